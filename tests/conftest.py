"""What several tests share: digits, and a small network trained on them."""

import os
from pathlib import Path

# AMX adds up in an order of its own, and a few tests of what a short training reaches hang on it. Read as torch starts;
# a processor without AVX-512 is unaffected.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rlprune import data, networks, training

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _threads():
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(scope="session")
def digits():
    return data.load("digits", validation=0.2)


@pytest.fixture(scope="session")
def _trained(digits):
    torch.manual_seed(0)
    network = networks.VGG([16, "M", 32, "M", 32, 32, "M"], classes=10)
    schedule = training.Training(epochs=4, batch_size=16, learning_rate=0.05)
    training.fit(network, digits, schedule, progress=None)
    return network.eval()


@pytest.fixture
def trained(_trained):
    """A small VGG with about 95 % accuracy on digits; a test must leave it as it is."""
    before = {name: tensor.clone() for name, tensor in _trained.state_dict().items()}
    yield _trained
    assert all(torch.equal(tensor, before[name]) for name, tensor in _trained.state_dict().items())
    assert not _trained.training


class Viewing(nn.Module):
    """Code that runs only where channel lies after channel in memory."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 36, 10)

    def forward(self, images):
        images = F.max_pool2d(self.first(images).relu(), 2)
        images = F.max_pool2d(self.second(images).relu(), 2)
        return self.last(images.view(images.size(0), -1))


@pytest.fixture
def viewing():
    return Viewing


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory):
    """A folder with cifar10.npz, where this machine has one."""
    if os.environ.get("RLPRUNE_DATA") and (Path(os.environ["RLPRUNE_DATA"]) / "cifar10.npz").exists():
        return Path(os.environ["RLPRUNE_DATA"])
    unpack = ROOT.parent / "shared" / "data" / "unpack.py"
    if not unpack.exists():
        pytest.skip("CIFAR-10 is not on this machine: set RLPRUNE_DATA to a folder with cifar10.npz")
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(unpack), str(folder), "cifar10"], check=True, capture_output=True)
    return folder
