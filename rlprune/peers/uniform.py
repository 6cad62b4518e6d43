"""Uniform widths: the same share of every group, the largest within budget."""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rlprune.costs import Budget
from rlprune.delivery import single
from rlprune.forward import learning
from rlprune.own import OwnData
from rlprune.peers.judged import judged
from rlprune.result import PruningResult


@learning
def uniform(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    seed: int = 0,
    **options: Any,
) -> PruningResult:
    """Keep the same share of every group's filters.

    See `rlprune.prune` for the arguments; ``options`` are those of `rlprune.peers.judged.judged`.
    ``seed`` divides data of one's own; nothing else here is random.
    """
    start = time.perf_counter()
    candidates, evaluator = judged(network, example_input, budgets, data, seed, **options)
    return single(candidates, evaluator, candidates.uniform(), start, "uniform")
