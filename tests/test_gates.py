"""Gates as the criterion of a search."""

import numpy as np
import pandas as pd
import pytest
import torch

from rlprune import Budget, gates, pareto, peers, prune
from rlprune.errors import InputError

SMALL = {"images": 150, "recalibration": 150}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(gates, "ROUNDS", 10)
    monkeypatch.setattr(gates, "IMAGES", 300)


def run(method, trained, digits, **more):
    how = {"criterion": "gates", "evaluation": SMALL, "progress": False, **more}
    return method(trained, digits.example, [Budget("parameters", 0.15)], digits, **how)


@pytest.mark.parametrize("action", ["layerwise", "filterwise"])
def test_an_agent_keeps_what_the_gates_rank_highest(action, trained, digits, monkeypatch):
    learned = []

    class Kept(gates.Gates):
        def scores(self):
            found = super().scores()
            learned.append(found)
            return found

    monkeypatch.setattr(gates, "Gates", Kept)
    result = run(prune, trained, digits, action=action, episodes=20)
    scores = learned[-1]
    for score, mask in zip(scores, result.masks, strict=True):
        if action == "layerwise":
            assert torch.equal(torch.topk(score, int(mask.sum())).indices.sort().values, mask.nonzero().flatten())
        elif not mask.all():  # gates have the largest say among several criteria
            assert score[mask].mean() > score[~mask].mean()
    assert result.costs["parameters"]["share"] <= 0.15


def test_an_agent_starts_from_the_ranking_of_the_gates(trained, digits):
    def distance(search, **more):
        tried = []

        def judge(network):
            tried.append([m.num_features for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)])
            return float(len(tried))

        run(search, trained, digits, episodes=10, evaluate=judge, **more)
        return np.abs(np.log(np.array(tried) / ranked)).mean()

    result = run(peers.prunenet, trained, digits, rounds=10, images=300)
    ranked = [kept for kept, _ in result.widths.values()]
    for search in (prune, peers.evolution):
        assert distance(search) < 0.5 * distance(search, start="uniform")


def test_all_searches_may_use_them_and_one_seed_gives_one_result(trained, digits):
    def history(seed):
        return run(peers.random, trained, digits, episodes=5, seed=seed).history.drop(columns="seconds")

    torch.manual_seed(1)
    np.random.seed(1)
    first = history(3)
    torch.manual_seed(2)
    pd.testing.assert_frame_equal(history(3), first)
    by_magnitude = run(peers.random, trained, digits, episodes=5, seed=3, criterion="magnitude").history
    assert first["reward"].mean() > by_magnitude["reward"].mean()


def test_a_method_that_asks_no_criterion_learns_none(trained, digits, monkeypatch):
    monkeypatch.setattr(gates.Gates, "__init__", lambda *args: pytest.fail("learned for nothing"))
    options = {"criterion": "gates", "evaluation": SMALL}
    more = {"epochs": 1, "batch_size": 64, "progress": False}
    assert peers.hfp(trained, digits.example, [Budget("macs", 0.5)], digits, **more, **options).reward > 0


def test_bad_input_is_one_sentence(trained, digits):
    with pytest.raises(InputError, match="Criterion 'gates' learns from images"):
        prune(trained, digits.example, [Budget("macs", 0.5)], evaluate=lambda network: 0.0, criterion="gates")
    with pytest.raises(InputError, match="Unknown criterion 'gate'.*gates"):
        run(prune, trained, digits, criterion="gate")
    with pytest.raises(InputError, match="criterion of a search for every budget"):
        pareto(trained, digits.example, "macs", digits, criterion="gates")


@pytest.mark.parametrize("action", ["layerwise", "filterwise"])
def test_a_search_that_goes_on_does_not_learn_its_gates_again(trained, digits, tmp_path, monkeypatch, action):
    how = {"action": action, "episodes": 10, "checkpoint": tmp_path / "state.pt"}
    first = run(prune, trained, digits, **how)
    monkeypatch.setattr(gates.Gates, "__init__", lambda *args, **options: pytest.fail("learned again"))
    assert run(prune, trained, digits, **how).widths == first.widths
