"""What every method returns: a network within budget, and how it was found."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rlprune.errors import InputError, first_line
from rlprune.files import (
    load_weights,
    read_json,
    read_tensors,
    save_tensors,
    stored,
    write_atomically,
    write_json,
)
from rlprune.masking import memory_format, rebuild
from rlprune.networks import PAIRS, SIZES, build


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
        agent: what the agent has learned, to begin another search with; None where none was at work.
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
    agent: dict[str, Any] | None = field(default=None, repr=False)

    def save(self, folder: str | Path, half: bool = False) -> Path:
        """Write ``weights.pt``, ``pruning.json`` (decision, every layer's sizes), ``history.csv``, any ``agent.pt``.

        Tensors and text only, no code. With ``half``, weights are stored as float16; `load` gives float32 again.

        Raises:
            InputError: a weight is too large for half precision.
        """
        folder, state = Path(folder), stored(self.network, half)  # what is refused leaves the folder as it was
        (folder / "pruning.json").unlink(missing_ok=True)  # written last: where it is, all the rest is of this result
        save_tensors(state, folder / "weights.pt")
        description = {
            "method": self.method,
            "architecture": self.architecture,
            "layers": _layers(self.network),
            "channels_last": memory_format(self.network) == torch.channels_last,
            "input_shape": list(self.input_shape),
            "masks": ["".join("01"[int(keep)] for keep in mask) for mask in self.masks],
            "widths": self.widths,
            "costs": self.costs,
            "reward": self.reward,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }
        write_atomically(folder / "history.csv", lambda path: self.history.to_csv(path, index=False))
        if self.agent is not None:
            save_tensors(self.agent, folder / "agent.pt")
        else:
            (folder / "agent.pt").unlink(missing_ok=True)  # another result's
        write_json(folder / "pruning.json", description)
        return folder

    def export_onnx(self, path: str | Path) -> Path:
        """Write the network as ONNX with a free batch size; inputs are normalised images (N, C, H, W).

        Where onnxruntime is installed the file's output is compared with the network's.

        Raises:
            InputError: the network cannot be expressed, or the file computes something else.
        """
        example = self._example()

        def write(partial: Path) -> None:
            try:
                with warnings.catch_warnings(action="ignore"):  # this exporter calls itself legacy
                    torch.onnx.export(
                        self.network.eval(),
                        (example,),
                        str(partial),
                        input_names=["images"],
                        output_names=["logits"],
                        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
                        dynamo=False,  # the newer exporter needs a further package and does the same here
                    )
            except Exception as error:  # whatever an operator without an ONNX form leads to
                raise InputError(f"The network cannot be written as ONNX: {first_line(error)}.") from error
            self._compare(partial, example)

        write_atomically(path, write)
        return Path(path)

    def export_program(self, path: str | Path) -> Path:
        """Write the network as a `torch.export` program (usually ``.pt2``) with a free batch size.

        ``torch.export.load(path).module()`` computes the logits in any process with torch, without rlprune.
        """
        batch = torch.export.Dim("batch")
        try:
            program = torch.export.export(self.network.eval(), (self._example(),), dynamic_shapes=({0: batch},))
        except Exception as error:  # whatever code of the network cannot be expressed
            raise InputError(f"The network cannot be exported: {first_line(error)}.") from error
        write_atomically(path, lambda partial: _save_program(program, partial))
        return Path(path)

    def _example(self) -> Tensor:
        """Two random inputs; of one alone an exporter would take the batch size for a constant."""
        generator = torch.Generator().manual_seed(0)
        device = next(self.network.parameters()).device
        kinds = [tensor.dtype for tensor in self.network.parameters() if tensor.is_floating_point()]
        return torch.randn(2, *self.input_shape, generator=generator).to(device, kinds[0])

    def _compare(self, path: Path, example: Tensor) -> None:
        """Raise `InputError` if onnxruntime, where it is installed, computes something else."""
        try:
            import onnxruntime
        except ImportError:
            return
        try:
            session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
            logits = torch.from_numpy(session.run(None, {"images": example.cpu().numpy()})[0])
        except Exception as error:  # onnxruntime's own kinds, of what it has not implemented
            raise InputError(f"onnxruntime cannot run the file: {first_line(error)}.") from error
        with torch.no_grad():
            # on the CPU as the file: a GPU rounds what goes into a convolution (TF32) by more than is looked for here
            expected = rebuild(self.network, {}).cpu()(example.cpu())
        error = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if not error <= max(1e-4, 20 * torch.finfo(example.dtype).eps):
            raise InputError(f"The ONNX file computes something else than the network (relative error {error:.1e}).")


def _save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open("wb") as file, warnings.catch_warnings(action="ignore"):  # of tensors in channels-last
        torch.export.save(program, file)


def _layers(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Kind, sizes and tensor shapes of every module that has sizes or holds tensors."""
    layers = {}
    for name, module in network.named_modules():
        tensors = {**module._parameters, **module._buffers}
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items() if tensor is not None}
        sizes = {key: value for key in SIZES if isinstance(value := module.__dict__.get(key), int)}
        if shapes or sizes:
            sizes |= {key: list(value) for key in PAIRS if isinstance(value := module.__dict__.get(key), tuple)}
            layers[name] = {"kind": type(module).__name__, **sizes, "tensors": shapes}
    return layers


