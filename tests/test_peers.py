"""Peers: the same signature, budget and record as `prune`."""

import copy
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import rlprune
from rlprune import Budget, costs, importance, peers
from rlprune.candidates import Candidates
from rlprune.errors import InputError
from rlprune.peers.paper import PublishedEnv

SMALL = {"images": 150, "recalibration": 150}
SEARCHES = [peers.random, peers.evolution]


def wants(network):
    """Best with 3, 12, 6 and 20 filters; a quadratic, on which an evolution strategy does well."""
    widths = [network.features[i].out_channels for i in (0, 4, 8, 11)]
    return -sum((width / size - best) ** 2 for width, size, best in zip(widths, SIZES, TARGET, strict=True))


SIZES, TARGET = (16, 32, 32, 32), (0.19, 0.38, 0.19, 0.63)


@pytest.mark.parametrize("search", SEARCHES)
def test_searches_spend_what_they_are_given_and_stay_within_budget(search, trained, digits):
    budgets = [Budget("parameters", 0.2), Budget("macs", 0.4)]
    result = search(trained, digits.example, budgets, digits, episodes=23, progress=False, evaluation=SMALL)
    assert len(result.history) == result.evaluations == 23
    assert (result.history["parameters"] <= 20).all()
    assert (result.history["macs"] <= 40).all()
    assert result.history["best"].is_monotonic_increasing
    assert result.reward == result.history["reward"].max()
    for budget in budgets:
        assert budget.cost(result.network, digits.example) <= budget.limit * budget.cost(trained, digits.example)


@pytest.mark.parametrize("search", SEARCHES)
def test_same_seed_same_search(search, trained, digits):
    def run(seed):
        arguments = {"episodes": 25, "seed": seed, "evaluate": wants, "progress": False}
        return search(trained, digits.example, [Budget("macs", 0.5)], **arguments).history.drop(columns="seconds")

    torch.manual_seed(1)
    np.random.seed(1)
    first = run(3)
    torch.manual_seed(2)
    np.random.seed(2)
    pd.testing.assert_frame_equal(run(3), first)
    assert not run(4).equals(first)


@pytest.mark.parametrize("search", SEARCHES)
def test_numpys_own_generator_is_left_as_it_was(search, trained, digits):
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    search(trained, digits.example, [Budget("macs", 0.5)], episodes=3, evaluate=wants, progress=False)
    assert np.random.rand() == expected


FEW = {"epochs": 1, "batch_size": 200}
METHODS = [(peers.uniform, {}), (peers.magnitude, {}), (peers.genetic, {"images": 20, "generations": 1})]
METHODS += [(peers.prunenet, {"rounds": 1, "steps": 1}), (peers.prunetrain, {"training": FEW}), (peers.smof, FEW)]
METHODS += [(peers.hfp, FEW), (peers.paper_coarse, {"episodes": 1, "images": 20}), (peers.random, {"episodes": 1})]
METHODS += [(peers.evolution, {"episodes": 1})]


@pytest.mark.parametrize(("method", "more"), METHODS)
def test_the_time_recorded_begins_with_the_call(method, more, trained, digits, monkeypatch):
    module, clock, ahead = sys.modules[method.__module__], time.perf_counter, [0]
    judged = module.judged

    def long(*arguments, **options):
        ahead[0] = 1000
        return judged(*arguments, **options)

    monkeypatch.setattr(PublishedEnv, "_accuracy", lambda *arguments: 0.0)
    monkeypatch.setattr(module, "judged", long)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + ahead[0])
    result = method(trained, digits.example, [Budget("parameters", 0.5)], digits, evaluation=SMALL, **more)
    assert 1000 < result.seconds < 1600


def widest(network, example_input):
    return max(module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d))


RANKERS = [(peers.prunenet, {"rounds": 1, "steps": 1}), (peers.prunetrain, {"training": FEW})]
RANKERS += [(peers.smof, FEW), (peers.magnitude, {})]


@pytest.mark.parametrize("cost", ["parameters", widest])
@pytest.mark.parametrize(("method", "more"), RANKERS)
def test_a_criterion_without_a_say_refuses_no_network(method, more, cost, digits):
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    result = method(
        bare.eval(), digits.example, [Budget(cost, 0.5)], digits, criterion="batchnorm", evaluation=SMALL, **more
    )
    assert result.network[0].out_channels < 8


