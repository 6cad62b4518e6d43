"""SMOF: kernels shrink exactly, scales mean what they say, and what is delivered is within budget."""

import copy
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_masking import IMAGES, case, random_masks, snapshot, unchanged
from torch import nn

import rlprune
from rlprune import Budget, costs, networks, training
from rlprune.errors import InputError
from rlprune.evaluate import recover
from rlprune.masking import masked, slim
from rlprune.networks import build
from rlprune.peers.rings import Scales, depths, masked_rings, removable, without_rings
from rlprune.peers.smof import _Run, smof

SMALL = {"images": 287, "recalibration": 150}
QUICK = {"epochs": 3, "batch_size": 16, "progress": False, "evaluation": SMALL}
KINDS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


@pytest.fixture(scope="module")
def residual(digits):
    """A small ResNet of about 75 % accuracy on digits."""
    torch.manual_seed(0)
    network = networks.ResNet([1, 1], [8, 16])
    training.fit(network, digits, training.Training(epochs=4, batch_size=16, learning_rate=0.05), progress=None)
    return network.eval()


@pytest.fixture(scope="module")
def found(_trained, digits):
    return smof(_trained, digits.example, [Budget("parameters", 0.2)], digits, **QUICK)


def convolutions(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def agree(result, expected):
    return bool((result - expected).abs().max() <= 1e-5 * expected.abs().max())


# Kernels


@st.composite
def layers(draw):
    """Convolutions of all kinds, small inputs for them, and random tensors in both."""
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())

    def sides(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation = sides(1, 7 if dims < 3 else 4), sides(1, 2)
    groups = draw(st.integers(1, 3))
    same = draw(st.booleans()) and not transposed
    shape = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel,
        "stride": (1,) * dims if same else sides(1, 3),
        "padding": "same" if same else sides(0, 6),
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = KINDS[dims, transposed](**shape)
    images = torch.randn(2, shape["in_channels"], *sides(5, 9))
    try:
        assume(layer(images).numel())
    except RuntimeError:  # the kernel is larger than the image
        assume(False)
    return layer, images


@given(layers(), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_without_rings_a_convolution_computes_what_it_does_with_them_zero(drawn, wanted):
    layer, images = drawn
    network = nn.Sequential(layer)
    most = removable(network).get("0", 0)
    if layer.padding != "same":  # neither too few rings nor too many
        pairs = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
        needed = [(size - 1) // 2 for size in layer.kernel_size]
        room = [p // d if (size - 1) // 2 else 99 for size, p, d in pairs]
        steps = [r for r in range(1, 4) if any(n >= r for n in needed)]
        expected = itertools.takewhile(
            lambda r: all(min(r, n) <= free for n, free in zip(needed, room, strict=True)), steps
        )
        assert most == len(list(expected))
    count = min(wanted, most)
    before, weight = snapshot(network), layer.weight
    small = without_rings(network, {"0": count})
    with torch.no_grad(), masked_rings(network, {"0": count}):
        expected = network(images)
    result = small(images)
    assert result.shape == expected.shape
    assert agree(result, expected)
    assert small[0].kernel_size == tuple(max(k - 2 * count, 2 - k % 2) for k in layer.kernel_size)
    assert tuple(small[0].weight.shape[2:]) == small[0].kernel_size
    assert layer.weight is weight
    assert unchanged(network, before)
    again = type(layer)(  # the layer is as if made with that kernel
        layer.in_channels,
        layer.out_channels,
        small[0].kernel_size,
        layer.stride,
        small[0].padding,
        groups=layer.groups,
        bias=layer.bias is not None,
        dilation=layer.dilation,
    )
    again.load_state_dict(small[0].state_dict())
    assert torch.equal(again(images), result)


def test_rings_stay_where_they_cannot_leave_exactly():
    class Own(nn.Conv2d):
        pass

    def shared():
        pair = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))
        pair[1].weight = pair[0].weight
        return pair

    def computed():
        return nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3, padding=1))

    stay = [nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1)]
    stay += [nn.Conv2d(2, 2, 3, padding=1, dilation=2), nn.Conv2d(2, 2, 3, padding="valid"), computed(), shared()]
    stay += [Own(2, 2, 3, padding=1), nn.Conv2d(2, 2, 2, padding=1), nn.Conv2d(2, 2, (3, 5), padding=(1, 0))]
    for layer in stay:
        assert removable(nn.Sequential(layer)) == {}, layer
    assert removable(nn.Sequential(nn.Conv2d(2, 2, 7, padding=2), nn.Conv2d(2, 2, (3, 7), padding=3))) == {
        "0": 2,
        "1": 3,
    }
    network = nn.Sequential(nn.Conv2d(2, 2, 5, padding=1))
    for removed in ({"0": 2}, {"1": 1}, {"0": -1}):
        with pytest.raises(InputError, match="that can leave exactly"):
            without_rings(network, removed)
        with pytest.raises(InputError, match="that can leave exactly"), masked_rings(network, removed):
            pass


