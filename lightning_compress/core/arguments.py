"""Arguments of a modifier: pydantic fields with one readable line for each error."""

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import repr as short
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

__all__ = ["Arguments"]


class Arguments(BaseModel):
    """Arguments that are validated when an object is made; unknown ones are refused.

    Args:
        index: Place in the recipe; free for the user.
        group: Name of the group in the recipe; free for the user.

    Raises:
        ValueError: An argument is unknown (near misses are named) or has a value that it cannot have.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True, allow_inf_nan=False)

    index: int | None = None
    group: str | None = None

    _entry: str | None = PrivateAttr(default=None)  # key in the recipe

    def __init__(self, /, **arguments: Any) -> None:
        try:
            super().__init__(**arguments)
        except ValidationError as error:
            raise ValueError(_readable(type(self), error)) from None

    @model_validator(mode="before")
    @classmethod
    def _no_surprise_of_yaml(cls, arguments: Any) -> Any:
        """Refuse a boolean where a number is expected (pydantic takes it), and a number where text is expected."""
        for name, value in arguments.items() if isinstance(arguments, dict) else ():
            kinds = _kinds(cls.model_fields[name].annotation) if name in cls.model_fields else {Any}
            if isinstance(value, bool) and kinds & {int, float} and not kinds & {bool, Any}:
                raise ValueError(
                    f"{name}={value}: expected a number (YAML reads yes, no, on, off, true and false as booleans)"
                )
            if isinstance(value, int) and not isinstance(value, bool) and str in kinds and not kinds - {str, list}:
                minutes = f", which is how YAML reads {value // 60}:{value % 60}" if value >= 60 else ""
                raise ValueError(f"{name}={value}: expected text, got a number{minutes}; write it in quotes")
        return arguments

    @property
    def name(self) -> str:
        """The name for messages and checkpoints: the class, and its group when it has one."""
        return f"{type(self).__name__}[{self.group}]" if self.group else type(self).__name__

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` whose value is not the default, sorted; dumped recipes give defaults, too."""
        fields = type(self).model_fields
        defaults = {name: fields[name].get_default(call_default_factory=True) for name in names}
        return sorted(name for name, value in defaults.items() if getattr(self, name) != value)

    def anew(self, **changes: Any) -> Self:
        """A new object with the same arguments but for ``changes``; None puts an argument back to its default."""
        arguments = {name: getattr(self, name) for name in self.model_fields_set} | changes
        new = type(self)(**{name: value for name, value in arguments.items() if value is not None})
        new._entry = self._entry
        return new

    def called(self, entry: str) -> None:
        """Note the key of this modifier in its recipe, for :meth:`override`."""
        self._entry = entry

    def override(self, argument: str, value: Any) -> str:
        """For messages in a Hydra app: how to set an argument on the command line; else empty."""
        hydra = sys.modules.get("hydra.core.hydra_config")
        if self._entry is None or hydra is None or not hydra.HydraConfig.initialized():
            return ""
        return f"; on the command line: callbacks.compress.modifiers.{self._entry}.{argument}={value}"


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation names, without those inside of lists and mappings."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(value) for value in inner}
    if origin is Annotated:
        return _kinds(inner[0])
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, inner)) - {NoneType}
    return {origin or annotation}


def _readable(arguments: type[Arguments], error: ValidationError) -> str:
    """One line for each wrong argument."""
    lines = []
    for entry in error.errors(include_url=False):
        name, message = ".".join(map(str, entry["loc"])), entry["msg"].removeprefix("Value error, ")
        if entry["type"] == "extra_forbidden" and len(entry["loc"]) == 1:
            near = get_close_matches(name, arguments.model_fields, cutoff=0.7)
            known = f"known: {', '.join(arguments.model_fields)}"
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else known
            lines.append(f"unknown argument {name!r}; {hint}")
        elif entry["type"] == "missing":
            lines.append(f"argument {name!r} is missing")
        else:
            lines.append(f"{name}={short(entry['input'])}: {message}" if name else message)
    return f"{arguments.__name__}: " + "\n".join(lines)
