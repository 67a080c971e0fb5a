"""Backends of the product of a packed Linear, and which of them a scheme may use, best first.

A backend says which calls it takes, prepares its operands once, and multiplies. A new kernel is one class and one line
in BACKENDS; calls that no backend takes are computed with a dense weight.

Shapes: M tokens, N output features, K input features, G groups of K / G columns.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationType
from torch import Tensor

from lightning_compress.ops import fp4_gemm as fp4
from lightning_compress.ops import w4a8_gemm as w4a8
from lightning_compress.ops import w4a16_gemm as w4a16
from lightning_compress.ops import w8a8_gemm as w8a8
from lightning_compress.ops.fp4_gemm import fp4_gemm
from lightning_compress.ops.fp4_gemm.layout import Layout, from_layout, to_layout
from lightning_compress.ops.w4a8_gemm import to_planes as w4a8_planes
from lightning_compress.ops.w4a8_gemm import w4a8_gemm
from lightning_compress.ops.w4a8_gemm.layout import codes as w4a8_codes
from lightning_compress.ops.w4a16_gemm import from_planes, grid_rows, to_planes, w4a16_gemm
from lightning_compress.ops.w4a16_gemm.cpu import gemm_bf16, prepare_bf16, takes_bf16
from lightning_compress.ops.w4a16_gemm.layout import from_grid_rows
from lightning_compress.ops.w8a8_gemm import cpu as int8_cpu
from lightning_compress.ops.w8a8_gemm import w8a8_linear
from lightning_compress.quant.packed.inputs import input_codes

__all__ = ["BACKENDS", "OPAQUE", "Backend", "HeldBackend", "ProductCall", "Weights", "backends_of"]

OPAQUE = ("qlinear",)  # backends whose operands cannot be traced: under torch.compile they prepare others
CHUNK = 2**22  # weights of which operands are made at a time: steps in between take some ten bytes for each
FEW = 16  # tokens up to which torch's int8 x bf16 product wins over unpacking (bench_packed_cpu.py)


class ProductCall(NamedTuple):
    """What a backend must know of a call: device, dtype and dimensions of x, and whether it needs a gradient."""

    device: str
    dtype: torch.dtype
    ndim: int
    gradient: bool


class Weights(Protocol):
    """The part of a packed Linear that a backend may use."""

    scheme: QuantizationScheme
    in_features: int
    out_features: int

    def stored(self, name: str) -> Tensor: ...
    def optional(self, name: str) -> Tensor | None: ...


class Backend(Protocol):
    """One way to compute y = x W^T, without the bias."""

    name: str

    def takes(self, layer: Weights, call: ProductCall) -> bool:
        """Whether it computes this, at least as quickly as a dense float32 Linear for few tokens."""

    def prepare(self, layer: Weights) -> tuple[Any, ...]:
        """Its operands."""

    def product(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
        """y [..., N], in the dtype of x."""


@runtime_checkable
class HeldBackend(Backend, Protocol):
    """A backend whose operands may replace tensors of the checkpoint."""

    def restore(self, layer: Weights, operands: tuple[Any, ...]) -> dict[str, Tensor]:
        """Tensors of the checkpoint, made from the operands; used in place of those that are equal."""

    def prepared(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Callable[[Tensor], Tensor] | None:
        """``product`` of contiguous x of the same ``call_key``; None where kernels do not compute it."""


class Int4OnCuda:
    """The fused kernel; passes the gradient to x."""

    name = "w4a16_gemm"

    def takes(self, layer: Weights, call: ProductCall) -> bool:
        return _on_cuda(call)

    def prepare(self, layer: Weights) -> tuple[Any, ...]:
        return _by_rows(layer, to_planes, layer.stored("weight_packed")), *grid_rows(*_grid(layer))

    def restore(self, layer: Weights, operands: tuple[Any, ...]) -> dict[str, Tensor]:
        planes_NP, scale_GN, zero_GN = operands
        scale, zero_packed = from_grid_rows(scale_GN, zero_GN)
        scale = scale[0] if layer.scheme.weights.strategy == "tensor" else scale
        packed = _by_rows(layer, lambda rows: from_planes(rows, layer.in_features), planes_NP)
        tensors = {"weight_packed": packed, "weight_scale": scale}
        return tensors if zero_packed is None else tensors | {"weight_zero_point": zero_packed}

    def product(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
        return w4a16_gemm(x, *operands)

    def prepared(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Callable[[Tensor], Tensor] | None:
        return w4a16.prepare(x, *operands)


class Int4OnCpu:
    """Torch's own product of bf16 and int4."""

    name = "_weight_int4pack_mm_for_cpu"

    def takes(self, layer: Weights, call: ProductCall) -> bool:
        G = layer.stored("weight_scale").shape[-1]
        return _bf16_on_avx512(call) and takes_bf16(layer.out_features, layer.in_features, G)

    def prepare(self, layer: Weights) -> tuple[Any, ...]:
        return prepare_bf16(layer.stored("weight_packed"), *_grid(layer), layer.in_features)

    def product(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
        return gemm_bf16(x, *operands)


class Int8OnCpu:
    """Torch's own product of bf16 and int8; above a few tokens codes, exact in bf16, are unpacked for the call."""

    name = "_weight_int8pack_mm"

    def takes(self, layer: Weights, call: ProductCall) -> bool:
        rows = layer.stored("weight_scale").numel() in (1, layer.out_features)
        return _bf16_on_avx512(call) and rows and layer.scheme.weights.symmetric

    def prepare(self, layer: Weights) -> tuple[Any, ...]:
        shape = torch.Size((layer.out_features, layer.in_features))
        codes_NK = unpack_from_int32(layer.stored("weight_packed"), layer.scheme.weights.num_bits, shape)
        return codes_NK.contiguous(), _scale_rows(layer).bfloat16()

    def product(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
        codes_NK, scale_N = operands
        x_MK = x.reshape(-1, layer.in_features)
        if not torch.compiler.is_exporting() and len(x_MK) <= FEW:  # a program takes any number of tokens
            y_MN = torch.ops.aten._weight_int8pack_mm(x_MK, codes_NK, scale_N)
        else:
            y_MN = (x_MK @ codes_NK.to(x.dtype).t()).mul_(scale_N)
        return y_MN.view(*x.shape[:-1], layer.out_features)


class Int8InputsOnCpu:
    """oneDNN's product of int8 and int8, any dtype of x."""

    name = "qlinear"

    def takes(self, layer: Weights, call: ProductCall) -> bool:
        plain = layer.scheme.weights.symmetric and layer.scheme.weights.strategy in ("channel", "tensor")
        return call.device == "cpu" and not call.gradient and plain and int8_cpu.is_exact()

    def prepare(self, layer: Weights) -> tuple[Any, ...]:
        return int8_cpu.prepare(layer.stored("weight").contiguous(), _scale_rows(layer))

    def product(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
        args = _inputs(layer)
        codes, scale, zero = input_codes(x, args, layer.optional("input_scale"), layer.optional("input_zero_point"))
        codes_MK = codes.reshape(-1, layer.in_features)
        y_MN = int8_cpu.gemm(codes_MK, _by_token(scale, x), None if zero is None else _by_token(zero, x), operands)
        return y_MN.to(x.dtype).view(*x.shape[:-1], layer.out_features)


class EightBitsOnCuda:
    """The fused kernel of int8 or FP8 weights and inputs; passes the gradient to x.

    Dynamic tokens get a scale each, as in quant/fake_quant.py for x [batch, tokens, K] and [rows, K].
    """

    name = "w8a8_linear"

    def takes(self, layer: Weights, call: ProductCall) -> bool:
        args, weights = _inputs(layer), layer.scheme.weights
        plain = weights.symmetric and weights.strategy in ("channel", "tensor") and args.symmetric
        tokens = args.dynamic is True and args.strategy == "token" and call.ndim <= 3
        return bool(plain and (tokens or (args.dynamic is False and args.strategy == "tensor"))) and _on_cuda(call)

    def prepare(self, layer: Weights) -> tuple[Any, ...]:
        return layer.stored("weight").contiguous(), _scale_rows(layer).float().contiguous()

    def restore(self, layer: Weights, operands: tuple[Any, ...]) -> dict[str, Tensor]:
        return {}  # the weight is the tensor of the checkpoint

    def product(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
        return w8a8_linear(x, operands[0], operands[1], layer.optional("input_scale"))

    def prepared(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Callable[[Tensor], Tensor] | None:
        return w8a8.prepare(x, operands[0], operands[1], layer.optional("input_scale"))


class Int4InputsOnCuda:
    """The fused kernel of int4 weights and int8 or FP8 tokens; passes the gradient to x."""

    name = "w4a8_gemm"

    def takes(self, layer: Weights, call: ProductCall) -> bool:
        args, weights = _inputs(layer), layer.scheme.weights
        plain = weights.symmetric and weights.strategy in ("channel", "group") and args.symmetric
        tokens = args.dynamic is True and args.strategy == "token" and call.ndim <= 3
        return bool(plain and tokens) and _on_cuda(call)

    def prepare(self, layer: Weights) -> tuple[Any, ...]:
        scale_NG = layer.stored("weight_scale")
        K, G = layer.in_features, scale_NG.shape[1]
        planes_NP = _by_rows(layer, lambda rows: w4a8_planes(rows, K, G), layer.stored("weight"))
        return planes_NP, scale_NG.t().contiguous()

    def restore(self, layer: Weights, operands: tuple[Any, ...]) -> dict[str, Tensor]:
        planes_NP, scale_GN = operands
        K, G = layer.in_features, len(scale_GN)
        codes_NK = _by_rows(layer, lambda rows: w4a8_codes(rows, K, G), planes_NP)
        return {"weight": codes_NK, "weight_scale": scale_GN.t().contiguous()}

    def product(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
        return w4a8_gemm(x, operands[0], operands[1], self._codes(layer))

    def prepared(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Callable[[Tensor], Tensor] | None:
        return w4a8.prepare(x, operands[0], operands[1], self._codes(layer))

    @staticmethod
    def _codes(layer: Weights) -> torch.dtype:
        """Dtype of the codes of tokens."""
        return torch.int8 if _kind(_inputs(layer)) == "int8" else torch.float8_e4m3fn


class Fp4OnCuda:
    """The fused kernel of NVFP4 or MXFP4 weights and inputs as they are; passes the gradient to x."""

    name = "fp4_gemm"

    def takes(self, layer: Weights, call: ProductCall) -> bool:
        return _on_cuda(call)

    def prepare(self, layer: Weights) -> tuple[Any, ...]:
        shared = layer.optional("weight_global_scale")
        packed, scale_NG = layer.stored("weight_packed"), layer.stored("weight_scale")
        rows = _chunks(layer)
        parts = [to_layout(*t, shared) for t in zip(packed.split(rows), scale_NG.split(rows), strict=True)]
        planes, scales, divisors = zip(*parts, strict=True)
        return torch.cat(planes), torch.cat(scales, 1), torch.cat(divisors)

    def restore(self, layer: Weights, operands: tuple[Any, ...]) -> dict[str, Tensor]:
        rows, exponents = _chunks(layer), layer.optional("weight_global_scale") is None
        parts = [t.split(rows, dim) for t, dim in zip(operands, (0, 1, 0), strict=True)]
        tensors = [from_layout(Layout(*t), layer.in_features, exponents) for t in zip(*parts, strict=True)]
        packed, scales = zip(*tensors, strict=True)
        return {"weight_packed": torch.cat(packed), "weight_scale": torch.cat(scales)}

    def product(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
        return fp4_gemm(x, *operands)

    def prepared(self, layer: Weights, x: Tensor, operands: tuple[Any, ...]) -> Callable[[Tensor], Tensor] | None:
        return fp4.prepare(x, Layout(*operands))


BACKENDS: dict[tuple[str, str], tuple[Backend, ...]] = {
    ("int4", ""): (Int4OnCuda(), Int4OnCpu()),
    ("int8", ""): (Int8OnCpu(),),
    ("int8", "int8"): (EightBitsOnCuda(), Int8InputsOnCpu()),
    ("float8", "float8"): (EightBitsOnCuda(),),
    ("int4", "int8"): (Int4InputsOnCuda(),),
    ("int4", "float8"): (Int4InputsOnCuda(),),
    ("microscaled_float4", ""): (Fp4OnCuda(),),
}
"""By the kind of the weights and of the inputs ("": not quantized)."""


def backends_of(scheme: QuantizationScheme) -> tuple[Backend, ...]:
    """The backends for a scheme, best first; none for schemes that are computed dense."""
    return BACKENDS.get((_kind(scheme.weights), _kind(scheme.input_activations)), ())


def _by_rows(layer: Weights, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``function`` of a tensor, some rows at a time, since it needs several times the memory of its result."""
    parts = rows.split(_chunks(layer))
    first = function(parts[0])
    result = first.new_empty(len(rows), *first.shape[1:])
    for part, place in zip(parts, result.split(_chunks(layer)), strict=True):
        place.copy_(function(part))
    return result


def _chunks(layer: Weights) -> int:
    """Number of rows of a chunk."""
    return max(1, CHUNK // layer.in_features)


def _kind(args: QuantizationArgs | None) -> str:
    if args is None:
        return ""
    return f"{'microscaled_' if args.scale_dtype is not None else ''}{QuantizationType(args.type).value}{args.num_bits}"


def _inputs(layer: Weights) -> QuantizationArgs:
    args = layer.scheme.input_activations
    assert args is not None
    return args


def _grid(layer: Weights) -> tuple[Tensor, Tensor | None]:
    """Scales [N, G], one for all rows spread over them, and packed zero points."""
    scale = layer.stored("weight_scale")
    return (scale if scale.ndim == 2 else scale.expand(layer.out_features, 1)), layer.optional("weight_zero_point")


def _by_token(scale: Tensor, x: Tensor) -> Tensor:
    """float32 [M, 1]."""
    if scale.numel() * x.shape[-1] != x.numel():
        scale = scale.expand(*x.shape[:-1], 1)
    return scale.reshape(-1, 1).float()


def _scale_rows(layer: Weights) -> Tensor:
    return layer.stored("weight_scale").flatten().expand(layer.out_features).contiguous()


def _bf16_on_avx512(call: ProductCall) -> bool:
    """On CPUs without AVX-512 these products may be slower than dense float32 ones."""
    return call.device == "cpu" and call.dtype == torch.bfloat16 and not call.gradient and _has_avx512()


def _on_cuda(call: ProductCall) -> bool:
    """Where Triton's kernels run."""
    return call.device == "cuda" and call.dtype in (torch.bfloat16, torch.float16, torch.float32) and _has_kernels()


@torch.compiler.assume_constant_result
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability() >= (8, 0)
