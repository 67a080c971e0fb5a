"""What a group of modules carries, as tensors for safetensors and facts for JSON; and back, bit for bit.

    to_tensors       weights on the grid of their record as codes, all others as they are; biases, buffers, records
    from_tensors     the modules again

The process that wrote calls :func:`from_tensors` as those do that read: integer codes do not hold the sign of a zero,
and the modules of all of them are to hold equal bits.

Names are those of an export, such as ``layers.0.fc.weight_packed``; tensors that an export does not hold have the
attribute of their record in the name.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.layers.matrix import parameter_of, weight_of
from lightning_compress.layers.records import Record, records_of
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.quant.formats import is_microscaled
from lightning_compress.quant.packing import is_packable, pack, tensor_names, unpack
from lightning_compress.quant.record import Quantized

__all__ = ["dense_tensors", "from_tensors", "settle", "to_tensors"]

Tensors = dict[str, Tensor]
Slots = dict[str, tuple[nn.Module, str]]


def to_tensors(modules: Mapping[str, nn.Module]) -> tuple[Tensors, dict[str, Any]]:
    """What these modules carry; their submodules count only where they are among them.

    Args:
        modules: Modules by a name that is the same wherever the result is read.

    Returns:
        Tensors on the CPU, which may share memory with the modules, and facts in JSON types.
    """
    packed = {name: codes for name, module in modules.items() if (codes := _pack(name, module)) is not None}
    tensors = {f"{name}.{local}": value for name, codes in packed.items() for local, value in codes.items()}
    unpacked, same = _first_names(_slots(modules), {name: modules[name] for name in packed})
    tensors |= {key: _tensor_at(*slot) for key, slot in unpacked.items()}
    records: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        for record in records_of(module):
            in_codes, of_record = {}, _tensors_of(record)
            if name in packed and isinstance(record, Quantized):
                in_codes = _in_codes(module, record, packed[name])
            extra = {field: t for field, t in of_record.items() if not _same_bits(t, in_codes.get(field))}
            tensors |= {f"{name}.{record.attribute}.{field}": value for field, value in extra.items()}
            records.setdefault(name, {})[record.attribute] = {
                "fields": replace(record, **dict.fromkeys(of_record)).to_json(),
                "tensors": list(extra),
                "in_codes": [field for field in of_record if field not in extra],
            }
    facts = {"packed": list(packed), "same": same, "records": records}
    return {key: _for_file(value) for key, value in tensors.items()}, facts


def from_tensors(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Give modules what :func:`to_tensors` returned for modules of these names.

    Values are written into the memory of the modules, on the meta device into new memory on the CPU. A module keeps no
    record that ``facts`` lacks.

    Raises:
        ValueError: A tensor belongs to none of the modules, is missing, or has another shape or dtype than the module
            has; or other modules share their tensors. Modules may be changed in part by then.
    """
    if unknown := sorted({*facts["packed"], *facts["records"]} - set(modules)):
        raise ValueError(f"there is a state of {unknown[0]!r}, which is not among the modules that are to get it")
    unpacked, same = _first_names(_slots(modules), {name: modules[name] for name in facts["packed"]})
    if same != facts["same"]:
        key = sorted(same.items() ^ facts["same"].items())[0][0]
        raise ValueError(
            f"{key!r} shares its memory with another tensor in one of the two models, and not in the other"
        )
    left = dict(tensors)
    records = {name: _records_of(name, modules[name], facts, left) for name in facts["records"]}
    for key, slot in unpacked.items():
        _write(key, *slot, _take(left, key))
    if left:
        raise ValueError(f"the tensor {sorted(left)[0]!r} belongs to none of the modules that are to get it")
    for name, module in modules.items():
        for record in records_of(module):
            if record.attribute not in records.get(name, {}):
                record.detach(module)
        for new in records.get(name, {}).values():
            old = new.of(module)
            if old is None or not _equal(old, new):  # hooks keep their order where nothing has changed
                new.to(_device_of(module)).attach(module)


