"""Peers: the same signature, budget and record as `prune`."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from rlprune import Budget, costs, peers
from rlprune.errors import InputError

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


def test_bad_input_is_named(trained, digits):
    with pytest.raises(InputError, match="at least 1 episode"):
        peers.random(trained, digits.example, [Budget("macs", 0.5)], digits, episodes=0)
    one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(InputError, match="at least 2 filter groups"):
        peers.evolution(one, digits.example, [Budget("macs", 0.5)], evaluate=lambda network: 0.0)
