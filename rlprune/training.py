"""Train, fine-tune (also by distillation) and measure accuracy.

The recipe is the usual fast one for CIFAR: SGD with Nesterov momentum, a
one-cycle learning rate, label smoothing, random crops and mirror images made
on the device, half precision and channels-last where the machine is faster so.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from rlprune.data import Dataset
from rlprune.errors import InputError, first_line
from rlprune.files import place_of, read_checkpoint, save_tensors, weights_hash
from rlprune.forward import (
    accuracy,
    check_classes,
    evaluating,
    half_precision,
    learning,
    logits_of,
    seeded,
    suited,
    training_logits,
)
from rlprune.lessons import Answer, Lessons


@dataclass(frozen=True)
class Training:
    """The schedule of a training or fine-tuning run.

    Attributes:
        epochs: passes over the training split.
        batch_size: images a step.
        learning_rate: at its peak.
        warmup: share of the steps until the peak.
        momentum: of SGD (Nesterov), in [0, 1).
        weight_decay: on weights of two or more dimensions.
        label_smoothing: share of the target spread over all classes.
        distillation: weight of the teacher's output in the loss (0 to 1), where a teacher is given.
        temperature: of the distillation (Hinton et al. 2015).
        average: decay a step of the exponential moving average of weights and statistics that the network ends with;
            0 for the weights of the last step.
    """

    epochs: int = 14
    batch_size: int = 128
    learning_rate: float = 0.1
    warmup: float = 0.25
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    distillation: float = 0.0
    temperature: float = 3.0
    average: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole = name in ("epochs", "batch_size")
            if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
                raise InputError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r}.")
            if not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, not {value!r}.")
        if self.epochs < 1 or self.batch_size < 2 or self.learning_rate <= 0:
            raise InputError(
                "A schedule needs at least 1 epoch, batches of at least 2 and a learning rate above 0, not "
                f"epochs={self.epochs}, batch_size={self.batch_size}, learning_rate={self.learning_rate}."
            )
        if not (0 <= self.distillation <= 1 and 0 < self.warmup < 1):
            raise InputError(
                f"distillation must lie in [0, 1] and warmup in (0, 1), not {self.distillation}, {self.warmup}."
            )
        if not 0 <= self.average < 1:
            raise InputError(f"average, the decay of a moving average, must lie in [0, 1), not {self.average}.")
        if not (0 <= self.momentum < 1 and 0 <= self.label_smoothing <= 1):
            raise InputError(
                "momentum must lie in [0, 1) and label_smoothing in [0, 1], not "
                f"{self.momentum}, {self.label_smoothing}."
            )
        if self.weight_decay < 0 or self.temperature <= 0:
            raise InputError(
                f"weight_decay must be at least 0 and temperature above 0, not {self.weight_decay}, {self.temperature}."
            )

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Training":
        """From a group of a parameter file; an unknown key is named."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(f"Unknown training parameter {unknown[0]!r}. Use one of: {', '.join(known)}.")
        return cls(**values)