def test_depths_count_from_outside():
    assert depths(nn.Conv2d(1, 1, 5, padding=2)).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 2, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    assert depths(nn.Conv2d(1, 1, (1, 5), padding=2)).tolist() == [[0, 1, 2, 1, 0]]


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "grouped", "mixed"])
@pytest.mark.parametrize("seed", [0, 1])
def test_filters_and_rings_leave_together(name, seed):
    network, groups = case(name)
    masks = random_masks(groups, seed)
    removed = {layer: (number + seed) % (count + 1) for number, (layer, count) in enumerate(removable(network).items())}
    assert any(removed.values())
    before = snapshot(network)
    small = without_rings(slim(network, groups, masks), removed)
    with torch.no_grad(), masked(network, groups, masks), masked_rings(network, removed):
        expected = network(IMAGES)
    assert agree(small(IMAGES), expected)
    assert unchanged(network, before)
    kept = without_rings(network.to(memory_format=torch.channels_last), removed)
    name = next(layer for layer, count in removed.items() if not count) if 0 in removed.values() else None
    assert name is None or kept.get_submodule(name).weight.is_contiguous(memory_format=torch.channels_last)
    network.to(memory_format=torch.contiguous_format)


# Scales


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "grouped", "mixed", "excited"])
def test_scales_at_0_and_1_are_the_slim_network_and_its_costs(name):
    network, groups = case(name)
    masks = random_masks(groups, 3)
    scales = Scales(network, groups, IMAGES[:1], True)
    removed = {layer: number % 2 for number, layer in enumerate(scales.layers)}
    with torch.no_grad():
        for scale, mask in zip(scales.scales, masks, strict=False):
            scale.copy_(0.5 * mask)  # relative to the largest of the group
        for scale, count in zip(scales.scales[len(groups) :], removed.values(), strict=True):
            scale[:count] = 0
    small = without_rings(slim(network, groups, masks), removed)
    for sharp in (1.0, 0.05):
        assert scales.expected(sharp).tolist() == pytest.approx(
            [costs.parameters(small, IMAGES), costs.macs(small, IMAGES)], rel=1e-5
        )
    folded = scales.folded(network)
    with torch.no_grad():
        assert agree(folded(IMAGES), small(IMAGES))
        assert agree(torch.func.functional_call(network, scales.weights(network), (IMAGES,)), small(IMAGES))


def test_folded_scales_are_gates_on_what_is_read():
    """The same function by another way: a hook multiplies each filter where it is read."""
    network, groups = case("grouped")
    scales = Scales(network, groups, IMAGES[:1], False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scale in scales.scales:
            scale.uniform_(0.1, 1, generator=generator)
    modules, hooks = dict(network.named_modules()), []
    for group, value in zip(groups, scales.values(), strict=True):
        assert value.max() == 1
        for part in group.slices:
            if part.axis == "in":
                gate = torch.ones(part.length).index_put((part.index,), value.detach()[part.source])

                def multiply(module, inputs, gate=gate):
                    return (inputs[0] * (gate if inputs[0].ndim == 2 else gate[:, None, None]),)

                hooks.append(modules[part.module].register_forward_pre_hook(multiply))
    with torch.no_grad():
        expected = network(IMAGES)
        for hook in hooks:
            hook.remove()
        assert agree(scales.folded(network)(IMAGES), expected)
        assert not agree(network(IMAGES), expected)


def test_inner_rings_outlive_outer_ones():
    network = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2))
    example = torch.zeros(1, 3, 8, 8)
    scales = Scales(network, rlprune.trace(network, example), example, True)
    with torch.no_grad():
        scales.scales[1].copy_(torch.tensor([0.9, 0.5]))
    assert scales.values()[1].tolist() == pytest.approx([0.45, 0.5])
    with torch.no_grad():
        scales.scales[1][1] = 0
    assert scales.values()[1].tolist() == [0, 0]


