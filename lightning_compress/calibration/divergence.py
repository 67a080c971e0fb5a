"""How far each block is from the dense model: its outputs for a few batches, before the walk and when it is finished.

    error_r = |y_r - d_r|^2 / |d_r|^2      for each row r of these batches; mean over rows, and its standard error

d is the output in the dense model, y the one in the compressed model, whose blocks before this one are compressed, too.
A row is what the first dimension counts (sequences, images); of each up to 65,536 evenly spaced numbers are compared.
The dense outputs come from one more pass of a sixteenth of the batches, or of one batch; with fewer than 8 batches that
would be too large a share of the work, and nothing is compared.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.calibration.activations import take, taken_off, tensors_of
from lightning_compress.calibration.capture import run_to_stop, stop
from lightning_compress.team import Team

__all__ = ["BlockOutputs", "children_of", "compared_batches", "row_errors"]

ROWS = 8  # that give a standard error worth reading
SHARE = 16  # one of so many batches
FEWEST = 8  # batches
NUMBERS = 2**16  # of a row


def compared_batches(count: int, rows: int) -> int:
    """How many of ``count`` batches with ``rows`` rows are compared: those of 8 rows, at most 1 of 16 batches.

    But at least two rows, which a standard error needs.

    >>> compared_batches(count=16, rows=4), compared_batches(128, 1), compared_batches(16, 1), compared_batches(4, 32)
    (1, 8, 2, 0)
    """
    if count < FEWEST:
        return 0
    return min(math.ceil(ROWS / rows), max(2 if rows == 1 else 1, count // SHARE))


def children_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that stand for blocks in a model without any: the children of it, or of its only child."""
    prefix, children = "", dict(model.named_children())
    while len(children) == 1:
        (name, child), prefix = next(iter(children.items())), next(iter(children))
        if not (inner := {f"{prefix}.{n}": m for n, m in child.named_children()}):
            return {name: child}
        children = inner
    return children


def row_errors(output: Tensor, dense: Tensor, mask: Tensor | None = None) -> list[float]:
    """Relative squared error of each row; rows where nothing counts, or that are zero, are left out.

    Args:
        output: Any shape, rows first.
        dense: The same of the dense model.
        mask: True where an element counts, or None.
    """
    y, d = output.reshape(len(output), -1).double(), dense.reshape(len(dense), -1).double()
    if mask is not None:
        y, d = y * mask, d * mask
    powers = d.square().sum(1)
    errors = (y - d).square().sum(1) / powers
    values: list[float] = errors[powers > 0].tolist()
    return values


class BlockOutputs:
    """Outputs of modules in the dense model, and the errors of those that are finished.

    Args:
        modules: The modules, by name.
        places: Position or key of the hidden state in the output of a module; where a name is missing, it is the first
            tensor of floats.
        count: How many batches are compared, over all ranks.
        team: The ranks. Each runs as many batches, so that a sharded block is called by all of them together.
        of: How many batches there are.
    """

    def __init__(self, modules: Mapping[str, nn.Module], places: Mapping[str, Any], count: int, team: Team, of: int):
        self.modules, self.places, self.count, self.team = modules, places, count, team
        self.numbers = team.mine(of)[: math.ceil(count / team.size)]
        self._dense: dict[tuple[str, int], Tensor] = {}
        self._errors: dict[str, dict[int, list[float]]] = {}

    def keep(self, run: Callable[[int], Any]) -> None:
        """Run the batches of this rank through the dense model, each to the last of the modules; keep their outputs."""

        def keep(name: str, i: int, output: Tensor) -> None:
            if self.numbers[i] < self.count:
                self._dense[name, i] = _sample(output).cpu().clone()

        self._run(run, keep)

    def compare_all(self, run: Callable[[int], Any], masks: Sequence[Tensor | None]) -> None:
        """Run them once more, and compare."""
        self._run(run, lambda name, i, output: self.compare(name, i, output, masks[i]))

    def compare(self, name: str, i: int, output: Tensor, mask: Tensor | None = None) -> None:
        """Compare a module's output for batch ``i`` of this rank; ``mask`` [B, T]: the tokens that count.

        Nothing is noted where the dense output is not known or has another shape.
        """
        dense, sample = self._dense.pop((name, i), None), _sample(output)
        if dense is None or dense.shape != sample.shape:
            return
        counted = None
        if mask is not None and output.shape[:2] == mask.shape:
            counted = _sample(mask.reshape(*mask.shape, *[1] * (output.ndim - 2)).expand(output.shape)).cpu()
        self._errors.setdefault(name, {})[self.numbers[i]] = row_errors(sample.cpu(), dense, counted)

    def result(self) -> dict[str, dict[str, float]]:
        """By module ``error``, ``standard_error`` (of two rows or more) and ``rows``; every rank calls this."""
        ranks = self.team.gather(self._errors, "divergence of blocks")
        facts: dict[str, dict[str, float]] = {}
        for name in self.modules:
            batches = {number: errors for rank in ranks for number, errors in rank.get(name, {}).items()}
            errors = [error for number in sorted(batches) for error in batches[number]]
            if errors:
                facts[name] = {"error": fmean(errors), "rows": len(errors)}
            if len(errors) > 1:
                facts[name]["standard_error"] = stdev(errors) / math.sqrt(len(errors))
        return facts

    def _run(self, run: Callable[[int], Any], note: Callable[[str, int, Tensor], None]) -> None:
        """Call ``note`` with the hidden state of the first call of each module, for each batch."""
        for i in range(len(self.numbers)):
            names: set[str] = set()

            def arrive(name: str, output: Any, i: int = i, names: set[str] = names) -> None:
                tensors = (tensor for tensor in tensors_of(output) if tensor.is_floating_point())
                hidden = take(output, self.places[name]) if name in self.places else next(tensors, None)
                if name not in names and isinstance(hidden, Tensor):
                    names.add(name)
                    note(name, i, hidden)
                if len(names) == len(self.modules):
                    stop()

            hooks = (m.register_forward_hook(lambda _m, _a, o, n=n: arrive(n, o)) for n, m in self.modules.items())
            with torch.random.fork_rng(devices=[]), taken_off(hooks):  # random numbers of the model stay for the walk
                run_to_stop(partial(run, i))


def _sample(output: Tensor) -> Tensor:
    """[rows, numbers]: evenly spaced, and in turn from all channels."""
    rows = output.reshape(len(output), -1) if output.ndim > 1 else output.reshape(1, -1)
    stride = max(1, rows.shape[1] // NUMBERS)
    while math.gcd(stride, output.shape[-1] if output.ndim else 1) > 1:
        stride += 1
    return rows[:, ::stride].detach()
