import copy
import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlprune.costs import Predictor, macs
from rlprune.errors import InputError
from rlprune.groups import trace
from rlprune.importance import scores
from rlprune.masking import check_masks, keep_top, masked, slim, widths
from rlprune.networks import build

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAMES = ["vgg11", "resnet18", "resnet20", "resnet50", "mixed", "grouped", "excited"]


class Mixed(nn.Module):
    """Biases, depth-wise and transposed convolution, concatenation, sigmoid after batch norm, flatten, PReLU."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.prelu = nn.PReLU(6)
        self.c = nn.Conv2d(14, 5, 3, stride=2, padding=1)
        self.norm_c = nn.BatchNorm2d(5)
        self.up = nn.ConvTranspose2d(5, 7, 2, stride=2)
        self.hidden = nn.Linear(7 * 16, 12)
        self.last = nn.Linear(12, 10)

    def forward(self, x):
        x = nn.functional.avg_pool2d(x, 8)
        a = torch.sigmoid(self.norm(self.depthwise(self.a(x))))
        b = self.prelu(self.b(a)) + 0.5
        c = self.norm_c(self.c(torch.cat([b, a], 1))).cos()
        return self.last(torch.sigmoid(self.hidden(self.up(c).flatten(1))))


class Grouped(nn.Module):
    """Grouped convolutions that lose whole groups or positions, transposed and multiplying ones, and a residual sum."""

    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 12, 3, padding=1, groups=3)
        self.stem = nn.Conv2d(12, 12, 1)
        self.many = nn.Conv2d(12, 36, 3, padding=1, groups=6)
        self.norm = nn.BatchNorm2d(36)
        self.back = nn.Conv2d(36, 12, 1)
        self.wide = nn.Conv2d(12, 16, 3, padding=1, groups=2)
        self.multiplied = nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.mixed = nn.Conv2d(32, 24, 1)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2, groups=2)
        self.up_depthwise = nn.ConvTranspose2d(12, 12, 2, stride=2, groups=12)
        self.last = nn.Linear(12 * 4, 10)

    def forward(self, x):
        x = self.stem(self.image(nn.functional.avg_pool2d(x, 8)))
        x = x + self.back(torch.sigmoid(self.norm(self.many(x))))
        x = self.mixed(self.multiplied(self.wide(x).cos()))
        x = self.up_depthwise(self.up(x).sin())
        return self.last(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Excited(nn.Module):
    """Squeeze and excitation around a grouped convolution in a residual branch, as in RegNetY."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1)
        self.back = nn.Conv2d(12, 8, 1)
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(nn.functional.avg_pool2d(x, 4))
        y = torch.sigmoid(self.norm(self.grouped(self.inner(x).relu())))
        y = y * torch.sigmoid(self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()))
        return self.last((x + self.back(y)).mean((2, 3)))


OWN = {"mixed": Mixed, "grouped": Grouped, "excited": Excited}


@functools.cache
def case(name):
    """A network whose every bias and statistic is far from neutral, so that a leak would show, and its groups."""
    network = OWN[name]() if name in OWN else build(name)
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-1, 1, generator=generator)
    network.eval()
    return network, trace(network, IMAGES)


