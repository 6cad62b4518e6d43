"""Candidates a second: the evaluator against the naive way, and against the machine's own convolution peak.

Naive is how the original evaluates: the full-size network in float32 with masked weights, images opened and
transformed one by one by torchvision in a data loader. Both sides see as many images, batch norm is
recalibrated in both, and both are timed in turn in one run. The peak is the best rate of one large convolution
in the evaluator's precision. Images are random: speed does not depend on them.
Run from the repository's root: python benchmarks/evaluator.py [network ...]
"""

import statistics
import sys
import time

import torch
from PIL import Image
from torch import nn

from rlprune import Budget, Evaluator, costs, masked, networks, trace
from rlprune._torchvision import torchvision
from rlprune.candidates import Candidates
from rlprune.forward import half_precision
from rlprune.own import from_tensors
from rlprune.stages.common import environment

IMAGES, RECALIBRATION, PAIRS = 1000, 500, 5


class Pictures(torch.utils.data.Dataset):
    """Images as a data loader of the usual kind gives them."""

    def __init__(self, split):
        transforms = torchvision().transforms
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in split.images]
        self.labels = split.labels
        scale = transforms.Normalize((0.5,) * 3, (0.25,) * 3)
        self.transform = transforms.Compose([transforms.ToTensor(), scale])

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.transform(self.pictures[index]), self.labels[index]


@torch.no_grad()
def naive(network, groups, masks, calibration, validation):
    """Seconds for one candidate at full size."""
    start = time.perf_counter()
    with masked(network, groups, masks):
        batches = torch.cat([images for images, _ in torch.utils.data.DataLoader(calibration, batch_size=250)])
        with torch.autocast("cpu", enabled=False):
            norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
            for norm in norms:
                norm.train()
            for batch in batches.split(250):
                network(batch)
            network.eval()
            for images, labels in torch.utils.data.DataLoader(validation, batch_size=250):
                (network(images).argmax(1) == labels).sum().item()
    return time.perf_counter() - start


def ours(evaluator, masks):
    """Seconds for one candidate."""
    start = time.perf_counter()
    evaluator(masks)
    return time.perf_counter() - start


@torch.no_grad()
def peak(device):
    """MAC/s of one 256-channel 3×3 convolution on 32×32 images, the best of several."""
    conv = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, memory_format=torch.channels_last)
    images = torch.randn(32, 256, 32, 32).to(device, memory_format=torch.channels_last)
    best = 0.0
    with half_precision(device):
        for _ in range(20):
            start = time.perf_counter()
            conv(images)
            best = max(best, 32 * 32 * 32 * conv.weight.numel() / (time.perf_counter() - start))
    return best


def main():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES + RECALIBRATION, 3, 32, 32), generator=generator, dtype=torch.uint8)
    classes = torch.randint(0, 10, (len(pixels),), generator=generator)
    data = from_tensors(pixels, classes, validation=IMAGES / len(pixels))
    calibration, validation = Pictures(data.train), Pictures(data.validation)
    print(environment("cpu"))
    top = peak("cpu")
    print(f"convolution peak: {top / 1e9:.0f} GMAC/s")
    print("| network | naive, s | ours, s | naive / ours (median, min–max) | MACs kept | GMAC/s | of the peak |")
    print("|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or ["vgg16", "vgg11", "resnet18"]:
        network = networks.build(name).to(memory_format=torch.channels_last).eval()
        groups = trace(network, data.example)
        candidates = Candidates(network, groups, data.example, [Budget("parameters", 0.1)])
        evaluator = Evaluator(network, groups, data, images=IMAGES, recalibration=RECALIBRATION)
        pairs, work = [], []
        for number in range(PAIRS + 1):  # the first is a warm-up
            shares = torch.rand(len(groups), generator=generator).clamp_min(0.05).numpy()
            widths = candidates.fit(shares, "scale")
            masks = candidates.masks(widths)
            slow, fast = naive(network, groups, masks, calibration, validation), ours(evaluator, masks)
            if number:
                pairs.append((slow, fast))
                work.append((candidates.predictor.macs(widths), (IMAGES + RECALIBRATION) / fast))
        ratios = sorted(slow / fast for slow, fast in pairs)
        slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
        rate = statistics.median(macs * speed for macs, speed in work)
        kept = statistics.median(macs for macs, _ in work) / costs.macs(network, data.example)
        spread = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}–{ratios[-1]:.1f})"
        shares = f"{100 * kept:.0f} % | {rate / 1e9:.0f} | {100 * rate / top:.0f} %"
        print(f"| {name} | {slow:.2f} | {fast:.2f} | {spread} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
