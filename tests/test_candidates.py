"""Candidates: budgets known before the search, met by every decision, alone and together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlprune import Budget, PruningEnv, costs, pareto, peers, prune, trace
from rlprune.candidates import COLUMNS, Candidates
from rlprune.errors import InputError
from rlprune.masking import slim

EXAMPLE = torch.zeros(1, 3, 8, 8)


def small():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 20, 3), nn.ReLU(), nn.Conv2d(20, 7, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)).eval()


NETWORK = small()
GROUPS = trace(NETWORK, EXAMPLE)


def candidates(*budgets, **options):
    return Candidates(NETWORK, GROUPS, EXAMPLE, list(budgets), **options)


def depth(network, example_input):
    """A cost of one's own, known to no predictor: filters of the first layer times those of the last."""
    return float(network[0].out_channels * network[4].out_channels)


def test_table_shows_what_can_be_reached():
    table = candidates(Budget("parameters", 0.1), Budget(depth, 12, relative=False)).table
    assert list(table.columns) == ["budget", "limit", "unpruned", "largest", "smallest", "satisfiable"]
    assert table["budget"].tolist() == ["parameters", "depth"]
    assert table["limit"].tolist() == [pytest.approx(0.1 * costs.parameters(NETWORK, EXAMPLE)), 12]
    assert table["unpruned"].tolist() == table["largest"].tolist() == [costs.parameters(NETWORK, EXAMPLE), 70]
    narrowest = slim(NETWORK, GROUPS, [torch.arange(g.size) == 0 for g in GROUPS])
    assert table["smallest"].tolist() == [costs.parameters(narrowest, EXAMPLE), 1]
    assert table["satisfiable"].all()


def test_a_budget_out_of_reach_is_refused_with_the_smallest_cost():
    with pytest.raises(InputError, match="8.99 on depth cannot be met: the smallest that can be reached is 9 "):
        candidates(Budget("parameters", 0.5), Budget(depth, 8.99, relative=False), minimum=3)
    assert candidates(Budget(depth, 9, relative=False), minimum=3).least == [3, 3, 3]


def test_budgets_that_contradict_each_other_are_refused():
    def emptiness(network, example_input):
        return 1e6 / costs.parameters(network, example_input)

    unpruned = emptiness(NETWORK, EXAMPLE)
    tight = Budget(emptiness, 1.3 * unpruned, relative=False)
    with pytest.raises(InputError, match="contradict each other: no widths meet parameters ≤ .* emptiness ≤ "):
        candidates(Budget("parameters", 0.1), tight)
    lax = candidates(Budget("parameters", 0.6), Budget(emptiness, 2.5 * unpruned, relative=False))
    assert lax.feasible(lax.anchor)
    assert not lax.feasible(lax.least)
    assert lax.feasible(lax.fit(np.full(3, 0.9)))


@pytest.mark.parametrize(
    ("budgets", "options", "words"),
    [
        ([], {}, "There is no budget"),
        ([Budget("macs", 0.1), Budget("macs", 50, relative=False)], {}, "Two budgets are named 'macs'"),
        ([Budget("macs", 0.5)], {"minimum": 0}, "minimum must be a whole number of at least 1, not 0"),
        ([Budget("macs", 0.5)], {"multiple": 0}, "multiple must be a whole number of at least 1, not 0"),
        ([Budget(lambda n, x: 0.0, 0.5, name="free")], {}, "free is 0 already"),
        ([Budget(depth, 0.5, name="seconds")], {}, "named 'seconds', as another column .* give it another name with"),
        ([Budget(depth, 0.5, name="budget")], {}, "named 'budget', as another column"),
        ([Budget("macs", 0.5), Budget(depth, 0.5, name="lambda_macs")], {}, "named 'lambda_macs', as another column"),
        ([Budget("macs", 1e-3)], {}, r"every group keeps 1 filter\(s\) or more\). Raise"),
        ([Budget("macs", 1e-3)], {"multiple": 8}, r"keeps 1 filter\(s\) or more, in multiples of 8\). Raise"),
    ],
)
def test_bad_arguments(budgets, options, words):
    with pytest.raises(InputError, match=words):
        candidates(*budgets, **options)


def test_no_history_has_a_column_twice():
    how = {"episodes": 2, "evaluate": lambda pruned: 0.0, "progress": False}
    found = prune(NETWORK, EXAMPLE, [Budget("macs", 0.5), Budget(depth, 0.5)], **how).history
    front = pareto(NETWORK, EXAMPLE, "macs", points=(0.4, 0.5), **how).history
    images = torch.rand(40, 3, 8, 8), torch.arange(40) % 4
    more = {"rounds": 1, "steps": 1, "batch_size": 8, "progress": False}
    gates = peers.prunenet(NETWORK, EXAMPLE, [Budget("macs", 0.5)], images, **more).history
    costs_of = {"macs", "depth", "lambda_macs", "lambda_depth"}
    assert (set(found) | set(front) | set(gates)) - costs_of == set(COLUMNS)


def test_a_network_without_filters_to_prune_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(InputError, match="no filter to prune"):
        Candidates(network, trace(network, EXAMPLE), EXAMPLE, [Budget("macs", 0.5)])


def test_a_cost_that_fails_names_the_candidate():
    def fragile(network, example_input):
        if network[2].out_channels == 7:
            raise ValueError("seven is not allowed")
        return 1.0 + network[0].out_channels

    of_own = candidates(Budget(fragile, 0.9))
    with pytest.raises(InputError) as error:
        of_own.costs([4, 7, 3])
    assert str(error.value) == (
        "The cost fragile failed with ValueError: seven is not allowed, on the candidate with widths 4, 7, 3."
    )


