"""The reward of many candidates, fast: slice, recalibrate, measure.

A pruned network that has not recovered answers at random, whatever its widths,
so that its accuracy says nothing. Measuring the batch-norm statistics of the
slim network again on a few hundred images (EagleEye, Li et al. 2020, section 3.3)
lets it recover far enough for the accuracy to rank candidates, at the price of
one or two forward passes of a small network.
"""

from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlprune.data import Dataset
from rlprune.errors import InputError
from rlprune.groups import FilterGroups
from rlprune.masking import slim
from rlprune.training import accuracy, half_precision

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def recalibrate(network: nn.Module, images: Tensor, batch_size: int = 250) -> None:
    """Measure the running statistics of every batch norm again, in place.

    Args:
        network: any network; its weights stay as they are.
        images: normalised, (N, C, H, W), on the network's device.
        batch_size: images a forward pass; the statistics are the mean over the passes.
    """
    norms = [m for m in network.modules() if isinstance(m, _NORMS) and m.track_running_stats]
    if not norms:
        return
    training = network.training
    network.eval()  # dropout stays off
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    with half_precision(images.device):
        for batch in images.split(batch_size):
            network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.train(training)


class Evaluator:
    """Accuracy in percent of the network that keep masks leave, on fixed validation images.

    Called with a keep mask per group. Equal masks are evaluated once.

    Args:
        network: the trained, unpruned network; untouched.
        groups: its filter groups.
        data: validation images are measured on, training images recalibrated on.
        images: how many validation images, at most.
        recalibration: how many training images to recalibrate batch norm on; 0 for none.
        finetune_steps: steps of SGD between recalibration and measurement.
        finetune_rate: their learning rate.
        seed: of the fine-tuning batches, the same for every candidate.

    Attributes:
        evaluations: candidates measured so far, repetitions not counted.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: FilterGroups,
        data: Dataset,
        images: int = 1000,
        recalibration: int = 500,
        finetune_steps: int = 0,
        finetune_rate: float = 0.01,
        seed: int = 0,
    ) -> None:
        if images < 1 or recalibration < 0 or finetune_steps < 0:
            raise InputError(
                "The evaluator needs at least 1 image and no negative counts, not "
                f"images={images}, recalibration={recalibration}, finetune_steps={finetune_steps}."
            )
        self.network, self.groups, self.data = network, groups, data
        self.split = data.validation[slice(0, images)]
        self.calibration = data.normalise(data.train[slice(0, recalibration)].images) if recalibration else None
        self.finetune_steps, self.finetune_rate, self.seed = finetune_steps, finetune_rate, seed
        self.evaluations = 0
        self._known: dict[bytes, float] = {}

    def candidate(self, masks: list[Tensor]) -> nn.Module:
        """The slim network of these masks, recovered as far as it is before it is measured."""
        network = slim(self.network, self.groups, masks).to(memory_format=torch.channels_last)
        if self.calibration is not None:
            recalibrate(network, self.calibration)
        if self.finetune_steps:
            self._finetune(network)
        return network.eval()

    def __call__(self, masks: list[Tensor]) -> float:
        """Accuracy in percent; see the class."""
        key = torch.cat(masks).cpu().numpy().tobytes()
        if key not in self._known:
            self.evaluations += 1
            self._known[key] = accuracy(self.candidate(masks), self.data, self.split)
        return self._known[key]

    def _finetune(self, network: nn.Module) -> None:
        """A few steps of SGD at a constant rate, the same batches for every candidate."""
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.SGD(network.parameters(), lr=self.finetune_rate, momentum=0.9)
        batch_size = min(128, len(self.data.train))
        network.train()
        steps = 0
        while steps < self.finetune_steps:
            for images, labels in islice(self.data.augmented(batch_size, generator), self.finetune_steps - steps):
                with half_precision(images.device):
                    loss = F.cross_entropy(network(images), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                steps += 1
