"""What a quantized module carries: its scheme, scales and zero points.

The record is a plain Python attribute, neither parameter nor buffer: the keys of ``state_dict`` stay those of the dense
model. The module's weight itself holds the dequantized value, (code - zero point) * scale, in its own dtype.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

from lightning_compress.quant.fake_quant import fake_quantize_input, has_rows

__all__ = ["Quantized", "attach", "detach", "moved", "note_rows", "quantized_modules", "quantized_of", "saw_rows"]

_ATTRIBUTE = "_lightning_compress_quantized"
_ROWS = "_lightning_compress_rows"


@dataclass(frozen=True)
class Quantized:
    """How the weight (and the input) of one module is quantized.

    Args:
        scheme: The scheme of compressed-tensors.
        scale: What codes are multiplied by, in the dtype it is stored in (float32 for the formats of quant/formats.py):
            [R, G] per group, [R, 1] per channel, [1] per tensor, [R / b, C / g] per block.
        zero_point: As scale, int8; None for a symmetric grid.
        input_scale: [1], for static activations.
        input_zero_point: [1], for static asymmetric activations.
        latent: [R, C] in the dtype of the weight: what was rounded to the weight, and rounds to it again. Training
            goes on from there; neither ``state_dict`` nor an export holds it.
        global_scale: g of NVFP4, float32 [1]: ``scale`` times g is what is stored.
        input_global_scale: The same for the input.
    """

    scheme: QuantizationScheme
    scale: Tensor
    zero_point: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    latent: Tensor | None = None
    global_scale: Tensor | None = None
    input_global_scale: Tensor | None = None


def moved(record: Any, device: torch.device) -> Any:
    """The same record (this one, or that of a KV cache), its tensors on another device."""
    tensors = {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
    return replace(record, **{name: tensor.to(device) for name, tensor in tensors.items()})


def attach(module: nn.Module, quantized: Quantized) -> None:
    """Put the record on a module, in place of an older one; with ``input_activations`` its input is quantized too."""
    detach(module)
    setattr(module, _ATTRIBUTE, quantized)
    if quantized.scheme.input_activations is not None:
        module.register_forward_pre_hook(_quantize_input)


def quantized_of(module: nn.Module) -> Quantized | None:
    """The record of a module, or None."""
    return getattr(module, _ATTRIBUTE, None)


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that carry a record, by dotted name."""
    return {name: module for name, module in model.named_modules() if quantized_of(module) is not None}


def detach(module: nn.Module) -> None:
    """Take the record and the hook off; the weight keeps its dequantized values. Nothing happens without a record."""
    if quantized_of(module) is not None:
        delattr(module, _ATTRIBUTE)
        # found by identity, not by a kept handle: a handle would not survive copy.deepcopy of the model
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _quantize_input]:
            del module._forward_pre_hooks[key]


def note_rows(module: nn.Module, x: Tensor, args: QuantizationArgs) -> None:
    """Remember on the module that several rows of [rows, features] got a scale each: plain transformers gives one."""
    if has_rows(module, x, args) and x.shape[0] > 1 and not torch.compiler.is_compiling():
        setattr(module, _ROWS, True)


def saw_rows(module: nn.Module) -> bool:
    """Whether :func:`note_rows` noted such an input."""
    return getattr(module, _ROWS, False)


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    quantized = quantized_of(module)
    if quantized is None or quantized.scheme.input_activations is None or not args:
        return None
    calibrated = (quantized.input_scale, quantized.input_zero_point, quantized.input_global_scale)
    note_rows(module, args[0], quantized.scheme.input_activations)
    x = fake_quantize_input(module, args[0], quantized.scheme.input_activations, *calibrated)
    return (x, *args[1:])
