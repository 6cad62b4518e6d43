"""Stage study: measurements that the search's own design rests on."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from torch.nn import functional as F

from rlprune.candidates import Candidates
from rlprune.costs import COSTS, Budget
from rlprune.data import Dataset
from rlprune.errors import InputError, one_of
from rlprune.evaluate import Evaluator, outputs
from rlprune.files import load_weights, read_json, save_weights, weights_hash, write_json
from rlprune.forward import accuracy, suited
from rlprune.front import LOOKS, pareto
from rlprune.groups import trace
from rlprune.lessons import Lessons
from rlprune.networks import build
from rlprune.peers.blind import LEAST
from rlprune.peers.prunetrain import prunetrain
from rlprune.result import load
from rlprune.search import EPISODES_PER_UPDATE, prune
from rlprune.stages.baseline import trained
from rlprune.stages.common import Project, project
from rlprune.stages.jobs import side_by_side
from rlprune.stages.prepare import dataset_once
from rlprune.stages.record import fingerprint, write_results
from rlprune.stages.values import check_study
from rlprune.training import Training, fit

Row = dict[str, Any]
CAPACITY = "MACs kept, not evaluated"
DENSE = "dense"


def run(name: str, root: str | Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Make the measurements of an entry of ``studies``; write metrics.json and history.csv, a row per measurement.

    Kinds of study:

    - reward: ``candidates`` random networks within budget, each judged by every one of ``rewards`` (options of
      `rlprune.evaluate.Evaluator`, the default's first) and then fine-tuned by ``training``. Does the reward
      foretell the accuracy, and at what price in seconds? With ``around``, a width per group, none of the widths is
      less than half or more than twice that before the budget scales them: how is it where a search ends?
    - front: one search for all ``points`` of a cost with ``episodes`` evaluations in all, against a search for each
      of ``budgets`` with its part of those.
    - transfer: a search that begins with what an agent learned in as long a search on the baseline ``begin``, against a
      fresh one.
    - ablation: searches with ``changes`` to the suite's criterion and evaluation or to other arguments of
      `rlprune.prune`, the first of them the default, by name. What is each part of the search worth?
    - schedule: the network that the layer-wise agent left in the experiment ``begin``, fine-tuned by ``training`` with
      ``changes``, the first of them the default. What is each part of the schedule worth on validation images?
    - prunetrain: PruneTrain with ``changes`` to its arguments, by name, beside dense training of the same length, both
      by ``training`` (a change may have other values of it, but for the epochs) and from scratch: of the baseline only
      the architecture is used. What does it save, and at what price? A budget of 1 leaves all to the lasso.

    A study that was killed goes on in the middle of the measurement that it was at; ``$RLPRUNE_JOBS`` are made side
    by side.

    Returns:
        the metrics written.
    """
    here = project(root)
    entry = settings(here, name)
    tasks = list(KINDS[entry["kind"]][0](entry))
    dataset_once.cache_clear()  # the files may have changed since another run in this process
    data = dataset_once(here.root, here.entry("baselines", entry["baseline"])["dataset"])
    # side by side the networks would each ask the teacher what all of them are to hear
    side_by_side(_teach, [(name, here.root, *lesson) for lesson in _lessons(entry)])
    beside = side_by_side(_measured, [(name, here.root, task, False) for task in tasks], entry["budgets"])
    found = [_measured(name, here.root, task, progress) for task in tasks]
    head = {"network": here.entry("baselines", entry["baseline"])["network"], "study": entry}
    rows = pd.DataFrame([row for _, rows in found for row in rows])
    metrics = write_results(here.results("studies", name), data, head, {}, rows, beside)
    for path, _ in found:
        for left in path.parent.glob(f"{path.stem}.*"):
            left.unlink()
    return metrics


def settings(here: Project, name: str) -> Row:
    """An entry of ``studies``, checked."""
    entry = here.entry("studies", name)
    one_of("kind of study", entry["kind"], KINDS)
    check_study(here, name, entry, _evaluation(here, entry))
    if entry["kind"] == "prunetrain" and DENSE in entry["changes"]:
        raise InputError(f"A change of studies.{name} in params.yaml is called {DENSE!r}, as what it is set beside is.")
    if entry["kind"] == "front":
        list(_searches(entry))
        if _learning(entry) < 1:
            raise InputError(
                f"The {entry['episodes']} episodes of studies.{name} in params.yaml leave none to learn from: "
                f"{LOOKS} go to each of the {len(entry['points'])} points, and an update of the agent takes "
                f"{EPISODES_PER_UPDATE}."
            )
    return entry


