"""Every plot, from result files only: no network is run or loaded here.

Figures are made without pyplot and under a style of their own, so that nothing
global changes; a method has the same colour and marker in all of them. In a
notebook a figure shows itself after ``%matplotlib inline``.
"""

import io
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from rlprune.accuracies import CUT, accuracy_against, accuracy_by_method
from rlprune.errors import InputError
from rlprune.labels import (
    REPLAYED,
    cost_label,
    count,
    layer_labels,
    method_label,
    method_rank,
    method_style,
    reward_label,
)
from rlprune.plotting import (
    DOTS,
    LIMIT,
    SMALL,
    WIDTH,
    SteadyLayout,
    columns_of,
    curve,
    finish,
    identified,
    key,
    save,
    style,
)
from rlprune.tables import limits, load_results, markdown, results_table

__all__ = ["Live", "limits", "load_results", "markdown", "results_table", "save"]
__all__ += ["accuracy_against", "accuracy_by_method", "before_and_after", "search_curves", "search_progress"]
__all__ += ["training_curves", "widths"]

FEW = 3  # seeds under which an interval by Student's t says more of t than of them
TRAINING = (0, (2, 1.5))  # dashes of what is measured on training images
REPLAYS = (  # what the curves of `REPLAYED` are
    "Published: reward on training images, of a network that is masked, not cut, and may be over budget;\n"
    "cost: convolution weights not masked; action, coarse: share of single weights, fine: share of filters."
)

_BUDGETS = ["#117733", "#aa4499", "#b8860b", "#332288", "#cc6677"]
_DASHES = ["-", (0, (5, 1, 1, 1)), (0, (3, 1)), (0, (5, 1, 1, 1, 1, 1))]


def search_curves(history: pd.DataFrame, limits: dict[str, float]) -> Figure:
    """Reward, cost, Lagrange multiplier λ and mean action against environment steps.

    Dots are episodes, lines their running mean over a twentieth of a search (at least five episodes). With
    several seeds a line is the mean over seeds and its band ± one standard deviation. Methods without episodes
    are left out. With several budgets, colours in the panels of cost and λ tell the budgets apart. Where a search of
    the paper is among them, labels say no more than is true of all, and a note says what its curves are.

    Args:
        history: one row per episode: steps, reward (%), mean_action (0 to 1), best (%) and for every budget
            ``<name>`` (% of the unpruned network) and ``lambda_<name>``; method and seed if there are several.
        limits: the budgets in percent of the unpruned network, by name; see `rlprune.tables.limits`.
    """
    history = identified(history)
    counts = history.dropna(subset=["steps"]).groupby(["method", "seed"]).size()
    methods = sorted(set(counts[counts > 1].index.get_level_values("method")), key=method_rank)
    several = len(limits) > 1
    of_budget = dict(zip(limits, _BUDGETS * len(limits), strict=False))
    dashes = dict(zip(methods, _DASHES * len(methods), strict=False))
    own = bool(REPLAYED.intersection(methods))
    asked = "Cost" if several or own else cost_label(next(iter(limits), "cost"), capital=True)
    with style():
        figure = Figure(figsize=(WIDTH, 4.9 if own else 4.6), layout=SteadyLayout())
        (reward, cost), (multiplier, action) = figure.subplots(2, 2, sharex=True)
        for method in methods:
            episodes, colour, dash = history[history["method"] == method], method_style(method)[0], dashes[method]
            curve(reward, episodes, "reward", colour, dash)
            curve(reward, episodes, "best", colour, DOTS, raw=False)
            curve(action, episodes, "mean_action", colour, dash)
            for name in limits:
                tone = of_budget[name] if several else colour
                curve(cost, episodes, name, tone, dash)
                curve(multiplier, episodes, f"lambda_{name}", tone, dash, raw=False)
        for name, limit in limits.items():
            cost.axhline(limit, color=of_budget[name] if several else "black", linestyle=LIMIT, linewidth=0.8)
        finish(reward, "Reward", reward_label(methods))
        kept = "Share kept" if own else "Share of filters kept"
        finish(cost, f"{asked} asked for", "Share of unpruned (%)", bottom=0)
        finish(multiplier, "Lagrange multiplier", "λ", "Environment steps", bottom=0)
        for line in multiplier.get_lines():  # one that stays at 0 would be hidden under the axis
            line.set(clip_on=False, zorder=3)
        finish(action, "Mean action", kept, "Environment steps")
        action.set_ylim(0, 1)
        for axis in (reward, cost, multiplier, action):
            if not axis.get_lines() or not methods:
                axis.text(0.5, 0.5, "none in this search", transform=axis.transAxes, ha="center", color="0.5")
        handles = [key(method_label(m), method_style(m)[0], linestyle=dashes[m]) for m in methods]
        handles += [key(cost_label(name, capital=True), of_budget[name]) for name in limits if several]
        handles += [
            key("Episode", linestyle="", marker="o", markersize=3, alpha=0.5),
            key("Best within budget so far", linestyle=DOTS),
            key("Budget", "black", linestyle=LIMIT, linewidth=0.8),
        ]
        note = {"title": REPLAYS, "title_fontsize": 6.5, "alignment": "left"} if own else {}
        figure.legend(handles=handles, loc="outside lower center", ncols=columns_of(handles), **note)
    return figure


