"""Keys and values of attention on a grid, where they enter the cache: after the rotary embedding, before the product.

compressed-tensors does the same when it loads a ``kv_cache_scheme``: the attention module gets a stand-in for its
cache, which quantizes the arguments of ``update``, also where there is no cache. Here the stand-in lives for one call,
and the module carries a record as quantized layers do: state dicts keep their keys.

Shapes: B batch, H heads of keys and values, T tokens, D numbers per head.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from torch import Tensor, nn

from lightning_compress.layers.matching import clean_name
from lightning_compress.layers.records import Record
from lightning_compress.quant.fake_quant import fake_quantize_input

__all__ = ["QuantizedCache", "attention_modules", "unread_caches", "with_stand_in"]

_KEYWORDS = ("cache", "past_key_values", "past_key_value")  # of transformers from 5.24, from 4.56, and before
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _quantize_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    record = QuantizedCache.of(module)
    if record is None:
        return None

    def change(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return (
            fake_quantize_input(module, key, record.args, record.k_scale, record.k_zero_point),
            fake_quantize_input(module, value, record.args, record.v_scale, record.v_zero_point),
        )

    return args, with_stand_in(module, kwargs, change)


@dataclass(frozen=True)
class QuantizedCache(Record):
    """How keys and values of one attention module are quantized."""

    attribute = "_lightning_compress_cache"
    hooks = (_quantize_cache,)

    args: QuantizationArgs
    k_scale: Tensor | None = None  # [1], or [H, 1, 1] per head; None where scales are dynamic
    v_scale: Tensor | None = None  # as k_scale
    k_zero_point: Tensor | None = None  # as k_scale, int8; None on a symmetric grid too
    v_zero_point: Tensor | None = None  # as k_zero_point

    def register(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(_quantize_cache, with_kwargs=True)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        return super().from_json(data | {"args": QuantizationArgs.model_validate(data["args"])})

    @staticmethod
    def tensor_names(args: QuantizationArgs) -> tuple[str, ...]:
        """Names of the tensors beside the grid, here and in checkpoints."""
        if args.dynamic:
            return ()
        scales, zeros = ("k_scale", "v_scale"), ("k_zero_point", "v_zero_point")
        return scales if args.symmetric else scales + zeros


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules that hand keys and values to a cache, by dotted name.

    The rule is that of compressed-tensors, plus the keyword of transformers 5.24: a class called attention, with k_proj
    or v_proj, or one projection of both, whose ``forward`` takes a cache.
    """
    modules = ((clean_name(name), module) for name, module in model.named_modules())
    return {name: module for name, module in modules if is_cached_attention_module(module) or _takes_cache(module)}


def unread_caches(model: nn.Module) -> list[str]:
    """Attention modules with a record whose cache the installed compressed-tensors would not quantize."""
    caches = QuantizedCache.find(model).items()
    return [clean_name(name) for name, (module, _) in caches if not is_cached_attention_module(module)]


def _takes_cache(module: nn.Module) -> bool:
    projections = any(hasattr(module, name) for name in ("k_proj", "v_proj", "qkv_proj", "kv_b_proj"))
    return "attention" in type(module).__name__.lower() and projections and _keyword(module) is not None


def _keyword(module: nn.Module) -> str | None:
    """The keyword argument of ``forward`` for the cache; None where there is none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in _KEYWORDS if name in parameters), None)


def with_stand_in(module: nn.Module, kwargs: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """The keyword arguments of a call, with keys and values changed by ``change`` where they enter the cache.

    ``change`` is a function of (keys, values), [B, H, T, D] each, that returns the ones to be used.
    """
    name = _keyword(module) or _KEYWORDS[-1]
    cache = next((kwargs[keyword] for keyword in _KEYWORDS if kwargs.get(keyword) is not None), None)
    others = {key: value for key, value in kwargs.items() if key not in _KEYWORDS}
    return {**others, name: _StandIn(cache, change)}


class _StandIn:
    """A cache, or None, whose ``update`` changes keys and values first; other attributes are those of the cache."""

    def __init__(self, cache: Any, change: Change):
        self._cache, self._change = cache, change

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = self._change(key, value)
        return (key, value) if self._cache is None else self._cache.update(key, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
