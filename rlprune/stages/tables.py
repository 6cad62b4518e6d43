"""Stage tables: every table and figure of a suite, from result files only."""

from pathlib import Path

import pandas as pd

from rlprune import figures
from rlprune.errors import InputError
from rlprune.reports import report
from rlprune.stages.common import project


def run(suite: str, root: str | Path | None = None) -> pd.DataFrame:
    """Write ``reports/<suite>/``; return the results table."""
    here = project(root)
    experiments = here.members(suite)
    return report(suite, experiments, here.root / "reports" / suite, results=here.root / "results")


def show(suite: str, root: str | Path | None = None) -> str:
    """The report's table as text, and where it lies."""
    here = project(root)
    here.members(suite)
    path = here.root / "reports" / suite / "results.csv"
    if not path.is_file():
        raise InputError(f"There is no report {path.parent}: run `dvc repro {suite}`.")
    table = figures.markdown(pd.read_csv(path, dtype={"seeds": str}))
    return f"{table}\n\nTables and figures are in {path.parent.relative_to(here.root)}/."
