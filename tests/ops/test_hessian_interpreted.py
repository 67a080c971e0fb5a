"""The kernel against float64 in Triton's interpreter, on the CPU. Needs the extra ``kernels`` and TRITON_INTERPRET=1
before Triton is imported (make test-kernels does both)."""

import os
from dataclasses import replace
from math import ceil

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.hessian import kernel, mirror_
from lightning_compress.ops.hessian.kernel import accumulate_
from lightning_compress.ops.hessian.launch import HessianLaunch, rule, tiles

pytestmark = pytest.mark.usefixtures("poisoned")

SQUARE = HessianLaunch(32, 32, 16, 1, 1, 8, 3, False)
WIDE = HessianLaunch(32, 64, 16, 1, 1, 8, 3, False)
BY_DESCRIPTOR = HessianLaunch(32, 64, 16, 1, 1, 8, 3, True)


def check(X_NC, launch, sums=torch.float32, atol=1e-4):
    """H holds numbers below the diagonal and NaN where no tile may write: above the tiles on the diagonal."""
    C = X_NC.shape[1]
    start = torch.randn(C, C)
    start = (start + start.t()).to(sums)
    H_CC = start.clone()
    accumulate_(H_CC, X_NC, launch)
    expected = start.double() + X_NC.double().t() @ X_NC.double()
    assert_close(H_CC.double().tril(), expected.tril(), rtol=1e-5, atol=atol)
    full = mirror_(H_CC)
    assert torch.equal(full, full.t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("launch", [SQUARE, WIDE], ids=str)
@pytest.mark.parametrize(("N", "C"), [(1, 1), (17, 33), (40, 100), (16, 128), (70, 161)], ids=str)
def test_equals_float64(N, C, launch, dtype):
    check(torch.randn(N, C).to(dtype), launch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "C"), [(17, 72), (40, 128)], ids=str)
def test_descriptors_equal_float64(N, C, dtype):
    check(torch.randn(N, C).to(dtype), BY_DESCRIPTOR)


@pytest.mark.parametrize("launch", [SQUARE, BY_DESCRIPTOR, replace(WIDE, tail=2, pieces=3)], ids=str)
@pytest.mark.parametrize(
    ("N", "C", "sums"),
    [(1, 1, torch.float32), (17, 33, torch.float64), (50, 72, torch.float32), (50, 72, torch.float64)],
    ids=str,
)
def test_float32_is_accurate_to_a_hundred_thousandth(N, C, launch, sums, monkeypatch):
    """Of the root of both squares on the diagonal; products of bf16(X) alone miss that by a factor of 100."""
    monkeypatch.setattr(kernel, "ROWS", 16)
    X = torch.randn(N, C) * torch.logspace(-3, 3, C)
    exact = X.double().t() @ X.double()
    H = torch.zeros(C, C, dtype=sums)
    accumulate_(H, X, launch)
    norms = exact.diagonal().sqrt()
    assert ((H.double() - exact) / norms[:, None] / norms).tril().abs().max() < 1e-5
    rounded = X.bfloat16().double()
    assert ((rounded.t() @ rounded - exact) / norms[:, None] / norms).tril().abs().max() > 1e-4


def test_the_parts_of_float32_are_the_numbers_rounded_and_the_rest():
    X = torch.randn(60, 37).t()[:, ::2]  # rows and columns lie apart
    parts = kernel.two_parts(X)
    assert parts.shape == (256, 30)
    assert kernel._aligned(parts)
    high, low = parts.split(128)
    assert torch.equal(high[:37], X.bfloat16())
    assert torch.equal(low[:37], (X - X.bfloat16().float()).bfloat16())
    assert not high[37:].any()
    assert not low[37:].any()


@pytest.mark.parametrize("launch", [SQUARE, WIDE, BY_DESCRIPTOR], ids=str)
@pytest.mark.parametrize(("N", "C"), [(40, 96), (37, 104)], ids=str)
def test_sums_may_be_float64(N, C, launch):
    check(torch.randn(N, C).half(), launch, torch.float64)


@pytest.mark.parametrize("sums", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("launch", [SQUARE, WIDE, BY_DESCRIPTOR], ids=str)
@pytest.mark.parametrize(("tail", "pieces"), [(1, 2), (2, 3), (100, 2)], ids=str)  # of 3 pieces the last has 5 tokens
def test_pieces_of_the_last_tiles_add_up(tail, pieces, launch, sums):
    check(torch.randn(37, 104).half(), replace(launch, tail=tail, pieces=pieces), sums)


def test_tokens_and_columns_may_lie_apart():
    check(torch.randn(50, 80).half()[::2, ::2], SQUARE)
    check(torch.randn(40, 25).half().t(), SQUARE)


def test_many_tokens_are_taken_in_turn(monkeypatch):
    monkeypatch.setattr(kernel, "TOKENS", 16)
    monkeypatch.setattr(kernel, "FLOAT32_TOKENS", 16)
    monkeypatch.setattr(kernel, "ROWS", 16)
    check(torch.randn(40, 33).half(), SQUARE)
    check(torch.randn(40, 33), SQUARE, atol=5e-4)
    check(torch.randn(0, 33).half(), SQUARE)


@pytest.mark.parametrize(("block_i", "block_j"), [(128, 128), (128, 256)])
@pytest.mark.parametrize("C", [1, 128, 129, 700, 4096, 14336, 28672])
def test_programs_cover_the_triangle_once(C, block_i, block_j):
    """The rule of the kernel, counted out in integers."""
    ratio, seen = block_j // block_i, set()
    pairs = ceil(ceil(C / block_i) / ratio)
    for p in range(pairs):
        seen |= {(ratio * p + r, j) for r in range(ratio) for j in range(p + 1)}
    assert len(seen) == tiles(C, block_i, block_j)
    needed = {(i, j) for i in range(ceil(C / block_i)) for j in range(i * block_i // block_j + 1)}
    assert needed <= seen


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("processors", [108, 132, 148])
def test_the_rule_fills_the_processors(processors, descriptors):
    """At least 85 % of the time of each, for 16384 tokens and every width; on an H200 for 4096 tokens, too."""
    for C in range(1024, 14336 + 1, 128):
        for N in (16384, 4096) if processors == 132 else (16384,):
            launch = rule(N, C, processors, descriptors)
            count, tail = tiles(C, launch.block_i, launch.block_j), launch.tail if launch.pieces > 1 else 0
            waves = ceil((count - tail) / processors) + ceil(tail * launch.pieces / processors) / launch.pieces
            assert count >= 0.85 * waves * processors, (C, N, launch)
            assert launch.pieces == 1 or N // launch.pieces >= 512


def test_few_columns_are_computed_in_pieces():
    for C in (128, 512):
        launch = rule(16384, C, 132, descriptors=True)
        assert launch.tail == tiles(C, launch.block_i, launch.block_j)
        assert launch.pieces * launch.tail >= min(132, 32 * launch.tail) * 0.85
    assert rule(16384, 14336, 132, True).block_j == 256
    assert rule(100, 4096, 132, True).pieces == 1
