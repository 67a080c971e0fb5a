import pytest
import torch
from torch.testing import assert_close

from lightning_compress.ops.hessian import LEAF, hessian_accumulate_, mirror_, reference, tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("N", "C"), [(1, 1), (17, 96), (63, 97), (5, 200), (130, 801)], ids=str
)  # one block, ragged, nine
def test_triangles_equal_the_reference(N, C, dtype):
    X_NC = torch.randn(N, C).to(dtype)
    H_CC = torch.randn(C, C)
    H_CC = H_CC + H_CC.t()
    expected = reference.hessian_accumulate_(H_CC.clone(), X_NC)
    assert_close(mirror_(hessian_accumulate_(H_CC, X_NC)), expected, rtol=1e-5, atol=1e-4)


def test_above_the_diagonal_nothing_is_read():
    X_NC = torch.randn(50, 300)
    H_CC = torch.zeros(300, 300)
    H_CC[torch.ones(300, 300).triu(LEAF).bool()] = torch.nan
    assert_close(mirror_(hessian_accumulate_(H_CC, X_NC)), X_NC.t() @ X_NC, rtol=1e-5, atol=1e-4)


def test_bf16_adds_up_in_float32():
    X_NC = torch.full((4096, 4), 1.0).bfloat16()  # in bf16 the sum would stop at 256
    assert hessian_accumulate_(torch.zeros(4, 4), X_NC)[0, 0] == 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_float64_sum_adds_up_the_float32_sums_of_the_calls(dtype):
    batches = torch.randn(3, 40, 200).to(dtype)
    one_CC = hessian_accumulate_(torch.zeros(200, 200, dtype=torch.float64), batches[0])
    assert torch.equal(one_CC.tril(), hessian_accumulate_(torch.zeros(200, 200), batches[0]).tril().double())
    forwards, backwards = (torch.zeros(200, 200, dtype=torch.float64) for _ in range(2))
    for i in range(3):
        hessian_accumulate_(forwards, batches[i])
        hessian_accumulate_(backwards, batches[2 - i])
    assert torch.equal(forwards.tril().float(), backwards.tril().float())
    assert_close(forwards.tril(), sum(x.double().t() @ x.double() for x in batches).tril(), rtol=1e-5, atol=1e-4)


def test_float64_inputs_stay_float64():
    X_NC = torch.randn(30, 150, dtype=torch.float64)
    H_CC = hessian_accumulate_(torch.zeros(150, 150, dtype=torch.float64), X_NC)
    assert_close(H_CC.tril(), (X_NC.t() @ X_NC).tril(), rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize(
    ("H", "X", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 4), r"expected H \[C, C\] and X \[N, C\], got \(3, 4\)"),
        (torch.zeros(4, 4), torch.zeros(2, 3), r"got \(4, 4\) and \(2, 3\)"),
        (torch.zeros(4, 4).bfloat16(), torch.zeros(2, 4), "H must be float32 or float64, got torch.bfloat16"),
        (torch.zeros(8, 8)[::2, ::2], torch.zeros(2, 4), "H must be contiguous"),
        (torch.zeros(4, 4, device="meta"), torch.zeros(2, 4), "H is on meta and X on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(H, X, message):
    with pytest.raises(ValueError, match=message):
        hessian_accumulate_(H, X)


def test_op_is_registered_soundly_and_compiles_whole():
    arguments = (torch.zeros(5, 5), torch.randn(7, 5))
    torch.library.opcheck(torch.ops.lightning_compress.hessian_accumulate_, arguments)
    expected = hessian_accumulate_(torch.zeros(5, 5), arguments[1])
    result = torch.compile(hessian_accumulate_, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(result, expected)
    assert result is arguments[0]


@pytest.mark.parametrize("C", [1, 31, 95, 96, 97, 128, 200, 777, 1536])
def test_tiles_cover_the_lower_triangle_once(C):
    seen = torch.zeros(C, C, dtype=torch.int)
    for rows, columns in tiles(0, C):
        seen[rows, columns] += 1
    assert torch.equal(seen.tril(), torch.ones_like(seen).tril())
    assert seen.max() == 1
    if C > 8 * LEAF:
        assert seen.sum() < 0.56 * C * C  # that is what it saves
