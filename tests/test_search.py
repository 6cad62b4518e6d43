"""The search: within budget, alive from the start, repeatable, resumable after SIGKILL; results that last."""

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from rlprune import Budget, Evaluator, costs, load, masking, networks, peers, prune, trace
from rlprune.errors import InputError
from rlprune.forward import accuracy
from rlprune.gates import Gates
from rlprune.training import Training, fit

SMALL = {"images": 150, "recalibration": 150}


def search(trained, digits, **changes):
    settings = {"episodes": 30, "evaluation": SMALL, "progress": False, **changes}
    return prune(trained, digits.example, [Budget(costs.parameters, 0.1)], digits, **settings)


def deterministic(history):
    return history.drop(columns="seconds")


@pytest.fixture(scope="module")
def found(_trained, digits):
    return search(_trained, digits)


def test_what_is_returned_meets_the_budget(found, trained, digits):
    kept = sum(p.numel() for p in found.network.parameters())
    unpruned = sum(p.numel() for p in trained.parameters())
    assert kept <= 0.1 * unpruned
    assert found.costs["parameters"]["value"] == kept
    assert [int(m.sum()) for m in found.masks] == [kept for kept, _ in found.widths.values()]


def test_history_has_a_row_per_episode(found):
    history = found.history
    assert list(history["episode"]) == list(range(1, 31))
    assert list(history["steps"]) == [4 * e for e in history["episode"]]
    assert history["best"].is_monotonic_increasing
    assert history["best"].iloc[-1] == found.reward
    assert {"reward", "mean_action", "parameters", "lambda_parameters", "seconds"} <= set(history)


def test_reward_is_alive_from_the_first_episode(digits):
    network = networks.VGG([64, "M", 128, "M", 128, 128, "M"])
    fit(network, digits, Training(epochs=3, batch_size=32, learning_rate=0.05), progress=None)
    evaluation = {"images": 287, "recalibration": 250}
    history = search(network, digits, episodes=20, evaluation=evaluation).history
    assert history["reward"].mean() > 20  # chance is 10
    dead = search(network, digits, episodes=20, evaluation={**evaluation, "recalibration": 0}).history
    assert history["reward"].mean() > dead["reward"].mean() + 5


def test_a_search_can_be_watched(found, trained, digits):
    seen = []
    search(trained, digits, watch=lambda history, limits: seen.append((history, limits)))
    assert [len(history) for history, _ in seen] == [10, 20, 30]
    assert seen[0][1] == {"parameters": pytest.approx(10)}
    pd.testing.assert_frame_equal(deterministic(seen[-1][0]), deterministic(found.history))


def test_same_seed_same_search(found, trained, digits):
    again, other = search(trained, digits), search(trained, digits, seed=1)
    pd.testing.assert_frame_equal(deterministic(again.history), deterministic(found.history))
    assert all(torch.equal(a, b) for a, b in zip(again.masks, found.masks, strict=True))
    assert not deterministic(other.history).equals(deterministic(found.history))


