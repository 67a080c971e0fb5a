"""One quantized module as tensors on disk and back, through compressed-tensors' own compressors.

Integer codes alone are packed by ops/pack, which is quicker, and checked by compressed-tensors' unpacking.

A quantized module holds its weight on the grid, W = (code - zero_point) * scale, and a
:class:`~lightning_compress.quant.record.Quantized` that knows the grid. Packing finds the codes again; that this loses
nothing is checked for every module, by unpacking and comparing bit for bit.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.base import COMPRESSIBLE_MODULE_TYPES
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from torch import Tensor, nn

from lightning_compress.layers.matrix import as_matrix, weight_of
from lightning_compress.ops.pack import pack as pack_words
from lightning_compress.quant.fake_quant import CACHED, on_its_device, round_weight, wide
from lightning_compress.quant.formats import has_global_scale, is_microscaled, scale_shape
from lightning_compress.quant.record import Quantized

Stored = TypeVar("Stored")

__all__ = ["ACTIVATION_NAMES", "check_fit", "check_record", "check_stored_scales", "compress_words", "is_packable",
           "pack", "tensor_names", "unpack", "unpacked_weight", "weight_codes"]  # fmt: skip

ROWS = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)  # scales [R, G]
ACTIVATION_NAMES = ("input_scale", "input_zero_point", "input_global_scale")
"""What a static activation scheme adds to the names of a module's tensors."""


def is_packable(module: nn.Module) -> bool:
    """True for modules whose packed weight transformers and vLLM read: Linear and Embedding."""
    return isinstance(module, COMPRESSIBLE_MODULE_TYPES)


