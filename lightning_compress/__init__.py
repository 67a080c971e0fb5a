"""Compression for any model that a PyTorch Lightning Trainer trains.

    Trainer(callbacks=[CompressionCallback(GPTQModifier(scheme="W4A16"))])

Public names, imported when they are first used: ``import lightning_compress`` itself imports nothing. Every name of
``lightning_compress.modifiers`` is a name of this package, too.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_compress.callback import CompressionCallback as CompressionCallback
    from lightning_compress.core.events import EventType as EventType
    from lightning_compress.export.load import load as load
    from lightning_compress.export.save import save as save
    from lightning_compress.folder import compress_folder as compress_folder
    from lightning_compress.modifiers import *  # noqa: F403
    from lightning_compress.oneshot import compress as compress
    from lightning_compress.planning.plan import Plan as Plan
    from lightning_compress.quant.packed import dequantize as dequantize
    from lightning_compress.training.probe import QuantizationProbe as QuantizationProbe
    from lightning_compress.training.sharding import before_sharding as before_sharding

__version__ = "0.1.0"

_HOME = MappingProxyType(
    {
        "CompressionCallback": "callback",
        "EventType": "core.events",
        "Plan": "planning.plan",
        "QuantizationProbe": "training.probe",
        "before_sharding": "training.sharding",
        "compress": "oneshot",
        "compress_folder": "folder",
        "dequantize": "quant.packed",
        "load": "export.load",
        "save": "export.save",
    }
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    modifiers = import_module(f"{__name__}.modifiers")
    names = sorted([*_HOME, *modifiers.__all__])
    if name == "__all__":
        return names
    if name not in names:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(names)}")
    return getattr(modifiers, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
