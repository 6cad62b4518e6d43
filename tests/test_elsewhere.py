"""No stage mixes tensors of two devices; see `elsewhere`."""

import pytest
import torch
import yaml
from elsewhere import DEVICE, Elsewhere, There
from torch.utils._pytree import tree_map

from rlprune import gates, networks, sources
from rlprune.stages import baseline, finetune, peers, prepare, search

SCHEDULE = {"epochs": 1, "batch_size": 32, "learning_rate": 0.05}
TINY = {
    "datasets": {"digits": {"validation": 0.3, "seed": 0}},
    "suites": {
        "tiny": {
            "baseline": SCHEDULE,
            "search": {"episodes": 30, "criterion": "taylor", "evaluation": {"images": 40, "recalibration": 60}},
            "finetune": {**SCHEDULE, "distillation": 0.5},
        },
        "peers": {
            "search": {
                "episodes": 4,
                "evaluation": {"images": 40, "recalibration": 60},
                "options": {
                    "layerwise": {"criterion": "gates", "imagined": 0},
                    "genetic": {"images": 40, "patches": 60, "generations": 3},
                    "prunenet": {"rounds": 2, "steps": 2, "batch_size": 32},
                    "prunetrain": {"training": {**SCHEDULE, "epochs": 2}},
                    "smof": {"epochs": 2, "batch_size": 32},
                    "hfp": {"epochs": 2, "batch_size": 32},
                },
            },
            "finetune": SCHEDULE,
        },
    },
    "baselines": {"small": {"suite": "tiny", "dataset": "digits", "network": "vgg11", "seeds": [0]}},
    "experiments": {
        "agents": {
            "suite": "tiny",
            "baseline": "small",
            "budgets": {"parameters": 0.25},
            "methods": ["layerwise", "filterwise", "evolution", "uniform", "taylor"],
            "seeds": [0],
        }
    },
    "comparisons": {
        "others": {
            "suite": "peers",
            "baseline": "small",
            "budgets": {"parameters": 0.3},
            "methods": ["layerwise", "genetic", "prunenet", "prunetrain", "smof", "hfp"],
            "seeds": [0],
        }
    },
}


@pytest.fixture
def there(monkeypatch):
    """The stages' device is the other one; the network and the images are few and small."""
    save, tolist, tensor, whole = torch.save, torch.Tensor.tolist, torch.tensor, sources._digits

    def few():
        return {name: rows[:100] for name, rows in whole().items()}

    def made(values, *args, device=None, **kwargs):  # torch makes these without asking anybody
        found = tensor(values, *args, **kwargs)
        return found if device is None else found.to(device)

    def saved(what, file, **kwargs):  # as tensors of the CPU
        plain = tree_map(lambda leaf: leaf.inner.detach() if isinstance(leaf, Elsewhere) else leaf, dict(what))
        save(plain, file, **kwargs)

    monkeypatch.setattr(torch, "save", saved)
    monkeypatch.setattr(torch, "tensor", made)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: tolist(t.inner if isinstance(t, Elsewhere) else t))
    monkeypatch.setattr(sources, "_digits", few)
    monkeypatch.setitem(networks.VGG_LAYERS, "vgg11", [8, "M", 12, "M", 16, "M", 16, "M"])
    monkeypatch.setattr(gates, "ROUNDS", 2)
    monkeypatch.setattr(gates, "STEPS", 2)
    monkeypatch.setattr(prepare, "device", lambda: str(DEVICE))
    prepare.dataset_once.cache_clear()
    yield
    prepare.dataset_once.cache_clear()


def test_the_other_device_refuses_company():
    with There():
        far, near = torch.ones(3, device=DEVICE), torch.ones(3)
        assert isinstance(far, Elsewhere)
        assert (far + far).sum().item() == 6
        with pytest.raises(RuntimeError, match="two devices"):
            far + near
        with pytest.raises(RuntimeError, match="generator of the CPU"):
            torch.rand(3, device=DEVICE, generator=torch.Generator())
        assert torch.equal((far + near.to(DEVICE)).cpu(), near + near)


def test_every_stage_keeps_to_its_device(there, tmp_path):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(TINY))
    with There():
        prepare.run("digits", tmp_path)
        baseline.run("small", tmp_path, progress=False)
        search.run("agents", tmp_path, progress=False)
        finetune.run("agents", tmp_path, progress=False)
        peers.run("others", tmp_path, progress=False)
    assert (tmp_path / "results/tiny/agents/finetune/metrics.json").exists()
    assert (tmp_path / "results/peers/others/finetune/metrics.json").exists()
