"""A model of the reward, on which the agent practises between evaluations.

Evaluations are dear and an agent that learns from each of them once needs many. A Gaussian process, fitted to all
evaluations so far, predicts the reward of decisions that nobody has evaluated; the agent plays many episodes
against it for every one that is evaluated. This is DyNA-PPO (Angermueller et al. 2020, ICLR), with the process in
place of its ensemble, and with a share of the predicted standard deviation as a premium on what is unknown.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel
from threadpoolctl import ThreadpoolController

PREMIUM = 0.5  # predicted standard deviations added to the mean
MEMORY = 500  # evaluations that the process is fitted to, the last ones: its price grows with their cube
KNOWN = 20  # evaluations before the process is worth anything
BLAS = ThreadpoolController()  # has one thread here: two round otherwise, and a search would part from its repetition


class RewardModel:
    """Rewards of decisions, as far as they are known.

    Given the state of another network's model it begins with what is known there: a decision here is carried over to
    that network, see `carried`, and the process learns by how much the reward differs from what that model expects.

    Attributes:
        groups: filter groups of the network.
        summaries: of the decisions evaluated, see `rlprune.env.PruningEnv`.
        rewards: of those.
        earlier: the other network's model, or None.
    """

    def __init__(self, groups: int, earlier: dict[str, Any] | None = None) -> None:
        """``earlier``: `state` of the other network's model, of the same action space."""
        self.groups = groups
        self.summaries: list[list[float]] = []
        self.rewards: list[float] = []
        self.earlier: RewardModel | None = None
        if earlier is not None:
            self.earlier = RewardModel(earlier["groups"], earlier["earlier"])
            self.earlier.restore(earlier)
            self.earlier.fit()
        self._process: GaussianProcessRegressor | None = None
        self._line = np.array([1.0, 0.0])  # slope and offset, from what the earlier model expects to rewards here
        self._known: dict[bytes, float] = {}

    @property
    def ready(self) -> bool:
        """Whether enough is known to practise on."""
        return len(self.rewards) >= KNOWN or (self.earlier is not None and self.earlier.ready)

    def add(self, summary: Sequence[float], reward: float) -> None:
        """Take in an evaluation; predictions change with the next `fit`."""
        self.summaries.append(list(summary))
        self.rewards.append(reward)

    @BLAS.wrap(limits=1)
    def fit(self) -> None:
        """Fit the process anew: length scales, one per number of a summary, and noise by maximum likelihood."""
        known, rewards = np.array(self.summaries[-MEMORY:]), np.array(self.rewards[-MEMORY:])
        self._known, self._process = {}, None
        if self.earlier is not None and len(rewards):
            expected, _ = self._carried(known)
            self._line = _line(expected, rewards)
            rewards = rewards - np.polyval(self._line, expected)
        if self.earlier is not None and len(rewards) < KNOWN:
            return  # too few to say what is different here
        process = GaussianProcessRegressor(_kernel(known.shape[1]), normalize_y=True)
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # a bound reached is an answer too
            self._process = process.fit(known, rewards)

    def __call__(self, summary: np.ndarray) -> float:
        """The reward that a decision may be hoped to bring: mean and `PREMIUM`."""
        key = summary.tobytes()
        if key not in self._known:
            mean, spread = self.predict(summary[None])
            self._known[key] = float(mean[0] + PREMIUM * spread[0])
        return self._known[key]

    @BLAS.wrap(limits=1)
    def predict(self, summaries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the rewards, (N,) each, of decisions (N, numbers of a summary)."""
        if self.earlier is None:
            return self._process.predict(summaries, return_std=True)
        mean, spread = self._carried(summaries)
        mean, spread = np.polyval(self._line, mean), abs(self._line[0]) * spread
        if self._process is not None:
            more, spread = self._process.predict(summaries, return_std=True)
            mean = mean + more
        return mean, spread

    def _carried(self, summaries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.earlier.predict(carried(summaries, self.groups, self.earlier.groups))

    def state(self) -> dict[str, Any]:
        """For a checkpoint, and to begin another network's model with."""
        earlier = self.earlier.state() if self.earlier is not None else None
        return {"groups": self.groups, "summaries": self.summaries, "rewards": self.rewards, "earlier": earlier}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.summaries, self.rewards = state["summaries"], state["rewards"]


def carried(summaries: np.ndarray, groups: int, others: int) -> np.ndarray:
    """Summaries of decisions on a network of ``groups`` as ones on a network of ``others``.

    Each group there gets the mean of those at about its relative depth, the nearer the heavier (a triangle as wide as
    the groups of the shallower network stand apart); between networks of equal depth nothing changes.
    """
    apart = 1 / max(0.5, min(groups, others) - 1)  # a group alone stands for all
    here, there = np.linspace(0, 1, groups), np.linspace(0, 1, others)
    weights = (1 - np.abs(there[:, None] - here) / apart).clip(min=0)
    weights /= weights.sum(1, keepdims=True)
    shares, rest = summaries[:, :groups], summaries[:, groups:].reshape(len(summaries), groups, -1)
    return np.concatenate([shares @ weights.T, (weights @ rest).reshape(len(summaries), -1)], axis=1)


def _line(expected: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Slope and offset of the rewards over what was expected of them; of few, or where nothing varies, slope 1."""
    if len(rewards) < KNOWN or np.ptp(expected) < 1e-9:
        return np.array([1.0, (rewards - expected).mean()])
    return np.polyfit(expected, rewards, 1)


def _kernel(count: int) -> Kernel:
    smooth = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(np.ones(count), (0.05, 50.0), nu=2.5)
    return smooth + WhiteKernel(1e-2, (1e-4, 1.0))
