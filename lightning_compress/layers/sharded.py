"""Parameters that FSDP2 or tensor parallelism shards (DTensors): their full values, and a module at work without both.

A rank holds its shard. Work that needs whole weights gathers one module at a time (:func:`gathered`): inside, plain
parameters stand in for the shards, and what is written into them goes back. Every rank enters, in the same order.

Hooks of ``fully_shard`` and ``parallelize_module`` gather weights and distribute inputs at each call. A walk over
blocks calls modules on plain weights, so :func:`plain_modules` takes these hooks off for a while.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "full",
    "gathered",
    "is_dtensor",
    "is_sharded",
    "local",
    "plain_modules",
    "reshard",
    "shard_alike",
    "sharded_like",
]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a shard; without importing torch.distributed.tensor."""
    return hasattr(tensor, "full_tensor")


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module is a DTensor."""
    return any(is_dtensor(parameter) for parameter in module.parameters())


def full(tensor: Tensor) -> Tensor:
    """All values of a tensor, without gradient; of a DTensor every rank gets them, and every rank calls this."""
    with torch.no_grad():
        values: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]
    return values


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, without gradient; all of it where it is not sharded."""
    held: Tensor = tensor.detach().to_local() if is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]
    return held


def sharded_like(values: Tensor, like: Tensor) -> Tensor:
    """Full values, equal on all ranks, in shards like those of ``like``; a plain ``like`` leaves them as they are."""
    if not is_dtensor(like) or is_dtensor(values):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    replicated = DTensor.from_local(values.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=placements)


@contextmanager
def gathered(module: nn.Module, *, without: Iterable[nn.Module] = (), write: bool = True) -> Iterator[None]:
    """Inside, parameters of a module, and of modules inside it, are plain and hold all values on every rank.

    Args:
        module: A module; parameters that are not DTensors stay as they are.
        without: Modules inside it whose parameters stay shards.
        write: Write values back into the shards at the end; False: nothing was changed.

    Raises:
        ValueError: A parameter has another shape at the end, or is gone: shards cannot follow.
    """
    outside = {inner for other in without for inner in other.modules()}
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if owner not in outside and parameter is not None and is_dtensor(parameter)
    ]
    plain: dict[int, nn.Parameter] = {}
    try:
        for owner, name, parameter in places:
            if id(parameter) not in plain:
                plain[id(parameter)] = nn.Parameter(full(parameter).contiguous(), parameter.requires_grad)
            owner._parameters[name] = plain[id(parameter)]
        yield
        for owner, name, parameter in places if write else ():
            _write(parameter, owner._parameters.get(name), f"{name!r} of a {type(owner).__name__}")
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter


def reshard(model: nn.Module) -> None:
    """Free the full weights that FSDP2 keeps after a forward pass: what is written into those would be lost."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):  # an FSDPModule
            module.reshard()  # type: ignore[operator]


@contextmanager
def plain_modules(model: nn.Module) -> Iterator[None]:
    """Inside, modules have the classes and hooks that they had before ``fully_shard`` and ``parallelize_module``."""
    reshard(model)
    classes = {m: type(m) for m in model.modules() if hasattr(m, "set_reshard_after_forward")}
    removed: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    try:
        for module, kind in classes.items():
            module.__class__ = kind.__bases__[1]  # FSDPLinear is made as (FSDPModule, Linear)
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                removed.append((hooks, before := dict(hooks)))
                for key in [key for key, hook in before.items() if _is_of_torch(hook)]:
                    del hooks[key]
        yield
    finally:
        for hooks, before in removed:
            earlier = {key: hook for key, hook in before.items() if key in hooks or _is_of_torch(hook)}
            later = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update(earlier | later)
        for module, kind in classes.items():
            module.__class__ = kind


def shard_alike(module: nn.Module, like: nn.Module) -> None:
    """Shard a module as ``fully_shard`` has sharded another one of the same structure; else it stays as it is."""
    modules = dict(module.named_modules())
    others = {name: other for name, other in like.named_modules() if hasattr(other, "set_reshard_after_forward")}
    if not others or not all(
        name in modules and isinstance(other, type(modules[name])) for name, other in others.items()
    ):
        return
    meshes = {name: next(filter(is_dtensor, other.parameters())).device_mesh for name, other in others.items()}
    if any(mesh.ndim > 1 for mesh in meshes.values()):
        return
    from torch.distributed.fsdp import fully_shard

    for name, mesh in reversed(meshes.items()):  # inner modules first
        fully_shard(modules[name], mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def _write(parameter: nn.Parameter, values: Tensor | None, name: str) -> None:
    if values is None or values.shape != parameter.shape:
        shape = "gone" if values is None else f"of shape {list(values.shape)}"
        raise ValueError(
            f"{name} is sharded with shape {list(parameter.shape)} and is {shape} now: a modifier that changes the "
            f"structure of a model cannot work on shards; compress on one device or with strategy='ddp'"
        )
    local(parameter).copy_(local(sharded_like(values.detach().to(parameter.dtype), parameter)))


def _is_of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
