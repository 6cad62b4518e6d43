"""Does a latency that was promised hold in a fresh process?

Networks are pruned under latency budgets (what they answer does not matter here, so their weights are
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
SHARES = (0.6, 0.4)
PROCESSES = 3
FRESH = """
import sys, torch
from rlprune import costs, load
result = load(sys.argv[1])
print(costs.latency(result.network, torch.zeros(int(sys.argv[2]), *result.input_shape)))
"""


def main():
    print(json.dumps(environment("cpu")))
    print("| network | images | budget, ms | unpruned, ms | promised, ms | in fresh processes, ms | off by at most |")
    print("|---|---|---|---|---|---|---|")
    for name, batch in CASES:
        network = networks.build(name).eval()
        example = torch.zeros(batch, 3, 32, 32)
        for share in SHARES:
            result = prune(network, example, [Budget("latency", share)], episodes=10, evaluate=size, progress=False)
            cost = result.costs["latency"]
            with tempfile.TemporaryDirectory() as folder:
                result.save(folder)
                command = [sys.executable, "-c", FRESH, folder, str(batch)]
                again = [
                    float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(PROCESSES)
                ]
            off = max(abs(value / cost["value"] - 1) for value in again)
            promised = f"{cost['value']:.2f} ({cost['low']:.2f}–{cost['high']:.2f})"
            measured = ", ".join(f"{value:.2f}" for value in again)
            figures = f"{cost['limit']:.2f} | {cost['unpruned']:.2f} | {promised} | {measured} | {100 * off:.0f} %"
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
