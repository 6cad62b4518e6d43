"""PruneTrain: a network that is trained from scratch and loses its filters on the way."""

import copy
import dataclasses
import itertools
import sys

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import rlprune
from rlprune import Budget, networks
from rlprune.costs import macs, parameters
from rlprune.errors import InputError
from rlprune.evaluate import recover
from rlprune.forward import accuracy
from rlprune.groups import remaining
from rlprune.peers.fresh import fresh
from rlprune.peers.judged import judged
from rlprune.peers.lasso import Lasso
from rlprune.peers.prunetrain import _Run, activations, prunetrain
from rlprune.training import Training

SMALL = {"images": 150, "recalibration": 150}
SHORT = {"epochs": 3, "batch_size": 32, "learning_rate": 0.1}
ALL = [Budget("parameters", 1.0)]  # no budget to speak of


def pruned(network, data, budgets=ALL, training=SHORT, **options):
    return prunetrain(network, data.example, budgets, data, training, progress=False, evaluation=SMALL, **options)


def residual():
    return networks.ResNet([1, 1], [8, 16]).eval()


def started(network, data, share=0.5, budgets=ALL, **schedule):
    """A run before its first step."""
    candidates, evaluator = judged(network, data.example, budgets, data, evaluation=SMALL)
    return _Run(candidates, evaluator, Training(**{**SHORT, **schedule}), share, seed=0)


class Bar:
    """In place of tqdm's."""

    n = total = 0
    disable = True

    def update(self):
        self.n += 1

    def set_postfix(self, **figures):
        pass


@pytest.mark.parametrize("settle", [0, 0.4])
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_within_every_budget_and_the_network_given_stays(kind, settle, trained, digits):
    network = trained if kind == "plain" else residual()
    before = copy.deepcopy(network.state_dict())
    budgets = [Budget("parameters", 0.3), Budget("macs", 0.4)]
    result = pruned(network, digits, budgets, settle=settle)
    for budget in budgets:
        assert budget.cost(result.network, digits.example) <= budget.limit * budget.cost(network, digits.example)
    # the masks lead from the unpruned network to the shapes of the one returned
    groups = rlprune.trace(network, digits.example)
    shapes = {name: tensor.shape for name, tensor in rlprune.slim(network, groups, result.masks).state_dict().items()}
    assert {name: tensor.shape for name, tensor in result.network.state_dict().items()} == shapes
    last = result.history.iloc[-1]
    assert (last["parameters"], last["macs"]) == tuple(c(result.network, digits.example) for c in (parameters, macs))
    assert last["filters"] == sum(mask.sum() for mask in result.masks)
    assert len(result.history) == 3
    assert result.method == "prunetrain"
    assert not network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_it_learns_and_what_it_saves_is_counted(trained, digits):
    schedule = {"epochs": 6, "batch_size": 16, "learning_rate": 0.1}
    result = pruned(trained, digits, [Budget("parameters", 0.5)], schedule, share=0.4)
    history, images = result.history, len(digits.train) // 16 * 16
    assert result.reward > 85
    assert history["filters"].is_monotonic_decreasing
    assert history["filters"].iloc[-3] < 112  # by the lasso alone, before the budget is enforced
    whole = macs(trained, digits.example)
    assert history["dense_training_macs"].tolist() == [3 * whole * images * epoch for epoch in range(1, 7)]
    during = [whole, *history["macs"].iloc[:-1]]  # an epoch runs on what the one before it left
    assert history["training_macs"].diff().fillna(history["training_macs"]).tolist() == [3 * n * images for n in during]
    assert history["training_macs"].iloc[-1] < 0.9 * history["dense_training_macs"].iloc[-1]


def test_what_the_lasso_takes_is_counted_to_the_end_where_no_budget_binds(trained, digits):
    schedule = {"epochs": 6, "batch_size": 16, "learning_rate": 0.1}
    history = pruned(trained, digits, ALL, schedule, share=0.5, settle=0.5).history
    assert history["filters"].iloc[-1] < history["filters"].iloc[2] < 112
    assert (112 - history["filters"] == history["faded"]).all()


def test_what_is_returned_has_recovered(trained, digits):
    result = pruned(trained, digits, training={**SHORT, "epochs": 2})
    network = copy.deepcopy(result.network)
    recover(network, digits.normalise(digits.train.images[: SMALL["recalibration"]]))
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), result.network.buffers(), strict=True) if a.ndim)
    assert result.history["validation_accuracy"].iloc[-1] == accuracy(network, digits, digits.validation)


