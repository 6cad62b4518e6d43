"""Smaller kernels, exactly; and the scales that tell which rings of a kernel, and which filters, can go.

A ring is the outermost weights of a kernel: both ends of every dimension that is at least 3 long. Without it a
5×5 kernel is 3×3, and 3×3 is 1×1. The padding falls by one dilation, so that all that is left reads what it read
before: the smaller convolution computes what the larger one does with that ring zero, whatever its stride,
dilation and groups, transposed or not.
"""

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlprune.costs import uses
from rlprune.errors import InputError
from rlprune.groups import FilterGroup
from rlprune.masking import carriers, rebuild

# classes of others may read their kernel's size in code of their own
_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def removable(network: nn.Module) -> dict[str, int]:
    """How many rings each convolution's kernel can lose, one after the other from the outside.

    Left out are kernels without a ring, layers whose padding is no zeros or less than one dilation (there a smaller
    kernel would compute more outputs), subclasses of torch's convolutions, and weights that are shared or
    computed from others.
    """
    owners: dict[int, int] = {}
    for module in network.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {}
    for name, module in network.named_modules():
        alone = owners.get(id(module._parameters.get("weight"))) == 1
        if type(module) in _KINDS and alone and (count := len(_boxes(module)) - 1):
            found[name] = count
    return found


def depths(convolution: nn.Module) -> Tensor:
    """For every place of the kernel the ring that it lies in, from 0 for the outermost; the number of rings if in none.

    Returns:
        int64, of the kernel's shape.
    """
    boxes = _boxes(convolution)
    result = torch.zeros(convolution.kernel_size, dtype=torch.int64)
    for depth, box in enumerate(boxes):
        result[box] = depth
    return result


def without_rings(network: nn.Module, removed: Mapping[str, int]) -> nn.Module:
    """A new network with smaller kernels.

    Args:
        network: stays as it is.
        removed: name of a convolution → how many of its outer rings leave, at most those of `removable`.

    Returns:
        a network that shares no memory with the given one. It keeps the mode, ``requires_grad`` and memory format.

    Raises:
        InputError: a layer that has not as many rings that can leave.
    """
    layers = _checked(network, removed)
    memo: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for layer, count in layers:
            weight = layer.weight
            last = weight.ndim == 4 and not weight.is_contiguous()
            last = last and weight.is_contiguous(memory_format=torch.channels_last)
            kept = weight.detach()[(..., *_boxes(layer)[count])]
            kept = kept.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
            memo[id(weight)] = nn.Parameter(kept, requires_grad=weight.requires_grad)
        smaller = rebuild(network, memo)
    for layer, count in layers:
        box = _boxes(layer)[count]
        memo[id(layer)].kernel_size = tuple(side.stop - side.start for side in box)
        if not isinstance(layer.padding, str):  # "same" stays the same
            pairs = zip(layer.padding, layer.dilation, box, strict=True)
            memo[id(layer)].padding = tuple(padding - dilation * side.start for padding, dilation, side in pairs)
    return smaller


@contextlib.contextmanager
def masked_rings(network: nn.Module, removed: Mapping[str, int]) -> Iterator[nn.Module]:
    """Within this context the network computes, at full size, the function of ``without_rings(network, removed)``.

    Yields:
        the network itself; on exit, after an error too, it has its own weights back.

    Raises:
        InputError: a layer that has not as many rings that can leave.
    """
    layers = _checked(network, removed)
    weights = [layer._parameters["weight"] for layer, _ in layers]
    try:
        for layer, count in layers:
            keep = (depths(layer) >= count).to(layer.weight.device)
            values = torch.where(keep, layer.weight.detach(), 0)
            layer._parameters["weight"] = nn.Parameter(values, requires_grad=layer.weight.requires_grad)
        yield network
    finally:
        for (layer, _), weight in zip(layers, weights, strict=True):
            layer._parameters["weight"] = weight


