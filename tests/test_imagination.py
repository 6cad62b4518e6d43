"""The model of the reward, and practice on it: a search that needs fewer evaluations."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprune import Budget, peers, prune
from rlprune.candidates import FITS
from rlprune.env import PruningEnv
from rlprune.errors import InputError
from rlprune.imagination import KNOWN, PREMIUM, RewardModel, carried


def bowl(point):
    return 80 - 10 * float(((point - np.array([-1.0, -0.5, -2.0])) ** 2).sum())


def fitted(count, seed=0):
    model, random = RewardModel(3), np.random.default_rng(seed)
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
    model = RewardModel(3)
    for point in np.random.default_rng(0).uniform(-1, 0, (30, 3)):
        model.add(point.tolist(), bowl(point))
    model.fit()
    points = np.array([[-0.5, -0.5, -0.5], [-4.0, -4.0, -4.0]])  # among what is known, and far from it
    mean, spread = model.predict(points)
    near, far = (model(point) - expected for point, expected in zip(points, mean, strict=True))
    assert spread[1] > 2 * spread[0]
    assert [near, far] == pytest.approx(list(PREMIUM * spread))
    assert 0 < near < far / 2
    alike = RewardModel(2)
    for _ in range(25):
        alike.add([-1.0, -1.0], 40.0)  # nothing to tell apart
    alike.fit()
    assert alike(np.array([-1.0, -1.0])) == pytest.approx(40, abs=1)


def test_a_restored_model_predicts_the_same():
    first, second = fitted(30), RewardModel(3)
    second.restore(first.state())
    second.fit()
    points = np.random.default_rng(1).uniform(-3, 0, (20, 3))
    assert [first(point) for point in points] == [second(point) for point in points]


@given(groups=st.integers(1, 12), others=st.integers(1, 12), numbers=st.integers(1, 4), seed=st.integers(0, 99))
def test_decisions_are_carried_over_to_any_depth(groups, others, numbers, seed):
    summaries = np.random.default_rng(seed).uniform(-3, 0, (5, groups * numbers))
    there = carried(summaries, groups, others)
    assert there.shape == (5, others * numbers)
    for of_group, over in zip(parts(summaries, groups), parts(there, others), strict=True):
        low, high = of_group.min(1, keepdims=True) - 1e-9, of_group.max(1, keepdims=True) + 1e-9
        assert ((low <= over) & (over <= high)).all()
        if groups > 1 and others > 1:  # first stays first, last stays last
            assert np.all(np.diff(carried(np.linspace(0, 1, groups)[None], groups, others)) > 0)
    if groups == others:
        assert np.allclose(there, summaries)
    assert np.allclose(carried(np.full((1, groups), -1.5), groups, others), -1.5)


def parts(summaries, groups):
    """One array (N, groups) per number that a group has: its share, then the weights of features."""
    weights = summaries[:, groups:].reshape(len(summaries), groups, -1)
    return [summaries[:, :groups], *np.moveaxis(weights, 2, 0)]


def test_a_model_begins_with_what_another_network_taught_and_learns_what_is_different():
    def here(point):  # six groups, half as steep, and the last matters more
        return 20 + bowl(carried(point[None], 6, 3)[0]) / 2 - 0.4 * point[5] ** 2

    random = np.random.default_rng(2)
    points = random.uniform(-3, 0, (300, 6))
    truth = np.array([here(point) for point in points])

    def error(model, count):
        for point in random.uniform(-3, 0, (count, 6)):
            model.add(point.tolist(), here(point))
        model.fit()
        return np.abs(model.predict(points)[0] - truth).mean()

    begun = RewardModel(6, fitted(60).state())
    assert begun.ready
    assert not RewardModel(6).ready
    begun.fit()
    before = begun.predict(points)[0]
    assert np.corrcoef(before, truth)[0, 1] > 0.95  # no evaluation of its own yet
    # of few it takes the level only
    assert error(begun, 5) < 0.8 * np.abs(before - truth).mean()
    assert np.corrcoef(begun.predict(points)[0], before)[0, 1] == pytest.approx(1)
    assert error(begun, KNOWN) < 0.25 * error(RewardModel(6), KNOWN + 5)

    # what it knows of both goes on to a third
    again = RewardModel(6, begun.state())
    again.fit()
    assert np.allclose(again.predict(points)[0], begun.predict(points)[0])


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


def test_multipliers_are_those_of_the_episodes_and_come_back_when_it_goes_on(trained, digits, tmp_path):
    def stop(history, limits):
        if len(history) == 40:
            raise KeyboardInterrupt

    agent = {"initial_action": 0.9, "multiplier": "adam"}  # asks for far too much; "pid" would soon be at 0 again
    arguments = {"episodes": 40, "evaluate": wanted, "agent": agent, "progress": False}
    whole = prune(trained, digits.example, [Budget("parameters", 0.3)], **arguments).history
    arguments["checkpoint"] = tmp_path / "search.pt"
    with pytest.raises(KeyboardInterrupt):
        prune(trained, digits.example, [Budget("parameters", 0.3)], watch=stop, **arguments)
    resumed = prune(trained, digits.example, [Budget("parameters", 0.3)], **arguments).history
    pd.testing.assert_frame_equal(resumed.drop(columns="seconds"), whole.drop(columns="seconds"))
    prices = whole["lambda_parameters"].iloc[::10]  # one per update; the last two after practice, which moves them
    assert prices.iloc[0] == pytest.approx(1)
    assert (prices.diff().abs()[2:] > prices.diff().abs().iloc[1]).all()


def test_measured_budgets_are_searched_without_a_model(trained, digits):
    def filters(network, example):
        return float(sum(p.shape[0] for p in network.parameters() if p.ndim == 4))

    result = prune(
        trained, digits.example, [Budget(filters, 0.5)], episodes=30, evaluate=wanted, imagined=10**9, progress=False
    )
    assert result.evaluations == 30


def test_bad_counts_are_named(trained, digits):
    with pytest.raises(InputError, match="imagined must be a whole number of at least 0, not -1"):
        prune(trained, digits.example, [Budget("macs", 0.5)], evaluate=wanted, imagined=-1)


def test_predictions_do_not_depend_on_the_threads_of_blas():
    code = (
        "import numpy as np; from rlprune.imagination import RewardModel\n"
        "rng = np.random.default_rng(0); model = RewardModel(8)\n"
        "for summary in rng.random((150, 24)): model.add(summary, 50 + 10 * summary[:4].sum() + rng.normal())\n"
        "model.fit(); print([part.tolist() for part in model.predict(rng.random((20, 24)))])"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    ]
    assert len(said[0]) > 100
    assert said[0] == said[1]
