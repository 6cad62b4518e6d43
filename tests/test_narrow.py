"""Convolutions of small maps as products of matrices: the same numbers, and only where they are meant."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rlprune import forward, narrow
from rlprune.narrow import NarrowConvolutions
from rlprune.networks import build


def gradients(images, weight, bias, *how, way):
    """Output and gradients in bfloat16 autocast, in float32."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (images, weight, bias) if leaf is not None]
    with torch.autocast("cpu", torch.bfloat16), way:
        maps = F.conv2d(*(leaves if bias is not None else [*leaves, None]), *how)
    # another weight for every number of the output, small enough for bfloat16 to tell neighbours apart; all above zero,
    # as weights that sum to zero leave nothing but rounding of the bias's gradient
    (maps.float() * torch.linspace(0.5, 2, maps.numel()).view(maps.shape)).sum().backward()
    return maps, [maps.float(), *(leaf.grad for leaf in leaves)]


def random(*shape, seed=0):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
    return numbers.to(memory_format=torch.channels_last) if len(shape) == 4 else numbers


@given(
    batch=st.integers(1, 4),
    channels=st.integers(1, 9),
    outputs=st.integers(1, 9),
    height=st.integers(1, narrow.WIDEST),
    width=st.integers(1, narrow.WIDEST),
    kernel=st.sampled_from([3, 5]),
    biased=st.booleans(),
    same=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_product_is_the_convolution(batch, channels, outputs, height, width, kernel, biased, same):
    images, weight = random(batch, channels, height, width), random(outputs, channels, kernel, kernel, seed=1)
    bias = random(outputs, seed=2) if biased else None
    how = ((1, 1), "same" if same else (kernel // 2, kernel // 2), (1, 1), 1)
    _, there = gradients(images, weight, bias, *how, way=NarrowConvolutions())
    _, here = gradients(images, weight, bias, *how, way=contextlib.nullcontext())
    for one, other in zip(there, here, strict=True):
        scale = other.abs().max().clamp_min(1e-6)
        assert ((one - other).abs().max() / scale) < 0.02  # bfloat16 rounds to 1 part in 256, here and there


def test_product_is_what_small_maps_go_through(monkeypatch):
    calls = []
    monkeypatch.setattr(narrow, "_convolved", lambda *a, real=narrow._convolved: (calls.append(1), real(*a))[1])
    weight, how = random(5, 3, 3, 3), ((1, 1), (1, 1), (1, 1), 1)
    maps, _ = gradients(random(2, 3, 4, 4), weight, None, *how, way=NarrowConvolutions())
    assert len(calls) == 2  # forward, and the gradient of the images
    assert maps.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("images", "weight", "how"),
    [
        (random(2, 4, 5, 4), random(6, 4, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),  # too large
        (random(2, 4, 4, 4), random(6, 4, 3, 3), ((2, 2), (1, 1), (1, 1), 1)),
        (random(2, 4, 4, 4), random(6, 4, 3, 3), ((1, 1), (0, 0), (1, 1), 1)),
        (random(2, 4, 4, 4), random(6, 4, 3, 3), ((1, 1), "valid", (1, 1), 1)),
        (random(2, 4, 4, 4), random(6, 4, 3, 3), ((1, 1), (2, 2), (2, 2), 1)),
        (random(2, 4, 4, 4), random(6, 2, 3, 3), ((1, 1), (1, 1), (1, 1), 2)),
        (random(2, 4, 4, 4), random(6, 4, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
        (random(2, 4, 4, 4), random(6, 4, 3, 5), ((1, 1), (1, 2), (1, 1), 1)),
        (random(2, 4, 4, 4).contiguous(), random(6, 4, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),  # code may count on it
    ],
)
def test_other_convolutions_are_left_alone(monkeypatch, images, weight, how):
    monkeypatch.setattr(narrow, "_convolved", lambda *_: pytest.fail("not this one"))
    gradients(images, weight, None, *how, way=NarrowConvolutions())


def test_so_is_float32(monkeypatch):
    monkeypatch.setattr(narrow, "_convolved", lambda *_: pytest.fail("not in float32"))
    with NarrowConvolutions():
        F.conv2d(random(2, 4, 4, 4), random(6, 4, 3, 3), None, 1, 1)


@pytest.mark.parametrize("amx", [True, False])
def test_training_takes_that_way_on_processors_with_amx(monkeypatch, amx):
    monkeypatch.setattr(forward, "cpu", lambda: {"avx512_bf16": True, "amx_bf16": amx})
    entered = []
    monkeypatch.setattr(
        narrow._Product, "apply", lambda *a, real=narrow._Product.apply: (entered.append(1), real(*a))[1]
    )
    network = build("vgg11", 10, 0).to(memory_format=torch.channels_last).train()
    logits = forward.training_logits(network, random(2, 3, 32, 32))
    assert logits.dtype == torch.bfloat16
    assert len(entered) == (4 if amx else 0)  # VGG11's last four layers see maps of 4×4 and 2×2
    logits.float().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
