"""GPTQ: round column after column, each time moving the error onto the columns still to come.

Frantar et al., 2022, arXiv:2210.17323; in the LDL form of Chee et al., 2023 (QuIP, arXiv:2307.13304), which gives the
same codes with one Cholesky factorization and no inverse:

    H   = E[x x^T] + lambda I                          lambda = dampening_frac * mean(diag E[x x^T])
    H   = U diag(p)^2 U^T                              U upper triangular with ones on its diagonal
    a_j = w_j + sum_{k<j} (w_k - q_k) U_kj             column j, adjusted for all errors made so far
    q_j = nearest point of the grid to a_j
    (W - Q) H (W - Q)^T = sum_j p_j^2 (a_j - q_j)^2    the loss, per row, for free

With ``actorder`` columns go in order of falling H_jj. Scales are fixed before, per group of neighbouring columns, so
that the order leaves no trace in the result. A column whose input is always zero has H_jj = lambda and no ties to the
others: it is rounded to nearest.

The loop works on W^T, whose columns lie contiguous, and hands errors on in two levels: within 16 columns one by one,
to the rest of the block of 128 by a GEMM every 16 columns, to all others by a GEMM every block.

Shapes: R rows, C columns (inputs), G groups of g columns, P partitions of a grouped convolution.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, State
from lightning_compress.distributed import all_reduce_
from lightning_compress.maths.factor import Factor, energy, factorize_each
from lightning_compress.maths.hessian import MomentPool, Shared
from lightning_compress.maths.pruning import share_of_zeros
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.facts import weight_facts
from lightning_compress.quant.fake_quant import latent_of
from lightning_compress.quant.formats import is_microscaled, round_float_, stored_as
from lightning_compress.quant.matrix import (
    as_matrix,
    input_layout,
    inputs_as_rows,
    only_input,
    partitions,
    write_matrix,
)
from lightning_compress.quant.observers import Observer, ObserverName, is_observed, make_observer
from lightning_compress.quant.record import Quantized, attach
from lightning_compress.quant.rounding import check_dense, find_scales, input_scales, round_module
from lightning_compress.quant.scales import expand, group_columns, integer_range
from lightning_compress.quant.schemes import no_group_order
from lightning_compress.quant.shared_scales import GlobalScales

__all__ = ["GPTQModifier", "adjusted", "output_error", "round_columns"]

SUB_BLOCK = 16
PROPOSALS_UP_TO = 3                       # bits; see GPTQModifier._proposals
STACKED = 4096           # rows of one column loop: as fast as 9216 at 576 columns (0.13 s), at half the memory
PRUNED = 1 / 3           # share of zeros from which on a weight is taken for pruned


def round_columns(
    W_RC: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    args: QuantizationArgs,
    factor: Factor,
    block: int = 128,
    dtype: torch.dtype | None = None,
    keep_RC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GPTQ with fixed scales.

    Args:
        W_RC: Weights, in the dtype of the factor.
        scale: [R, G], [R, 1] or [1], already rounded to the dtype that stores it.
        zero_point: As scale, or None.
        args: The grid.
        factor: Of the damped H.
        block: Columns after which errors reach all columns still to come.
        dtype: In which the result is stored: errors are measured against what will be stored.
        keep_RC: False where the result is zero, and the columns still to come make up for it; bool, or None.

    Returns:
        Q [R, C], dequantized, and for each row the loss (w - q) H (w - q)^T with the damped H, [R].
    """
    R, C = W_RC.shape
    W_CR = W_RC.t().contiguous().index_select(0, factor.order_C)
    A_CR, Q_CR, UT_CC = W_CR.clone(), torch.empty_like(W_CR), factor.UT_CC
    D_bR = W_CR.new_empty(min(block, C), R)
    groups = (factor.order_C // group_columns(args, C)).tolist()
    scales = [s.contiguous() for s in expand(scale, R, args).to(W_RC.dtype).unbind(1)]
    zeros = None
    if zero_point is not None:
        zeros = [z.contiguous() for z in expand(zero_point, R, args).to(W_RC.dtype).unbind(1)]
    gone = None if keep_RC is None else (~keep_RC).t().index_select(0, factor.order_C).unbind(0)
    nearest_ = _Nearest(args, W_RC.dtype if dtype is None else dtype)
    a_rows, q_rows, w_rows, d_rows = A_CR.unbind(0), Q_CR.unbind(0), W_CR.unbind(0), D_bR.unbind(0)
    for i1 in range(0, C, block):
        i2 = min(i1 + block, C)
        for j1 in range(i1, i2, SUB_BLOCK):
            j2 = min(j1 + SUB_BLOCK, i2)
            # From column k to all of the sub-block, zero up to k itself: to add zeros there is quicker than to slice.
            hand_on = UT_CC[j1:j2, j1:j2].tril(-1).t().contiguous().unbind(0)
            A_sub = A_CR[j1:j2]
            for j in range(j1, j2):
                group, a, q, d = groups[j], a_rows[j], q_rows[j], d_rows[j - i1]
                nearest_(a, scales[group], None if zeros is None else zeros[group], q)
                if gone is not None:
                    q.masked_fill_(gone[j], 0)
                torch.sub(w_rows[j], q, out=d)
                A_sub.addr_(hand_on[j - j1], d)
            if j2 < i2:
                A_CR[j2:i2].addmm_(UT_CC[j2:i2, j1:j2], D_bR[j1 - i1 : j2 - i1])
        if i2 < C:
            A_CR[i2:].addmm_(UT_CC[i2:, i1:i2], D_bR[: i2 - i1])
    loss_R = factor.pivot_C.square() @ A_CR.sub_(Q_CR).square_()
    A_CR.index_copy_(0, factor.order_C, Q_CR)                                  # back into the order of the columns
    return A_CR.t().contiguous(), loss_R


def output_error(W_RC: Tensor, Q_RC: Tensor, loss_R: Tensor, factor: Factor) -> tuple[float, float]:
    """The traces of (W - Q) H (W - Q)^T and of W H W^T, with H as it was before damping.

    The second costs half as much as the column loop. A sample of rows will not do: single rows carry most of it, and
    128 of 576 rows of SmolLM2's projections were off by up to a factor of four.

    Args:
        W_RC: The weight.
        Q_RC: What GPTQ made of it.
        loss_R: (w - q) H (w - q)^T of each row with the damped H.
        factor: Of the damped H.
    """
    error = loss_R - (W_RC - Q_RC).square_() @ factor.added_C
    total = energy(W_RC, factor) - W_RC.square() @ factor.added_C
    return max(0.0, float(error.sum())), float(total.sum())


def adjusted(W_RC: Tensor, Q_RC: Tensor, factor: Factor) -> Tensor:
    """a_j = w_j + sum_{k<j} (w_k - q_k) U_kj, [R, C]: what was rounded to Q, column after column.

    Args:
        W_RC: The weight.
        Q_RC: What GPTQ made of it.
        factor: Of the damped H.
    """
    W_RC, D_RC = (t.index_select(1, factor.order_C) for t in (W_RC, W_RC - Q_RC))
    A_RC = torch.addmm(W_RC, D_RC, factor.UT_CC.tril(-1).t())
    return torch.empty_like(A_RC).index_copy_(1, factor.order_C, A_RC)


class _Nearest:
    """Nearest grid point of a column, written into ``out``, in the order of operations of compressed-tensors."""

    def __init__(self, args: QuantizationArgs, stored: torch.dtype):
        self.low, self.high = integer_range(args)
        self.args, self.stored = args, stored

    def __call__(self, a_R: Tensor, s_R: Tensor, z_R: Tensor | None, out: Tensor) -> None:
        torch.div(a_R, s_R, out=out)
        if self.args.type == "float":
            round_float_(out, self.args.num_bits)
        elif z_R is None:
            out.round_().clamp_(self.low, self.high)
        else:
            out.add_(z_R).round_().clamp_(self.low, self.high).sub_(z_R)
        out.mul_(s_R)
        if self.stored != out.dtype or is_microscaled(self.args):
            out.copy_(stored_as(out, self.args, self.stored))


class GPTQModifier(QuantizationArguments, Modifier):
    """Quantize weights with GPTQ on calibration data.

    Args:
        targets: Class names, dotted names or ``re:`` patterns of what is quantized, with ``scheme``.
        ignore: The same, for what is left out.
        scheme: A preset (``W4A16``, ``W8A8`` ...), or a mapping of presets to their targets.
        group_size: Takes the place of the preset's group size; -1 for one scale per row.
        config_groups: Schemes in full, in place of ``scheme``.
        block_size: Columns after which errors reach all columns still to come; changes speed, not results.
        dampening_frac: Share of the mean diagonal of H that is added to its diagonal.
        actorder: ``static`` (= ``weight``): columns with large inputs first; None: from left to right.
        scale_search: ``hessian``: per row and group the scale with the least sum_j H_jj (w_j - q_j)^2; up to 3 bits
            that, the min-max scale, or the mean of the two: what loses least when the row is rounded. ``mse``: the
            least sum |w_j - q_j|^2.4. ``minmax``: from the extremes, as llm-compressor does.
        on_failure: When H is not positive definite: ``raise``; ``retry`` with ten times the damping, up to 1.0, then
            raise; ``round`` to nearest. The ledger says what was done.
        share_inputs: One H for modules that receive the very same tensor (query, key, value; gate, up).
        observer: How static activation scales are found: ``minmax``, ``moving_average`` or ``mse``.
        averaging_constant: Of ``moving_average``: the weight of the newest batch.
        preserve_zeros: Weights that are zero stay zero, so that a pruned model stays pruned. None: in the modules of
            which at least a third of the weights are.
        keep_latents: Keep beside each weight the values that were rounded to it, for a QATModifier that goes on from
            there. They take the memory of the weights once more, and are never saved.
        start: Not after training but before the batch at ``start``, in ``unit``: for a QATModifier that stands after
            it in the recipe, with the same scheme, start and unit, and goes on from its result.
    """

    needs_calibration: ClassVar[bool] = True
    every_format: ClassVar[bool] = True
    one_pass: ClassVar[bool] = True

    block_size: int = Field(default=128, ge=1)
    dampening_frac: float = Field(default=0.01, ge=0)
    actorder: Literal["static", "weight"] | None = "static"
    scale_search: Literal["minmax", "mse", "hessian"] = "hessian"
    on_failure: Literal["raise", "retry", "round"] = "raise"
    share_inputs: bool = True
    observer: ObserverName = "minmax"
    averaging_constant: float = Field(default=0.01, gt=0, le=1)
    preserve_zeros: bool | None = None
    keep_latents: bool = False

    _schemes: dict[str, QuantizationScheme] = PrivateAttr(default_factory=dict)       # what is left to do
    _modules: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _observers: dict[str, Observer] = PrivateAttr(default_factory=dict)
    _globals: GlobalScales = PrivateAttr(default_factory=lambda: GlobalScales({}, {}))
    _pool: MomentPool = PrivateAttr(default_factory=MomentPool)
    _factors: WeakKeyDictionary[Shared, list[Factor] | None] = PrivateAttr(default_factory=WeakKeyDictionary)

    @field_validator("actorder", mode="before")
    @classmethod
    def _order_is_static(cls, actorder: Any) -> Any:
        if isinstance(actorder, str) and actorder.lower() in ("group", "dynamic"):
            raise ValueError(no_group_order(actorder))
        return actorder

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def hands_over(self) -> bool:
        return self.start is not None

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert state.model is not None
        self.assign(state.model)
        for scheme in self.schemes:
            self._ordered(scheme)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        assert state.model is not None
        assigned = self.assign(state.model)
        ordered = {id(scheme): self._ordered(scheme) for scheme in assigned.values()}
        self._schemes = {name: ordered[id(scheme)] for name, scheme in assigned.items()}
        self._modules = {name: state.model.get_submodule(name) for name in self._schemes}
        self._pool = MomentPool(self.share_inputs)
        self._globals = GlobalScales(self._modules, self._schemes)
        for name, module in self._modules.items():
            args = self._schemes[name].input_activations
            if is_observed(args):
                self._observers[name] = make_observer(self.observer, args, self.averaging_constant)
            self.hook(module, lambda module, inputs, name=name: self._observe(name, module, inputs))

    def _ordered(self, scheme: QuantizationScheme) -> QuantizationScheme:
        """The scheme with the column order written into it, as readers of the export expect."""
        weights = scheme.weights
        assert weights is not None
        order = weights.actorder
        if order is not None and "actorder" in self.model_fields_set and self.actorder not in ("static", "weight"):
            raise ValueError(f"actorder={self.actorder} of the modifier contradicts actorder={order!r} of the scheme")
        return scheme.model_copy(update={"weights": weights.model_copy(update={"actorder": order or self.actorder})})

    def _observe(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = only_input(name, inputs)
        self._pool.update(name, x, input_layout(module), lambda: inputs_as_rows(module, x, self.token_mask))
        if name in self._observers:
            self._observers[name].update(inputs_as_rows(module, x, self.token_mask))

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        self._pool.drop_stale()
        self._solve(state, state.modules)

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._solve(state, state.modules)
        self._pool.drop(*state.modules)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._solve(state, self._modules)
        unseen = list(self._schemes)
        for name in unseen:
            if name in self._observers:                        # without a static input scale no reader could use it
                state.ledger.add(name, "gptq", flag="never saw data; left as it was", tokens=0)
            else:
                self._round(state, name, "never saw data; rounded to nearest")
        if unseen:
            warnings.warn(
                f"{self.name}: {', '.join(unseen)} never saw data and were rounded to nearest (with static "
                f"activations: left as they were); were they called, in these batches, as modules of their own? "
                f"(nn.MultiheadAttention uses the weight of its out_proj directly)",
                stacklevel=2,
            )
        self._schemes, self._modules, self._observers, self._pool = {}, {}, {}, MomentPool()
        self._globals = GlobalScales({}, {})
        self._factors.clear()
        self.remove_hooks()

    def _solve(self, state: State, modules: Mapping[str, nn.Module]) -> None:
        """Quantize those of ``modules`` that are left and have seen data: one column loop per shared H and scheme."""
        together: dict[tuple[Any, ...], list[str]] = {}
        for name in [name for name in modules if name in self._schemes]:
            if (shared := self._pool.get(name)) is not None:
                alone = name if partitions(self._modules[name]) > 1 else ""        # its rows split by partition already
                together.setdefault((shared, id(self._schemes[name].weights), alone), []).append(name)
        for (shared, *_), names in together.items():
            with torch.inference_mode(False), torch.no_grad():
                self._solve_together(state, shared, names)

    def _solve_together(self, state: State, shared: Shared, names: Sequence[str]) -> None:
        start = time.perf_counter()
        assert shared.moment is not None
        for name in names:
            check_dense(name, self._modules[name])
        if shared not in self._factors:
            if state.distributed:
                all_reduce_(shared.moment)
            self._factors[shared] = self._factorize(shared, names)
        factors, tokens = self._factors[shared], shared.moment.tokens
        if factors is None:
            for name in names:
                self._round(state, name, "H not positive definite; rounded to nearest", tokens)
            return
        args = self._schemes[names[0]].weights
        assert args is not None
        dense = [as_matrix(self._modules[name]) for name in names]
        rows = [len(W_RC) for W_RC in dense]
        shared_scales = [self._globals.of(name) for name in names]
        pairs = zip(dense, shared_scales, strict=True)
        proposed = list(zip(*[self._proposals(W_RC, args, factors, g) for W_RC, g in pairs], strict=True))
        W_RC = (torch.cat(dense) if len(dense) > 1 else dense[0]).float()
        keeps = [self._keep(W) for W in dense]
        keep_RC = torch.cat(keeps) if any(not keep.all() for keep in keeps) else None
        tried = []
        for found in proposed:                                 # the scales of all these modules, found in one way
            scale_RG = torch.cat([expand(scale, R, args) for (scale, _), R in zip(found, rows, strict=True)])
            zeros = [expand(zero, R, args) for (_, zero), R in zip(found, rows, strict=True) if zero is not None]
            tried.append((scale_RG, torch.cat(zeros) if zeros else None))
        Q_RC, loss_R, best_R = self._best_rows(W_RC, tried, args, factors, dense[0].dtype, keep_RC)
        scales = proposed[0] if best_R is None else _chosen(tried, best_R, rows)
        seconds, P = time.perf_counter() - start, len(factors)
        pieces = zip(names, scales, keeps, W_RC.split(rows), Q_RC.split(rows), loss_R.split(rows), strict=True)
        for name, (scale, zero_point), keep, W, Q, loss in pieces:
            parts = zip(W.chunk(P), Q.chunk(P), loss.chunk(P), factors, strict=True)
            sums = [output_error(*part) for part in parts]
            error, total = sum(e for e, _ in sums), sum(t for _, t in sums)
            latent = None
            if self.keep_latents or self.hands_over:
                matrices = zip(W.chunk(P), Q.chunk(P), factors, strict=True)
                latent = torch.cat([adjusted(*part) for part in matrices]).mul_(keep)
            self._write(state, name, Q, scale, zero_point, latent, factors[0], {
                "error": error / total if total > 0 else 0.0,
                "tokens": tokens,
                "seconds": seconds * len(W) / sum(rows),
                "sparsity": None if keep.all() else share_of_zeros(Q),
            })

    def _factorize(self, shared: Shared, names: Sequence[str]) -> list[Factor] | None:
        """One factor per partition; None where rounding to nearest is what the user wants then.

        Raises:
            ValueError: H is not positive definite, and ``on_failure`` does not help.
        """
        assert shared.moment is not None
        weights = self._schemes[names[0]].weights
        assert weights is not None
        H_PCC, by_size = shared.moment.take(), weights.actorder is not None
        factors, dampening = factorize_each(H_PCC, self.dampening_frac, by_size, retry=self.on_failure == "retry")
        if factors is None and self.on_failure != "round":
            tokens, C = shared.moment.tokens, H_PCC.shape[1]
            raise ValueError(
                f"H of {', '.join(map(repr, names))} is not positive definite with dampening_frac={dampening:g} "
                f"({tokens} tokens for {C} columns); raise dampening_frac (0.01 to 0.1 is usual), calibrate on "
                f"more tokens, or set on_failure='retry' or 'round'"
            )
        return factors

    def _proposals(
        self, W_RC: Tensor, args: QuantizationArgs, factors: Sequence[Factor], global_scale: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Scales and zero points of one module, each found in another way, the first by ``scale_search``.

        The diagonal of H knows nothing of what later columns make good: where inputs are strongly correlated and bits
        are few, it shrinks too far. Measured, KL to the dense model with min-max scales / with those of the diagonal /
        chosen by row: the demo's Llama at 2 bits .0033 / .0250 / .0034, at 3 bits .00053 / .00076 / .00043; SmolLM2 at
        3 bits 1.6 / .49 / .50. So up to 3 bits ``hessian`` proposes both and their geometric mean, and each row takes
        what loses least. At 4 bits that fits the calibration data and nothing else: SmolLM2 with 4096 tokens .246 /
        .122 / .137 (worse on each of three subsets), for a column loop that takes more than twice as long.
        """
        scale, zero_point = self._scales(W_RC, args, factors, global_scale)
        if self.scale_search != "hessian" or args.strategy == "tensor" or args.num_bits > PROPOSALS_UP_TO:
            return [(scale, zero_point)]
        widest, widest_zero = find_scales(W_RC, args, "minmax")
        if zero_point is not None:                             # two ranges have no mean with a zero point of its own
            return [(scale, zero_point), (widest, widest_zero)]
        mean = (scale.float() * widest.float()).sqrt().to(scale.dtype)
        return [(scale, None), (mean, None), (widest, None)]

    def _scales(
        self, W_RC: Tensor, args: QuantizationArgs, factors: Sequence[Factor], global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scales of one module; each partition of a grouped convolution weighs errors by its own inputs."""
        if args.strategy in ("tensor", "block") or len(factors) == 1:
            importance_C = torch.stack([factor.diagonal_C for factor in factors]).mean(0)
            return find_scales(W_RC, args, self.scale_search, importance_C, global_scale)
        parts = [
            find_scales(W, args, self.scale_search, factor.diagonal_C, global_scale)
            for W, factor in zip(W_RC.chunk(len(factors)), factors, strict=True)
        ]
        zeros = [zero_point for _, zero_point in parts if zero_point is not None]
        return torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None

    def _keep(self, W_RC: Tensor) -> Tensor:
        """False where a weight is zero and shall stay zero."""
        preserve = share_of_zeros(W_RC) >= PRUNED if self.preserve_zeros is None else self.preserve_zeros
        return W_RC != 0 if preserve else torch.ones_like(W_RC, dtype=torch.bool)

    def _best_rows(
        self,
        W_RC: Tensor,
        tried: Sequence[tuple[Tensor, Tensor | None]],
        args: QuantizationArgs,
        factors: Sequence[Factor],
        dtype: torch.dtype,
        keep_RC: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Q [R, C] and losses [R] with the scales that lose least in each row, and which these were, int64 [R].

        Rows do not know of each other, so all proposals go through one column loop, stacked; many rows in pieces.
        """
        if len(tried) == 1:
            Q_RC, loss_R = self._columns(W_RC, *tried[0], args, factors, dtype, keep_RC)
            return Q_RC, loss_R, None
        K, R, P = len(tried), len(W_RC), len(factors)
        if P == 1 and (piece := STACKED // K) < R:
            found = []
            for i in range(0, R, piece):
                rows = slice(i, i + piece)
                some = [(scale[rows], None if zero is None else zero[rows]) for scale, zero in tried]
                keep = None if keep_RC is None else keep_RC[rows]
                found.append(self._best_rows(W_RC[rows], some, args, factors, dtype, keep))
            best = [b for _, _, b in found if b is not None]
            return torch.cat([q for q, _, _ in found]), torch.cat([x for _, x, _ in found]), torch.cat(best)

        def stacked(matrices: Sequence[Tensor]) -> Tensor:
            """[K * R, ...], partition by partition, as the factors want their rows."""
            return torch.stack([m.unflatten(0, (P, -1)) for m in matrices], 1).flatten(0, 2)

        zeros = [zero for _, zero in tried if zero is not None]
        Q_XC, loss_X = self._columns(
            stacked([W_RC] * K),
            stacked([scale for scale, _ in tried]),
            stacked(zeros) if zeros else None,
            args,
            factors,
            dtype,
            None if keep_RC is None else stacked([keep_RC] * K),
        )
        loss_KR = loss_X.view(P, K, R // P).transpose(0, 1).flatten(1)
        Q_KRC = Q_XC.unflatten(0, (P, K, R // P)).transpose(0, 1).flatten(1, 2)
        best_R = loss_KR.argmin(0)
        row_R = torch.arange(R, device=best_R.device)
        return Q_KRC[best_R, row_R], loss_KR[best_R, row_R], best_R

    def _columns(
        self,
        W_RC: Tensor,
        scale_RG: Tensor,
        zero_RG: Tensor | None,
        args: QuantizationArgs,
        factors: Sequence[Factor],
        dtype: torch.dtype,
        keep_RC: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """:func:`round_columns`, for each partition with its own factor."""
        if len(factors) == 1:
            return round_columns(W_RC, scale_RG, zero_RG, args, factors[0], self.block_size, dtype, keep_RC)
        P = len(factors)
        zeros, keeps = ([None] * P if whole is None else whole.chunk(P) for whole in (zero_RG, keep_RC))
        parts = [
            round_columns(W, scale, zero_point, args, factor, self.block_size, dtype, keep)
            for W, scale, zero_point, factor, keep in zip(
                W_RC.chunk(P), scale_RG.chunk(P), zeros, factors, keeps, strict=True
            )
        ]
        return torch.cat([Q for Q, _ in parts]), torch.cat([loss for _, loss in parts])

    def _write(
        self,
        state: State,
        name: str,
        Q_RC: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        A_RC: Tensor | None,
        factor: Factor,
        facts: dict[str, Any],
    ) -> None:
        module, scheme = self._modules[name], self._schemes.pop(name)
        W_RC = as_matrix(module)
        assert scheme.weights is not None
        latent = None if A_RC is None else latent_of(A_RC, Q_RC.to(W_RC.dtype), scale, zero_point, scheme.weights)
        found = input_scales(self._observers.get(name), W_RC.dtype)
        shared = self._globals.of(name)
        quantized = Quantized(scheme, scale, zero_point, latent=latent, global_scale=shared, **found)
        facts = {**weight_facts(W_RC, Q_RC, quantized), **facts}
        write_matrix(module, Q_RC)
        attach(module, quantized)
        self.remove_hooks(module)
        raised = f"damping raised to {factor.dampening:g}" if factor.dampening != self.dampening_frac else None
        state.ledger.add(name, "gptq", flag=raised, **facts)

    def _round(self, state: State, name: str, flag: str, tokens: int = 0) -> None:
        module = self._modules[name]
        scheme, shared = self._schemes.pop(name), self._globals.of(name)
        facts = round_module(name, module, scheme, self.scale_search, self._observers.get(name), shared)
        self.remove_hooks(module)
        state.ledger.add(name, "gptq", flag=flag, tokens=tokens, **facts)


def _chosen(
    tried: Sequence[tuple[Tensor, Tensor | None]], best_R: Tensor, rows: Sequence[int]
) -> list[tuple[Tensor, Tensor | None]]:
    """Scale and zero point of each module: row r from proposal ``best_R[r]``."""
    row_R = torch.arange(len(best_R), device=best_R.device)
    scales = torch.stack([scale for scale, _ in tried])[best_R, row_R].split(rows)
    zeros = [zero for _, zero in tried if zero is not None]
    if not zeros:
        return [(scale.contiguous(), None) for scale in scales]
    points = torch.stack(zeros)[best_R, row_R].split(rows)
    return [(scale.contiguous(), zero.contiguous()) for scale, zero in zip(scales, points, strict=True)]
