"""QLoRA: low-rank adapters train beside a quantized model, whose weights stay as they are.

    y  = x Q^T + s drop(x) A^T B^T      s = alpha / rank; while training
    W' = Q + s B A                      after it: merged, and quantized again by GPTQ

Hu et al. 2021, "LoRA", arXiv:2106.09685: A from a uniform distribution (Kaiming), B zero, so that training begins with
the outputs of the quantized model. Dettmers et al. 2023, "QLoRA", arXiv:2305.14314: the base is quantized first, and
the adapters also learn to make up for its errors.

The base is dense in memory, with values on its grid. Checkpoints have the keys of the dense model; A and B are in the
state of the callback.

Shapes: N tokens, R rows (out features), C columns (in features), K = rank.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core import Event, EventType, Modifier, Needs, State
from lightning_compress.layers.dense_keys import remove_hook
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import describe

__all__ = ["Adapter", "LoRAModifier"]

CHILD = "lora_adapter"
"""Name of the child of a Linear that holds its adapter, so that ``model.parameters()`` has it."""


class Adapter(nn.Module):
    """A [K, C] and B [R, K] beside a Linear; they are not part of a state dict.

    Args:
        layer: The Linear.
        rank: K.
        s: The factor of the product.
        dropout: Share of the inputs that are set to zero while training.
    """

    is_target: ClassVar[bool] = False  # no pattern selects it

    def __init__(self, layer: nn.Linear, rank: int, s: float, dropout: float):
        super().__init__()
        self.s, self.dropout = s, dropout
        self.A_KC = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.B_RK = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.A_KC, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """s drop(x) A^T B^T"""
        x = F.dropout(x, self.dropout, self.training)
        return self.s * F.linear(F.linear(x, self.A_KC), self.B_RK)

    def product(self) -> Tensor:
        """s B A, float32 [R, C]."""
        return self.s * (self.B_RK.float() @ self.A_KC.float())

    def _save_to_state_dict(self, *_: Any) -> None:
        """Nothing: the modifier keeps them."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Nothing, and nothing is missing."""


