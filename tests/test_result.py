"""What a search returns: saved without code, loaded without searching, exported."""

import copy
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from rlprune import Budget, costs, load, networks, peers
from rlprune.errors import InputError

SMALL = {"images": 150, "recalibration": 150}


def uniform(network, example, data, share=0.2):
    return peers.uniform(network, example, [Budget("parameters", share)], data, evaluation=SMALL)


@pytest.fixture(scope="module")
def found(_trained, digits):
    return uniform(_trained, digits.example, digits)


def test_another_process_writes_the_same_bytes(tmp_path, found, monkeypatch):
    found.save(tmp_path / "one")
    monkeypatch.setattr(os, "getpid", lambda: 12345678)
    found.save(tmp_path / "two")
    for file in ("weights.pt", "pruning.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.fixture(scope="module")
def images(digits):
    return digits.normalise(digits.test.images[:8])


def test_saved_result_loads_again(tmp_path, digits, images):
    network = networks.build("resnet20").eval()
    result = uniform(network, digits.example, digits)
    result.save(tmp_path / "r")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["history.csv", "pruning.json", "weights.pt"]
    again = load(tmp_path / "r")
    assert torch.equal(again.network(images), result.network(images))
    assert again.costs == result.costs
    assert again.widths == result.widths
    (tmp_path / "r" / "weights.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(InputError, match="is cut off or holds no weights"):
        load(tmp_path / "r")
    torch.save(networks.build("resnet20").state_dict(), tmp_path / "r" / "weights.pt")
    with pytest.raises(InputError, match="weights of another network"):
        load(tmp_path / "r")
    with pytest.raises(InputError, match="There is no"):
        load(tmp_path / "absent")
    result.save(tmp_path / "r")
    (tmp_path / "r" / "history.csv").write_text("")
    with pytest.raises(InputError, match="history.csv is absent or cut off"):
        load(tmp_path / "r")


def test_a_result_that_was_half_written_over_another_is_none(found, trained, tmp_path, monkeypatch):
    found.save(tmp_path)
    other = dataclasses.replace(found, network=copy.deepcopy(found.network), reward=1.0)
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *args, **options: 1 / 0)  # killed behind its weights
    with pytest.raises(ZeroDivisionError):
        other.save(tmp_path)
    with pytest.raises(InputError, match="There is no"):
        load(tmp_path, trained)


def test_a_result_that_is_refused_leaves_the_folder_as_it_was(found, trained, tmp_path):
    found.save(tmp_path)
    broken = copy.deepcopy(found)
    broken.network.classifier.weight.data.mul_(1e9)
    with pytest.raises(InputError, match="too large for half precision"):
        broken.save(tmp_path, half=True)
    assert load(tmp_path, trained).widths == found.widths
    with pytest.raises(InputError, match="There is no saved result in"):
        load(tmp_path / "absent")


def test_own_network_needs_its_architecture_to_load(found, trained, tmp_path, images):
    found.save(tmp_path)
    with pytest.raises(InputError, match="a pruned network of your own"):
        load(tmp_path)
    assert torch.allclose(load(tmp_path, trained).network(images), found.network(images), atol=1e-6)


@pytest.mark.parametrize("lies", [torch.channels_last, torch.contiguous_format])
def test_a_loaded_network_lies_in_memory_as_the_delivered_one(found, trained, tmp_path, lies):
    network = copy.deepcopy(found.network).to(memory_format=lies)  # what was measured must be as fast when loaded
    dataclasses.replace(found, network=network).save(tmp_path)
    kernels = [tensor for tensor in load(tmp_path, trained).network.parameters() if tensor.ndim == 4]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=lies) for kernel in kernels)


def test_an_agent_of_another_result_does_not_stay(found, trained, tmp_path):
    dataclasses.replace(found, agent={"shape": "any"}).save(tmp_path)
    assert load(tmp_path, trained).agent == {"shape": "any"}
    found.save(tmp_path)
    assert load(tmp_path, trained).agent is None


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3)
        self.last, self.twin = torch.nn.Linear(8, 2), torch.nn.Linear(8, 2)
        self.twin.weight = self.last.weight

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x.mean((2, 3))) + self.twin(x.amax((2, 3)))


def test_what_modules_share_they_share_when_loaded(tmp_path):
    example = torch.zeros(1, 3, 8, 8)
    found = peers.uniform(Tied(), example, [Budget("parameters", 0.6)], evaluate=lambda network: 1.0)
    found.save(tmp_path)
    again = load(tmp_path, Tied()).network
    assert again.twin.weight is again.last.weight
    assert costs.parameters(again, example) == found.costs["parameters"]["value"]


