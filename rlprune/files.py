"""Files that are whole or absent, and read without executing anything stored in them."""

import contextlib
import glob
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlprune.errors import InputError

ABANDONED = 3600.0  # seconds after which nobody is taken to be still writing a file


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a file beside ``path``, then put it in place; nothing half-written stays.

    What a process left that was killed while it wrote goes with the next write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(FileNotFoundError):  # another process has just put it in place
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def place_of(checkpoint: str | Path | None) -> Path | None:
    """Where a checkpoint is to be; its folder is made.

    Raises:
        InputError: a file cannot be written there.
    """
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The checkpoint {path} cannot be written ({error}): name another file.") from error
    if path.is_dir():
        raise InputError(f"The checkpoint {path} is a folder: name a file.")
    return path


def read_checkpoint(path: Path, run: str) -> dict[str, Any]:
    """The state in a checkpoint of the run ``run``, read without executing anything stored in it.

    Raises:
        InputError: the file is cut off, no checkpoint, or of another run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["run"]
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        raise InputError(f"Checkpoint {path} is cut off or no checkpoint of rlprune: delete it and start again.") from (
            error
        )
    if found != run:
        raise InputError(
            f"Checkpoint {path} belongs to another run (network, its weights, teacher, data, budgets, options, "
            "schedule or seed differ; a loader that shuffles gives other data each time): hand in what that run began "
            "with, delete it, or name another file."
        )
    return state


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over a network's state; tells two trained networks apart."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        # as bytes: numpy knows no bfloat16
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored(network: nn.Module, half: bool = False) -> dict[str, Tensor]:
    """A network's state as it is written; with ``half``, floating point as float16.

    Raises:
        InputError: a value is too large for float16.
    """
    state = network.state_dict()
    if half:
        state = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
        for name, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise InputError(f"{name} holds values too large for half precision: save with half=False.")
    return state


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's state, tensors only."""
    save_tensors(stored(network), path)


def save_tensors(state: object, path: str | Path) -> None:
    """Have `torch.save` write tensors, numbers and text; the same content makes the same file.

    Given a path and no open file, torch would write its name into the file, here one with the process's number.
    """

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            torch.save(state, file)

    write_atomically(path, write)


def read_tensors(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, as long as it is tensors, numbers and text; nothing stored is executed.

    Raises:
        InputError: the file is absent or cut off.
    """
    if not path.is_file():
        raise InputError(
            f"There are no weights {path}: make them first, in the pipeline with their stage's `dvc repro`."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        raise InputError(f"{path} is cut off or holds no weights: delete it and run its stage again.") from error


def load_weights(network: nn.Module, path: Path) -> None:
    """Read a network's state in place, executing nothing that is stored.

    Raises:
        InputError: the file is absent, cut off, or of another network.
    """
    state = read_tensors(path)
    try:
        network.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{path} holds the weights of another network: delete it and run its stage again.") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON for people to read, in place at once."""
    write_atomically(path, lambda partial: partial.write_text(json.dumps(content, indent=1) + "\n"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `InputError` where it is absent or broken."""
    if not path.is_file():
        raise InputError(f"There is no {path}: run the stage that makes it.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON ({error}): delete it and run its stage again.") from error
