"""What a teacher says of the images of a training run, kept for the next network that is shown the same ones.

Every method of an experiment is fine-tuned on the same stream of crops and mirror images, which a seed decides. So the
teacher, far larger than the networks that it teaches, need look at each of them once, and not once a network.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from rlprune.data import Dataset
from rlprune.files import read_checkpoint, save_tensors, weights_hash

Answer = Callable[[Tensor], Tensor]


class Lessons:
    """A teacher's outputs on the images of one training run, a file an epoch.

    A file's name holds what its content depends on: the teacher's weights, the data (`Dataset.identity`), the seed of
    shuffling, crops and mirror images, and the batch size. So one folder serves any number of teachers and runs, and
    two runs at the same epoch at once merely do the same work twice.

    Args:
        teacher: in evaluation mode.
        data: whose `rlprune.data.Dataset.augmented` batches are shown.
        batch_size: images a batch.
        seed: of the training run.
        folder: where the files lie; None: nothing is kept.
    """

    def __init__(self, teacher: nn.Module, data: Dataset, batch_size: int, seed: int, folder: Path | None) -> None:
        self.teacher, self.folder = teacher, folder
        what = [*data.identity(), batch_size, seed]
        if folder is not None:
            self.run = hashlib.sha256(repr([weights_hash(teacher), *what]).encode()).hexdigest()

    @contextmanager
    def epoch(self, number: int) -> Iterator[Answer]:
        """The teacher for one epoch: called on each of its batches, in order, it answers from the file if there is one.

        Yields:
            (B, C, H, W) → (B, classes).

        Raises:
            InputError: a file that is cut off.
        """
        if self.folder is None:
            yield self.teacher
            return
        path = self.folder / f"{self.run[:16]}-{number}.pt"
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
