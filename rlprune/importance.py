"""How much each filter of a group matters, from the weights alone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlprune.errors import InputError, one_of
from rlprune.groups import FilterGroup, Slice

CRITERIA = ["magnitude", "batchnorm"]


def scores(network: nn.Module, groups: Sequence[FilterGroup], criterion: str = "magnitude") -> list[Tensor]:
    """One score per filter of each group; the higher, the more it matters.

    Args:
        network: the one that ``groups`` was traced on.
        groups: its filter groups.
        criterion: "magnitude", the L1 norm of the filter's weights (Li et al. 2017), or "batchnorm",
            the absolute scale |γ| of its batch norm (network slimming, Liu et al. 2017).
            Over the layers of a group the mean is taken, each layer divided by its own mean.

    Returns:
        float32 tensors of shape (size,) on the CPU; their scale means nothing across groups.

    Raises:
        InputError: an unknown criterion, or "batchnorm" for a group without batch norm.
    """
    one_of("criterion", criterion, CRITERIA)
    modules = dict(network.named_modules())
    result = []
    for group in groups:
        layers = [
            _per_filter(group, part, values)
            for part in group.slices
            if (values := _VALUES[criterion](modules[part.module], part.axis)) is not None
        ]
        if not layers:
            raise InputError(f"Group {group.name} has no batch norm with a scale: use criterion 'magnitude'.")
        result.append(torch.stack([layer / layer.mean().clamp(min=1e-12) for layer in layers]).mean(0))
    return result


@torch.no_grad()
def _magnitude(module: nn.Module, axis: str) -> Tensor | None:
    """L1 norm of what makes each filter, (length of the axis,); None where nothing is made."""
    if axis == "in" or not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return None
    weight = module.weight.detach().float().abs()
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # (inputs, outputs per group, …) → (outputs, …)
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1).sum(1)


@torch.no_grad()
def _scale(module: nn.Module, axis: str) -> Tensor | None:
    """|γ| of a batch norm, (length of the axis,)."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.weight is None:
        return None
    return module.weight.detach().float().abs()


_VALUES = {"magnitude": _magnitude, "batchnorm": _scale}


def _per_filter(group: FilterGroup, part: Slice, values: Tensor) -> Tensor:
    """Values along an axis, averaged for each filter of the group, (size,)."""
    owned = len(part.index) // group.size
    total = torch.zeros(group.size).index_add_(0, part.source, values.cpu()[part.index])
    return total / owned
