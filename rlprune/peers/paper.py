"""The search as published (arXiv 2110.08558), with its own hyperparameters and schedules, for comparison.

What was found wanting in it is left in on purpose: nothing recovers before it is judged unless the schedule trains
it, weights are only masked, bias and batch norm of a filter that is gone stay, its readers are not counted as
smaller, and the images that judge are images that were trained on. What it decides on is then cut out, judged
and returned as every other method's network is. One thing is not: the fine-grained search judged by soft masks, filters
multiplied by their action, and counted as gone those below 0.5, so that 0.49 cost nothing; here they are gone for both.
"""

import copy
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlprune.agent import LagrangianPPO
from rlprune.candidates import Candidates, Decision
from rlprune.costs import Budget, check_budgets
from rlprune.data import Dataset
from rlprune.delivery import finish
from rlprune.errors import InputError, whole_each
from rlprune.forward import accuracy, evaluating, learning, seeded, training_logits
from rlprune.groups import FilterGroup
from rlprune.log import SearchLog
from rlprune.own import OwnData
from rlprune.peers.judged import judged
from rlprune.policy import PPOOptions
from rlprune.result import PruningResult
from rlprune.training import changeable

BATCH, RATE = 60, 3e-4  # of the fine-tuning with Adam before the reward
IMAGES = 20_000  # training images that judge
UNKNOWN = (nn.Linear, nn.Conv1d, nn.Conv3d, nn.modules.conv._ConvTransposeNd)  # the search decides Conv2d only


@dataclass(frozen=True)
class Schedule:
    """How a search changes as it goes on.

    Attributes:
        cap: the largest action allowed at the start; it grows linearly to 1.
        phases: fine-tuning steps before the reward, in equal parts of the search.
    """

    cap: float
    phases: tuple[int, ...]


COARSE, FINE = Schedule(0.8, (0, 32, 128)), Schedule(0.9, (0, 0, 32, 64, 256))


