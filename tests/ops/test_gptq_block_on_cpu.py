"""kernel.cu compiled as C++ for this CPU, a thread for each of its threads: the same source, the same arithmetic."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.ops.gptq_block import Grid, Rounding, reference
from lightning_compress.ops.gptq_block.cuda import SOURCE, options, padded
from tests.support.gptq_block_cases import GRIDS, block

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")

MASKED = ("int3 bf16", "E2M1 microscaled", "none")  # grids that are tested with a mask
STANDS_FOR_A_GPU = """
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>
using std::max; using std::min;
#define ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(n)
#define __align__(n)
#define __syncthreads() everyone->arrive_and_wait()
struct Index { int x; };
static thread_local Index threadIdx, blockIdx;
static std::barrier<>* everyone;
alignas(16) float shared[128 * 128 + 128 * 64];
static unsigned BITS(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static float FROM_BITS(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
static float reciprocal(float x) { return std::nextafterf(1.0f / x, WORSE); }          // as wrong as a GPU's may be
#define COPY_16_BYTES(to, from) memcpy(to, from, 16)
#define COMMIT
#define WAIT_FOR_ALL_BUT(groups)
#define STORE_IF(condition, to, value) do { if (condition) *(to) = (value); } while (0)
"""
LAUNCH = """
extern "C" void launch(float* A, float* Q, float* D, const float* W, const float* U, const float* S, const float* Z,
                       const int* group, const unsigned char* keep, int R, int b, int stride_u, float low, float high) {
    for (int i = 0; i * THREADS < R; ++i) {
        std::barrier<> all(THREADS);
        everyone = &all;
        std::vector<std::thread> threads;
        for (int t = 0; t < THREADS; ++t)
            threads.emplace_back([=] {
                threadIdx.x = t; blockIdx.x = i;
                gptq_block(A, Q, D, W, U, S, Z, group, keep, R, b, stride_u, low, high);
            });
        for (auto& thread : threads) thread.join();
    }
}
extern "C" long wrong_quotients(const float* a, const float* s, long n) {
    long wrong = 0;
    for (long i = 0; i < n; ++i) wrong += BITS(quotient(a[i], s[i])) != BITS(a[i] / s[i]);
    return wrong;
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder, libraries = tmp_path_factory.mktemp("on_cpu"), {}

    def built(*of, worse="0.0f"):
        words = [word for word in options(*of) if word.startswith("-D")]
        name = "".join(words) + worse
        if name not in libraries:
            source, result = folder / f"{len(libraries)}.cpp", folder / f"{len(libraries)}.so"
            source.write_text(STANDS_FOR_A_GPU + SOURCE.replace("extern __shared__", "extern") + LAUNCH)
            subprocess.run(
                ["g++", "-std=c++20", "-O0", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w",
                 f"-DWORSE={worse}", *words, str(source), "-o", str(result)], check=True,
            )  # fmt: skip
            libraries[name] = ctypes.CDLL(str(result))
        return libraries[name]

    return built


def run(library, A, W, U, rounding, keep):
    grid, scale, zero, group = rounding or (None, None, None, None)
    Q, D, U = torch.full_like(A, torch.nan), torch.full_like(A, torch.nan), padded(U)
    tensors = (A, Q, D, W, U, scale, zero, None if group is None else group.int(), keep)
    b, R = A.shape
    low, high = (0.0, 0.0) if grid is None else (grid.low, grid.high)
    library.launch(
        *[ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors], R, b, U.stride(0),
        ctypes.c_float(low), ctypes.c_float(high),
    )  # fmt: skip
    return A, Q, D


@pytest.mark.parametrize("name", GRIDS)
def test_equals_float64(name, build):
    zero, keep = name == "int3 bf16", name in MASKED
    library = build(GRIDS[name], zero, keep)
    for b, R in ((1, 1), (32, 64), (77, 65), (128, 70)):
        A, W, U, *rest = block(b, R, GRIDS[name], zero=zero, keep=keep)
        expected = reference.gptq_block(A, W, U.triu(1).nan_to_num(), *rest)
        for actual, exact in zip(run(library, A, W, U, *rest), expected, strict=True):
            assert_close(actual.double(), exact, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_a_column_is_rounded_as_torch_rounds_it(name, build):
    """One column, no errors: values in the middle of two grid points, beyond the grid, infinite, NaN."""
    grid = GRIDS[name]
    if grid is None:
        return
    R = 4000
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42, 3e38, -3e38, 65519.0, 65520.0])
    v = torch.cat([torch.linspace(-10, 10, 1601), torch.linspace(-500, 500, 2000), odd, torch.randn(R)])[:R]
    for s in (1.0, 0.1, 2.0**-140, 3.0e-5, 1000.0):
        A, scale = (v * s).view(1, R).contiguous(), torch.full((1, R), s)
        expected = torch.empty(R)
        zero = torch.zeros(1, R) if name == "int3 bf16" else None
        keep = torch.ones(1, R, dtype=torch.bool) if name in MASKED else None
        grid.nearest_(A[0], scale[0], None if zero is None else zero[0], expected)
        library = build(grid, zero is not None, keep is not None)
        group = torch.zeros(1).int()
        _, Q, _ = run(library, A, A.clone(), torch.zeros(1, 1), Rounding(grid, scale, zero, group), keep)
        same = (Q[0] == expected) | (Q[0].isnan() & expected.isnan())  # the sign of a zero may differ
        assert same.all(), (s, v[~same][:5], Q[0][~same][:5], expected[~same][:5])


@pytest.mark.parametrize("worse", ["0.0f", "1e30f"])
def test_quotients_are_correctly_rounded(worse, build):
    """Even where the reciprocal is off by one unit in the last place, either way."""
    random = torch.Generator().manual_seed(0)
    s = torch.rand(400_000, generator=random) + 0.5
    ends = torch.nextafter(torch.tensor([1.0, 2.0]), torch.tensor(0.0))
    s = torch.cat([s, s[:1000] * 2.0**100, s[:1000] * 2.0**-100, ends])
    a = (torch.rand(len(s), generator=random) * 20 - 10) * s
    library = build(Grid(-8, 7), False, False, worse=worse)
    library.wrong_quotients.restype = ctypes.c_long
    pointers = [ctypes.c_void_p(t.contiguous().data_ptr()) for t in (a, s)]
    assert library.wrong_quotients(*pointers, ctypes.c_long(len(s))) == 0
