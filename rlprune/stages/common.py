"""What all stages share: parameters, where files lie, what every result records."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlprune.errors import InputError, one_of
from rlprune.stages.values import ENTRIES, must

if TYPE_CHECKING:  # a stage that only draws does not wait for torch
    from rlprune.costs import Budget
    from rlprune.training import Training

REQUIRED = {
    "datasets": {"validation", "seed"},
    "suites": {"search", "finetune"},
    "baselines": {"suite", "dataset", "network", "seeds"},
    "experiments": {"suite", "baseline", "budgets", "methods", "seeds"},
    "studies": {"kind", "needs", "suite", "baseline", "budgets", "seeds"},
}
OPTIONAL = {
    "suites": {"baseline"},
    "baselines": {"training"},
    "experiments": {"baseline_seed", "search", "training", "part_of"},
    "studies": {
        "baseline_seed",
        "candidates",
        "rewards",
        "training",
        "episodes",
        "points",
        "begin",
        "changes",
        "around",
    },
}
SHARED = ("baseline", "baseline_seed", "budgets", "search", "training")  # by all parts of an experiment


@dataclass(frozen=True)
class Project:
    """A folder with a params.yaml, and what is in it.

    Attributes:
        root: the folder.
        params: the groups of params.yaml.
    """

    root: Path
    params: dict[str, Any]

    def entry(self, group: str, name: str) -> dict[str, Any]:
        """One entry of a group, its keys checked.

        Raises:
            InputError: unknown name, a key that is missing or unknown, or a value of the wrong kind.
        """
        entries = self.experiments if group == "experiments" else self.params.get(group) or {}
        one_of({"studies": "study"}.get(group, group[:-1]), name, entries)
        entry, where = entries[name] or {}, self.where(group, name)
        if not isinstance(entry, dict):
            raise InputError(f"{where} in params.yaml must map names to values, not {entry!r}.")
        missing = sorted(REQUIRED[group] - set(entry))
        unknown = sorted(set(entry) - REQUIRED[group] - OPTIONAL.get(group, set()))
        if missing or unknown:
            fault = f"lacks {missing[0]!r}" if missing else f"has the unknown key {unknown[0]!r}"
            known = ", ".join(sorted(REQUIRED[group] | OPTIONAL.get(group, set())))
            raise InputError(f"{where} in params.yaml {fault}. Its keys are: {known}.")
        for key, rule in ENTRIES[group].items():
            if key in entry:
                must(f"{where}.{key} in params.yaml", rule, entry[key])
        for key in sorted({"seeds", "methods"} & set(entry)):
            if len(set(entry[key])) < len(entry[key]):
                raise InputError(f"{where}.{key} in params.yaml names something twice: {entry[key]!r}.")
        return entry

    def where(self, group: str, name: str) -> str:
        """The place of an entry in params.yaml, for messages: experiments with peers are called comparisons there."""
        peers = group == "experiments" and name in (self.params.get("comparisons") or {})
        return f"{'comparisons' if peers else group}.{name}"

    @property
    def experiments(self) -> dict[str, Any]:
        """The experiments, those with peers among them."""
        return {**(self.params.get("experiments") or {}), **(self.params.get("comparisons") or {})}

    def results(self, *place: str) -> Path:
        """Folder of a metrics.json and history.csv: suite, experiment, stage; or "baselines", name."""
        return self.root.joinpath("results", *place)

    def weights(self, *place: str) -> Path:
        """Folder of a stage's networks, at the same place as its results."""
        return self.root.joinpath("weights", *place)

    def checkpoint(self, name: str, stage: str, *which: object) -> Path:
        """Where an unfinished run keeps its state."""
        return self.root / "checkpoints" / f"{name}-{stage}-{'-'.join(map(str, which))}.pt"

    @property
    def lessons(self) -> Path:
        """Where the outputs of the unpruned networks are kept, which all experiments with the same seed imitate."""
        return self.root / "checkpoints" / "lessons"

    def baseline_seed(self, name: str, seed: int) -> int:
        """The seed of the baseline that an experiment prunes with this seed: the same, unless the entry says one."""
        return self.entry("experiments", name).get("baseline_seed", seed)

    def parts(self, suite: str) -> dict[str, str]:
        """Experiments of a suite that are parts of others, and of which.

        Raises:
            InputError: a part of something that is no experiment of the suite, or is itself a part; that differs from
                its whole in what all parts share, or has a method and seed that another part has.
        """
        members = {name: self.entry("experiments", name) for name in self.members(suite)}
        found = {name: entry["part_of"] for name, entry in members.items() if "part_of" in entry}
        for name, whole in found.items():
            if whole not in members or whole in found:
                raise InputError(
                    f"{self.where('experiments', name)}.part_of in params.yaml must name an experiment of suite "
                    f"{suite!r} that is no part itself, not {whole!r}."
                )
            for key in SHARED:
                if members[name].get(key) != members[whole].get(key):
                    raise InputError(
                        f"{self.where('experiments', name)} in params.yaml is part of {whole!r} and differs from it in "
                        f"{key!r}: give both the same, or take part_of out."
                    )
        taken: dict[tuple[str, ...], str] = {}
        for name, entry in members.items():
            for run in product([found.get(name, name)], entry["methods"], map(str, entry["seeds"])):
                if run in taken:
                    raise InputError(
                        f"{self.where('experiments', name)} and {taken[run]} in params.yaml are parts of one "
                        f"experiment and both have {run[1]} with seed {run[2]}: take it out of one of them."
                    )
                taken[run] = self.where("experiments", name)
        return found

    def members(self, suite: str) -> list[str]:
        """Names of the experiments of a suite."""
        one_of("suite", suite, self.params.get("suites") or {})
        return [name for name in self.experiments if self.entry("experiments", name)["suite"] == suite]


