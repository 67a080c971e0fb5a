"""Time that a packed Linear takes on the CPU for each call on a GPU, measured without one: launches do nothing.

    python -m benchmarks.bench_wrapper

Launches go to a driver that notes them; a real one adds about as much for every way to launch.
"""

import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from lightning_compress.quant.packed import PackedLinear, backends, linear
from tests.support.fake_triton import fake_triton
from tests.support.packed_linears import quantized_linear

SCHEMES = ("w4 g64", "NVFP4A16", "w8a8 token", "FP8_DYNAMIC", "W4A8 g64", "W4AFP8 g64")
N, K, CALLS, ROUNDS = 4096, 1024, 300, 9


def main() -> None:
    """Print a row for each scheme: microseconds of CPU time for each call, later ones and first ones."""
    print("| scheme | tokens | us | us, first call of a shape | launches |\n|---|---|---|---|---|")
    taken = {"_on_cuda": lambda call: call.dtype.is_floating_point}
    with mock.patch.multiple(backends, **taken), mock.patch.object(linear, "HOLDING", "cpu"), torch.no_grad():
        for scheme in SCHEMES:
            layer = PackedLinear.from_quantized(quantized_linear(scheme, N, K, torch.bfloat16, bias=False))
            for tokens in (1, 16):
                x = torch.randn(1, tokens, K).bfloat16()
                with fake_triton() as launches:
                    later, first = timed(lambda x=x, layer=layer: layer(x)), timed(unprepared(layer, x))
                    launches.clear()
                    layer(x)
                print(f"| {scheme} | {tokens} | {later:.1f} | {first:.1f} | {len(launches)} |", flush=True)


def unprepared(layer: PackedLinear, x: Tensor) -> Callable[[], Tensor]:
    """A call that finds no prepared kernel."""

    def call() -> Tensor:
        layer._calls.clear()
        return layer(x)

    return call


def timed(call: Callable[[], Tensor]) -> float:
    """Microseconds, the fewest of some rounds."""
    for _ in range(20):
        call()
    rounds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        rounds.append((time.thread_time() - start) / CALLS * 1e6)
    return min(rounds)


if __name__ == "__main__":
    main()
