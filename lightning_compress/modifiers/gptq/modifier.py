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

Shapes: R rows, C columns (inputs), G groups of g columns, P partitions of a grouped convolution.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from compressed_tensors.quantization import QuantizationScheme
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.distributed import all_reduce_
from lightning_compress.layers.matrix import (
    as_matrix,
    input_layout,
    inputs_as_rows,
    is_embedding,
    only_input,
    partitions,
    write_matrix,
)
from lightning_compress.layerwise.factor import Factor, factorize_each
from lightning_compress.layerwise.input_hessian import MomentPool, PerShared, Shared
from lightning_compress.modifiers.gptq.columns import output_error
from lightning_compress.modifiers.gptq.held_out import DAMPENINGS, Choice, choose
from lightning_compress.modifiers.gptq.refinement import is_refinable
from lightning_compress.modifiers.gptq.solver import ScaleSearch, Solver, damped
from lightning_compress.pruning.arguments import share_of_zeros, zeros_stay
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.embeddings import Embeddings
from lightning_compress.quant.fake_quant import latent_of, on_stored_grid
from lightning_compress.quant.observers import Observer, ObserverName, is_observed, make_observer
from lightning_compress.quant.record import Quantized, attach
from lightning_compress.quant.rounding import DEAD_INPUT, check_dense, input_scales, round_embeddings, round_module
from lightning_compress.quant.schemes import no_group_order
from lightning_compress.quant.shared_scales import GlobalScales
from lightning_compress.quant.weight_metrics import weight_facts

__all__ = ["GPTQModifier"]


@dataclass(frozen=True)
class _Prepared:
    """What is known of one H.

    Args:
        factors: One per partition.
        H_PCC: Damped; None: no refinement.
        said: For the ledger.
    """

    factors: list[Factor]
    H_PCC: Tensor | None
    said: str | None


