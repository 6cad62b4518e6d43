"""What the values in params.yaml must be, so that a fault is said before any work and not hours into it."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from rlprune.errors import InputError, one_of

if TYPE_CHECKING:
    from rlprune.stages.common import Project

Rule = tuple[str, Callable[[Any], bool]]  # what a value must do, and whether it does


def must(what: str, rule: Rule, value: object) -> None:
    """Raise `InputError` unless the value of ``what`` follows the rule."""
    words, follows = rule
    if not follows(value):
        raise InputError(f"{what} must {words}, not {value!r}.")


def _number(words: str, follows: Callable[[Any], bool], kind: type = Real) -> Rule:
    """A rule on numbers; true and false are none."""

    def holds(value: Any) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and follows(value)

    return words, holds


def _whole(least: int) -> Rule:
    return _number(f"be a whole number of at least {least}", lambda value: value >= least, Integral)


def _list(words: str, rule: Rule, least: int = 1) -> Rule:
    """A rule on all values of a list with ``least`` values or more."""

    def holds(given: Any) -> bool:
        return isinstance(given, list) and len(given) >= least and all(map(rule[1], given))

    return f"be a list of {words}", holds


_TEXT: Rule = "be a name", lambda value: isinstance(value, str)
_SWITCH: Rule = "be true or false", lambda value: isinstance(value, bool)
_COUNT, _SEED = _whole(1), _whole(0)
_POSITIVE = _number("be a number above 0", lambda value: value > 0)
_BETWEEN = _number("lie in (0, 1)", lambda value: 0 < value < 1)
_UP_TO_1 = _number("lie in (0, 1]", lambda value: 0 < value <= 1)
_MAPPING: Rule = "map names to values", lambda value: isinstance(value, dict)
_FILLED: Rule = "map one name or more to values", lambda value: isinstance(value, dict) and len(value) > 0
_SEEDS, _NAMES = _list("whole numbers of at least 0", _SEED), _list("names", _TEXT)

# of the entries of a group, by key; experiments are also those of comparisons
ENTRIES: dict[str, dict[str, Rule]] = {
    "datasets": {"validation": _number("lie between 0 and 1", lambda value: 0 < value < 1), "seed": _SEED},
    "suites": dict.fromkeys(("baseline", "search", "finetune"), _MAPPING),
    "baselines": {"training": _MAPPING, "seeds": _SEEDS},
    "experiments": {
        "search": _MAPPING,
        "training": _MAPPING,
        "baseline_seed": _SEED,
        "seeds": _SEEDS,
        "methods": _NAMES,
        "part_of": _TEXT,
    },
    "studies": {
        "budgets": _FILLED,
        "training": _MAPPING,
        "changes": _FILLED,
        "rewards": _FILLED,
        "baseline_seed": _SEED,
        "candidates": _COUNT,
        "episodes": _COUNT,
        "points": _list("shares in (0, 1], two or more", _UP_TO_1, least=2),
        "around": _list("whole numbers of at least 1", _COUNT),
        "seeds": _SEEDS,
    },
}
# of a search, of the agent's evaluator and of every method, by argument
ARGUMENTS: dict[str, Rule] = {
    **dict.fromkeys(("episodes", "minimum", "multiple", "images", "interval"), _COUNT),
    **dict.fromkeys(("epochs", "rounds", "steps", "patches", "generations"), _COUNT),
    **dict.fromkeys(("imagined", "recalibration", "finetune_steps", "seed"), _SEED),
    **dict.fromkeys(("batch_size", "population"), _whole(2)),
    **dict.fromkeys(("learning_rate", "finetune_rate", "threshold", "travel"), _POSITIVE),
    **dict.fromkeys(("share", "fading", "pace"), _BETWEEN),
    **dict.fromkeys(("rings", "grow_batch", "normalised", "reset"), _SWITCH),
    **dict.fromkeys(("evaluation", "agent", "training", "options"), _MAPPING),
    "tolerance": _UP_TO_1,
    "settle": _number("lie in [0, 1)", lambda value: 0 <= value < 1),
    "near": _number("lie in [0, 1]", lambda value: 0 <= value <= 1),
    "ridge": _number("be a number of at least 0", lambda value: value >= 0),
    "exclude": _list("names", _TEXT, least=0),
}
AGENTS = ("agent", "fit_budget", "imagined", "start")  # what only the agents' searches take
UNSET = ("fit_budget", "start", "normalised")  # null leaves the choice to the search


def check_arguments(given: dict[str, Any], whose: str) -> None:
    """Raise `InputError` unless all values are such as a search or a method takes; unknown arguments are not looked at.

    Args:
        given: values by argument; ``options`` hold those of methods by name.
        whose: they are, in words.
    """
    from rlprune.candidates import FITS, STARTS  # here, as a stage that only draws does not wait for torch
    from rlprune.env import ACTIONS
    from rlprune.evaluate import options_of
    from rlprune.gates import GATES
    from rlprune.importance import CRITERIA
    from rlprune.search import agent_options
    from rlprune.training import Training

    known = {"action": ACTIONS, "criterion": [*CRITERIA, GATES], "fit_budget": FITS, "start": STARTS}
    for key, value in given.items():
        if value is None and key in UNSET:
            continue
        if key in known:
            one_of(key, value, known[key])
        if key in ARGUMENTS:
            must(f"{key} of {whose}", ARGUMENTS[key], value)
        if key == "evaluation":
            check_arguments(options_of(value), whose)
        elif key == "training":
            Training.of(value)
        elif key == "agent":
            try:
                agent_options(value)
            except InputError as error:
                raise InputError(f"agent of {whose}: {error}") from error
        elif key == "options":
            for method, options in value.items():
                if options is not None:
                    must(f"{method} of {whose}", _MAPPING, options)
                    check_arguments(options, f"{method} of {whose}")


# what an entry of each kind of study has beside that of every study
OWN = {"reward": {"candidates", "rewards", "training"}, "front": {"episodes", "points"}}
OWN |= {"transfer": {"episodes", "begin"}, "ablation": {"episodes", "changes"}}
OWN |= {"schedule": {"begin", "training", "changes"}, "prunetrain": {"training", "changes"}}
# what may be changed of what, by kind
CHANGED = {"ablation": ("a search", sorted({"action", "criterion", *AGENTS}))}
CHANGED["prunetrain"] = ("PruneTrain", ["grow_batch", "interval", "reset", "settle", "share", "threshold", "training"])


def check_study(here: Project, name: str, entry: dict[str, Any], judged: dict[str, Any]) -> None:
    """Raise `InputError` unless an entry of ``studies``, of a known kind, is sound.

    Args:
        here: the project.
        name: of the entry.
        entry: its values.
        judged: the criterion and the evaluator's options of its suite.
    """
    from rlprune.costs import Budget
    from rlprune.training import Training

    kind, where = entry["kind"], f"studies.{name} in params.yaml"
    for lacking in sorted(OWN[kind] - set(entry)):
        raise InputError(f"{where} lacks {lacking!r}, which a study of this kind needs.")
    for label, change in {**entry.get("changes", {}), **entry.get("rewards", {})}.items():
        must(f"{label!r} of {where}", _MAPPING, change)
    check_arguments(judged, f"suite {entry['suite']!r}")
    for label, reward in entry.get("rewards", {}).items():
        check_arguments({"evaluation": reward}, f"{label!r} of {where}")
    for cost, shares in entry["budgets"].items():
        if kind == "front" and (len(entry["budgets"]) > 1 or not isinstance(shares, list) or not shares):
            raise InputError(
                f"The budgets of {where} must be one cost with a list of shares, such as {{parameters: [0.1, 0.5]}}, "
                f"not {entry['budgets']!r}."
            )
        for share in shares if kind == "front" else [shares]:
            Budget(cost, share)
    baseline, seed = here.entry("baselines", entry["baseline"]), entry.get("baseline_seed", 0)
    one_of(f"seed of baseline {entry['baseline']}", seed, baseline["seeds"])
    if kind in ("reward", "schedule", "prunetrain"):
        for changes in entry["changes"].values() if kind == "schedule" else [{}]:
            Training.of({**entry["training"], **changes})
    if kind == "transfer":
        first = here.entry("baselines", entry["begin"])
        one_of(f"seed of baseline {entry['begin']}", seed, first["seeds"])
        if first["dataset"] != baseline["dataset"]:
            raise InputError(
                f"{where} goes from {first['dataset']} to {baseline['dataset']}: name two baselines of one dataset."
            )
        if entry["begin"] != entry["baseline"]:
            _check_needs(where, entry, f"weights/baselines/{entry['begin']}")
    if kind == "schedule":
        _check_teacher(here, where, entry, seed)
    if kind == "reward" and len(entry["seeds"]) != 1:
        raise InputError(f"{where} has {len(entry['seeds'])} seeds: a study of rewards needs one.")
    for label, changes in entry["changes"].items() if kind in CHANGED else ():
        what, may_change = CHANGED[kind]
        for key in changes:
            one_of(f"change to {what}", key, may_change)
        check_arguments(changes, f"{label!r} of {where}")
        if "epochs" in changes.get("training", {}):
            raise InputError(f"{label!r} of {where} changes the epochs: all are set beside dense training of as many.")


def _check_needs(where: str, entry: dict[str, Any], place: str) -> None:
    """Raise `InputError` unless DVC is told of the weights that a study begins with."""
    if entry["needs"] != place:
        raise InputError(f"{where} begins with {entry['begin']}: its 'needs' must be {place}, not {entry['needs']}.")


def _check_teacher(here: Project, where: str, entry: dict[str, Any], seed: int) -> None:
    """Raise `InputError` unless the network that a schedule trains was cut from the baseline that teaches it."""
    first = here.entry("experiments", entry["begin"])
    if "layerwise" not in first["methods"]:
        raise InputError(
            f"{where} begins with what the layer-wise agent leaves in {entry['begin']!r}, which does not run it."
        )
    there = {**first, "baseline_seed": here.baseline_seed(entry["begin"], first["seeds"][0])}
    for key, own in {"baseline": entry["baseline"], "baseline_seed": seed, "budgets": entry["budgets"]}.items():
        if own != there[key]:
            raise InputError(
                f"{where} has the {key} {own!r}, and {entry['begin']!r}, which it begins with, has {there[key]!r}: "
                "give both the same."
            )
    _check_needs(where, entry, f"weights/{first['suite']}/{entry['begin']}/search")
