"""The environment and the candidates behind it."""

import warnings

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprune import Budget, PruningEnv, costs, networks, trace
from rlprune.candidates import STARTS, Candidates
from rlprune.env import ACTIONS, HARMONICS
from rlprune.errors import InputError
from rlprune.importance import FEATURES, features
from rlprune.masking import slim

BUDGETS = [Budget(costs.parameters, 0.2), Budget(costs.macs, 0.3)]


@pytest.fixture
def env(trained, digits):
    return PruningEnv(trained, digits.example, BUDGETS, reward=lambda masks: float(sum(m.sum() for m in masks)))


def play(env, shares):
    observation, _ = env.reset(seed=0)
    steps = []
    for share in shares:
        observation, reward, terminated, truncated, info = env.step(np.array(share, dtype=np.float32).reshape(-1))
        steps.append((observation, reward, terminated, info["cost"]))
        assert not truncated
    return steps


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("start", STARTS)
def test_passes_gymnasiums_checker(action, start, trained, digits):
    env = PruningEnv(trained, digits.example, BUDGETS, reward=lambda masks: 1.0, action=action, start=start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(infinity|Not able to test alternative render).*")
        check_env(env, skip_render_check=True)


def test_episode_walks_every_group_and_pays_at_the_end(env):
    steps = play(env, [0.5] * len(env.groups))
    assert [s[2] for s in steps] == [False] * (len(env.groups) - 1) + [True]
    assert all(s[1] == 0 and (s[3] == 0).all() for s in steps[:-1])
    assert steps[-1][1] > 0
    assert steps[-1][3].shape == (2,)
    with pytest.raises(InputError, match="call reset"):
        env.step(np.array([0.5], dtype=np.float32))


def test_cost_is_what_was_asked_for_in_percent(env, trained, digits):
    cost = play(env, [0.5] * len(env.groups))[-1][3]
    candidates = env.candidates
    network = slim(trained, env.groups, candidates.masks(candidates.widths(np.full(len(env.groups), 0.5))))
    for value, count in zip(cost, (costs.parameters, costs.macs), strict=True):
        assert value == pytest.approx(100 * count(network, digits.example) / count(trained, digits.example))
    assert env.limits == pytest.approx([20, 30])
    assert cost[0] > env.limits[0]  # asked for too much …
    assert env.episodes[-1]["feasible"]  # … and evaluated within budget


def test_observation_is_as_documented(env, trained):
    observation, _ = env.reset()
    assert observation.shape == (11 + HARMONICS + len(BUDGETS),)
    assert observation.dtype == np.float32
    sizes = [group.size for group in env.groups]
    first = [0, np.log2(3) / 10, np.log2(sizes[0]) / 10, 1, 0.5, 1]
    assert observation[:6] == pytest.approx(first, abs=1e-6)
    assert observation[8:11] == pytest.approx([1, 1, 1])
    assert observation[-2:] == pytest.approx([0.2, 0.3])
    shares = [0.3, 0.6, 0.9, 0.5]
    steps = play(env, shares)
    second = steps[1][0]  # before the third decision
    assert second[0] == pytest.approx(2 / 3)
    assert second[2] == pytest.approx(np.log2(sizes[2]) / 10)
    assert second[8:11] == pytest.approx([0.6, 0.45, 0.5])
    assert second[11] == pytest.approx(np.cos(np.pi * 2 / 3), abs=1e-6)
    masks = [torch.ones(size, dtype=torch.bool) for size in sizes]
    masks[2] = torch.arange(sizes[2]) == 0
    without = slim(trained, env.groups, masks)
    example = env.candidates.example_input
    gone = [1 - cost(without, example) / cost(trained, example) for cost in (costs.parameters, costs.macs)]
    assert second[6:8] == pytest.approx(gone, abs=1e-6)


def test_size_of_the_observation_does_not_depend_on_the_network(digits):
    sizes = set()
    for name in ("vgg11", "resnet20"):
        network = networks.build(name).eval()
        sizes.add(PruningEnv(network, digits.example, BUDGETS, reward=lambda masks: 0.0).observation_space.shape)
    assert len(sizes) == 1


def test_bad_input(trained, digits):
    with pytest.raises(InputError, match="Unknown action space 'columnwise'"):
        PruningEnv(trained, digits.example, BUDGETS, reward=lambda m: 0.0, action="columnwise")
    with pytest.raises(InputError, match="cannot be met: the smallest .* is 82"):
        PruningEnv(trained, digits.example, [Budget(costs.parameters, 1e-4)], reward=lambda m: 0.0)
    env = PruningEnv(trained, digits.example, BUDGETS, reward=lambda m: 0.0)
    env.reset()
    with pytest.raises(InputError, match="must be 1 number"):
        env.step(np.array([np.nan]))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_decision_becomes_a_network_within_every_budget(_trained, digits, data):
    limits = [data.draw(st.floats(0.05, 1.0), label=name) for name in ("parameters", "macs")]
    budgets = [Budget(costs.parameters, limits[0]), Budget(costs.macs, limits[1])]
    groups = trace(_trained, digits.example)
    candidates = Candidates(_trained, groups, digits.example, budgets)
    shares = np.array([data.draw(st.floats(0, 1)) for _ in groups])
    how = data.draw(st.sampled_from(["shrink", "scale"]))
    widths = candidates.fit(shares, how)
    network = slim(_trained, groups, candidates.masks(widths))
    for budget, count in zip(budgets, (costs.parameters, costs.macs), strict=True):
        assert count(network, digits.example) <= budget.limit * count(_trained, digits.example)
    asked = candidates.widths(shares)
    if candidates.within(candidates.costs(asked)) and how == "shrink":
        assert widths == asked
    if how == "shrink":
        assert all(
            kept <= wanted for kept, wanted in zip(widths, candidates.widths(np.maximum(shares, 1e-3)), strict=True)
        )


def test_scaling_uses_all_of_the_budget(trained, digits):
    candidates = Candidates(trained, trace(trained, digits.example), digits.example, [Budget(costs.parameters, 0.3)])
    widths = candidates.fit(np.array([0.1, 0.2, 0.1, 0.2]), "scale")
    spent = candidates.costs(widths)[0] / candidates.limits[0]
    assert 0.9 < spent <= 1


def test_costs_that_must_be_measured_are_met_too(trained, digits):
    def buffers(network, example_input):
        return float(sum(b.numel() for b in network.buffers()))

    candidates = Candidates(trained, trace(trained, digits.example), digits.example, [Budget(buffers, 0.4)])
    widths = candidates.uniform()
    network = slim(trained, candidates.groups, candidates.masks(widths))
    assert buffers(network, None) <= 0.4 * buffers(trained, None)
    assert buffers(network, None) > 0.3 * buffers(trained, None)


def test_filterwise_actions_weigh_the_features_of_filters(trained, digits):
    seen = []
    arguments = {"reward": lambda masks: float(seen.append(masks) or 0), "action": "filterwise"}
    env = PruningEnv(trained, digits.example, [Budget("parameters", 1.0)], **arguments)
    assert env.action_space.shape == (1 + len(FEATURES),)
    weights = {"magnitude": [0.5, 1.0, *[0.5] * 4], "outgoing, reversed": [0.5, *[0.5] * 3, 0.0, 0.5]}
    for action in weights.values():
        env.reset()
        for _ in env.groups:
            env.step(np.array(action, dtype=np.float32))
    table = features(trained, env.groups)
    for masks, (column, sign) in zip(seen, [("magnitude", 1), ("outgoing", -1)], strict=True):
        for mask, of_group in zip(masks, table, strict=True):
            values = sign * of_group[:, FEATURES.index(column)]
            assert int(mask.sum()) == len(mask) // 2
            assert values[mask].min() >= values[~mask].max()
    env.reset()
    with pytest.raises(InputError, match="must be 6 number"):
        env.step(np.array([0.5], dtype=np.float32))


@pytest.mark.parametrize("action", ACTIONS)
def test_shares_may_be_relative_to_a_ranking(action, trained, digits):
    arguments = {"reward": lambda masks: 1.0, "action": action, "fit": "none", "start": "ranking"}
    env = PruningEnv(trained, digits.example, BUDGETS, **arguments)
    ranked, sizes = env.candidates.thresholded(env.candidates.scores), env.candidates.sizes
    assert len(set(np.array(ranked) / sizes)) > 1
    for number, factor in [(0, 0.5), (0.25, 2**-0.5), (0.5, 1), (1, 2)]:
        play(env, [[number, *[0.5] * (env.action_space.shape[0] - 1)]] * len(env.groups))
        expected = env.candidates.widths(np.array(ranked) / sizes * factor)
        assert env.episodes[-1]["decision"].widths == expected
    play(env, [[0.5, *[0.5] * (env.action_space.shape[0] - 1)]] * len(env.groups))
    assert env.episodes[-1]["feasible"]
    with pytest.raises(InputError, match="start 'best'"):
        PruningEnv(trained, digits.example, BUDGETS, **{**arguments, "start": "best"})


@pytest.mark.parametrize("action", ACTIONS)
def test_a_search_goes_on_with_the_scores_that_it_began_with(action, trained, digits):
    def environment(seed):
        def learned(candidates):
            generator = torch.Generator().manual_seed(seed)
            return [torch.rand(size, generator=generator) for size in candidates.sizes.tolist()]

        return PruningEnv(trained, digits.example, BUDGETS, sum_of, criterion=learned, action=action)

    def sum_of(masks):
        return float(sum((mask * torch.arange(len(mask))).sum() for mask in masks))

    first, second = environment(0), environment(1)
    actions = np.random.default_rng(0).uniform(size=(len(first.groups), *first.action_space.shape))
    reward = play(first, actions)[-1][1]
    assert play(second, actions)[-1][1] != reward
    second.restore(first.state())
    assert play(second, actions)[-1][1] == reward


def test_whether_a_budget_can_be_met_is_known_before_a_criterion_is_learned(trained, digits):
    def learned(candidates):
        raise AssertionError("learned before the budget was looked at")

    with pytest.raises(InputError, match="cannot be met"):
        Candidates(
            trained, trace(trained, digits.example), digits.example, [Budget("peak_memory", 1e-6)], criterion=learned
        )
