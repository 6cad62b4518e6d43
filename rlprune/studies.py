"""Tables and figures of the studies, see `rlprune.stages.study`; from their result files only."""

import math
import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from rlprune.changes import (
    ablation_figure,
    ablation_table,
    prunetrain_figure,
    prunetrain_table,
    schedule_figure,
    schedule_table,
)
from rlprune.errors import InputError
from rlprune.labels import network_label
from rlprune.plotting import WIDTH, SteadyLayout, finish, key, save, style
from rlprune.reports import renewed
from rlprune.tables import read

RESAMPLES = 2000  # of the bootstrap that gives a rank correlation's interval
TITLE = 20  # letters of a panel's title in a line
_COLOURS = {"front": "#0072b2", "separate": "#d55e00", "fresh": "#d55e00", "continued": "#0072b2"}


def reward_table(history: pd.DataFrame) -> pd.DataFrame:
    """How well each reward foretells the accuracy after fine-tuning, and what it costs.

    Args:
        history: a row per candidate: accuracy (%), and per reward ``<name>`` (%) and ``<name> seconds``.

    Returns:
        a row per reward: reward (its name), rank_correlation (Spearman) with its 95 % interval (low, high;
        percentile bootstrap over candidates), mean and std of the reward (%), seconds (median per candidate),
        candidates.
    """
    names = [column.removesuffix(" seconds") for column in history if column.endswith(" seconds")]
    draws = np.random.default_rng(0).integers(0, len(history), (RESAMPLES, len(history)))
    rows = []
    for name in names:
        pair = history[[name, "accuracy"]].to_numpy(dtype=float)
        with warnings.catch_warnings():  # resamples in which a dead reward is the same for all say nothing: NaN
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            resampled = [stats.spearmanr(*pair[draw].T).statistic for draw in draws]
        rows.append(
            {
                "reward": name,
                "rank_correlation": stats.spearmanr(*pair.T).statistic,
                "low": np.nanquantile(resampled, 0.025),
                "high": np.nanquantile(resampled, 0.975),
                "mean": pair[:, 0].mean(),
                "std": pair[:, 0].std(ddof=1),
                "seconds": history[f"{name} seconds"].median(),
                "candidates": len(history),
            }
        )
    return pd.DataFrame(rows)


def reward_figure(history: pd.DataFrame) -> Figure:
    """Accuracy after fine-tuning against each reward, a panel a reward, a dot a candidate; ρ is Spearman's."""
    table = reward_table(history)
    with style():
        across = 3
        down = math.ceil(len(table) / across)
        figure = Figure(figsize=(WIDTH, 1.7 * down), layout=SteadyLayout())
        axes = figure.subplots(down, across, squeeze=False, sharey=True)
        for axis, row in zip(axes.flat, table.itertuples(), strict=False):
            axis.scatter(history[row.reward], history["accuracy"], s=8, color="#0072b2", alpha=0.7, linewidth=0)
            coefficient = f"ρ = {row.rank_correlation:.2f}".replace("-", "−")
            axis.text(0.97, 0.05, coefficient, transform=axis.transAxes, ha="right", fontsize=8.5)
            name, _, rest = row.reward.partition(", ")
            unit = f"{name} (%)" if rest == "not evaluated" else "Reward (%)"
            finish(axis, textwrap.fill(row.reward, TITLE), "", unit)
        for axis in axes.flat[len(table) :]:
            axis.set_axis_off()
        figure.supylabel("Validation accuracy after fine-tuning (%)", fontsize=8.5)
    return figure


def hypervolume(points: Sequence[tuple[float, float]], most: float, least: float) -> float:
    """Area that points (cost, reward) dominate, over the logarithm of the cost, up to a cost of ``most``.

    Args:
        points: costs above 0, rewards.
        most: the cost that the area ends at.
        least: the reward that it begins at.
    """
    area, best, edge = 0.0, least, None
    for cost, reward in sorted(points, key=lambda point: (point[0], -point[1])):
        if cost > most:
            break
        if edge is not None:
            area += (math.log(cost) - math.log(edge)) * (best - least)
        best, edge = max(best, reward), cost
    return area + (math.log(most) - math.log(edge)) * (best - least) if edge is not None else 0.0


