"""The input of a layer on its grid, in training: dynamic, from a moving average, or with a scale that is learned (LSQ).

NVFP4 has both: scales of 16 columns from the input itself, and a global scale g from the moving average.

A learned scale starts from the average at the end of observation; its gradient is that of Esser et al. 2020
(arXiv:1902.08153), scaled by 1 / sqrt(N q_max) with N the features of the layer's input (section 2.2): its columns, for
a convolution channels times places.
"""

import math
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor, nn

from lightning_compress.layers.matrix import CONVOLUTIONS
from lightning_compress.ops.fake_quant import HALF_STEP, learned_value, relative_step, replace_value
from lightning_compress.quant.fake_quant import codes_of, fake_quantize_input
from lightning_compress.quant.formats import LARGEST_SCALE, global_scale_of
from lightning_compress.quant.observers import is_observed
from lightning_compress.quant.record import Quantized, note_rows

__all__ = ["FakeQuantizeInput"]

TENSORS = ("low", "high", "scale", "zero_point", "global_scale")


class FakeQuantizeInput(nn.Module):
    """The input of a layer: dynamic scales (by token, row, image, group of columns or tensor), or one static scale.

    A static scale, or the global scale of NVFP4, follows the extremes of each training batch: forward passes record
    them, :meth:`take_batch` adds them to the average after the batch. So a forward pass can be repeated (activation
    checkpointing) and changes nothing.
    Before the first :meth:`take_batch` inputs pass unchanged.

    Args:
        args: The grid.
        constant: Weight of the newest batch in the average.
        like: A tensor with the device and the dtype for the scale.
        learned: The optimizer trains a static scale after observation has ended.

    Attributes:
        observing: The scale follows the extremes of batches.
        frozen: The scale is constant.
        change: With ``learned`` the parameter behind the scale, [1]: scale = scale after observation (1 + change).
    """

    low: Tensor
    high: Tensor
    batch_low: Tensor
    batch_high: Tensor
    scale: Tensor
    zero_point: Tensor
    global_scale: Tensor

    def __init__(self, args: QuantizationArgs, constant: float, like: Tensor, learned: bool = False):
        super().__init__()
        self.args, self.constant = args, constant
        self.observing = is_observed(args)
        self.frozen, self.batches = False, 0
        zero = torch.zeros(1, device=like.device, dtype=torch.float32)
        self.change = nn.Parameter(zero) if learned and not args.dynamic else None
        for name in ("low", "high", "batch_low", "batch_high"):
            self.register_buffer(name, torch.zeros(1, device=like.device, dtype=torch.float32), persistent=False)
        self.register_buffer("scale", torch.ones(1, device=like.device, dtype=like.dtype), persistent=False)
        self.register_buffer("zero_point", torch.zeros(1, device=like.device, dtype=torch.int8), persistent=False)
        self.register_buffer("global_scale", torch.ones_like(zero), persistent=False)
        self._forget_batch()

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.observing and torch.is_grad_enabled():  # not module.training: from_pretrained gives eval mode
            low, high = x.detach().float().aminmax()
            self.batch_low.copy_(torch.minimum(self.batch_low, low))
            self.batch_high.copy_(torch.maximum(self.batch_high, high))
        note_rows(module, x, self.args)
        if self.args.dynamic is True:  # the range follows the input, so no value is outside of it
            return fake_quantize_input(module, x, self.args, None, None)
        if self.args.dynamic:
            return self._with_local_scales(module, x) if self.batches else x
        change = self.change if torch.is_grad_enabled() else None
        if change is not None and not self._learned:
            x = x + 0 * change.sum()  # DDP waits for the gradient of every parameter, and gets zero
        if not self.batches:
            return x
        scale, zero = self.grid()
        value = fake_quantize_input(module, x.detach(), self.args, scale, zero)
        codes = codes_of(self.args)
        if change is not None and self._learned:
            moving = relative_step(self.scale.clone(), change, self.scale.dtype)
            features = x[0].numel() if isinstance(module, CONVOLUTIONS) and len(x) else x.shape[-1]
            return learned_value(x, value, moving, zero, codes, features)
        half = HALF_STEP[codes.float_bits]
        v = x.detach() / scale if zero is None else x.detach() / scale + zero
        return replace_value(x, value, (v >= codes.low - half) & (v <= codes.high + half))

    def _with_local_scales(self, module: nn.Module, x: Tensor) -> Tensor:
        """Of NVFP4: values beyond the largest code of the largest scale are clamped, and get no gradient."""
        g = self.global_scale.clone()
        value = fake_quantize_input(module, x.detach(), self.args, None, None, g)
        codes = codes_of(self.args)
        return replace_value(
            x, value, x.detach().abs() * g <= LARGEST_SCALE * (codes.high + HALF_STEP[codes.float_bits])
        )

    def take_batch(self, low: Tensor, high: Tensor) -> None:
        """Add the extremes of a batch, [1] each, to the average; a batch without data is ignored."""
        if self.observing and bool(low.isfinite() & high.isfinite()):
            share = self.constant if self.batches else 1.0
            self.low.lerp_(low, share)
            self.high.lerp_(high, share)
            self.batches += 1
            dtype = self.scale.dtype
            if self.args.dynamic:
                self.global_scale.copy_(global_scale_of(self.low, self.high))
            else:
                scale, zero = calculate_qparams(self.low.to(dtype), self.high.to(dtype), self.args)
                self.scale.copy_(scale)
                self.zero_point.copy_(zero)
        self._forget_batch()

    def take_record(self, record: Quantized) -> None:
        """Use the static scale of a record, if it has one, without further observation."""
        if record.input_global_scale is not None:
            self.global_scale.copy_(record.input_global_scale)
        elif record.input_scale is not None:
            self.scale.copy_(record.input_scale)
        else:
            return
        if record.input_zero_point is not None:
            self.zero_point.copy_(record.input_zero_point)
        if self.change is not None:
            self.change.zero_()
        self.batches, self.observing = 1, False

    def freeze(self) -> None:
        """Keep the scale from now on."""
        self.scale.copy_(self.grid()[0])
        self.observing, self.frozen = False, True

    def record(self) -> dict[str, Tensor | None]:
        """What static scales add to a record, by the names of its fields."""
        if not is_observed(self.args):
            return {}
        if self.args.dynamic:
            return {"input_global_scale": self.global_scale.clone()}
        return dict(zip(("input_scale", "input_zero_point"), self.grid(), strict=True))

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale [1] and zero point [1] (None: symmetric) of static activations, in the dtype that stores them."""
        scale = self.scale.clone()
        if self.change is not None and self._learned:
            scale = relative_step(scale, self.change, scale.dtype)
        return scale, None if self.args.symmetric else self.zero_point.clone()

    @property
    def _learned(self) -> bool:
        return self.change is not None and not self.observing and not self.frozen

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for checkpoints."""
        tensors = {name: getattr(self, name).detach().clone() for name in TENSORS}
        change = None if self.change is None else self.change.detach().clone()
        flags = {"batches": self.batches, "observing": self.observing, "frozen": self.frozen}
        return {**flags, "change": change, **tensors}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state`."""
        self.batches, self.observing, self.frozen = state["batches"], state["observing"], state["frozen"]
        for name in TENSORS:
            if name in state:  # checkpoints of earlier versions hold no global scale
                getattr(self, name).copy_(state[name])
        if self.change is not None and state["change"] is not None:
            self.change.copy_(state["change"])

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """A cast of the model to 16 bits leaves the global scale as the record will hold it."""
        exact = self.global_scale
        super()._apply(fn, recurse)
        self.global_scale = exact.to(self.global_scale.device)
        return self

    def _forget_batch(self) -> None:
        self.batch_low.fill_(math.inf)
        self.batch_high.fill_(-math.inf)