def _measured(name: str, root: Path, task: Row, progress: bool) -> tuple[Path, list[Row]]:
    """The rows of one measurement, which is made unless its checkpoint is there."""
    here = project(root)
    entry = here.entry("studies", name)
    data = dataset_once(root, here.entry("baselines", entry["baseline"])["dataset"])
    if entry["kind"] == "prunetrain":
        network = build(here.entry("baselines", entry["baseline"])["network"], data.classes).to(data.device)
    else:
        network = trained(here, entry["baseline"], entry.get("baseline_seed", 0), data)
    begun = weights_hash(_first(here, entry, data)) if "begin" in entry else None
    own, judged = _own(entry, task), _evaluation(here, entry)
    which = fingerprint(weights_hash(network), begun, data.describe(), own, judged, task)
    state = here.checkpoint(name, "study", which)
    path = state.with_suffix(".json")
    if not path.exists():
        rows = KINDS[entry["kind"]][1](here, entry, task, network, data, state, progress)
        write_json(path, [{**task, **row} for row in rows])
    return path, read_json(path)


def _own(entry: Row, task: Row) -> Row:
    """What a measurement depends on of its entry: not on which others there are, so that more leave it finished."""
    lists = {"changes", "candidates"} | ({"seeds"} if "seed" in task else set())
    changes = {value: entry["changes"][value] for value in task.values() if value in entry.get("changes", ())}
    return {**{key: value for key, value in entry.items() if key not in lists}, **changes}


def _evaluation(here: Project, entry: Row) -> Row:
    """The criterion and the evaluator's options of the entry's suite."""
    suite = here.entry("suites", entry["suite"])["search"]
    return {key: suite[key] for key in ("criterion", "evaluation") if key in suite}


def _candidates(entry: Row) -> Iterator[Row]:
    yield from ({"candidate": number} for number in range(entry["candidates"]))


def _reward(
    here: Project, entry: Row, task: Row, network: nn.Module, data: Dataset, state: Path, progress: bool
) -> list[Row]:
    """One random network: its reward by every option, the seconds that each took, its accuracy after training."""
    groups = trace(network, data.example)
    given = _evaluation(here, entry)
    evaluators = {
        label: Evaluator(network, groups, data, **{**given.get("evaluation", {}), **changes})
        for label, changes in entry["rewards"].items()
    }
    sample = next(iter(evaluators.values())).sample
    candidates = Candidates(network, groups, data.example, _budgets(entry), given.get("criterion", "magnitude"), sample)
    draw = np.random.default_rng([entry["seeds"][0], task["candidate"]])
    around = entry.get("around")
    if around is None:
        shares = draw.uniform(LEAST, 1, len(groups))
    elif len(around) == len(groups):
        shares = np.array(around) / candidates.sizes * 2 ** draw.uniform(-1, 1, len(groups))
    else:
        raise InputError(f"'around' of a study lists {len(around)} widths, and the network has {len(groups)} groups.")
    widths = candidates.fit(shares, "scale")
    masks = candidates.masks(widths)
    whole = candidates.predictor.macs(candidates.sizes.tolist())
    # what can be had for nothing stands beside the rewards
    row: Row = {CAPACITY: 100 * candidates.predictor.macs(widths) / whole, f"{CAPACITY} seconds": 0.0}
    row["widths"] = " ".join(map(str, widths))
    for label, evaluator in evaluators.items():
        start = time.perf_counter()
        row[label] = evaluator(masks)
        row[f"{label} seconds"] = time.perf_counter() - start
    slim = next(iter(evaluators.values())).candidate(masks)
    # what training begins with is the same after a stop, though another number of threads fits it otherwise
    begun = state.with_suffix(".slim.pt")
    if begun.exists():
        load_weights(slim, begun)
    else:
        save_weights(slim, begun)
    label = f"candidate {task['candidate']}" if progress else None
    history = fit(slim, data, Training.of(entry["training"]), entry["seeds"][0], checkpoint=state, progress=label)
    return [{**row, "loss": history["loss"].iloc[-1], "accuracy": accuracy(slim, data, data.validation)}]