def budgets(here: Project, name: str) -> list[Budget]:
    """An experiment's budgets: cost → share of the unpruned network's, or {limit, relative: false} in its own unit.

    Raises:
        InputError: unknown cost, or a limit that makes no sense.
    """
    from rlprune.costs import Budget

    given = here.entry("experiments", name)["budgets"]
    fault = InputError(
        f"{here.where('experiments', name)}.budgets in params.yaml must be like {{parameters: 0.1}} or "
        f"{{latency: {{limit: 5.0, relative: false}}}}, not {given!r}."
    )
    if not isinstance(given, dict) or not given:
        raise fault
    found = []
    for cost, limit in given.items():
        options = limit if isinstance(limit, dict) else {"limit": limit}
        if "limit" not in options or not set(options) <= {"limit", "relative"}:
            raise fault
        found.append(Budget(cost, **options))
    return found


def schedule(here: Project, name: str) -> Training:
    """An experiment's fine-tuning schedule: the suite's, with the entry's own changes.

    Raises:
        InputError: an unknown value, or one that makes no sense.
    """
    from rlprune.training import Training

    entry = here.entry("experiments", name)
    suite = here.entry("suites", entry["suite"])
    return Training.of({**suite["finetune"], **entry.get("training", {})})


def described(limits: Sequence[Budget]) -> list[dict[str, Any]]:
    """Budgets as results record them."""
    return [{"name": budget.name, "limit": budget.limit, "relative": budget.relative} for budget in limits]


def project(root: str | Path | None = None) -> Project:
    """The project in ``root``, by default the nearest folder upwards with a params.yaml.

    Raises:
        InputError: there is none, or it is no YAML mapping.
    """
    start = Path(root) if root is not None else Path.cwd()
    places = [start] if root is not None else [start, *start.resolve().parents]
    for place in places:
        path = place / "params.yaml"
        if path.is_file():
            try:
                params = yaml.safe_load(path.read_text())
            except yaml.YAMLError as error:
                raise InputError(f"{path} is no valid YAML: {' '.join(str(error).split())}.") from error
            groups = [*REQUIRED, "comparisons"]
            if not isinstance(params, dict) or not all(isinstance(params.get(name) or {}, dict) for name in groups):
                raise InputError(f"{path} must hold groups that map names to entries: {', '.join(groups)}.")
            return Project(place, params)
    raise InputError(f"There is no params.yaml in {start} or above: run from the project's folder.")


def environment(device: str, beside: int = 1) -> dict[str, Any]:
    """What every result says of the machine and the software: device and versions.

    Args:
        device: cpu or cuda.
        beside: runs that were at work at a time, see `rlprune.stages.jobs.side_by_side`.
    """
    import torch

    from rlprune.forward import cpu, half_precision
    from rlprune.stages.jobs import threads

    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        count = f"{threads(beside)} thread{'s' if threads(beside) > 1 else ''}"
        count += f" each for {beside} runs side by side" if beside > 1 else ""
        where = f"{cpu().get('cpu_name') or platform.processor()}, {count}"
    precision = "bfloat16" if isinstance(half_precision(device), torch.autocast) else "float32"
    packages = ["torch", "torchvision", "numpy", "gymnasium", "torch-pruning", "rlprune"]
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"device": f"{where}, {precision}", "versions": versions}


def device() -> str:
    """``$RLPRUNE_DEVICE`` if set, else a GPU if there is one, else the CPU; a GPU is made to repeat itself."""
    import torch

    chosen = os.environ.get("RLPRUNE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    one_of("RLPRUNE_DEVICE", chosen, ["cpu", "cuda"])
    if chosen == "cuda" and not torch.cuda.is_available():
        raise InputError("RLPRUNE_DEVICE is cuda, but torch sees no GPU: unset it, or install a CUDA build of torch.")
    if chosen == "cuda":  # whose fastest kernels add up in no fixed order; a few have no other
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return chosen
