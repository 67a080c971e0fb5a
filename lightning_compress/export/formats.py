"""The formats that a model is saved in, by name."""

from collections.abc import Sequence

__all__ = ["FORMATS", "check_formats"]

FORMATS = ("compressed_tensors", "onnx", "gguf")


def check_formats(argument: str, formats: str | Sequence[str]) -> tuple[str, ...]:
    """The formats of an argument, one name or several; ValueError for an unknown one, for none, and for one twice."""
    names = (formats,) if isinstance(formats, str) else formats
    if not isinstance(names, Sequence) or not names or len(set(map(str, names))) < len(names):
        raise ValueError(f"{argument}={formats!r}: expected a format or a list of formats, of {', '.join(FORMATS)}")
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"{argument}={name!r} is not a format; expected {' or '.join(FORMATS)}")
    return tuple(names)
