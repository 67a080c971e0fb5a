"""Batch normalization, folded into the layers before it, for quantizers later in the recipe.

Jacob et al. 2017, arXiv:1712.05877, section 3.2. The equations and the search for pairs are in quant/batch_norm.py.
"""

from typing import Any

from pydantic import PrivateAttr
from torch import nn

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.state import State
from lightning_compress.quant.batch_norm import fold_all

__all__ = ["FoldBatchNormModifier"]


class FoldBatchNormModifier(Modifier):
    """Fold every BatchNorm into the Linear or convolution before it. It must come before quantizers in the recipe.

    Args:
        remove: Remove the norms from the model, which changes the names of its tensors: the result loads into a model
            folded in the same way. By default they stay and add the shift that remains of them; names and shapes do
            not change, and training goes on with them in evaluation mode.

    Raises:
        ValueError: No norm can be folded, or a layer is quantized already.
    """

    remove: bool = False

    _norms: list[nn.Module] = PrivateAttr(default_factory=list)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        for folding in fold_all(state.model, self.remove):
            state.ledger.add(folding.layer, "fold_batchnorm")
            self._norms.append(state.model.get_submodule(folding.norm))
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.BATCH_START:
            for norm in self._norms:
                norm.eval()  # each batch: the Trainer calls model.train()