class Live:
    """`search_curves` in a notebook while the search runs: ``rlprune.prune(…, watch=rlprune.figures.Live())``."""

    def __init__(self) -> None:
        self._shown: Any = None

    def __call__(self, history: pd.DataFrame, limits: dict[str, float]) -> None:
        """Draw the curves so far in place of the last ones."""
        from IPython.display import Image, display  # only a notebook has it

        picture = io.BytesIO()  # a figure shows itself only after %matplotlib inline
        search_curves(history, limits).savefig(picture, format="png", dpi=120)
        if self._shown is None:
            self._shown = display(Image(picture.getvalue()), display_id=True)
        else:
            self._shown.update(Image(picture.getvalue()))


def search_progress(history: pd.DataFrame, outcomes: dict[str, float] | None = None) -> Figure:
    """Best reward within budget so far against evaluations, of every method of an experiment.

    With several seeds a line is their mean, from where each of them has found something, and its band the mean's 95 %
    confidence interval (Student's t), or from the lowest to the highest where there are fewer than `FEW`. Methods that
    decide at once, or of which only the outcome is known, are dotted lines across, with their value in the legend. What
    is far below all searches' ends (`rlprune.accuracies.CUT`) is beneath the axis; an arrow in the legend says so.

    Args:
        history: one row per candidate: episode (from 1) and best (%); method and seed if there are several.
        outcomes: method → reward (%) of what it returned, for methods that leave no such rows.
    """
    if absent := [column for column in ("episode", "best") if column not in history]:
        raise InputError(f"There is no progress in a history without {absent[0]!r}: give rewards as outcomes instead.")
    history, outcomes = identified(history).dropna(subset=["episode"]), outcomes or {}
    if history.duplicated(["method", "seed", "episode"]).any():
        raise InputError("Of some seed an episode comes twice: tell histories apart, history.assign(method=…, seed=…).")
    searched = set(history.dropna(subset=["best"])["method"])
    methods = sorted({*searched, *outcomes}, key=method_rank)
    dashes = dict(zip(methods, _DASHES * len(methods), strict=False))
    with style():
        figure = Figure(figsize=(WIDTH, 3.4), layout=SteadyLayout())
        axis = figure.subplots()
        handles, ends, across = [], [], []
        for method in methods:
            colour, dash = method_style(method)[0], dashes[method]
            table = history[history["method"] == method].pivot(index="episode", columns="seed", values="best").ffill()
            table = table.dropna()  # evaluations by which every seed has found something
            if len(table) == 1 or (method in outcomes and not len(table)):
                value = table.iloc[0].mean() if len(table) else outcomes[method]
                axis.axhline(value, color=colour, linestyle=DOTS)
                handles.append(key(f"{method_label(method)} ({value:.1f})", colour, linestyle=DOTS))
                across.append((value, handles[-1]))
            if len(table) < 2:
                continue
            mean, count = table.mean(axis=1), table.shape[1]
            ends.append(mean.iloc[-1])
            axis.step(table.index, mean, color=colour, linestyle=dash, where="post")
            handles.append(key(method_label(method), colour, linestyle=dash))
            if count > 1:
                half = stats.t.ppf(0.975, count - 1) * table.std(axis=1) / count**0.5
                low, high = (mean - half, mean + half) if count >= FEW else (table.min(axis=1), table.max(axis=1))
                axis.fill_between(table.index, low, high, step="post", color=colour, alpha=0.2, linewidth=0)
        finish(axis, "Best network within budget", reward_label(searched), "Evaluations")
        axis.set_xlim(left=0)
        # where searches end must be told apart; what begins or stays far below would squeeze that
        reached = [*ends, *(value for value, _ in across)]
        low = min([max(reached) - CUT, *(end - CUT / 4 for end in ends)]) if ends else -np.inf
        if axis.get_ylim()[0] < low:
            axis.set_ylim(bottom=low)
        for value, handle in across:
            if value < low:
                handle.set_label(handle.get_label().replace(")", " ↓)"))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns_of(handles))
    return figure


