"""One search for every budget."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from gymnasium.utils.env_checker import check_env

from rlprune import Budget, costs, data, load, pareto, prune
from rlprune import front as front_module
from rlprune.delivery import finish
from rlprune.errors import InputError
from rlprune.front import BANDS, LOOKS, FrontEnv
from rlprune.studies import hypervolume

POINTS = (0.1, 0.2, 0.4)


def wanted(network):
    """The more filters the better, those of the third layer most."""
    widths = np.array([network.features[i].out_channels for i in (0, 4, 8, 11)])
    return float((np.array([1, 1, 4, 1]) * np.sqrt(widths)).sum())


def search(trained, digits, **changes):
    return pareto(
        trained, digits.example, **{"episodes": 60, "points": POINTS, "evaluate": wanted, "progress": False, **changes}
    )


@pytest.fixture(scope="module")
def front(_trained, digits):
    return search(_trained, digits)


def test_every_point_is_within_its_budget_and_more_is_no_worse(front, trained, digits):
    assert list(front.results) == list(POINTS)
    for share, result in front.results.items():
        kept = costs.parameters(result.network, digits.example) / costs.parameters(trained, digits.example)
        assert kept <= share
        assert result.costs["parameters"]["share"] == kept
        assert result.costs["parameters"]["limit"] == pytest.approx(share * costs.parameters(trained, digits.example))
    table = front.table
    assert (table["cost"] <= table["budget"]).all()
    assert table["reward"].is_monotonic_increasing
    assert len(front.history) == 60 + LOOKS * len(POINTS)
    assert (front.history["budget"].between(9.999, 40.001)).all()


def test_it_comes_near_separate_searches_of_as_many_evaluations(front, trained, digits):
    separate = []
    for share in POINTS:
        budget = [Budget("parameters", share)]
        result = prune(trained, digits.example, budget, episodes=20, evaluate=wanted, progress=False)
        separate.append((100 * result.costs["parameters"]["share"], result.reward))
    together = [(row.cost, row.reward) for row in front.table.itertuples()]
    assert hypervolume(together, 40, 20) > 0.95 * hypervolume(separate, 40, 20)


def test_same_seed_same_front_and_stopped_ones_go_on(front, trained, digits, tmp_path, monkeypatch):
    def rows(front):
        return front.history.drop(columns="seconds")

    path, calls = tmp_path / "front.pt", []

    def stop(network):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return wanted(network)

    with pytest.raises(KeyboardInterrupt):
        search(trained, digits, evaluate=stop, checkpoint=path)
    resumed = search(trained, digits, checkpoint=path)
    pd.testing.assert_frame_equal(rows(resumed), rows(front))
    assert not rows(search(trained, digits, seed=1)).equals(rows(front))
    with pytest.raises(InputError, match="belongs to another run"):
        search(trained, digits, seed=1, checkpoint=path)


@pytest.mark.parametrize("multiple", [1, 8])  # in multiples of 8 there are few networks, so that decisions come again
def test_fronts_of_a_noisy_cost_go_on_and_offer_every_network_once(multiple, trained, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "PAUSE", 0)
    random, calls, offered = np.random.default_rng(0), [], []

    def noisy(network, example):
        widths = [network.features[i].out_channels for i in (0, 4, 8, 11)]
        return sum(widths) * (1 + 0.1 * random.random())

    def stop(network):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return wanted(network)

    def spy(candidates, ranked, *rest):
        offered.append(ranked)
        return finish(candidates, ranked, *rest)

    monkeypatch.setattr(front_module, "finish", spy)
    how = {
        "cost": noisy,
        "episodes": 30,
        "points": (0.4, 0.6),
        "multiple": multiple,
        "checkpoint": tmp_path / "front.pt",
    }
    with pytest.raises(KeyboardInterrupt):
        search(trained, digits, evaluate=stop, **how)
    front = search(trained, digits, **how)
    assert len(front.history) == 30 + 2 * LOOKS
    assert len(offered) == 2
    for ranked in offered:
        assert len({tuple(decision.widths) for decision in ranked}) == len(ranked) > 1
        assert [decision.reward for decision in ranked] == sorted((d.reward for d in ranked), reverse=True)


def test_a_checkpoint_is_of_one_split(trained, digits, tmp_path):
    def stop(network):
        if path.exists():
            raise KeyboardInterrupt
        return wanted(network)

    path = tmp_path / "front.pt"
    with pytest.raises(KeyboardInterrupt):
        search(trained, digits, data=digits, evaluate=stop, checkpoint=path)
    with pytest.raises(InputError, match="belongs to another run"):
        search(trained, digits, data=data.load("digits", validation=0.2, seed=1), checkpoint=path)
    with pytest.raises(InputError, match="belongs to another run"):
        search(trained, digits, data=replace(digits, mean=digits.mean + 0.1), checkpoint=path)


def test_filterwise_and_measured_costs_have_fronts_too(trained, digits, tmp_path):
    def filters(network, example):
        return float(sum(p.shape[0] for p in network.parameters() if p.ndim == 4))

    front = search(trained, digits, cost=filters, action="filterwise", episodes=20, points=(0.3, 0.6))
    assert all(result.costs["filters"]["share"] <= share for share, result in front.results.items())
    saved = front.save(tmp_path / "front")
    assert len(pd.read_csv(saved / "history.csv")) == 20 + 2 * LOOKS
    assert load(saved / "0.3", trained).widths == front.results[0.3].widths


def test_environment_keeps_gymnasiums_rules_and_says_its_budget(trained, digits):
    env = FrontEnv(trained, digits.example, "parameters", 0.02, 0.5, lambda masks: 1.0)
    check_env(env, skip_render_check=True)
    shares = []
    for _ in range(9):
        observation, _ = env.reset()
        shares.append(env.share)
        assert observation[-1] == pytest.approx(math.log10(env.share))
        for _ in env.groups:
            *_, info = env.step(np.array([0.9], np.float32))
        asked = env.episodes[-1]["asked"][0]
        band = min(int(BANDS * math.log(env.share / 0.02) / math.log(25)), BANDS - 1)
        assert info["cost"][band] == pytest.approx(asked - 100 * env.share)
        assert np.count_nonzero(info["cost"]) == 1
        assert env.candidates.costs(env.episodes[-1]["decision"].widths)[0] <= env.share * env.candidates.unpruned[0]
    assert len(set(shares)) == 9
    env.reset(options={"share": 0.25})
    assert env.share == 0.25
    env.reset(options={"share": 0.01})  # below all bands: it counts in the first
    for _ in env.groups:
        *_, info = env.step(np.array([0.9], np.float32))
    assert info["cost"].nonzero()[0].tolist() == [0]
    with pytest.raises(InputError, match="from a share above 0 to a larger one"):
        FrontEnv(trained, digits.example, "parameters", 0.1, 0.1, lambda masks: 1.0)


def test_bad_input_is_named(trained, digits):
    for changes, words in [
        ({"points": (0.1, 0.1)}, "at least 2 different points"),
        ({"episodes": 0}, "episodes must be a whole number of at least 1"),
        ({"imagined": -1}, "imagined must be a whole number of at least 0"),
    ]:
        with pytest.raises(InputError, match=words):
            search(trained, digits, **changes)
    with pytest.raises(InputError, match="share above 0 and at most 1"):
        search(trained, digits, points=(0.1, 2.0))
    with pytest.raises(InputError, match="cannot be met"):
        search(trained, digits, points=(1e-6, 0.5))
