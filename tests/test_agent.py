"""The agent, against constrained problems whose optimum is known in closed form."""

import io
import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlprune.agent import LagrangianPPO, PPOOptions
from rlprune.errors import InputError
from rlprune.policy import Multiplier, RunningStatistics, advantages


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Problem(gymnasium.Env):
    """A deterministic episode of ``length`` steps; the observation is the step, one-hot."""

    def __init__(self, length, actions, reward, cost, truncated=False):
        self.length, self.reward, self.cost, self.truncated = length, reward, cost, truncated
        self.observation_space = Box(-1, 2, (length,))
        self.action_space = Box(0, 1, (actions,))
        self.resets = []

    def _observation(self):
        return np.eye(1, self.length, self.t, dtype=np.float32)[0]

    def reset(self, *, seed=None, options=None):
        self.resets.append(seed)
        self.t = 0
        counted = np.asarray(self.cost(0, np.zeros(self.action_space.shape)))
        return self._observation(), {"cost": np.zeros_like(counted) + 1e6}  # a reset's cost counts for nothing

    def step(self, action):
        assert self.action_space.contains(action)
        reward, cost = self.reward(self.t, action.astype(float)), self.cost(self.t, action.astype(float))
        self.t += 1
        over = self.t == self.length
        return self._observation(), float(reward), over and not self.truncated, over and self.truncated, {"cost": cost}


def side_by_side(make, n=8):
    return SyncVectorEnv([make] * n, autoreset_mode=AutoresetMode.SAME_STEP)


def bandit(cost):
    """One step; reward a₁ + 0.6 a₂ − |a|²/2, whose unconstrained optimum is (1, 0.6)."""
    return Problem(1, 2, lambda t, a: a @ [1, 0.6] - a @ a / 2, cost)


def percent(t, a):
    return 100.0 * a.sum()


FAST = {"steps_per_update": 16, "minibatch": 128, "epochs": 5, "initial_log_std": -1.5, "initial_action": 0.5}


def late(agent, key, updates=40):
    return np.mean([row[key] for row in agent.history[-updates:]])


# --- optima -----------------------------------------------------------------------------------------------------


def test_bandit_pid():
    # max over a₁ + a₂ = 1: a₁ − a₂ = 0.4, so (0.7, 0.3), λ* = 1 − 0.7 = 0.3 per unit of a, 0.003 per percent
    options = PPOOptions(**FAST, learning_rate=3e-3, multiplier="pid")
    agent = LagrangianPPO(side_by_side(lambda: bandit(percent)), [100], options=options).learn(128 * 120)
    action, none = agent.predict(np.ones(1, np.float32), deterministic=True)
    assert none is None
    np.testing.assert_allclose(action, [0.7, 0.3], atol=0.06)
    assert late(agent, "mean_cost_0") == pytest.approx(100, abs=3)
    assert late(agent, "price_0") == pytest.approx(0.003, rel=0.35)
    assert late(agent, "lambda_0") > 0.02


def test_bandit_adam():
    # The paper's multiplier swings around the optimum; what holds is the mean over time, in cost and in price.
    options = PPOOptions(**FAST, learning_rate=1e-3, lambda_learning_rate=0.3)
    env = side_by_side(lambda: bandit(lambda t, a: 3 * a.sum()))
    agent = LagrangianPPO(env, [3], options=options).learn(128 * 130)
    assert late(agent, "mean_cost_0", 110) == pytest.approx(3, rel=0.2)  # 4.8 if unconstrained
    assert late(agent, "price_0", 110) == pytest.approx(0.1, rel=0.6)
    assert max(row["lambda_0"] for row in agent.history) > 1


@pytest.mark.parametrize("multiplier", ["adam", "pid"])
def test_limit_that_does_not_bind(multiplier):
    options = PPOOptions(**FAST, learning_rate=3e-3, multiplier=multiplier)
    agent = LagrangianPPO(side_by_side(lambda: bandit(percent)), [250], options=options).learn(128 * 60)
    action, _ = agent.predict(np.ones(1, np.float32), deterministic=True)
    np.testing.assert_allclose(action, [1, 0.6], atol=0.08)
    assert agent.multipliers[0] <= 0.0011


