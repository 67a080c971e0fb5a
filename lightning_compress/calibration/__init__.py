"""The walk over a model's blocks that shows calibration data to modifiers, without tracing."""

from lightning_compress.calibration.sequential import calibrate

__all__ = ["calibrate"]
