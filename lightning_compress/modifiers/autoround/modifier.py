"""AutoRound: rounding and clipping of a block's weights, learned by sign descent on the block's output.

Cheng et al., 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
arXiv:2309.05516:

    min_{V, alpha, beta}  || B(X; Q(W)) - B*(X*) ||^2                           over the tokens that count
    q = s (clip(round(w / s + V + z)) - z),   V in [-1/2, 1/2],   alpha, beta in [1/2, 1] shrink the range (grid.py)
    V <- V - lr_t sign(dL/dV),   lr_t = lr (1 - t / iters)                      alpha, beta likewise (descent.py)

B* is the dense block and X* its input in the dense model, B the block being quantized and X its input behind quantized
blocks, so that each block also makes up for those before it. All weights of a block are learned together. Iterate 0 is
rounding to nearest, or GPTQ's solution; the result is never worse than either on the calibration data.

Modules behind the last block are learned by the model's output; those in front of the first one stay as they began.

Shapes: R rows, C columns.
"""

import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationScheme
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.layers.matrix import as_matrix, input_layout, inputs_as_rows, only_input, write_matrix
from lightning_compress.layerwise.input_hessian import HessianPool
from lightning_compress.modifiers.autoround.block import LearnedBlock
from lightning_compress.modifiers.autoround.descent import Descent, descend
from lightning_compress.modifiers.autoround.grid import LearnedGrid, OnGrid
from lightning_compress.modifiers.autoround.initial_grids import Start
from lightning_compress.modifiers.gptq.solver import ScaleSearch
from lightning_compress.pruning.arguments import share_of_zeros, zeros_stay
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.record import Quantized, attach
from lightning_compress.quant.rounding import check_dense, round_module
from lightning_compress.quant.schemes import describe
from lightning_compress.quant.weight_metrics import weight_facts

__all__ = ["AutoRoundModifier"]

# lr times iters. The demo's model at 2 bits, 100 steps from GPTQ: KL to the dense model .00286 at first, .00262 with
# 0.05; with 0.2, and with 1 in 200 steps, no iterate was better than the first one
RATES = {"rtn": 1.0, "gptq": 0.05}


