"""Forward hooks of a modifier: they can be paused, and all of them can be removed at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, PrivateAttr
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.precision import plain_precision

__all__ = ["Hooks"]


class Hooks(BaseModel):
    """Forward hooks on modules of the model."""

    _paused: int = PrivateAttr(default=0)
    _token_mask: Tensor | None = PrivateAttr(default=None)
    _batch_number: int = PrivateAttr(default=0)
    _dense_pass: bool = PrivateAttr(default=False)
    _hooks: list[tuple[nn.Module, RemovableHandle]] = PrivateAttr(default_factory=list)

    def hook(
        self, module: nn.Module, function: Callable[..., Any], kind: str = "forward_pre", with_kwargs: bool = False
    ) -> RemovableHandle:
        """Call ``function`` at every forward of ``module`` until :meth:`remove_hooks`, except while paused.

        It runs with float32 as default dtype and without autocast, whatever the precision of the model (except in
        compiled code).

        Args:
            module: Module of the hook.
            function: ``(module, args)`` for ``forward_pre``, ``(module, args, output)`` for ``forward``; its result
                replaces the input or the output, as in torch.
            kind: ``forward_pre`` or ``forward``.
            with_kwargs: The function takes the call's keyword arguments too, after ``args``, as in torch.
        """
        register = getattr(module, f"register_{kind}_hook")
        handle: RemovableHandle = register(_UnlessPaused(self, function), with_kwargs=with_kwargs)
        self._hooks.append((module, handle))
        return handle

    @property
    def hooked(self) -> list[nn.Module]:
        """Modules that carry a hook of this modifier, each once, in the order of hooking."""
        return list(dict.fromkeys(module for module, _ in self._hooks))

    @property
    def token_mask(self) -> Tensor | None:
        """While a calibration batch runs: True for tokens that count (not padding), bool [batch, tokens], or None."""
        return self._token_mask

    @property
    def batch_number(self) -> int:
        """The number of the calibration batch that runs, counted over all ranks."""
        return self._batch_number

    @property
    def dense_pass(self) -> bool:
        """True while a block of the dense model runs, for ``needs.dense_inputs``: weights and inputs are dense ones."""
        return self._dense_pass

    @contextmanager
    def in_dense_pass(self) -> Iterator[None]:
        """Hooks find :attr:`dense_pass` True inside."""
        self._dense_pass = True
        try:
            yield
        finally:
            self._dense_pass = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hooks do nothing inside; can be nested."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def remove_hooks(self, *modules: nn.Module) -> None:
        """Remove the hooks of these modules; without an argument all of them."""
        for module, handle in self._hooks:
            if not modules or module in modules:
                handle.remove()
        self._hooks = [pair for pair in self._hooks if modules and pair[0] not in modules]


class _UnlessPaused:
    """A hook of a modifier. A pickled model does not hold the modifier; its hooks then do nothing."""

    def __init__(self, modifier: Hooks | None = None, function: Callable[..., Any] | None = None):
        self.modifier, self.function = modifier, function

    def __call__(self, *args: Any) -> Any:
        if self.modifier is None or self.modifier._paused or not self.function:
            return None
        if torch.compiler.is_compiling():  # dynamo cannot trace a change of the default dtype
            return self.function(*args)
        with plain_precision():
            return self.function(*args)

    def __copy__(self) -> "_UnlessPaused":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "_UnlessPaused":
        return self  # as functions do

    def __reduce__(self) -> tuple[Any, ...]:
        return _UnlessPaused, ()
