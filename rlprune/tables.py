"""Result files in, tables out.

A result lives in ``results/<suite>/<experiment>/<stage>/`` or, of a baseline, which
several suites may share, in ``results/baselines/<name>/``, as metrics.json (what
was reached, and on what) and history.csv (how). Nothing here runs a network.
"""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rlprune.errors import InputError
from rlprune.labels import budget_label, cost_label, duration, method_label, method_rank, network_label, quantity

COUNTED = ("parameters", "macs")  # of every network, whatever its budgets

_HEAD = ["dataset", "source", "sha256", "network", "device", "versions"]
_KEYS = {
    "baseline": [*_HEAD, "seeds"],
    "search": [*_HEAD, "baseline", "budgets", "methods"],
    "finetune": [*_HEAD, "baseline", "budgets", "methods"],
}
_COLUMNS = {
    "baseline": ["seed", "epoch", "loss", "train_accuracy", "validation_accuracy"],
    "search": ["method", "seed", "steps", "reward", "best"],
    "finetune": ["method", "seed", "epoch"],
}
_NUMBERS = {  # of each run
    "search": ["widths", "costs", "evaluations", "seconds"],
    "finetune": ["baseline_accuracy", "pruned_accuracy", "accuracy", "seconds"],
}


@dataclass(frozen=True)
class Stage:
    """One result: the content of metrics.json, the rows of history.csv, the folder of both, and what it is made of."""

    metrics: dict[str, Any]
    history: pd.DataFrame
    folder: Path
    parts: "tuple[Stage, ...]" = ()


@dataclass(frozen=True)
class Results:
    """The results of a suite: experiments by name (searches, finetunes) and the baselines they start from."""

    suite: str
    searches: dict[str, Stage]
    finetunes: dict[str, Stage]
    baselines: dict[str, Stage]


def load_results(suite: str, experiments: Sequence[str], results: str | Path = "results") -> Results:
    """Read the result files of some experiments and of their baselines.

    Args:
        suite: folder under ``results``.
        experiments: folders under the suite, each with the stages search and finetune.
        results: the folder of all results.

    Raises:
        InputError: a file is missing or broken, or the fine-tuning is of another search; says what to run.
    """
    if not experiments:
        raise InputError(f"No experiment of suite {suite!r} is named: give at least one folder of {results}/{suite}.")
    root = Path(results) / suite
    searches = {name: _read(root / name / "search", suite, name, "search") for name in experiments}
    finetunes = {name: _read(root / name / "finetune", suite, name, "finetune") for name in experiments}
    baselines = [stage.metrics["baseline"] for stage in searches.values()]
    for name, search in searches.items():
        if (was := _runs(search)) != (now := _runs(finetunes[name])):
            odd = ", ".join(f"{method} (seed {seed})" for method, seed in sorted(was ^ now))
            raise InputError(
                f"{finetunes[name].folder}/metrics.json and the search beside it differ in {odd}: "
                f"{_remedy(suite, name, 'finetune')}."
            )
        for method, seed in sorted(was):
            pruned, tuned = (stage.metrics["methods"][method][seed] for stage in (search, finetunes[name]))
            # results made before widths were recorded twice do not have them
            if tuned.get("widths", pruned.get("widths")) != pruned.get("widths"):
                raise InputError(
                    f"{finetunes[name].folder}/metrics.json is of another network than the search beside it left with "
                    f"{method} (seed {seed}): {_remedy(suite, name, 'finetune')}."
                )
        for stage in (search, finetunes[name]):
            for method, seed in sorted(was):
                run = stage.metrics["methods"][method][seed]
                if lacking := [key for key in _NUMBERS[stage.folder.name] if key not in run]:
                    raise InputError(
                        f"Result file {stage.folder}/metrics.json lacks {lacking[0]!r} of {method} (seed {seed}): "
                        f"{_remedy(suite, name, stage.folder.name)}."
                    )
            # the history is written first: where a stage was killed right then, it tells of runs without an outcome
            rows = zip(stage.history["method"], stage.history["seed"].astype(str), strict=True)
            if odd := sorted(set(rows) - was):
                raise InputError(
                    f"{stage.folder}/history.csv tells of {odd[0][0]} (seed {odd[0][1]}), and the metrics.json beside "
                    f"it does not: {_remedy(suite, name, stage.folder.name)}."
                )
    folder = Path(results) / "baselines"
    started = {name: _read(folder / name, suite, name, "baseline") for name in baselines}
    return Results(suite, searches, finetunes, started)


