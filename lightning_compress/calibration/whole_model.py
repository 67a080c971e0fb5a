"""The whole model on a calibration batch, after the walk, for modifiers that train (``Needs.after_walk``).

With gradients only the input of each block is stored; the rest is computed again in the backward pass (Chen et al.
2016, arXiv:1604.06174), so that memory holds the activations of one block.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.calibration.activations import device_of, token_mask, tree_move
from lightning_compress.calibration.walker import Walker
from lightning_compress.core.precision import model_precision
from lightning_compress.layers.forward import patched

__all__ = ["checkpointed", "run_whole"]


def run_whole(walker: Walker, blocks: Iterable[nn.Module], i: int) -> Any:
    """The model's own output for batch ``i`` of this rank, hooks paused, and the modifiers given its mask and number.

    The backward pass must run inside ``model_precision``, too, as blocks are computed again there.
    """
    number = walker.numbers[i]
    if walker.progress is not None:  # all blocks are finished, this is not
        names = ", ".join(m.name for m in walker.lifecycle.modifiers if m.needs.after_walk)
        walker.progress(f"{names}: batch {number + 1}", walker.total, walker.total + 1)
    mask = tree_move(token_mask(walker.batches[i]), walker.device or device_of(walker.model))
    walker.lifecycle.set_token_mask(mask, number)
    with walker.lifecycle.paused(), model_precision(), checkpointed(blocks if torch.is_grad_enabled() else ()):
        return walker.runner.own_output(walker.batches[i])


@contextmanager
def checkpointed(
    blocks: Iterable[nn.Module], present: Callable[[nn.Module], AbstractContextManager[None]] | None = None
) -> Iterator[None]:
    """Forward passes inside store only the inputs of these blocks for the backward pass.

    Args:
        blocks: The blocks.
        present: Inside, the tensors of a block are where it runs. A block that is computed again, without its hooks,
            stays there until the next one is: its backward pass reads weights that have no gradient from the module.
    """
    turn = ExitStack()

    def there(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        turn.close()
        if present is not None:
            turn.enter_context(present(block))
        return forward(*args, **kwargs)

    with ExitStack() as stack, turn:
        for block in blocks:
            forward = partial(checkpoint, partial(there, block, block.forward), use_reentrant=False)
            stack.enter_context(patched(block, forward=forward))
        yield
