"""A block while its weights are learned: its target output, the error to it, gradients for its weights.

Weights are written into the parameters of the block, and gradients computed for these: no module is replaced or
wrapped, so that any forward works, and ``.grad`` is not used.

Shapes: R rows, C columns.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from lightning_compress.layers.forward import gradients_for
from lightning_compress.layers.matrix import as_matrix, parameter_of, write_matrix
from lightning_compress.layerwise.parent import counted, first_tensor
from lightning_compress.modifiers.autoround.grid import OnGrid
from lightning_compress.quant.fake_quant import fake_quantize_input

__all__ = ["InputGrid", "LearnedBlock"]


class InputGrid(NamedTuple):
    """The grid of an input; scales where they are static: one for the tensor, or the global scale of NVFP4."""

    args: QuantizationArgs
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None


class _Size(NamedTuple):
    power: float
    numbers: int
    samples: int


class LearnedBlock:
    """The modules of a block whose weights are learned together.

    Args:
        modules: Modules by name; their weights are dense.
        replay: Runs the block on a batch and returns its output.
        mask: Mask of the tokens that count in the last batch; None: all.
        count: Number of batches.
        dense: Target output for a batch; None: the present output of the block.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        replay: Callable[[int], Any],
        mask: Callable[[], Tensor | None],
        count: int,
        dense: Callable[[int], Tensor] | None,
    ):
        self.modules, self.replay, self.mask, self.count = modules, replay, mask, count
        outputs = [] if dense is not None else [first_tensor(replay(i)).clone() for i in range(count)]
        self._target: Callable[[int], Tensor] = outputs.__getitem__ if dense is None else dense
        self._sizes: dict[int, _Size] = {}  # of the target output, by batch
        self.gives_output = dense is not None or outputs[0].numel() > 0

    @property
    def power(self) -> float:
        """The sum of squares of the target output, over the batches of :meth:`error` so far."""
        return sum(size.power for size in self._sizes.values())

    def samples(self, batch: int) -> int:
        """Number of samples in a batch, after :meth:`error` of that batch."""
        return self._sizes[batch].samples

    def error(self, batch: int) -> Tensor:
        """Sum of squared errors of the present output, over tokens that count, float32."""
        output = first_tensor(self.replay(batch))
        mask = self.mask()
        target = counted(self._target(batch).to(output.device), mask).float()
        if batch not in self._sizes:
            self._sizes[batch] = _Size(float(target.square().sum()), target.numel(), len(output))
        return (counted(output, mask).float() - target).square().sum()

    def norms(self, batch: int) -> list[Tensor]:
        """||B(X)||_2 of the present output, over tokens that count: float32 [], one for each sample."""
        output, mask = first_tensor(self.replay(batch)), self.mask()
        if mask is not None:
            mask = mask.to(output.device)
            if output.shape[: mask.ndim] != mask.shape and output.ndim and len(output) == mask.numel():
                output = output.unflatten(0, mask.shape)
            if output.shape[: mask.ndim] == mask.shape:
                return [torch.linalg.vector_norm(x[m].float()) for x, m in zip(output, mask, strict=True)]
        return [torch.linalg.vector_norm(x.float()) for x in output]

    def place(self, weights: Mapping[str, OnGrid]) -> None:
        """Write weights into the block."""
        self.write({name: weight.value() for name, weight in weights.items()})

    def write(self, weights: Mapping[str, Tensor]) -> None:
        """As :meth:`place`, [R, C] each, in any dtype."""
        for name, W_RC in weights.items():
            write_matrix(self.modules[name], W_RC)

    def gradients(self, error: Tensor) -> dict[str, Tensor]:
        """Gradients of an error for the weights, [R, C] float32; modules without a gradient are left out.

        Their unit is the mean square of the target output, so that half precision neither overflows nor underflows.

        Raises:
            ValueError: The block's output has no gradient.
        """
        unit = sum(size.numbers for size in self._sizes.values()) / max(self.power, torch.finfo(torch.float32).tiny)
        return self.gradients_of(error, unit)

    def gradients_of(self, value: Tensor, unit: float = 1.0, again: bool = False) -> dict[str, Tensor]:
        """``unit`` times the gradients of a scalar for the weights; ``again``: keep the graph for another scalar."""
        if not value.requires_grad:
            raise ValueError(
                f"no gradient of the block's output reaches {', '.join(map(repr, self.modules))}: is there a "
                f"torch.no_grad() or .detach() in its forward? Add them to ignore, or use GPTQModifier"
            )
        holders = {name: parameter_of(module) for name, module in self.modules.items()}
        parameters = list(dict.fromkeys(holders.values()))  # experts may share one
        weight = torch.full_like(value, unit)
        gradients = torch.autograd.grad(value, parameters, weight, retain_graph=again, allow_unused=True)
        of = dict(zip(parameters, gradients, strict=True))
        pairs = [(name, of[holder]) for name, holder in holders.items()]
        return {name: as_matrix(self.modules[name], like=G).float() for name, G in pairs if G is not None}

    @contextmanager
    def learning(self, model: nn.Module, inputs: Mapping[str, InputGrid | None]) -> Iterator[None]:
        """Inside, these weights alone have gradients, and inputs are quantized, straight through.

        Args:
            model: The model with the block.
            inputs: Grid of the input of each module; None: not quantized.
        """
        handles = [
            self.modules[name].register_forward_pre_hook(lambda module, x, grid=grid: _quantized(module, x, grid))
            for name, grid in inputs.items()
            if grid is not None
        ]
        try:
            with gradients_for(model, [parameter_of(module) for module in self.modules.values()]):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _quantized(module: nn.Module, inputs: tuple[Any, ...], grid: InputGrid) -> tuple[Any, ...]:
    """The input on its grid, whose gradient passes unchanged."""
    return (fake_quantize_input(module, inputs[0], *grid), *inputs[1:])