class Scales:
    """A scale for each filter and each ring, and what they make of weights and costs.

    A filter's multiplies the weights that read it, relative to the largest of its group. A ring's is the share left of
    the angle between the kernel and what lies inside the ring, and so multiplies its weights by tan(scale · angle) /
    tan(angle). Both are 1 at 1 and 0 at 0.

    Args:
        network: the one that ``groups`` was traced on.
        groups: its filter groups.
        example_input: tells how often a weight is used.
        rings: whether rings have scales.
        stay: names of layers whose rings have none.

    Attributes:
        layers: names of those whose rings have scales.
        scales: what is learned: a tensor per group, (size,), then one per layer, (rings,), the outermost first;
            1 to begin with.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[FilterGroup],
        example_input: Tensor,
        rings: bool,
        stay: Container[str] = (),
    ) -> None:
        device, modules = example_input.device, dict(network.named_modules())
        used = uses(network, example_input)
        able = removable(network).items() if rings else ()
        counts = {name: count for name, count in able if name not in stay and used.get(modules[name])}
        self.layers, self._groups = list(counts), len(groups)
        sizes = [group.size for group in groups] + list(counts.values())
        self.scales = [torch.ones(size, device=device, requires_grad=True) for size in sizes]
        self._depths = [depths(modules[name]).to(device) for name in counts]
        self._angles = [_angles(modules[name].weight, depth) for name, depth in zip(counts, self._depths, strict=True)]

        parameters = dict(network.named_parameters())
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        products = dict.fromkeys(parameters, 0)  # uses of each weight for one image
        for module, count in used.items():
            if id(module.weight) in names:  # else it is computed from others
                products[names[id(module.weight)]] += count
        self._products = torch.tensor(list(products.values()), dtype=torch.float32, device=device)

        # (module, axis) → its length, and where on it the filters of which groups lie
        self._axes: dict[tuple[str, str], tuple[int, list[tuple[int, Tensor, Tensor]]]] = {}
        for number, group in enumerate(groups):
            for part in group.slices:
                places = self._axes.setdefault((part.module, part.axis), (part.length, []))[1]
                places.append((number, part.index.to(device), part.source.to(device)))
        # parameter → dimension → its length, and the axis that runs along it
        self._dims: dict[str, dict[int, tuple[int, tuple[str, str]]]] = {name: {} for name in parameters}
        for module, axis in self._axes:
            for tensor, dim in carriers(modules[module], axis)[0].items():
                if name := names.get(id(modules[module]._parameters.get(tensor))):
                    self._dims[name][dim] = parameters[name].shape[dim], (module, axis)

    def values(self) -> list[Tensor]:
        """What the scales count for: filters relative to their group's largest, rings with those inside them."""
        filters, kernels = self.scales[: self._groups], self.scales[self._groups :]
        return [scale / scale.max().clamp_min(1e-6) for scale in filters] + [_with_inner(scale) for scale in kernels]

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """Name → what the scales make of each weight that they touch."""
        turned = zip(self.scales[self._groups :], self._angles, strict=True)
        multiplied = [_with_inner((scale * angle).tan() / angle.tan()) for scale, angle in turned]
        axes, kernels = self._factors(self.values()[: self._groups] + multiplied)
        touched: dict[str, Tensor] = {}
        parameters = dict(network.named_parameters())
        for name, dims in self._dims.items():
            for dim, (length, key) in dims.items():
                if key[1] == "in":
                    weight = touched.get(name, parameters[name])
                    touched[name] = weight * axes[key][:length].view(-1, *[1] * (weight.ndim - 1 - dim))
        for name, kernel in kernels.items():
            touched[name] = touched.get(name, parameters[name]) * kernel
        return touched

    @torch.no_grad()
    def folded(self, network: nn.Module) -> nn.Module:
        """A copy of the network with the scales in its weights."""
        parameters = dict(network.named_parameters())
        memo: dict[int, Any] = {}
        for name, value in self.weights(network).items():
            old = parameters[name]
            memo[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
        return rebuild(network, memo)

    def expected(self, sharp: float) -> Tensor:
        """Parameters and MACs, (2,), if a scale s is s · (1 + sharp) / (s + sharp) filters or rings.

        With all scales 0 or 1 they are those of the slim network.
        """
        axes, kernels = self._factors([value * (1 + sharp) / (value + sharp) for value in self.values()])
        shares: dict[tuple[int, tuple[str, str]], Tensor] = {}
        elements = []
        for name, size in self._sizes.items():
            left = kernels[name].mean() if name in kernels else torch.ones((), device=self._products.device)
            for length, key in self._dims[name].values():
                if (length, key) not in shares:
                    shares[length, key] = axes[key][:length].mean()
                left = left * shares[length, key]
            elements.append(size * left)
        counts = torch.stack(elements)
        return torch.stack([counts.sum(), counts @ self._products])

    def _factors(self, values: list[Tensor]) -> tuple[dict[tuple[str, str], Tensor], dict[str, Tensor]]:
        """A factor for each place of every axis that filters lie on, and of every kernel whose rings have scales."""
        axes = {}
        for key, (length, parts) in self._axes.items():
            axes[key] = torch.ones(length, device=values[0].device)
            for number, index, source in parts:
                axes[key] = axes[key].index_put((index,), values[number][source])
        layers = zip(self.layers, values[self._groups :], self._depths, strict=True)
        return axes, {f"{name}.weight": torch.cat([value, value.new_ones(1)])[depth] for name, value, depth in layers}


def _with_inner(scale: Tensor) -> Tensor:
    """Each ring's scale times those of the rings inside it."""
    return scale.flip(0).cumprod(0).flip(0)


@torch.no_grad()
def _angles(weight: Tensor, depth: Tensor) -> Tensor:
    """By how much each ring turns the kernel away from what lies inside it, 0 to π/2, (rings,)."""
    energy = weight.detach().float().square().flatten(2).sum((0, 1))
    rings = [energy[depth.flatten() == ring].sum() for ring in range(int(depth.max()) + 1)]
    inside = torch.stack(rings).flip(0).cumsum(0).flip(0)
    # not quite the limits, where the tangent is 0 or infinite
    return torch.atan2(torch.stack(rings)[:-1].sqrt(), inside[1:].sqrt()).clamp(0.01, 1.56)


def _boxes(convolution: nn.Module) -> list[tuple[slice, ...]]:
    """The whole kernel, and what is left of it without its outer ring, without two, …, as far as that is exact."""
    sides = [(0, length) for length in convolution.kernel_size]
    boxes = [tuple(slice(*side) for side in sides)]
    if convolution.padding_mode != "zeros" or convolution.padding == "valid":
        return boxes
    while True:
        inner = [(start + 1, stop - 1) if stop - start >= 3 else (start, stop) for start, stop in sides]
        if inner == sides:
            return boxes
        if convolution.padding != "same":
            room = zip(convolution.padding, convolution.dilation, inner, strict=True)
            if any(padding < dilation * start for padding, dilation, (start, _) in room):
                return boxes
        sides = inner
        boxes.append(tuple(slice(*side) for side in sides))


def _checked(network: nn.Module, removed: Mapping[str, int]) -> list[tuple[nn.Module, int]]:
    """The layers that lose rings, each with how many."""
    known = removable(network)
    for name, count in removed.items():
        if not 0 <= count <= known.get(name, 0):
            raise InputError(
                f"The layer {name!r} has {known.get(name, 0)} ring(s) that can leave exactly, not {count}: ask "
                "removable() which layers have any."
            )
    return [(network.get_submodule(name), count) for name, count in removed.items() if count]
