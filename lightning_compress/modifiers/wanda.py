"""Wanda: prune by |weight| times input norm (Sun et al., 2023, arXiv:2306.11695).

    score_rc = |W_rc| * ||x_c||_2          eq. (1); compared within each output row, or within each group of N:M

||x_c||_2 is the root of H's diagonal. The paper changes no weight that stays; with ``refit_iterations`` those make up
for what is gone (maths/support.py): on the correlated inputs of the tests that halves the error of the layer.

Shapes: R rows (out features), C columns (in features), P partitions of a grouped convolution.
"""

import time
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, State
from lightning_compress.distributed import all_reduce_
from lightning_compress.maths.factor import added_diagonal
from lightning_compress.maths.gathering import Gathering
from lightning_compress.maths.hessian import Shared
from lightning_compress.maths.masks import keep_rows
from lightning_compress.maths.owl import OutlierSurvey
from lightning_compress.maths.pruning import PruningArguments, never_saw_data, share_of_zeros
from lightning_compress.maths.support import refit
from lightning_compress.quant.facts import sqnr_db, weight_error
from lightning_compress.quant.matrix import as_matrix, write_matrix
from lightning_compress.quant.record import quantized_of
from lightning_compress.quant.schemes import check_finite

__all__ = ["WandaPruningModifier", "wanda_mask"]


def wanda_mask(W_RC: Tensor, norm_C: Tensor, sparsity: float, structure: str = "unstructured") -> Tensor:
    """True where the weight survives; zeros that are there never do, and count.

    Args:
        W_RC: Weights.
        norm_C: ||x_c||_2 up to a common factor.
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

    Raises:
        ValueError: A sparsity outside of [0, 1), a pattern whose sparsity is another, a width that it does not divide.
    """

    needs_calibration: ClassVar[bool] = True
    one_pass: ClassVar[bool] = True
    own_pass: ClassVar[bool] = True

    refit_iterations: int = Field(default=0, ge=0)

    _modules: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _gathering: Gathering = PrivateAttr(default_factory=lambda: Gathering({}))
    _survey: OutlierSurvey | None = PrivateAttr(default=None)
    _sparsities: dict[str, float] = PrivateAttr(default_factory=dict)         # of single modules, where they differ
    _moments: WeakKeyDictionary[Shared, Tensor] = PrivateAttr(default_factory=WeakKeyDictionary)

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def surveys(self) -> bool:
        return self.sparsity_profile == "owl"

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert state.model is not None
        self.find(state.model)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        assert state.model is not None
        self._modules = self.find(state.model)
        self._gathering = Gathering(self._modules, self.share_inputs)
        self._survey = OutlierSurvey(self._modules, self.owl_m) if self.surveys else None
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
        for name, module, shared in self._gathering.complete(modules):
            with torch.inference_mode(False), torch.no_grad():
                self._prune_one(state, name, module, shared)
            self.remove_hooks(module)

    def _prune_one(self, state: State, name: str, module: nn.Module, shared: Shared) -> None:
        start = time.perf_counter()
        assert shared.moment is not None
        if quantized_of(module) is not None:
            raise ValueError(f"{name!r} is quantized already: put {self.name} before what quantizes it")
        check_finite({name: module})
        if shared not in self._moments:
            if state.distributed:
                all_reduce_(shared.moment)
            self._moments[shared] = shared.moment.take()
        H_PCC, W_RC = self._moments[shared], as_matrix(module).clone()
        sparsity = self._sparsities.get(name, self.sparsity_of(name, module))
        parts, error, total = [], 0.0, 0.0
        for W, H_CC in zip(W_RC.float().chunk(len(H_PCC)), H_PCC, strict=True):
            keep = wanda_mask(W, H_CC.diagonal().sqrt(), sparsity, self.mask_structure)
            Q = W * keep
            if self.refit_iterations:
                damped_CC = H_CC + added_diagonal(H_CC, self.dampening_frac).diag()
                Q = refit(W, Q, keep, damped_CC, self.refit_iterations)
            Q = Q.to(W_RC.dtype)
            D = W - Q.float()
            error += float(((D @ H_CC) * D).sum())
            total += float(((W @ H_CC) * W).sum())
            parts.append(Q)
        Q_RC = torch.cat(parts)
        write_matrix(module, Q_RC)
        state.ledger.add(
            name,
            "wanda",
            scheme=self.mask_structure,
            sparsity=share_of_zeros(Q_RC),
            error=max(0.0, error) / max(total, torch.finfo().tiny),
            sqnr_db=sqnr_db(weight_error(W_RC, Q_RC)),
            params=W_RC.numel(),
            tokens=shared.moment.tokens,
            seconds=time.perf_counter() - start,
        )