def results_table(results: Results) -> pd.DataFrame:
    """One row per experiment and method, sorted by dataset, network, budget (falling) and method.

    Returns:
        text columns experiment, dataset, network, method, budget and seeds; for parameters, macs and every
        cost with a budget ``<cost>_kept`` (in its own unit) and ``<cost>_percent`` (of the unpruned network);
        ``accuracy_before``, ``accuracy_pruned`` (pruned and recalibrated), ``accuracy`` (fine-tuned), all in
        percent of the test images, and ``change`` in points; each a mean over the seeds, with ``<name>_std``
        (sample standard deviation, empty for a single seed); epochs of fine-tuning (empty where the result file does
        not say); evaluations, search_seconds and finetune_seconds, each per seed.

    Raises:
        InputError: a result file lacks a number.
    """
    rows = []
    for name, search in results.searches.items():
        finetune = results.finetunes[name]
        for method in search.metrics["methods"]:
            try:
                rows.append((_place(search.metrics, method), _row(name, method, search.metrics, finetune.metrics)))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(
                    f"The result of {method} in {search.folder} or {finetune.folder} is broken ({error!r}): "
                    f"{_remedy(results.suite, name, 'search')}."
                ) from error
    table = pd.DataFrame([row for _, row in sorted(rows, key=lambda pair: pair[0])])
    fixed = ["parameters_kept", "parameters_percent", "macs_kept", "macs_percent"]
    extra = [c for c in table if c.endswith(("_kept", "_percent")) and c not in fixed]
    head, numbers = ["experiment", "dataset", "network", "method", "budget"], fixed + extra
    table = table.reindex(columns=[*head, *numbers, *(c for c in table if c not in [*head, *numbers])])
    whole = ["parameters_kept", "macs_kept", "epochs", "evaluations"]
    return table.astype(dict.fromkeys([c for c in table if c not in [*head, "seeds"]], float)).astype(
        {column: "Int64" for column in whole if (table[column].dropna() % 1 == 0).all()}
    )


