"""The original's claims (Malik et al., arXiv 2110.08558), one by one, beside what our result files hold.

Its numbers are of single weights set to zero (coarse) or of filters masked, read on images that the search saw; ours
are of networks from which the filters are gone, on test images.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from rlprune.labels import method_label, network_label, signed
from rlprune.margins import AGENTS
from rlprune.tables import Results, limits

COMPARABLE = 0.3  # points that a network may lose and still be called comparable: a standard error of 10,000 images
LAST, LEAST = 0.05, 16  # share of a search that its end is read from, and episodes at least: an update of VGG11's


@dataclass(frozen=True)
class Claim:
    """A pruned network of the abstract.

    Attributes:
        network: as `rlprune.networks` names it.
        said: of it.
        kept: the most parameters that a network may keep to be held against it, in percent.
        least: nothing is claimed of a smaller network, in percent.
        loss: the most points it may lose.
    """

    network: str
    said: str
    kept: float
    least: float
    loss: float


# least is a tenth below the smallest network claimed, since budgets are met from below
CLAIMS = [
    *(Claim(n, "83 to 92.9 % of the parameters gone, accuracy comparable or better", 17, 7.0, COMPARABLE)
      for n in ("vgg11", "vgg16", "vgg19")),
    # 25 and not 24.91: our budget is a quarter
    Claim("resnet18", "75.09 % of the parameters gone, nothing lost", 25, 24.81, 0),
]  # fmt: skip
# where the authors' plots end: accuracy in search and share of the convolutions' weights kept, by network, agent and
# the share asked for, all in percent
ENDS = {
    ("vgg11", "paper_coarse", 10): (87.0, 7.3),
    ("vgg16", "paper_coarse", 10): (89.0, 7.0),
    ("vgg19", "paper_coarse", 10): (90.4, 7.1),
    ("vgg11", "paper_coarse", 20): (96.2, 16.2),
    ("vgg16", "paper_coarse", 20): (96.6, 16.2),
    ("vgg19", "paper_coarse", 20): (97.4, 16.5),
    ("vgg11", "paper_fine", 10): (73.8, 7.5),
    ("vgg16", "paper_fine", 10): (79.9, 9.2),
    ("vgg19", "paper_fine", 10): (92.4, 22.4),
    ("vgg16", "paper_fine", 20): (90.3, 20.9),
    ("vgg19", "paper_fine", 20): (89.5, 12.6),
}


def page(replayed: Results | None, table: pd.DataFrame) -> str:
    """The page: the abstract's claims, where the searches of the plots end, and what the published search needs.

    Args:
        replayed: results of the published search, of few episodes, beside the agents; None where there are none yet.
        table: of `rlprune.tables.results_table`, of the agents on CIFAR-10; empty where there are none yet.
    """
    lines = [
        "# The paper's claims, one by one",
        "",
        "Malik et al., *Neural Network Pruning Through Constrained Reinforcement Learning*, arXiv 2110.08558. Its "
        "numbers are of single weights set to zero (coarse) or of filters masked (fine), read on images that the "
        "search saw. Ours are of networks from which the filters are gone, within budget, on test images that nothing "
        "was chosen by. Made by `python -m rlprune tables paper` from what results/ holds of the suites cifar10 and "
        "cifar10-gpu (the abstract) and published (the searches): *not run* is said of these alone.",
        "",
        "## The abstract",
        "",
        f"*Comparable* is at most {COMPARABLE:g} points below the unpruned network, on the mean over seeds. "
        "Of networks smaller than the smallest of a claim it says nothing.",
        "",
        "| network | claim | ours | verdict |",
        "|---|---|---|---|",
        *_verdicts(table),
        "",
        "## Where the searches end",
        "",
        "Accuracy in search and share of the weights kept, in percent: where the authors' plots end, after 40,000 "
        "steps (coarse) and 124,000 (fine), one for each convolution of an episode, which are 5,000 and 15,500 "
        f"episodes of VGG11; and the mean of the last {100 * LAST:g} % of the episodes, {LEAST} at least, of the same "
        "search here (`rlprune.peers.paper`), which had fewer.",
        "",
        "| network | search | asked for | authors' end | our run's end | our run's first third | episodes | seeds |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
        *_ends(replayed),
    ]
    if replayed is not None:
        lines += [
            "",
            "## What it takes to get as far",
            "",
            "What the published search returns, its shares of weights taken for shares of filters and brought within "
            "budget, judged as every other network is: on validation images, recovered. Of a search in none of whose "
            "episodes the budget was met that is its last decision, made smaller, and says little of what it learned: "
            "the column *met* has the episodes that met it. Then the evaluations after which an agent of ours had a "
            "network as good.",
            "",
            "| experiment | search | evaluations | met | reward | agent | evaluations to reach it |",
            "|---|---|--:|--:|--:|---|--:|",
            *_needed(replayed),
        ]
    return "\n".join(lines) + "\n"


def _verdicts(table: pd.DataFrame) -> Iterator[str]:
    for claim in CLAIMS:
        head = f"| {network_label(claim.network)} | {claim.said} |"
        ours = table
        if len(table):
            of_network = (table["dataset"] == "cifar10") & (table["network"] == claim.network)
            ours = table[of_network & table["method"].isin(AGENTS) & (table["parameters_percent"] <= claim.kept)]
        if not len(ours):
            yield f"{head} – | not run |"
            continue
        for row in ours.sort_values("parameters_percent", ascending=False).itertuples():
            if row.change >= 0:
                verdict = "surpassed: nothing lost, filters gone"
            elif -row.change <= claim.loss:
                verdict = "reproduced, filters gone"
            else:
                smaller = row.parameters_percent < claim.least
                verdict = "smaller than what was claimed" if smaller else "not reproduced"
            yield (
                f"{head} {method_label(row.method)}, {100 - row.parameters_percent:.1f} % gone: "
                f"{row.accuracy_before:.2f} → {row.accuracy:.2f} ({signed(row.change)}; "
                f"seeds {row.seeds}) | {verdict} |"
            )


def _ends(replayed: Results | None) -> Iterator[str]:
    found = {}
    for search in replayed.searches.values() if replayed is not None else ():
        (name, percent), *_ = limits(search.metrics).items()
        for method, history in search.history.groupby("method"):
            found[search.metrics["network"], method, round(percent)] = history, name
    for (network, method, asked), (reward, cost) in ENDS.items():
        head = f"| {network_label(network)} | {method_label(method)} | {asked} | {reward} at {cost} |"
        if (network, method, asked) not in found:
            yield f"{head} not run | – | – | – |"
            continue
        history, name = found[network, method, asked]
        runs = [run for _, run in history.groupby("seed")]
        last = pd.concat([run.tail(max(LEAST, round(LAST * len(run)))) for run in runs])
        first = pd.concat([run.head(max(1, len(run) // 3)) for run in runs])
        ends = f"{last['reward'].mean():.1f} at {last[name].mean():.1f} | {first['reward'].mean():.1f}"
        yield f"{head} {ends} at {first[name].mean():.1f} | {len(runs[0])} | {len(runs)} |"


def _needed(replayed: Results) -> Iterator[str]:
    for experiment, search in replayed.searches.items():
        methods = search.metrics["methods"]
        for method in [method for method in methods if method.startswith("paper_")]:
            for agent in [agent for agent in AGENTS if agent in methods]:
                shared = sorted(set(methods[method]) & set(methods[agent]), key=int)
                needed, rewards, met = [], [methods[method][seed]["reward"] for seed in shared], []
                (name, percent), *_ = limits(search.metrics).items()
                for seed, reward in zip(shared, rewards, strict=True):
                    history = search.history[search.history["seed"] == int(seed)]
                    own = history[history["method"] == agent]
                    met.append(str((history.loc[history["method"] == method, name] <= percent).sum()))
                    reached = own.loc[own["best"] >= reward, "episode"]
                    needed.append(f"{reached.min():.0f}" if len(reached) else "never")
                counts = ", ".join(str(methods[method][seed]["evaluations"]) for seed in shared)
                shown = ", ".join(f"{reward:.1f}" for reward in rewards)
                head = f"| {experiment} | {method_label(method)} | {counts} | {', '.join(met)} | {shown} |"
                yield f"{head} {method_label(agent)} | {', '.join(needed)} |"
