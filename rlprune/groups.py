"""Which filters must leave together, for any network that can be traced.

`rlprune.coupling` follows each filter through the network: the batch norm behind a
convolution, the inputs of layers that read it, the other branch of a residual sum.
Here those that touch the same layers become a group. Then every group is put to the
test (`rlprune.verify`): with random weights the slim and the masked network must
agree. One that fails is left out, and named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rlprune.coupling import LAYERS, Axis, Coupling, couple
from rlprune.errors import InputError
from rlprune.forward import evaluating, seeded
from rlprune.masking import rebuild
from rlprune.places import OUTPUT
from rlprune.verify import verified


@dataclass(frozen=True, eq=False)
class Slice:
    """Where the filters of a group lie along one axis of one module.

    Attributes:
        module: name of the module.
        axis: "out" (filters that it makes), "in" (filters that it reads) or "channels" (both at once:
            batch norm, convolution that loses whole groups); see `rlprune.masking.carriers`.
        length: of the axis.
        index: positions along the axis, (n,), each once.
        source: the filter of the group that each position belongs to, (n,). Every filter
            owns equally many: H·W of a linear layer that reads a flattened image, all that must leave
            together for the sake of a grouped convolution, else one.
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
        size: number of filters. Where a grouped convolution ties several of a layer's filters, such a
            set of them counts as one: that many can be removed one by one.
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
        skipped: (name, reason) of each convolution or linear layer whose filters stay because they
            cannot be removed safely, or are excluded. Layers that make the network's output are in neither list.
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


def trace(network: nn.Module, example_input: Tensor, exclude: Iterable[str | type[nn.Module]] = ()) -> FilterGroups:
    """Find the groups of filters that must leave together.

    The filters of a grouped convolution are tied so that a grouped convolution remains: either whole
    groups leave, inputs and outputs together (ResNeXt loses paths, a depth-wise convolution channels), or the
    filters at one position of every group do. Both are exact; each layer gets the one with more to choose from.

    Args:
        network: (N, …) → (N, classes); it stays as it is.
        example_input: a batch that the network can process, on its device.
        exclude: layers whose filters stay, and with them all that must leave together with those: names of
            modules, where a container stands for all within it, or subclasses of `torch.nn.Module`.

    Raises:
        InputError: the example input does not fit, the output is not (N, classes), tracing fails, a weight is
            computed in a hook, or ``exclude`` holds something else or a name that is not the network's.
    """
    _check_example(network, example_input)
    _check_hooks(network)
    _check_without_hooks(network, example_input)
    coupling = couple(network, example_input, _excluded(network, exclude))
    found, reasons = _grouped(network, coupling)
    found, refused = verified(network, example_input, found, coupling.layers) if found else ([], [])
    for group, reason in refused:
        reasons |= {part.module: reason for part in group.slices if part.axis != "in"}
    made = {part.module for group in found for part in group.slices if part.axis != "in"}
    position = {name: place for place, name in enumerate(coupling.layers)}  # others run in training, or never
    skipped = [
        (name, reasons.get(name, "it did not run on the example input, or takes no part in the output"))
        for name, module in network.named_modules()
        if isinstance(module, LAYERS) and name not in made and reasons.get(name) is not OUTPUT
    ]
    return FilterGroups(found, sorted(skipped, key=lambda entry: position.get(entry[0], len(position))))


def _grouped(network: nn.Module, coupling: Coupling) -> tuple[list[FilterGroup], dict[str, str]]:
    """The groups, in order of execution, and for layers that are in none: name → why."""
    touching: dict[int, list[int]] = defaultdict(list)  # filter → its axes
    for number, axis in enumerate(coupling.axes):
        for one in np.unique(axis.filters).tolist():
            touching[one].append(number)
    groups, skipped = [], {}
    reasons = dict(coupling.reasons)
    taken: set[int] = set()
    rank = np.full(1 + max(touching, default=0), -1)  # filter → its number in the group at hand
    for number, axis in enumerate(coupling.axes):
        if axis.kind == "in" or not isinstance(network.get_submodule(axis.module), LAYERS):
            continue
        ones, first = np.unique(axis.filters, return_index=True)
        ones = ones[first.argsort()]  # in the order of the layer's filters
        if not taken.isdisjoint(ones.tolist()):
            continue  # a layer before has them
        reason = next((reasons[one] for one in ones.tolist() if one in reasons), None)
        if reason is None and len(ones) == 1 < axis.length:
            reason = "all its filters are tied to each other"
        if reason is None:
            rank[ones] = np.arange(len(ones))
            others = {other for one in ones.tolist() for other in touching[one]} - {number}
            parts = [_slice(coupling.axes[other], rank) for other in (number, *sorted(others))]
            rank[ones] = -1
            for part in parts:
                owned = torch.bincount(part.source, minlength=len(ones))
                if owned.min() != owned.max():
                    reason = f"{part.module} is coupled with only a part of its filters"
        if reason is None:
            groups.append(FilterGroup(axis.module, len(ones), tuple(parts)))
            taken.update(ones.tolist())
        else:
            skipped[axis.module] = reason
            reasons.update(dict.fromkeys(ones.tolist(), reason))
    return groups, skipped


