"""The pipeline for real: a clone, DVC, papermill, digits; every stage, at a length of seconds."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from rlprune import sources
from rlprune.errors import InputError
from rlprune.files import save_weights, write_json
from rlprune.networks import build
from rlprune.stages import baseline, check, finetune, jobs, prepare, record, search, tables
from rlprune.stages.common import environment, project

ROOT = Path(__file__).resolve().parents[1]
SCHEDULE = {"epochs": 1, "batch_size": 64, "learning_rate": 0.05}
TINY = {
    "datasets": {"digits": {"validation": 0.2, "seed": 0}, "cifar10": {"validation": 0.1, "seed": 0}},
    "suites": {
        "quick": {
            "baseline": {**SCHEDULE, "epochs": 2},
            "search": {"episodes": 4, "evaluation": {"images": 50, "recalibration": 50}},
            "finetune": SCHEDULE,
        },
        "cifar10": {"baseline": SCHEDULE, "search": {"episodes": 4}, "finetune": SCHEDULE},
    },
    "baselines": {"digits_resnet20": {"suite": "quick", "dataset": "digits", "network": "resnet20", "seeds": [0, 1]}},
    "experiments": {
        "digits_resnet20_20": {
            "suite": "quick",
            "baseline": "digits_resnet20",
            "budgets": {"parameters": 0.2},
            "methods": ["layerwise", "uniform"],
            "seeds": [0, 1],
        }
    },
}
TINY |= {"comparisons": {}, "studies": {}}  # DVC wants every group that dvc.yaml makes stages of
NAME = "digits_resnet20_20"


def run(folder, *command, check=True):
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", OMP_NUM_THREADS="1")
    environment.pop("RLPRUNE_DATA", None)
    environment["GIT_CONFIG_GLOBAL"] = os.devnull
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if check and done.returncode:
        raise AssertionError(f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    return done


def git(folder, *command):
    return run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", *command)


def write(folder, params):
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with this working tree's files and one tiny experiment, reproduced by DVC and committed."""
    folder = tmp_path_factory.mktemp("clone") / "rlprune"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if name.startswith(("results/", "reports/", "dvc.lock")) or not (ROOT / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    write(folder, TINY)
    git(folder, "init", "--quiet")
    run(folder, "dvc", "repro", "--quiet", "quick")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "all")
    return folder


