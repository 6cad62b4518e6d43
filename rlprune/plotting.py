"""What all figures share: their look, the parts that they are made of, and how they are written."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

LIMIT, DOTS = (0, (4, 3)), (0, (1, 1))  # dashes of a budget, and of the best so far
WIDTH = 5.6  # inches; the text width of most papers
SMALL = 7.5  # points; of numbers within a panel


class SteadyLayout(ConstrainedLayoutEngine):
    """Matplotlib's constrained layout, with the same positions in every process.

    Its solver keeps variables in the order in which they lie in memory, so that the last bits of a position differ from
    run to run, and with them the names of clip paths in an SVG.
    """

    def execute(self, fig: Figure) -> Any:
        """Lay a figure out, its panels to a billionth of its size."""
        margins = super().execute(fig)
        for axis in fig.axes:
            laid_out = axis.get_in_layout()
            axis.set_position([round(number, 9) for number in axis.get_position(original=True).bounds])
            axis.set_in_layout(laid_out)  # which set_position has ended
        return margins


def save(figure: Figure, path_without_suffix: str | Path) -> None:
    """Write a figure as PNG (150 dots per inch) and SVG; the same figure gives the same bytes."""
    path = Path(path_without_suffix)
    path = path.with_suffix("") if path.suffix in (".png", ".svg") else path  # given all the same
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "rlprune"}):
        figure.savefig(path.with_name(f"{path.name}.png"), dpi=150, metadata={"Software": None})
        figure.savefig(path.with_name(f"{path.name}.svg"), dpi=300, metadata={"Date": None, "Creator": None})


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Under this every figure is made, so that nothing global changes."""
    ours = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same bytes on every machine
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        **dict.fromkeys(["axes.titlesize", "axes.labelsize", "figure.labelsize"], 8.5),
        **dict.fromkeys(["xtick.labelsize", "ytick.labelsize", "legend.fontsize"], 8),
        "legend.frameon": False,
        "legend.columnspacing": 1.4,
        "legend.handlelength": 1.8,
        "lines.linewidth": 1.3,
        "savefig.facecolor": "white",
    }
    paper, ticks = dict(sns.plotting_context("paper")), dict(sns.axes_style("ticks"))
    with matplotlib.style.context(["default", ticks, paper, ours]):
        yield


def finish(axis: Axes, title: str, y: str, x: str = "", bottom: float | None = None) -> None:
    """Title, labels and frame of a panel."""
    axis.set(title=title, ylabel=y, xlabel=x)
    if bottom is not None:
        axis.set_ylim(bottom=bottom)
    sns.despine(ax=axis)


def identified(history: pd.DataFrame) -> pd.DataFrame:
    """With columns method and seed; the history of a single search in a notebook may have neither."""
    absent = {column: value for column, value in (("method", "search"), ("seed", 0)) if column not in history}
    return history.assign(**absent)


def key(label: str, colour: str = "0.3", **look: Any) -> Line2D:
    """A legend entry."""
    return Line2D([], [], color=colour, label=label, **look)


def curve(axis: Axes, episodes: pd.DataFrame, column: str, colour: str, dashes: Any = "-", raw: bool = True) -> None:
    """A column against steps: its mean over seeds and ± one standard deviation.

    ``raw`` values are shown as dots and smoothed for the line; others are exact. Seeds are compared on the
    steps that all of them have.
    """
    if column not in episodes:
        return
    runs = [run.dropna(subset=["steps", column]).sort_values("steps") for _, run in episodes.groupby("seed")]
    if not all(len(run) for run in runs):
        return
    grid = np.unique(np.concatenate([run["steps"] for run in runs]))
    grid = grid[(grid >= max(run["steps"].min() for run in runs)) & (grid <= min(run["steps"].max() for run in runs))]
    lines = []
    for run in runs:
        values = run[column]
        if raw:
            axis.plot(run["steps"], values, ".", markersize=3, alpha=0.3, mec="none", color=colour, rasterized=True)
            values = values.rolling(max(5, len(run) // 20), center=True, min_periods=1).mean()
        last = np.searchsorted(run["steps"], grid, side="right") - 1
        lines.append(values.to_numpy()[last])
    mean = np.mean(lines, axis=0)
    axis.plot(grid, mean, color=colour, linestyle=dashes)
    if len(lines) > 1:
        spread = np.std(lines, axis=0, ddof=1)
        axis.fill_between(grid, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)


def columns_of(handles: list[Line2D]) -> int:
    """Legend columns that fit under a figure."""
    labels = [len(handle.get_label()) for handle in handles]
    return len(handles) if len(labels) <= 4 and sum(labels) < 50 else 3 if max(labels, default=0) < 28 else 2
