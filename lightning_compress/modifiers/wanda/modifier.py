"""Wanda: prune by |weight| times input norm (Sun et al., 2023, arXiv:2306.11695).

    score_rc = |W_rc| * ||x_c||_2          eq. (1); compared within each output row, or within each group of N:M

||x_c||_2 is the root of H's diagonal. The paper changes no weight that stays; with ``refit_iterations`` those make up
for what is gone (layerwise/least_squares_refit.py): on the correlated inputs of the tests that halves the error of
the layer.

Wanda++ (Yang et al., 2025, arXiv:2503.04992), optional, looks at the whole block:

    score_rc = (alpha G_rc + ||x_c||_2) |W_rc|       G: RMS over samples of the gradient of ||block output||_2
    K times: prune W; M steps of RMSprop on the squared error of the block's output; in the end prune W

Shapes: R rows (out features), C columns (in features), P partitions of a grouped convolution.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.distributed import all_reduce_
from lightning_compress.layers.matrix import as_matrix, write_matrix
from lightning_compress.layerwise.factor import added_diagonal
from lightning_compress.layerwise.hessian_collector import Gathering
from lightning_compress.layerwise.input_hessian import PerShared, Shared
from lightning_compress.layerwise.least_squares_refit import refit
from lightning_compress.layerwise.owl import OutlierSurvey
from lightning_compress.modifiers.autoround.block import LearnedBlock
from lightning_compress.modifiers.wanda.regional_refinement import Refinement, refine
from lightning_compress.modifiers.wanda.regional_score import regional_gradients, regional_norm
from lightning_compress.pruning.arguments import PruningArguments, never_saw_data, share_of_zeros
from lightning_compress.pruning.masks import keep_rows
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import check_finite
from lightning_compress.quant.weight_metrics import sqnr_db, weight_error

__all__ = ["WandaPruningModifier", "wanda_mask"]


def wanda_mask(W_RC: Tensor, norm_C: Tensor, sparsity: float, structure: str = "unstructured") -> Tensor:
    """True where the weight survives; zeros that are there never do, and count.

    Args:
        W_RC: Weights.
        norm_C: ||x_c||_2 up to a common factor; or [R, C], what else |W| shall be multiplied by.
        sparsity: Share that each row loses, in [0, 1): ``floor(sparsity * C)`` weights.
        structure: ``unstructured`` or ``N:M``.
    """
    zero_RC = W_RC == 0
    score_RC = (W_RC.abs() * norm_C).masked_fill_(zero_RC, -1.0)
    return keep_rows(score_RC, sparsity, structure) & ~zero_RC


class WandaPruningModifier(PruningArguments, Modifier):
    """Prune with Wanda on calibration data.

    Args:
        targets: Class names, dotted names or ``re:`` patterns of what is pruned; with ``sparsity`` as a mapping the
            targets stand there.
        ignore: The same, for what is left out.
        sparsity: Share of zeros in every row, in [0, 1), or a mapping of targets to shares, the best match counting.
            None: 0.5, and with N:M what the pattern has. Zeros that are there count, and stay.
        mask_structure: ``unstructured``, or ``N:M``: of every M consecutive columns N are kept.
        sparsity_profile: ``owl``: blocks with many outliers keep more weights; the share of all targets together stays
            ``sparsity``. It takes one more pass over the data. None: all alike.
        owl_m: Of ``owl``: an outlier is so many times the mean of its block.
        owl_lmbda: Of ``owl``: blocks differ by at most twice this share.
        refit_iterations: Of conjugate gradients for the weights that are kept; 0: none, as in the paper.
        dampening_frac: Of the refit: share of the mean diagonal of H that is added to its diagonal.
        share_inputs: One H for modules that receive the very same tensor (query, key, value; gate, up).
        regional_gradient: alpha, weight of the block's own gradients in the score (Wanda++ takes 100); 0: none. It
            takes a backward pass through each block for every sample.
        regional_rounds: K, how often a block is pruned and then trained on its output (Wanda++ takes 5); 0: never.
            The result is never worse than without, on the calibration data, and the sparsity is as exact.
        regional_steps: M, steps of RMSprop in each round, one on each calibration batch.
        regional_rate: lr of RMSprop; Wanda++ takes 3e-7 for models of 7B.
        regional_seed: Of the order of batches.

    Raises:
        ValueError: A sparsity outside of [0, 1), a pattern whose sparsity is another, a width that it does not divide.
    """

    refit_iterations: int = Field(default=0, ge=0)
    regional_gradient: float = Field(default=0.0, ge=0)
    regional_rounds: int = Field(default=0, ge=0)
    regional_steps: int = Field(default=32, ge=1)
    # the paper's 3e-7 is for 160 steps of a 7B model; SmolLM2, 2:4, 16 steps of 3e-5: KL 1.94 by Wanda, 1.59 refined
    regional_rate: float = Field(default=3e-5, gt=0)
    regional_seed: int = 0

    _modules: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _gathering: Gathering = PrivateAttr(default_factory=lambda: Gathering({}))
    _survey: OutlierSurvey | None = PrivateAttr(default=None)
    _sparsities: dict[str, float] = PrivateAttr(default_factory=dict)  # of single modules, where they differ
    _moments: PerShared[Tensor] = PrivateAttr(default_factory=PerShared)

    @model_validator(mode="after")
    def _rounds_are_asked_for(self) -> "WandaPruningModifier":
        given = self.changed({"regional_steps", "regional_rate", "regional_seed"})
        if given and not self.regional_rounds:
            raise ValueError(f"{', '.join(given)} without regional_rounds would do nothing; give such as 5")
        return self

    @property
    def needs(self) -> Needs:
        regional = bool(self.regional_gradient or self.regional_rounds)
        return Needs(data=True, one_pass=True, own_pass=True, replay=regional, survey=self.sparsity_profile == "owl")

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert state.model is not None
        self.find(state.model)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        assert state.model is not None
        self._modules = self.find(state.model)
        self._gathering = Gathering(self._modules, self.share_inputs)
        self._survey = OutlierSurvey(self._modules, self.owl_m) if self.needs.survey else None
        for name, module in self._modules.items():
            statistic = self._survey or self._gathering
            self.hook(module, lambda _, inputs, name=name, s=statistic: s.observe(name, inputs, self.token_mask))

    def on_block_surveyed(self, state: State, event: Event, **kwargs: Any) -> None:
        assert self._survey is not None
        targets = {name: module for name, module in state.modules.items() if name in self._modules}
        self._survey.close(state.block_name, targets)
        self._sparsities = self._survey.sparsities(self.mean_sparsity, self.owl_lmbda)
        for name, module in targets.items():
            self.remove_hooks(module)
            self.hook(module, lambda _, inputs, name=name: self._gathering.observe(name, inputs, self.token_mask))

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        self._prune(state, state.modules)

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._prune(state, state.modules)
        self._gathering.drop(state.modules)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._prune(state, self._modules)
        for name, module in self._gathering.left.items():
            W_RC = as_matrix(module)
            facts = {"sparsity": share_of_zeros(W_RC), "params": W_RC.numel(), "tokens": 0}
            state.ledger.add(name, "wanda", flag="never saw data; left as it was", **facts)
        if unseen := list(self._gathering.left):
            warnings.warn(never_saw_data(self.name, unseen), stacklevel=2)
        self._modules, self._gathering, self._survey, self._sparsities = {}, Gathering({}), None, {}
        self._moments.clear()
        self.remove_hooks()

    def _prune(self, state: State, modules: Mapping[str, nn.Module]) -> None:
        found = [Pruned(*done) for done in self._gathering.complete(modules)]
        with torch.inference_mode(False), torch.no_grad():
            if self.needs.replay:
                self._prune_block(state, {one.name: one for one in found})
                return
            for one in found:
                start = time.perf_counter()
                self._begin(state, one)
                one.Q_RC = self._sparse(one, one.W_RC.float())
                self._finish(state, one, start)

    def _begin(self, state: State, one: "Pruned") -> None:
        """The dense weight and H."""
        shared = one.shared
        assert shared.moment is not None
        if Quantized.of(one.module) is not None:
            raise ValueError(f"{one.name!r} is quantized already: put {self.name} before what quantizes it")
        check_finite({one.name: one.module})
        if shared not in self._moments:
            if state.distributed:
                all_reduce_(shared.moment)
            self._moments[shared] = shared.moment.take()
        one.H_PCC, one.W_RC, one.tokens = self._moments[shared], as_matrix(one.module).clone(), shared.moment.tokens

    def _sparse(
        self, one: "Pruned", W_RC: Tensor, norms: Sequence[Tensor] | None = None, again: bool = False
    ) -> Tensor:
        """A weight, float32, pruned, in the dtype of the module.

        Args:
            one: The module.
            W_RC: The weight as it is now.
            norms: By partition what |W| is multiplied by; None: ||x_c||_2.
            again: It was refitted before; else that is done if asked for.
        """
        sparsity, parts = self._sparsities.get(one.name, self.sparsity_of(one.name, one.module)), []
        for p, (W, H_CC) in enumerate(zip(W_RC.chunk(len(one.H_PCC)), one.H_PCC, strict=True)):
            keep = wanda_mask(W, H_CC.diagonal().sqrt() if norms is None else norms[p], sparsity, self.mask_structure)
            Q = W * keep
            if self.refit_iterations and not again:
                damped_CC = H_CC + added_diagonal(H_CC, self.dampening_frac).diag()
                Q = refit(W, Q, keep, damped_CC, self.refit_iterations)
            parts.append(Q.to(one.W_RC.dtype))
        return torch.cat(parts)

    def _finish(self, state: State, one: "Pruned", start: float, flag: str | None = None) -> None:
        """Write the weight, and the row of the ledger; ``start`` is when the work on it began."""
        error, total = 0.0, 0.0
        matrices = one.W_RC.float(), one.Q_RC.float()
        for W, Q, H_CC in zip(*(M.chunk(len(one.H_PCC)) for M in matrices), one.H_PCC, strict=True):
            D = W - Q
            error += float(((D @ H_CC) * D).sum())
            total += float(((W @ H_CC) * W).sum())
        write_matrix(one.module, one.Q_RC)
        state.ledger.add(
            one.name,
            "wanda",
            scheme=self.mask_structure,
            sparsity=share_of_zeros(one.Q_RC),
            error=max(0.0, error) / max(total, torch.finfo(torch.float32).tiny),
            sqnr_db=sqnr_db(weight_error(one.W_RC, one.Q_RC)),
            params=one.W_RC.numel(),
            tokens=one.tokens,
            seconds=time.perf_counter() - start,
            **({} if flag is None else {"flag": flag}),
        )
        self.remove_hooks(one.module)
        one.W_RC = one.Q_RC = one.H_PCC = torch.empty(0, dtype=torch.float32)

    def _prune_block(self, state: State, found: Mapping[str, "Pruned"]) -> None:
        """Wanda++: all modules of a block together."""
        if not found:
            return
        start = time.perf_counter()
        assert state.model is not None
        assert state.replay is not None
        for one in found.values():
            self._begin(state, one)
            one.Q_RC = self._sparse(one, one.W_RC.float())
        modules = {name: one.module for name, one in found.items()}
        block = LearnedBlock(modules, state.replay, lambda: self.token_mask, state.batches, None)
        flag = "its pass ends here; pruned by itself"
        if block.gives_output:
            dense = {name: one.W_RC for name, one in found.items()}
            how = Refinement(self.regional_rounds, self.regional_steps, self.regional_rate, self.regional_seed)
            with block.learning(state.model, {}):
                norms = self._norms(state, found, block) if self.regional_gradient else {}
                result = refine(
                    block,
                    dense,
                    {name: one.Q_RC for name, one in found.items()},
                    lambda name, W_RC, first: self._sparse(found[name], W_RC, norms.get(name), again=not first),
                    how,
                )
            power = block.power or 1.0
            flag = f"block error by Wanda {result.began / power:.3g}, by Wanda++ {result.ended / power:.3g}"
            for name, Q_RC in result.found.items():
                found[name].Q_RC = Q_RC
        start += (time.perf_counter() - start) * (1 - 1 / len(found))  # its share of the block's time
        for one in found.values():
            self._finish(state, one, start, flag)

    def _norms(self, state: State, found: Mapping[str, "Pruned"], block: LearnedBlock) -> dict[str, list[Tensor]]:
        """By module and partition what |W| is multiplied by."""
        norms = {}
        for name, gradient in regional_gradients(block, {name: one.W_RC for name, one in found.items()}).items():
            if state.distributed:
                all_reduce_(gradient)
            one, samples, alpha = found[name], gradient.samples, self.regional_gradient
            parts = zip(one.H_PCC, gradient.value().chunk(len(one.H_PCC)), strict=True)
            norms[name] = [regional_norm(H_CC.diagonal(), one.tokens, samples, G_RC, alpha) for H_CC, G_RC in parts]
        return norms


@dataclass
class Pruned:
    """One module while it is pruned.

    Args:
        name: Its dotted name.
        module: The module.
        shared: The statistic of its inputs.
        W_RC: The dense weight in its own dtype.
        H_PCC: H by partition.
        Q_RC: The pruned weight.
        tokens: How many H is of.
    """

    name: str
    module: nn.Module
    shared: Shared
    W_RC: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    H_PCC: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    Q_RC: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    tokens: int = 0
