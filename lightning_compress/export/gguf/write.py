"""A folder with a compressed decoder as ``model.gguf``, which llama.cpp runs.

    model.gguf              weights, metadata and tokenizer
    recipe.yaml             the recipe, where one was given
    export_manifest.json    the names of these files

Codes of symmetric integer grids are re-encoded, not rounded again: up to 4 bits as Q4_0, up to 8 bits as Q8_0, whose
blocks of 32 columns divide the groups. The scale of a block is float16; those of a model in bfloat16 fit exactly from
2^-17 up, those of a model in float32 are rounded, which changes a weight by at most 2^-11 of its value. Other weights
keep the dtype of the model; vectors are float32, as llama.cpp wants them.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

from lightning_compress.export.contents import check_weights
from lightning_compress.export.gguf.architecture import Architecture, architecture_of
from lightning_compress.export.gguf.blocks import BLOCK, block_scales, q4_0, q8_0
from lightning_compress.export.gguf.tokenizer import add_tokenizer, tokenizer_among
from lightning_compress.files.atomic_folder import whole_folder
from lightning_compress.layers.matching import clean_name, shortlist
from lightning_compress.layers.matrix import weight_of
from lightning_compress.modifiers.rotation.online import OnlineRotations
from lightning_compress.quant.kv_cache import QuantizedCache
from lightning_compress.quant.packed import unpacked
from lightning_compress.quant.packing import weight_codes
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.scales import expand

__all__ = ["FILE", "check_decoder", "check_package", "write_gguf"]

FILE = "model.gguf"


@dataclass
class _Written:
    """What went into a file."""

    types: dict[str, int] = field(default_factory=dict)  # tensors by type
    dense: list[str] = field(default_factory=list)  # quantized modules that the blocks cannot hold
    rounded: int = 0  # scales that float16 does not hold exactly
    scales: int = 0
    difference: float = 0.0  # the largest relative one of a scale


def check_package() -> None:
    """ValueError where the package gguf is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError("format='gguf' needs the package gguf: pip install 'lightning-compress[gguf]'") from error


