"""What a network costs, budgets on that, and costs of slim networks without building them.

Every cost, your own too, is a function (network, example_input) -> float. It
is measured in evaluation mode without gradients; the mode is given back.
"""

import contextlib
import io
import math
import statistics
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlprune.errors import InputError, finite, one_of
from rlprune.forward import evaluating, read_by
from rlprune.groups import FilterGroups
from rlprune.masking import carriers, rebuild

Cost = Callable[[nn.Module, Tensor], float]

# A machine that others share changes its pace for seconds at a time, by more than measurements in a row differ.
NOISY = 9  # measurements of a cost that is not the same twice
PAUSE = 0.5  # seconds between them


def parameters(network: nn.Module, example_input: Tensor) -> float:
    """Number of parameters; one that is used twice counts once."""
    return float(sum(parameter.numel() for parameter in network.parameters()))


def macs(network: nn.Module, example_input: Tensor) -> float:
    """Multiply–accumulates of all convolution and linear modules for one image.

    What an `nn.MultiheadAttention` multiplies without calling one is not counted.
    """
    counts = uses(network, example_input)
    with _evaluation(network):  # a weight that is computed may change its own state in training
        return float(sum(count * module.weight.numel() for module, count in counts.items()))


def latency(network: nn.Module, example_input: Tensor, repeats: int = 20, warmup: int = 5) -> float:
    """Milliseconds of a forward pass for the whole example input: the median of `timings`."""
    return statistics.median(timings(network, example_input, repeats, warmup))


def timings(
    network: nn.Module, example_input: Tensor, repeats: int = 20, warmup: int = 5, seconds: float = 0.05
) -> list[float]:
    """Milliseconds of forward passes for the whole example input, after a warm-up.

    Args:
        network: in evaluation mode meanwhile, float32, with torch's own number of threads.
        example_input: (N, …), on the network's device.
        repeats: passes timed, at least.
        warmup: passes before those.
        seconds: timed altogether, at least: a small network runs more often.
    """
    times: list[float] = []
    total = 0.0
    with _evaluation(network):
        for _ in range(warmup):
            network(example_input)
        while len(times) < repeats or total < seconds:
            if example_input.is_cuda:  # a GPU is still at work when a call returns
                torch.cuda.synchronize(example_input.device)
            start = time.perf_counter()
            network(example_input)
            if example_input.is_cuda:
                torch.cuda.synchronize(example_input.device)
            times.append(1000 * (time.perf_counter() - start))
            total += times[-1] / 1000
    return times


def conditions(example_input: Tensor) -> dict[str, Any]:
    """What a latency holds for: device, threads and images at once."""
    if example_input.is_cuda:
        return {"device": torch.cuda.get_device_name(example_input.device), "batch": len(example_input)}
    return {"device": "cpu", "threads": torch.get_num_threads(), "batch": len(example_input)}


def peak_memory(network: nn.Module, example_input: Tensor) -> float:
    """The most bytes of activations alive at once in a forward pass for the whole example input.

    Counted, not sampled, hence the same on every run: each operation's results until the last
    reference to them is gone, and the input throughout; no parameters, no operation's own scratch.
    """
    counter = _LiveBytes(network, example_input)
    with _evaluation(network), counter:
        network(example_input)
    return float(counter.peak)


def onnx_bytes(network: nn.Module, example_input: Tensor) -> float:
    """Size of the network as an ONNX file, in bytes."""
    file = io.BytesIO()
    with _evaluation(network), warnings.catch_warnings(action="ignore"):  # this exporter calls itself legacy
        torch.onnx.export(network, (example_input,), file, dynamo=False)
    return float(file.tell())


COSTS: dict[str, Cost] = {cost.__name__: cost for cost in (parameters, macs, latency, peak_memory, onnx_bytes)}


