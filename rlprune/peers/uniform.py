"""Uniform widths: the same share of every group, the largest within budget."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rlprune.candidates import Candidates, single
from rlprune.costs import Budget
from rlprune.data import Dataset
from rlprune.evaluate import Evaluator
from rlprune.groups import trace
from rlprune.result import PruningResult


def uniform(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: Dataset,
    seed: int = 0,
    criterion: str = "magnitude",
    evaluation: dict[str, Any] | None = None,
) -> PruningResult:
    """Keep the same share of every group's filters; see `rlprune.prune` for the arguments.

    ``seed`` is accepted as by every method; nothing here is random.
    """
    groups = trace(network, example_input)
    candidates = Candidates(network, groups, example_input, budgets, criterion)
    evaluator = Evaluator(network, groups, data, **(evaluation or {}))
    return single(candidates, evaluator, candidates.uniform(), "uniform")
