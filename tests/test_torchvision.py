"""Every family of image classifiers in torchvision, traced, cut and trained.

The smallest members at small sizes; docs/networks.md has larger ones at their own.
"""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rlprune import costs
from rlprune._torchvision import torchvision
from rlprune.groups import trace
from rlprune.importance import scores
from rlprune.masking import keep_top, masked, slim, widths
from rlprune.verify import randomised

# name → side of the image, layers that make the output
NETWORKS = {
    "alexnet": (64, ["classifier.6"]),
    "vgg11": (32, ["classifier.6"]),
    "vgg11_bn": (32, ["classifier.6"]),
    "resnet18": (64, ["fc"]),
    "resnet34": (32, ["fc"]),
    "resnet50": (64, ["fc"]),
    "resnext50_32x4d": (64, ["fc"]),
    "wide_resnet50_2": (32, ["fc"]),
    "mobilenet_v2": (64, ["classifier.1"]),
    "mobilenet_v3_small": (64, ["classifier.3"]),
    "mobilenet_v3_large": (64, ["classifier.3"]),
    "efficientnet_b0": (64, ["classifier.1"]),
    "efficientnet_b1": (64, ["classifier.1"]),
    "efficientnet_v2_s": (64, ["classifier.1"]),
    "densenet121": (64, ["classifier"]),
    "googlenet": (64, ["aux1.fc2", "aux2.fc2", "fc"]),
    "inception_v3": (299, ["AuxLogits.fc", "fc"]),
    "squeezenet1_0": (64, ["classifier.1"]),
    "squeezenet1_1": (64, ["classifier.1"]),
    "shufflenet_v2_x0_5": (64, ["fc"]),
    "shufflenet_v2_x1_0": (64, ["fc"]),
    "mnasnet0_5": (64, ["classifier.1"]),
    "mnasnet0_75": (64, ["classifier.1"]),
    "regnet_x_400mf": (64, ["fc"]),
    "regnet_x_800mf": (64, ["fc"]),
    "regnet_y_400mf": (64, ["fc"]),
    "regnet_y_800mf": (64, ["fc"]),
    "convnext_tiny": (64, ["classifier.2"]),
}


def build(name):
    """The network with weights and statistics under which no filter is idle, so that a leak would show."""
    quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = torchvision().models.get_model(name, weights=None, **quick)
    return randomised(network, torch.Generator().manual_seed(0))


def layers(network):
    return [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def made(groups):
    return {part.module for group in groups for part in group.slices if part.axis != "in"}


def random_masks(groups):
    """From a single filter to all of a group's."""
    generator = torch.Generator().manual_seed(1)
    kept = [1 + int(torch.randint(group.size, (), generator=generator)) for group in groups]
    return keep_top([torch.rand(group.size, generator=generator) for group in groups], kept)


@pytest.mark.parametrize("name", NETWORKS)
def test_slim_equals_masked_costs_what_is_predicted_and_trains(name):
    side, heads = NETWORKS[name]
    network, images = build(name), torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    groups = trace(network, images[:1])

    skipped = dict(groups.skipped)
    assert sorted([*made(groups) & set(layers(network)), *skipped, *heads]) == sorted(layers(network))
    assert bool(skipped) == name.startswith(("shufflenet", "convnext"))
    assert len({group.name for group in groups}) == len(groups)
    assert all(len(score) == group.size for score, group in zip(scores(network, groups), groups, strict=True))

    masks = random_masks(groups)
    small = slim(network, groups, masks)
    with torch.no_grad():
        with masked(network, groups, masks):
            expected = network(images)
        assert (small(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (network(images) - expected).abs().max() > 1e-2 * expected.abs().max()  # something left

    predictor = costs.Predictor(network, groups, images)
    assert predictor.parameters(widths(masks)) == costs.parameters(small, images)
    assert predictor.macs(widths(masks)) == costs.macs(small, images)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(images[:1])
    assert costs.macs(small, images) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)

    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in small.parameters()]
    sum(nn.functional.cross_entropy(logits, torch.tensor([0, 1])) for logits in tree_leaves(small(images))).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.isfinite().all() for p in small.parameters())
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(small.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2


def test_shufflenet_keeps_what_is_shuffled_and_loses_the_rest():
    groups = trace(build("shufflenet_v2_x0_5"), torch.zeros(1, 3, 64, 64))
    inner = {f"stage{stage}.{unit}.branch2.0" for stage, units in ((2, 4), (3, 8), (4, 4)) for unit in range(units)}
    assert {group.name for group in groups} == inner | {"conv1.0", "conv5.0"}
    reasons = dict(groups.skipped)
    assert "rearranges" in reasons["stage2.1.branch2.5"]
    assert "grouped convolution of filters that stay" in reasons["stage3.0.branch1.0"]


def test_convnext_loses_its_hidden_filters_only():
    network = build("convnext_tiny")
    groups = trace(network, torch.zeros(1, 3, 64, 64))
    hidden = {name for name in layers(network) if name.endswith("block.3")}
    assert {group.name for group in groups} == hidden
    assert all("LayerNorm" in reason for _, reason in groups.skipped)


def test_resnext_loses_whole_paths_or_positions_whichever_are_more():
    groups = {group.name: group for group in trace(build("resnext50_32x4d"), torch.zeros(1, 3, 64, 64))}
    # 32 groups of 4 filters: a path of two layers leaves; of 32 filters: a position in each layer
    first, last = groups["layer1.0.conv1"], groups["layer4.0.conv1"]
    assert [(part.module, part.axis) for part in first.slices][:3:2] == [
        ("layer1.0.conv1", "out"),
        ("layer1.0.conv2", "channels"),
    ]
    assert first.size == last.size == groups["layer4.0.conv2"].size == 32
    assert ("layer4.0.conv2", "in") in {(part.module, part.axis) for part in last.slices}


def test_googlenets_training_outputs_agree_too():
    network = build("googlenet")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    groups = trace(network, images)
    masks = random_masks(groups)
    small = slim(network, groups, masks)
    for each in (network, small):  # only the whole trains, so that no batch norm or dropout differs
        each.training = True
    with torch.no_grad(), masked(network, groups, masks):
        for result, expected in zip(small(images), network(images), strict=True):
            assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
