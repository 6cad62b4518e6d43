"""What a search has tried: the rows of history.csv, the best decisions, and the bar that shows them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from rlprune.candidates import Candidates, Decision

KEPT = 10  # decisions remembered, for a noisy cost may refuse the best when it is measured again


class SearchLog:
    """Kept by every method that tries candidates one after the other.

    Args:
        candidates: what is searched among.
        episodes: candidates to try, for the bar.
        progress: show the bar.

    Attributes:
        rows: one per candidate: episode, steps (decisions so far), reward, mean_action (mean share kept), a column
            per budget (percent of the unpruned network's cost), best (reward so far), seconds.
        best: feasible decisions, the best first, `KEPT` of them.
    """

    def __init__(self, candidates: Candidates, episodes: int, progress: bool) -> None:
        self.candidates = candidates
        self.names = [budget.name for budget in candidates.budgets]
        self.rows: list[dict[str, float]] = []
        self.best: list[Decision] = []
        self.bar = tqdm(total=episodes, desc="search", mininterval=1, disable=not progress)

    def add(
        self,
        decision: Decision,
        shares: Sequence[float],
        percent: Sequence[float],
        seconds: float,
        feasible: bool = True,
        more: dict[str, float] | None = None,
    ) -> None:
        """Add a candidate.

        Args:
            decision: as it was evaluated.
            shares: one per group: those that an agent asked for, or, of a method that asks for nothing in
                particular, those of the network.
            percent: cost of these, in percent of the unpruned network's, one per budget.
            seconds: that it took.
            feasible: whether its network is within budget.
            more: further columns.
        """
        if feasible:
            # a stable sort: of equal rewards the first found stays first
            self.best = sorted(distinct([*self.best, decision]), key=lambda known: -known.reward)[:KEPT]
        number = len(self.rows) + 1
        row = {
            "episode": number,
            "steps": number * len(decision.widths),
            "reward": decision.reward,
            "mean_action": float(np.mean(shares)),
        }
        row |= dict(zip(self.names, map(float, percent), strict=True)) | (more or {})
        row |= {"best": self.best[0].reward if self.best else float("nan"), "seconds": seconds}
        self.rows.append(row)

    def show(self, **figures: str) -> None:
        """Bring the bar up to date; ``figures`` are shown beside reward and best."""
        self.bar.n = min(len(self.rows), self.bar.total)
        if self.rows:
            last = self.rows[-10:]
            shown = {"best": f"{last[-1]['best']:.1f}", "reward": f"{_mean(last, 'reward'):.1f}"}
            shown |= {name: f"{_mean(last, name):.1f} %" for name in self.names}
            self.bar.set_postfix({**shown, **figures})

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"rows": self.rows, "best": [vars(decision) for decision in self.best]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.rows, self.best = state["rows"], [Decision(**decision) for decision in state["best"]]


def distinct(decisions: Iterable[Decision]) -> list[Decision]:
    """Of decisions that make the same network, of equal widths and without scores of their own, the first."""
    kept: list[Decision] = []
    for decision in decisions:
        if decision.scores or all(known.widths != decision.widths for known in kept):
            kept.append(decision)
    return kept


def _mean(rows: list[dict[str, float]], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)