def ran(done):
    """Stages that a `dvc repro` ran."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("Running stage")]
    return [line.split("'")[1] for line in lines]


def read(path):
    return json.loads(path.read_text())


def test_every_stage_leaves_what_it_should(clone):
    results = clone / "results" / "quick"
    trained = read(clone / "results/baselines/digits_resnet20/metrics.json")
    assert set(trained["seeds"]) == {"0", "1"}
    assert trained["dataset"] == "digits"
    assert len(trained["sha256"]) == 64
    assert {"torch", "rlprune"} <= set(trained["versions"])
    assert (trained["train_images"], trained["validation_images"], trained["test_images"]) == (1150, 287, 360)
    found = read(results / NAME / "search" / "metrics.json")
    tuned = read(results / NAME / "finetune" / "metrics.json")
    for method in ("layerwise", "uniform"):
        for seed in ("0", "1"):
            cost = found["methods"][method][seed]["costs"]["parameters"]
            assert cost["value"] <= 0.2 * cost["unpruned"]
            assert 0 <= tuned["methods"][method][seed]["accuracy"] <= 100
    names = {path.name for path in (clone / "reports" / "quick").iterdir()}
    assert {"results.md", "results.csv", f"curves_{NAME}.png", f"widths_{NAME}.svg"} <= names
    assert {"accuracy_against_parameters.png", "accuracy_against_parameters.svg"} <= names
    assert not list((clone / "checkpoints").glob("*"))


def test_networks_left_behind_are_within_budget(clone):
    import torch

    full = torch.load(clone / "weights/baselines/digits_resnet20/0.pt", weights_only=True)
    from rlprune import networks

    names = {name for name, _ in networks.build("resnet20").named_parameters()}
    count = lambda state: sum(t.numel() for name, t in state.items() if name in names)  # noqa: E731
    for path in (clone / "weights/quick" / NAME / "finetune").rglob("*.pt"):
        assert count(torch.load(path, weights_only=True)) <= 0.2 * count(full)


def test_second_run_has_nothing_to_do(clone):
    done = run(clone, "dvc", "repro", "quick")
    assert "up to date" in done.stdout
    assert ran(done) == []


def test_a_stage_runs_again_when_what_it_uses_changes_and_not_otherwise(clone):
    def would_run(path, old, new):
        text = path.read_text()
        assert old in text
        try:
            path.write_text(text.replace(old, new, 1))
            return ran(run(clone, "dvc", "repro", "--dry", "quick"))
        finally:
            path.write_text(text)

    finetuned, reported = f"finetune@{NAME}", ["tables@quick", "quick"]
    in_params = lambda old, new: would_run(clone / "params.yaml", old, new)  # noqa: E731
    assert in_params("episodes: 4\n      evaluation", "episodes: 5\n      evaluation")[0] == f"search@{NAME}"
    assert in_params("layerwise\n", "layerwise # the agent\n") == []
    assert would_run(clone / "rlprune/stages/finetune.py", "import Path", "import Path  # new")[0] == finetuned
    assert would_run(clone / "rlprune/figures.py", "import", "import  ")[:1] == reported[:1]
    assert would_run(clone / "README.md", "#", "##") == []
    notebook = clone / "notebooks/01_baseline.ipynb"
    assert would_run(notebook, "Train a baseline", "Train the baseline")[0] == "baseline@digits_resnet20"


def test_tables_are_made_again_from_a_bare_clone_without_weights(clone, tmp_path):
    bare = tmp_path / "bare"
    git(clone, "clone", "--quiet", str(clone), str(bare))
    assert not (bare / "weights").exists()
    done = run(bare, "dvc", "repro", "--allow-missing", "quick")
    assert ran(done) == []
    before = {path.name: path.read_bytes() for path in (bare / "reports/quick").iterdir()}
    shutil.rmtree(bare / "reports/quick")
    done = run(bare, "dvc", "repro", "--allow-missing", "--force", "--single-item", "tables@quick")
    assert ran(done) == ["tables@quick"]
    assert {path.name: path.read_bytes() for path in (bare / "reports/quick").iterdir()} == before
    figures = bare / "rlprune/figures.py"
    figures.write_text(figures.read_text() + "\n# drawn otherwise\n")
    assert ran(run(bare, "dvc", "repro", "--allow-missing", "--dry", "quick"))[0] == "tables@quick"
    assert not (bare / "weights").exists()


def test_dvc_shows_metrics_plots_and_graph(clone):
    assert "digits_resnet20" in run(clone, "dvc", "metrics", "show").stdout
    assert "search@" in run(clone, "dvc", "dag", "quick").stdout
    run(clone, "dvc", "plots", "show", "--out", "executed/plots")
    assert (clone / "executed/plots/index.html").stat().st_size > 1000
    run(clone, "dvc", "metrics", "diff")
    run(clone, "dvc", "plots", "diff", "HEAD", "--out", "executed/plots")


def test_plain_functions_do_the_same_without_dvc_and_papermill(tmp_path, clone):
    params = json.loads(json.dumps(TINY))
    params["baselines"]["digits_resnet20"]["seeds"] = params["experiments"][NAME]["seeds"] = [1]
    write(tmp_path, params)
    prepare.run("digits", tmp_path)
    baseline.run("digits_resnet20", tmp_path, progress=False)
    search.run(NAME, tmp_path, progress=False)
    finetune.run(NAME, tmp_path, progress=False)
    table = tables.run("quick", tmp_path)
    assert list(table["method"]) == ["layerwise", "uniform"]
    assert "| " in tables.show("quick", tmp_path)
    params["experiments"]["later"] = params["experiments"]["later_still"] = params["experiments"][NAME]
    write(tmp_path, params)
    assert set(tables.run("quick", tmp_path)["experiment"]) == {NAME}
    page = (tmp_path / "reports/quick/results.md").read_text()
    assert "- Not run yet: later, later_still; `dvc repro finetune@later` and so on\n" in page
    mine = read(tmp_path / "results/quick" / NAME / "finetune/metrics.json")["methods"]
    (tmp_path / "results/quick/later/finetune").mkdir(parents=True)  # as DVC leaves it before a stage that fails
    assert set(tables.run("quick", tmp_path)["experiment"]) == {NAME}
    assert set(mine) == {"layerwise", "uniform"}


def test_stopped_stage_goes_on(tmp_path, monkeypatch):
    params = json.loads(json.dumps(TINY))
    write(tmp_path, params)
    from rlprune import training

    prepare.run("digits", tmp_path)
    real, calls = training.one_epoch, []

    def stop_in_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "one_epoch", stop_in_third)
    with pytest.raises(KeyboardInterrupt):
        baseline.run("digits_resnet20", tmp_path, progress=False)
    assert not (tmp_path / "results/quick").exists()
    baseline.run("digits_resnet20", tmp_path, progress=False)
    assert len(calls) == 3 + 2  # seed 0 is finished: only seed 1's two epochs
    assert not list((tmp_path / "checkpoints").iterdir())

    ours, done = search._search, []

    def stop_in_third_search(*args):
        done.append(args[0])
        if len(done) == 3:
            raise KeyboardInterrupt
        return ours(*args)

    monkeypatch.setattr(search, "_search", stop_in_third_search)
    with pytest.raises(KeyboardInterrupt):
        search.run(NAME, tmp_path, progress=False)
    assert not (tmp_path / "results/quick").exists()
    shutil.rmtree(tmp_path / "weights/quick")  # as DVC does before it runs a stage again
    stopped = search.run(NAME, tmp_path, progress=False)
    assert done == ["layerwise", "uniform", "layerwise", "layerwise", "uniform"]  # seed 0 is finished
    assert not list((tmp_path / "checkpoints").iterdir())
    monkeypatch.setattr(search, "_search", ours)
    straight = search.run(NAME, tmp_path, progress=False)
    for method in ("layerwise", "uniform"):
        for seed in ("0", "1"):
            pair = [metrics["methods"][method][seed] for metrics in (stopped, straight)]
            assert [pair[0][key] for key in ("reward", "costs")] == [pair[1][key] for key in ("reward", "costs")]
            assert {k: list(v) for k, v in pair[0]["widths"].items()} == {
                k: list(v) for k, v in pair[1]["widths"].items()
            }


def test_all_networks_learn_from_the_same_lessons(tmp_path, monkeypatch):
    params = json.loads(json.dumps(TINY))
    params["suites"]["quick"]["finetune"]["distillation"] = 0.5
    write(tmp_path, params)
    torch.set_num_threads(1)  # as in the processes of runs side by side
    prepare.run("digits", tmp_path)
    for stage, name in ((baseline, "digits_resnet20"), (search, NAME)):
        stage.run(name, tmp_path, progress=False)
    taught = finetune.run(NAME, tmp_path, progress=False)
    lessons = set((tmp_path / "checkpoints/lessons").iterdir())
    assert len(lessons) == 2  # an epoch for each of two seeds, whatever the number of methods
    monkeypatch.setenv("RLPRUNE_JOBS", "2")
    shutil.rmtree(tmp_path / "checkpoints/lessons")
    ours, tasks = finetune.side_by_side, []

    def spied(work, of):
        tasks.append((work.__name__, len(of), len(list((tmp_path / "checkpoints").glob("lessons/*")))))
        return ours(work, of)

    monkeypatch.setattr(finetune, "side_by_side", spied)
    again = finetune.run(NAME, tmp_path, progress=False)
    assert tasks == [("_teach", 2, 0), ("_ahead", 4, 2)]  # before any network learns, all lessons are there
    assert set((tmp_path / "checkpoints/lessons").iterdir()) == lessons
    for method, seeds in taught["methods"].items():
        for seed, outcome in seeds.items():
            assert outcome["accuracy"] == again["methods"][method][seed]["accuracy"]


def test_runs_side_by_side_end_as_one_after_the_other(tmp_path, monkeypatch):
    torch.set_num_threads(1)  # as in the processes that they run in
    outcomes = []
    for count in ("1", "2"):
        folder = tmp_path / count
        folder.mkdir()
        write(folder, TINY)
        monkeypatch.setenv("RLPRUNE_JOBS", count)
        prepare.run("digits", folder)
        stages = [baseline.run("digits_resnet20", folder, progress=False)]
        stages += [stage.run(NAME, folder, progress=False) for stage in (search, finetune)]
        assert not list((folder / "checkpoints").iterdir())
        outcomes.append(stages)
    plain, beside = outcomes
    assert "2 runs side by side" in beside[0]["device"]
    assert "side by side" not in plain[0]["device"]
    for seed in ("0", "1"):
        assert plain[0]["seeds"][seed]["test_accuracy"] == beside[0]["seeds"][seed]["test_accuracy"]
        for method in ("layerwise", "uniform"):
            for stage, what in ((1, "reward"), (2, "accuracy")):
                pair = [stages[stage]["methods"][method][seed][what] for stages in outcomes]
                assert pair[0] == pair[1], (stage, method, seed)


@pytest.mark.parametrize("count", ["0", "two", "-1", "1.5"])
def test_senseless_number_of_jobs_is_one_sentence(count, monkeypatch):
    monkeypatch.setenv("RLPRUNE_JOBS", count)
    with pytest.raises(InputError, match="RLPRUNE_JOBS must be a whole number"):
        jobs.jobs()


def test_a_killed_run_leaves_no_workers(tmp_path):
    shell = f"echo $PPID >> {tmp_path}/workers; sleep 15"  # in a worker, whose number the shell knows as its parent's
    code = "import os; from rlprune.stages.jobs import side_by_side\n"
    code += f"if __name__ == '__main__': side_by_side(os.system, [({shell!r},)] * 2)"
    (tmp_path / "run.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "run.py"], cwd=ROOT, env={**os.environ, "RLPRUNE_JOBS": "2"})
    for _ in range(600):
        workers = (tmp_path / "workers").read_text().split() if (tmp_path / "workers").exists() else []
        if len(workers) == 2:
            break
        time.sleep(0.1)
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    for _ in range(100):
        alive = [worker for worker in workers if alive_still(int(worker))]
        if not alive:
            return
        time.sleep(0.1)
    pytest.fail(f"still at work after 10 s: {alive}")


def alive_still(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


@pytest.mark.parametrize(
    ("group", "key", "value", "fault"),
    [
        ("baselines", "network", "vgg12", "Unknown network 'vgg12'"),
        ("baselines", "dataset", "cifar11", "Unknown datasets? 'cifar11'|Unknown dataset 'cifar11'"),
        ("baselines", "suite", "slow", "Unknown suite 'slow'"),
        ("baselines", "seeds", [], "must be a list of whole numbers"),
        ("baselines", "training", {"epoch": 3}, "Unknown training parameter 'epoch'"),
        ("experiments", "baseline", "nothing", "Unknown baseline 'nothing'"),
        ("experiments", "budgets", {"parameters": 0}, "limit of the budget on parameters"),
        ("experiments", "budgets", {"weight": 0.1}, "Unknown cost 'weight'"),
        ("experiments", "budgets", 0.1, "must be like"),
        ("experiments", "budgets", {"macs": {"share": 0.1}}, "must be like"),
        ("experiments", "budgets", {"macs": {"limit": 2.0}}, "relative=False"),
        ("baselines", "network", "torchvision.resnet19", "Unknown network of torchvision 'resnet19'"),
        ("experiments", "methods", ["magic"], "Unknown method 'magic'"),
        ("experiments", "search", {"episode": 3}, "Unknown search parameter 'episode'"),
        ("experiments", "seeds", [7], r"is trained with \[0, 1\] only"),
        ("experiments", "seed", 0, "unknown key 'seed'"),
        ("experiments", "seeds", [0, 0], "names something twice"),
        ("experiments", "methods", [], "must be a list of names"),
        ("experiments", "search", None, "must map names to values, not None"),
        ("experiments", "search", {"criterion": "mag"}, "Unknown criterion 'mag'"),
        ("experiments", "search", {"fit_budget": "x"}, "Unknown fit_budget 'x'"),
        ("experiments", "search", {"episodes": 0}, "must be a whole number of at least 1, not 0"),
        ("experiments", "search", {"evaluation": {"image": 3}}, "Unknown option of the evaluator 'image'"),
        ("experiments", "search", {"agent": {"lr": 1}}, "Unknown option of the agent 'lr'"),
        ("baselines", "training", {"epochs": "x"}, "epochs must be a whole number, not 'x'"),
        ("datasets", "validation", 2, "must lie between 0 and 1, not 2"),
        ("suites", "finetune", None, "must map names to values, not None"),
        ("datasets", "seed", "x", "datasets.digits.seed in params.yaml must be a whole number of at least 0, not 'x'"),
        ("experiments", "seeds", [-1], "must be a list of whole numbers of at least 0"),
        ("experiments", "seeds", [True], "must be a list of whole numbers of at least 0"),
        ("experiments", "search", {"imagined": "x"}, "imagined of experiment .* a whole number of at least 0, not 'x'"),
        ("experiments", "search", {"imagined": -1}, "imagined of experiment .* a whole number of at least 0, not -1"),
        ("experiments", "search", {"minimum": "x"}, "minimum of experiment .* a whole number of at least 1, not 'x'"),
        ("experiments", "search", {"evaluation": {"images": "many"}}, "images of .* a whole number of at least 1"),
        ("experiments", "search", {"options": {"random": {"criterion": "gatez"}}}, "Unknown criterion 'gatez'"),
        ("experiments", "search", {"options": {"random": 3}}, "random of experiment .* must map names to values"),
    ],
)
def test_bad_entry_is_one_sentence_before_any_work(tmp_path, group, key, value, fault):
    params = json.loads(json.dumps(TINY))
    next(iter(params[group].values()))[key] = value
    write(tmp_path, params)
    with pytest.raises(InputError, match=fault) as error:
        check.run(tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize(
    ("group", "name", "fault"),
    [
        ("experiments", "..", "experiments in params.yaml has the name '..'"),
        ("baselines", "a/b", "baselines in params.yaml has the name 'a/b'"),
        ("studies", "mine@home", "studies in params.yaml has the name 'mine@home'"),
        ("suites", "studies", "suites.studies in params.yaml would share a folder"),
        ("suites", "baselines", "suites.baselines in params.yaml would share a folder"),
    ],
)
def test_names_that_make_no_folder_of_their_own_are_refused(tmp_path, group, name, fault):
    params = json.loads(json.dumps(TINY))
    entries = params.get(group) or {}
    params[group] = {**entries, name: next(iter(entries.values()), {})}
    write(tmp_path, params)
    with pytest.raises(InputError, match=re.escape(fault)):
        check.run(tmp_path)


def test_groups_that_are_none_are_one_sentence(tmp_path):
    write(tmp_path, {**TINY, "experiments": [NAME]})
    with pytest.raises(InputError, match="must hold groups that map names to entries"):
        check.run(tmp_path)
    write(tmp_path, {**TINY, "experiments": {NAME: {"seeds": [0]}}})
    with pytest.raises(InputError, match=f"experiments.{NAME} in params.yaml lacks 'baseline'"):
        tables.run("quick", tmp_path)


def test_several_budgets_and_methods_by_their_entries(tmp_path):
    params = json.loads(json.dumps(TINY))
    experiment = params["experiments"][NAME]
    experiment["budgets"] = {"parameters": 0.3, "macs": {"limit": 8e6, "relative": False}, "peak_memory": 0.9}
    experiment["methods"] = ["layerwise", "random", "evolution", "uniform"]
    experiment["search"] = {"minimum": 2, "multiple": 2, "exclude": ["stem"]}
    params["baselines"]["digits_resnet20"]["seeds"] = experiment["seeds"] = [0]
    write(tmp_path, params)
    assert "in order" in check.run(tmp_path)
    prepare.run("digits", tmp_path)
    baseline.run("digits_resnet20", tmp_path, progress=False)
    searched = search.run(NAME, tmp_path, progress=False)
    assert searched["budgets"][1] == {"name": "macs", "limit": 8e6, "relative": False}
    for method, evaluations in (("layerwise", 4), ("random", 4), ("evolution", 4), ("uniform", 1)):
        found = searched["methods"][method]["0"]
        assert found["evaluations"] == evaluations
        assert found["costs"]["macs"]["value"] <= 8e6
        assert found["costs"]["parameters"]["share"] <= 0.3
        assert found["costs"]["peak_memory"]["share"] <= 0.9
        assert all(kept % 2 == 0 for kept, _ in found["widths"].values())
        assert "stem.0" not in found["widths"]
    finetune.run(NAME, tmp_path, progress=False)
    tables.run("quick", tmp_path)
    page = (tmp_path / "reports" / "quick" / "results.md").read_text()
    assert "CMA-ES" in page
    assert "MACs ≤ 8.00 M" in page


def test_quick_start_notebook_runs_as_it_stands(clone):
    small = {"episodes": "4", "epochs": "1", "latency": "0.9"}
    arguments = [part for name, value in small.items() for part in ("-p", name, value)]
    notebook = "executed/quickstart.ipynb"
    run(clone, "papermill", "--no-progress-bar", "notebooks/00_quickstart.ipynb", notebook, *arguments)
    cells = json.loads((clone / notebook).read_text())["cells"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    assert (clone / "executed" / "slim.onnx").stat().st_size > 10_000


def test_good_entries_pass_the_check(tmp_path):
    write(tmp_path, TINY)
    assert check.run(tmp_path) == "params.yaml: 1 baselines and 1 experiments are in order."
    assert "in order" in check.run(ROOT)


def test_command_line_says_one_sentence_and_fails(tmp_path):
    def shell(*arguments):
        return run(tmp_path, sys.executable, "-m", "rlprune", *arguments, check=False)

    done = shell("baseline", "digits_vgg11")
    assert done.returncode == 2
    assert done.stderr.startswith("rlprune: There is no params.yaml in")
    write(tmp_path, TINY)
    for arguments, sentence in [
        (("baseline", "vgg"), "rlprune: Unknown baseline 'vgg'. Use one of: digits_resnet20."),
        (("search", NAME), "rlprune: There is no "),
        (("fetch", "mnist"), "rlprune: Unknown dataset 'mnist'. Use one of: digits, cifar10, cifar100, svhn."),
        (("show", "quick"), "rlprune: There is no report"),
    ]:
        done = shell(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(sentence)
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_broken_notebook_stage_fails_with_the_sentence_last(clone):
    command = [
        "papermill",
        "--no-progress-bar",
        "notebooks/01_baseline.ipynb",
        "executed/x.ipynb",
        "-p",
        "name",
        "nothing",
    ]
    done = run(clone, *command, check=False)
    assert done.returncode != 0
    assert done.stderr.strip().endswith("InputError: Unknown baseline 'nothing'. Use one of: digits_resnet20.")


def test_changed_dataset_is_noticed(tmp_path):
    write(tmp_path, TINY)
    prepare.run("digits", tmp_path)
    record = tmp_path / "results/data/digits.json"
    record.write_text(record.read_text().replace(read(record)["sha256"], "0" * 64))
    with pytest.raises(InputError, match="not those that results/data/digits.json records: run"):
        prepare.dataset(project(tmp_path), "digits")


@pytest.mark.parametrize("change", [{"seed": 1}, {"validation": 0.3}])
def test_changed_division_is_noticed(tmp_path, change):
    write(tmp_path, TINY)
    prepare.run("digits", tmp_path)
    here = project(tmp_path)
    untrained(here)
    record = here.results("baselines", "digits_resnet20") / "metrics.json"
    write_json(record, prepare.dataset(here, "digits").describe())
    baseline.trained(here, "digits_resnet20", 0, prepare.dataset(here, "digits"))
    params = json.loads(json.dumps(TINY))
    params["datasets"]["digits"].update(change)
    write(tmp_path, params)
    here = project(tmp_path)
    with pytest.raises(InputError, match="or their division .* not those that results/data/digits.json records"):
        prepare.dataset(here, "digits")
    prepare.run("digits", tmp_path)
    with pytest.raises(InputError, match="was trained on other images, .* run `python -m rlprune baseline digits_res"):
        baseline.trained(here, "digits_resnet20", 0, prepare.dataset(here, "digits"))


def untrained(here):
    """Weights where the stage baseline leaves them."""
    for seed in (0, 1):
        save_weights(build("resnet20", 10, seed), here.weights("baselines", "digits_resnet20") / f"{seed}.pt")


def test_a_name_with_a_dot_leaves_no_checkpoints(tmp_path):
    params = json.loads(json.dumps(TINY))
    params["experiments"] = {"a_2.5": {**params["experiments"][NAME], "seeds": [0]}}
    write(tmp_path, params)
    prepare.run("digits", tmp_path)
    untrained(project(tmp_path))
    search.run("a_2.5", tmp_path, progress=False)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("change", "fault"),
    [({"epoch": 1}, "Unknown training parameter 'epoch'"), ({"batch_size": 5000}, "do not fill one")],
)
def test_a_schedule_that_cannot_be_is_named_before_the_search(tmp_path, monkeypatch, change, fault):
    params = json.loads(json.dumps(TINY))
    params["experiments"][NAME]["training"] = change
    write(tmp_path, params)
    prepare.run("digits", tmp_path)
    monkeypatch.setattr(search, "side_by_side", lambda *args: pytest.fail("it was searched"))
    with pytest.raises(InputError, match=fault):
        search.run(NAME, tmp_path, progress=False)


def test_a_search_that_another_process_has_just_finished_is_taken(tmp_path, monkeypatch):
    params = json.loads(json.dumps(TINY))
    params["experiments"][NAME] |= {"methods": ["uniform"], "seeds": [0]}
    write(tmp_path, params)
    prepare.run("digits", tmp_path)
    untrained(project(tmp_path))
    real, finished = search._search, []

    def twice(*args):
        result, path = real(*args), args[-2]
        finished.append(result.save(path.with_suffix("")))  # by the other one, meanwhile
        return result

    monkeypatch.setattr(search, "_search", twice)
    search.run(NAME, tmp_path, progress=False)
    assert len(finished) == 1
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_comparison_is_no_experiment_of_the_stage_search(tmp_path):
    params = json.loads(json.dumps(TINY))
    params["comparisons"] = {"peers": params["experiments"][NAME]}
    write(tmp_path, params)
    with pytest.raises(InputError, match="'peers' is among the comparisons .* run the stage peers"):
        search.run("peers", tmp_path, progress=False)


@pytest.mark.parametrize(("stage", "name"), [(baseline, "digits_resnet20"), (search, NAME), (finetune, NAME)])
def test_data_is_had_before_any_process_starts(tmp_path, monkeypatch, stage, name):
    write(tmp_path, TINY)
    monkeypatch.setattr(stage, "side_by_side", lambda *args: pytest.fail("it was not looked for"))
    with pytest.raises(InputError, match="There is no .*digits.json"):
        stage.run(name, tmp_path, progress=False)


def test_a_single_task_has_all_threads(monkeypatch):
    monkeypatch.setenv("RLPRUNE_JOBS", "2")
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", lambda *args: pytest.fail("a pool was started"))
    assert jobs.side_by_side(print, [("alone",)]) == 1
    assert environment("cpu", 1)["device"].count(f"{torch.get_num_threads()} thread") == 1
    assert "side by side" not in environment("cpu", 1)["device"]


def test_a_latency_is_measured_with_nothing_beside_it(tmp_path, monkeypatch):
    params = json.loads(json.dumps(TINY))
    params["experiments"][NAME]["budgets"] = {"parameters": 0.5, "latency": 0.9}
    write(tmp_path, params)
    prepare.run("digits", tmp_path)
    untrained(project(tmp_path))

    def reached(*args):
        raise KeyboardInterrupt

    monkeypatch.setenv("RLPRUNE_JOBS", "2")
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", lambda *args: pytest.fail("a pool was started"))
    monkeypatch.setattr(search, "_search", reached)
    with pytest.raises(KeyboardInterrupt):
        search.run(NAME, tmp_path, progress=False)


def test_metrics_are_written_last(tmp_path, digits, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        record.write_results(tmp_path, digits, {}, {}, pd.DataFrame({"epoch": [1]}))
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_a_clone_that_has_the_record_of_a_dataset_fetches_its_images(tmp_path, monkeypatch):
    write(tmp_path, TINY)
    prepare.run("digits", tmp_path)
    fetched = []
    monkeypatch.setattr(prepare, "fetch", lambda name, folder: fetched.append((name, folder)))
    prepare.dataset(project(tmp_path), "digits")
    assert fetched == [("digits", sources.data_folder(tmp_path))]
