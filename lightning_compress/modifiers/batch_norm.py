"""Batch normalization, folded into the layers before it, for quantizers of the recipe.

Jacob et al. 2017, arXiv:1712.05877, section 3.2. The equations and the search for pairs are in quant/batch_norm.py.
"""

from typing import Any, ClassVar, Literal

from pydantic import PrivateAttr, model_validator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.needs import Needs
from lightning_compress.core.state import State
from lightning_compress.quant.batch_norm import fold_all

__all__ = ["FoldBatchNormModifier"]


class FoldBatchNormModifier(Modifier):
    """Fold every BatchNorm into the Linear or convolution before it.

    Args:
        remove: Remove the norms from the model, which changes the names of its tensors: the result loads into a model
            folded in the same way. By default they stay and add the shift that remains of them; names and shapes do
            not change, and training goes on with them in evaluation mode.
        when: ``set_up``: before training, for a model that is trained already; it must come before quantizers in the
            recipe. ``training_end``: after training, for quantizers that act then. ``end``: last, into weights and
            scales of layers that are quantized, for a ``QATModifier`` before it in the recipe: norms are trained as
            usual until then.
        required: Whether it is an error if the model has no norm that can be folded.

    Raises:
        ValueError: No norm can be folded, a layer is quantized already with scales that rows share, or ``when`` does
            not fit the other modifiers.
    """

    needs: ClassVar[Needs] = Needs(one_pass=True, team="weights")

    remove: bool = False
    when: Literal["set_up", "training_end", "end"] = "set_up"
    required: bool = True

    _norms: list[nn.Module] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _names_stay_after_training(self) -> "FoldBatchNormModifier":
        if self.remove and self.when != "set_up":
            raise ValueError(
                f"remove=True changes the names of tensors, which must not change after training, and "
                f"when={self.when!r} folds then; leave remove out, or give when='set_up'"
            )
        return self

    @property
    def handles_training_end(self) -> bool:
        return self.when == "training_end"

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        if not other.needs.parametrizes or self.when == "set_up":
            return None
        if self.when == "training_end":
            return f"{other.name} still computes the weights then; give when='end', after it in the recipe"
        return None if earlier else f"when='end' folds into what {other.name} leaves; place it after that in the recipe"

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        if self.when == "set_up":
            self._fold(state)
        elif self.required and not any(isinstance(module, _BatchNorm) for module in state.model.modules()):
            fold_all(state.model)  # raises
        return True

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self.when == "training_end":
            self._fold(state)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        if self.when == "end":
            self._fold(state)
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.BATCH_START:
            for norm in self._norms:
                norm.eval()  # each batch: the Trainer calls model.train()

    def _fold(self, state: State) -> None:
        for folding in fold_all(state.model, self.remove, self.required):
            state.ledger.add(folding.layer, "fold_batchnorm")
            self._norms.append(state.model.get_submodule(folding.norm))
