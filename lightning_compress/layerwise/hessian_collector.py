"""Targets of a calibration: the second moment of their inputs grows until each is finished.

Modules that receive the very same tensor share one moment. A convolution is seen through its windows.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lightning_compress.layers.matrix import input_layout, inputs_as_rows
from lightning_compress.layerwise.input_hessian import MomentPool, Shared

__all__ = ["Gathering"]


class Gathering:
    """Modules that wait for the last of their inputs.

    Args:
        modules: By dotted name.
        share: One moment for modules that receive the very same tensor.
    """

    def __init__(self, modules: Mapping[str, nn.Module], share: bool = True):
        self.left = dict(modules)
        self._pool = MomentPool(share)

    def observe(self, name: str, inputs: tuple[Tensor, ...], mask: Tensor | None) -> None:
        """A module is called with ``inputs``; ``mask`` is True for tokens that count. For a forward-pre hook.

        Raises:
            ValueError: NaN or Inf (module and batch are named), or modules with one moment part ways.
        """
        module, x = self.left[name], inputs[0]
        self._pool.update(name, x, input_layout(module), lambda: inputs_as_rows(module, x, mask))

    def complete(self, names: Iterable[str]) -> list[tuple[str, nn.Module, Shared]]:
        """Those of ``names`` that are left and have seen data; from now on they are done."""
        self._pool.drop_stale()
        done = []
        for name in [name for name in names if name in self.left]:
            if (shared := self._pool.get(name)) is not None:
                done.append((name, self.left.pop(name), shared))
        return done

    def drop(self, names: Iterable[str]) -> None:
        """No more inputs will come: let the moments go."""
        self._pool.drop(*names)