def test_a_measured_cost_is_measured_once_per_widths():
    calls = []

    def counted(network, example_input):
        calls.append(network)
        return depth(network, example_input)

    of_own = candidates(Budget(counted, 0.5), Budget("parameters", 0.2))
    before = len(calls)
    assert of_own.costs([4, 4, 4])[0] == of_own.costs([4, 4, 4])[0] == 16
    assert len(calls) == before + 1
    assert not of_own.feasible([10, 20, 7])  # over on parameters, which need no measuring
    assert len(calls) == before + 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0.35, 1),
    st.sampled_from(["shrink", "scale", "wall"]),
)
def test_every_decision_is_within_budget_and_keeps_the_promised_widths(shares, minimum, multiple, limit, how):
    def within(limit):
        return candidates(Budget("parameters", limit), Budget(depth, limit), minimum=minimum, multiple=multiple)

    loose = within(1.0)
    if (loose.costs(loose.least) > limit * loose.unpruned).any():  # such as 6 filters each, for half the depth
        with pytest.raises(InputError, match="cannot be met"):
            within(limit)
        return
    chosen = within(limit)
    widths = chosen.fit(np.array(shares), how)
    assert chosen.within(chosen.costs(widths))
    for width, size in zip(widths, [10, 20, 7], strict=True):
        assert min(minimum, size) <= width <= size
        assert width % multiple == 0 or width == size
    assert chosen.widths(np.ones(3)) == [10, 20, 7]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.sampled_from(["parameters", "macs", depth]))
def test_the_wall_keeps_every_episode_within_budget(shares, cost):
    env = PruningEnv(NETWORK, EXAMPLE, [Budget(cost, 0.2)], reward=lambda masks: 0.0, fit="wall")
    env.reset()
    for share in shares:
        *_, info = env.step(np.array([share], dtype=np.float32))
    assert info["cost"][0] <= env.limits[0] + 1e-9
    assert env.episodes[-1]["feasible"]


def test_a_threshold_keeps_what_is_above_it_to_the_filter():
    """Of 960 filters and of 480, whose shares float32 cannot hold."""
    network = nn.Sequential(nn.Conv2d(3, 960, 1), nn.Conv2d(960, 480, 1), nn.Flatten(1), nn.Linear(480, 2))
    example = torch.zeros(1, 3, 1, 1)
    random = torch.Generator().manual_seed(0)
    for share in (0.15, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
        found = Candidates(network, trace(network, example), example, [Budget("parameters", share)])
        values = [torch.rand(960, generator=random), torch.rand(480, generator=random)]
        widths = found.thresholded(values)
        best = torch.cat(values).topk(sum(widths)).indices
        assert [int((best < 960).sum()), int((best >= 960).sum())] == widths


def test_shares_scaled_to_a_measured_budget_use_it_up():
    def measured(network, example_input):
        return costs.parameters(network, example_input)

    network = nn.Sequential(nn.Conv2d(3, 300, 1), nn.Conv2d(300, 200, 1), nn.Flatten(1), nn.Linear(200, 2))
    example = torch.zeros(1, 3, 1, 1)
    found = Candidates(network, trace(network, example), example, [Budget(measured, 0.1)])
    drawn = np.random.default_rng(0).uniform(0.02, 1, (20, 2))
    for shares in [*drawn, *(0.2 * drawn), np.array([1.0, 0.001])]:
        scaled, shrunk = (found.percent(found.fit(shares, how))["measured"] for how in ("scale", "shrink"))
        assert shrunk <= scaled <= 10
        assert scaled > 9


def test_groups_of_thousands_of_filters_are_decided_as_asked():
    network = nn.Sequential(nn.Conv2d(3, 4096, 1), nn.Conv2d(4096, 8, 1), nn.Flatten(1), nn.Linear(8, 2))
    example = torch.zeros(1, 3, 1, 1)
    found = Candidates(network, trace(network, example), example, [Budget("parameters", 0.5)])
    for kept in (0, 1, 2, 5):
        shares = np.array([kept / 4096, 0.5])
        assert found.fit(shares, "none") == found.fit(shares) == found.widths(shares) == [max(kept, 1), 4]


def test_the_wall_is_the_largest_width_that_leaves_enough():
    chosen = candidates(Budget("parameters", 0.15))
    for decided in ([], [3], [3, 2]):
        most = chosen.wall(decided)
        rest = chosen.least[len(decided) + 1 :]
        assert chosen.feasible([*decided, most, *rest])
        assert most == chosen.sizes[len(decided)] or not chosen.feasible([*decided, most + 1, *rest])


def test_200_random_budgets_are_met_by_what_is_returned():
    generator = np.random.default_rng(0)
    available = ["parameters", "macs", "peak_memory", depth]
    over = 0
    for number in range(200):
        chosen = generator.choice(len(available), size=1 + number % 3, replace=False)
        budgets = []
        for index in chosen:
            share = float(generator.uniform(0.45, 1))
            cost = costs.COSTS.get(available[index], available[index])
            absolute = bool(generator.integers(2))
            limit = share * cost(NETWORK, EXAMPLE) if absolute else share
            budgets.append(Budget(cost, limit, relative=not absolute))
        result = prune(NETWORK, EXAMPLE, budgets, episodes=2, seed=number, evaluate=lambda pruned: 0.0, progress=False)
        for budget in budgets:
            limit = budget.limit * budget.cost(NETWORK, EXAMPLE) if budget.relative else budget.limit
            over += budget.cost(result.network, EXAMPLE) > limit
    assert over == 0
