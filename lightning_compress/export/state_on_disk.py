"""The state dict of a model as it is written: weights replaced by their packed tensors, slices separate."""

from torch import Tensor, nn

from lightning_compress.export.contents import Contents, Records
from lightning_compress.export.experts import names_of_experts
from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.matching import clean_name
from lightning_compress.layers.module_weights import all_weights, weights_inside
from lightning_compress.quant.packing import pack

__all__ = ["state_on_disk"]


def state_on_disk(contents: Contents) -> dict[str, Tensor]:
    """The state dict, each packed weight replaced by its packed tensors, module by module; the rest is not copied.

    Tensors of KV caches follow.
    """
    model, packed, stored = contents.model, contents.packed, contents.stored
    name_of = {id(module): name for name, (module, _) in packed.items()}
    packed_at = {
        f"{clean_name(path)}.weight": name_of[id(module)]
        for path, module in model.named_modules(remove_duplicate=False)
        if id(module) in name_of
    }
    parts = _experts_on_disk(model, packed) | _parts_on_disk(model, packed)
    tensors_of: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    first: dict[int, Tensor] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        key = clean_name(key)
        if isinstance(value, Tensor):
            value = _unshared(value, first)
        if key in parts:
            state |= parts[key]
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{key!r} in the state dict is a {type(value).__name__}; safetensors holds tensors only")
        if (name := packed_at.get(key)) is None:
            state[key] = value
            continue
        if name not in tensors_of:
            in_memory = {local: tensor.cpu().contiguous() for local, tensor in stored.get(name, {}).items()}
            tensors_of[name] = in_memory or pack(name, *packed[name])
        state |= {key.removesuffix("weight") + local: tensor for local, tensor in tensors_of[name].items()}
    for name, cache in contents.caches.items():
        state |= {f"{name}.{local}": getattr(cache, local).detach().cpu() for local in cache.tensor_names(cache.args)}
    return state


def _unshared(value: Tensor, first: dict[int, Tensor]) -> Tensor:
    """The tensor without gradient; a copy where it shares its memory without being tied (one Parameter).

    Writers keep one of equal views, and a model that is built anew does not share them.
    """
    if value.is_meta or not value.numel():
        return value.detach()
    earlier = first.setdefault(value.untyped_storage().data_ptr(), value)
    return value.detach() if earlier is value else value.detach().clone()


def _experts_on_disk(model: nn.Module, packed: Records) -> dict[str, dict[str, Tensor]]:
    """By key of a tensor of fused experts, the tensors of each expert, packed or dense, that replace it on disk."""
    experts: dict[str, dict[str, Tensor]] = {}
    if not any(isinstance(module, ExpertLinear) for module, _ in packed.values()):
        return experts
    for name, on_disk in names_of_experts(model).items():
        linear = model.get_submodule(name)
        assert isinstance(linear, ExpertLinear)
        local = pack(name, *packed[name]) if name in packed else {"weight": linear.weight.detach()}
        key = f"{name.rsplit('.', 2)[0]}.{linear.fused}"
        experts.setdefault(key, {}).update({f"{on_disk}.{part}": tensor for part, tensor in local.items()})
    return experts


def _parts_on_disk(model: nn.Module, packed: Records) -> dict[str, dict[str, Tensor]]:
    """The same for parameters of recurrent modules and attentions (layers/module_weights.py)."""
    name_of = {id(module): name for name, (module, _) in packed.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for path, home in model.named_modules(remove_duplicate=False):
        if not weights_inside(home):
            continue
        prefix = f"{clean_name(path)}." if path else ""
        weights = all_weights(home)
        written = {weight.fused for weight in weights.values() if id(weight) in name_of}
        for local, weight in weights.items():
            if weight.fused not in written:
                continue
            name = name_of.get(id(weight))
            tensors = {"weight": weight.weight.detach()} if name is None else pack(name, *packed[name])
            entry = parts.setdefault(f"{prefix}{weight.fused}", {})
            entry |= {f"{prefix}{local}.{part}": tensor for part, tensor in tensors.items()}
    return parts
