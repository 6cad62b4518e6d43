"""The published search: its own masks, cost and schedule, and a network within budget all the same."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import nn

from rlprune import Budget, costs, networks, peers
from rlprune.errors import InputError
from rlprune.groups import trace
from rlprune.peers import paper
from rlprune.peers.paper import COARSE, FINE, PublishedEnv, Schedule

SEARCHES = [peers.paper_coarse, peers.paper_fine]
SMALL = {"images": 150, "recalibration": 150}


@pytest.fixture
def brief(monkeypatch):
    """The schedules, with next to no fine-tuning."""
    for name in ("COARSE", "FINE"):
        monkeypatch.setattr(paper, name, replace(getattr(paper, name), phases=(0, 2)))


def play(env, actions):
    env.reset(seed=0)
    for action in actions:
        *_, reward, over, _, info = env.step(np.asarray(action, np.float32))
    assert over
    return reward, info["cost"]


@pytest.mark.parametrize(("fine", "schedule"), [(False, COARSE), (True, FINE)])
def test_environment_keeps_gymnasiums_rules(fine, schedule, trained, digits):
    env = PublishedEnv(trained, digits, fine, schedule, episodes=10, images=50, seed=0)
    check_env(env, skip_render_check=True)
    assert env.observation_space.shape == ((9,) if fine else (10,))
    assert env.action_space.shape == ((32,) if fine else (1,))


def test_coarse_prunes_the_smallest_weights_and_counts_them(trained, digits, monkeypatch):
    env = PublishedEnv(trained, digits, False, COARSE, episodes=10, images=50, seed=0)
    seen = []
    monkeypatch.setattr(env, "_accuracy", lambda masks, steps: seen.append((masks, steps)) or 0.0)
    first, *_ = env.reset()
    assert first[-1] == 0
    second, *_ = env.step(np.array([0.75]))
    assert second[-1] == 0.75  # the sum of the actions so far
    for _ in range(2):
        env.step(np.array([0.75]))
    *_, info = env.step(np.array([1.0]))
    (masks, steps) = seen[0]
    assert steps == 0
    for mask, name, share in zip(masks, env.layers, [0.75, 0.75, 0.75, 0.8], strict=True):  # 0.8: the cap
        weight = trained.get_submodule(name).weight.detach().abs()
        assert float(mask.float().mean()) == pytest.approx(1 - share, abs=1e-3)
        assert weight[mask].min() >= weight[~mask].max()
    kept = 100 * sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
    assert info["cost"] == pytest.approx(4 * kept)


def test_schedule_moves_on_with_the_episodes(trained, digits, monkeypatch):
    schedule = Schedule(0.5, (0, 2, 4))
    env = PublishedEnv(trained, digits, False, schedule, episodes=6, images=50, seed=0)
    seen = []
    monkeypatch.setattr(
        env, "_accuracy", lambda masks, steps: seen.append((float(masks[0].float().mean()), steps)) or 0.0
    )
    for _ in range(7):
        play(env, [[1.0]] * 4)
    assert [steps for _, steps in seen] == [0, 0, 2, 2, 4, 4, 4]
    assert np.allclose([kept for kept, _ in seen], [0.5, 5 / 12, 1 / 3, 0.25, 1 / 6, 1 / 12, 0], atol=0.01)


def test_finetuning_before_the_reward_keeps_weights_pruned_and_helps(trained, digits, monkeypatch):
    before = copy.deepcopy(trained.state_dict())
    cut = [[0.7]] * 4
    reward = {}
    for steps in (0, 60):
        env = PublishedEnv(trained, digits, False, Schedule(1.0, (steps,)), episodes=1, images=400, seed=0)
        reward[steps], _ = play(env, cut)
    assert reward[60] > reward[0] + 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


def test_a_network_in_training_mode_keeps_its_statistics(trained, digits):
    network = copy.deepcopy(trained).train()
    PublishedEnv(network, digits, False, COARSE, episodes=1, images=50, seed=0)
    assert network.training
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), trained.buffers(), strict=True))


def test_the_seed_decides_dropout_too(trained, digits):
    network, rewards = nn.Sequential(trained, nn.Dropout(0.5)).eval(), []
    for start in (1, 2):
        env = PublishedEnv(network, digits, False, Schedule(1.0, (5,)), episodes=1, images=400, seed=0)
        torch.manual_seed(start)
        rewards.append(play(env, [[0.7]] * 4)[0])
    assert rewards[0] == rewards[1]


def test_fine_masks_whole_filters_from_a_half_on(trained, digits, monkeypatch):
    env = PublishedEnv(trained, digits, True, FINE, episodes=10, images=50, seed=0)
    seen = []
    monkeypatch.setattr(env, "_accuracy", lambda masks, steps: seen.append(masks) or 0.0)
    action = np.linspace(0, 1, 32)
    _, cost = play(env, [action] * 4)
    for mask, name in zip(seen[0], env.layers, strict=True):
        size = trained.get_submodule(name).out_channels
        assert torch.equal(mask.flatten(1).all(1), torch.from_numpy(action[:size] >= 0.5))
        assert torch.equal(mask.flatten(1).all(1), mask.flatten(1).any(1))
    assert cost == pytest.approx(400 * sum(int(m.sum()) for m in seen[0]) / sum(m.numel() for m in seen[0]))


@pytest.mark.parametrize("search", SEARCHES)
def test_what_is_returned_is_within_budget(search, trained, digits, brief):
    def run(seed):
        return search(
            trained,
            digits.example,
            [Budget("parameters", 0.2)],
            digits,
            episodes=40,
            seed=seed,
            images=60,
            progress=False,
            evaluation=SMALL,
        )

    result = run(0)
    assert result.method == search.__name__
    assert costs.parameters(result.network, digits.example) <= 0.2 * costs.parameters(trained, digits.example)
    history = result.history
    assert len(history) == 40
    assert {"episode", "steps", "reward", "mean_action", "parameters", "lambda_parameters", "best"} <= set(history)
    assert (history.loc[history["best"].notna(), "parameters"].cummin() <= 20).all()
    pd.testing.assert_frame_equal(run(0).history.drop(columns="seconds"), history.drop(columns="seconds"))
    assert not run(1).history["reward"].equals(history["reward"])


def test_residual_networks_are_searched_too(digits, brief):
    network = networks.build("resnet20").eval()
    for search in SEARCHES:
        arguments = {"episodes": 7, "images": 20, "progress": False, "evaluation": SMALL}
        result = search(network, digits.example, [Budget("parameters", 0.5)], digits, **arguments)
        assert result.costs["parameters"]["share"] <= 0.5


def test_layers_that_the_search_does_not_decide_stay(digits, brief):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, stride=4), nn.ReLU(), nn.ConvTranspose2d(6, 8, 2), nn.ReLU(), nn.Conv2d(8, 6, 3)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)).eval()
    for search in SEARCHES:
        arguments = {"episodes": 3, "images": 20, "progress": False, "evaluation": SMALL}
        result = search(network, digits.example, [Budget("parameters", 0.7)], digits, **arguments)
        assert list(result.widths) == ["0", "4"]


def test_bad_input_is_named(trained, digits):
    for budgets in ([Budget("macs", 0.5)], [Budget("parameters", 1e4, relative=False)]):
        with pytest.raises(InputError, match="one budget, a share of the parameters"):
            peers.paper_coarse(trained, digits.example, budgets, digits)
    with pytest.raises(InputError, match="on training images: give data"):
        peers.paper_fine(trained, digits.example, [Budget("parameters", 0.5)], evaluate=lambda network: 0.0)
    with pytest.raises(InputError, match="images must be a whole number of at least 1, not 0"):
        peers.paper_fine(trained, digits.example, [Budget("parameters", 0.5)], digits, images=0)
    frozen = copy.deepcopy(trained).requires_grad_(False)
    with pytest.raises(InputError, match="No weight of the network may change"):
        peers.paper_coarse(frozen, digits.example, [Budget("parameters", 0.5)], digits, episodes=1, progress=False)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.Linear(16, 10))
    with pytest.raises(InputError, match="no filter to prune"):
        peers.paper_coarse(flat, digits.example, [Budget("parameters", 0.5)], digits)


def test_filters_that_a_grouped_convolution_ties_have_the_mean_of_their_scores():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8, 10)).eval()
    group = next(iter(trace(network, torch.zeros(1, 3, 5, 5))))
    assert group.size == 4
    action = np.arange(8.0)
    assert paper._of_filters(group, action).tolist() == [0.5, 2.5, 4.5, 6.5]


@pytest.mark.parametrize(
    ("exclude", "fault"), [(nn.Conv2d, "must be a sequence of names or types"), ("0", "must be a sequence of names")]
)
def test_layers_to_exclude_are_checked(trained, digits, exclude, fault):
    with pytest.raises(InputError, match=fault):
        peers.paper_coarse(trained, digits.example, [Budget("parameters", 0.5)], digits, exclude=exclude)
