"""Agent × environment → the best decision within budget; resumable."""

import copy
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from rlprune.agent import LagrangianPPO, PPOOptions
from rlprune.costs import Budget, check_budgets
from rlprune.data import Dataset
from rlprune.delivery import finish
from rlprune.env import PruningEnv
from rlprune.errors import InputError, named, one_of, whole_each
from rlprune.evaluate import Evaluator, options_of
from rlprune.files import place_of, read_checkpoint, save_tensors, weights_hash
from rlprune.forward import evaluating, learning
from rlprune.gates import criterion_of, start_of
from rlprune.groups import trace
from rlprune.imagination import RewardModel
from rlprune.importance import FEATURES
from rlprune.log import SearchLog
from rlprune.masking import memory_format
from rlprune.own import OwnData, dataset_of
from rlprune.result import PruningResult
from rlprune.training import Training, fit, trainable

EPISODES_PER_UPDATE = 10
SHOWN = 5  # layers that are left alone, of which the reason is printed


@learning
def prune(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    episodes: int = 200,
    action: str = "layerwise",
    seed: int = 0,
    evaluate: Callable[[nn.Module], float] | None = None,
    criterion: str = "magnitude",
    fit_budget: str | None = None,
    start: str | None = None,
    minimum: int = 1,
    multiple: int = 1,
    exclude: Sequence[str | type[nn.Module]] = (),
    evaluation: dict[str, Any] | None = None,
    agent: dict[str, Any] | None = None,
    imagined: int = 100,
    begin: PruningResult | None = None,
    finetune: Training | dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    watch: Callable[[pd.DataFrame, dict[str, float]], None] | None = None,
) -> PruningResult:
    """Search for the best pruned network within budget by constrained reinforcement learning.

    Args:
        network: trained; untouched.
        example_input: (N, C, H, W), on the network's device; a latency is that of all N.
        budgets: all of them are met by what is returned, measured on it.
        data: whatever `rlprune.own.dataset_of` takes. Its training split recovers pruned networks,
            its validation split gives the reward; a test split is not touched.
        episodes: pruned networks that the agent decides on, rounded up to whole updates of `EPISODES_PER_UPDATE`.
        action: see `rlprune.env.ACTIONS`.
        seed: of the agent, and of the division of data of one's own.
        evaluate: slim network → number to be maximised, in place of the accuracy on validation images. Without data,
            pruned networks are judged unrecovered. What it does to the network, such as training, is lost.
        criterion: which filters of a group stay, see `rlprune.importance.scores`; "gates" learns it first
            (`rlprune.gates`), in the time of some hundred evaluations.
        fit_budget: how a decision is brought within budget, see `Candidates.fit`; None for "scale" where costs follow
            from the widths, and "shrink", which measures less often, where they do not.
        start: widths that the search starts from, uniform ones or those of one "ranking" of all filters by the
            criterion, see `PruningEnv`; None for "ranking" with gates, whose values compare across groups, else
            "uniform".
        minimum: filters that every group keeps at least.
        multiple: what is kept of a group is a multiple of this, or all of it: for vector units and tensor cores.
        exclude: layers, by name or type, whose filters stay, see `rlprune.trace`.
        evaluation: options of `rlprune.evaluate.Evaluator`.
        agent: options of `rlprune.agent.PPOOptions`, over this function's own defaults.
        imagined: episodes that the agent plays on a model of the reward after every update, see
            `rlprune.imagination`; 0 for none, and none under budgets that must be measured.
        begin: a result of another search, of the same action space, ``start`` and number of budgets, on any network:
            the agent begins with what it learned there, model of the reward included.
        finetune: a schedule to train the pruned network with, or some of its values by name; None leaves it recovered
            without training. What is said of the reward stays that of before. Where training diverges, or brings the
            network over a budget whose cost depends on the values of weights, it is returned as it was before, with a
            warning.
        checkpoint: a file written after every update of the agent. If it is there,
            the search goes on from it and ends as if never stopped; it is left in place. It knows what it was made with
            but for the code of functions, such as ``evaluate``, which must be the same.
        progress: print the budgets' table and show a bar: the best reward, and means of the last ten episodes, the
            costs as the agent asked for them, before the decision is scaled onto the budget.
        watch: called after every update with the history so far and the budgets in percent of the unpruned network's
            cost, by name; `rlprune.figures.Live` draws them while the search runs.

    Raises:
        InputError: bad options; or budgets that cannot be met, before any search.
    """
    check_budgets(budgets)
    whole_each(episodes=(episodes, 1), imagined=(imagined, 0), seed=(seed, 0))
    finetune = Training.of(finetune) if isinstance(finetune, dict) else finetune
    if not isinstance(finetune, Training | None):
        raise InputError(f"finetune must be a Training, or a dict of its values, not {finetune!r}.")
    if watch is not None and not callable(watch):
        raise InputError(f"watch must be a function (history, limits), such as figures.Live(), not {watch!r}.")
    if data is None and finetune is not None:
        raise InputError("Fine-tuning needs data: give data, or leave finetune out.")
    began = time.perf_counter()
    start = start_of(start, criterion)
    if fit_budget is None:
        fit_budget = "scale" if all(budget.predicted for budget in budgets) else "shrink"
    agent_options(agent)
    if begin is not None:
        if not isinstance(begin, PruningResult):
            raise InputError(
                f"begin must be a result of prune(), not {type(begin).__name__}: rlprune.load() reads one."
            )
        if begin.agent is None:
            raise InputError(f"There is no agent in a result of method {begin.method!r}: begin with prune()'s.")
        if (before := begin.agent.get("start", start)) != start:
            raise InputError(
                f"The agent learned to decide relative to {before!r} widths, and this search starts from {start!r} "
                f"ones: give start={before!r}."
            )
    groups = trace(network, example_input, exclude)
    images = dataset_of(data, example_input, seed) if data is not None else None
    if finetune is not None:
        trainable(network, images, finetune)
    evaluator = Evaluator(network, groups, images, evaluate, **options_of(evaluation))
    env = PruningEnv(
        network,
        example_input,
        budgets,
        evaluator,
        action,
        groups=groups,
        criterion=criterion_of(criterion, evaluator.data, seed),
        sample=evaluator.sample,
        fit=fit_budget,
        minimum=minimum,
        multiple=multiple,
        start=start,
    )
    if env.candidates.feasible(env.candidates.sizes.tolist()):
        warnings.warn(
            "The unpruned network is within every budget already: there is nothing to prune it for. Lower a limit.",
            stacklevel=3,
        )
    options = options_for(env, episodes, criterion, agent or {}, begun=begin is not None)
    rest = [_learned(begin), episodes, seed, criterion, fit_budget, start, minimum, multiple]
    rest += [action, evaluation, imagined, [group.name for group in groups], evaluate is not None]
    rest += [list(example_input.shape)]
    run = _fingerprint(env, images, identity_of(options, agent or {}), rest)
    path = place_of(checkpoint)
    state = read_checkpoint(path, run) if path is not None and path.exists() else None
    if state is not None:
        env.restore(state["env"])
    if progress:
        print(env.candidates.table.to_string(index=False, float_format="{:,.6g}".format))
        for name, reason in groups.skipped[:SHOWN]:
            print(f"left alone: {name} ({reason})")
        if len(groups.skipped) > SHOWN:
            print(f"left alone: {len(groups.skipped) - SHOWN} more, see rlprune.trace(…).skipped")
    ppo = LagrangianPPO(env, env.limits.tolist(), seed=seed, options=options)
    if begin is not None:
        ppo.adopt(begin.agent)
    known = begin.agent.get("model") if begin is not None else None
    log, model = _Log(env, episodes, progress), RewardModel(len(groups), known)
    practises = bool(imagined) and env.candidates.predicted
    if state is not None:
        ppo.load_state_dict(state["agent"])
        log.restore(state)
        model.restore(state["model"])
        began -= state["seconds"]
    with log.bar:
        log.take(model)
        if practises and model.ready and not log.rows:
            imagine(ppo, env, model, imagined)
        while len(log.rows) < episodes:
            log.multipliers = ppo.multipliers.tolist()
            ppo.learn(1)  # a whole update
            log.take(model)
            if watch is not None:
                watch(pd.DataFrame(log.rows), dict(zip(log.names, env.limits.tolist(), strict=True)))
            if practises and model.ready and len(log.rows) < episodes:
                imagine(ppo, env, model, imagined)
            if path is not None:
                state = {"run": run, "agent": ppo.state_dict(), **log.state(), "model": model.state()}
                state |= {"env": env.state(), "seconds": time.perf_counter() - began}
                save_tensors(state, path)
    if not log.best:
        raise InputError(
            f"None of {len(log.rows)} networks met the budget: use fit_budget='shrink', or search for longer."
        )
    seconds = time.perf_counter() - began
    result = finish(env.candidates, log.best, evaluator, log.rows, len(log.rows), seconds, action)
    result.agent = {**ppo.state_dict(), "history": [], "start": start, "model": model.state()}
    if finetune is not None:
        _finetuned(result, network, images, finetune, seed, env, progress)
    return result


