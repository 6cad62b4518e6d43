"""What stands beside the table of a report: how far the agents are ahead, and what only some methods have to say."""

import pandas as pd
from scipy import stats

from rlprune.labels import method_label, method_rank, signed
from rlprune.tables import Results

AGENTS = ("layerwise", "filterwise")
SEEDS = 3  # from which on a difference may be called larger than the spread: two agree by chance


def agents_margins(results: Results) -> pd.DataFrame:
    """By how much each agent is ahead of every other method, in experiments with several seeds.

    Differences are taken seed by seed, so that what a seed does to all methods alike is no spread.

    Returns:
        a row per experiment, quantity ("reward", of the search on validation images, or "accuracy", fine-tuned, on test
        images), agent and other method: difference (mean over seeds, in points), standard_error, seeds.
    """
    rows = []
    for name, search in results.searches.items():
        for quantity, stage in (("reward", search), ("accuracy", results.finetunes[name])):
            of_method = {
                method: pd.Series({seed: run[quantity] for seed, run in runs.items()})
                for method, runs in stage.metrics["methods"].items()
                if all(quantity in run for run in runs.values())
            }
            for agent in [agent for agent in AGENTS if agent in of_method]:
                for other in sorted(set(of_method) - {agent}, key=method_rank):
                    gaps = (of_method[agent] - of_method[other]).dropna()
                    if len(gaps) > 1:
                        row = {"experiment": name, "quantity": quantity, "agent": agent, "other": other}
                        rows.append(row | {"difference": gaps.mean(), "standard_error": gaps.sem(), "seeds": len(gaps)})
    return pd.DataFrame(rows)


def spreads(margins: pd.DataFrame) -> list[str]:
    """`agents_margins` as lines of Markdown, what is larger than the spread in bold."""
    lines = []
    for (name, quantity), part in margins.groupby(["experiment", "quantity"], sort=False) if len(margins) else ():
        what = "reward of the search" if quantity == "reward" else "accuracy after fine-tuning"
        agents = list(dict.fromkeys(part["agent"]))
        lines += ["", f"**{name}: how far the agents are ahead, {what}** (points; ± is the standard error over "]
        least, most = part["seeds"].min(), part["seeds"].max()
        seeds = f"{least} to {most} seeds" if least < most else f"{least} seeds"
        lines[-1] += f"{seeds}, seed by seed; bold, from {SEEDS} seeds on: 0 is outside the 95 % interval)"
        lines += ["", f"| ahead of | {' | '.join(map(method_label, agents))} |", f"|---|{'--:|' * len(agents)}"]
        for other, of_other in part.groupby("other", sort=False):
            cells = of_other.set_index("agent").reindex(agents)
            texts = [_cell(row.difference, row.standard_error, row.seeds) for row in cells.itertuples()]
            lines.append(f"| {method_label(other)} | {' | '.join(texts)} |")
    return lines


def _cell(difference: float, error: float, seeds: float) -> str:
    if pd.isna(difference):
        return "–"
    text = f"{signed(difference)} ± {error:.2f}"
    sure = seeds >= SEEDS and round(abs(difference), 2) > 0 and abs(difference) > stats.t.ppf(0.975, seeds - 1) * error
    return f"**{text}**" if sure else text


def extras(results: Results) -> list[str]:
    """Lines on what only some methods have: training of their own, kernel sizes that changed, MACs of a training."""
    lines = []
    for name, search in results.searches.items():
        if "epoch" in search.history:
            epochs = search.history.groupby("method")["epoch"].max().dropna().to_dict()
            own = ", ".join(f"{method_label(m)} ({epochs[m]:.0f})" for m in sorted(epochs, key=method_rank))
            lines.append(f"- {name}: these train all weights, for epochs, before the fine-tuning common to all: {own}.")
        for method, runs in search.metrics["methods"].items():
            for seed, run in runs.items():
                who = f"- {name}, {method_label(method)}, seed {seed}"
                if "kernels" in run:
                    kinds = ", ".join(f"{count} of {kind}" for kind, count in run["kernels"].items())
                    lines.append(f"{who}: kernels {kinds}.")
                if "training_macs" in run:
                    share = 100 * run["training_macs"]["value"] / run["training_macs"]["dense"]
                    filters = sum(of for _, of in run["widths"].values())
                    alone = ""
                    if "faded" in run:
                        alone = f"; {run['faded']} of {filters} filters left before the budget asked"
                    lines.append(
                        f"{who}: {share:.1f} % of the MACs that training the unpruned network for as long takes{alone}."
                    )
    return ["", "Beside the table:", "", *lines] if lines else []
