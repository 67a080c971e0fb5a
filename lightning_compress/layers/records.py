"""What a module carries beside its tensors: the grid of its weight or of its cache, rotations, the cuts of a model.

A record is a plain attribute of the module, neither parameter nor buffer: the keys of ``state_dict`` stay those of the
dense model. Each kind of record is a frozen dataclass derived from :class:`Record`, which attaches, finds, moves and
converts all of them alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

__all__ = ["Record", "has_record", "records_of"]


@dataclass(frozen=True)
class Record:
    """One kind of record; a module carries at most one of each kind.

    Attributes:
        attribute: Name of the attribute of the module.
        hooks: Functions that :meth:`register` may hook to the module, and that :meth:`detach` removes.
    """

    attribute: ClassVar[str]
    hooks: ClassVar[tuple[Callable[..., Any], ...]] = ()

    def attach(self, module: nn.Module) -> None:
        """Put the record and its hooks on a module, in place of an older record of this kind."""
        self.detach(module)
        setattr(module, self.attribute, self)
        self.register(module)

    def register(self, module: nn.Module) -> None:
        """Register the hooks that this record needs; a kind without hooks needs none."""

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """The record of a module, or None."""
        return getattr(module, cls.attribute, None)

    @classmethod
    def find(cls, model: nn.Module) -> dict[str, tuple[nn.Module, Self]]:
        """Modules of a model that carry such a record, and their records, by dotted name."""
        records = ((name, module, cls.of(module)) for name, module in model.named_modules())
        return {name: (module, record) for name, module, record in records if record is not None}

    @classmethod
    def detach(cls, module: nn.Module) -> None:
        """Remove the record and its hooks; the tensors of the module stay as they are. Without a record: nothing."""
        if cls.of(module) is None:
            return
        delattr(module, cls.attribute)
        # hooks are found by identity: handles would not survive copy.deepcopy of the model
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if hook in cls.hooks]:
                del hooks[key]
                with_kwargs.pop(key, None)

    def to(self, device: torch.device) -> Self:
        """The same record with its tensors on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def to_json(self) -> Any:
        """The record in JSON types, without fields whose metadata says ``stored=False``.

        A tensor becomes its dtype, its shape and its values in a flat list; decimal numbers give back the same bits.
        """
        stored = [field.name for field in fields(self) if field.metadata.get("stored", True)]
        return {name: _to_json(getattr(self, name)) for name in stored}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """The reverse of :meth:`to_json`."""
        return cls(**{name: _from_json(value) for name, value in data.items()})


def records_of(module: nn.Module) -> list[Record]:
    """The records of a module, of all kinds."""
    return [value for value in vars(module).values() if isinstance(value, Record)]


def has_record(module: nn.Module) -> bool:
    """Whether a module carries a record of any kind."""
    return bool(records_of(module))


def _to_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        dtype, values = str(value.dtype).removeprefix("torch."), value.detach().cpu().flatten().tolist()
        return {"dtype": dtype, "shape": list(value.shape), "values": values}
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"dtype", "shape", "values"}:
        return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]), device="cpu").reshape(value["shape"])
    return value
