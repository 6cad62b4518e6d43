"""Genetic channel pruning (Hu, Sun, Li, Wang, Gu 2018, arXiv 1805.11394): evolution chooses which filters go.

Layer by layer, the least sensitive first, keep masks of one width evolve by crossover, mutation and selection. Their
fitness comes in two cheap steps. What a layer computes changes by δwᵀ H δw, summed over its outputs, where δw zeroes
the weights that read removed filters and H is the mean of x·xᵀ over the layer's input patches; and this layer error
stands for the network's. H is taken once a layer, and no candidate needs a forward pass. Here it is summed over kernel
positions as well, which leaves rᵀ Q r, r being 1 for each removed filter: one small product judges a population.

Where the paper is silent, or something else serves better:

- A group's error is the mean over all layers that read it, each relative to its own output. So filters that a
  residual sum couples are decided at once.
- Where there is batch norm, neither a shift nor a factor is an error, since the statistics measured again, as on
  everything returned, make both good: H is of patches less their mean, and of δwᵀ H δw counts what is left after the
  best factor, which is one less the squared correlation of what a layer computes with what it computed before. By the
  plain error, evolution keeps the filters that stand for a few classes and loses the rest, at an error far below that
  of random masks, which only make everything smaller. ``normalised=False`` gives the error of the paper.
- All H are of the unpruned network, not of the network as pruned so far. So the order of the groups is that of the
  record alone.
- Sensitivity is the reward lost when a group alone keeps 1/8, 1/4 or 1/2 of its filters, these too chosen by
  evolution. Every group gets the share at which it alone would lose ``tolerance`` of what the median group loses at
  1/8; then one common factor brings all shares onto the budgets.
- A child keeps what both parents keep and draws the rest from what one of them keeps. Parents win tournaments of
  two; the best of old and new survive, none of them twice.

Fine-tuning by distillation is the same for all methods and not done here, see `rlprune.training.fit`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from rlprune.candidates import Decision
from rlprune.costs import Budget
from rlprune.delivery import finish
from rlprune.errors import InputError
from rlprune.evaluate import Evaluator, outputs
from rlprune.groups import FilterGroup
from rlprune.own import OwnData
from rlprune.peers.judged import judged
from rlprune.result import PruningResult

SHARES = (0.125, 0.25, 0.5)  # of a group's filters, at which its sensitivity is measured
PATIENCE = 50  # generations without a better mask that end an evolution
MUTATION = 1.0  # filters of a child decided anew, on average
RANDOM = 100  # random masks that history compares with
Look = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]


def genetic(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    images: int = 500,
    patches: int = 2048,
    normalised: bool | None = None,
    tolerance: float = 0.5,
    population: int = 64,
    generations: int = 1000,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """Prune each group by the mask that changes least what the layers behind it compute.

    Args:
        network: see `rlprune.prune`.
        example_input: see `rlprune.prune`.
        budgets: see `rlprune.prune`.
        data: needed.
        images: training images that H is of. Half of them recover the networks by which sensitivity is judged, on as
            many validation images as the reward is.
        patches: input patches drawn from them, per layer.
        normalised: whether a shift and a factor of what the layers compute are no error. None: if the network has
            batch norm.
        tolerance: of sensitivity, above 0 and at most 1.
        population: masks that survive a generation; as many are born in it.
        generations: of one evolution, at most.
        seed: of patches and evolution, and of the division of data of one's own.
        progress: show a bar.
        options: those of `rlprune.peers.judged.judged`.

    Returns:
        the network; its history has a row per group, in the order of pruning: group, filters, kept, share (before
        the budgets were asked), error (of its readers' output, as a share), criterion_error and random_error (the
        same of the criterion's mask and, on average, of random ones as wide), generations, reward (in the last
        row), seconds.

    Raises:
        InputError: bad input, or a group that layers other than Conv2d and Linear read.
    """
    if min(images, patches, generations) < 1 or population < 2 or not 0 < tolerance <= 1:
        raise InputError(
            "Genetic pruning needs at least 1 image, patch and generation, a population of at least 2 and a tolerance "
            f"in (0, 1], not images={images}, patches={patches}, generations={generations}, population={population}, "
            f"tolerance={tolerance}."
        )
    candidates, evaluator = judged(network, example_input, budgets, data, seed, **options)
    if evaluator.data is None:
        raise InputError("Genetic pruning measures what layers read on images: give data.")
    if normalised is None:
        normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    clock = start = time.perf_counter()
    groups, dataset, generator = candidates.groups, evaluator.data, torch.Generator().manual_seed(seed)
    seen = dataset.normalise(dataset.train.images[:images])
    forms = error_forms(network, groups, seen, patches, normalised, generator)
    recalibration = images // 2 if evaluator.calibration is not None else 0
    judges = len(evaluator.split)  # fewer, and the luck of one or two images would decide a group's width
    probe = Evaluator(network, groups, dataset, evaluator.measure, judges, recalibration, evaluator.ridge)
    masks = [torch.ones(group.size, dtype=torch.bool) for group in groups]
    rewards, rows, scores = np.empty((len(groups), len(SHARES))), [], list(candidates.scores)
    evolved = partial(evolve, population=population, generations=generations, generator=generator)
    with tqdm(total=2 * len(groups), desc="genetic", mininterval=1, disable=not progress) as bar:
        for number in range(len(groups)):
            for place, share in enumerate(SHARES):
                alone, width = list(masks), candidates.widths(np.full(len(groups), share))[number]
                alone[number], _ = evolved(forms[number], width)
                rewards[number, place] = probe(alone)
            bar.update()
        shares = _shares(probe(masks), rewards, tolerance)
        widths = candidates.fit(shares, "scale")
        for number in shares.argsort(kind="stable").tolist():
            group, form, width = groups[number], forms[number], widths[number]
            masks[number], spent = evolved(form, width)
            others = [candidates.scores[number], *torch.rand(RANDOM, group.size, generator=generator)]
            error = errors(form, torch.stack([masks[number], *_top(torch.stack(others), width)]))
            # a noisy cost may ask for fewer: then those go first whose loss adds the least error
            without = errors(form, masks[number] & ~torch.eye(group.size, dtype=torch.bool))
            scores[number] = masks[number] * (1 + without.argsort(stable=True).argsort(stable=True))
            row = {"group": group.name, "filters": group.size, "kept": width, "share": shares[number]}
            row |= {"error": float(error[0]), "criterion_error": float(error[1])}
            row |= {"random_error": float(error[2:].mean()), "generations": spent}
            row["reward"] = evaluator(masks) if len(rows) == len(groups) - 1 else float("nan")
            clock, row["seconds"] = time.perf_counter(), time.perf_counter() - clock
            rows.append(row)
            bar.update()
    decision, evaluations = Decision(rows[-1]["reward"], widths, scores), probe.evaluations + evaluator.evaluations
    return finish(candidates, [decision], evaluator, rows, evaluations, clock - start, "genetic")


@dataclass(frozen=True)
class ErrorForm:
    """What it takes to tell the error of any mask of one group, float32 on the CPU.

    All is relative to the energy of the reader's output, or to its variance if that is ``normalised``.

    Attributes:
        products: Q, (readers, size, size): of what filters add to the output, the inner product of each two.
        shared: the inner product of what each filter adds and the whole output, (readers, size).
        normalised: see `genetic`.
    """

    products: Tensor
    shared: Tensor
    normalised: bool

    @property
    def size(self) -> int:
        """Filters of the group."""
        return self.products.shape[-1]


def evolve(
    form: ErrorForm, width: int, population: int, generations: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The mask that keeps ``width`` filters with the smallest error found, and how many generations that took.

    Args:
        form: of the group's error.
        width: 1 to size.
        population: see `genetic`.
        generations: see `genetic`.
        generator: on the CPU; all randomness comes from it.
    """
    size, spent, idle, least = form.size, 0, 0, float("inf")
    masks, error = torch.zeros(0, size, dtype=torch.bool), torch.zeros(0)
    children = _top(torch.rand(population, size, generator=generator), width)
    while spent < generations and idle < PATIENCE and (spent == 0 or width < size):
        error, order = torch.cat([error, errors(form, children)]).sort(stable=True)
        once = torch.cat([torch.ones(1, dtype=torch.bool), error[1:] > error[:-1]])
        masks, error = torch.cat([masks, children])[order[once][:population]], error[once][:population]
        spent, idle, least = spent + 1, 0 if error[0] < least else idle + 1, float(error[0])
        drawn = torch.randint(len(masks), (2, 2, population), generator=generator)
        parents = masks[drawn.amin(0)].float()  # they stand in order, the best first
        # at least 2 where both keep a filter, at least 1 where one of them does
        rank = parents.sum(0) + torch.rand(population, size, generator=generator)
        anew = torch.rand(population, size, generator=generator) < MUTATION / size
        children = _top(torch.where(anew, 3 * torch.rand(population, size, generator=generator), rank), width)
    return masks[0], spent


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
    rows, is never held as a whole. Images are normalised, (N, C, H, W); see `genetic` for the rest.

    Raises:
        InputError: layers other than Conv2d and Linear read a group.
    """
    readers = [_readers(network, group) for group in groups]
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for group in readers for module in group}

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        count = -(-patches * len(output) // len(images))
        seen[module].append(_sampled(module, inputs[0].float(), output.float(), count, generator))

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
        patches: see `genetic`.
        normalised: see `genetic`.
        seed: of the patches.

    Returns:
        both, (masks,).
    """
    (form,) = error_forms(network, [group], images, patches, normalised, torch.Generator().manual_seed(seed))
    readers = _readers(network, group)
    # per mask, of the change in each output: count, Σ, Σ of squares and of products with the whole
    totals: dict[nn.Module, list[Any]] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        axis, total = -1 if isinstance(module, nn.Linear) else 1, totals.setdefault(module, [0] * (1 + len(masks)))
        with torch.autocast(output.device.type, enabled=False):
            whole = module.forward(inputs[0].float())  # a call would end up here again
            made = None
            for number, mask in enumerate([None, *masks]):  # None: without all inputs, for the whole output
                less = inputs[0].float().clone()
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
    hooks = [module.register_forward_hook(look) for module in modules]
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
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode).permute(0, 2, 3, 1)
    rows, columns = (
        corner[dim][:, None] * module.stride[dim] + torch.arange(size, device=x.device) * module.dilation[dim]
        for dim, size in enumerate(module.kernel_size)
    )
    read = x[image[:, None, None], rows[:, :, None], columns[:, None]]
    return read.flatten(1, 2).transpose(1, 2), y[image, *corner]


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


def _shares(unpruned: float, rewards: np.ndarray, tolerance: float) -> np.ndarray:
    """Per group the share at which its reward reaches the level tolerated, between those measured, (groups, SHARES)."""
    level = unpruned - tolerance * max(unpruned - float(np.median(rewards[:, 0])), 0.0)
    at, shares = (0.0, *SHARES, 1.0), []
    for row in rewards:
        curve = np.maximum.accumulate([min(rewards.min(), unpruned), *row, unpruned])  # more filters are no worse
        high = int((curve >= level).argmax())
        low = max(high - 1, 0)
        part = (level - curve[low]) / (curve[high] - curve[low]) if high else 0.0
        shares.append(at[low] + part * (at[high] - at[low]))
    return np.array(shares)


def _top(scores: Tensor, width: int) -> Tensor:
    """Masks of the ``width`` highest scores of each row."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(width, 1).indices, True)
