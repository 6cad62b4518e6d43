"""Which places along the axes of a network's layers belong to the same filter.

Torch-Pruning's dependency graph (Fang et al. 2023) says how layers feed each other.
Every one of its edges is walked once, place by place: what meets in a batch norm, a
concatenation or a residual sum is one filter. A filter stays, for a reason that is
kept, where it meets something that cannot lose single filters.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np
import torch
import torch_pruning
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.node import Node

from rlprune.errors import InputError, first_line
from rlprune.forward import evaluating
from rlprune.masking import carriers, rebuild
from rlprune.places import OUTPUT, Key, Places

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
VISITS = 1000  # walks through a node, after which there is taken to be no end


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of a module, in the terms of `rlprune.masking.carriers`.

    Attributes:
        module: its name.
        kind: "out", "in" or "channels".
        length: number of places along it.
        places: those that belong to a filter that some layer makes, ascending, (n,).
        filters: the filter of each, (n,): a number that says nothing but which places belong together.
    """

    module: str
    kind: str
    length: int
    places: np.ndarray = field(repr=False)
    filters: np.ndarray = field(repr=False)


@dataclass(frozen=True, eq=False)
class Coupling:
    """What `couple` finds.

    Attributes:
        axes: in order of execution.
        reasons: filter → why it stays; `OUTPUT` if it is one of the network's outputs.
        layers: names of the convolution and linear layers that run in evaluation mode, in order.
    """

    axes: list[Axis]
    reasons: dict[int, str]
    layers: list[str]


def couple(network: nn.Module, example_input: Tensor, excluded: Container[str] = ()) -> Coupling:
    """Follow every filter through the network.

    Args:
        network: (N, …) → (N, classes); it stays as it is.
        example_input: a batch that the network can process, on its device.
        excluded: names of modules whose filters stay.

    Raises:
        InputError: the example input does not fit, the output is not (N, classes), or tracing fails.
    """
    order: dict[nn.Module, int] = {}
    layers: list[nn.Module] = []

    def run(twin: nn.Module, images: Tensor) -> list[Tensor]:
        outputs = [_output(twin, images)]
        layers.extend(m for m in order if isinstance(m, LAYERS))
        if any(isinstance(m, LAYERS) and m not in order for m in twin.modules()):
            # a branch may run in training only: the containers train, but not the batch norms and dropouts in them
            for module in twin.modules():
                module.training = any(True for _ in module.children())
            with contextlib.suppress(Exception):
                outputs += [t for t in tree_leaves(twin(images)) if isinstance(t, Tensor) and t.requires_grad]
            twin.eval()
        return [output * 1 for output in outputs]  # an operation tells what makes an output from what does not

    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings(action="ignore"):
            # frozen weights leave no trace in autograd; the twin's share memory with them but ask for gradients
            leaves = {id(p): nn.Parameter(p.detach(), requires_grad=True) for p in network.parameters()}
            twin = rebuild(network, dict(leaves))
            for module in twin.modules():
                module.register_forward_hook(lambda m, *_: order.update({m: order.get(m, len(order))}))
            graph = _Graph().build_dependency(twin, _one(twin, example_input), run, verbose=False)
            names: dict[object, str] = {module: name for name, module in twin.named_modules()}
            names |= {parameter: name for name, parameter in twin.named_parameters()}
            places = _walk(graph, names, order)
    except InputError:
        raise
    except Exception as error:  # whatever the network's own code or the tracer raises
        raise InputError(f"The network cannot be traced: {first_line(error)}.") from error

    for (node, side), seen in places.seen.items():
        if side != "in" and names.get(node.module) in excluded:
            places.stay(places.ids((node, side), seen), "excluded", first=True)
    whole = _tie(places, names)
    axes = []
    for (node, side), seen in places.seen.items():
        module = node.module
        if module not in order or _holds_nothing(module) or (side == "in" and module in whole):
            continue
        kind = side if isinstance(module, LAYERS) and module not in whole else "channels"
        if found := carriers(module, kind):
            filters = places.filters(places.ids((node, side), seen))
            axes.append(Axis(names[module], kind, getattr(module, found[1][0]), seen, filters))
    rank = {names[module]: position for module, position in order.items()}
    axes.sort(key=lambda axis: (rank[axis.module], axis.kind))
    return Coupling(axes, places.reasons, [names[module] for module in layers])