def pack(name: str, module: nn.Module, record: Quantized) -> dict[str, Tensor]:
    """The tensors that replace ``weight`` on disk, on the CPU; the module is not changed.

    ``module`` is a Linear or an Embedding whose weight [R, C] is on the grid of ``record``; ``name`` is for messages.

    Returns:
        By local name: ``weight_packed`` int32 and ``weight_shape`` int64, or ``weight_packed`` uint8 (FP4, FP6), or
        ``weight`` int8 or float8; ``weight_scale`` in the weight's dtype (NVFP4: float8, MX formats: exponents as
        uint8), ``weight_zero_point``, ``weight_global_scale``, ``input_scale``, ``input_zero_point``,
        ``input_global_scale`` where the scheme has them.

    Raises:
        RuntimeError: The weight is not on the grid: it was changed after compression.
    """
    weight, scheme = weight_of(module), record.scheme
    check_record(name, weight, record)
    compressor = _compressor(type(module), scheme)
    compress = compress_words if compressor is PackedQuantizationCompressor else compressor.compress
    state = {"weight_scale": wide(record.scale)}
    if record.zero_point is not None:
        state["weight_zero_point"] = record.zero_point
    if record.global_scale is not None:
        state["weight_global_scale"] = record.global_scale.clone()  # fused modules share one
        state["weight_scale"] = (record.scale * record.global_scale).to(torch.float8_e4m3fn).float()

    def to_disk_and_back(wide_RC: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed: dict[str, Tensor] = compress({"weight": wide_RC, **state}, scheme)
        if not is_microscaled(scheme.weights):
            packed["weight_scale"] = record.scale
        if compress is compress_words and scheme.weights.strategy in ROWS:
            codes = unpack_from_int32(packed["weight_packed"], scheme.weights.num_bits, wide_RC.shape)
            return packed, _values(codes, record.scale, record.zero_point)
        return packed, _decompress(compressor, packed, scheme)["weight"]

    packed = _exact(name, weight, record, to_disk_and_back)
    for local in ACTIVATION_NAMES:
        value = getattr(record, local)
        if value is not None and not (local.endswith("zero_point") and scheme.input_activations.symmetric):
            packed[local] = value.reshape(-1).to(weight.dtype if local == "input_scale" else value.dtype)
    return {local: value.detach().cpu().contiguous() for local, value in packed.items()}


def compress_words(state: Mapping[str, Tensor], scheme: QuantizationScheme) -> dict[str, Tensor]:
    """The result of ``PackedQuantizationCompressor.compress``, bit for bit, on the device of the weight.

    ``weight`` [R, C] in ``state`` is float32 or wider, and on the grid of ``weight_scale`` and ``weight_zero_point``.
    """
    args = scheme.weights
    tensors = {name: value for name, value in state.items() if name not in ("weight", "weight_zero_point")}
    zero = state.get("weight_zero_point")
    codes = _codes(state["weight"], state["weight_scale"], zero, args)
    shape = torch.tensor(codes.shape, dtype=torch.int64, device="cpu")
    tensors |= {"weight_packed": pack_words(codes, args.num_bits), "weight_shape": shape}
    if not args.symmetric and zero is not None:
        tensors["weight_zero_point"] = pack_words(zero, args.num_bits, 0) if args.strategy in ROWS else zero
    return tensors


def _codes(wide_RC: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs) -> Tensor:
    """What compressed-tensors' ``quantize`` gives, for groups and channels on the CPU in a quarter of its time."""
    if args.strategy not in ROWS or wide_RC.is_cuda:  # on a GPU it is one kernel
        with on_its_device(wide_RC):
            return quantize(wide_RC, scale, zero_point, args, dtype=torch.int8)
    largest, rows = 2 ** (args.num_bits - 1) - 1, max(1, CACHED // wide_RC.shape[1])
    codes_RC = torch.empty(wide_RC.shape, dtype=torch.int8, device="cpu")
    for start in range(0, len(wide_RC), rows):
        piece = slice(start, start + rows)
        codes_RGg = wide_RC[piece].unflatten(1, (scale.shape[1], -1)) / scale[piece, :, None]
        if zero_point is not None:
            codes_RGg += zero_point[piece, :, None]
        codes_RC[piece] = codes_RGg.round_().clamp_(-largest - 1, largest).flatten(1)
    return codes_RC


def _values(codes_RC: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """What compressed-tensors' ``dequantize`` gives, in a fifth of its time."""
    values_RC = codes_RC.to(scale.dtype)
    values_RGg = values_RC.unflatten(1, (scale.shape[1], -1))
    if zero_point is not None:
        values_RGg -= zero_point[:, :, None]
    values_RGg *= scale[:, :, None]
    return values_RC


def unpack(tensors: dict[str, Tensor], module_type: type, scheme: QuantizationScheme) -> tuple[Tensor, Quantized]:
    """The reverse of :func:`pack`: the dequantized weight [R, C] and the record."""
    state = _decompress(_compressor(module_type, scheme), tensors, scheme)
    scale, shared = state["weight_scale"].detach(), state.get("weight_global_scale")
    if is_microscaled(scheme.weights):
        scale = scale.float() if shared is None else scale.float() / shared
    record = Quantized(
        scheme=scheme,
        scale=scale,
        zero_point=state.get("weight_zero_point"),
        input_scale=state.get("input_scale"),
        input_zero_point=state.get("input_zero_point"),
        global_scale=shared,
        input_global_scale=state.get("input_global_scale"),
    )
    return state["weight"], record


def unpacked_weight(tensors: dict[str, Any], module_type: type, scheme: QuantizationScheme) -> Tensor:
    """The weight alone, without the rest of the record: torch.export fails on results that are not used."""
    return _decompress(_compressor(module_type, scheme), tensors, scheme)["weight"]


def tensor_names(module_type: type, scheme: QuantizationScheme) -> tuple[str, ...]:
    """Local names that :func:`unpack` wants (activation names only where the file has them)."""
    return (*_compressor(module_type, scheme).compression_param_names(scheme), *ACTIVATION_NAMES)


def check_fit(name: str, module: nn.Module, record: Quantized) -> None:
    """RuntimeError names the module when its weight is not on the grid of its record; for any kind of module."""
    _exact_codes(name, module, record)


def weight_codes(name: str, module: nn.Module, record: Quantized) -> Tensor:
    """The codes of an integer weight as int8 [R, C], on its device: those that :func:`pack` packs.

    Raises:
        RuntimeError: The weight is not on the grid of its record.
    """
    codes_RC = _exact_codes(name, module, record)
    assert codes_RC is not None
    return codes_RC


def _exact_codes(name: str, module: nn.Module, record: Quantized) -> Tensor | None:
    """The codes of a weight, which give it back bit for bit; None for the formats of quant/formats.py."""
    weight_RC, args = as_matrix(module).detach(), record.scheme.weights
    check_record(name, weight_RC, record)

    def to_codes_and_back(wide_RC: Tensor) -> tuple[Tensor | None, Tensor]:
        if is_microscaled(args):
            return None, round_weight(weight_RC, record.scale, None, args)
        with on_its_device(wide_RC):
            codes_RC = quantize(wide_RC, wide(record.scale), record.zero_point, args, dtype=args.pytorch_dtype())
        return codes_RC, dequantize(codes_RC, record.scale, record.zero_point, args)

    return _exact(name, weight_RC, record, to_codes_and_back)


def check_record(name: str, weight_RC: Tensor, record: Quantized) -> None:
    """RuntimeError when scales do not have the shape that the strategy wants, or are not finite and positive."""
    args: QuantizationArgs = record.scheme.weights
    expected = scale_shape(args, *weight_RC.shape)
    if expected is None:
        raise ValueError(f"{name!r}: cannot export weights of strategy {args.strategy!r}; use tensor, channel or group")
    if has_global_scale(args) and record.global_scale is None:
        raise RuntimeError(f"{name!r}: its scheme is NVFP4, but its record has no global scale")
    for what, value in (("scale", record.scale), ("zero point", record.zero_point)):
        if value is not None and tuple(value.shape) != expected:
            raise RuntimeError(
                f"{name!r}: its {what} has shape {tuple(value.shape)}, expected {expected} "
                f"({QuantizationStrategy(args.strategy).value})"
            )
    if not args.symmetric and record.zero_point is None:
        raise RuntimeError(f"{name!r}: its scheme is asymmetric, but its record has no zero point")
    names = ("scale", "global_scale", "input_scale", "input_global_scale")
    _check_positive(name, {what: getattr(record, what) for what in names})


def check_stored_scales(name: str, tensors: Mapping[str, Tensor]) -> None:
    """RuntimeError when scales among the tensors of one packed module are not finite and positive."""
    scales: dict[str, Tensor | None] = {}
    for local, value in tensors.items():
        if local.endswith("_scale"):
            value = value.view(torch.float8_e8m0fnu) if value.dtype == torch.uint8 else value
            scales[local.removeprefix("weight_")] = value.float() if value.itemsize == 1 else value
    _check_positive(name, scales)


def _check_positive(name: str, scales: Mapping[str, Tensor | None]) -> None:
    for what, value in scales.items():
        if value is not None and not ((values := wide(value)).isfinite() & (values > 0)).all():
            raise RuntimeError(f"{name!r}: its {what} is not finite and positive everywhere")


def _compressor(module_type: type, scheme: QuantizationScheme) -> type[BaseCompressor]:
    chosen = scheme.format or infer_module_format(module_type, scheme).value
    return BaseCompressor.get_value_from_registry(chosen)


def _decompress(
    compressor: type[BaseCompressor], tensors: dict[str, Any], scheme: QuantizationScheme
) -> dict[str, Tensor]:
    """What it makes of ``tensors``; of packed zero points it views the transpose as bytes, which must be contiguous."""
    zero = tensors.get("weight_zero_point")
    if zero is not None and zero.ndim == 2:
        tensors = tensors | {"weight_zero_point": zero.t().clone(memory_format=torch.contiguous_format).t()}
    state: dict[str, Tensor] = compressor.decompress(tensors, scheme)
    return state


def _exact(
    name: str, weight_RC: Tensor, record: Quantized, round_trip: Callable[[Tensor], tuple[Stored, Tensor]]
) -> Stored:
    """What ``round_trip`` stores of a weight; RuntimeError where it cannot give back the weight bit for bit.

    It gets the weight in float32 or wider: in bfloat16 the quotient of an 8-bit code rounds to a neighbour (948 of all
    32,768 pairs of code and scale mantissa). That is exact for codes up to +-128; the asymmetric 8-bit ones reach
    +-255, where two codes may share one bfloat16 value and the nearest code (18 of 65,408 pairs) may give the value
    next to it; those are moved by one code, once.
    """
    args: QuantizationArgs = record.scheme.weights
    wide_RC, attempts = wide(weight_RC), 1 if is_microscaled(args) else 2
    while True:
        stored, again_RC = round_trip(wide_RC)
        again_RC, attempts = again_RC.to(weight_RC.dtype), attempts - 1
        if torch.equal(again_RC, weight_RC):
            return stored
        if not attempts:
            break
        step_RC = dequantize(torch.ones_like(wide_RC), wide(record.scale), None, args)
        wide_RC = wide_RC + wide(weight_RC - again_RC).sign() * step_RC
    off = again_RC != weight_RC
    raise RuntimeError(
        f"{name!r}: {int(off.sum())} of {off.numel()} weights do not lie on the grid of its record (largest gap "
        f"{(again_RC - weight_RC).abs().max().item():.3g}): the weight was changed after compression, as by training "
        f"or merging an adapter; call lightning_compress.dequantize(model), which keeps it, then compress it again"
    )
