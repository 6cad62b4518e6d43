"""Narrow convolutions that oneDNN, torch's library for CPUs, trains slowly or wrongly, done in another way."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Rows of up to 4 pixels: oneDNN's kernels go through a map row by row, and a short row leaves most of a register idle.
WIDEST = 4


class NarrowConvolutions(TorchFunctionMode):
    """While it is entered, ``conv2d`` takes another way to the same numbers where torch's own is bad.

    * Without autocast, a 1×1 convolution of few channels with a stride, such as the shortcut of a slim residual
      network, sees only the pixels that its stride would leave it. For the gradient of its weights, in float32 and
      channels-last, oneDNN writes past the end of its memory where there are fewer input channels than a vector holds
      numbers (16 at most): the process dies, or learns nonsense (uxlfoundation/oneDNN issue 6035, open in torch 2.13).
    * Under autocast, with ``products``, a convolution that keeps the size of a map of at most `WIDEST` pixels each way
      is one product of matrices, and so are both of its gradients: on AMX that is faster (benchmarks/narrow.py).
    """

    def __init__(self, products: bool = True) -> None:
        super().__init__()
        self.products = products

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.conv2d and not kwargs:
            if not torch.is_autocast_enabled("cpu"):
                args = _strided_by_slicing(*args)
            elif self.products and _small(*args):
                images, weight = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in args[:2])
                maps = _Product.apply(images, weight)
                return maps if args[2] is None else maps + args[2].to(maps.dtype)[:, None, None]
        return function(*args, **(kwargs or {}))


def _strided_by_slicing(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, *others: Any
) -> tuple[Any, ...]:
    """The arguments of ``conv2d``, the stride taken out of those of a narrow 1×1 convolution."""
    down, across = _pair(stride)
    narrow = images.ndim == 4 and images.shape[1] < 16 and weight.shape[2:] == (1, 1)
    if narrow and max(down, across) > 1 and (padding == "valid" or _pair(padding) == (0, 0)):
        images, stride = images[..., ::down, ::across], (1, 1)
    return images, weight, bias, stride, padding, *others


def _small(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether a call of ``conv2d`` keeps the size of a small map that lies channels-last."""
    kernel = tuple(weight.shape[2:])
    return (
        images.ndim == 4
        and max(images.shape[2:]) <= WIDEST
        and images.device.type == "cpu"
        and images.is_contiguous(memory_format=torch.channels_last)
        and kernel in ((3, 3), (5, 5))
        and (padding == "same" or _pair(padding) == (kernel[0] // 2, kernel[1] // 2))
        and _pair(stride) == _pair(dilation) == (1, 1)
        and groups == 1
    )


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if isinstance(value, int | str) else tuple(value) * (3 - len(value))


class _Product(torch.autograd.Function):
    """(B, C, H, W) and (O, C, K, K), K odd → (B, O, H, W), padded with zeros."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        return _convolved(images, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        images, weight = ctx.saved_tensors
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = _convolved(gradient, weight.flip(2, 3).transpose(0, 1))
        if ctx.needs_input_grad[1]:
            rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)
            outputs, channels, *kernel = weight.shape
            product = rows.t() @ _columns(images, kernel[0])
            of_weight = product.view(outputs, *kernel, channels).permute(0, 3, 1, 2)
        return of_images, of_weight


def _convolved(images: Tensor, weight: Tensor) -> Tensor:
    product = _columns(images, weight.shape[-1]) @ weight.permute(0, 2, 3, 1).flatten(1).t()
    return product.view(len(images), *images.shape[2:], -1).permute(0, 3, 1, 2)


def _columns(images: Tensor, kernel: int) -> Tensor:
    """What each pixel's output reads: (B, C, H, W) → (B·H·W, K·K·C)."""
    edge = kernel // 2
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, edge, edge, edge, edge))
    return padded.unfold(1, kernel, 1).unfold(2, kernel, 1).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
