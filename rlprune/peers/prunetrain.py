"""PruneTrain (Lym et al. 2019, arXiv 1901.09290): train from scratch and lose filters on the way.

Of the network only the architecture is used. A group lasso pulls at every filter as a whole; what nothing reads any
more leaves for good, and a physically smaller, hence cheaper, network trains on. Filled in here:

* What the lasso takes together are the weights of one layer that make a filter of `rlprune.trace`, and those of one
  layer that read it; where residual sums couple filters, several layers do either, each for itself. Biases and batch
  norm are not in it, as they are not in the weight decay.
* The paper removes a filter whose ingoing or outgoing weights are all under 1e-4. Here the outgoing ones decide: a
  filter without ingoing weights still hands on the bias of its batch norm, one that nothing reads does nothing.
* SGD takes norms near 0 but not under 1e-4 in a few epochs. So the lasso acts as its proximal step behind every step of
  SGD: a norm loses λ · (learning rate) / (1 - momentum), what its gradient would take in the long run, and ends at
  exactly 0. A weight belongs to the filter that it makes and to the one that it reads, and takes the factors of both.
* The strongest filters of a group, as many as it must keep, are not pulled at, lest a layer die out.
* The paper knows no budget. Towards the end what is over one is brought within it: the filters of the smallest norms,
  as shares of their group's mean, leave, wherever they are; what is left recovers as every candidate does
  (`rlprune.evaluate.recover`) and trains on.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from rlprune.candidates import Candidates
from rlprune.costs import Budget
from rlprune.data import Dataset
from rlprune.delivery import TRIES, delivered
from rlprune.errors import InputError, whole
from rlprune.evaluate import Evaluator, outputs, recover
from rlprune.files import place_of, read_checkpoint, save_tensors, weights_hash
from rlprune.forward import accuracy, check_classes, half_precision, learning, logits_of, seeded
from rlprune.groups import FilterGroup, remaining
from rlprune.masking import keep_top, masked, rebuild, slim, widths
from rlprune.own import OwnData
from rlprune.peers.fresh import fresh
from rlprune.peers.judged import judged, without_criterion
from rlprune.peers.lasso import Lasso
from rlprune.result import PruningResult
from rlprune.training import Training, check_loss, fillable, one_epoch, sgd


@learning
def prunetrain(
    network: nn.Module,
    example_input: Tensor,
    budgets: Sequence[Budget],
    data: OwnData | None = None,
    training: Training | dict[str, Any] | None = None,
    share: float = 0.25,
    interval: int = 1,
    threshold: float = 1e-4,
    settle: float = 0.2,
    grow_batch: bool = False,
    reset: bool = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    shared: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """Train the architecture of ``network`` from scratch under a group lasso and remove filters between epochs.

    See `rlprune.prune` for the arguments that are not described here.

    Args:
        network: its weights are not used.
        example_input: see `rlprune.prune`.
        budgets: see above; a network that is below them stays as it is.
        data: needed.
        training: the schedule, or some of its values by name; by default `Training()`. Distillation plays no part.
        share: of the lasso in the loss of the first iteration, in (0, 1); sets its strength λ, once. The paper: 0.2 to
            0.25, for 182 epochs. How far it takes a norm grows with the number of steps and falls with that of filters:
            in a few epochs few filters go to 0, and a share of one half and more can keep a network from learning.
        interval: epochs from one removal to the next (the paper: 10).
        threshold: a filter leaves when every weight that reads it is smaller than this.
        settle: share of the epochs that are left when the budgets are enforced; 0 for after the last.
        grow_batch: let the batch grow by as much as an image's activations shrink, by quarters of the first one's
            size, and the learning rate in proportion.
        reset: make the weights with every module's own ``reset_parameters`` even if `rlprune.networks.build` knows
            the architecture. Its VGGs start near the identity: each filter is read by a weight of 1, which a lasso
            takes many epochs to bring down.
        seed: of weights, shuffling and crops.
        checkpoint: a file written after every epoch. If it is there, training goes on from it and ends as if never
            stopped; it is left in place.
        shared: a folder in which the training stays as it is before the budgets are first enforced. Another run that
            differs in nothing but its budgets goes on from there, ends as it would have alone, and counts the seconds.
        progress: show a bar.
        options: those of `rlprune.peers.judged.judged`; its criterion plays no part.

    Returns:
        the trained network. ``history`` has a row an epoch: epoch, loss (of classification), train_accuracy,
        validation_accuracy (percent), strength (λ), lasso (its share of the whole loss, with the norms at the end),
        filters, parameters, macs of what goes on, faded (filters that the lasso alone has taken so far),
        training_macs so far (3 · MACs · images: forward, and twice that backward), dense_training_macs (the same for
        the unpruned network), batch_size, seconds.

    Raises:
        InputError: no data, values that make no sense, a module whose weights cannot be made anew, or a checkpoint that
            is cut off or of another run.
    """
    start = time.perf_counter()
    training = training if isinstance(training, Training) else Training.of(training or {})
    if data is None:
        raise InputError("PruneTrain trains from scratch: give data.")
    whole(interval, "interval", 1)
    if not (0 < share < 1 and 0 <= settle < 1 and threshold > 0):
        raise InputError(
            "share must lie in (0, 1), settle in [0, 1) and threshold be above 0, not "
            f"share={share}, settle={settle}, threshold={threshold}."
        )
    if training.average:
        raise InputError("PruneTrain's network gets smaller while it trains, which no average can follow: average=0.")
    candidates, evaluator = judged(network, example_input, budgets, data, seed, **without_criterion(options))
    check_classes(evaluator.network, evaluator.data)  # it is trained on the labels, whatever judges it
    fillable(evaluator.data, training)
    with seeded(seed, evaluator.data.device):  # for dropout, which has no generator of its own
        run = _Run(candidates, evaluator, training, share, seed, reset)
        limits = [[budget.name, float(budget.limit), budget.relative] for budget in budgets]  # nothing measured
        given = [weights_hash(run.network), evaluator.data.identity(), asdict(training), share, interval, threshold]
        given += [settle, grow_batch, seed, reset, candidates.least, candidates.multiple, options.get("evaluation")]
        given += [[group.name for group in candidates.groups]]
        alike, which = (
            hashlib.sha256(json.dumps(of, default=str).encode()).hexdigest() for of in (given, [*given, limits])
        )
        path = place_of(checkpoint)
        trunk = Path(shared) / f"{alike[:16]}.pt" if shared is not None else None
        enforced = max(1, training.epochs - round(settle * training.epochs))
        if path is not None and path.exists():
            state = read_checkpoint(path, which)
            candidates.go_on_with(state["unpruned"])
            start -= run.restore(state)
        elif trunk is not None and trunk.exists():
            start -= run.restore(read_checkpoint(trunk, alike))
        with tqdm(desc="train", mininterval=1, disable=not progress) as bar:
            for epoch in range(len(run.history) + 1, training.epochs + 1):
                began, rates = time.perf_counter(), run.train(epoch, bar)
                check_loss(rates["loss"], epoch, run.network)
                if epoch % interval == 0:
                    run.remove_silent(threshold)
                if epoch in (enforced, training.epochs):
                    run.enforce()
                if epoch == training.epochs:
                    evaluator.recalibrate(run.network)
                run.record(epoch, rates, began)
                if grow_batch:
                    run.grow()
                state = {**run.state(), "seconds": time.perf_counter() - start}
                if path is not None:
                    save_tensors({"run": which, "unpruned": candidates.unpruned.tolist(), **state}, path)
                if trunk is not None and epoch == enforced - 1:
                    save_tensors({"run": alike, **state}, trunk)
    seconds = time.perf_counter() - start
    return delivered(candidates, evaluator, run.network, run.alive, run.history, seconds, "prunetrain")


# of a run, for its checkpoint
_PLAIN = ("alive", "batch_size", "strength", "history", "macs", "dense", "faded", "asked")


class _Run:
    """A training run on a network that shrinks.

    Attributes:
        network: as it is now.
        groups: its filter groups, in the order of the unpruned network's.
        alive: which filters of the unpruned network are left, a keep mask per group.
        batch_size: images a step, now.
        strength: λ.
        faded: filters that left because nothing read them any more, not for the budgets' sake.
        history: a row per epoch.
    """

    def __init__(
        self,
        candidates: Candidates,
        evaluator: Evaluator,
        training: Training,
        share: float,
        seed: int,
        reset: bool = False,
    ) -> None:
        self.candidates, self.evaluator, self.training = candidates, evaluator, training
        self.data: Dataset = evaluator.data
        network = fresh(candidates.network, seed, reset)
        self.network = network.to(self.data.device, memory_format=self.data.memory_format)
        self.groups: Sequence[FilterGroup] = candidates.groups
        self.alive = [torch.ones(group.size, dtype=torch.bool) for group in self.groups]
        self.batch_size = training.batch_size
        self.history: list[dict[str, float]] = []
        self.macs = self.dense = self.faded = 0
        self.asked = False  # whether anything has left for the budgets' sake
        self.generator = torch.Generator().manual_seed(seed)
        self.activations = activations(self.network, candidates.example_input)
        self._prepare()
        images, labels = next(self.data.augmented(self.batch_size, torch.Generator().manual_seed(seed), 1))
        with torch.no_grad(), masked(self.network.train(), (), ()), half_precision(images.device):
            # of the first iteration; the statistics of batch norm stay as they were
            logits = logits_of(self.network(images))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=training.label_smoothing)
        self.strength = share / (1 - share) * float(loss) / float(self.lasso.norms().sum())

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        buffers = [self.optimizer.state[p].get("momentum_buffer") for p in self.network.parameters()]
        random = [self.generator.get_state(), torch.get_rng_state()]
        random += [torch.cuda.get_rng_state(self.data.device)] if self.data.device.type == "cuda" else []
        return {**plain, "network": self.network.state_dict(), "momentum": buffers, "random": random}

    def restore(self, state: dict[str, Any]) -> float:
        """Go on from `state`, on a run that has just begun; returns the seconds that it had taken."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.network, self.groups = slim(self.network, self.groups, self.alive), remaining(self.groups, self.alive)
        self.network.load_state_dict(state["network"])
        self._prepare()
        for parameter, buffer in zip(self.network.parameters(), state["momentum"], strict=True):
            if buffer is not None:
                self.optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device)
        self.generator.set_state(state["random"][0])
        torch.set_rng_state(state["random"][1])
        for of_device in state["random"][2:]:
            torch.cuda.set_rng_state(of_device, self.data.device)
        return state["seconds"]

    def train(self, epoch: int, bar: tqdm) -> dict[str, float]:
        """One epoch as of `rlprune.training.fit`; its loss and accuracy."""
        steps, predictor = len(self.data.train) // self.batch_size, self.candidates.predictor
        first = self.training.batch_size
        self.macs += 3 * predictor.macs(widths(self.alive)) * steps * self.batch_size
        self.dense += 3 * predictor.macs(self.candidates.sizes) * (len(self.data.train) // first * first)

        def rate(step: int) -> float:  # up and down as in `fit`, but by images: larger batches make fewer steps
            done = (epoch - 1 + step / steps) / self.training.epochs
            return self.batch_size / first * float(np.interp(done, [0, self.training.warmup, 1], [0.1, 1, 1e-4]))

        bar.total = bar.n + steps * (self.training.epochs - epoch + 1)
        batches = self.data.augmented(self.batch_size, self.generator, epoch)
        return one_epoch(
            self.network, batches, self.training, self.optimizer, LambdaLR(self.optimizer, rate), None, bar
        )

    def record(self, epoch: int, rates: dict[str, float], began: float) -> None:
        """Add the row of an epoch to `history`."""
        kept, penalty = widths(self.alive), self.strength * float(self.lasso.norms().sum())
        row = {"epoch": epoch, "loss": rates["loss"], "train_accuracy": rates["train_accuracy"]}
        row |= {"validation_accuracy": accuracy(self.network, self.data, self.data.validation)}
        row |= {"strength": self.strength, "lasso": penalty / (penalty + rates["loss"]), "filters": sum(kept)}
        row |= {"parameters": self.candidates.predictor.parameters(kept), "macs": self.candidates.predictor.macs(kept)}
        row |= {"faded": self.faded, "training_macs": self.macs, "dense_training_macs": self.dense}
        row |= {"batch_size": self.batch_size}
        self.history.append({**row, "seconds": time.perf_counter() - began})

    def remove_silent(self, threshold: float) -> None:
        """Remove the filters that nothing reads; every group keeps its least, and a multiple as asked for."""
        keeps, multiple = [], self.candidates.multiple
        for reading, least in zip(self.lasso.reading(), self.candidates.least, strict=True):
            width = -(-int((reading >= threshold).sum()) // multiple) * multiple
            keeps += keep_top([reading], [min(max(width, least), len(reading))])
        self.faded += 0 if self.asked else sum(int((~keep).sum()) for keep in keeps)
        self._remove(keeps)

    def enforce(self) -> None:
        """Bring the network within every budget; what is cut then recovers."""
        candidates, evaluator, target = self.candidates, self.evaluator, None
        for attempt in range(TRIES + 2):  # the second and further ones for a cost that is noisy
            costs = candidates.measured(candidates.as_returned(self.network)).values()
            if all(cost["value"] <= cost["limit"] for cost in costs):
                break
            self.asked = True
            if attempt == 0 and evaluator.calibration is not None:
                target = outputs(self.network, evaluator.calibration)
            values = [torch.full((len(alive),), -1.0) for alive in self.alive]  # of those that are gone
            for value, alive, norms in zip(values, self.alive, self.lasso.split(self.lasso.strength()), strict=True):
                # a norm grows with the weights in it: only beside those of its group does it say something
                value[alive] = norms / norms.mean().clamp_min(1e-12)
            kept = np.array(widths(self.alive))
            wanted = candidates.widths(0.93 * kept / candidates.sizes) if attempt else candidates.thresholded(values)
            wanted = np.minimum(kept, wanted if attempt < TRIES else candidates.anchor)
            masks = keep_top(values, wanted.tolist())
            self._remove([mask[alive] for mask, alive in zip(masks, self.alive, strict=True)])
        if target is not None:
            recover(self.network, evaluator.calibration, target if evaluator.ridge else None, evaluator.ridge)

    def grow(self) -> None:
        """Let the batch grow by as much as the activations of an image have shrunk."""
        first, now = self.training.batch_size, activations(self.network, self.candidates.example_input)
        unit = max(1, first // 4)
        room = min(first * self.activations // now, len(self.data.train))
        self.batch_size = max(self.batch_size, room // unit * unit)

    def _remove(self, keeps: list[Tensor]) -> None:
        """Rebuild the network, and with it the momentum of SGD, from what is kept, a mask per present group."""
        if all(bool(keep.all()) for keep in keeps):
            return
        momenta: dict[int, Any] = {}
        for parameter in self.network.parameters():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            momenta[id(parameter)] = nn.Parameter(torch.zeros_like(parameter) if buffer is None else buffer)
        carried = slim(rebuild(self.network, momenta), self.groups, keeps)
        self.network, self.groups = slim(self.network, self.groups, keeps), remaining(self.groups, keeps)
        for alive, keep in zip(self.alive, keeps, strict=True):
            alive[alive.clone()] = keep
        self._prepare()
        for parameter, buffer in zip(self.network.parameters(), carried.parameters(), strict=True):
            self.optimizer.state[parameter]["momentum_buffer"] = buffer.detach()

    def _prepare(self) -> None:
        """Lasso and optimizer of the network as it is."""
        lasso = self.lasso = Lasso(self.network, self.groups, self.candidates.least)
        self.optimizer = sgd(self.network, self.training)

        def pull(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            lasso.shrink(self.strength * optimizer.param_groups[0]["lr"] / (1 - self.training.momentum))

        self.optimizer.register_step_post_hook(pull)


@torch.no_grad()
def activations(network: nn.Module, example_input: Tensor) -> int:
    """Numbers that the innermost modules put out for one image: what training keeps in memory of it."""
    sizes: list[int] = []

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        sizes.extend(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    inner = [module for module in network.modules() if next(module.children(), None) is None]
    hooks = [module.register_forward_hook(count) for module in inner]
    mode = network.training
    network.eval()(example_input[:1])
    network.train(mode)
    for hook in hooks:
        hook.remove()
    return sum(sizes)
