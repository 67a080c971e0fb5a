"""Turn the basis of a space, or of the heads of attentions, inside the weights; all of it, or nothing.

    vectors are rows, x -> x R                                     QuaRot, Ashkboos et al. 2024, arXiv:2404.00456
    source, writer   W' = W R along the dimension that writes       (and its bias b' = b R)
    reader           W' = W diag(g) R along the one that reads
    norm             g' = 1, b' = (b / g) R                        RMSNorm commutes with every R, LayerNorm with those
                                                                   that keep the vector of ones
    head             rows of the value projection, head by head, and columns of the output projection, by the same R

Everything is computed in float64 and rounded once.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.modifiers.rotation.follow import output_leaves
from lightning_compress.modifiers.rotation.spaces import Head, Norm, Slot, Touch

__all__ = ["Fusion", "Turn", "fuse", "outputs_of", "turns_of_heads"]

FULL_PRECISION, HALF_PRECISION = 1e-5, 5e-2


@dataclass(frozen=True, eq=False)
class Turn:
    """The rotation of one dimension of a parameter.

    Args:
        touch: The dimension, with the norm whose gain is folded in.
        matrix: R [h, h] float64; h divides the dimension, and acts on each h neighbours.
    """

    touch: Touch
    matrix: Tensor


@dataclass
class Fusion:
    """The effects of a rotation on a model: names of parameters, and the largest change of an output."""

    changed: list[str] = field(default_factory=list)  # that were turned
    untied: list[str] = field(default_factory=list)  # that had shared their tensor with another one and no longer do
    difference: float = 0.0  # as a share of the largest output


def turns_of_heads(heads: Iterable[Head], rotation_of: Callable[[Head], Tensor]) -> list[Turn]:
    """Turn the values of each head; a head that runs several times is turned once.

    Raises:
        ValueError: A projection belongs to two attentions in different ways.
    """
    partner: dict[Touch, Touch] = {}
    turns = []
    for head in dict.fromkeys(heads):
        ends = {*head.value, head.output}
        if any(partner.get(end, head.output) != head.output for end in ends):
            raise ValueError(f"R2: {head.output.slot.name!r} and another weight read the same values; leave R2 out")
        partner |= dict.fromkeys(ends, head.output)
        R = rotation_of(head)
        turns += [Turn(touch, R) for touch in (*head.value, head.output)]
    return turns


@torch.no_grad()
def fuse(
    model: nn.Module,
    turns: Sequence[Turn],
    norms: Sequence[tuple[Norm, Tensor]],
    run: Callable[[], Any],
    tolerance: float | None,
    online: Callable[[], Callable[[], None]] | None = None,
) -> Fusion:
    """Write the turned weights, and check that the outputs are as before.

    Needs memory for a copy of every weight that changes, until the check is over.

    Args:
        model: Model that is changed in place.
        turns: Rotations of its parameters.
        norms: Normalizations whose gains the turns fold in, with the R of their space.
        run: Runs the model on a few samples.
        tolerance: Largest change of an output, as a share of the largest output; None: 1e-5, and 5e-2 of all outputs
            together where weights have 16 bits.
        online: Attaches rotations that run at every call, and returns a function that detaches them.

    Raises:
        ValueError: The outputs changed, a gain is zero, or two turns contradict each other; the model is restored.
    """
    before = outputs_of(run())
    fusion = Fusion()
    with ExitStack() as undo:
        _untie(model, turns, fusion, undo)
        for parameter, its_turns in _by_parameter(model, turns).items():
            _change(parameter, _turned(parameter, its_turns, model), undo)
        for norm, R in {norm.module: (norm, R) for norm, R in norms}.values():
            _reset(model, norm, R, undo)
        if online is not None:
            undo.callback(online())
        fusion.changed = list(dict.fromkeys(turn.touch.slot.name for turn in turns))
        fusion.difference = _check(before, outputs_of(run()), turns, model, tolerance)
        undo.pop_all()
    return fusion


def outputs_of(output: Any) -> list[Tensor]:
    """The logits of an output that has them, else all its floating-point tensors; float64 copies."""
    leaves = output_leaves(output)
    tensors = [leaf.detach().double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise ValueError("the model returns no floating-point tensor, so that a rotation cannot be checked")
    return tensors


# -- weights ----------------------------------------------------------------------------------------------------------


def _untie(model: nn.Module, turns: Sequence[Turn], fusion: Fusion, undo: ExitStack) -> None:
    """Give a slot its own tensor where its turns differ from those of another slot of the same tensor."""
    effects: dict[Slot, set[tuple[Any, ...]]] = {}
    for turn in turns:
        effects.setdefault(turn.touch.slot, set()).add(_effect(turn, model))
    first: dict[int, Slot] = {}
    for slot in effects:
        parameter = slot.of(model)
        owner = first.setdefault(id(parameter), slot)
        if effects[slot] != effects[owner]:
            module = model.get_submodule(slot.module)
            setattr(module, slot.attribute, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            undo.callback(setattr, module, slot.attribute, parameter)
            fusion.untied.append(slot.name)
    if fusion.untied:
        configs = [getattr(module, "config", None) for module in model.modules()]
        tied = {id(c): c for c in configs if c is not None and getattr(c, "tie_word_embeddings", False) is True}
        for config in tied.values():
            config.tie_word_embeddings = False
            undo.callback(setattr, config, "tie_word_embeddings", True)


def _effect(turn: Turn, model: nn.Module) -> tuple[Any, ...]:
    """Equal for turns that do the same to one tensor: a norm counts where its gain is not 1."""
    touch, norm = turn.touch, turn.touch.norm
    gain = None if norm is None else norm.gain_of(model)
    plain = gain is None or bool((gain == 1).all())
    return (touch.dim, touch.start, touch.stop, None if norm is None or plain else norm.module, id(turn.matrix))


def _by_parameter(model: nn.Module, turns: Sequence[Turn]) -> dict[nn.Parameter, list[Turn]]:
    """The turns of each tensor, each once, in order."""
    by_parameter: dict[nn.Parameter, dict[tuple[Any, ...], Turn]] = {}
    for turn in turns:
        effect, by_effect = _effect(turn, model), by_parameter.setdefault(turn.touch.slot.of(model), {})
        for key, other in by_effect.items():
            if key[:3] == effect[:3] and key != effect:
                raise ValueError(
                    f"{turn.touch.slot.name!r} would have to be turned in two ways, as it and "
                    f"{other.touch.slot.name!r} use it (after {_after(other)}, and after {_after(turn)}); it cannot be "
                    f"rotated"
                )
        by_effect.setdefault(effect, turn)
    return {parameter: list(by_effect.values()) for parameter, by_effect in by_parameter.items()}


def _after(turn: Turn) -> str:
    return "no norm" if turn.touch.norm is None else repr(turn.touch.norm.module)


def _turned(parameter: nn.Parameter, turns: Sequence[Turn], model: nn.Module) -> Tensor:
    """The parameter after its turns, in float64."""
    W = parameter.detach().double().clone()
    for turn in turns:
        touch, norm = turn.touch, turn.touch.norm
        stop = W.shape[touch.dim] if touch.stop is None else touch.stop
        view = W.narrow(touch.dim, touch.start, stop - touch.start)
        rows = view.movedim(touch.dim, -1)
        gain = None if norm is None else norm.gain_of(model)
        if gain is not None:
            rows = rows * gain.to(rows.device)
        M = turn.matrix.to(rows.device)
        if rows.shape[-1] % len(M):
            raise ValueError(f"blocks of {len(M)} do not divide the {rows.shape[-1]} features of {touch.slot.name!r}")
        turned = (rows.reshape(*rows.shape[:-1], -1, len(M)) @ M).reshape(rows.shape)
        view.copy_(turned.movedim(-1, touch.dim))
    return W


def _reset(model: nn.Module, norm: Norm, R: Tensor, undo: ExitStack) -> None:
    """Set the gain to 1, since the readers hold it now, and turn the bias."""
    gain = norm.gain_of(model)
    if norm.bias is not None:
        bias = norm.bias.of(model)
        b = bias.detach().double()
        if gain is not None:
            g = gain.to(b.device)
            if bool((g.abs() <= 1e-6 * g.abs().max()).any()):
                raise ValueError(
                    f"{norm.module!r} has gains of zero and a bias: the gains cannot be moved into its readers, so "
                    f"that the space it reads cannot be rotated"
                )
            b = b / g
        M = R.to(b.device)
        _change(bias, (b.reshape(-1, len(M)) @ M).reshape(b.shape), undo)
    if norm.gain is not None:
        weight = norm.gain.of(model)
        _change(weight, torch.full_like(weight, 1 - norm.offset), undo)


def _change(parameter: nn.Parameter, value: Tensor, undo: ExitStack) -> None:
    with torch.inference_mode(False):
        undo.callback(parameter.data.copy_, parameter.detach().clone())
        parameter.data.copy_(value)


# -- the check --------------------------------------------------------------------------------------------------------


def _check(
    before: Sequence[Tensor], after: Sequence[Tensor], turns: Sequence[Turn], model: nn.Module, tolerance: float | None
) -> float:
    """The change of the outputs; ValueError where it is too large."""
    full = all(turn.touch.slot.of(model).dtype in (torch.float32, torch.float64) for turn in turns)
    largest = max((float(x.abs().max()) for x in before if x.numel()), default=0.0)
    if full or tolerance is not None:
        change = max((float((x - y).abs().max()) for x, y in zip(before, after, strict=True) if x.numel()), default=0.0)
        difference = change / max(largest, 1e-30)
    else:  # each weight was rounded again: the error of all outputs together
        squares = sum(float((x - y).square().sum()) for x, y in zip(before, after, strict=True))
        difference = (squares / max(sum(float(x.square().sum()) for x in before), 1e-30)) ** 0.5
    allowed = tolerance if tolerance is not None else FULL_PRECISION if full else HALF_PRECISION
    if not difference <= allowed:
        raise ValueError(
            f"the outputs of the model changed by {difference:.1e} of their size when it was rotated, allowed is "
            f"{allowed:.0e}; it was restored. Some operation needs its basis as it is: rotate less "
            f"(rotations=['R1'] or ['R2']), or, where the difference is rounding, raise tolerance"
        )
    return difference
