"""How a calibration batch becomes the arguments of a model, and whether the model accepts them.

A mapping gives the keyword arguments that ``forward`` takes; of a tuple or list the first item is the input; anything
else is the input itself. ``labels`` are left out, since calibration needs no loss, unless ``forward`` requires them.
"""

import inspect
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any, Final

from torch import Tensor, nn

__all__ = ["IN_COMPRESS", "IN_TRAINER", "check_batch", "run_model"]

IN_COMPRESS: Final = "pass forward=lambda model, batch: ... to compress(), or other batches"
IN_TRAINER: Final = (
    "write calibration_step(self, batch, batch_idx) in the LightningModule, which runs the model on a batch, or give "
    "other batches in a calibration_dataloader() of the LightningDataModule or the LightningModule"
)


@dataclass(frozen=True)
class Arguments:
    """Arguments of a call of the model, and the keys of the batch that it does not take."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    unused: tuple[str, ...] = ()


def run_model(model: nn.Module, batch: Any, advice: str = IN_COMPRESS) -> Any:
    """Run the model on a batch.

    Args:
        model: The model.
        batch: A calibration batch, on the model's device.
        advice: Advice in the message where the model cannot take the batch.
    """
    arguments = _arguments(model, batch, advice)
    try:
        return model(*arguments.args, **arguments.kwargs)
    except (TypeError, RuntimeError, AttributeError, IndexError) as error:
        error.add_note(
            f"This was {type(model).__name__} on a calibration batch: it got {_described(arguments)}. "
            f"If it takes something else, {advice}."
        )
        raise


def check_batch(model: nn.Module, batch: Any, advice: str = IN_COMPRESS) -> None:
    """Compare a batch with the signature of ``forward``; the model is not run. Warns of keys that are left out.

    Raises:
        ValueError: The model cannot take it.
    """
    arguments = _arguments(model, batch, advice)
    signature = _signature(model)
    try:
        if signature is not None:
            signature.bind(*arguments.args, **arguments.kwargs)
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot take a calibration batch: {error}; it would get {_described(arguments)}, "
            f"and its forward is {signature}: {advice}"
        ) from error
    if arguments.unused:
        warnings.warn(
            f"calibration leaves the keys {list(arguments.unused)} of a batch out: the forward of "
            f"{type(model).__name__} does not take them; it gets {sorted(arguments.kwargs)}",
            stacklevel=1,  # one place, so that Python shows it once
        )


def _arguments(model: nn.Module, batch: Any, advice: str) -> Arguments:
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError(f"a calibration batch is an empty {type(batch).__name__}; expected the input first")
        return _arguments(model, batch[0], advice)
    return _keywords(model, batch, advice) if isinstance(batch, Mapping) else Arguments((batch,), {})


def _keywords(model: nn.Module, batch: Mapping[str, Any], advice: str) -> Arguments:
    signature = _signature(model)
    parameters = signature.parameters.values() if signature is not None else ()
    named = {p.name: p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    further = next((p for p in parameters if p.kind == Parameter.VAR_KEYWORD), None)
    typed = _typed_keys(further, model) if further is not None else frozenset[str]()
    is_open = typed is None or signature is None
    chosen = {key: value for key, value in batch.items() if is_open or key in named or key in (typed or ())}
    config = getattr(model, "config", None)
    # an encoder-decoder computes its decoder's input from labels
    needs_labels = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in batch
    needs_labels |= "labels" in named and named["labels"].default is Parameter.empty
    if not needs_labels:
        chosen.pop("labels", None)
    if not chosen:
        raise ValueError(
            f"{type(model).__name__}.forward takes none of the batch's keys {sorted(map(str, batch))}, but "
            f"{sorted(named)}: {advice}"
        )
    unused = tuple(str(key) for key in batch if key not in chosen and key != "labels")
    if hasattr(config, "use_cache") and (is_open or "use_cache" in named):
        chosen["use_cache"] = False
    return Arguments((), chosen, unused)


def _signature(model: nn.Module) -> Signature | None:
    """Signature of ``forward``; None where Python has none (compiled by TorchScript)."""
    try:
        return inspect.signature(getattr(model, "_orig_mod", model).forward)
    except (TypeError, ValueError):
        return None


def _typed_keys(parameter: Parameter, model: nn.Module) -> frozenset[str] | None:
    """Keys in the annotation of ``**kwargs: Unpack[SomeTypedDict]``; None: any key is allowed."""
    annotation = parameter.annotation
    if isinstance(annotation, str):
        try:
            forward = inspect.unwrap(type(model).forward)
            annotation = typing.get_type_hints(forward, include_extras=True)[parameter.name]
        except (NameError, AttributeError, KeyError, TypeError):
            return None
    if typing.get_origin(annotation) is not typing.Unpack:
        return None
    (keys,) = typing.get_args(annotation)
    return frozenset(keys.__required_keys__ | keys.__optional_keys__)


def _described(arguments: Arguments) -> str:
    if arguments.kwargs:
        return f"the keywords {sorted(arguments.kwargs)}"
    value = arguments.args[0]
    return f"its tensor {list(value.shape)}" if isinstance(value, Tensor) else f"its {type(value).__name__}"
