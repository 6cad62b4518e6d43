"""Passes through a network: its mode, the precision, how many images at a time and how they lie in memory."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlprune.data import Dataset, Split
from rlprune.errors import InputError, first_line, one_of
from rlprune.narrow import NarrowConvolutions

P, R = ParamSpec("P"), TypeVar("R")


def half_precision(device: torch.device | str) -> contextlib.AbstractContextManager:
    """bfloat16 autocast where the hardware multiplies it natively, else nothing.

    On a CPU without such instructions bfloat16 is emulated and slower than float32. ``RLPRUNE_PRECISION=float32`` in
    the environment says that a network's code cannot do with bfloat16.
    """
    device = torch.device(device)
    if given := os.environ.get("RLPRUNE_PRECISION"):
        one_of("RLPRUNE_PRECISION", given, ["float32"])
        return contextlib.nullcontext()
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # of other kinds of device nothing is known
        native = device.type == "cpu" and _cpu_has_bfloat16()
    return torch.autocast(device.type, torch.bfloat16) if native else contextlib.nullcontext()


def cpu() -> dict[str, Any]:
    """What torch knows of the processor: its name and instruction sets; empty before torch 2.13."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _cpu_has_bfloat16() -> bool:
    capabilities = cpu()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@contextlib.contextmanager
def seeded(seed: int, device: torch.device, state: Sequence[Tensor] = ()) -> Iterator[None]:
    """The global generators, which dropout draws from, begin at a seed or at a state; then they get their own back."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed those of all GPUs, too
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        if state:
            torch.set_rng_state(state[0])
        if cuda and state[1:]:
            torch.cuda.set_rng_state(state[1], device)
        yield


def learning(function: Callable[P, R]) -> Callable[P, R]:
    """A function that learns does so wherever it is called, under ``torch.no_grad()``, too."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def logits_of(output: Any) -> Tensor:
    """The first of several outputs, such as networks with auxiliary heads give in training (GoogLeNet, Inception)."""
    return output if isinstance(output, Tensor) else output[0]


def training_logits(network: nn.Module, images: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Logits to learn from, (B, classes), in half precision where that pays.

    Args:
        network: in the mode that it is to have.
        images: normalised, (B, C, H, W).
        weights: in place of parameters of the network, by name.
    """
    on_cpu = images.device.type == "cpu"
    other_ways = NarrowConvolutions(products=cpu().get("amx_bf16", False)) if on_cpu else contextlib.nullcontext()
    with half_precision(images.device), other_ways:
        return logits_of(functional_call(network, weights, (images,)) if weights else network(images))


def read_by(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What a layer was called with, for a hook that is registered ``with_kwargs``: by place, or as ``input=``."""
    return inputs[0] if inputs else named["input"]


def suitable_batch(images: Tensor) -> int:
    """How many of these images (N, C, H, W) go through a network at a time: as many pixels as 250 of 32×32.

    More was no faster on two CPU cores, and images of 224×224 want the memory.
    """
    return max(8, 250 * 32 * 32 // (images.shape[-2] * images.shape[-1]))


@torch.no_grad()
def suited(network: nn.Module, data: Dataset) -> Dataset:
    """The data in a memory format that the network can take: channels-last, which is faster, if it can.

    Code such as ``x.view(len(x), -1)`` runs only where channel lies after channel.

    Raises:
        InputError: it can take neither.
    """
    few = data.normalise(data.train.images[:2])
    if data.memory_format == torch.contiguous_format or not len(few):
        return data
    tensors = (*network.parameters(), *network.buffers())
    if any(tensor.ndim == 5 for tensor in tensors):  # 3-d convolutions have a format of their own
        return data.contiguous()
    half = half_precision(data.device)
    with evaluating(network), half:
        try:
            network(few)
        except Exception:  # whatever the network's own code raises
            try:
                network(few.contiguous())
            except Exception as error:
                remedy = (
                    "; RLPRUNE_PRECISION=float32 in the environment keeps it from bfloat16"
                    if isinstance(half, torch.autocast)
                    else ""
                )
                raise InputError(f"The network cannot process the images: {first_line(error)}{remedy}.") from error
            return data.contiguous()
    return data


def check_classes(network: nn.Module, data: Dataset) -> None:
    """Raise `InputError` unless the network, on the data's device, has an output for every label."""
    data = suited(network, data)
    with torch.no_grad(), evaluating(network), half_precision(data.device):
        few = network(data.normalise(data.train.images[:2]))  # one alone may be squeezed by the network's code
    if not few.isfinite().all():
        raise InputError("The network's outputs are not finite numbers: look at its weights, and at what it is given.")
    check_labels(max(int(split.labels.max()) for split in (data.train, data.validation) if len(split)), few.shape[-1])


def check_labels(most: int, classes: int) -> None:
    """Raise `InputError` unless a network of so many classes has an output for the largest label."""
    if most >= classes:
        raise InputError(f"There is a label {most}, but the network has outputs for 0 to {classes - 1}.")


def accuracy(network: nn.Module, data: Dataset, split: Split) -> float:
    """Percent of a split's images that the network classifies rightly, in evaluation mode."""
    if not isinstance(data, Dataset):
        raise InputError("An accuracy is of a split of a Dataset: rlprune.own.from_tensors makes one of tensors.")
    if not len(split):
        raise InputError("There is no image in this split to measure an accuracy on.")
    try:
        return _accuracy(network, data, split)
    except RuntimeError:
        if (plain := suited(network, data)) is data:
            raise
        return _accuracy(network, plain, Split(split.images.contiguous(), split.labels))


@torch.no_grad()
def _accuracy(network: nn.Module, data: Dataset, split: Split) -> float:
    correct = torch.zeros((), device=data.device)
    batch_size = suitable_batch(split.images)
    with evaluating(network):
        for start in range(0, len(split), batch_size):
            part = split[slice(start, start + batch_size)]
            with half_precision(data.device):
                logits = network(data.normalise(part.images))
            correct += (logits.argmax(1) == part.labels).sum()
    return 100 * correct.item() / len(split)