class GPTQModifier(QuantizationArguments, Modifier):
    """Quantize weights with GPTQ on calibration data.

    Args:
        targets: Class names, dotted names or ``re:`` patterns of what is quantized, with ``scheme``.
        ignore: The same, for what is left out.
        scheme: A preset (``W4A16``, ``W8A8`` ...), or a mapping of presets to their targets.
        group_size: Takes the place of the preset's group size; -1 for one scale per row; ``auto`` or a list of
            sizes for one that fits each module.
        config_groups: Schemes in full, in place of ``scheme``.
        block_size: Columns after which errors reach all columns still to come; changes speed, not results.
        dampening_frac: Share of the mean diagonal of H that is added to its diagonal. ``auto``: of 0.01, 0.03, 0.1 and
            0.3 what loses least on every second batch when fitted to the others; then all batches count.
        refine: Afterwards refit scales and improve codes (refinement.py), in layers where that lowers the error
            on batches held out in the same way.
        actorder: ``static`` (= ``weight``): columns with large inputs first; None: from left to right.
        scale_search: ``hessian``: per row and group the scale with the least sum_j H_jj (w_j - q_j)^2; up to 3 bits
            that, the min-max scale, or the mean of the two: what loses least when the row is rounded. ``mse``: the
            least sum |w_j - q_j|^2.4. ``minmax``: from the extremes, as llm-compressor does.
        on_failure: When H is not positive definite: ``raise``; ``retry`` with ten times the damping, up to 1.0, then
            raise; ``round`` to nearest. The ledger says what was done.
        share_inputs: One H for modules that receive the very same tensor (query, key, value; gate, up).
        observer: How static activation scales are found: ``minmax``, ``moving_average``, ``mse``, ``percentile`` or
            ``histogram``.
        averaging_constant: Of ``moving_average``: the weight of the newest batch.
        preserve_zeros: Weights that are zero stay zero, so that a pruned model stays pruned. None: in the modules of
            which at least a third of the weights are.
        keep_latents: Keep beside each weight the values that were rounded to it, for a QATModifier that goes on from
            there. They take the memory of the weights once more, and are never saved.
        start: Not after training but before the batch at ``start``, in ``unit``: for a QATModifier that stands after
            it in the recipe, with the same scheme, start and unit, and goes on from its result.
    """

    every_format: ClassVar[bool] = True
    embeddings: ClassVar[Embeddings] = "shared"

    block_size: int = Field(default=128, ge=1)
    dampening_frac: Annotated[float, Field(ge=0)] | Literal["auto"] = 0.01
    refine: bool = False
    actorder: Literal["static", "weight"] | None = "static"
    scale_search: ScaleSearch = "hessian"
    on_failure: Literal["raise", "retry", "round"] = "raise"
    share_inputs: bool = True
    observer: ObserverName = "minmax"
    averaging_constant: float = Field(default=0.01, gt=0, le=1)
    preserve_zeros: bool | None = None
    keep_latents: bool = False

    _schemes: dict[str, QuantizationScheme] = PrivateAttr(default_factory=dict)  # what is left to do
    _modules: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _observers: dict[str, Observer] = PrivateAttr(default_factory=dict)
    _globals: GlobalScales = PrivateAttr(default_factory=lambda: GlobalScales({}, {}))
    _pool: MomentPool = PrivateAttr(default_factory=MomentPool)
    _prepared: PerShared[_Prepared | None] = PrivateAttr(default_factory=PerShared)

    @field_validator("actorder", mode="before")
    @classmethod
    def _order_is_static(cls, actorder: Any) -> Any:
        if isinstance(actorder, str) and actorder.lower() in ("group", "dynamic"):
            raise ValueError(no_group_order(actorder))
        return actorder

    @property
    def needs(self) -> Needs:
        return Needs(data=True, one_pass=True, hand_over=self.start is not None)

    @property
    def _holds_out(self) -> bool:
        return self.refine or self.dampening_frac == "auto"

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
        self._pool = MomentPool(self.share_inputs, hold_out=self._holds_out)
        self._globals = GlobalScales(self._modules, self._schemes)
        for name, module in self._modules.items():
            if is_embedding(module):
                continue
            args = self._schemes[name].input_activations
            if is_observed(args):
                self._observers[name] = make_observer(self.observer, args, self.averaging_constant)
            self.hook(module, lambda module, inputs, name=name: self._observe(name, module, inputs))

    def _ordered(self, scheme: QuantizationScheme) -> QuantizationScheme:
        """The scheme with the column order written into it, as readers of the export expect."""
        weights = scheme.weights
        assert weights is not None
        order = weights.actorder
        if order is not None and self.actorder not in ("static", "weight"):
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
            if name in self._observers:  # without a static input scale no reader could use it
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
        self._prepared.clear()
        self.remove_hooks()

    def _solve(self, state: State, modules: Mapping[str, nn.Module]) -> None:
        """Quantize those of ``modules`` that are left and have seen data: one column loop per shared H and scheme."""
        arguments = (self.scale_search, self._globals, self.keep_latents or self.needs.hand_over)
        for name, facts in round_embeddings(modules, self._modules, self._schemes, *arguments):
            state.ledger.add(name, "gptq", **facts)
        together: dict[tuple[Any, ...], list[str]] = {}
        for name in [name for name in modules if name in self._schemes]:
            if (shared := self._pool.get(name)) is not None:
                alone = name if partitions(self._modules[name]) > 1 else ""  # its rows split by partition already
                together.setdefault((shared, id(self._schemes[name].weights), alone), []).append(name)
        for (shared, *_), names in together.items():
            with torch.inference_mode(False), torch.no_grad():
                self._solve_together(state, shared, names)

    def _solve_together(self, state: State, shared: Shared, names: Sequence[str]) -> None:
        start = time.perf_counter()
        assert shared.moment is not None
        for name in names:
            check_dense(name, self._modules[name])
        args = self._schemes[names[0]].weights
        assert args is not None
        dense = [as_matrix(self._modules[name]) for name in names]
        keeps = [self._keep(W_RC) for W_RC in dense]
        solver = Solver(args, self.scale_search, self.block_size)
        global_scales = [self._globals.of(name) for name in names]
        if shared not in self._prepared:
            for moment in (shared.moment, shared.held_out):
                if state.distributed and moment is not None:
                    all_reduce_(moment)
            self._prepared[shared] = self._prepare(shared, names, solver, dense, global_scales, keeps)
        prepared, tokens = self._prepared[shared], shared.moment.tokens
        if prepared is None:
            for name in names:
                self._round(state, name, "H not positive definite; rounded to nearest", tokens)
            return
        factors = prepared.factors
        solved = solver(dense, factors, global_scales, keeps)
        if prepared.H_PCC is not None and is_refinable(args):
            solved = solver.refined(solved, prepared.H_PCC, dense[0].dtype)
        seconds, P, rows = time.perf_counter() - start, len(factors), list(solved.rows)
        wanted = self.keep_latents or self.needs.hand_over
        latents = solved.latents(factors).split(rows) if wanted else [None] * len(names)
        pieces = zip(
            names, solved.scales, keeps, solved.W_RC.split(rows), solved.Q_RC.split(rows), solved.loss_R.split(rows),
            latents, strict=True,
        )  # fmt: skip
        for name, (scale, zero_point), keep, W, Q, loss, latent in pieces:
            parts = zip(W.chunk(P), Q.chunk(P), loss.chunk(P), factors, strict=True)
            sums = [output_error(*part) for part in parts]
            error, total = sum(e for e, _ in sums), sum(t for _, t in sums)
            self._write(
                state,
                name,
                Q,
                scale,
                zero_point,
                latent,
                prepared,
                {
                    "error": error / total if total > 0 else 0.0,
                    "tokens": tokens,
                    "seconds": seconds * len(W) / sum(rows),
                    "sparsity": None if keep.all() else share_of_zeros(Q),
                },
            )

    def _prepare(
        self,
        shared: Shared,
        names: Sequence[str],
        solver: Solver,
        dense: Sequence[Tensor],
        global_scales: Sequence[Tensor | None],
        keeps: Sequence[Tensor],
    ) -> "_Prepared | None":
        """One factor per partition; None where rounding to nearest is what the user wants then.

        What is chosen on held-out batches is chosen with the weights of these modules; others that share H follow.

        Raises:
            ValueError: H is not positive definite, and ``on_failure`` does not help.
        """
        assert shared.moment is not None
        by_size = solver.args.actorder is not None
        auto = self.dampening_frac == "auto"
        choice = Choice(DAMPENINGS[0] if self.dampening_frac == "auto" else self.dampening_frac, False)
        said = None
        if shared.held_out is not None and shared.held_out.tokens and shared.moment.tokens:
            dampenings = DAMPENINGS if auto else (choice.dampening,)
            halves = shared.moment.value(), shared.held_out.value()
            wanted = self.refine and is_refinable(solver.args)
            chosen = choose(solver, dense, global_scales, keeps, *halves, dampenings, by_size, wanted)
            choice = chosen or Choice(dampenings[-1], False)
        elif self._holds_out:
            said = "one calibration batch: nothing held out to choose the damping or refinement by"
        shared.join()
        H_PCC = shared.moment.take()
        dead = not H_PCC.any()
        dead = not H_PCC.any()
        factors, dampening = factorize_each(H_PCC, choice.dampening, by_size, retry=self.on_failure == "retry")
        if factors is None:
            if self.on_failure == "round":
                return None
            tokens, C = shared.moment.tokens, H_PCC.shape[1]
            raise ValueError(
                f"H of {', '.join(map(repr, names))} is not positive definite with dampening_frac={dampening:g} "
                f"({tokens} tokens for {C} columns); raise dampening_frac (0.01 to 0.1 is usual), calibrate on "
                f"more tokens, or set on_failure='retry' or 'round'"
            )
        raised = dampening != choice.dampening
        flags = [
            said,
            DEAD_INPUT if dead else None,
            f"damping {'raised to ' if raised else ''}{dampening:g}" if raised or auto else None,
            {(True, True): "refined", (True, False): "not refined"}.get((self.refine, choice.refine)),
        ]
        flag = "; ".join(f for f in flags if f) or None
        return _Prepared(factors, damped(H_PCC, factors) if choice.refine else None, flag)

    def _keep(self, W_RC: Tensor) -> Tensor:
        """False where a weight is zero and shall stay zero."""
        return W_RC != 0 if zeros_stay(W_RC, self.preserve_zeros) else torch.ones_like(W_RC, dtype=torch.bool)

    def _write(
        self,
        state: State,
        name: str,
        Q_RC: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        A_RC: Tensor | None,
        prepared: "_Prepared",
        facts: dict[str, Any],
    ) -> None:
        module, scheme = self._modules[name], self._schemes.pop(name)
        W_RC = as_matrix(module)
        assert scheme.weights is not None
        Q_RC = on_stored_grid(Q_RC, scale, zero_point, scheme.weights, W_RC.dtype)
        latent = None if A_RC is None else latent_of(A_RC, Q_RC, scale, zero_point, scheme.weights)
        found = input_scales(self._observers.get(name), W_RC.dtype)
        shared = self._globals.of(name)
        quantized = Quantized(scheme, scale, zero_point, latent=latent, global_scale=shared, **found)
        facts = {**weight_facts(W_RC, Q_RC, quantized), **facts}
        write_matrix(module, Q_RC)
        attach(module, quantized)
        self.remove_hooks(module)
        state.ledger.add(name, "gptq", flag=prepared.said, **facts)

    def _round(self, state: State, name: str, flag: str, tokens: int = 0) -> None:
        module = self._modules[name]
        scheme, shared = self._schemes.pop(name), self._globals.of(name)
        latent = self.keep_latents or self.needs.hand_over
        observer = self._observers.get(name)
        facts = round_module(name, module, scheme, self.scale_search, observer, shared, keep_latent=latent)
        self.remove_hooks(module)
        state.ledger.add(name, "gptq", flag=flag, tokens=tokens, **facts)
