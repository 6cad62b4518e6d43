"""How much each filter of a group matters: single criteria, and features from which an agent makes its own."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlprune.errors import InputError, one_of
from rlprune.forward import check_labels, evaluating, read_by, suitable_batch
from rlprune.groups import FilterGroup, Slice

CRITERIA = ["magnitude", "batchnorm", "taylor"]
FEATURES = ["magnitude", "batchnorm", "taylor", "outgoing", "distinct"]
Sample = tuple[Tensor, Tensor]
_NORM = nn.modules.batchnorm._BatchNorm
_NORMS = (_NORM, nn.modules.instancenorm._InstanceNorm)  # of single channels, whatever the others hold
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


def scores(
    network: nn.Module,
    groups: Sequence[FilterGroup],
    criterion: str = "magnitude",
    sample: Sample | None = None,
    relative: bool = True,
) -> list[Tensor]:
    """One score per filter of each group; the higher, the more it matters.

    Args:
        network: the one that ``groups`` was traced on.
        groups: its filter groups.
        criterion: "magnitude", the L1 norm of the filter's weights (Li et al. 2017); "batchnorm", the absolute
            scale |γ| of its batch norm (network slimming, Liu et al. 2017); or "taylor", the first-order
            change of the loss if the filter were zero (Molchanov et al. 2019, section 3.1).
            Over the layers of a group the mean is taken.
        sample: normalised images (N, C, H, W) and labels (N,), for "taylor".
        relative: each layer is divided by its own mean; otherwise values compare across groups as they are.

    Returns:
        float32 tensors of shape (size,) on the CPU.

    Raises:
        InputError: an unknown criterion, "batchnorm" for a group without batch norm, or "taylor" without a sample.
    """
    one_of("criterion", criterion, CRITERIA)
    if criterion == "taylor" and sample is None:
        raise InputError(
            "Criterion 'taylor' needs data, and training images to recover on (recalibration): give both, or use "
            "criterion 'magnitude'."
        )
    result = []
    values = _values(network, groups, criterion, sample)
    for group, score in zip(groups, _gathered(groups, values, relative), strict=True):
        if score is None:
            lack = "has no batch norm with a scale" if criterion == "batchnorm" else "is not reached by the loss"
            raise InputError(
                f"Group {group.name} {lack}: use criterion 'magnitude', or leave the group as it is with "
                f"exclude=[{group.name!r}]."
            )
        result.append(score)
    return result


def features(
    network: nn.Module,
    groups: Sequence[FilterGroup],
    sample: Sample | None = None,
    more: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """What an agent sees of single filters, comparable between layers and networks.

    Args:
        network: the one that ``groups`` was traced on.
        groups: its filter groups.
        sample: normalised images (N, C, H, W) and labels (N,); without it "taylor" is 0.
        more: a further feature, (size,) per group, which becomes the last column.

    Returns:
        one tensor per group, (size, len(FEATURES)) or one column more, float32 on the CPU, each of mean 0 and standard
        deviation 1 within the group, clipped at ±3; 0 where a feature is not defined or does not vary.
        Columns: the criteria of `scores`; "outgoing", the L1 norm of the weights that read the filter; and
        "distinct", one minus the largest absolute cosine between the filter's weights and another's.
    """
    columns = []
    for name in FEATURES:
        known = name != "taylor" or sample is not None
        columns.append(_gathered(groups, _values(network, groups, name, sample) if known else {}))
    if more is not None:
        columns.append(list(more))
    return [
        torch.stack([_standardised(column, group.size) for column in of_group], 1)
        for group, *of_group in zip(groups, *columns, strict=True)
    ]


def _values(
    network: nn.Module, groups: Sequence[FilterGroup], name: str, sample: Sample | None
) -> dict[tuple[str, str], Tensor]:
    """(module, axis) → a value per place of that axis, where there is one."""
    if name == "taylor":
        return _taylor(network, *sample)
    modules = dict(network.named_modules())
    keys = {(part.module, part.axis) for group in groups for part in group.slices}
    found = {(module, axis): _OF_MODULE[name](modules[module], axis) for module, axis in keys}
    return {key: value for key, value in found.items() if value is not None}


def _gathered(
    groups: Sequence[FilterGroup], values: dict[tuple[str, str], Tensor], relative: bool = True
) -> list[Tensor | None]:
    """Values of axes per filter of each group: the mean over layers, each divided by its own mean if ``relative``."""
    result: list[Tensor | None] = []
    for group in groups:
        parts = [part for part in group.slices if (part.module, part.axis) in values]
        layers = [_per_filter(group, part, values[part.module, part.axis]) for part in parts]
        scaled = [layer / layer.mean().clamp(min=1e-12) for layer in layers] if relative else layers
        result.append(torch.stack(scaled).mean(0) if scaled else None)
    return result


def _per_filter(group: FilterGroup, part: Slice, values: Tensor) -> Tensor:
    """Values along an axis, averaged for each filter of the group, (size,)."""
    owned = len(part.index) // group.size
    total = torch.zeros(group.size, dtype=values.dtype).index_add_(0, part.source, values.cpu()[part.index])
    return total / owned


def _standardised(values: Tensor | None, size: int) -> Tensor:
    """(size,): mean 0, standard deviation 1, clipped at ±3."""
    if values is None or size < 2 or values.std() <= 1e-6 * values.abs().mean():
        return torch.zeros(size)
    return ((values - values.mean()) / values.std()).clamp(-3, 3)


@torch.no_grad()
def _magnitude(module: nn.Module, axis: str) -> Tensor | None:
    """L1 norm of what makes each filter, (length of the axis,); None where nothing is made."""
    if axis == "in" or not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return None
    weight = module.weight.detach().float().abs()
    if isinstance(module, _TRANSPOSED):  # (inputs, outputs per group, …) → (outputs, …)
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1).sum(1)


@torch.no_grad()
def _scale(module: nn.Module, axis: str) -> Tensor | None:
    """|γ| of a batch norm, (length of the axis,)."""
    if not isinstance(module, _NORM) or module.weight is None:
        return None
    return module.weight.detach().float().abs()


@torch.no_grad()
def _outgoing(module: nn.Module, axis: str) -> Tensor | None:
    """L1 norm of the weights that read each filter, (length of the axis,)."""
    if axis != "in" or getattr(module, "groups", 1) > 1:
        return None
    dim = 0 if isinstance(module, _TRANSPOSED) else 1
    return module.weight.detach().float().abs().movedim(dim, 0).flatten(1).sum(1)


@torch.no_grad()
def _distinct(module: nn.Module, axis: str) -> Tensor | None:
    """One minus the largest absolute cosine with another filter of the layer, (length of the axis,)."""
    if axis != "out" or isinstance(module, _TRANSPOSED) or len(module.weight) < 2:
        return None
    rows = F.normalize(module.weight.detach().float().flatten(1), dim=1)
    return 1 - (rows @ rows.T).abs().fill_diagonal_(0).amax(1)


_OF_MODULE = {"magnitude": _magnitude, "batchnorm": _scale, "outgoing": _outgoing, "distinct": _distinct}


def _taylor(network: nn.Module, images: Tensor, labels: Tensor) -> dict[tuple[str, str], Tensor]:
    """Root mean square over images of Σ activation · gradient, per channel that a layer makes.

    Taken behind the norm of a channel, where there is one: where a gate of 0 would remove the filter.
    """
    names = {module: name for name, module in network.named_modules()}
    made: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}  # id of what a layer hands on → layer, output, that

    def gate(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
        if isinstance(module, _NORMS):
            made.pop(id(read_by(inputs, named)), None)  # the convolution before it
        handed = output.clone()  # a ReLU in place must not change what the gradient belongs to
        made[id(handed)] = module, output, handed
        return handed

    layers = (*_NORMS, nn.modules.conv._ConvNd, nn.Linear)
    hooks = [module.register_forward_hook(gate, with_kwargs=True) for module in names if isinstance(module, layers)]
    step = suitable_batch(images)
    totals: dict[nn.Module, Tensor] = {}
    with evaluating(network):
        try:
            for start in range(0, len(images), step):
                made.clear()
                with torch.enable_grad():  # of activations only: the weights' own gradients stay as they are
                    logits = network(images[start : start + step].detach().requires_grad_())
                    check_labels(int(labels.max()), logits.shape[-1])
                    loss = F.cross_entropy(logits, labels[start : start + step], reduction="sum")
                    outputs = [output for _, output, _ in made.values()]
                    gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
                changes: dict[tuple[nn.Module, int], Tensor] = {}
                for (module, output, _), gradient in zip(made.values(), gradients, strict=True):
                    if gradient is not None:
                        change = (output * gradient).detach().float()
                        if isinstance(module, nn.Linear):  # (N, …, features): its filters are last
                            change = change.flatten(1, -2).sum(1) if change.ndim > 2 else change
                        else:
                            change = change.flatten(2).sum(2) if change.ndim > 2 else change
                        # a gate would act on all calls of a layer at once
                        changes[module, len(change)] = changes.get((module, len(change)), 0) + change
                for (module, _), change in changes.items():
                    totals[module] = totals.get(module, 0) + change.square().sum(0).cpu()
        finally:
            for hook in hooks:
                hook.remove()
    scale = {module: (total / len(images)).sqrt() for module, total in totals.items()}
    return {(names[module], axis): value for module, value in scale.items() for axis in ("out", "channels")}
