"""Data of one's own: tensors, a DataLoader, or a folder of images.

What is given as floating point is taken as the network wants it, and stays so;
bytes are scaled to zero mean and unit variance first.
"""

import warnings
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlprune.data import Dataset, Split, from_splits
from rlprune.errors import InputError, whole, whole_each
from rlprune.sources import content_hash

MOST = 3000  # images taken of a loader or folder: more than a search looks at, and they are kept in memory
IMAGENET = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
OwnData = Dataset | tuple[Tensor, Tensor] | str | Path | Iterable[tuple[Tensor, Tensor]]


def dataset_of(data: OwnData, example_input: Tensor, seed: int = 0) -> Dataset:
    """Whatever a caller has, as a `Dataset` on the device of the example input.

    Of a loader the first `MOST` images are taken, of a folder as many at random: more than a search looks at, but few
    to train on. A fifth of what is given, unless as a `Dataset`, is set aside for validation, and training images are
    neither cropped nor mirrored. So it is in fine-tuning, too (``prune(finetune=)``): hand over
    ``from_loader(…, most=)``, ``from_folder(…, most=)`` or ``from_tensors(…, crop=, flip=)`` for anything else.

    Args:
        data: a `Dataset`; a pair (images, labels); an iterable of such pairs, such as a
            DataLoader; or the path of an image folder.
        example_input: (N, C, H, W); the images must have its C, H, W. Those of a folder are brought to it.
        seed: of the division into training and validation.

    Raises:
        InputError: none of these, or images and labels that do not fit each other or the example input.
    """
    if example_input.dtype != torch.float32:  # as which all images come to a network
        kind = str(example_input.dtype).removeprefix("torch.")
        raise InputError(
            f"The example input is {kind}, and images come to a network as float32: turn the network and the example "
            "input into float32 with .float()."
        )
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, np.ndarray) for part in data):
        data = tuple(torch.from_numpy(part) for part in data)
    if isinstance(data, Dataset):
        dataset = data
    elif isinstance(data, str | Path):
        grey = example_input.shape[1] == 1
        statistics = None if grey else IMAGENET
        dataset = from_folder(data, tuple(example_input.shape[-2:]), seed=seed, statistics=statistics, grey=grey)
    elif isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        dataset = from_tensors(*data, seed=seed)
    elif isinstance(data, Iterable) and not isinstance(data, Tensor | dict):
        dataset = from_loader(data, seed=seed)
    else:
        raise InputError(
            f"data must be (images, labels), a DataLoader, the path of an image folder or a Dataset, not "
            f"{type(data).__name__}."
        )
    found, wanted = tuple(dataset.train.images.shape[1:]), tuple(example_input.shape[1:])
    if found != wanted:
        raise InputError(f"The images have shape {found} but the example input {wanted}: give both the same.")
    return dataset.to(example_input.device)


def from_tensors(
    images: Tensor,
    labels: Tensor,
    validation: float = 0.2,
    seed: int = 0,
    flip: bool = False,
    crop: int = 0,
    test: tuple[Tensor, Tensor] | None = None,
) -> Dataset:
    """A dataset from tensors.

    Args:
        images: (N, C, H, W), uint8, or floating point as the network wants them.
        labels: whole numbers from 0, (N,).
        validation: share set aside for validation.
        seed: of the division.
        flip: mirror training images at random.
        crop: pixels by which training images are shifted at random, at most.
        test: images and labels kept apart; the test split is empty without them.

    Raises:
        InputError: images and labels that do not fit each other, a share outside 0…1, or a crop that is no smaller than
            the images.
    """
    _check(None, validation)
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    # a plain copy of what numpy does not know, such as bfloat16
    images = images.detach().float() if images.is_floating_point() else images
    whole = _split(images, labels)
    kept_apart = _split(*map(torch.as_tensor, test)) if test is not None else whole[slice(0, 0)]
    if (kept_apart.images.shape[1:], kept_apart.images.dtype) != (whole.images.shape[1:], whole.images.dtype):
        raise InputError(
            f"The test images are {_kind(kept_apart.images)} and the others {_kind(whole.images)}: give both the same."
        )
    sides = whole.images.shape[-2:]
    if not isinstance(crop, Integral) or not 0 <= crop < min(sides):
        raise InputError(f"crop must be a whole number from 0 and less than a side of {tuple(sides)}, not {crop!r}.")
    digest = content_hash({"images": images.cpu().numpy(), "labels": labels.cpu().numpy()})
    source = "tensors given by the caller"
    return from_splits(whole, kept_apart, "own", validation, seed, flip, source, digest, crop, _statistics(images))