def test_a_network_that_is_cut_recovers_at_once(trained, digits, monkeypatch):
    run = started(trained, digits, share=0.1, budgets=[Budget("parameters", 0.2)], batch_size=16)
    for epoch in (1, 2, 3):
        run.train(epoch, Bar())
    other = copy.copy(run)
    other.alive = [mask.clone() for mask in run.alive]
    run.enforce()
    monkeypatch.setattr(sys.modules[prunetrain.__module__], "recover", lambda *arguments: False)
    other.enforce()
    assert all(torch.equal(a, b) for a, b in zip(run.alive, other.alive, strict=True))
    recovered, not_so = (accuracy(each.network, digits, digits.validation) for each in (run, other))
    assert recovered > not_so + 10


def test_the_lasso_has_its_share_of_the_first_loss(trained, digits):
    share = 0.23
    history = pruned(trained, digits, training={**SHORT, "epochs": 1}, share=share, seed=4).history
    network = fresh(trained, 4).train()
    images, labels = next(digits.augmented(32, torch.Generator().manual_seed(4), 1))
    loss = F.cross_entropy(network(images), labels, label_smoothing=0.1).item()
    layers = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = 0.0
    for ingoing, outgoing in itertools.pairwise(layers):
        for i in range(len(ingoing)):
            norms += ingoing[i].norm().item() + outgoing[:, i].norm().item()
    penalty = history["strength"].iloc[0] * norms
    # bfloat16 in the one loss, where the machine has it
    assert penalty / (penalty + loss) == pytest.approx(share, rel=0.01)


def test_same_seed_same_result_and_only_the_architecture_counts(trained, digits):
    def network(seed):
        torch.manual_seed(seed)
        inner = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU()]
        return nn.Sequential(*inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 10)).eval()

    def run(start, seed):
        torch.manual_seed(start)
        result = pruned(network(start), digits, [Budget("macs", 0.5)], seed=seed)
        return result.history.drop(columns="seconds"), result.network.state_dict()

    (first, weights), (second, again), (third, _) = run(1, 3), run(2, 3), run(1, 4)
    pd.testing.assert_frame_equal(first, second)
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    assert not first.equals(third)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_a_rebuild_changes_nothing_and_carries_the_momentum(kind, trained, digits):
    run = started(trained if kind == "plain" else residual(), digits, share=0.01)
    run.train(1, Bar())  # batch norm has biases now, SGD momentum
    generator = torch.Generator().manual_seed(0)
    gone = [torch.rand(group.size, generator=generator) < 0.4 for group in run.groups]
    with torch.no_grad():
        for tensor, dim, reads, owner in run.lasso.parts:
            if reads:  # what makes a filter, batch norm included, is left as it is: it need not be silent
                tensor.index_fill_(dim, torch.cat([*gone, torch.tensor([False])])[owner].nonzero().flatten(), 0)
    big = run.network
    assert any(module.bias.abs().max() > 0 for module in big.modules() if isinstance(module, nn.BatchNorm2d))
    for parameter, state in run.optimizer.state.items():
        state["momentum_buffer"].copy_(2 * parameter.detach())  # a mark of where it belongs
    run.remove_silent(1e-4)
    assert [int(mask.sum()) for mask in run.alive] == [int((~mask).sum()) for mask in gone]
    images = digits.normalise(digits.train.images[:40])
    for mode in (False, True):  # `train` last: it changes the statistics
        with torch.no_grad():
            expected, found = big.train(mode)(images), run.network.train(mode)(images)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for parameter in run.network.parameters():
        assert torch.equal(run.optimizer.state[parameter]["momentum_buffer"], 2 * parameter.detach())
    run.train(2, Bar())  # and on it goes
    assert parameters(run.network, digits.example) == run.candidates.predictor.parameters(
        [int(mask.sum()) for mask in run.alive]
    )


