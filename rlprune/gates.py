"""A learned importance: gates on the filters of a frozen network, trained to keep its output at the budget's cost.

The weights stay as they are. Every filter gets a gate, a sigmoid of one number, and
gradient descent moves the gates alone, on a small sample of the training images: the gated network shall
still give the unpruned network's output, at as small a sum of gates as possible. Sparsity rises in
small steps until the budget is reached. That is the method of PruneNet (Khetan & Karnin 2020, arXiv 2005.11282), whose
ranking it makes (`rlprune.peers.prunenet`); here the gates serve any search as the criterion that says which filters
of a group stay (``criterion="gates"``).

What the paper leaves open, and how it is filled in:

- Batch norm uses the statistics of the batch, as the network that is recalibrated afterwards does.
- Behind batch statistics all gates of a group can fade together without any change of the output, which makes them
  worth little as a ranking between groups and as a measure of width. So they are noisy while they learn
  (binary concrete, Maddison et al. 2017, arXiv 1611.00712): a gate of 0.1 is then not a faint filter but one
  that is mostly absent, which no normalisation undoes.
- The output is compared by its Kullback–Leibler divergence.
- The penalty is the plain mean of the gates, whatever a filter costs. Its weight λ follows the cost of the
  expected widths (the sum of each group's gates): it rises while that is above a limit that falls evenly, on a
  logarithmic scale, from the unpruned network's to the budget, and sinks while it is below.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlprune.candidates import STARTS, Candidates
from rlprune.data import Dataset
from rlprune.errors import InputError, one_of
from rlprune.evaluate import outputs
from rlprune.forward import half_precision, learning, read_by, suitable_batch
from rlprune.groups import FilterGroups
from rlprune.importance import CRITERIA
from rlprune.masking import rebuild

GATES = "gates"
OPEN = 2.0  # logit of every gate to begin with: it stands at 0.88
TEMPERATURE = 0.5  # of the noisy gates: the lower, the nearer to 0 or 1
WEIGHT = 0.3  # λ to begin with; the divergence and the mean gate are both of the order of 1
SETTLE = 0.25  # share of the rounds at the full budget
PACE = 0.3  # the most by which log λ moves in a round
ROUNDS, STEPS, BATCH, IMAGES, RATE = 40, 12, 64, 2000, 0.05  # see `rlprune.peers.prunenet`


def criterion_of(name: str, data: Dataset | None, seed: int) -> str | Callable[[Candidates], list[Tensor]]:
    """A criterion by name, as `rlprune.candidates.Candidates` takes it.

    Args:
        name: one of `rlprune.importance.CRITERIA`, or "gates".
        data: what gates learn from.
        seed: of their learning.

    Raises:
        InputError: an unknown criterion, or gates without data.
    """
    one_of("criterion", name, [*CRITERIA, GATES])
    if name != GATES:
        return name
    if data is None:
        raise InputError("Criterion 'gates' learns from images: give data, or use criterion 'magnitude'.")

    @learning
    def learned(candidates: Candidates) -> list[Tensor]:
        gates = Gates(candidates, data, IMAGES, BATCH, RATE, seed)
        for number in range(1, ROUNDS + 1):
            gates.round(STEPS, number / ROUNDS)
        return gates.scores()

    return learned


def start_of(start: str | None, criterion: str) -> str:
    """One of `rlprune.candidates.STARTS`; for None "ranking" with gates, whose values compare across groups."""
    if start is None:
        return "ranking" if criterion == GATES else "uniform"
    one_of("start", start, STARTS)
    return start


class Gates:
    """A gate for every filter of a frozen network, learned under a weight that follows the cost.

    A gate multiplies its filter wherever a layer reads it. That is exact for residual sums, too: at 0 the filter is
    as good as removed.

    Args:
        candidates: of the unpruned network, with the budgets.
        data: its training split is learned from.
        images: so many of it, at most.
        batch_size: images a step.
        learning_rate: of the logits.
        seed: of order and noise.

    Attributes:
        logits: of the gates, of all groups one after the other, (filters,).
        weight: λ, of the mean gate in the loss.
        network: a copy that the gates are at work in.
        values: what they let through: 1, for what belongs to no group, then a number for every filter.

    Raises:
        InputError: too few images for batch norm.
    """

    def __init__(
        self, candidates: Candidates, data: Dataset, images: int, batch_size: int, learning_rate: float, seed: int
    ) -> None:
        if len(data.train) < 2:
            raise InputError("Gates need at least 2 training images: give more data.")
        self.candidates, self.weight = candidates, WEIGHT
        self.data, self.images = data, data.train.images[:images]
        made = [outputs(candidates.network, data.normalise(part)) for part in self.images.split(batch_size)]
        self.target = F.log_softmax(torch.cat(made), 1)
        self.logits = torch.full((int(sum(candidates.sizes)),), OPEN, device=data.device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=learning_rate, betas=(0.9, 0.99))
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = self._batches(min(batch_size, len(self.images), suitable_batch(self.images)))
        self.network = rebuild(candidates.network, {}).requires_grad_(False).eval()
        self.network.to(memory_format=data.memory_format)
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()  # of this copy, whose running statistics nobody reads
        self.values = torch.ones(1 + len(self.logits), device=data.device)
        for name, places in _readers(candidates.groups).items():
            self._gate(self.network.get_submodule(name), places.to(data.device))

    def round(self, steps: int, done: float) -> dict[str, float]:
        """Some steps, then a new λ.

        Args:
            steps: of Adam.
            done: share of the rounds, this one included; the last `SETTLE` of them are at the full budget.

        Returns:
            a row of the history.
        """
        left = max(0.0, 1 - done / (1 - SETTLE))
        start, total, weight = time.perf_counter(), torch.zeros((), device=self.logits.device), self.weight
        for _ in range(steps):
            total += self._step(next(self.batches))
        gates = [score.sigmoid() for score in self.scores()]
        widths = self.candidates.widths(np.array([float(gate.mean()) for gate in gates]))
        costs, limits = self.candidates.costs(widths), self.candidates.limits
        # a budget above the unpruned network's cost asks for nothing
        whole = np.log(np.maximum(self.candidates.unpruned / limits, 1))
        above = float(np.max(np.log(np.maximum(costs, 1e-12) / limits) - left * whole))
        self.weight *= float(np.exp(np.clip(above, -PACE, PACE)))
        row = {"loss": total.item() / steps, "penalty": weight, "gate": float(torch.cat(gates).mean())}
        return {**row, **self.candidates.percent(widths), "seconds": time.perf_counter() - start}

    def scores(self) -> list[Tensor]:
        """Logits of the gates per group, (size,) each, on the CPU: they rank as the gates do, but never saturate."""
        return list(self.logits.detach().cpu().clone().split(self.candidates.sizes.tolist()))

    def _step(self, index: Tensor) -> Tensor:
        """One step on these images; the divergence before it."""
        noise = torch.rand(len(self.logits), generator=self.generator).logit(1e-6).to(self.logits.device)
        noisy = ((self.logits + noise) / TEMPERATURE).sigmoid()
        self.values = torch.cat([noisy.new_ones(1), noisy])
        with half_precision(self.images.device):
            output = self.network(self.data.normalise(self.images[index]))
        output = F.log_softmax(output.float(), 1)
        divergence = F.kl_div(output, self.target[index], log_target=True, reduction="batchmean")
        loss = divergence + self.weight * self.logits.sigmoid().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return divergence.detach()

    def _gate(self, layer: nn.Module, places: Tensor) -> None:
        """Have what a layer reads multiplied by the gates in these places of `values`, (length of its axis,)."""
        behind = 0 if isinstance(layer, nn.Linear) else layer.weight.ndim - 2  # dimensions behind that of the filters

        def gated(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            read = read_by(inputs, named)
            gates = self.values[places].to(read.dtype)
            return (read * gates.view(-1, *[1] * behind), *inputs[1:]), {k: v for k, v in named.items() if k != "input"}

        layer.register_forward_pre_hook(gated, with_kwargs=True)

    def _batches(self, size: int) -> Iterator[Tensor]:
        """Indices of images, shuffled anew whenever all were seen; a last, smaller batch is dropped."""
        while True:
            order = torch.randperm(len(self.images), generator=self.generator).to(self.images.device)
            yield from order[: len(order) // size * size].split(size)


def _readers(groups: FilterGroups) -> dict[str, Tensor]:
    """Layer that reads filters → for each place of that axis the filter's number among all groups', from 1; else 0."""
    readers: dict[str, Tensor] = {}
    first = 1
    for group in groups:
        for part in group.slices:
            if part.axis == "in":
                places = readers.setdefault(part.module, torch.zeros(part.length, dtype=torch.long))
                places[part.index] = part.source + first
        first += group.size
    return readers
