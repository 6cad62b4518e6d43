"""Stage search: every method of an experiment decides which filters stay."""

import hashlib
import inspect
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

import rlprune
from rlprune import costs
from rlprune.costs import Budget
from rlprune.data import Dataset
from rlprune.env import ACTIONS
from rlprune.errors import InputError, one_of
from rlprune.files import weights_hash
from rlprune.peers.blind import evolution, random
from rlprune.peers.paper import paper_coarse, paper_fine
from rlprune.peers.ranked import batchnorm, magnitude, taylor
from rlprune.peers.uniform import uniform
from rlprune.result import PruningResult, load
from rlprune.search import prune
from rlprune.stages.baseline import trained
from rlprune.stages.common import Project, budgets, described, project, schedule
from rlprune.stages.jobs import side_by_side
from rlprune.stages.prepare import dataset, dataset_once
from rlprune.stages.record import fingerprint, write_results
from rlprune.stages.values import AGENTS, check_arguments
from rlprune.training import fillable

Method = Callable[..., PruningResult]
# what an agent is compared with here; the peers have a stage of their own, so that an edit of one leaves this one's
# results as they are
REFERENCES: dict[str, Method] = {
    method.__name__: method
    for method in (random, evolution, uniform, magnitude, batchnorm, taylor, paper_coarse, paper_fine)
}
# what every method takes, and what the stage itself sees to
SHARED = {"criterion", "evaluation", "minimum", "multiple", "exclude"}
GIVEN = {"network", "example_input", "budgets", "data", "seed", "action"}
GIVEN |= {"checkpoint", "shared", "progress", "options"}


def settings(here: Project, name: str, others: Mapping[str, Method] = REFERENCES) -> dict[str, Any]:
    """An experiment's search settings: the suite's, with the entry's own changes.

    Under ``options`` they may hold further arguments by method, the entry's added to the suite's.
    """
    entry = here.entry("experiments", name)
    suite, own = here.entry("suites", entry["suite"])["search"], entry.get("search", {})
    for part in (suite, own):
        for key in part:
            one_of("search parameter", key, sorted({*SHARED, *AGENTS, "episodes", "options"}))
        check_arguments(part, f"experiment {name!r}")
    chosen = {**suite, **own}
    if "options" in chosen:
        both = suite.get("options", {}), own.get("options", {})
        chosen["options"] = {
            method: {**(both[0].get(method) or {}), **(both[1].get(method) or {})} for method in both[0] | both[1]
        }
    for method in [*entry["methods"], *chosen.get("options", {})]:
        one_of("method", method, [*ACTIONS, *others])
    for method, given in chosen.get("options", {}).items():
        takes = set(inspect.signature(others.get(method, prune)).parameters)
        takes = (takes | SHARED if "options" in takes else takes) - GIVEN
        for key in given:
            one_of(f"option of {method}", key, sorted(takes))
    return chosen


