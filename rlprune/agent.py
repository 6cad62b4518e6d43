"""PPO-Lagrangian: proximal policy optimisation under limits on expected cost.

Works on any `gymnasium.Env` with a 1-D Box observation and a Box action that reports ``info["cost"]`` at every
step. A limit bounds the expected undiscounted sum of that cost over an episode. Sources: PPO, Schulman et al.
2017 (arXiv 1707.06347); its Lagrangian form, Ray et al. 2019 and arXiv 2110.08558, whose settings are the
defaults here; PID multipliers, Stooke et al. 2020 (arXiv 2007.03964).

Beyond the paper: critics that fit costs of any scale, a pull of the mean action back into the Box, and multipliers
that wake again after a long time within the limit; each is explained where it stands.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from rlprune.errors import InputError, first_line, whole
from rlprune.forward import learning
from rlprune.policy import (
    Critic,
    GaussianPolicy,
    Multiplier,
    PPOOptions,
    RunningStatistics,
    advantages,
    gaussian_kl,
    minibatches,
)
from rlprune.vector import check_finite, reported_costs, vectorised

__all__ = ["LagrangianPPO", "PPOOptions"]


class LagrangianPPO:
    """Learns a policy of high return whose expected cost per episode keeps within limits.

    Runs on the CPU, where networks this small are fastest. All randomness comes from the agent's own generators;
    the environment's is its own, seeded on the first reset.

    Attributes:
        history: one row per update: steps, episodes (both since the start), mean_return, mean_cost_i (of the
            episodes that ended in this update; NaN if none did), lambda_i, price_i (λ in reward per unit of cost:
            what one more unit of the limit would be worth), mean_action, std (of the policy), entropy, kl, epochs,
            policy_loss, value_loss (of all critics, in units of their targets' variance).
        steps: environment steps learned from, over all environments.
    """

    def __init__(
        self,
        env: gymnasium.Env | VectorEnv,
        limits: Sequence[float],
        seed: int = 0,
        options: PPOOptions | None = None,
    ) -> None:
        """Make the networks; the environment is not touched yet.

        Args:
            env: or a vector of them with ``autoreset_mode=SAME_STEP``. There, cost must be of type float (gymnasium
                would cut another environment's 0.5 to an integer), and what `reset` returns be a new array.
            limits: one per entry of ``info["cost"]``, in its unit, per episode. An episode's cost ends with it,
                be it terminated or truncated; its reward is bootstrapped beyond a truncation.
            seed: of everything random here, and of the environment's first reset.
            options: how to learn; None for the paper's settings.

        Raises:
            InputError: spaces, limits, seed or autoreset mode that the agent can't work with.
        """
        self.options = o = options or PPOOptions()
        env = vectorised(env)
        box, view = env.single_action_space, env.single_observation_space
        self.limits = np.asarray(limits, dtype=np.float64)
        if self.limits.ndim != 1 or len(self.limits) == 0 or not np.isfinite(self.limits).all():
            raise InputError(f"limits must be a list of one finite number per cost, not {limits!r}.")
        whole(seed, "seed")
        actions, count = int(np.prod(box.shape)), len(self.limits)
        first = o.first_action(actions)

        self.env, self.seed = env, int(seed)
        self._bounds = [torch.as_tensor(bound.reshape(-1), dtype=torch.float32) for bound in (box.low, box.high)]
        width = (self._bounds[1] - self._bounds[0]).nan_to_num(posinf=1.0)
        self._width = width.where(width > 0, 1.0)  # of the Box; 1 where it has no end, or a single point
        # `predict` has one of its own, so that it disturbs nothing
        self.generator, self.prediction_generator = (torch.Generator().manual_seed(self.seed) for _ in range(2))
        sizes = (view.shape[0], *o.hidden)
        self.policy = GaussianPolicy((*sizes, actions), o.initial_log_std, torch.from_numpy(first), self.generator)
        self.critics = nn.ModuleList([Critic((*sizes, 1), self.generator), Critic((*sizes, count), self.generator)])
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=o.learning_rate)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=o.learning_rate)
        self.observation_scale, self.return_scale = RunningStatistics(view.shape[0]), RunningStatistics(1)
        self.multiplier = Multiplier(self.limits, o)
        self.steps, self.episodes = 0, 0
        self.history: list[dict[str, float]] = []
        self._observation: np.ndarray | None = None  # None: the next step begins with a reset

    @property
    def multipliers(self) -> np.ndarray:
        """The current λ, one per limit."""
        return self.multiplier.value.numpy().copy()

    @learning
    def learn(
        self,
        total_steps: int,
        callback: Callable[["LagrangianPPO", dict[str, float]], bool | None] | None = None,
        progress: bool = False,
    ) -> "LagrangianPPO":
        """Learn from ``total_steps`` more environment steps (over all environments), rounded up to whole updates.

        Args:
            total_steps: at least 1.
            callback: gets the agent and the new row of `history` after every update; returning False stops.
            progress: show a bar.

        Raises:
            InputError: the environment reports no cost, or a wrong one, or episodes that `whole_episodes` forbids.
        """
        whole(total_steps, "total_steps", 1)
        goal = self.steps + total_steps
        with tqdm(total=total_steps, desc="learn", unit="step", disable=not progress) as bar:
            while self.steps < goal:
                before = self.steps
                row = self._update()
                bar.update(self.steps - before)
                bar.set_postfix(reward=f"{row['mean_return']:.4g}", cost=f"{row['mean_cost_0']:.4g}")
                if callback is not None and callback(self, row) is False:
                    break
        return self

    def _update(self) -> dict[str, float]:
        """Collect, then learn: the algorithm in the order of the paper."""
        o = self.options
        try:
            batch = self._collect()
        except BaseException:  # also a keyboard interrupt: the environment may stand in the middle of a step
            self._observation = None
            raise
        with torch.no_grad():
            values, next_values = ([critic(batch[k]) for critic in self.critics] for k in ("seen", "seen_next"))
            over, terminated = batch["over"].unsqueeze(-1), batch["terminated"].unsqueeze(-1)
            rewards, costs = batch["rewards"].unsqueeze(-1), batch["costs"]
            reward_advantage = advantages(rewards, values[0], next_values[0], terminated, over, o.gamma, o.gae_lambda)
            # an episode's cost ends with the episode, however that ended: nothing is added beyond a truncation
            cost_advantage = advantages(costs, values[1], next_values[1], over, over, o.cost_gamma, o.cost_gae_lambda)
            returns = [(a + v).flatten(0, 1) for a, v in zip((reward_advantage, cost_advantage), values, strict=True)]
            spread = reward_advantage.std(correction=0)
            reward_advantage = ((reward_advantage - reward_advantage.mean()) / (spread + 1e-8)).flatten()
            cost_advantage = cost_advantage.flatten(0, 1)
            cost_advantage = cost_advantage - cost_advantage.mean(0)  # centred only: λ keeps its unit
            seen, actions = batch["seen"].flatten(0, 1), batch["actions"].flatten(0, 1)
            old_mean, old_log_std = self.policy.mean(seen), self.policy.log_std.clone()
            old_log_prob = self.policy.log_prob(old_mean, actions)
        weight = self.multiplier.value.float()

        def policy_loss(rows: Tensor) -> Tensor:
            mean = self.policy.mean(seen[rows])
            ratio = (self.policy.log_prob(mean, actions[rows]) - old_log_prob[rows]).exp()
            gain = reward_advantage[rows]
            reward = torch.min(ratio * gain, ratio.clamp(1 - o.clip, 1 + o.clip) * gain).mean()
            cost = ((ratio.unsqueeze(-1) * cost_advantage[rows]).mean(0) * weight).sum()
            outside = ((mean - mean.clamp(*self._bounds)) / self._width).square().sum(-1).mean()
            regularisation = o.bound_coefficient * outside - o.entropy_coefficient * self.policy.entropy()
            return -(reward - cost) / (1 + weight.sum()) + regularisation

        loss, kl, epochs = 0.0, 0.0, 0
        while epochs < o.epochs and kl <= o.target_kl:
            order = torch.randperm(len(seen), generator=self.generator)
            loss = minibatches(self.policy, self.policy_optimizer, policy_loss, order, o.minibatch, o.max_grad_norm)
            with torch.no_grad():
                kl = gaussian_kl(old_mean, old_log_std, self.policy.mean(seen), self.policy.log_std).item()
            epochs += 1

        targets = [critic.standardised(r) for critic, r in zip(self.critics, returns, strict=True)]

        def value_loss(rows: Tensor) -> Tensor:
            pairs = zip(self.critics, targets, strict=True)
            return torch.stack([F.mse_loss(critic.net(seen[rows]), t[rows]) for critic, t in pairs]).sum()

        fit = 0.0
        for _ in range(o.epochs):
            order = torch.randperm(len(seen), generator=self.generator)
            fit = minibatches(self.critics, self.critic_optimizer, value_loss, order, o.minibatch, o.max_grad_norm)

        ended = np.array(batch["ended"]).reshape(-1, 1 + len(self.limits))  # per episode: return, costs
        means = ended.mean(0) if len(ended) else np.full(1 + len(self.limits), math.nan)
        if len(ended):
            self.multiplier.update(means[1:])
        self.steps += len(seen)
        self.episodes += len(ended)
        row = {"steps": self.steps, "episodes": self.episodes, "mean_return": float(means[0])}
        row |= {f"mean_cost_{i}": float(cost) for i, cost in enumerate(means[1:])}
        row |= {f"lambda_{i}": float(value) for i, value in enumerate(self.multipliers)}
        unit = spread.item() * batch["reward_unit"]
        row |= {f"price_{i}": float(value) * unit for i, value in enumerate(weight)}  # of λ as just used
        row |= {"mean_action": batch["mean_action"], "std": self.policy.log_std.exp().mean().item()}
        row |= {"entropy": self.policy.entropy().item(), "kl": kl, "epochs": epochs}
        row |= {"policy_loss": loss, "value_loss": fit}
        self.history.append(row)
        return row

    @torch.no_grad()
    def _collect(self) -> dict[str, Any]:
        """One update's steps: tensors (steps, environments, …), and what the history tells of them."""
        o, n = self.options, self.env.num_envs
        if self._observation is None:
            self._observation, _ = self.env.reset(seed=self.seed + self.steps)  # a resumed run does not repeat itself
            self._discounted, self._totals = np.zeros(n), np.zeros((n, 1 + len(self.limits)))
        names = ("seen", "seen_next", "actions", "rewards", "costs", "terminated", "over", "discounted", "clipped")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        ended: list[np.ndarray] = []
        done = False
        while not done:
            check_finite(self._observation)
            self.observation_scale.update(torch.as_tensor(self._observation))
            seen = self._normalised(self._observation)
            mean = self.policy.mean(seen)
            # the raw sample is learned from, the clipped one is acted on
            action = mean + self.policy.log_std.exp() * torch.randn(mean.shape, generator=self.generator)
            clipped = self._clipped(action)
            with torch.enable_grad():  # what an environment does is its own affair: it may train a network
                observation, reward, terminated, truncated, infos = self.env.step(clipped)
            over = terminated | truncated
            following = observation.copy()
            for i in np.flatnonzero(over):  # ``observation`` is the next episode's first already
                following[i] = infos["final_obs"][i]
            cost = reported_costs(infos, over, len(self.limits))
            check_finite(following, reward)
            self._discounted = o.gamma * self._discounted + reward
            self._totals += np.column_stack([reward, cost])
            row = (seen, self._normalised(following), action, reward, cost, terminated, over, self._discounted, clipped)
            for name, value in zip(names, row, strict=True):
                columns[name].append(torch.as_tensor(value))
            ended += list(self._totals[over])
            self._discounted = np.where(over, 0, self._discounted)
            self._totals[over] = 0
            self._observation = observation
            if o.whole_episodes and over.any() and not over.all():
                raise InputError(
                    "whole_episodes needs episodes of equal length side by side: use one environment alone."
                )
            done = len(columns["seen"]) >= o.steps_per_update and (bool(over.all()) or not o.whole_episodes)
        batch: dict[str, Any] = {name: torch.stack(values) for name, values in columns.items()}
        self.return_scale.update(batch["discounted"].reshape(-1, 1))
        unit = self.return_scale.std.item() if o.normalise_rewards else 1.0
        batch["rewards"], batch["costs"] = (batch["rewards"] / unit).float(), batch["costs"].float()
        return {**batch, "ended": ended, "reward_unit": unit, "mean_action": batch["clipped"].double().mean().item()}

    def _normalised(self, observation: np.ndarray) -> Tensor:
        rows = torch.as_tensor(observation, dtype=torch.float64)
        if self.options.normalise_observations:
            rows = ((rows - self.observation_scale.mean) / self.observation_scale.std).clamp(-10, 10)
        return rows.float()

    def _clipped(self, actions: Tensor) -> np.ndarray:
        """(N, A) → (N, *action shape), within the Box."""
        box = self.env.single_action_space
        return np.clip(actions.numpy().reshape(-1, *box.shape), box.low, box.high).astype(box.dtype)

    @torch.no_grad()
    def predict(self, observation: np.ndarray, deterministic: bool = False) -> tuple[np.ndarray, None]:
        """Decide, as in stable-baselines3.

        Args:
            observation: (O,), or a batch (N, O).
            deterministic: the mean action instead of a sample; samples leave the course of learning as it is.

        Returns:
            the action, or (N, ...) actions, within the Box; and None.
        """
        observation = np.asarray(observation)
        size = self.env.single_observation_space.shape[0]
        if observation.ndim not in (1, 2) or observation.shape[-1] != size:
            raise InputError(f"An observation must have the shape ({size},) or (N, {size}), not {observation.shape}.")
        action = self.policy.mean(self._normalised(np.atleast_2d(observation)))
        if not deterministic:
            noise = torch.randn(action.shape, generator=self.prediction_generator)
            action = action + self.policy.log_std.exp() * noise
        clipped = self._clipped(action)
        return (clipped[0] if observation.ndim == 1 else clipped), None

    def _modules(self) -> dict[str, Any]:
        names = ("policy", "critics", "policy_optimizer", "critic_optimizer", "observation_scale", "return_scale")
        return {name: getattr(self, name) for name in (*names, "multiplier")}

    def _shape(self) -> dict[str, Any]:
        sizes = {"observation": self.env.single_observation_space.shape[0], "action": len(self.policy.log_std)}
        own = {"hidden": list(self.options.hidden), "multiplier": self.options.multiplier}
        return {**sizes, "limits": len(self.limits), **own}

    def state_dict(self) -> dict[str, Any]:
        """All that learning goes on from, as tensors, numbers, strings, lists and dicts.

        The environment's own state is not part of it: after `load_state_dict` the next step begins new episodes. With
        ``whole_episodes`` no episode is ever cut, and a run in an environment whose episodes do not depend on its own
        random numbers goes on exactly as if never stopped.
        """
        state = {name: part.state_dict() for name, part in self._modules().items()}
        state |= {name: getattr(self, name).get_state() for name in ("generator", "prediction_generator")}
        state |= {"steps": self.steps, "episodes": self.episodes, "history": self.history, "shape": self._shape()}
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an agent of the same spaces, number of limits, ``hidden`` and ``multiplier``.

        Raises:
            InputError: the state is of another kind of agent or incomplete; this agent is then as before.
        """
        names = [*self._modules(), "generator", "prediction_generator", "steps", "episodes", "history", "shape"]
        missing = [name for name in names if name not in state]
        if missing:
            raise InputError(f"This is no complete state of an agent: {missing[0]!r} is missing.")
        if state["shape"] != self._shape():
            raise InputError(f"The state is of an agent with {state['shape']}, this one has {self._shape()}.")
        state = copy.deepcopy(state)
        parts = copy.deepcopy(self._modules())  # together, since the optimisers hold the networks' parameters
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except (RuntimeError, KeyError, ValueError) as error:
            raise InputError(f"This is no complete state of an agent: {first_line(error)}.") from error
        vars(self).update(parts)
        self.generator.set_state(state["generator"])
        self.prediction_generator.set_state(state["prediction_generator"])
        self.steps, self.episodes, self.history = state["steps"], state["episodes"], state["history"]
        self._observation = None

    def adopt(self, state: dict[str, Any]) -> None:
        """Begin with what another agent has learned: its policy, critics and statistics, in another environment.

        Exploration, multipliers, optimisers, counters and random numbers stay this agent's own.

        Args:
            state: of an agent of the same spaces, number of limits, ``hidden`` and ``multiplier``; see `state_dict`.

        Raises:
            InputError: as of `load_state_dict`.
        """
        spread = self.policy.log_std.detach().clone()
        learned = {"policy", "critics", "observation_scale", "return_scale", "shape"}
        mine = {name: part for name, part in self.state_dict().items() if name not in learned}
        self.load_state_dict(mine | {name: part for name, part in state.items() if name in learned})
        with torch.no_grad():
            self.policy.log_std.copy_(spread)
