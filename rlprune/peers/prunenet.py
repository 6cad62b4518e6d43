"""PruneNet (Khetan & Karnin 2020, arXiv 2005.11282): gates on a frozen network find the width of every group.

Gates on all filters are learned on a small sample (`rlprune.gates`, which says what was filled in); then one ranking of
all of them says which filters stay, hence how many in each group.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from rlprune.candidates import Decision
from rlprune.costs import Budget
from rlprune.delivery import finish
from rlprune.errors import InputError, whole_each
from rlprune.forward import learning
from rlprune.gates import BATCH, IMAGES, RATE, ROUNDS, STEPS, Gates
from rlprune.own import OwnData
from rlprune.peers.judged import judged, without_criterion
from rlprune.result import PruningResult


@learning
def prunenet(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    batch_size: int = BATCH,
    images: int = IMAGES,
    learning_rate: float = RATE,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """Rank all filters by gates learned on the frozen network, and keep the best within budget.

    Args:
        network: see `rlprune.prune`.
        example_input: see `rlprune.prune`.
        budgets: see `rlprune.prune`; of any kind.
        data: needed.
        rounds: steps of sparsity; before each but the first λ is set anew.
        steps: of gradient descent (Adam) in each.
        batch_size: images a step; fewer where they are large, see `rlprune.forward.suitable_batch`.
        images: of the training split to learn from, at most; not augmented.
        learning_rate: of the logits of the gates.
        seed: of the order of the images and of the noise.
        progress: show a bar.
        options: those of `rlprune.peers.judged.judged`; the criterion has no say.

    Returns:
        its history has a row per round: round, loss (mean divergence), penalty (λ), gate (the mean one), a column per
        budget (expected widths, in percent of the unpruned network's cost), seconds; and a last row for the
        network itself, with reward.

    Raises:
        InputError: no data, a schedule of nothing, or too few images.
    """
    begin = time.perf_counter()
    if data is None:
        raise InputError("PruneNet learns its gates from images: give data.")
    whole_each(rounds=(rounds, 1), steps=(steps, 1), batch_size=(batch_size, 2), images=(images, 2))
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate must be a finite number above 0, not {learning_rate}.")
    candidates, evaluator = judged(network, example_input, budgets, data, seed, **without_criterion(options))
    gates = Gates(candidates, evaluator.data, images, batch_size, learning_rate, seed)
    history = []
    with tqdm(total=rounds, desc="gates", mininterval=1, disable=not progress) as bar:
        for number in range(1, rounds + 1):
            history.append({"round": number, **gates.round(steps, number / rounds)})
            bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", gate=f"{history[-1]['gate']:.2f}")
            bar.update()
    start = time.perf_counter()
    scores = gates.scores()
    widths = candidates.thresholded(scores)
    reward = evaluator(candidates.masks(widths, scores))
    row = {"episode": 1, "steps": len(widths), "reward": reward, "best": reward}
    row |= candidates.percent(widths) | {"mean_action": float(np.mean(np.array(widths) / candidates.sizes))}
    history.append(row | {"seconds": time.perf_counter() - start})
    seconds = time.perf_counter() - begin
    return finish(candidates, [Decision(reward, widths, scores)], evaluator, history, 1, seconds, "prunenet")
