"""What every method is given, candidates within budget and their judge, and what one that trains hands back."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rlprune.candidates import Candidates, record
from rlprune.costs import Budget
from rlprune.errors import InputError
from rlprune.evaluate import Evaluator
from rlprune.groups import trace
from rlprune.own import OwnData, dataset_of
from rlprune.result import PruningResult


def judged(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    seed: int = 0,
    evaluate: Callable[[nn.Module], float] | None = None,
    criterion: str = "magnitude",
    minimum: int = 1,
    multiple: int = 1,
    exclude: Sequence[str | type[nn.Module]] = (),
    evaluation: dict[str, Any] | None = None,
) -> tuple[Candidates, Evaluator]:
    """Candidates and evaluator, the same for every method; see `rlprune.prune` for the arguments."""
    groups = trace(network, example_input, exclude)
    images = dataset_of(data, example_input, seed) if data is not None else None
    evaluator = Evaluator(network, groups, images, evaluate, **(evaluation or {}))
    sample = evaluator.sample
    return Candidates(network, groups, example_input, budgets, criterion, sample, minimum, multiple), evaluator


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
        evaluator: judges it, without recovery.
        network: slim, trained.
        masks: which filters of the unpruned network are left in it, one per group.
        history: a row per step or epoch of the method.
        seconds: wall time, for the record.
        method: its name, for the record.

    Raises:
        InputError: the network is over budget.
    """
    costs = candidates.measured(network.eval())
    for name, cost in costs.items():
        if cost["value"] > cost["limit"]:
            raise InputError(
                f"The network of {method} costs {cost['value']:g} {name}, over the limit of {cost['limit']:g}: "
                "the cost is noisy; widen the budget or steady the measurement."
            )
    reward = evaluator.judge(network)
    return record(candidates, network, masks, costs, reward, history, 1, seconds, method)
