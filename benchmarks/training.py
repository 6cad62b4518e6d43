"""Images per second of the training loop, in one run: against the bare loop, and with lessons against a live teacher.

    python benchmarks/training.py [network ...]

The bare forward–backward–step loop feeds the same batch again and again: no
shuffling, augmentation, schedule, accuracy or progress, and torch's own
convolutions throughout (`rlprune.narrow`). The second table is of
the fine-tuning of a network with uniform widths and a tenth of the parameters,
which imitates the unpruned one: that one is asked at every step, or its answers
are those that an earlier run has left (`rlprune.lessons`). The two of a pair
alternate, and the ratio is taken pair by pair, so that it holds while the
machine's speed drifts. Data: random images of CIFAR-10's shape, since speed
does not depend on what is seen.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import rlprune
from rlprune import forward, networks, peers, training
from rlprune.own import from_tensors
from rlprune.stages.common import environment

BATCH, STEPS, PAIRS = 128, 20, 7


def bare(network, optimizer, images, labels):
    """Images per second of forward, backward and step alone."""
    network.train()  # `fit` leaves it in evaluation mode
    start = time.perf_counter()
    for _ in range(STEPS):
        with forward.half_precision(images.device):
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


def distilled(network, dataset, teacher, lessons):
    """Images per second of an epoch of `rlprune.training.fit` that imitates a teacher."""
    schedule = training.Training(epochs=1, batch_size=BATCH, distillation=0.5)
    history = training.fit(network, dataset, schedule, teacher=teacher, progress=None, lessons=lessons)
    return history["images_per_second"].iloc[0]


def tenth(network, example):
    """A network with uniform widths and a tenth of the parameters."""
    return peers.uniform(network, example, [rlprune.Budget("parameters", 0.1)], evaluate=lambda _: 0.0).network


def table(head, names, pair):
    """Print a row a network: the medians of PAIRS pairs of speeds, and the spread of their ratio."""
    print(f"\n| network | {head} (median, min–max) |\n|---|---|---|---|")
    for name in names:
        measure = pair(name)
        measure()  # warm-up
        pairs = [measure() for _ in range(PAIRS)]
        ratios = [b / a for a, b in pairs]
        speeds = [statistics.median(column) for column in zip(*pairs, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        print(f"| {name} | {speeds[0]:.0f} | {speeds[1]:.0f} | {spread} |", flush=True)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    count = round(BATCH * STEPS / 0.98)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    classes = torch.randint(0, 10, (count,), generator=generator)
    dataset = from_tensors(pixels, classes, validation=0.02, flip=True, crop=4).to(device)
    print(environment(device))
    names = sys.argv[1:] or ["vgg11", "resnet18"]

    def loops(name):
        network = networks.build(name).to(device, memory_format=torch.channels_last)
        optimizer = training.sgd(network, training.Training())
        images, labels = next(dataset.augmented(BATCH, generator))
        return lambda: (bare(network, optimizer, images, labels), ours(network, dataset))

    def teachings(name):
        teacher = networks.build(name).to(device, memory_format=torch.channels_last).eval()
        slim = tenth(teacher, dataset.example)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return lambda: (distilled(slim, dataset, teacher, None), distilled(slim, dataset, teacher, folder))

    with contextlib.ExitStack() as stack:
        table("bare loop, images/s | fit, images/s | fit / bare", names, loops)
        table("teacher asked, images/s | lessons, images/s | lessons / asked", names, teachings)


if __name__ == "__main__":
    main()
