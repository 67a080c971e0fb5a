"""Wanda: prune by |weight| times input norm (Sun et al., 2023, arXiv:2306.11695).

    score_rc = |W_rc| * ||x_c||_2          eq. (1); compared within each output row, or within each group of N:M

||x_c||_2 is the root of H's diagonal. The paper does not change the remaining weights; with ``refit_iterations`` they
correct the pruned ones (layerwise/least_squares_refit.py): on the correlated inputs of the tests that halves the error
of the layer.

Wanda++ (Yang et al., 2025, arXiv:2503.04992), optional, looks at the whole block:

    score_rc = (alpha G_rc + ||x_c||_2) |W_rc|       G: RMS over samples of the gradient of ||block output||_2
    K times: prune W; M steps of RMSprop on the squared error of the block's output; in the end prune W

Shapes: R rows (out features), C columns (in features).
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lightning_compress.core import Needs, State
from lightning_compress.layerwise.factor import added_diagonal
from lightning_compress.layerwise.layer import Hessian, Layer, Solved
from lightning_compress.layerwise.least_squares_refit import refit
from lightning_compress.layerwise.pruner import LayerwisePruner
from lightning_compress.layerwise.token_weights import Objective
from lightning_compress.modifiers.autoround.block import LearnedBlock
from lightning_compress.modifiers.wanda.regional_refinement import Refinement, refine
from lightning_compress.modifiers.wanda.regional_score import regional_gradients, regional_norm
from lightning_compress.pruning.masks import keep_rows

__all__ = ["WandaPruningModifier", "wanda_mask"]


def wanda_mask(W_RC: Tensor, norm_C: Tensor, sparsity: float, structure: str = "unstructured") -> Tensor:
    """True where the weight survives; weights that are zero already count as pruned.

    Args:
        W_RC: Weights.
        norm_C: ||x_c||_2 up to a common factor; or any factor of |W|, [R, C].
        sparsity: Share that each row loses, in [0, 1): ``floor(sparsity * C)`` weights.
        structure: ``unstructured`` or ``N:M``.
    """
    zero_RC = W_RC == 0
    score_RC = (W_RC.abs() * norm_C).masked_fill_(zero_RC, -1.0)
    return keep_rows(score_RC, sparsity, structure) & ~zero_RC


class WandaPruningModifier(LayerwisePruner):
    """Prune with Wanda on calibration data.

    The other arguments are those of :class:`~lightning_compress.pruning.arguments.PruningArguments`: ``targets``,
    ``ignore``, ``mask_structure``, ``sparsity_profile``, ``owl_m``, ``owl_lmbda``,
    ``refit_iterations`` (0: none, as in the paper), ``dampening_frac`` (of the refit) and ``share_inputs``.

    Args:
        sparsity: Share of zeros in every row, in [0, 1), or a mapping of targets to shares, the best match counting.
            None: 0.5, or with N:M the sparsity of the pattern. Weights that are zero already count, and stay zero.
        objective: ``layer``, ``loss``, ``output`` or ``training_step``: whether tokens are weighed by the gradient of a
            loss in the norms of inputs, as in :class:`~lightning_compress.modifiers.gptq.modifier.GPTQModifier`.
        regional_gradient: alpha, weight of the block's gradients in the score (100 in Wanda++); 0: none. It takes a
            backward pass through each block for every sample.
        regional_rounds: K, how often a block is pruned and then trained on its output (5 in Wanda++); 0: never. The
            result is never worse on the calibration data, and the sparsity is as exact.
        regional_steps: M, steps of RMSprop in each round, one on each calibration batch.
        regional_rate: lr of RMSprop; 3e-7 in Wanda++ for models of 7B.
        regional_seed: Seed of the order of batches.

    Raises:
        ValueError: A sparsity outside of [0, 1) or other than that of the pattern, a width that M does not divide.
    """

    technique: ClassVar[str] = "wanda"

    objective: Objective = "layer"
    refit_iterations: int = Field(default=0, ge=0)
    regional_gradient: float = Field(default=0.0, ge=0)
    regional_rounds: int = Field(default=0, ge=0)
    regional_steps: int = Field(default=32, ge=1)
    # the paper's 3e-7 is for 160 steps of a 7B model; SmolLM2, 2:4, 16 steps of 3e-5: KL 1.94 by Wanda, 1.59 refined
    regional_rate: float = Field(default=3e-5, gt=0)
    regional_seed: int = 0

    @model_validator(mode="after")
    def _rounds_are_set(self) -> "WandaPruningModifier":
        names = self.changed({"regional_steps", "regional_rate", "regional_seed"})
        if names and not self.regional_rounds:
            raise ValueError(f"{', '.join(names)} without regional_rounds would do nothing; give such as 5")
        return self

    @property
    def needs(self) -> Needs:
        needs = super().needs
        return replace(needs, replay=True, team="alone") if self._is_regional else needs

    @property
    def _is_regional(self) -> bool:
        return bool(self.regional_gradient or self.regional_rounds)

    def rows_apart(self, name: str) -> bool:
        return True

    def solve(self, layer: Layer, hessian: Hessian) -> Solved:
        return self._solved(layer, hessian, self._pruned(layer, layer.W_RC.float(), hessian))

    def _pruned(
        self, layer: Layer, W_RC: Tensor, hessian: Hessian, norm: Tensor | None = None, refitted: bool = False
    ) -> Tensor:
        """A weight, pruned, in the dtype of the layer.

        Args:
            layer: The layer.
            W_RC: Its present weight, float32.
            hessian: Hessian of its inputs.
            norm: Factor of |W|; None: ||x_c||_2.
            refitted: True: the weight is refitted already, so it is not refitted again.
        """
        norm = hessian.H_CC.diagonal().sqrt() if norm is None else norm
        keep_RC = wanda_mask(W_RC, norm, self.sparsity_in(layer), self.mask_structure)
        Q_RC = W_RC * keep_RC
        if self.refit_iterations and not refitted:
            damped_CC = hessian.H_CC + added_diagonal(hessian.H_CC, self.dampening_frac).diag()
            Q_RC = refit(W_RC, Q_RC, keep_RC, damped_CC, self.refit_iterations)
        return Q_RC.to(layer.W_RC.dtype)

    def _solved(self, layer: Layer, hessian: Hessian, Q_RC: Tensor, flag: str | None = None) -> Solved:
        W_RC, H_CC = layer.W_RC.float(), hessian.H_CC
        D_RC = W_RC - Q_RC.float()
        return Solved(Q_RC, float(((D_RC @ H_CC) * D_RC).sum()), float(((W_RC @ H_CC) * W_RC).sum()), flag)

    # -- Wanda++: all layers of a block together ----------------------------------------------------------------------

    def solve_seen(self, state: State, names: Iterable[str]) -> None:
        if not self._is_regional:
            super().solve_seen(state, names)
        elif statistics := self.seen(state, names):
            with torch.inference_mode(False), torch.no_grad():
                start = time.perf_counter()
                layers = [replace(layer, W_RC=layer.W_RC.clone()) for layer in self.begin(statistics)]
                hessians = {layer.name: self.prepared(statistics[layer.name], [layer]) for layer in layers}
                parts = {layer.name: layer.parts(len(hessians[layer.name])) for layer in layers}
                solutions = self._solve_block(state, parts, hessians)
                seconds = (time.perf_counter() - start) / len(layers)
                for layer in layers:
                    tokens = hessians[layer.name][0].tokens
                    self.conclude(state, layer, Solved.join(solutions[layer.name]), tokens, seconds)

    def _solve_block(
        self, state: State, layers: Mapping[str, Sequence[Layer]], hessians: Mapping[str, Sequence[Hessian]]
    ) -> dict[str, list[Solved]]:
        """Solutions for each layer of a block, by partition."""
        assert state.replay is not None

        def prune(name: str, W_RC: Tensor, first: bool) -> Tensor:
            problems = zip(layers[name], W_RC.chunk(len(layers[name])), hessians[name], norms[name], strict=True)
            return torch.cat([self._pruned(*problem, refitted=not first) for problem in problems])

        norms: Mapping[str, Sequence[Tensor | None]] = {name: [None] * len(parts) for name, parts in layers.items()}
        dense = {name: torch.cat([part.W_RC for part in parts]) for name, parts in layers.items()}
        weights = {name: prune(name, W_RC.float(), True) for name, W_RC in dense.items()}
        modules = {name: parts[0].module for name, parts in layers.items()}
        block = LearnedBlock(modules, state.replay, lambda: self.token_mask, state.batches, None)
        flag = "its pass ends here; pruned by itself"
        if block.gives_output:
            how = Refinement(self.regional_rounds, self.regional_steps, self.regional_rate, self.regional_seed)
            with block.learning(state.model, {}):
                if self.regional_gradient:
                    norms = self._norms(block, dense, hessians)
                result = refine(block, dense, weights, prune, how)
            power, weights = block.power or 1.0, result.weights
            flag = f"block error by Wanda {result.began / power:.3g}, by Wanda++ {result.ended / power:.3g}"
        return {
            name: [
                self._solved(layer, hessian, Q_RC, flag)
                for layer, hessian, Q_RC in zip(parts, hessians[name], weights[name].chunk(len(parts)), strict=True)
            ]
            for name, parts in layers.items()
        }

    def _norms(
        self, block: LearnedBlock, dense: Mapping[str, Tensor], hessians: Mapping[str, Sequence[Hessian]]
    ) -> dict[str, list[Tensor]]:
        """The factors of |W|, by layer and partition."""
        norms = {}
        for name, gradient in regional_gradients(block, dense).items():
            parts = zip(hessians[name], gradient.value().chunk(len(hessians[name])), strict=True)
            norms[name] = [
                regional_norm(h.H_CC.diagonal(), h.tokens, gradient.samples, G_RC, self.regional_gradient)
                for h, G_RC in parts
            ]
        return norms
