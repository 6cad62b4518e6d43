"""Where datasets come from: files checked before use, official archives, scikit-learn's digits."""

import contextlib
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch

from rlprune.errors import InputError, one_of
from rlprune.files import write_atomically

NAMES = ["digits", "cifar10", "cifar100", "svhn"]
ARRAYS = ["train_images", "train_labels", "test_images", "test_labels"]

# what reading a damaged .npz file raises; a RuntimeError where it then seems to be encrypted or packed otherwise
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)
OFFICIAL = "official archive, md5 verified by torchvision"

# Copies whose content is known not to be the official one, by content hash.
KNOWN_COPIES = {
    "6dfebda1771c5ebc99eb898be006ff85cfafeca468a00d8f8be17d6833047952": (
        "copy of CIFAR-10 in which 104 of 60,000 images (81 training, 23 test) are decoded from JPEG"
    ),
}


def data_folder(root: str | Path = ".") -> Path:
    """Where datasets lie: ``$RLPRUNE_DATA`` if set, else ``data`` in the project's folder ``root``."""
    return Path(os.environ.get("RLPRUNE_DATA") or Path(root) / "data")


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
    with _opened(path, remedy) as archive:
        missing = [name for name in ARRAYS if name not in archive.files]
        if missing:
            raise InputError(f"{path} lacks {', '.join(missing)}: {remedy}.")
        arrays = {name: archive[name] for name in ARRAYS}
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
        if len(labels) and labels.min() < 0:
            raise InputError(f"{split}_labels in {path} hold {labels.min()}, and they count from 0: {remedy}.")
    sizes = [arrays[f"{split}_images"].shape[2:] for split in ("train", "test")]
    if sizes[0] != sizes[1]:
        raise InputError(f"Training images in {path} are {sizes[0]} and test images {sizes[1]}: {remedy}.")
    return arrays


@contextlib.contextmanager
def _opened(path: Path, remedy: str) -> Iterator[np.lib.npyio.NpzFile]:
    """A dataset file to be read from; `InputError` as soon as it shows that it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            yield archive
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"{path} is cut off or no .npz file ({error}): delete it, then {remedy}.") from error


def fetch(name: str, folder: str | Path | None = None) -> Path | None:
    """Make sure that a dataset is at hand; download it from its official source if not.

    torchvision checks the archive's published md5. An archive that lies in
    ``folder`` already (from ``dvc update data.dvc``, say) is used without a network.

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

        def write(partial: Path) -> None:
            with partial.open("wb") as file:  # to a path np.savez would add .npz
                np.savez(file, **arrays, source=np.array(OFFICIAL))

        write_atomically(target, write)
    return target


def arrays_of(name: str, folder: Path) -> tuple[dict[str, np.ndarray], str, str]:
    """A dataset's four arrays, their origin in words, and their content hash.

    Raises:
        InputError: unknown name, or a file that is absent, cut off or malformed.
    """
    one_of("dataset", name, NAMES)
    if name == "digits":
        arrays, source = _digits(), "scikit-learn's load_digits, 8×8 scaled to 32×32"
    else:
        path = folder / f"{name}.npz"
        remedy = f"run `python -m rlprune fetch {name}`, or set RLPRUNE_DATA to its folder"
        arrays, source = read_npz(path, remedy), _source(path, remedy)
    digest = content_hash(arrays)
    return arrays, KNOWN_COPIES.get(digest, source), digest


def _source(path: Path, remedy: str) -> str:
    """What `fetch` noted in a dataset file; a file from elsewhere says nothing of its origin."""
    with _opened(path, remedy) as archive:
        return str(archive["source"]) if "source" in archive.files else f"a file {path.name} of unrecorded origin"


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