def markdown(table: pd.DataFrame) -> str:
    """The table for people: rounded, with units; the best accuracy per network and budget in bold.

    Args:
        table: of `results_table`.
    """
    best = table["accuracy"].round(1)
    best = best == best.groupby([table[c] for c in ("dataset", "network", "budget")]).transform("max")
    shown: dict[str, Iterable[str]] = {}
    if table.duplicated(["dataset", "network", "method", "budget"]).any():
        shown["Experiment"] = table["experiment"]
    shown |= {"Dataset": table["dataset"], "Network": table["network"].map(network_label)}
    shown |= {"Budget": table["budget"], "Method": table["method"].map(method_label)}
    for cost in [c.removesuffix("_kept") for c in table if c.endswith("_kept")]:
        pairs = zip(table[f"{cost}_kept"], table[f"{cost}_percent"], strict=True)
        texts = [_or(k, lambda k, c=cost, p=p: f"{quantity(c, k)} ({p:.2f} %)") for k, p in pairs]
        shown[f"{cost_label(cost, capital=True)} kept"] = texts
    for column, label in {
        "accuracy_before": "Accuracy before (%)",
        "accuracy_pruned": "Pruned (%)",
        "accuracy": "Fine-tuned (%)",
        "change": "Change (points)",
    }.items():
        sign = "+" if column == "change" else ""
        pairs = zip(table[column], table[f"{column}_std"], strict=True)
        shown[label] = [_or(m, lambda m, s=s, sign=sign: _spread(m, s, sign)) for m, s in pairs]
    shown["Fine-tuned (%)"] = [f"**{t}**" if b else t for t, b in zip(shown["Fine-tuned (%)"], best, strict=True)]
    shown["Evaluations"] = [_or(n, lambda n: f"{n:,.0f}") for n in table["evaluations"]]
    shown["Search"] = [_or(s, duration) for s in table["search_seconds"]]
    shown["Epochs"] = [_or(n, lambda n: f"{n:,.0f}") for n in table["epochs"]]
    shown["Fine-tuning"] = [_or(s, duration) for s in table["finetune_seconds"]]
    shown["Seeds"] = table["seeds"]
    frame = pd.DataFrame({label: list(values) for label, values in shown.items()})
    left = ("Experiment", "Dataset", "Network", "Budget", "Method")
    align = ["left" if column in left else "right" for column in frame]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def page(
    results: Results, table: pd.DataFrame, files: Collection[str], notes: Sequence[str] = (), more: Sequence[str] = ()
) -> str:
    """The report as Markdown: where numbers come from, ``notes``, the table, ``more``, the figures among ``files``."""
    stages = [*results.baselines.values(), *results.searches.values(), *results.finetunes.values()]
    heads = [part.metrics for stage in stages for part in stage.parts or (stage,)]
    images = ("train_images", "validation_images", "test_images")
    splits = [" / ".join(f"{h[i]:,}" for i in images) if all(i in h for i in images) else "unknown" for h in heads]
    data = [
        f"- Dataset: {h['dataset']}, {h['source'].rstrip('.')}; sha256 `{h['sha256']}`; {split} images for training / "
        f"validation / test, split with seed {h.get('split_seed', 0)}"
        for h, split in zip(heads, splits, strict=True)
    ]
    versions = [", ".join(f"{name} {version}" for name, version in h["versions"].items()) for h in heads]
    seeds = {f"{name}: {', '.join(stage.metrics['seeds'])}" for name, stage in results.baselines.items()}
    lines = [
        f"# Results of the suite {results.suite}",
        "",
        *dict.fromkeys(data),
        f"- Device: {'; '.join(dict.fromkeys(h['device'] for h in heads))}",
        f"- Versions: {'; '.join(dict.fromkeys(versions))}",
        f"- Seeds of the baselines: {'; '.join(sorted(seeds))}; of every method: last column",
        f"- Made by: `dvc repro tables@{results.suite}`",
        *notes,
        "",
        markdown(table),
        "",
        "Accuracies in percent of the test images; ± is the standard deviation over seeds. Pruned: after pruning "
        "and recovery (batch norm recalibrated, last layer fitted again unless the method has trained it itself), "
        "before fine-tuning. Bold: the best per network and budget. Epochs: of fine-tuning. Evaluations and times "
        "are per seed. Figures of accuracy: error bars are one standard deviation; what stands in a grey strip is "
        "not to scale. Curves of a search: dots are episodes, lines their running mean. Over several seeds lines "
        "are means, and thin lines on the bars of widths go from the smallest to the largest; the band is one "
        "standard deviation of the running means in the curves, and in the progress the 95 % interval of the mean "
        "(of two seeds, from the lower to the higher). Dotted in the progress: a method that decides at once, or "
        "of which only the outcome is known; ↓ is below the axis.",
        *more,
    ]
    shown = [("accuracy_by_method", "Accuracy after fine-tuning")]
    shown += [(f"accuracy_against_{c}", f"Accuracy after fine-tuning against {cost_label(c)} kept") for c in COUNTED]
    for name, search in results.searches.items():
        what = f"{network_label(search.metrics['network'])}, {budget_label(search.metrics['budgets'])}"
        parts = {"curves": "the search", "progress": "best within budget by evaluations", "widths": "filters"}
        shown += [(f"{file}_{name}", f"{name} ({what}): {title}") for file, title in parts.items()]
    shown += [(f"training_{name}", f"{name}: training of the unpruned network") for name in results.baselines]
    for file, title in shown:
        if f"{file}.png" in files:
            lines += ["", f"## {title}", "", f"![{title}]({file}.png)"]
    return "\n".join(lines) + "\n"


def limits(metrics: dict[str, Any]) -> dict[str, float]:
    """The budgets of a search in percent of the unpruned network, by name of the cost."""
    percents = {}
    for budget in metrics["budgets"]:
        name, limit = budget["name"], budget["limit"]
        if not budget.get("relative", True):
            runs = [run for seeds in metrics["methods"].values() for run in seeds.values()]
            limit /= next(run["costs"][name]["unpruned"] for run in runs)
        percents[name] = 100 * limit
    return percents


def _read(folder: Path, suite: str, name: str, stage: str) -> Stage:
    return read(folder, _KEYS[stage], _COLUMNS[stage], _remedy(suite, name, stage))


