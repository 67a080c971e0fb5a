"""GPTQ's block of columns: int4 with bf16 scales; everybody refills the matrix that is rounded within the time."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contestants import llm_compressor_block, once
from benchmarks.op_case import Case, Trial
from lightning_compress.ops.gptq_block import Block, Grid, Rounding, cpu, gptq_block_, reference

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
    shapes = [(24, 7)] if tiny else [(128, R) for R in (4096, 1024, 6144, 28672)]

    def case(b: int, R: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            W = torch.randn(b, R, generator=random, device=device)
            U = (torch.randn(b, b, generator=random, device=device) * 0.2 / b**0.5).triu(1)
            scale = (torch.rand(1, R, generator=random, device=device) * 0.1 + 0.3).to(torch.bfloat16).float()
            group, grid = torch.zeros(b, dtype=torch.int32, device=device), Grid(-8, 7, 0, torch.bfloat16)
            rounding = Rounding(grid, scale, None, group)

            def ours() -> Tensor:
                A, Q, D = W.clone(), torch.empty_like(W), torch.empty_like(W)
                gptq_block_(Block(A, Q, D, W, U), rounding)
                return Q

            def loop() -> Tensor:
                A, Q, D = W.clone(), torch.empty_like(W), torch.empty_like(W)
                cpu.gptq_block_(Block(A, Q, D, W, U), rounding._replace(group_b=zeros), 0, b, 16)
                return Q

            contestants: dict[str, Callable[[], Tensor]] = {"torch, column by column": loop}
            if device.type == "cuda":
                unit = U + torch.eye(b, device=device)
                H, rows = unit @ unit.t(), scale.t().expand(R, b).contiguous()  # pivots of 1
                theirs = once(llm_compressor_block, W.t().contiguous(), H, rows)
                contestants["llm-compressor"] = lambda: theirs().t()
            zeros = torch.zeros(b, dtype=torch.int32)  # on the CPU: the loop reads it there
            exact = lambda: reference.gptq_block(W, W, U, rounding)[1]  # noqa: E731
            return Trial(ours, contestants, exact)

        # A code that lies in the middle may fall either way in float32, and takes others with it
        moved, sizes = 28 * b * R, {"b": b, "R": R}
        return Case("gptq_block", f"{b} columns, {R} rows", moved, b * b * R, 2e-2, make, torch.float32, sizes)

    return [case(*shape) for shape in shapes]
