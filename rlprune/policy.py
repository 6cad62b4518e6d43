"""What the agent is made of: its options, small networks, running statistics and multipliers.

The algorithm itself is in `rlprune.agent`.
"""

import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlprune.errors import InputError, one_of


@dataclass(frozen=True)
class PPOOptions:
    """How the agent learns.

    A multiplier weighs cost, in its own unit, against standardised reward advantages. The defaults suit costs whose
    episodes differ by units to tens, as percent do; scale yours to that.

    Attributes:
        hidden: width of each hidden layer, of the policy and of both critics.
        learning_rate: of Adam, for policy and critics.
        steps_per_update: environment steps per environment and update.
        whole_episodes: an update goes on until every environment stands at the end of an episode, which suits a
            reward that comes at the end; side by side, episodes must then be equally long.
        minibatch: steps per gradient step.
        epochs: passes over the steps of an update.
        clip: of the probability ratio, in the reward's surrogate only.
        gamma: discount of the reward.
        gae_lambda: of the reward's generalised advantage estimate.
        cost_gamma: discount of the cost; 1, since the limit is on the plain sum.
        cost_gae_lambda: of the cost's generalised advantage estimate; 1: no bias from a critic still wrong.
        target_kl: the policy's epochs end once KL(old ‖ new) exceeds this many nats.
        max_grad_norm: gradients are shortened to this length.
        entropy_coefficient: weight of the entropy bonus.
        bound_coefficient: weight of the squared distance of the mean action from the Box, in widths of the Box.
            Outside, every sample is clipped to the same action and nothing could be learned any more.
        initial_log_std: natural logarithm of the policy's first spread, in the unit of the action.
        initial_action: the mean action before any learning, a number or one per action; None: 0.
        normalise_observations: by running mean and standard deviation, then clipped at ±10.
        normalise_rewards: divided by the running standard deviation of the discounted return.
        multiplier: "adam": gradient ascent on λ = softplus(ν); "pid": a controller on the excess cost.
        initial_multiplier: λ to begin with ("adam"; "pid" begins at 0).
        minimum_multiplier: λ never falls below ("adam"), where its gradient would vanish.
        lambda_learning_rate: of Adam on ν.
        pid_gains: proportional, integral, derivative; λ per unit of excess cost.
    """

    hidden: tuple[int, ...] = (32, 32)
    learning_rate: float = 3e-4
    steps_per_update: int = 128
    whole_episodes: bool = False
    minibatch: int = 64
    epochs: int = 10
    clip: float = 0.2
    gamma: float = 0.99
    gae_lambda: float = 0.95
    cost_gamma: float = 1.0
    cost_gae_lambda: float = 1.0
    target_kl: float = 0.1
    max_grad_norm: float = 0.5
    entropy_coefficient: float = 0.0
    bound_coefficient: float = 1.0
    initial_log_std: float = -0.5
    initial_action: float | Sequence[float] | None = None
    normalise_observations: bool = True
    normalise_rewards: bool = True
    multiplier: str = "adam"
    initial_multiplier: float = 1.0
    minimum_multiplier: float = 1e-3
    lambda_learning_rate: float = 1.0
    pid_gains: tuple[float, float, float] = (0.02, 0.002, 0.02)

    def __post_init__(self) -> None:
        one_of("multiplier", self.multiplier, ["adam", "pid"])
        positive = ("learning_rate", "clip", "target_kl", "max_grad_norm", "lambda_learning_rate", "minimum_multiplier")
        for names, low, high, whole in [
            (("steps_per_update", "minibatch", "epochs"), 1, math.inf, True),
            (("gamma", "gae_lambda", "cost_gamma", "cost_gae_lambda"), 0, 1, False),
            ((*positive, "initial_multiplier"), 1e-12, math.inf, False),
            (("entropy_coefficient", "bound_coefficient"), 0, math.inf, False),
            (("initial_log_std",), -20, 20, False),
        ]:
            for name in names:
                if not _number(value := getattr(self, name), low, high, whole):
                    kind = "a whole number" if whole else "a number"
                    raise InputError(f"{name} must be {kind} from {low:g} to {high:g}, not {value!r}.")
        sequences = isinstance(self.hidden, tuple | list) and isinstance(self.pid_gains, tuple | list)
        if not (
            sequences
            and all(_number(width, 1, math.inf, whole=True) for width in self.hidden)
            and len(self.pid_gains) == 3
            and all(_number(gain, 0, math.inf, whole=False) for gain in self.pid_gains)
        ):
            raise InputError(
                "hidden needs whole widths of at least 1 and pid_gains three numbers of at least 0, not "
                f"{self.hidden!r} and {self.pid_gains!r}."
            )

    def first_action(self, actions: int) -> np.ndarray:
        """The mean action before any learning, (1,) or (actions,).

        Raises:
            InputError: `initial_action` is neither a number nor one per action.
        """
        try:
            first = np.asarray(0.0 if self.initial_action is None else self.initial_action, np.float64).reshape(-1)
        except (TypeError, ValueError):
            first = np.array([math.nan])
        if len(first) not in (1, actions) or not np.isfinite(first).all():
            raise InputError(f"initial_action must be a number or {actions} numbers, not {self.initial_action!r}.")
        return first


