"""Docstrings as the site shows them: fields of modifiers are their arguments, roles are code (griffe loads it)."""

import re
from typing import Any

from griffe import (
    Class,
    ExprCall,
    ExprKeyword,
    Extension,
    Function,
    Object,
    Package,
    Parameter,
    ParameterKind,
    Parameters,
)

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?(?:[\w.]+\.)?(\w+)`")


class PlainRoles(Extension):
    """Shows ``:class:`~package.module.Name``` as ``Name``, and ``text::`` above an example as ``text:``."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"::$", ":", ROLE.sub(r"`\1`", obj.docstring.value), flags=re.MULTILINE)


class FieldsAsArguments(Extension):
    """Gives modifiers the ``__init__`` that pydantic makes at run time, so that ``Args:`` has types and defaults."""

    def on_package(self, *, pkg: Package, **_: Any) -> None:
        for cls in _classes(pkg):
            if any(str(base).endswith("BaseModel") for parent in [cls, *cls.mro()] for base in parent.bases):
                cls.set_member("__init__", Function("__init__", parameters=Parameters(*_fields(cls))))


def _classes(scope: Any) -> list[Class]:
    members = [member for member in scope.members.values() if not member.is_alias]
    inner = [cls for member in members if member.is_module for cls in _classes(member)]
    return [*(member for member in members if member.is_class), *inner]


def _fields(cls: Class) -> list[Parameter]:
    """Public fields of the class and its bases as keyword arguments, those of the class itself first."""
    fields: dict[str, Parameter] = {}
    for parent in [cls, *cls.mro()]:
        for name, member in parent.members.items():
            if member.is_attribute and "instance-attribute" in member.labels and member.annotation and name[0] != "_":
                default = _default(member.value)
                field = Parameter(name, annotation=member.annotation, kind=ParameterKind.keyword_only, default=default)
                fields.setdefault(name, field)
    return list(fields.values())


def _default(value: Any) -> Any:
    """Of ``Field(default=1, ge=0)`` and ``Field(1, ge=0)`` the 1; of a plain value the value."""
    if not isinstance(value, ExprCall) or str(value.function) != "Field":
        return value
    keywords = {argument.name: argument.value for argument in value.arguments if isinstance(argument, ExprKeyword)}
    positional = [argument for argument in value.arguments if not isinstance(argument, ExprKeyword)]
    return keywords.get("default", keywords.get("default_factory", next(iter(positional), None)))
