"""Uniform widths: the same share of every group, the largest within budget."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rlprune.candidates import Candidates, single
from rlprune.costs import Budget
from rlprune.evaluate import Evaluator
from rlprune.groups import trace
from rlprune.own import OwnData, dataset_of
from rlprune.result import PruningResult


def uniform(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    seed: int = 0,
    evaluate: Callable[[nn.Module], float] | None = None,
    criterion: str = "magnitude",
    minimum: int = 1,
    multiple: int = 1,
    exclude: Sequence[str | type[nn.Module]] = (),
    evaluation: dict[str, Any] | None = None,
) -> PruningResult:
    """Keep the same share of every group's filters; see `rlprune.prune` for the arguments.

    ``seed`` divides data of one's own; nothing else here is random.
    """
    groups = trace(network, example_input, exclude)
    candidates = Candidates(network, groups, example_input, budgets, criterion, minimum, multiple)
    images = dataset_of(data, example_input, seed) if data is not None else None
    evaluator = Evaluator(network, groups, images, evaluate, **(evaluation or {}))
    return single(candidates, evaluator, candidates.uniform(), "uniform")
