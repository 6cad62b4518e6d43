"""What the files at the top level promise, held together."""

import ast
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def name_of(requirement):
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), "only name==version"
    return {name_of(line): line.split("==")[1] for line in lines}


def test_every_dependency_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    pins = pinned()
    for text in [*PYPROJECT["project"]["dependencies"], *EXTRAS["pipeline"], *EXTRAS["test"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[name_of(text)]), text


def test_every_pin_installs_on_the_oldest_python_that_is_promised():
    """A release may ask for a newer patch release than ours: Debian 12 has 3.11.2."""
    from importlib.metadata import distributions

    from packaging.specifiers import SpecifierSet

    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=") + ".0"
    pins, seen = pinned(), set()
    for package in distributions():
        if pins.get(name := name_of(package.name)) == package.version.split("+")[0]:
            seen.add(name)
            assert SpecifierSet(package.metadata["Requires-Python"] or "").contains(oldest), f"{name} on {oldest}"
    assert {name_of(text) for text in PYPROJECT["project"]["dependencies"]} <= seen


def test_conda_environment_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["-c constraints.txt", f"-e .[{','.join(sorted(EXTRAS))}]"]
    (python,) = [d for d in environment["dependencies"] if str(d).startswith("python=")]
    assert PYPROJECT["project"]["requires-python"] == f">={python.removeprefix('python=')}"
    makefile = (ROOT / "Makefile").read_text()
    assert f"-c constraints.txt -e '.[{','.join(sorted(EXTRAS))}]'" in makefile


def test_every_make_target_of_cifar10_records_its_images_first():
    rules = (ROOT / "Makefile").read_text().splitlines()
    (targets,) = [rule.split(":")[0].split() for rule in rules if rule.endswith(": images")]
    experiments = yaml.safe_load((ROOT / "params.yaml").read_text())
    suites = {entry["suite"] for kind in ("experiments", "comparisons") for entry in experiments[kind].values()}
    assert set(targets) == suites - {"quick", "peers-digits"}


def test_data_dvc_pins_the_official_archive():
    (out,) = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"]
    assert (out["md5"], out["size"]) == ("c58f30108f718f92721af3b95e74349a", 170498071)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_thin_and_stripped(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    assert sum(len(cell["source"]) for cell in code) <= 30
    assert "def " not in "".join("".join(cell["source"]) for cell in code)
    assert notebook["cells"][-1]["cell_type"] == "markdown"  # a sentence on what is seen


def imports(path):
    """Files of rlprune that a file imports anywhere in it."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what is imported for its types only changes nothing
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlprune":
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("rlprune")}
    files = set()
    for name in found:
        base = ROOT / name.replace(".", "/")
        files |= {p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()}
    return files


def closure(path, ignored=frozenset()):
    todo, seen = [path], set()
    while todo:
        current = todo.pop()
        if current not in seen and current not in ignored:
            seen.add(current)
            todo += imports(current)
    return seen


# They say where files lie, how they are written and what a record holds; no number in a result comes from them.
PLUMBING = {
    ROOT / "rlprune" / name
    for name in (
        "__init__.py",
        "errors.py",
        "files.py",
        "_torchvision.py",
        "stages/__init__.py",
        "stages/common.py",
        "stages/jobs.py",
        "stages/record.py",
    )
}


def test_results_stay_until_new_ones_are_there():
    kept = []
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values():
        stage = stage.get("do", stage)
        outs = [*stage.get("metrics", []), *stage.get("plots", []), *stage.get("outs", [])]
        kept += [how for out in outs if isinstance(out, dict) for how in out.values() if not how.get("cache", True)]
    assert len(kept) >= 10
    assert all(how.get("persist") for how in kept)  # else DVC deletes them first, and they are in git


STAGES = ["prepare", "baseline", "search", "finetune", "peers", "study", "tables", "studies", "paper"]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_the_modules_that_it_imports(stage):
    entry = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    declared = entry.get("do", entry)["deps"]
    files = set()
    for dep in declared:
        if dep.startswith("rlprune"):
            path = ROOT / dep
            files |= set(path.glob("*.py")) if path.is_dir() else {path}
    assert files, stage
    assert all(path.exists() for path in files)
    # the reports of studies and of the paper are the stage tables, too
    own = ROOT / "rlprune" / "stages" / f"{'tables' if stage in ('studies', 'paper') else stage}.py"
    parts = {own.with_stem(part) for part in ("search", "finetune")} if stage == "peers" else set()
    other_stages = set((ROOT / "rlprune" / "stages").glob("*.py")) - {own} - parts
    used = closure(own, frozenset(PLUMBING | other_stages)) - PLUMBING
    assert files == used


def test_figures_need_no_torch():
    code = "import sys, rlprune.stages.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_public_names_exist():
    import rlprune

    for name in rlprune.__all__:
        assert getattr(rlprune, name) is not None
    with pytest.raises(AttributeError):
        rlprune.nothing  # noqa: B018


def test_no_machine_path_in_tracked_files():
    listed = subprocess.run(
        ["git", "grep", "-nIE", r"/(root|home|work|tmp)/[a-z]", "--", "."], cwd=ROOT, capture_output=True
    )
    assert (listed.returncode, listed.stdout.decode()) == (1, "")  # 1: searched, and nothing found


def finetuned():
    """(network, share of parameters, epochs) → of the CPU scale's experiments: method → outcome of seed 0."""
    found = {}
    for path in (ROOT / "results/cifar10").glob("*/finetune/metrics.json"):
        metrics = json.loads(path.read_text())
        (budget,) = metrics["budgets"]
        key = metrics["network"].upper(), budget["limit"], metrics["training"]["epochs"]
        outcome = {method: seeds["0"] for method, seeds in metrics["methods"].items() if "0" in seeds}
        found.setdefault(key, {}).update(outcome)
    return {key: outcome for key, outcome in found.items() if outcome}


METHODS = {"layer-wise": "layerwise", "filter-wise": "filterwise", "random": "random", "uniform": "uniform"}


def method_of(said):
    return METHODS[said.split()[0].lower()]


def cells(line):
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def share_of(said):
    return round(float(re.search(r"[\d.]+", said).group()) / 100, 6)


def test_readme_has_the_accuracies_of_the_result_files():
    lines = (ROOT / "README.md").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| network | unpruned |"))
    methods = [method_of(head) for head in cells(lines[begin])[3:]]
    said, network, unpruned = {}, "", ""
    for line in itertools.takewhile(str.strip, lines[begin + 2 :]):
        first, second, share, *accuracies = cells(line)
        network, unpruned = (first.replace("-", "").upper(), second) if first else (network, unpruned)
        said[network, share_of(share)] = unpruned, {m: a for m, a in zip(methods, accuracies, strict=True) if a}
    expected = {}
    for (network, share, _), outcome in sorted(finetuned().items()):  # of two schedules the longer
        (unpruned,) = {f"{of['baseline_accuracy']:.2f}" for of in outcome.values()}
        expected[network, share] = unpruned, {method: f"{of['accuracy']:.2f}" for method, of in outcome.items()}
    assert said == expected


def test_docs_have_the_accuracies_of_the_result_files():
    known, seen = finetuned(), set()
    for section in re.split(r"^## ", (ROOT / "docs/results.md").read_text(), flags=re.MULTILINE):
        title = re.match(r"([\w-]+) on CIFAR-10\n", section)
        network = title.group(1).replace("-", "").upper() if title else None
        if network not in {key[0] for key in known}:
            continue
        share, usual = None, min(epochs for name, _, epochs in known if name == network)
        for line in re.findall(r"^\| (?:parameters ≤|the same).*$", section, flags=re.MULTILINE):
            budget, method, *_, pruned, accuracy, change, _, _ = cells(line)
            longer = re.fullmatch(r"the same, (\d+) epochs", budget)
            share = share if longer else share_of(budget)
            key = network, share, int(longer.group(1)) if longer else usual
            outcome = known[key][method_of(method)]
            gained = outcome["accuracy"] - outcome["baseline_accuracy"]
            found = [f"{outcome['pruned_accuracy']:.2f}", f"{outcome['accuracy']:.2f}", f"{gained:+.2f}"]
            assert [pruned, accuracy, change.replace("−", "-")] == found, line
            seen.add((key, method))
    assert len(seen) == sum(map(len, known.values()))
