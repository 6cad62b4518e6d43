"""From what a method decided to what it returns: built, measured again, and refused if it is over budget."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rlprune.candidates import Candidates, Decision
from rlprune.errors import InputError
from rlprune.evaluate import Evaluator
from rlprune.masking import memory_format, rebuild
from rlprune.networks import architecture_of
from rlprune.result import PruningResult

TRIES = 20  # ever smaller networks measured where a noisy cost refuses those that the search found


def finish(
    candidates: Candidates,
    ranked: Sequence[Decision],
    evaluator: Evaluator,
    history: list[dict[str, Any]],
    evaluations: int,
    seconds: float,
    method: str,
) -> PruningResult:
    """Build the best decision that meets every budget when measured again, on the very network returned.

    It lies in memory as the unpruned one, in which format the search has measured: it computes the same either way, but
    not as fast, nor with as much memory.

    Args:
        candidates: of the unpruned network.
        ranked: what was decided on, the best first. A noisy cost may refuse them all: then the
            best one is made smaller until it is accepted.
        evaluator: makes the network of given masks, and knows its reward.
        history: a row per candidate tried.
        evaluations: candidates evaluated, for the record.
        seconds: wall time, for the record.
        method: its name, for the record.

    Raises:
        InputError: even the smallest networks are over budget when measured again.
    """
    best = ranked[0]
    shares = np.array(best.widths) / candidates.sizes
    smaller = [candidates.widths(shares * 0.93**step) for step in range(1, TRIES + 1)] + [candidates.anchor]
    for decision in itertools.chain(ranked, (replace(best, widths=widths) for widths in smaller)):
        masks = candidates.masks(decision.widths, decision.scores)
        network = evaluator.candidate(masks).to(memory_format=memory_format(candidates.network))
        costs = candidates.measured(network)
        if all(cost["value"] <= cost["limit"] for cost in costs.values()):
            break
    else:
        name, cost = next((name, cost) for name, cost in costs.items() if cost["value"] > cost["limit"])
        raise InputError(
            f"No network that was found costs at most {cost['limit']:g} {name} when measured again (the last one "
            f"{cost['low']:g} to {cost['high']:g}): the cost is noisy, or depends on the values of weights; widen the "
            "budget or steady the measurement."
        )
    how = {"history": history, "evaluations": evaluations, "seconds": seconds, "method": method}
    return record(candidates, network, masks, costs, evaluator(masks), **how)


def record(
    candidates: Candidates,
    network: nn.Module,
    masks: list[Tensor],
    costs: dict[str, dict[str, Any]],
    reward: float,
    history: list[dict[str, Any]],
    evaluations: int,
    seconds: float,
    method: str,
) -> PruningResult:
    """A finished network with all that is said of it; see `finish` and `rlprune.result.PruningResult`."""
    widths = {group.name: (int(mask.sum()), group.size) for group, mask in zip(candidates.groups, masks, strict=True)}
    return PruningResult(
        network=network,
        masks=masks,
        costs=costs,
        history=pd.DataFrame(history),
        widths=widths,
        reward=reward,
        evaluations=evaluations,
        seconds=seconds,
        method=method,
        input_shape=tuple(candidates.example_input.shape[1:]),
        architecture=architecture_of(candidates.network),
    )


def single(
    candidates: Candidates,
    evaluator: Evaluator,
    widths: list[int],
    start: float,
    method: str,
    scores: list[Tensor] | None = None,
) -> PruningResult:
    """The result of a method that began at ``start`` and evaluates only what it decided at once; see `Decision`."""
    masks = candidates.masks(widths, scores)
    reward = evaluator(masks)
    share = float((torch.tensor(widths) / torch.as_tensor(candidates.sizes)).mean())
    seconds = time.perf_counter() - start
    row = {"episode": 1, "steps": len(widths), "reward": reward, "mean_action": share, "best": reward}
    row |= candidates.percent(widths) | {"seconds": seconds}
    return finish(candidates, [Decision(reward, widths, scores)], evaluator, [row], 1, seconds, method)


def delivered(
    candidates: Candidates,
    evaluator: Evaluator,
    network: nn.Module,
    masks: list[Tensor],
    history: list[dict[str, Any]],
    seconds: float,
    method: str,
) -> PruningResult:
    """The result of a method that trains while it prunes: the slim network as it stands, measured and judged.

    Args:
        candidates: of the unpruned network.
        evaluator: judges it as it is.
        network: slim, trained; its batch norm as `Evaluator.recalibrate` leaves it.
        masks: which filters of the unpruned network are left in it, one per group.
        history: a row per step or epoch of the method.
        seconds: wall time, for the record.
        method: its name, for the record.

    Raises:
        InputError: the network is over budget.
    """
    network.eval().to(memory_format=memory_format(candidates.network))
    for name, parameter in candidates.network.named_parameters():  # frozen is again what was
        network.get_parameter(name).requires_grad_(parameter.requires_grad)
    costs = candidates.measured(network)
    for name, cost in costs.items():
        if cost["value"] > cost["limit"]:
            raise InputError(
                f"The network of {method} costs {cost['value']:g} {name}, over the limit of {cost['limit']:g}: "
                "the cost is noisy; widen the budget or steady the measurement."
            )
    reward = evaluator.judge(rebuild(network, {}))  # what a function of the caller's own does to it must not stay
    return record(candidates, network, masks, costs, reward, history, 1, seconds, method)
