"""Names to modifier classes: those of this package, those a user registers, those that other packages install."""

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

from lightning_compress.core.modifier import Modifier

__all__ = ["ModifierFactory"]

PACKAGE = "lightning_compress.modifiers"
ENTRY_POINTS = "lightning_compress.modifiers"


class ModifierFactory:
    """Builds modifiers by name.

    A name is looked up among the registered classes first, then among installed plug-ins (the entry-point group
    ``lightning_compress.modifiers``), then in this package. Only the module that defines the class is imported; when
    that fails, the error is raised with its cause.
    """

    _registered: ClassVar[dict[str, type[Modifier]]] = {}
    _plugins: ClassVar[dict[str, EntryPoint] | None] = None

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
        if cls._plugins is None:
            cls.refresh()
        registered = cls._registered if allow_registered else {}
        plugins = (cls._plugins or {}) if allow_experimental else {}
        if type_ in registered:
            return registered[type_]
        if type_ in plugins:
            return _checked(type_, _imported(f"the plug-in {type_!r} ({plugins[type_].value})", plugins[type_].load))
        package = importlib.import_module(PACKAGE)
        modules: Mapping[str, str] = package.modules()
        if type_ in modules:
            return _imported(f"{type_!r} is defined in {modules[type_]}, which", partial(getattr, package, type_))
        names = sorted({*registered, *plugins, *modules})
        near = get_close_matches(type_, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        raise ValueError(f"no modifier of type {type_!r} found; {hint}")

    @classmethod
    def register(cls, type_: str | type[Modifier], modifier_class: type[Modifier] | None = None) -> Any:
        """Register a class under a name, as a call or as a decorator (without a name: under its own).

        >>> @ModifierFactory.register("Mine")
        ... class MineModifier(Modifier):
        ...     def on_initialize(self, state, **kwargs):
        ...         return True

        Raises:
            ValueError: It is not a Modifier class.
        """
        if not isinstance(type_, str):
            return cls.register(getattr(type_, "__name__", repr(type_)), type_)
        if modifier_class is None:
            return partial(cls.register, type_)
        cls._registered[type_] = _checked(type_, modifier_class)
        return modifier_class

    @classmethod
    def refresh(cls) -> dict[str, type[Modifier]]:
        """Look for installed plug-ins again; keeps what users registered, and returns those."""
        cls._plugins = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        return dict(cls._registered)

    @classmethod
    def load_from_package(cls, package: str) -> dict[str, type[Modifier]]:
        """Concrete ``...Modifier`` classes of a package and its modules; a module that fails to import is a warning."""
        classes: dict[str, type[Modifier]] = {}
        path = importlib.import_module(package).__path__
        names = [m.name for m in pkgutil.walk_packages(path, f"{package}.", onerror=lambda name: None)]
        for name in [package, *names]:
            try:
                module = importlib.import_module(name)
            except Exception as error:
                warnings.warn(f"{name} failed to import, its modifiers are left out: {error}", stacklevel=2)
                continue
            for attribute, value in vars(module).items():
                concrete = isinstance(value, type) and issubclass(value, Modifier) and not value.__abstractmethods__
                if concrete and attribute.endswith("Modifier") and f"{value.__module__}.".startswith(f"{package}."):
                    classes.setdefault(attribute, value)
        return classes


def _checked(name: str, value: Any) -> type[Modifier]:
    if not (isinstance(value, type) and issubclass(value, Modifier)):
        raise ValueError(f"cannot register {name!r}: expected a subclass of Modifier, got {value!r}")
    return value


def _imported(source: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        raise ImportError(f"{source} failed to import: {error}") from error
