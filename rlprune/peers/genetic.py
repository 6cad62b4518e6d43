"""Genetic channel pruning (Hu, Sun, Li, Wang, Gu 2018, arXiv 1805.11394): evolution chooses which filters go.

Layer by layer, the least sensitive first, keep masks of one width evolve by crossover, mutation and selection. Their
fitness comes in two cheap steps. What a layer computes changes by δwᵀ H δw, summed over its outputs, where δw zeroes
the weights that read removed filters and H is the mean of x·xᵀ over the layer's input patches; and this layer error
stands for the network's. H is taken once a layer, and no candidate needs a forward pass. Here it is summed over kernel
positions as well, which leaves rᵀ Q r, r being 1 for each removed filter: one small product judges a population.

Where the paper is silent, or something else serves better:

- A group's error is the mean over all layers that read it, each relative to its own output. So filters that a
  residual sum couples are decided at once.
- Where there is batch norm, neither a shift nor a factor is an error, since the statistics measured again, as on
  everything returned, make both good: H is of patches less their mean, and of δwᵀ H δw counts what is left after the
  best factor, which is one less the squared correlation of what a layer computes with what it computed before. By the
  plain error, evolution keeps the filters that stand for a few classes and loses the rest, at an error far below that
  of random masks, which only make everything smaller. ``normalised=False`` gives the error of the paper.
- All H are of the unpruned network, not of the network as pruned so far. So the order of the groups is that of the
  record alone.
- Sensitivity is the reward lost when a group alone keeps 1/8, 1/4 or 1/2 of its filters, these too chosen by
  evolution. Every group gets the share at which it alone would lose ``tolerance`` of what the median group loses at
  1/8; then one common factor brings all shares onto the budgets.
- A child keeps what both parents keep and draws the rest from what one of them keeps. Parents win tournaments of
  two; the best of old and new survive, none of them twice.

Fine-tuning by distillation is the same for all methods and not done here, see `rlprune.training.fit`.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rlprune.candidates import Decision
from rlprune.costs import Budget
from rlprune.delivery import finish
from rlprune.errors import InputError, whole_each
from rlprune.evaluate import Evaluator
from rlprune.forward import learning
from rlprune.own import OwnData
from rlprune.peers.judged import judged
from rlprune.peers.layer_error import ErrorForm, error_forms, errors
from rlprune.result import PruningResult

SHARES = (0.125, 0.25, 0.5)  # of a group's filters, at which its sensitivity is measured
PATIENCE = 50  # generations without a better mask that end an evolution
MUTATION = 1.0  # filters of a child decided anew, on average
RANDOM = 100  # random masks that history compares with


@learning
def genetic(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    images: int = 500,
    patches: int = 2048,
    normalised: bool | None = None,
    tolerance: float = 0.5,
    population: int = 64,
    generations: int = 1000,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """Prune each group by the mask that changes least what the layers behind it compute.

    Args:
        network: see `rlprune.prune`.
        example_input: see `rlprune.prune`.
        budgets: see `rlprune.prune`.
        data: needed.
        images: training images that H is of. Half of them, but 2 at least, recover the networks by which sensitivity is
            judged, on as many validation images as the reward is.
        patches: input patches drawn from them, per layer.
        normalised: whether a shift and a factor of what the layers compute are no error. None: if the network has
            batch norm.
        tolerance: of sensitivity, above 0 and at most 1.
        population: masks that survive a generation; as many are born in it.
        generations: of one evolution, at most.
        seed: of patches and evolution, and of the division of data of one's own.
        progress: show a bar.
        options: those of `rlprune.peers.judged.judged`.

    Returns:
        the network; its history has a row per group, in the order of pruning: group, filters, kept, share (before
        the budgets were asked), error (of its readers' output, as a share), criterion_error and random_error (the
        same of the criterion's mask and, on average, of random ones as wide), generations, reward (in the last
        row), seconds.

    Raises:
        InputError: bad input, or a group that layers other than Conv2d and Linear read.
    """
    clock = start = time.perf_counter()
    whole_each(images=(images, 1), patches=(patches, 1), generations=(generations, 1), population=(population, 2))
    if not 0 < tolerance <= 1:
        raise InputError(f"tolerance must lie in (0, 1], not {tolerance}.")
    candidates, evaluator = judged(network, example_input, budgets, data, seed, **options)
    if evaluator.data is None:
        raise InputError("Genetic pruning measures what layers read on images: give data.")
    if normalised is None:
        normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    groups, dataset, generator = candidates.groups, evaluator.data, torch.Generator().manual_seed(seed)
    seen = dataset.normalise(dataset.train.images[:images])
    forms = error_forms(network, groups, seen, patches, normalised, generator)
    recalibration = max(2, images // 2) if evaluator.calibration is not None else 0
    judges = len(evaluator.split)  # fewer, and the luck of one or two images would decide a group's width
    probe = Evaluator(network, groups, dataset, evaluator.measure, judges, recalibration, evaluator.ridge)
    masks = [torch.ones(group.size, dtype=torch.bool) for group in groups]
    rewards, rows, scores = np.empty((len(groups), len(SHARES))), [], list(candidates.scores)
    evolved = partial(evolve, population=population, generations=generations, generator=generator)
    with tqdm(total=2 * len(groups), desc="genetic", mininterval=1, disable=not progress) as bar:
        for number in range(len(groups)):
            for place, share in enumerate(SHARES):
                alone, width = list(masks), candidates.widths(np.full(len(groups), share))[number]
                alone[number], _ = evolved(forms[number], width)
                rewards[number, place] = probe(alone)
            bar.update()
        shares = _shares(probe(masks), rewards, tolerance)
        widths = candidates.fit(shares, "scale")
        for number in shares.argsort(kind="stable").tolist():
            group, form, width = groups[number], forms[number], widths[number]
            masks[number], spent = evolved(form, width)
            others = [candidates.scores[number], *torch.rand(RANDOM, group.size, generator=generator)]
            error = errors(form, torch.stack([masks[number], *_top(torch.stack(others), width)]))
            # a noisy cost may ask for fewer: then those go first whose loss adds the least error
            without = errors(form, masks[number] & ~torch.eye(group.size, dtype=torch.bool))
            scores[number] = masks[number] * (1 + without.argsort(stable=True).argsort(stable=True))
            row = {"group": group.name, "filters": group.size, "kept": width, "share": shares[number]}
            row |= {"error": float(error[0]), "criterion_error": float(error[1])}
            row |= {"random_error": float(error[2:].mean()), "generations": spent}
            row["reward"] = evaluator(masks) if len(rows) == len(groups) - 1 else float("nan")
            clock, row["seconds"] = time.perf_counter(), time.perf_counter() - clock
            rows.append(row)
            bar.update()
    decision, evaluations = Decision(rows[-1]["reward"], widths, scores), probe.evaluations + evaluator.evaluations
    return finish(candidates, [decision], evaluator, rows, evaluations, clock - start, "genetic")


def evolve(
    form: ErrorForm, width: int, population: int, generations: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The mask that keeps ``width`` filters with the smallest error found, and how many generations that took.

    Args:
        form: of the group's error.
        width: 1 to size.
        population: see `genetic`.
        generations: see `genetic`.
        generator: on the CPU; all randomness comes from it.
    """
    size, spent, idle, least = form.size, 0, 0, float("inf")
    masks, error = torch.zeros(0, size, dtype=torch.bool), torch.zeros(0)
    children = _top(torch.rand(population, size, generator=generator), width)
    while spent < generations and idle < PATIENCE and (spent == 0 or width < size):
        error, order = torch.cat([error, errors(form, children)]).sort(stable=True)
        once = torch.cat([torch.ones(1, dtype=torch.bool), error[1:] > error[:-1]])
        masks, error = torch.cat([masks, children])[order[once][:population]], error[once][:population]
        spent, idle, least = spent + 1, 0 if error[0] < least else idle + 1, float(error[0])
        drawn = torch.randint(len(masks), (2, 2, population), generator=generator)
        parents = masks[drawn.amin(0)].float()  # they stand in order, the best first
        # at least 2 where both keep a filter, at least 1 where one of them does
        rank = parents.sum(0) + torch.rand(population, size, generator=generator)
        anew = torch.rand(population, size, generator=generator) < MUTATION / size
        children = _top(torch.where(anew, 3 * torch.rand(population, size, generator=generator), rank), width)
    return masks[0], spent


def _shares(unpruned: float, rewards: np.ndarray, tolerance: float) -> np.ndarray:
    """Per group the share at which its reward reaches the level tolerated, between those measured, (groups, SHARES)."""
    level = unpruned - tolerance * max(unpruned - float(np.median(rewards[:, 0])), 0.0)
    at, shares = (0.0, *SHARES, 1.0), []
    for row in rewards:
        curve = np.maximum.accumulate([min(rewards.min(), unpruned), *row, unpruned])  # more filters are no worse
        high = int((curve >= level).argmax())
        low = max(high - 1, 0)
        part = (level - curve[low]) / (curve[high] - curve[low]) if high else 0.0
        shares.append(at[low] + part * (at[high] - at[low]))
    return np.array(shares)


def _top(scores: Tensor, width: int) -> Tensor:
    """Masks of the ``width`` highest scores of each row."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(width, 1).indices, True)
