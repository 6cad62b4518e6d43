"""A suite's report: the table and every figure, written together or not at all."""

import contextlib
import glob
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from rlprune.figures import (
    accuracy_against,
    accuracy_by_method,
    save,
    search_curves,
    search_progress,
    training_curves,
    widths,
)
from rlprune.margins import agents_margins, extras, spreads
from rlprune.parts import joined
from rlprune.published import EPOCHS, beside
from rlprune.tables import Results, limits, load_results, page, results_table

ABANDONED = 3600.0  # seconds, as in rlprune.files, which would make what only draws wait for torch
_OURS = re.compile(
    r"(results|margins)\.(csv|md)|(accuracy_(against|by)_.+|(curves|progress|widths|training)_.+)\.(png|svg)"
)


def report(
    suite: str,
    experiments: Sequence[str],
    folder: str | Path,
    results: str | Path = "results",
    notes: Sequence[str] = (),
    parts: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Write the table and every figure of some experiments: results.csv, results.md, margins.csv and, as PNG and SVG,
    accuracy_against_<cost>, curves_, progress_ and widths_<experiment>, and training_<baseline>. Where there are many
    methods, accuracy_by_method stands for accuracy_against_parameters, which then shows no more than can be held
    against what other papers report, if anything.

    All is made in a folder beside ``folder`` and then put in place, so that a failure leaves the old report.
    Figures of an earlier report go; files that no report writes stay. Curves and progress of an experiment in which
    no method has episodes are left out. ``notes`` are lines for the head of the page; ``parts`` are experiments that
    belong to others, see `rlprune.parts.joined`.

    Returns:
        the table; see `results_table`.

    Raises:
        InputError: a result file is missing or broken; see `load_results`.
    """  # noqa: D205
    loaded = joined(load_results(suite, experiments, results), parts or {})
    table = results_table(loaded)
    trained = table[table["epochs"] >= EPOCHS]  # not only as far as tells methods apart
    others = beside(trained)
    with renewed(folder, _OURS) as partial:
        table.round(4).to_csv(partial / "results.csv", index=False, lineterminator="\n")
        # of many methods some would hide others
        single = table.groupby(["dataset", "network"])["budget"].nunique().max() == 1
        piled = table.groupby("experiment")["method"].nunique().max() > (3 if single else 6)
        if piled:
            save(accuracy_by_method(table), partial / "accuracy_by_method")
        if others or not piled:
            shown = trained if piled else table
            save(accuracy_against(shown, reported=len(shown) == len(trained)), partial / "accuracy_against_parameters")
        save(accuracy_against(table, "macs"), partial / "accuracy_against_macs")
        if len(margins := agents_margins(loaded)):
            margins.round(4).to_csv(partial / "margins.csv", index=False, lineterminator="\n")
        for name, baseline in loaded.baselines.items():
            save(training_curves(baseline.history), partial / f"training_{name}")
        for name, search in loaded.searches.items():
            save(widths(search.metrics), partial / f"widths_{name}")
            if search.history.groupby(["method", "seed"])["steps"].count().gt(1).any():
                save(search_curves(search.history, limits(search.metrics)), partial / f"curves_{name}")
                rewards = pd.DataFrame(search.metrics["methods"]).map(
                    lambda run: run.get("reward", float("nan")), na_action="ignore"
                )
                save(search_progress(search.history, rewards.mean().to_dict()), partial / f"progress_{name}")
        more = spreads(margins) + extras(loaded) + others
        heads = [*notes, *other_baselines(loaded)]
        text = page(loaded, table, {file.name for file in partial.iterdir()}, heads, more)
        (partial / "results.md").write_text(text, encoding="utf-8")
    return table


def other_baselines(results: Results) -> list[str]:
    """Lines on experiments that began with another training of their baseline than the one on record."""
    lines = []
    for name, stage in results.finetunes.items():
        which = stage.metrics["baseline"]
        seeds, methods = results.baselines[which].metrics["seeds"].values(), stage.metrics["methods"].values()
        recorded = {round(run["test_accuracy"], 2) for run in seeds if "test_accuracy" in run}
        begun = {round(run["baseline_accuracy"], 2) for runs in methods for run in runs.values()}
        if recorded and (others := sorted(begun - recorded)):
            lines.append(
                f"- {name} began with another training of {which} ({', '.join(f'{other:.2f}' for other in others)} % "
                f"of the test images) than the one on record ({', '.join(f'{one:.2f}' for one in sorted(recorded))} %)"
            )
    return lines


@contextlib.contextmanager
def renewed(folder: str | Path, ours: re.Pattern[str]) -> Iterator[Path]:
    """A folder to make files in, beside the given one, into which they are moved at the end.

    Files there whose names match ``ours`` and that are not made again go. After an error all is as before. What a
    process left beside it that was killed goes the next time.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        folder.mkdir(exist_ok=True)
        made = list(partial.iterdir())
        for file in made:
            file.replace(folder / file.name)
        for stale in [file for file in folder.iterdir() if ours.fullmatch(file.name)]:
            if stale.name not in {file.name for file in made}:
                stale.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)