def test_two_limits_of_which_one_binds():
    # a₁ ≤ 0.3 with λ₁* = 1 − 0.3 = 0.7; a₂ ≤ 0.9 leaves a₂ = 0.6 alone
    options = PPOOptions(**FAST, learning_rate=3e-3, multiplier="pid")
    env = side_by_side(lambda: bandit(lambda t, a: 100 * a))
    agent = LagrangianPPO(env, [30, 90], options=options).learn(128 * 100)
    action, _ = agent.predict(np.ones(1, np.float32), deterministic=True)
    np.testing.assert_allclose(action, [0.3, 0.6], atol=0.08)
    assert late(agent, "price_0") == pytest.approx(0.007, rel=0.35)
    assert late(agent, "lambda_0") > 0.02
    assert late(agent, "lambda_1") < 0.002


@pytest.mark.parametrize("coefficient", [0.0, 10.0])
def test_a_bonus_on_entropy_keeps_the_policy_wide(coefficient):
    options = PPOOptions(**FAST, learning_rate=3e-3, entropy_coefficient=coefficient)
    agent = LagrangianPPO(side_by_side(lambda: bandit(percent)), [250], options=options).learn(128 * 40)
    first, last = (agent.history[row]["std"] for row in (0, -1))
    assert last > 1.5 * first if coefficient else last < first


def test_budget_over_several_steps():
    # Σ wₜ √aₜ under Σ aₜ ≤ 1: aₜ = wₜ² / Σ w² = (0.61, 0.30, 0.10), return √Σ w² = 1.285, λ* = √Σ w² / 2;
    # equal shares, where it begins, return 1.212; without the limit all three actions were 1
    w = np.array([1, 0.7, 0.4])
    options = PPOOptions(
        learning_rate=2e-3, steps_per_update=15, minibatch=120, epochs=5, initial_log_std=-2.0, initial_action=1 / 3,
        gamma=1.0, multiplier="pid", whole_episodes=True,
    )  # fmt: skip
    env = side_by_side(lambda: Problem(3, 1, lambda t, a: w[t] * np.sqrt(a[0]), percent), 16)
    agent = LagrangianPPO(env, [100], options=options).learn(240 * 150)
    spent = agent.predict(np.eye(3), deterministic=True)[0][:, 0]
    np.testing.assert_allclose(spent, w**2 / (w @ w), atol=0.12)
    assert spent.sum() == pytest.approx(1, abs=0.1)
    assert w @ np.sqrt(spent / spent.sum()) > 1.265
    assert late(agent, "mean_cost_0") == pytest.approx(100, abs=4)
    assert late(agent, "price_0") == pytest.approx(0.0064, rel=0.45)


def test_recovers_from_actions_beyond_the_box():
    # with every sample clipped to 0 there is no gradient but that of the distance from the box
    options = PPOOptions(**{**FAST, "initial_log_std": -3.0, "initial_action": -0.4}, learning_rate=3e-3)
    agent = LagrangianPPO(side_by_side(lambda: bandit(percent)), [250], options=options).learn(128 * 60)
    assert agent.predict(np.ones(1, np.float32), deterministic=True)[0].min() > 0.3


# --- accounting -------------------------------------------------------------------------------------------------


def test_costs_and_returns_of_episodes_of_different_length_are_complete():
    # Three steps of cost 1, then 10 at the last: 13 for length 4. Environment i has length 2 + i.
    lengths = [2, 3, 4, 5]
    makes = [
        lambda n=n: Problem(n, 1, lambda t, a: 1, lambda t, a, n=n: np.array([10.0 if t == n - 1 else 1, 0.5]))
        for n in lengths
    ]
    padded = [  # to one observation size
        lambda make=make: gymnasium.wrappers.TransformObservation(make(), _pad, Box(-1, 2, (5,))) for make in makes
    ]
    env = SyncVectorEnv(padded, autoreset_mode=AutoresetMode.SAME_STEP)
    agent = LagrangianPPO(env, [1, 1], options=PPOOptions(steps_per_update=60))
    agent.learn(240)
    counts = np.array([60 / n for n in lengths])
    row = agent.history[0]
    assert row["episodes"] == counts.sum() == 30 + 20 + 15 + 12
    assert row["mean_return"] == pytest.approx(240 / counts.sum())
    assert row["mean_cost_0"] == pytest.approx(counts @ [11, 12, 13, 14] / counts.sum())
    assert row["mean_cost_1"] == pytest.approx(0.5 * 240 / counts.sum())


