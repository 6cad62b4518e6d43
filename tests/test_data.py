"""Datasets: disjoint seeded splits, augmentation, and one sentence for every bad file."""

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprune import data, sources
from rlprune.errors import InputError
from rlprune.own import from_tensors

ROOT = Path(__file__).resolve().parents[1]


def arrays(n=20, m=10):
    rng = np.random.default_rng(0)
    images = lambda count: rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)  # noqa: E731
    return {
        "train_images": images(n),
        "train_labels": np.arange(n, dtype=np.uint8) % 10,
        "test_images": images(m),
        "test_labels": np.arange(m, dtype=np.uint8) % 10,
    }


def rows(split):
    return [image.numpy().tobytes() for image in split.images]


def test_digits_are_real_and_split_without_overlap(digits):
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1150, 287, 360)
    assert digits.train.images.shape[1:] == (3, 32, 32)
    assert digits.train.images.is_contiguous(memory_format=torch.channels_last)
    assert digits.classes == 10
    parts = [set(rows(getattr(digits, name))) for name in ("train", "validation", "test")]
    whole = set().union(*parts)
    assert sum(map(len, parts)) == len(whole)  # also: no image twice


def test_split_is_seeded_and_leaves_the_test_images_alone(digits):
    again, other = data.load("digits", validation=0.2), data.load("digits", validation=0.2, seed=1)
    assert torch.equal(again.validation.images, digits.validation.images)
    assert not torch.equal(other.validation.images, digits.validation.images)
    assert torch.equal(other.test.images, digits.test.images)
    assert other.describe()["split_seed"] == 1
    assert other.sha256 == digits.sha256


def test_normalised_training_images_have_zero_mean_and_unit_variance(digits):
    images = digits.normalise(digits.train.images)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.mean().abs() < 1e-4
    assert (images.std() - 1).abs() < 1e-3


def test_augmentation_is_a_crop_of_the_padded_image(digits):
    generator = torch.Generator().manual_seed(0)
    size, pad = 32, digits.pad
    known = {}
    for image, label in zip(digits.padded[:, :, :, 0], digits.train.labels, strict=True):
        windows = image.unfold(0, size, 1).unfold(1, size, 1).reshape(-1, size * size)
        known.setdefault(int(label), set()).update(w.numpy().tobytes() for w in windows[:: 2 * pad + 2])
    seen = hits = 0
    for images, labels in digits.augmented(64, generator):
        pixels = (images[:, 0] * digits.std[0] + digits.mean[0]) * 255
        for image, label in zip(pixels.round().byte(), labels, strict=True):
            seen += 1
            hits += image.contiguous().numpy().tobytes() in known[int(label)]
    assert seen == 1150 // 64 * 64
    # the diagonal windows are 9 of the 81 that a crop may take; with no crop at all, it would always be one of them
    assert seen / 30 < hits < seen / 4


def test_every_image_is_mirrored_in_every_other_epoch_if_it_keeps_its_class():
    rising = torch.arange(32, dtype=torch.uint8).expand(40, 3, 32, 32).clone()
    rising[:, 0, :, 0] = torch.arange(40, dtype=torch.uint8)[:, None]  # tells the images apart
    for flip in (True, False):
        own = from_tensors(rising, torch.zeros(40, dtype=torch.long), flip=flip)
        sides = [set(), set()]
        for epoch in (0, 1):
            (images, _), *_ = own.augmented(32, torch.Generator().manual_seed(0), epoch)
            for image in images:
                mirrored = bool(image[1, 0, 12] > image[1, 0, 18])
                sides[epoch].add((round(float(image[0, 0, 31 if mirrored else 0]), 3), mirrored))
        assert len(sides[0]) == len(sides[1]) == 32
        if flip:
            assert sides[1] == {(name, not mirrored) for name, mirrored in sides[0]}
            assert 0 < sum(mirrored for _, mirrored in sides[0]) < 32
        else:
            assert sides[0] == sides[1]
            assert not any(mirrored for _, mirrored in sides[0])


def test_npz_round_trip_and_hash(tmp_path):
    content = arrays()
    np.savez(tmp_path / "cifar10.npz", **content)
    loaded = data.load("cifar10", tmp_path, validation=0.25)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (15, 5, 10)
    assert loaded.flip
    assert loaded.source == "a file cifar10.npz of unrecorded origin"
    content["test_images"][0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "cifar10.npz", **content)
    assert data.load("cifar10", tmp_path).sha256 != loaded.sha256


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda a: a.pop("test_labels"), "lacks test_labels"),
        (lambda a: a.update(train_images=a["train_images"].astype(np.float32)), "must be uint8"),
        (lambda a: a.update(train_images=a["train_images"].transpose(0, 2, 3, 1)), r"shape \(N, 3, H, W\)"),
        (lambda a: a.update(train_labels=a["train_labels"][:-1]), "must be 20 whole numbers"),
        (lambda a: a.update(test_labels=a["test_labels"] / 2), "must be 10 whole numbers"),
        (lambda a: a.update(test_labels=a["test_labels"].astype(int) - 20), "test_labels in .* count from 0"),
        (lambda a: a.update(test_images=a["test_images"][..., :24]), r"are \(32, 32\) and test images \(32, 24\)"),
    ],
)
def test_malformed_file_is_one_sentence(tmp_path, change, fault):
    content = arrays()
    change(content)
    np.savez(tmp_path / "cifar10.npz", **content)
    with pytest.raises(InputError, match=fault) as error:
        data.load("cifar10", tmp_path)
    assert "cifar10.npz" in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0, 0.99))
