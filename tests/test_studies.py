"""Studies: their stage for real on digits, and tables whose numbers are known."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlprune import changes, data, studies, trace, training
from rlprune.errors import InputError
from rlprune.evaluate import Evaluator
from rlprune.networks import build
from rlprune.stages import baseline, check, prepare, search, study, tables
from rlprune.stages.common import Project

COMMON = {"needs": "results/data/digits.json", "suite": "tiny", "baseline": "small", "seeds": [0]}
TINY = {
    "datasets": {"digits": {"validation": 0.2, "seed": 0}},
    "suites": {
        "tiny": {
            "baseline": {"epochs": 1, "batch_size": 64, "learning_rate": 0.05},
            "search": {"episodes": 10, "evaluation": {"images": 60, "recalibration": 60}},
            "finetune": {"epochs": 1, "batch_size": 64},
        }
    },
    "baselines": {"small": {"suite": "tiny", "dataset": "digits", "network": "resnet20", "seeds": [0]}},
    "experiments": {
        "first": {
            "suite": "tiny",
            "baseline": "small",
            "budgets": {"parameters": 0.2},
            "methods": ["layerwise"],
            "seeds": [0],
        }
    },
    "studies": {
        "reward": {
            **COMMON,
            "kind": "reward",
            "budgets": {"parameters": 0.3},
            "candidates": 3,
            "rewards": {"default": {}, "raw": {"recalibration": 0}},
            "training": {"epochs": 1, "batch_size": 64},
        },
        "front": {
            **COMMON,
            "kind": "front",
            "budgets": {"parameters": [0.2, 0.5]},
            "points": [0.2, 0.3, 0.5],
            "episodes": 40,
        },
        "transfer": {**COMMON, "kind": "transfer", "budgets": {"macs": 0.3}, "episodes": 10, "begin": "small"},
        "ablation": {
            **COMMON,
            "kind": "ablation",
            "budgets": {"macs": 0.3},
            "episodes": 10,
            "changes": {"default": {}, "filters": {"action": "filterwise"}, "wall": {"fit_budget": "wall"}},
            "seeds": [0, 1],
        },
        "schedule": {
            **COMMON,
            "kind": "schedule",
            "needs": "weights/tiny/first/search",
            "budgets": {"parameters": 0.2},
            "begin": "first",
            "training": {"epochs": 1, "batch_size": 64, "distillation": 0.5},
            "changes": {"default": {}, "longer": {"epochs": 2}, "hotter": {"temperature": 6.0}},
            "seeds": [0, 1],
        },
        "lean": {
            **COMMON,
            "kind": "prunetrain",
            "budgets": {"parameters": 1.0},
            "training": {"epochs": 2, "batch_size": 64},
            "changes": {
                "weak": {"share": 1e-6},
                "strong": {"share": 0.99},
                "idle": {"share": 1e-6, "training": {"learning_rate": 1e-9}},
            },
        },
    },
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    (folder / "params.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    prepare.run("digits", folder)
    baseline.run("small", folder, progress=False)
    search.run("first", folder, progress=False)
    return folder


known = Project.entry


def rows(folder, name):
    return pd.read_csv(folder / "results/studies" / name / "history.csv")


def test_reward_study_judges_and_trains_every_candidate(here, monkeypatch):
    trained, fit = [], study.fit

    def stop_at_third(*args, **more):
        trained.append(1)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return fit(*args, **more)

    monkeypatch.setattr(study, "fit", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        study.run("reward", here, progress=False)
    assert not (here / "results/studies/reward").exists()
    metrics = study.run("reward", here, progress=False)
    assert len(trained) == 4  # the first two were not made again
    assert metrics["study"] == TINY["studies"]["reward"]
    assert not list((here / "checkpoints").iterdir())
    found = rows(here, "reward")
    assert found["candidate"].tolist() == [0, 1, 2]
    assert found["widths"].nunique() == 3
    assert found[["default", "raw", "accuracy"]].stack().between(0, 100).all()
    assert (found[["default seconds", "raw seconds"]] > 0).all(axis=None)
    assert found["MACs kept, not evaluated"].between(0, 100, inclusive="neither").all()


def test_a_stopped_candidate_goes_on_though_it_would_be_recovered_otherwise(here, monkeypatch):
    entry = {**TINY["studies"]["reward"], "candidates": 1, "training": {"epochs": 2, "batch_size": 64}}
    monkeypatch.setattr(
        Project, "entry", lambda self, group, name: entry if name == "stopped" else known(self, group, name)
    )
    trained, one_epoch, candidate = [], training.one_epoch, Evaluator.candidate

    def stop_in_second(*args):
        trained.append(1)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return one_epoch(*args)

    def otherwise(self, masks):  # as another number of threads adds up in another order
        network = candidate(self, masks)
        with torch.no_grad():
            next(network.parameters())[0, 0, 0, 0] += 1e-7
        return network

    monkeypatch.setattr(training, "one_epoch", stop_in_second)
    with pytest.raises(KeyboardInterrupt):
        study.run("stopped", here, progress=False)
    monkeypatch.setattr(Evaluator, "candidate", otherwise)
    study.run("stopped", here, progress=False)
    assert len(trained) == 3
    assert not list((here / "checkpoints").iterdir())


def test_candidates_around_given_widths_stay_near_them(here, monkeypatch):
    sizes = [group.size for group in trace(build("resnet20"), data.load("digits").example)]
    near = {"around": [size // 2 for size in sizes], "rewards": {"default": {}}, "budgets": {"parameters": 0.25}}
    entry = {**TINY["studies"]["reward"], **near}
    monkeypatch.setattr(
        Project, "entry", lambda self, group, name: entry if name == "near" else known(self, group, name)
    )
    study.run("near", here, progress=False)
    shares = rows(here, "near")["widths"].str.split(expand=True).astype(int) / sizes
    assert (shares.max(axis=1) / shares.min(axis=1) < 4.5).all()  # a factor of four, and rounding
    assert shares.std(axis=1).gt(0.02).all()
    entry["around"] = [3]
    with pytest.raises(InputError, match=f"lists 1 widths, and the network has {len(sizes)} groups"):
        study.run("near", here, progress=False)


def test_front_study_spends_equal_evaluations(here):
    study.run("front", here, progress=False)
    found = rows(here, "front")
    spent = found.groupby("search")["evaluations"]
    assert spent.first()["front"] <= 40  # rounded down to whole updates, the last looks at its points among them
    assert spent.first()["front"] > 40 - 10
    assert (found["seconds"] > 0).all()
    assert spent.sum()["separate"] == 40
    assert (found["cost"] <= found["budget"]).all()
    assert sorted(found.loc[found["search"] == "separate", "budget"]) == [20, 50]
    assert len(found[found["search"] == "front"]) == 3


def test_transfer_study_continues_an_agent_that_has_learned(here, monkeypatch):
    begun, there, prune = [], [], study.prune

    def killed_at_third(*args, begin=None, checkpoint=None, **more):
        begun.append(begin)
        there.append(checkpoint.exists())
        if len(begun) == 3:
            raise KeyboardInterrupt
        return prune(*args, begin=begin, checkpoint=checkpoint, **more)

    monkeypatch.setattr(study, "prune", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        study.run("transfer", here, progress=False)
    assert [begin is None for begin in begun] == [True, True, False]
    study.run("transfer", here, progress=False)
    assert there == [False, False, False, True, False]  # what was learned first is not learned again
    assert not list((here / "checkpoints").iterdir())
    found = rows(here, "transfer")
    first = {search: part["reward"].tolist() for search, part in found.groupby("search")}
    assert len(first["fresh"]) == len(first["continued"]) == 10
    assert first["fresh"] != first["continued"]
    for begin in (begun[2], begun[4]):
        assert begin.history["reward"].tolist() == first["fresh"]  # of the same baseline, here


def test_ablation_study_changes_one_thing_at_a_time(here):
    study.run("ablation", here, progress=False)
    found = rows(here, "ablation")
    assert found.groupby(["search", "seed"])["episode"].max().tolist() == [10] * 6
    rewards = {search: part["reward"].tolist() for search, part in found.groupby("search")}
    assert len(set(map(str, rewards.values()))) == 3


def test_what_is_finished_stays_when_a_study_grows(here, monkeypatch):
    made, prune = [], study.prune

    def killed_at_third(*args, seed, **more):
        made.append((seed, more.get("fit_budget", "default")))
        if len(made) == 3:
            raise KeyboardInterrupt
        return prune(*args, seed=seed, **more)

    small = {**TINY["studies"]["ablation"], "changes": {"default": {}, "wall": {"fit_budget": "wall"}}, "seeds": [0, 1]}
    grown = {**small, "changes": {"default": {}, "wall": {"fit_budget": "shrink"}, "none": {"fit_budget": "none"}}}
    entry = dict(small)
    monkeypatch.setattr(
        Project, "entry", lambda self, group, name: entry if name == "grows" else known(self, group, name)
    )
    monkeypatch.setattr(study, "prune", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        study.run("grows", here, progress=False)
    entry |= {**grown, "seeds": [0, 2]}
    made.append(None)
    study.run("grows", here, progress=False)
    expected = [(0, "shrink"), (0, "none"), (2, "default"), (2, "shrink"), (2, "none")]  # a change that changed is new
    assert made == [(0, "default"), (0, "wall"), (1, "default"), None, *expected]
    shutil.rmtree(here / "checkpoints")  # of the change and the seed that the entry no longer has


def test_schedule_study_trains_the_agents_network(here, monkeypatch):
    torch.set_num_threads(1)  # as in the processes of measurements side by side
    study.run("schedule", here, progress=False)
    found = rows(here, "schedule")
    assert found.groupby("schedule")["epochs"].first().to_dict() == {"default": 1, "longer": 2, "hotter": 1}
    assert len(found) == 6
    assert found["accuracy"].between(0, 100).all()
    assert found.groupby("seed")["cross_entropy"].nunique().tolist() == [3, 3]
    lessons = set((here / "checkpoints/lessons").iterdir())
    assert len(lessons) == 4  # two epochs for each of two seeds
    shutil.rmtree(here / "checkpoints/lessons")
    monkeypatch.setenv("RLPRUNE_JOBS", "2")
    ours, tasks = study.side_by_side, []

    def spied(work, of, *rest):
        tasks.append((work.__name__, len(of), len(list((here / "checkpoints").glob("lessons/*")))))
        return ours(work, of, *rest)

    monkeypatch.setattr(study, "side_by_side", spied)
    study.run("schedule", here, progress=False)
    assert tasks == [("_teach", 4, 0), ("_measured", 6, 4)]  # before any network learns, all lessons are there
    assert set((here / "checkpoints/lessons").iterdir()) == lessons
    assert rows(here, "schedule")["accuracy"].tolist() == found["accuracy"].tolist()
    shutil.rmtree(here / "checkpoints/lessons")


def test_prunetrain_study_counts_what_is_saved_of_a_dense_training(here):
    metrics = study.run("lean", here, progress=False)
    found = rows(here, "lean")
    hits = found["accuracy"] / 100 * metrics["validation_images"]  # whole numbers: all are judged by all of the images
    assert hits.tolist() == pytest.approx(hits.round().tolist(), abs=1e-3)
    assert found.groupby("training", sort=False)["epoch"].apply(list).to_dict() == {
        label: [1, 2] for label in ("dense", "weak", "strong", "idle")
    }
    parts = dict(list(found.set_index("epoch").groupby("training")))
    for label in ("dense", "weak"):  # a lasso next to nothing removes nothing, and learns much the same
        assert parts[label][["parameters", "macs"]].eq(100).all(axis=None)
        assert parts[label]["training_macs"].tolist() == pytest.approx([50, 100])
    assert parts["weak"]["accuracy"].tolist() == pytest.approx(parts["dense"]["accuracy"].tolist(), abs=10)
    # its own learning rate teaches little
    assert parts["idle"]["accuracy"].max() < parts["weak"]["accuracy"].max() - 10
    strong = parts["strong"]
    assert strong.loc[1, "macs"] < 100
    assert strong.loc[2, "training_macs"] == pytest.approx(50 + strong.loc[1, "macs"] / 2)
    assert parts["dense"]["seconds"].is_monotonic_increasing
    assert strong["seconds"].is_monotonic_increasing


def test_report_holds_what_has_been_run_and_names_what_has_not(here, tmp_path):
    names = ["reward", "front", "transfer", "ablation", "schedule", "lean"]
    for name in names:
        if not (here / "results/studies" / name).exists():
            study.run(name, here, progress=False)
    params = json.loads(json.dumps(TINY))
    params["studies"]["later"] = params["studies"]["reward"]
    (here / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert check.run(here)
    assert tables.run("studies", here)["study"].tolist() == names
    text = (here / "reports/studies/README.md").read_text()
    assert "Not run yet: `dvc repro study@later`" in text
    for said in ("*default* as it is; *longer* epochs 2;", "*idle* share 1e-06, learning_rate 1e-09."):
        assert said in text
    for name in names:
        assert (here / f"reports/studies/{name}.png").stat().st_size > 5000
        assert f"![{name}]({name}.png)" in text


def test_reward_table_finds_the_better_foreteller():
    draw = np.random.default_rng(0)
    accuracy = draw.uniform(60, 80, 50)
    history = pd.DataFrame({"accuracy": accuracy, "good": accuracy**3, "noise": draw.uniform(0, 1, 50)})
    history["good seconds"], history["noise seconds"] = 2.0, 1.0
    good, noise = studies.reward_table(history).itertuples()
    assert good.rank_correlation == pytest.approx(1)
    assert (good.low, good.high) == pytest.approx((1, 1))
    assert abs(noise.rank_correlation) < 0.4
    assert noise.low < noise.rank_correlation < noise.high
    assert (good.seconds, noise.seconds) == (2, 1)


def test_front_table_compares_at_the_same_budgets_and_with_all_points():
    row = {"seed": 3, "evaluations": 1}
    history = pd.DataFrame(
        [
            {**row, "search": "separate", "budget": 10, "cost": 10, "reward": 50},
            {**row, "search": "separate", "budget": 40, "cost": 40, "reward": 90},
            {**row, "search": "front", "budget": 10, "cost": 10, "reward": 50},
            {**row, "search": "front", "budget": 20, "cost": 20, "reward": 75},
            {**row, "search": "front", "budget": 40, "cost": 40, "reward": 80},
        ]
    )
    (row,) = studies.front_table(history).itertuples()
    separate, front = 50 * math.log(4) + 90 * math.log(2.5), (50 + 75) * math.log(2) + 80 * math.log(2.5)
    assert row.separate == pytest.approx(separate)
    assert row.ratio == pytest.approx(front / separate)
    assert row.ratio_at_same == pytest.approx((50 * math.log(4) + 80 * math.log(2.5)) / separate)


def test_transfer_table_says_when_the_goal_is_reached():
    best = {"fresh": [10, 20, 60], "continued": [50, 61, 70]}
    parts = [
        pd.DataFrame({"search": s, "seed": 0, "episode": [1, 2, 3], "best": best[s]}) for s in ("fresh", "continued")
    ]
    (row,) = studies.transfer_table(pd.concat(parts)).itertuples()
    assert (row.evaluations, row.fresh, row.continued, row.needed) == (3, 60, 70, 2)
    parts[1]["best"] = [1, 2, 3]
    assert studies.transfer_table(pd.concat(parts))["needed"].isna().all()


def test_ablation_table_compares_with_the_default_of_the_same_seed():
    best = {"default": [[10, 20], [30, 50]], "worse": [[10, 12], [30, 40]]}
    history = pd.DataFrame(
        {"search": search, "seed": seed, "episode": episode + 1, "reward": value - 1, "best": value, "seconds": 3.0}
        for search, of_seeds in best.items()
        for seed, values in enumerate(of_seeds)
        for episode, value in enumerate(values)
    )
    default, worse = changes.ablation_table(history).itertuples()
    assert (default.search, default.best, default.difference, default.first_20) == ("default", 35, 0, 26.5)
    assert (worse.best, worse.difference, worse.standard_error, worse.seeds) == (26, -9, 1, 2)


def test_schedule_table_compares_with_the_default_of_the_same_seed():
    found = {"default": [90, 92], "longer": [91, 94]}
    history = pd.DataFrame(
        {"schedule": label, "seed": seed, "epochs": 2 - (label == "default"), "accuracy": accuracy, "seconds": 5.0}
        | {"cross_entropy": 1 - accuracy / 100}
        for label, values in found.items()
        for seed, accuracy in enumerate(values)
    )
    default, longer = changes.schedule_table(history).itertuples()
    assert (default.schedule, default.epochs, default.accuracy, default.difference) == ("default", 1, 91, 0)
    assert (longer.epochs, longer.accuracy, longer.difference, longer.standard_error) == (2, 92.5, 1.5, 0.5)
    assert longer.cross_entropy == pytest.approx(0.075)


def test_prunetrain_table_compares_with_the_dense_training_of_the_same_seed():
    history = pd.DataFrame(
        {"training": label, "seed": seed, "epoch": epoch, "accuracy": accuracy - (2 - epoch)}
        | {"seconds": seconds * epoch, "parameters": 80.0 / epoch, "macs": 90.0 / epoch, "training_macs": 30.0 * epoch}
        for label, seed, accuracy, seconds in [
            ("dense", 0, 90, 10),
            ("lean", 0, 89, 5),
            ("dense", 1, 92, 20),
            ("lean", 1, 89, 15),
        ]
        for epoch in (1, 2)
    )
    dense, lean = changes.prunetrain_table(history).itertuples()
    assert (dense.training, dense.accuracy, dense.difference, dense.time) == ("dense", 91, 0, 100)
    assert (lean.parameters, lean.macs, lean.training_macs, lean.time) == (40, 45, 60, 62.5)
    assert (lean.difference, lean.standard_error, lean.seconds, lean.seeds) == (-2, 1, 20, 2)


def test_prunetrain_legend_fits_whatever_the_trainings_are_called():
    labels = ["dense", "threshold 0.01, share 0.5", "threshold 0.01, peak rate 0.02", "threshold 0.01, share 0.25"]
    history = pd.DataFrame({"training": labels, "seed": 0, "epoch": 1, "accuracy": 90.0, "macs": 80.0})
    figure = changes.prunetrain_figure(history)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(0, 100)), min_size=1, max_size=6), st.floats(1, 100))
def test_hypervolume_counts_what_some_point_dominates(points, most):
    grid = np.linspace(math.log(1), math.log(most), 4001)
    best = [max((r for c, r in points if math.log(c) <= x), default=0) for x in (grid[1:] + grid[:-1]) / 2]
    expected = sum(best) * (grid[1] - grid[0])
    assert studies.hypervolume(points, most, 0) == pytest.approx(expected, abs=0.3 * len(points))


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("reward", {"kind": "magic"}, "Unknown kind of study 'magic'"),
        ("reward", {"candidate": 3}, "unknown key 'candidate'"),
        ("front", {"episodes": 41}, "must divide by its 2 budgets"),
        ("front", {"episodes": 20}, "leave none to learn from: 4 go to each of the 3 points"),
        ("reward", {"seeds": [0, 1]}, "has 2 seeds: a study of rewards needs one"),
        ("reward", {"suite": "none"}, "Unknown suite 'none'"),
        ("transfer", {"begin": "second"}, "Unknown baseline 'second'"),
        ("schedule", {"begin": "second"}, "Unknown experiment 'second'"),
        ("reward", {"training": {"epoch": 1}}, "Unknown training parameter 'epoch'"),
        ("schedule", {"changes": {"default": {}, "odd": {"rate": 1}}}, "Unknown training parameter 'rate'"),
        ("schedule", {"begin": None}, "lacks 'begin'"),
        (
            "schedule",
            {"needs": "weights/baselines/small"},
            "its 'needs' must be weights/tiny/first/search, not weights",
        ),
        ("transfer", {"begin": "other"}, "its 'needs' must be weights/baselines/other, not results"),
        ("front", {"points": None}, "lacks 'points'"),
        ("ablation", {"changes": {"default": {"episodes": 3}}}, "Unknown change to a search 'episodes'"),
        ("lean", {"changes": {"odd": {"seed": 3}}}, "Unknown change to PruneTrain 'seed'"),
        ("lean", {"changes": {"dense": {}}}, "is called 'dense'"),
        ("lean", {"changes": {"x": {"training": {"epochs": 3}}}}, "'x' of studies.lean .* changes the epochs"),
        ("lean", {"changes": {"x": {"training": {"epoch": 3}}}}, "Unknown training parameter 'epoch'"),
        ("reward", {"budgets": {"params": 0.1}}, "Unknown cost 'params'"),
        ("front", {"baseline_seed": 7}, "Unknown seed of baseline small 7"),
        ("schedule", {"changes": {"default": 3}}, "'default' of studies.schedule in params.yaml must map"),
        ("lean", {"training": {"epoch": 1}}, "Unknown training parameter 'epoch'"),
        ("ablation", {"changes": {"x": {"criterion": "magnitud"}}}, "Unknown criterion 'magnitud'"),
        ("ablation", {"changes": {"x": {"action": "filterwize"}}}, "Unknown action 'filterwize'"),
        ("ablation", {"changes": {"x": {"fit_budget": "wal"}}}, "Unknown fit_budget 'wal'"),
        ("ablation", {"changes": {"x": {"agent": {"lr": 1}}}}, "Unknown option of the agent 'lr'"),
        (
            "ablation",
            {"changes": {"x": {"agent": {"gamma": "x"}}}},
            "agent of 'x' of studies.ablation.*: gamma must be a number",
        ),
        ("ablation", {"changes": {"x": {"imagined": -1}}}, "imagined of 'x' .* whole number of at least 0, not -1"),
        ("ablation", {"budgets": {"parameters": [0.1, 0.2]}}, "limit of the budget on parameters"),
        ("ablation", {"episodes": "many"}, "episodes in params.yaml must be a whole number of at least 1, not 'many'"),
        ("transfer", {"episodes": 0}, "must be a whole number of at least 1, not 0"),
        ("reward", {"candidates": "many"}, "candidates in params.yaml must be a whole number of at least 1"),
        ("reward", {"rewards": {"x": {"recalibratoin": 0}}}, "Unknown option of the evaluator 'recalibratoin'"),
        ("reward", {"rewards": {"x": {"ridge": -1}}}, "ridge of 'x' of studies.reward .* at least 0, not -1"),
        ("lean", {"changes": {"x": {"share": 2}}}, r"share of 'x' of studies.lean .* must lie in \(0, 1\), not 2"),
        ("front", {"points": 3}, "must be a list of shares"),
        ("front", {"budgets": {"parameters": 0.1}}, "must be one cost with a list of shares"),
        ("front", {"budgets": {"parameters": [0.2], "macs": [0.2]}}, "must be one cost with a list of shares"),
        (
            "schedule",
            {"baseline": "other"},
            "has the baseline 'other', and 'first', .* has 'small': give both",
        ),
        ("schedule", {"baseline_seed": 1}, "has the baseline_seed 1, and 'first', .* has 0: give both the same"),
        ("schedule", {"budgets": {"parameters": 0.3}}, "has the budgets .* 0.3.*, and 'first', .* 0.2"),
    ],
)
def test_bad_entry_is_one_sentence_before_any_work(tmp_path, name, change, fault):
    params = json.loads(json.dumps(TINY))
    params["baselines"] = {label: {**params["baselines"]["small"], "seeds": [0, 1]} for label in ("small", "other")}
    params["studies"][name].update(change)
    params["studies"][name] = {key: value for key, value in params["studies"][name].items() if value is not None}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    with pytest.raises(InputError, match=fault):
        check.run(tmp_path)


def test_a_broken_result_is_named_with_its_remedy(tmp_path):
    place = tmp_path / "results/studies/some"
    place.mkdir(parents=True)
    head = {"study": {"kind": "ablation", "budgets": {"parameters": 0.1}}, "network": "vgg11", "dataset": "digits"}
    head |= {"source": "here", "device": "a machine"}
    for content, fault in {"{": "is broken", "{}": "lacks 'study'", json.dumps(head): "lacks column 'search'"}.items():
        (place / "history.csv").write_text("a\n1\n")
        (place / "metrics.json").write_text(content)
        with pytest.raises(InputError, match=f"{fault}.*run `dvc repro study@some`"):
            studies.report(["some"], tmp_path / "reports", tmp_path / "results")
        assert not (tmp_path / "reports").exists()
    (place / "history.csv").unlink()
    with pytest.raises(InputError, match="history.csv is missing: run `dvc repro study@some`"):
        studies.report(["some"], tmp_path / "reports", tmp_path / "results")
