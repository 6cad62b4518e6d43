"""Tables and figures of studies that change one thing at a time; see `rlprune.studies`."""

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from rlprune.plotting import WIDTH, SteadyLayout, columns_of, finish, key, style


def ablation_table(history: pd.DataFrame) -> pd.DataFrame:
    """What each change to a search does to it.

    Args:
        history: a row per evaluation: search (name of the change; the first one is the default), seed, episode, reward,
            best (%), seconds (of the whole search).

    Returns:
        a row per change: search, first_20 (mean reward of the first 20 evaluations) and best (at the end), both means
        over seeds; difference (of best, to the default of the same seed) and its standard_error; seconds (median);
        seeds.
    """
    last = history.loc[history.groupby(["search", "seed"], sort=False)["episode"].idxmax()]
    first_20 = history[history["episode"] <= 20].groupby("search")["reward"].mean()
    table = _against_the_first(last, "search", "best")
    table.insert(1, "first_20", table["search"].map(first_20))
    return table


def ablation_figure(history: pd.DataFrame) -> Figure:
    """Best reward so far against evaluations, mean over seeds, a line a change; the default is the thick one."""
    with style():
        figure = Figure(figsize=(WIDTH, 3.6), layout=SteadyLayout())
        axis = figure.subplots()
        handles, colours = [], sns.color_palette("colorblind", history["search"].nunique())
        for colour, (search, part) in zip(colours, history.groupby("search", sort=False), strict=True):
            mean = part.groupby("episode")["best"].mean()
            look = {"linewidth": 1.1 if handles else 2.2, "linestyle": ("-", "--", "-.")[len(handles) % 3]}
            axis.plot(mean.index, mean, color=colour, **look)
            handles.append(key(search, colour, **look))
        finish(axis, "One change at a time", "Best reward so far (%)", "Evaluations")
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def schedule_table(history: pd.DataFrame) -> pd.DataFrame:
    """What each change to a fine-tuning schedule does to it.

    Args:
        history: a row per fine-tuning: schedule (name of the change; the first one is the default), seed, epochs,
            accuracy (%) and cross_entropy (nats) on validation images, seconds.

    Returns:
        a row per schedule: schedule, epochs, cross_entropy and accuracy, means over seeds; difference (of the accuracy,
        to the default of the same seed) and its standard_error; seconds (median); seeds.
    """
    table = _against_the_first(history, "schedule", "accuracy")
    parts = history.groupby("schedule")
    for place, name in enumerate(("epochs", "cross_entropy"), 1):
        table.insert(place, name, table["schedule"].map(parts[name].mean()))
    return table


def schedule_figure(history: pd.DataFrame) -> Figure:
    """Accuracy on validation images by schedule: a dot a seed, a line at their mean."""
    names = list(history["schedule"].unique())
    with style():
        figure = Figure(figsize=(WIDTH, 0.7 + 0.3 * len(names)), layout=SteadyLayout())
        axis = figure.subplots()
        for place, name in enumerate(names):
            found = history.loc[history["schedule"] == name, "accuracy"]
            axis.scatter(found, [place] * len(found), s=14, color="#0072b2", alpha=0.7, linewidth=0)
            axis.plot([found.mean()] * 2, [place - 0.25, place + 0.25], color="#d55e00")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        finish(axis, "One change at a time", "", "Validation accuracy after fine-tuning (%)")
    return figure


def prunetrain_table(history: pd.DataFrame) -> pd.DataFrame:
    """What PruneTrain saves of a training, and at what price.

    Args:
        history: a row per epoch: training (name; the first one is the dense network's), seed, epoch, accuracy (%, of
            validation images), parameters and macs (of the network at the epoch's end), training_macs (so far), all
            three in percent of the dense network's, seconds so far.

    Returns:
        a row per training, means over seeds: training, parameters, macs, training_macs, time (in percent of the dense
        training's of the same seed), accuracy; difference (to the dense one's of the same seed) and its
        standard_error; seconds (median); seeds.
    """
    last = history.loc[history.groupby(["training", "seed"], sort=False)["epoch"].idxmax()]
    table = _against_the_first(last, "training", "accuracy")
    dense = last[last["training"] == table["training"].iloc[0]].set_index("seed")["seconds"]
    last = last.assign(time=100 * last["seconds"] / last["seed"].map(dense))
    for place, name in enumerate(("parameters", "macs", "training_macs", "time"), 1):
        table.insert(place, name, table["training"].map(last.groupby("training")[name].mean()))
    return table


def prunetrain_figure(history: pd.DataFrame) -> Figure:
    """Validation accuracy, and MACs of what is left, by epoch; a line a training, the mean over seeds."""
    with style():
        figure = Figure(figsize=(WIDTH, 2.8), layout=SteadyLayout())
        left, right = figure.subplots(1, 2)
        handles, colours = [], sns.color_palette("colorblind", history["training"].nunique())
        for colour, (label, part) in zip(colours, history.groupby("training", sort=False), strict=True):
            mean = part.groupby("epoch")[["accuracy", "macs"]].mean()
            left.plot(mean.index, mean["accuracy"], color=colour)
            right.step([0, *mean.index], [100, *mean["macs"]], where="post", color=colour)
            handles.append(key(label, colour))
        finish(left, "Accuracy", "Validation accuracy (%)", "Epoch")
        finish(right, "What goes on training", "MACs (% of unpruned)", "Epoch")
        right.set_ylim(0, 104)  # a line at 100 in full
        figure.legend(handles=handles, loc="outside lower center", ncols=columns_of(handles))
    return figure


def _against_the_first(rows: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """A row per ``by``, in order: mean ``value``, its difference to the first one's, seed by seed, seconds, seeds."""
    table, default = [], None
    for label, part in rows.groupby(by, sort=False):
        values = part.set_index("seed")[value]
        default = values if default is None else default
        gaps = values - default
        row = {by: label, value: values.mean(), "difference": gaps.mean(), "standard_error": gaps.sem()}
        table.append({**row, "seconds": part["seconds"].median(), "seeds": len(part)})
    return pd.DataFrame(table)
