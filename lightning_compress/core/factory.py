"""Names to modifier classes: those of this package, those a user registers, those that other packages install."""

import importlib
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from lightning_compress.core.modifier import Modifier

__all__ = ["ModifierFactory"]

PACKAGE = "lightning_compress.modifiers"
ENTRY_POINTS = "lightning_compress.modifiers"


class ModifierFactory:
    """Builds modifiers by name.

    A name is looked up among the registered classes first, then among installed plug-ins (the entry-point group
    ``lightning_compress.modifiers``), then in this package. An import error of a module is kept and raised, with its
    cause, when one of its names is asked for.
    """

    _registered: dict[str, type[Modifier]] = {}
    _main: dict[str, type[Modifier]] = {}
    _plugins: dict[str, Any] = {}
    _errors: dict[str, Exception] = {}
    _loaded = False

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
            cls._load()
        if allow_registered and type_ in cls._registered:
            return cls._registered[type_]
        if allow_experimental and type_ in cls._plugins:
            return cls._check(type_, cls._plugins[type_].load())
        if type_ in cls._main:
            return cls._main[type_]
        names = sorted({*cls._main, *(cls._registered if allow_registered else ()), *cls._plugins})
        near = get_close_matches(type_, names, n=3)
        for module, error in cls._errors.items():
            if _plain(module.rsplit(".", 1)[-1]) in _plain(type_):
                raise ImportError(f"{type_!r} should come from {module}, which failed to import: {error}") from error
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        broken = "".join(f"; {module} failed to import: {error}" for module, error in cls._errors.items())
        raise ValueError(f"no modifier of type {type_!r} found; {hint}{broken}")

    @classmethod
    def register(cls, type_: str, modifier_class: type[Modifier] | None = None) -> Any:
        """Register a class under a name, as a call or as a decorator.

        >>> @ModifierFactory.register("Mine")
        ... class MineModifier(Modifier):
        ...     def on_initialize(self, state, **kwargs):
        ...         return True

        Raises:
            ValueError: It is no Modifier class.
        """
        if modifier_class is None:
            decorator: Callable[[type[Modifier]], type[Modifier]] = lambda c: cls.register(type_, c)  # noqa: E731
            return decorator
        cls._registered[type_] = cls._check(type_, modifier_class)
        return modifier_class

    @classmethod
    def refresh(cls) -> dict[str, type[Modifier]]:
        """Scan the package and the plug-ins again; keeps what users registered, and returns those."""
        cls._main, cls._plugins, cls._errors, cls._loaded = {}, {}, {}, False
        cls._load()
        return dict(cls._registered)

    @classmethod
    def load_from_package(cls, package: str) -> dict[str, type[Modifier]]:
        """Every concrete ``...Modifier`` class of a package and its modules; failed imports are kept for :meth:`find`."""
        found: dict[str, type[Modifier]] = {}
        root = importlib.import_module(package)
        names = [m.name for m in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda name: None)]
        for name in [package, *names]:
            try:
                module = importlib.import_module(name)
            except Exception as error:
                cls._errors[name] = error
                continue
            for attribute, value in vars(module).items():
                if isinstance(value, type) and issubclass(value, Modifier) and attribute.endswith("Modifier"):
                    if not value.__abstractmethods__ and value.__module__.startswith(package):
                        found.setdefault(attribute, value)
        return found

    @classmethod
    def _load(cls) -> None:
        cls._main = cls.load_from_package(PACKAGE)
        cls._plugins = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        cls._loaded = True

    @staticmethod
    def _check(name: str, value: Any) -> type[Modifier]:
        if not (isinstance(value, type) and issubclass(value, Modifier)):
            raise ValueError(f"cannot register {name!r}: expected a subclass of Modifier, got {value!r}")
        return value


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