def _pad(observation):
    return np.pad(observation, (0, 5 - len(observation)))


def test_episode_that_spans_two_updates_is_counted_once_and_whole():
    agent = LagrangianPPO(Problem(5, 1, lambda t, a: 1, lambda t, a: 2), [1], options=PPOOptions(steps_per_update=3))
    agent.learn(15)
    assert [row["episodes"] for row in agent.history] == [0, 1, 1, 2, 3]
    assert [row["mean_cost_0"] for row in agent.history if row["mean_cost_0"] > 0] == [10, 10, 10]
    assert np.isnan(agent.history[0]["mean_cost_0"])
    assert agent.history[0]["lambda_0"] == pytest.approx(1)  # nothing known, nothing changed


def test_whole_episodes_end_with_the_update():
    env = Problem(5, 1, lambda t, a: 1, lambda t, a: 2)
    agent = LagrangianPPO(env, [1], options=PPOOptions(steps_per_update=8, whole_episodes=True)).learn(11)
    assert [row["steps"] for row in agent.history] == [10, 20]
    assert [row["episodes"] for row in agent.history] == [2, 4]


def test_advantages_bootstrap_a_truncation_but_not_a_termination():
    rewards, values = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0.5], [0.25], [0.125]])
    following = torch.tensor([[10.0], [20.0], [40.0]])
    no, mid = torch.zeros(3, 1, dtype=torch.bool), torch.tensor([[False], [True], [False]])
    truncated = advantages(rewards, values, following, no, mid, 0.5, 1.0)
    terminated = advantages(rewards, values, following, mid, mid, 0.5, 1.0)
    last = 4 + 0.5 * 40 - 0.125  # the cut at the end of the batch
    assert truncated[:, 0].tolist() == [
        pytest.approx(1 + 0.5 * 10 - 0.5 + 0.5 * (2 + 0.5 * 20 - 0.25)), 2 + 0.5 * 20 - 0.25, last
    ]  # fmt: skip
    assert terminated[:, 0].tolist() == [pytest.approx(5.5 + 0.5 * 1.75), 1.75, last]


@pytest.mark.parametrize(("truncated", "value"), [(False, 1.0), (True, 10.0)])
def test_value_of_an_endless_reward(truncated, value):
    # Reward 1 for ever at γ = 0.9 is worth 10, cut after one step by the clock 10 as well, ended by the world 1;
    # the cost of an episode is 3 however it ends.
    class Constant(Problem):
        def _observation(self):
            return np.ones(1, np.float32)

    options = PPOOptions(
        gamma=0.9,
        learning_rate=1e-2,
        normalise_rewards=False,
        normalise_observations=False,
        steps_per_update=32,
        epochs=5,
    )
    env = Constant(1, 1, lambda t, a: 1, lambda t, a: 3, truncated)
    agent = LagrangianPPO(env, [3], options=options).learn(32 * 60)
    reward, cost = (critic(torch.ones(1, 1)).item() for critic in agent.critics)
    assert reward == pytest.approx(value, rel=0.1)
    assert cost == pytest.approx(3, rel=0.05)


def test_last_observation_is_the_old_episodes_even_if_the_environment_reuses_its_array():
    class Reusing(Problem):
        array = np.zeros(3, np.float32)

        def _observation(self):
            self.array[:] = self.t
            return self.array

    options = PPOOptions(steps_per_update=4, normalise_observations=False)
    agent = LagrangianPPO(Reusing(3, 1, lambda t, a: 1, lambda t, a: 1), [1], options=options)
    batch = agent._collect()
    assert batch["seen"][:, 0, 0].tolist() == [0, 1, 2, 0]
    assert batch["seen_next"][:, 0, 0].tolist() == [1, 2, 3, 1]


