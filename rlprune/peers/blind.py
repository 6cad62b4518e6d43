"""Searches that do not look at the network: random shares, and an evolution strategy on shares.

What an agent has to beat at as many evaluations. Both decide a share of filters
per group; a decision is brought onto the budget by one common factor.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import cma
import numpy as np
from torch import Tensor, nn

from rlprune.candidates import Candidates, Decision
from rlprune.costs import Budget
from rlprune.delivery import finish
from rlprune.errors import InputError, whole
from rlprune.evaluate import Evaluator
from rlprune.forward import learning
from rlprune.gates import start_of
from rlprune.log import SearchLog
from rlprune.own import OwnData
from rlprune.peers.judged import judged
from rlprune.result import PruningResult

LEAST = 0.05  # the smallest share tried, before it is fitted to the budget
# first step of the evolution strategy, in logits of the shares; a ranking is nearer to what is looked for
SPREAD = {"uniform": 0.8, "ranking": 0.2}


@learning
def random(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    episodes: int = 200,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """The best of ``episodes`` networks whose shares are drawn uniformly, each group's on its own.

    See `rlprune.prune` for the arguments; ``options`` are those of `rlprune.peers.judged.judged`.
    """
    whole(episodes, "episodes", 1)
    start = time.perf_counter()
    search = _Search(*judged(network, example_input, budgets, data, seed, **options), episodes, progress, start)
    generator = np.random.default_rng(seed)
    with search.log.bar:
        for _ in range(episodes):
            search.tried(generator.uniform(LEAST, 1, len(search.candidates.sizes)))
    return search.result("random")


@learning
def evolution(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    episodes: int = 200,
    start: str | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """CMA-ES (Hansen 2016, arXiv 1604.00772; package ``cma``) on the logits of the shares, from where an agent starts.

    See `rlprune.prune` for the arguments; ``options`` are those of `rlprune.peers.judged.judged`.
    """
    whole(episodes, "episodes", 1)
    began = time.perf_counter()
    start = start_of(start, options.get("criterion", "magnitude"))
    search = _Search(*judged(network, example_input, budgets, data, seed, **options), episodes, progress, began)
    count = len(search.candidates.sizes)
    if count < 2:
        raise InputError("CMA-ES needs at least 2 filter groups, and this network has 1: use peers.random.")
    candidates = search.candidates
    if start == "ranking":
        shares = np.array(candidates.thresholded(candidates.scores)) / candidates.sizes
    else:
        shares = np.full(count, np.mean(np.array(candidates.uniform()) / candidates.sizes))
    shares = np.clip(shares, LEAST, 1 - LEAST)
    with search.log.bar, _numpy_restored():
        # its seed 0 stands for the time of day
        given = {"seed": seed + 1, "verbose": -9}
        strategy = cma.CMAEvolutionStrategy(np.log(shares / (1 - shares)), SPREAD[start], given)
        while len(search.log.rows) < episodes:
            points = strategy.ask()[: episodes - len(search.log.rows)]
            rewards = [search.tried(1 / (1 + np.exp(-point))) for point in points]
            if len(points) == strategy.popsize:
                strategy.tell(points, [-reward for reward in rewards])
    return search.result("evolution")


@contextlib.contextmanager
def _numpy_restored() -> Iterator[None]:
    """On exit numpy's global generator, which ``cma`` seeds and draws from, is as it was."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


class _Search:
    """Tries shares, one candidate after the other."""

    def __init__(
        self, candidates: Candidates, evaluator: Evaluator, episodes: int, progress: bool, start: float
    ) -> None:
        self.candidates, self.evaluator = candidates, evaluator
        self.log = SearchLog(candidates, episodes, progress)
        self.start = start

    def tried(self, shares: np.ndarray) -> float:
        """Reward of these shares, brought onto the budget."""
        start = time.perf_counter()
        widths = self.candidates.fit(shares, "scale")
        reward = self.evaluator(self.candidates.masks(widths))
        percent = list(self.candidates.percent(widths).values())
        shares, seconds = np.array(widths) / self.candidates.sizes, time.perf_counter() - start
        self.log.add(Decision(reward, widths), shares, percent, seconds)
        self.log.show()
        return reward

    def result(self, method: str) -> PruningResult:
        """The best that was tried."""
        rows, seconds = self.log.rows, time.perf_counter() - self.start
        return finish(self.candidates, self.log.best, self.evaluator, rows, len(rows), seconds, method)