@given(st.integers(0, 10**6), st.floats(0, 3))
@settings(max_examples=25, deadline=None)
def test_a_step_takes_as_much_off_every_norm_down_to_exactly_zero(digits_example, seed, step):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    lasso = Lasso(network, rlprune.trace(network, digits_example), [2])
    before, bias = lasso.norms(), network[0].bias.clone()
    each = torch.stack([network[0].weight.square().sum((1, 2, 3)), network[3].weight.square().sum(0)]).sqrt()
    made = 0 if torch.allclose(before[0], each[0]) else 1  # parts may come in either order
    assert torch.allclose(before[[made, 1 - made]], each)
    assert torch.allclose(lasso.strength(), each.square().sum(0).sqrt())
    lasso.shrink(step)
    expected = (before - step).clamp_min(0)
    spared = each.square().sum(0).topk(2).indices
    expected[:, spared] = before[:, spared]
    assert torch.allclose(lasso.norms(), expected, atol=1e-5)
    assert (network[0].weight[expected[made] == 0] == 0).all()
    assert torch.equal(network[0].bias, bias)


def test_a_depthwise_convolution_may_come_down_to_one_channel(digits):
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 1),
    )
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    budgets = [Budget("parameters", 0.15)]
    result = pruned(network, digits, budgets, {"epochs": 3, "batch_size": 64, "learning_rate": 0.05}, settle=0.4)
    assert result.network[3].groups == 1
    assert result.costs["parameters"]["share"] <= 0.15


