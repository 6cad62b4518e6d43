"""What filters matter by single criteria, and the features that an agent sees."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rlprune import networks, trace
from rlprune.errors import InputError
from rlprune.importance import FEATURES, features, scores

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Gated(nn.Module):
    """Two convolutions, one with batch norm; a gate behind each, of which `taylor` is the derivative."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.second, self.last = nn.Conv2d(5, 4, 3), nn.Linear(4, 3)
        with torch.no_grad():
            self.norm.weight.uniform_(0.2, 2)
            self.norm.running_mean.normal_()
        self.gates = None

    def forward(self, x):
        x = self.norm(self.first(x))
        x = self.second(F.relu(x * self.gates[0][:, None, None]) if self.gates else F.relu_(x))
        x = F.relu(x * self.gates[1][:, None, None]) if self.gates else F.relu_(x)
        return self.last(x.mean((2, 3)))


def sample(count=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 3


def test_taylor_is_the_derivative_with_respect_to_a_gate():
    network = Gated().eval()
    images, labels = sample()
    squares = [torch.zeros(5), torch.zeros(4)]
    for image, label in zip(images, labels, strict=True):
        network.gates = [torch.ones(5, requires_grad=True), torch.ones(4, requires_grad=True)]
        F.cross_entropy(network(image[None]), label[None]).backward()
        for square, gate in zip(squares, network.gates, strict=True):
            square += gate.grad**2
    network.gates = None
    network.zero_grad()
    found = scores(network, trace(network, EXAMPLE), "taylor", (images, labels))
    for score, square in zip(found, squares, strict=True):
        expected = square.sqrt() / square.sqrt().mean()
        assert torch.allclose(score, expected, rtol=1e-4)
    assert all(p.grad is None for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_taylor_in_front_of_an_instance_norm_is_taken_behind_it():
    class Normed(Gated):  # which cancels any gate in front of it
        def __init__(self):
            super().__init__()
            self.norm = nn.InstanceNorm2d(5, affine=True)
            with torch.no_grad():
                self.norm.weight.uniform_(0.2, 2)

        def forward(self, x):
            x = F.relu(self.norm(self.first(x)))
            x = F.relu(self.second(x * self.gates[0][:, None, None] if self.gates else x))
            return self.last(x.mean((2, 3)))

    network = Normed().eval()
    images, labels = sample()
    square = torch.zeros(5)
    for image, label in zip(images, labels, strict=True):
        network.gates = [torch.ones(5, requires_grad=True)]
        F.cross_entropy(network(image[None]), label[None]).backward()
        square += network.gates[0].grad ** 2
    network.gates = None
    found = scores(network, trace(network, EXAMPLE), "taylor", (images, labels))[0]
    assert torch.allclose(found, square.sqrt() / square.sqrt().mean(), rtol=1e-3)


def test_taylor_of_a_linear_layer_on_tokens_is_that_of_its_features():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.made, self.read, self.head = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(F.gelu(self.read(F.gelu(self.made(x.flatten(2).mT)))).mean(1))

    network = Tokens().eval()
    with torch.no_grad():
        network.made.weight[2], network.made.bias[2], network.read.weight[:, 2] = 0, 0, 0  # a filter that does nothing
    value = scores(network, trace(network, EXAMPLE), "taylor", sample(), relative=False)[0]
    assert value.shape == (6,)
    assert value[2] == 0
    assert value.count_nonzero() == 5


def test_taylor_leaves_gradients_and_frozen_weights_alone():
    network = Gated().requires_grad_(False)
    network.last.weight.grad = torch.full((3, 4), 7.0)
    scores(network, trace(network, EXAMPLE), "taylor", sample())
    assert (network.last.weight.grad == 7).all()
    assert network.training


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "torchvision.mobilenet_v3_small"])
def test_features_are_comparable_between_networks(name):
    network = networks.build(name).eval()
    example = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
    groups = trace(network, example)
    found = features(network, groups, (torch.randn(4, 3, 64, 64), torch.arange(4)))
    for group, of_group in zip(groups, found, strict=True):
        assert of_group.shape == (group.size, len(FEATURES))
        assert torch.isfinite(of_group).all()
        assert of_group.abs().max() <= 3
        assert of_group.mean(0).abs().max() < 0.3  # clipped after it was centred
    without = features(network, groups)
    taylor = FEATURES.index("taylor")
    assert all((of_group[:, taylor] == 0).all() for of_group in without)
    assert any((of_group[:, taylor] != 0).any() for of_group in found)


def test_features_of_known_filters():
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 4.0]])[:, :, None, None])
        network[3].weight.copy_(torch.tensor([[1, 2, 3, 4.0], [1, 2, 3, 4.0]]))
    (found,) = features(network, trace(network, EXAMPLE))
    columns = dict(zip(FEATURES, found.T, strict=True))
    for name, raw in {"magnitude": [1, 2, 1, 4], "outgoing": [2, 4, 6, 8], "distinct": [0, 0, 1, 1]}.items():
        raw = torch.tensor(raw, dtype=torch.float32)
        assert torch.allclose(columns[name], (raw - raw.mean()) / raw.std(), atol=1e-5)
    assert (columns["batchnorm"] == 0).all()


def test_bad_input_is_named():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    groups = trace(network, EXAMPLE)
    with pytest.raises(InputError, match="Unknown criterion 'size'"):
        scores(network, groups, "size")
    with pytest.raises(InputError, match="'taylor' needs data"):
        scores(network, groups, "taylor")
    with pytest.raises(InputError, match="Group 0 has no batch norm"):
        scores(network, groups, "batchnorm")


def test_taylor_of_a_layer_that_runs_twice_is_that_of_one_gate():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

        def forward(self, images):
            return self.last((self.shared(images) - self.shared(images)).mean((2, 3)))

    network = Twins()
    (score,) = scores(network, trace(network, EXAMPLE), "taylor", sample(), relative=False)
    assert score.abs().max() < 1e-6  # the two cancel: without a filter nothing changes