@learning
def fit(
    network: nn.Module,
    data: Dataset,
    training: Training | dict[str, Any],
    seed: int = 0,
    teacher: nn.Module | None = None,
    checkpoint: str | Path | None = None,
    progress: str | None = "train",
    lessons: str | Path | None = None,
) -> pd.DataFrame:
    """Train a network in place.

    Args:
        network: (N, C, H, W) → (N, classes); trained on the device of ``data``.
        data: its training split is learned from, its validation split watched.
        training: the schedule, or some of its values by name.
        seed: of shuffling, crops and mirror images, and of the network's own random numbers, such as dropout's.
        teacher: its output, in evaluation mode, is imitated with weight ``training.distillation``.
        checkpoint: a file written after every epoch. If it is there, training goes on from it and ends as if never
            stopped, given the same teacher and the network as it was before its training; it is left in place.
        progress: label of the progress bar, None for none.
        lessons: a folder in which the teacher's outputs stay, for other networks that it teaches on the same images
            (same data, seed and batch size): they take them from there. See `rlprune.lessons`.

    Returns:
        one row an epoch: epoch, loss, train_accuracy and validation_accuracy (of the average, if there is one) in
        percent, images_per_second (of the training steps alone), seconds since the start.

    Raises:
        InputError: a checkpoint that is cut off or of another run, a lesson that is, too few images for one batch, or
            training that diverges: then the network is left as it is, and is of no use.
    """
    if not isinstance(data, Dataset):
        raise InputError("The data to train on must be a Dataset: rlprune.own.from_tensors makes one of tensors.")
    training = Training.of(training) if isinstance(training, dict) else training
    if not isinstance(training, Training):
        raise InputError(f"training must be a Training, or a dict of its values, not {training!r}.")
    network.to(data.device)
    trainable(network, data, training)
    teacher = teacher if training.distillation > 0 else None
    path = place_of(checkpoint)
    run = _fingerprint(network, teacher, data, training, seed) if path is not None else ""
    steps = len(data.train) // training.batch_size
    # a single step would be the last of its schedule, at next to no rate
    planned = max(2, steps * training.epochs)
    data = suited(network, data)
    if teacher is not None:
        _check_teacher(network, teacher, data)
    network.to(memory_format=data.memory_format)
    generator = torch.Generator().manual_seed(seed)
    optimizer = sgd(network, training)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=training.learning_rate,
        total_steps=planned,
        # a warm-up of exactly one step would make torch divide by zero
        pct_start=training.warmup * (1 + 1e-6 * (training.warmup * planned == 1)),
        anneal_strategy="linear",
        cycle_momentum=False,
        div_factor=10,
        final_div_factor=1e3,
    )
    averaged = None
    if training.average:
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(training.average), use_buffers=True)
        optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(network))
    history: list[dict[str, float]] = []
    random: list[Tensor] = []
    if path is not None and path.exists():
        state = read_checkpoint(path, run)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])
        generator.set_state(state["generator"])
        history, random = state["history"], state["random"]
    earlier = history[-1]["seconds"] if history else 0.0
    start = time.perf_counter()
    taught = None
    if teacher is not None:
        taught = Lessons(teacher, data, training.batch_size, seed, Path(lessons) if lessons is not None else None)
    done, total = len(history) * steps, training.epochs * steps
    with (
        contextlib.ExitStack() as afterwards,
        evaluating(teacher) if teacher is not None else contextlib.nullcontext(),
        seeded(seed, data.device, random),
        # an executed notebook keeps every line that the bar writes, hence not more than one a second
        tqdm(total=total, initial=done, desc=progress, mininterval=1, disable=progress is None) as bar,
    ):
        afterwards.callback(network.eval)
        for epoch in range(len(history) + 1, training.epochs + 1):
            batches = data.augmented(training.batch_size, generator, epoch)
            with taught.epoch(epoch) if taught is not None else contextlib.nullcontext() as answer:
                row = one_epoch(network, batches, training, optimizer, schedule, answer, bar)
            check_loss(row["loss"], epoch, network)
            row["validation_accuracy"] = accuracy(averaged.module if averaged else network, data, data.validation)
            seconds = earlier + time.perf_counter() - start
            history.append({"epoch": epoch, **row, "seconds": seconds})
            if path is not None:
                state = {
                    "run": run,
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "generator": generator.get_state(),
                    "random": [torch.get_rng_state()],
                    "history": history,
                }
                if data.device.type == "cuda":
                    state["random"].append(torch.cuda.get_rng_state(data.device))
                if averaged is not None:
                    state["averaged"] = averaged.state_dict()
                save_tensors(state, path)
    if averaged is not None:
        network.load_state_dict(averaged.module.state_dict())
    return pd.DataFrame(history)


def fillable(data: Dataset, training: Training) -> None:
    """Raise `InputError` if there are too few images for one batch."""
    if len(data.train) < training.batch_size:
        raise InputError(
            f"{len(data.train)} training images do not fill one batch of {training.batch_size}: lower batch_size."
        )


def trainable(network: nn.Module, data: Dataset, training: Training) -> None:
    """Raise `InputError` if there are too few images for one batch, an unknown label, or if no weight may change.

    The network must be on the data's device.
    """
    fillable(data, training)
    changeable(network)
    check_classes(network, data)


