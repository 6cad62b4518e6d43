"""Genetic channel pruning: its fitness is the layers' error, and evolution makes that small."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

import rlprune
from rlprune import Budget, masking, networks
from rlprune.errors import InputError
from rlprune.peers.genetic import evolve, genetic
from rlprune.peers.layer_error import ErrorForm, errors, fidelity
from rlprune.peers.rings import without_rings

SMALL = {"images": 100, "generations": 60, "evaluation": {"images": 100, "recalibration": 100}, "progress": False}


def filters(network, example_input):
    """A cost that only a slim network tells."""
    return sum(m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d))


BUDGETS = [Budget("parameters", 0.3), Budget("macs", 0.5)]


@pytest.fixture(scope="module")
def resnet(digits):
    torch.manual_seed(0)
    network = networks.ResNet([1, 1], [8, 16])
    rlprune.training.fit(
        network, digits, rlprune.training.Training(epochs=2, batch_size=16, learning_rate=0.05), progress=None
    )
    return network.eval()


@pytest.fixture(params=["trained", "resnet"])
def network(request):
    return request.getfixturevalue(request.param)


def unusual():
    """Readers with groups, strides, dilation, reflected borders and bias, and one that reads a flattened image."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=3), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 6, 3, stride=2, groups=2, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(6, 8, (3, 2), dilation=2, padding="same", padding_mode="reflect"), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 10)).eval()


