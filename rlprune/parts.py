"""Parts of an experiment, run one by one, put together as if they had been one run.

All methods and seeds of a comparison take hours. An entry of params.yaml that is ``part_of`` another adds its methods
and seeds to that one's table and figures; either can be run, and run again, without the other.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from rlprune.errors import InputError
from rlprune.tables import Results, Stage

ALIKE = (
    "dataset",
    "sha256",
    "split_seed",
    "network",
    "baseline",
    "baseline_weights",
    "budgets",
    "search",
    "training",
)


def joined(results: Results, parts: Mapping[str, str]) -> Results:
    """The results with every part taken into its whole, which need not have been run itself.

    Args:
        results: of wholes and parts.
        parts: name of a part → name of its whole.

    Raises:
        InputError: two of them differ in what all parts of an experiment share, or hold the same method and seed.
    """
    return replace(results, searches=_gathered(results.searches, parts), finetunes=_gathered(results.finetunes, parts))


def _gathered(stages: Mapping[str, Stage], parts: Mapping[str, str]) -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for name, stage in stages.items():
        whole = parts.get(name, name)
        found[whole] = _both(found[whole], stage) if whole in found else replace(stage, parts=(stage,))
    return found


def _both(first: Stage, second: Stage) -> Stage:
    """Two parts as one stage."""
    for key in ALIKE:
        if not _agree(*({key: stage.metrics[key]} if key in stage.metrics else {} for stage in (first, second))):
            raise InputError(
                f"{second.folder} and {first.folder} are parts of one experiment and differ in {key!r}: run the older "
                "one again, or take its part_of out of params.yaml."
            )
    _check_baselines(first, second)
    methods = {method: dict(runs) for method, runs in first.metrics["methods"].items()}
    for method, runs in second.metrics["methods"].items():
        if twice := sorted(set(runs) & set(methods.get(method, {}))):
            raise InputError(
                f"{second.folder} and {first.folder} are parts of one experiment and both hold {method} with seed "
                f"{twice[0]}: take it out of one of them in params.yaml."
            )
        methods.setdefault(method, {}).update(runs)
    # a history without rows has columns of no type, which would take the others' away
    histories = [part.history for part in (first, second) if len(part.history)] or [first.history]
    history = pd.concat(histories, ignore_index=True)
    metrics = {**first.metrics, "methods": methods}
    if weights := {**second.metrics.get("baseline_weights", {}), **first.metrics.get("baseline_weights", {})}:
        metrics["baseline_weights"] = weights
    return Stage(metrics, history, first.folder, (*first.parts, second))


def _check_baselines(first: Stage, second: Stage) -> None:
    """Raise `InputError` where baselines differ in accuracy: older results do not have their weights' hash."""
    before: dict[str, set[float]] = {}
    for stage in (first, second):
        for runs in stage.metrics["methods"].values():
            for seed, run in runs.items():
                before.setdefault(seed, set()).update({run["baseline_accuracy"]} if "baseline_accuracy" in run else ())
    if differ := [seed for seed, found in before.items() if len(found) > 1]:
        raise InputError(
            f"{second.folder} and {first.folder} are parts of one experiment and began with baselines of different "
            f"accuracy (seed {differ[0]}): run the older one again, or take its part_of out of params.yaml."
        )


def _agree(first: Any, second: Any) -> bool:
    """Whether two settings are the same, as far as both name them: an older result lacks what came later."""
    if isinstance(first, dict) and isinstance(second, dict):
        return all(_agree(first[key], second[key]) for key in set(first) & set(second))
    return first == second