def _finetuned(
    result: PruningResult,
    network: nn.Module,
    images: Dataset,
    finetune: Training,
    seed: int,
    env: PruningEnv,
    progress: bool,
) -> None:
    """Train the result's network in place, and measure it again."""
    before = copy.deepcopy(result.network.state_dict())
    fault = ""
    try:
        with evaluating(network):
            fit(result.network, images, finetune, seed, teacher=network, progress="fine-tune" if progress else None)
    except InputError as error:  # it has diverged; the rest was looked at before the search
        fault = str(error)
    result.network.to(memory_format=memory_format(network)).eval()  # as before; training has another format
    # what varies from one measurement to the next depends on the widths, which are the same
    steady = [name for name, cost in result.costs.items() if cost["low"] == cost["high"]]
    measured = env.candidates.measured(result.network) if not fault else {}
    costs = {name: cost for name, cost in measured.items() if name in steady}
    over = [name for name, cost in costs.items() if cost["value"] > cost["limit"]]
    if over:
        values = [cost[over[0]]["value"] for cost in (result.costs, costs)]
        fault = f"Fine-tuning took {over[0]} from {values[0]:g} to {values[1]:g}, over its limit of "
        fault += f"{costs[over[0]]['limit']:g}."
    if fault:
        result.network.load_state_dict(before)
        warnings.warn(f"{fault} What is returned is the network before fine-tuning.", stacklevel=3)
    else:
        result.costs |= costs


