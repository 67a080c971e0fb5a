"""What lightning_compress.json may hold, checked before its use. What it is for: save.py."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from lightning_compress.export.tensors import read_json

__all__ = ["FORMAT_VERSION", "OWN_FILE", "read_own"]

OWN_FILE = "lightning_compress.json"
FORMAT_VERSION = 1

Count = Annotated[int, Field(strict=True, ge=0)]
Float = Literal["float64", "float32", "float16", "bfloat16"]
Sign = Literal[-1, 1]
Shape = Annotated[list[Count], Field(max_length=8)]


def read_own(path: Path) -> dict[str, Any]:
    """The content of lightning_compress.json; without such a file that of an empty one.

    Raises:
        ValueError: It is damaged (the message says where), or a newer version of this package wrote it.
    """
    if not path.exists():
        return {"format_version": FORMAT_VERSION, "dense": {}, "names": {}}
    content = read_json(path)
    version = content.get("format_version")
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, expected {FORMAT_VERSION}; load it with a newer version of this "
            f"package"
        )
    try:
        _Own.model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'all of it'}: {e['msg']}" for e in error.errors()[:3]]
        raise ValueError(f"{path} is not a file that save wrote: {'; '.join(faults)}; copy the folder again") from error
    return content


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Tensor(_Part):
    dtype: Literal[Float, "float8_e4m3fn", "int8", "int16", "int32", "int64", "uint8"]
    shape: Shape
    values: list[int | float]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if math.prod(self.shape) != len(self.values):
            raise ValueError(f"shape {self.shape} needs {math.prod(self.shape)} values, got {len(self.values)}")
        return self


class _Record(_Part):
    scheme: dict[str, Any]  # compressed-tensors checks it
    scale: _Tensor
    zero_point: _Tensor | None = None
    input_scale: _Tensor | None = None
    input_zero_point: _Tensor | None = None
    input_global_scale: _Tensor | None = None
    global_scale: _Tensor | None = None


class _Rotation(_Part):
    side: Literal["input", "output"]
    signs: Annotated[list[Sign], Field(min_length=1)]


class _Step(_Part):
    layers: dict[str, Annotated[list[Count], Field(min_length=1)]] = {}
    shapes: dict[str, Shape] = {}
    attributes: dict[str, dict[str, int | list[int]]]
    config: dict[str, Any]


class _Own(_Part):
    format_version: StrictInt
    dense: dict[str, _Record]
    names: dict[str, str]
    dtype: Float = "float32"
    online: dict[str, list[_Rotation]] = {}
    structure: list[_Step] = []
