"""Training steps with convolutions of small maps as products of matrices (`rlprune.narrow`), against torch's own.

    python benchmarks/narrow.py [network ...]

Steps of both kinds alternate, and the ratio is taken pair by pair; for maps of up to 4 and of up to 8 pixels each way,
for the network as it is and with uniform widths and a tenth of the parameters, in training and in evaluation. In
bfloat16, whatever the processor; ``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`` shows one without AMX. Images are random.
"""

import contextlib
import statistics
import sys
import time

import torch
from torch.nn import functional as F

from rlprune import Budget, narrow, networks, peers
from rlprune.stages.common import environment
from rlprune.training import Training, sgd

BATCH, PAIRS = 128, 9


def step(network, optimizer, images, labels, way):
    """Seconds of one training step, or of a pass without an optimizer."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16), way:
        loss = F.cross_entropy(network(images).float(), labels)
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def main():
    print(environment("cpu"))
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))
    print("\n| network | maps up to | torch's, images/s | products, images/s | ratio (median, min–max) |")
    print("|---|--:|--:|--:|---|")
    for name in sys.argv[1:] or ["vgg11"]:
        full = networks.build(name)
        tenth = peers.uniform(full, images[:1], [Budget("parameters", 0.1)], evaluate=lambda _: 0.0).network
        for label, network in ((name, full), (f"{name}, a tenth", tenth)):
            network.to(memory_format=torch.channels_last).train()
            for what, optimizer in (("training", sgd(network, Training())), ("evaluation", None)):
                network.train(optimizer is not None)
                for narrow.WIDEST in (4, 8):
                    pairs = []
                    for _ in range(PAIRS + 1):
                        ways = contextlib.nullcontext(), narrow.NarrowConvolutions()
                        with torch.set_grad_enabled(optimizer is not None):
                            pairs.append([step(network, optimizer, images, labels, way) for way in ways])
                    pairs = pairs[1:]  # the first warms up
                    ratios = [a / b for a, b in pairs]
                    speeds = [BATCH / statistics.median(column) for column in zip(*pairs, strict=True)]
                    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
                    row = f"{label}, {what} | {narrow.WIDEST} | {speeds[0]:.0f} | {speeds[1]:.0f} | {spread}"
                    print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