def _one(network: nn.Module, example_input: Tensor) -> Tensor:
    """The first of several inputs, if the network takes it alone: instance norm, for one, views images as channels."""
    given = example_input[:1].clone()
    try:
        with torch.no_grad(), evaluating(network):
            alone = network(given)
        fits = isinstance(alone, Tensor) and alone.ndim == 2 and len(alone) == 1
    except Exception:  # whatever the network's own code raises
        fits = False
    if given._version:
        raise InputError(
            "The network changes its input in place, and the caller's images with it: let it compute a new tensor, as "
            "in x = x - 0.5 for x.sub_(0.5) or nn.ReLU() for nn.ReLU(inplace=True)."
        )
    return example_input[:1] if fits else example_input


def _output(network: nn.Module, example_input: Tensor) -> Tensor:
    """The network's output, found to be one that can be traced."""
    try:
        output = network(example_input)
    except Exception as error:  # whatever the network's own code raises
        raise InputError(
            f"The network cannot process the example input of shape {tuple(example_input.shape)}: {first_line(error)}."
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(example_input):
        given = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise InputError(f"The network's output must have shape ({len(example_input)}, classes), not {given}.")
    if not output.requires_grad:
        raise RuntimeError("its code detaches the output from the weights")
    return output


class _Graph(torch_pruning.DependencyGraph):
    """A dependency graph that knows which views move filters about, as a channel shuffle does."""

    def _build_dependency(self, module2node: dict[object, Node]) -> None:
        super()._build_dependency(module2node)
        views = [node for node in module2node.values() if node.type == ops.OPTYPE.RESHAPE and node.inputs]
        self.shuffles = {node for node in views if _shuffles(node.grad_fn)}
        for node in self.shuffles:  # or its index mapping, which cannot express them, stops with an error
            node.type = ops.OPTYPE.ELEMENTWISE


def _shuffles(view: torch.autograd.graph.Node) -> bool:
    """Whether a view is none of those that leave filters in their order."""
    before, made = getattr(view, "_saved_self_sym_sizes", None), getattr(view, "_input_metadata", None)
    if not before or not made or before[:2] == (after := tuple(made[0].shape))[:2]:
        return False
    if [side for side in before if side > 1] == [side for side in after if side > 1]:
        return False
    if before[0] == after[0] and 2 in (len(before), len(after)):
        return False  # to a flat image and back
    return before[-1] != after[-1] or 2 not in (len(before), len(after))  # a linear layer's to rows and back


def _walk(graph: _Graph, names: dict[object, str], order: dict[nn.Module, int]) -> Places:
    """All places that the filters of any layer reach, linked along the graph's edges."""
    places = Places()
    queue: dict[Key, list[np.ndarray]] = {}  # first come, first served, with all that has arrived by then
    visits: Counter[Key] = Counter()
    for module in sorted((m for m in graph.module2node if m in order and isinstance(m, LAYERS)), key=order.__getitem__):
        count = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        queue[graph.module2node[module], "out"] = [np.arange(count)]
    while queue:
        node, side = next(iter(queue))
        new = places.visit((node, side), np.concatenate(queue.pop((node, side))))
        if not len(new):
            continue
        visits[node, side] += 1
        if visits[node, side] > VISITS:  # a loop in the code, such as x + x[:, 1:], moves them on for ever
            places.stay(places.ids((node, side), new), "the network's code adds them to others that it has moved")
            continue
        if reason := _reason(graph, node, side, new, names):
            places.stay(places.ids((node, side), new), reason)
            continue
        if node.type == ops.OPTYPE.SPLIT and len(sizes := set(node.module.split_sizes or [])) == 1:
            # a chunk is cut in the middle again if all its parts keep the same places
            places.link(places.ids((node, side), new), places.ids((node, side), new % sizes.pop()))
        starts = [_HybridIndex(place, place) for place in new.tolist()]
        for number, (other, edge) in enumerate(zip([*node.inputs, *node.outputs], node.dependencies, strict=True)):
            forward = number >= len(node.inputs)
            if side == ("in" if forward else "out"):
                continue
            here, there = _mapped(edge, starts) if any(edge.index_mapping) else (new, new)
            key = other, "channels" if not isinstance(other.module, LAYERS) else "in" if forward else "out"
            places.link(places.ids((node, side), here), places.ids(key, there))
            queue.setdefault(key, []).append(there)
    return places


def _mapped(edge: Dependency, starts: list[_HybridIndex]) -> tuple[np.ndarray, np.ndarray]:
    """Places at an edge's start, and at its end, pair by pair."""
    pairs = starts
    for mapping in edge.index_mapping:
        pairs = pairs if mapping is None else mapping(pairs)
    return np.array([p.root_idx for p in pairs], np.int64), np.array([p.idx for p in pairs], np.int64)


def _reason(graph: _Graph, node: Node, side: str, places: np.ndarray, names: dict[object, str]) -> str | None:
    """Why filters with these places cannot leave; None if they can."""
    module = node.module
    if node.type == ops.OPTYPE.OUTPUT:
        return OUTPUT
    if node in graph.shuffles:
        return "a view in the network's code rearranges its filters"
    if isinstance(module, nn.Parameter):
        return f"it is coupled with {names[module]}, a parameter outside any layer"
    if module not in names or _holds_nothing(module):
        return None
    kind = side if isinstance(module, LAYERS) else "channels"
    if carriers(module, kind) is None:
        return f"{names[module]} ({type(module).__name__}) ties its filters to each other"
    tensors, attributes = carriers(module, kind)
    for tensor in tensors:
        if tensor not in module._parameters and tensor not in module._buffers:
            return f"the {tensor} of {names[module]} is computed from other parameters"
    if places.max() >= getattr(module, attributes[0]):
        return f"code in front of {names[module]} moves its filters to another dimension"
    return None


def _holds_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _tie(places: Places, names: dict[object, str]) -> set[nn.Module]:
    """Tie the filters of grouped convolutions so that a grouped convolution remains.

    There are two ways. Either whole groups leave, inputs and outputs together, or filters at the same
    position in every group, of the inputs and of the outputs apart. The one with more parts to choose from is
    taken: whole groups for many narrow ones (ResNeXt's first stages, depth-wise), positions for few wide ones
    (large RegNets). Positions need no removable inputs, so they also step in where a whole group must stay.

    Returns:
        the convolutions that lose whole groups.
    """
    blocks: dict[nn.Module, tuple[np.ndarray, np.ndarray]] = {}
    for node in [node for node, side in places.seen if side == "out"]:
        conv = node.module
        if isinstance(conv, nn.modules.conv._ConvNd) and conv.groups > 1 and conv not in blocks:
            inputs, outputs = np.arange(conv.in_channels), np.arange(conv.out_channels)
            orphans = np.setdiff1d(inputs, places.seen.get((node, "in"), inputs[:0]))
            if len(orphans):
                reason = f"{names[conv]} is a grouped convolution of filters that stay"
                places.stay(places.ids((node, "in"), orphans), reason)
            ids = (places.ids((node, "in"), inputs), places.ids((node, "out"), outputs))
            blocks[conv] = tuple(part.reshape(conv.groups, -1) for part in ids)
    whole = {
        conv
        for conv, (inputs, outputs) in blocks.items()
        if conv.groups > min(inputs.shape[1], outputs.shape[1]) and carriers(conv, "channels")
    }
    while True:
        links = []
        for conv, (inputs, outputs) in blocks.items():
            anchors = (inputs[:, :1], inputs[:, :1]) if conv in whole else (inputs[:1], outputs[:1])
            links += zip(anchors, (inputs, outputs), strict=True)
        places.join(links)
        stuck = (conv for conv in blocks if conv in whole and not _is_depthwise(conv))
        stuck = next((conv for conv in stuck if any(map(places.stays, blocks[conv]))), None)
        if stuck is None:
            return whole
        whole.remove(stuck)


def _is_depthwise(conv: nn.Module) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels
