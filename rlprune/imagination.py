"""A model of the reward, on which the agent practises between evaluations.

Evaluations are dear and an agent that learns from each of them once needs many. A Gaussian process, fitted to all
evaluations so far, predicts the reward of decisions that nobody has evaluated; the agent plays many episodes
against it for every one that is evaluated. This is DyNA-PPO (Angermueller et al. 2020, ICLR), with the process in
place of its ensemble, and with a share of the predicted standard deviation as a premium on what is unknown.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel

PREMIUM = 0.5  # predicted standard deviations added to the mean
MEMORY = 500  # evaluations that the process is fitted to, the last ones: its price grows with their cube


class RewardModel:
    """Rewards of decisions, as far as they are known.

    Attributes:
        summaries: of the decisions evaluated, see `rlprune.env.PruningEnv`.
        rewards: of those.
    """

    def __init__(self) -> None:
        self.summaries: list[list[float]] = []
        self.rewards: list[float] = []
        self._process: GaussianProcessRegressor | None = None
        self._known: dict[bytes, float] = {}

    def add(self, summary: Sequence[float], reward: float) -> None:
        """Take in an evaluation; predictions change with the next `fit`."""
        self.summaries.append(list(summary))
        self.rewards.append(reward)

    def fit(self) -> None:
        """Fit the process anew: length scales, one per number of a summary, and noise by maximum likelihood."""
        known, rewards = np.array(self.summaries[-MEMORY:]), np.array(self.rewards[-MEMORY:])
        process = GaussianProcessRegressor(_kernel(known.shape[1]), normalize_y=True)
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # a bound reached is an answer too
            self._process = process.fit(known, rewards)
        self._known = {}

    def __call__(self, summary: np.ndarray) -> float:
        """The reward that a decision may be hoped to bring: mean and `PREMIUM`."""
        key = summary.tobytes()
        if key not in self._known:
            mean, spread = self._process.predict(summary[None], return_std=True)
            self._known[key] = float(mean[0] + PREMIUM * spread[0])
        return self._known[key]

    def state(self) -> dict[str, list]:
        """For a checkpoint."""
        return {"summaries": self.summaries, "rewards": self.rewards}

    def restore(self, state: dict[str, list]) -> None:
        """Go on from `state`."""
        self.summaries, self.rewards = state["summaries"], state["rewards"]


def _kernel(count: int) -> Kernel:
    smooth = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(np.ones(count), (0.05, 50.0), nu=2.5)
    return smooth + WhiteKernel(1e-2, (1e-4, 1.0))
