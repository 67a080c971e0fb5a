"""PackedLinear: a Linear that computes on compressed weights, and keeps them as compressed-tensors stores them.

Its state dict has the names, dtypes and shapes of the checkpoint. What a backend of the device computes with
(backends.py) is made from that at the first call and not saved. Where no backend takes a call, a dense weight is made
once: float32 on the CPU, the dtype of x elsewhere.

Shapes: N output features, K input features, G groups of K / G columns.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from lightning_compress.quant.fake_quant import fake_quantize_input
from lightning_compress.quant.packed.backends import Backend, ProductCall, backends_of
from lightning_compress.quant.packed.layout import check_tensors, fault_of
from lightning_compress.quant.packed.weight import PackedWeight
from lightning_compress.quant.packing import pack, unpack
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import describe

__all__ = ["PackedLinear", "JointProduct"]


class JointProduct(Protocol):
    """A group of Linears that make one product (siblings.py), as its members use it."""

    def product(self, layer: "PackedLinear", x: Tensor) -> Tensor: ...
    def forget(self) -> None: ...


class PackedLinear(nn.Linear):
    """y = x W^T + b with a weight in any format of compressed-tensors, and inputs quantized where the scheme says so.

    It is an ``nn.Linear`` for libraries such as peft, but its ``weight`` can only be read (weight.py).

    Args:
        tensors: As the checkpoint names them: ``weight_packed`` or ``weight``, ``weight_scale`` and so on, and
            ``input_scale``, ``input_zero_point``, ``input_global_scale`` of static inputs.
        scheme: Quantization scheme of the tensors.
        bias: [N], or None.
        dtype: That of the dense weight; by default that of the bias or of the scale.

    Raises:
        ValueError: The tensors do not fit one another, or Linears cannot have the scheme.
    """

    stands_for: ClassVar[str] = "Linear"  # for selecting targets

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        scheme: QuantizationScheme,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        self.out_features, self.in_features = check_tensors(tensors, scheme)
        self.scheme = scheme
        for name, value in tensors.items():
            self._buffers[name] = value  # register_buffer refuses "weight", which is a property here
        parameter = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.register_parameter("bias", parameter)
        scale = tensors["weight_scale"].dtype
        self.dtype = dtype or (scale if bias is None else bias.dtype)
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float64):
            self.dtype = torch.float32
        self.siblings: JointProduct | None = None
        self._prepared: dict[str, tuple[Any, ...]] = {}
        self._chosen: dict[ProductCall, Backend | None] = {}

    @classmethod
    def from_quantized(cls, module: nn.Module, name: str = "the module") -> Self:
        """The packed form of a Linear that carries a record; it stays as it is, and the bias is shared.

        Raises:
            ValueError: The module is not a quantized Linear, or its scheme is not one that is exported.
            RuntimeError: Its weight was changed after compression.
        """
        record = Quantized.of(module)
        if not isinstance(module, nn.Linear) or record is None:
            raise ValueError(f"expected a Linear that was quantized, got {type(module).__name__}; compress it first")
        if (fault := fault_of(record.scheme)) is not None:
            raise ValueError(f"a PackedLinear cannot hold a {fault}; leave the Linear dense")
        tensors = {key: value.to(module.weight.device) for key, value in pack(name, module, record).items()}
        return cls(tensors, record.scheme, module.bias, module.weight.dtype).train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] in the dtype of x; the gradient goes to x (past the rounding of inputs) and to the bias."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected x [..., {self.in_features}], got {tuple(x.shape)}")
        y = self.product(x) if self.siblings is None else self.siblings.product(self, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """The result without bias."""
        backend = self.backend(ProductCall(x.device.type, x.dtype, x.ndim, x.requires_grad and torch.is_grad_enabled()))
        if backend is not None and x.numel():
            return backend.product(self, x, self._operands(backend))
        args = self.scheme.input_activations
        if args is not None:
            calibrated = (self.optional(f"input_{name}") for name in ("scale", "zero_point", "global_scale"))
            x = fake_quantize_input(self, x, args, *calibrated)
        wide = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        return F.linear(x.to(wide), self._dense_once(wide)).to(x.dtype)  # bf16 products are slow on old CPUs

    def backend(self, call: ProductCall) -> Backend | None:
        """The backend of such a call; None: it is computed with a dense weight."""
        if call not in self._chosen:
            self._chosen[call] = next(
                (backend for backend in backends_of(self.scheme) if backend.takes(self, call)), None
            )
        return self._chosen[call]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight [N, K], to be read; its numbers are made when they are needed."""
        device = self.stored("weight_scale").device
        return PackedWeight((self.out_features, self.in_features), self.dtype, device, lambda: self.dense(self.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K], dequantized anew, by default in the dtype that compressed-tensors gives it."""
        tensors: dict[str, Any] = self.tensors()
        if "weight_shape" in tensors:  # plain numbers, so that it can be traced
            tensors["weight_shape"] = torch.Size((self.out_features, self.in_features))
        weight, _ = unpack(tensors, nn.Linear, self.scheme)
        return weight if dtype is None else weight.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint for this weight and its inputs, by local name."""
        return {name: value for name, value in self._buffers.items() if value is not None}

    def stored(self, name: str) -> Tensor:
        """One of :meth:`tensors`."""
        value = self._buffers[name]
        assert value is not None
        return value

    def optional(self, name: str) -> Tensor | None:
        """One of :meth:`tensors`, or None where there is none of that name."""
        return self._buffers.get(name)

    def forget(self) -> None:
        """Drop operands that were prepared from the tensors, which have changed or moved."""
        self._prepared, self._chosen = {}, {}

    def extra_repr(self) -> str:
        """Sizes, as Linear shows them, and the scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{describe(self.scheme)}"
        )

    def _operands(self, backend: Backend) -> tuple[Any, ...]:
        form = f"{backend.name}{' compiled' if torch.compiler.is_compiling() else ''}"
        if form not in self._prepared:
            with torch.no_grad(), torch.inference_mode(False):
                self._prepared = {form: backend.prepare(self)}  # only the form that was used last is kept
        return self._prepared[form]

    def _dense_once(self, dtype: torch.dtype) -> Tensor:
        if (form := f"dense {dtype}") not in self._prepared:
            with torch.no_grad(), torch.inference_mode(False):
                self._prepared = {form: (self.dense().to(dtype),)}
        dense: Tensor = self._prepared[form][0]
        return dense

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Tensors of the checkpoint move, and keep their dtypes: ``model.to(torch.bfloat16)`` is for the others."""
        tensors = self.tensors()
        for name in tensors:
            self._buffers[name] = None
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, value in tensors.items():
            moved = fn(value)
            self._buffers[name] = moved if moved.dtype == value.dtype else value.to(moved.device)
        self.forget()
        if self.siblings is not None:
            self.siblings.forget()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        if self.siblings is not None:
            self.siblings.forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}, "_chosen": {}}
