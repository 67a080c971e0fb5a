"""What a quantized module carries: its scheme, scales and zero points.

The module's weight itself holds the dequantized value, (code - zero point) * scale, in its own dtype.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

from lightning_compress.layers.dense_keys import remove_hook
from lightning_compress.layers.records import Record
from lightning_compress.quant.fake_quant import fake_quantize_input, has_rows

__all__ = ["Quantized", "note_rows", "saw_rows"]

_ROWS = "_lightning_compress_rows"


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    quantized = Quantized.of(module)
    if quantized is None or quantized.scheme.input_activations is None or not args:
        return None
    calibrated = (quantized.input_scale, quantized.input_zero_point, quantized.input_global_scale)
    note_rows(module, args[0], quantized.scheme.input_activations)
    x = fake_quantize_input(module, args[0], quantized.scheme.input_activations, *calibrated)
    return (x, *args[1:])


@dataclass(frozen=True)
class Quantized(Record):
    """How the weight (and the input) of one module is quantized; with ``input_activations`` a hook rounds its input.

    Args:
        scheme: The scheme of compressed-tensors.
        scale: What codes are multiplied by, in the dtype it is stored in (float32 for the formats of quant/formats.py):
            [R, G] per group, [R, 1] per channel, [1] per tensor, [R / b, C / g] per block.
        zero_point: As scale, int8; None for a symmetric grid.
        input_scale: [1], for static activations.
        input_zero_point: [1], for static asymmetric activations.
        latent: [R, C] in the dtype of the weight: the weight before rounding, which rounds to the weight again.
            Training continues from it; neither ``state_dict`` nor an export holds it.
        global_scale: g of NVFP4, float32 [1]: ``scale`` times g is what is stored.
        input_global_scale: The same for the input.
    """

    attribute = "_lightning_compress_quantized"
    hooks = (_quantize_input,)

    scheme: QuantizationScheme
    scale: Tensor
    zero_point: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    latent: Tensor | None = field(default=None, metadata={"stored": False})
    global_scale: Tensor | None = None
    input_global_scale: Tensor | None = None

    def register(self, module: nn.Module) -> None:
        if self.scheme.input_activations is not None:
            module.register_forward_pre_hook(_quantize_input)

    def leave_inputs(self, module: nn.Module) -> None:
        """Stop rounding the inputs of a module that carries this record; its weight stays on the grid."""
        remove_hook(module._forward_pre_hooks, _quantize_input)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        return super().from_json(data | {"scheme": QuantizationScheme.model_validate(data["scheme"])})


def note_rows(module: nn.Module, x: Tensor, args: QuantizationArgs) -> None:
    """Remember on the module that several rows of [rows, features] got a scale each: plain transformers gives one."""
    if has_rows(module, x, args) and x.shape[0] > 1 and not torch.compiler.is_compiling():
        setattr(module, _ROWS, True)


def saw_rows(module: nn.Module) -> bool:
    """Whether :func:`note_rows` noted such an input."""
    return getattr(module, _ROWS, False)
