"""What other papers report of structured pruning on CIFAR-10: filters really removed, by name and source.

Each has a baseline and a training of its own: what can be compared is how much was lost at which size.
"""

from dataclasses import dataclass

import pandas as pd

from rlprune.labels import method_label, network_label, signed

EPOCHS = 10  # of fine-tuning, from which on ours are set beside theirs


@dataclass(frozen=True)
class Published:
    """One pruned network of a paper.

    Attributes:
        network: as `rlprune.networks` names it.
        method: its name.
        kept: parameters kept, in percent.
        before: accuracy of the unpruned network in percent of the test images; None where it is not known to us.
        after: of the pruned one, fine-tuned.
        source: where it is reported.
    """

    network: str
    method: str
    kept: float
    before: float | None
    after: float
    source: str


CIFAR10 = (
    Published("vgg16", "CHIP", 16.7, 93.96, 93.72, "Sui et al. 2021, arXiv 2110.13981"),
    Published("vgg16", "CHIP", 12.7, 93.96, 93.18, "Sui et al. 2021, arXiv 2110.13981"),
    Published("vgg16", "FSM", 13.7, None, 93.73, "Duan et al. 2022, arXiv 2207.02632"),
    Published("vgg16", "FSM", 9.4, None, 92.86, "Duan et al. 2022, arXiv 2207.02632"),
    Published("vgg16", "DECORE", 1.7, 93.96, 91.68, "Alwani et al. 2022, arXiv 2106.06091"),
    # not the paper's own numbers: its method, by another's code
    Published(
        "vgg19", "Network slimming", 12.1, 93.62, 93.56, "pytorch-slimming, after Liu et al. 2017, arXiv 1708.06519"
    ),
)


def published(dataset: str, network: str) -> list[Published]:
    """What is reported of a network on a dataset, the largest first; often nothing."""
    found = [one for one in CIFAR10 if dataset == "cifar10" and one.network == network]
    return sorted(found, key=lambda one: -one.kept)


def beside(table: pd.DataFrame) -> list[str]:
    """What others report of the networks of a results table, as lines of Markdown; none where nothing is reported.

    Beside each stands the best of ours that keeps no more parameters.

    Args:
        table: of `rlprune.tables.results_table`.
    """
    lines = []
    for (dataset, network), part in table.groupby(["dataset", "network"], sort=True):
        for one in published(dataset, network):
            ours = part[part["parameters_percent"] <= one.kept].sort_values("accuracy").tail(1)
            texts = [
                f"{method_label(row.method)}, {row.parameters_percent:.1f} %: {row.accuracy_before:.2f} → "
                f"{row.accuracy:.2f} ({signed(row.change)})"
                for row in ours.itertuples()
            ]
            before = "" if one.before is None else f"{one.before:.2f} "
            theirs = f"{one.kept:g} % | {one.method} ({one.source}) | {before}→ {one.after:.2f}"
            lines.append(f"| {network_label(network)} | {theirs} | {texts[0] if texts else '–'} |")
    if not lines:
        return []
    head = ["", "**What other papers report**, filters removed, from baselines and trainings of their own:", ""]
    head += ["| network | parameters kept | method | before → after (%) | ours, no larger |", "|---|--:|---|--:|---|"]
    return head + lines
