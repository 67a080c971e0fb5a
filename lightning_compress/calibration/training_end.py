"""The turn between training and calibration, for modifiers that need the final weights and no data."""

from dataclasses import replace

from lightning_compress.calibration.activations import check_weights
from lightning_compress.calibration.modes import calibration_mode
from lightning_compress.core import Event, EventType, Lifecycle, State
from lightning_compress.layers.split_experts import split_while

__all__ = ["end_training"]


def end_training(lifecycle: Lifecycle, state: State, clock: Event = Event()) -> None:  # noqa: B008  (frozen)
    """Emit TRAINING_END.

    Where a modifier has a handler for it, the model is as in calibration meanwhile: in eval mode, without gradients,
    with a Linear for each expert of a fused mixture.

    Args:
        lifecycle: The initialized modifiers.
        state: State with the model.
        clock: Clock of the event.

    Raises:
        ValueError: A modifier has a handler for it, and there is NaN or Inf in the weights.
    """
    event = replace(clock, type_=EventType.TRAINING_END)
    if not any(modifier.handles_training_end for modifier in lifecycle.modifiers):
        lifecycle.emit(state, event)
        return
    assert state.model is not None
    with split_while(state.model), calibration_mode(state.model):
        check_weights(state.model)
        lifecycle.emit(state, event)
