"""Quantized modules as ONNX sees them: inside of a context their weight is DequantizeLinear of integer codes.

    x -> QuantizeLinear -> DequantizeLinear -> MatMul, Conv <- DequantizeLinear <- codes

Only what is traced changes: each module gets a class whose ``weight`` is that node, and buffers in place of the
parameter; afterwards it has its class, parameters and buffers again. The model itself is not copied.

A Linear multiplies by codes [C, R] (MatMul), which ONNX Runtime turns into integer products: MatMulIntegerToFloat, and
MatMulNBits for int4 in groups. As Gemm with a transposed weight it stays in float32: 3.6 times as slow for 128 rows of
256 x 256 on a CPU, where MatMul and Add become a Gemm too, MatMul and Sub do not.

Shapes: R rows, C columns, G groups of columns.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStrategy
from torch import Tensor, nn

from lightning_compress.layers.forward import patched
from lightning_compress.layers.matching import clean_name
from lightning_compress.layers.matrix import layout_of, weight_of
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.quant.packing import weight_codes
from lightning_compress.quant.record import Quantized

__all__ = ["INT4", "Codes", "codes_of", "int4_weights", "with_codes"]

Codes = dict[str, tuple[Tensor, Quantized]]
INT4 = 4
"""Weights of at most as many bits are stored as INT4."""


def codes_of(model: nn.Module) -> Codes:
    """The codes int8 [R, C] and the record of each quantized module, by name; not of slices of another's parameter.

    Raises:
        RuntimeError: A weight was changed after compression.
    """
    return {
        name: (weight_codes(clean_name(name), module, record), record)
        for name, (module, record) in Quantized.find(model).items()
        if not isinstance(module, WeightSlice)
    }


@contextmanager
def with_codes(model: nn.Module, codes: Codes) -> Iterator[set[str]]:
    """Inside, quantized modules hold codes; yields the names of those whose weight was read, filled as calls go on."""
    with ExitStack() as stack:
        reached: set[str] = set()
        for name, (codes_RC, record) in codes.items():
            module = model.get_submodule(name)
            tensors = _tensors(module, codes_RC, record)
            stack.enter_context(_replaced(module, tensors, record, partial(reached.add, name)))
        yield reached


def int4_weights(codes: Codes) -> set[str]:
    """The names of the codes of a graph that are stored as INT4."""
    narrow = [clean_name(name) for name, (_, record) in codes.items() if record.scheme.weights.num_bits <= INT4]
    return {f"{name}.weight" if name else "weight" for name in narrow}


@contextmanager
def _replaced(
    module: nn.Module, tensors: dict[str, Tensor], record: Quantized, note: Callable[[], None]
) -> Iterator[None]:
    """Inside, the module has these buffers and no ``weight``; its record, whose hook rounds, is set aside.

    Dicts are replaced, not changed: the order of the parameters stays. ``note`` is called when the weight is read.
    """
    kind = type(module)
    stand_in = type(kind.__name__, (kind,), {"weight": property(_weight), "__module__": kind.__module__})
    attributes = {
        "_parameters": {name: value for name, value in module._parameters.items() if name != "weight"},
        "_buffers": module._buffers | tensors,
        "forward": partial(_forward, module, kind),
        Quantized.attribute: None,
        "_onnx": (record, weight_of(module).shape, note),
    }
    with patched(module, **attributes):
        module.__class__ = stand_in
        try:
            yield
        finally:
            module.__class__ = kind


def _tensors(module: nn.Module, codes_RC: Tensor, record: Quantized) -> dict[str, Tensor]:
    """Codes and scales in the layout of the node that reads them."""
    flipped = _is_flipped(module)
    codes = codes_RC.t().contiguous() if flipped else codes_RC
    if _by_shape(module, record):
        codes = layout_of(module).stored(codes_RC, weight_of(module).shape).contiguous()
    tensors = {"weight": codes, "weight_scale": _grain(record.scale.float(), record, flipped)}
    if record.zero_point is not None:
        tensors["weight_zero_point"] = _grain(record.zero_point.to(torch.int8), record, flipped)
    if record.input_scale is not None:
        tensors["input_scale"] = record.input_scale.detach().float().reshape(())
        zero = record.input_zero_point
        zero = torch.zeros_like(tensors["input_scale"]) if zero is None else zero
        tensors["input_zero_point"] = zero.reshape(()).to(device=codes.device, dtype=torch.int8)
        if type(module).forward is nn.Linear.forward and isinstance(module.bias, Tensor):
            tensors["negative_bias"] = -module.bias.detach()
    return tensors


def _grain(values: Tensor, record: Quantized, flipped: bool) -> Tensor:
    """[R, 1], [1] or [R, G] as [R], [] or [R, G], which is [G, R] for codes [C, R]."""
    strategy, values = record.scheme.weights.strategy, values.detach()
    if strategy == QuantizationStrategy.GROUP:
        return values.t().contiguous() if flipped else values.contiguous()
    return values.reshape(()) if strategy == QuantizationStrategy.TENSOR else values.flatten()


def _is_flipped(module: nn.Module) -> bool:
    """Whether the codes are [C, R]."""
    return isinstance(module, nn.Linear) or layout_of(module).kind == "columns"


def _by_shape(module: nn.Module, record: Quantized) -> bool:
    """Whether the codes have the shape of the weight, and not [R, C]: scales are along one of its dimensions."""
    return (
        not _is_flipped(module)
        and record.scheme.weights.strategy != QuantizationStrategy.GROUP
        and (layout_of(module).groups == 1)
    )


def _weight(self: Any) -> Tensor:
    """The weight in the layout of the module, float32."""
    node, (record, shape, _) = _dequantized(self), self._onnx
    if isinstance(self, nn.Linear):
        return node.t()
    if _is_flipped(self) or _by_shape(self, record) or node.shape == shape:
        return node
    return layout_of(self).stored(node, shape)


def _dequantized(module: Any) -> Tensor:
    """DequantizeLinear of the codes."""
    buffers, (record, _, note) = module._buffers, module._onnx
    note()
    codes, args, attributes = buffers["weight"], record.scheme.weights, {}
    axis = 1 if _is_flipped(module) or (layout_of(module).kind == "inputs" and _by_shape(module, record)) else 0
    if args.strategy == QuantizationStrategy.GROUP:
        axis = 1 - axis
        attributes = {"axis": axis, "block_size": codes.shape[axis] // buffers["weight_scale"].shape[axis]}
    elif args.strategy == QuantizationStrategy.CHANNEL:
        attributes = {"axis": axis}
    operands = [buffers[name] for name in ("weight", "weight_scale", "weight_zero_point") if name in buffers]
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", operands, attributes, dtype=torch.float32, shape=tuple(codes.shape)
    )


def _forward(module: Any, kind: type[nn.Module], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``forward`` of the module: with static inputs x passes QuantizeLinear and DequantizeLinear first."""
    buffers = module._buffers
    if "input_scale" in buffers:
        grid = (buffers["input_scale"], buffers["input_zero_point"])
        q = torch.onnx.ops.symbolic("QuantizeLinear", (x, *grid), dtype=torch.int8, shape=x.shape)
        x = torch.onnx.ops.symbolic("DequantizeLinear", (q, *grid), dtype=torch.float32, shape=x.shape)
    if kind.forward is not nn.Linear.forward:
        return kind.forward(module, x, *args, **kwargs)
    y = torch.matmul(x, _dequantized(module))
    if "negative_bias" in buffers and x.ndim == 2:
        return y - buffers["negative_bias"]
    return y if module.bias is None else y + module.bias
