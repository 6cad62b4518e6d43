"""Images per second of the training loop against the bare forward–backward–step loop, in one run.

    python benchmarks/training.py [network ...]

The bare loop feeds the same batch again and again: no shuffling, augmentation,
schedule, accuracy or progress. The two alternate, and the ratio is taken pair by
pair, so that it holds while the machine's speed drifts. Data: random images of
CIFAR-10's shape, since speed does not depend on what is seen.
"""

import statistics
import sys
import time

import torch
from torch.nn import functional as F

from rlprune import networks, training
from rlprune.own import from_tensors
from rlprune.stages.common import environment

BATCH, STEPS, PAIRS = 128, 20, 7


def bare(network, optimizer, images, labels):
    """Images per second of forward, backward and step alone."""
    start = time.perf_counter()
    for _ in range(STEPS):
        with training.half_precision(images.device):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize()
    return BATCH * STEPS / (time.perf_counter() - start)


def ours(network, dataset):
    """Images per second of an epoch of `rlprune.training.fit`, as it reports them."""
    schedule = training.Training(epochs=1, batch_size=BATCH)
    return training.fit(network, dataset, schedule, progress=None)["images_per_second"].iloc[0]


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    count = round(BATCH * STEPS / 0.98)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    classes = torch.randint(0, 10, (count,), generator=generator)
    dataset = from_tensors(pixels, classes, validation=0.02, flip=True, crop=4).to(device)
    print(environment(device))
    print("| network | bare loop, images/s | fit, images/s | fit / bare (median, min–max) |\n|---|---|---|---|")
    for name in sys.argv[1:] or ["vgg11", "resnet18"]:
        network = networks.build(name).to(device, memory_format=torch.channels_last)
        optimizer = training.sgd(network, training.Training())
        images, labels = next(dataset.augmented(BATCH, generator))
        bare(network, optimizer, images, labels)  # warm-up
        pairs = [(bare(network, optimizer, images, labels), ours(network, dataset)) for _ in range(PAIRS)]
        ratios = [b / a for a, b in pairs]
        speeds = [statistics.median(column) for column in zip(*pairs, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        print(f"| {name} | {speeds[0]:.0f} | {speeds[1]:.0f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
