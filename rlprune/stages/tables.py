"""Stage tables: every table and figure of a suite, from result files only."""

import re
from pathlib import Path

import pandas as pd

from rlprune import claims, figures
from rlprune.errors import InputError
from rlprune.parts import joined
from rlprune.reports import renewed, report
from rlprune.stages.common import Project, project
from rlprune.studies import report as report_studies
from rlprune.tables import load_results, results_table

STUDIES = "studies"  # of all studies there is one report, beside those of the suites
PAPER = "paper"  # and one page of the paper's claims, beside what was reached in the suites of CIFAR10 and "published"
CIFAR10 = ("cifar10", "cifar10-gpu")


def run(suite: str, root: str | Path | None = None) -> pd.DataFrame:
    """Write ``reports/<suite>/``; return the results table (of the studies: what they have in common, their names).

    ``suite`` may also be "studies", or "paper" for reports/paper.md, from what there is of the suites cifar10,
    cifar10-gpu and published. Experiments of a suite that have no results yet are left out, and its report says how to
    run them.

    Raises:
        InputError: no experiment of the suite has results, or they are incomplete or broken.
    """
    here = project(root)
    if suite == STUDIES:
        names = list(here.params.get(STUDIES) or {})
        return pd.DataFrame(
            {"study": list(report_studies(names, here.root / "reports" / STUDIES, here.root / "results"))}
        )
    if suite == PAPER:
        return _paper(here)
    members = here.members(suite)
    made = _made(here, suite)
    absent = []
    for stage, group in (("finetune", "experiments"), ("peers", "comparisons")):
        if names := [name for name in here.params.get(group) or {} if name in members and name not in made]:
            command = f"`dvc repro {stage}@{names[0]}`" + " and so on" * (len(names) > 1)
            absent.append(f"- Not run yet: {', '.join(names)}; {command}")
    where = here.root / "reports" / suite, here.root / "results"
    return report(suite, made or members, *where, absent, here.parts(suite))


def _made(here: Project, suite: str) -> list[str]:
    """The experiments of a suite that have been searched and fine-tuned."""
    return [name for name in here.members(suite) if here.results(suite, name, "finetune", "metrics.json").is_file()]


def _paper(here: Project) -> pd.DataFrame:
    loaded = {
        suite: joined(load_results(suite, made, here.root / "results"), here.parts(suite))
        for suite in (*CIFAR10, "published")
        if suite in (here.params.get("suites") or {}) and (made := _made(here, suite))
    }
    tables = [results_table(loaded[suite]) for suite in CIFAR10 if suite in loaded]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    with renewed(here.root / "reports", re.compile(rf"{PAPER}\.md")) as partial:
        text = claims.page(loaded.get("published"), table)
        (partial / f"{PAPER}.md").write_text(text, encoding="utf-8")
    return table


def show(suite: str, root: str | Path | None = None) -> str:
    """The report's table as text, and where it lies."""
    here = project(root)
    here.members(suite)
    path = here.root / "reports" / suite / "results.csv"
    if not path.is_file():
        raise InputError(f"There is no report {path.parent}: run `dvc repro tables@{suite}`.")
    table = figures.markdown(pd.read_csv(path, dtype={"seeds": str}))
    return f"{table}\n\nTables and figures are in {path.parent.relative_to(here.root)}/."
