"""The page of the paper's claims, from hand-made results."""

from pathlib import Path

import pandas as pd
import pytest

from rlprune import claims
from rlprune.tables import Results, Stage


def row(network, method, percent, change):
    head = {"dataset": "cifar10", "network": network, "method": method, "seeds": "0, 1"}
    return {**head, "parameters_percent": percent, "accuracy_before": 91.0, "accuracy": 91 + change, "change": change}


def line(text, *parts):
    found = [line for line in text.splitlines() if all(part in line for part in parts)]
    assert len(found) == 1, found
    return found[0]


def test_each_claim_has_its_verdict():
    rows = [row("vgg11", "layerwise", 9.9, -0.25), row("vgg11", "filterwise", 9.8, -0.35)]
    rows += [row("vgg16", "layerwise", 16.9, 0.1), row("vgg16", "layerwise", 20, 3), row("vgg16", "uniform", 9, 2)]
    rows += [row("resnet18", "layerwise", 24.9, -0.1), {**row("vgg19", "layerwise", 9, 1), "dataset": "digits"}]
    text = claims.page(None, pd.DataFrame(rows))
    assert "reproduced, filters gone |" in line(text, "VGG-11", "Layer-wise", "90.1 % gone: 91.00 → 90.75 (−0.25")
    assert "not reproduced |" in line(text, "VGG-11", "Filter-wise")
    assert "surpassed" in line(text, "VGG-16", "→ 91.10")  # neither the larger network nor uniform widths
    assert "not reproduced |" in line(text, "ResNet-18", "75.1 % gone")  # no loss was claimed
    assert "not run" in line(text, "VGG-19", "comparable or better")


def test_nothing_is_claimed_of_networks_that_are_smaller_still():
    rows = [row("vgg11", "layerwise", 7.05, -1), row("vgg11", "filterwise", 4.9, -1), row("vgg16", "layerwise", 4.9, 0)]
    rows += [row("resnet18", "layerwise", 10, -0.1), row("resnet18", "filterwise", 24.99, -0.1)]
    text = claims.page(None, pd.DataFrame(rows))
    assert "not reproduced |" in line(text, "VGG-11", "Layer-wise")
    assert "smaller than what was claimed |" in line(text, "VGG-11", "Filter-wise")
    assert "surpassed" in line(text, "VGG-16", "Layer-wise")
    assert "smaller than what was claimed |" in line(text, "ResNet-18", "Layer-wise")
    assert "not reproduced |" in line(text, "ResNet-18", "Filter-wise")


def test_nothing_has_been_run():
    text = claims.page(None, pd.DataFrame())
    assert text.count("| – | not run |") == len(claims.CLAIMS)
    assert text.count("| not run | – | – | – |") == len(claims.ENDS)
    assert "What it takes" not in text


@pytest.fixture
def replayed():
    """A published search of 40 episodes, none within budget, and an agent whose third network is as good as its own."""
    episodes = range(1, 41)
    theirs = {"method": "paper_coarse", "episode": episodes, "reward": [10.0] * 13 + [20.0] * 25 + [30.0] * 2}
    theirs |= {"parameters": [60.0] * 13 + [40.0] * 25 + [12.0] * 2, "best": float("nan")}
    ours = {"method": "layerwise", "episode": episodes, "reward": 50.0, "parameters": 10.0}
    ours |= {"best": [45.0, 49.0] + [51.0] * 38}
    history = pd.concat([pd.DataFrame({**run, "seed": seed}) for run in (theirs, ours) for seed in (0, 1)])
    methods = {
        "paper_coarse": {s: {"reward": r, "evaluations": 40} for s, r in (("0", 50.0), ("1", 99.0))},
        "layerwise": {s: {"reward": 51.0, "evaluations": 40} for s in ("0", "1")},
    }
    metrics = {"network": "vgg11", "methods": methods}
    metrics["budgets"] = [{"name": "parameters", "limit": 0.1, "relative": True}]
    return Results("published", {"vgg11_10": Stage(metrics, history, Path())}, {}, {})


def test_ends_and_what_it_takes_to_get_there(replayed):
    text = claims.page(replayed, pd.DataFrame())
    end = line(text, "VGG-11", "Published, coarse | 10 |")
    assert end.endswith("| 87.0 at 7.3 | 21.2 at 36.5 | 10.0 at 60.0 | 40 | 2 |")
    assert "not run" in line(text, "VGG-11", "Published, fine | 10 |")
    assert line(text, "vgg11_10").endswith("| 40, 40 | 0, 0 | 50.0, 99.0 | Layer-wise agent | 3, never |")
