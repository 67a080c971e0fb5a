"""PackedLinear: a Linear that computes on 4-bit weights, and keeps them as compressed-tensors stores them.

Its state dict has the names, dtypes and shapes of a pack-quantized checkpoint. What the device at hand computes with
is made from that at the first call and not saved: nibble planes for the kernel on a GPU; on the CPU a dense float32
weight, or for bf16 tokens without gradient torch's own 4-bit layout.

Shapes: N output features, K input features, G groups of K / G columns.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from lightning_compress.ops.w4a16_gemm import dequantize, grid_rows, to_planes, w4a16_gemm
from lightning_compress.ops.w4a16_gemm.cpu import gemm_bf16, prepare_bf16, takes_bf16
from lightning_compress.quant.record import quantized_of
from lightning_compress.quant.words import compress_words

__all__ = ["PackedLinear", "is_packable", "pack_linears"]

TENSORS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def pack_linears(model: nn.Module) -> list[str]:
    """Replace, in place, every Linear that carries a record of 4-bit weights by its packed form; their names.

    Those that share their weight with another module stay dense.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    names = [
        name
        for name, module in model.named_modules()
        if name and is_packable(module) and owners[id(module.get_parameter("weight"))] == 1
    ]
    for name in names:
        model.set_submodule(name, PackedLinear.from_quantized(model.get_submodule(name)))
    return names


def is_packable(module: nn.Module) -> bool:
    """True for a quantized Linear with integer 4-bit weights by group or by row, whose input is not quantized."""
    record = quantized_of(module)
    return type(module) is nn.Linear and record is not None and _fault(record.scheme) is None


class PackedLinear(nn.Module):
    """y = x W^T + b with W = (code - zero point) * scale.

    Args:
        tensors: ``weight_packed`` int32 [N, ceil(K / 8)], ``weight_scale`` [N, G] or [1], ``weight_shape`` int64 [2],
            and for an asymmetric grid ``weight_zero_point`` int32 [ceil(N / 8), G].
        bias: [N], or None.

    Raises:
        ValueError: They do not fit one another.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = _checked(tensors)
        for name in TENSORS:
            self.register_buffer(name, tensors.get(name))
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self._prepared: dict[str, tuple[Any, ...]] = {}

    @classmethod
    def from_quantized(cls, module: nn.Module) -> Self:
        """The packed form of a Linear that carries a record; it stays as it is, and the bias is shared.

        Raises:
            ValueError: The module is no quantized Linear, or its grid is not one of 4-bit integers.
            RuntimeError: Its weight was changed after compression.
        """
        record = quantized_of(module)
        if not isinstance(module, nn.Linear) or record is None:
            raise ValueError(f"expected a Linear that was quantized, got {type(module).__name__}; compress it first")
        if (fault := _fault(record.scheme)) is not None:
            raise ValueError(f"PackedLinear holds 4-bit integer weights by group or by row, not {fault}")
        weight = module.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        state = {"weight": weight.to(wide), "weight_scale": record.scale.to(wide)}
        if record.zero_point is not None:
            state["weight_zero_point"] = record.zero_point
        tensors = compress_words(state, record.scheme) | {"weight_scale": record.scale}
        tensors["weight_shape"] = tensors["weight_shape"].to(weight.device)
        packed = cls(tensors, module.bias).train(module.training)
        if not torch.equal(packed.dense(weight.dtype), weight):
            raise RuntimeError("the weight does not lie on the grid of its record: it was changed after compression")
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] in the dtype of x; the gradient goes to x and to the bias."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected x [..., {self.in_features}], got {tuple(x.shape)}")
        if x.device.type != "cpu":
            y = w4a16_gemm(x, *self._once("planes", lambda: (to_planes(self.weight_packed), *grid_rows(*self._grid()))))
        elif x.dtype == torch.bfloat16 and self._takes_bf16() and not (x.requires_grad and torch.is_grad_enabled()):
            y = gemm_bf16(x, *self._once("bf16", self._for_bf16))
        else:
            (dense_NK,) = self._once("dense", lambda: (self.dense().float(),))
            wide = torch.promote_types(x.dtype, torch.float32)     # bf16 products are slow on CPUs without AMX
            y = F.linear(x.to(wide), dense_NK.to(wide)).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K], dequantized anew, by default in the dtype of the scale."""
        return dequantize(self.weight_packed, *self._grid(), self.in_features, dtype)

    def extra_repr(self) -> str:
        """Sizes, as Linear shows them."""
        grid = "symmetric" if self.weight_zero_point is None else "asymmetric"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"groups={self.weight_scale.shape[-1]}, {grid}"
        )

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        """Scales [N, G], one for all rows spread over them, and packed zero points."""
        scale = self.weight_scale
        return (scale if scale.ndim == 2 else scale.expand(self.out_features, 1)), self.weight_zero_point

    def _takes_bf16(self) -> bool:
        return takes_bf16(self.out_features, self.in_features, self.weight_scale.shape[-1])

    def _for_bf16(self) -> tuple[Tensor, Tensor]:
        return prepare_bf16(self.weight_packed, *self._grid(), self.in_features)

    def _once(self, form: str, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What ``make`` returned at the first call; only the form used last is kept."""
        if form not in self._prepared:
            with torch.no_grad(), torch.inference_mode(False):
                self._prepared = {form: make()}
        return self._prepared[form]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._prepared = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._prepared = {}
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}}


def _fault(scheme: QuantizationScheme) -> str | None:
    """What keeps a scheme out of a PackedLinear."""
    args = scheme.weights
    if args is None:
        return "a scheme without weights"
    if args.type != "int" or args.num_bits != 4:
        return f"{args.num_bits}-bit {args.type}"
    if args.strategy not in ("group", "channel", "tensor") or (args.strategy == "tensor" and not args.symmetric):
        return f"strategy {args.strategy} with symmetric={args.symmetric}"
    if scheme.input_activations is not None:
        return "quantized inputs beside them"
    return None


def _checked(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """N and K of tensors that fit one another."""
    unknown, missing = sorted(tensors.keys() - set(TENSORS)), sorted(set(TENSORS[:3]) - tensors.keys())
    if unknown or missing:
        raise ValueError(f"expected the tensors {', '.join(TENSORS)}; lacking are {missing}, unknown are {unknown}")
    N, K = (int(size) for size in tensors["weight_shape"])
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    words = tensors["weight_packed"]
    if words.dtype != torch.int32 or tuple(words.shape) != (N, -(-K // 8)):
        raise ValueError(f"expected weight_packed int32 {(N, -(-K // 8))}, got {words.dtype} {tuple(words.shape)}")
    if tuple(scale.shape) != (1,) and (scale.ndim != 2 or len(scale) != N or K % scale.shape[1]):
        raise ValueError(f"expected weight_scale [1] or [{N}, G] with G a divisor of {K}, got {tuple(scale.shape)}")
    if zero is not None and (zero.dtype != torch.int32 or tuple(zero.shape) != (-(-N // 8), scale.shape[-1])):
        raise ValueError(
            f"expected weight_zero_point int32 {(-(-N // 8), scale.shape[-1])}, got {zero.dtype} {tuple(zero.shape)}"
        )
    return N, K