class AutoRoundModifier(QuantizationArguments, Modifier):
    """Quantize weights to integers; which way each is rounded is learned block by block.

    Args:
        targets: Class names, dotted names or ``re:`` patterns of what is quantized, with ``scheme``.
        ignore: The same, for what is left out.
        scheme: A preset of integers (``W4A16``, ``W2A16`` ...), or a mapping of presets to their targets.
        group_size: Takes the place of the preset's group size; -1 for one scale per row; ``auto`` or a list of
            sizes for one that fits each module.
        config_groups: Schemes in full, in place of ``scheme``.
        iters: Steps for each block; 0 leaves it as it began.
        lr: Of the first step, falling to 0. None: from ``rtn`` 1 / ``iters``, so that V can just get to its bound; from
            ``gptq`` a twentieth of that, since columns that make up for each other must move together.
        batch_size: Samples a step: as many calibration batches as hold them, at least one.
        seed: Of the order of the batches.
        init: What the descent begins with: ``gptq``, or ``rtn``, rounding to nearest.
        scale_search: The scales it begins with, as for GPTQModifier: ``hessian``, ``mse`` or ``minmax``.
        target: The output that is aimed at: ``dense``: of the block in the dense model. ``same_input``: of the dense
            block on what it gets behind quantized blocks.
        preserve_zeros: Weights that are zero stay zero, so that a pruned model stays pruned. None: in the modules of
            which at least a third of the weights are.
    """

    iters: int = Field(default=200, ge=0)
    lr: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=8, ge=1)
    seed: int = 0
    init: Literal["rtn", "gptq"] = "gptq"
    scale_search: ScaleSearch = "hessian"
    target: Literal["dense", "same_input"] = "dense"
    preserve_zeros: bool | None = None

    _schemes: dict[str, QuantizationScheme] = PrivateAttr(default_factory=dict)  # what is left to do
    _modules: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _tokens: dict[str, int] = PrivateAttr(default_factory=dict)
    _pool: HessianPool = PrivateAttr(default_factory=HessianPool)

    @model_validator(mode="after")
    def _scheme_is_learnable(self) -> "AutoRoundModifier":
        for scheme in self.schemes:
            assert scheme.weights is not None
            if scheme.weights.type != "int":
                raise ValueError(
                    f"{describe(scheme)} is no grid of integers, which is what AutoRound rounds to; take an integer "
                    f"scheme such as W4A16, or GPTQModifier for this one"
                )
        if self.has_static_inputs:
            raise ValueError(
                "static activations are not calibrated while the rounding is learned; take a scheme whose activations "
                "are dynamic, or none, or GPTQModifier for this one"
            )
        return self

    @property
    def needs(self) -> Needs:
        return Needs(data=True, own_pass=True, dense_outputs=self.target == "dense")

    @property
    def _begin(self) -> Start:
        return Start(self.init == "gptq", self.scale_search)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert state.model is not None
        self.assign(state.model)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        assert state.model is not None
        self._schemes = self.assign(state.model)
        self._modules = {name: state.model.get_submodule(name) for name in self._schemes}
        self._pool = HessianPool()
        for name, module in self._modules.items():
            self.hook(module, lambda module, inputs, name=name: self._observe(name, module, inputs))

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        seen = [name for name in state.modules if name in self._schemes and self._tokens.get(name)]
        if not seen:
            return
        if state.replay is None:
            raise ValueError(
                f"{self.name} must run block {state.block_name!r} again to learn its rounding, but its inputs are "
                f"gone; calibrate with walk='two_pass' or walk='auto'"
            )
        with torch.inference_mode(False), torch.no_grad():
            self._learn(state, seen)
        self._pool.drop(*seen)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        unseen = list(self._schemes)
        for name in unseen:
            facts = round_module(name, self._modules[name], self._schemes[name], self.scale_search)
            state.ledger.add(name, "autoround", flag="never saw data; rounded to nearest", tokens=0, **facts)
        if unseen:
            warnings.warn(
                f"{self.name}: {', '.join(unseen)} never saw data and were rounded to nearest; were they called, in "
                f"these batches, as modules of their own?",
                stacklevel=2,
            )
        self._schemes, self._modules, self._tokens, self._pool = {}, {}, {}, HessianPool()
        self.remove_hooks()

    def _observe(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, mask = only_input(name, inputs), self.token_mask
        X_PNC = inputs_as_rows(module, x, mask)
        self._tokens[name] = self._tokens.get(name, 0) + X_PNC.shape[1]
        if self._begin.needs_hessian:
            self._pool.update(name, x, input_layout(module), lambda: X_PNC)

    # -- one block ----------------------------------------------------------------------------------------------------

    def _learn(self, state: State, names: Sequence[str]) -> None:
        """All weights of the block that have seen data."""
        began = time.perf_counter()
        assert state.model is not None
        assert state.replay is not None
        modules = {name: self._modules[name] for name in names}
        dense = {name: as_matrix(module).clone() for name, module in modules.items()}
        block = LearnedBlock(modules, state.replay, lambda: self.token_mask, state.batches, state.dense)
        grids = {name: self._grid(name, self._begin) for name in names}
        found, flag, error = {name: grid.now() for name, grid in grids.items()}, "its pass ends here; not learned", None
        if block.gives_output:
            rounded = {name: self._grid(name, Start(False, "minmax")).now() for name in names}
            rate = self.lr or RATES[self.init] / max(1, self.iters)
            how = Descent(self.iters, rate, self.batch_size, self.seed)
            with block.learning(state.model, {name: self._schemes[name].input_activations for name in names}):
                result = descend(grids, block, how, [rounded])
            found, power = result.found, block.power or 1.0
            error = result.ended / power
            flag = f"block error {result.began / power:.3g}, learned {error:.3g}"
        seconds = (time.perf_counter() - began) / len(names)
        for name in names:
            self._write(state, name, dense[name], found[name], flag, {"error": error, "seconds": seconds})

    def _grid(self, name: str, start: Start) -> LearnedGrid:
        module, args = self._modules[name], self._schemes[name].weights
        assert args is not None
        check_dense(name, module)
        W_RC, shared = as_matrix(module), self._pool.get(name)
        H_PCC = shared.statistic.value() if shared is not None and shared.statistic is not None else None
        return start(W_RC.clone(), args, W_RC != 0 if zeros_stay(W_RC, self.preserve_zeros) else None, H_PCC)

    def _write(self, state: State, name: str, W_RC: Tensor, found: OnGrid, flag: str, facts: dict[str, Any]) -> None:
        module, scheme = self._modules[name], self._schemes.pop(name)
        quantized, Q_RC = Quantized(scheme, found.scale, found.zero_point), found.value()
        facts = {**weight_facts(W_RC, Q_RC, quantized), **facts, "tokens": self._tokens.pop(name)}
        if zeros_stay(W_RC, self.preserve_zeros):
            facts["sparsity"] = share_of_zeros(Q_RC)
        write_matrix(module, Q_RC)
        attach(module, quantized)
        self.remove_hooks(module)
        state.ledger.add(name, "autoround", flag=flag, **facts)
