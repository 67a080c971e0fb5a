"""What of a model goes where in an export: which weights are packed, which stay dense and why; and what prevents it."""

import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_compress.export.embeddings import unpackable_embeddings, unpacked
from lightning_compress.export.hugging_face import is_transformers
from lightning_compress.layers.finite import nonfinite
from lightning_compress.layers.matching import clean_name, shortlist
from lightning_compress.layers.module_weights import ModuleWeight
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.quant.kv_cache import QuantizedCache, attention_modules
from lightning_compress.quant.packing import is_packable
from lightning_compress.quant.record import Quantized, saw_rows

__all__ = ["Contents", "Records", "Stored", "block_contents", "check_weights", "contents_of", "warn_of_contents"]

Records = Mapping[str, tuple[nn.Module, Quantized]]
Stored = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Contents:
    """What is written of a model."""

    model: nn.Module  # packed Linears are replaced by Linears without memory
    records: Records  # of quantized modules, by clean name
    dense: Mapping[str, str]  # those whose weight stays dense on disk, and why
    caches: Mapping[str, QuantizedCache]  # by attention module
    stored: Stored  # tensors of modules that are packed in memory, by name

    @property
    def packed(self) -> Records:
        """Modules whose weight is written packed."""
        return {name: pair for name, pair in self.records.items() if name not in self.dense}

    @property
    def is_transformers(self) -> bool:
        """True for a model of transformers."""
        return is_transformers(self.model)


def contents_of(model: nn.Module, stored: Stored) -> Contents:
    """Sort the modules of a model by how they are written.

    Raises:
        ValueError: The KV cache of some attention modules is quantized, and that of others is not.
    """
    records: Records = {clean_name(name): pair for name, pair in Quantized.find(model).items()}
    caches, dense = _caches(model), _dense_on_disk(model, records)
    if is_transformers(model):
        packed = {name: pair for name, pair in records.items() if name not in dense}
        embeddings = unpackable_embeddings(packed, bool(caches))
        dense |= {name: reason for name, reason in embeddings.items() if reason is not None}
        in_bytes = embeddings.keys() - dense.keys()
        records = {n: (module, unpacked(r) if n in in_bytes else r) for n, (module, r) in records.items()}
    return Contents(model, records, dense, caches, stored)


def block_contents(model: nn.Module, modules: Mapping[str, nn.Module]) -> Contents:
    """What is written of one block of a model of transformers; it holds no embeddings.

    Args:
        model: The model; tensors outside of the block may be on meta.
        modules: The modules of the block, by clean name.
    """
    records = {name: (module, record) for name, module in modules.items() if (record := Quantized.of(module))}
    caches = {name: cache for name, module in modules.items() if (cache := QuantizedCache.of(module))}
    return Contents(model, records, _dense_on_disk(model, records), caches, {})


def check_weights(model: nn.Module, stored: Stored) -> None:
    """ValueError for weights that are not in memory, and for NaN or Inf."""
    away = [clean_name(name) for name, p in model.named_parameters() if p.is_meta]
    if away := [name for name in away if name.rpartition(".")[0] not in stored]:
        raise ValueError(f"{len(away)} weights are not in memory, such as {away[0]}; load the model without offloading")
    if broken := nonfinite(model):
        listed = shortlist(map(clean_name, broken))
        raise ValueError(
            f"NaN or Inf in {len(broken)} parameters or buffers, such as {listed}; such a model is not exported"
        )


def warn_of_contents(contents: Contents) -> None:
    """Warn of weights that stay dense, and of inputs that other loaders do not quantize, or quantize otherwise."""
    records, dense = contents.records, contents.dense
    if dense:
        listed = shortlist((f"{name} ({reason})" for name, reason in dense.items()), "; ")
        warnings.warn(
            f"{len(dense)} of {len(records)} quantized modules are written with dense weights, on their grid, "
            f"so their size on disk does not shrink: {listed}",
            stacklevel=3,
        )
    if active := [name for name in dense if records[name][1].scheme.input_activations is not None]:
        warnings.warn(
            f"transformers and vLLM will not quantize the inputs of {shortlist(active)}, so their outputs differ "
            f"from this model's; lightning_compress.load restores it",
            stacklevel=3,
        )
    rows = [name for name, (module, _) in contents.packed.items() if saw_rows(module)]
    if rows and contents.is_transformers:
        warnings.warn(
            f"{len(rows)} modules, such as {rows[0]}, get inputs [rows, features]: here each row has a scale of its "
            f"own, plain transformers takes one for all rows, so that its answers depend on the rest of the batch; "
            f"load the folder with lightning_compress.load, or add these modules to ignore",
            stacklevel=3,
        )


def _caches(model: nn.Module) -> dict[str, QuantizedCache]:
    """Records of the KV cache, by attention module; ValueError where loaders would quantize more than these."""
    caches = {clean_name(name): record for name, (_, record) in QuantizedCache.find(model).items()}
    if caches and (missing := [name for name in attention_modules(model) if name not in caches]):
        raise ValueError(
            f"the KV cache of {len(caches)} attention modules is quantized, that of {shortlist(missing)} is not, "
            f"and a folder can only say it of all; calibrate on data that reaches every one of them"
        )
    return caches


def _dense_on_disk(model: nn.Module, records: Records) -> dict[str, str]:
    """Quantized modules whose weight stays dense on disk, and why."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(clean_name(name))
    reasons = {}
    for name, (module, _) in records.items():
        if not is_packable(module):
            reasons[name] = f"no loader reads a packed {type(module).__name__}"
        elif isinstance(module, ModuleWeight) and is_transformers(model):
            reasons[name] = f"transformers reads no packed weights of a {type(module.home).__name__}"
        elif isinstance(module, WeightSlice):
            continue
        elif others := [other for other in owners[id(module.weight)] if other != name]:
            reasons[name] = f"it shares its weight with {others[0]!r}"
    return reasons