def test_exported_onnx_computes_the_same(found, tmp_path, digits):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = found.export_onnx(tmp_path / "slim.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = digits.normalise(digits.test.images[:5])
    (logits,) = session.run(None, {"images": images.numpy(force=True).astype(np.float32)})
    assert np.abs(logits - found.network(images).detach().numpy()).max() < 1e-4
    assert path.stat().st_size < 4.5 * sum(p.numel() for p in found.network.parameters()) + 10000


def test_half_precision_weights_are_half_the_size(found, trained, tmp_path, images):
    found.save(tmp_path / "full")
    found.save(tmp_path / "half", half=True)
    full, half = ((tmp_path / name / "weights.pt").stat().st_size for name in ("full", "half"))
    assert half < 0.75 * full  # a small network: names and counts are a part of it
    again = load(tmp_path / "half", trained).network
    assert all(p.dtype == torch.float32 for p in again.parameters())
    expected = found.network(images)
    assert (again(images) - expected).abs().max() < 0.01 * expected.abs().max()
    found.network.classifier.bias.data[0] += 1e6
    with pytest.raises(InputError, match="classifier.bias holds values too large for half precision"):
        found.save(tmp_path / "over", half=True)
    found.network.classifier.bias.data[0] -= 1e6
    assert not (tmp_path / "over").exists() or not list((tmp_path / "over").iterdir())


def test_a_network_of_torchvision_loads_by_its_name(tmp_path):
    network = networks.build("torchvision.mobilenet_v3_small", classes=10).eval()
    example = torch.zeros(1, 3, 64, 64)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    result = peers.uniform(network, example, [Budget("macs", 0.5)], evaluate=lambda pruned: 0.0)
    result.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path).network(images), result.network(images))
    with pytest.raises(InputError, match="another architecture"):
        load(tmp_path, networks.build("vgg11"))
    with pytest.raises(InputError, match="Unknown network of torchvision 'resnet19'"):
        networks.build("torchvision.resnet19")


FOREIGN = """
import sys
sys.modules["rlprune"] = sys.modules["torch_pruning"] = None  # importing either fails
import torch
images = torch.load({images!r})
torch.save(torch.export.load({program!r}).module()(images), {out!r})
"""


def test_an_exported_program_runs_without_rlprune(found, tmp_path, images):
    torch.save(images, tmp_path / "images.pt")
    path = found.export_program(tmp_path / "slim.pt2")
    paths = {"images": tmp_path / "images.pt", "program": path, "out": tmp_path / "out.pt"}
    script = FOREIGN.format(**{key: str(value) for key, value in paths.items()})
    subprocess.run([sys.executable, "-c", script], check=True)
    assert torch.allclose(torch.load(tmp_path / "out.pt"), found.network(images), atol=1e-5)


def test_loading_needs_no_search_code(found, trained, tmp_path):
    found.save(tmp_path)
    script = f"""
import sys
for name in ("torch_pruning", "rlprune.agent", "rlprune.env", "rlprune.search", "rlprune.groups"):
    sys.modules[name] = None
from rlprune import load, networks
load({str(tmp_path)!r}, networks.VGG([16, "M", 32, "M", 32, 32, "M"]))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_cannot_be_exported_is_told_in_a_sentence(tmp_path):
    layers = [torch.nn.Conv2d(3, 8, 3, padding="same", dilation=2), torch.nn.ReLU(), torch.nn.Conv2d(8, 6, 3)]
    network = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 2))
    found = peers.uniform(network.eval(), torch.zeros(1, 3, 8, 8), [Budget("macs", 0.6)], evaluate=lambda n: 1.0)
    with pytest.raises(InputError) as error:
        found.export_onnx(tmp_path / "a.onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_network_in_double_precision_is_exported(found, tmp_path):
    double = dataclasses.replace(found, network=copy.deepcopy(found.network).double())
    program = torch.export.load(double.export_program(tmp_path / "a.pt2")).module()
    example = torch.zeros(3, *found.input_shape, dtype=torch.float64)
    assert torch.allclose(program(example), double.network(example))


@pytest.mark.parametrize("change", ["stride", "pooling"])
def test_a_network_changed_since_it_was_built_is_needed_to_load(digits, tmp_path, change):
    network = networks.build("resnet20")
    if change == "stride":
        network.stem[0].stride = (2, 2)
    else:
        network.pool = nn.AdaptiveMaxPool2d(1)
    images = torch.randn(2, 3, 32, 32)
    result = peers.uniform(
        network, images[:1], [Budget("parameters", 0.3)], evaluate=lambda network: 0.0, progress=False
    )
    result.save(tmp_path)
    with pytest.raises(InputError, match="hand its unpruned architecture to load"):
        load(tmp_path)
    assert torch.equal(load(tmp_path, network).network.eval()(images), result.network.eval()(images))


@pytest.mark.parametrize("name", [*networks.NAMES, "torchvision.resnet18", "torchvision.regnet_y_400mf"])
def test_a_network_as_it_was_built_is_known_by_name(name):
    network = networks.build(name, classes=7)
    assert networks.architecture_of(network) == {"name": name, "classes": 7}


def test_a_loaded_network_is_as_frozen_as_the_saved_one(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    network.requires_grad_(False)
    budget = Budget("parameters", 0.6)
    result = peers.uniform(network, torch.randn(1, 3, 8, 8), [budget], evaluate=lambda network: 0.0, progress=False)
    result.save(tmp_path)
    again = load(tmp_path, network).network
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert again[1].num_features == again[0].out_channels == result.network[1].num_features < 8


def test_an_attribute_of_ones_own_is_no_architecture():
    network = nn.Linear(3, 2)
    network.architecture = {"name": "mine", "classes": 2}
    assert networks.architecture_of(network) == {}
