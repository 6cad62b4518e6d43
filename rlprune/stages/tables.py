"""Stage tables: every table and figure of a suite, from result files only."""

from pathlib import Path

import pandas as pd

from rlprune import figures
from rlprune.errors import InputError
from rlprune.reports import report
from rlprune.stages.common import project
from rlprune.studies import report as report_studies

STUDIES = "studies"  # of all studies there is one report, beside those of the suites


def run(suite: str, root: str | Path | None = None) -> pd.DataFrame:
    """Write ``reports/<suite>/``; return the results table (of the studies: what they have in common, their names).

    Experiments of the suite that have no results yet are left out, and the report says how to run them.

    Raises:
        InputError: no experiment of the suite has results, or they are incomplete or broken.
    """
    here = project(root)
    if suite == STUDIES:
        names = list(here.params.get(STUDIES) or {})
        return pd.DataFrame(
            {"study": list(report_studies(names, here.root / "reports" / STUDIES, here.root / "results"))}
        )
    members = here.members(suite)
    made = [name for name in members if here.results(suite, name).exists()]
    stages = {name: "peers" if name in (here.params.get("comparisons") or {}) else "finetune" for name in members}
    absent = [f"- Not run yet: {name}, `dvc repro {stages[name]}@{name}`" for name in members if name not in made]
    return report(suite, made or members, here.root / "reports" / suite, here.root / "results", absent)


def show(suite: str, root: str | Path | None = None) -> str:
    """The report's table as text, and where it lies."""
    here = project(root)
    here.members(suite)
    path = here.root / "reports" / suite / "results.csv"
    if not path.is_file():
        raise InputError(f"There is no report {path.parent}: run `dvc repro {suite}`.")
    table = figures.markdown(pd.read_csv(path, dtype={"seeds": str}))
    return f"{table}\n\nTables and figures are in {path.parent.relative_to(here.root)}/."