def some_masks(size, width, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return masking.keep_top(list(torch.rand(count, size, generator=generator)), [width] * count)


def form_of(changes, normalised):
    """Of filters that add these to one output, (patches, filters)."""
    whole = changes.sum(1)
    parts = (changes.T @ changes)[None] / (whole @ whole), (whole @ changes)[None] / (whole @ whole)
    return ErrorForm(*parts, normalised)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("kind", ["trained", "resnet", "unusual", "of smaller kernels"])
def test_the_fitness_is_the_error_where_every_patch_is_seen(kind, normalised, request, digits, monkeypatch):
    # bfloat16 says little of a mask whose few filters contribute little
    monkeypatch.setenv("RLPRUNE_PRECISION", "float32")
    if kind == "of smaller kernels":
        network = without_rings(request.getfixturevalue("trained"), {"features.4": 1, "features.8": 1})
    else:
        network = unusual() if kind == "unusual" else request.getfixturevalue(kind)
    images = digits.normalise(digits.train.images[:30])
    groups = rlprune.trace(network, digits.example)
    owned = {len(part.index) // group.size for group in groups for part in group.slices if part.axis == "in"}
    assert kind != "unusual" or owned == {1, 2, 4}
    for group in groups:
        masks = [*some_masks(group.size, group.size // 2, 5), *some_masks(group.size, 1, 2)]
        fitness, true = fidelity(network, group, masks, images, images, patches=10**6, normalised=normalised)
        torch.testing.assert_close(fitness.double(), true, rtol=1e-3, atol=1e-5)
        assert true.min() > 0


def test_the_fitness_ranks_masks_as_the_error_on_other_images_does(network, digits):
    seen, held_out = digits.normalise(digits.train.images), digits.normalise(digits.validation.images)[:150]
    for group in rlprune.trace(network, digits.example):
        masks = some_masks(group.size, group.size // 2, 25)
        fitness, true = fidelity(network, group, masks, seen, held_out, seed=1)
        assert spearmanr(fitness, true).statistic >= 0.9, group.name


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_a_factor_is_no_error_where_batch_norm_makes_it_good(seed, width):
    generator = torch.Generator().manual_seed(seed)
    changes = torch.randn(30, 8, generator=generator)
    masks = torch.stack(some_masks(8, width, 10, seed))
    best, plain = (errors(form_of(changes, normalised), masks) for normalised in (True, False))
    assert (best <= plain + 1e-5).all()
    assert (best > -1e-5).all()
    twice, first = form_of(changes.repeat(1, 2), True), torch.arange(16) < 8
    assert errors(twice, torch.stack([first, ~first])).abs().max() < 1e-5  # half of what was, and no different
    torch.testing.assert_close(errors(form_of(changes.repeat(1, 2), False), first[None]), torch.tensor([0.25]))


def test_masks_are_better_than_chance(trained, digits):
    result = genetic(trained, digits.example, [Budget("parameters", 0.1)], digits, **SMALL, patches=500)
    groups = rlprune.trace(trained, digits.example)
    judge = rlprune.Evaluator(trained, groups, digits, **SMALL["evaluation"])
    widths = [int(mask.sum()) for mask in result.masks]
    drawn = [some_masks(group.size, width, 20) for group, width in zip(groups, widths, strict=True)]
    others = [judge(list(masks)) for masks in zip(*drawn, strict=True)]
    assert result.reward > np.mean(others) + np.std(others)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 7), st.booleans())
def test_evolution_finds_the_best_of_all_masks_of_a_tiny_layer(seed, width, normalised):
    generator = torch.Generator().manual_seed(seed)
    changes = torch.randn(30, 8, generator=generator) + torch.randn(30, 1, generator=generator)
    form = form_of(changes, normalised)
    every = torch.tensor([[place in kept for place in range(8)] for kept in itertools.combinations(range(8), width)])
    mask, spent = evolve(form, width, 20, 200, generator)  # of 10 masks one evolution in seventy ends elsewhere
    assert mask.sum() == width
    assert 1 <= spent <= 200
    torch.testing.assert_close(errors(form, mask[None])[0], errors(form, every).min())


def test_the_mask_found_errs_less_than_others_as_wide_on_images_never_seen(trained, digits):
    arguments = {**SMALL, "images": 300, "generations": 300}
    result = genetic(trained, digits.example, [Budget("parameters", 0.3)], digits, **arguments)
    groups = rlprune.trace(trained, digits.example)
    held_out = digits.normalise(digits.validation.images[:100])
    magnitude = rlprune.importance.scores(trained, groups)
    for group, mask, score in zip(groups, result.masks, magnitude, strict=True):
        width = int(mask.sum())
        rivals = [*masking.keep_top([score], [width]), *some_masks(group.size, width, 20)]
        _, (found, *others) = fidelity(trained, group, [mask, *rivals], held_out, held_out)
        assert found < min(others), group.name


@pytest.mark.parametrize("budgets", [BUDGETS, [Budget(filters, 0.6)]], ids=["predicted", "own"])
def test_within_every_budget_with_a_row_per_group(network, budgets, digits):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    result = genetic(network, digits.example, budgets, digits, **SMALL)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    spent = [b.cost(result.network, digits.example) / b.cost(network, digits.example) / b.limit for b in budgets]
    assert 0.8 < max(spent) <= 1
    groups = rlprune.trace(network, digits.example)
    history = result.history
    assert sorted(history["group"]) == sorted(group.name for group in groups)
    assert history["share"].is_monotonic_increasing
    assert {row.group: (row.kept, row.filters) for row in history.itertuples()} == result.widths
    pruned = history[history["kept"] < history["filters"]]
    assert (pruned["error"] <= pruned[["criterion_error", "random_error"]].min(axis=1)).all()
    assert (pruned["error"] < pruned["random_error"]).all()
    assert history["reward"].isna().sum() == len(groups) - 1
    assert history["reward"].iloc[-1] == result.reward
    assert result.evaluations > 3 * len(groups)
    slim = rlprune.slim(network, groups, result.masks)
    assert [p.shape for p in slim.parameters()] == [p.shape for p in result.network.parameters()]


def test_same_seed_same_result(trained, digits):
    def run(seed):
        return genetic(trained, digits.example, BUDGETS, digits, seed=seed, **SMALL)

    torch.manual_seed(1)
    np.random.seed(1)
    first = run(3)
    torch.manual_seed(2)
    np.random.seed(2)
    again = run(3)
    pd.testing.assert_frame_equal(again.history.drop(columns="seconds"), first.history.drop(columns="seconds"))
    assert all(map(torch.equal, again.masks, first.masks))
    assert not run(4).history["random_error"].equals(first.history["random_error"])


def test_what_the_reward_depends_on_keeps_more(trained, digits):
    def shares(place):
        def evaluate(network):
            return -1.0 / network.features[place].out_channels

        result = genetic(trained, digits.example, [Budget("parameters", 0.3)], digits, evaluate=evaluate, **SMALL)
        return {name: kept / size for name, (kept, size) in result.widths.items()}

    first, last = shares(0), shares(11)
    assert first["features.0"] > 2 * last["features.0"]
    assert last["features.11"] > 2 * first["features.11"]
    assert first["features.0"] == max(first.values())


@pytest.mark.parametrize("images", [1, 3])
def test_few_images_are_enough_to_recover_a_flat_network_on(images, digits):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)]
    arguments = SMALL | {"images": images, "generations": 5}
    result = genetic(nn.Sequential(*layers).eval(), digits.example, [Budget("parameters", 0.5)], digits, **arguments)
    assert result.costs["parameters"]["share"] <= 0.5


def test_bad_input_is_named(trained, digits):
    for fault in ({"images": 0}, {"patches": 0}, {"generations": 0}, {"population": 64.5}, {"tolerance": 0}):
        with pytest.raises(InputError, match=next(iter(fault)) + " must"):
            genetic(trained, digits.example, BUDGETS, digits, **fault)
    with pytest.raises(InputError, match="give data"):
        genetic(trained, digits.example, BUDGETS, evaluate=lambda network: 0.0)


def test_what_reads_in_another_way_is_named_and_can_be_excluded(digits):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, stride=4), nn.ReLU(), nn.ConvTranspose2d(6, 8, 2), nn.ReLU(), nn.Conv2d(8, 6, 3)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)).eval()
    with pytest.raises(InputError, match="not ConvTranspose2d: exclude 0"):
        genetic(network, digits.example, [Budget("macs", 0.5)], digits, **SMALL)
    result = genetic(network, digits.example, [Budget("macs", 0.7)], digits, exclude=["0"], **SMALL)
    assert result.costs["macs"]["share"] <= 0.7
    assert "0" not in result.widths


def test_layers_called_by_keyword_are_read_alike(digits):
    class Net(nn.Module):
        def __init__(self, named):
            super().__init__()
            self.named = named
            self.first, self.second = nn.Conv2d(3, 8, 3, stride=4), nn.Conv2d(8, 8, 3)
            self.last = nn.Linear(8, 10)

        def forward(self, x):
            x = self.first(x).relu()
            x = self.second(input=x) if self.named else self.second(x)
            x = x.relu().mean((2, 3))
            return self.last(input=x) if self.named else self.last(x)

    networks = [Net(named).eval() for named in (False, True)]
    networks[1].load_state_dict(networks[0].state_dict())
    budgets = [Budget("parameters", 0.5)]
    masks = [genetic(network, digits.example, budgets, digits, **SMALL).masks for network in networks]
    assert all(map(torch.equal, *masks))
