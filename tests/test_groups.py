import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from rlprune.errors import InputError
from rlprune.groups import trace
from rlprune.masking import slim
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
        "pixels made of filters",
        Small(
            lambda self, x: self.last(pooled(nn.functional.pixel_shuffle(self.conv(x), 2))),
            conv=conv,
            last=nn.Linear(2, 2),
        ),
    )
    yield (
        "channel shuffle",
        Small(
            lambda self, x: self.last(pooled(self.conv(x).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2))),
            conv=conv,
            last=last,
        ),
    )
    yield (
        "filters in two halves of fixed size",
        Small(
            lambda self, x: self.last(pooled(torch.cat([(y := self.conv(x))[:, :4], y[:, 4:].exp()], 1))),
            conv=conv,
            last=last,
        ),
    )
    yield (
        "layer norm and a scale of the network's own",
        Small(
            lambda self, x: self.last(self.norm(pooled(self.conv(x)) * self.scale)),
            conv=conv,
            norm=nn.LayerNorm(8),
            scale=nn.Parameter(torch.ones(8)),
            last=last,
        ),
    )
    yield (
        "one scale for each filter",
        Small(
            lambda self, x: self.last(pooled(self.conv(x)) * self.scale),
            conv=conv,
            scale=nn.Parameter(torch.ones(8)),
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


@pytest.mark.parametrize(("size", "prunable"), [(-1, True), (8, False)])
def test_a_branch_that_runs_in_training_only_counts(size, prunable):
    def forward(self, x):
        y = pooled(self.conv(x))
        return self.last(y) + self.extra(y.view(len(y), size)) if self.training else self.last(y)

    network = Small(forward, conv=nn.Conv2d(3, 8, 3), extra=nn.Linear(8, 2), last=nn.Linear(8, 2)).eval()
    groups = trace(network, IMAGES)
    if not prunable:
        assert (len(groups), [name for name, _ in groups.skipped]) == (0, ["conv"])
        assert "in training" in groups.skipped[0][1]
        return
    assert groups.skipped == []
    assert {("extra", "in"), ("last", "in")} < parts(groups[0])
    small = slim(network, groups, [torch.arange(8) < 3]).train()
    assert small.extra.in_features == 3
    assert small(IMAGES).shape == (2, 2)
    assert not network.training


def tied(**layers):
    """A chain of layers, then a linear layer."""
    chain = list(layers)

    def forward(self, x):
        for name in chain:
            x = getattr(self, name)(x)
        return self.last(pooled(x))

    return Small(forward, **layers, last=nn.Linear(layers[chain[-1]].out_channels, 2))


def units(group):
    """Module and axis → the places of each filter."""
    return {
        (part.module, part.axis): [sorted(part.index[part.source == one].tolist()) for one in range(group.size)]
        for part in group.slices
    }


def test_of_many_narrow_groups_whole_ones_leave():
    network = tied(conv=nn.Conv2d(3, 8, 3), grouped=nn.Conv2d(8, 12, 3, groups=4))
    (group,) = trace(network, IMAGES)
    assert (group.name, group.size) == ("conv", 4)
    assert units(group) == {
        ("conv", "out"): [[0, 1], [2, 3], [4, 5], [6, 7]],
        ("grouped", "channels"): [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]],
        ("last", "in"): [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]],
    }
    small = slim(network, [group], [torch.tensor([True, False, True, True])])
    assert (small.grouped.groups, small.grouped.in_channels, small.grouped.out_channels) == (3, 6, 9)
    assert small.grouped.weight.shape == (9, 2, 3, 3)
    assert torch.equal(small.grouped.weight[3:], network.grouped.weight[6:])


def test_of_few_wide_groups_the_same_positions_leave():
    network = tied(conv=nn.Conv2d(3, 8, 3), grouped=nn.Conv2d(8, 6, 3, groups=2))
    first, second = trace(network, IMAGES)
    assert units(first) == {
        ("conv", "out"): [[0, 4], [1, 5], [2, 6], [3, 7]],
        ("grouped", "in"): units(first)["conv", "out"],
    }
    assert units(second) == {("grouped", "out"): [[0, 3], [1, 4], [2, 5]], ("last", "in"): [[0, 3], [1, 4], [2, 5]]}
    small = slim(network, [first, second], [torch.tensor([True, False, True, True]), torch.tensor([False, True, True])])
    assert (small.grouped.groups, small.grouped.in_channels, small.grouped.out_channels) == (2, 6, 4)
    assert torch.equal(small.grouped.weight, network.grouped.weight[[1, 2, 4, 5]][:, [0, 2, 3]])


def test_a_grouped_convolution_of_the_image_loses_positions():
    network = tied(grouped=nn.Conv2d(3, 12, 3, groups=3))  # whole groups cannot leave: the image stays
    (group,) = trace(network, IMAGES)
    assert units(group)["grouped", "out"] == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    single = trace(tied(depthwise=nn.Conv2d(3, 3, 3, groups=3)), IMAGES)
    assert (len(single), single.skipped) == (
        0,
        [("depthwise", "depthwise is a grouped convolution of filters that stay")],
    )


