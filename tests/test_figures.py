"""Tables and figures from hand-made result files."""

import ast
import json
import os
import re
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text

from rlprune import accuracies, figures, labels, margins, parts, plotting, published, reports, tables
from rlprune.errors import InputError

LAYERS = {f"features.{3 * i}": size for i, size in enumerate([64, 128, 256, 256, 512, 512, 512, 512])}


def write(root, name, stage, metrics, history):
    folder = root / "baselines" / name if stage == "baseline" else root / "quick" / name / stage
    folder.mkdir(parents=True, exist_ok=True)
    head = {"dataset": "digits", "source": "scikit-learn", "sha256": "ab12", "split_seed": 0, "network": "vgg11"}
    head |= {"train_images": 1078, "validation_images": 359, "test_images": 360}
    head |= {"device": "AMD EPYC, 2 threads, bfloat16", "versions": {"torch": "2.13.0", "rlprune": "0.1.0"}}
    (folder / "metrics.json").write_text(json.dumps(head | metrics))
    history.to_csv(folder / "history.csv", index=False)


def epochs(methods=(None,), seeds=(0,), count=4):
    rows = [
        {"seed": s, "epoch": e, "loss": 2 / e + 0.05 * s, "train_accuracy": 100 - 40 / e}
        | {"validation_accuracy": 98 - 30 / e - s, "images_per_second": 2000.0, "seconds": 2.0 * e}
        | ({} if method is None else {"method": method})
        for method in methods
        for s in seeds
        for e in range(1, count + 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def episodes(methods, seeds, budgets, count=40):
    rows = []
    for method in methods:
        for seed in seeds:
            random, best = np.random.default_rng([seed, len(method)]), np.nan
            for e in range(1, count + 1):
                done = 1 - np.exp(-3 * e / count)
                reward = 10 + 80 * done * (0.6 if method == "random" else 1) + random.normal(0, 5)
                best = np.fmax(best, reward) if e > 3 else best
                row = {"method": method, "seed": seed, "episode": e, "steps": 8 * e, "reward": reward, "best": best}
                row |= {"mean_action": 0.7 - 0.3 * done + random.normal(0, 0.03), "seconds": 0.2 * e}
                for i, name in enumerate(budgets):
                    row[name] = 60 - (50 - 15 * i) * done + random.normal(0, 3)
                    row[f"lambda_{name}"] = np.nan if method == "random" else 1 + 2 * done + i
                rows.append(row)
    columns = ["method", "seed", "episode", "steps", "reward", "mean_action", "best", "seconds"]
    return pd.DataFrame(rows, columns=None if rows else columns)


def cost(share, unpruned=9_228_362):
    return {"value": share * unpruned, "unpruned": unpruned, "share": share}


def kept(share, shift):
    return {
        k: [max(1, round(of * share * (1 + 0.3 * ((i + shift) % 3)))), of] for i, (k, of) in enumerate(LAYERS.items())
    }


def make(
    root,
    name="digits_vgg11_10",
    methods=("layerwise", "uniform"),
    seeds=(0,),
    limit=0.1,
    second=None,
    count=40,
    length=8,
):
    """An experiment whose accuracy after fine-tuning is 98, 99, 100, … by seed, less 2 for every further method."""
    budgets = [{"name": "parameters", "limit": limit, "relative": True}]
    budgets += [{"name": "macs", "limit": second, "relative": True}] if second else []
    found, tuned = {}, {}
    for rank, method in enumerate(methods):
        found[method] = {
            str(s): {
                "reward": 87.2,
                "evaluations": 150 if method in ("layerwise", "filterwise", "random") else 1,
                "seconds": 30.0 + 2 * s,
                "widths": kept(limit, rank + s),
                "costs": {"parameters": cost(limit - 0.001 * s), "macs": cost(0.25, 153_000_000)},
            }
            for s in seeds
        }  # fmt: skip
        tuned[method] = {
            str(s): {
                "baseline_accuracy": 99.0,
                "pruned_accuracy": 71.0,
                "accuracy": 98.0 + s - 2 * rank,
                "seconds": 600.0,
            }
            for s in seeds
        }
    agents = [m for m in methods if m in ("layerwise", "filterwise", "random")]
    head = {"baseline": "digits_vgg11", "budgets": budgets, "training": {"epochs": length}}
    history = episodes(agents, seeds, [b["name"] for b in budgets], count)
    write(root, name, "search", head | {"methods": found}, history)
    write(root, name, "finetune", head | {"methods": tuned}, epochs(methods, seeds))
    write(root, "digits_vgg11", "baseline", {"training": {}, "seeds": {str(s): {} for s in seeds}}, epochs(seeds=seeds))
    return name


def load(root, *names):
    return tables.load_results("quick", names, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Results of one experiment: an agent and a reference, three seeds."""
    root = tmp_path_factory.mktemp("figures") / "results"
    make(root, seeds=(0, 1, 2))
    return root


@pytest.fixture(scope="module")
def reported(root):
    folder = root.parent / "reports"
    folder.mkdir()
    (folder / "curves_gone.png").write_text("of an earlier report")
    (folder / "notes.txt").write_text("mine")
    return folder, reports.report("quick", ["digits_vgg11_10"], folder, root)


def test_table_means_and_deviations_over_seeds(root):
    row = tables.results_table(load(root, "digits_vgg11_10")).set_index("method").loc["layerwise"]
    assert row["parameters_kept"] == pytest.approx(9_228_362 * 0.099)
    assert row["parameters_percent"] == pytest.approx(9.9)
    assert (row["macs_kept"], row["macs_percent"]) == (38_250_000, 25)
    assert (row["accuracy_before"], row["accuracy_before_std"], row["accuracy_pruned"]) == (99, 0, 71)
    assert (row["accuracy"], row["accuracy_std"]) == (99, 1)  # 98, 99, 100; divided by n - 1
    assert (row["change"], row["change_std"]) == (0, 1)
    assert (row["evaluations"], row["search_seconds"], row["finetune_seconds"], row["epochs"]) == (150, 32, 600, 8)
    assert (row["budget"], row["seeds"]) == ("parameters ≤ 10 %", "0, 1, 2")


def test_change_is_taken_within_each_seed(tmp_path):
    name = make(tmp_path, methods=("uniform",), seeds=(0, 1))
    file = tmp_path / "quick" / name / "finetune" / "metrics.json"
    content = json.loads(file.read_text())
    content["methods"]["uniform"]["1"]["baseline_accuracy"] = 100.0  # both seeds lose one point
    file.write_text(json.dumps(content))
    row = tables.results_table(load(tmp_path, name)).iloc[0]
    assert (row["change"], row["change_std"]) == (-1, 0)


def test_a_single_seed_has_no_deviation(tmp_path):
    table = tables.results_table(load(tmp_path, make(tmp_path)))
    assert table["accuracy_std"].isna().all()
    assert "±" not in tables.markdown(table).replace("± is", "")
    assert "| **98.0** |" in re.sub(" +", " ", tables.markdown(table))


def test_rows_by_falling_budget_agents_first_best_in_bold(tmp_path):
    names = [
        make(tmp_path, "a", ("uniform", "random", "genetic", "layerwise"), limit=0.1),
        make(tmp_path, "b", ("uniform", "layerwise"), limit=0.2),
        make(tmp_path, "c", ("mystery", "uniform"), limit=0.1, second=0.3),
    ]
    table = tables.results_table(load(tmp_path, *names))
    assert list(zip(table["experiment"], table["method"], strict=True)) == [
        ("b", "layerwise"), ("b", "uniform"),
        ("a", "layerwise"), ("a", "genetic"), ("a", "random"), ("a", "uniform"),
        ("c", "uniform"), ("c", "mystery"),
    ]  # fmt: skip
    assert table["budget"].iloc[-1] == "parameters ≤ 10 %, MACs ≤ 30 %"
    bold = [line.split("|")[4].strip() for line in tables.markdown(table).splitlines() if "**" in line]
    assert bold == ["Uniform widths", "Uniform widths", "Mystery"]


def test_markdown_rounds_for_people(root):
    text = re.sub(" +", " ", tables.markdown(tables.results_table(load(root, "digits_vgg11_10"))))
    row = next(line for line in text.splitlines() if "Layer-wise" in line)
    assert row == (
        "| digits | VGG-11 | parameters ≤ 10 % | Layer-wise agent | 0.91 M (9.90 %) | 38.2 M (25.00 %) | 99.0 ± 0.0 | "
        "71.0 ± 0.0 | **99.0 ± 1.0** | +0.0 ± 1.0 | 150 | 32 s | 8 | 10 min | 0, 1, 2 |"
    )


def test_schedules_of_different_length_are_told_apart(tmp_path):
    names = [make(tmp_path, "a", limit=0.1), make(tmp_path, "long", ("layerwise",), limit=0.1, seeds=(1,), length=24)]
    older = tmp_path / "quick" / make(tmp_path, "older", ("uniform",), limit=0.2) / "finetune" / "metrics.json"
    older.write_text(json.dumps({k: v for k, v in json.loads(older.read_text()).items() if k != "training"}))
    rows = tables.markdown(tables.results_table(load(tmp_path, *names, "older"))).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(row[0], row[9], row[-3]) for row in cells] == [
        ("older", "**98.0**", "–"), ("a", "98.0", "8"), ("long", "**99.0**", "24"), ("a", "96.0", "8"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(922_000, "0.92 M"), (9_228_362, "9.23 M"), (153e6, "153 M"), (1.25e9, "1.25 G"), (12_300, "12.3 k"), (7, "7")],
)
def test_counts(value, text):
    assert labels.count(value) == text


@pytest.mark.parametrize(("value", "text"), [(1.25, "1.2 s"), (31, "31 s"), (99.6, "2 min"), (7300, "2.0 h")])
def test_durations(value, text):
    assert labels.duration(value) == text


def test_absolute_budget_in_percent_of_the_unpruned():
    run = {"costs": {"macs": cost(0.1, 200e6)}}
    budgets = [{"name": "macs", "limit": 20e6, "relative": False}]
    assert tables.limits({"budgets": budgets, "methods": {"uniform": {"0": run}}}) == {"macs": pytest.approx(10)}
    assert labels.budget_label(budgets) == "MACs ≤ 20.0 M"
    absolute = {"latency": 5.0, "onnx_bytes": 2e6, "peak_memory": 512, "mine": 3.5}
    budgets = [{"name": name, "limit": limit, "relative": False} for name, limit in absolute.items()]
    assert labels.budget_label(budgets) == "latency ≤ 5 ms, ONNX file ≤ 2.00 MB, peak memory ≤ 512 B, mine ≤ 3.5"


def test_report_writes_every_file_and_removes_stale_figures(reported):
    folder, table = reported
    stems = ["accuracy_against_parameters", "accuracy_against_macs", "training_digits_vgg11"]
    stems += [f"{figure}_digits_vgg11_10" for figure in ("curves", "progress", "widths")]
    expected = {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg")}
    assert {file.name for file in folder.iterdir()} == expected | {
        "results.csv",
        "results.md",
        "margins.csv",
        "notes.txt",
    }
    assert not list(folder.parent.glob(".reports*"))
    pd.testing.assert_frame_equal(pd.read_csv(folder / "results.csv"), table.round(4), check_dtype=False)
    page = (folder / "results.md").read_text()
    for part in ("scikit-learn", "`ab12`", "AMD EPYC", "torch 2.13.0", "`dvc repro tables@quick`", "1,078 / 359 / 360"):
        assert part in page
    assert sorted(re.findall(r"\]\((.+?)\)", page)) == sorted(f"{stem}.png" for stem in stems)


def test_a_baseline_trained_again_is_told_from_the_one_that_was_pruned(tmp_path):
    name = make(tmp_path, seeds=(0, 1))
    seeds = {"0": {"test_accuracy": 99.0}, "1": {"test_accuracy": 98.4}}
    write(tmp_path, "digits_vgg11", "baseline", {"training": {}, "seeds": seeds}, epochs(seeds=(0, 1)))
    assert reports.other_baselines(load(tmp_path, name)) == []  # an experiment may begin with one seed of several
    seeds["0"]["test_accuracy"] = 99.3
    write(tmp_path, "digits_vgg11", "baseline", {"training": {}, "seeds": seeds}, epochs(seeds=(0, 1)))
    (line,) = reports.other_baselines(load(tmp_path, name))
    assert "another training of digits_vgg11 (99.00 % of the test images)" in line
    assert "(98.40, 99.30 %)" in line
    reports.report("quick", [name], tmp_path / "reports", tmp_path)
    assert line in (tmp_path / "reports" / "results.md").read_text()


def test_report_again_gives_the_same_bytes(reported, root, tmp_path):
    reports.report("quick", ["digits_vgg11_10"], tmp_path, root)
    files = [file for file in reported[0].iterdir() if file.name != "notes.txt"]
    assert all((tmp_path / file.name).read_bytes() == file.read_bytes() for file in files)


def test_the_last_bits_of_a_layout_do_not_show(tmp_path, monkeypatch):
    solve = ConstrainedLayoutEngine.execute

    def saved(name, noise):
        def noisy(self, fig):
            margins = solve(self, fig)
            for axis in fig.axes:
                axis.set_position([number + noise for number in axis.get_position(original=True).bounds])
                axis.set_in_layout(True)
            return margins

        monkeypatch.setattr(ConstrainedLayoutEngine, "execute", noisy)
        figure = figures.training_curves(epochs())
        figures.save(figure, tmp_path / name)
        return figure, [(tmp_path / f"{name}.{suffix}").read_bytes() for suffix in ("png", "svg")]

    figure, exact = saved("exact", 0.0)
    assert saved("noisy", 1e-14)[1] == exact
    before = figure.axes[0].get_position().bounds
    figure.set_size_inches(4, 4)
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().bounds != before  # and it is laid out again when it must be


def test_a_failing_report_leaves_the_old_one(tmp_path, monkeypatch):
    name = make(tmp_path / "results", methods=("uniform",))
    folder = tmp_path / "reports"
    folder.mkdir()
    (folder / "results.md").write_text("old")
    monkeypatch.setattr(reports, "widths", lambda metrics: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reports.report("quick", [name], folder, tmp_path / "results")
    assert [file.name for file in folder.iterdir()] == ["results.md"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["reports", "results"]


def test_a_killed_report_leaves_what_goes_next_time(tmp_path, monkeypatch):
    folder = tmp_path / "quick"
    folder.mkdir()
    (folder / "stale.md").touch()
    for name in (".quick.dead", ".quick.busy"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / ".quick.dead", (0, 0))

    def renew():
        with reports.renewed(folder, re.compile(r".*\.md")) as partial:
            (partial / "new.md").touch()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            renew()
    assert [file.name for file in folder.iterdir()] == ["stale.md"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [".quick.busy", "quick"]
    renew()
    assert [file.name for file in folder.iterdir()] == ["new.md"]


def test_report_without_an_agent_has_no_curves(tmp_path):
    name = make(tmp_path / "results", methods=("uniform", "taylor"))
    reports.report("quick", [name], tmp_path / "reports", tmp_path / "results")
    assert not list((tmp_path / "reports").glob("curves_*"))
    assert "curves_" not in (tmp_path / "reports" / "results.md").read_text()


@pytest.mark.parametrize("stage", ["search", "finetune"])
def test_a_history_newer_than_its_metrics_is_refused(tmp_path, stage):
    name = make(tmp_path)
    path = tmp_path / "quick" / name / stage / "history.csv"
    history = pd.read_csv(path)
    pd.concat([history, history.assign(seed=1)]).to_csv(path, index=False)
    with pytest.raises(InputError, match=rf"history.csv tells of layerwise \(seed 1\), .*python -m rlprune {stage}"):
        load(tmp_path, name)


def test_missing_file_says_what_to_run(tmp_path):
    name = make(tmp_path)
    file = tmp_path / "quick" / name / "finetune" / "metrics.json"
    file.unlink()
    with pytest.raises(InputError) as error:
        load(tmp_path, name)
    remedy = "run `dvc repro tables@quick` or `python -m rlprune finetune digits_vgg11_10`"
    remedy += " (`python -m rlprune peers digits_vgg11_10` if it is a comparison)."
    assert str(error.value) == f"Result file {file} is missing: {remedy}"


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("metrics.json", '{"dataset": ', "is broken"),
        ("metrics.json", "[]", "lacks 'dataset'"),
        ("history.csv", "", "is broken"),
        ("history.csv", "method,seed\n", "lacks column 'steps'"),
        ("history.csv", "steps,reward,best,method,seed\n8,90.1,90.1,layerwise,0\n16,91", "is cut off"),
    ],
)
def test_broken_file_is_named(tmp_path, file, content, sentence):
    name = make(tmp_path)
    (tmp_path / "quick" / name / "search" / file).write_text(content)
    with pytest.raises(InputError, match=f"{file} {sentence}.*dvc repro tables@quick"):
        load(tmp_path, name)


def test_finetuning_of_another_search_is_refused(tmp_path):
    name = make(tmp_path, methods=("layerwise", "uniform"))
    file = tmp_path / "quick" / name / "finetune" / "metrics.json"
    content = json.loads(file.read_text())
    del content["methods"]["uniform"]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"differ in uniform \(seed 0\)"):
        load(tmp_path, name)


def solid(axis):
    """The curves of a panel: neither dots nor the budget."""
    return [line for line in axis.get_lines() if line.get_linestyle() != "None" and len(line.get_xdata()) > 2]


def test_search_curves_mean_over_seeds_with_band():
    history = episodes(["layerwise"], [0, 1, 2], ["parameters"])
    history["lambda_parameters"] = history["seed"] + history["episode"]
    reward, cost_panel, multiplier, action = figures.search_curves(history, {"parameters": 10.0}).axes
    (line,) = solid(multiplier)
    assert np.allclose(line.get_xdata(), 8 * np.arange(1, 41))
    assert np.allclose(line.get_ydata(), 1 + np.arange(1, 41))
    (band,) = multiplier.collections
    assert np.allclose(band.get_paths()[0].vertices[:, 1].max(), 1 + 40 + 1)  # seeds 0, 1, 2: deviation 1
    assert [line.get_ydata()[0] for line in cost_panel.get_lines() if len(line.get_xdata()) == 2] == [10.0]
    assert len(solid(reward)) == 2  # running mean, best within budget
    assert action.get_ylim() == (0, 1)


def test_search_curves_smooth_and_skip_methods_without_episodes():
    history = episodes(["layerwise"], [0], ["parameters"])
    history["reward"] = np.where(history["episode"] == 20, 50.0, 0.0)
    history.loc[len(history)] = {"method": "uniform", "seed": 0, "episode": 1, "steps": 8, "reward": 30.0}
    figure = figures.search_curves(history, {"parameters": 10.0})
    assert solid(figure.axes[0])[0].get_ydata().max() == pytest.approx(10)  # over 5 episodes
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "Layer-wise agent" in labels
    assert "Uniform widths" not in labels


def test_search_curves_colour_two_budgets():
    budgets = {"parameters": 10.0, "macs": 30.0}
    figure = figures.search_curves(episodes(["layerwise", "random"], [0], budgets), budgets)
    _, cost_panel, multiplier, _ = figure.axes
    assert len({line.get_color() for line in solid(cost_panel)}) == 2
    assert len(solid(multiplier)) == 2  # random search has no multiplier
    assert {"Parameters", "MACs"} <= {text.get_text() for text in figure.legends[0].get_texts()}


def test_search_curves_of_one_live_search_and_of_none():
    live = episodes(["layerwise"], [0], ["parameters"]).drop(columns=["method", "seed"])
    assert solid(figures.search_curves(live, {"parameters": 10.0}).axes[0])
    empty = figures.search_curves(episodes([], [0], []), {"parameters": 10.0})
    assert all(axis.texts[0].get_text() == "none in this search" for axis in empty.axes)


def test_widths_show_the_mean_over_seeds_before_the_unpruned(root):
    metrics = load(root, "digits_vgg11_10").searches["digits_vgg11_10"].metrics
    layerwise, uniform = figures.widths(metrics).axes
    heights = [bar.get_height() for bar in layerwise.patches]
    assert heights[: len(LAYERS)] == list(LAYERS.values())
    runs = metrics["methods"]["layerwise"].values()
    assert heights[len(LAYERS) :] == pytest.approx([np.mean([r["widths"][n][0] for r in runs]) for n in LAYERS])
    assert [label.get_text() for label in uniform.get_xticklabels()] == [str(3 * i) for i in range(8)]


def test_widths_of_forty_layers_do_not_overlap():
    names = [f"stages.{i // 2}.convs.{i % 2}.0" for i in range(40)]
    run = {"widths": {name: [8, 64] for name in names}, "costs": {"parameters": cost(0.1)}}
    figure = figures.widths({"methods": {m: {"0": run} for m in ("layerwise", "random", "uniform")}})
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[-1].get_xticklabels()]
    assert len(boxes) == 40
    assert all(a.x1 <= b.x0 for a, b in pairwise(boxes))


def test_accuracy_against_a_cost(root):
    table = tables.results_table(load(root, "digits_vgg11_10"))
    both = pd.concat([table, table.assign(network="resnet18", accuracy_std=np.nan)])
    figure = figures.accuracy_against(both)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["ResNet-18 on digits", "VGG-11 on digits"]
    axis = figure.axes[1]
    assert axis.get_xscale() == "log"
    points = {tuple(c.lines[0].get_xydata()[0].round(6)) for c in axis.containers}
    assert points == {(9.9, 99.0), (9.9, 97.0)}
    bars = [segment for c in axis.containers for segment in c.lines[2][0].get_segments()]
    assert sorted(bar[:, 1].tolist() for bar in bars) == [[96, 98], [98, 100]]

    against_macs = figures.accuracy_against(both, "macs").axes[1]
    assert {round(c.lines[0].get_xydata()[0][0], 6) for c in against_macs.containers} == {25.0}
    assert "MACs" in against_macs.get_xlabel()


def test_what_others_report_stands_beside_the_same_network(root):
    digits = tables.results_table(load(root, "digits_vgg11_10"))
    cifar = digits.assign(dataset="cifar10", network="vgg16")

    def labels(table, cost):
        figure = figures.accuracy_against(table, cost)
        return {text.get_text() for text in figure.findobj(Text)}, figure.axes[0]

    texts, axis = labels(cifar, "parameters")
    assert {"CHIP", "FSM", "DECORE", "Reported elsewhere"} <= texts
    assert [text.get_text() for text in axis.texts] == ["CHIP", "FSM", "DECORE"]  # each once, however many its points
    drawn = {tuple(line.get_xdata()) for line in axis.lines if line.get_marker() == accuracies.REPORTED["marker"]}
    assert drawn == {(16.7, 12.7), (13.7, 9.4), (1.7,)}
    low, high = axis.get_xlim()
    assert low < 1.7
    assert high > 16.7
    for table, cost in ((cifar, "macs"), (digits, "parameters"), (digits.assign(dataset="cifar10"), "parameters")):
        assert not {"CHIP", "Reported elsewhere"} & labels(table, cost)[0]

    lines = published.beside(cifar)
    chip = next(line for line in lines if "| 16.7 % | CHIP" in line)
    assert "93.96 → 93.72" in chip
    assert "Layer-wise agent, 9.9 %: 99.00 → 99.00 (+0.00)" in chip  # the better one of the two methods
    assert next(line for line in lines if "FSM" in line and "9.4 %" in line).endswith("| – |")  # ours are larger
    assert published.beside(digits) == []


def test_a_family_is_named_shortly():
    assert accuracies.together(["peers_vgg11_20", "peers_vgg11_10", "other_5"]) == "peers_vgg11_20, _10, other_5"
    assert accuracies.together(["alone"]) == "alone"


def test_points_of_one_budget_are_never_joined(tmp_path):
    names = [
        make(tmp_path, "v_20", limit=0.2),
        make(tmp_path, "v_10"),
        make(tmp_path, "v_10_gates", methods=("layerwise",)),
    ]
    table = tables.results_table(load(tmp_path, *names))

    def drawn(*experiments):
        """The experiments' lines: method, budgets joined, fill of the marker; and the legend."""
        figure = figures.accuracy_against(table[table["experiment"].isin(experiments)])
        lines = [container.lines[0] for container in figure.axes[0].containers]
        methods = {labels.method_style(method)[0]: method for method in ("layerwise", "uniform")}
        shown = {(methods[x.get_color()], tuple(map(round, x.get_xdata())), x.get_fillstyle()) for x in lines}
        return shown, {text.get_text() for text in figure.legends[0].get_texts()}

    lines, legend = drawn("v_20", "v_10")
    assert lines == {("layerwise", (10, 20), "full"), ("uniform", (10, 20), "full")}
    assert not legend & {"v_20, _10", "v_10"}
    again, legend = drawn(*names)
    assert again == lines | {("layerwise", (10,), "none")}
    assert {"v_20, _10", "v_10_gates"} <= legend
    other = table[table["experiment"] == "v_10"].assign(network="vgg16", experiment="other_10")
    two = figures.accuracy_against(pd.concat([table, other]))  # whose markers are filled, too
    legend = {text.get_text() for text in two.legends[0].get_texts()}
    assert "v_10_gates" in legend
    assert "v_20, _10" not in legend
    table["experiment"] = table["experiment"].map({"v_20": "one", "v_10": "two", "v_10_gates": "three"})
    apart, _ = drawn("one", "two", "three")  # names that tell of no family
    assert {budgets for _, budgets, _ in apart} == {(10,), (20,)}


def far_below(root):
    """A table of three methods at two budgets, of which one keeps 25 % accuracy."""
    names = [
        make(root, f"v_{limit:.0f}", ("layerwise", "uniform", "batchnorm"), (0, 1), limit / 100) for limit in (20, 10)
    ]
    table = tables.results_table(load(root, *names))
    lost = table["method"] == "batchnorm"
    return table.assign(accuracy=table["accuracy"].mask(lost, 25.14), accuracy_std=table["accuracy_std"].mask(lost, 3))


def test_accuracies_far_below_the_best_stand_at_the_edge_with_their_value(tmp_path):
    table = far_below(tmp_path)
    (axis,) = figures.accuracy_against(table).axes
    low, _ = axis.get_ylim()
    assert low > 90  # 96.5 is the lowest of the others
    assert (
        min(axis.get_yticks()) > axis.patches[0].get_corners()[:, 1].max() > low
    )  # no ticks where nothing is to scale
    assert [text.get_text() for text in axis.texts] == ["▾ 25.1", "▾ 25.1"]
    (colour, marker), strip = labels.method_style("batchnorm"), axis.patches[0].get_corners()[:, 1]
    at_edge = [line for line in axis.lines if (line.get_color(), line.get_marker()) == (colour, marker)]
    assert sum(strip.min() < line.get_ydata()[0] < strip.max() for line in at_edge) == 2

    panels = figures.accuracy_by_method(table).axes
    assert len(panels) == 2
    for panel in panels:
        assert panel.get_xlim()[0] > 90
        assert [text.get_text() for text in panel.texts] == ["◂ 25.1"]
        assert panel.texts[0].get_position()[1] == 0  # the row of its method
    near = table.assign(accuracy=table["accuracy"].mask(table["method"] == "batchnorm", 88.0))
    for figure in (figures.accuracy_against(near), figures.accuracy_by_method(near)):
        assert not any(axis.texts or axis.patches for axis in figure.axes)  # 10.5 below the best: to scale
        assert {88.0} <= {y for axis in figure.axes for line in axis.lines for xy in line.get_xydata() for y in xy}


def test_values_at_the_edge_do_not_overlap(tmp_path):
    table = far_below(tmp_path)
    lost = table[table["method"] == "batchnorm"]
    more = pd.concat([table, lost.assign(method="taylor", parameters_percent=lost["parameters_percent"] * 1.02)])
    figure = figures.accuracy_against(more)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(figure.axes[0].get_window_extent().x1 >= box.x1 - 1 for box in boxes)


def test_a_budget_at_which_all_methods_lose_is_to_scale(tmp_path):
    table = far_below(tmp_path)
    lost = (table["experiment"] == "v_10") & (table["method"] != "batchnorm")
    (axis,) = figures.accuracy_against(table.assign(accuracy=table["accuracy"].mask(lost, 60.0))).axes
    assert 48 <= axis.get_ylim()[0] < 60
    assert len(axis.texts) == 2


def test_experiments_have_accuracy_axes_of_their_own(tmp_path):
    table = far_below(tmp_path)
    close = table["experiment"] == "v_10"
    accuracy = table["accuracy"].mask(close, 85.0 + 0.1 * table["method"].map(len) / 10)  # 85.07 to 85.09
    before = table["accuracy_before"].mask(close, 91.1)
    table = table.assign(accuracy=accuracy, accuracy_std=np.nan, accuracy_before=before)
    one, two = figures.accuracy_by_method(table).axes
    assert one.get_xlim() != two.get_xlim()
    assert 1 <= np.diff(two.get_xlim())[0] < 2  # differences show, noise is not magnified
    assert [text.get_text() for text in two.texts] == ["unpruned\n91.1 ▸"]  # it would press all into a column
    assert not any(line.get_linestyle() == ":" for line in two.lines)
    assert any(line.get_linestyle() == ":" for line in one.lines)


def test_curves_of_the_published_search_claim_no_more_than_is_true_of_all():
    history = episodes(["layerwise", "paper_coarse"], [0], ["parameters"])

    def words(*methods):
        part = history[history["method"].isin(methods)]
        figure, progress = figures.search_curves(part, {"parameters": 10.0}), figures.search_progress(part)
        shown = [(axis.get_title(loc="left"), axis.get_ylabel()) for axis in figure.axes]
        return shown, progress.axes[0].get_ylabel(), figure.legends[0].get_title().get_text()

    shown, progress, note = words("layerwise", "paper_coarse")
    assert shown[0] == ("Reward", "Reward of its own search (%)")
    assert shown[1] == ("Cost asked for", "Share of unpruned (%)")
    assert shown[3] == ("Mean action", "Share kept")
    assert progress == "Reward of its own search (%)"
    assert "training images" in note
    shown, progress, note = words("layerwise")
    assert [label for _, label in shown][::3] == ["Accuracy in search (%)", "Share of filters kept"]
    assert shown[1][0] == "Parameters asked for"
    assert (progress, note) == ("Accuracy in search (%)", "")


def test_live_curves_are_drawn_in_place(monkeypatch):
    import IPython.display

    shown, updates = [], []

    class Handle:
        def update(self, figure):
            updates.append(figure)

    def display(figure, display_id):
        assert display_id is True
        shown.append(figure)
        return Handle()

    drawn, curves = [], figures.search_curves
    monkeypatch.setattr(figures, "search_curves", lambda *given: drawn.append(curves(*given)) or drawn[-1])
    monkeypatch.setattr(IPython.display, "display", display)
    live, history = figures.Live(), episodes(["layerwise"], (0,), ["parameters"], count=6)
    live(history.head(2).drop(columns=["method", "seed"]), {"parameters": 10.0})
    for count in (4, 6):
        live(history.head(count), {"parameters": 10.0})
    assert len(shown) == 1
    assert len(updates) == 2
    # as a picture, which shows itself in any notebook
    assert all(each.data.startswith(b"\x89PNG") for each in (*shown, *updates))
    assert [max(line.get_xdata().max() for line in f.axes[0].lines) for f in drawn[1:]] == [4 * 8, 6 * 8]


def test_histories_that_cannot_be_told_apart_are_named():
    history = episodes(["layerwise"], (0,), ["parameters"])
    with pytest.raises(InputError, match="comes twice: tell histories apart"):
        figures.search_progress(pd.concat([history, history]))
    with pytest.raises(InputError, match="no progress in a history without 'episode'"):
        figures.search_progress(pd.DataFrame({"epoch": [1, 2], "loss": [2.0, 1.0]}))


def test_a_figure_named_with_its_suffix_is_saved_under_that_name(tmp_path):
    figures.save(figures.search_progress(episodes(["layerwise"], (0,), ["parameters"])), tmp_path / "a.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_margins_are_taken_seed_by_seed_and_told_from_the_spread(tmp_path):
    name = make(tmp_path, methods=("layerwise", "uniform"), seeds=(0, 1, 2))  # accuracies 98, 99, 100 and 2 less
    file = tmp_path / "quick" / name / "finetune" / "metrics.json"
    metrics = json.loads(file.read_text())
    for seed, accuracy in {"0": 96.5, "1": 97.0, "2": 97.5}.items():
        metrics["methods"]["uniform"][seed]["accuracy"] = accuracy
    file.write_text(json.dumps(metrics))
    reward, accuracy = margins.agents_margins(load(tmp_path, name)).itertuples()
    assert (reward.quantity, reward.difference, reward.standard_error) == ("reward", 0, 0)
    assert (accuracy.agent, accuracy.other, accuracy.seeds) == ("layerwise", "uniform", 3)
    assert accuracy.difference == pytest.approx(2.0)
    assert accuracy.standard_error == pytest.approx(0.5 / 3**0.5)  # of 1.5, 2 and 2.5
    lines = margins.spreads(margins.agents_margins(load(tmp_path, name)))
    assert "| Uniform widths | **+2.00 ± 0.29** |" in lines
    assert "| Uniform widths | +0.00 ± 0.00 |" in lines
    assert margins.spreads(margins.agents_margins(load(tmp_path, make(tmp_path, "one", seeds=(0,))))) == []
    two = make(tmp_path, "two", methods=("layerwise", "uniform"), seeds=(0, 1))  # which agree by chance
    lines = margins.spreads(margins.agents_margins(load(tmp_path, two)))
    assert "| Uniform widths | +2.00 ± 0.00 |" in lines


def test_parts_of_an_experiment_stand_in_one_table(tmp_path):
    whole = make(tmp_path, methods=("layerwise", "uniform"), seeds=(0,))
    seeds = make(tmp_path, "more_seeds", methods=("layerwise", "uniform"), seeds=(1, 2))
    methods = make(tmp_path, "more_methods", methods=("smof",), seeds=(0,))
    file = tmp_path / "quick" / methods / "search" / "metrics.json"
    file.write_text(file.read_text().replace("AMD EPYC, 2 threads", "another machine"))
    both = {seeds: whole, methods: whole}
    reports.report("quick", [seeds, whole, methods], tmp_path / "reports", tmp_path, parts=both)
    table = pd.read_csv(tmp_path / "reports/results.csv").set_index("method")
    assert table["experiment"].tolist() == [whole] * 3
    assert table["seeds"].to_dict() == {"layerwise": "0, 1, 2", "smof": "0", "uniform": "0, 1, 2"}
    assert table.loc["layerwise", "accuracy"] == 99  # the mean of 98, 99 and 100
    margin = pd.read_csv(tmp_path / "reports/margins.csv").set_index(["quantity", "other"])
    assert margin.loc[("accuracy", "uniform"), ["difference", "seeds"]].tolist() == [2, 3]
    assert "another machine" in (tmp_path / "reports/results.md").read_text()
    assert not list((tmp_path / "reports").glob(f"*{seeds}*"))  # a part has no figures of its own


@pytest.mark.parametrize(
    ("change", "fault"),
    [({"seeds": (0,)}, "both hold layerwise with seed 0"), ({"seeds": (1,), "limit": 0.2}, "differ in 'budgets'")],
)
def test_parts_that_do_not_fit_together_are_refused(tmp_path, change, fault):
    whole, part = make(tmp_path), make(tmp_path, "part", **change)
    with pytest.raises(InputError, match=f"part/search and .*{whole}/search are parts of one experiment and {fault}"):
        parts.joined(load(tmp_path, whole, part), {part: whole})


def test_parts_may_lack_settings_that_came_later(tmp_path):
    whole, part = make(tmp_path), make(tmp_path, "part", seeds=(1,))
    for name, training in {whole: {"epochs": 4}, part: {"epochs": 4, "average": 0.0}}.items():
        file = tmp_path / "quick" / name / "finetune" / "metrics.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"training": training}))
    assert list(parts.joined(load(tmp_path, whole, part), {part: whole}).finetunes) == [whole]


def test_a_finetuning_of_another_search_is_refused(tmp_path):
    name = make(tmp_path, methods=("uniform",))
    search, tuned = (tmp_path / "quick" / name / stage / "metrics.json" for stage in ("search", "finetune"))
    metrics = json.loads(tuned.read_text())
    metrics["methods"]["uniform"]["0"]["widths"] = json.loads(search.read_text())["methods"]["uniform"]["0"]["widths"]
    tuned.write_text(json.dumps(metrics))
    load(tmp_path, name)
    next(iter(metrics["methods"]["uniform"]["0"]["widths"].values()))[0] += 1
    tuned.write_text(json.dumps(metrics))
    with pytest.raises(InputError, match="of another network than the search beside it left with uniform"):
        load(tmp_path, name)


def test_what_only_some_methods_have_stands_beside_the_table(tmp_path):
    name = make(tmp_path, methods=("smof", "prunetrain", "uniform"))
    assert margins.extras(load(tmp_path, name)) == []
    file = tmp_path / "quick" / name / "search" / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["methods"]["smof"]["0"]["kernels"] = {"1×1": 3, "3×3": 5}
    metrics["methods"]["prunetrain"]["0"]["training_macs"] = {"value": 3e12, "dense": 5e12}
    file.write_text(json.dumps(metrics))
    history = pd.read_csv(file.with_name("history.csv"))
    spent = [
        (method, 0, epoch) for method, count in {"smof": 4, "prunetrain": 6}.items() for epoch in range(1, count + 1)
    ]
    history = pd.concat([history, pd.DataFrame(spent, columns=["method", "seed", "epoch"])])
    history.to_csv(file.with_name("history.csv"), index=False)
    reports.report("quick", [name], tmp_path / "reports", tmp_path)
    page = (tmp_path / "reports/results.md").read_text()
    assert "common to all: PruneTrain (6), SMOF (4)." in page
    assert "SMOF, seed 0: kernels 3 of 1×1, 5 of 3×3." in page
    assert "PruneTrain, seed 0: 60.0 % of the MACs" in page


def test_progress_leaves_no_method_out():
    history = episodes(["layerwise", "random"], (0, 1), ["parameters"], count=6)
    history.loc[(history["method"] == "random") & (history["seed"] == 1), "best"] = np.nan  # never within budget
    figure = figures.search_progress(history, {"layerwise": 70.0, "random": 42.0, "hfp": 98.6})
    curve, only, across = figure.axes[0].lines
    assert len(curve.get_xdata()) > 2
    assert (only.get_ydata()[0], across.get_ydata()[0]) == (98.6, 42.0)
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == ["Layer-wise agent", "HFP (98.6)", "Random search (42.0 ↓)"]


def test_progress_is_to_scale_where_searches_end():
    history = episodes(["layerwise", "random"], (0,), ["parameters"], count=6)
    history["best"] = np.where(history["method"] == "random", 30.0, 90.0)
    history.loc[history["episode"] == 1, "best"] = 5.0
    axis = figures.search_progress(history, {"taylor": 28.0, "batchnorm": 20.0}).axes[0]
    assert axis.get_ylim()[0] == 27.0  # the lower search in sight, but not where it began
    assert figures.search_progress(history.assign(best=85.0), {"taylor": 84.0}).axes[0].get_ylim()[0] > 80
    alone = figures.search_progress(history.iloc[:0], {"taylor": 84.0, "batchnorm": 20.0})
    assert alone.axes[0].get_ylim()[0] < 20


def test_curves_of_many_methods_are_told_apart_without_colour():
    figure = figures.search_curves(episodes(["filterwise", "evolution"], (0,), ["parameters"]), {"parameters": 10.0})
    first, second, *_ = figure.legends[0].legend_handles
    assert first.get_linestyle() != second.get_linestyle()


def test_progress_is_the_mean_of_the_best_with_its_confidence_interval():
    history = episodes(["layerwise", "random"], (0, 1, 2), ["parameters"], count=6)
    history["best"] = history["seed"] + 10 * history["episode"]  # at every evaluation e: 10 e, + 1 and + 2
    history.loc[(history["seed"] == 2) & (history["episode"] == 1), "best"] = np.nan  # nothing within budget yet
    history = history[(history["method"] == "layerwise") | (history["episode"] == 1)]  # "random" decides at once
    history.loc[history["method"] == "random", "best"] = 42.0
    figure = figures.search_progress(history)
    curve, across = figure.axes[0].lines
    assert curve.get_xydata().tolist() == [[e, 10.0 * e + 1] for e in range(2, 7)]
    assert across.get_ydata()[0] == 42
    low, high = figure.axes[0].collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    half = 4.302653 / 3**0.5  # Student's t with two degrees of freedom
    assert (low, high) == pytest.approx((21 - half, 61 + half), abs=1e-4)
    assert [text.get_text() for text in figure.legends[0].texts] == ["Layer-wise agent", "Random search (42.0 ↓)"]


def test_many_methods_at_one_budget_stand_below_each_other(tmp_path):
    name = make(tmp_path, methods=("layerwise", "random", "uniform", "taylor"))
    reports.report("quick", [name], tmp_path / "reports", tmp_path)
    assert (tmp_path / "reports/accuracy_by_method.png").exists()
    assert not (tmp_path / "reports/accuracy_against_parameters.png").exists()
    assert "](accuracy_by_method.png)" in (tmp_path / "reports/results.md").read_text()
    table = tables.results_table(load(tmp_path, name))
    (axis,) = figures.accuracy_by_method(table).axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == [labels.method_label(method) for method in table["method"][::-1]]
    drawn = [line.get_xdata()[0] for line in axis.lines if line.get_marker() not in ("None", "", None, "|")]
    assert drawn == pytest.approx(table["accuracy"][::-1].tolist())


def test_many_methods_keep_their_figure_beside_a_network_that_others_report(tmp_path):
    many = make(tmp_path, methods=("layerwise", "random", "uniform", "taylor"))
    long = make(tmp_path, "long", methods=("genetic",))
    for stage in ("search", "finetune"):
        file = tmp_path / "quick" / long / stage / "metrics.json"
        other = {"dataset": "cifar10", "network": "vgg16", "training": {"epochs": 16}}
        file.write_text(json.dumps(json.loads(file.read_text()) | other))
    reports.report("quick", [many, long], tmp_path / "reports", tmp_path)
    names = {file.name for file in (tmp_path / "reports").iterdir()}
    assert {"accuracy_by_method.png", "accuracy_against_macs.png", "accuracy_against_parameters.png"} <= names
    drawn = (tmp_path / "reports/accuracy_against_parameters.svg").read_text()
    assert "CHIP" in drawn
    assert "VGG-11" not in drawn  # fine-tuned too briefly to stand beside what others report


def test_a_single_network_does_not_magnify_noise(tmp_path):
    table = tables.results_table(load(tmp_path, make(tmp_path, methods=("genetic",))))
    near = table.assign(accuracy=table["accuracy_before"] + 0.1)
    (against,), (by_method,) = figures.accuracy_against(near, "macs").axes, figures.accuracy_by_method(near).axes
    assert 1 <= np.ptp(against.get_ylim()) < 2
    assert 1 <= np.ptp(by_method.get_xlim()) < 2


def test_a_long_title_stays_above_its_panel(tmp_path):
    name = make(tmp_path, "targets_cifar10_vgg16", limit=0.125, second=0.3333)
    figure = figures.accuracy_by_method(tables.results_table(load(tmp_path, name)))
    figure.canvas.draw()
    (axis,) = figure.axes
    title = next(text for text in axis.findobj(type(axis.title)) if text.get_text().startswith(name))
    assert title.get_text().replace("\N{NO-BREAK SPACE}", " ").splitlines()[1] == "MACs ≤ 33.33 %"
    assert title.get_window_extent().x1 <= figure.bbox.x1


def test_an_unpruned_network_below_all_methods_is_in_sight(tmp_path):
    table = tables.results_table(load(tmp_path, make(tmp_path, methods=("layerwise", "uniform"))))
    (axis,) = figures.accuracy_by_method(table.assign(accuracy_before=table["accuracy"].min() - 3)).axes
    (line,) = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert axis.get_xlim()[0] < line.get_xdata()[0] < axis.get_xlim()[1]


@pytest.mark.parametrize(("stage", "lost"), [("search", "evaluations"), ("finetune", "pruned_accuracy")])
def test_a_number_that_a_run_lacks_is_named_with_the_stage_to_run(tmp_path, stage, lost):
    name = make(tmp_path)
    file = tmp_path / "quick" / name / stage / "metrics.json"
    metrics = json.loads(file.read_text())
    del metrics["methods"]["uniform"]["0"][lost]
    file.write_text(json.dumps(metrics))
    fault = rf"{stage}/metrics.json lacks '{lost}' of uniform \(seed 0\): .*python -m rlprune {stage} {name}`"
    with pytest.raises(InputError, match=fault):
        load(tmp_path, name)


def test_the_progress_of_two_seeds_lies_between_them():
    history = episodes(["layerwise"], (0, 1), ["parameters"], count=6)
    history["best"] = history["seed"] + 10 * history["episode"]
    low, high = figures.search_progress(history).axes[0].collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == (10, 61)


def test_training_curves_of_baseline_and_finetuning():
    loss, accuracy = figures.training_curves(epochs(seeds=(0, 1))).axes
    assert loss.get_lines()[0].get_ydata()[0] == pytest.approx(2.025)
    assert [line.get_ydata()[-1] for line in accuracy.get_lines()] == pytest.approx([97.5 - 7.5, 90])
    tuned = figures.training_curves(epochs(("layerwise", "uniform")))
    assert [text.get_text() for text in tuned.legends[0].get_texts()][:2] == ["Layer-wise agent", "Uniform widths"]


def test_methods_are_told_apart():
    styles = [labels.method_style(method) for method in labels.METHODS]
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == len(styles)


def test_nothing_global_changes(tmp_path):
    before = dict(matplotlib.rcParams)
    figure = figures.training_curves(epochs())
    figures.save(figure, tmp_path / "new" / "figure.v2")
    assert isinstance(figure, Figure)
    assert dict(matplotlib.rcParams) == before
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["figure.v2.png", "figure.v2.svg"]


def test_no_network_is_loaded():
    for module in (accuracies, figures, labels, plotting, published, tables):
        tree = ast.walk(ast.parse(Path(module.__file__).read_text()))
        names = {node.module for node in tree if isinstance(node, ast.ImportFrom)}
        assert {name for name in names if name.startswith("rlprune")} <= {
            "rlprune.accuracies",
            "rlprune.tables",
            "rlprune.labels",
            "rlprune.plotting",
            "rlprune.published",
            "rlprune.errors",
        }
        assert "import torch" not in Path(module.__file__).read_text()


def test_before_and_after_shows_each_cost_and_layer():
    kept = {name: (size // 3, size) for name, size in LAYERS.items()}
    costs = {"latency": {"value": 2.1, "unpruned": 5.0, "limit": 2.5}, "accuracy": {"value": 91.0, "unpruned": 92.5}}
    figure = figures.before_and_after(kept, costs)
    axes = [axis for part in figure.subfigs for axis in part.axes]
    assert [axis.get_title(loc="left") for axis in axes] == ["Latency (ms)", "Accuracy (%)", "Filters per layer"]
    assert [bar.get_height() for bar in axes[0].patches] == [5.0, 2.1]
    assert [len(axis.lines) for axis in axes[:2]] == [1, 0]  # the budget
    assert [bar.get_height() for bar in axes[2].patches] == [*LAYERS.values(), *(k for k, _ in kept.values())]


def test_parts_of_baselines_of_different_accuracy_are_refused(tmp_path):
    whole, part = make(tmp_path), make(tmp_path, "part", methods=("smof",))
    parts.joined(load(tmp_path, whole, part), {part: whole})
    file = tmp_path / "quick" / part / "finetune/metrics.json"
    metrics = json.loads(file.read_text())
    metrics["methods"]["smof"]["0"]["baseline_accuracy"] += 0.1
    file.write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=r"began with baselines of different accuracy \(seed 0\)"):
        parts.joined(load(tmp_path, whole, part), {part: whole})


def test_parts_of_different_baselines_are_refused(tmp_path):
    whole, part = make(tmp_path), make(tmp_path, "part", seeds=(1,))

    def of(name, stage, weights):
        file = tmp_path / "quick" / name / stage / "metrics.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"baseline_weights": weights}))

    of(whole, "search", {"0": "abc"})
    parts.joined(load(tmp_path, whole, part), {part: whole})  # an older result does not say
    of(part, "search", {"0": "abd"})
    with pytest.raises(InputError, match="differ in 'baseline_weights'"):
        parts.joined(load(tmp_path, whole, part), {part: whole})
    of(part, "search", {"1": "abd"})
    joined = parts.joined(load(tmp_path, whole, part), {part: whole})
    assert joined.searches[whole].metrics["baseline_weights"] == {"0": "abc", "1": "abd"}


def test_a_spread_says_of_how_many_seeds_it_is(tmp_path):
    whole = make(tmp_path, methods=("layerwise", "uniform"), seeds=(0, 1))
    part = make(tmp_path, "part", methods=("layerwise",), seeds=(2,))
    third = make(tmp_path, "third", methods=("taylor",), seeds=(0, 1, 2))
    results = parts.joined(load(tmp_path, whole, part, third), {part: whole, third: whole})
    text = "\n".join(margins.spreads(margins.agents_margins(results)))
    assert "± is the standard error over 2 to 3 seeds, seed by seed" in text