def front_table(history: pd.DataFrame) -> pd.DataFrame:
    """Area under the front of one search and of separate ones, per seed.

    The area is `hypervolume` from a reward of 0 up to the cost of the unpruned network.

    Args:
        history: a row per network returned: search ("front" or "separate"), seed, budget, cost (both in percent of
            the unpruned network's), reward (%).

    Returns:
        a row per seed: seed, separate, front (all its points), ratio of those; front_at_same and ratio_at_same, of
        its networks for the budgets of the separate searches alone.
    """
    rows = []
    for seed, part in history.groupby("seed"):
        separate, front = (part[part["search"] == search] for search in ("separate", "front"))
        same = front[front["budget"].round(6).isin(separate["budget"].round(6))]
        areas = [hypervolume(list(zip(p["cost"], p["reward"], strict=True)), 100, 0) for p in (separate, front, same)]
        row = {"seed": seed, "separate": areas[0], "front": areas[1], "ratio": areas[1] / areas[0]}
        rows.append({**row, "front_at_same": areas[2], "ratio_at_same": areas[2] / areas[0]})
    return pd.DataFrame(rows)


def front_figure(history: pd.DataFrame) -> Figure:
    """Reward against cost of the networks that one search and separate searches return; a dot a network."""
    with style():
        figure = Figure(figsize=(WIDTH, 3.2), layout=SteadyLayout())
        axis = figure.subplots()
        for search, part in history.groupby("search"):
            axis.scatter(part["cost"], part["reward"], s=10, color=_COLOURS[search], alpha=0.6, linewidth=0)
            mean = part.groupby("budget")[["cost", "reward"]].mean()
            axis.step(mean["cost"], mean["reward"], where="post", color=_COLOURS[search])  # between two, the smaller
        axis.set_xscale("log")
        ticks = sorted(set(history["budget"].round(6)))
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axis.minorticks_off()
        finish(axis, "One search for every budget", "Accuracy in search (%)", "Cost (% of the unpruned network)")
        labels = {"front": "One search, all budgets", "separate": "A search for each budget"}
        figure.legend(handles=[key(labels[s], _COLOURS[s]) for s in labels], loc="outside lower center", ncols=2)
    return figure


def transfer_table(history: pd.DataFrame) -> pd.DataFrame:
    """Evaluations that a continued search needs for what a fresh one ends with, per seed.

    Args:
        history: a row per evaluation: search ("fresh" or "continued"), seed, episode, best (%).

    Returns:
        a row per seed: seed, evaluations and best of the fresh search, best of the continued one, and needed, the
        evaluations after which that was as good (NaN: never).
    """
    rows = []
    for seed, part in history.groupby("seed"):
        fresh, continued = (part[part["search"] == search] for search in ("fresh", "continued"))
        goal = fresh["best"].max()
        reached = continued.loc[continued["best"] >= goal, "episode"]
        row = {"seed": seed, "evaluations": len(fresh), "fresh": goal, "continued": continued["best"].max()}
        rows.append({**row, "needed": reached.min() if len(reached) else float("nan")})
    return pd.DataFrame(rows)


def transfer_figure(history: pd.DataFrame) -> Figure:
    """Best reward so far against evaluations; thin lines are seeds, thick ones their mean."""
    with style():
        figure = Figure(figsize=(WIDTH, 3.0), layout=SteadyLayout())
        axis = figure.subplots()
        for search, part in history.groupby("search"):
            best = part.pivot(index="episode", columns="seed", values="best")
            axis.plot(best.index, best, color=_COLOURS[search], linewidth=0.5, alpha=0.6)
            axis.plot(best.index, best.mean(axis=1), color=_COLOURS[search])
        finish(axis, "An agent that has pruned before", "Best reward so far (%)", "Evaluations")
        labels = {"continued": "Begins with what it learned elsewhere", "fresh": "Begins afresh"}
        figure.legend(handles=[key(labels[s], _COLOURS[s]) for s in labels], loc="outside lower center", ncols=2)
    return figure


