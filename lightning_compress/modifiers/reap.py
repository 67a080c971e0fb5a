"""REAP: remove the experts whose routed outputs weigh least (Lasby et al., 2025, arXiv:2510.13999).

    S_e = 1 / |T_e|  sum_{t in T_e}  g_e(t) ||f_e(x_t)||_2        T_e: tokens that the router sends to expert e
    g_e(t): the router's weights of a token's K experts, divided by their sum

The experts with the least S_e go for real: their rows of the router, their slices of the expert tensors, and the count
in the model's config. An expert that no token was sent to has S_e = 0 and goes first.

Shapes: N tokens, K experts per token, E experts, H hidden, I inside of an expert.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.layers.matching import Names, clean_name, select
from lightning_compress.layers.split_experts import fused_experts, is_split, join
from lightning_compress.structure.config import check_states
from lightning_compress.structure.surgery import cut_tensors

__all__ = ["REAPModifier", "REAPPruningModifier", "ExpertSaliency", "experts_to_keep", "router_of"]

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # fields of configs
EXPERT_TENSORS = ("gate_up_proj", "down_proj")


class ExpertSaliency:
    """S_e of one layer, from what the router sends and what the experts make of it."""

    reduce = {"sum_E": "sum", "tokens_E": "sum"}

    def __init__(self, experts: int):
        self.sum_E = torch.zeros(experts, dtype=torch.float64)
        self.tokens_E = torch.zeros(experts, dtype=torch.float64)

    def update(
        self, x_NH: Tensor, index_NK: Tensor, weight_NK: Tensor, expert: Callable[[int, Tensor], Tensor]
    ) -> None:
        """Add a batch.

        Args:
            x_NH: Tokens.
            index_NK: Their experts.
            weight_NK: The router's weights of these.
            expert: ``expert(e, x)`` [n, H] is what expert e makes of tokens [n, H].
        """
        least = torch.finfo(torch.float32).tiny
        gate_NK = weight_NK.double() / weight_NK.double().sum(1, keepdim=True).clamp_min(least)
        for e in range(len(self.sum_E)):
            tokens, place = torch.where(index_NK == e)
            if len(tokens):
                norms = expert(e, x_NH[tokens]).double().norm(dim=1)
                self.sum_E[e] += (gate_NK[tokens, place] * norms).sum().cpu()
                self.tokens_E[e] += len(tokens)

    def value(self) -> Tensor:
        """S [E], float64; 0 for experts without a token."""
        return self.sum_E / self.tokens_E.clamp_min(1)


def experts_to_keep(saliency_E: Tensor, count: int, groups: int = 1) -> Tensor:
    """Places of the ``count`` most salient experts, ascending; as many of each of ``groups`` equal runs of them."""
    size = len(saliency_E) // groups
    best = saliency_E.reshape(groups, size).topk(count // groups, dim=1).indices
    return (best + size * torch.arange(groups)[:, None]).flatten().sort().values


def router_of(model: nn.Module, experts: str) -> tuple[str, nn.Module]:
    """The router beside fused experts, by name: the module there whose weight has a row for each of them.

    Raises:
        ValueError: There is none, or more than one.
    """
    parent, count = experts.rpartition(".")[0], len(model.get_submodule(experts).get_parameter("down_proj"))
    beside = model.get_submodule(parent).named_children()
    weights = {name: (module, module._parameters.get("weight")) for name, module in beside}
    found = [(n, m) for n, (m, w) in weights.items() if w is not None and w.ndim == 2 and len(w) == count]
    if len(found) != 1:
        raise ValueError(
            f"expected one router beside {experts!r}, a module with a weight of {count} rows, found "
            f"{[name for name, _ in found]}; add {experts!r} to ignore"
        )
    return f"{parent}.{found[0][0]}" if parent else found[0][0], found[0][1]


class REAPModifier(Modifier):
    """Remove the least salient experts of every layer of a mixture.

    It works on experts that lie in one tensor, as those of transformers 5 do. Run it alone, and what quantizes or
    prunes weights in a run after it. It is not a LayerwiseModifier: it decides on whole experts by what the router
    sends them, after all batches, and no weight is solved.

    Args:
        sparsity: Share of the experts of a layer that goes, in [0, 1): ``floor(sparsity * E)`` of them, at the end of
            the calibration of all layers. As many as the router picks for a token stay, and of routers with groups
            equally many in each.
        ignore: Class names, dotted names or ``re:`` patterns of fused experts that are left whole; all layers share
            one count in the config of a transformers model, so there it must name all or none.

    Raises:
        ValueError: A share outside of [0, 1), a model without fused experts, fewer experts left than a token gets.
    """

    needs: ClassVar[Needs] = Needs(data=True, changes_shapes=True)

    sparsity: float = Field(default=0.25)
    ignore: Names = []

    _saliencies: dict[str, ExpertSaliency] = PrivateAttr(default_factory=dict)

    @field_validator("sparsity")
    @classmethod
    def _share(cls, sparsity: float) -> float:
        if not 0 <= sparsity < 1:
            raise ValueError("expected a share of the experts in [0, 1), such as 0.25")
        return sparsity

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        """Experts get new numbers, so that what ``other`` knows of them is wrong from then on."""
        if not other.acts_after_training:
            return None
        return "it renumbers the experts that the other works on: compress with it first, with the other in a new run"

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._find(state.model)
        return True

    def _find(self, model: nn.Module) -> dict[str, tuple[str, int, int]]:
        """By fused experts: their router, how many stay, in how many groups."""
        found = fused_experts(model)
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no experts in one tensor (gate_up_proj [E, 2 I, H], down_proj [E, H, I]), "
                f"as mixtures of transformers 5 have; there is nothing to remove"
            )
        left_out = select(model, self.ignore, field="ignore") if self.ignore else {}
        plan = {}
        for name, module in found.items():
            if name in left_out:
                continue
            router, gate = router_of(model, name)
            total, groups = len(module.get_parameter("down_proj")), _groups(gate)
            gone = math.floor(self.sparsity * total + 1e-9)
            kept = total - gone
            kept += -kept % groups
            top = int(getattr(gate, "top_k", getattr(getattr(model, "config", None), "num_experts_per_tok", 1)))
            reached = kept * int(getattr(gate, "topk_group", groups)) // groups
            if reached < top:
                raise ValueError(
                    f"sparsity={self.sparsity} leaves {kept} of {total} experts in {name!r}, of which a token can "
                    f"reach {reached}, and the router picks {top} for each token; take at most "
                    f"{max(0, total - top) / total:g}"
                )
            plan[name] = (router, kept, groups)
        if plan and hasattr(model, "config"):
            _check_config(model, plan)
        return plan

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        for name in self._find(state.model):
            module = state.model.get_submodule(name)
            self._saliencies[name] = ExpertSaliency(len(module.get_parameter("down_proj")))
            self.hook(module, lambda m, inputs, name=name: self._observe(name, m, inputs))

    def _observe(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x_NH, index_NK, weight_NK = inputs[:3]
        if (mask := self.token_mask) is not None and mask.numel() == len(x_NH):
            counts = mask.flatten().to(x_NH.device)
            x_NH, index_NK, weight_NK = x_NH[counts], index_NK[counts], weight_NK[counts]
        with torch.no_grad():
            self._saliencies[name].update(x_NH, index_NK, weight_NK, lambda e, x: _output(module, e, x))

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        model, plan = state.model, self._find(state.model)
        for name, (router, kept, groups) in plan.items():
            self._prune(state, name, router, kept, groups, _fields(model, plan))
        self._saliencies = {}
        self.remove_hooks()

    def _prune(self, state: State, name: str, router: str, kept: int, groups: int, config: dict[str, int]) -> None:
        start, model, statistic = time.perf_counter(), state.model, self._saliencies[name]
        if not statistic.tokens_E.sum():
            raise ValueError(f"the experts of {name!r} never saw data: none can be chosen; do batches reach them?")
        saliency_E = statistic.value()
        keep = experts_to_keep(saliency_E, kept, groups)
        module, gate = model.get_submodule(name), model.get_submodule(router)
        total = len(saliency_E)
        if unseen := [str(e) for e in range(total) if not statistic.tokens_E[e]]:
            warnings.warn(f"{self.name}: no token was sent to experts {', '.join(unseen)} of {name!r}", stacklevel=2)
        params = sum(module.get_parameter(tensor).numel() for tensor in EXPERT_TENSORS)
        if kept < total:
            if is_split(module):
                join(model, [name])
            cut = {f"{name}.{tensor}": {0: keep} for tensor in EXPERT_TENSORS}
            cut |= {f"{router}.{own}": {0: keep} for own in _rows(gate, total)}
            paths = (name, router, name.rpartition(".")[0])
            attributes = {path: _counts(model.get_submodule(path), total, kept) for path in paths}
            cut_tensors(model, cut, attributes=attributes, config=config)
        told = ", ".join(f"{e}: {s:.3g}" for e, s in enumerate(saliency_E.tolist()))
        gone = sorted(set(range(total)) - set(keep.tolist()))
        state.ledger.add(
            name,
            "reap",
            flag=f"kept {kept} of {total} experts, without {gone}; saliencies {told}",
            sparsity=1 - kept / total,
            params=params * kept // total,
            tokens=int(statistic.tokens_E.sum()),
            seconds=time.perf_counter() - start,
        )


class REAPPruningModifier(REAPModifier):
    """:class:`REAPModifier` under the name that llm-compressor gives it."""


def _output(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What one expert makes of tokens [n, H]."""
    both, down = (module.get_parameter(name)[expert] for name in EXPERT_TENSORS)
    gated: Callable[[Tensor], Tensor] = getattr(module, "_apply_gate")  # noqa: B009  mypy takes attributes for tensors
    return nn.functional.linear(gated(nn.functional.linear(x, both)), down)


