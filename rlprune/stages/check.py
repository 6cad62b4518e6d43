"""Check params.yaml as a whole before any work starts."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from rlprune.errors import InputError, one_of
from rlprune.networks import check_name
from rlprune.sources import NAMES as DATASETS
from rlprune.stages import baseline, peers, search, study
from rlprune.stages.common import REQUIRED, Project, budgets, project, schedule
from rlprune.stages.tables import PAPER, STUDIES


def run(root: str | Path | None = None) -> str:
    """Check every entry; return a sentence that says how many there are.

    Raises:
        InputError: the first fault found.
    """
    here = project(root)
    _check_names(here)
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
        with _naming(here.where("baselines", name)):
            entry = here.entry("baselines", name)
            check_name(entry["network"])
            here.entry("datasets", entry["dataset"])
            baseline.schedule(here, name)
    for name in experiments:
        with _naming(here.where("experiments", name)):
            _check_experiment(here, name)
    for name in here.params.get("studies") or {}:
        with _naming(here.where("studies", name)):
            here.entry("baselines", study.settings(here, name)["baseline"])
    return f"params.yaml: {len(baselines)} baselines and {len(experiments)} experiments are in order."


def _check_names(here: Project) -> None:
    """Entries give their names to stages of DVC and to folders, in which suites stand beside what is of none."""
    for group in (*REQUIRED, "comparisons"):
        for name in here.params.get(group) or {}:
            if not re.fullmatch(r"\w[\w.-]*", str(name), re.ASCII):
                raise InputError(
                    f"{group} in params.yaml has the name {name!r}: names are made of letters, digits, '_', '-' and "
                    "'.', and begin with a letter, a digit or '_'."
                )
    if taken := sorted({"baselines", "data", PAPER, STUDIES} & set(here.params.get("suites") or {})):
        raise InputError(f"suites.{taken[0]} in params.yaml would share a folder with other results: rename it.")


def _check_experiment(here: Project, name: str) -> None:
    entry = here.entry("experiments", name)
    seeds = here.entry("baselines", entry["baseline"])["seeds"]
    wanted = [here.baseline_seed(name, seed) for seed in entry["seeds"]]
    if not set(wanted) <= set(seeds):
        raise InputError(
            f"{here.where('experiments', name)} wants the seeds {wanted} of baseline {entry['baseline']}, which is "
            f"trained with {seeds} only: add the missing ones there, or name one as baseline_seed."
        )
    compared = name in (here.params.get("comparisons") or {})
    search.settings(here, name, peers.METHODS if compared else search.REFERENCES)
    budgets(here, name)
    schedule(here, name)


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Have a fault name the entry that it is in."""
    try:
        yield
    except InputError as error:
        if where in str(error):
            raise
        raise InputError(f"{where} in params.yaml: {error}") from error
