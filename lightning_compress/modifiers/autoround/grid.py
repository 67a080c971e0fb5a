"""A weight on a grid with learned rounding and range, and the gradients for both, straight through the rounding.

    c = clip(round(w / s + u V + z)),   q = s (c - z)                                 V in [-1/2, 1/2]
    s = s0 f,   f = (beta (qmax - z0) - alpha (qmin - z0)) / (qmax - qmin)            alpha, beta in [1/2, 1]
    z = qmin - round(alpha (qmin - z0) / f)                                           symmetric: f = beta, z = 0

For the range of the extremes, (qmin - z0) s0 = min w and (qmax - z0) s0 = max w, these are equations (2) to (4) of
Cheng et al. (arXiv:2309.05516). At V = 0 and alpha = beta = 1 the scale is s0 bit for bit.

u is the distance between the codes around w / s: 1 for integers; of floats (quant/formats.py) it grows with |w / s|. Of
microscaled formats s is the nearest scale that is stored.

In backward all rounding counts as the identity, that of s too. With G the gradient for q, and [inside] where c was not
clipped:

    dV = G s u [inside]        ds = sum G (c - z - [inside] w / s)        dz = -sum G s [outside]

Shapes: R rows, C columns, G groups of g columns; scales, zero points, alpha and beta as quant/scales.py has them: [R,
G] per group, [R, 1] per channel, [1] per tensor, [R / b, C / g] per block.
"""

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor
from torch.nn.functional import pad

from lightning_compress.ops.fake_quant import HALF_STEP
from lightning_compress.quant.fake_quant import codes_of, wide
from lightning_compress.quant.formats import is_microscaled, round_float_, spacing, stored_as, stored_scale
from lightning_compress.quant.scales import expand, group_columns

__all__ = ["ROUNDING", "SHRINK", "LearnedGrid", "OnGrid"]

ROUNDING = 0.5  # |V| at most
SHRINK = 0.5  # alpha and beta at least


@dataclass(frozen=True)
class OnGrid:
    """A weight on its grid, as it is stored.

    Args:
        codes_RC: c - z, int16 (8 bits less a zero point); floats as float8.
        scale: In the dtype of the weight; of microscaled formats float32.
        zero_point: int8; None for a symmetric grid.
        args: The grid.
    """

    codes_RC: Tensor
    scale: Tensor
    zero_point: Tensor | None
    args: QuantizationArgs

    def value(self) -> Tensor:
        """(c - z) s, worked out in float32 or wider, in the dtype of the scale, [R, C]."""
        R, C = self.codes_RC.shape
        s_RG1 = wide(expand(self.scale, R, self.args))[..., None]
        blocks = _blocks(self.codes_RC.to(s_RG1.dtype), self.args)
        return stored_as((blocks * s_RG1).flatten(1)[:, :C], self.args, self.scale.dtype)


