"""Small models, data with outlier columns, and a calibration driven by hand, event by event."""

from collections.abc import Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from lightning_compress.core import Event, EventType, Ledger, Lifecycle, Modifier, State
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.quant.schemes import from_groups


class Attention(nn.Module):
    """q, k and v receive one tensor object; o receives another one; spare is never called."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(width, width),
            nn.Linear(width, 32),
            nn.Linear(width, 32),
            nn.Linear(32, width),
        )
        self.spare = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.softmax(self.q(x)[..., :32] * self.k(x), -1) * self.v(x)
        return self.o(mixed)


def attention(seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    return Attention().eval()


def int4(**weights: Any) -> QuantizationArgs:
    """A grid of 4-bit integers, with other arguments of compressed-tensors."""
    args = from_groups({"g": {"targets": ["Linear"], "weights": {"num_bits": 4, **weights}}})[0].weights
    assert args is not None
    return args


def correlated(tokens: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs [tokens, columns] of low rank with noise; every 13th column eight times as large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 4, columns, generator=torch.Generator().manual_seed(99))
    x = torch.randn(tokens, columns // 4, generator=generator) @ mix / columns**0.5
    x += 0.3 * torch.randn(tokens, columns, generator=generator)
    x[:, ::13] *= 8
    return x.to(dtype)


def batches(count: int = 4, width: int = 64, tokens: int = 48, seed: int = 0) -> list[Tensor]:
    return [correlated(2 * tokens, width, seed + i).view(2, tokens, width) for i in range(count)]


def calibrate(
    model: nn.Module,
    modifiers: Modifier | Sequence[Modifier],
    data: Sequence[Tensor],
    masks: Sequence[Tensor | None] = (),
) -> Ledger:
    """One whole-model walk: all batches, one BLOCK_END for all modules."""
    lifecycle = Lifecycle([modifiers] if isinstance(modifiers, Modifier) else modifiers)
    state = State(model=model)
    lifecycle.initialize(state)
    lifecycle.emit(state, Event(EventType.TRAINING_END))
    lifecycle.emit(state, Event(EventType.CALIBRATION_START))
    with torch.no_grad():
        for i, batch in enumerate(data):
            lifecycle.set_token_mask(masks[i] if masks else None, i)
            model(batch)
    lifecycle.set_token_mask(None)
    modules = {name: module for name, module in model.named_modules() if name}
    lifecycle.emit(state.but(block=model, modules=modules), Event(EventType.BLOCK_END))
    lifecycle.emit(state, Event(EventType.CALIBRATION_END))
    lifecycle.finalize(state)
    return state.ledger


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("weight")}


def made(**arguments) -> GPTQModifier:
    return GPTQModifier(**{"scheme": "W4A16", "group_size": 16, "ignore": ["spare"], **arguments})


def inputs_of(model: nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    """What each Linear receives from the dense model, as rows."""
    rows: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: rows.setdefault(name, []).append(args[0].flatten(0, 1))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for x in data:
            model(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}
