"""A second device without one: tensors that say they are on it, compute on the CPU, and refuse company from the CPU.

There is no GPU where these tests run, and code that mixes devices works on the CPU alone. A tensor of the device "meta"
wraps one of the CPU here; operations on both at once raise, as they would on a GPU, and so does a generator of the CPU
that draws for it.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
# these may take indices or values from the CPU on a GPU, too
WELCOME = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_"}
WELCOME |= {"aten::_index_put_impl_", "aten::_copy_from"}


class Elsewhere(torch.Tensor):
    """A tensor of the other device; ``inner`` holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        how = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=DEVICE, **how)
        made.inner = inner
        return made

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = Elsewhere(self.inner.clone())
            given = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if given else copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class There(TorchDispatchMode):
    """What is made on the other device is made there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function, args, kwargs):
    """An operation on either device, never on both."""
    name, asked = function._schema.name, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim > 0]
    if "index_put" in name:  # the CPU may say where, not what
        strangers = [tensor for tensor in strangers if tensor is args[2]]
    if there and strangers and (name not in WELCOME or ("index" in name and not isinstance(args[0], Elsewhere))):
        raise RuntimeError(
            f"{name} is given tensors of two devices: {[tuple(t.shape) for t in strangers]} are the CPU's"
        )
    goes = torch.device(asked).type == DEVICE.type if asked is not None else bool(there)
    generator = kwargs.get("generator")
    if goes and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name} is to draw from a generator of the CPU for another device")
    kwargs = dict(kwargs)
    if asked is not None and goes:
        kwargs["device"] = torch.device("cpu")
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False
    args, kwargs = tree_map(stripped, (args, kwargs))
    made = function(*args, **kwargs)
    if name == "aten::_local_scalar_dense":
        return made
    known = {id(tensor.inner): tensor for tensor in there}  # what an operation changes in place
    return tree_map(lambda leaf: wrapped(leaf, known, goes), made)


def stripped(leaf):
    return leaf.inner if isinstance(leaf, Elsewhere) else leaf


def wrapped(leaf, known, goes):
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return known.get(id(leaf), Elsewhere(leaf) if goes else leaf)