class LoRAModifier(GPTQModifier):
    """Train low-rank adapters beside frozen weights; after training merge them, and quantize with GPTQ.

    All parameters of the model are frozen, and the user's optimizer trains the adapters alone. Place it after a
    GPTQModifier with the same scheme and ``start=0``, which quantizes the weights first, or load a quantized model;
    otherwise the adapters train beside the dense weights (LoRA). The other arguments are those of
    :class:`~lightning_compress.modifiers.gptq.modifier.GPTQModifier`, for the end.

    Args:
        rank: Rank K of the adapters.
        alpha: The product of an adapter is multiplied by alpha / rank.
        dropout: Share of the inputs of an adapter that are set to zero while training.
        start: 0, the first batch.

    Raises:
        ValueError: A window other than the whole run, a scheme with quantized inputs, or targets that are not Linear.
    """

    technique: ClassVar[str] = "qlora"
    promotable: ClassVar[bool] = False

    start: float | None = 0.0
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    _adapted: dict[str, nn.Linear] = PrivateAttr(default_factory=dict)  # layers with adapters
    _frozen: list[nn.Parameter] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _window_is_the_run(self) -> "LoRAModifier":
        if self.start != 0 or self.end is not None or self.update is not None:
            raise ValueError(
                f"start={self.start}, end={self.end}, update={self.update}: adapters train in the whole run; leave "
                f"these out"
            )
        if inputs := [describe(scheme) for scheme in self.schemes if scheme.input_activations is not None]:
            raise ValueError(
                f"{inputs[0]} quantizes inputs, and adapters train beside quantized weights alone; give a scheme such "
                f"as 'W4A16', or take QATModifier"
            )
        return self

    @property
    def needs(self) -> Needs:
        return replace(
            super().needs,
            hand_over=False,
            checkpoint_state=True,
            fixed_shapes_from="set-up",
            sharded=False,
            window=True,
        )

    def takes_over(self, earlier: Modifier, modules: set[str], state: State) -> bool:
        """True for a quantizer that quantizes before the first batch, to the grids of the end."""
        if not isinstance(earlier, QuantizationArguments) or earlier.start != 0:
            return False
        before, now = earlier.assign(state.model), self.assign(state.model)
        for name in sorted(modules & before.keys() & now.keys()):
            if describe(before[name]) != describe(now[name]):
                raise ValueError(
                    f"{self.name} continues from {earlier.name}, which quantizes {name!r} as {describe(before[name])}, "
                    f"but has the scheme {describe(now[name])}; give both the same scheme"
                )
        return True

    # -- training -----------------------------------------------------------------------------------------------------

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Freeze the model and add the adapters, before there are optimizers."""
        model = state.model
        records = Quantized.find(model)
        for module, _ in records.values():
            Quantized.detach(module)
        try:
            layers = self.find_layers(model)
            _check_layers(layers, records)
        except BaseException:
            for module, record in records.values():
                record.attach(module)
            raise
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._adapted = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        for layer in self._adapted.values():
            layer.add_module(CHILD, Adapter(layer, self.rank, self.alpha / self.rank, self.dropout))
            layer.register_forward_hook(_add_adapter)
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.BATCH_START:  # the weights stay on the grid; the record comes again at the end
            for layer in self._adapted.values():
                Quantized.detach(layer)

    # -- the end ------------------------------------------------------------------------------------------------------

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._merge()
        super().on_calibration_start(state, event, **kwargs)

    def solve_seen(self, state: State, names: Iterable[str]) -> None:
        """Without training, as in ``compress``, the quantizer before it in the recipe has done the work."""
        names = list(names)
        for name in names:
            if name in self._layers and Quantized.of(self._layers[name]) is not None:
                self.finish(name)
        super().solve_seen(state, names)

    @torch.no_grad()
    def _merge(self) -> None:
        """W' = Q + s B A, in float32, on all ranks; the adapters are removed."""
        for layer in self._adapted.values():
            layer.weight.copy_(layer.weight.float() + _adapter_of(layer).product())
            del layer._modules[CHILD]
            remove_hook(layer._forward_hooks, _add_adapter)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._adapted, self._frozen = {}, []

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        adapters = {
            name: {key: parameter.detach().clone() for key, parameter in _adapter_of(layer).named_parameters()}
            for name, layer in self._adapted.items()
        }
        return {**super().state_dict(), "adapters": adapters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.on_weights_loaded(state)

    @torch.no_grad()
    def on_weights_loaded(self, state: dict[str, Any]) -> None:
        for name, tensors in state["adapters"].items():
            if name in self._adapted:
                for key, parameter in _adapter_of(self._adapted[name]).named_parameters():
                    parameter.copy_(tensors[key])


def _adapter_of(layer: nn.Module) -> Adapter:
    adapter = layer._modules[CHILD]
    assert isinstance(adapter, Adapter)
    return adapter


def _add_adapter(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    addition: Tensor = _adapter_of(layer)(args[0])
    return y + addition


def _check_layers(layers: dict[str, nn.Module], records: dict[str, tuple[nn.Module, Quantized]]) -> None:
    """ValueError names layers that cannot have adapters."""
    if odd := [f"{name!r} ({type(layer).__name__})" for name, layer in layers.items() if type(layer) is not nn.Linear]:
        raise ValueError(f"{', '.join(odd[:5])}: adapters are for nn.Linear; narrow targets, or add them to ignore")
    for name, (_, record) in records.items():
        if record.scheme.input_activations is not None:
            raise ValueError(
                f"{name!r} is quantized as {describe(record.scheme)}, and adapters train beside quantized weights "
                f"alone; start from a model with dense inputs, such as W4A16"
            )
        if name not in layers:
            raise ValueError(
                f"{name!r} is quantized already ({describe(record.scheme)}) and is not among the targets, so that it "
                f"would be exported dense; add it to targets"
            )
