"""SMOF (Liu et al. 2021, arXiv 2110.10842): filters leave, and so do the outer rings of kernels.

While the network trains on, learnable scales multiply its weights: one for each filter, one for each ring of each
layer's kernel. A penalty on what they cost drives them down. A ring that has faded turns 5×5 into 3×3 and 3×3 into
1×1, a filter that has faded is removed, and what remains are plain dense convolutions. Filled in here:

* The scale of a filter multiplies the weights that read it, the scale of a ring the weights in it: so they fold into
  the weights exactly, in any network that `rlprune.trace` can handle. Batch norm's own scales would not do: a residual
  sum has several of them, and a network may have none.
* What a batch norm undoes does not count. A filter's scale is taken relative to the largest of its group. A ring's is
  the share left of the angle by which the ring turns the kernel: by their size alone, the eight outer weights of nine
  could shrink far before the loss feels anything. An inner ring's scale multiplies the outer rings, which go first.
* The penalty is λ times the logarithm of the expected cost, that of the network in which a scale s is s filters or
  rings. Its gradient is an L1 penalty with each scale weighted by its share in what the network still costs. Of
  several budgets the one that is furthest over counts. MACs stand in for a cost that only measuring can tell,
  parameters for the size of an ONNX file.
* L1 alone meets the budget with many small scales, which can't be cut. So s is taken for s · (1 + ε) / (s + ε) filters,
  as in reweighted L1 (Candès et al. 2008), with an ε that falls: at first scales spread by what they are worth, then
  those in between must decide.
* Nobody has to choose λ: it grows while the cost is above a curve that falls to the budget, and shrinks below it.
* At the cut one threshold common to all scales, the lowest within every budget as measured on the slim network
  itself, decides what leaves. For the epochs that are left the slim network learns on.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from rlprune.candidates import Candidates
from rlprune.costs import Budget
from rlprune.delivery import TRIES, delivered
from rlprune.errors import InputError
from rlprune.evaluate import Evaluator
from rlprune.forward import accuracy, check_classes, learning, seeded, training_logits
from rlprune.groups import remaining
from rlprune.masking import keep_top, rebuild, slim, widths
from rlprune.own import OwnData
from rlprune.peers.judged import judged, without_criterion
from rlprune.peers.lasso import Lasso
from rlprune.peers.rings import Scales, removable, without_rings
from rlprune.result import PruningResult
from rlprune.training import Training, check_loss, sgd

FIRST = 0.1  # λ to begin with
GAIN = 20.0  # by how many powers of e λ grows in the whole fading while the cost is e times the curve's
STIFF = 30.0  # share by which the penalty rises at once for each percent that the cost is over the curve, in percent
SHARP = (1.0, 0.05)  # ε at the start, and when the curve reaches the budget
SETTLED = 0.8  # share of the fading after which it does
LATE = 1e-3  # weight of a scale's mean over time: of filters that have faded, those that did so last come first
UNREAD = 1e-6  # share of the largest weight that reads a filter of its group: what has less is not read
FADED = 0.05  # a scale below this has faded, as far as the history is concerned
MARGIN = 0.95  # of a limit on a cost that is not the same twice, lest the network be refused when measured again


@learning
def smof(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    rings: bool = True,
    epochs: int = 3,
    fading: float = 0.5,
    batch_size: int = 128,
    learning_rate: float = 0.02,
    travel: float = 4.0,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """Let scales on filters and kernel rings fade while the network trains on, then remove what has faded.

    Frozen weights are trained, too, during the search, and stay marked as frozen.

    Args:
        network: trained; see `rlprune.prune`.
        example_input: see `rlprune.prune`.
        budgets: of any kind; see above.
        data: needed.
        rings: whether kernels may shrink; otherwise only filters leave.
        epochs: passes over the training split, before and after the cut together.
        fading: share of them before the cut, in (0, 1).
        batch_size: images a step.
        learning_rate: of the weights (SGD with momentum): constant until the cut, from then on falling to 0.
        travel: how far a scale (trained by Adam) could go in the whole fading; 1 is from all to nothing.
        seed: of the batches and of dropout.
        progress: show a bar.
        options: those of `rlprune.peers.judged.judged`; ``criterion`` decides nothing here, and of layers that stay for
            the sake of ``exclude`` the kernels stay, too.

    Returns:
        the result. Its history has a row an epoch: epoch, loss (without the penalty), validation_accuracy in percent,
        the percent of parameters, MACs and every budget's cost left if what has faded were cut now, rings (left),
        multiplier (λ), seconds that the epoch took.

    Raises:
        InputError: no data, a schedule that makes no sense or has too few batches, or a loss that is not finite.
    """
    start = time.perf_counter()
    if data is None:
        raise InputError("SMOF trains while it prunes: give data.")
    if not (0 < fading < 1 and travel > 0):
        raise InputError(f"fading must lie in (0, 1) and travel above 0, not {fading} and {travel}.")
    schedule = Training(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)
    candidates, evaluator = judged(network, example_input, budgets, data, seed, **without_criterion(options))
    check_classes(evaluator.network, evaluator.data)  # it is trained on the labels, whatever judges it
    images = len(evaluator.data.train)
    steps = epochs * (images // batch_size)
    if steps < 2:
        raise InputError(
            f"{images} training images make {steps} batch(es) of {batch_size} in {epochs} epoch(s), too few to fade "
            "and to settle: lower batch_size or raise epochs."
        )
    device = example_input.device
    with seeded(seed, device), tqdm(total=steps, desc="smof", mininterval=1, disable=not progress) as bar:
        run = _Run(candidates, evaluator, schedule, rings, fading, travel)
        history = run.epochs(torch.Generator().manual_seed(seed), bar)
        run.enforce()
    seconds = time.perf_counter() - start
    method = "smof" if rings else "smof_filters"
    return delivered(candidates, evaluator, run.network, run.masks, history, seconds, method)


smof_filters = partial(smof, rings=False)  # a method by itself, to see what smaller kernels are worth


class _Run:
    """The training: scales fade, the cut is made, the slim network settles.

    Attributes:
        network: what is trained: of full size until the cut, slim from then on.
        masks: what the cut has kept; None before.
        scores: by which it did, (size,) per group; None before.
    """

    def __init__(
        self,
        candidates: Candidates,
        evaluator: Evaluator,
        schedule: Training,
        rings: bool,
        fading: float,
        travel: float,
    ) -> None:
        self.candidates, self.evaluator, self.schedule = candidates, evaluator, schedule
        steps = schedule.epochs * (len(evaluator.data.train) // schedule.batch_size)
        self.fading = min(max(1, round(fading * steps)), steps - 1)
        self.settling, self.taken = steps - self.fading, 0
        self.network = rebuild(candidates.network, {}).requires_grad_(True)
        self.network.to(memory_format=evaluator.data.memory_format)
        self.masks: list[Tensor] | None = None
        self.scores: list[Tensor] | None = None
        self.optimizer = sgd(self.network, schedule)
        self.example = example = candidates.example_input
        excluded = {name for name, reason in candidates.groups.skipped if reason == "excluded"}
        self.scales = Scales(self.network, candidates.groups, example, rings, excluded)
        self.means = [torch.zeros_like(value) for value in self.scales.values()]
        self.pull = torch.optim.Adam(self.scales.scales, lr=travel / self.fading, betas=(0.9, 0.99))
        self.multiplier = torch.tensor(FIRST, device=example.device)
        self.full = self.scales.expected(SHARP[0]).detach()
        targets = torch.ones(2, device=example.device)
        for budget, limit, unpruned in zip(candidates.budgets, candidates.limits, candidates.unpruned, strict=True):
            which = 0 if budget.is_named("parameters") or budget.is_named("onnx_bytes") else 1
            targets[which] = min(float(targets[which]), limit / unpruned)
        self.targets = targets.log()
        costs = [Budget("parameters", 1), Budget("macs", 1), *candidates.budgets]
        self.costs = {cost.name: (cost, cost.measure(candidates.network, example)) for cost in costs}

    def epochs(self, generator: torch.Generator, bar: tqdm) -> list[dict[str, Any]]:
        """Train; returns the history."""
        data, rows = self.evaluator.data, []
        for epoch in range(1, self.schedule.epochs + 1):
            start, losses = time.perf_counter(), []
            for images, labels in data.augmented(self.schedule.batch_size, generator, epoch):
                losses.append(self._step(images, labels))
                bar.update()
            loss = float(torch.stack(losses).mean())
            check_loss(loss, epoch, self.network)
            fades = self.masks is None
            whole = self.scales.folded(self.network) if fades else self.network
            self.evaluator.recalibrate(whole)
            left = self._cut(whole, self.scales.values(), FADED, FADED)[0] if fades else whole
            row = {"epoch": epoch, "loss": loss, "validation_accuracy": accuracy(whole, data, self.evaluator.split)}
            for name, (cost, unpruned) in self.costs.items():
                row[name] = 100 * cost.measure(self.candidates.as_returned(left), self.example) / unpruned
            row |= {"rings": sum(removable(left).values()), "multiplier": float(self.multiplier)}
            rows.append(row | {"seconds": time.perf_counter() - start})
            bar.set_postfix(loss=f"{loss:.2f}", parameters=f"{row['parameters']:.1f} %", macs=f"{row['macs']:.1f} %")
        return rows

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One batch; returns its loss without the penalty."""
        fades = self.masks is None
        self.network.train()
        weights = self.scales.weights(self.network) if fades else {}
        logits = training_logits(self.network, images, weights)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.schedule.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        self.pull.zero_grad(set_to_none=True)
        (loss + self._penalty() if fades else loss).backward()
        self.optimizer.step()
        self.taken += 1
        if fades:
            self._faded()
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.learning_rate * (1 - (self.taken - self.fading) / self.settling)
        return loss.detach()

    def _penalty(self) -> Tensor:
        """λ · the logarithm of the cost that is furthest over its curve; brings λ up to date."""
        time_gone = min(1.0, self.taken / (SETTLED * self.fading))
        costs = (self.scales.expected(SHARP[0] * (SHARP[1] / SHARP[0]) ** time_gone) / self.full).log()
        over = torch.where(self.targets < 0, costs.detach() - time_gone * self.targets, -math.inf)
        most = over.max().clamp(-0.5, 0.5)
        self.multiplier = self.multiplier * (GAIN / self.fading * most).exp()
        return self.multiplier * (1 + STIFF * most).clamp_min(0) * costs.gather(0, over.argmax(0, keepdim=True)).sum()

    @torch.no_grad()
    def _faded(self) -> None:
        """The scales' own part of a step; the last one makes the cut."""
        self.pull.step()
        for scale in self.scales.scales:
            scale.clamp_(0, 1)
        values = self.scales.values()
        for mean, value in zip(self.means, values, strict=True):
            mean += value / self.fading
        if self.taken == self.fading:
            scores = self._ranks([v + LATE * m for v, m in zip(values, self.means, strict=True)])
            self.network, self.masks = self._best(self.scales.folded(self.network), scores)
            self.scores = scores[: len(self.masks)]
            self.network.to(memory_format=self.evaluator.data.memory_format)
            self.evaluator.recalibrate(self.network)
            self.optimizer = sgd(self.network, self.schedule)

    def _ranks(self, scores: list[Tensor]) -> list[Tensor]:
        """The scores' places, 0 for the lowest of all: no two are the same, so that a cut can lie between any two.

        Scales that never faded are at 1, all of them. Of equal filters those stay whose norm is larger beside their
        group's mean. What next to nothing reads comes last, whatever its scale: a pull that sets in late hardly moves
        a scale that the loss leaves at 1.
        """
        reading = Lasso(self.network, self.candidates.groups, self.candidates.least).reading()
        scores = [
            torch.where((reads <= UNREAD * reads.max()).to(score.device), -1.0, score)
            for reads, score in zip(reading, scores, strict=False)
        ] + scores[len(reading) :]  # those of the rings
        norms = [norm.cpu() / norm.mean().clamp_min(1e-12).cpu() for norm in self.candidates.scores]
        ties = torch.cat([*norms, *(torch.ones(len(score)) for score in scores[len(norms) :])])
        order = np.lexsort((ties.numpy(), torch.cat(scores).cpu().numpy()))
        ranks = torch.empty(len(order))
        ranks[torch.from_numpy(order)] = torch.arange(len(order), dtype=torch.float32)
        return list(ranks.split([len(score) for score in scores]))

    def enforce(self) -> None:
        """Take the weakest filters out of a network that a noisy cost refuses at the end, until it is within budget."""
        groups = remaining(self.candidates.groups, self.masks)
        for attempt in range(TRIES + 1):
            costs = self.candidates.measured(self.candidates.as_returned(self.network)).values()
            if all(cost["value"] <= cost["limit"] for cost in costs):
                return
            kept = np.array(widths(self.masks))
            fewer = self.candidates.widths(0.93 * kept / self.candidates.sizes)
            fewer = np.minimum(kept, fewer if attempt < TRIES else self.candidates.anchor)
            scores = [score[mask] for score, mask in zip(self.scores, self.masks, strict=True)]
            keeps = keep_top(scores, fewer.tolist())
            self.network, groups = slim(self.network, groups, keeps), remaining(groups, keeps)
            for mask, keep in zip(self.masks, keeps, strict=True):
                mask[mask.clone()] = keep
            self.evaluator.recalibrate(self.network)

    def _best(self, whole: nn.Module, scores: list[Tensor]) -> tuple[nn.Module, list[Tensor]]:
        """The slim network within every budget, and its masks, that the lowest threshold leaves."""
        order = [math.inf, *sorted(torch.cat(scores).tolist(), reverse=True)]
        limits = []
        for budget, limit in zip(self.candidates.budgets, self.candidates.limits, strict=True):
            steady = (
                budget.predicted or budget.measure(self.candidates.network, self.example) == self.costs[budget.name][1]
            )
            limits.append((budget, float(limit) if steady else MARGIN * float(limit)))

        def lowest(kernels: float | None) -> float | None:
            low, high = -1, len(order) - 1
            while low < high:
                middle = (low + high + 1) // 2
                small = self._cut(whole, scores, order[middle], order[middle] if kernels is None else kernels)[0]
                small = self.candidates.as_returned(small)
                if all(budget.measure(small, self.example) <= limit for budget, limit in limits):
                    low = middle
                else:
                    high = middle - 1
            return order[low] if low >= 0 else None

        kernels = lowest(None)
        # a ring is a large step: what it leaves over of the budgets goes to the filters that come next
        filters = lowest(kernels) if kernels is not None else None
        if filters is not None:
            return self._cut(whole, scores, filters, kernels)
        masks = self.candidates.masks(self.candidates.anchor, scores[: len(self.candidates.groups)])
        return slim(whole, self.candidates.groups, masks), masks  # a cost of one's own need not fall with the widths

    def _cut(
        self, whole: nn.Module, scores: list[Tensor], filters: float, kernels: float
    ) -> tuple[nn.Module, list[Tensor]]:
        """The slim network and its masks if all filters and rings that score less leave, as far as they may."""
        count = len(self.candidates.groups)
        widths = self.candidates.widths([float((score >= filters).double().mean()) for score in scores[:count]])
        masks = self.candidates.masks(widths, scores[:count])
        removed = {n: int((score < kernels).sum()) for n, score in zip(self.scales.layers, scores[count:], strict=True)}
        return without_rings(slim(whole, self.candidates.groups, masks), removed), masks
