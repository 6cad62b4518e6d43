"""From keep masks to the masked network and to the slim network, which compute the same function.

A keep mask says for every filter of a group whether it stays. `slim` copies
only what stays into a new network; `masked` keeps the shapes and removes the
filters' effect. Both read one table, `carriers`, of what a filter owns.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rlprune.errors import InputError

if TYPE_CHECKING:  # `groups` verifies what it finds with `slim` and `masked`, so it stands below this module
    from rlprune.groups import FilterGroup

_CONV = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_NORM = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_NORM_TENSORS = {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = ("_parameters", "_buffers", "_modules")  # what a module is made of, beside what its code keeps


def carriers(module: nn.Module, axis: str) -> tuple[dict[str, int], tuple[str, ...]] | None:
    """What in a module runs along one of its axes; None for a module whose filters cannot be removed.

    Args:
        module: a convolution, linear layer or normalisation of single channels.
        axis: "out" (filters that it makes), "in" (filters that it reads) or
            "channels" (both at once, for what is made of single channels, as batch norm is, or of
            whole groups of them, as a grouped or depth-wise convolution is; the places are those it makes).

    Returns:
        tensor name → dimension, and the attributes that shrink along with the axis, the first of
        them its length. A dimension may be shorter than the axis: a grouped convolution's weight holds
        only the places within one group, and what leaves must leave at the same places of every group.
    """
    if isinstance(module, _CONV):
        transposed = isinstance(module, _TRANSPOSED)
        if axis == "channels" and module.groups > 1 and (not transposed or module.in_channels == module.out_channels):
            return {"weight": 0, "bias": 0}, ("out_channels", "in_channels", "groups")
        if axis == "out":
            return {"weight": int(transposed), "bias": 0}, ("out_channels",)
        if axis == "in":
            return {"weight": int(not transposed)}, ("in_channels",)
    elif isinstance(module, nn.Linear):
        if axis == "out":
            return {"weight": 0, "bias": 0}, ("out_features",)
        if axis == "in":
            return {"weight": 1}, ("in_features",)
    elif isinstance(module, _NORM) and axis == "channels":
        return _NORM_TENSORS, ("num_features",)
    elif isinstance(module, nn.PReLU) and axis == "channels" and module.num_parameters > 1:
        return {"weight": 0}, ("num_parameters",)
    return None


def check_masks(groups: Sequence[FilterGroup], masks: Sequence[Tensor]) -> None:
    """Raise `InputError` unless there is one boolean mask per group, of its size, keeping at least one filter."""
    if len(masks) != len(groups):
        raise InputError(f"There must be one mask per group: {len(groups)} groups, but {len(masks)} masks.")
    for group, mask in zip(groups, masks, strict=True):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"The mask of group {group.name} must be a tensor of dtype torch.bool, not {kind}.")
        if mask.shape != (group.size,):
            raise InputError(
                f"The mask of group {group.name} must have shape ({group.size},), not {tuple(mask.shape)}."
            )
        if not mask.any():
            raise InputError(f"The mask of group {group.name} removes all {group.size} filters: keep at least one.")


def slim(network: nn.Module, groups: Sequence[FilterGroup], masks: Sequence[Tensor]) -> nn.Module:
    """A new, physically smaller network that holds only the kept filters.

    Args:
        network: the one that ``groups`` was traced on; it stays as it is.
        groups: the filters that may leave.
        masks: one boolean tensor per group, (size,), True where a filter stays.

    Returns:
        a network that shares no memory with the given one. It keeps the mode (training or
        evaluation), ``requires_grad`` and memory format; forward and backward hooks are left behind.

    Raises:
        InputError: the masks do not fit the groups, or the groups do not fit the network.
    """
    check_masks(groups, masks)
    # inference tensors could never be trained, so leave that mode while they are made
    with torch.inference_mode(False), torch.no_grad():
        cuts: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        lengths: list[tuple[nn.Module, str, int]] = []
        for module, axis, keep in _decisions(network, groups, masks):
            tensors, attributes = carriers(module, axis)
            for name, dim in tensors.items():
                tensor = getattr(module, name)
                if tensor is not None:
                    places = keep[: tensor.shape[dim]].nonzero().flatten()
                    cuts.setdefault(id(tensor), (tensor, {}))[1][dim] = places.to(tensor.device)
            kept = int(keep.sum())
            lengths += [(module, name, getattr(module, name) * kept // len(keep)) for name in attributes]
        memo: dict[int, Any] = {key: _like(tensor, _select(tensor, dims)) for key, (tensor, dims) in cuts.items()}
        small = rebuild(network, memo)
        for module, attribute, length in lengths:
            setattr(memo[id(module)], attribute, length)
    return small


@contextlib.contextmanager
def masked(network: nn.Module, groups: Sequence[FilterGroup], masks: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Within this context the network computes, at full size, the function of ``slim(network, groups, masks)``.

    All that a removed filter owns is zeroed: what makes it, so that nothing stored there
    (NaN included) can spread, and what reads it, so that no activation of zero can leak.
    On exit, after an error too, the network has its own tensors back, bit for bit. Within it,
    parameters that a removed filter touches are stand-ins: do not train them there.

    Yields:
        the network itself.

    Raises:
        InputError: the masks do not fit the groups, or the groups do not fit the network.
    """
    check_masks(groups, masks)
    # every buffer gets a stand-in, so that statistics gathered within the context go with it
    stand_ins = {id(buffer): buffer.clone() for buffer in network.buffers()}
    with torch.no_grad():
        for module, axis, keep in _decisions(network, groups, masks):
            for name, dim in carriers(module, axis)[0].items():
                tensor = getattr(module, name)
                if tensor is not None:
                    removed = (~keep[: tensor.shape[dim]]).nonzero().flatten()
                    if id(tensor) not in stand_ins:
                        stand_ins[id(tensor)] = _like(tensor, tensor.detach().clone())
                    fill = 1 if name == "running_var" else 0
                    stand_ins[id(tensor)].index_fill_(dim, removed.to(tensor.device), fill)
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in network.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if id(tensor) in stand_ins:
                        swapped.append((store, name, tensor))
                        store[name] = stand_ins[id(tensor)]
        yield network
    finally:
        for store, name, tensor in swapped:
            store[name] = tensor


