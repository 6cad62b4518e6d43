"""The model of the reward, and practice on it: a search that needs fewer evaluations."""

import numpy as np
import pytest

from rlprune import Budget, peers, prune
from rlprune.candidates import FITS
from rlprune.env import PruningEnv
from rlprune.errors import InputError
from rlprune.imagination import RewardModel


def bowl(point):
    return 80 - 10 * float(((point - np.array([-1.0, -0.5, -2.0])) ** 2).sum())


def fitted(count, seed=0):
    model, random = RewardModel(), np.random.default_rng(seed)
    for point in random.uniform(-3, 0, (count, 3)):
        model.add(point.tolist(), bowl(point))
    model.fit()
    return model


def test_the_model_predicts_what_it_has_not_seen_and_better_with_more():
    points = np.random.default_rng(9).uniform(-3, 0, (200, 3))
    truth = np.array([bowl(point) for point in points])
    errors = [
        np.abs([model(p) - t for p, t in zip(points, truth, strict=True)]).mean() for model in (fitted(8), fitted(60))
    ]
    assert errors[1] < 0.1 * truth.std()
    assert errors[1] < errors[0]


def test_what_is_unknown_has_a_premium():
    model = RewardModel()
    random = np.random.default_rng(0)
    for number in range(30):
        model.add([-0.1 * random.random()], 50 + number % 3)
    model.fit()
    assert model(np.array([-4.0])) > model(np.array([-0.05])) - 1
    alike = RewardModel()
    for _ in range(25):
        alike.add([-1.0, -1.0], 40.0)  # nothing to tell apart
    alike.fit()
    assert alike(np.array([-1.0, -1.0])) == pytest.approx(40, abs=1)


def test_a_restored_model_predicts_the_same():
    first, second = fitted(30), RewardModel()
    second.restore(first.state())
    second.fit()
    points = np.random.default_rng(1).uniform(-3, 0, (20, 3))
    assert [first(point) for point in points] == [second(point) for point in points]


@pytest.mark.parametrize("action", ["layerwise", "filterwise"])
def test_an_imagined_episode_evaluates_nothing(action, trained, digits):
    calls, seen = [], []

    def reward(masks):
        calls.append(masks)
        return 1.0

    env = PruningEnv(trained, digits.example, [Budget("parameters", 0.2)], reward, action, fit="scale")

    def play():
        env.reset(seed=0)
        for _ in env.groups:
            _, reward, _, _, info = env.step(np.full(env.action_space.shape, 0.3, np.float32))
        return reward, info["cost"]

    real, cost = play()
    env.imagined = lambda summary: seen.append(summary) or 7.0
    imagined, same = play()
    assert (real, imagined, len(calls), len(env.episodes)) == (1.0, 7.0, 1, 1)
    assert cost == pytest.approx(same)
    assert np.allclose(seen[0], env.episodes[0]["summary"])
    widths = env.episodes[0]["decision"].widths
    assert np.allclose(np.exp(seen[0][: len(widths)]) * env.candidates.sizes, widths)


def wanted(network):
    """Best with 3, 12, 6 and 20 filters; a little rough, as accuracies are."""
    widths = np.array([network.features[i].out_channels for i in (0, 4, 8, 11)])
    away = ((widths / np.array([16, 32, 32, 32]) - np.array([0.19, 0.38, 0.19, 0.63])) ** 2).sum()
    return 80 - 100 * float(away) + float(np.random.default_rng(widths.tolist()).normal())


def test_practice_finds_better_networks_in_as_many_evaluations(trained, digits):
    def mean(search, **options):
        arguments = {"episodes": 80, "evaluate": wanted, "progress": False, **options}
        runs = [search(trained, digits.example, [Budget("parameters", 0.3)], seed=s, **arguments) for s in range(3)]
        assert all(run.evaluations == len(run.history) == 80 for run in runs)
        # the mean of the last networks: the best one may be luck
        return np.mean([run.history["reward"].tail(20).mean() for run in runs])

    practised = mean(prune)
    assert practised > mean(prune, imagined=0) > mean(peers.random)


@pytest.mark.parametrize("how", FITS)
def test_every_way_to_fit_can_be_practised(how, trained, digits):
    arguments = {"episodes": 30, "evaluate": wanted, "fit_budget": how, "imagined": 10, "progress": False}
    if how == "none":  # a decision may be over budget: then there is nothing to return
        arguments["agent"] = {"initial_action": 0.2}
    result = prune(trained, digits.example, [Budget("macs", 0.3)], **arguments)
    assert result.costs["macs"]["share"] <= 0.3


def test_measured_budgets_are_searched_without_a_model(trained, digits):
    def filters(network, example):
        return float(sum(p.shape[0] for p in network.parameters() if p.ndim == 4))

    result = prune(
        trained, digits.example, [Budget(filters, 0.5)], episodes=30, evaluate=wanted, imagined=10**9, progress=False
    )
    assert result.evaluations == 30


def test_bad_counts_are_named(trained, digits):
    with pytest.raises(InputError, match="imagined must be at least 0, not -1"):
        prune(trained, digits.example, [Budget("macs", 0.5)], evaluate=wanted, imagined=-1)