def random_masks(groups, seed):
    """At least one filter kept in each group; from nearly none to nearly all."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(len(groups), generator=generator) if seed else torch.zeros(len(groups))
    order = [torch.rand(group.size, generator=generator) for group in groups]
    return keep_top(order, [max(1, int(s * group.size)) for s, group in zip(shares, groups, strict=True)])


def snapshot(network):
    tensors = [*network.parameters(), *network.buffers()]
    return [(id(t), t.clone(), t._version) for t in tensors]


def unchanged(network, before):
    tensors = [*network.parameters(), *network.buffers()]
    return all(
        id(t) == key and torch.equal(t, old) and t._version == version
        for t, (key, old, version) in zip(tensors, before, strict=True)
    )


def compare(name, seed):
    network, groups = case(name)
    masks = random_masks(groups, seed)
    before = snapshot(network)
    small = slim(network, groups, masks)
    with torch.no_grad():
        full = network(IMAGES)
        with masked(network, groups, masks) as inside:
            expected = inside(IMAGES)
        result = small(IMAGES)
        after = network(IMAGES)
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(full, after)
    assert unchanged(network, before)
    predictor = Predictor(network, groups, IMAGES)
    assert sum(p.numel() for p in small.parameters()) == predictor.parameters(widths(masks))
    assert macs(small, IMAGES) == predictor.macs(widths(masks))
    if seed == 0:  # one filter in every group: something must have happened
        assert not torch.allclose(expected, full, rtol=1e-2)


def test_all_of_the_mixed_network_is_grouped():
    groups = case("mixed")[1]
    assert [(group.name, group.size) for group in groups] == [("a", 8), ("b", 6), ("c", 5), ("up", 7), ("hidden", 12)]


def test_grouped_convolutions_lose_whole_groups_or_positions():
    groups = {group.name: group for group in case("grouped")[1]}
    # on the stream of 12, `many` ties neighbours and `wide` what lies 6 apart; its own 16 make 8 pairs
    sizes = {"image": 4, "stem": 3, "wide": 8, "mixed": 12, "up": 6}
    assert {name: group.size for name, group in groups.items()} == sizes
    assert [(group.name, group.size) for group in case("excited")[1]] == [("stem", 8), ("inner", 4), ("squeeze", 5)]


@pytest.mark.parametrize("name", NAMES)
def test_slim_equals_masked_at_the_narrowest(name):
    compare(name, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2**31))
def test_slim_equals_masked_small(seed):
    compare("mixed", seed)
    compare("grouped", seed)
    compare("excited", seed)
    compare("resnet20", seed)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["vgg11", "resnet18", "resnet50"]), st.integers(1, 2**31))
def test_slim_equals_masked_large(name, seed):
    compare(name, seed)


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "mixed", "grouped", "excited"])
@pytest.mark.parametrize("value", [1e30, float("nan")])
def test_what_removed_filters_hold_does_not_matter(name, value):
    network, groups = case(name)
    masks = random_masks(groups, 5)
    with torch.no_grad():
        expected = slim(network, groups, masks)(IMAGES)
        broken = copy.deepcopy(network)
        for group, mask in zip(groups, masks, strict=True):
            for part in group.slices:
                module, places = broken.get_submodule(part.module), part.index[~mask[part.source]]
                dim = int((part.axis == "in") != isinstance(module, nn.ConvTranspose2d))
                dim = 0 if part.axis == "channels" else dim
                module.weight.index_fill_(dim, places % module.weight.shape[dim], value)
                if part.axis != "in":
                    # a mean of the other sign: ReLU must not hide what the filter emits
                    for tensor, sign in (("bias", 1), ("running_mean", -1), ("running_var", 1)):
                        if getattr(module, tensor, None) is not None:
                            getattr(module, tensor).index_fill_(0, places, sign * value)
        assert not torch.allclose(broken(IMAGES), expected)
        assert torch.equal(slim(broken, groups, masks)(IMAGES), expected)
        with masked(broken, groups, masks):
            result = broken(IMAGES)
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "mixed", "grouped", "excited"])
def test_slim_trains_and_shares_nothing(name):
    network, groups = case(name)
    before = snapshot(network)
    with torch.inference_mode():
        small = slim(network, groups, random_masks(groups, 3))
    old = [p.clone() for p in small.parameters()]
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small.train()
    nn.functional.cross_entropy(small(IMAGES), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    optimizer.step()
    assert sum(not torch.equal(p, o) for p, o in zip(small.parameters(), old, strict=True)) > len(old) / 2
    assert unchanged(network, before)
    assert not network.training
    memory = {t.untyped_storage().data_ptr() for t in network.state_dict().values()}
    assert not memory & {t.untyped_storage().data_ptr() for t in small.state_dict().values()}


def test_slim_is_physically_small_and_describes_itself():
    network, groups = case("mixed")
    small = slim(network, groups, [torch.arange(group.size) < 2 for group in groups])
    assert (small.a.out_channels, small.a.in_channels, small.a.weight.shape) == (2, 3, (2, 3, 3, 3))
    assert (small.depthwise.groups, small.depthwise.in_channels, small.depthwise.out_channels) == (2, 2, 2)
    assert (small.norm.num_features, small.norm.running_var.shape) == (2, (2,))
    assert (small.c.in_channels, small.prelu.num_parameters) == (4, 2)
    assert (small.up.in_channels, small.up.out_channels, small.up.weight.shape) == (2, 2, (2, 2, 2, 2))
    assert (small.hidden.in_features, small.hidden.out_features) == (32, 2)
    assert (small.last.in_features, small.last.out_features) == (2, 10)
    for tensor in small.state_dict().values():  # no view into something large
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    again = trace(small, IMAGES)
    assert [group.size for group in again] == [2] * len(groups)


def test_a_batch_norm_without_eps():
    """It cannot train, which is no fault of the groups; a masked variance of zero would give NaN."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    network = nn.Sequential(network, nn.Linear(4, 2)).eval()
    groups = trace(network, IMAGES)
    masks = [torch.tensor([True, False, True, False])]
    with masked(network, groups, masks):
        torch.testing.assert_close(network(IMAGES), slim(network, groups, masks)(IMAGES))


def test_positions_may_be_listed_in_any_order():
    network, groups = case("mixed")
    masks = random_masks(groups, 4)
    turned = [
        dataclasses.replace(
            group,
            slices=tuple(
                dataclasses.replace(part, index=part.index.flip(0), source=part.source.flip(0)) for part in group.slices
            ),
        )
        for group in groups
    ]
    assert torch.equal(slim(network, turned, masks)(IMAGES), slim(network, groups, masks)(IMAGES))


