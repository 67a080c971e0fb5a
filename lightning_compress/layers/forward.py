"""Change an object for a while: methods of this one instance, the eval mode of a model, what of it has gradients."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

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
def gradients_for(model: nn.Module, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, of the model's parameters these alone have gradients, and so have other tensors; afterwards as before."""
    tensors = list(tensors)
    flags = {tensor: tensor.requires_grad for tensor in (*model.parameters(), *tensors)}
    try:
        for tensor in flags:
            tensor.requires_grad_(False)
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor, flag in flags.items():
            tensor.requires_grad_(flag)
