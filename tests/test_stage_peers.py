"""Stage peers for real: every method, from a baseline to the report, on digits."""

import inspect
import json
from collections import Counter

import pytest
import yaml
from torch import nn

from rlprune import data, load, prune
from rlprune.costs import parameters
from rlprune.errors import InputError
from rlprune.files import weights_hash
from rlprune.networks import build
from rlprune.stages import baseline, check, finetune, peers, prepare, search, tables, values

METHODS = ["layerwise", "genetic", "prunenet", "prunetrain", "smof", "smof_filters", "hfp", "uniform"]
SHORT = {"epochs": 2, "batch_size": 64, "learning_rate": 0.05}
TINY = {
    "datasets": {"digits": {"validation": 0.2, "seed": 0}},
    "suites": {
        "tiny": {
            "baseline": SHORT,
            "search": {
                "episodes": 10,
                "evaluation": {"images": 100, "recalibration": 100},
                "options": {
                    "genetic": {"images": 64, "patches": 256},
                    "prunenet": {"rounds": 4, "steps": 2, "images": 200},
                    "prunetrain": {"training": SHORT},
                    "smof": {"epochs": 2, "batch_size": 64},
                    "smof_filters": {"epochs": 2, "batch_size": 64},
                    "hfp": {"epochs": 2, "batch_size": 64},
                },
            },
            "finetune": {**SHORT, "epochs": 1},
        }
    },
    "baselines": {"small": {"suite": "tiny", "dataset": "digits", "network": "resnet20", "seeds": [0]}},
    "experiments": {},
    "comparisons": {
        "all": {
            "suite": "tiny",
            "baseline": "small",
            "budgets": {"parameters": 0.15},
            "methods": METHODS,
            "seeds": [0],
        }
    },
}


def write(folder, params):
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture(scope="module")
def tuned():
    """Of every fine-tuning: seed, schedule, hash of the teacher, and what else it is given."""
    return []


@pytest.fixture(scope="module")
def here(tmp_path_factory, tuned):
    folder = tmp_path_factory.mktemp("peers")
    write(folder, TINY)
    check.run(folder)
    prepare.run("digits", folder)
    baseline.run("small", folder, progress=False)
    fit = finetune.fit

    def spied(network, data, training, seed, teacher, checkpoint, progress, lessons):
        tuned.append((seed, training, weights_hash(teacher), json.dumps(data.identity())))
        return fit(network, data, training, seed, teacher, checkpoint, progress, lessons)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "fit", spied)
        peers.run("all", folder, progress=False)
    return folder


def metrics(folder, stage):
    return json.loads((folder / "results/tiny/all" / stage / "metrics.json").read_text())


def test_every_method_ends_within_budget_on_the_slim_network(here):
    example = data.load("digits").example
    unpruned = parameters(build("resnet20"), example)
    found = metrics(here, "search")["methods"]
    assert list(found) == METHODS
    for method in METHODS:
        result = load(here / "weights/tiny/all/search" / method / "0")
        assert parameters(result.network, example) <= 0.15 * unpruned
        assert found[method]["0"]["costs"]["parameters"]["value"] == parameters(result.network, example)
        assert result.method == method


def test_all_are_trained_alike_and_stand_in_one_table(here, tuned):
    found = metrics(here, "finetune")
    assert list(found["methods"]) == METHODS
    assert found["training"]["epochs"] == 1
    assert len({run["0"]["baseline_accuracy"] for run in found["methods"].values()}) == 1
    assert len(tuned) == len(METHODS)
    assert len(set(tuned)) == 1
    table = tables.run("tiny", here)
    assert table["method"].tolist() == METHODS
    assert table["accuracy"].between(0, 100).all()
    page = (here / "reports/tiny/results.md").read_text()
    assert "of the MACs that training the unpruned network for as long takes" in page
    for figure in ("accuracy_by_method", "accuracy_against_macs"):  # one budget on parameters: nothing to see along it
        assert (here / f"reports/tiny/{figure}.png").exists()


def test_what_only_some_methods_have_is_recorded(here):
    found = metrics(here, "search")["methods"]
    dense = found["prunetrain"]["0"]["training_macs"]["dense"]
    assert 0 < found["prunetrain"]["0"]["training_macs"]["value"] <= dense
    network = load(here / "weights/tiny/all/search/smof/0").network
    counts, before = (
        Counter("×".join(map(str, m.kernel_size)) for m in net.modules() if isinstance(m, nn.Conv2d))
        for net in (network, build("resnet20"))
    )
    assert counts != before  # at this budget some kernels are smaller
    assert found["smof"]["0"]["kernels"] == counts
    assert all("kernels" not in found[method]["0"] for method in METHODS if method != "smof")


