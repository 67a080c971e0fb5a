"""Change an object for a while: methods of this one instance, the eval mode of a model, what of it has gradients."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["eval_mode", "gradients_for", "patched"]


@contextmanager
def patched(thing: object, **attributes: Any) -> Iterator[None]:
    """Inside, methods of this instance alone are other functions.

    Afterwards it has what it had itself (accelerate puts a ``forward`` there, too), and else that of its class. The
    ``patch_attr`` of compressed-tensors leaves the bound method on the instance, so that a copy of the model would call
    the first one's; importing it costs 2 s.
    """
    before = {name: vars(thing)[name] for name in attributes if name in vars(thing)}
    vars(thing).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(thing).pop(name, None)
        vars(thing).update(before)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards each of its modules is in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def gradients_for(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, of the model's parameters these alone have gradients; afterwards those that had them before."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
