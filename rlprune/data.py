"""A dataset as a few tensors on one device, in three disjoint splits.

Images stay uint8 and channels-last in memory for as long as they can: a batch
is one gather that crops and flips at once, and only then becomes floating point.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlprune.errors import InputError
from rlprune.sources import arrays_of, data_folder

CROP = 4  # pixels, as is usual on CIFAR


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes:
        images: (N, C, H, W), channels-last in memory: uint8, or float32 as the network wants them.
        labels: int64, (N,).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, and what is needed to feed and to cite them.

    Attributes:
        name: as given to `load`.
        train, validation, test: see `Split`.
        classes: number of classes.
        mean, std: per channel, of the first 10,000 training images, in units of 0…1, shape (C,).
        flip: whether a mirrored image is still of its class.
        source: where the images came from, in words.
        sha256: hash of the content before splitting.
        split_seed: seed of the division into training and validation.
        pad: pixels on each side from which a random crop of a training image may start.
        padded: training images with those pixels, channels last.
        memory_format: of all images, see `rlprune.forward.suited`.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    mean: Tensor
    std: Tensor
    flip: bool
    source: str
    sha256: str
    split_seed: int
    pad: int
    padded: Tensor = field(repr=False)
    memory_format: torch.memory_format = torch.channels_last

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    @property
    def example(self) -> Tensor:
        """One normalised training image, (1, C, H, W), contiguous: an example input for tracing."""
        return self.normalise(self.train.images[:1]).contiguous()

    def to(self, device: torch.device | str) -> "Dataset":
        moved = {
            name: getattr(self, name).to(device) for name in ("train", "validation", "test", "mean", "std", "padded")
        }
        return replace(self, **moved)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) → float32 of zero mean and unit variance, memory format kept; float32 as it is."""
        if images.is_floating_point():
            return images
        scale = 1 / (255 * self.std)
        return images * scale[:, None, None] - (self.mean / self.std)[:, None, None]

    def contiguous(self) -> "Dataset":
        """The same images, channel after channel in memory."""
        splits = {name: getattr(self, name) for name in ("train", "validation", "test")}
        plain = {name: Split(split.images.contiguous(), split.labels) for name, split in splits.items()}
        return replace(self, **plain, memory_format=torch.contiguous_format)

    def augmented(self, batch_size: int, generator: torch.Generator, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch over the training split, shuffled, cropped at random, and mirrored every other time.

        Args:
            batch_size: images a batch; a last, smaller batch is dropped, so that
                batch norm never sees a handful.
            generator: on the CPU; all randomness comes from it.
            epoch: of a training run; an image is mirrored in the even or in the odd ones. So two epochs show
                both sides of it, where chance would show one of them twice half of the time (Jordan 2024, section 3.6).

        Yields:
            normalised images (B, C, H, W) and labels (B,).
        """
        height, width = self.train.images.shape[-2:]
        order = torch.randperm(len(self.train), generator=generator)
        offsets = torch.randint(0, 2 * self.pad + 1, (2, len(order)), generator=generator)
        mirror = (order + epoch) % 2 == 1 if self.flip else torch.zeros(len(order), dtype=torch.bool)
        across = torch.arange(width)
        rows = offsets[0][:, None] + torch.arange(height)
        columns = offsets[1][:, None] + torch.where(mirror[:, None], width - 1 - across, across)
        order, rows, columns = (t.to(self.device) for t in (order, rows, columns))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            part = slice(start, start + batch_size)
            picked = self.padded[order[part, None, None], rows[part, :, None], columns[part, None, :]]
            picked = picked.permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)
            yield self.normalise(picked), self.train.labels[order[part]]

    def identity(self) -> list[Any]:
        """All that decides which images a network is shown and how, as plain numbers: part of every checkpoint's key.

        The hash of the content says nothing of the division, of crops and mirror images, or of the normalisation.
        """
        sizes = [len(split) for split in (self.train, self.validation, self.test)]
        statistics = [self.mean.tolist(), self.std.tolist()]
        return [self.sha256, self.split_seed, sizes, self.pad, self.flip, *statistics]

    def describe(self) -> dict[str, object]:
        """What every result records of its data."""
        sizes = {f"{name}_images": len(getattr(self, name)) for name in ("train", "validation", "test")}
        return {
            "dataset": self.name,
            "source": self.source,
            "sha256": self.sha256,
            "split_seed": self.split_seed,
            **sizes,
        }


def load(
    name: str,
    folder: str | Path | None = None,
    validation: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Dataset:
    """A dataset by name, divided into training, validation and test.

    Args:
        name: one of `rlprune.sources.NAMES`.
        folder: where ``<name>.npz`` lies; by default `rlprune.sources.data_folder()`. ``digits``
            comes with scikit-learn and needs none.
        validation: share of the training images set aside for validation.
        seed: of that division. The test images are the official ones (for
            ``digits``: a fixed, stratified fifth).
        device: where the tensors shall live.

    Raises:
        InputError: unknown name, or a file that is absent, cut off or malformed.
    """
    if not 0 < validation < 1:
        raise InputError(f"The validation share must lie between 0 and 1, not {validation!r}.")
    arrays, source, digest = arrays_of(name, Path(folder) if folder is not None else data_folder())
    train = from_numpy(arrays["train_images"], arrays["train_labels"])
    test = from_numpy(arrays["test_images"], arrays["test_labels"])
    dataset = from_splits(train, test, name, validation, seed, name.startswith("cifar"), source, digest, CROP)
    return dataset.to(device)


def from_splits(
    train: Split,
    test: Split,
    name: str,
    validation: float,
    seed: int,
    flip: bool,
    source: str,
    sha256: str,
    pad: int,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Dataset:
    """Set part of ``train`` aside for validation and gather a `Dataset`.

    ``statistics`` are mean and std per channel, (C,), in units of 0…1, where the network wants given ones.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held_out = max(1, round(len(train) * validation))
    validation_split, train = train[order[:held_out]], train[order[held_out:]]
    if not len(train):
        raise InputError(f"{held_out} image(s) are too few to divide into training and validation: give more.")
    if statistics is None:
        scaled = train.images[:10000].float() / 255
        statistics = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3)).clamp_min(1e-3)
    padded = train.images
    if pad:
        # Reflection keeps the statistics of natural images at the border; zeros would add a black frame.
        padded = torch.nn.functional.pad(padded.float(), [pad] * 4, mode="reflect").to(padded.dtype)
    return Dataset(
        name=name,
        train=train,
        validation=validation_split,
        test=test,
        classes=int(torch.cat([train.labels, validation_split.labels, test.labels]).max()) + 1,
        mean=statistics[0],
        std=statistics[1],
        flip=flip,
        source=source,
        sha256=sha256,
        split_seed=seed,
        pad=pad,
        padded=padded.permute(0, 2, 3, 1).contiguous(),
    )


def from_numpy(images: np.ndarray, labels: np.ndarray) -> Split:
    """A `Split` of uint8 images, channels first, and their labels."""
    tensor = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
    return Split(tensor, torch.from_numpy(labels.astype(np.int64)))
