"""Names to modifier classes: those of this package, those a user registers, those that other packages install."""

import importlib
import pkgutil
import re
from difflib import get_close_matches
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from lightning_compress.core.modifier import Modifier

__all__ = ["ModifierFactory"]

PACKAGE = "lightning_compress.modifiers"
ENTRY_POINTS = "lightning_compress.modifiers"


class ModifierFactory:
    """Builds modifiers by name.

    A name is looked up among the registered classes first, then among installed plug-ins (the entry-point group
    ``lightning_compress.modifiers``), then in this package. An import error of a module is kept and raised, with its
    cause, when a name that it defines is asked for.
    """

    _registered: ClassVar[dict[str, type[Modifier]]] = {}
    _plugins: ClassVar[dict[str, EntryPoint]] = {}
    _main: ClassVar[dict[str, type[Modifier]]] = {}
    _errors: ClassVar[dict[str, Exception]] = {}
    _loaded: ClassVar[bool] = False

    @classmethod
    def create(
        cls, type_: str, allow_registered: bool = True, allow_experimental: bool = True, **kwargs: Any
    ) -> Modifier:
        """Build the modifier called ``type_``.

        Args:
            type_: Class name, such as ``GPTQModifier``, or the name it was registered under.
            allow_registered: Look among registered classes too.
            allow_experimental: Look among plug-ins of other packages too.
            **kwargs: Arguments of the modifier.

        Raises:
            ValueError: No modifier has that name (near misses are listed), or its arguments are wrong.
            ImportError: The module that should define it could not be imported.
        """
        return cls.find(type_, allow_registered, allow_experimental)(**kwargs)

    @classmethod
    def find(cls, type_: str, allow_registered: bool = True, allow_experimental: bool = True) -> type[Modifier]:
        """The class called ``type_``; raises as :meth:`create`."""
        if not cls._loaded:
            cls.refresh()
        registered, plugins = cls._registered if allow_registered else {}, cls._plugins if allow_experimental else {}
        if type_ in registered:
            return registered[type_]
        if type_ in plugins:
            try:
                return _checked(type_, plugins[type_].load())
            except (ImportError, AttributeError) as error:
                source = plugins[type_].value
                raise ImportError(f"the plug-in {type_!r} ({source}) failed to import: {error}") from error
        if type_ in cls._main:
            return cls._main[type_]
        for module, fault in cls._errors.items():
            if _defines(module, type_):
                raise ImportError(f"{type_!r} is defined in {module}, which failed to import: {fault}") from fault
        names = sorted({*registered, *plugins, *cls._main})
        near = get_close_matches(type_, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        broken = "".join(f"; {module} failed to import: {error}" for module, error in cls._errors.items())
        raise ValueError(f"no modifier of type {type_!r} found; {hint}{broken}")

    @classmethod
    def register(cls, type_: str | type[Modifier], modifier_class: type[Modifier] | None = None) -> Any:
        """Register a class under a name, as a call or as a decorator (without a name: under its own).

        >>> @ModifierFactory.register("Mine")
        ... class MineModifier(Modifier):
        ...     def on_initialize(self, state, **kwargs):
        ...         return True

        Raises:
            ValueError: It is no Modifier class.
        """
        if not isinstance(type_, str):
            return cls.register(getattr(type_, "__name__", repr(type_)), type_)
        if modifier_class is None:
            return partial(cls.register, type_)
        cls._registered[type_] = _checked(type_, modifier_class)
        return modifier_class

    @classmethod
    def refresh(cls) -> dict[str, type[Modifier]]:
        """Scan the package and the plug-ins again; keeps what users registered, and returns those."""
        cls._errors = {}
        cls._main = cls.load_from_package(PACKAGE)
        cls._plugins = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        cls._loaded = True
        return dict(cls._registered)

    @classmethod
    def load_from_package(cls, package: str) -> dict[str, type[Modifier]]:
        """Concrete ``...Modifier`` classes of a package and its modules; failed imports are kept for :meth:`find`."""
        found: dict[str, type[Modifier]] = {}
        path = importlib.import_module(package).__path__
        names = [m.name for m in pkgutil.walk_packages(path, f"{package}.", onerror=lambda name: None)]
        for name in [package, *names]:
            try:
                module = importlib.import_module(name)
            except Exception as error:
                cls._errors[name] = error
                continue
            classes = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, Modifier)}
            for attribute, value in classes.items():
                own = f"{value.__module__}.".startswith(f"{package}.")
                if own and attribute.endswith("Modifier") and not value.__abstractmethods__:
                    found.setdefault(attribute, value)
        return found


def _checked(name: str, value: Any) -> type[Modifier]:
    if not (isinstance(value, type) and issubclass(value, Modifier)):
        raise ValueError(f"cannot register {name!r}: expected a subclass of Modifier, got {value!r}")
    return value


def _defines(module: str, type_: str) -> bool:
    """Whether the source of a module that cannot be imported holds ``class type_``."""
    spec = find_spec(module)
    source = Path(spec.origin).read_text(errors="ignore") if spec and spec.origin else ""
    return re.search(rf"^class {re.escape(type_)}\b", source, re.MULTILINE) is not None