# what stands above each kind's table
SAID = {
    "reward": "Spearman's rank correlation of each reward with the accuracy after fine-tuning, over the candidates, "
    "with its 95 % interval; mean and standard deviation of the reward; median seconds per candidate. The accuracy is "
    "that on all validation images, the first of which give the reward, too.",
    "front": "Area that the networks found dominate: accuracy over the logarithm of the cost, from 0 % up to the "
    "unpruned network's cost, named below with the separate searches' budgets. *Separate*: a search for each of these. "
    "*Front*: one search for all, with as many evaluations in all; with all its networks, and with those for the "
    "separate searches' budgets alone (*at same*).",
    "transfer": "Best reward of a fresh search after all its evaluations, of one that began with what the agent had "
    "learned on another network, and the evaluations after which that was as good.",
    "ablation": "Mean reward of the first 20 evaluations and best reward at the end, means over seeds; the difference "
    "is to the first row, seed by seed, ± its standard error; seconds are the whole search's, on the "
    "median.",
    "schedule": "Accuracy and cross-entropy (nats) on validation images after fine-tuning the same pruned network, "
    "means over seeds; the difference in accuracy is to the first row, seed by seed, ± its standard "
    "error; seconds on the median, with the unpruned network's answers at hand or not "
    "(rlprune/lessons.py).",
    "prunetrain": "PruneTrain, and dense training for as many epochs: parameters and MACs of the network at the end, "
    "MACs that its training took, and wall time, all in percent of the dense one's; accuracy on validation images, "
    "means over seeds; the difference is to the first row, seed by seed, ± its standard error; seconds on the median.",
}
MAKERS = {
    "ablation": (ablation_table, ablation_figure),
    "reward": (reward_table, reward_figure),
    "front": (front_table, front_figure),
    "transfer": (transfer_table, transfer_figure),
    "schedule": (schedule_table, schedule_figure),
    "prunetrain": (prunetrain_table, prunetrain_figure),
}


def report(names: Sequence[str], folder: str | Path, results: str | Path = "results") -> dict[str, pd.DataFrame]:
    """Write ``<study>.csv`` and its figure for each study, and README.md with all of them.

    Studies without results are left out, and the README says so.

    Returns:
        the tables, by study.

    Raises:
        InputError: a result file is missing or broken.
    """
    tables = {}
    lines = ["# Studies", "", "Made from the files in results/studies by `python -m rlprune tables studies`."]
    with renewed(folder, re.compile(r".+\.(csv|png|svg)|README\.md")) as partial:
        for name in names:
            place = Path(results) / "studies" / name
            if not (place / "metrics.json").exists():
                lines += ["", f"## {name}", "", f"Not run yet: `dvc repro study@{name}`."]
                continue
            remedy = f"run `dvc repro study@{name}`"
            found = read(place, ["study", "network", "dataset", "source", "device"], [], remedy)
            metrics, history = found.metrics, found.history
            table, draw = MAKERS[metrics["study"]["kind"]]
            try:
                tables[name] = table(history)
            except KeyError as error:
                raise InputError(f"Result file {place / 'history.csv'} lacks column {error}: {remedy}.") from error
            tables[name].to_csv(partial / f"{name}.csv", index=False, lineterminator="\n")
            save(draw(history), partial / name)
            budgets = ", ".join(f"{cost} {share}" for cost, share in metrics["study"]["budgets"].items())
            data = f"{metrics['dataset']} ({metrics['source'].rstrip('.')})"
            said = f"{network_label(metrics['network'])}, {data}; {budgets}; {metrics['device']}."
            said = f"{SAID[metrics['study']['kind']]} {said} {_settings(metrics['study'])}".rstrip()
            lines += ["", f"## {name}", "", said, "", _markdown(tables[name]), "", f"![{name}]({name}.png)"]
        (partial / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tables


def _settings(study: dict[str, Any]) -> str:
    """What a kind of study has beside a network and budgets."""
    said = []
    if "begin" in study:
        said.append(f"Begins with: {study['begin']}.")
    if "training" in study:
        said.append(f"Training: {study['training']['epochs']} epochs.")
    for group, what in (("rewards", "The evaluator's options"), ("changes", "Changes")):
        if group in study:
            named = (f"*{name}* {_flat(options) or 'as it is'}" for name, options in study[group].items())
            said.append(f"{what}: {'; '.join(named)}.")
    return " ".join(said)


def _flat(options: dict[str, Any]) -> str:
    """Settings and their values, groups of them opened."""
    return ", ".join(_flat(value) if isinstance(value, dict) else f"{key} {value}" for key, value in options.items())


def _markdown(table: pd.DataFrame) -> str:
    shown = table.rename(columns=lambda name: name.replace("_", " "))
    rows = [shown.columns, ["---"] + ["--:"] * (len(shown.columns) - 1)]
    rows += [
        [cell if isinstance(cell, str) else "–" if pd.isna(cell) else f"{cell:.4g}" for cell in row]
        for row in shown.itertuples(index=False)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
