"""Does a latency that was promised hold in a fresh process?

Networks are pruned to half their latency (what they answer does not matter here, so their weights are
random), saved, loaded in a process of its own and measured there again, as `rlprune.costs.latency` measures.
Run from the repository's root: python benchmarks/latency.py
"""

import json
import subprocess
import sys
import tempfile

import torch

from rlprune import Budget, costs, networks, prune
from rlprune.stages.common import environment

CASES = [("vgg11", 1), ("vgg16", 1), ("resnet18", 1), ("torchvision.mobilenet_v2", 1), ("vgg16", 32), ("resnet18", 32)]
SHARE = 0.5
PROCESSES = 3
FRESH = """
import sys, torch
from rlprune import costs, load
result = load(sys.argv[1])
print(costs.latency(result.network, torch.zeros(int(sys.argv[2]), *result.input_shape)))
"""


def main():
    print(json.dumps(environment("cpu")))
    head = ["network", "images", "budget, ms", "promised, ms (spread)", "in fresh processes, ms", "off by at most"]
    print(f"| {' | '.join(head)} | outside the spread by |")
    print("|---" * 7 + "|")
    for name, batch in CASES:
        network = networks.build(name).eval()
        example = torch.zeros(batch, 3, 32, 32)
        result = prune(network, example, [Budget("latency", SHARE)], episodes=10, evaluate=size, progress=False)
        cost = result.costs["latency"]
        with tempfile.TemporaryDirectory() as folder:
            result.save(folder)
            again = [fresh(folder, batch) for _ in range(PROCESSES)]
        off = max(abs(value / cost["value"] - 1) for value in again)
        outside = max(max(cost["low"] / value - 1, value / cost["high"] - 1, 0) for value in again)
        promised = f"{cost['value']:.2f} ({cost['low']:.2f}–{cost['high']:.2f})"
        measured = ", ".join(f"{value:.2f}" for value in again)
        figures = f"{cost['limit']:.2f} | {promised} | {measured} | {100 * off:.0f} % | {100 * outside:.0f} %"
        print(f"| {name} | {batch} | {figures} |", flush=True)


def size(network):
    """The reward: the more parameters are left within budget, the better."""
    return costs.parameters(network, torch.empty(0))


def fresh(folder, batch):
    """Milliseconds, in a process of its own."""
    command = [sys.executable, "-c", FRESH, folder, str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True).stdout)


if __name__ == "__main__":
    main()