def read(folder: Path, keys: Sequence[str], columns: Sequence[str], remedy: str) -> Stage:
    """The two result files in a folder.

    Args:
        folder: of metrics.json and history.csv.
        keys: that the first must hold.
        columns: that the second must have.
        remedy: what to do where they are missing or broken, for the message.

    Raises:
        InputError: they are.
    """
    for file in (folder / "metrics.json", folder / "history.csv"):
        if not file.is_file():
            raise InputError(f"Result file {file} is missing: {remedy}.")
    metrics = _parse(folder / "metrics.json", remedy, lambda file: json.loads(file.read_text(encoding="utf-8")))
    missing = [k for k in keys if not metrics.get(k)] if isinstance(metrics, dict) else keys
    if missing:
        raise InputError(f"Result file {folder / 'metrics.json'} lacks {missing[0]!r}: {remedy}.")
    history = _parse(folder / "history.csv", remedy, pd.read_csv)
    missing = [column for column in columns if column not in history]
    if missing:
        raise InputError(f"Result file {folder / 'history.csv'} lacks column {missing[0]!r}: {remedy}.")
    for column in {"method", "seed"} & set(columns):
        if history[column].isna().any():
            raise InputError(f"Result file {folder / 'history.csv'} is cut off: {remedy}.")
    return Stage(metrics, history, folder)


def _parse(file: Path, remedy: str, parse: Callable[[Path], Any]) -> Any:
    try:
        return parse(file)
    except (ValueError, OSError) as error:  # json's and pandas' parse errors are ValueErrors
        raise InputError(f"Result file {file} is broken ({error}): {remedy}.") from error


def _remedy(suite: str, name: str, stage: str) -> str:
    other = "" if stage == "baseline" else f" (`python -m rlprune peers {name}` if it is a comparison)"
    return f"run `dvc repro tables@{suite}` or `python -m rlprune {stage} {name}`{other}"


def _runs(stage: Stage) -> set[tuple[str, str]]:
    return {(method, seed) for method, seeds in stage.metrics["methods"].items() for seed in seeds}


def _place(metrics: dict[str, Any], method: str) -> tuple:
    budgets = metrics["budgets"]
    costs = [(b["name"], not b.get("relative", True)) for b in budgets]
    falling = [-b["limit"] for b in budgets]
    return metrics["dataset"], metrics["network"], len(costs), costs, falling, method_rank(method)


def _row(name: str, method: str, search: dict[str, Any], finetune: dict[str, Any]) -> dict[str, Any]:
    seeds = sorted(search["methods"][method], key=int)
    found = pd.DataFrame([search["methods"][method][seed] for seed in seeds])
    found = found[["widths", "costs", "evaluations", "seconds"]]
    tuned = pd.DataFrame([finetune["methods"][method][seed] for seed in seeds])
    row = {"experiment": name, "dataset": search["dataset"], "network": search["network"], "method": method}
    row["budget"] = budget_label(search["budgets"])
    for cost in found["costs"].iloc[0]:
        row[f"{cost}_kept"] = found["costs"].map(lambda costs, c=cost: costs[c]["value"]).mean()
        row[f"{cost}_percent"] = 100 * found["costs"].map(lambda costs, c=cost: costs[c]["share"]).mean()
    row["parameters_kept"], row["macs_kept"] = (row.get(f"{c}_kept", float("nan")) for c in ("parameters", "macs"))
    change = tuned["accuracy"] - tuned["baseline_accuracy"]
    for column, values in {
        "accuracy_before": tuned["baseline_accuracy"],
        "accuracy_pruned": tuned["pruned_accuracy"],
        "accuracy": tuned["accuracy"],
        "change": change,
    }.items():
        row |= {column: values.mean(), f"{column}_std": values.std()}
    row["epochs"] = finetune.get("training", {}).get("epochs", float("nan"))
    row["evaluations"] = found["evaluations"].mean()
    row |= {"search_seconds": found["seconds"].mean(), "finetune_seconds": tuned["seconds"].mean()}
    return {**row, "seeds": ", ".join(seeds)}


def _or(value: float, text: Callable[[float], str]) -> str:
    return "–" if pd.isna(value) else text(value)


def _spread(mean: float, std: float, sign: str) -> str:
    text = f"{round(mean, 1) + 0.0:{sign}.1f}".replace("-", "−")  # + 0.0: no −0.0
    return text if pd.isna(std) else f"{text} ± {std:.1f}"
