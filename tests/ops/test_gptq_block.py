"""The op on a CPU against float64, its messages, and the choice of the kernel on CUDA."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.ops import gptq_block as module
from lightning_compress.ops.gptq_block import Block, Grid, Rounding, cpu, cuda, gptq_block_, reference
from lightning_compress.ops.gptq_block.grid import EXPONENT, LARGEST, MANTISSA, round_float_
from tests.support.gptq_block_cases import GRIDS, block


def run(A, W, U, rounding, keep, **options):
    A, Q, D = A.clone(), torch.full_like(A, torch.nan), torch.full_like(A, torch.nan)
    gptq_block_(Block(A, Q, D, W, U, keep), rounding, **options)
    return A, Q, D


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("b", "R"), [(1, 1), (17, 5), (50, 9)], ids=str)
def test_equals_float64(b, R, name, keep, dtype):
    for zero in (False, True) if name.startswith("int") else (False,):
        A, W, U, rounding, mask = block(b, R, GRIDS[name], zero=zero, keep=keep)
        if rounding is not None:
            points = rounding.zero_GR
            scales = rounding.scale_GR.to(dtype), None if points is None else points.to(dtype)
            rounding = rounding._replace(scale_GR=scales[0], zero_GR=scales[1])
        case = (*(t.to(dtype) for t in (A, W, U.triu(1).nan_to_num())), rounding, mask)
        for actual, exact in zip(run(*case), reference.gptq_block(*case), strict=True):
            assert_close(actual.double(), exact, rtol=1e-5, atol=2e-6 if dtype == torch.float32 else 1e-12)


def test_columns_may_come_a_few_at_a_time():
    A, W, U, rounding, keep = block(48, 6, GRIDS["int4"], keep=True)
    U = U.triu(1).nan_to_num()
    at_once = run(A, W, U, rounding, keep)
    A, Q, D = A.clone(), torch.full_like(A, torch.nan), torch.full_like(A, torch.nan)
    for start, stop in itertools.pairwise((0, 3, 4, 20, 41, 48)):
        gptq_block_(Block(A, Q, D, W, U, keep), rounding, columns=(start, stop))
        if stop < 48:
            assert Q[stop:].isnan().all()
    for actual, expected in zip((A, Q, D), at_once, strict=True):
        assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_numbers_of_a_format_are_the_nearest(bits):
    largest = {4: 6.0, 6: 7.5, 8: 448.0}[bits]
    v = torch.cat([torch.linspace(-1.2 * largest, 1.2 * largest, 4001), torch.linspace(-0.05, 0.05, 401)])
    one, zero = torch.ones_like(v), torch.zeros_like(v)
    exact = reference.nearest(v.double(), one.double(), zero.double(), Grid(-largest, largest, bits))
    assert torch.equal(round_float_(v.clone(), bits).double(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_exponent_of_a_float_is_that_of_frexp(bits, dtype):
    """To the bit, with the sign of zero: over all sizes, at the limits, and past them."""
    v = torch.randn(7, 20_000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    v *= torch.logspace(-12, 6, 7, dtype=dtype)[:, None]
    v[0, :6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-42, 448.0], dtype=dtype)
    v.clamp_(-LARGEST[bits], LARGEST[bits])
    exponent = torch.frexp(v).exponent.sub(1).clamp(min=EXPONENT[bits])
    step = torch.ldexp(torch.ones_like(v), exponent - MANTISSA[bits])
    expected, integers = (v / step).round() * step, torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.equal(round_float_(v.clone(), bits).view(integers), expected.view(integers))


@pytest.mark.parametrize("name", ["int4", "none"])
def test_op_is_registered_soundly_and_compiles_whole(name):
    A, W, U, rounding, keep = block(20, 5, GRIDS[name], keep=True)
    U = U.triu(1).nan_to_num()
    g, *scales = rounding or (Grid(0, 0), None, None, None)
    empty = torch.zeros_like(A)
    arguments = (A.clone(), empty, empty.clone(), W, U, *scales, keep)
    numbers = (float(g.low), float(g.high), g.float_bits, g.stored, g.through_bf16, 0, 20, 16)
    torch.library.opcheck(torch.ops.lightning_compress.gptq_block_, (*arguments, *numbers))
    compiled = torch.compile(gptq_block_, fullgraph=True, backend="aot_eager")
    outputs = A.clone(), torch.zeros_like(A), torch.zeros_like(A)
    compiled(Block(*outputs, W, U, keep), rounding)
    for actual, expected in zip(outputs, run(A, W, U, rounding, keep), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_bR": torch.zeros(3, 4)}, r"expected A, Q, D and W \[b, R\] and U \[b, b\], got \(2, 4\), .*\(3, 4\)"),
        ({"U_bb": torch.zeros(2, 3)}, r"and \(2, 3\)"),
        ({"W_bR": torch.zeros(2, 4).half()}, r"all in float32 or all in float64, got .*float16.*; .*convert with"),
        ({"scale_GR": torch.ones(1, 3)}, r"expected a scale \(and zero point\) \[G, 4\] .* got \(1, 3\) and \(2,\)"),
        ({"zero_GR": torch.ones(2, 4)}, r"got \(1, 4\), zero point \(2, 4\)"),
        ({"group_b": torch.zeros(2)}, "the group of each column must be int32 or int64, got torch.float32"),
        ({"keep_bR": torch.ones(2, 4)}, r"expected a bool mask \(2, 4\), got torch.float32 \(2, 4\)"),
        ({"W_bR": torch.zeros(4, 2).t()}, "must be contiguous: columns of the weight are rows here"),
        ({"W_bR": torch.zeros(2, 4, device="meta")}, "all tensors must be on one device, got cpu, meta"),
        ({"columns": (1, 3)}, r"expected columns 0 <= start <= stop <= 2 .* got \(1, 3\) and 16"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    columns = Block(*(torch.zeros(2, 4) for _ in range(4)), torch.zeros(2, 2))
    rounding = Rounding(Grid(-8, 7), torch.ones(1, 4), None, torch.zeros(2).long())
    gptq_block_(columns, rounding)
    (name, value), limits = next(iter(change.items())), change.get("columns")
    if name in Block._fields:
        columns = columns._replace(**{name: value})
    elif limits is None:
        rounding = rounding._replace(**{name: value})
    with pytest.raises(ValueError, match=message):
        gptq_block_(columns, rounding, limits)


def test_other_grids_are_refused():
    with pytest.raises(ValueError, match="float_bits must be 0 for integers, or 4, 6 or 8, got 5"):
        Grid(-1, 1, 5)
    with pytest.raises(ValueError, match=r"stored in float16, bfloat16, float32 or float64, got torch.int8"):
        Grid(-1, 1, 0, torch.int8)


def test_which_kernel_runs_and_its_warnings(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
    A, W, U, rounding, _ = block(2, 4, GRIDS["int4"])
    single = Block(A, A, A, W, U), rounding
    double = Block(A.double(), A, A, W, U), rounding
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "missing", lambda *of: None)
    assert module._kernel(*single) is cuda.gptq_block_
    monkeypatch.setattr(cuda, "missing", lambda *of: "NVRTC is not installed")
    with pytest.warns(UserWarning, match="by Triton's kernel, not by the one in CUDA C.*NVRTC is not installed"):
        assert module._kernel(*single).__module__.endswith("gptq_block.kernel")
    with pytest.warns(UserWarning, match=r"rounded one by one, without a fused kernel: the kernel needs float32"):
        assert module._kernel(*double) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="one by one, without a fused kernel: Triton is not installed"):
        assert module._kernel(*single) is None


def test_kernels_take_128_columns_at_a_time(monkeypatch):
    """The way through the kernels, with torch's loop in the place of one."""
    A, W, U, rounding, keep = block(300, 3, GRIDS["int4"], keep=True)
    U = U.triu(1).nan_to_num()
    expected = run(A, W, U, rounding, keep)
    sizes = []

    def kernel_(columns, rounding):
        sizes.append(len(columns.A_bR))
        cpu.gptq_block_(columns, rounding, 0, len(columns.A_bR), 16)

    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(module, "_kernel", lambda *of: kernel_)
    outputs = A.clone().as_subclass(OnCuda), torch.zeros_like(A), torch.zeros_like(A)
    module._block_(Block(*outputs, W, U, keep), rounding, 0, 300, 16)
    assert sizes == [128, 128, 44]
    for actual, exact in zip(outputs, expected, strict=True):
        assert_close(actual.as_subclass(torch.Tensor), exact, rtol=1e-5, atol=2e-6)
