"""What a teacher says of the images of a training run, kept for the next network that is shown the same ones.

Every method of an experiment is fine-tuned on the same stream of crops and mirror images, which a seed decides. So the
teacher, far larger than the networks that it teaches, need look at each of them once, and not once a network.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from rlprune.data import Dataset
from rlprune.files import read_checkpoint, save_tensors, weights_hash
from rlprune.forward import evaluating, half_precision

Answer = Callable[[Tensor], Tensor]


class Lessons:
    """A teacher's outputs on the images of one training run, a file an epoch.

    A file's name holds what its content depends on: the teacher's weights, the data (`Dataset.identity`), the seed of
    shuffling, crops and mirror images, and the batch size. So one folder serves any number of teachers and runs. Two
    runs at the same epoch at once do the same work twice, unless `prepare` has done it before.

    Args:
        teacher: in evaluation mode.
        data: whose `rlprune.data.Dataset.augmented` batches are shown.
        batch_size: images a batch.
        seed: of the training run.
        folder: where the files lie; None: nothing is kept.
    """

    def __init__(self, teacher: nn.Module, data: Dataset, batch_size: int, seed: int, folder: Path | None) -> None:
        self.teacher, self.data, self.batch_size, self.seed, self.folder = teacher, data, batch_size, seed, folder
        what = [*data.identity(), batch_size, seed]
        if folder is not None:
            self.run = hashlib.sha256(repr([weights_hash(teacher), *what]).encode()).hexdigest()

    def prepare(self, number: int) -> None:
        """Write the file of one epoch, as the network that learns from it first would; nothing if it is there."""
        path = self._path(number)
        if path is None or path.is_file():
            return
        generator = torch.Generator().manual_seed(self.seed)
        for earlier in range(1, number):  # all of an epoch is drawn before its first batch
            next(self.data.augmented(self.batch_size, generator, earlier))
        with torch.no_grad(), evaluating(self.teacher), half_precision(self.data.device), self.epoch(number) as answer:
            for images, _ in self.data.augmented(self.batch_size, generator, number):
                answer(images)

    @contextmanager
    def epoch(self, number: int) -> Iterator[Answer]:
        """The teacher for one epoch: called on each of its batches, in order, it answers from the file if there is one.

        Yields:
            (B, C, H, W) → (B, classes).

        Raises:
            InputError: a file that is cut off.
        """
        path = self._path(number)
        if path is None:
            yield self.teacher
            return
        if path.is_file():
            device = next(self.teacher.parameters()).device
            remembered = iter([said.to(device) for said in read_checkpoint(path, self.run)["answers"]])
            yield lambda images: next(remembered)
            return
        answers: list[Tensor] = []

        def answer(images: Tensor) -> Tensor:
            answers.append(self.teacher(images))
            return answers[-1]

        yield answer
        state = {"run": self.run, "answers": [said.cpu() for said in answers]}
        save_tensors(state, path)

    def _path(self, number: int) -> Path | None:
        return self.folder / f"{self.run[:16]}-{number}.pt" if self.folder is not None else None