def test_what_may_not_change_may_not_change_afterwards_either(trained, digits):
    network = copy.deepcopy(trained)
    network.features[0].weight.requires_grad_(False)
    result = pruned(network, digits, [Budget("parameters", 0.5)])
    flags = {name: parameter.requires_grad for name, parameter in result.network.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["features.0.weight"]


@pytest.mark.parametrize("grow_batch", [False, True])
def test_a_stopped_training_ends_as_if_never_stopped(grow_batch, trained, digits, tmp_path, monkeypatch):
    schedule = {**SHORT, "epochs": 4, "batch_size": 32}
    settings = {"training": schedule, "share": 0.6, "settle": 0.5, "grow_batch": grow_batch, "progress": False}

    def run(checkpoint=None, **changes):
        return prunetrain(
            trained, digits.example, [Budget("parameters", 0.3)], digits, checkpoint=checkpoint, **settings, **changes
        )

    whole, train, path = run(), _Run.train, tmp_path / "state.pt"
    for stop in (2, 4):  # before and after the budget was enforced
        monkeypatch.setattr(_Run, "train", lambda self, epoch, bar, stop=stop: stopped(self, epoch, bar, stop, train))
        with pytest.raises(KeyboardInterrupt):
            run(path)
    monkeypatch.setattr(_Run, "train", train)
    rest = run(path)
    assert rest.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))
    assert rest.seconds > 0
    pairs = zip(rest.network.state_dict().values(), whole.network.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    for changes in ({"seed": 1}, {"reset": True}):
        with pytest.raises(InputError, match="belongs to another run"):
            run(path, **changes)
    mirrored = dataclasses.replace(digits, flip=True)
    with pytest.raises(InputError, match="belongs to another run"):
        prunetrain(trained, digits.example, [Budget("parameters", 0.3)], mirrored, checkpoint=path, **settings)


@pytest.mark.parametrize("grow_batch", [False, True])
def test_trainings_that_differ_in_their_budgets_share_what_comes_before(
    grow_batch, trained, digits, tmp_path, monkeypatch
):
    train, epochs = _Run.train, []

    def seen(run, epoch, bar):
        epochs.append(epoch)
        return train(run, epoch, bar)

    def run(limit, shared=None, **changes):
        epochs.clear()
        settings = {"settle": 0.5, "share": 0.6, "grow_batch": grow_batch, "shared": shared, **changes}
        return pruned(trained, digits, [Budget("parameters", limit)], {**SHORT, "epochs": 4}, **settings)

    monkeypatch.setattr(_Run, "train", seen)
    alone = run(0.2)
    first = run(0.4, tmp_path)
    assert epochs == [1, 2, 3, 4]
    second = run(0.2, tmp_path)
    assert epochs == [2, 3, 4]  # the budgets are enforced after the second
    assert second.history.drop(columns="seconds").equals(alone.history.drop(columns="seconds"))
    pairs = zip(second.network.state_dict().values(), alone.network.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert second.seconds > first.history["seconds"][0]  # what it did not have to do is counted
    assert second.costs["parameters"]["value"] <= 0.2 * parameters(trained, digits.example)
    for changes in ({"seed": 1}, {"share": 0.5}):  # in more than the budgets
        run(0.2, tmp_path, **changes)
        assert epochs == [1, 2, 3, 4]


def stopped(run, epoch, bar, stop, train):
    if epoch == stop:
        raise KeyboardInterrupt
    return train(run, epoch, bar)


def test_a_weight_between_two_filters_takes_the_factors_of_both(digits_example):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 10)
    network = nn.Sequential(*layers[:2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), layers[2]).eval()
    lasso, between = Lasso(network, rlprune.trace(network, digits_example), [1, 1]), layers[1].weight.clone()
    norms, step = [between.square().sum(dims).sqrt() for dims in ((0, 2, 3), (1, 2, 3))], 0.1
    strongest = [part.argmax() for part in lasso.strength().split([6, 5])]
    reads, makes = (
        (1 - step / norm).clamp_min(0).index_fill(0, best, 1) for norm, best in zip(norms, strongest, strict=True)
    )
    lasso.shrink(step)
    assert torch.allclose(layers[1].weight, between * makes[:, None, None, None] * reads[:, None, None], atol=1e-6)


@pytest.fixture(scope="module")
def digits_example(digits):
    return digits.example


def test_what_remains_is_what_a_trace_finds(digits):
    grouped = nn.Sequential(
        *[nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()],
        *[nn.Conv2d(8, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=3), nn.AdaptiveAvgPool2d(2), nn.Flatten()],
        nn.Linear(48, 10),
    )
    for network in (residual(), grouped.eval()):
        groups = rlprune.trace(network, digits.example)
        masks = [torch.arange(group.size) % 3 != 1 for group in groups]
        small = rlprune.slim(network, groups, masks)
        found, expected = remaining(groups, masks), rlprune.trace(small, digits.example)
        assert [(group.name, group.size) for group in found] == [(group.name, group.size) for group in expected]
        for one, other in zip(found, expected, strict=True):
            assert {described(part) for part in one.slices} == {described(part) for part in other.slices}


def described(part):
    pairs = sorted(zip(part.index.tolist(), part.source.tolist(), strict=True))
    return part.module, part.axis, part.length, tuple(pairs)


def test_a_group_keeps_its_least_and_multiples(trained, digits):
    result = pruned(trained, digits, [Budget("parameters", 0.5)], share=0.99, multiple=4, minimum=3)
    widths = [int(mask.sum()) for mask in result.masks]
    assert all(width >= 4 and width % 4 == 0 for width in widths)
    assert min(widths) == 4  # so strong a lasso would take all
    assert all(torch.isfinite(tensor).all() for tensor in result.network.state_dict().values())


def test_the_batch_grows_with_the_memory_set_free(trained, digits):
    schedule = {"epochs": 4, "batch_size": 32, "learning_rate": 0.05}
    result = pruned(trained, digits, [Budget("macs", 0.2)], schedule, settle=0.7, grow_batch=True)
    sizes = result.history["batch_size"].tolist()
    assert sizes[0] == 32
    assert all(size % 8 == 0 for size in sizes)
    freed = activations(trained, digits.example) / activations(result.network, digits.example)
    assert 32 * freed - 8 < sizes[-1] <= 32 * freed
    assert sizes[-1] > 40
    images = [len(digits.train) // size * size for size in sizes]
    spent = [macs(trained, digits.example), *result.history["macs"].iloc[:-1]]
    total = sum(3 * of_image * count for of_image, count in zip(spent, images, strict=True))
    assert result.history["training_macs"].iloc[-1] == total


def test_the_learning_rate_is_that_of_fit(trained, digits):
    run = started(trained, digits, share=0.01, epochs=2)
    rates = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    for epoch in (1, 2):
        run.train(epoch, Bar())
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, len(rates), pct_start=0.25, anneal_strategy="linear", cycle_momentum=False, div_factor=10
    )
    expected = []
    for _ in rates:
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, abs=0.1 / len(rates) * 8)
    assert max(rates) == pytest.approx(0.1, rel=0.05)


def test_the_learning_rate_grows_with_the_batch(trained, digits):
    run, rates = started(trained, digits, share=0.01, epochs=4), []
    run.batch_size = 2 * run.training.batch_size
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    run.train(2, Bar())
    assert rates[0] == pytest.approx(2 * 0.1)
    assert rates[-1] == pytest.approx(2 * 0.1 * 2 / 3, rel=0.05)


