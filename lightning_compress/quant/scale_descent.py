"""The search for one piece of a weight: walk the factor down, refine it, shift the zero point, fit.

Shapes: r rows of all groups of one piece.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.ops.scale_search.reference import LOWEST, PATIENCE, RATIO, first_factor, roots
from lightning_compress.quant.scale_errors import Candidate, Errors, GridErrors, integer_range

__all__ = ["descend"]

AT_ONCE = 2  # factors, for each of which the weights of a block would come from a slower cache
MARGIN = 1e-3  # of an error; float32 sums over a row are exact to less


def descend(errors: Errors) -> tuple[Tensor, Tensor]:
    """The best factor and zero-point shift of each row, [r]: walk f down, refine, try z - 1 and z + 1, fit.

    Rows are independent of one another.
    """
    best, best_f, ratio = _walk_down(errors)
    best_shift = torch.zeros_like(best)

    def improve(*candidates: Candidate) -> None:
        """Replace factor and shift where the error falls."""
        nonlocal best, best_f, best_shift
        for (f, shift), error in zip(candidates, errors.each(candidates), strict=True):
            better, best = error < best, torch.minimum(error, best)
            best_f = _chosen(better, f, best_f)
            if errors.z is not None:
                best_shift = _chosen(better, shift, best_shift)

    for root in roots(errors.power):
        improve((best_f * ratio ** (1 / root), 0.0), (best_f / ratio ** (1 / root), 0.0))
    if errors.z is not None:
        improve((best_f, -1.0), (best_f, 1.0))
    if errors.power == 2:
        best_f = _fitted(errors, best, best_f, best_shift)
    return best_f, best_shift


def _fitted(errors: Errors, best: Tensor, f: Tensor, shift: Tensor) -> Tensor:
    """The factors that fit the codes of these, where the error falls.

    With the same codes it falls by ``below (fitted - f)^2``, with those of the new factor by more: errors are computed
    for rows where that is little.
    """
    above, below = errors.fit(f, shift)
    fitted = (above / below).where((above > 0) & (below > 0), f)
    better = (fitted - f).square_().mul_(below) > MARGIN * best
    index, unsure = _narrowed(errors, ~better) or (slice(None), errors)
    shift = shift[index]
    (error,) = unsure.each([(fitted[index], shift)])
    better[index] = error < best[index]
    return _chosen(better, fitted, f)


def _narrowed(errors: Errors, rows: Tensor) -> tuple[Tensor, GridErrors] | None:
    """Index and errors of these rows, where leaving out the others saves work."""
    return errors.narrowed(rows) if isinstance(errors, GridErrors) and errors.narrows else None


def _chosen(better: Tensor, new: Tensor | float, old: Tensor) -> Tensor:
    """New numbers for rows that are better: ``where`` branches for each row, and takes ten times as long on a CPU."""
    if better.is_cuda:  # there it is one launch in place of three
        return torch.where(better, new, old)
    return old.lerp(new if isinstance(new, Tensor) else torch.full_like(old, new), better.float())


def _walk_down(errors: Errors) -> tuple[Tensor, Tensor, float]:
    """Try factors from the highest down; gives the least error of each row, its factor, and the ratio of factors."""
    bits, (low, high) = errors.args.num_bits, integer_range(errors.args)
    f, ratio = first_factor(low, high) * errors.above, RATIO[bits] ** (1 / errors.finer)
    factors = []
    while f > LOWEST[bits]:
        factors.append(f)
        f *= ratio
    walk = _Walk(errors)
    for i in range(0, len(factors), AT_ONCE):
        walk.leave_out(factors[i])
        walk.try_factors(factors[i : i + AT_ONCE])
    if walk.fell.any():  # heavy tails: go on where errors still fall
        (patience,) = walk.keep(walk.fell, PATIENCE * walk.fell)
        while (patience > 0).any() and f > torch.finfo(torch.float32).eps:
            walk.try_factors([f], patience > 0)
            patience = (patience - 1).masked_fill_(walk.fell, PATIENCE)
            f *= ratio
    return *walk.all_rows(), ratio


class _Walk:
    """The rows for which factors are still tried, with their least errors.

    Attributes:
        errors: Their errors.
        least: The least so far.
        factor: Its factor.
        fell: Whether that is the last factor.
    """

    def __init__(self, errors: Errors):
        self.errors = errors
        (self.least,) = errors.each([(1.0, 0.0)])  # the min-max scale: a candidate must be better
        self.factor, self.fell = torch.ones_like(self.least), torch.ones_like(self.least, dtype=torch.bool)
        self._all = self.least, self.factor
        self._rows: Tensor | None = None  # None: all
        self._tries = 0  # since rows were left out

    def try_factors(self, factors: Sequence[float], among: Tensor | None = None) -> None:
        """Try factors for these rows, or for those ``among`` them."""
        for f, error in zip(factors, self.errors.each([(f, 0.0) for f in factors]), strict=True):
            if among is not None:
                error.masked_fill_(~among, math.inf)
            self.fell, self.least = error < self.least, torch.minimum(error, self.least)
            self.factor = _chosen(self.fell, f, self.factor)
            self._tries += 1

    def leave_out(self, f: float) -> None:
        """Leave out rows whose clipped weights alone lose more than the least error: as f falls, that only grows.

        Finding them takes two thirds of a try, so it waits until most rows are past their least error.
        """
        errors = self.errors
        if not isinstance(errors, GridErrors) or not errors.narrows or self._tries < 2:
            return
        if 8 * errors.rows >= len(self._all[0]) and 2 * int(self.fell.sum()) < errors.worth * errors.rows:
            self._tries = 0
            self.keep(~(errors.clipped(f) > self.least * (1 + MARGIN)))

    def keep(self, rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Leave the other rows out, where that saves work; gives ``others`` for the rows that stay."""
        narrowed = _narrowed(self.errors, rows)
        if narrowed is None:
            return others
        self._all = self.all_rows()
        index, self.errors = narrowed
        self._rows = index if self._rows is None else self._rows[index]
        self.least, self.factor, self.fell = self.least[index], self.factor[index], self.fell[index]
        return tuple(other[index] for other in others)

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """The least errors and their factors, also of the rows that were left out."""
        if self._rows is None:
            return self.least, self.factor
        for every, these in zip(self._all, (self.least, self.factor), strict=True):
            every[self._rows] = these
        return self._all