def _resize(network: nn.Module, layers: dict[str, dict[str, Any]]) -> None:
    """Give every module the sizes of `_layers`, in place; what its tensors held is lost.

    Raises:
        AttributeError, KeyError: the network has no such module or tensor.
    """
    made: dict[Tensor, Tensor] = {}  # what modules share they share afterwards, too
    for name, layer in layers.items():
        module = network.get_submodule(name)
        if type(module).__name__ != layer["kind"]:
            raise KeyError(name)
        for key, shape in layer["tensors"].items():
            store = module._parameters if key in module._parameters else module._buffers
            tensor = store[key]
            if tensor in made:
                store[key] = made[tensor]
            elif list(tensor.shape) != shape:
                values = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                if isinstance(tensor, nn.Parameter):
                    values = nn.Parameter(values, requires_grad=tensor.requires_grad)
                store[key] = made[tensor] = values
        for key in SIZES:
            if key in layer:
                setattr(module, key, layer[key])
        for key in PAIRS:
            if key in layer:
                setattr(module, key, tuple(layer[key]))


def load(folder: str | Path, network: nn.Module | None = None) -> PruningResult:
    """A saved result, without tracing or searching anything again.

    Args:
        folder: as given to `PruningResult.save`.
        network: the unpruned network (its weights do not matter, and it stays as it is), needed
            when it was not one of `rlprune.networks.build`.

    Raises:
        InputError: something is absent, cut off, or of another network.
    """
    folder = Path(folder)
    if not (folder / "pruning.json").is_file():
        raise InputError(f"There is no saved result in {folder}: name a folder that a result's save() has written.")
    description = read_json(folder / "pruning.json")
    try:
        history = pd.read_csv(folder / "history.csv")
    except (OSError, pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise InputError(f"{folder / 'history.csv'} is absent or cut off: save the result again.") from error
    if network is None:
        if not description["architecture"]:
            raise InputError(f"{folder} holds a pruned network of your own: hand its unpruned architecture to load().")
        network = build(**description["architecture"])
    pruned = rebuild(network, {})
    try:
        _resize(pruned, description["layers"])
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds a pruned network of another architecture: hand load() the right one.") from (
            error
        )
    load_weights(pruned, folder / "weights.pt")
    if description.get("channels_last"):  # not in files of old
        pruned.to(memory_format=torch.channels_last)
    return PruningResult(
        network=pruned.eval(),
        masks=[torch.tensor([letter == "1" for letter in mask]) for mask in description["masks"]],
        costs=description["costs"],
        history=history,
        widths={name: tuple(pair) for name, pair in description["widths"].items()},
        reward=description["reward"],
        evaluations=description["evaluations"],
        seconds=description["seconds"],
        method=description["method"],
        input_shape=tuple(description["input_shape"]),
        architecture=description["architecture"],
        agent=read_tensors(folder / "agent.pt") if (folder / "agent.pt").exists() else None,
    )
