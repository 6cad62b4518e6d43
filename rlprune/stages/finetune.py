"""Stage finetune: the same training for the network of every method, then the test split, once."""

from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from rlprune.data import Dataset
from rlprune.files import save_weights, weights_hash
from rlprune.forward import accuracy, suited
from rlprune.lessons import Lessons
from rlprune.result import PruningResult, load
from rlprune.stages.baseline import trained
from rlprune.stages.common import Project, budgets, described, project, schedule
from rlprune.stages.jobs import side_by_side
from rlprune.stages.prepare import dataset, dataset_once
from rlprune.stages.record import fingerprint, write_results
from rlprune.training import fit


def run(name: str, root: str | Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Fine-tune what the search left, per method and seed; write networks, metrics.json and history.csv.

    A run that was killed goes on from its last finished epoch. ``$RLPRUNE_JOBS`` networks train side by side.

    Returns:
        the metrics written.
    """
    here = project(root)
    entry, training = here.entry("experiments", name), schedule(here, name)
    data = dataset(here, here.entry("baselines", entry["baseline"])["dataset"])  # fetched once, not by each process
    if training.distillation > 0:  # side by side the networks would each ask the teacher what all of them are to hear
        side_by_side(_teach, list(product([name], [here.root], entry["seeds"], range(1, training.epochs + 1))))
    beside = side_by_side(_ahead, list(product([name], [here.root], entry["methods"], entry["seeds"])))
    outcome: dict[str, dict[str, Any]] = {method: {} for method in entry["methods"]}
    histories, checkpoints, begun = [], [], {}
    for seed in entry["seeds"]:
        teacher = trained(here, entry["baseline"], of_baseline := here.baseline_seed(name, seed), data)
        begun[str(of_baseline)] = weights_hash(teacher)
        before = accuracy(teacher, data, data.test)
        for method in entry["methods"]:
            pruned, after_pruning, path = _pruned(here, name, method, seed, data)
            network = pruned.network
            label = f"fine-tune {name} {method} seed {seed}" if progress else None
            history = fit(network, data, training, seed, teacher, path, label, here.lessons)
            save_weights(network, here.weights(entry["suite"], name, "finetune") / method / f"{seed}.pt")
            outcome[method][str(seed)] = {
                "widths": pruned.widths,
                "baseline_accuracy": before,
                "pruned_accuracy": after_pruning,
                "accuracy": accuracy(network, data, data.test),
                "validation_accuracy": accuracy(network, data, data.validation),
                "seconds": float(history["seconds"].iloc[-1]),
            }
            histories.append(history.assign(method=method, seed=seed))
            checkpoints.append(path)
    head = {
        "network": here.entry("baselines", entry["baseline"])["network"],
        "baseline": entry["baseline"],
        "baseline_weights": begun,
        "budgets": described(budgets(here, name)),
        "training": training,
    }
    folder = here.results(entry["suite"], name, "finetune")
    metrics = write_results(folder, data, head, {"methods": outcome}, pd.concat(histories), beside)
    for path in checkpoints:
        path.unlink(missing_ok=True)
    return metrics


def _pruned(here: Project, name: str, method: str, seed: int, data: Dataset) -> tuple[PruningResult, float, Path]:
    """What the search left for a method and seed, its test accuracy, and where the checkpoint of its training lies."""
    pruned = load(here.weights(here.entry("experiments", name)["suite"], name, "search") / method / str(seed))
    after_pruning = accuracy(pruned.network.to(data.device), data, data.test)
    which = fingerprint(schedule(here, name), data.describe(), weights_hash(pruned.network))
    return pruned, after_pruning, here.checkpoint(name, "finetune", method, seed, which)


def _teach(name: str, root: Path, seed: int, epoch: int) -> None:
    """What the unpruned network says in one epoch, which every method's network then finds."""
    here = project(root)
    baseline = here.entry("experiments", name)["baseline"]
    data = dataset_once(root, here.entry("baselines", baseline)["dataset"])
    teacher = trained(here, baseline, here.baseline_seed(name, seed), data)
    Lessons(teacher, suited(teacher, data), schedule(here, name).batch_size, seed, here.lessons).prepare(epoch)


def _ahead(name: str, root: Path, method: str, seed: int) -> None:
    """One network trained in a process of its own; it stays in the checkpoint of its last epoch."""
    here = project(root)
    entry = here.entry("experiments", name)
    data = dataset_once(root, here.entry("baselines", entry["baseline"])["dataset"])
    pruned, _, path = _pruned(here, name, method, seed, data)
    teacher = trained(here, entry["baseline"], here.baseline_seed(name, seed), data)
    fit(pruned.network, data, schedule(here, name), seed, teacher, path, None, here.lessons)