def test_an_evolution_strategy_beats_chance_where_there_is_something_to_learn(trained, digits):
    assert [network.out_channels for network in trained.features if isinstance(network, nn.Conv2d)] == list(SIZES)
    budget = [Budget(costs.parameters, 0.3)]
    rewards = {
        search: [
            search(trained, digits.example, budget, episodes=150, seed=s, evaluate=wants, progress=False).reward
            for s in range(3)
        ]
        for search in SEARCHES
    }
    assert max(rewards[peers.random]) < np.mean(rewards[peers.evolution]) <= 0


def test_a_ranking_of_equal_values_still_uses_the_budget(trained, digits):
    groups = rlprune.trace(trained, digits.example)
    candidates = Candidates(trained, groups, digits.example, [Budget("parameters", 0.3)])
    widths = candidates.thresholded([torch.ones(group.size) for group in groups])
    used = candidates.costs(widths)[0] / candidates.unpruned[0]
    assert 0.27 < used <= 0.3


RANKINGS = [peers.magnitude, peers.batchnorm, peers.taylor]


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_ranking_keeps_what_scores_best_anywhere_and_uses_the_budget(ranking, trained, digits):
    budgets = [Budget("parameters", 0.3), Budget("macs", 0.5)]
    result = ranking(trained, digits.example, budgets, digits, evaluation=SMALL)
    assert result.method == ranking.__name__
    assert result.evaluations == 1
    for budget in budgets:
        assert budget.cost(result.network, digits.example) <= budget.limit * budget.cost(trained, digits.example)
    groups = rlprune.trace(trained, digits.example)
    sample = digits.normalise(digits.train.images[: SMALL["recalibration"]]), digits.train.labels[:150]
    values = importance.scores(trained, groups, result.method, sample, relative=ranking is peers.magnitude)
    kept = torch.cat([value[mask] for value, mask in zip(values, result.masks, strict=True) if mask.sum() > 1])
    gone = torch.cat([value[~mask] for value, mask in zip(values, result.masks, strict=True)])
    assert kept.min() >= gone.max()
    # one filter more, the best of those that went, is one too many
    left = [value.masked_fill(mask, -1) for value, mask in zip(values, result.masks, strict=True)]
    i = int(torch.stack([value.max() for value in left]).argmax())
    wider = [mask.clone() for mask in result.masks]
    wider[i][left[i].argmax()] = True
    larger = rlprune.slim(trained, groups, wider)
    assert any(b.cost(larger, digits.example) > b.limit * b.cost(trained, digits.example) for b in budgets)


def test_a_group_of_larger_scales_keeps_more(trained, digits):
    network = copy.deepcopy(trained)
    before = peers.batchnorm(network, digits.example, [Budget("macs", 0.5)], digits, evaluation=SMALL).widths
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    with torch.no_grad():
        norm.weight.mul_(100)
    after = peers.batchnorm(network, digits.example, [Budget("macs", 0.5)], digits, evaluation=SMALL).widths
    first = next(iter(before))
    assert after[first][0] == after[first][1] > before[first][0]


def test_bad_input_is_named(trained, digits):
    with pytest.raises(InputError, match="episodes must be a whole number of at least 1, not 0"):
        peers.random(trained, digits.example, [Budget("macs", 0.5)], digits, episodes=0)
    one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(InputError, match="'taylor' needs data"):
        peers.taylor(trained, digits.example, [Budget("macs", 0.5)], evaluate=lambda network: 0.0)
    with pytest.raises(InputError, match="at least 2 filter groups"):
        peers.evolution(one, digits.example, [Budget("macs", 0.5)], evaluate=lambda network: 0.0)