def from_loader(
    loader: Iterable[tuple[Tensor, Tensor]], most: int | None = None, validation: float = 0.2, seed: int = 0
) -> Dataset:
    """A dataset from batches (images, labels), such as those of a DataLoader: its first ``most`` images.

    They are used as the loader gives them, its own random crops and mirror images included. Without ``most`` they are
    `MOST`, with a warning if there are others.

    Raises:
        InputError: the loader gives something else, or nothing.
    """
    _check(most, validation)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    wanted, more = MOST if most is None else most, False
    for batch in loader:
        fits = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
        if fits and (batch[0].ndim < 2 or batch[1].ndim < 1):
            raise InputError("The data must come in batches, not image by image: hand over a DataLoader of it.")
        if not fits:
            raise InputError(f"The data must come in pairs of tensors (images, labels), not as {type(batch).__name__}.")
        if images and batch[0].shape[1:] != images[0].shape[1:]:
            shapes = f"{tuple(images[0].shape[1:])} and {tuple(batch[0].shape[1:])}"
            raise InputError(f"The loader's batches hold images of shapes {shapes}: bring all to one.")
        if more := sum(map(len, images)) >= wanted:
            break
        images.append(batch[0])
        labels.append(batch[1])
    if not images:
        raise InputError("The data holds no batch.")
    ahead = torch.cat(labels)[:wanted]
    if more or sum(map(len, images)) > wanted:
        if ahead.ndim == 1 and (ahead.diff() >= 0).all():
            raise InputError(
                f"The loader gives its images class by class, and of its first {wanted} the last ones are of class "
                f"{int(ahead[-1])}: shuffle it."
            )
        if most is None:
            _left_out("the first of a loader", "from_loader")
    return from_tensors(torch.cat(images)[:wanted], ahead, validation, seed)


def from_folder(
    folder: str | Path,
    size: tuple[int, int] = (224, 224),
    most: int | None = None,
    validation: float = 0.2,
    seed: int = 0,
    statistics: tuple[Tensor, Tensor] | None = IMAGENET,
    grey: bool = False,
) -> Dataset:
    """A dataset from a folder with one subfolder of images per class; class 0 is the first by name.

    Args:
        folder: its path.
        size: height and width that images are brought to: the shorter side is scaled to 8/7 of it (up to 64 pixels: to
            it) and the middle cut out, as torchvision's trained networks expect.
        most: images used, drawn at random if there are more; None for `MOST`, with a warning if there are.
        validation: share set aside for validation.
        seed: of the draw and the division.
        statistics: mean and std per channel in units of 0…1, (3,), that the network was trained
            with: ImageNet's, as of torchvision's; None for those of the images themselves.
        grey: give images one channel, and not three; statistics are then (1,) or None.

    Raises:
        InputError: no such folder, no images in it, a file that is no image, or a size that is none.
    """
    from rlprune._torchvision import torchvision

    _check(most, validation)
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise InputError(f"size must be a pair (height, width), not {size!r}.")
    whole_each(height=(size[0], 1), width=(size[1], 1))
    if statistics is not None and len(statistics[0]) != (channels := 1 if grey else 3):
        given = len(statistics[0])
        raise InputError(f"The images have {channels} channel(s) and the statistics {given}: give as many.")
    vision = torchvision()
    try:
        found = vision.datasets.ImageFolder(str(folder))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{folder} is no image folder: it must hold one subfolder per class, with images in each."
        ) from error
    scale = max(size) if max(size) <= 64 else round(max(size) * 8 / 7)
    bring = vision.transforms.Compose(
        [
            vision.transforms.Resize(scale),
            vision.transforms.CenterCrop(size),
            vision.transforms.PILToTensor(),
        ]
    )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    order = order[: MOST if most is None else most].tolist()
    if most is None and len(order) < len(found):
        _left_out(f"drawn from {len(found)} of a folder", "from_folder")
    images = []
    for index in order:
        try:
            image = found[index][0]
            images.append(bring(image.convert("L") if grey else image))
        except OSError as error:
            path = found.samples[index][0]
            raise InputError(f"{path} cannot be read as an image ({error}): mend or remove it.") from error
    pixels, labels = torch.stack(images), torch.tensor([found.targets[index] for index in order])
    whole = _split(pixels, labels)
    digest = content_hash({"images": pixels.numpy(), "labels": labels.numpy()})
    source = f"{len(order)} of {len(found)} images of a folder"
    return from_splits(whole, whole[slice(0, 0)], "own", validation, seed, False, source, digest, 0, statistics)


def _check(most: int | None, validation: float) -> None:
    """Raise `InputError` unless these say how many images are used, and which share of them validates."""
    if most is not None:
        whole(most, "most", 2)
    if not 0 < validation < 1:
        raise InputError(f"The validation share must lie between 0 and 1, not {validation!r}.")


def _left_out(which: str, function: str) -> None:
    """Warn of images that are not used."""
    warnings.warn(
        f"Of the data {MOST} images are used, {which}: for more, to fine-tune on, say, hand over "
        f"rlprune.own.{function}(…, most=…).",
        stacklevel=3,
    )


def _split(images: Tensor, labels: Tensor) -> Split:
    """Checked images and labels as a `Split`."""
    fits = images.ndim == 4 and labels.ndim == 1 and len(images) == len(labels)
    if not fits or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise InputError(
            "Own images must be a tensor (N, C, H, W), uint8 or floating point, with N labels, not "
            f"{images.dtype} {tuple(images.shape)} with labels {tuple(labels.shape)}; for anything but images give a "
            "function evaluate(network) in place of data."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool or (len(labels) and labels.min() < 0):
        raise InputError(f"Labels must be whole numbers from 0, not {labels.dtype} from {labels.min()}.")
    if images.is_floating_point():
        if not torch.isfinite(images).all():
            raise InputError("Own images hold values that are not finite.")
        images = images.float()
    return Split(images.contiguous(memory_format=torch.channels_last), labels.long())


def _kind(images: Tensor) -> str:
    return f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape[1:])}"


def _statistics(images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Zero mean and unit scale for images that are normalised already."""
    channels = images.shape[1] if images.ndim == 4 else 0
    return (torch.zeros(channels), torch.ones(channels)) if images.is_floating_point() else None