def test_running_statistics():
    rows = torch.randn(100, 3, dtype=torch.float64) * 5 + 2
    rows[:, 2] = 7
    statistics = RunningStatistics(3)
    assert statistics.std.tolist() == [1, 1, 1]
    for part in rows.split(7):
        statistics.update(part)
    torch.testing.assert_close(statistics.mean, rows.mean(0))
    torch.testing.assert_close(statistics.std[:2], rows.std(0, correction=0)[:2])
    assert statistics.std[2] == 1


def test_critic_keeps_its_prediction_when_its_scale_moves():
    agent = LagrangianPPO(bandit(percent), [1])
    critic, seen = agent.critics[1], torch.ones(1, 1)
    critic.standardised(torch.tensor([[1.0], [3.0]]))
    before = critic(seen)
    critic.standardised(torch.tensor([[500.0], [900.0]]))
    torch.testing.assert_close(critic(seen), before, rtol=1e-4, atol=1e-4)


# --- multipliers ------------------------------------------------------------------------------------------------


def test_adam_multiplier_starts_at_one_falls_to_its_floor_and_wakes():
    multiplier = Multiplier(np.array([10.0]), PPOOptions())
    assert multiplier.value.item() == pytest.approx(1)
    multiplier.update(np.array([30.0]))
    assert multiplier.value.item() > 1
    for _ in range(200):
        multiplier.update(np.array([0.0]))
    assert multiplier.value.item() == pytest.approx(1e-3, rel=1e-6)
    for _ in range(30):
        multiplier.update(np.array([30.0]))
    assert multiplier.value.item() > 1


def test_pid_multiplier_by_hand():
    multiplier = Multiplier(np.array([10.0]), PPOOptions(multiplier="pid", pid_gains=(0.1, 0.01, 1.0)))
    seen = []
    for cost in (20.0, 25.0, 15.0, 0.0, 0.0, 0.0):
        multiplier.update(np.array([cost]))
        seen.append(multiplier.value.item())
    # integrals 10, 25, 30, 20, 10, 0; the derivative counts a rise (5) only
    assert seen == pytest.approx([1 + 0.1, 1.5 + 0.25 + 5, 0.5 + 0.3, 0, 0, 0])
    multiplier.update(np.array([0.0]))
    assert multiplier.integral.item() == 0


# --- repeatable, resumable --------------------------------------------------------------------------------------


def problem(length=3):
    return Problem(length, 2, lambda t, a: a @ [1, 0.6] - a @ a / 2, lambda t, a: 30 * a)


def same(a, b):
    assert a.history == b.history
    for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True):
        assert torch.equal(x, y)
    np.testing.assert_array_equal(a.multipliers, b.multipliers)


OPTIONS = PPOOptions(steps_per_update=9, whole_episodes=True, minibatch=16)


def test_same_seed_same_result_whatever_the_global_generator():
    agents = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(agents))
        np.random.seed(len(agents))
        agents.append(LagrangianPPO(side_by_side(problem, 2), [20, 20], seed=seed, options=OPTIONS).learn(90))
    same(agents[0], agents[1])
    assert agents[0].history != agents[2].history


@pytest.mark.parametrize("multiplier", ["adam", "pid"])
def test_saved_and_loaded_goes_on_as_if_never_stopped(multiplier):
    options = PPOOptions(steps_per_update=9, whole_episodes=True, minibatch=16, multiplier=multiplier)

    def make(seed=0):
        return LagrangianPPO(side_by_side(problem, 2), [20, 20], seed=seed, options=options)

    whole = make().learn(180)
    half = make().learn(90)
    half.predict(np.zeros(3))  # draws, but from its own generator
    file = io.BytesIO()
    memory = half.state_dict()
    torch.save(memory, file)
    half.learn(18)  # must not reach into what was handed out
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = make(seed=5)
    resumed.load_state_dict(state)
    assert resumed.steps == 90
    resumed.learn(90)
    same(whole, resumed)
    for unchanged in (memory, state):  # nor did learning reach into what was loaded
        again = make()
        again.load_state_dict(unchanged)
        same(again.learn(90), whole)