@given(st.floats(0, 1), st.floats(0.05, 20))
@settings(max_examples=10, deadline=None)
def test_a_ring_fades_by_the_angle_that_it_turns_the_kernel(share, size):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2))
    example, ring = torch.zeros(1, 3, 8, 8), depths(network[0]) == 0

    def angle(weight):
        weight = weight.detach().double()
        return torch.atan2(weight[:, :, ring].norm(), weight[:, :, ~ring].norm()).item()

    with torch.no_grad():
        network[0].weight[:, :, ring] *= size
        scales = Scales(network, rlprune.trace(network, example), example, True)
        assert all(torch.allclose(new, network.get_parameter(name)) for name, new in scales.weights(network).items())
        scales.scales[1].fill_(share)
        folded = scales.folded(network)[0].weight
    assert angle(folded) == pytest.approx(share * angle(network[0].weight), rel=1e-3, abs=1e-5)
    assert torch.equal(folded[:, :, ~ring], network[0].weight[:, :, ~ring])


# The method


def within(result, network, example, budgets):
    return all(
        budget.cost(result.network, example) <= budget.limit * budget.cost(network, example) for budget in budgets
    )


def test_a_vgg_is_within_every_budget_and_has_recovered(trained, digits):
    budgets = [Budget("parameters", 0.25), Budget("macs", 0.35)]
    result = smof(trained, digits.example, budgets, digits, seed=1, **QUICK)
    assert within(result, trained, digits.example, budgets)
    spent = [result.costs[budget.name]["share"] / budget.limit for budget in budgets]
    assert 0.9 < max(spent) <= 1
    assert result.reward == pytest.approx(training.accuracy(result.network, digits, digits.validation))
    assert result.reward > 85
    assert result.method == "smof"
    columns = ["epoch", "loss", "validation_accuracy", "parameters", "macs", "rings", "multiplier", "seconds"]
    assert list(result.history.columns) == columns
    assert result.history["epoch"].tolist() == [1, 2, 3]
    last = result.history.iloc[-1]
    assert last["validation_accuracy"] == result.reward
    assert last["macs"] == pytest.approx(100 * result.costs["macs"]["share"])
    assert last["rings"] == sum(removable(result.network).values())
    assert all(type(module) is nn.Conv2d for module in convolutions(result.network).values())
    assert [int(mask.sum()) for mask in result.masks] == [kept for kept, _ in result.widths.values()]
    assert not result.network.training


def test_a_residual_network_is_within_budget_and_untouched(residual, digits):
    residual.stem[0].weight.requires_grad_(False)
    before = snapshot(residual)
    budgets = [Budget("macs", 0.3)]
    result = smof(residual, digits.example, budgets, digits, **QUICK)
    assert within(result, residual, digits.example, budgets)
    assert result.reward > 45
    assert unchanged(residual, before)
    assert not residual.training
    for network in (residual, result.network):
        assert not network.stem[0].weight.requires_grad
        assert network.stem[1].weight.requires_grad
    residual.stem[0].weight.requires_grad_(True)


def test_a_cut_among_scales_that_never_faded_uses_the_budget(digits):
    torch.manual_seed(0)
    layers, before = [], 3
    for width in (8, 12, 16):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)).eval()
    budgets = [Budget("parameters", 0.06)]  # more filters are at the upper end of their scale than may stay
    result = smof(network, digits.example, budgets, digits, rings=False, **QUICK)
    assert 0.6 < result.costs["parameters"]["share"] / 0.06 <= 1