@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_mode_format_gradients_and_hooks(kept):
    network = build("resnet20").to(memory_format=torch.channels_last).train()
    groups = trace(network, IMAGES)
    network.stem[0].weight.requires_grad_(False)
    network.stem[1].eval()
    calls = []
    network.stem[0].register_forward_hook(lambda *_: calls.append(1))
    network.stem[0].register_forward_pre_hook(lambda *_: calls.append(1))
    small = slim(network, groups, [torch.arange(g.size) < kept * g.size for g in groups])
    assert [m.training for m in small.modules()] == [m.training for m in network.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in network.parameters()]
    weight = small.stages[0][0].convs[0][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    small(IMAGES)
    assert calls == []
    assert len(network.stem[0]._forward_hooks) == 1


def test_shared_modules_and_parameters_stay_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 6, 3, padding=1)
            self.again = nn.Conv2d(6, 6, 3, padding=1)
            self.layers = nn.ModuleList([self.again, self.again])
            self.plain = [self.again]  # a reference outside the module tree
            self.last, self.twin = nn.Linear(6, 2), nn.Linear(6, 2)
            self.twin.weight = self.last.weight

        def forward(self, x):
            for layer in [self.first, *self.layers]:
                x = layer(x).relu()
            return self.last(x.mean((2, 3))) + self.twin(x.amax((2, 3)))

    network = Shared()
    groups = trace(network, IMAGES)
    assert [group.name for group in groups] == ["first"]
    masks = [torch.arange(6) % 2 == 0]
    small = slim(network, groups, masks)
    assert small.layers[0] is small.layers[1] is small.again is small.plain[0]
    assert small.again.weight.shape == (3, 3, 3, 3)
    assert small.twin.weight is small.last.weight
    with masked(network, groups, masks):
        torch.testing.assert_close(small(IMAGES), network(IMAGES))


def test_masked_restores_after_an_error_and_forgets_statistics():
    network, groups = case("resnet20")
    before = snapshot(network)
    masks = random_masks(groups, 2)

    def fail():
        with masked(network, groups, masks):
            network.train()
            network(IMAGES)  # moves the running statistics
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    network.eval()
    assert unchanged(network, before)
    assert isinstance(network.stem[0].weight, nn.Parameter)


def test_bad_masks_are_named():
    network, groups = case("mixed")
    good = [torch.ones(group.size, dtype=torch.bool) for group in groups]
    check_masks(groups, good)
    for masks, words in [
        (good[1:], "5 groups, but 4 masks"),
        ([good[0][1:], *good[1:]], r"group a must have shape \(8,\), not \(7,\)"),
        ([good[0].float(), *good[1:]], "dtype torch.bool, not torch.float32"),
        ([[True] * 8, *good[1:]], "dtype torch.bool, not list"),
        ([~good[0], *good[1:]], "group a removes all 8"),
    ]:
        for use in (slim, lambda *arguments: masked(*arguments).__enter__()):
            with pytest.raises(InputError, match=words):
                use(network, groups, masks)
    with pytest.raises(InputError, match="traced on another network"):
        slim(build("vgg11"), groups, [torch.arange(group.size) < 1 for group in groups])
    half = slim(network, groups, [torch.arange(group.size) < 2 for group in groups])
    with pytest.raises(InputError, match="traced on another network"):
        slim(half, groups, [torch.arange(group.size) < 1 for group in groups])


def test_keep_top_keeps_the_highest_and_breaks_ties_by_order():
    masks = keep_top([torch.tensor([1.0, 3.0, 2.0]), torch.ones(40)], [2, 7])
    assert masks[0].tolist() == [False, True, True]
    assert torch.equal(masks[1], torch.arange(40) < 7)
    assert widths(masks) == [2, 7]
    for wrong in ([0, 7], [2, 41], [2]):
        with pytest.raises(InputError):
            keep_top([torch.ones(3), torch.ones(40)], wrong)


def test_scores_rank_by_the_weights_of_all_layers():
    network = build("resnet20")
    groups = trace(network, IMAGES)
    with torch.no_grad():
        for part in groups[0].slices:  # filter 5 fades in every layer of the stage
            module = network.get_submodule(part.module)
            if part.axis != "in":
                module.weight[5] *= 1e-3
        network.stem[0].weight[3] *= 100
        network.stem[1].weight[4] *= 100
    for criterion, best in (("magnitude", 3), ("batchnorm", 4)):
        found = scores(network, groups, criterion)
        assert [len(score) for score in found] == [group.size for group in groups]
        assert found[0].argmin() == 5
        assert found[0].argmax() == best
        assert found[0].mean().item() == pytest.approx(1)
    plain, groups_of_plain = case("vgg11")  # one convolution per group: what it makes counts, not what reads it
    norms = plain.features[0].weight.abs().sum((1, 2, 3))
    torch.testing.assert_close(scores(plain, groups_of_plain, "magnitude")[0], (norms / norms.mean()).detach())
    with pytest.raises(InputError, match="magnitude, batchnorm, taylor"):
        scores(network, groups, "luck")
    with pytest.raises(InputError, match="Group b has no batch norm"):
        scores(*case("mixed"), "batchnorm")
