"""Data of one's own: tensors, loaders, image folders."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from rlprune import own
from rlprune.errors import InputError
from rlprune.forward import accuracy
from rlprune.own import dataset_of, from_folder, from_loader, from_tensors
from rlprune.training import Training, fit

EXAMPLE = torch.zeros(1, 3, 16, 12)


def pair(count=40, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 12), generator=generator, dtype=torch.uint8)
    return images.to(dtype), torch.arange(count) % 4


def test_bytes_are_normalised_and_floats_are_left_alone():
    images, labels = pair()
    own = dataset_of((images, labels), EXAMPLE)
    assert (len(own.train), len(own.validation), len(own.test), own.classes) == (32, 8, 0, 4)
    assert own.normalise(own.train.images).mean().abs() < 1e-4
    wanted = images.double() / 7 - 3
    own = dataset_of((wanted, labels), EXAMPLE)
    batches = [part for part, _ in own.augmented(8, torch.Generator().manual_seed(0))]
    known = {image.numpy().tobytes() for image in wanted.float()}
    assert all(image.contiguous().numpy().tobytes() in known for batch in batches for image in batch)


def test_images_that_are_not_square_are_cropped_and_mirrored_whole():
    images = torch.arange(12, dtype=torch.uint8).expand(40, 3, 16, 12).contiguous()
    own = from_tensors(images, torch.zeros(40, dtype=torch.long), flip=True, crop=2)
    batch, _ = next(own.augmented(16, torch.Generator().manual_seed(0)))
    assert batch.shape == (16, 3, 16, 12)
    rising = (batch[:, 0, 0, 8] > batch[:, 0, 0, 3]).sum()
    assert 0 < rising < 16


def test_a_loader_gives_its_first_images():
    images, labels = pair(dtype=torch.float32)
    loader = DataLoader(TensorDataset(images, labels), batch_size=7)
    own = dataset_of(loader, EXAMPLE)
    assert len(own.train) + len(own.validation) == 40
    assert len(from_loader(loader, most=10).train) == 8
    whole = torch.cat([own.train.images, own.validation.images])
    assert {i.numpy().tobytes() for i in whole.contiguous()} == {i.numpy().tobytes() for i in images}


def test_a_loader_class_by_class_is_refused_where_classes_would_be_missed():
    images, labels = pair()
    loader = DataLoader(TensorDataset(images, labels.sort().values), batch_size=8)
    for most, last in ((16, 1), (8, 0)):
        with pytest.raises(InputError, match=f"first {most} the last ones are of class {last}: shuffle it"):
            from_loader(loader, most=most)
    assert from_loader(loader, most=40).classes == 4  # all are seen


@pytest.mark.parametrize("batch_size", [40, 14])
def test_a_loader_class_by_class_is_refused_where_its_last_batch_is_cut(batch_size):
    images, labels = pair()
    loader = DataLoader(TensorDataset(images, labels.sort().values), batch_size=batch_size)
    with pytest.raises(InputError, match="first 30 the last ones are of class 2: shuffle it"):
        from_loader(loader, most=30)


def test_images_left_out_are_told_of_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "MOST", 30)
    loader = DataLoader(TensorDataset(*pair()), batch_size=40)
    for number in range(32):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 12, 3), number, dtype=np.uint8)).save(tmp_path / str(number % 2) / f"{number}.png")
    for given, function in ((loader, from_loader), (tmp_path, from_folder)):
        with pytest.warns(UserWarning, match=rf"30 images are used, .* rlprune.own.{function.__name__}\(…, most=…\)"):
            found = dataset_of(given, EXAMPLE)
        assert len(found.train) + len(found.validation) == 30
        with warnings.catch_warnings(action="error"):
            function(given, most=20)
            function(given, most=40)


def test_images_that_numpy_does_not_know():
    images, labels = pair()
    own = dataset_of((images.bfloat16().requires_grad_(), labels), EXAMPLE)
    assert own.train.images.dtype == torch.float32


def test_a_network_of_other_numbers_than_the_images_is_refused():
    for kind in (torch.float64, torch.bfloat16):
        with pytest.raises(InputError, match=f"example input is {str(kind)[6:]}, .* come to a network as float32"):
            dataset_of(pair(), EXAMPLE.to(kind))


def test_an_image_folder_with_a_class_per_subfolder(tmp_path):
    for label, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        for number in range(5):
            picture = np.full((40, 30, 3), 100 * label + number, dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / name / f"{number}.png")
    own = dataset_of(tmp_path, torch.zeros(1, 3, 24, 24))
    assert own.train.images.shape == (8, 3, 24, 24)
    assert ((own.train.images[:, 0, 0, 0] >= 100).long() == own.train.labels).all()
    assert own.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert len(from_folder(tmp_path, most=4).train) == 3
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="0.png cannot be read as an image"):
        dataset_of(tmp_path, EXAMPLE)
    with pytest.raises(InputError, match="is no image folder"):
        dataset_of(tmp_path / "cat", EXAMPLE)
    with pytest.raises(InputError, match="is no image folder"):
        dataset_of(str(tmp_path / "absent"), EXAMPLE)


def test_a_folder_of_grey_images_for_a_network_of_one_channel(tmp_path):
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("L", (20, 24), level + number).save(tmp_path / name / f"{number}.png")
    own = dataset_of(tmp_path, EXAMPLE[:, :1])
    assert own.train.images.shape[1:] == (1, 16, 12)
    assert own.normalise(own.train.images).mean().abs() < 1e-4
    with pytest.raises(InputError, match=r"The images have 1 channel\(s\) and the statistics 3"):
        from_folder(tmp_path, grey=True)
    for size, words in (((0, 8), "height must be a whole number of at least 1"), (16, "size must be a pair")):
        with pytest.raises(InputError, match=words):
            from_folder(tmp_path, size)


def test_batches_of_several_sizes_are_named():
    batches = [(torch.zeros(4, 3, side, side), torch.arange(4)) for side in (8, 9)]
    with pytest.raises(InputError, match=r"images of shapes \(3, 8, 8\) and \(3, 9, 9\)"):
        from_loader(batches)


def test_tensors_may_be_numpy_arrays():
    images, labels = pair()
    own = from_tensors(images.numpy(), labels.numpy(), test=(images[:4].numpy(), labels[:4].numpy()))
    assert (len(own.train), len(own.validation), len(own.test)) == (32, 8, 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, "data must be"),
        (torch.zeros(3), "data must be"),
        ((torch.zeros(4, 3, 8), torch.zeros(4).long()), r"tensor \(N, C, H, W\)"),
        ((torch.zeros(4, 3, 16, 12), torch.zeros(5).long()), "with N labels"),
        ((torch.zeros(4, 3, 16, 12), torch.zeros(4)), "whole numbers from 0, not torch.float32"),
        ((torch.zeros(4, 3, 16, 12), torch.tensor([0, 1, -1, 0])), "whole numbers from 0, not torch.int64 from -1"),
        ((torch.full((4, 3, 16, 12), np.nan), torch.zeros(4).long()), "not finite"),
        ((torch.zeros(4, 3, 12, 16), torch.zeros(4).long()), "the example input"),
        ((torch.zeros(1, 3, 16, 12), torch.zeros(1).long()), "too few"),
        ([], "holds no batch"),
        ([torch.zeros(4, 3, 16, 12)], "pairs of tensors"),
    ],
)
def test_bad_data_is_named(data, words):
    with pytest.raises(InputError, match=words):
        dataset_of(data, EXAMPLE)


@pytest.mark.parametrize("crop", [-1, 12, 1.5])
def test_a_crop_as_large_as_the_images_is_refused(crop):
    with pytest.raises(InputError, match=r"crop must be a whole number from 0 and less than a side of \(16, 12\)"):
        from_tensors(torch.zeros(8, 3, 16, 12), torch.zeros(8).long(), crop=crop)


@pytest.mark.parametrize("test", [torch.zeros(2, 3, 16, 12, dtype=torch.uint8), torch.zeros(2, 1, 16, 12)])
def test_test_images_of_another_kind_are_refused(test):
    with pytest.raises(InputError, match="test images are .* and the others float32"):
        from_tensors(torch.zeros(8, 3, 16, 12), torch.zeros(8).long(), test=(test, torch.zeros(2).long()))


def test_numpy_arrays_and_images_one_by_one():
    images, labels = pair()
    given = dataset_of((images.numpy(), labels.numpy()), EXAMPLE)
    assert torch.equal(given.train.images, dataset_of((images, labels), EXAMPLE).train.images)
    with pytest.raises(InputError, match="in batches, not image by image"):
        dataset_of(list(zip(images, labels, strict=True)), EXAMPLE)


def test_functions_that_want_a_dataset_say_so():
    images, network = pair(dtype=torch.float32), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(576, 4))
    for call in (lambda: fit(network, images, Training()), lambda: accuracy(network, images, images)):
        with pytest.raises(InputError, match="Dataset: rlprune.own.from_tensors makes one"):
            call()


def test_how_many_images_and_which_share_is_checked_at_once(tmp_path):
    loader = DataLoader(TensorDataset(*pair()), batch_size=7)
    for most in (0, 1, -1, 2.5):
        for function, given in ((from_loader, loader), (from_folder, tmp_path)):
            with pytest.raises(InputError, match="most must be a whole number of at least 2"):
                function(given, most=most)
    for share in (0, 1.5, -1):
        for function, given in ((from_loader, loader), (from_folder, tmp_path)):
            with pytest.raises(InputError, match="validation share must lie between 0 and 1"):
                function(given, validation=share)