def settle(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Give modules the bits that :func:`from_tensors` gives others, after their own :func:`to_tensors`.

    Only the sign of zeros can differ, of weights on integer grids; other grids have codes for both.
    """
    others: list[str] = []
    for name in facts["packed"]:
        record = Quantized.of(modules[name])
        assert record is not None
        if record.scheme.weights.type == "int":
            with torch.inference_mode(False), torch.no_grad():
                weight_of(modules[name]).add_(0.0)  # -0.0 + 0.0 is 0.0, and no other number changes
        else:
            others.append(name)
    if others:
        from_tensors(modules, tensors, facts)


def dense_tensors(modules: Mapping[str, nn.Module]) -> Tensors:
    """Parameters and buffers of modules by name, experts as slices; they share memory with the modules."""
    return {key: _tensor_at(*slot) for key, slot in _slots(modules).items()}


# -- parameters and buffers -------------------------------------------------------------------------------------------


def _slots(modules: Mapping[str, nn.Module]) -> Slots:
    """Where tensors lie, by name: module and attribute. Of fused experts the slices, where all of them are there."""
    sliced: Counter[int] = Counter()
    for module in modules.values():
        if isinstance(module, WeightSlice):
            sliced[id(module.whole)] += module.weight.numel()
    slots: Slots = {}
    for name, module in modules.items():
        for inner, owner in _with_parametrizations(name, module):
            if isinstance(owner, WeightSlice):
                slots[f"{inner}.weight"] = owner, "weight"
                continue
            for local, value in {**owner._parameters, **owner._buffers}.items():
                if value is not None and sliced.get(id(value)) != value.numel():
                    slots[f"{inner}.{local}"] = owner, local
    return slots


def _with_parametrizations(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    if isinstance(lists := module._modules.get("parametrizations"), nn.ModuleDict):
        yield from lists.named_modules(prefix=f"{name}.parametrizations")


def _first_names(slots: Slots, packed: Mapping[str, nn.Module]) -> tuple[Slots, dict[str, str]]:
    """The slots of tensors that are stored as they are, and by the name of each further slot of one its first name."""
    first = {_identity(module): "" for module in packed.values()}
    unpacked: Slots = {}
    same: dict[str, str] = {}
    for key, (module, local) in slots.items():
        identity = _identity(module) if isinstance(module, WeightSlice) else id(getattr(module, local))
        name = first.setdefault(identity, key)
        if name == key:
            unpacked[key] = module, local
        elif name and slots[name] != slots[key]:
            same[key] = name
    return unpacked, same


def _identity(module: nn.Module) -> int:
    """That of the tensor that holds the weight; a slice is made anew at every look, so an expert stands for its own."""
    return id(module) if isinstance(module, WeightSlice) else id(parameter_of(module))


def _tensor_at(module: nn.Module, local: str) -> Tensor:
    tensor = getattr(module, local)
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def _write(key: str, module: nn.Module, local: str, value: Tensor) -> None:
    place = _tensor_at(module, local)
    if place.shape != value.shape or place.dtype != value.dtype:
        raise ValueError(
            f"{key!r} is stored as {value.dtype} {list(value.shape)}, and the module has {place.dtype} "
            f"{list(place.shape)}: the models differ"
        )
    if not place.is_meta:
        place.copy_(value)
    elif local in module._buffers:
        module._buffers[local] = value.clone()
    else:
        assert local in module._parameters, f"{key!r} is on the meta device, and its module does not own it"
        module._parameters[local] = nn.Parameter(value.clone(), getattr(module, local).requires_grad)


def _take(left: Tensors, key: str) -> Tensor:
    if key not in left:
        raise ValueError(f"there is no tensor {key!r}; expected one for each parameter and buffer that has no codes")
    return left.pop(key)


def _for_file(value: Tensor) -> Tensor:
    """Contiguous on the CPU, in memory that no other tensor uses: safetensors refuses shared memory."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


# -- codes ------------------------------------------------------------------------------------------------------------


def _pack(name: str, module: nn.Module) -> Tensors | None:
    """Packed tensors of a module; None where it has no grid, or no codes give its weight."""
    record = Quantized.of(module)
    if record is None or not is_packable(module):
        return None
    try:
        return pack(name, module, record)
    except (RuntimeError, ValueError):  # changed after rounding, or a strategy that no reader knows
        return None


def _in_codes(module: nn.Module, record: Quantized, codes: Tensors) -> Tensors:
    """The tensors of a record that :func:`unpack` gives back."""
    if is_microscaled(record.scheme.weights):
        return _tensors_of(unpack(codes, type(module), record.scheme)[1])
    names = {"scale": "weight_scale", "input_scale": "input_scale", "input_zero_point": "input_zero_point"}
    tensors = {field: codes[local] for field, local in names.items() if local in codes}
    if record.zero_point is not None and "weight_zero_point" in codes:  # packed in words, exactly
        tensors["zero_point"] = record.zero_point
    return tensors


def _unpack(name: str, module: nn.Module, fields_: Mapping[str, Any], left: Tensors) -> Quantized:
    """Write the weight of a module from its codes, and return the record that they hold."""
    scheme = Quantized.from_json(fields_).scheme
    codes = {
        part: left.pop(f"{name}.{part}") for part in tensor_names(type(module), scheme) if f"{name}.{part}" in left
    }
    with torch.inference_mode(False), torch.no_grad():
        W_RC, record = unpack(codes, type(module), scheme)
    weight = weight_of(module)
    parameter = "parametrizations.weight.original" if hasattr(module, "parametrizations") else "weight"
    owner = module.get_submodule(parameter.rpartition(".")[0])
    _write(f"{name}.weight", owner, parameter.rpartition(".")[2], W_RC.to(weight.dtype))
    return record


# -- records ----------------------------------------------------------------------------------------------------------


def _records_of(name: str, module: nn.Module, facts: Mapping[str, Any], left: Tensors) -> dict[str, Record]:
    """The records of a module by attribute; its weight is written where it has codes."""
    kinds = {kind.attribute: kind for kind in _kinds(Record)}
    records = {}
    for attribute, stored in facts["records"][name].items():
        if attribute not in kinds:
            raise ValueError(f"{name!r} has a record {attribute!r}, which is unknown here; import what defines it")
        from_codes = {}
        if name in facts["packed"] and attribute == Quantized.attribute:
            from_codes = _tensors_of(_unpack(name, module, stored["fields"], left))
        extra = {field: _take(left, f"{name}.{attribute}.{field}").clone() for field in stored["tensors"]}
        tensors = {field: from_codes[field] for field in stored["in_codes"]} | extra
        records[attribute] = replace(kinds[attribute].from_json(stored["fields"]), **tensors)
    return records


def _kinds(kind: type[Record]) -> Iterator[type[Record]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _kinds(sub)


def _tensors_of(record: Record) -> Tensors:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _same_bits(value: Tensor, other: Tensor | None) -> bool:
    if other is None or value.shape != other.shape or value.dtype != other.dtype:
        return False
    one, two = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (value, other))
    return torch.equal(one, two)


def _equal(record: Record, other: Record) -> bool:
    of_one, of_other = _tensors_of(record), _tensors_of(other)
    equal_tensors = of_one.keys() == of_other.keys() and all(_same_bits(t, of_other[k]) for k, t in of_one.items())
    return equal_tensors and replace(record, **dict.fromkeys(of_one)) == replace(other, **dict.fromkeys(of_other))


def _device_of(module: nn.Module) -> torch.device:
    """Of its weight; a module without tensors of its own is where its submodules are."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
