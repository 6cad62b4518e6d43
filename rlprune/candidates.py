"""From shares of filters kept to networks within budget.

What the agent and every method that it is compared with have in common: how
shares become widths, widths become masks, and how a decision over budget is
brought within it.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rlprune.costs import Budget, Predictor, check_reachable
from rlprune.errors import InputError, one_of
from rlprune.evaluate import Evaluator
from rlprune.groups import FilterGroups
from rlprune.importance import scores
from rlprune.masking import keep_top, slim
from rlprune.result import PruningResult

FITS = ["shrink", "scale", "none"]


class Candidates:
    """The pruned networks of one trained network under given budgets.

    Args:
        network: trained, unpruned; untouched.
        groups: its filter groups.
        example_input: what costs are measured with.
        budgets: all of them are to be met.
        criterion: which filters of a group stay, see `rlprune.importance.scores`.
        minimum: filters that every group keeps at least.

    Attributes:
        unpruned: cost of the unpruned network, one per budget.
        limits: the most that each cost may be, in the cost's own unit.

    Raises:
        InputError: a budget that cannot be met, with the smallest cost that can be reached.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: FilterGroups,
        example_input: Tensor,
        budgets: Sequence[Budget],
        criterion: str = "magnitude",
        minimum: int = 1,
    ) -> None:
        self.network, self.groups, self.example_input = network, groups, example_input
        self.budgets, self.minimum = list(budgets), minimum
        table = check_reachable(network, groups, example_input, self.budgets, minimum)
        self.unpruned, self.limits = table["unpruned"].to_numpy(float), table["limit"].to_numpy(float)
        self.sizes = np.array([group.size for group in groups])
        self.scores = scores(network, groups, criterion)
        self.predictor = Predictor(network, groups, example_input)

    def widths(self, shares: np.ndarray) -> list[int]:
        """Filters kept per group for these shares, rounded down, at least `minimum`."""
        # the small addend keeps 0.3 · 10 from becoming 2
        kept = np.floor(np.asarray(shares, dtype=np.float64) * self.sizes + 1e-6).astype(int)
        return np.clip(kept, np.minimum(self.minimum, self.sizes), self.sizes).tolist()

    def masks(self, widths: list[int]) -> list[Tensor]:
        """Keep masks: the best filters of each group by the criterion."""
        return keep_top(self.scores, widths)

    def costs(self, widths: list[int]) -> np.ndarray:
        """The cost of these widths, one per budget: computed where it can be, else measured on the slim network."""
        network, values = None, []
        for budget in self.budgets:
            if budget.is_named("parameters"):
                values.append(self.predictor.parameters(widths))
            elif budget.is_named("macs"):
                values.append(self.predictor.macs(widths))
            else:
                network = network or slim(self.network, self.groups, self.masks(widths))
                values.append(budget.measure(network, self.example_input))
        return np.array(values, dtype=np.float64)

    def within(self, costs: np.ndarray) -> bool:
        """Whether these costs meet every budget."""
        return bool((costs <= self.limits).all())

    def fit(self, shares: np.ndarray, how: str = "shrink") -> list[int]:
        """Widths within budget, made from shares by one common factor.

        Args:
            shares: of filters kept, one per group, in [0, 1].
            how: "shrink" leaves alone what is within budget and scales down what
                is over it; "scale" also scales up what is below, so that all of the
                budget is used; "none" takes the shares as they are.
        """
        one_of("way to fit a budget", how, FITS)
        shares = np.clip(np.asarray(shares, dtype=np.float64), 1e-3, 1.0)
        asked = self.widths(shares)
        if how == "none" or (how == "shrink" and self.within(self.costs(asked))):
            return asked
        low, high = 0.0, 1.0 if how == "shrink" else 1.0 / shares.min()
        best = self.widths(np.zeros_like(shares))  # the smallest network: known to be within
        for _ in range(16):
            middle = (low + high) / 2
            widths = self.widths(np.minimum(middle * shares, 1.0))
            if self.within(self.costs(widths)):
                low, best = middle, widths
            else:
                high = middle
        return best

    def uniform(self) -> list[int]:
        """The widest network within budget that keeps the same share of every group."""
        return self.fit(np.ones(len(self.sizes)), "shrink")

    def measured(self, network: nn.Module) -> dict[str, dict[str, float]]:
        """The budgets' costs of a finished network, measured on it.

        Returns:
            name → {"value", "unpruned", "share" (value / unpruned), "limit"}.
        """
        report = {}
        for budget, unpruned, limit in zip(self.budgets, self.unpruned, self.limits, strict=True):
            value = budget.measure(network, self.example_input)
            report[budget.name] = {
                "value": value,
                "unpruned": float(unpruned),
                "share": value / float(unpruned),
                "limit": float(limit),
            }
        return report


def finish(
    candidates: Candidates,
    masks: list[Tensor],
    candidate: Callable[[list[Tensor]], nn.Module],
    history: list[dict[str, Any]],
    reward: float,
    evaluations: int,
    seconds: float,
    method: str,
) -> PruningResult:
    """Build the network of the chosen masks, measure it, and refuse to return one over budget."""
    network = candidate(masks)
    costs = candidates.measured(network)
    for name, cost in costs.items():
        if cost["value"] > cost["limit"]:
            raise InputError(
                f"The network found costs {cost['value']:g} {name} when measured again, over the budget of "
                f"{cost['limit']:g}: the cost is noisy; widen the budget or steady the measurement."
            )
    kept = {group.name: (int(mask.sum()), group.size) for group, mask in zip(candidates.groups, masks, strict=True)}
    return PruningResult(
        network=network,
        masks=masks,
        costs=costs,
        history=pd.DataFrame(history),
        widths=kept,
        reward=reward,
        evaluations=evaluations,
        seconds=seconds,
        method=method,
        input_shape=tuple(candidates.example_input.shape[1:]),
        architecture=dict(getattr(candidates.network, "architecture", {})),
    )


def single(candidates: Candidates, evaluator: Evaluator, widths: list[int], method: str) -> PruningResult:
    """The result of a method that decides at once and evaluates only what it decided."""
    start = time.perf_counter()
    masks = candidates.masks(widths)
    reward = evaluator(masks)
    share = float((torch.tensor(widths) / torch.as_tensor(candidates.sizes)).mean())
    seconds = time.perf_counter() - start
    row = {"episode": 1, "steps": len(widths), "reward": reward, "mean_action": share, "best": reward}
    for budget, percent in zip(candidates.budgets, 100 * candidates.costs(widths) / candidates.unpruned, strict=True):
        row[budget.name] = percent
    row["seconds"] = seconds
    return finish(candidates, masks, evaluator.candidate, [row], reward, 1, seconds, method)
