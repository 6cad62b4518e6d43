import copy

import pytest
import torch
from torch import nn

from rlprune.errors import InputError
from rlprune.groups import trace
from rlprune.networks import NAMES, build

IMAGES = torch.zeros(2, 3, 32, 32)
COUNTS = {
    **{"vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16},
    # a stage's shared filters once, and those within each block
    **{"resnet18": 12, "resnet20": 12, "resnet34": 20, "resnet50": 37, "resnet56": 30},
}


class Small(nn.Module):
    """A network of our own: `forward` is handed in, the layers are keyword arguments."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._run = forward

    def forward(self, x):
        return self._run(self, x)


def parts(group):
    return {(part.module, part.axis) for part in group.slices}


def pooled(x):
    return x.mean((2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_every_network_has_its_groups_in_order(name):
    network = build(name)
    groups = trace(network, IMAGES)
    assert len(groups) == COUNTS[name]
    assert groups.skipped == []
    position = {module: index for index, (module, _) in enumerate(network.named_modules())}
    first = [position[group.name] for group in groups]
    assert first == sorted(first)
    for group in groups:
        conv = network.get_submodule(group.name)
        assert group.size == conv.out_channels
        assert group.slices[0].module == group.name
        assert torch.equal(group.slices[0].index, torch.arange(group.size))
        root = group.root(network)
        facts = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.padding[0])
        assert (root.in_channels, root.out_channels, root.kernel, root.stride, root.padding) == facts
    made = {module for group in groups for module, axis in parts(group) if axis == "out"}
    assert made == {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}  # all convs, not the classifier


def test_a_residual_stage_leaves_together():
    groups = trace(build("resnet20"), IMAGES)
    stage = [f"stages.0.{block}.convs.1.0" for block in range(3)]
    assert {(name, "out") for name in ["stem.0", *stage]} <= parts(groups[0])
    assert ("stages.1.0.shortcut.0", "in") in parts(groups[0])
    shortcut = next(group for group in groups if ("stages.1.0.shortcut.0", "out") in parts(group))
    assert {("stages.1.0.convs.1.0", "out"), ("stages.1.2.convs.1.0", "out")} <= parts(shortcut)


def test_flatten_gives_each_filter_its_places():
    network = Small(lambda self, x: self.last(self.conv(x).flatten(1)), conv=nn.Conv2d(3, 4, 1), last=nn.Linear(36, 5))
    (group,) = trace(network, torch.zeros(1, 3, 3, 3))
    last = group.slices[-1]
    assert (last.module, last.axis, last.length) == ("last", "in", 36)
    assert torch.equal(last.source[last.index.argsort()], torch.arange(4).repeat_interleave(9))


def test_concatenation_shifts_the_second_group():
    network = Small(
        lambda self, x: self.last(pooled(torch.cat([self.a(x), self.b(x)], 1))),
        **{"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 6, 1), "last": nn.Linear(10, 2)},
    )
    first, second = trace(network, torch.zeros(1, 3, 4, 4))
    assert torch.equal(first.slices[-1].index, torch.arange(4))
    assert torch.equal(second.slices[-1].index, torch.arange(4, 10))


def test_a_hidden_linear_layer_is_a_group():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    (group,) = trace(network, torch.zeros(2, 6))
    assert (group.name, group.size) == ("0", 8)
    root = group.root(network)
    assert (root.in_channels, root.out_channels, root.kernel, root.stride, root.padding) == (6, 8, 1, 1, 0)


def test_layers_that_make_the_output_are_no_group():
    convolutional = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LogSoftmax(1)
    )
    groups = trace(convolutional, IMAGES)
    assert [group.name for group in groups] == ["0"]
    assert groups.skipped == []


def unsafe_networks():
    conv, last = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
    yield "group norm", nn.Sequential(conv, nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    yield (
        "softmax over filters",
        Small(lambda self, x: self.last(pooled(self.conv(x).softmax(1) * 5)), conv=conv, last=nn.Linear(8, 2)),
    )
    yield (
        "attention by the mean filter",
        Small(lambda self, x: self.last(pooled((y := self.conv(x)) * y.mean(1, True))), conv=conv, last=last),
    )
    yield (
        "a size fixed in the code",
        Small(lambda self, x: self.last(pooled(self.conv(x)).view(-1, 8)), conv=conv, last=last),
    )
    yield (
        "grouped convolution",
        Small(
            lambda self, x: self.last(pooled(self.g(self.conv(x)))),
            conv=conv,
            g=nn.Conv2d(8, 8, 1, groups=2),
            last=last,
        ),
    )
    yield (
        "shuffled filters",
        Small(lambda self, x: self.last(pooled(self.conv(x).flip(1))), conv=conv, last=last),
    )
    yield (
        "computed weight",
        Small(
            lambda self, x: self.last(pooled(self.conv(x))),
            conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
            last=nn.Linear(8, 2),
        ),
    )


@pytest.mark.parametrize(("what", "network"), list(unsafe_networks()))
def test_what_cannot_be_removed_safely_is_left_out_and_named(what, network):
    groups = trace(network, IMAGES)
    assert len(groups) == 0
    names = [name for name, reason in groups.skipped if reason]
    assert names[0] in ("conv", "0"), what


def test_a_hidden_fault_in_one_group_spares_the_others():
    network = Small(
        lambda self, x: self.last(pooled(self.b(self.a(x).relu()).softmax(1))),
        **{"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 6, 3), "last": nn.Linear(6, 2)},
    )
    groups = trace(network, IMAGES)
    assert [group.name for group in groups] == ["a"]
    assert [name for name, _ in groups.skipped] == ["b"]


def test_a_branch_that_runs_in_training_only_counts():
    def forward(self, x):
        y = self.conv(x)
        return self.last(pooled(y)) + self.extra(pooled(y)) if self.training else self.last(pooled(y))

    network = Small(forward, conv=nn.Conv2d(3, 8, 3), extra=nn.Linear(8, 2), last=nn.Linear(8, 2)).eval()
    assert [name for name, _ in trace(network, IMAGES).skipped] == ["conv"]


def test_the_network_stays_as_it_is():
    network = build("resnet20").train()
    network.stem[1].eval()
    network.stem[0].weight.requires_grad_(False)
    network.stem[0].register_forward_hook(lambda *_: None)
    network.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    tensors = [id(tensor) for tensor in network.parameters()]
    modes = [module.training for module in network.modules()]
    with torch.no_grad():
        groups = trace(network, IMAGES)
    assert len(groups) == COUNTS["resnet20"]  # frozen weights are traced all the same
    assert tensors == [id(tensor) for tensor in network.parameters()]
    assert modes == [module.training for module in network.modules()]
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    assert [len(module._forward_hooks) for module in network.modules()].count(1) == 1
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_part_of_the_groups_is_a_sequence_too():
    groups = trace(build("vgg11"), IMAGES)
    assert [group.name for group in groups[:2]] == [groups[0].name, groups[1].name]
    assert "features.0: 64" in repr(groups)


@pytest.mark.parametrize(
    ("network", "example", "words"),
    [
        (build("vgg11"), torch.zeros(2, 1, 32, 32), "shape (2, 1, 32, 32)"),
        (build("vgg11"), torch.zeros(2, 3, 32, 32, device="meta"), "on meta but the network on cpu"),
        (build("vgg11"), [1, 2], "must be a tensor"),
        (build("vgg11"), torch.zeros(0, 3, 32, 32), "N of at least 1"),
        (nn.Conv2d(3, 4, 3), IMAGES, "must have shape (2, classes), not (2, 4, 30, 30)"),
        (Small(lambda self, x: (self.conv(x),), conv=nn.Conv2d(3, 4, 3)), IMAGES, "not a tuple"),
        (
            Small(lambda self, x: self.last(x.flatten(1)).detach(), last=nn.Linear(3072, 4)),
            IMAGES,
            "detaches the output",
        ),
        ("vgg11", IMAGES, "torch.nn.Module, not str"),
    ],
)
def test_bad_input_is_told_in_a_sentence(network, example, words):
    with pytest.raises(InputError) as error:
        trace(network, example)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
