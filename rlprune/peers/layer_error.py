"""What layers compute differently without some filters: the fitness of `rlprune.peers.genetic`, and its check."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlprune.errors import InputError
from rlprune.evaluate import outputs
from rlprune.forward import read_by
from rlprune.groups import FilterGroup

Look = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any], Tensor], None]


@dataclass(frozen=True)
class ErrorForm:
    """What it takes to tell the error of any mask of one group, float32 on the CPU.

    All is relative to the energy of the reader's output, or to its variance if that is ``normalised``.

    Attributes:
        products: Q, (readers, size, size): of what filters add to the output, the inner product of each two.
        shared: the inner product of what each filter adds and the whole output, (readers, size).
        normalised: see `rlprune.peers.genetic`.
    """

    products: Tensor
    shared: Tensor
    normalised: bool

    @property
    def size(self) -> int:
        """Filters of the group."""
        return self.products.shape[-1]


def errors(form: ErrorForm, masks: Tensor) -> Tensor:
    """The fitness, the smaller the better: the readers' mean error under each mask, (masks, size) → (masks,)."""
    removed = (~masks).to(form.products.dtype)
    energy = ((removed @ form.products) * removed).sum(-1)
    return _error(energy, form.shared @ removed.T, form.normalised).mean(0)


def _error(energy: Tensor, shared: Tensor, normalised: bool) -> Tensor:
    """The error by the energy of what was removed and what that shares with the whole output, both relative to it."""
    if not normalised:
        return energy
    left = 1 - 2 * shared + energy
    return 1 - (1 - shared).clamp_min(0) ** 2 / left.clamp_min(1e-6)  # at worst nothing is left