def _groups(gate: nn.Module) -> int:
    return int(getattr(gate, "num_group", None) or getattr(gate, "n_group", None) or 1)


def _rows(gate: nn.Module, total: int) -> list[str]:
    """Parameters and buffers of the router with one entry for each expert."""
    tensors = [*gate.named_parameters(recurse=False), *gate.named_buffers(recurse=False)]
    return [name for name, tensor in tensors if tensor.ndim and len(tensor) == total]


def _counts(module: nn.Module, total: int, kept: int) -> dict[str, int]:
    """Attributes in which a module keeps how many experts there are."""
    return {field: kept for field in COUNTS if vars(module).get(field) == total}


def _fields(model: nn.Module, plan: dict[str, tuple[str, int, int]]) -> dict[str, int]:
    """New values of the config."""
    config = getattr(model, "config", None)
    if config is None or not plan:
        return {}
    kept = next(kept for _, kept, _ in plan.values())
    return {field: kept for field in COUNTS if isinstance(getattr(config, field, None), int)}


def _check_config(model: nn.Module, plan: dict[str, tuple[str, int, int]]) -> None:
    """ValueError where no config can state what is left."""
    shapes: dict[str, Sequence[int]] = {clean_name(n): list(p.shape) for n, p in model.named_parameters()}
    for name, (router, kept, _) in plan.items():
        total = len(model.get_submodule(name).get_parameter("down_proj"))
        names = [f"{name}.{tensor}" for tensor in EXPERT_TENSORS]
        names += [f"{router}.{own}" for own in _rows(model.get_submodule(router), total)]
        shapes |= {n: [kept, *shapes[n][1:]] for n in names if n in shapes}
    check_states(model, _fields(model, plan), shapes, "remove as many experts in every layer, and ignore none")
