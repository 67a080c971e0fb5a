"""Masks from scores, in the structures that pruning supports.

    unstructured    the highest scores stay, wherever they are
    N:M             of every M consecutive columns N stay ("2:4": two of four, "1:4": one of four)
    block RxC       tiles of R rows and C columns are kept or removed as one, by the mean of their scores
    channel         whole rows (output channels) are kept or removed, by the mean of their scores

Letters: R rows (output features), C columns (input features); a mask is True where the weight survives.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_compress.ops.mask_2of4 import mask_2of4

__all__ = ["check_columns", "check_structure", "global_masks", "keep_highest", "keep_mask", "keep_rows", "n_of_m"]


def keep_mask(score_RC: Tensor, sparsity: float, structure: str = "unstructured") -> Tensor:
    """The mask that removes the share ``sparsity`` with the lowest scores.

    Exactly ``floor(sparsity * units)`` units are removed (weights, tiles or rows), ties by position, so that equal
    inputs give equal masks; N:M keeps N of M regardless of ``sparsity`` (:func:`check_structure` compares the two).

    Args:
        score_RC: Scores, [R, C], float; higher is more important.
        sparsity: Share to remove, in [0, 1).
        structure: ``unstructured``, ``N:M``, ``block RxC`` or ``channel``.

    Returns:
        Bool [R, C].

    Raises:
        ValueError: The structure does not divide the matrix.
    """
    if (pattern := n_of_m(structure)) is not None:
        return _keep_n_of_m(score_RC, *pattern)
    rows, columns = tile(structure, score_RC.shape)
    R, C = score_RC.shape
    if R % rows or C % columns:
        raise ValueError(f"structure {structure!r} does not divide a matrix of {R} x {C}; expected multiples")
    unit_scores = score_RC.reshape(R // rows, rows, C // columns, columns).float().mean((1, 3))
    keep = keep_highest(unit_scores.flatten(), int(sparsity * unit_scores.numel() + 1e-9)).reshape(unit_scores.shape)
    return keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def keep_rows(score_RC: Tensor, sparsity: float, structure: str = "unstructured") -> Tensor:
    """As :func:`keep_mask`, but each row is ranked separately and loses exactly ``floor(sparsity * C)`` weights.

    Args:
        score_RC: Scores, [R, C], float.
        sparsity: Share to remove, in [0, 1).
        structure: ``unstructured`` or ``N:M``.
    """
    if (pattern := n_of_m(structure)) is not None:
        return _keep_n_of_m(score_RC, *pattern)
    lowest = score_RC.argsort(dim=1, stable=True)[:, : int(sparsity * score_RC.shape[1] + 1e-9)]
    return torch.ones_like(score_RC, dtype=torch.bool).scatter_(1, lowest, False)


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """One ranking over all matrices: together they lose the share ``sparsity``; each may lose more or less."""
    flat = torch.cat([score.flatten().float() for score in scores.values()])
    masks = keep_highest(flat, int(sparsity * flat.numel() + 1e-9)).split([score.numel() for score in scores.values()])
    return {name: mask.reshape(score.shape) for (name, score), mask in zip(scores.items(), masks, strict=True)}


def n_of_m(structure: str) -> tuple[int, int] | None:
    """(N, M) of a pattern such as ``2:4``, or None for another structure."""
    match = re.fullmatch(r"(\d+):(\d+)", structure)
    return (int(match[1]), int(match[2])) if match else None


def tile(structure: str, shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of the unit that is kept or removed as one, in a matrix of that shape."""
    if structure == "unstructured":
        return 1, 1
    if structure == "channel":
        return 1, shape[1]
    match = re.fullmatch(r"block (\d+)x(\d+)", structure)
    assert match, structure
    return int(match[1]), int(match[2])


def check_structure(structure: str, sparsity: float | None = None) -> str:
    """Return the structure if it is valid.

    Args:
        structure: As in :func:`keep_mask`.
        sparsity: Final sparsity of the recipe, if any.

    Raises:
        ValueError: The structure is unknown, or N:M has another sparsity.
    """
    pattern = n_of_m(structure)
    if pattern is not None:
        n, m = pattern
        if not 0 < n < m:
            raise ValueError(f"mask_structure={structure!r} keeps {n} of every {m} weights; expected 0 < N < M")
        if sparsity is not None and abs(sparsity - (m - n) / m) > 1e-9:
            raise ValueError(
                f"mask_structure={structure!r} has sparsity {(m - n) / m:g}, but {sparsity:g} was asked for; "
                f"give {(m - n) / m:g}, or another structure"
            )
    elif structure not in ("unstructured", "channel") and not re.fullmatch(r"block [1-9]\d*x[1-9]\d*", structure):
        raise ValueError(
            f"mask_structure={structure!r} is unknown; expected 'unstructured', 'N:M' such as '2:4', "
            f"'block RxC' such as 'block 4x1', or 'channel'"
        )
    return structure


def check_columns(columns: Mapping[str, int], structure: str) -> None:
    """ValueError names modules with numbers of columns that M of an N:M structure does not divide."""
    pattern = n_of_m(structure)
    if pattern and (unfit := [f"{name} ({C})" for name, C in columns.items() if C % pattern[1]]):
        raise ValueError(
            f"mask_structure={structure!r} does not divide the columns of {', '.join(unfit[:5])}; add them to ignore, "
            f"or choose another pattern"
        )


def keep_highest(scores: Tensor, removed: int) -> Tensor:
    """The mask that removes the ``removed`` lowest of all scores, ties by position."""
    if not removed:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    limit = flat.kthvalue(removed).values  # a third of the time of sorting them all
    tied = flat == limit
    place = tied.cumsum(0, dtype=torch.int32 if len(flat) < 2**31 else torch.int64)  # of a tied one, counted from 1
    dropped = tied & (place <= removed - (flat < limit).sum())
    return ((flat >= limit) & ~dropped).reshape(scores.shape)


def _keep_n_of_m(score_RC: Tensor, n: int, m: int) -> Tensor:
    R, C = score_RC.shape
    if C % m:
        raise ValueError(f"{n}:{m} does not divide {C} columns; ignore the module, or choose another pattern")
    if (n, m) == (2, 4):
        return mask_2of4(score_RC)
    lowest = score_RC.reshape(R, C // m, m).argsort(dim=-1, stable=True)[..., : m - n]
    keep = torch.ones(R, C // m, m, dtype=torch.bool, device=score_RC.device)
    return keep.scatter_(-1, lowest, False).reshape(R, C)
