"""A dataset as a few tensors on one device, in three disjoint splits.

Images stay uint8 and channels-last in memory for as long as they can: a batch
is one gather that crops and flips at once, and only then becomes floating point.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlprune.errors import InputError
from rlprune.sources import arrays_of, content_hash, data_folder


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes:
        images: uint8, (N, C, H, W), channels-last in memory.
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
        mean, std: per channel, of the training split, in units of 0…1, shape (C,).
        flip: whether a mirrored image is still of its class.
        source: where the images came from, in words.
        sha256: hash of the content before splitting.
        split_seed: seed of the division into training and validation.
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
    padded: Tensor = field(repr=False)

    PAD = 4  # pixels on each side from which a crop may start, as is usual on CIFAR

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    @property
    def example(self) -> Tensor:
        """One normalised training image, (1, C, H, W): an example input for tracing."""
        return self.normalise(self.train.images[:1])

    def to(self, device: torch.device | str) -> "Dataset":
        moved = {
            name: getattr(self, name).to(device) for name in ("train", "validation", "test", "mean", "std", "padded")
        }
        return replace(self, **moved)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) → float32 of zero mean and unit variance, memory format kept."""
        scale = 1 / (255 * self.std)
        return images * scale[:, None, None] - (self.mean / self.std)[:, None, None]

    def augmented(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch over the training split, shuffled, cropped at random, mirrored at random.

        Args:
            batch_size: images a batch; a last, smaller batch is dropped, so that
                batch norm never sees a handful.
            generator: on the CPU; all randomness comes from it.

        Yields:
            normalised images (B, C, H, W) and labels (B,).
        """
        size = self.train.images.shape[-1]
        order = torch.randperm(len(self.train), generator=generator)
        offsets = torch.randint(0, 2 * self.PAD + 1, (2, len(order)), generator=generator)
        mirror = torch.rand(len(order), generator=generator) < (0.5 if self.flip else 0.0)
        pixels = torch.arange(size)
        rows = offsets[0][:, None] + pixels
        columns = offsets[1][:, None] + torch.where(mirror[:, None], size - 1 - pixels, pixels)
        order, rows, columns = (t.to(self.device) for t in (order, rows, columns))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            part = slice(start, start + batch_size)
            picked = self.padded[order[part, None, None], rows[part, :, None], columns[part, None, :]]
            yield self.normalise(picked.permute(0, 3, 1, 2)), self.train.labels[order[part]]

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
    dataset = from_splits(train, test, name, validation, seed, name.startswith("cifar"), source, digest)
    return dataset.to(device)


def from_tensors(images: Tensor, labels: Tensor, validation: float = 0.2, seed: int = 0, flip: bool = False) -> Dataset:
    """A dataset of one's own; half of what is set aside serves as validation, half as test.

    Args:
        images: uint8, (N, C, H, W).
        labels: whole numbers from 0, (N,).
        validation: share set aside for validation and test together.
        seed: of the division.
        flip: whether a mirrored image is still of its class.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
        raise InputError(
            f"Own images must be a uint8 tensor (N, C, H, W) with N labels, not {images.dtype} "
            f"{tuple(images.shape)} with {len(labels)} labels."
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out = max(1, round(len(images) * validation / 2))
    everything = Split(images.contiguous(memory_format=torch.channels_last), labels.long())
    digest = content_hash({"images": images.cpu().numpy(), "labels": labels.cpu().numpy()})
    rest, test = everything[order[held_out:]], everything[order[:held_out]]
    return from_splits(rest, test, "own", validation / 2, seed, flip, "tensors given by the caller", digest)


def from_splits(
    train: Split, test: Split, name: str, validation: float, seed: int, flip: bool, source: str, sha256: str
) -> Dataset:
    """Set part of ``train`` aside for validation and gather a `Dataset`."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held_out = round(len(train) * validation)
    validation_split, train = train[order[:held_out]], train[order[held_out:]]
    scaled = train.images[:10000].float() / 255
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3)).clamp_min(1e-3)
    # Reflection keeps the statistics of natural images at the border; zeros would add a black frame.
    padded = torch.nn.functional.pad(train.images.float(), [Dataset.PAD] * 4, mode="reflect").byte()
    return Dataset(
        name=name,
        train=train,
        validation=validation_split,
        test=test,
        classes=int(torch.cat([train.labels, test.labels]).max()) + 1,
        mean=mean,
        std=std,
        flip=flip,
        source=source,
        sha256=sha256,
        split_seed=seed,
        padded=padded.permute(0, 2, 3, 1).contiguous(),
    )


def from_numpy(images: np.ndarray, labels: np.ndarray) -> Split:
    """A `Split` of uint8 images, channels first, and their labels."""
    tensor = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
    return Split(tensor, torch.from_numpy(labels.astype(np.int64)))