@dataclass(frozen=True)
class Budget:
    """The most that a network may cost.

    Attributes:
        cost: any (network, example_input) -> float, or a name in `COSTS`.
        limit: a share of the unpruned network's cost, above 0 and at most 1,
        relative: unless this is False; then a value in the cost's own unit.
        name: for tables; the cost's own name if not given.

    Raises:
        InputError: an unknown cost, or a limit that makes no sense.
    """

    cost: Cost | str
    limit: float
    relative: bool = True
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.cost, str):
            one_of("cost", self.cost, list(COSTS))
        cost = COSTS[self.cost] if isinstance(self.cost, str) else self.cost
        if not callable(cost):
            raise InputError(f"A budget's cost must be a function (network, example_input) -> float, not {cost!r}.")
        if not isinstance(self.name, str | None):
            raise InputError(f"A budget's name must be text, not {self.name!r}.")
        object.__setattr__(self, "cost", cost)
        object.__setattr__(self, "name", self.name or getattr(cost, "__name__", type(cost).__name__))
        sound = isinstance(self.limit, Real) and math.isfinite(self.limit) and self.limit > 0
        if not sound or (self.relative and self.limit > 1):
            wanted = "a share above 0 and at most 1" if self.relative else "a finite number above 0"
            hint = "; for an absolute value give relative=False" if sound else ""
            raise InputError(f"The limit of the budget on {self.name} must be {wanted}, not {self.limit!r}{hint}.")

    def is_named(self, name: str) -> bool:
        """Whether the cost is this package's own one of that name."""
        return self.cost is COSTS.get(name)

    @property
    def predicted(self) -> bool:
        """Whether a `Predictor` computes the cost from the widths."""
        return self.is_named("parameters") or self.is_named("macs")

    def measure(self, network: nn.Module, example_input: Tensor) -> float:
        """The network's cost, in evaluation mode without gradients.

        Raises:
            InputError: the cost raises, or returns no finite number of at least 0.
        """
        if self.cost not in COSTS.values():
            # what a function of one's own does to them must not stay
            network, example_input = rebuild(network, {}), example_input.clone()
        try:
            with _evaluation(network):
                value = self.cost(network, example_input)
        except Exception as error:  # whatever a cost of the user's own raises
            raise InputError(f"The cost {self.name} failed with {type(error).__name__}: {error}") from error
        return finite(value, f"The cost {self.name}", least=0)

    def measurements(self, network: nn.Module, example_input: Tensor) -> list[float]:
        """The cost measured twice, and where those differ `NOISY` times over some seconds; see `measure`."""
        values = [self.measure(network, example_input) for _ in range(2)]
        while values[0] != values[1] and len(values) < NOISY:
            time.sleep(PAUSE)
            values.append(self.measure(network, example_input))
        return values


def check_budgets(budgets: Sequence[Budget]) -> None:
    """Raise `InputError` unless these are several budgets, or one in a list."""
    if not isinstance(budgets, Sequence) or not all(isinstance(budget, Budget) for budget in budgets):
        given = repr(budgets) if len(repr(budgets)) < 100 else type(budgets).__name__
        raise InputError(f"budgets must be a list of Budget, such as [Budget('parameters', 0.1)], not {given}.")


