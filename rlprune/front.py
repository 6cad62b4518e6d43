"""One search for every budget: the Pareto front of reward against one cost.

The budget is drawn anew for every episode and is part of what the agent sees, so that one policy serves all of
them; λ has a value for each of a few bands of budgets. Whatever a network costs, its evaluation tells the model of
the reward (`rlprune.imagination`) something about all the others.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from rlprune.agent import LagrangianPPO
from rlprune.candidates import Decision
from rlprune.costs import Budget, Cost
from rlprune.delivery import finish
from rlprune.env import PruningEnv
from rlprune.errors import InputError, one_of, whole_each
from rlprune.evaluate import Evaluator, options_of
from rlprune.files import place_of, read_checkpoint, save_tensors, weights_hash, write_atomically
from rlprune.forward import learning
from rlprune.groups import trace
from rlprune.imagination import RewardModel
from rlprune.importance import CRITERIA
from rlprune.log import KEPT, SearchLog, distinct
from rlprune.own import OwnData, dataset_of
from rlprune.result import PruningResult
from rlprune.search import identity_of, imagine, options_for

BANDS = 4  # of budgets, each with a λ of its own
LOOKS = 4  # evaluations that each point gets once the agent has learned
POINTS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


@dataclass
class Front:
    """What `pareto` returns.

    Attributes:
        results: budget, a share of the unpruned network's cost → the best network within it.
        history: a row per candidate tried, with its budget in percent.
    """

    results: dict[float, PruningResult]
    history: pd.DataFrame

    @property
    def table(self) -> pd.DataFrame:
        """Per budget: budget and cost (both in percent of the unpruned network's), reward."""
        rows = [(100 * share, *_point(result)) for share, result in self.results.items()]
        return pd.DataFrame(rows, columns=["budget", "cost", "reward"])

    def save(self, folder: str | Path) -> Path:
        """Write every result to a folder named by its budget, and ``history.csv``; see `PruningResult.save`."""
        folder = Path(folder)
        for share, result in self.results.items():
            result.save(folder / repr(float(share)))  # all of its digits: another budget is another folder
        write_atomically(folder / "history.csv", lambda path: self.history.to_csv(path, index=False))
        return folder


class FrontEnv(PruningEnv):
    """`PruningEnv` under a budget that changes from episode to episode.

    The last number of an observation is the logarithm (base 10) of the budget's share. ``info["cost"]`` has an
    entry per band of budgets: in that of the episode's budget what was asked for beyond it, in percentage points
    of the unpruned network's cost, elsewhere 0; hence the limits of the agent are 0.

    Budgets follow van der Corput's sequence on a logarithmic scale, which needs no random numbers, so that a
    search that was stopped goes on with the budgets that it would have had.

    Args:
        cost: in place of the budgets; what is not named here is as in `PruningEnv`.
        low: the smallest share of the unpruned network's cost.
        high: the largest.

    Attributes:
        drawn: episodes finished, imagined ones among them.
        share: the episode's budget.
    """

    def __init__(
        self,
        network: nn.Module,
        example_input: Tensor,
        cost: Cost | str,
        low: float,
        high: float,
        reward: Callable[[list[Tensor]], float],
        **options: Any,
    ) -> None:
        if not 0 < low < high <= 1:
            raise InputError(f"Budgets must go from a share above 0 to a larger one of at most 1, not {low} to {high}.")
        self.low, self.high, self.drawn, self.share = low, high, 0, low
        super().__init__(network, example_input, [Budget(cost, low)], reward, fit="scale", **options)

    def demand(self, share: float) -> None:
        """Set the budget."""
        self.share = share
        self.limits = np.array([100 * share])
        self.candidates.limits = share * self.candidates.unpruned

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw the next budget, or take ``options["share"]``, and start at the first group."""
        place = _van_der_corput(self.drawn)
        self.demand((options or {}).get("share", self.low * (self.high / self.low) ** place))
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Decide one group."""
        observation, reward, over, cut, info = super().step(action)
        cost = np.zeros(BANDS)
        if over:
            self.drawn += 1
            cost[self._band()] = info["cost"][0] - 100 * self.share
        return observation, reward, over, cut, {"cost": cost}

    def _finish(self) -> tuple[float, np.ndarray]:
        outcome = super()._finish()
        if self.imagined is None:
            self.episodes[-1]["share"] = self.share
        return outcome

    def _band(self) -> int:
        place = math.log(self.share / self.low) / math.log(self.high / self.low)
        return min(max(int(BANDS * place), 0), BANDS - 1)  # also where ``reset`` was told a budget outside

    def _observation(self) -> np.ndarray:
        observation = super()._observation()
        observation[-1] = math.log10(self.share)
        return observation


@learning
def pareto(
    network: nn.Module,
    example_input: Tensor,
    cost: Cost | str = "parameters",
    data: OwnData | None = None,
    episodes: int = 800,
    points: Sequence[float] = POINTS,
    action: str = "layerwise",
    seed: int = 0,
    evaluate: Callable[[nn.Module], float] | None = None,
    criterion: str = "magnitude",
    minimum: int = 1,
    multiple: int = 1,
    exclude: Sequence[str | type[nn.Module]] = (),
    evaluation: dict[str, Any] | None = None,
    agent: dict[str, Any] | None = None,
    imagined: int = 100,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Front:
    """Search once for the best pruned networks under every budget between the smallest and the largest of ``points``.

    ``points`` are the budgets to return a network for, shares of the unpruned network's ``cost``. After ``episodes``
    evaluations while it learns (rounded up to whole updates) the agent spends `LOOKS` more on each point, see
    `proposals`. See `rlprune.prune` for the other arguments.

    Raises:
        InputError: bad options, or a smallest budget that cannot be met.
    """
    whole_each(episodes=(episodes, 1), imagined=(imagined, 0), seed=(seed, 0))
    if not isinstance(points, Iterable):
        raise InputError(f"points must be several shares, such as [0.1, 0.2], not {points!r}.")
    points = sorted(set(points))
    if len(points) < 2:
        raise InputError(f"A front needs at least 2 different points, not {len(points)}.")
    one_of("criterion of a search for every budget", criterion, CRITERIA)  # gates are learned for one
    budgets = [Budget(cost, share) for share in points]  # says what is wrong with one
    start = time.perf_counter()
    groups = trace(network, example_input, exclude)
    images = dataset_of(data, example_input, seed) if data is not None else None
    evaluator = Evaluator(network, groups, images, evaluate, **options_of(evaluation))
    rest = {"criterion": criterion, "sample": evaluator.sample, "minimum": minimum, "multiple": multiple}
    low, high = points[0], points[-1]
    env = FrontEnv(network, example_input, cost, low, high, evaluator, action=action, groups=groups, **rest)
    options = options_for(env, episodes, criterion, agent or {})
    ppo = LagrangianPPO(env, [0.0] * BANDS, seed=seed, options=options)
    log, model = SearchLog(env.candidates, episodes + LOOKS * len(points), progress), RewardModel(len(groups))
    found: list[Decision] = []
    practises = bool(imagined) and env.candidates.predicted
    what = [weights_hash(network), budgets[0].name, points, episodes, action, seed, criterion, minimum, multiple]
    what += [evaluation, imagined, identity_of(options, agent or {}), [group.name for group in groups]]
    what += [list(example_input.shape), evaluate is not None]
    run = str([*what, *(images.identity() if images is not None else [])])
    path = place_of(checkpoint)
    if path is not None and path.exists():
        state = read_checkpoint(path, run)
        env.restore(state["env"])
        ppo.load_state_dict(state["agent"])
        log.restore(state)
        model.restore(state["model"])
        found, env.drawn = [Decision(**decision) for decision in state["found"]], state["drawn"]
        start -= state["seconds"]

    def take() -> None:
        for episode in env.episodes:
            decision, share = episode["decision"], episode["share"]
            found.append(decision)
            model.add(episode["summary"], decision.reward)
            log.add(decision, episode["shares"], episode["asked"], episode["seconds"], more={"budget": 100 * share})
        env.episodes.clear()
        log.show()

    with log.bar:
        while len(log.rows) < episodes:
            ppo.learn(1)  # a whole update
            take()
            if practises and model.ready:
                imagine(ppo, env, model, imagined)
            if path is not None:
                state = {"run": run, "agent": ppo.state_dict(), **log.state(), "model": model.state()}
                state |= {"found": [vars(decision) for decision in found], "drawn": env.drawn, "env": env.state()}
                state["seconds"] = time.perf_counter() - start
                save_tensors(state, path)
        for share in points:
            for actions in proposals(env, ppo, model if practises else None, share):
                env.reset(options={"share": share})
                for action in actions:
                    env.step(action)
                take()
    seconds = time.perf_counter() - start
    results = {}
    for share in points:
        env.demand(share)
        within = [decision for decision in found if env.candidates.feasible(decision.widths)]
        best = distinct(sorted(within, key=lambda decision: -decision.reward))[:KEPT]
        results[share] = finish(env.candidates, best, evaluator, log.rows, len(log.rows), seconds, "front")
    return Front(results, pd.DataFrame(log.rows))


def proposals(env: FrontEnv, ppo: LagrangianPPO, model: RewardModel | None, share: float) -> list[np.ndarray]:
    """What to evaluate for a budget: what the agent decides there, then what promises most.

    With a model of the reward that is, of all decisions evaluated under whatever budget and brought onto this one,
    those of which the model expects most; without one, samples of what the agent might decide.

    Returns:
        `LOOKS` decisions at most, the actions of an episode each, (groups, actions).
    """
    first = _decided(env, ppo, share, deterministic=True)
    if model is None:
        return [first, *(_decided(env, ppo, share, deterministic=False) for _ in range(LOOKS - 1))]
    model.fit()
    count, sizes = len(env.groups), env.candidates.sizes
    expected: dict[bytes, tuple[float, np.ndarray]] = {}
    for summary in np.array(model.summaries):
        shares, weights = np.exp(summary[:count]), summary[count:]
        widths = np.array(env.candidates.fit(shares, "scale"))
        onto = np.concatenate([np.log(widths / sizes), weights])
        if onto.tolist() not in model.summaries:  # what is known already is not looked at again
            actions = np.column_stack([widths / sizes, (1 + weights.reshape(count, -1)) / 2])
            expected[onto.tobytes()] = model(onto), actions
    best = sorted(expected.values(), key=lambda known: -known[0])
    return [first, *(actions for _, actions in best[: LOOKS - 1])]


def _decided(env: FrontEnv, ppo: LagrangianPPO, share: float, deterministic: bool) -> np.ndarray:
    """The agent's actions in an episode under this budget, (groups, actions), which is not evaluated."""
    env.imagined = lambda summary: 0.0
    try:
        (observation, _), actions, over = env.reset(options={"share": share}), [], False
        while not over:
            actions.append(ppo.predict(observation, deterministic)[0])
            observation, _, over, _, _ = env.step(actions[-1])
    finally:
        env.imagined = None
    return np.array(actions)


def _point(result: PruningResult) -> tuple[float, float]:
    cost = next(iter(result.costs.values()))
    return 100 * cost["share"], result.reward


def _van_der_corput(number: int) -> float:
    """The fraction in [0, 1) whose binary digits are the number's, mirrored at the point."""
    value, unit = 0.0, 0.5
    while number:
        value += unit * (number & 1)
        number, unit = number >> 1, unit / 2
    return value
