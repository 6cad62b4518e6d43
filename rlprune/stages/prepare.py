"""Stage prepare: have a dataset at hand and record exactly what it is."""

import functools
from pathlib import Path
from typing import Any

import torch

from rlprune.data import Dataset, load
from rlprune.errors import InputError
from rlprune.files import read_json, write_json
from rlprune.sources import data_folder, fetch
from rlprune.stages.common import Project, device, project


def run(name: str, root: str | Path | None = None) -> dict[str, Any]:
    """Fetch the dataset if need be; write ``results/data/<name>.json``: source, content hash, splits."""
    here = project(root)
    entry = here.entry("datasets", name)
    fetch(name, data_folder(here.root))
    dataset = load(name, data_folder(here.root), entry["validation"], entry["seed"])
    record = dataset.describe()
    for split in ("train", "validation", "test"):
        counts = torch.bincount(getattr(dataset, split).labels, minlength=dataset.classes)
        record[f"{split}_images_per_class"] = counts.tolist()
    write_json(_path(here, name), record)
    return record


def dataset(here: Project, name: str) -> Dataset:
    """The prepared dataset on the device of the run, fetched if its files are not there.

    Raises:
        InputError: it was not prepared, has changed or is divided otherwise since, or cannot be fetched.
    """
    entry = here.entry("datasets", name)
    recorded = read_json(_path(here, name))
    fetch(name, data_folder(here.root))  # a clone has the record of a dataset, and not its images
    loaded = load(name, data_folder(here.root), entry["validation"], entry["seed"], device())
    if not same_images(recorded, loaded):
        raise InputError(
            f"The images of {name}, or their division by datasets.{name} in params.yaml, are not those that "
            f"{_path(here, name).relative_to(here.root)} records: run `python -m rlprune prepare {name}` to go on with "
            "these, or put the earlier ones back."
        )
    return loaded


def same_images(recorded: dict[str, Any], data: Dataset) -> bool:
    """Whether a record, of a dataset or of what was made with it, is of these images, divided in the same way."""
    now = data.describe()
    return all(recorded.get(key) == now[key] for key in now if key != "source")


@functools.lru_cache(maxsize=1)
def dataset_once(root: Path, name: str) -> Dataset:
    """`dataset`, read once in a process that does one run of a stage after the other, see `rlprune.stages.jobs`."""
    return dataset(project(root), name)


def _path(here: Project, name: str) -> Path:
    return here.root / "results" / "data" / f"{name}.json"
