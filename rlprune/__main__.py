"""The stages from the shell: ``python -m rlprune baseline digits_vgg11``; needs neither Jupyter nor DVC."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from rlprune.errors import InputError

STAGES = {
    "prepare": "fetch a dataset and record its content and splits",
    "baseline": "train a network",
    "search": "search for what to prune",
    "finetune": "fine-tune what the search left",
    "peers": "prune by other papers' methods and fine-tune",
    "study": "measure what the search's own design rests on",
    "tables": "draw a suite's report from its result files",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rlprune", description="Run one stage of the pipeline.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage, what in STAGES.items():
        command = commands.add_parser(stage, help=what)
        command.add_argument("name", help=f"an entry of params.yaml that `{stage}` runs on")
    fetch = commands.add_parser("fetch", help="download a dataset from its official source, checksum verified")
    fetch.add_argument("name", help="digits, cifar10, cifar100 or svhn")
    show = commands.add_parser("show", help="print a suite's results table")
    show.add_argument("name", help="a suite of params.yaml")
    commands.add_parser("check", help="check all of params.yaml")
    given = parser.parse_args(arguments)
    try:
        if given.command == "fetch":
            sources = importlib.import_module("rlprune.sources")
            print(sources.fetch(given.name) or "digits comes with scikit-learn")
        elif given.command == "show":
            print(importlib.import_module("rlprune.stages.tables").show(given.name))
        elif given.command == "check":
            print(importlib.import_module("rlprune.stages.check").run())
        else:
            importlib.import_module(f"rlprune.stages.{given.command}").run(given.name)
    except InputError as error:
        print(f"rlprune: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
