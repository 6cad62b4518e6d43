"""Which filters must leave together, for any network that can be traced.

Torch-Pruning's dependency graph finds the coupling (Fang et al. 2023): the
batch norm behind a convolution, the inputs of layers that read it, the other
branch of a residual sum. Then every group is put to the test: with random weights
the slim and the masked network must agree. One that fails is left out, and named.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning import ops

from rlprune.errors import InputError
from rlprune.masking import carriers, keep_top, masked, rebuild, slim

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True, eq=False)
class Slice:
    """Where the filters of a group lie along one axis of one module.

    Attributes:
        module: name of the module.
        axis: "out" (filters that it makes), "in" (filters that it reads) or "channels" (both at once:
            batch norm, depth-wise convolution); see `rlprune.masking.carriers`.
        length: of the axis.
        index: positions along the axis, (n,), each once.
        source: the filter of the group that each position belongs to, (n,). Every filter
            owns equally many: H·W of a linear layer that reads a flattened image, else one.
    """

    module: str
    axis: str
    length: int
    index: Tensor = field(repr=False)
    source: Tensor = field(repr=False)


@dataclass(frozen=True)
class Root:
    """Facts on a group's first layer, as numbers (of a kernel that is not square, its height)."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int


@dataclass(frozen=True, eq=False)
class FilterGroup:
    """Filters of one or more layers that leave together, filter i of one with filter i of the others.

    Attributes:
        name: module name of the first of these layers to run.
        size: number of filters.
        slices: all that belongs to them; the first one is the root's own "out" axis.
    """

    name: str
    size: int
    slices: tuple[Slice, ...] = field(repr=False)

    def root(self, network: nn.Module) -> Root:
        """Facts on the group's first layer, read off the given network (full size or slim)."""
        module = network.get_submodule(self.name)
        if isinstance(module, nn.Linear):
            return Root(module.in_features, module.out_features, kernel=1, stride=1, padding=0)
        kernel, padding = module.kernel_size[0], module.padding
        if isinstance(padding, str):
            padding = (module.dilation[0] * (kernel - 1) // 2 if padding == "same" else 0,)
        return Root(module.in_channels, module.out_channels, kernel, module.stride[0], padding[0])


class FilterGroups(Sequence[FilterGroup]):
    """All groups of a network, in order of execution.

    Attributes:
        skipped: (name, reason) of each layer whose filters stay because they cannot be removed
            safely. Layers that make the network's output are in neither list.
    """

    def __init__(self, groups: Sequence[FilterGroup], skipped: Sequence[tuple[str, str]] = ()) -> None:
        self._groups = tuple(groups)
        self.skipped = list(skipped)

    def __getitem__(self, index: int | slice) -> FilterGroup | FilterGroups:
        if isinstance(index, slice):
            return FilterGroups(self._groups[index], self.skipped)
        return self._groups[index]

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        return f"FilterGroups({', '.join(f'{g.name}: {g.size}' for g in self)}; {len(self.skipped)} skipped)"


def trace(network: nn.Module, example_input: Tensor) -> FilterGroups:
    """Find the groups of filters that must leave together.

    Args:
        network: (N, …) → (N, classes); it stays as it is.
        example_input: a batch that the network can process, on its device.

    Raises:
        InputError: the example input does not fit, the output is not (N, classes), or tracing fails.
    """
    _check_example(network, example_input)
    order: dict[nn.Module, int] = {}
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings(action="ignore"):
            # frozen weights leave no trace in autograd; the twin's share memory with them but ask for gradients
            leaves = {id(p): nn.Parameter(p.detach(), requires_grad=True) for p in network.parameters()}
            twin = rebuild(network, dict(leaves))
            for module in twin.modules():
                module.register_forward_hook(lambda m, *_: order.update({m: order.get(m, len(order))}))
            graph = torch_pruning.DependencyGraph().build_dependency(
                twin, example_input, lambda model, x: model(x), _differentiable, verbose=False
            )
    except Exception as error:  # whatever the network's own code or the tracer raises
        raise InputError(f"The network cannot be traced: {_first_line(error)}.") from error

    names = {module: name for name, module in twin.named_modules()}
    found: list[FilterGroup] = []
    skipped: dict[str, str] = {}
    taken: set[tuple[str, str, int]] = set()  # places that belong to a group
    for module in sorted((m for m in graph.module2node if m in order), key=order.__getitem__):
        name = names[module]
        is_root = isinstance(module, _LAYERS) and carriers(module, "channels") is None
        if not is_root or (name, "out", 0) in taken:
            continue
        try:
            if group := _group(graph, module, names, taken):
                found.append(group)
                taken.update((s.module, s.axis, place) for s in group.slices for place in s.index.tolist())
        except _Unsafe as reason:
            skipped[name] = str(reason)
    found = _verified(network, example_input, found, skipped) if found else found
    covered = {s.module for group in found for s in group.slices if s.axis == "out"}  # as another root's partner
    return FilterGroups(found, [(name, reason) for name, reason in skipped.items() if name not in covered])


def _differentiable(output: Tensor) -> Tensor:
    """The output with an operation behind it, which tells a layer that makes it from one that does not."""
    if not output.requires_grad:
        raise RuntimeError("its code detaches the output from the weights")
    return output * 1


class _Unsafe(Exception):
    """Why a group is left out."""


def _group(
    graph: torch_pruning.DependencyGraph, root: nn.Module, names: dict[nn.Module, str], taken: set[tuple[str, str, int]]
) -> FilterGroup | None:
    """All that is coupled with the filters of ``root``; None if they are the network's output."""
    if carriers(root, "out") is None:
        raise _Unsafe("it is a grouped convolution")
    size = getattr(root, carriers(root, "out")[1][0])
    try:
        handler = graph.get_pruner_of_module(root).prune_out_channels
        items = list(graph.get_pruning_group(root, handler, list(range(size))))
    except Exception as error:  # the tracer's own gaps
        raise _Unsafe(f"its coupling cannot be followed ({_first_line(error)})") from error
    if any(isinstance(item.dep.target.module, ops._OutputOp) for item in items):
        return None
    slices = []
    for item in items:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            raise _Unsafe("it is coupled with a parameter outside any layer")
        if module not in names or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
            continue  # an operation, or a layer that holds nothing per filter
        axis = "channels"
        if isinstance(module, _LAYERS) and carriers(module, "channels") is None:
            axis = "out" if item.dep.handler == graph.get_pruner_of_module(module).prune_out_channels else "in"
        if carriers(module, axis) is None:
            kind = "grouped convolution" if getattr(module, "groups", 1) > 1 else type(module).__name__
            raise _Unsafe(f"{names[module]} ({kind}) ties its filters to each other")
        tensors, attributes = carriers(module, axis)
        for tensor in tensors:
            if tensor not in module._parameters and tensor not in module._buffers:
                raise _Unsafe(f"the {tensor} of {names[module]} is computed from other parameters")
        index, source = torch.tensor(item.idxs, dtype=torch.long), torch.tensor(item.root_idxs, dtype=torch.long)
        owned = torch.bincount(source, minlength=size)
        if len(index.unique()) != len(index) or not 0 < owned.min() == owned.max():
            raise _Unsafe(f"{names[module]} is coupled with only a part of its filters")
        if any((names[module], axis, place) in taken for place in item.idxs):
            raise _Unsafe(f"{names[module]} couples some of its filters with those of another group")
        slices.append(Slice(names[module], axis, getattr(module, attributes[0]), index, source))
    return FilterGroup(names[root], size, tuple(slices))


def _verified(
    network: nn.Module, example_input: Tensor, groups: list[FilterGroup], skipped: dict[str, str]
) -> list[FilterGroup]:
    """The groups for which slim and masked agree; the others join ``skipped``."""
    trial = _trial(network, example_input)
    if _disagreement(*trial, groups) is None:
        return groups
    accepted: list[FilterGroup] = []
    for group in groups:
        if fault := _disagreement(*trial, [*accepted, group]):
            skipped[group.name] = fault
        else:
            accepted.append(group)
    return accepted


def _trial(network: nn.Module, example_input: Tensor) -> tuple[nn.Module, Tensor, float]:
    """The network with random weights, two random images, and the relative error of its arithmetic.

    Trained weights could hide a fault (a scale of zero, a dead activation), and float32 a small one.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        memo: dict[int, Any] = {}
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            values = torch.empty(tensor.shape, dtype=dtype).uniform_(-1, 1, generator=generator)
            if tensor.ndim > 1:
                values *= (6 * len(values) / values.numel()) ** 0.5  # He's bound: signals keep their size
            else:
                values = values / 2 + (1 if name.endswith(("weight", "running_var")) else 0)
            values = values.to(tensor.device)
            memo[id(tensor)] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values
        trial = rebuild(network, memo).eval()
        shape = (2, *example_input.shape[1:])
        images = torch.empty(shape, dtype=dtype).uniform_(-1, 1, generator=generator).to(example_input.device)
        if not (failure := _failure(trial, images)):  # else a dtype may be fixed in the network's code
            return trial, images, tolerance
    raise InputError(f"The network cannot be tried with random weights: {failure}.")


@torch.no_grad()
def _disagreement(trial: nn.Module, images: Tensor, tolerance: float, groups: list[FilterGroup]) -> str | None:
    """What goes wrong when a random half of every group's filters leaves; None if nothing does."""
    generator = torch.Generator().manual_seed(len(groups))
    halves = [torch.rand(group.size, generator=generator) for group in groups]
    masks = keep_top(halves, [(group.size + 1) // 2 for group in groups])
    try:
        small = slim(trial, groups, masks)
        with masked(trial, groups, masks):
            expected = trial(images)
        error = (small(images) - expected).abs().max() / expected.abs().max()
    except Exception as failure:  # whatever the network's code raises at other widths
        return f"without some of its filters the network fails ({_first_line(failure)})"
    # a branch may run in training only
    if (failure := _failure(small.train(), images)) and not _failure(rebuild(trial, {}).train(), images):
        return f"without some of its filters the network fails in training ({failure})"
    return None if error <= tolerance else "the network without its filters and with them masked differ"


@torch.no_grad()
def _failure(network: nn.Module, images: Tensor) -> str | None:
    """What a forward pass raises, if it does."""
    try:
        network(images)
    except Exception as error:  # whatever the network's own code raises
        return _first_line(error)
    return None


def _check_example(network: nn.Module, example_input: Tensor) -> None:
    """Raise `InputError` unless the network maps the example input to (N, classes)."""
    if not isinstance(network, nn.Module):
        raise InputError(f"The network must be a torch.nn.Module, not {type(network).__name__}.")
    if not isinstance(example_input, Tensor) or example_input.ndim < 2 or len(example_input) < 1:
        given = tuple(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise InputError(f"The example input must be a tensor of shape (N, …) with N of at least 1, not {given}.")
    device = next((parameter.device for parameter in network.parameters()), example_input.device)
    if example_input.device != device:
        raise InputError(f"The example input is on {example_input.device} but the network on {device}: move one.")
    try:
        with torch.no_grad():
            output = rebuild(network, {id(p): p for p in network.parameters()}).eval()(example_input)
    except Exception as error:  # whatever the network's own code raises
        raise InputError(
            f"The network cannot process the example input of shape {tuple(example_input.shape)}: {_first_line(error)}."
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(example_input):
        given = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise InputError(f"The network's output must have shape ({len(example_input)}, classes), not {given}.")


def _first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
