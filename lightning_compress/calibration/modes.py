"""The modes of a model while it calibrates: eval, no gradients, eager, no KV cache; all are put back afterwards."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_compress.layers.forward import eval_mode

__all__ = ["calibration_mode", "forked_random_state"]


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """The model as calibration needs it inside, and as it was, module by module, afterwards.

    Eval mode, ``no_grad`` (and no inference mode, whose tensors break later training), eager execution, no KV cache, no
    fused attention path that would bypass hooks, no cached low-precision weights.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_no_autocast_cache())
        stack.enter_context(forked_random_state())
        stack.enter_context(eval_mode(model))
        stack.enter_context(_no_cache(model))
        stack.enter_context(_no_fused_attention())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it costs a second
            # a compiled module ignores hooks that were added after its compilation
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def forked_random_state() -> AbstractContextManager[None]:
    """Torch's random state, CPU and CUDA, is afterwards what it was before."""
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Turn ``config.use_cache`` off on every submodule that has one (Hugging Face)."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "use_cache", None):
            configs.setdefault(id(config), config)
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    """``nn.TransformerEncoderLayer`` in eval mode may run as one fused op, which skips the hooks of its Linears."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast caches low-precision copies of weights, and would use them after a weight has changed."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