def _check_teacher(network: nn.Module, teacher: nn.Module, data: Dataset) -> None:
    """Raise `InputError` unless the teacher takes the images and has as many outputs as its pupil."""
    few, shapes = data.normalise(data.train.images[:2]), []
    with torch.no_grad(), half_precision(data.device):
        for taught in (teacher, network):
            with evaluating(taught):
                try:
                    shapes.append(tuple(logits_of(taught(few)).shape[1:]))
                except Exception as error:  # whatever the teacher's own code raises
                    raise InputError(f"The teacher cannot process the images: {first_line(error)}.") from error
    if shapes[0] != shapes[1]:
        raise InputError(f"The teacher has outputs {shapes[0]} and the network {shapes[1]}: they must be the same.")


def changeable(network: nn.Module) -> None:
    """Raise `InputError` if no weight may change."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise InputError("No weight of the network may change: call network.requires_grad_() before it is trained.")


def check_loss(loss: float, epoch: int, network: nn.Module | None = None) -> None:
    """Raise `InputError` if training has diverged: the epoch's mean loss, a weight or a statistic is not finite."""
    modules = list(network.modules()) if network is not None else []
    numbers = [p.detach() for module in modules for p in module.parameters(recurse=False)]
    for module in modules:  # other buffers may hold infinities for reasons of their own
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            numbers += [module.running_mean, module.running_var]
    if not (math.isfinite(loss) and all(tensor.isfinite().all() for tensor in numbers)):
        raise InputError(f"Training has diverged (loss {loss:g} in epoch {epoch}): lower learning_rate.")


def one_epoch(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    training: Training,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    teacher: Answer | None,
    bar: tqdm,
) -> dict[str, float]:
    """Train on some batches, imitating ``teacher`` if there is one.

    Returns:
        loss (mean), train_accuracy in percent, images_per_second.
    """
    network.train()
    device = next(network.parameters()).device
    total_loss, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    start, seen = time.perf_counter(), 0
    for images, labels in batches:
        logits, imitated = training_logits(network, images), None
        if teacher is not None:
            with torch.no_grad(), half_precision(device):
                imitated = teacher(images)
        loss = _loss(logits.float(), labels, training, imitated)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total_loss += loss.detach() * len(labels)
        correct += (logits.detach().argmax(1) == labels).sum()
        seen += len(labels)
        bar.update()
        if not bar.disable and bar.n % 10 == 0:  # reading a number waits for a GPU, so not at every step
            rates = {"loss": f"{total_loss.item() / seen:.3f}", "accuracy": f"{100 * correct.item() / seen:.1f} %"}
            bar.set_postfix(rates, refresh=False)
    rates = {"loss": total_loss.item() / seen, "train_accuracy": 100 * correct.item() / seen}
    return {**rates, "images_per_second": seen / (time.perf_counter() - start)}


def _loss(logits: Tensor, labels: Tensor, training: Training, imitated: Tensor | None) -> Tensor:
    loss = F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
    if imitated is None:
        return loss
    warm = training.temperature
    target = F.log_softmax(imitated.float() / warm, 1)
    divergence = F.kl_div(F.log_softmax(logits / warm, 1), target, log_target=True, reduction="batchmean")
    # warm² keeps the gradient's size independent of the temperature (Hinton et al. 2015, section 2)
    return (1 - training.distillation) * loss + training.distillation * warm**2 * divergence


def sgd(network: nn.Module, training: Training) -> torch.optim.Optimizer:
    """SGD; weight decay spares biases and batch norm, which it would only hold back."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    momentum = training.momentum
    return torch.optim.SGD(groups, lr=training.learning_rate, momentum=momentum, nesterov=momentum > 0)


def _fingerprint(network: nn.Module, teacher: nn.Module | None, data: Dataset, training: Training, seed: int) -> str:
    """Tells one training run from another; a checkpoint carries it."""
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    weights = [weights_hash(each) for each in (network, teacher) if each is not None]
    what = [shapes, weights, data.identity(), asdict(training), seed]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
