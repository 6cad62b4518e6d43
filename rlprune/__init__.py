"""Prune a trained network under a budget by constrained reinforcement learning.

Everything is imported when first asked for, so that a stage which draws figures
does not wait for torch.
"""

import importlib
from typing import Any

_HOME = {
    "trace": "groups",
    "FilterGroups": "groups",
    "slim": "masking",
    "masked": "masking",
    "Budget": "costs",
    "Evaluator": "evaluate",
    "PruningEnv": "env",
    "LagrangianPPO": "agent",
    "PPOOptions": "agent",
    "prune": "search",
    "pareto": "front",
    "PruningResult": "result",
    "load": "result",
    "Training": "training",
    "InputError": "errors",
}
_MODULES = {"costs", "data", "figures", "importance", "networks", "own", "peers", "stages", "training"}

__all__ = [*_HOME, *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"rlprune.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"rlprune.{name}")
    raise AttributeError(f"module 'rlprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
