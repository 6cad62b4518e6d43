"""Stage search: every method of an experiment decides which filters stay."""

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from rlprune import costs, peers
from rlprune.costs import Budget
from rlprune.data import Dataset
from rlprune.env import ACTIONS
from rlprune.errors import one_of
from rlprune.files import weights_hash
from rlprune.result import PruningResult, load
from rlprune.search import prune
from rlprune.stages.baseline import trained
from rlprune.stages.common import Project, budgets, described, project
from rlprune.stages.jobs import side_by_side
from rlprune.stages.prepare import dataset
from rlprune.stages.record import fingerprint, write_results

PEERS: dict[str, Callable[..., PruningResult]] = {name: getattr(peers, name) for name in peers.__all__}
METHODS = [*ACTIONS, *PEERS]
# what every method takes; the rest is the agent's
SHARED = {"criterion", "evaluation", "minimum", "multiple", "exclude"}


def settings(here: Project, name: str) -> dict[str, Any]:
    """An experiment's search settings: the suite's, with the entry's own changes."""
    entry = here.entry("experiments", name)
    suite = here.entry("suites", entry["suite"])
    chosen = {**suite["search"], **entry.get("search", {})}
    known = SHARED | {"episodes", "fit_budget", "agent", "imagined", "paper"}
    for key in chosen:
        one_of("search parameter", key, sorted(known))
    for key in chosen.get("paper", {}):  # of the published searches alone: their length, the images that judge
        one_of("parameter of the published search", key, ["episodes", "images"])
    for method in entry["methods"]:
        one_of("method", method, METHODS)
    return chosen


def run(name: str, root: str | Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Search with every method and seed of an experiment; write networks, metrics.json and history.csv.

    A stage that was killed goes on with the search that it was at; an agent's goes on from its last update.
    ``$RLPRUNE_JOBS`` searches run side by side.

    Returns:
        the metrics written.
    """
    here = project(root)
    entry, chosen, limits = here.entry("experiments", name), settings(here, name), budgets(here, name)
    side_by_side(_ahead, [(name, here.root, method, seed) for seed in entry["seeds"] for method in entry["methods"]])
    data = dataset(here, here.entry("baselines", entry["baseline"])["dataset"])
    outcome: dict[str, dict[str, Any]] = {method: {} for method in entry["methods"]}
    histories, checkpoints = [], []
    for seed in entry["seeds"]:
        network = trained(here, entry["baseline"], here.baseline_seed(name, seed), data)
        for method in entry["methods"]:
            finished = _finished(here, name, method, seed, network, data, progress)
            result = load(finished)
            result.save(here.weights(entry["suite"], name, "search") / method / str(seed))
            outcome[method][str(seed)] = {
                "reward": result.reward,
                "evaluations": result.evaluations,
                "seconds": result.seconds,
                "widths": result.widths,
                "costs": _costs(result, network, data),
            }
            histories.append(result.history.assign(method=method, seed=seed))
            checkpoints += [finished.with_suffix(".pt"), finished]
    head = {
        "network": here.entry("baselines", entry["baseline"])["network"],
        "baseline": entry["baseline"],
        "budgets": described(limits),
        "search": chosen,
    }
    folder = here.results(entry["suite"], name, "search")
    metrics = write_results(folder, data, head, {"methods": outcome}, pd.concat(histories))
    for path in checkpoints:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return metrics


def _ahead(name: str, root: Path, method: str, seed: int) -> None:
    """One search in a process of its own."""
    here = project(root)
    entry = here.entry("experiments", name)
    data = dataset(here, here.entry("baselines", entry["baseline"])["dataset"])
    network = trained(here, entry["baseline"], here.baseline_seed(name, seed), data)
    _finished(here, name, method, seed, network, data, progress=False)


def _finished(
    here: Project, name: str, method: str, seed: int, network: nn.Module, data: Dataset, progress: bool
) -> Path:
    """The folder among the checkpoints with the result of one search, which is run unless it is there."""
    chosen, limits = settings(here, name), budgets(here, name)
    which = fingerprint(weights_hash(network), data.describe(), here.entry("experiments", name)["budgets"], chosen)
    path = here.checkpoint(name, "search", method, seed, which)
    finished = path.with_suffix("")
    if not finished.exists():
        result = _search(method, network, data, limits, chosen, seed, path, progress)
        result.save(partial := finished.with_suffix(".partial"))
        partial.rename(finished)
    return finished


def _search(
    method: str,
    network: nn.Module,
    data: Dataset,
    limits: list[Budget],
    chosen: dict[str, Any],
    seed: int,
    checkpoint: Path,
    progress: bool,
) -> PruningResult:
    if method in PEERS:
        takes = SHARED | (set(inspect.signature(PEERS[method]).parameters) & {"episodes"})
        shared = {key: value for key, value in chosen.items() if key in takes}
        if method.startswith("paper_"):
            shared |= chosen.get("paper", {})
        if "episodes" in takes:
            shared["progress"] = progress
        return PEERS[method](network, data.example, limits, data, seed=seed, **shared)
    own = {key: value for key, value in chosen.items() if key != "paper"}
    how = {"action": method, "seed": seed, "checkpoint": checkpoint, "progress": progress}
    return prune(network, data.example, limits, data, **how, **own)


def _costs(result: PruningResult, network: nn.Module, data: Dataset) -> dict[str, dict[str, float]]:
    """Parameters and MACs for the table, whatever the budgets were, and the budgets' own costs."""
    report = {}
    for cost in (costs.parameters, costs.macs):
        value, unpruned = cost(result.network, data.example), cost(network, data.example)
        report[cost.__name__] = {"value": value, "unpruned": unpruned, "share": value / unpruned}
    return {**report, **result.costs}