def _searches(entry: Row) -> Iterator[Row]:
    (shares,) = entry["budgets"].values()
    if entry["episodes"] % len(shares):
        raise InputError(f"The {entry['episodes']} episodes of a front must divide by its {len(shares)} budgets.")
    for seed in entry["seeds"]:
        yield {"search": "front", "seed": seed}
        yield from ({"search": "separate", "seed": seed, "budget": 100 * share} for share in shares)


def _learning(entry: Row) -> int:
    """Episodes in which a front's agent learns: whole updates, of what the last evaluations at each point leave."""
    return (entry["episodes"] - LOOKS * len(entry["points"])) // EPISODES_PER_UPDATE * EPISODES_PER_UPDATE


def _front(
    here: Project, entry: Row, task: Row, network: nn.Module, data: Dataset, state: Path, progress: bool
) -> list[Row]:
    """The networks that one search returns: budget and cost in percent of the unpruned network's, reward; the search's
    evaluations and seconds.
    """  # noqa: D205
    ((cost, shares),) = entry["budgets"].items()
    how = {"seed": task["seed"], "checkpoint": state, "progress": progress, **_evaluation(here, entry)}
    if task["search"] == "front":
        front = pareto(network, data.example, cost, data, _learning(entry), entry["points"], **how)
        seconds = next(iter(front.results.values())).seconds
        return front.table.assign(evaluations=len(front.history), seconds=seconds).to_dict("records")
    episodes = entry["episodes"] // len(shares)
    result = prune(network, data.example, [Budget(cost, task["budget"] / 100)], data, episodes, **how)
    percent = 100 * next(iter(result.costs.values()))["share"]
    return [{"cost": percent, "reward": result.reward, "evaluations": result.evaluations, "seconds": result.seconds}]


def _beginnings(entry: Row) -> Iterator[Row]:
    for seed in entry["seeds"]:
        yield {"search": "fresh", "seed": seed}
        yield {"search": "continued", "seed": seed}


def _transfer(
    here: Project, entry: Row, task: Row, network: nn.Module, data: Dataset, state: Path, progress: bool
) -> list[Row]:
    begin = None
    if task["search"] == "continued":
        how = {"seed": task["seed"], "progress": progress, **_evaluation(here, entry)}
        learned = state.with_suffix(".begin.pt")
        first = _first(here, entry, data)
        begin = prune(first, data.example, _budgets(entry), data, entry["episodes"], checkpoint=learned, **how)
    return _search(here, entry, task, network, data, state, progress, begin=begin)


def _first(here: Project, entry: Row, data: Dataset) -> nn.Module:
    """What a study begins with: the baseline that an agent learns on first, or the network that a schedule trains."""
    if entry["kind"] == "transfer":
        return trained(here, entry["begin"], entry.get("baseline_seed", 0), data)
    return _left(here, entry).to(data.device)


def _left(here: Project, entry: Row) -> nn.Module:
    """The network that the layer-wise agent left, with the first seed, in the experiment of a schedule."""
    first = here.entry("experiments", entry["begin"])
    place = here.weights(first["suite"], entry["begin"], "search", "layerwise")
    return load(place / str(first["seeds"][0])).network


def _changes(what: str, entry: Row) -> Iterator[Row]:
    """Every change, made to a ``what``, with every seed."""
    for seed in entry["seeds"]:
        yield from ({what: label, "seed": seed} for label in entry["changes"])


def _changed(
    here: Project, entry: Row, task: Row, network: nn.Module, data: Dataset, state: Path, progress: bool
) -> list[Row]:
    return _search(here, entry, task, network, data, state, progress, **entry["changes"][task["search"]])


def _search(
    here: Project, entry: Row, task: Row, network: nn.Module, data: Dataset, state: Path, progress: bool, **changes: Any
) -> list[Row]:
    """A row per evaluation: reward, the best so far, and the seconds of the whole search."""
    how = {"seed": task["seed"], "checkpoint": state, "progress": progress, **_evaluation(here, entry), **changes}
    result = prune(network, data.example, _budgets(entry), data, entry["episodes"], **how)
    return result.history[["episode", "reward", "best"]].assign(seconds=result.seconds).to_dict("records")