@learning
def paper_coarse(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    episodes: int = 5000,
    seed: int = 0,
    images: int = IMAGES,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """The coarse-grained agent: a share of single weights to prune per layer, the smallest of the layer.

    No filter leaves that way. The network returned keeps the same shares of filters, scaled down to the budget but
    never up: as filters are counted as inputs, too, an episode of 10 % of the weights leaves about 1 % of the
    parameters. Of the episodes within the limit the one of the best accuracy on training images is taken, else the
    last one of all.
    See `rlprune.prune` for the arguments; 5,000 episodes of VGG11 are the 40,000 steps of the paper.

    Args:
        network: see `rlprune.prune`.
        example_input: see `rlprune.prune`.
        budgets: one, a share of the parameters.
        data: needed.
        episodes: networks evaluated; the schedule spans them.
        seed: of agent and fine-tuning.
        images: training images that give the reward, at most.
        progress: show a bar.
        options: those of `rlprune.peers.judged.judged`, for the network returned.
    """
    return _search(COARSE, False, network, example_input, budgets, data, episodes, seed, images, progress, options)


@learning
def paper_fine(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    episodes: int = 15_500,
    seed: int = 0,
    images: int = IMAGES,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """The fine-grained agent: a number per filter, which stays from 0.5 on.

    See `paper_coarse`; 15,500 episodes of VGG11 are the 124,000 steps of the paper. Of filters that must leave
    together, the first layer's decide. What `paper_coarse` says of the network returned holds here, too.
    """
    return _search(FINE, True, network, example_input, budgets, data, episodes, seed, images, progress, options)


class PublishedEnv(gymnasium.Env):
    """Walks all convolutions, one step each; reward and cost come with the last.

    Action: the share to prune, (1,), or a number per filter of the widest layer, of which a layer reads as many as
    it has filters. Observation: index of the layer, input and output channels, kernel, stride and padding (two
    numbers each), and with one action a layer the sum of the actions so far. Cost: the number of layers times the
    percentage of convolution weights kept, so that its mean over the steps is that percentage.

    Args:
        network: trained; untouched.
        data: its training split gives the reward.
        fine: decide filters.
        schedule: see `Schedule`.
        episodes: that the schedule spans.
        images: see `paper_coarse`.
        seed: of the fine-tuning batches and of dropout.

    Attributes:
        played: a dict per finished episode: reward, cost (percent of weights kept), actions per layer, seconds.
        layers: names of the convolutions in order of execution.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own form)

    def __init__(
        self, network: nn.Module, data: Dataset, fine: bool, schedule: Schedule, episodes: int, images: int, seed: int
    ) -> None:
        self.network, self.data, self.fine, self.schedule, self.episodes = network, data, fine, schedule, episodes
        if any(schedule.phases):
            changeable(network)
        self.split = data.train[slice(0, images)]
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.layers = _convolutions(network, data.example)
        modules = [network.get_submodule(name) for name in self.layers]
        self._described = [
            [i, m.in_channels, m.out_channels, *m.kernel_size, *m.stride, *_padding(m)] for i, m in enumerate(modules)
        ]
        self.sizes = [module.out_channels for module in modules]
        self._weights = [module.weight.detach() for module in modules]
        self.action_space = gymnasium.spaces.Box(0.0, 1.0, (max(self.sizes) if fine else 1,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (9 if fine else 10,), np.float32)
        self.played: list[dict[str, Any]] = []
        self._actions: list[np.ndarray] = []
        self._started = time.perf_counter()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start at the first layer."""
        super().reset(seed=seed)
        self._actions, self._started = [], time.perf_counter()
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Decide one layer."""
        done = min(1.0, len(self.played) / self.episodes)
        cap = self.schedule.cap + (1 - self.schedule.cap) * done
        size = self.sizes[len(self._actions)] if self.fine else 1
        self._actions.append(np.minimum(np.asarray(action, dtype=np.float64)[:size], cap))
        if len(self._actions) < len(self.layers):
            return self._observation(), 0.0, False, False, {"cost": 0.0}
        masks = [self._mask(i) for i in range(len(self.layers))]
        percent = 100 * sum(float(m.sum()) for m in masks) / sum(m.numel() for m in masks)
        steps = self.schedule.phases[min(int(done * len(self.schedule.phases)), len(self.schedule.phases) - 1)]
        reward = self._accuracy(masks, steps)
        seconds = time.perf_counter() - self._started
        self.played.append({"reward": reward, "cost": percent, "actions": self._actions, "seconds": seconds})
        return self._observation(), reward, True, False, {"cost": len(self.layers) * percent}

    def kept(self, actions: np.ndarray) -> float:
        """The share of a layer that its action keeps."""
        return float((actions >= 0.5).mean()) if self.fine else 1 - float(actions[0])

    def _mask(self, index: int) -> Tensor:
        """Which of a layer's weights stay, of the weight's shape."""
        weight, action = self._weights[index], self._actions[index]
        if self.fine:
            keep = torch.from_numpy(action >= 0.5).to(weight.device)
            return keep[:, None, None, None].expand_as(weight)
        order = weight.abs().flatten().argsort()
        mask = torch.ones_like(order, dtype=torch.bool)
        mask[order[: round(float(action[0]) * len(order))]] = False
        return mask.view(weight.shape)

    def _accuracy(self, masks: list[Tensor], steps: int) -> float:
        network = copy.deepcopy(self.network)
        weights = [network.get_submodule(name).weight for name in self.layers]

        def cut() -> None:
            with torch.no_grad():
                for weight, mask in zip(weights, masks, strict=True):
                    weight.mul_(mask)

        cut()
        if steps:
            network.train()
            optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
            batch_size = min(BATCH, len(self.data.train))
            epochs = (self.data.augmented(batch_size, self.generator, epoch) for epoch in itertools.count())
            with seeded(self.seed, self.data.device):
                for images, labels in itertools.islice(itertools.chain.from_iterable(epochs), steps):
                    loss = F.cross_entropy(training_logits(network, images).float(), labels)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    cut()
        return accuracy(network, self.data, self.split)

    def _observation(self) -> np.ndarray:
        index = min(len(self._actions), len(self.layers) - 1)
        total = [] if self.fine else [sum(float(action[0]) for action in self._actions)]
        return np.array(self._described[index] + total, dtype=np.float32)


def _search(
    schedule: Schedule,
    fine: bool,
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None,
    episodes: int,
    seed: int,
    images: int,
    progress: bool,
    options: dict[str, Any],
) -> PruningResult:
    start = time.perf_counter()
    whole_each(episodes=(episodes, 1), images=(images, 1))
    check_budgets(budgets)
    if len(budgets) != 1 or not budgets[0].is_named("parameters") or not budgets[0].relative:
        raise InputError("The published search takes one budget, a share of the parameters.")
    exclude = options.get("exclude", ())
    if isinstance(exclude, Iterable) and not isinstance(exclude, str | type):  # else `trace` names the fault
        exclude = [*exclude, *UNKNOWN]
    options = {**options, "exclude": exclude}
    candidates, evaluator = judged(network, example_input, budgets, data, seed, **options)
    if evaluator.data is None:
        raise InputError("The published search judges by accuracy on training images: give data.")
    env = PublishedEnv(network, evaluator.data, fine, schedule, episodes, images, seed)
    name, limit = budgets[0].name, 100 * budgets[0].limit
    total = episodes * len(env.layers)  # in updates of equal length, of about as many steps as the paper's
    options = PPOOptions(steps_per_update=-(-total // -(-total // PPOOptions.steps_per_update)))
    agent = LagrangianPPO(env, [len(env.layers) * limit], options=options, seed=seed)
    log = SearchLog(candidates, episodes, progress)
    multiplier = float(agent.multipliers[0])

    def after_update(agent: LagrangianPPO, _: dict[str, float]) -> bool:
        nonlocal multiplier
        for episode in env.played[len(log.rows) : episodes]:  # an update may play more than are asked for
            decision = _decision(candidates, env, episode)
            shares = [env.kept(action) for action in episode["actions"]]
            more, within = {f"lambda_{name}": multiplier}, episode["cost"] <= limit
            log.add(decision, shares, [episode["cost"]], episode["seconds"], within, more)
        multiplier = float(agent.multipliers[0])
        log.show()
        return len(log.rows) < episodes

    with log.bar:
        agent.learn(total, callback=after_update)
    seconds = time.perf_counter() - start
    last = _decision(candidates, env, env.played[episodes - 1])
    method = "paper_fine" if fine else "paper_coarse"
    return finish(candidates, log.best or [last], evaluator, log.rows, len(log.rows), seconds, method)


def _decision(candidates: Candidates, env: PublishedEnv, episode: dict[str, Any]) -> Decision:
    """The filters that an episode keeps, within budget."""
    of_layer = dict(zip(env.layers, episode["actions"], strict=True))
    actions = [of_layer[group.name] for group in candidates.groups]
    widths = candidates.fit(np.array([env.kept(action) for action in actions]), "shrink")
    scores = [_of_filters(*pair) for pair in zip(candidates.groups, actions, strict=True)] if env.fine else None
    return Decision(episode["reward"], widths, scores)


def _of_filters(group: FilterGroup, action: np.ndarray) -> Tensor:
    """A score per filter from one per channel of its layer, (channels,) → (size,): a filter may be several of them."""
    part = next(part for part in group.slices if part.module == group.name and part.axis == "out")
    total = np.bincount(part.source, weights=np.asarray(action, dtype=np.float64)[part.index], minlength=group.size)
    return torch.as_tensor(total / np.bincount(part.source, minlength=group.size), dtype=torch.float32)


def _convolutions(network: nn.Module, example: Tensor) -> list[str]:
    """Names in order of execution, each once."""
    called: dict[str, None] = {}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.setdefault(name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        with torch.no_grad(), evaluating(network):  # statistics of batch norm stay as they are
            network(example)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise InputError("The published search prunes convolutions, and this network has none.")
    return list(called)


def _padding(module: nn.Conv2d) -> tuple[int, int]:
    if isinstance(module.padding, str):
        return tuple((k - 1) // 2 if module.padding == "same" else 0 for k in module.kernel_size)
    return tuple(module.padding)