def test_environment_is_seeded_on_the_first_reset_only():
    env = problem()
    LagrangianPPO(env, [1, 1], seed=7, options=OPTIONS).learn(30).learn(30)
    assert env.resets[0] == 7
    assert set(env.resets[1:]) == {None}


def test_learn_stops_when_told_and_counts_whole_updates():
    rows = []
    agent = LagrangianPPO(problem(), [1, 1], options=OPTIONS)
    agent.learn(1000, callback=lambda who, row: rows.append(row) or (len(rows) < 3 and who is agent))
    assert agent.steps == 27
    assert rows == agent.history
    assert agent.learn(10).steps == 45


def test_predict():
    agent = LagrangianPPO(problem(), [1, 1], options=PPOOptions(initial_action=[0.2, 5.0]))
    action, state = agent.predict(np.zeros(3), deterministic=True)
    assert state is None
    assert action.shape == (2,)
    assert action.dtype == np.float32
    np.testing.assert_allclose(action, [0.2, 1.0], atol=0.05)
    batch, _ = agent.predict(np.zeros((5, 3)))
    assert batch.shape == (5, 2)
    assert len(np.unique(batch[:, 0])) > 1
    assert batch.min() >= 0
    assert batch.max() <= 1
    with pytest.raises(InputError, match="shape"):
        agent.predict(np.zeros(4))


# --- errors -----------------------------------------------------------------------------------------------------


def with_space(**spaces):
    env = problem()
    for name, space in spaces.items():
        setattr(env, name, space)
    return env


@pytest.mark.parametrize(
    ("make", "limits", "sentence"),
    [
        (lambda: with_space(action_space=Discrete(3)), [1], "action space must be a Box"),
        (lambda: with_space(observation_space=Box(0, 1, (2, 2))), [1], "one-dimensional Box"),
        (lambda: with_space(observation_space=Discrete(3)), [1], "one-dimensional Box"),
        (problem, [], "limits"),
        (problem, [float("nan")], "limits"),
        (lambda: SyncVectorEnv([problem]), [1], "SAME_STEP"),
    ],
)
def test_what_no_agent_can_be_made_for(make, limits, sentence):
    with pytest.raises(InputError, match=sentence):
        LagrangianPPO(make(), limits)


@pytest.mark.parametrize(
    ("cost", "limits", "sentence"),
    [
        (lambda t, a: np.zeros(2), [1], "2 entries for 1 limit"),
        (lambda t, a: 0.0, [1, 1], "1 entries for 2 limits"),
        (lambda t, a: float("nan"), [1], "finite"),
        (lambda t, a: 1 if t else 1.5, [1], "float"),
    ],
)
def test_wrong_costs(cost, limits, sentence):
    env = side_by_side(lambda: Problem(2, 1, lambda t, a: 0, cost), 2)
    with pytest.raises(InputError, match=sentence):
        LagrangianPPO(env, limits).learn(10)


@pytest.mark.parametrize("last", [0, 2])  # missing from the first step on, or at an episode's last step alone
def test_missing_cost(last):
    class Silent(Problem):
        def step(self, action):
            *rest, info = super().step(action)
            return (*rest, info if self.t <= last else {})

    with pytest.raises(InputError, match=r"must report info\[\"cost\"\]"):
        LagrangianPPO(Silent(3, 1, lambda t, a: 0, lambda t, a: 0.0), [1]).learn(10)


def test_reward_that_is_not_a_number():
    with pytest.raises(InputError, match="NaN"):
        LagrangianPPO(Problem(2, 1, lambda t, a: float("nan"), percent), [1]).learn(10)


def test_a_first_observation_that_is_not_a_number():
    class Lost(Problem):
        def reset(self, **options):
            observation, info = super().reset(**options)
            return np.full_like(observation, np.nan), info

    agent = LagrangianPPO(Lost(2, 1, lambda t, a: 0, percent), [1])
    with pytest.raises(InputError, match="NaN or infinity: observation"):
        agent.learn(10)
    assert agent.observation_scale.mean.isfinite().all()


