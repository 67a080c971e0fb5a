"""Weights that several modules share: one Parameter with two owners, or two Parameters in the same memory.

A change of the weight of one such module changes the others with it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_compress.layers.matching import shortlist
from lightning_compress.layers.sharded import is_dtensor
from lightning_compress.layers.weight_slice import owner_of

__all__ = ["check_unshared", "owners_of", "shared_message", "shared_parameters"]


def owners_of(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """By ``id`` of a parameter, the modules that hold it or a parameter that overlaps it, by the parameter's name."""
    named = [
        (f"{owner_name}.{name}".removeprefix("."), owner, parameter)
        for owner_name, owner in model.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
    ]
    places: dict[object, list[tuple[str, nn.Module, Tensor]]] = defaultdict(list)
    for entry in named:
        places[_storage(entry[2])].append(entry)
    return {
        id(parameter): {name: owner for name, owner, other in places[_storage(parameter)] if _overlap(parameter, other)}
        for _, _, parameter in named
    }


def shared_parameters(model: nn.Module) -> set[int]:
    """The ``id`` of each parameter that has several owners."""
    return {key for key, owners in owners_of(model).items() if len({id(owner) for owner in owners.values()}) > 1}


def check_unshared(model: nn.Module, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor]) -> None:
    """ValueError names the first of ``modules`` whose weight other modules share.

    ``parameters`` holds the parameter of each module that will be changed.
    """
    owners = owners_of(model)
    for name, parameter in parameters.items():
        inside = set(map(id, owner_of(modules[name]).modules()))  # with parametrizations
        held = {key: owner for key, owner in owners.get(id(parameter), {}).items() if id(owner) not in inside}
        if held:
            raise ValueError(shared_message(name, list(held), [n for n in modules if f"{n}.weight" in held]))


def shared_message(name: str, others: Sequence[str], targets: Sequence[str] = ()) -> str:
    """Why a module is refused whose weight is shared.

    ``others`` are parameters of other modules that share its weight, ``targets`` those modules that are targets too.
    """
    listed = shortlist(map(repr, others))
    both = " and ".join(map(repr, dict.fromkeys([name, *targets])))
    return (
        f"the weight of {name!r} is shared with {listed}, which would change with it; add {both} to ignore, or untie "
        f"the two: give one of them a copy, as in head.weight = nn.Parameter(head.weight.detach().clone()), and set "
        f"tie_word_embeddings=False in the model's config"
    )


def _storage(parameter: Tensor) -> object:
    if parameter.is_meta or not parameter.numel() or is_dtensor(parameter):
        return id(parameter)
    return parameter.device, parameter.untyped_storage().data_ptr()


def _overlap(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    (begin, end), (other_begin, other_end) = _range(first), _range(second)
    return begin < other_end and other_begin < end


def _range(tensor: Tensor) -> tuple[int, int]:
    """The first byte, and the one behind the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    begin = int(tensor.storage_offset()) * tensor.element_size()
    return begin, begin + (sum((size - 1) * int(stride) for size, stride in steps) + 1) * tensor.element_size()
