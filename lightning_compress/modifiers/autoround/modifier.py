"""AutoRound: rounding and clipping of a block's weights, learned by sign descent on the block's output.

Cheng et al., 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
arXiv:2309.05516:

    min_{V, alpha, beta}  || B(X; Q(W)) - B*(X*) ||^2                           over the tokens that count
    q = s (clip(round(w / s + V + z)) - z),   V in [-1/2, 1/2],   alpha, beta in [1/2, 1] shrink the range (grid.py)
    V <- V - lr_t sign(dL/dV),   lr_t = lr (1 - t / iters)                      alpha, beta likewise (descent.py)

B* is the dense block and X* its input in the dense model, B the block being quantized and X its input after quantized
blocks, so that each block also corrects those before it. All weights of a block are learned together. Iterate 0 is
rounding to nearest, or GPTQ's solution; the result is never worse than either on the calibration data.

Modules after the last block are learned by the model's output; those before the first one keep iterate 0.

Shapes: R rows, C columns.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from lightning_compress.core import Event, Needs, State
from lightning_compress.layers.matrix import inputs_as_rows
from lightning_compress.layerwise.layer import Layer, Solved
from lightning_compress.layerwise.quantizer import LayerwiseQuantizer
from lightning_compress.modifiers.autoround.block import InputGrid, LearnedBlock
from lightning_compress.modifiers.autoround.descent import Descent, descend
from lightning_compress.modifiers.autoround.grid import LearnedGrid, OnGrid
from lightning_compress.modifiers.autoround.initial_grids import Start
from lightning_compress.modifiers.gptq.solver import ScaleSearch
from lightning_compress.pruning.arguments import zeros_stay
from lightning_compress.quant.observers import ObserverName
from lightning_compress.quant.rounding import input_scales

__all__ = ["AutoRoundModifier"]

# lr times iters. The demo's model at 2 bits, 100 steps from GPTQ: KL to the dense model .00286 at first, .00262 with
# 0.05; with 0.2, and with 1 in 200 steps, no iterate was better than the first one
RATES = {"rtn": 1.0, "gptq": 0.05}


class AutoRoundModifier(LayerwiseQuantizer):
    """Quantize weights, with rounding that is learned block by block.

    The layers of a block are learned together by replaying it: no layer is solved alone.

    ``targets``, ``ignore``, ``scheme``, ``group_size`` and ``config_groups`` are those of
    :class:`~lightning_compress.quant.arguments.QuantizationArguments`, ``observer``, ``averaging_constant`` and
    ``preserve_zeros`` those of :class:`~lightning_compress.layerwise.quantizer.LayerwiseQuantizer`.

    Args:
        iters: Steps for each block; 0 keeps iterate 0.
        lr: Rate of the first step, falling to 0. None: from ``rtn`` 1 / ``iters``, so that V can just reach its bound;
            from ``gptq`` a twentieth of that, since columns that correct each other must change together.
        batch_size: Samples in each step: as many calibration batches as hold them, at least one.
        seed: Seed of the order of the batches.
        init: Iterate 0 of the descent: ``gptq``, or ``rtn``, rounding to nearest.
        scale_search: Initial scales, as for GPTQModifier: ``hessian``, ``mse`` or ``minmax``.
        target: Target output: ``dense``: of the block in the dense model. ``same_input``: of the dense block for its
            input after quantized blocks.
    """

    technique: ClassVar[str] = "autoround"
    every_format: ClassVar[bool] = True

    iters: int = Field(default=200, ge=0)
    lr: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=8, ge=1)
    seed: int = 0
    init: Literal["rtn", "gptq"] = "gptq"
    scale_search: ScaleSearch = "hessian"
    target: Literal["dense", "same_input"] = "dense"
    observer: ObserverName = "minmax"
    averaging_constant: float = Field(default=0.01, gt=0, le=1)
    preserve_zeros: bool | None = None

    _tokens: dict[str, int] = PrivateAttr(default_factory=dict)

    @property
    def needs(self) -> Needs:
        return Needs(data=True, own_pass=True, dense_outputs=self.target == "dense", sharded=True)

    @property
    def _initial(self) -> Start:
        return Start(self.init == "gptq", self.scale_search)

    def observe(self, name: str, module: nn.Module, x: Tensor) -> None:
        self._tokens[name] = self._tokens.get(name, 0) + inputs_as_rows(module, x, self.token_mask).shape[1]
        if self._initial.needs_hessian:
            super().observe(name, module, x)
        else:
            self.observe_range(name, module, x)

    def solve_seen(self, state: State, names: Iterable[str]) -> None:
        names = [name for name in names if name in self._layers and self._tokens.get(name)]
        if not names:
            return
        self.reduce_ranges(state, names)
        for name in names:
            self._globals.of(name)  # from dense weights
        if state.replay is None:
            raise ValueError(
                f"{self.name} must run block {state.block_name!r} again to learn its rounding, but its inputs are "
                f"not stored; calibrate with walk='two_pass' or walk='auto'"
            )
        with torch.inference_mode(False), torch.no_grad():
            start = time.perf_counter()
            layers = [replace(layer, W_RC=layer.W_RC.clone()) for layer in self.begin(names)]
            weights, error, flag = self._learned(state, layers)
            seconds = (time.perf_counter() - start) / len(layers)
            for layer in layers:
                weight = weights[layer.name]
                parts = {"scale": weight.scale, "zero_point": weight.zero_point}
                solved = Solved(weight.value(), error, 1.0, flag, parts)
                self.conclude(state, layer, solved, self._tokens[layer.name], seconds)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._layers:
            self.unseen(state, dict(self._layers))
        self.reset()

    def _learned(self, state: State, layers: Sequence[Layer]) -> tuple[dict[str, OnGrid], float | None, str]:
        """The weights of a block on their grids, the relative error of its output, and a remark for the ledger."""
        assert state.replay is not None
        modules = {layer.name: layer.module for layer in layers}
        block = LearnedBlock(modules, state.replay, lambda: self.token_mask, state.batches, state.dense)
        grids = {layer.name: self._grid(layer, self._initial) for layer in layers}
        if not block.gives_output:
            return {name: grid.now() for name, grid in grids.items()}, None, "its pass ends here; not learned"
        rounded = {layer.name: self._grid(layer, Start(False, "minmax")).now() for layer in layers}
        rate = self.lr or RATES[self.init] / max(1, self.iters)
        descent = Descent(self.iters, rate, self.batch_size, self.seed)
        with block.learning(state.model, {layer.name: self._input_grid(layer) for layer in layers}):
            result = descend(grids, block, descent, [rounded])
        power = block.power or 1.0
        error = result.ended / power
        return result.weights, error, f"block error {result.began / power:.3g}, learned {error:.3g}"

    def _input_grid(self, layer: Layer) -> InputGrid | None:
        args, observer = self._schemes[layer.name].input_activations, self._observers.get(layer.name)
        scales = {name.removeprefix("input_"): scale for name, scale in input_scales(observer, layer.W_RC).items()}
        return None if args is None else InputGrid(args, **scales)

    def _grid(self, layer: Layer, start: Start) -> LearnedGrid:
        W_RC, shared = layer.W_RC, self._pool.get(layer.name)
        H_PCC = shared.statistic.value() if shared is not None and shared.statistic is not None else None
        keep_RC = W_RC != 0 if zeros_stay(W_RC, self.preserve_zeros) else None
        return start(W_RC.clone(), self.weights_of(layer.name), keep_RC, H_PCC, self._globals.of(layer.name))

    def reset(self) -> None:
        super().reset()
        self._tokens = {}
