"""Latency of what methods left, in one run: every result against the first, pair by pair.

    python benchmarks/results.py weights/peers-cifar10/peers_cifar10_vgg11_10/search/{smof,layerwise}/0

The folders are of `PruningResult.save`, as stages leave them below weights/. The two of a pair are timed one after the
other, as `rlprune.costs.latency` does it (float32, torch's own number of threads), and the ratio is taken pair by pair,
so that it holds while the machine's speed drifts. Fine-tuning changes weights and no latency.
"""

import statistics
import sys

import torch

from rlprune import costs, load
from rlprune.stages.common import environment

BATCHES, PAIRS = (1, 128), 15


def main():
    folders = sys.argv[1:]
    if len(folders) < 2:
        raise SystemExit(__doc__)
    results = [load(folder) for folder in folders]
    print(environment("cpu")["device"])
    print("| result | parameters | MACs | images | ms | ms of the first / its own, median (min–max) |")
    print("|---" * 6 + "|")
    first = results[0]
    for batch in BATCHES:
        example = torch.zeros(batch, *first.input_shape)
        for folder, other in zip(folders, results, strict=True):
            pairs = [[costs.latency(r.network, example) for r in (first, other)] for _ in range(PAIRS)]
            ratios = [a / b for a, b in pairs]
            size = [f"{cost(other.network, example) / 1e6:.2f} M" for cost in (costs.parameters, costs.macs)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            milliseconds = f"{statistics.median(b for _, b in pairs):.2f}"
            print(f"| {folder} | {' | '.join(size)} | {batch} | {milliseconds} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
