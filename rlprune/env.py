"""The constrained Markov decision process as a gymnasium environment.

One episode walks the filter groups of a trained network from first to last, one
step a group (arXiv 2110.08558, section 3). Nothing is evaluated until the last
step, which brings the whole reward and the whole cost.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from rlprune.candidates import FITS, STARTS, Candidates, Decision
from rlprune.costs import Budget
from rlprune.errors import InputError, one_of
from rlprune.groups import FilterGroups, trace
from rlprune.importance import FEATURES, Sample, features

ACTIONS = ["layerwise", "filterwise"]
HARMONICS = 4


class PruningEnv(gymnasium.Env):
    """Prune a network group by group, under budgets.

    **Action**, layer-wise, ``Box(0, 1, (1,))``: the share of the group's filters to keep. Which ones, a
    criterion says.

    **Action**, filter-wise, ``Box(0, 1, (1 + len(FEATURES),))``: the share, and how much each of a filter's
    `rlprune.importance.FEATURES` (and a criterion that is not among them) counts, 0 for -1, 0.5 for nothing, 1 for 1.
    The weighted sum is each filter's keep logit, and the highest stay: a learned importance, whose weights the
    filters of a group share, so that it fits groups of any size.

    **Share**: with ``start="ranking"`` not the number itself. One ranking of all filters by the criterion gives every
    group a share to start from (`rlprune.candidates.Candidates.thresholded`); 0.5 stands for it, 0 for half and 1 for
    twice as much. An agent then improves on what the criterion decides at once.

    **Observation**, ``Box(-inf, inf, (11 + HARMONICS + budgets,))``, of the group to decide next:

    ====  ==========================================================================
    0     position of the group, 0 for the first, 1 for the last
    1     input channels of its first convolution, log2 / 10
    2     filters in the group, log2 / 10
    3     kernel size / 3
    4     stride / 2
    5     padding
    6     share of the network's parameters that go if the group keeps one filter
    7     share of its MACs that go then
    8     share of filters asked for in the group before (1 at the first step)
    9     mean share asked for so far, each group counting once (1 at the first step)
    10    number of groups still to decide / number of groups
    11…   cos(k·π·position), k = 1 … HARMONICS: lets a small policy tell neighbours apart
    last  per budget: the limit as a share of the unpruned cost
    ====  ==========================================================================

    After the last step the observation is that of the last group.

    **Reward**: 0, then at the last step ``reward(masks)``.

    **info["cost"]**, shape (budgets,): 0, then at the last step the cost of what was
    asked for, in percent of the unpruned network's. The network evaluated, and
    reported in `episodes`, is made from it by ``fit`` and is within budget unless
    ``fit`` is "none". With "wall" a share is cut at every step to the largest from
    which the budgets can still be met, so that what is asked for is within budget too.

    Args:
        network: trained, unpruned; untouched.
        example_input: one input, (1, C, H, W), on the network's device.
        budgets: one or more.
        reward: keep masks → number; usually an `rlprune.evaluate.Evaluator`.
        action: one of `ACTIONS`.
        groups: the filter groups, if they have been traced already.
        criterion: which filters of a group stay, see `Candidates`; layer-wise. Filter-wise, one that is a function
            is a feature more.
        sample: images and labels, for the criterion "taylor" and for the feature of that name.
        fit: how a decision is brought within budget, see `Candidates.fit`.
        minimum: filters that every group keeps at least.
        multiple: what is kept of a group is a multiple of this, or all of it.
        start: one of `rlprune.candidates.STARTS`, what shares are relative to.

    Attributes:
        relative: whether shares are relative to `start`.
        episodes: a dict per finished episode: decision (`rlprune.candidates.Decision`), shares, summary,
            asked (cost asked for, percent), feasible, seconds.
        limits: the budgets in the unit of ``info["cost"]``, to be handed to the agent.
        imagined: a function of the summary of a decision, that of `episodes`: an array of the groups' shares kept, as
            logarithms, and of the features' weights. While it is set it gives the reward, nothing is evaluated,
            and `episodes` stays as it is. For costs that follow from the widths.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own form)

    def __init__(
        self,
        network: nn.Module,
        example_input: Tensor,
        budgets: Sequence[Budget],
        reward: Callable[[list[Tensor]], float],
        action: str = "layerwise",
        groups: FilterGroups | None = None,
        criterion: str | Callable[[Candidates], list[Tensor]] = "magnitude",
        sample: Sample | None = None,
        fit: str = "shrink",
        minimum: int = 1,
        multiple: int = 1,
        start: str = "uniform",
    ) -> None:
        one_of("action space", action, ACTIONS)
        one_of("start", start, STARTS)
        one_of("way to fit a budget", fit, FITS)
        groups = trace(network, example_input) if groups is None else groups
        self.candidates = Candidates(network, groups, example_input, budgets, criterion, sample, minimum, multiple)
        self.reward, self.fit = reward, fit
        self.limits = 100 * self.candidates.limits / self.candidates.unpruned
        self.episodes: list[dict[str, Any]] = []
        self.imagined: Callable[[np.ndarray], float] | None = None
        self.groups, self.relative = groups, start == "ranking"
        self._features = self._describe()
        # a criterion that is no feature yet becomes one
        self._filterwise, self._sample, self._more = action == "filterwise", sample, not isinstance(criterion, str)
        self._weights: list[np.ndarray] = []
        length = 1 + (len(FEATURES) + self._more if self._filterwise else 0)
        self.action_space = gymnasium.spaces.Box(0.0, 1.0, (length,), np.float32)
        size = self._features.shape[1] + 3 + len(self.limits)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self._shares: list[float] = []
        self._started = time.perf_counter()

    @cached_property
    def start(self) -> np.ndarray | None:
        """Shares that 0.5 stands for, (groups,); None where a share is the number itself."""
        if not self.relative:
            return None
        return np.array(self.candidates.thresholded(self.candidates.scores)) / self.candidates.sizes

    @cached_property
    def _of_filters(self) -> list[Tensor] | None:
        if not self._filterwise:
            return None
        more = self.candidates.scores if self._more else None
        return features(self.candidates.network, self.groups, self._sample, more)

    def state(self) -> dict[str, Any]:
        """What was measured and learned of the network, for a checkpoint: another process would not find the same."""
        start = self.start.tolist() if self.start is not None else None
        learned = {"scores": self.candidates.scores, "features": self._of_filters}
        return {"unpruned": self.candidates.unpruned.tolist(), "start": start, **learned}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`: limits, relative shares and what ranks filters mean what they meant there.

        Raises:
            InputError: budgets that cannot be met then.
        """
        if "scores" in state:  # not in that of an unfinished search of an earlier version; to ask for them is to learn
            self.candidates.scores, self._of_filters = state["scores"], state["features"]
        self.candidates.go_on_with(state["unpruned"])
        self.limits = 100 * self.candidates.limits / self.candidates.unpruned
        self.start = np.array(state["start"]) if state["start"] is not None else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start at the first group. The environment has no randomness of its own."""
        super().reset(seed=seed)
        self._shares, self._weights = [], []
        _ = self.start, self._of_filters, self.candidates.scores  # what must be learned is, before the clock starts
        self._started = time.perf_counter()
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Decide one group; see the class."""
        if len(self._shares) == len(self.groups):
            raise InputError("The episode is over: call reset() before the next step.")
        action = np.asarray(action, dtype=np.float64).reshape(-1)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise InputError(f"An action must be {self.action_space.shape[0]} number(s) in [0, 1], not {action}.")
        action = action.clip(0, 1)
        share = action[0] if self.start is None else self.start[len(self._shares)] * 2 ** (2 * action[0] - 1)
        self._shares.append(self._walled(min(float(share), 1.0)))
        self._weights.append(2 * action[1:] - 1)
        if len(self._shares) < len(self.groups):
            return self._observation(), 0.0, False, False, {"cost": np.zeros(len(self.limits))}
        reward, cost = self._finish()
        return self._observation(), reward, True, False, {"cost": cost}

    def _walled(self, share: float) -> float:
        """The share, cut where it would leave too little for the groups to come."""
        if self.fit != "wall":
            return share
        decided = self._decided()
        index = len(decided)
        most = self.candidates.wall(decided)
        return min(share, most / self.groups[index].size)

    def _decided(self) -> list[int]:
        """Widths of the groups decided so far."""
        shares = self._shares + [0.0] * (len(self.groups) - len(self._shares))
        return self.candidates.widths(np.array(shares))[: len(self._shares)]

    def _finish(self) -> tuple[float, np.ndarray]:
        shares = np.array(self._shares)
        asked = np.array(list(self.candidates.percent(self.candidates.widths(shares)).values()))
        widths = self.candidates.fit(shares, self.fit)
        summary = np.concatenate([np.log(np.array(widths) / self.candidates.sizes), *self._weights])
        if self.imagined is not None:
            return float(self.imagined(summary)), asked
        scores = None
        if self._of_filters is not None:
            pairs = zip(self._of_filters, self._weights, strict=True)
            scores = [of_group @ torch.as_tensor(weights, dtype=torch.float32) for of_group, weights in pairs]
        reward = float(self.reward(self.candidates.masks(widths, scores)))
        self.episodes.append(
            {
                "decision": Decision(reward, widths, scores),
                "shares": shares.tolist(),
                "summary": summary.tolist(),
                "asked": asked.tolist(),
                "feasible": self.candidates.feasible(widths),
                "seconds": time.perf_counter() - self._started,
            }
        )
        return reward, asked

    def _describe(self) -> np.ndarray:
        """The numbers of an observation that no decision changes, (groups, 8 + HARMONICS)."""
        candidates, rows = self.candidates, []
        sizes, predict = candidates.sizes.tolist(), candidates.predictor
        whole = predict.parameters(sizes), predict.macs(sizes)
        for index, group in enumerate(self.groups):
            root = group.root(candidates.network)
            position = index / max(1, len(self.groups) - 1)
            without = [1 if i == index else size for i, size in enumerate(sizes)]
            rows.append(
                [
                    position,
                    math.log2(root.in_channels) / 10,
                    math.log2(group.size) / 10,
                    root.kernel / 3,
                    root.stride / 2,
                    root.padding,
                    1 - predict.parameters(without) / whole[0],
                    1 - predict.macs(without) / whole[1],
                    *[math.cos(k * math.pi * position) for k in range(1, HARMONICS + 1)],
                ]
            )
        return np.array(rows, dtype=np.float32)

    def _observation(self) -> np.ndarray:
        decided = len(self._shares)
        fixed = self._features[min(decided, len(self.groups) - 1)]
        before = self._shares[-1] if decided else 1.0
        mean = float(np.mean(self._shares)) if decided else 1.0
        moving = [before, mean, 1 - decided / len(self.groups)]
        return np.concatenate([fixed[:8], moving, fixed[8:], self.limits / 100]).astype(np.float32)
