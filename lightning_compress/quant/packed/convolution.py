"""Quantized 2d convolutions that multiply int8 codes of weights and inputs on a CPU, by oneDNN.

The weight stays a parameter on its grid: the state dict, training and saving are those of any Conv2d with a record.

    y = s_x s_n (sum_k q_k w_nk - z_x sum_k w_nk) + b        q: codes of the input, w: of the weight, sums exact

Padding adds values of zero, whose code is z_x. A dynamic scale is one for each sample, as in quant/fake_quant.py.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from lightning_compress.ops.w8a8_gemm import cpu as int8_cpu
from lightning_compress.quant.fake_quant import fake_quantize_input
from lightning_compress.quant.packed.dispatch import is_dense_faster
from lightning_compress.quant.packed.inputs import HIGHEST, LOWEST, input_codes
from lightning_compress.quant.record import Quantized

__all__ = ["Int8Conv2d", "multiply_codes", "restore_class"]

FEW_VALUES = 2**13  # up to which rounding inputs costs less than oneDNN's call: a digit takes 0.35 ms, not 0.40
MOST_SHAPES = 64  # for which a module remembers its way
Way = Literal["codes", "clipped", "rounded"]


class Operands(NamedTuple):
    """What a product needs, made from a state of the weight."""

    version: tuple[int, int]  # of that state
    packed: Tensor
    scale_N: Tensor
    zero_N: Tensor
    scale_x: float
    zero_x: int  # of unsigned codes


def multiply_codes(model: nn.Module, *, fastest: bool = False) -> list[str]:
    """Let quantized Conv2d of a model, in place, multiply codes where this CPU's sums are exact; returns their names.

    Args:
        model: Any module, with its records.
        fastest: Compute densely where that is faster, with inputs that are not rounded (dispatch.py).
    """
    modules = {name: pair for name, pair in Quantized.find(model).items() if _fits(*pair)}
    if not modules or not int8_cpu.is_exact():
        return []
    for module, record in modules.values():
        record.leave_inputs(module)
        module.__class__ = Int8Conv2d
        vars(module).update(fastest=fastest, _ways={})
    return [*modules]


def restore_class(module: nn.Module) -> None:
    """Make an :class:`Int8Conv2d` a Conv2d again; others stay as they are."""
    if isinstance(module, Int8Conv2d):
        module.__class__ = nn.Conv2d  # type: ignore[assignment]


class Int8Conv2d(nn.Conv2d):
    """A Conv2d with a record whose calls without gradient multiply int8 codes; made by :func:`multiply_codes`."""

    stands_for: ClassVar[str] = "Conv2d"
    fastest: bool = False
    _operands: Operands | None = None
    _ways: dict[tuple[Any, ...], Way]

    def forward(self, x: Tensor) -> Tensor:
        """As Conv2d; x is quantized here, since the hook of the record is not registered."""
        record = Quantized.of(self)
        if record is None:
            return super().forward(x)
        gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        key = (x.shape, x.dtype, gradient, x.device, self.weight.device)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
            way: Way = "rounded"
        elif key in self._ways:
            way = self._ways[key]
        else:
            way = self._ways[key] = self._way(x, gradient)
        if way == "codes":
            return self._multiply(x, record)
        return super().forward(self._clipped(x, record) if way == "clipped" else _rounded(self, x, record))

    def _way(self, x: Tensor, gradient: bool) -> Way:
        if len(self._ways) >= MOST_SHAPES:
            self._ways.clear()
        on_cpu = x.device.type == self.weight.device.type == "cpu"
        if gradient or not on_cpu or x.ndim != 4 or x.dtype not in (torch.float32, torch.bfloat16) or not x.numel():
            return "rounded"
        height, width = _sizes(self, x)
        M, N, K = len(x) * height * width, self.out_channels, self.weight[0].numel()
        values = x.numel() + M * N
        if not is_dense_faster("qconv", torch.float32, M, N, K, values):
            return "codes"
        if self.fastest:
            return "clipped"
        return "rounded" if values <= FEW_VALUES else "codes"

    def _multiply(self, x: Tensor, record: Quantized) -> Tensor:
        args = _inputs(record)
        packed = self._prepared(record)
        rows = x.reshape(1, len(x), -1) if args.dynamic else x
        codes, scale, _ = input_codes(rows, args, record.input_scale, record.input_zero_point)
        unsigned = codes.view(x.shape).view(torch.uint8) ^ 128
        bias = None if self.bias is None else self.bias.float()
        y: Tensor = torch.ops.onednn.qconv2d_pointwise(
            unsigned, packed.scale_x, packed.zero_x, packed.packed, packed.scale_N, packed.zero_N,
            None if args.dynamic else bias, self.stride, self.padding, self.dilation, 1,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        if args.dynamic:
            y *= scale.view(-1, 1, 1, 1).float()
            y = y if bias is None else y.add_(bias.view(1, -1, 1, 1))
        return (y.contiguous() if x.is_contiguous() else y).to(x.dtype)  # oneDNN's result has channels last

    def _prepared(self, record: Quantized) -> Operands:
        changes = 0 if self.weight.is_inference() else self.weight._version  # inference tensors count none
        version = (changes, self.weight.data_ptr())
        if self._operands is None or self._operands.version != version:
            with torch.no_grad(), torch.inference_mode(False):
                self._operands = _operands(self, record, version)
        return self._operands

    def _clipped(self, x: Tensor, record: Quantized) -> Tensor:
        """Static grids also clip, which is a part of the function; dynamic ones reach all of x."""
        if _inputs(record).dynamic:
            return x
        operands = self._operands or self._prepared(record)
        zero = operands.zero_x - 128
        return x.clamp((LOWEST - zero) * operands.scale_x, (HIGHEST - zero) * operands.scale_x)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_operands": None, "_ways": {}}


def _inputs(record: Quantized) -> QuantizationArgs:
    args = record.scheme.input_activations
    assert args is not None
    return args


def _rounded(module: nn.Module, x: Tensor, record: Quantized) -> Tensor:
    return fake_quantize_input(module, x, _inputs(record), record.input_scale, record.input_zero_point)


def _fits(module: nn.Module, record: Quantized) -> bool:
    """Whether oneDNN multiplies codes of this convolution as the record says."""
    if type(module) is not nn.Conv2d or module.weight.device.type != "cpu":
        return False
    weights, args = record.scheme.weights, record.scheme.input_activations
    if weights is None or args is None or isinstance(module.padding, str):
        return False
    integers = weights.type == args.type == "int" and weights.num_bits == args.num_bits == 8
    by_row = weights.symmetric and weights.strategy in ("channel", "tensor")
    static = args.dynamic is False and args.strategy == "tensor"
    by_sample = args.dynamic is True and args.strategy == "token" and args.symmetric
    plain = module.groups == 1 and module.padding_mode == "zeros" and record.scheme.output_activations is None
    return bool(integers and by_row and (static or by_sample) and plain)


def _operands(module: Int8Conv2d, record: Quantized, version: tuple[int, int]) -> Operands:
    N = module.out_channels
    scale_N = record.scale.flatten().expand(N).float().contiguous()
    codes = (module.weight.float() / scale_N.view(-1, 1, 1, 1)).round().clamp(LOWEST, HIGHEST).to(torch.int8)
    scale_x = 1.0 if record.input_scale is None else float(record.input_scale)
    zero_x = 128 + (0 if record.input_zero_point is None else int(record.input_zero_point.item()))
    geometry = (module.stride, module.padding, module.dilation)
    packed = torch.ops.onednn.qconv_prepack(codes, scale_N, scale_x, zero_x, *geometry, 1, None)
    return Operands(version, packed, scale_N, torch.zeros(N, dtype=torch.int32, device="cpu"), scale_x, zero_x)


def _sizes(module: nn.Conv2d, x: Tensor) -> list[int]:
    """Height and width of the result."""
    assert not isinstance(module.padding, str)
    geometry = zip(x.shape[2:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    return [(size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, pad, dilation in geometry]  # fmt: skip
