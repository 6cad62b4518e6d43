import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masking import case, random_masks
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from rlprune import costs
from rlprune.costs import Budget, Predictor
from rlprune.errors import InputError
from rlprune.groups import trace
from rlprune.masking import slim, widths

IMAGES = torch.zeros(2, 3, 32, 32)
predicted = functools.cache(lambda name: Predictor(*case(name), IMAGES))


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50", "mixed"])
def test_macs_agree_with_torchs_own_counter(name):
    network, groups = case(name)
    for candidate in (network, slim(network, groups, random_masks(groups, 7))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            candidate(IMAGES[:1])
        assert costs.macs(candidate, IMAGES) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
        assert costs.macs(candidate, IMAGES) == costs.macs(candidate, IMAGES[:1])


def test_layers_called_by_keyword_are_counted_alike():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.last = nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Linear(4, 5)

        def forward(self, x):
            return self.last(input=self.up(input=x).mean((2, 3)))

    assert costs.macs(Named().eval(), torch.zeros(1, 3, 8, 8)) == 3 * 4 * 4 * 64 + 4 * 5


def test_known_numbers():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    images = torch.zeros(4, 3, 6, 6)  # → 3×3 → 1×1
    assert costs.parameters(network, images) == 216 + 16 + 80 + 18
    assert costs.macs(network, images) == 9 * 216 + 72 + 16
    # the input, what the convolution makes, and batch norm's result of the same size, in float32 of 4 images
    assert costs.peak_memory(network, images) == 4 * 4 * (108 + 72 + 72)


def test_a_residual_input_stays_in_memory():
    class Residual(nn.Module):
        def forward(self, x):
            y = x + 1  # x, y
            z = y.relu().exp()  # x, y, relu, exp
            del y
            return (z + x).mean((2, 3))

    assert costs.peak_memory(Residual(), IMAGES) == 4 * IMAGES.nbytes
    assert costs.peak_memory(Residual(), IMAGES[:1]) == 2 * IMAGES.nbytes  # not the storage it is a view of


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["mixed", "resnet20", "vgg11"]), st.integers(0, 2**31))
def test_predictions_are_exact(name, seed):
    network, groups = case(name)
    masks = random_masks(groups, seed)
    small = slim(network, groups, masks)
    assert predicted(name).parameters(widths(masks)) == costs.parameters(small, IMAGES)
    assert predicted(name).macs(widths(masks)) == costs.macs(small, IMAGES)


def test_what_a_layer_with_a_computed_weight_costs_is_predicted():
    tail = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 16, 3))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), normed, *tail).eval()
    groups = trace(network, IMAGES)
    predictor = Predictor(network, groups, IMAGES)
    for masks in ([torch.ones(group.size, dtype=torch.bool) for group in groups], random_masks(groups, 3)):
        small = slim(network, groups, masks)
        assert predictor.macs(widths(masks)) == costs.macs(small, IMAGES)
        assert predictor.parameters(widths(masks)) == costs.parameters(small, IMAGES)


def test_predictor_checks_the_number_of_widths():
    with pytest.raises(InputError, match="5 widths"):
        predicted("mixed").macs([1, 2])


@pytest.mark.parametrize("cost", costs.COSTS.values())
def test_every_cost_falls_and_leaves_the_network_as_it_was(cost):
    network, groups = case("vgg11")
    small = slim(network, groups, [torch.arange(g.size) < g.size // 4 for g in groups])
    small.train()
    small.features[1].eval()
    modes = [module.training for module in small.modules()]
    state = {key: value.clone() for key, value in small.state_dict().items()}
    value = cost(small, IMAGES)
    assert isinstance(value, float)
    assert 0 < value < cost(network, IMAGES)
    assert [module.training for module in small.modules()] == modes
    assert all(torch.equal(tensor, state[key]) for key, tensor in small.state_dict().items())
    assert not any(module._forward_hooks for module in small.modules())
    if cost is not costs.latency:
        assert cost(small, IMAGES) == value


def test_onnx_bytes_is_about_the_weights():
    network, _ = case("vgg11")
    assert costs.onnx_bytes(network, IMAGES) == pytest.approx(4 * costs.parameters(network, IMAGES), rel=0.01)


def my_cost(network, example_input):
    return 7.0


def test_budget_limits():
    share = Budget(costs.parameters, 0.1)
    assert (share.name, share.limit, share.relative) == ("parameters", 0.1, True)
    assert Budget("parameters", 0.1) == share
    assert share.is_named("parameters")
    assert not share.is_named("macs")
    absolute = Budget(my_cost, 2.5e6, relative=False, name="mine")
    assert (absolute.name, absolute.limit, absolute.relative) == ("mine", 2.5e6, False)
    assert not absolute.is_named("mine")
    assert Budget(functools.partial(my_cost), 0.5).name == "partial"


@pytest.mark.parametrize(
    ("cost", "limit", "relative", "words"),
    [
        ("params", 0.1, True, "Unknown cost 'params'. Use one of: parameters, macs, latency, peak_memory, onnx_bytes"),
        (3, 0.1, True, "must be a function"),
        (my_cost, 0, True, "my_cost must be a share"),
        (my_cost, -1, False, "my_cost must be a finite number above 0"),
        (my_cost, 1.5, True, "relative=False"),
        (my_cost, math.nan, True, "not nan"),
        (my_cost, math.inf, False, "not inf"),
        (my_cost, "0.1", True, "not '0.1'"),
    ],
)
def test_bad_budgets(cost, limit, relative, words):
    with pytest.raises(InputError) as error:
        Budget(cost, limit, relative)
    assert words in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, None, "3", [1], torch.ones(2), 1j])
def test_a_cost_that_returns_nonsense_is_named(value):
    def odd(network, example_input):
        return value

    with pytest.raises(InputError, match="The cost odd must return a finite number"):
        Budget(odd, 0.5).measure(nn.Identity(), IMAGES)


def test_what_a_cost_of_ones_own_does_to_the_network_does_not_stay():
    def halved(network, example_input):
        return sum(tensor.nbytes for tensor in network.half().state_dict().values())

    network = nn.Linear(4, 2)
    assert Budget(halved, 0.5).measure(network, torch.zeros(1, 4)) == 2 * (4 * 2 + 2)
    assert network.weight.dtype == torch.float32


def test_what_a_cost_of_ones_own_does_to_its_input_does_not_stay():
    network, example = nn.Linear(3, 2), torch.ones(1, 3)
    assert Budget(lambda network, images: images.mul_(2).sum(), 1, relative=False).measure(network, example) == 6
    assert torch.equal(example, torch.ones(1, 3))


def test_a_name_that_is_none_is_named():
    with pytest.raises(InputError, match="A budget's name must be text, not 3"):
        Budget("parameters", 0.5, name=3)


def test_a_cost_that_raises_is_named():
    def broken(network, example_input):
        assert not network.training
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError("by nought")

    network = nn.Identity()
    with pytest.raises(InputError, match="The cost broken failed with ZeroDivisionError: by nought"):
        Budget(broken, 0.5).measure(network, IMAGES)
    assert network.training
    assert Budget(lambda *_: torch.tensor(3), 0.5, name="three").measure(network, IMAGES) == 3.0


def test_counting_leaves_a_weight_with_a_state_as_it_was():
    network = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
    ).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    example = torch.zeros(1, 3, 8, 8)
    assert costs.macs(network, example) == 36 * 27 * 8 + 16 * 72 * 8 + 1280
    groups = trace(network, example)
    assert Predictor(network, groups, example).macs([group.size for group in groups]) == costs.macs(network, example)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
