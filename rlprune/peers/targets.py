"""Widths whose costs end just below their limits: for methods that are held to a target, not only to a bound."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlprune.candidates import Candidates

OVER = 1e3  # a cost over its limit outweighs any that is too far below
TOGETHER, MOST = 3, 100_000  # groups that `on_target` changes at once, and changes that it looks at


class ExactCosts:
    """What `rlprune.costs.Predictor` computes, differentiable and for many widths at once.

    In float64, whole numbers up to 2⁵³ are exact.

    Args:
        candidates: with budgets on parameters and MACs.
        near: how far below its limit a cost may be, as a share of the limit.
    """

    def __init__(self, candidates: Candidates, near: float = 0.01) -> None:
        self.near = near
        known = candidates.predictor
        terms = [known.elements if b.is_named("parameters") else known.products for b in candidates.budgets]
        numbers = [known.base, known.slope.T, known.split, np.stack(terms, 1), candidates.limits]
        self._base, self._slope, self._split, self._terms, self.limits = (torch.tensor(n).double() for n in numbers)
        self._first, self._second = torch.tensor(known.first), torch.tensor(known.second)

    def __call__(self, widths: Tensor) -> Tensor:
        """Costs (…, budgets), in their own units, of widths (…, groups), float64."""
        lengths = self._base + widths @ self._slope
        return (lengths[..., self._first] * lengths[..., self._second] / self._split) @ self._terms

    def excess(self, widths: Tensor) -> Tensor:
        """By how much the costs exceed their limits, relatively, summed: (…,)."""
        return (self(widths) / self.limits - 1).relu().sum(-1)

    def gap(self, widths: Tensor) -> Tensor:
        """0 where every cost is near enough below its limit; else a number that falls as they get there: (…,)."""
        return (1 - self.near - self(widths) / self.limits).relu().sum(-1) + OVER * self.excess(widths)


def on_target(
    costs: ExactCosts, scores: Sequence[Tensor], widths: Sequence[int], least: Sequence[int], multiple: int = 1
) -> list[int]:
    """Widths near the given ones with every cost within budget, and within ``costs.near`` of it where such are found.

    Greedy: of the changes by a step in one group, else in two, else in three, that narrow the gap, the one that takes
    least worth for what it narrows; of those that take none, the one that narrows it most. The worth of a group is the
    logarithm of the share of its scores that is kept, times their sum.

    Args:
        costs: with their limits.
        scores: positive, per filter of each group, (size,); the highest stay.
        widths: to begin with, within budget or not.
        least: filters that each group keeps at least.
        multiple: what is kept of a group is a multiple of this, or all of it.
    """
    sizes, least = torch.tensor([len(score) for score in scores]), torch.tensor(least)
    worth = torch.zeros(len(sizes), 1 + int(sizes.max()), dtype=torch.float64)  # of each width
    for row, score in zip(worth, scores, strict=True):
        kept = score.double().sort(descending=True).values.cumsum(0)
        row[1 : 1 + len(score)] = kept[-1] * (kept / kept[-1]).log()
    rows, at = torch.arange(len(sizes)), torch.tensor(widths)
    at = torch.where(at < sizes, at // multiple * multiple, sizes).maximum(least)
    while gap := float(costs.gap(at.double())):
        up, down = (at // multiple * multiple + multiple).minimum(sizes), (at - 1) // multiple * multiple
        single = torch.cat([torch.diag(up - at), torch.diag(torch.where(down < least, at, down) - at)])
        single = single[single.any(1)]
        changes, better = at.new_zeros(1, len(sizes)), torch.tensor([False])
        for _ in range(TOGETHER):
            if not better.any() and len(changes) * len(single) <= MOST:
                apart = (changes[:, None] * single == 0).all(2)  # a further group changes, each set of changes once
                changes = (changes[:, None] + single)[apart].unique(dim=0)
                narrowed = gap - costs.gap((at + changes).double())
                better = narrowed > 1e-9
        if not better.any():
            break
        changes, narrowed = changes[better], narrowed[better]
        taken = (worth[rows, at] - worth[rows, at + changes]).sum(1).relu()
        at = at + changes[(taken / narrowed - 1e-9 * narrowed).argmin()]
    return at.tolist()
