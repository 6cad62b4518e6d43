"""The reward of many candidates, fast: slice, recalibrate, measure.

A pruned network that has not recovered answers at random, whatever its widths,
so that its accuracy says nothing. Measuring the batch-norm statistics of the
slim network again on a few hundred images (EagleEye, Li et al. 2020, section 3.3)
lets it recover far enough for the accuracy to rank candidates, at the price of
one or two forward passes of a small network. Where whole residual stages lose most
of their filters even that leaves it at chance; then fitting the last linear layer
again, by least squares, brings it back.
"""

import inspect
from collections.abc import Callable
from itertools import chain, count, islice
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlprune.data import Dataset
from rlprune.errors import InputError, finite, named, one_of, whole_each
from rlprune.forward import (
    accuracy,
    check_classes,
    evaluating,
    half_precision,
    learning,
    read_by,
    seeded,
    suitable_batch,
    suited,
    training_logits,
)
from rlprune.groups import FilterGroups
from rlprune.masking import slim
from rlprune.training import changeable


@torch.no_grad()
def recover(network: nn.Module, images: Tensor, target: Tensor | None = None, ridge: float = 0.1) -> bool:
    """Measure the statistics of every batch norm again and fit the layer that makes the output, in place.

    The statistics become their mean over batches of the images. The fit is a ridge regression, in the same passes:
    the reconstruction of AMC (He et al. 2018, section 3.4) for the one layer that costs next to nothing.

    Args:
        network: any network; all its other weights stay as they are.
        images: normalised, (N, C, H, W), on the network's device.
        target: what the output shall come near to, (N, classes): the unpruned network's. None: nothing is fitted.
        ridge: penalty on the weights, as a share of the mean variance of the layer's inputs.

    Returns:
        whether a layer was fitted: not if the output comes from anything but a linear layer on (N, features).
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    before = [[buffer.clone() for buffer in _statistics(norm)] for norm in norms]
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []
    linears = [m for m in network.modules() if _is_linear(m)] if target is not None else []
    hooks = [
        m.register_forward_hook(lambda m, x, named, y: calls.append((m, read_by(x, named), y)), with_kwargs=True)
        for m in linears
    ]
    made: list[tuple[nn.Linear, Tensor]] = []
    with evaluating(network):  # dropout stays off
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        try:
            with half_precision(images.device):
                for batch in _batches(images):
                    calls.clear()
                    output = network(batch)
                    # a weight that is computed from others can't be set
                    made += [(m, x) for m, x, y in calls if y is output and x.ndim == 2 and "weight" in m._parameters]
        finally:
            for hook in hooks:
                hook.remove()
            for norm, momentum, statistics in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if not norm.num_batches_tracked:  # of a branch that these images do not take
                    for buffer, values in zip(_statistics(norm), statistics, strict=True):
                        buffer.copy_(values)
    if made:
        _fit(made[0][0], torch.cat([inputs for _, inputs in made]).double(), target.double(), ridge)
    return bool(made)


def _statistics(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


def _is_linear(module: nn.Module) -> bool:
    """Whether this computes what a linear layer does: one that inherits from it may compute something else."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _batches(images: Tensor) -> list[Tensor]:
    """Images in batches of equal size (but for one image), since each counts alike in a mean of statistics.

    None is of a single image, which a batch norm may refuse, if there are more.
    """
    return list(images.tensor_split(-(-len(images) // suitable_batch(images))))


def _fit(layer: nn.Linear, features: Tensor, target: Tensor, ridge: float) -> None:
    """Ridge regression of the target (N, classes) on the features (N, F), into the layer; its bias is not penalised."""
    offset = target.mean(0) if layer.bias is not None else torch.zeros_like(target[0])
    centre = features.mean(0) if layer.bias is not None else torch.zeros_like(features[0])
    features, target = features - centre, target - offset
    penalty = ridge * features.square().sum() / features.shape[1]
    # the same solution through the smaller of two systems: as many unknowns as images, or as features
    few = len(features) < features.shape[1]
    gram = features @ features.T if few else features.T @ features
    gram.diagonal().add_(penalty.clamp_min(1e-12))  # the features may all be dead
    solved = torch.linalg.solve(gram, target if few else features.T @ target)
    weight = (features.T @ solved if few else solved).T
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(offset - weight @ centre)


@torch.no_grad()
def outputs(network: nn.Module, images: Tensor) -> Tensor:
    """The network's output in evaluation mode, float32, (N, classes)."""
    with evaluating(network), half_precision(images.device):
        parts = [network(batch).float() for batch in images.split(suitable_batch(images))]
    return torch.cat(parts)


def options_of(given: dict[str, Any] | None) -> dict[str, Any]:
    """Options of `Evaluator` by name, an unknown one named."""
    known = list(inspect.signature(Evaluator).parameters)
    for name in named(given, "evaluation"):
        one_of("option of the evaluator", name, known[known.index("images") :])
    return given or {}


class Evaluator:
    """Accuracy in percent of the network that keep masks leave, on fixed validation images.

    Called with a keep mask per group. Equal masks are evaluated once.

    Args:
        network: the trained, unpruned network; untouched.
        groups: its filter groups.
        data: validation images are measured on, training images recalibrated on. None with ``measure``
            alone: then nothing is recalibrated, fitted again or fine-tuned.
        measure: slim network → number, in place of the accuracy on the validation images.
        images: how many validation images, at most.
        recalibration: how many training images to recover on, 2 or more, see `recover`; 0 for not at all.
        ridge: see `recover`; 0 for batch norm alone.
        finetune_steps: steps of SGD between recalibration and measurement.
        finetune_rate: their learning rate, to begin with.
        seed: of the fine-tuning batches and of dropout, the same for every candidate.

    Attributes:
        evaluations: candidates measured so far, repetitions not counted.
        sample: the training images and labels that candidates are recalibrated on, normalised; None without.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: FilterGroups,
        data: Dataset | None,
        measure: Callable[[nn.Module], float] | None = None,
        images: int = 1000,
        recalibration: int = 500,
        ridge: float = 0.1,
        finetune_steps: int = 0,
        finetune_rate: float = 0.003,
        seed: int = 0,
    ) -> None:
        whole_each(
            images=(images, 1), recalibration=(recalibration, 0), finetune_steps=(finetune_steps, 0), seed=(seed, 0)
        )
        if not 0 <= ridge < inf or not 0 < finetune_rate < inf:
            raise InputError(
                f"The evaluator needs a finetune_rate above 0 and no negative ridge, not {finetune_rate=}, {ridge=}."
            )
        if not isinstance(data, Dataset | None):
            raise InputError("The evaluator's data must be a Dataset: rlprune.own.dataset_of makes one.")
        if data is None and measure is None:
            raise InputError(
                "There is nothing to judge pruned networks by: give data, or a function evaluate(network)."
            )
        if finetune_steps and data is not None:
            changeable(network)
        data = suited(network, data) if data is not None else None
        self.network, self.groups, self.data, self.measure = network, groups, data, measure
        self.finetune_steps, self.finetune_rate, self.seed = finetune_steps, finetune_rate, seed
        self.ridge = ridge
        self.calibration = self.target = self.sample = None
        if data is not None:
            self.split = data.validation[slice(0, images)]
            if measure is None or finetune_steps:
                check_classes(network, data)
            if recalibration and (most := min(recalibration, len(data.train))) < 2:
                raise InputError(f"Recovery needs at least 2 training images, not {most}; recalibration=0 needs none.")
            if recalibration:
                chosen = data.train[slice(0, recalibration)]
                self.calibration = data.normalise(chosen.images)
                self.sample = self.calibration, chosen.labels
                self.target = outputs(network, self.calibration) if ridge else None
        self.evaluations = 0
        self._known: dict[bytes, float] = {}

    def candidate(self, masks: list[Tensor]) -> nn.Module:
        """The slim network of these masks, recovered as far as it is before it is measured."""
        network = slim(self.network, self.groups, masks)
        if self.data is None:
            return network.eval()
        network.to(memory_format=self.data.memory_format)
        if self.calibration is not None:
            recover(network, self.calibration, self.target, self.ridge)
        if self.finetune_steps:
            with seeded(self.seed, self.data.device):
                self._finetune(network)
        return network.eval()

    def recalibrate(self, network: nn.Module) -> None:
        """The part of recovery that a trained network gets: its batch norm's statistics, as far as candidates get any.

        Its last layer is trained already; fitted again it would go back to the unpruned network's output.
        """
        if self.calibration is not None:
            recover(network, self.calibration)

    def __call__(self, masks: list[Tensor]) -> float:
        """Accuracy in percent, or what ``measure`` returns.

        Raises:
            InputError: ``measure`` raises, or returns no finite number.
        """
        key = torch.cat(masks).cpu().numpy().tobytes()
        if key not in self._known:
            self.evaluations += 1
            self._known[key] = self.judge(self.candidate(masks))
        return self._known[key]

    def judge(self, network: nn.Module) -> float:
        """The reward of a network as it is; raises as calling does."""
        if self.measure is None:
            return accuracy(network, self.data, self.split)
        try:
            value = self.measure(network)
        except Exception as error:  # whatever the caller's own code raises
            raise InputError(f"evaluate(network) failed with {type(error).__name__}: {error}") from error
        return finite(value, "evaluate(network)")

    @learning
    def _finetune(self, network: nn.Module) -> None:
        """A few steps of SGD at a falling rate, the same batches for every candidate."""
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.SGD(network.parameters(), lr=self.finetune_rate, momentum=0.9)
        batch_size = min(128, len(self.data.train))
        network.train()
        epochs = (self.data.augmented(batch_size, generator, epoch) for epoch in count())
        for step, (images, labels) in enumerate(islice(chain.from_iterable(epochs), self.finetune_steps)):
            loss = F.cross_entropy(training_logits(network, images).float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.param_groups[0]["lr"] = self.finetune_rate * (1 - step / self.finetune_steps)
            optimizer.step()