def widths(metrics: dict[str, Any]) -> Figure:
    """Filters kept per layer, one panel per method; the unpruned widths stand behind as light bars.

    With several seeds a bar is the mean and a thin line spans the smallest to the largest.

    Args:
        metrics: of a search: ``methods[method][seed]`` holds widths {layer: [kept, of]} in order, and costs.
    """
    methods = sorted(set(metrics["methods"]), key=method_rank)
    runs = {m: list(metrics["methods"][m].values()) for m in methods}
    unpruned = pd.Series({layer: of for layer, (_, of) in runs[methods[0]][0]["widths"].items()})
    place = np.arange(len(unpruned))
    columns = 2 if len(unpruned) <= 20 and len(methods) > 1 else 1
    rows = -(-len(methods) // columns)
    with style():
        figure = Figure(figsize=(WIDTH if len(unpruned) <= 32 else 7.0, 0.8 + 1.15 * rows), layout=SteadyLayout())
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axis in grid.flat[len(methods) :]:
            axis.set_visible(False)
        for axis, method in zip(grid.flat, methods, strict=False):
            kept = pd.DataFrame([{n: kept for n, (kept, _) in run["widths"].items()} for run in runs[method]])
            kept = kept.reindex(columns=unpruned.index)
            axis.bar(place, unpruned, width=0.85, color="0.87", linewidth=0)
            axis.bar(place, kept.mean(), width=0.85, color=method_style(method)[0], linewidth=0)
            axis.margins(x=0.01)
            if len(kept) > 1:
                axis.vlines(place, kept.min(), kept.max(), color="black", linewidth=0.8)
            share = np.mean([run["costs"].get("parameters", {}).get("share", np.nan) for run in runs[method]])
            if np.isfinite(share):
                axis.set_title(f"{100 * share:.1f} % of parameters", loc="right", fontweight="normal", fontsize=SMALL)
            finish(axis, method_label(method), "")
        labels = layer_labels(list(unpruned.index))
        for axis in list(grid.flat)[max(0, len(methods) - columns) : len(methods)]:  # the lowest of each column
            axis.tick_params(labelbottom=True)
            axis.set_xticks(place, labels, rotation=90 if len("".join(labels)) * columns > 48 else 0)
        figure.supxlabel("Layer")
        figure.supylabel("Filters (unpruned in grey)")
    return figure


def before_and_after(widths: dict[str, tuple[int, int]], costs: dict[str, dict[str, float]]) -> Figure:
    """One pruned network beside the unpruned one: each cost in its own unit, and the filters of every layer.

    Args:
        widths: layer → (filters kept, filters), in order; as in `rlprune.PruningResult`.
        costs: name → "value" and "unpruned", and "limit" where there is a budget; as in `rlprune.PruningResult`.
            Accuracy in percent may be among them.
    """
    colour = method_style("layerwise")[0]
    with style():
        figure = Figure(figsize=(WIDTH, 3.4), layout=SteadyLayout())
        rows = figure.subfigures(2, 1, height_ratios=[1, 1.1])
        for axis, (name, cost) in zip(rows[0].subplots(1, len(costs), squeeze=False)[0], costs.items(), strict=True):
            values = [cost["unpruned"], cost["value"]]
            bars = axis.bar(["before", "after"], values, width=0.6, color=["0.8", colour], linewidth=0)
            axis.bar_label(bars, [count(value) for value in values], padding=1, fontsize=SMALL)
            if "limit" in cost:
                axis.axhline(cost["limit"], color="black", linestyle=LIMIT, linewidth=0.8)
            axis.margins(y=0.18)
            axis.set_yticks([])
            unit = {"latency": " (ms)", "accuracy": " (%)"}.get(name, "")
            finish(axis, cost_label(name, capital=True) + unit, "")
            sns.despine(ax=axis, left=True)
        axis = rows[1].subplots()
        place = np.arange(len(widths))
        axis.bar(place, [size for _, size in widths.values()], width=0.85, color="0.87", linewidth=0)
        axis.bar(place, [kept for kept, _ in widths.values()], width=0.85, color=colour, linewidth=0)
        axis.margins(x=0.01)
        labels = layer_labels(list(widths))
        axis.set_xticks(place, labels, rotation=90 if len("".join(labels)) > 48 else 0)
        finish(axis, "Filters per layer", "Filters")
        if any("limit" in cost for cost in costs.values()):
            handles = [key("Budget", "black", linestyle=LIMIT, linewidth=0.8)]
            rows[0].legend(handles=handles, loc="outside lower center")
    return figure


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss and accuracy by epoch, of a baseline's training or of fine-tuning (a colour per method).

    With several seeds a line is their mean and the band ± one standard deviation.

    Args:
        history: one row per epoch: epoch, loss, train_accuracy and validation_accuracy (%); method and seed
            if there are several.
    """
    named = "method" in history
    history = identified(history)
    methods = sorted(set(history["method"]), key=method_rank)
    colours = {m: method_style(m)[0] if named else "#0072b2" for m in methods}
    wide = history.rename(columns={"train_accuracy": "Training", "validation_accuracy": "Validation"})
    tall = wide.melt(["method", "seed", "epoch"], ["Training", "Validation"], "split", "accuracy")
    shared = {"x": "epoch", "hue": "method", "palette": colours, "hue_order": methods, "legend": False}
    shared |= {"errorbar": "sd", "err_kws": {"linewidth": 0}}
    dashes = {"Validation": "", "Training": TRAINING[1]}
    with style():
        figure = Figure(figsize=(WIDTH, 2.5), layout=SteadyLayout())
        loss, accuracy = figure.subplots(1, 2)
        sns.lineplot(history, y="loss", **shared, linestyle=TRAINING, ax=loss)
        sns.lineplot(tall, y="accuracy", **shared, style="split", dashes=dashes, ax=accuracy)
        finish(loss, "Training loss", "Loss", "Epoch")
        finish(accuracy, "Accuracy", "Accuracy (%)", "Epoch")
        for axis in (loss, accuracy):
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        handles = [key(method_label(m), colours[m]) for m in methods if named]
        tone = "0.3" if named else colours[methods[0]]
        handles += [key("Validation", tone), key("Training", tone, linestyle=TRAINING)]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns_of(handles))
    return figure