def _schedule(
    here: Project, entry: Row, task: Row, network: nn.Module, data: Dataset, state: Path, progress: bool
) -> list[Row]:
    """One fine-tuning: its epochs, accuracy and cross-entropy (nats) on validation images, seconds."""
    slim = _first(here, entry, data)
    training = Training.of({**entry["training"], **entry["changes"][task["schedule"]]})
    label = f"{task['schedule']}, seed {task['seed']}" if progress else None
    history = fit(slim, data, training, task["seed"], network, state, progress=label, lessons=here.lessons)
    logits, labels = outputs(slim, data.normalise(data.validation.images)), data.validation.labels
    row = {"epochs": training.epochs, "accuracy": accuracy(slim, data, data.validation)}
    row["cross_entropy"] = F.cross_entropy(logits, labels).item()
    return [{**row, "seconds": history["seconds"].iloc[-1]}]


def _lessons(entry: Row) -> list[tuple[int, int, int]]:
    """Batch size, seed and epoch of all that the trainings of a schedule hear from a teacher, each once."""
    if entry["kind"] != "schedule":
        return []
    trainings = [Training.of({**entry["training"], **change}) for change in entry["changes"].values()]
    epochs = {(of.batch_size, epoch) for of in trainings if of.distillation > 0 for epoch in range(1, of.epochs + 1)}
    return [(batch_size, seed, epoch) for seed in entry["seeds"] for batch_size, epoch in sorted(epochs)]


def _teach(name: str, root: Path, batch_size: int, seed: int, epoch: int) -> None:
    """What the unpruned network says in one epoch, which every training then finds."""
    here = project(root)
    entry = here.entry("studies", name)
    data = dataset_once(root, here.entry("baselines", entry["baseline"])["dataset"])
    teacher = trained(here, entry["baseline"], entry.get("baseline_seed", 0), data)
    Lessons(teacher, suited(teacher, data), batch_size, seed, here.lessons).prepare(epoch)


def _trainings(entry: Row) -> Iterator[Row]:
    for seed in entry["seeds"]:
        yield from ({"training": label, "seed": seed} for label in (DENSE, *entry["changes"]))


def _trained(
    here: Project, entry: Row, task: Row, network: nn.Module, data: Dataset, state: Path, progress: bool
) -> list[Row]:
    """A row per epoch: accuracy, size at its end, and what was spent so far, in percent of the dense network's."""
    change = {"training": {}, **entry["changes"].get(task["training"], {})}
    training, seed = Training.of({**entry["training"], **change.pop("training")}), task["seed"]
    label = f"{task['training']}, seed {seed}" if progress else None
    if task["training"] == DENSE:
        kind = here.entry("baselines", entry["baseline"])["network"]
        history = fit(dense := build(kind, data.classes, seed), data, training, seed, checkpoint=state, progress=label)
        # as PruneTrain's network is in the end
        Evaluator(dense, [], data, **_evaluation(here, entry).get("evaluation", {})).recalibrate(dense)
        history.loc[history.index[-1], "validation_accuracy"] = accuracy(dense, data, data.validation)
        spent = 100 * history["epoch"] / training.epochs
        history = history.assign(parameters=100.0, macs=100.0, training_macs=spent)
    else:
        how = {"seed": seed, "checkpoint": state, "progress": progress, **_evaluation(here, entry)}
        how |= change
        result = prunetrain(network, data.example, _budgets(entry), data, training, **how)
        history = result.history
        history["seconds"] = history["seconds"].cumsum()
        history["training_macs"] *= 100 / history["dense_training_macs"].iloc[-1]
        for cost in ("parameters", "macs"):
            history[cost] *= 100 / COSTS[cost](network, data.example)
    history = history.rename(columns={"validation_accuracy": "accuracy"})
    return history[["epoch", "accuracy", "parameters", "macs", "training_macs", "seconds"]].to_dict("records")


def _budgets(entry: Row) -> list[Budget]:
    return [Budget(cost, share) for cost, share in entry["budgets"].items()]


KINDS = {
    "reward": (_candidates, _reward),
    "front": (_searches, _front),
    "transfer": (_beginnings, _transfer),
    "ablation": (partial(_changes, "search"), _changed),
    "schedule": (partial(_changes, "schedule"), _schedule),
    "prunetrain": (_trainings, _trained),
}