@pytest.mark.parametrize("method", ["prune", "genetic", "prunenet", "prunetrain", "smof", "taylor", "paper_coarse"])
def test_a_network_that_views_is_pruned(method, viewing, digits):
    torch.manual_seed(0)
    data = digits.normalise(digits.train.images[:200]), digits.train.labels[:200]
    schedule = rlprune.Training(epochs=1, batch_size=32)
    options = {
        "prune": {"episodes": 2, "finetune": schedule, "criterion": "gates"},
        "genetic": {"images": 20, "generations": 2},
        "prunenet": {"rounds": 1, "steps": 1},
        "prunetrain": {"training": schedule},
        "smof": {"epochs": 1, "batch_size": 32},
        "paper_coarse": {"episodes": 1, "images": 50},
    }.get(method, {})
    call = rlprune.prune if method == "prune" else getattr(peers, method)
    options |= {} if method == "taylor" else {"progress": False}
    budgets = [Budget("parameters", 0.5)]
    result = call(viewing(), digits.example, budgets, data, evaluation={"recalibration": 50}, **options)
    assert result.costs["parameters"]["share"] <= 0.5
    assert 0 <= result.reward <= 100
    result.network(digits.example)


@pytest.mark.parametrize("name", peers.__all__)
def test_an_argument_that_a_method_does_not_take_is_named(name, trained, digits):
    budgets = [Budget("parameters", 0.3)]
    with pytest.raises(InputError, match="Unknown option of this method 'finetune'. Use one of: evaluate"):
        getattr(peers, name)(trained, digits.example, budgets, digits, progress=False, finetune=1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["taylor", "uniform"])
def test_what_has_to_learn_does_so_where_gradients_are_off(method, mode, trained, digits, monkeypatch):
    monkeypatch.setattr("rlprune.gates.ROUNDS", 1)
    options = {"criterion": "gates"} if method == "uniform" else {}
    example = digits.example
    with mode():
        result = getattr(peers, method)(
            trained, example, [Budget("parameters", 0.5)], digits, evaluation=SMALL, **options
        )
    assert result.costs["parameters"]["share"] <= 0.5


@pytest.mark.parametrize("method", ["prunetrain", "smof", "hfp"])
def test_what_a_judge_does_to_a_network_that_was_trained_is_lost(method, trained, digits):
    def judge(network):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        return 1.0

    schedule = {"epochs": 1, "batch_size": 64}
    schedule = {"training": schedule} if method == "prunetrain" else schedule
    how = {"evaluate": judge, "evaluation": SMALL, "progress": False, **schedule}
    result = getattr(peers, method)(trained, digits.example, [Budget("parameters", 0.5)], digits, **how)
    assert result.reward == 1.0
    assert all(parameter.abs().sum() > 0 for parameter in result.network.parameters() if parameter.ndim > 1)


@pytest.mark.parametrize("method", ["prunetrain", "smof"])
def test_costs_are_measured_as_the_network_that_is_returned_lies_in_memory(method, digits):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16 * 30 * 30, 10)]
    network = nn.Sequential(*layers)  # to flatten channels-last, in which training runs, takes memory for a copy
    example = digits.normalise(digits.train.images[:4]).contiguous()
    schedule = {"epochs": 1, "batch_size": 16}  # as many steps as scales need to come apart
    schedule = {"training": {"epochs": 1, "batch_size": 128}} if method == "prunetrain" else schedule
    how = {"evaluation": {"images": 100, "recalibration": 50}, "progress": False, **schedule}
    result = getattr(peers, method)(network, example, [Budget("peak_memory", 0.6)], digits, **how)
    assert 0.5 < result.costs["peak_memory"]["share"] <= 0.6  # a filter is a sixteenth


def test_seeds_are_whole_numbers(trained, digits):
    for method in (peers.random, peers.taylor, peers.prunenet):
        with pytest.raises(InputError, match="seed must be a whole number of at least 0, not -1"):
            method(trained, digits.example, [Budget("macs", 0.5)], digits, seed=-1)


@pytest.mark.parametrize("method", [peers.hfp, peers.smof, peers.prunetrain, peers.taylor])
def test_labels_are_checked_where_something_else_judges(method, trained, digits):
    beyond = rlprune.own.from_tensors(digits.train.images[:200].float(), digits.train.labels[:200] + 5)
    options = {"progress": False, "evaluate": lambda network: 1.0, "evaluation": {"recalibration": 50}}
    with pytest.raises(InputError, match="There is a label 14, but the network has outputs for 0 to 9"):
        method(trained, digits.example, [Budget("parameters", 0.5)], beyond, **options)
