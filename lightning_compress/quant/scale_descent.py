"""The search for one piece of a weight: walk the factor down, refine it, shift the zero point, fit.

Shapes: r rows of all groups of one piece.
"""

import torch
from torch import Tensor

from lightning_compress.ops.scale_search.reference import LOWEST, PATIENCE, RATIO, first_factor, roots
from lightning_compress.quant.scale_errors import Errors, GridErrors, integer_range

__all__ = ["descend"]

MARGIN = 1e-3  # of an error; float32 sums over a row are exact to less


def descend(errors: Errors) -> tuple[Tensor, Tensor]:
    """The best factor and zero-point shift of each row, [r]: walk f down, refine, try z - 1 and z + 1, fit.

    Rows are independent of one another.
    """
    best = errors(1.0, 0.0).clone()  # the min-max scale: a candidate must be better
    best_f, best_shift = torch.ones_like(best), torch.zeros_like(best)

    def improve(f: Tensor, shift: float | Tensor) -> None:
        """Replace factor and shift where the error falls."""
        error = errors(f, shift)
        better = error < best
        torch.where(better, error, best, out=best)
        torch.where(better, f, best_f, out=best_f)
        if errors.z is not None:
            best_shift.copy_(torch.where(better, shift, best_shift))

    ratio = _walk_down(errors, best, best_f)
    for root in roots(errors.power):
        middle = best_f.clone()
        improve(middle * ratio ** (1 / root), 0.0)
        improve(middle / ratio ** (1 / root), 0.0)
    if errors.z is not None:
        improve(best_f.clone(), -1.0)
        improve(best_f.clone(), 1.0)
    if errors.power == 2:
        above, below = errors.fit(best_f, best_shift)
        improve((above / below).where((above > 0) & (below > 0), best_f), best_shift.clone())
    return best_f, best_shift


def _walk_down(errors: Errors, best: Tensor, best_f: Tensor) -> float:
    """Try factors from the highest down, and write errors and factors that are better; gives the ratio of factors."""
    bits, (low, high) = errors.args.num_bits, integer_range(errors.args)
    f, ratio = first_factor(low, high) * errors.above, RATIO[bits] ** (1 / errors.finer)
    walk = _Walk(errors, best, best_f)
    while f > LOWEST[bits]:
        walk.leave_out(f)
        fell = walk.try_factor(f)
        f *= ratio
    if fell.any():  # heavy tails: go on where errors still fall
        (patience,) = walk.keep(fell, PATIENCE * fell)
        while (patience > 0).any() and f > torch.finfo(torch.float32).eps:
            patience = (patience - 1).masked_fill_(walk.try_factor(f, patience > 0), PATIENCE)
            f *= ratio
    walk.write()
    return ratio


class _Walk:
    """The rows for which factors are still tried, with their least errors.

    Args:
        errors: The errors of all rows.
        best: The least error so far, [r]; complete after :meth:`write`.
        best_f: Its factor, [r]; complete after :meth:`write`.
    """

    def __init__(self, errors: Errors, best: Tensor, best_f: Tensor):
        self.errors, self.best, self.best_f = errors, best, best_f
        self.rows: Tensor | None = None  # None: all
        self.least, self.factor = best, best_f  # of these rows
        self.fell, self.tries = torch.ones_like(best, dtype=torch.bool), 0  # at the last try; since rows were left out

    def try_factor(self, f: float, among: Tensor | None = None) -> Tensor:
        """True for rows, of those ``among`` them, whose error falls."""
        error = self.errors(f, 0.0)
        self.fell = error < self.least if among is None else (error < self.least) & among
        torch.where(self.fell, error, self.least, out=self.least)
        self.factor.masked_fill_(self.fell, f)
        self.tries += 1
        return self.fell

    def leave_out(self, f: float) -> None:
        """Leave out rows whose clipped weights alone lose more than the least error: as f falls, that only grows.

        Finding them takes two thirds of a try, so it waits until most rows are past their least error.
        """
        errors = self.errors
        if (
            not isinstance(errors, GridErrors)
            or not errors.narrows
            or self.tries < 2
            or 8 * errors.rows < len(self.best)
        ):
            return
        if 2 * int(self.fell.sum()) < errors.rows:
            self.tries = 0
            self.keep(~(errors.clipped(f) > self.least * (1 + MARGIN)))

    def keep(self, rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Leave the other rows out, where that saves work; gives ``others`` for the rows that stay."""
        errors = self.errors
        narrowed = errors.narrowed(rows) if isinstance(errors, GridErrors) and errors.narrows else None
        if narrowed is None:
            return others
        self.write()
        index, self.errors = narrowed
        self.rows = index if self.rows is None else self.rows[index]
        self.least, self.factor = self.best[self.rows], self.best_f[self.rows]
        self.fell = self.fell[index]
        return tuple(other[index] for other in others)

    def write(self) -> None:
        if self.rows is not None:
            self.best[self.rows], self.best_f[self.rows] = self.least, self.factor
