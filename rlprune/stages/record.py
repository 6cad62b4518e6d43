"""Write a stage's results so that they tell how they came about."""

import hashlib
import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rlprune.data import Dataset
from rlprune.files import write_atomically, write_json
from rlprune.stages.common import environment


def fingerprint(*what: object) -> str:
    """A short name for what a run depends on; it tells its checkpoints from those of other settings."""
    plain = [asdict(item) if is_dataclass(item) else item for item in what]
    return hashlib.sha256(json.dumps(plain, default=str, sort_keys=True).encode()).hexdigest()[:12]


def write_results(
    folder: Path, data: Dataset, head: dict[str, Any], outcome: dict[str, Any], history: pd.DataFrame, beside: int = 1
) -> dict[str, Any]:
    """Write history.csv and metrics.json (data, settings, machine, outcome); return the metrics.

    ``beside`` is how many runs were at work at a time. The metrics come last: where they are, all is there.
    """
    head = {key: asdict(value) if is_dataclass(value) else value for key, value in head.items()}
    metrics = {**data.describe(), **head, **environment(data.device.type, beside), **outcome}
    write_atomically(folder / "history.csv", lambda path: history.to_csv(path, index=False))
    write_json(folder / "metrics.json", metrics)
    return metrics
