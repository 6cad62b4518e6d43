"""Which filters of torchvision's image classifiers can be removed, and how long it takes to find and remove them.

    python benchmarks/networks.py [page]

Writes the page, by default docs/networks.md, and prints it (about 2 minutes on two cores, and 4.5 GB of memory).
"""

import copy
import re
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch_pruning
from tqdm import tqdm

from rlprune import costs, networks
from rlprune._torchvision import torchvision
from rlprune.groups import trace
from rlprune.masking import keep_top, masked, slim
from rlprune.stages.common import environment
from rlprune.verify import randomised

NAMES = [
    "alexnet",
    "vgg11",
    "vgg16",
    "vgg16_bn",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext50_32x4d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet0_5",
    "mnasnet1_0",
    "efficientnet_b0",
    "efficientnet_b3",
    "efficientnet_v2_s",
    "densenet121",
    "densenet201",
    "googlenet",
    "inception_v3",
    "squeezenet1_0",
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "regnet_x_400mf",
    "regnet_x_3_2gf",
    "regnet_y_400mf",
    "regnet_y_3_2gf",
    "convnext_tiny",
    "convnext_small",
]
PAGE = """# What can be removed from torchvision's image classifiers

`rlprune.trace` on {count} networks of `torchvision.models` at the image size of their published weights.
Made by `{command}` on {device}, float32; {versions}.
Weights are random: what can be removed does not depend on them.

- *filters*: how many can be removed one by one. Where a grouped convolution ties several, the set counts as one.
- *left alone*: convolution and linear layers whose filters stay; why, see below. The classifier's last layer, which
  makes the output, does not count.
- *slim vs masked*: largest difference of the two networks' outputs, in parts of the largest output, in float32 with a
  random half of every group's filters removed.
- *parameters*, *MACs*: of the slim one, in percent of the unpruned network.
- *trace*: one call for one image.

| network | image | groups | filters | left alone | slim vs masked | parameters, % | MACs, % | trace, s |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
{rows}

## Left alone, and why

A ShuffleNet unit halves, joins and shuffles its channels by code that stays as it is: a filter of one half could only
leave with its counterparts all along the stage, and that ties all of them to each other. Layer norm computes with the
mean over all channels, so that a channel of zeros is not the same as none. What lies inside the units is pruned.

{reasons}

## Speed

| what | median | slowest of {repeats} |
|---|--:|--:|
{speeds}

Cutting is at the widths that leave 10 % of the parameters ({share:.1%} of every group's filters), on one thread.
Torch-Pruning prunes a network in place, so that a copy comes first, and its graph must be built on that copy.
All three alternate in one run.
"""


def measured(name):
    """The network's row, and reason → layers that are left alone."""
    models = torchvision().models
    quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = randomised(models.get_model(name, weights=None, **quick), torch.Generator().manual_seed(0))
    side = models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    groups = trace(network, images)
    seconds = time.perf_counter() - start
    generator = torch.Generator().manual_seed(2)
    order = [torch.rand(group.size, generator=generator) for group in groups]
    masks = keep_top(order, [(group.size + 1) // 2 for group in groups])
    small = slim(network, groups, masks)
    with torch.no_grad(), masked(network, groups, masks):
        expected = network(images)
        error = ((small(images) - expected).abs().max() / expected.abs().max()).item()
    shares = [100 * cost(small, images) / cost(network, images) for cost in (costs.parameters, costs.macs)]
    alone = defaultdict(list)
    for layer, reason in groups.skipped:
        alone[reason].append(layer)
    filters = sum(group.size for group in groups)
    row = (name, side, len(groups), filters, len(groups.skipped), f"{error:.0e}", *(f"{s:.1f}" for s in shares))
    return (*row, f"{seconds:.2f}"), alone


def pattern(text):
    """A module's name with a star for the number of its block."""
    return re.sub(r"\d+(?=[^ ]*\.[^ .]+\.[^ .]+)", "*", text)


def compact(alone):
    """Lines that name the layers left alone in a network."""
    counts = defaultdict(lambda: defaultdict(int))
    for reason, layers in alone.items():
        for layer in layers:
            counts[pattern(reason)][pattern(layer)] += 1
    for reason, layers in counts.items():
        yield f"  - {reason}: " + ", ".join(f"`{layer}` ({count})" for layer, count in layers.items())


def trace_times(repeats=7):
    """Seconds of tracing torchvision's ResNet-50 at 224 × 224."""
    network, images = torchvision().models.resnet50(), torch.randn(1, 3, 224, 224)
    return timed([lambda: trace(network, images)], repeats)[0]


def cut_times(repeats=30):
    """Seconds of cutting VGG-16: by `slim`, by Torch-Pruning, and the latter without building its graph; the share."""
    network, images = networks.build("vgg16").eval(), torch.randn(1, 3, 32, 32)
    groups = trace(network, images)
    predict, full = costs.Predictor(network, groups, images), [group.size for group in groups]

    def at(share):
        return [max(1, round(share * size)) for size in full]

    share = next(
        s / 1000 for s in range(1000, 0, -1) if predict.parameters(at(s / 1000)) <= 0.1 * predict.parameters(full)
    )
    masks = keep_top([torch.rand(size) for size in full], at(share))
    removed = [(~mask).nonzero().flatten().tolist() for mask in masks]

    def build():
        twin = copy.deepcopy(network)
        return twin, torch_pruning.DependencyGraph().build_dependency(twin, images)

    def prune(twin, graph):
        for group, places in zip(groups, removed, strict=True):
            layer = twin.get_submodule(group.name)
            graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, places).prune()
        return twin

    def theirs():
        return prune(*build())

    assert costs.parameters(theirs(), images) == costs.parameters(slim(network, groups, masks), images)
    ready = iter([build() for _ in range(repeats + 1)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = timed([lambda: slim(network, groups, masks), theirs, lambda: prune(*next(ready))], repeats)
    torch.set_num_threads(threads)
    return *times, share


def timed(calls, repeats):
    """Seconds of each call, the calls by turns, after one of each."""
    times = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if repeat:
                taken.append(time.perf_counter() - start)
    return times


def main():
    torch.set_num_threads(2)
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/networks.md")
    tracing = trace_times()
    *cutting, share = cut_times()
    what = [
        "`trace`, ResNet-50, 1×3×224×224",
        "`slim`, VGG-16",
        "Torch-Pruning: copy, build graph, prune",
        "its pruning alone",
    ]
    speeds = [
        f"| {name} | {1000 * statistics.median(times):.1f} ms | {1000 * max(times):.1f} ms |"
        for name, times in zip(what, [tracing, *cutting], strict=True)
    ]
    rows, reasons = [], []
    for name in tqdm(NAMES):
        row, alone = measured(name)
        rows.append("| " + " | ".join(map(str, row)) + " |")
        reasons += [f"- {name}", *compact(alone)] if alone else []
    facts = environment("cpu")
    page = PAGE.format(
        count=len(NAMES),
        command=f"python benchmarks/networks.py {path}",
        device=facts["device"].rsplit(", ", 1)[0],
        versions=", ".join(f"{package} {version}" for package, version in facts["versions"].items()),
        rows="\n".join(rows),
        reasons="\n".join(reasons),
        speeds="\n".join(speeds),
        repeats=f"{len(tracing)} and {len(cutting[0])}",
        share=share,
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
