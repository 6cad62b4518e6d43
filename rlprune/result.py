"""What every method returns: a network within budget, and how it was found."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rlprune.errors import InputError
from rlprune.files import load_weights, read_json, save_weights, write_atomically, write_json
from rlprune.groups import trace
from rlprune.masking import slim
from rlprune.networks import build


@dataclass
class PruningResult:
    """A pruned network and the record of its making.

    Attributes:
        network: slim, in evaluation mode.
        masks: the keep mask of each filter group of the unpruned network.
        costs: budget name → value, unpruned, share, limit; measured on `network`.
        history: a row per candidate tried.
        widths: group name → (filters kept, filters).
        reward: of the decision, in the evaluator's unit (percent).
        evaluations: networks evaluated.
        seconds: wall time.
        method: its name.
        architecture: what `rlprune.networks.build` needs to make the unpruned
            network again, empty for a network of one's own.
        input_shape: of one input, (C, H, W).
    """

    network: nn.Module
    masks: list[Tensor]
    costs: dict[str, dict[str, float]]
    history: pd.DataFrame
    widths: dict[str, tuple[int, int]]
    reward: float
    evaluations: int
    seconds: float
    method: str
    input_shape: tuple[int, ...]
    architecture: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write ``weights.pt`` (tensors only), ``pruning.json`` and ``history.csv``; no code is stored."""
        folder = Path(folder)
        save_weights(self.network, folder / "weights.pt")
        description = {
            "method": self.method,
            "architecture": self.architecture,
            "input_shape": list(self.input_shape),
            "masks": ["".join("01"[int(keep)] for keep in mask) for mask in self.masks],
            "widths": self.widths,
            "costs": self.costs,
            "reward": self.reward,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }
        write_json(folder / "pruning.json", description)
        write_atomically(folder / "history.csv", lambda path: self.history.to_csv(path, index=False))
        return folder

    def export_onnx(self, path: str | Path) -> Path:
        """Write the network as ONNX with a free batch size; inputs are normalised images (N, C, H, W)."""
        device = next(self.network.parameters()).device
        example = torch.zeros(1, *self.input_shape, device=device)

        def write(partial: Path) -> None:
            torch.onnx.export(
                self.network.eval(),
                (example,),
                str(partial),
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
                dynamo=False,  # the newer exporter needs a further package and does the same here
            )

        write_atomically(path, write)
        return Path(path)


def load(folder: str | Path, network: nn.Module | None = None) -> PruningResult:
    """A saved result.

    Args:
        folder: as given to `PruningResult.save`.
        network: the unpruned network (its weights do not matter), needed when it
            was not one of `rlprune.networks`.

    Raises:
        InputError: something is absent, cut off, or of another network.
    """
    folder = Path(folder)
    description = read_json(folder / "pruning.json")
    if network is None:
        if not description["architecture"]:
            raise InputError(f"{folder} holds a pruned network of your own: hand its unpruned architecture to load().")
        network = build(**description["architecture"])
    groups = trace(network, torch.zeros(1, *description["input_shape"]))
    masks = [torch.tensor([letter == "1" for letter in mask]) for mask in description["masks"]]
    pruned = slim(network, groups, masks)
    load_weights(pruned, folder / "weights.pt")
    return PruningResult(
        network=pruned.eval(),
        masks=masks,
        costs=description["costs"],
        history=pd.read_csv(folder / "history.csv"),
        widths={name: tuple(pair) for name, pair in description["widths"].items()},
        reward=description["reward"],
        evaluations=description["evaluations"],
        seconds=description["seconds"],
        method=description["method"],
        input_shape=tuple(description["input_shape"]),
        architecture=description["architecture"],
    )
