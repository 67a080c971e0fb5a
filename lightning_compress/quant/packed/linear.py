"""PackedLinear: a Linear that computes on compressed weights, and keeps them as compressed-tensors stores them.

Its state dict has the names, dtypes and shapes of the checkpoint. What a backend of the device computes with
(backends.py) is made from that and not saved: on CUDA at once, and it replaces the tensors of the checkpoint that it
gives back bit for bit, so that the weight is in memory once; elsewhere at the first call. Where no backend takes a
call, a dense weight is made once: float32 on the CPU, the dtype of x elsewhere.

The tensors are not buffers: DistributedDataParallel would broadcast them at every forward.

Shapes: N output features, K input features, G groups of K / G columns.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from lightning_compress.ops.availability import calls_kernel
from lightning_compress.ops.prepared import Call, call_key
from lightning_compress.ops.registration import skips_dispatcher
from lightning_compress.quant.fake_quant import fake_quantize_input
from lightning_compress.quant.packed.backends import OPAQUE, Backend, HeldBackend, ProductCall, backends_of
from lightning_compress.quant.packed.dispatch import MANY, is_dense_faster
from lightning_compress.quant.packed.inputs import HIGHEST, LOWEST
from lightning_compress.quant.packed.layout import check_tensors, fault_of
from lightning_compress.quant.packed.weight import PackedWeight
from lightning_compress.quant.packing import pack, unpacked_weight
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import describe

__all__ = ["HOLDING", "Held", "JointProduct", "PackedLinear"]

MOST_CALLS = 64  # shapes of x for which a module keeps prepared kernels
HOLDING = "cuda"
"""Type of the devices on which operands replace the tensors that they are made of."""


class Held(NamedTuple):
    """The operands of a backend, in place of tensors of the checkpoint."""

    backend: HeldBackend
    operands: tuple[Any, ...]
    kinds: Mapping[str, Tensor]  # the tensors that they replace, on the meta device


class JointProduct(Protocol):
    """A group of Linears that make one product (siblings.py), as its members use it."""

    def product(self, layer: "PackedLinear", x: Tensor) -> Tensor: ...
    def is_best_dense(self, x: Tensor) -> bool: ...
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
        self._tensors = dict(tensors)
        self.device = tensors["weight_scale"].device
        parameter = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.register_parameter("bias", parameter)
        scale = tensors["weight_scale"].dtype
        self.dtype = dtype or (scale if bias is None else bias.dtype)
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float64):
            self.dtype = torch.float32
        self.siblings: JointProduct | None = None
        self.fastest = False  # calls for which a dense product is faster take it, with inputs that are not rounded
        self._unrounded: dict[torch.dtype, tuple[Tensor, tuple[float, float] | None]] = {}
        self._prepared: dict[str, tuple[Any, ...]] = {}
        self._chosen: dict[ProductCall, Backend | None] = {}
        self._calls: dict[Call, Callable[[Tensor], Tensor] | None] = {}
        self.held: Held | None = None
        self._hold()

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
        """[..., N] in the dtype of x, under autocast in that of F.linear.

        The gradient goes to x (past the rounding of inputs) and to the bias.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected x [..., {self.in_features}], got {tuple(x.shape)}")
        if self.siblings is None:
            return self.product(x, self.bias)
        if self.fastest and not torch.compiler.is_compiling() and self.siblings.is_best_dense(x):
            return self.unrounded_product(x, _result_dtype(x), self.bias)  # with its bias, and rows that are contiguous
        y = self.siblings.product(self, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias."""
        dtype, args = _result_dtype(x), self.scheme.input_activations
        if args is None and x.dtype != dtype:
            x = x.to(dtype)  # quantized inputs get the codes that a dense Linear's hook gives them, before its cast
        backend = self.backend(ProductCall(x.device.type, x.dtype, x.ndim, x.requires_grad and torch.is_grad_enabled()))
        if backend is not None and x.numel():
            eager = not torch.compiler.is_compiling()  # a program takes any number of tokens
            if self.fastest and eager and self._is_dense_faster(backend, dtype, x.numel() // self.in_features):
                return self.unrounded_product(x, dtype, bias)
            y = self._by_backend(backend, x).to(dtype)
            return y if bias is None else y + bias.to(dtype)
        if args is not None:
            calibrated = (self.optional(f"input_{name}") for name in ("scale", "zero_point", "global_scale"))
            x = fake_quantize_input(self, x, args, *calibrated)
        if dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self._dense_once(dtype), bias)
        wide = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        y = F.linear(x.to(wide), self._dense_once(wide), None if bias is None else bias.to(wide))
        return y.to(dtype)  # bf16 products are slow on old CPUs

    def backend(self, call: ProductCall) -> Backend | None:
        """The backend of such a call; None: it is computed with a dense weight."""
        if torch.compiler.is_compiling():  # a dict that changes would be a reason to compile again
            return self._choose(call)
        if call not in self._chosen:
            self._chosen[call] = self._choose(call)
        return self._chosen[call]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight [N, K], to be read; its numbers are made when they are needed."""
        shape = self.out_features, self.in_features
        return PackedWeight(shape, self.dtype, self.device, lambda: self.dense(self.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K], dequantized anew, by default in the dtype that compressed-tensors gives it."""
        tensors: dict[str, Any] = self.tensors()
        if "weight_shape" in tensors:  # plain numbers, so that it can be traced
            tensors["weight_shape"] = torch.Size((self.out_features, self.in_features))
        weight = unpacked_weight(tensors, nn.Linear, self.scheme)
        return weight if dtype is None else weight.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint for this weight and its inputs, by local name; of held ones new copies."""
        if self.held is None:
            return dict(self._tensors)
        with torch.no_grad(), torch.inference_mode(False):
            again = self.held.backend.restore(self, self.held.operands)
        return {name: again[name] if value.is_meta else value for name, value in self.kinds().items()}

    def kinds(self) -> dict[str, Tensor]:
        """As :meth:`tensors`; those that operands replace are on the meta device."""
        return self._tensors if self.held is None else {**self._tensors, **self.held.kinds}

    def stored(self, name: str) -> Tensor:
        """One of :meth:`tensors`."""
        return self._tensors[name] if name in self._tensors else self.tensors()[name]

    def optional(self, name: str) -> Tensor | None:
        """One of :meth:`tensors`, or None where there is none of that name."""
        return self.stored(name) if name in self.kinds() else None

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace some of the tensors of the checkpoint, or, with none, prepare again."""
        self._tensors, self.held = self.tensors() | dict(tensors), None
        self.device = self._tensors["weight_scale"].device
        self.forget()
        self._hold()

    def be_rows_of(self, stacked: "PackedLinear", start: int, rows: Mapping[str, int]) -> None:
        """Use the memory of another one, whose rows from ``start`` on are equal to those of this one.

        Args:
            stacked: The other one.
            start: The first row.
            rows: Number of rows of those tensors of the checkpoint that have rows.
        """
        for name in rows.keys() & self._tensors.keys() & stacked._tensors.keys():
            first = start * rows[name] // self.out_features  # zero points are packed along rows
            self._tensors[name] = stacked._tensors[name][first : first + rows[name]]
        if self.held is not None and stacked.held is not None:
            codes = stacked.held.operands[0][start : start + self.out_features]
            self.held = self.held._replace(operands=(codes, *self.held.operands[1:]))
        self.forget()

    def forget(self) -> None:
        """Drop operands that were prepared from the tensors, and that can be prepared again."""
        self._prepared, self._chosen, self._calls, self._unrounded = {}, {}, {}, {}

    def is_best_dense(self, x: Tensor) -> bool:
        """Whether ``fastest`` computes this call densely."""
        gradient = x.requires_grad and torch.is_grad_enabled()
        backend = self.backend(ProductCall(x.device.type, x.dtype, x.ndim, gradient))
        if backend is None or not x.numel():
            return False
        return self._is_dense_faster(backend, _result_dtype(x), x.numel() // self.in_features)

    def is_ever_packed(self, call: ProductCall) -> bool:
        """Whether ``fastest`` leaves any such call to a packed product: one of few tokens, or of many."""
        backend = self.backend(call)
        return backend is not None and not all(self._is_dense_faster(backend, call.dtype, M) for M in (1, 2, 8, MANY))

    def extra_repr(self) -> str:
        """Sizes, as Linear shows them, and the scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{describe(self.scheme)}"
        )

    def _choose(self, call: ProductCall) -> Backend | None:
        return next((backend for backend in backends_of(self.scheme) if backend.takes(self, call)), None)

    def _by_backend(self, backend: Backend, x: Tensor) -> Tensor:
        operands = self._operands(backend)
        if not calls_kernel(x) or not skips_dispatcher(x) or not x.is_contiguous():
            return backend.product(self, x, operands)
        key = call_key(x)
        if key not in self._calls:
            if len(self._calls) >= MOST_CALLS:
                self._calls.clear()
            self._calls[key] = backend.prepared(self, x, operands) if isinstance(backend, HeldBackend) else None
        call = self._calls[key]
        return backend.product(self, x, operands) if call is None else call(x)

    def _is_dense_faster(self, backend: Backend, dtype: torch.dtype, M: int) -> bool:
        return is_dense_faster(backend.name, dtype, M, self.out_features, self.in_features)

    def unrounded_product(self, x: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        """x W^T + bias by a dense copy of the weight; static grids still clip x, which is a part of the function."""
        if dtype not in self._unrounded:
            with torch.no_grad(), torch.inference_mode(False):
                self._unrounded[dtype] = self.dense().to(dtype), self._range_of_inputs()
        weight, bounds = self._unrounded[dtype]
        x = x if bounds is None else x.clamp(*bounds)
        return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))

    def _range_of_inputs(self) -> tuple[float, float] | None:
        scale, zero = self.optional("input_scale"), self.optional("input_zero_point")
        if scale is None:
            return None
        offset = 0 if zero is None else int(zero)
        return (LOWEST - offset) * float(scale), (HIGHEST - offset) * float(scale)

    def _hold(self) -> None:
        """Prepare operands, and let go of the tensors that they give back bit for bit."""
        if self.device.type != HOLDING:
            return
        backend = self.backend(ProductCall(HOLDING, torch.bfloat16, 2, False))
        if not isinstance(backend, HeldBackend):
            return
        with torch.no_grad(), torch.inference_mode(False):
            operands = backend.prepare(self)
            again = backend.restore(self, operands)
        names = [name for name, value in again.items() if _are_equal(value, self._tensors[name])]
        kinds = {name: self._tensors.pop(name).to("meta") for name in names}
        self.held = Held(backend, operands, kinds)

    def _operands(self, backend: Backend) -> tuple[Any, ...]:
        if self.held is not None and backend is self.held.backend:
            return self.held.operands
        opaque = torch.compiler.is_compiling() and backend.name in OPAQUE
        form = f"{backend.name} compiled" if opaque else backend.name
        if form in self._prepared:
            return self._prepared[form]
        with torch.no_grad(), torch.inference_mode(False):
            operands = backend.prepare(self)
        if not _is_traced():
            same = {key: value for key, value in self._prepared.items() if key.startswith(backend.name)}
            self._prepared = same | {form: operands}  # only the backend that was used last is kept
        return operands

    def _dense_once(self, dtype: torch.dtype) -> Tensor:
        form = f"dense {dtype}"
        if form in self._prepared and not torch.compiler.is_exporting():  # a program would store it, not the codes
            dense: Tensor = self._prepared[form][0]
            return dense
        with torch.no_grad(), torch.inference_mode(False):
            dense = self.dense().to(dtype)
        if not _is_traced():
            self._prepared = {form: (dense,)}
        return dense

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Tensors of the checkpoint move, and keep their dtypes: ``model.to(torch.bfloat16)`` is for the others."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        moved = {name: (value, fn(value)) for name, value in self.tensors().items()}
        self.take({name: new if new.dtype == old.dtype else old.to(new.device) for name, (old, new) in moved.items()})
        if self.siblings is not None:
            self.siblings.forget()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{name}": value for name, value in self.tensors().items()})

    def _load_from_state_dict(self, *args: Any) -> None:
        self._buffers.update(self.tensors())  # torch copies values into buffers
        try:
            super()._load_from_state_dict(*args)
        finally:
            tensors = {name: value for name, value in self._buffers.items() if value is not None}
            self._buffers.clear()
        self.take(tensors)
        if self.siblings is not None:
            self.siblings.forget()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_tensors": self.tensors(),
            "held": None,
            "_prepared": {},
            "_chosen": {},
            "_calls": {},
            "_unrounded": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.take({})  # the device may be another one


def _is_traced() -> bool:
    """Whether torch.export runs the module on tensors without data (strict=False): they are no good for later calls."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def _result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of F.linear(x, W), where W has that of x."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Bit for bit; torch compares no float8 on CUDA."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(*(t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (first, second)))
