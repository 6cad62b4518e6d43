"""Holistic filter pruning (Enderich, Timm & Burgard 2020, arXiv 2009.08169): gradient descent divides the budgets.

A filter is on while its batch-norm scale |γ| is above a threshold; off, its γ and shift β count as 0, and so do the
weights of all layers that make it, for a sum may add one without batch norm: it is silent. With every forward pass the
indicators, 1 or 0, give the exact parameters and MACs, and by how much these exceed their targets, relatively, is
added to the loss. Backwards an indicator passes its gradient straight through to |γ|. So as long as a target is missed
every scale is pulled down by what its filter costs; no layer has a rate of its own. What is filled in here, for a
short training from a network that is trained already:

- The slope of an indicator, free in a straight-through gradient. With quick training |γ| stays near its start (in
  the deep layers of our VGG11 a few per cent apart), and one slope for all shuts down whole layers at a time. Hence a
  filter's slope is 1 over its importance, the first-order change of the loss if it were zero (`rlprune.importance`,
  "taylor"); and it falls with the share of its group that is on: the narrower a group, the more it loses by one more.
- The threshold is a share of the mean |γ|. A γ that would cross zero stops there.
- What is off gets no gradient from the loss: the ReLU behind a channel that is 0 everywhere passes none back, so that
  one straight through γ would come too late as well. Off is final, but for what the end brings back, see below.
- Filters that leave together have one indicator, on their mean |γ|; each γ gets its gradient in full, for a mean's
  would pull coupled filters more slowly. The best of a group, as many as it must keep, stay on and are not pulled.
- The penalty's weight grows linearly; its pull alone would meet the targets after a given share (``pace``) of the
  steps. γ and β go without momentum, which would carry them past the targets.
- Once these are met, at the latest midway between that share and the end, the gap that is left is closed exactly, see
  `rlprune.peers.targets.on_target`, and the network is cut: within a group those filters stay whose |γ|, but at least
  the threshold, times importance is largest, be they on or off. The steps to come train it at its small size.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from rlprune.candidates import Candidates
from rlprune.costs import Budget, check_budgets
from rlprune.data import Dataset
from rlprune.delivery import delivered
from rlprune.errors import InputError, whole_each
from rlprune.evaluate import Evaluator
from rlprune.forward import accuracy, check_classes, learning, seeded, training_logits
from rlprune.importance import scores
from rlprune.masking import carriers, keep_top, rebuild, slim
from rlprune.own import OwnData
from rlprune.peers.judged import judged, without_criterion
from rlprune.peers.targets import ExactCosts, on_target
from rlprune.result import PruningResult
from rlprune.training import check_loss

SAMPLE = 500  # training images that importance is measured on
UNIMPORTANT = 0.05  # of the mean importance: the least that a filter is taken to have
FINE = 0.02  # of the mean |γ|: how far the most pulled group moves in a step of `pull_time`
MOMENTUM, DECAY = 0.9, 5e-4  # of the weights, as in `rlprune.training.Training`


@learning
def hfp(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    epochs: int = 3,
    learning_rate: float = 0.02,
    batch_size: int = 128,
    pace: float = 0.5,
    threshold: float = 0.05,
    near: float = 0.01,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """Train with a penalty on the relative excess over the budgets; ends at most 1 % below each of them.

    Frozen weights are trained, too, during the search, and stay marked as frozen.
    Where a single filter costs more than that, or no widths bring two budgets together, as near as
    `rlprune.peers.targets.on_target` gets.

    History, one row an epoch: epoch, loss (without penalty), penalty (mean relative excess, without its weight),
    train_accuracy, validation_accuracy, parameters and macs (percent of the unpruned network's), seconds.

    Args:
        network: trained, with a batch norm behind every filter that may leave; untouched.
        example_input: see `rlprune.prune`.
        budgets: on parameters, MACs or both.
        data: needed.
        epochs: passes over the training split.
        learning_rate: of SGD, falling linearly to 0 from the cut on.
        batch_size: images a step, or all there are.
        pace: share of the steps after which the pull alone would meet the budgets.
        threshold: |γ| up to which a filter is off, as a share of the network's mean |γ|.
        near: how far below its limit a cost may end, as a share of the limit. Of two budgets that do not go well
            together the second may cost accuracy to use up: 1 never brings filters back for its sake.
        seed: of the batches and of dropout.
        progress: show a bar.
        options: those of `rlprune.peers.judged.judged`; its criterion plays no part.

    Raises:
        InputError: a budget on anything else, no data, filters without batch norm, or settings that make no sense.
    """
    start = time.perf_counter()
    whole_each(epochs=(epochs, 1), batch_size=(batch_size, 2))
    if not (0 < pace < 1 and 0 < threshold < 1 and 0 <= near <= 1 and learning_rate > 0):
        raise InputError(
            "HFP needs a learning rate above 0 and shares between 0 and 1, "
            f"not {learning_rate=}, {pace=}, {threshold=}, {near=}."
        )
    check_budgets(budgets)
    for budget in budgets:
        if not budget.predicted:
            raise InputError(f"HFP needs the gradient of a cost, and {budget.name} has none: use parameters or macs.")
    if data is None:
        raise InputError("HFP trains the network while it prunes: give data.")
    candidates, evaluator = judged(network, example_input, budgets, data, seed, **without_criterion(options))
    check_classes(evaluator.network, evaluator.data)  # it is trained on the labels, whatever judges it
    batch_size = min(batch_size, len(evaluator.data.train))
    gates, costs = Gates(candidates, evaluator.data, threshold), ExactCosts(candidates, near)
    run = _Run(candidates, evaluator, gates, costs, epochs * (len(evaluator.data.train) // batch_size), pace)
    generator, history = torch.Generator().manual_seed(seed), []
    device = evaluator.data.device
    with seeded(seed, device), tqdm(total=run.steps, desc="hfp", mininterval=1, disable=not progress) as bar:
        for epoch in range(1, epochs + 1):
            begun, figures = time.perf_counter(), []
            for images, labels in evaluator.data.augmented(batch_size, generator, epoch):
                figures.append(run.learn(images, labels, learning_rate))
                bar.update()
            means = zip(("loss", "penalty", "train_accuracy"), np.mean(figures, 0).tolist(), strict=True)
            row = {"epoch": epoch, **dict(means)}
            check_loss(row["loss"], epoch, run.network)
            row |= run.measured()
            bar.set_postfix({name: f"{row[name]:.1f}" for name in ("validation_accuracy", "parameters", "macs")})
            history.append(row | {"seconds": time.perf_counter() - begun})
    seconds = time.perf_counter() - start
    return delivered(candidates, evaluator, run.network, run.masks, history, seconds, "hfp")


class Gates:
    """Which filters of a network in training are on.

    Args:
        candidates: of the unpruned network.
        data: importance is measured on some of its training images.
        threshold: |γ| up to which a filter is off, as a share of the mean |γ|.

    Attributes:
        network: a copy of the unpruned network, to be trained; its batch norms say what is on.
        norms: those of them that the groups have, by name.
        importance: of each filter of each group, (size,), 1 on average over all.

    Raises:
        InputError: a group without batch norm.
    """

    def __init__(self, candidates: Candidates, data: Dataset, threshold: float) -> None:
        self.network = rebuild(candidates.network, {}).to(memory_format=data.memory_format)
        self.network.requires_grad_().train()
        self.sizes, self.least = candidates.sizes.tolist(), candidates.least
        self.norms, self._place = {}, {}  # of each channel, its filter's number in the network; the last is none's
        self._gated = {}  # parameter that makes filters, by id → module, name, dimension along which they lie
        for group, before in zip(candidates.groups, np.cumsum([0, *self.sizes]), strict=False):
            for part in group.slices:
                if part.axis == "in":
                    continue
                module = self.network.get_submodule(part.module)
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                    self.norms[part.module] = module
                none = torch.full((part.length,), sum(self.sizes))
                self._place.setdefault(part.module, none)[part.index] = part.source + before
                for name, dim in carriers(module, part.axis)[0].items():
                    if (parameter := module._parameters.get(name)) is not None:
                        self._gated.setdefault(id(parameter), (part.module, name, dim))  # it may be shared
        places = [self._place[name] for name in self.norms]
        self._owned = torch.bincount(torch.cat([*places, torch.tensor([sum(self.sizes)])]))
        for group, owned in zip(candidates.groups, self._owned[:-1].split(self.sizes), strict=True):
            if not owned.all():
                raise InputError(
                    f"The filters of {group.name} have no batch norm with a scale, by which HFP decides: leave them "
                    f"as they are with exclude=[{group.name!r}]."
                )
        few = data.train[:SAMPLE]
        sample = data.normalise(few.images), few.labels
        importance = scores(candidates.network, candidates.groups, "taylor", sample, relative=False)
        mean = torch.cat(importance).mean().clamp(min=1e-12)
        self.importance = [(value / mean).clamp(min=UNIMPORTANT) for value in importance]
        self.threshold = threshold * float(torch.cat(self.scales()).detach().mean())

    def scales(self) -> Sequence[Tensor]:
        """The mean |γ| of each filter: per group, (size,), on the CPU, differentiable."""
        total = torch.zeros(len(self._owned))
        for name, norm in self.norms.items():
            total = total.index_add(0, self._place[name], norm.weight.abs().cpu())
        return (total / self._owned)[:-1].split(self.sizes)

    def __call__(self) -> tuple[list[Tensor], Tensor]:
        """Whether each filter is on, (size,) per group, and how many are, (groups,), float64, with its gradient."""
        on, widths = [], []
        for i, (scale, owned) in enumerate(zip(self.scales(), self._owned[:-1].split(self.sizes), strict=True)):
            best = scale.topk(self.least[i]).indices
            on.append((scale > self.threshold).index_fill(0, best, True))
            slope = owned * (on[i].float().mean() / self.importance[i]).index_fill(0, best, 0)
            widths.append(on[i].sum() + ((scale - scale.detach()) * slope).sum().double())
        return on, torch.stack(widths)

    def _spread(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Boolean values per filter of each group, brought to the channels that each module makes; else True."""
        of_filter = torch.cat([*values, torch.tensor([True])])
        device = next(iter(self.norms.values())).weight.device
        return {name: of_filter[place].to(device) for name, place in self._place.items()}

    def gated(self, on: Sequence[Tensor]) -> dict[str, Tensor]:
        """Name → each parameter that makes filters, γ and β among them, 0 for what is off."""
        spread, gated = self._spread(on), {}
        for module, name, dim in self._gated.values():
            parameter = self.network.get_parameter(f"{module}.{name}")
            keep = spread[module][: parameter.shape[dim]]
            gated[f"{module}.{name}"] = parameter * keep.view(-1, *[1] * (parameter.ndim - 1 - dim))
        return gated

    @torch.no_grad()
    def revive(self, on: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        """What is off and yet stays gets, in each batch norm, the mean |γ| of what is on, and the sign that it has.

        A γ that stopped at 0 counts as positive, from whichever side it came.
        """
        on, stays = self._spread(on), self._spread(masks)
        for name, norm in self.norms.items():
            scale, value, back = norm.weight, on[name], stays[name] & ~on[name]
            scale[back] = torch.copysign(scale[value].abs().mean(), scale[back])


def pull_time(costs: ExactCosts, gates: Gates) -> float:
    """How long gradient flow on the excess alone, of weight 1, needs from these gates until there is none."""
    scales, floor = [scale.detach() for scale in gates.scales()], torch.tensor(gates.least).double()
    sizes, step = torch.tensor([len(scale) for scale in scales]).double(), FINE * float(torch.cat(scales).mean())
    elapsed, moved = 0.0, torch.zeros_like(sizes)
    while True:
        left = [s - shift / i for s, i, shift in zip(scales, gates.importance, moved, strict=True)]
        above = [(scale > gates.threshold).sum() for scale in left]
        widths = torch.stack(above).double().maximum(floor).requires_grad_()
        excess = costs.excess(widths)
        pull = torch.autograd.grad(excess, widths)[0] * widths.detach() / sizes * (widths.detach() > floor)
        if excess == 0 or not pull.any():
            return elapsed
        elapsed += step / float(pull.max())
        moved += step / pull.max() * pull


class _Run:
    """The training: at full size with gates until the budgets are met, then at the size that is left."""

    def __init__(
        self, candidates: Candidates, evaluator: Evaluator, gates: Gates, costs: ExactCosts, steps: int, pace: float
    ) -> None:
        self.candidates, self.evaluator, self.gates, self.costs = candidates, evaluator, gates, costs
        self.network, self.masks = gates.network, None
        self.step, self.steps, self.latest = 0, steps, int(steps * (1 + pace) / 2)
        ramp = sum(range(1, 1 + max(1, round(pace * steps))))  # the weight grows by as much in every step
        self.weight = pull_time(costs, gates) * (1 - MOMENTUM) / ramp
        self.optimizer = _optimizer(self.network, list(gates.norms.values()))

    def learn(self, images: Tensor, labels: Tensor, rate: float) -> tuple[float, float, float]:
        """One step: loss, relative excess, and percent classified rightly."""
        gated, excess = {}, torch.zeros(())
        if self.masks is None:
            on, widths = self.gates()
            excess = self.costs.excess(widths)
            if excess == 0 or self.step >= self.latest:
                self._cut(on)
                excess = torch.zeros(())
            else:
                gated = self.gates.gated(on)
        logits = training_logits(self.network, images, gated).float()
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + self.weight / rate * (self.step + 1) * excess.to(loss)).backward()
        falling = 1 if self.masks is None else (self.steps - self.step) / (self.steps - self.cut)
        for group in self.optimizer.param_groups:  # what has no momentum goes as fast in the long run
            group["lr"] = rate * falling / (1 if group["momentum"] else 1 - MOMENTUM)
        before = [(norm.weight, norm.weight.detach().clone()) for norm in self.gates.norms.values()] if gated else []
        self.optimizer.step()
        with torch.no_grad():
            for scale, old in before:
                scale[scale * old < 0] = 0
        self.step += 1
        correct = 100 * (logits.detach().argmax(1) == labels).float().mean()
        return loss.item(), excess.item(), correct.item()

    def _cut(self, on: list[Tensor]) -> None:
        """Close the gap and go on with what is left."""
        gates, widths = self.gates, [int(value.sum()) for value in on]
        scales = [scale.detach().clamp(min=gates.threshold) for scale in gates.scales()]
        order = [scale * value for scale, value in zip(scales, gates.importance, strict=True)]
        widths = on_target(self.costs, order, widths, gates.least, self.candidates.multiple)
        self.masks, self.cut = keep_top(order, widths), self.step
        gates.revive(on, self.masks)
        self.network = slim(self.network, self.candidates.groups, self.masks)
        self.optimizer = _optimizer(self.network, [])

    def measured(self) -> dict[str, float]:
        """Accuracy and costs of what is left now."""
        masks, network = self.masks, self.network
        if masks is None:
            masks = self.gates()[0]
            network = slim(network, self.candidates.groups, masks)
        self.evaluator.recalibrate(network)
        row = {"validation_accuracy": accuracy(network, self.evaluator.data, self.evaluator.split)}
        for name in ("parameters", "macs"):
            cost = getattr(self.candidates.predictor, name)
            row[name] = 100 * cost([int(mask.sum()) for mask in masks]) / cost(self.candidates.sizes)
        return row


def _optimizer(network: nn.Module, norms: Sequence[nn.Module]) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, these batch norms without; weight decay on weights of two or more dimensions."""
    scales = {id(parameter) for norm in norms for parameter in norm.parameters()}
    others = [p for p in network.parameters() if id(p) not in scales]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in others if p.ndim <= 1]},
        {"params": [p for p in network.parameters() if id(p) in scales], "momentum": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True)