class LearnedGrid:
    """One weight, its V, alpha and beta.

    Args:
        W_RC: The values to round, any floating dtype; q has the dtype of ``scale``.
        scale: s0, positive.
        zero_point: z0, int8; None for a symmetric grid.
        args: The grid.
        keep_RC: False where q stays zero; None: nowhere.
        global_scale: g of NVFP4.
    """

    def __init__(
        self,
        W_RC: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        args: QuantizationArgs,
        keep_RC: Tensor | None = None,
        global_scale: Tensor | None = None,
    ):
        self.W_RC, self.scale, self.zero_point, self.args, self.keep_RC = W_RC, scale, zero_point, args, keep_RC
        self.global_scale = global_scale
        self.low, self.high, self.float_bits, _ = codes_of(args)
        self.V_RC = torch.zeros_like(W_RC, dtype=torch.float32)
        self.beta = torch.ones_like(scale, dtype=torch.float32)
        self.alpha = None if zero_point is None else torch.ones_like(self.beta)

    def now(self) -> OnGrid:
        """The weight, rounded with the present V, alpha and beta."""
        scale, zero_point, _ = self._range()
        c_RGg, z_RG1, _, _ = self._codes(scale, zero_point)
        codes_RC = self._joined(c_RGg - z_RG1)
        if self.keep_RC is not None:
            codes_RC = codes_RC * self.keep_RC
        zero = None if self.zero_point is None or zero_point is None else zero_point.to(self.zero_point.dtype)
        stored = torch.float8_e4m3fn if self.float_bits else torch.int16  # E4M3 holds E2M1 and E2M3, too
        return OnGrid(codes_RC.to(stored), scale, zero, self.args)

    def step(self, gradient_RC: Tensor, rate: float) -> None:
        """One step of sign descent from the gradient for q, [R, C]."""
        dV_RC, dalpha, dbeta = self.gradients(gradient_RC)
        self.V_RC.sub_(dV_RC.sign_(), alpha=rate).clamp_(-ROUNDING, ROUNDING)
        self.beta.sub_(dbeta.sign_(), alpha=rate).clamp_(SHRINK, 1.0)
        if self.alpha is not None and dalpha is not None:
            self.alpha.sub_(dalpha.sign_(), alpha=rate).clamp_(SHRINK, 1.0)

    def gradients(self, gradient_RC: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients for V, alpha (None: symmetric) and beta."""
        G_RC = gradient_RC.float()
        if self.keep_RC is not None:
            G_RC = G_RC * self.keep_RC
        scale, zero_point, f = self._range()
        c_RGg, z_RG1, s_RG1, outside_RGg = self._codes(scale, zero_point)
        G_RGg = _blocks(G_RC, self.args)
        t_RGg = _blocks(self.W_RC.float(), self.args) / s_RG1
        dV_RGg = (G_RGg * s_RG1).masked_fill_(outside_RGg, 0)
        if self.float_bits:
            dV_RGg *= spacing(t_RGg, self.float_bits)
        t_RGg.masked_fill_(outside_RGg, 0)
        ds = self._gathered((G_RGg * (c_RGg - z_RG1 - t_RGg)).sum(-1)) * self.scale.float()  # for f
        if self.alpha is None or self.zero_point is None:
            return self._joined(dV_RGg), None, ds
        dz = -self._gathered((G_RGg * s_RG1 * outside_RGg).sum(-1))
        z0 = self.zero_point.float()
        below, above = self.low - z0, self.high - z0
        df = ds + dz * self.alpha * below / f.square()
        width = self.high - self.low
        return self._joined(dV_RGg), -dz * below / f - df * below / width, df * above / width

    def _range(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """s as it is stored, z as float, and f."""
        f, zero = self.beta, None
        if self.alpha is not None and self.zero_point is not None:
            z0 = self.zero_point.float()
            f = (self.beta * (self.high - z0) - self.alpha * (self.low - z0)) / (self.high - self.low)
            zero = self.low - (self.alpha * (self.low - z0) / f).round()
        scale = (self.scale.float() * f).to(self.scale.dtype)
        if is_microscaled(self.args):
            scale = stored_scale(scale, self.args, self.global_scale)
        return torch.where(scale > 0, scale, self.scale), zero, f

    def _codes(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c [R, G, g], z and s [R, G, 1], True where c was clipped [R, G, g]."""
        R = len(self.W_RC)
        s_RG1 = expand(scale, R, self.args).float()[..., None]
        z_RG1 = torch.zeros_like(s_RG1) if zero is None else expand(zero, R, self.args)[..., None]
        t_RGg, V_RGg = _blocks(self.W_RC.float(), self.args) / s_RG1, _blocks(self.V_RC, self.args)
        if self.float_bits:
            t_RGg += spacing(t_RGg, self.float_bits) * V_RGg
            outside_RGg = t_RGg.abs() > self.high + HALF_STEP[self.float_bits]
            return round_float_(t_RGg, self.float_bits), z_RG1, s_RG1, outside_RGg
        c_RGg = t_RGg.add_(V_RGg).add_(z_RG1).round_()
        outside_RGg = (c_RGg < self.low) | (c_RGg > self.high)
        return c_RGg.clamp_(self.low, self.high), z_RG1, s_RG1, outside_RGg

    def _joined(self, M_RGg: Tensor) -> Tensor:
        """[R, C] again."""
        return M_RGg.flatten(1)[:, : self.W_RC.shape[1]]

    def _gathered(self, sums_RG: Tensor) -> Tensor:
        """In the shape of the scale."""
        if self.args.strategy == QuantizationStrategy.BLOCK and len(self.scale) != len(sums_RG):
            b, _ = self.args.block_structure
            return pad(sums_RG, (0, 0, 0, -len(sums_RG) % b)).unflatten(0, (-1, b)).sum(1)
        return sums_RG.sum().reshape(1) if self.scale.ndim == 1 else sums_RG


def _blocks(M_RC: Tensor, args: QuantizationArgs) -> Tensor:
    """[R, G, g], zeros filling up the last group."""
    C, g = M_RC.shape[1], group_columns(args, M_RC.shape[1])
    return (pad(M_RC, (0, -C % g)) if C % g else M_RC).unflatten(1, (-1, g))