def test_a_box_of_a_single_point_in_one_dimension():
    class Fixed(Problem):
        def __init__(self):
            super().__init__(2, 2, lambda t, a: float(a[0]), percent)
            self.action_space = Box(np.array([0, 0.5], np.float32), np.array([1, 0.5], np.float32))

    agent = LagrangianPPO(Fixed(), [100], options=PPOOptions(steps_per_update=16)).learn(64)
    assert agent.predict(np.zeros(agent.env.single_observation_space.shape[0]))[0][1] == 0.5
    assert all(np.isfinite(list(row.values())).all() for row in agent.history)


def test_whole_episodes_of_different_length_are_refused():
    makes = [lambda n=n: gymnasium.wrappers.TransformObservation(problem(n), _pad, Box(-1, 2, (5,))) for n in (2, 3)]
    env = SyncVectorEnv(makes, autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(InputError, match="equal length"):
        LagrangianPPO(env, [1, 1], options=OPTIONS).learn(10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"minibatch": 0}, {"epochs": 1.5}, {"gamma": 1.1}, {"learning_rate": 0}, {"clip": float("nan")},
        {"multiplier": "sgd"}, {"hidden": (0,)}, {"pid_gains": (1, 1)}, {"learning_rate": "1e-3"}, {"hidden": 32},
        {"hidden": (8.5,)}, {"pid_gains": 0.1}, {"minibatch": 64.0}, {"entropy_coefficient": None},
        {"entropy_coefficient": float("nan")}, {"initial_log_std": float("nan")}, {"bound_coefficient": -1},
    ],
)  # fmt: skip
def test_wrong_options(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        PPOOptions(**wrong)


def test_wrong_initial_action_seed_and_steps():
    with pytest.raises(InputError, match="initial_action"):
        LagrangianPPO(problem(), [1, 1], options=PPOOptions(initial_action=[1, 2, 3]))
    with pytest.raises(InputError, match="initial_action"):
        LagrangianPPO(problem(), [1, 1], options=PPOOptions(initial_action="x"))
    with pytest.raises(InputError, match="seed"):
        LagrangianPPO(problem(), [1, 1], seed=-1)
    with pytest.raises(InputError, match="total_steps"):
        LagrangianPPO(problem(), [1, 1]).learn(0)


def test_what_another_agent_has_learned_is_taken_over_and_no_more():
    env = side_by_side(lambda: bandit(percent))
    old = LagrangianPPO(env, [100], options=PPOOptions(**FAST, learning_rate=3e-3)).learn(128 * 10)
    new = LagrangianPPO(env, [100], seed=1, options=PPOOptions(**{**FAST, "initial_log_std": -0.5}))
    new.adopt(old.state_dict())
    decisions = [agent.predict(np.ones(1, np.float32), deterministic=True)[0] for agent in (old, new)]
    np.testing.assert_array_equal(*decisions)
    assert not np.allclose(decisions[0], 0.5, atol=1e-3)  # where both began
    assert torch.equal(new.policy.log_std, torch.full((2,), -0.5))
    assert (new.multipliers, new.steps, new.episodes, new.history) == ([1.0], 0, 0, [])
    assert not np.allclose(old.multipliers, 1)


def test_state_of_another_agent_is_refused_and_changes_nothing():
    agent = LagrangianPPO(problem(), [1, 1])
    before = [p.clone() for p in itertools.chain(agent.policy.parameters(), agent.critics.parameters())]
    for other in (
        LagrangianPPO(problem(4), [1, 1], seed=1),
        LagrangianPPO(problem(), [1], seed=1),
        LagrangianPPO(problem(), [1, 1], seed=1, options=PPOOptions(hidden=(16,))),
        LagrangianPPO(problem(), [1, 1], seed=1, options=PPOOptions(multiplier="pid")),
    ):
        with pytest.raises(InputError, match="The state is of an agent with"):
            agent.load_state_dict(other.state_dict())
    with pytest.raises(InputError, match="'policy' is missing"):
        agent.load_state_dict({})
    cut = LagrangianPPO(problem(), [1, 1], seed=1).state_dict()
    del cut["critics"]["0.scale.mean"]
    with pytest.raises(InputError, match="no complete state"):
        agent.load_state_dict(cut)
    for p, q in zip(before, itertools.chain(agent.policy.parameters(), agent.critics.parameters()), strict=True):
        assert torch.equal(p, q)