def memory_format(network: nn.Module) -> torch.memory_format:
    """How the kernels of its 2-d convolutions lie in memory: channels-last, or contiguous."""
    strided = [tensor for tensor in network.parameters() if tensor.ndim == 4 and not tensor.is_contiguous()]
    last = any(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in strided)
    return torch.channels_last if last else torch.contiguous_format


def rebuild(network: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a network in which some tensors are replaced and none of those is copied.

    Args:
        network: what to copy, its hooks apart.
        memo: ``id`` of a tensor → its replacement. As after `copy.deepcopy`,
            it then also leads from the ``id`` of every module to its copy.
    """
    for tensor in [*network.parameters(), *network.buffers()]:
        if id(tensor) not in memo:
            memo[id(tensor)] = _like(tensor, tensor.detach().clone())
    for module in network.modules():
        for name, value in module.__dict__.items():
            # most of the time of a copy would go into these, nearly always empty, dictionaries
            if name.startswith(_HOOKS) or ("_hooks" in name and isinstance(value, dict) and not value):
                memo[id(value)] = type(value)()
            elif isinstance(value, Tensor | list | tuple | dict) and name not in _OWN:
                for leaf in tree_leaves(value):  # what the code has kept of a pass, which deepcopy refuses
                    if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                        memo.setdefault(id(leaf), leaf.detach().clone())
    return copy.deepcopy(network, memo)


def widths(masks: Sequence[Tensor]) -> list[int]:
    """How many filters each mask keeps."""
    return [int(mask.sum()) for mask in masks]


def keep_top(scores: Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
    """Masks that keep the highest scores; of equal ones those that come first.

    Args:
        scores: one tensor per group, (size,).
        widths: filters to keep, per group.

    Raises:
        InputError: not one width per group, or a width outside 1 to size.
    """
    if len(scores) != len(widths):
        raise InputError(f"There must be one width per group: {len(scores)} groups, but {len(widths)} widths.")
    masks = []
    for index, (score, width) in enumerate(zip(scores, widths, strict=True)):
        if not 1 <= width <= len(score):
            raise InputError(f"The width of group number {index} must lie in 1 to {len(score)}, not {width}.")
        mask = torch.zeros(len(score), dtype=torch.bool)
        mask[torch.sort(score.detach(), descending=True, stable=True).indices[: int(width)].cpu()] = True
        masks.append(mask)
    return masks


def _decisions(
    network: nn.Module, groups: Sequence[FilterGroup], masks: Sequence[Tensor]
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Each axis of each module from which something leaves, with its keep mask (length of the axis,)."""
    keeps: dict[tuple[str, str], Tensor] = {}
    for group, mask in zip(groups, masks, strict=True):
        mask = mask.cpu()
        if mask.all():
            continue
        for part in group.slices:
            keep = keeps.setdefault((part.module, part.axis), torch.ones(part.length, dtype=torch.bool))
            keep[part.index] = mask[part.source]
    modules = dict(network.named_modules())
    for (name, axis), keep in keeps.items():
        module = modules.get(name)
        found = carriers(module, axis) if module is not None else None
        if found is None or getattr(module, found[1][0]) != len(keep) or not _whole(module, axis, keep):
            raise InputError(
                f"The groups were traced on another network: this one has no module {name!r} with {len(keep)} "
                f"{axis if axis == 'channels' else axis + 'put channels'}. Trace this network."
            )
        yield module, axis, keep


def _whole(module: nn.Module, axis: str, keep: Tensor) -> bool:
    """Whether a convolution's groups leave as a whole ("channels"), or keep the same places in each ("in", "out")."""
    if not isinstance(module, _CONV):
        return True
    blocks = keep.view(module.groups, -1)
    return bool((blocks == (blocks[:, :1] if axis == "channels" else blocks[:1])).all())


def _select(tensor: Tensor, places: dict[int, Tensor]) -> Tensor:
    """The given places of some dimensions, in the memory format of ``tensor``."""
    tensor = tensor.detach()
    if tensor.ndim != 4 or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        for dim in sorted(places):  # rows first: each is copied in one piece
            tensor = tensor.index_select(dim, places[dim])
        return tensor
    # channels-last: the same in the order in which the numbers lie, three times faster
    tensor = tensor.permute(0, 2, 3, 1)
    if 0 in places:
        tensor = tensor.index_select(0, places[0])
    if 1 in places:
        tensor = tensor.gather(3, places[1].expand(*tensor.shape[:3], -1))
    return tensor.permute(0, 3, 1, 2)


def _like(original: Tensor, values: Tensor) -> Tensor:
    """The values as a parameter if the original is one, with its ``requires_grad``."""
    if isinstance(original, nn.Parameter):
        return nn.Parameter(values, requires_grad=original.requires_grad)
    return values