def check_decoder(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> None:
    """ValueError where llama.cpp would compute something else than a model whose modules will have these schemes."""
    architecture_of(model)
    _check_features({"quantized inputs": [n for n, s in schemes.items() if s.input_activations is not None]})
    no_block = [n for n, s in schemes.items() if not _fits(s.weights, weight_of(model.get_submodule(n)).shape[-1])]
    if schemes and len(no_block) == len(schemes):
        raise ValueError(
            f"no weight would be smaller in GGUF, whose blocks hold symmetric integers in groups of 32 columns or a "
            f"multiple: {shortlist(no_block)}; take scheme=W4A16 or W8A16 with group_size=32"
        )


def write_gguf(
    model: nn.Module,
    folder: str | Path,
    *,
    processors: Sequence[Any] = (),
    recipe_yaml: str | None = None,
    overwrite: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Write a Llama or Qwen decoder as GGUF; the model does not change, and the folder appears whole or not at all.

    Warns where weights or scales of the file are not exactly those of the model.

    Args:
        model: The model.
        folder: Folder to write.
        processors: Among them the tokenizer; without one the file takes token ids.
        recipe_yaml: The text of recipe.yaml.
        overwrite: As of :func:`lightning_compress.save`.
        origin: The same.

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: The package gguf is missing, llama.cpp would compute something else, or the tokenizer is unknown.
    """
    check_package()
    from gguf import GGUFWriter

    architecture = architecture_of(model)
    _check_records(model)
    with unpacked(model), torch.no_grad():
        check_weights(model, {})
        with whole_folder(folder, overwrite=overwrite, origin=origin) as partial:
            writer = GGUFWriter(partial / FILE, architecture.name)
            try:
                architecture.add_metadata(writer)
                add_tokenizer(writer, tokenizer_among(processors), architecture.config.vocab_size)
                written = _add_tensors(writer, model, architecture)
                _add_file_type(writer, written)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
            if recipe_yaml is not None:
                (partial / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
    _warn(written)
    return Path(folder).expanduser().resolve()


def _check_records(model: nn.Module) -> None:
    """ValueError for what runs beside the weights, which llama.cpp does not do."""
    records = Quantized.find(model)
    inputs = [clean_name(name) for name, (_, r) in records.items() if r.scheme.input_activations is not None]
    _check_features({"quantized inputs": inputs, "a quantized KV cache": list(QuantizedCache.find(model)),
                     "rotations": list(OnlineRotations.find(model))})  # fmt: skip


def _check_features(features: Mapping[str, list[str]]) -> None:
    for what, names in features.items():
        if names:
            raise ValueError(
                f"{shortlist(names)} run with {what}, which GGUF does not hold: compress weights alone, as with W4A16 "
                f"or W8A16, or save in another format"
            )


def _add_tensors(writer: Any, model: nn.Module, architecture: Architecture) -> _Written:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    assert isinstance(kind, MODEL_ARCH)
    names = get_tensor_name_map(kind, architecture.config.num_hidden_layers)
    records = {f"{clean_name(name)}.weight": pair for name, pair in Quantized.find(model).items()}
    written = _Written()
    decoder: Any = model
    tied = decoder.get_output_embeddings().weight is decoder.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        on_disk = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if on_disk is None:
            raise ValueError(f"llama.cpp's {architecture.name} has no tensor for {name!r}: save it in another format")
        rows, type_ = _encoded(name, tensor, records.get(name), written)
        rows = architecture.reordered(name, rows).cpu().contiguous()
        as_numbers = rows.view(torch.uint8) if rows.dtype == torch.bfloat16 else rows
        writer.add_tensor(on_disk, as_numbers.numpy(), raw_dtype=type_)
        written.types[type_.name] = written.types.get(type_.name, 0) + (rows.ndim > 1)
    if (factors := architecture.rope_factors()) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    return written


def _encoded(name: str, tensor: Tensor, pair: tuple[nn.Module, Quantized] | None, written: _Written) -> Any:
    """Rows of bytes or numbers, and their type."""
    from gguf import GGMLQuantizationType as Type

    if pair is not None and _fits(pair[1].scheme.weights, tensor.shape[1]):
        module, record = pair
        d_RB, rounded, difference = block_scales(
            expand(record.scale, len(tensor), record.scheme.weights), tensor.shape[1]
        )
        if not d_RB.isfinite().all():
            raise ValueError(f"{name!r}: a scale above 65504 does not fit into float16, in which GGUF stores it")
        written.scales += record.scale.numel()
        written.rounded += rounded
        written.difference = max(written.difference, difference)
        codes_RC = weight_codes(name, module, record)
        if record.scheme.weights.num_bits <= 4:
            return q4_0(codes_RC, d_RB), Type.Q4_0
        return q8_0(codes_RC, d_RB), Type.Q8_0
    if pair is not None:
        written.dense.append(name.removesuffix(".weight"))
    types = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
    if tensor.ndim < 2 or tensor.dtype not in types:
        return tensor.float(), Type.F32
    return tensor, types[tensor.dtype]


def _fits(args: QuantizationArgs, columns: int) -> bool:
    """Whether blocks of 32 hold the codes: symmetric integers of up to 8 bits, in groups of whole blocks."""
    group = args.group_size if args.group_size and args.group_size > 0 else columns
    is_grid = args.type == "int" and args.symmetric and args.num_bits <= 8 and args.block_structure is None
    return is_grid and columns % BLOCK == 0 and group % BLOCK == 0


def _add_file_type(writer: Any, written: _Written) -> None:
    """Named after the type of most matrices."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    most = max(written.types, key=lambda name: written.types[name])
    writer.add_file_type(LlamaFileType.ALL_F32 if most == "F32" else LlamaFileType[f"MOSTLY_{most}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _warn(written: _Written) -> None:
    if written.dense:
        warnings.warn(
            f"{len(written.dense)} quantized modules are in {FILE} with dense weights, on their grid: "
            f"{shortlist(written.dense)}; Q4_0 and Q8_0 hold symmetric integers of up to 8 bits in groups of 32 "
            f"columns or a multiple",
            stacklevel=3,
        )
    if written.rounded:
        warnings.warn(
            f"{written.rounded} of {written.scales} scales do not fit into float16 exactly, in which GGUF stores them: "
            f"weights differ by up to {100 * written.difference:.2g} %; scales of a model in bfloat16 fit",
            stacklevel=3,
        )