def _number(value: object, low: float, high: float, whole: bool) -> bool:
    kind = numbers.Integral if whole else numbers.Real
    return isinstance(value, kind) and math.isfinite(value) and low <= value <= high


class RunningStatistics(nn.Module):
    """Mean and variance of all rows seen so far (Chan et al. 1979), kept in double precision.

    Before any row: mean 0, standard deviation 1.
    """

    def __init__(self, size: int) -> None:
        """``size``: the length of a row."""
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(size, dtype=torch.float64))  # sum of squared deviations

    @property
    def std(self) -> Tensor:
        """(size,); 1 where nothing has varied yet, so that dividing by it is always safe."""
        std = (self.square / self.count.clamp(min=1)).sqrt()
        return torch.where(std > 1e-6 * (1 + self.mean.abs()), std, torch.ones_like(std))

    def update(self, rows: Tensor) -> None:
        """Take in ``rows``: (N, size)."""
        rows = rows.double()
        total = self.count + len(rows)
        delta = rows.mean(0) - self.mean
        self.square += ((rows - rows.mean(0)) ** 2).sum(0) + delta**2 * self.count * len(rows) / total
        self.mean += delta * len(rows) / total
        self.count.copy_(total)


def mlp(sizes: Sequence[int], last_gain: float, generator: torch.Generator) -> nn.Sequential:
    """Linear layers of these sizes with tanh between; orthogonal weights drawn from ``generator``, biases 0."""
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        # skip_init: PyTorch's own initialisation would draw from the global generator
        linear = nn.utils.skip_init(nn.Linear, n, m)
        last = i == len(sizes) - 2
        nn.init.orthogonal_(linear.weight, last_gain if last else math.sqrt(2), generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class GaussianPolicy(nn.Module):
    """Independent normals: the mean from an MLP, one learned spread per action; rows (N, O) → (N, A)."""

    def __init__(self, sizes: Sequence[int], log_std: float, first: Tensor, generator: torch.Generator) -> None:
        """``sizes`` from observation to action; ``log_std`` to begin with; ``first`` (A,): the mean to begin with."""
        super().__init__()
        self.mean = mlp(sizes, last_gain=0.01, generator=generator)
        with torch.no_grad():
            self.mean[-1].bias.copy_(first)
        self.log_std = nn.Parameter(torch.full((sizes[-1],), log_std))

    def log_prob(self, mean: Tensor, actions: Tensor) -> Tensor:
        """(N,): log density of ``actions`` around ``mean``."""
        z = (actions - mean) / self.log_std.exp()
        return -(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Of the unclipped distribution, in nats; the same for every observation."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


def gaussian_kl(old_mean: Tensor, old_log_std: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Mean over rows of KL(old ‖ new), in nats."""
    ratio = (2 * (old_log_std - log_std)).exp()
    shift = ((mean - old_mean) / log_std.exp()) ** 2
    return (log_std - old_log_std + 0.5 * (ratio + shift - 1)).sum(-1).mean()


class Critic(nn.Module):
    """Predicts returns (N, outputs) of any scale.

    The MLP works in units of the running mean and spread of its targets. When these move, its last layer is
    rescaled so that the prediction stays what it was (PopArt, van Hasselt et al. 2016, arXiv 1602.07714).
    """

    def __init__(self, sizes: Sequence[int], generator: torch.Generator) -> None:
        """``sizes`` from observation to the number of outputs."""
        super().__init__()
        self.net = mlp(sizes, last_gain=1.0, generator=generator)
        self.scale = RunningStatistics(sizes[-1])

    def forward(self, observations: Tensor) -> Tensor:
        """(N, O) → (N, outputs), in the unit of the targets."""
        return self.net(observations) * self.scale.std.float() + self.scale.mean.float()

    @torch.no_grad()
    def standardised(self, targets: Tensor) -> Tensor:
        """Take ``targets`` (N, outputs) into the statistics and return them in units of these."""
        mean, std = self.scale.mean.clone(), self.scale.std.clone()
        self.scale.update(targets)
        last = self.net[-1]
        last.weight.mul_((std / self.scale.std).unsqueeze(1))
        last.bias.copy_((std * last.bias + mean - self.scale.mean) / self.scale.std)
        return ((targets - self.scale.mean) / self.scale.std).float()


def minibatches(
    modules: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor], Tensor],
    order: Tensor,
    size: int,
    max_norm: float,
) -> float:
    """One pass of gradient steps over the rows in ``order``; returns the mean loss."""
    total = 0.0
    for rows in order.split(size):
        value = loss(rows)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), max_norm)
        optimizer.step()
        total += value.item() * len(rows)
    return total / len(order)


def advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    final: Tensor,
    over: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438), all (steps, environments, outputs).

    Args:
        rewards: of each step.
        values: predicted for what was seen before it.
        next_values: predicted for what was seen after it, the last observation where an episode ended.
        final: nothing is to be expected after this step.
        over: the episode ended here; the next step is another episode's.
        gamma: discount.
        gae_lambda: 0: one step and the critic; 1: the sum of what came, the critic only where it was cut.
    """
    error = rewards + gamma * next_values * ~final - values
    result = torch.empty_like(error)
    following = torch.zeros_like(error[0])
    for t in reversed(range(len(error))):
        following = error[t] + gamma * gae_lambda * ~over[t] * following
        result[t] = following
    return result


class Multiplier(nn.Module):
    """λ of each limit, from the mean cost of the episodes that ended."""

    def __init__(self, limits: np.ndarray, options: PPOOptions) -> None:
        """``limits``: (L,)."""
        super().__init__()
        self.options = options
        self.register_buffer("limits", torch.from_numpy(limits), persistent=False)
        self.nu = nn.Parameter(_inverse_softplus(torch.full_like(self.limits, options.initial_multiplier)))
        self.register_buffer("pid", torch.zeros_like(self.limits))  # λ of the controller
        self.register_buffer("integral", torch.zeros_like(self.limits))
        self.register_buffer("previous", torch.full_like(self.limits, math.nan))
        self.optimizer = torch.optim.Adam([self.nu], lr=options.lambda_learning_rate)

    @property
    def value(self) -> Tensor:
        """(L,): the current λ."""
        return (F.softplus(self.nu) if self.options.multiplier == "adam" else self.pid).detach()

    def update(self, cost: np.ndarray) -> None:
        """``cost``: (L,), the mean over episodes of their sum."""
        cost = torch.from_numpy(cost)
        excess = cost - self.limits
        if self.options.multiplier == "adam":
            self.optimizer.zero_grad(set_to_none=True)
            # Adam on −λ · excess, but with dλ/dν taken as 1: at a small λ the true slope, about λ, would keep it there
            # for hundreds of updates however far the cost were beyond its limit
            self.nu.grad = -excess
            self.optimizer.step()
            floor = torch.full_like(self.nu, self.options.minimum_multiplier)
            with torch.no_grad():
                self.nu.copy_(torch.maximum(self.nu, _inverse_softplus(floor)))
            return
        proportional, integral, derivative = self.options.pid_gains
        self.integral.copy_((self.integral + excess).clamp(min=0))
        rise = (cost - self.previous).nan_to_num(0).clamp(min=0)  # no rise is known at the first update
        self.previous.copy_(cost)
        self.pid.copy_((proportional * excess + integral * self.integral + derivative * rise).clamp(min=0))

    def get_extra_state(self) -> dict[str, object]:
        """The optimiser's state, so that `state_dict` is complete."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, object]) -> None:
        """See `get_extra_state`."""
        self.optimizer.load_state_dict(state)


def _inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))