def test_groups_of_two_sizes_on_one_residual_stream():
    def forward(self, x):
        x = self.stem(x)
        x = x + self.fours(x)
        return self.last(pooled(x + self.threes(x)))

    layers = {"fours": nn.Conv2d(24, 24, 3, padding=1, groups=12), "threes": nn.Conv2d(24, 24, 3, padding=1, groups=8)}
    network = Small(forward, stem=nn.Conv2d(3, 24, 3), **layers, last=nn.Linear(24, 2))
    (group,) = trace(network, IMAGES)
    assert units(group)["stem", "out"] == [list(range(start, start + 6)) for start in (0, 6, 12, 18)]
    small = slim(network, [group], [torch.arange(4) < 3])
    assert (small.fours.groups, small.threes.groups) == (9, 6)


def test_a_chunk_is_cut_in_the_middle_again():
    network = Small(
        lambda self, x: self.last(pooled((y := self.conv(x).chunk(2, 1))[0] * y[1].sigmoid())),
        conv=nn.Conv2d(3, 8, 3),
        last=nn.Linear(4, 2),
    )
    (group,) = trace(network, IMAGES)
    assert units(group)["conv", "out"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    apart = Small(
        lambda self, x: self.last(pooled((y := self.conv(x).chunk(2, 1))[0])) + self.last(pooled(y[1]).exp()),
        conv=nn.Conv2d(3, 8, 3),
        last=nn.Linear(4, 2),
    )
    assert [group.size for group in trace(apart, IMAGES)] == [4]


def test_excluded_layers_keep_their_filters():
    network = build("resnet20")
    everything = trace(network, IMAGES)
    assert [group.name for group in trace(network, IMAGES, exclude=["stages.0.0.convs.0.0"])] == [
        group.name for group in everything if group.name != "stages.0.0.convs.0.0"
    ]
    # a partner keeps the whole stream
    groups = trace(network, IMAGES, exclude=("stages.0.1.convs.1.0",))
    stream = {module for module, axis in parts(everything[0]) if axis == "out"}
    assert dict(groups.skipped) == dict.fromkeys(stream, "excluded")
    assert [group.name for group in groups] == [group.name for group in everything[1:]]
    # a container stands for all within it, a type for all of its kind; what only reads is not touched
    groups = trace(network, IMAGES, exclude=["stages.1"])
    assert not any(name.startswith("stages.1.") for group in groups for name, axis in parts(group) if axis != "in")
    assert ("stages.1.0.convs.0.0", "in") in parts(groups[0])
    assert {reason for _, reason in groups.skipped} == {"excluded"}
    assert (
        len(trace(network, IMAGES, exclude=[nn.Conv2d])) == len(trace(network, IMAGES, exclude=[nn.BatchNorm2d])) == 0
    )
    assert (
        trace(network, IMAGES, exclude=["classifier", nn.Linear]).skipped == []
    )  # it makes the output: nothing to keep


@pytest.mark.parametrize(
    ("exclude", "words"),
    [
        (["stem", "nothing.0"], "no module 'nothing.0'"),
        ([""], "no module ''"),
        ([7], "a name or a subclass of torch.nn.Module, not 7"),
        ([int], "not <class 'int'>"),
        ("stem", "a sequence of names or types, not 'stem'"),
        (nn.Conv2d, "a sequence of names or types"),
        (3, "a sequence of names or types, not 3"),
    ],
)
def test_a_wrong_exclusion_is_told_in_a_sentence(exclude, words):
    with pytest.raises(InputError) as error:
        trace(build("resnet20"), IMAGES, exclude)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_every_layer_is_accounted_for():
    network = Small(
        lambda self, x: self.last(pooled(self.norm(self.b(self.a(x))))),
        **{"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 8, 3), "norm": nn.GroupNorm(2, 8), "idle": nn.Conv2d(8, 8, 1)},
        last=nn.Linear(8, 2),
    )
    groups = trace(network, IMAGES)
    assert [group.name for group in groups] == ["a"]
    assert groups.skipped == [
        ("b", "norm (GroupNorm) ties its filters to each other"),
        ("idle", "it did not run on the example input, or takes no part in the output"),
    ]


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


@pytest.mark.parametrize(
    ("hook", "remedy"),
    [
        (nn.utils.weight_norm, "use torch.nn.utils.parametrizations.weight_norm in place of"),
        (nn.utils.spectral_norm, "use torch.nn.utils.parametrizations.spectral_norm in place of"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "torch.nn.utils.prune.remove"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_that_a_hook_computes_is_refused(hook, remedy):
    layers = {"conv": nn.Conv2d(3, 8, 3), "last": nn.Linear(8, 2)}
    network = Small(lambda self, x: self.last(pooled(self.conv(x))), **layers)
    hook(network.conv)
    with pytest.raises(InputError, match=f"computes a weight of the layer 'conv', .*{remedy}"):
        trace(network, IMAGES, exclude=["conv"])


@pytest.mark.parametrize("reads", ["its output", "what it kept"])
def test_a_hook_that_changes_what_is_computed_is_refused(reads):
    layers = {"conv": nn.Conv2d(3, 8, 3), "last": nn.Linear(8, 2)}
    network = Small(lambda self, x: self.last(pooled(self.conv(x))), **layers)
    if reads == "its output":
        network.conv.register_forward_hook(lambda module, inputs, output: 3 * output)
    else:
        kept = {}
        network._run = lambda self, x: (self.conv(x), self.last(pooled(kept["made"])))[1]
        network.conv.register_forward_hook(lambda module, inputs, output: kept.update(made=output) or None)
    with pytest.raises(InputError, match="Without its forward hooks|The network cannot process"):
        trace(network, torch.rand(2, 3, 32, 32))


def test_a_hook_that_only_looks_on_is_none_of_our_business():
    seen = []
    network = Small(lambda self, x: self.last(pooled(self.conv(x))), conv=nn.Conv2d(3, 8, 3), last=nn.Linear(8, 2))
    network.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape) or None)
    assert [group.name for group in trace(network, IMAGES)] == ["conv"]
    assert len(network.conv._forward_hooks) == 1


def test_a_network_that_keeps_what_it_made_is_traced_after_its_training():
    def run(self, x):
        self.made = self.conv(x)  # as code for attention maps and auxiliary losses does
        self.all = {"maps": [self.made]}
        return self.last(pooled(self.made))

    network = Small(run, conv=nn.Conv2d(3, 8, 3), last=nn.Linear(8, 2))
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    groups = trace(network, IMAGES)
    assert [group.name for group in groups] == ["conv"]
    assert slim(network, groups, [torch.arange(8) < 3]).conv.out_channels == 3


@pytest.mark.parametrize("count", [1, 2])
def test_instance_norm_whatever_the_batch(count):
    norms = [nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 6, 3)]
    network = nn.Sequential(*norms, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    assert [group.name for group in trace(network, torch.rand(count, 3, 16, 16))] == ["0", "3"]


def test_a_device_without_float64_is_refused(monkeypatch):
    def empty(*size, dtype, device):
        raise TypeError("no float64 here")

    network = nn.Conv2d(3, 4, 3)
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(InputError, match=r"cpu has no float64 numbers \(no float64 here\): move the network"):
        trace(network, IMAGES)


def scaled(by):
    """A network whose code multiplies what its first layer makes by something made of some of it."""
    layers = {"a": nn.Conv2d(3, 32, 3, padding=1), "norm": nn.BatchNorm2d(32), "b": nn.Conv2d(32, 8, 3)}
    return Small(lambda n, x: n.head(pooled(n.b(by(n.norm(n.a(x)).relu())))), **layers, head=nn.Linear(8, 10)).eval()


@pytest.mark.parametrize("channel", [0, 3, 17])
def test_code_that_needs_a_certain_filter_keeps_its_group(channel):
    def by(y):
        return y * y.index_select(1, torch.tensor([channel])).sigmoid()

    groups = trace(scaled(by), IMAGES)
    assert [group.name for group in groups] == ["b"]
    assert groups.skipped[0][0] == "a"


@pytest.mark.parametrize(
    "by", [lambda y: y * y[:, 3:4].sigmoid(), lambda y: y + torch.cat([y[:, 1:], y[:, :1]], 1)], ids=["gate", "shift"]
)
def test_code_that_moves_filters_on_and_adds_them_up_has_an_end(by):
    groups = trace(scaled(by), IMAGES)
    assert [group.name for group in groups] == ["b"]
    assert groups.skipped[0][0] == "a"


def test_code_that_squeezes_a_width_of_one_keeps_its_group():
    network = Small(
        lambda n, x: n.head(n.b(n.a(x).relu()).mean((2, 3), keepdim=True).squeeze()),
        a=nn.Conv2d(3, 8, 3),
        b=nn.Conv2d(8, 16, 3),
        head=nn.Linear(16, 10),
    ).eval()
    groups = trace(network, IMAGES)
    assert [group.name for group in groups] == ["a"]
    assert "fails" in dict(groups.skipped)["b"]


def test_tracing_leaves_the_global_generator_as_it_was():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2)]
    network = nn.Sequential(*layers)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    trace(network, torch.zeros(1, 3, 8, 8))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)])
def test_a_network_that_changes_its_input_is_refused(first):
    network = nn.Sequential(first, nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    images = torch.full((1, 3, 8, 8), -2.0)
    with pytest.raises(InputError, match="changes its input in place"):
        trace(network, images)
    assert images.eq(-2).all()


def test_a_compiled_network_is_refused_by_name():
    network = torch.compile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10)), backend="eager")
    with pytest.raises(InputError, match="hand in what was compiled, network._orig_mod"):
        trace(network, torch.zeros(1, 3, 8, 8))