@torch.no_grad()
def error_forms(
    network: nn.Module,
    groups: Sequence[FilterGroup],
    images: Tensor,
    patches: int,
    normalised: bool,
    generator: torch.Generator,
) -> list[ErrorForm]:
    """Per group what the fitness needs, measured once.

    Of filters c and d, Q is Σ (Σ_o w_oc w_od) · mean(x_c x_d) over pairs of kernel positions. H itself, with C·k²
    rows, is never held as a whole. Images are normalised, (N, C, H, W); see `rlprune.peers.genetic` for the rest.

    Raises:
        InputError: layers other than Conv2d and Linear read a group.
    """
    readers = [_readers(network, group) for group in groups]
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for group in readers for module in group}

    def look(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Tensor) -> None:
        count = -(-patches * len(output) // len(images))
        seen[module].append(_sampled(module, read_by(inputs, named).float(), output.float(), count, generator))

    _run(network, images, seen, look)
    forms = []
    for group, of_group in zip(groups, readers, strict=True):
        # a reader that was not seen runs in training only
        parts = [_form(module, seen[module], places, normalised) for module, places in of_group.items() if seen[module]]
        parts = parts or [(torch.zeros(group.size, group.size), torch.zeros(group.size))]
        products, shared = (torch.stack(part).cpu() for part in zip(*parts, strict=True))
        forms.append(ErrorForm(products, shared, normalised))
    return forms


@torch.no_grad()
def fidelity(
    network: nn.Module,
    group: FilterGroup,
    masks: Sequence[Tensor],
    images: Tensor,
    held_out: Tensor,
    patches: int = 2048,
    normalised: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Fitness and true error of masks; Spearman's correlation of the two says how far the first can be trusted.

    Args:
        network: unpruned.
        group: one of its filter groups.
        masks: of this group, (size,) each.
        images: that the fitness is taken from, normalised, (N, C, H, W).
        held_out: others, on which the group's readers run with and without the removed filters.
        patches: see `rlprune.peers.genetic`.
        normalised: see `rlprune.peers.genetic`.
        seed: of the patches.

    Returns:
        both, (masks,).
    """
    (form,) = error_forms(network, [group], images, patches, normalised, torch.Generator().manual_seed(seed))
    readers = _readers(network, group)
    # per mask, of the change in each output: count, Σ, Σ of squares and of products with the whole
    totals: dict[nn.Module, list[Any]] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Tensor) -> None:
        axis, total = -1 if isinstance(module, nn.Linear) else 1, totals.setdefault(module, [0] * (1 + len(masks)))
        with torch.autocast(output.device.type, enabled=False):
            read = read_by(inputs, named).float()
            whole = module.forward(read)  # a call would end up here again
            made = None
            for number, mask in enumerate([None, *masks]):  # None: without all inputs, for the whole output
                less = read.clone()
                gone = slice(None) if mask is None else readers[module][~mask].flatten()
                less.movedim(axis, -1)[..., gone] = 0
                change = (whole - module.forward(less)).movedim(axis, -1).flatten(0, -2).double()
                made = change if made is None else made
                sums = [torch.ones_like(change), change, change**2, change * made]
                total[number] += torch.stack([part.sum(0) for part in sums])

    _run(network, held_out, readers, look)
    true = torch.zeros(len(masks), dtype=torch.float64)
    for total in totals.values():
        count, sums, squares, products = torch.stack(total).cpu().unbind(1)
        if normalised:
            squares, products = squares - sums**2 / count, products - sums * sums[0] / count
        energy, shared = (part.sum(1) / squares[0].sum().clamp_min(1e-12) for part in (squares, products))
        true += _error(energy[1:], shared[1:], normalised) / len(readers)
    return errors(form, torch.stack(list(masks))), true


def _readers(network: nn.Module, group: FilterGroup) -> dict[nn.Module, Tensor]:
    """The layers that read a group, and where each reads its filters, (size, places per filter)."""
    readers = {}
    for part in group.slices:
        module = network.get_submodule(part.module)
        if part.axis == "in" and not isinstance(module, nn.Conv2d | nn.Linear):
            raise InputError(
                f"Genetic pruning knows how Conv2d and Linear layers read filters, not {type(module).__name__}: "
                f"exclude {group.name}, which {part.module} reads."
            )
        if part.axis == "in":
            readers[module] = part.index[part.source.argsort(stable=True)].view(group.size, -1)
    return readers


def _run(network: nn.Module, images: Tensor, modules: Iterable[nn.Module], look: Look) -> None:
    """Send images through the network with a forward hook on some modules."""
    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in modules]
    try:
        outputs(network, images)
    finally:
        for hook in hooks:
            hook.remove()


def _sampled(module: nn.Module, x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What a layer reads for random positions of its output, (count, inputs, kernel positions), and what it makes."""
    if isinstance(module, nn.Linear):
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        chosen = torch.randperm(len(x), generator=generator)[:count].to(x.device)
        return x[chosen, :, None], y[chosen]
    y = y.permute(0, 2, 3, 1)
    chosen = torch.randperm(y[..., 0].numel(), generator=generator)[:count].to(x.device)
    image, *corner = torch.unravel_index(chosen, y.shape[:3])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, _padding(module), mode=mode).permute(0, 2, 3, 1)
    rows, columns = (
        corner[dim][:, None] * module.stride[dim] + torch.arange(size, device=x.device) * module.dilation[dim]
        for dim, size in enumerate(module.kernel_size)
    )
    read = x[image[:, None, None], rows[:, :, None], columns[:, None]]
    return read.flatten(1, 2).transpose(1, 2), y[image, *corner]


def _padding(module: nn.Conv2d) -> list[int]:
    """What a convolution adds on either side, the last dimension first, as `F.pad` has it."""
    if isinstance(module.padding, str):
        both = [(size - 1) * step for size, step in zip(module.kernel_size, module.dilation, strict=True)]
        sides = [(total // 2, total - total // 2) if module.padding == "same" else (0, 0) for total in both]
    else:
        sides = [(padding, padding) for padding in module.padding]
    return [side for pair in reversed(sides) for side in pair]


def _form(
    module: nn.Module, seen: list[tuple[Tensor, Tensor]], places: Tensor, normalised: bool
) -> tuple[Tensor, Tensor]:
    """Q of one reader, and what each filter's part shares with its output; see `ErrorForm`."""
    x, y = map(torch.cat, zip(*seen, strict=True))
    y = y - module.bias if module.bias is not None else y
    weight, count = module.weight.detach().float()[..., None].flatten(2), getattr(module, "groups", 1)
    if count > 1:  # a grouped convolution: with zeros for what each of its groups does not read
        own = torch.eye(count, device=weight.device).repeat_interleave(len(weight) // count, 0)
        weight = (own[:, :, None, None] * weight[:, None]).flatten(1, 2)
    # both (positions or outputs, places per filter and kernel positions, size)
    x, weight = (values[:, places].permute(0, 2, 3, 1).flatten(1, 2) for values in (x, weight))
    if normalised:
        x, y = x - x.mean(0), y - y.mean(0)
    form, shared = x.new_zeros(len(places), len(places)), x.new_zeros(len(places))
    for tap in range(x.shape[1]):  # and those behind it: xᵀx and wᵀw are symmetric
        products = (x[:, tap].T @ x[:, tap:].flatten(1)) * (weight[:, tap].T @ weight[:, tap:].flatten(1))
        products = products.view(len(places), -1, len(places))
        behind = products[:, 1:].sum(1)
        form += products[:, 0] + behind + behind.T
        shared += ((y.T @ x[:, tap]) * weight[:, tap]).sum(0)
    energy = y.square().sum().clamp_min(1e-12)
    return form / energy, shared / energy
