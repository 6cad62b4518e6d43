"""How methods, networks, costs and numbers are written for people, the same in every table and figure."""

import re
import zlib
from collections.abc import Iterable
from typing import Any

# Label, colour and marker; the order of rows, panels and legends: ours, the peers, then what serves for comparison.
# Most colours are of Wong (2011) and Tol (2021); the agents have the strongest. So many cannot all be told apart by
# colour-blind readers: figures add markers, dashes or names.
METHODS = {
    "layerwise": ("Layer-wise agent", "#0072b2", "o"),
    "filterwise": ("Filter-wise agent", "#d55e00", "s"),
    "paper_coarse": ("Published, coarse", "#117733", "8"),
    "paper_fine": ("Published, fine", "#7f4a1e", "H"),
    "genetic": ("Genetic", "#009e73", "^"),
    "prunenet": ("PruneNet", "#aa4499", "D"),
    "prunetrain": ("PruneTrain", "#e69f00", "v"),
    "smof": ("SMOF", "#882255", "P"),
    "smof_filters": ("SMOF, filters only", "#ee99aa", "."),
    "hfp": ("HFP", "#332288", "p"),
    "random": ("Random search", "#333333", "X"),
    "evolution": ("CMA-ES", "#6a8f00", "*"),
    "uniform": ("Uniform widths", "#8c8c8c", "h"),
    "magnitude": ("Magnitude", "#999933", "<"),
    "batchnorm": ("Batch-norm scale", "#56b4e9", ">"),
    "taylor": ("Taylor", "#cc6677", "d"),
}
_OTHERS = [("#44aa99", "8"), ("#a05a2c", "H"), ("#b0578d", "o"), ("#2b7a78", "s")]
# Searches whose reward, cost and action are not what ours are, see `rlprune.peers.paper`
REPLAYED = {"paper_coarse", "paper_fine"}
COSTS = {"macs": "MACs", "peak_memory": "peak memory", "onnx_bytes": "ONNX file"}  # names that read badly as they are
UNITS = {"latency": "ms", "peak_memory": "B", "onnx_bytes": "B"}  # of rlprune's own costs


def method_rank(method: str) -> tuple[int, str]:
    """Sorts methods: the agents first, then the peers, the references, and unknown ones by name."""
    return (list(METHODS).index(method) if method in METHODS else len(METHODS), method)


def method_label(method: str) -> str:
    """A method's name for people."""
    return METHODS[method][0] if method in METHODS else method.replace("_", " ").capitalize()


def method_style(method: str) -> tuple[str, str]:
    """Colour and marker of a method, the same in every figure."""
    return METHODS[method][1:] if method in METHODS else _OTHERS[zlib.crc32(method.encode()) % len(_OTHERS)]


def reward_label(methods: Iterable[str]) -> str:
    """What the rewards of methods are, true of all of them."""
    return "Reward of its own search (%)" if REPLAYED.intersection(methods) else "Accuracy in search (%)"


def network_label(network: str) -> str:
    """A network's name as the field writes it: resnet18 → ResNet-18."""
    return re.sub(r"^(resnet|vgg)(?=\d)", lambda m: {"resnet": "ResNet-", "vgg": "VGG-"}[m[1]], network)


def cost_label(cost: str, capital: bool = False) -> str:
    """A cost's name for people, ``capital`` where it starts a label."""
    label = COSTS.get(cost, cost.replace("_", " "))
    return label[0].upper() + label[1:] if capital else label


def budget_label(budgets: list[dict[str, Any]]) -> str:
    """The budgets of an experiment, such as ``parameters ≤ 10 %, MACs ≤ 20 M``."""
    limit = [
        f"{100 * b['limit']:.4g} %" if b.get("relative", True) else quantity(b["name"], b["limit"]) for b in budgets
    ]
    return ", ".join(f"{cost_label(b['name'])} ≤ {text}" for b, text in zip(budgets, limit, strict=True))


def count(number: float) -> str:
    """A count in three figures or so: 0.92 M, 12.3 k, 1.25 G."""
    for size, letter in ((1e9, " G"), (1e5, " M"), (1e3, " k")):
        if number >= size:
            scaled = number / {" G": 1e9, " M": 1e6, " k": 1e3}[letter]
            return (f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.1f}" if scaled >= 10 else f"{scaled:.2f}") + letter
    return f"{number:.3g}"


def quantity(cost: str, number: float) -> str:
    """A cost with its unit, if it has one: 5 ms, 1.25 MB, 0.92 M."""
    text, unit = count(number), UNITS.get(cost, "")
    return f"{text} {unit}" if unit and text[-1].isdigit() else text + unit


def signed(points: float) -> str:
    """A difference in points: +0.12, −0.42."""
    return f"{round(points, 2) + 0.0:+.2f}".replace("-", "−")  # + 0.0: no −0.00


def duration(seconds: float) -> str:
    """A time to two figures or so: 31 s, 12 min, 2.5 h."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def layer_labels(layers: list[str]) -> list[str]:
    """Layer names without the words before numbers: stages.0.convs.1 → 0.1, unless two would be alike."""
    while len(layers) > 1 and all(name.endswith(".0") for name in layers):
        layers = [name.removesuffix(".0") for name in layers]
    short = [re.sub(r"[A-Za-z_]+\.?(?=\d)", "", name) for name in layers]
    return short if len(set(short)) == len(layers) else layers