def imagine(ppo: LagrangianPPO, env: PruningEnv, model: RewardModel, episodes: int) -> None:
    """Let the agent play on the model of the reward."""
    model.fit()
    env.imagined = model
    try:
        ppo.learn(episodes * len(env.groups))
    finally:
        env.imagined = None


def options_for(
    env: PruningEnv, episodes: int, criterion: str, given: dict[str, Any], begun: bool = False
) -> PPOOptions:
    """The agent's options: short episodes and few of them want larger steps than the paper's."""
    shares = [width / size for width, size in zip(env.candidates.uniform(), env.candidates.sizes, strict=True)]
    # filter-wise it begins with the criterion alone: what is more and what is less is to be learned
    filterwise = env.action_space.shape[0] > 1
    names = [*FEATURES, criterion][: env.action_space.shape[0] - 1] if filterwise else []
    own = {
        "steps_per_update": min(EPISODES_PER_UPDATE, episodes) * len(env.groups),
        "learning_rate": 5e-3,
        "minibatch": 128,
        "gamma": 1.0,
        "initial_log_std": -1.8,
        "initial_action": [sum(shares) / len(shares), *(0.75 if name == criterion else 0.5 for name in names)],
        "multiplier": "pid",
    }
    # near something good large steps would only lead away: what was learned elsewhere, or what the criterion decides
    if begun or env.relative:
        own["initial_log_std"] = -2.5 if filterwise else -2.2
    if begun and not filterwise:
        own["learning_rate"] = 2e-3
    if env.relative:
        own |= {
            "learning_rate": 3e-4 if filterwise else 1e-3,
            "initial_action": [0.5, *(0.9 if name == criterion else 0.5 for name in names)],
        }
    return agent_options(given, **own)


def agent_options(given: dict[str, Any] | None, **own: Any) -> PPOOptions:
    """The agent's options: what is given for it, over ``own``.

    Raises:
        InputError: an unknown or senseless option.
    """
    for name in named(given, "agent"):
        one_of("option of the agent", name, PPOOptions.__dataclass_fields__)
    options = PPOOptions(**{"whole_episodes": True, **own, **(given or {})})
    if not options.whole_episodes:
        raise InputError("A search decides whole networks, from which alone it can go on: leave whole_episodes True.")
    return options


def identity_of(options: PPOOptions, given: dict[str, Any]) -> dict[str, Any]:
    """The options by which a checkpoint knows its agent: an initial action only if it was given.

    The one that `options_for` takes in its place may follow from measurements, which no two processes share.
    """
    return {**asdict(options), "initial_action": given.get("initial_action")}


class _Log(SearchLog):
    """The episodes of an environment, with the λ under which they were played."""

    def __init__(self, env: PruningEnv, episodes: int, progress: bool) -> None:
        super().__init__(env.candidates, episodes, progress)
        self.env = env
        self.taken = 0  # of env.episodes
        self.multipliers: list[float] = []  # λ under which the next episodes are played, to be set before them

    def take(self, model: RewardModel) -> None:
        """Add the episodes that have ended since the last call, and tell the model of them."""
        for episode in self.env.episodes[self.taken :]:
            prices = {f"lambda_{name}": x for name, x in zip(self.names, self.multipliers, strict=True)}
            shares, asked, seconds = episode["shares"], episode["asked"], episode["seconds"]
            self.add(episode["decision"], shares, asked, seconds, episode["feasible"], prices)
            model.add(episode["summary"], episode["decision"].reward)
        self.taken = len(self.env.episodes)
        prices = zip(self.names, self.multipliers, strict=False)
        self.show(**{f"λ {name}": f"{price:.3f}" for name, price in prices})


def _learned(begin: PruningResult | None) -> dict[str, Any] | None:
    """The policy that a search begins with, exactly."""
    if begin is None:
        return None
    return {name: tensor.tolist() for name, tensor in begin.agent.get("policy", {}).items()}


def _fingerprint(env: PruningEnv, data: Dataset | None, options: dict[str, Any], rest: list[Any]) -> str:
    """Tells one search from another by what it was given, nothing measured; a checkpoint carries it."""
    budgets = [[budget.name, float(budget.limit), budget.relative] for budget in env.candidates.budgets]
    what = [
        weights_hash(env.candidates.network),
        budgets,
        data.identity() if data is not None else None,
        options,
        rest,
    ]
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()