def test_truncated_file_is_one_sentence(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    np.savez(folder / "cifar10.npz", **arrays(4, 4))
    whole = (folder / "cifar10.npz").read_bytes()
    (folder / "cifar10.npz").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="cut off"):
        data.load("cifar10", folder)


def test_damaged_file_is_one_sentence(tmp_path):
    path = tmp_path / "cifar10.npz"
    content = {name: array % 9 for name, array in arrays(4, 4).items()}  # or it would not become smaller
    np.savez_compressed(path, **content, source=np.array("nobody knows where they come from"))
    whole, end = path.read_bytes(), path.read_bytes().index(b"PK\x01\x02")
    # what numpy and zipfile then raise depends on the place: in the images, and in the words on where they come from
    for place in (*range(80, end // 3, end // 100), whole.rindex(b"source.npy", 0, end) + 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"cifar10\.npz is cut off or no \.npz file"):
            data.load("cifar10", tmp_path)


def test_identity_holds_all_that_decides_what_a_network_is_shown(digits):
    images, labels = digits.train.images[:50], digits.train.labels[:50]
    one = from_tensors(images, labels)
    others = [
        from_tensors(images, labels, flip=True),
        from_tensors(images, labels, crop=2),
        from_tensors(images, labels, seed=1),
        from_tensors(images, labels, validation=0.3),
        from_tensors(images, labels, test=(images[:5], labels[:5])),
        dataclasses.replace(one, mean=one.mean + 0.1),
        dataclasses.replace(one, std=one.std * 2),
    ]
    found = [json.dumps(each.identity()) for each in (one, *others)]
    assert len(set(found)) == len(found)
    assert json.dumps(from_tensors(images, labels).identity()) == found[0]


def test_absent_file_and_unknown_name(tmp_path):
    with pytest.raises(InputError, match=r"no dataset file .*cifar100\.npz: run `python -m rlprune fetch cifar100`"):
        data.load("cifar100", tmp_path)
    with pytest.raises(InputError, match="Unknown dataset 'cifar11'"):
        data.load("cifar11")
    with pytest.raises(InputError, match="validation share"):
        data.load("digits", validation=1.5)


def test_no_network_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("cifar10", "svhn"):
        with pytest.raises(InputError, match=f"{name} is neither in .* nor to be had .* set RLPRUNE_DATA"):
            sources.fetch(name, tmp_path / name)
        assert not [path for path in (tmp_path / name).rglob("*") if path.is_file()]


def test_official_images_become_the_four_arrays(tmp_path, monkeypatch):
    from rlprune._torchvision import torchvision

    content = arrays()

    class Official:
        def __init__(self, root, train, download):
            split = "train" if train else "test"
            self.data = content[f"{split}_images"].transpose(0, 2, 3, 1)  # as torchvision has them
            self.targets = content[f"{split}_labels"].tolist()

    monkeypatch.setattr(torchvision().datasets, "CIFAR10", Official)
    path = sources.fetch("cifar10", tmp_path)
    read = sources.read_npz(path)
    assert all(np.array_equal(read[name], content[name]) for name in sources.ARRAYS)
    assert data.load("cifar10", tmp_path).source == sources.OFFICIAL
    assert [p.name for p in tmp_path.iterdir()] == ["cifar10.npz"]


FETCH = """
import pathlib, sys, time
import numpy as np
from rlprune import sources

folder, savez = pathlib.Path(sys.argv[1]), np.savez

def meet(where):
    (folder / f"{where}.{sys.argv[2]}").touch()
    for _ in range(6000):
        if len(list(folder.glob(f"{where}.*"))) == 2:
            return
        time.sleep(0.01)

def official(name, folder):
    meet("had")
    images, labels = np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, np.uint8)
    return dict(train_images=images, train_labels=labels, test_images=images, test_labels=labels)

def written(*args, **arrays):
    savez(*args, **arrays)
    meet("written")

sources._official, np.savez = official, written
sources.fetch("cifar10", folder / "data")
"""


def test_two_processes_fetch_the_same_dataset(tmp_path):
    (tmp_path / "data").mkdir()
    both = [subprocess.Popen([sys.executable, "-c", FETCH, tmp_path, name], cwd=ROOT) for name in "ab"]
    assert [process.wait(120) for process in both] == [0, 0]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar10.npz"]
    assert len(sources.read_npz(tmp_path / "data/cifar10.npz")["test_images"]) == 4


def test_data_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RLPRUNE_DATA", str(tmp_path))
    assert sources.data_folder() == tmp_path
    monkeypatch.delenv("RLPRUNE_DATA")
    assert str(sources.data_folder()) == "data"


def test_copy_of_cifar10_says_what_it_is(cifar_folder):
    dataset = data.load("cifar10", cifar_folder, validation=0.05)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (47500, 2500, 10000)
    assert torch.equal(torch.bincount(dataset.test.labels), torch.full((10,), 1000))
    if dataset.sha256 in sources.KNOWN_COPIES:
        assert "104 of 60,000 images" in dataset.source
