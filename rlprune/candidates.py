"""From shares of filters kept to networks within budget.

What the agent and every method that it is compared with have in common: how
shares become widths, widths become masks, and how a decision over budget is
brought within it.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rlprune.costs import Budget, Predictor, conditions
from rlprune.errors import InputError, one_of, whole
from rlprune.groups import FilterGroups
from rlprune.importance import Sample, scores
from rlprune.masking import keep_top, memory_format, rebuild, slim

FITS = ["shrink", "scale", "wall", "none"]
STARTS = ["uniform", "ranking"]  # widths that a search starts from
# of a history, beside the costs
COLUMNS = ["episode", "steps", "reward", "mean_action", "budget", "best", "seconds", "round", "loss", "penalty", "gate"]
PROBES = 33  # uniform widths looked at where the smallest network is not within budget


@dataclass(frozen=True)
class Decision:
    """What a method decided on.

    Attributes:
        reward: of its network.
        widths: filters kept per group.
        scores: per group, (size,): the highest stay; None for those of the criterion.
    """

    reward: float
    widths: list[int]
    scores: list[Tensor] | None = None


class Candidates:
    """The pruned networks of one trained network under given budgets.

    Args:
        network: trained, unpruned; untouched.
        groups: its filter groups.
        example_input: what costs are measured with.
        budgets: all of them are to be met.
        criterion: which filters of a group stay, see `rlprune.importance.scores`; or a function of these candidates
            that gives a score per filter, one tensor (size,) per group.
        sample: images and labels, for a criterion that looks at data.
        minimum: filters that every group keeps at least.
        multiple: what is kept of a group is a multiple of this, or all of it.

    Attributes:
        unpruned: cost of the unpruned network, one per budget.
        limits: the most that each cost may be, in the cost's own unit.
        table: one row a budget: budget, limit, unpruned, largest and smallest (reachable), satisfiable.

    Raises:
        InputError: nothing to prune, or budgets that cannot be met, with the smallest cost that can be reached.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: FilterGroups,
        example_input: Tensor,
        budgets: Sequence[Budget],
        criterion: "str | Callable[[Candidates], list[Tensor]]" = "magnitude",
        sample: Sample | None = None,
        minimum: int = 1,
        multiple: int = 1,
    ) -> None:
        self.network, self.groups, self.example_input = network, groups, example_input
        self.budgets, self.minimum, self.multiple = list(budgets), minimum, multiple
        self._check()
        self.sizes = np.array([group.size for group in groups])
        least = -(-max(minimum, 1) // multiple) * multiple
        self.least = np.minimum(least, self.sizes).tolist()
        self._scores = scores(network, groups, criterion, sample) if isinstance(criterion, str) else criterion
        self.predictor = Predictor(network, groups, example_input)
        self._values: dict[tuple[int, ...], dict[int, float]] = {}
        self._built: tuple[tuple[int, ...], nn.Module] | None = None
        measured = [budget.measurements(network, example_input) for budget in self.budgets]
        self.steady = [min(values) == max(values) for values in measured]
        self.compare_with([statistics.median(values) for values in measured])

    def compare_with(self, unpruned: Sequence[float]) -> None:
        """Set the cost of the unpruned network, one per budget, and what follows from it: `limits` and `table`.

        Raises:
            InputError: a cost of 0, or budgets that cannot be met.
        """
        self.unpruned = np.array(unpruned)
        for budget, cost in zip(self.budgets, self.unpruned, strict=True):
            if cost == 0:
                raise InputError(f"The unpruned network's {budget.name} is 0 already: leave that budget out.")
        units = [u if budget.relative else 1.0 for budget, u in zip(self.budgets, self.unpruned, strict=True)]
        self.limits = np.array([budget.limit for budget in self.budgets]) * units
        self.table, self.anchor = self._reachable()

    def go_on_with(self, unpruned: Sequence[float]) -> None:
        """As `compare_with`, with what another process has measured of the unpruned network, for a run that goes on.

        Raises:
            InputError: that was another cost, or budgets that cannot be met.
        """
        for budget, steady, cost, before in zip(self.budgets, self.steady, self.unpruned, unpruned, strict=True):
            if steady and cost != before:
                raise InputError(
                    f"The checkpoint is of a run in which the unpruned network's {budget.name} was {before:g}; now "
                    f"it is {cost:g}: hand in the cost and the example input of that run, or delete the checkpoint."
                )
        self.compare_with(unpruned)

    @property
    def scores(self) -> list[Tensor]:
        """Of the criterion, (size,) per group; one that is a function is called when it is first asked for."""
        if not isinstance(self._scores, list):
            learn, self._scores = self._scores, self._before()
            self._scores = learn(self)
        return self._scores

    @scores.setter
    def scores(self, known: list[Tensor]) -> None:
        self._scores = known

    def _before(self) -> list[Tensor]:
        """The scores, or those of the largest filters where they have yet to be learned.

        Whether budgets can be met is asked before that, and learning itself asks for costs.
        """
        return self._scores if isinstance(self._scores, list) else scores(self.network, self.groups)

    def _check(self) -> None:
        if not self.budgets:
            raise InputError("There is no budget: give one or more, such as Budget('parameters', 0.1).")
        names = [budget.name for budget in self.budgets]
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise InputError(f"Two budgets are named {double!r}: give each a name of its own with Budget(…, name=…).")
        for name in names:
            if name in [*COLUMNS, *(f"lambda_{other}" for other in names)]:
                raise InputError(
                    f"A budget is named {name!r}, as another column of the history is: give it another name with "
                    "Budget(…, name=…), or rename the cost's function."
                )
        if not len(self.groups):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.groups.skipped[:3])
            raise InputError(f"There is no filter to prune in this network{f' ({reasons})' if reasons else ''}.")
        whole(self.minimum, "minimum", 1)
        whole(self.multiple, "multiple", 1)

    def _reachable(self) -> tuple[pd.DataFrame, list[int]]:
        """The table, and widths that meet all budgets; `InputError` if none are found."""
        largest, smallest = self.costs(self.sizes.tolist()), self.costs(self.least)
        anchor = self.least if self.within(smallest) else None
        if anchor is None:  # a cost of one's own need not fall with the widths
            for share in np.linspace(1, 0, PROBES):
                widths = self.widths(np.full(len(self.sizes), share))
                costs = self.costs(widths)
                smallest, largest = np.minimum(smallest, costs), np.maximum(largest, costs)
                if anchor is None and self.within(costs):
                    anchor = widths
        columns = {
            "budget": [budget.name for budget in self.budgets],
            "limit": self.limits,
            "unpruned": self.unpruned,
            "largest": largest,
            "smallest": smallest,
            "satisfiable": smallest <= self.limits,
        }
        table = pd.DataFrame(columns)
        rounded = f", in multiples of {self.multiple}" if self.multiple > 1 else ""
        for row in table[~table["satisfiable"]].itertuples():
            raise InputError(
                f"The budget of {row.limit:,.6g} on {row.budget} cannot be met: the smallest that can be reached is "
                f"{row.smallest:,.6g} (unpruned {row.unpruned:,.6g}; every group keeps {self.minimum} filter(s) or "
                f"more{rounded}{self._left_alone()}). Raise the limit."
            )
        if anchor is None:
            names = ", ".join(f"{row.budget} ≤ {row.limit:,.6g}" for row in table.itertuples())
            raise InputError(f"The budgets contradict each other: no widths meet {names} at once. Raise one of them.")
        return table, anchor

    def _left_alone(self) -> str:
        skipped = getattr(self.groups, "skipped", [])
        return f"; {len(skipped)} layer(s) are left alone, such as {skipped[0][0]}: {skipped[0][1]}" if skipped else ""

    def widths(self, shares: np.ndarray) -> list[int]:
        """Filters kept per group for these shares, rounded down to `multiple`, at least `minimum`."""
        shares = np.asarray(shares, dtype=np.float64)
        # the small addend keeps 0.3 · 10 from becoming 2
        kept = np.floor(shares * self.sizes / self.multiple + 1e-6).astype(int) * self.multiple
        return np.clip(np.where(shares >= 1, self.sizes, kept), self.least, self.sizes).tolist()

    def masks(self, widths: list[int], scores: list[Tensor] | None = None) -> list[Tensor]:
        """Keep masks: the best filters of each group by the criterion, or by ``scores`` of one's own."""
        return keep_top(self.scores if scores is None else scores, widths)

    def costs(self, widths: list[int]) -> np.ndarray:
        """The cost of these widths, one per budget: computed where it can be, else measured on the slim network."""
        return np.array([self._cost(number, widths) for number in range(len(self.budgets))], dtype=np.float64)

    def percent(self, widths: list[int]) -> dict[str, float]:
        """The cost of these widths in percent of the unpruned network's, by budget."""
        percent = 100 * self.costs(widths) / self.unpruned
        return {budget.name: float(value) for budget, value in zip(self.budgets, percent, strict=True)}

    def _cost(self, number: int, widths: list[int]) -> float:
        budget, key = self.budgets[number], tuple(widths)
        if budget.predicted:
            return self.predictor.cost(budget, widths)
        known = self._values.setdefault(key, {})
        if number not in known:
            if self._built is None or self._built[0] != key:
                self._built = key, slim(self.network, self.groups, self.masks(widths, self._before()))
            try:
                known[number] = budget.measure(self._built[1], self.example_input)
            except InputError as error:
                fault = str(error).rstrip(".")
                raise InputError(f"{fault}, on the candidate with widths {', '.join(map(str, widths))}.") from error
        return known[number]

    def within(self, costs: np.ndarray) -> bool:
        """Whether these costs meet every budget."""
        return bool((costs <= self.limits).all())

    def feasible(self, widths: list[int]) -> bool:
        """Whether these widths meet every budget; nothing is measured if what can be computed is over already."""
        order = sorted(range(len(self.budgets)), key=lambda number: not self.budgets[number].predicted)
        return all(self._cost(number, widths) <= self.limits[number] for number in order)

    def fit(self, shares: np.ndarray, how: str = "shrink") -> list[int]:
        """Widths within budget, made from shares by one common factor.

        Args:
            shares: of filters kept, one per group, in [0, 1].
            how: "shrink" leaves alone what is within budget and scales down what
                is over it, and so does "wall", whose shares the environment has held
                within budget before; "scale" also scales up what is below, so that the budget is
                used up (but for a few percent where a share is near 0, which makes the factor's
                steps large); "none" takes the shares as they are.
        """
        one_of("way to fit a budget", how, FITS)
        # scaled up, 0 would stay 0; in a group of more than 1,000 filters a thousandth is not the least
        shares = np.clip(np.asarray(shares, dtype=np.float64), np.minimum(1e-3, 1 / self.sizes), 1.0)
        asked = self.widths(shares)
        if how == "none" or (how != "scale" and self.feasible(asked)):
            return asked
        low, high, best = 0.0, 1.0 / shares.min() if how == "scale" else 1.0, self.anchor
        # which side of 1 the factor lies on comes first where there are few steps: the whole way may be a thousandfold
        grows = how == "scale" and not self.predicted and self.feasible(asked)
        if grows:
            low, best = 1.0, asked
        elif not self.predicted:
            high = 1.0
        # a measured cost takes a fraction of a second and is not exact to a hundredth
        for _ in range(16 if self.predicted else 7):
            middle = (low * high) ** 0.5 if grows else (low + high) / 2
            widths = self.widths(np.minimum(middle * shares, 1.0))
            if self.feasible(widths):
                low, best = middle, widths
            else:
                high = middle
        return best

    @property
    def predicted(self) -> bool:
        """Whether every cost follows from the widths without measuring."""
        return all(budget.predicted for budget in self.budgets)

    def wall(self, decided: Sequence[int]) -> int:
        """The most filters that the next group may keep if the groups to come can still meet the budgets.

        The action bound of AMC (He et al. 2018, section 3.2), for costs that fall with the widths.

        Args:
            decided: filters kept by the groups before.

        Returns:
            the width; the least one if even that is over budget.
        """
        index = len(decided)
        rest = self.least[index + 1 :]
        low, high = self.least[index], int(self.sizes[index])
        if self.feasible([*decided, high, *rest]):
            return high
        while high - low > 1:  # low is taken to be within, high is not
            middle = (low + high) // 2
            if self.feasible([*decided, middle, *rest]):
                low = middle
            else:
                high = middle
        return max(low // self.multiple * self.multiple, self.least[index])

    def uniform(self) -> list[int]:
        """The widest network within budget that keeps the same share of every group."""
        return self.fit(np.ones(len(self.sizes)), "shrink")

    def thresholded(self, values: Sequence[Tensor]) -> list[int]:
        """The widest network within budget that keeps, of every group, the filters above one threshold on these values.

        Of equal values the earlier ones count as higher.
        """
        order = torch.cat(list(values)).sort(descending=True, stable=True).indices
        ranks = order.argsort().split([len(value) for value in values])
        low, high, best = 0, len(order), self.anchor
        while low <= high:  # filters kept, before every group gets its least
            middle = (low + high) // 2
            widths = self.widths(np.array([float((rank < middle).double().mean()) for rank in ranks]))
            if self.feasible(widths):
                low, best = middle + 1, widths
            else:
                high = middle - 1
        return best

    def as_returned(self, network: nn.Module) -> nn.Module:
        """A copy that lies in memory as the unpruned network and as what is returned: costs can depend on that."""
        return rebuild(network, {}).to(memory_format=memory_format(self.network))

    def measured(self, network: nn.Module) -> dict[str, dict[str, Any]]:
        """The budgets' costs of a finished network, measured on it, see `Budget.measurements`.

        Returns:
            name → {"value" (the median), "low", "high" (of the measurements), "unpruned",
            "share" (value / unpruned), "limit"}; of a latency also device, threads and batch.
        """
        report: dict[str, dict[str, Any]] = {}
        for budget, unpruned, limit in zip(self.budgets, self.unpruned, self.limits, strict=True):
            values = budget.measurements(network, self.example_input)
            value = statistics.median_high(values)
            report[budget.name] = {
                "value": value,
                "low": min(values),
                "high": max(values),
                "unpruned": float(unpruned),
                "share": value / float(unpruned),
                "limit": float(limit),
            }
            if budget.is_named("latency"):
                report[budget.name] |= conditions(self.example_input)
        return report
