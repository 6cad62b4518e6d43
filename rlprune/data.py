"""A dataset as a few tensors on one device, in three disjoint splits.

Images stay uint8 and channels-last in memory for as long as they can: a batch
is one gather that crops and flips at once, and only then becomes floating point.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

from rlprune.errors import InputError, one_of

NAMES = ["digits", "cifar10", "cifar100", "svhn"]
ARRAYS = ["train_images", "train_labels", "test_images", "test_labels"]

# Copies whose content is known not to be the official one, by content hash.
KNOWN_COPIES = {
    "6dfebda1771c5ebc99eb898be006ff85cfafeca468a00d8f8be17d6833047952": (
        "copy of CIFAR-10 in which 104 of 60,000 images (81 training, 23 test) are decoded from JPEG"
    ),
}


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
        name: one of `NAMES`.
        folder: where ``<name>.npz`` lies; by default `data_folder()`. ``digits``
            comes with scikit-learn and needs none.
        validation: share of the training images set aside for validation.
        seed: of that division. The test images are the official ones (for
            ``digits``: a fixed, stratified fifth).
        device: where the tensors shall live.

    Raises:
        InputError: unknown name, or a file that is absent, cut off or malformed.
    """
    one_of("dataset", name, NAMES)
    if not 0 < validation < 1:
        raise InputError(f"The validation share must lie between 0 and 1, not {validation!r}.")
    if name == "digits":
        arrays, source = _digits(), "scikit-learn's load_digits, 8×8 scaled to 32×32"
    else:
        path = Path(folder) if folder is not None else data_folder()
        path = path / f"{name}.npz"
        arrays = read_npz(path, remedy=f"run `python -m rlprune fetch {name}`, or set RLPRUNE_DATA to its folder")
        source = "official archive through torchvision"
    digest = content_hash(arrays)
    source = KNOWN_COPIES.get(digest, source)
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


def data_folder() -> Path:
    """Where datasets lie: ``$RLPRUNE_DATA`` if set, else ``data`` in the working directory."""
    return Path(os.environ.get("RLPRUNE_DATA") or "data")


def content_hash(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes of the arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()


def read_npz(path: Path, remedy: str = "make it again") -> dict[str, np.ndarray]:
    """The four arrays of a dataset file, checked for presence, type and shape.

    Raises:
        InputError: the file is absent, cut off, or not of the form that the README gives.
    """
    if not path.is_file():
        raise InputError(f"There is no dataset file {path}: {remedy}.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in ARRAYS if name not in archive.files]
            if missing:
                raise InputError(f"{path} lacks {', '.join(missing)}: {remedy}.")
            arrays = {name: archive[name] for name in ARRAYS}
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is cut off or no .npz file ({error}): delete it, then {remedy}.") from error
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                f"{split}_images in {path} must be uint8 of shape (N, 3, H, W), not {images.dtype} "
                f"{images.shape}: {remedy}."
            )
        if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu":
            raise InputError(
                f"{split}_labels in {path} must be {len(images)} whole numbers, not {labels.dtype} "
                f"{labels.shape}: {remedy}."
            )
    return arrays


def fetch(name: str, folder: str | Path | None = None) -> Path | None:
    """Make sure that a dataset is at hand; download it from its official source if not.

    torchvision checks the archive's published md5. An archive that lies in
    ``folder`` already (from ``dvc pull data.dvc``, say) is used without a network.

    Returns:
        the path of ``<name>.npz``, or None for ``digits``, which needs no file.

    Raises:
        InputError: unknown name, or no network and no file.
    """
    one_of("dataset", name, NAMES)
    if name == "digits":
        return None
    folder = Path(folder) if folder is not None else data_folder()
    target = folder / f"{name}.npz"
    if not target.exists():
        arrays = _official(name, folder)
        partial = target.with_suffix(".partial.npz")
        try:
            np.savez(partial, **arrays)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _official(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The official images through torchvision, as the four arrays."""
    from rlprune._torchvision import torchvision

    datasets = torchvision().datasets
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    try:
        for split in ("train", "test"):
            if name == "svhn":
                part = datasets.SVHN(str(folder), split=split, download=True)
                images, labels = part.data, part.labels
            else:
                kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
                part = kind(str(folder), train=split == "train", download=True)
                images, labels = part.data.transpose(0, 3, 1, 2), np.array(part.targets)
            arrays[f"{split}_images"] = np.ascontiguousarray(images)
            arrays[f"{split}_labels"] = labels.astype(np.uint8)
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"{name} is neither in {folder} nor to be had from its official source ({error}): connect to the "
            f"network and try again, or set RLPRUNE_DATA to a folder that holds {name}.npz."
        ) from error
    return arrays


def _digits() -> dict[str, np.ndarray]:
    """scikit-learn's scanned digits, 8×8 with values to 16, as 3×32×32 images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    images = images.round().byte().expand(-1, 3, -1, -1).numpy()
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    parts = [images[train], digits.target[train], images[test], digits.target[test]]
    return dict(zip(ARRAYS, map(np.ascontiguousarray, parts), strict=True))