def _slice(axis: Axis, rank: np.ndarray) -> Slice:
    """The part of an axis that belongs to the filters with a rank of 0 or more."""
    source = rank[axis.filters]
    ours = source >= 0
    return Slice(
        axis.module, axis.kind, axis.length, torch.from_numpy(axis.places[ours]), torch.from_numpy(source[ours])
    )


def _excluded(network: nn.Module, exclude: Iterable[str | type[nn.Module]]) -> set[str]:
    """Names of all modules that ``exclude`` stands for."""
    if isinstance(exclude, str | type) or not isinstance(exclude, Iterable):
        raise InputError(f"The layers to exclude must be a sequence of names or types, not {exclude!r}.")
    names = {module: name for name, module in network.named_modules()}  # of several names the one that `couple` knows
    paths = dict(network.named_modules(remove_duplicate=False))
    found: set[str] = set()
    for entry in exclude:
        if isinstance(entry, type) and issubclass(entry, nn.Module):
            found |= {name for module, name in names.items() if isinstance(module, entry)}
        elif isinstance(entry, str) and entry in paths and entry:
            found |= {names[module] for module in paths[entry].modules()}
        elif isinstance(entry, str):
            raise InputError(f"The network has no module {entry!r} to exclude.")
        else:
            raise InputError(f"A layer to exclude must be a name or a subclass of torch.nn.Module, not {entry!r}.")
    return found


def _check_example(network: nn.Module, example_input: Tensor) -> None:
    """Raise `InputError` for what is not a network and a batch, both on one device."""
    if not isinstance(network, nn.Module):
        raise InputError(f"The network must be a torch.nn.Module, not {type(network).__name__}.")
    if hasattr(network, "_orig_mod"):
        raise InputError("The network comes from torch.compile: hand in what was compiled, network._orig_mod.")
    if not isinstance(example_input, Tensor) or example_input.ndim < 2 or len(example_input) < 1:
        given = tuple(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise InputError(f"The example input must be a tensor of shape (N, …) with N of at least 1, not {given}.")
    device = next((parameter.device for parameter in network.parameters()), example_input.device)
    if example_input.device != device:
        raise InputError(f"The example input is on {example_input.device} but the network on {device}: move one.")
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:  # as on Apple's GPUs
        raise InputError(
            f"{device} has no float64 numbers ({error}): move the network to the CPU or a CUDA GPU."
        ) from error


def _check_hooks(network: nn.Module) -> None:
    """Raise `InputError` for a weight that a hook computes: a copy goes without hooks, and would compute it no more."""
    for name, module in network.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                remedy = "make its pruning permanent with torch.nn.utils.prune.remove"
            elif isinstance(hook, WeightNorm | SpectralNorm):
                kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
                remedy = f"use torch.nn.utils.parametrizations.{kind} in place of torch.nn.utils.{kind}"
            else:
                continue
            layer = f"layer {name!r}" if name else "network"
            raise InputError(f"A hook computes a weight of the {layer}, and pruned networks have no hooks: {remedy}.")


def _check_without_hooks(network: nn.Module, example_input: Tensor) -> None:
    """Raise `InputError` if forward hooks have a part in the output: a copy goes without them."""
    if not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules()):
        return
    probe = example_input  # another than the hooks may have seen
    if probe.is_floating_point():
        probe = torch.rand(probe.shape, generator=torch.Generator().manual_seed(0)).to(probe)

    def output(of: nn.Module) -> object:
        with torch.no_grad(), evaluating(of), seeded(0, probe.device):
            return of(probe)

    try:
        found = output(rebuild(network, {}))  # before the hooks leave anything that forward() reads
    except Exception:  # whatever the network's code lacks then
        found = None
    try:
        expected = output(network)
    except Exception:  # said where the network is traced
        return
    same = not isinstance(expected, Tensor) or (
        isinstance(found, Tensor) and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    )
    if not same:
        raise InputError(
            "Without its forward hooks the network computes something else, and pruned networks have no hooks: do in "
            "forward() what the hooks do."
        )


def remaining(groups: Sequence[FilterGroup], keeps: Sequence[Tensor]) -> list[FilterGroup]:
    """The groups of ``slim(network, groups, keeps)``, without tracing it."""
    axes: dict[tuple[str, str], Tensor] = {}  # (module, axis) → which of its places stay
    for group, keep in zip(groups, keeps, strict=True):
        for part in group.slices:
            stays = axes.setdefault((part.module, part.axis), torch.ones(part.length, dtype=torch.bool))
            stays[part.index] = keep[part.source]
    result = []
    for group, keep in zip(groups, keeps, strict=True):
        parts = []
        for part in group.slices:
            stays, ours = axes[part.module, part.axis], keep[part.source]
            index, source = (stays.cumsum(0) - 1)[part.index[ours]], (keep.cumsum(0) - 1)[part.source[ours]]
            parts.append(Slice(part.module, part.axis, int(stays.sum()), index, source))
        result.append(FilterGroup(group.name, int(keep.sum()), tuple(parts)))
    return result
