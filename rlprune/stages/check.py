"""Check params.yaml as a whole before any work starts."""

from pathlib import Path

from rlprune.errors import InputError, one_of
from rlprune.networks import check_name
from rlprune.sources import NAMES as DATASETS
from rlprune.stages import baseline, finetune, peers, search, study
from rlprune.stages.common import budgets, project


def run(root: str | Path | None = None) -> str:
    """Check every entry; return a sentence that says how many there are.

    Raises:
        InputError: the first fault found.
    """
    here = project(root)
    for name in here.params.get("suites") or {}:
        here.entry("suites", name)
        here.parts(name)
    for name in here.params.get("datasets") or {}:
        one_of("dataset", name, DATASETS)
        here.entry("datasets", name)
    baselines, experiments = here.params.get("baselines") or {}, here.experiments
    if twice := sorted(set(here.params.get("experiments") or {}) & set(here.params.get("comparisons") or {})):
        raise InputError(f"{twice[0]!r} in params.yaml is among experiments and comparisons: rename one of them.")
    for name in baselines:
        entry = here.entry("baselines", name)
        check_name(entry["network"])
        here.entry("datasets", entry["dataset"])
        baseline.schedule(here, name)
    for name in experiments:
        entry = here.entry("experiments", name)
        seeds = here.entry("baselines", entry["baseline"])["seeds"]
        wanted = [here.baseline_seed(name, seed) for seed in entry["seeds"]]
        if not set(wanted) <= set(seeds):
            raise InputError(
                f"{here.where('experiments', name)} wants the seeds {wanted} of baseline "
                f"{entry['baseline']}, which is trained with {seeds} only: add the missing ones there, or name one as "
                "baseline_seed."
            )
        search.settings(
            here, name, peers.METHODS if name in (here.params.get("comparisons") or {}) else search.REFERENCES
        )
        budgets(here, name)
        finetune.schedule(here, name)
    for name in here.params.get("studies") or {}:
        here.entry("baselines", study.settings(here, name)["baseline"])
    return f"params.yaml: {len(baselines)} baselines and {len(experiments)} experiments are in order."
