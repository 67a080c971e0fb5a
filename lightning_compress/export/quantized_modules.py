"""The quantized modules of a folder: those that compute on packed weights are read, the others when they are needed.

No more than one dense weight is in memory beside those of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from lightning_compress.export.tensors import DeferredTensor, TensorFiles, naming
from lightning_compress.layers.matrix import weight_of
from lightning_compress.layers.memory import release
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.quant.formats import is_microscaled
from lightning_compress.quant.packed import PackedLinear, PackingChoice
from lightning_compress.quant.packing import check_record, check_stored_scales, tensor_names, unpack
from lightning_compress.quant.record import Quantized

__all__ = ["QuantizedModules"]

_RELEASED_AFTER = 2**25  # bytes of dense weights; after each weight it takes 40 % more CPU


@dataclass
class QuantizedModules:
    """The quantized modules of one folder, by name of the module.

    Args:
        layout: The model, with values or on meta.
        dtype: That of scales; None: as they are.
        choice: Chooses those that compute on packed weights; None: none does.
        device: Where they will compute; None: where the module is.
        model_dtype: That of the weights; None: as the module has it.
        weights: Dense weights by name on disk. In place of a packed one they have zeros that take no memory.
        records: Those of the dense modules, known when their weights are made.
        packed: Tensors and schemes of the packed modules.
    """

    layout: nn.Module
    dtype: torch.dtype | None
    choice: PackingChoice | None
    device: torch.device | str | None = None
    model_dtype: torch.dtype | None = None
    weights: dict[str, DeferredTensor] = field(default_factory=dict)
    records: dict[str, Quantized] = field(default_factory=dict)
    packed: dict[str, tuple[dict[str, Tensor], QuantizationScheme]] = field(default_factory=dict)
    _unreleased: int = 0

    def add(self, name: str, on_disk: str, scheme: QuantizationScheme, files: TensorFiles) -> None:
        """Take the tensors of a module from the files; ValueError where they do not fit it."""
        module, path = self.layout.get_submodule(name), files.path_of(f"{on_disk}.weight_scale")
        if isinstance(module, WeightSlice) and f"{on_disk}.weight_scale" not in files.names:
            return  # a target by class, but these experts stayed dense
        weight = weight_of(module)
        with naming(path, repr(name)):
            deferred = files.take(on_disk, tensor_names(type(module), scheme))
            _check_size(deferred, scheme, weight)
            make = partial(self._dense, path, name, deferred, scheme)
            if self._is_packed(name, module, deferred, scheme):
                self.packed[name] = self._stored(name, deferred, scheme), scheme
                make = partial(_zeros, weight.shape, self.model_dtype or weight.dtype)
        self.weights[f"{on_disk}.weight"] = DeferredTensor(make, tuple(weight.shape), self.model_dtype or weight.dtype)

    def replace_packed(self, model: nn.Module) -> None:
        """Put the packed Linears into the model, which gets their tensors."""
        while self.packed:
            name, (tensors, scheme) = self.packed.popitem()
            linear = model.get_submodule(name)
            weight = linear.get_parameter("weight")
            tensors = {local: tensor.to(weight.device) for local, tensor in tensors.items()}
            packed = PackedLinear(tensors, scheme, linear.bias, weight.dtype)  # type: ignore[arg-type]
            model.set_submodule(name, packed.train(linear.training))

    def _is_packed(
        self, name: str, module: nn.Module, deferred: Mapping[str, DeferredTensor], scheme: QuantizationScheme
    ) -> bool:
        if self.choice is None:
            return False
        weight = weight_of(module)
        dtype = self.model_dtype or weight.dtype

        def from_shapes() -> PackedLinear:
            tensors = {local: tensor.on_meta() for local, tensor in deferred.items()}
            if "weight_shape" in deferred:
                tensors["weight_shape"] = deferred["weight_shape"][...]
            packed = PackedLinear(_scales_as(self.dtype, tensors, scheme), scheme, None, dtype)
            _check_shape([packed.out_features, packed.in_features], weight)
            return packed

        device = self.device if self.device is not None else "cpu" if weight.is_meta else weight.device
        return self.choice.packed(name, module, scheme, from_shapes, torch.device(device).type, dtype) is not None

    def _stored(
        self, name: str, deferred: Mapping[str, DeferredTensor], scheme: QuantizationScheme
    ) -> dict[str, Tensor]:
        """The tensors of a packed module."""
        tensors = {local: tensor[...] for local, tensor in deferred.items()}
        check_stored_scales(name, tensors)
        codes = tensors.get("weight")
        if codes is not None and codes.is_floating_point() and (codes.view(torch.uint8) & 127 == 127).any():
            raise ValueError("NaN in its weight; the file is damaged")
        return _scales_as(self.dtype, tensors, scheme)

    def _dense(
        self, path: Path, name: str, deferred: Mapping[str, DeferredTensor], scheme: QuantizationScheme
    ) -> Tensor:
        """The dense weight of one module, of the dtype of the model; its record is noted."""
        module = self.layout.get_submodule(name)
        weight = weight_of(module)
        with naming(path, repr(name)):
            tensors = _scales_as(self.dtype, {local: tensor[...] for local, tensor in deferred.items()}, scheme)
            value, record = unpack(tensors, type(module), scheme)
            if value.shape != weight.shape:
                raise ValueError(
                    f"its weight unpacks to {list(value.shape)}, and in the model it is {list(weight.shape)}"
                )
            check_record(name, value, record)
        self.records[name] = record
        self._unreleased += value.nbytes
        if self._unreleased > _RELEASED_AFTER:
            release()
            self._unreleased = 0
        return value.to(weight.dtype) if is_microscaled(scheme.weights) else value


def _check_size(deferred: Mapping[str, DeferredTensor], scheme: QuantizationScheme, weight: Tensor) -> None:
    """ValueError before memory is allocated that the file does not fill."""
    codes = deferred.get("weight", deferred.get("weight_packed"))
    assert codes is not None
    if "weight_shape" in deferred:
        _check_shape(deferred["weight_shape"][...].tolist(), weight)
    elif "weight" in deferred:
        _check_shape(list(codes.shape), weight)
    bits = codes.numel() * codes.dtype.itemsize * 8
    if bits < weight.numel() * scheme.weights.num_bits:
        raise ValueError(f"its codes have {bits:,} bits in the file, too few for {weight.numel():,} weights")


def _check_shape(shape: list[int], weight: Tensor) -> None:
    if shape != list(weight.shape):
        raise ValueError(f"its weight is {shape!s:.80} in the file, and in the model {list(weight.shape)}")


def _scales_as(dtype: torch.dtype | None, tensors: dict[str, Tensor], scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Scales of the model's dtype in another one, as transformers reads them; those with a format of their own stay."""
    if dtype is None or is_microscaled(scheme.weights):
        return tensors
    return tensors | {name: tensors[name].to(dtype) for name in ("weight_scale", "input_scale") if name in tensors}


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, dtype=dtype, device="cpu").expand(shape)
