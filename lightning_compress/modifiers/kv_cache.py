"""Quantize the KV cache: keys and values of attention to FP8, INT8 or INT4.

    K <- Q(K; s_k, z_k),  V <- Q(V; s_v, z_v)        keys after the rotary embedding, as they enter the cache

The cache dominates memory and bandwidth of long contexts. There is one scale per tensor (for which vLLM has a kernel),
one for each head, or one for each token and head, computed at run time (KIVI, Liu et al., 2024, arXiv:2402.02750, shows
why keys need finer scales than one per tensor: a few channels are large). Asymmetric grids of integers have zero points
(z), for keys and values that are not centred at zero.

Shapes: B batch, H heads of keys and values, T tokens, D numbers per head, N tokens that count.
"""

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.utils import get_head_dim
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.quant.kv_cache import QuantizedCache, attention_modules, with_stand_in
from lightning_compress.quant.observers import Observer, ObserverName, make_observer

__all__ = ["KVCacheModifier"]

FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": 8, "type": "float"},
    "int8": {"num_bits": 8, "type": "int"},
    "int4": {"num_bits": 4, "type": "int"},
}
STRATEGIES = {"tensor": "tensor", "head": "attn_head"}


class KVCacheModifier(Modifier):
    """Quantize keys and values where they enter the cache, in all attention modules of a model of transformers.

    It is not a LayerwiseModifier: it observes keys and values inside of attention, not inputs of a layer, and changes
    no weight.

    Args:
        format: ``fp8`` (E4M3), ``int8`` or ``int4``.
        strategy: ``tensor`` and ``head``: calibrated scales, one for all or one for each head of keys and values.
            ``token``: one for each token and head, computed at run time without calibration.
        symmetric: False: integers with zero points; not for ``fp8``.
        observer: How calibrated scales are found.
        averaging_constant: Weight of the newest batch in ``moving_average``.

    Raises:
        ValueError: A model without attention, a cache that no loader quantizes or that is quantized already, FP8 with
            zero points.
    """

    format: Literal["fp8", "int8", "int4"] = "fp8"
    strategy: Literal["tensor", "head", "token"] = "tensor"
    symmetric: bool = True
    observer: ObserverName = "minmax"
    averaging_constant: float = Field(default=0.01, gt=0, le=1)

    _modules: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _observers: dict[str, dict[str, list[Observer]]] = PrivateAttr(default_factory=dict)  # of "k" and "v", by head
    _args: QuantizationArgs = PrivateAttr(default_factory=QuantizationArgs)

    @model_validator(mode="after")
    def _grid_is_possible(self) -> "KVCacheModifier":
        if self.format == "fp8" and not self.symmetric:
            raise ValueError(
                "format='fp8' with symmetric=False: floating-point codes have no zero point in any loader; take "
                "format='int8', or symmetric=True"
            )
        return self

    @property
    def needs(self) -> Needs:
        data = self.strategy != "token"
        return Needs(calibration=True, data=data, team="sums" if data else "weights")

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._find(state.model)
        return True

    def _find(self, model: nn.Module) -> dict[str, nn.Module]:
        """The attention modules, by name."""
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder, whose attention gets a cache of two parts, of its own "
                f"tokens and of the encoder's; compressed-tensors 0.20 replaces it by a cache of one part, so that a "
                f"loaded folder fails at its first call. Leave the KV cache out of the recipe and quantize the "
                f"weights; models with a decoder alone work"
            )
        modules = attention_modules(model) if hasattr(model, "config") else {}
        if not modules:
            raise ValueError(
                f"this {type(model).__name__} has no attention module whose keys and values can be quantized: expected "
                f"a model of transformers, with a cache (past_key_values, or cache) and k_proj and v_proj in a module "
                f"whose class is called attention; leave the KV cache out of the recipe"
            )
        if names := [name for name, module in modules.items() if QuantizedCache.of(module) is not None]:
            raise ValueError(f"the KV cache of {names[0]!r} is quantized already; start from the dense model")
        return modules

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._modules = self._find(state.model)
        self._args = self._grid(state.model)
        if not self.needs.data:
            return
        for name, module in self._modules.items():
            self._observers[name] = {"k": [], "v": []}
            self.hook(module, partial(self._watch, name), with_kwargs=True)
            for child in module.children():  # a pass ends where the last hooked module begins: the output projection
                self.hook(child, _no_change)

    def _grid(self, model: Any) -> QuantizationArgs:
        form = {**FORMATS[self.format], "symmetric": self.symmetric}
        if self.strategy == "token":  # the loader reads "token" as one scale for all tokens of a head
            size = get_head_dim(model.config.get_text_config(decoder=True))
            return QuantizationArgs(**form, strategy="group", group_size=size, dynamic=True)
        return QuantizationArgs(**form, strategy=STRATEGIES[self.strategy])

    def _watch(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        def observe(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            for kind, x in (("k", key), ("v", value)):
                try:
                    self._update(self._observers[name][kind], x)
                except ValueError as error:
                    raise ValueError(f"{kind} of {name!r}: {error}") from error
            return key, value

        return args, with_stand_in(module, kwargs, observe)

    def _update(self, observers: list[Observer], x_BHTD: Tensor) -> None:
        x, mask = x_BHTD.transpose(1, 2), self.token_mask
        x_NHD = x[mask.to(x.device)] if mask is not None and mask.shape == x.shape[:2] else x.flatten(0, 1)
        heads = x_NHD.unbind(1) if self.strategy == "head" else [x_NHD]
        self._fill(observers, len(heads))
        for observer, head in zip(observers, heads, strict=True):
            observer.update(head, self.batch_number)

    def _fill(self, observers: list[Observer], heads: int) -> None:
        if not observers:
            observers += [make_observer(self.observer, self._args, self.averaging_constant) for _ in range(heads)]

    def _reduce(self, state: State, names: Iterable[str]) -> None:
        """Combine the observers of all ranks; on some of them a module may have seen no data."""
        heads = {name: len(self._observers[name]["k"]) for name in names if name in self._observers}
        if not heads:
            return
        ranks = state.team.gather(heads, "observers of keys and values")
        for name in heads:
            for observers in self._observers[name].values():
                self._fill(observers, max(each[name] for each in ranks))
                for observer in observers:
                    observer.read()
                    state.team.reduce_(observer)

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._quantize(state, state.modules)

    def group_state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {"finished": [name for name in modules if name not in self._modules]}

    def load_group_state(self, modules: Mapping[str, nn.Module], state: dict[str, Any]) -> None:
        for name in self._modules.keys() & set(state["finished"]):
            module = self._modules.pop(name)
            self.remove_hooks(module, *module.children())

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._quantize(state, list(self._modules))
        if self._modules:
            warnings.warn(
                f"{self.name}: {', '.join(self._modules)} never saw data, so that their scales are unknown and their "
                f"keys and values stay as they are; such a model cannot be exported",
                stacklevel=2,
            )
        for name in self._modules:
            state.ledger.add(name, "kv_cache", flag="never saw data; left as it was")
        self._modules, self._observers = {}, {}
        self.remove_hooks()

    def _quantize(self, state: State, names: Iterable[str]) -> None:
        names = [name for name in names if name in self._modules]
        self._reduce(state, names)
        for name in names:
            observers = self._observers.get(name)
            if observers is None:
                record = QuantizedCache(self._args)
            elif observers["k"]:
                weight = next(self._modules[name].parameters())
                (k, k_zero), (v, v_zero) = (self._scale(observers[kind], weight.dtype) for kind in "kv")
                record = QuantizedCache(self._args, k, v, k_zero, v_zero).to(weight.device)
            else:
                continue
            module = self._modules.pop(name)
            self.remove_hooks(module, *module.children())
            record.attach(module)
            grid = f"{self.format.upper()} {self.strategy}"
            state.ledger.add(name, "kv_cache", scheme=f"KV {grid}" if self.symmetric else f"KV {grid} asymmetric")

    def _scale(self, observers: list[Observer], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None: symmetric), [1] or [H, 1, 1]."""
        scales, zeros = zip(*(observer.value(dtype) for observer in observers), strict=True)
        shape = (-1, 1, 1) if self.strategy == "head" else (-1,)
        return torch.cat(scales).view(shape), None if self.symmetric else torch.cat(zeros).view(shape)


def _no_change(module: nn.Module, args: Any) -> None:
    """A hook that only marks a module as one that must be reached."""
