"""Accuracy after fine-tuning, of all methods in one figure: against what is kept of a cost, or method by method.

One method that fails lies tens of points below ten that differ by a point, so axes are cut below the others, and what
is farther down is written at the edge.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from rlprune.labels import cost_label, method_label, method_rank, method_style, network_label
from rlprune.plotting import SMALL, WIDTH, SteadyLayout, columns_of, finish, key, style
from rlprune.published import published

CUT = 12  # points below the best; what is farther down is written at the edge, for the others to be told apart
LEAST = 1.0  # points that an axis shows at least, not to magnify noise
LINE = 58  # characters of a title that fit above a panel
SOLID = "\N{NO-BREAK SPACE}"
FILLS = ("full", "none", "left", "top")  # of markers, for experiments that share a panel
REPORTED = {"marker": "1", "markersize": 7}  # points of other papers: no method has this marker


def accuracy_against(table: pd.DataFrame, cost: str = "parameters", reported: bool = True) -> Figure:
    """Accuracy after fine-tuning against what is kept of a cost, one panel per dataset and network.

    The dotted line is the unpruned network; error bars are ± one standard deviation over seeds. Tripods are what
    other papers report of the same network (`rlprune.published`), from baselines and trainings of their own. Lines
    join the budgets of one family of experiments, whose fills of markers tell it from others (`families`), and what a
    paper reports of several sizes. Of filled markers the legend has no names where a panel holds one family only.
    What lies far below the best stands in a grey strip with its value, not to scale (`floor`).

    Args:
        table: of `results_table`.
        cost: "parameters" or "macs", or another that has a budget.
        reported: whether what other papers report is drawn.
    """
    share = f"{cost}_percent"
    panels = list(table.reset_index(drop=True).groupby(["dataset", "network"], sort=True))
    methods = sorted(set(table["method"]), key=method_rank)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    look = {"markeredgecolor": "white", "markeredgewidth": 0.5, "linewidth": 0.8}
    fills: dict[tuple[str, ...], str] = {}  # of families that share a panel
    lone = False  # whether a panel has a single family, of filled markers that the legend need not name
    with style():
        figure = Figure(figsize=(WIDTH if columns > 1 else 4.6, 0.9 + 2.4 * rows), layout=SteadyLayout())
        grid = figure.subplots(rows, columns, squeeze=False)
        for axis in grid.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, ((dataset, network), part) in zip(grid.flat, panels, strict=False):
            axis.axhline(part["accuracy_before"].mean(), color="black", linestyle=":", linewidth=1)
            lowest, hidden = floor(part), []
            groups = list(part.groupby(families(part), sort=False))
            lone |= len(groups) == 1
            for number, (_, family) in enumerate(groups):
                fill = FILLS[number % len(FILLS)]
                if len(groups) > 1:
                    fills[tuple(dict.fromkeys(family["experiment"]))] = fill
                for method, points in family.sort_values(share).groupby("method", sort=False):
                    x, y, spread = (points[c] for c in (share, "accuracy", "accuracy_std"))
                    colour, marker = method_style(method)
                    form = look | {"color": colour} | _marked(marker) | _filled(fill, colour)
                    axis.errorbar(x, y, spread, capsize=2, **form)
                    hidden += [(a, b, form) for a, b in zip(x, y, strict=True) if b < lowest]
            theirs = published(dataset, network) if reported and cost == "parameters" else []
            for place, method in enumerate(dict.fromkeys(one.method for one in theirs)):
                points = [(one.kept, one.after) for one in theirs if one.method == method]
                axis.plot(*zip(*points, strict=True), color="0.25", linewidth=0.6, **REPORTED)
                # each method is named once, neighbours at opposite ends; upwards, as ours are mostly below
                left = {"xytext": (-2, 3), "ha": "right", "rotation": -40}
                end, where = (points[-1], left) if place % 2 else (points[0], {"xytext": (2, 3), "rotation": 40})
                slanted = {"textcoords": "offset points", "rotation_mode": "anchor", "fontsize": 6.5}
                axis.annotate(method, end, **where, **slanted)
            low, high = axis.get_ylim()
            if high - low < LEAST:
                axis.set_ylim((low + high - LEAST) / 2, (low + high + LEAST) / 2)
            if hidden:
                low, high = extent(part)
                seen = [part["accuracy_before"].mean(), low, high, *(one.after for one in theirs)]
                room = 0.08 * max(max(seen) - min(seen), 1)
                axis.set_ylim(min(seen) - room, max(seen) + room)
            if theirs:  # room for their names below the title
                low, high = axis.get_ylim()
                axis.set_ylim(low, high + 0.15 * (high - low))
            kept = [*part[share], *(one.kept for one in theirs)]
            least, most = min(kept), max(kept)
            room = max(1.25, 2 * (least / most) ** 0.5)  # shows at least a factor of four
            axis.set(xscale="log", xlim=(least / room, most * room))
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
            if hidden:
                beneath(axis, hidden)
            title = f"{network_label(network)} on {dataset}"
            finish(axis, title, "Accuracy after\nfine-tuning (%)", f"{cost_label(cost, capital=True)} kept (%)")
        handles = [key(method_label(m), method_style(m)[0], **look | _marked(method_style(m)[1])) for m in methods]
        handles.append(key("Unpruned", "black", linestyle=":", linewidth=1))
        for names, fill in fills.items():
            if lone and fill == FILLS[0]:
                continue  # it would seem to name those of all panels
            handles.append(key(together(names), linestyle="", **look | _marked("o") | _filled(fill, "0.3")))
        if reported and cost == "parameters" and any(published(*panel) for panel, _ in panels):
            handles.append(key("Reported elsewhere", "0.25", linestyle="", **REPORTED))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns_of(handles))
    return figure


def accuracy_by_method(table: pd.DataFrame) -> Figure:
    """Accuracy after fine-tuning, one panel per experiment and one row per method.

    For experiments of many methods, or with one budget, along whose cost there is nothing to see. The dotted line is
    the unpruned network; error bars are ± one standard deviation over seeds. What lies far from the others stands in a
    grey strip at the edge with its value, not to scale: methods below `floor`, and the unpruned network where the
    methods could not be told apart otherwise.

    Args:
        table: of `results_table`.
    """
    panels = list(table.groupby("experiment", sort=False))
    titles = []
    for name, part in panels:
        what = part["budget"].iloc[0].replace(" ", SOLID).replace(f",{SOLID}", ", ")  # a break between budgets only
        title = f"{name}: {network_label(part['network'].iloc[0])}, {what}"
        titles.append(textwrap.fill(title, LINE, break_on_hyphens=False))
    with style():
        height = 0.8 + sum(0.5 + 0.19 * len(part) for _, part in panels) + 0.17 * "".join(titles).count("\n")
        figure = Figure(figsize=(WIDTH, height), layout=SteadyLayout())
        # an axis of its own for each: another experiment's range would hide the differences
        grid = figure.subplots(len(panels), squeeze=False, height_ratios=[0.7 + len(part) for _, part in panels])
        for axis, title, (_, part) in zip(grid.flat, titles, panels, strict=True):
            part = part.iloc[::-1]
            before, lowest, (low, high) = part["accuracy_before"].mean(), floor(part), extent(part)
            apart = (low + high - LEAST) / 2, (low + high + LEAST) / 2
            low, high = min(low, apart[0]), max(high, apart[1])
            far = before - high > 2 * (high - low)
            if not far:
                axis.axvline(before, color="black", linestyle=":", linewidth=1)
                low, high = min(low, before), max(high, before)
            wide, room = 0.17 * (high - low), 0.06 * (high - low)
            axis.set(xlim=(low - room, high + room), ylim=(-0.6, len(part) - 0.4))
            if (part["accuracy"] < lowest).any():
                strip(axis, low - room - wide, low - room, "left")
            if far:
                strip(axis, high + room, high + room + wide, "right")
                middle = {"ha": "center", "va": "center", "fontsize": SMALL, "zorder": 4}
                axis.text(high + room + wide / 2, (len(part) - 1) / 2, f"unpruned\n{before:.1f} ▸", **middle)
            for place, row in enumerate(part.itertuples()):
                colour, marker = method_style(row.method)
                if row.accuracy < lowest:
                    text = f"◂ {row.accuracy:.1f}"
                    axis.text(low - room - wide / 2, place, text, ha="center", va="center", fontsize=SMALL, zorder=4)
                    continue
                look = {"color": colour, **_marked(marker), "markeredgecolor": "white"}
                axis.errorbar(row.accuracy, place, xerr=row.accuracy_std, capsize=2, markeredgewidth=0.5, **look)
            axis.set_yticks(range(len(part)), [method_label(method) for method in part["method"]])
            finish(axis, title, "")
        grid.flat[-1].set_xlabel("Accuracy after fine-tuning (%)")
        handles = [key("Unpruned", "black", linestyle=":", linewidth=1)]
        figure.legend(handles=handles, loc="outside lower center")
    return figure


def families(part: pd.DataFrame) -> pd.Series:
    """Which experiments a line may join, a name for each row: those that differ in the size of their budget alone.

    They are on the same costs. Where a budget comes twice, names tell families apart: without their number they are
    the same (a_20 and a_10, but not a_10_gates). In none does a budget come twice.

    Args:
        part: rows of `rlprune.tables.results_table`, of one network, with an index of its own for each.
    """
    kind = part["budget"].str.replace(r"[\d.]+", "", regex=True)
    stem = kind + part["experiment"].str.replace(r"_[\d.]+(?=_|$)", "", regex=True)
    for family in (kind, stem):
        pairs = part[["experiment", "budget"]].assign(family=family).drop_duplicates()
        if not pairs.duplicated(["family", "budget"]).any():
            return family
    return part["experiment"]


def together(names: Sequence[str]) -> str:
    """Names of a family without what they have in common: a_20, _10, _5."""
    first, *others = names
    stem = first.rpartition("_")[0]
    return ", ".join([first, *(name.removeprefix(stem) if name.startswith(f"{stem}_") else name for name in others)])


def floor(part: pd.DataFrame) -> float:
    """The accuracy at which a panel's axis is cut: `CUT` below the best, of the budget in which the best is lowest.

    So budgets at which all methods lose stay in sight.
    """
    return part.groupby("budget")["accuracy"].max().min() - CUT


def extent(part: pd.DataFrame) -> tuple[float, float]:
    """Lowest and highest accuracy from `floor` on, with error bars."""
    lowest = floor(part)
    shown = part[part["accuracy"] >= lowest]
    spread = shown["accuracy_std"].fillna(0)
    return max(lowest, (shown["accuracy"] - spread).min()), (shown["accuracy"] + spread).max()


def strip(axis: Axes, start: float, end: float, side: str) -> None:
    """A grey strip along an edge of a panel ("left", "right" or "bottom"), in which nothing is to scale."""
    span, name = (axis.axhspan, "y") if side == "bottom" else (axis.axvspan, "x")
    span(start, end, color="0.93", linewidth=0, zorder=2.4)  # over lines that leave the panel, under its frame
    low, high = (end, np.inf) if side != "right" else (-np.inf, start)
    ticks = getattr(axis, f"get_{name}ticks")()
    limits = getattr(axis, f"get_{name}lim")()
    getattr(axis, f"set_{name}ticks")([t for t in ticks if max(low, limits[0]) <= t <= min(high, limits[1])])
    getattr(axis, f"set_{name}lim")(min(start, limits[0]), max(end, limits[1]))


def beneath(axis: Axes, points: Sequence[tuple[float, float, dict[str, Any]]]) -> None:
    """Points that lie below a panel, in a strip under what is drawn to scale: each with its marker and its value.

    Those that would overlap stand in rows of their own.

    Args:
        axis: with its final limits.
        points: x, value and the marker's look.
    """
    low, high = axis.get_ylim()
    columns, inches = axis.get_gridspec().ncols, axis.get_figure().get_figwidth()
    wide = 0.62 * columns / inches  # of the panel's width; a marker and its number
    to_panel = axis.transData + axis.transAxes.inverted()
    rows: list[float] = []  # the place up to which each is taken
    placed = []
    for x, value, look in sorted(points, key=lambda point: point[0]):
        place = to_panel.transform((x, low))[0]
        left = place + wide > 1.05  # no room to the right
        start = place - wide if left else place
        row = next((number for number, end in enumerate(rows) if end <= start), len(rows))
        rows[row : row + 1] = [start + wide]
        placed.append((x, value, look, row, left))
    step = 0.1 * (high - low)
    strip(axis, low - len(rows) * step, low, "bottom")
    for x, value, look, row, left in placed:
        y = low - (row + 0.5) * step
        axis.plot([x], [y], linestyle="", zorder=4, **look)
        near = {"xytext": (-5 if left else 5, 0), "ha": "right" if left else "left", "va": "center_baseline"}
        axis.annotate(f"▾ {value:.1f}", (x, y), **near, textcoords="offset points", fontsize=SMALL, zorder=4)


def _marked(marker: str) -> dict[str, Any]:
    return {"marker": marker, "markersize": 9 if marker in "*." else 6}  # of a star little is left beside its edge


def _filled(fill: str, colour: str) -> dict[str, Any]:
    """How a marker with a fill of `FILLS` looks: in its colour all around unless it is full."""
    edge = {} if fill == "full" else {"markeredgecolor": colour, "markeredgewidth": 1, "markerfacecoloralt": "white"}
    return {"fillstyle": fill, **edge}