def run(name: str, root: str | Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Search with every method and seed of an experiment; write networks, metrics.json and history.csv.

    A stage that was killed goes on with the search that it was at; an agent's goes on from its last update.
    ``$RLPRUNE_JOBS`` searches run side by side.

    Returns:
        the metrics written.
    """
    if name in (project(root).params.get("comparisons") or {}):
        raise InputError(f"{name!r} is among the comparisons in params.yaml: run the stage peers, which searches, too.")
    metrics, checkpoints = searched(name, root, progress, REFERENCES)
    tidy(checkpoints)
    return metrics


def searched(
    name: str, root: str | Path | None, progress: bool, others: Mapping[str, Method]
) -> tuple[dict[str, Any], list[Path]]:
    """As `run`, with ``others`` as the methods beside the agents, by name.

    Returns:
        the metrics written, and the checkpoints, from which another call finds all searches finished.
    """
    here = project(root)
    entry, chosen, limits = here.entry("experiments", name), settings(here, name, others), budgets(here, name)
    runs = [(seed, method) for seed in entry["seeds"] for method in entry["methods"]]
    data = dataset(here, here.entry("baselines", entry["baseline"])["dataset"])  # fetched once, not by each process
    fillable(data, schedule(here, name))  # of the stage that follows: better now than after hours
    tasks = [(name, here.root, method, seed, others) for seed, method in runs]
    beside = side_by_side(_ahead, tasks, entry["budgets"])
    outcome: dict[str, dict[str, Any]] = {method: {} for method in entry["methods"]}
    histories, checkpoints, begun = [], [], {}
    for seed in entry["seeds"]:
        network = trained(here, entry["baseline"], of_baseline := here.baseline_seed(name, seed), data)
        begun[str(of_baseline)] = weights_hash(network)
        for method in entry["methods"]:
            finished = _finished(here, name, method, seed, others, network, data, progress)
            result = load(finished)
            result.network.to(data.device)
            result.save(here.weights(entry["suite"], name, "search") / method / str(seed))
            outcome[method][str(seed)] = {
                "reward": result.reward,
                "evaluations": result.evaluations,
                "seconds": result.seconds,
                "widths": result.widths,
                "costs": _costs(result, network, data),
                **_extras(result, network),
            }
            histories.append(result.history.assign(method=method, seed=seed))
            checkpoints += [finished.with_name(f"{finished.name}.pt"), finished]
    head = {
        "network": here.entry("baselines", entry["baseline"])["network"],
        "baseline": entry["baseline"],
        "baseline_weights": begun,
        "budgets": described(limits),
        "search": chosen,
    }
    folder = here.results(entry["suite"], name, "search")
    history = pd.concat(histories)
    lacking = [column for column in ("episode", "steps", "reward", "best") if column not in history]
    history[lacking] = float("nan")  # where no method tries candidates one after the other
    metrics = write_results(folder, data, head, {"methods": outcome}, history, beside)
    return metrics, checkpoints


def tidy(checkpoints: list[Path]) -> None:
    """Remove what is needed no more."""
    for path in checkpoints:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def of_this_code(folder: Path) -> Path:
    """The folder in ``folder`` for what several runs share, as this code makes it; what other code made there goes.

    An unfinished run's checkpoint goes when the run ends. What is shared stays, and would outlive an edit of the code.
    """
    package = Path(rlprune.__file__).parent
    code = fingerprint([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(package.rglob("*.py"))])
    for other in folder.glob("*"):
        if other.name != code:
            shutil.rmtree(other, ignore_errors=True)
    return folder / code


def _ahead(name: str, root: Path, method: str, seed: int, others: Mapping[str, Method]) -> None:
    """One search in a process of its own."""
    here = project(root)
    entry = here.entry("experiments", name)
    data = dataset_once(root, here.entry("baselines", entry["baseline"])["dataset"])
    network = trained(here, entry["baseline"], here.baseline_seed(name, seed), data)
    _finished(here, name, method, seed, others, network, data, progress=False)


def _finished(
    here: Project,
    name: str,
    method: str,
    seed: int,
    others: Mapping[str, Method],
    network: nn.Module,
    data: Dataset,
    progress: bool,
) -> Path:
    """The folder among the checkpoints with the result of one search, which is run unless it is there."""
    chosen, limits = settings(here, name, others), budgets(here, name)
    which = fingerprint(weights_hash(network), data.describe(), here.entry("experiments", name)["budgets"], chosen)
    path = here.checkpoint(name, "search", method, seed, which)
    finished = path.with_suffix("")
    if not finished.exists():
        result = _search(method, others, network, data, limits, chosen, seed, path, progress)
        result.save(partial := finished.with_name(f"{finished.name}.{os.getpid()}.partial"))  # a name may hold dots
        try:
            partial.rename(finished)
        except OSError:  # another process has just finished the same search
            shutil.rmtree(partial)
    return finished


def _search(
    method: str,
    others: Mapping[str, Method],
    network: nn.Module,
    data: Dataset,
    limits: list[Budget],
    chosen: dict[str, Any],
    seed: int,
    checkpoint: Path,
    progress: bool,
) -> PruningResult:
    how = {key: value for key, value in chosen.items() if key != "options"}
    more = {**chosen.get("options", {}).get(method, {}), "seed": seed}
    if method in ACTIONS:
        how |= {"action": method, "checkpoint": checkpoint, "progress": progress}
        return prune(network, data.example, limits, data, **{**how, **more})
    function = others[method]
    parameters = set(inspect.signature(function).parameters)
    # an agent's number of evaluations is that of all searches; one that trains meanwhile has options of its own
    how = {key: value for key, value in how.items() if key in SHARED | (parameters & {"episodes", "start"})}
    how |= {key: value for key, value in {"progress": progress, "checkpoint": checkpoint}.items() if key in parameters}
    if "shared" in parameters:
        how["shared"] = of_this_code(checkpoint.parent / "shared")
    return function(network, data.example, limits, data, **{**how, **more})


def _costs(result: PruningResult, network: nn.Module, data: Dataset) -> dict[str, dict[str, float]]:
    """Parameters and MACs for the table, whatever the budgets were, and the budgets' own costs."""
    report = {}
    for cost in (costs.parameters, costs.macs):
        value, unpruned = cost(result.network, data.example), cost(network, data.example)
        report[cost.__name__] = {"value": value, "unpruned": unpruned, "share": value / unpruned}
    return {**report, **result.costs}


def _extras(result: PruningResult, network: nn.Module) -> dict[str, Any]:
    """What only some methods have to say: sizes of kernels that they changed, MACs of a training from scratch."""
    kernels, before = (
        Counter("×".join(map(str, m.kernel_size)) for m in n.modules() if isinstance(m, nn.modules.conv._ConvNd))
        for n in (result.network, network)
    )
    extras: dict[str, Any] = {"kernels": dict(sorted(kernels.items()))} if kernels != before else {}
    if "dense_training_macs" in result.history:
        last = result.history.iloc[-1]
        extras["training_macs"] = {"value": float(last["training_macs"]), "dense": float(last["dense_training_macs"])}
        extras["faded"] = int(last["faded"])
    return extras