def test_a_slim_network_stays_slim(digits):
    network = networks.build("resnet20").eval()
    assert all(torch.equal(a, b) for a, b in zip(fresh(network, 0).parameters(), network.parameters(), strict=True))
    groups = rlprune.trace(network, digits.example)
    small = rlprune.slim(network, groups, [torch.arange(group.size) % 2 == 0 for group in groups])
    made = fresh(small, 1)
    assert [p.shape for p in made.parameters()] == [p.shape for p in small.parameters()]
    assert not torch.equal(next(made.parameters()), next(small.parameters()))


def test_a_known_network_begins_near_the_identity_or_as_its_modules_would(digits):
    network, begun = networks.build("vgg11").eval(), {}
    for reset in (False, True):
        candidates, evaluator = judged(network, digits.example, ALL, digits, evaluation=SMALL)
        run = _Run(candidates, evaluator, Training(**SHORT), 0.5, seed=0, reset=reset)
        begun[reset] = [weight for weight in run.network.parameters() if weight.ndim == 4][1:]
    for built, own in zip(begun[False], begun[True], strict=True):
        assert built.max() == 1  # what passes an input on
        assert own.abs().max() <= own[0].numel() ** -0.5  # torch: uniform, of at most 1 / sqrt(fan in)
    again = [weight for weight in fresh(network, 0, reset=True).parameters() if weight.ndim == 4][1:]
    assert all(torch.equal(weight, other) for weight, other in zip(begun[True], again, strict=True))


def test_bad_input_is_named(trained, digits):
    with pytest.raises(InputError, match="give data"):
        prunetrain(trained, digits.example, ALL, evaluate=lambda network: 0.0)
    for options in ({"share": 0}, {"share": 1}, {"settle": 1}, {"threshold": 0}):
        with pytest.raises(InputError, match="share must lie"):
            pruned(trained, digits, **options)
    for interval in (0, 2.5):
        with pytest.raises(InputError, match="interval must be a whole number of at least 1"):
            pruned(trained, digits, interval=interval)
    with pytest.raises(InputError, match="Unknown training parameter 'epoch'"):
        pruned(trained, digits, training={"epoch": 3})
    with pytest.raises(InputError, match="which no average can follow: average=0"):
        pruned(trained, digits, training={**SHORT, "average": 0.9})
    with pytest.raises(InputError, match="Training has diverged .loss nan in epoch 1.: lower learning_rate"):
        pruned(trained, digits, training={**SHORT, "learning_rate": 1e12})
    with pytest.raises(InputError, match="do not fill one batch of 5000"):
        pruned(trained, digits, training=Training(batch_size=5000))

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.scale

    own = nn.Sequential(Scaled(), nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    with pytest.raises(InputError, match="module '0' cannot be made anew"):
        pruned(own, digits)


def test_a_stopped_training_goes_on_under_a_cost_that_is_measured(trained, digits, tmp_path, monkeypatch):
    noise = itertools.count()

    def noisy(network, example_input):
        return parameters(network, example_input) * (1 + 1e-4 * next(noise))

    monkeypatch.setattr("rlprune.costs.PAUSE", 0.0)
    train, path = _Run.train, tmp_path / "state.pt"
    how = {"budgets": [Budget(noisy, 0.5)], "checkpoint": path}
    with monkeypatch.context() as patch:
        patch.setattr(_Run, "train", lambda self, epoch, bar: stopped(self, epoch, bar, 2, train))
        with pytest.raises(KeyboardInterrupt):
            pruned(trained, digits, **how)
    before = torch.load(path, weights_only=True)["unpruned"]
    result = pruned(trained, digits, **how)
    assert len(result.history) == SHORT["epochs"]
    assert result.costs["noisy"]["limit"] == 0.5 * before[0]  # not half of what it was when it went on


def test_another_activation_than_the_built_ones_is_trained():
    network = networks.build("vgg11")
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.ReLU):
            network.set_submodule(name, nn.SiLU())
    kinds = [type(module) for module in fresh(network, 0).modules()]
    assert kinds.count(nn.SiLU) > 0
    assert nn.ReLU not in kinds


def test_activations_of_a_module_that_splits_are_counted():
    class Split(nn.Module):
        def forward(self, images):
            return images.chunk(2, 1)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.split = Split()

        def forward(self, images):
            return sum(self.split(images))

    assert activations(Both(), torch.zeros(1, 4, 3, 3)) == 36
