"""The stages of the pipeline as plain functions, one module each: ``rlprune.stages.search.run(name)``.

Each reads params.yaml and the files of the stages before it, and writes its own;
neither Jupyter, papermill nor DVC is needed.
"""
