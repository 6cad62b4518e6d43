"""One ranking over the filters of all groups: what scores lowest goes first, wherever it is.

The one-shot heuristics that a search has to beat. A threshold common to all groups says how many filters each
keeps; the lowest threshold within budget is taken.
"""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rlprune.costs import Budget
from rlprune.delivery import single
from rlprune.forward import learning
from rlprune.importance import scores
from rlprune.own import OwnData
from rlprune.peers.judged import judged, without_criterion
from rlprune.result import PruningResult


@learning
def magnitude(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    seed: int = 0,
    **options: Any,
) -> PruningResult:
    """Global magnitude pruning: by the L1 norm of each filter over its group's mean (Li et al. 2017).

    See `rlprune.prune` for the arguments; ``options`` are those of `rlprune.peers.judged.judged` but the
    criterion. ``seed`` divides data of one's own; nothing else here is random.
    """
    return _ranked("magnitude", network, example_input, budgets, data, seed, options)


@learning
def batchnorm(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    seed: int = 0,
    **options: Any,
) -> PruningResult:
    """By each filter's batch-norm scale |γ| (network slimming, Liu et al. 2017); see `magnitude`.

    Slimming trains the network under an L1 penalty on γ before it ranks; that is left out here, where the scales are
    those of a network trained without one.
    """
    return _ranked("batchnorm", network, example_input, budgets, data, seed, options)


@learning
def taylor(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    seed: int = 0,
    **options: Any,
) -> PruningResult:
    """By the first-order change of the loss if the filter were zero (Molchanov et al. 2019); see `magnitude`.

    Needs data, and images to recalibrate on.
    """
    return _ranked("taylor", network, example_input, budgets, data, seed, options)


def _ranked(
    criterion: str,
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None,
    seed: int,
    options: dict[str, Any],
) -> PruningResult:
    start = time.perf_counter()
    candidates, evaluator = judged(network, example_input, budgets, data, seed, **without_criterion(options))
    # a norm grows with a filter's inputs: only within its group does it say something; the others compare as they are
    values = scores(network, candidates.groups, criterion, evaluator.sample, relative=criterion == "magnitude")
    return single(candidates, evaluator, candidates.thresholded(values), start, criterion, values)
