"""Stage baseline: train the network that is pruned later."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from rlprune.data import Dataset
from rlprune.errors import InputError, one_of
from rlprune.files import load_weights, read_json, save_weights
from rlprune.forward import accuracy
from rlprune.networks import build, check_name
from rlprune.stages.common import Project, project
from rlprune.stages.jobs import side_by_side
from rlprune.stages.prepare import dataset, dataset_once, same_images
from rlprune.stages.record import fingerprint, write_results
from rlprune.training import Training, fit


def schedule(here: Project, name: str) -> Training:
    """A baseline's training schedule: the suite's, with the entry's own changes."""
    entry = here.entry("baselines", name)
    suite = here.entry("suites", entry["suite"])
    if "baseline" not in suite:
        raise InputError(f"suites.{entry['suite']} in params.yaml lacks 'baseline', which baselines.{name} needs.")
    return Training.of({**suite["baseline"], **entry.get("training", {})})


def run(name: str, root: str | Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Train a baseline once per seed; write weights, metrics.json and history.csv.

    A run that was killed goes on from its last finished epoch. ``$RLPRUNE_JOBS`` seeds train side by side.

    Returns:
        the metrics written.
    """
    here = project(root)
    entry, training = here.entry("baselines", name), schedule(here, name)
    check_name(entry["network"])
    data = dataset(here, entry["dataset"])  # fetched once, not by each process
    beside = side_by_side(_ahead, [(name, here.root, seed) for seed in entry["seeds"]])
    seeds, histories, checkpoints = {}, [], []
    for seed in entry["seeds"]:
        network, path, history = _train(here, name, seed, data, progress)
        save_weights(network, here.weights("baselines", name) / f"{seed}.pt")
        seeds[str(seed)] = {
            "test_accuracy": accuracy(network, data, data.test),
            "validation_accuracy": accuracy(network, data, data.validation),
            "parameters": sum(p.numel() for p in network.parameters()),
            "images_per_second": float(history["images_per_second"].median()),
            "seconds": float(history["seconds"].iloc[-1]),
        }
        histories.append(history.assign(seed=seed))
        checkpoints.append(path)
    head = {"network": entry["network"], "training": training}
    metrics = write_results(here.results("baselines", name), data, head, {"seeds": seeds}, pd.concat(histories), beside)
    for path in checkpoints:
        path.unlink(missing_ok=True)
    return metrics


def trained(here: Project, name: str, seed: int, data: Dataset) -> nn.Module:
    """The network that this stage left for a seed, in evaluation mode on the data's device.

    Raises:
        InputError: there is none, or it was trained on other images, some of which may now be among those that judge.
    """
    entry = here.entry("baselines", name)
    one_of(f"seed of baseline {name}", seed, entry["seeds"])
    record = here.results("baselines", name) / "metrics.json"
    if record.is_file() and not same_images(read_json(record), data):  # weights may come without their record
        raise InputError(
            f"Baseline {name} was trained on other images, or on others of them, than datasets.{entry['dataset']} in "
            f"params.yaml gives: run `python -m rlprune baseline {name}`."
        )
    network = build(entry["network"], data.classes)
    load_weights(network, here.weights("baselines", name) / f"{seed}.pt")
    return network.to(data.device, memory_format=torch.channels_last).eval()


def _train(here: Project, name: str, seed: int, data: Dataset, progress: bool) -> tuple[nn.Module, Path, pd.DataFrame]:
    """A trained network, its checkpoint and its history."""
    kind, training = here.entry("baselines", name)["network"], schedule(here, name)
    network = build(kind, data.classes, seed)
    path = here.checkpoint(name, "baseline", seed, fingerprint(training, data.describe(), kind))
    label = f"train {name} seed {seed}" if progress else None
    return network, path, fit(network, data, training, seed, checkpoint=path, progress=label)


def _ahead(name: str, root: Path, seed: int) -> None:
    """One network trained in a process of its own; it stays in the checkpoint of its last epoch."""
    here = project(root)
    _train(here, name, seed, dataset_once(root, here.entry("baselines", name)["dataset"]), progress=False)
