"""Fake-quantization, forward and backward."""

import torch
from torch import Tensor

from benchmarks.op_case import Case, Trial
from lightning_compress.ops.fake_quant import Codes, learned_step, straight_through

__all__ = ["cases"]


def cases(tiny: bool) -> list[Case]:
    shapes = [(6, 64)] if tiny else [(8192, 8192), (4096, 14336)]

    def case(R: int, C: int, grain: str, learned: bool) -> Case:
        group = {"group": 32 if tiny else 128, "channel": C, "tensor": R * C}[grain]

        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Trial:
            random = torch.Generator(device).manual_seed(seed)
            W = torch.randn(R, C, generator=random, device=device).to(dtype).requires_grad_()
            gradient = torch.randn(R, C, generator=random, device=device).to(dtype)
            size = (1,) if grain == "tensor" else (R, C // group)
            scale = (torch.rand(size, generator=random, device=device) * 0.05 + 0.2).to(dtype).requires_grad_(learned)
            function = learned_step if learned else straight_through
            wanted = (W, scale) if learned else (W,)

            def ours() -> tuple[Tensor, ...]:
                value = function(W, scale, None, Codes(-8, 7))
                return value.detach(), *torch.autograd.grad(value, wanted, gradient)

            def theirs() -> tuple[Tensor, ...]:
                value = (compiled_fake_quant if device.type == "cuda" else plain_fake_quant)(W, scale, group, learned)
                return value.detach(), *torch.autograd.grad(value, wanted, gradient)

            def exact() -> tuple[Tensor, ...]:
                s = scale.detach().double().reshape(-1, 1)
                v = W.detach().double().reshape(-1, group) / s
                g = gradient.double().reshape(v.shape)
                value = v.clamp(-8, 7).round() * s
                if not learned:
                    return value, g * ((v >= -8.5) & (v <= 7.5))
                inside = (v > -8) & (v < 7)
                slope = torch.where(inside, v.round() - v, v.clamp(-8, 7))
                of_scale = (slope * g).sum(-1) if grain != "tensor" else (slope * g).sum()
                return value, g * inside, of_scale / (group * 7) ** 0.5

            rival = "torch.compile" if device.type == "cuda" else "autograd"
            return Trial(ours, {rival: theirs} if tiny or R == C else {}, exact)  # seconds for each shape

        shape = f"{R} x {C}, {grain}, {'LSQ' if learned else 'STE'}, forward and backward"
        return Case("fake_quant", shape, 10 * R * C, 0, 0.02, make)

    return [
        case(R, C, grain, learned)
        for learned in (False, True)
        for grain in ("group", "channel", "tensor")
        for R, C in shapes
    ]


def plain_fake_quant(W: Tensor, scale: Tensor, group: int, learned: bool) -> Tensor:
    """What one writes in torch for the same values and gradients; in float32, as the op."""
    lines, scales = W.reshape(-1, group).float(), scale.reshape(-1, 1).float()
    v = lines / scales
    if learned:
        slowed = scales / (group * 7) ** 0.5
        scales = slowed + (scales - slowed).detach()
        v = (lines / scales).clamp(-8, 7)
        return ((v + (v.round() - v).detach()) * scales).to(W.dtype).view(W.shape)
    value = v.clamp(-8, 7).round() * scales
    passed = torch.where((v >= -8.5) & (v <= 7.5), lines, lines.detach())
    return (passed + (value - passed).detach()).to(W.dtype).view(W.shape)


compiled_fake_quant = torch.compile(plain_fake_quant, dynamic=False)
