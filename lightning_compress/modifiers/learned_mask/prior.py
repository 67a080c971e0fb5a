"""Weights of a sparse model on disk, whose masks are the initial masks of a learned mask."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_compress.layers.matrix import layout_of
from lightning_compress.pruning.masked import MaskedWeights

__all__ = ["read_weights"]


def read_weights(path: Path, weights: MaskedWeights) -> dict[str, Tensor]:
    """The weights [R, C] of a sparse model, by module name."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.exists() or file.suffix != ".safetensors":
        raise ValueError(
            f"prior={str(path)!r}: expected 'magnitude', a .safetensors file, or a folder that holds model.safetensors"
        )
    matrices = {}
    try:
        opened = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"prior={str(path)!r}: {file.name} is not a complete safetensors file: {error}") from error
    with opened as file_:
        names = set(file_.keys())
        for name, W_RC in weights.matrices().items():
            if f"{name}.weight" not in names:
                raise ValueError(
                    f"prior={str(path)!r} has no {name}.weight; it holds {len(names)} tensors, such as "
                    f"{', '.join(sorted(names)[:3])}: give a dense-format model with the names of this one"
                )
            weight = file_.get_tensor(f"{name}.weight")
            matrix = layout_of(weights.modules[name]).matrix(weight)
            if matrix.shape != W_RC.shape:
                raise ValueError(
                    f"prior={str(path)!r}: {name}.weight is {tuple(matrix.shape)} as a matrix, and in this model "
                    f"{tuple(W_RC.shape)}; give the same model, sparse"
                )
            matrices[name] = matrix
    return matrices