def test_rings_leave_only_if_they_may(trained, digits, found):
    assert {module.kernel_size for module in convolutions(found.network).values()} >= {(1, 1)}
    assert all(module.padding[0] == module.kernel_size[0] // 2 for module in convolutions(found.network).values())
    budgets = [Budget("parameters", 0.2)]
    kept = smof(trained, digits.example, budgets, digits, rings=False, **QUICK)
    assert {module.kernel_size for module in convolutions(kept.network).values()} == {(3, 3)}
    assert within(kept, trained, digits.example, budgets)
    assert kept.reward > 85


def test_the_kernels_of_layers_that_are_excluded_stay(trained, digits, found):
    assert found.network.features[11].kernel_size == (1, 1)
    kept = smof(trained, digits.example, [Budget("parameters", 0.2)], digits, exclude=["features.11"], **QUICK)
    assert kept.network.features[11].weight.shape[2:] == (3, 3)
    assert "features.11" not in kept.widths
    assert (1, 1) in {module.kernel_size for module in convolutions(kept.network).values()}


def padded(trained):
    """The same function with 16 more filters in the third layer, unread, and a ring of zeros around the last kernel."""
    network = networks.VGG([16, "M", 32, "M", 48, 32, "M"])
    last = network.features[11]
    last.weight = nn.Parameter(torch.zeros(32, 48, 5, 5))
    last.kernel_size, last.padding = (5, 5), (2, 2)
    state = trained.state_dict()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name == "features.11.weight":
                tensor[:, :32, 1:-1, 1:-1] = state[name]
            elif tensor.ndim:
                tensor[: len(state[name])] = state[name]
    return network.eval()


def test_filters_and_rings_that_do_nothing_leave(trained, digits):
    network, images = padded(trained), digits.normalise(digits.validation.images)
    with torch.no_grad():
        assert agree(network(images), trained(images))
    share = costs.macs(trained, digits.example) / costs.macs(network, digits.example)
    # the weights stay as they are, so that what is of no use remains so
    result = smof(network, digits.example, [Budget("macs", share)], digits, learning_rate=1e-9, **QUICK)
    assert [module.kernel_size for module in convolutions(result.network).values()] == [(3, 3)] * 4
    assert result.masks[2].tolist() == [True] * 32 + [False] * 16
    assert result.reward > 90


def test_same_seed_same_network(trained, digits):
    def run(seed):
        arguments = {"epochs": 1, "batch_size": 32, "progress": False, "evaluation": SMALL}
        result = smof(trained, digits.example, [Budget("macs", 0.5)], digits, seed=seed, **arguments)
        return result.history.drop(columns="seconds"), result.network.state_dict()

    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.random.get_rng_state()
    history, weights = run(3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    np.random.seed(2)
    again, same = run(3)
    pd.testing.assert_frame_equal(again, history)
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())
    assert not run(4)[0].equals(history)


def test_the_seed_decides_dropout_too(trained, digits):
    def run(start):
        torch.manual_seed(start)
        arguments = {"epochs": 1, "batch_size": 64, "progress": False, "evaluation": SMALL}
        return smof(network, digits.example, [Budget("macs", 0.5)], digits, **arguments).history["loss"]

    network = nn.Sequential(trained, nn.Dropout(0.5)).eval()
    assert run(1).equals(run(2))


def test_a_result_loads_and_exports_with_its_kernels(trained, digits, found, tmp_path):
    images = digits.normalise(digits.test.images[:8])
    found.save(tmp_path / "own")
    again = rlprune.load(tmp_path / "own", trained)
    assert [m.kernel_size for m in convolutions(again.network).values()] == [
        m.kernel_size for m in convolutions(found.network).values()
    ]
    with torch.no_grad():
        assert agree(again.network(images), found.network(images))
    few = digits.normalise(digits.train.images[:40]), digits.train.labels[:40]
    budgets = [Budget("parameters", 0.3)]
    result = smof(build("resnet20").eval(), digits.example, budgets, few, epochs=1, batch_size=8, progress=False)
    result.save(tmp_path / "named")
    loaded = rlprune.load(tmp_path / "named")
    with torch.no_grad():
        assert agree(loaded.network(images), result.network(images))
    onnxruntime = pytest.importorskip("onnxruntime")
    path = loaded.export_onnx(tmp_path / "slim.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert np.abs(logits - result.network(images).numpy()).max() < 1e-4


def test_costs_that_only_measuring_tells(trained, digits, monkeypatch):
    monkeypatch.setattr(costs, "PAUSE", 0)
    calls = itertools.count()

    def milliseconds(network, example_input):  # never the same twice, by up to 2 %
        return costs.macs(network, example_input) ** 0.9 * (1 + 0.01 * (next(calls) % 3))

    budgets = [Budget(milliseconds, 0.4), Budget("onnx_bytes", 0.5)]
    arguments = {"epochs": 1, "batch_size": 32, "progress": False, "evaluation": SMALL}
    result = smof(trained, digits.example, budgets, digits, minimum=4, multiple=4, **arguments)
    assert all(cost["value"] <= cost["limit"] for cost in result.costs.values())
    assert all(kept % 4 == 0 for kept, _ in result.widths.values())
    assert {"milliseconds", "onnx_bytes"} <= set(result.history.columns)


def test_a_network_that_is_over_budget_in_the_end_becomes_smaller(trained, digits, monkeypatch):
    end, state = _Run.enforce, {"pace": 1.0}
    monkeypatch.setattr(costs, "PAUSE", 0)

    def milliseconds(network, example_input):
        return state["pace"] * costs.macs(network, example_input)

    def slower(run):
        state["pace"], state["kept"] = 1.3, [int(mask.sum()) for mask in run.masks]
        end(run)

    monkeypatch.setattr(_Run, "enforce", slower)
    arguments = {"epochs": 1, "batch_size": 32, "progress": False, "evaluation": SMALL}
    result = smof(trained, digits.example, [Budget(milliseconds, 0.4)], digits, **arguments)
    assert milliseconds(result.network, digits.example) <= 0.4 * costs.macs(trained, digits.example)
    kept = [kept for kept, _ in result.widths.values()]
    assert all(now <= before for now, before in zip(kept, state["kept"], strict=True))
    assert sum(kept) < sum(state["kept"])
    assert [len(norm.weight) for norm in result.network.modules() if isinstance(norm, nn.BatchNorm2d)] == kept


def test_a_network_within_budget_already_only_learns_on(trained, digits):
    arguments = {"epochs": 1, "batch_size": 64, "progress": False, "evaluation": SMALL}
    result = smof(trained, digits.example, [Budget("parameters", 1.0)], digits, **arguments)
    assert all(mask.all() for mask in result.masks)
    assert result.history["rings"].tolist() == [4]
    groups = rlprune.trace(trained, digits.example)
    assert [len(mask) for mask in result.masks] == [group.size for group in groups]


def test_what_is_returned_has_recovered(trained, digits):
    arguments = {"epochs": 1, "batch_size": 32, "progress": False, "evaluation": SMALL}
    result = smof(trained, digits.example, [Budget("parameters", 0.1)], digits, **arguments)
    network = copy.deepcopy(result.network)
    recover(network, digits.normalise(digits.train.images[: SMALL["recalibration"]]))
    assert result.reward > training.accuracy(network, digits, digits.validation) - 3
    assert result.history["validation_accuracy"].iloc[-1] == result.reward


def test_bad_input_is_named(trained, digits):
    example, budgets = digits.example, [Budget("macs", 0.5)]
    with pytest.raises(InputError, match="give data"):
        smof(trained, example, budgets, evaluate=lambda network: 0.0)
    for wrong in ({"fading": 1.0}, {"fading": 0.0}, {"travel": 0.0}):
        with pytest.raises(InputError, match="fading must lie in"):
            smof(trained, example, budgets, digits, **wrong)
    with pytest.raises(InputError, match="at least 1 epoch"):
        smof(trained, example, budgets, digits, epochs=0)
    with pytest.raises(InputError, match="too few to fade"):
        smof(trained, example, budgets, digits, epochs=1, batch_size=len(digits.train), evaluation=SMALL)
    with pytest.raises(InputError, match="cannot be met"):
        smof(trained, example, [Budget("parameters", 1e-4)], digits, evaluation=SMALL)
    with pytest.raises(InputError, match="lower learning_rate"):
        smof(trained, example, budgets, digits, **(QUICK | {"epochs": 1, "learning_rate": 1e12}))
