"""Does a network without some filters compute what it computes with them masked? With random weights, it must."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlprune.coupling import LAYERS
from rlprune.errors import InputError, first_line
from rlprune.forward import seeded
from rlprune.masking import keep_top, masked, rebuild, slim

if TYPE_CHECKING:  # `groups` stands below this module
    from rlprune.groups import FilterGroup

_SIDES = (64, 128)  # pixels to try: channels couple in the same way at any size, and large images take long


def verified(
    network: nn.Module, example_input: Tensor, groups: list[FilterGroup], layers: list[str]
) -> tuple[list[FilterGroup], list[tuple[FilterGroup, str]]]:
    """Try the groups on the network with random weights.

    Args:
        network: the one that the groups were traced on; it stays as it is.
        example_input: a batch that the network can process.
        groups: what may leave.
        layers: names of the convolution and linear layers that the example input makes run, in order.

    Returns:
        the groups for which `slim` and `masked` agree, and (group, reason) of each of the others.

    Raises:
        InputError: the network does not run with random weights.
    """
    trial = _trial(network, example_input, layers)
    if _disagreement(trial, groups) is None:
        return groups, []
    accepted: list[FilterGroup] = []
    refused: list[tuple[FilterGroup, str]] = []
    for group in groups:
        if fault := _disagreement(trial, [*accepted, group]):
            refused.append((group, fault))
        else:
            accepted.append(group)
    return accepted, refused


@dataclass(frozen=True)
class _Trial:
    """A network with random weights, in evaluation mode, and two random images.

    Attributes:
        network: the network.
        images: for evaluation mode, (2, …).
        training_images: for training mode, where a branch may need larger ones, (2, …).
        tolerance: relative error of its arithmetic.
    """

    network: nn.Module
    images: Tensor
    training_images: Tensor
    tolerance: float


def _trial(network: nn.Module, example_input: Tensor, layers: list[str]) -> _Trial:
    """The network as it is tried, with images no larger than it takes, and in float64, which hides no small fault."""
    generator = torch.Generator().manual_seed(0)
    native = tuple(example_input.shape[1:])
    shapes = dict.fromkeys((*native[:1], *(min(side, most) for side in native[1:])) for most in _SIDES)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        trial = randomised(network, generator, dtype)
        largest = torch.empty((2, *native), dtype=dtype).uniform_(-1, 1, generator=generator).to(example_input.device)
        for shape in shapes if len(native) == 3 else ():
            images = largest[..., : shape[1], : shape[2]]
            if _layers_run(trial, images) == layers:
                return _Trial(trial, images, largest if _training_failure(trial, images) else images, tolerance)
        if not (failure := _failure(trial, largest)):  # else a dtype may be fixed in the network's code
            return _Trial(trial, largest, largest, tolerance)
    raise InputError(f"The network cannot be tried with random weights: {failure}.")


def randomised(network: nn.Module, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy in evaluation mode with random weights and statistics, under which every filter counts.

    Trained weights could hide a fault by a scale of zero or a dead activation, and fresh ones by biases of zero.
    """
    memo: dict[int, Any] = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        values = torch.empty(tensor.shape, dtype=dtype).uniform_(-1, 1, generator=generator)
        if tensor.ndim > 1:
            values *= (6 * len(values) / values.numel()) ** 0.5  # He's bound: signals keep their size
        else:
            values.div_(2).add_(1 if name.endswith(("weight", "running_var")) else 0)
        values = values.to(tensor.device)
        memo[id(tensor)] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values
    return rebuild(network, memo).eval()


def _layers_run(network: nn.Module, images: Tensor) -> list[str]:
    """Names of the layers that the images make run, in order; none if the network fails."""
    ran: dict[str, None] = {}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.update({name: None}))
        for name, module in network.named_modules()
        if isinstance(module, LAYERS)
    ]
    failed = _failure(network, images)
    for hook in hooks:
        hook.remove()
    return [] if failed else list(ran)


@torch.no_grad()
def _disagreement(trial: _Trial, groups: list[FilterGroup]) -> str | None:
    """What goes wrong when filters of every group leave; None if nothing does.

    Random halves stay, then the others, so that none stays both times: code may depend on a certain one. Then a single
    filter of each group, a width at which code that squeezes sees another shape.
    """
    generator = torch.Generator().manual_seed(len(groups))
    halves = [torch.rand(group.size, generator=generator) for group in groups]
    rest = [1 - half for half in halves]
    for scores, widths in (
        (halves, [(group.size + 1) // 2 for group in groups]),
        (rest, [max(group.size // 2, 1) for group in groups]),
        (rest, [1] * len(groups)),
    ):
        masks = keep_top(scores, widths)
        try:
            small = slim(trial.network, groups, masks)
            with masked(trial.network, groups, masks):
                expected = trial.network(trial.images)
            error = (small(trial.images) - expected).abs().max() / expected.abs().max()
        except Exception as failure:  # whatever the network's code raises at other widths
            return (
                f"without some of its filters the network fails ({first_line(failure)}); code such as view(-1, 400) "
                "fixes their number, where flatten(1) does not"
            )
        if not error <= trial.tolerance:
            return "the network without its filters and with them masked differ"
        # a branch may run in training only
        failure = _training_failure(small, trial.training_images) if scores is halves else None
        if failure and not _training_failure(trial.network, trial.training_images):
            return f"without some of its filters the network fails in training ({failure})"
    return None


def _training_failure(network: nn.Module, images: Tensor) -> str | None:
    """What a forward pass in training mode raises, if it does; the network is then in evaluation mode as before."""
    # the statistics of batch norms stay, and the generators that dropout draws from
    with masked(network, (), ()), seeded(0, images.device):
        failure = _failure(network.train(), images)
    network.eval()
    return failure


@torch.no_grad()
def _failure(network: nn.Module, images: Tensor) -> str | None:
    """What a forward pass raises, if it does."""
    try:
        network(images)
    except Exception as error:  # whatever the network's own code raises
        return first_line(error)
    return None