class Predictor:
    """Parameters and MACs of a slim network from its widths alone, exactly.

    Both are sums of products, such as filters made · filters read · kernel size, whose
    factors are linear in the widths: a call is a few operations on small arrays. With the lengths of all axes,
    ``base + slope @ widths``, the parameters are Σ elements · lengths[first] · lengths[second] / split over the terms.

    Attributes:
        base: length of each axis without its filters of any group, (axes,); axis 0 is the constant 1.
        slope: by how much it grows with the width of each group, (axes, groups).
        first: axis that is a term's first factor, (terms,).
        second: axis that is its second factor, (terms,).
        elements: numbers that a weight has for each place of both axes, (terms,).
        products: times its uses for one image: what gives the MACs, (terms,).
        split: groups of a convolution, which share its inputs out, (terms,).
    """

    def __init__(self, network: nn.Module, groups: FilterGroups, example_input: Tensor) -> None:
        rows = {("", ""): 0}  # (module, axis) → row of a length; row 0 is the constant 1
        base, slope, full = [1], [np.zeros(len(groups), dtype=np.int64)], [1]
        for number, group in enumerate(groups):
            for part in group.slices:
                row = rows.setdefault((part.module, part.axis), len(rows))
                if row == len(base):
                    base.append(part.length)
                    full.append(part.length)
                    slope.append(np.zeros(len(groups), dtype=np.int64))
                base[row] -= len(part.index)
                slope[row][number] += len(part.index) // group.size
        self.base, self.slope = np.array(base), np.array(slope)

        tensors: dict[int, tuple[nn.Parameter, dict[int, int]]] = {id(p): (p, {}) for p in network.parameters()}
        modules = dict(network.named_modules())
        for name, axis in list(rows)[1:]:
            for tensor_name, dim in carriers(modules[name], axis)[0].items():
                tensor = modules[name]._parameters.get(tensor_name)
                if tensor is not None:
                    tensors[id(tensor)][1][dim] = rows[name, axis]
        weight_uses, computed = Counter(), 0
        for module, count in uses(network, example_input).items():
            if (weight := module._parameters.get("weight")) is not None:
                weight_uses[id(weight)] += count
            else:  # computed from other parameters, as by weight_norm: such a layer keeps its filters
                with _evaluation(network):  # in training it may change its own state
                    computed += count * module.weight.numel()
        terms = [(0, computed, 0, 0, 1)] if computed else []
        # elements beside the varying dimensions, uses of each per image, row, row, groups of a convolution
        for key, (tensor, dims) in tensors.items():
            beside = tensor.numel() // math.prod(tensor.shape[dim] for dim in dims)
            first, second = (*dims.values(), 0, 0)[:2]
            groups_of = math.prod(full[row] // tensor.shape[dim] for dim, row in dims.items())
            terms.append((beside, beside * weight_uses[key], first, second, groups_of))
        self.elements, self.products, self.first, self.second, self.split = np.array(terms, dtype=np.int64).T

    def cost(self, budget: Budget, widths: Sequence[int]) -> float:
        """The slim network's cost under a budget that is `Budget.predicted`."""
        return float(self.parameters(widths) if budget.is_named("parameters") else self.macs(widths))

    def parameters(self, widths: Sequence[int]) -> int:
        """`parameters` of the slim network with these widths, one per group."""
        return int(self.elements @ self._areas(widths))

    def macs(self, widths: Sequence[int]) -> int:
        """`macs` of the slim network with these widths, one per group."""
        return int(self.products @ self._areas(widths))

    def _areas(self, widths: Sequence[int]) -> np.ndarray:
        if len(widths) != self.slope.shape[1]:
            raise InputError(f"There must be {self.slope.shape[1]} widths, one per group, not {len(widths)}.")
        lengths = self.base + self.slope @ np.asarray(widths, dtype=np.int64)
        return lengths[self.first] * lengths[self.second] // self.split


def uses(network: nn.Module, example_input: Tensor) -> dict[nn.Module, int]:
    """How often one image makes each convolution or linear module use each of its weights."""
    counts: dict[nn.Module, int] = Counter()

    def count(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            places = output.numel() // module.out_features
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            places = read_by(inputs, named).numel() // module.in_channels
        else:
            places = output.numel() // module.out_channels
        counts[module] += places

    layers = (nn.modules.conv._ConvNd, nn.Linear)
    hooks = [m.register_forward_hook(count, with_kwargs=True) for m in network.modules() if isinstance(m, layers)]
    try:
        with _evaluation(network):
            network(example_input[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return counts


class _LiveBytes(TorchDispatchMode):
    """Sums the storages that are alive, from the results of every operation."""

    def __init__(self, network: nn.Module, example_input: Tensor) -> None:
        super().__init__()
        known = [*network.parameters(), *network.buffers(), example_input]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live = self.peak = example_input.numel() * example_input.element_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)  # its address may serve another storage
        self._live -= size


@contextlib.contextmanager
def _evaluation(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    with evaluating(network), torch.no_grad():
        yield