def tried(path):
    return len(torch.load(path, weights_only=True)["rows"])


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from rlprune import data, networks
from test_search import search
torch.set_num_threads(1)
network = networks.VGG([16, "M", 32, "M", 32, 32, "M"])
network.load_state_dict(torch.load({weights!r}, weights_only=True))
search(network.eval(), data.load("digits", validation=0.2), checkpoint=Path({path!r}))
"""


@pytest.mark.parametrize("least", [1, 20])  # before the agent has a model of the reward, and after
def test_killed_search_ends_as_if_never_stopped(least, found, trained, digits, tmp_path):
    path, weights = tmp_path / "search.pt", tmp_path / "weights.pt"
    torch.save(trained.state_dict(), weights)
    script = KILLED.format(tests=os.path.dirname(__file__), weights=str(weights), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", script])
    while process.poll() is None and (not path.exists() or tried(path) < least):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert least <= tried(path) < 30
    resumed = search(trained, digits, checkpoint=path)
    pd.testing.assert_frame_equal(deterministic(resumed.history), deterministic(found.history))
    assert all(torch.equal(a, b) for a, b in zip(resumed.masks, found.masks, strict=True))
    assert resumed.evaluations == 30
    with pytest.raises(InputError, match="belongs to another run"):
        search(trained, digits, seed=5, checkpoint=path)


def test_a_checkpoint_is_of_one_normalisation(trained, digits, tmp_path):
    path = tmp_path / "search.pt"
    search(trained, digits, episodes=2, checkpoint=path)
    with pytest.raises(InputError, match="belongs to another run"):
        search(trained, dataclasses.replace(digits, std=2 * digits.std), episodes=2, checkpoint=path)


def test_budget_out_of_reach_is_refused_before_the_search(trained, digits):
    start = time.perf_counter()
    with pytest.raises(InputError, match="cannot be met: the smallest .* is 82") as error:
        prune(trained, digits.example, [Budget(costs.parameters, 1e-4)], digits, episodes=10**6)
    assert time.perf_counter() - start < 10
    assert "\n" not in str(error.value)


def test_bad_options(trained, digits):
    with pytest.raises(InputError, match="episodes must be a whole number of at least 1"):
        search(trained, digits, episodes=0)
    for wrong, words in [
        ({"episodes": "50"}, "episodes must be a whole number of at least 1"),
        ({"seed": None}, "seed must be a whole number"),
        ({"minimum": "4"}, "minimum must be a whole number of at least 1"),
        ({"multiple": 2.5}, "multiple must be a whole number of at least 1, not 2.5"),
        ({"agent": 5}, "agent must be a dict"),
        ({"evaluation": 5}, "evaluation must be a dict"),
        ({"begin": "foo"}, "begin must be a result"),
        ({"finetune": {"epoch": 1}}, "Unknown training parameter 'epoch'"),
    ]:
        with pytest.raises(InputError, match=words):
            search(trained, digits, **wrong)
    with pytest.raises(InputError, match="leave whole_episodes True"):
        search(trained, digits, agent={"whole_episodes": False})
    with pytest.raises(InputError, match="Unknown way to fit"):
        search(trained, digits, fit_budget="magic")


def test_finetuning_is_part_of_the_call_if_asked_for(trained, digits, found):
    tuned = search(trained, digits, episodes=5, finetune=Training(epochs=3, batch_size=64, learning_rate=0.05))
    before = accuracy(found.network, digits, digits.validation)
    assert accuracy(tuned.network, digits, digits.validation) > before


def test_a_network_that_finetuning_brings_over_budget_is_returned_as_it_was_before(trained, digits):
    def nonzero(network, example_input):  # what depends on the weights' values
        last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
        return costs.parameters(network, example_input) * (1 if last.weight.abs().max() > 1e-3 else 0.5)

    with torch.no_grad():
        dead = copy.deepcopy(trained)
        [module for module in dead.modules() if isinstance(module, torch.nn.Linear)][-1].weight.mul_(1e-4)
    budget, schedule = Budget(nonzero, 0.3), Training(epochs=1, batch_size=32, learning_rate=0.3)
    settings = {"episodes": 10, "evaluation": {**SMALL, "ridge": 0}, "progress": False, "finetune": schedule}
    with pytest.warns(UserWarning, match="over its limit.*before fine-tuning"):
        result = prune(dead, digits.example, [budget], digits, **settings)
    cost = result.costs["nonzero"]
    assert nonzero(result.network, digits.example) == cost["value"] <= cost["limit"]


def test_a_network_whose_finetuning_diverges_is_returned_as_it_was_before(trained, digits):
    schedule = Training(epochs=1, batch_size=64, learning_rate=1e30)
    with pytest.warns(UserWarning, match="diverged .* before fine-tuning"):
        result = search(trained, digits, episodes=2, finetune=schedule)
    assert all(torch.isfinite(tensor).all() for tensor in result.network.state_dict().values())
    assert accuracy(result.network, digits, digits.validation) > 20
    assert not result.network.training


def test_faults_are_found_before_the_search(trained, digits, monkeypatch):
    monkeypatch.setattr(Evaluator, "__call__", lambda *args: pytest.fail("searched for nothing"))
    example, budget = digits.example, Budget("parameters", 0.1)
    for budgets in (budget, [0.1], ["parameters"]):
        with pytest.raises(InputError, match="budgets must be a list of Budget"):
            prune(trained, example, budgets, digits)
        for method in (peers.uniform, peers.hfp, peers.paper_coarse):
            with pytest.raises(InputError, match="budgets must be a list of Budget"):
                method(trained, example, budgets, digits)
    with pytest.raises(InputError, match="Unknown option of the evaluator 'imges'"):
        prune(trained, example, [budget], digits, evaluation={"imges": 3})
    with pytest.raises(InputError, match="do not fill one batch of 5000"):
        prune(trained, example, [budget], digits, finetune=Training(batch_size=5000))
    monkeypatch.setattr(Gates, "round", lambda *args: pytest.fail("learned gates for nothing"))
    with pytest.raises(InputError, match="Unknown option of the agent 'learning_speed'"):
        prune(trained, example, [budget], digits, criterion="gates", agent={"learning_speed": 1})
    with pytest.raises(InputError, match="finetune_rate above 0"):
        prune(trained, example, [budget], digits, evaluation={"finetune_rate": -1.0})
    with pytest.raises(InputError, match="watch must be a function"):
        prune(trained, example, [budget], digits, watch=3)
    few = networks.VGG([8, "M"], classes=5)
    with pytest.raises(InputError, match="There is a label 9"):
        prune(few, example, [budget], digits, evaluate=lambda network: 1.0, finetune=Training())


def test_a_network_of_ones_own_may_call_anything_its_architecture(trained, digits):
    own = copy.deepcopy(trained)
    own.architecture = "resnet18"
    assert peers.uniform(own, digits.example, [Budget("parameters", 0.3)], digits, evaluation=SMALL).architecture == {}


def test_filterwise_search_repeats_itself_and_its_network_is_the_one_it_found(trained, digits):
    first, again = (search(trained, digits, action="filterwise", episodes=20) for _ in range(2))
    pd.testing.assert_frame_equal(deterministic(first.history), deterministic(again.history))
    evaluator = Evaluator(trained, trace(trained, digits.example), digits, **SMALL)
    assert evaluator(first.masks) == first.reward == first.history["reward"].max()
    assert first.costs["parameters"]["share"] <= 0.1


def test_an_agent_goes_on_with_what_it_learned_on_another_network(trained, digits, tmp_path):
    """Wanted is little of the first layers and much of the last, in any network."""

    def wanted(network):
        widths = [module.out_channels / 64 for module in network.features if isinstance(module, torch.nn.Conv2d)]
        return 100 * sum(width * (-1) ** (i < len(widths) / 2) for i, width in enumerate(widths)) / len(widths)

    def search(network, **changes):
        settings = {"evaluate": wanted, "fit_budget": "shrink", "progress": False, **changes}
        return prune(network, digits.example, [Budget("parameters", 0.5)], **settings)

    teacher = search(networks.VGG([64, "M", 64, "M", 64, 64]).eval(), episodes=100)
    teacher.save(tmp_path / "agent")
    known = load(tmp_path / "agent", networks.VGG([64, "M", 64, "M", 64, 64]))
    larger = networks.VGG([64, 64, "M", 64, 64, "M", 64, 64]).eval()
    fresh, taught = search(larger, episodes=20), search(larger, episodes=20, begin=known)
    assert taught.history["reward"].head(10).mean() > fresh.history["reward"].head(10).mean() + 3
    pd.testing.assert_frame_equal(
        deterministic(search(larger, episodes=20, begin=teacher).history), deterministic(taught.history)
    )
    how = {"episodes": 2, "checkpoint": tmp_path / "search.pt"}
    search(larger, begin=teacher, **how)
    search(larger, begin=known, **how)  # the same agent
    for another in (None, taught):
        with pytest.raises(InputError, match="belongs to another run"):
            search(larger, begin=another, **how)
    with pytest.raises(InputError, match="no agent in a result of method 'uniform'"):
        search(larger, begin=peers.uniform(trained, digits.example, [Budget("parameters", 0.5)], evaluate=wanted))
    with pytest.raises(InputError, match="agent with"):
        search(larger, begin=known, action="filterwise")
    with pytest.raises(InputError, match="start='uniform'"):
        search(larger, begin=known, start="ranking")


def test_candidates_may_be_finetuned_before_they_are_judged(trained, digits):
    plain, tuned = (
        search(trained, digits, episodes=10, evaluation={**SMALL, "finetune_steps": steps}) for steps in (0, 20)
    )
    assert tuned.history["reward"].mean() > plain.history["reward"].mean()


def test_uniform_is_the_widest_network_that_fits(trained, digits):
    result = peers.uniform(trained, digits.example, [Budget(costs.parameters, 0.3)], digits, evaluation=SMALL)
    shares = [kept / size for kept, size in result.widths.values()]
    assert max(shares) - min(shares) < 0.07  # rounding down
    assert 0.27 < result.costs["parameters"]["share"] <= 0.3
    assert result.evaluations == 1
    groups = trace(trained, digits.example)
    wider = [torch.ones(g.size, dtype=torch.bool) for g in groups]
    for mask, (kept, _) in zip(wider, result.widths.values(), strict=True):
        mask[min(kept + 1, len(mask)) :] = False
    assert costs.parameters(masking.slim(trained, groups, wider), digits.example) > result.costs["parameters"]["limit"]


def test_three_lines_for_own_images(trained, digits):
    pair = digits.train.images, digits.train.labels
    result = prune(trained, digits.example, [Budget("macs", 0.3)], pair, episodes=5, progress=False, evaluation=SMALL)
    assert result.costs["macs"]["share"] <= 0.3


def test_own_measure_without_data(trained, digits, capsys):
    def evaluate(network):
        return -sum(p.numel() for p in network.parameters())

    result = prune(trained, digits.example, [Budget("macs", 0.5)], episodes=5, evaluate=evaluate)
    assert result.reward == evaluate(result.network)
    assert "satisfiable" in capsys.readouterr().out  # the budgets' table, before the search
    with pytest.raises(InputError, match="Fine-tuning needs data"):
        prune(trained, digits.example, [Budget("macs", 0.5)], evaluate=evaluate, finetune=Training())
    with pytest.raises(InputError, match="nothing to judge"):
        prune(trained, digits.example, [Budget("macs", 0.5)])


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("start", ["uniform", "ranking"])
def test_a_search_under_a_noisy_cost_goes_on(start, relative, trained, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "PAUSE", 0)
    random = np.random.default_rng(0)  # never the same again, as in another process

    def noisy(network, example_input):
        return sum(p.numel() for p in network.parameters()) * (1 + 1e-2 * random.random())

    def stop(history, limits):
        if len(history) == 20:
            raise KeyboardInterrupt
        seen.append((history, limits))

    limit = 0.3 if relative else 0.3 * sum(p.numel() for p in trained.parameters())
    settings = {"episodes": 30, "evaluate": lambda network: noisy(network, None), "start": start, "progress": False}
    settings |= {"budgets": [Budget(noisy, limit, relative=relative)], "checkpoint": tmp_path / "search.pt"}
    seen = []
    with pytest.raises(KeyboardInterrupt):
        prune(trained, digits.example, **settings, watch=stop)
    before = torch.load(tmp_path / "search.pt", weights_only=True)
    result = prune(trained, digits.example, **settings, watch=lambda *now: seen.append(now))
    pd.testing.assert_frame_equal(result.history.head(10), seen[0][0])
    assert [len(history) for history, _ in seen] == [10, 20, 30]
    assert seen[0][1] == seen[-1][1]  # the limit in percent of what was measured at first
    envs = [state["env"] for state in (before, torch.load(tmp_path / "search.pt", weights_only=True))]
    assert all(map(torch.equal, *(env.pop("scores") for env in envs)))
    assert envs[0] == envs[1]
    settings["budgets"] = [Budget(noisy, 1.01 * limit, relative=relative)]
    with pytest.raises(InputError, match="belongs to another run"):
        prune(trained, digits.example, **settings)


@pytest.mark.parametrize(
    "changes", [{"action": "filterwise"}, {"agent": {"initial_action": 0.5}}, {"start": "ranking"}]
)
def test_a_checkpoint_is_of_one_kind_of_agent(changes, trained, digits, tmp_path):
    how = {"episodes": 2, "evaluate": lambda network: 0.0, "checkpoint": tmp_path / "search.pt", "progress": False}
    prune(trained, digits.example, [Budget("parameters", 0.3)], **how)
    with pytest.raises(InputError, match="belongs to another run"):
        prune(trained, digits.example, [Budget("parameters", 0.3)], **how, **changes)


def test_a_checkpoint_is_of_one_example_and_one_judge(trained, digits, tmp_path):
    how = {"episodes": 2, "checkpoint": tmp_path / "search.pt", "progress": False}
    budgets = [Budget("macs", 0.3)]
    prune(trained, digits.example, budgets, evaluate=lambda network: 0.0, **how)
    with pytest.raises(InputError, match="belongs to another run"):
        prune(trained, digits.example[..., :16, :16], budgets, evaluate=lambda network: 0.0, **how)
    how["checkpoint"] = tmp_path / "judged.pt"
    prune(trained, digits.example, budgets, digits, evaluate=lambda network: 0.0, **how)
    with pytest.raises(InputError, match="belongs to another run"):
        prune(trained, digits.example, budgets, digits, **how)


def test_a_checkpoint_is_of_one_cost(trained, digits, tmp_path):
    def cost(scale):
        return Budget(lambda network, x: scale * sum(p.numel() for p in network.parameters()), 0.5, name="weights")

    how = {"episodes": 2, "evaluate": lambda network: 0.0, "checkpoint": tmp_path / "search.pt", "progress": False}
    prune(trained, digits.example, [cost(1)], **how)
    with pytest.raises(InputError, match="in which the unpruned network's weights was"):
        prune(trained, digits.example, [cost(4)], **how)


def test_a_network_within_budget_already_is_told_of(trained, digits):
    with pytest.warns(UserWarning, match="within every budget already"):
        prune(trained, digits.example, [Budget("parameters", 1.0)], evaluate=lambda n: 0.0, episodes=2, progress=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_search_learns_where_gradients_are_off(mode, found, trained, digits):
    example, budgets = digits.example, [Budget(costs.parameters, 0.1)]
    how = {"episodes": 10, "evaluation": SMALL, "progress": False, "finetune": {"epochs": 1, "batch_size": 64}}
    with mode():
        again = prune(trained, example, budgets, digits, **how)
    pd.testing.assert_frame_equal(deterministic(again.history.head(10)), deterministic(found.history.head(10)))


def test_layers_left_alone_are_named_with_the_table_and_the_budget(capsys):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Unflatten(1, (8, 36)), nn.Flatten())
    network.extend([nn.Linear(288, 16), nn.ReLU(), nn.Linear(16, 10)]).eval()
    how = {"evaluate": lambda network: 0.0, "episodes": 2}
    prune(network, torch.rand(2, 3, 8, 8), [Budget("parameters", 0.5)], **how)
    assert "left alone: 0 (" in capsys.readouterr().out
    with pytest.raises(InputError, match="cannot be met.* left alone, such as 0: "):
        prune(network, torch.rand(2, 3, 8, 8), [Budget("parameters", 0.01)], **how)


def test_a_noisy_cost_is_measured_again_before_a_network_is_accepted(trained, digits, monkeypatch):
    monkeypatch.setattr(costs, "PAUSE", 0)
    state = {"calls": 0, "evaluated": 0, "truth": 2.0}  # during the search the cost shows half the truth

    def noisy(network, example_input):
        state["calls"] += 1
        seen = 0.5 if state["evaluated"] < 5 else state["truth"] / 2
        return seen * sum(p.numel() for p in network.parameters()) * (1 + 1e-3 * (state["calls"] % 3))

    def evaluate(network):
        state["evaluated"] += 1
        return float(sum(p.numel() for p in network.parameters()))

    unpruned = sum(p.numel() for p in trained.parameters())
    budget = Budget(noisy, 0.3 * unpruned, relative=False)
    result = prune(trained, digits.example, [budget], episodes=10, evaluate=evaluate, progress=False)
    cost = result.costs["noisy"]
    assert cost["low"] < cost["high"]
    assert cost["value"] <= 0.3 * unpruned
    assert sum(p.numel() for p in result.network.parameters()) <= 0.3 * unpruned
    state.update(evaluated=0, truth=1e4)
    with pytest.raises(InputError, match="the cost is noisy"):
        prune(trained, digits.example, [budget], episodes=10, evaluate=evaluate, progress=False)


def test_decisions_use_the_budget_up_unless_that_takes_measurements(trained, digits):
    measured = []

    def filters(network, example):
        measured.append(network)
        return float(sum(p.shape[0] for p in network.parameters() if p.ndim == 4))

    how = {"episodes": 10, "evaluate": lambda network: 0.0, "progress": False, "agent": {"initial_action": 0.1}}
    small = prune(trained, digits.example, [Budget(filters, 0.9)], **how)
    assert small.costs["filters"]["share"] < 0.5  # nothing was over budget, so nothing was scaled
    assert len(measured) < 10 * 7
    assert prune(trained, digits.example, [Budget("macs", 0.9)], **how).costs["macs"]["share"] > 0.7


def test_what_the_search_has_measured_is_what_it_returns(digits):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16 * 30 * 30, 10)]
    network = nn.Sequential(*layers)  # to flatten channels-last takes memory for a copy
    example = digits.normalise(digits.train.images[:4]).contiguous()
    budgets, images = [Budget("peak_memory", 0.6)], {"images": 100, "recalibration": 50}
    schedule = Training(epochs=1, batch_size=128)
    result = prune(network, example, budgets, digits, 10, evaluation=images, finetune=schedule, progress=False)
    assert result.reward == result.history["reward"].max()
    assert result.network[0].weight.is_contiguous()
    assert costs.peak_memory(result.network, example) == result.costs["peak_memory"]["value"]