def test_a_stopped_comparison_goes_on(here, monkeypatch):
    params = json.loads(json.dumps(TINY))
    params["comparisons"]["some"] = {**params["comparisons"]["all"], "methods": ["uniform", "hfp"]}
    write(here, params)
    real = finetune.fit

    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        peers.run("some", here, progress=False)
    monkeypatch.setattr(finetune, "fit", real)
    monkeypatch.setattr(search, "_search", stop)  # what the searches found was kept: it is not looked for again
    tuned = peers.run("some", here, progress=False)["methods"]
    assert [path.name for path in (here / "checkpoints").iterdir()] == ["shared"]
    for method, before in metrics(here, "finetune")["methods"].items():
        if method in tuned:
            assert tuned[method]["0"]["accuracy"] == before["0"]["accuracy"]


def test_prunetrain_trains_once_for_all_budgets_but_again_once_its_code_is_another(here, monkeypatch):
    kept = list((here / "checkpoints/shared").glob("*/*.pt"))
    assert len(kept) == 1
    began = kept[0].stat().st_mtime_ns
    params = json.loads(json.dumps(TINY))
    params["comparisons"]["all"].update(methods=["prunetrain"], budgets={"parameters": 0.3})
    write(here, params)
    training_macs = metrics(here, "search")["methods"]["prunetrain"]["0"]["training_macs"]
    _, checkpoints = search.searched("all", here, False, peers.METHODS)
    search.tidy(checkpoints)
    assert (kept[0].stat().st_mtime_ns, metrics(here, "search")["methods"]["prunetrain"]["0"]["training_macs"]) == (
        began,
        training_macs,  # both lose filters after the second of two epochs
    )
    real = search.fingerprint
    monkeypatch.setattr(search, "fingerprint", lambda *what: f"{real(*what)}x")
    _, checkpoints = search.searched("all", here, False, peers.METHODS)
    search.tidy(checkpoints)
    assert not kept[0].exists()
    assert len(list((here / "checkpoints/shared").glob("*/*.pt"))) == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"methods": ["magic"]}, "Unknown method 'magic'"),
        ({"search": {"options": {"smof": {"epoch": 1}}}}, "Unknown option of smof 'epoch'"),
        ({"search": {"options": {"slimming": {}}}}, "Unknown method 'slimming'"),
        ({"search": {"options": {"smof": {"seed": 1}}}}, "Unknown option of smof 'seed'"),
        ({"search": {"options": {"smof": {"epochs": "four"}}}}, "epochs of smof of experiment 'all' must be a whole"),
        ({"search": {"options": {"smof": {"evaluation": {"imags": 3}}}}}, "Unknown option of the evaluator 'imags'"),
        ({"search": {"options": {"prunetrain": {"training": {"epoch": 3}}}}}, "Unknown training parameter 'epoch'"),
    ],
)
def test_bad_entry_is_one_sentence_before_any_work(tmp_path, change, fault):
    params = json.loads(json.dumps(TINY))
    params["comparisons"]["all"].update(change)
    write(tmp_path, params)
    with pytest.raises(InputError, match=fault):
        check.run(tmp_path)


@pytest.mark.parametrize("whole", ["nothing", "more"])
def test_a_part_belongs_to_an_experiment_of_its_suite(tmp_path, whole):
    params = json.loads(json.dumps(TINY))
    params["comparisons"]["more"] = {**params["comparisons"]["all"], "methods": ["taylor"], "part_of": "all"}
    write(tmp_path, params)
    assert "2 experiments are in order" in check.run(tmp_path)
    params["comparisons"]["more"]["part_of"] = whole
    write(tmp_path, params)
    with pytest.raises(InputError, match=rf"comparisons.more.part_of in params.yaml must name .* not '{whole}'"):
        check.run(tmp_path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"budgets": {"parameters": 0.2}}, "comparisons.more in .* is part of 'all' and differs from it in 'budgets'"),
        ({"training": {"epochs": 2}}, "is part of 'all' and differs from it in 'training'"),
        ({"methods": ["taylor", "hfp"]}, "comparisons.more and comparisons.all .* both have hfp with seed 0"),
    ],
)
def test_a_part_that_will_not_fit_its_whole_is_refused_before_it_runs(tmp_path, change, fault):
    params = json.loads(json.dumps(TINY))
    more = {**params["comparisons"]["all"], "methods": ["taylor"], "part_of": "all", **change}
    params["comparisons"]["more"] = more
    write(tmp_path, params)
    with pytest.raises(InputError, match=fault):
        check.run(tmp_path)


def test_a_peer_has_its_place_among_comparisons(tmp_path):
    params = json.loads(json.dumps(TINY))
    params["experiments"] = {"other": params["comparisons"].pop("all")}
    write(tmp_path, params)
    with pytest.raises(InputError, match="Unknown method 'genetic'"):
        check.run(tmp_path)
    params["comparisons"] = dict(params["experiments"])
    write(tmp_path, params)
    with pytest.raises(InputError, match="'other' in params.yaml is among experiments and comparisons"):
        check.run(tmp_path)


def test_every_argument_of_every_method_has_a_rule():
    known = {*values.ARGUMENTS, "criterion", "start", "fit_budget", "action"}
    beside = search.GIVEN | {"evaluate", "begin", "finetune", "watch"}  # what params.yaml cannot hold
    for function in (prune, *search.REFERENCES.values(), *peers.METHODS.values()):
        assert set(inspect.signature(function).parameters) - beside <= known
