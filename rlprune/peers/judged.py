"""What every method is given: candidates within budget, and their judge."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rlprune.candidates import Candidates
from rlprune.costs import Budget, check_budgets
from rlprune.errors import one_of, whole
from rlprune.evaluate import Evaluator, options_of
from rlprune.gates import criterion_of
from rlprune.groups import trace
from rlprune.own import OwnData, dataset_of


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
    progress: bool = True,
    **others: Any,
) -> tuple[Candidates, Evaluator]:
    """Candidates and evaluator, the same for every method; see `rlprune.prune` for the arguments.

    A method that decides at once has no ``progress`` to show, and takes it as all others do.

    Raises:
        InputError: an argument that the method does not take.
    """
    for name in others:
        one_of("option of this method", name, list(inspect.signature(judged).parameters)[5:-1])
    check_budgets(budgets)
    whole(seed, "seed")
    groups = trace(network, example_input, exclude)
    images = dataset_of(data, example_input, seed) if data is not None else None
    evaluator = Evaluator(network, groups, images, evaluate, **options_of(evaluation))
    chosen = criterion_of(criterion, evaluator.data, seed)
    sample = evaluator.sample
    return Candidates(network, groups, example_input, budgets, chosen, sample, minimum, multiple), evaluator


def without_criterion(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `judged` for a method that ranks filters by itself.

    The criterion that an experiment gives to all its methods has no say there, and must not refuse a network either.
    """
    return {key: value for key, value in options.items() if key != "criterion"}
