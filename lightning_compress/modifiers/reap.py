"""REAP: remove the experts whose routed outputs have the least weight (Lasby et al., 2025, arXiv:2510.13999).

    S_e = 1 / |T_e|  sum_{t in T_e}  g_e(t) ||f_e(x_t)||_2        T_e: tokens that the router sends to expert e
    g_e(t): the router's weights of a token's K experts, divided by their sum

The experts with the least S_e are removed: their rows of the router, their slices of the expert tensors, and their
count in the model's config. An expert without tokens has S_e = 0 and is removed first.

Shapes: N tokens, K experts per token, E experts, H hidden size of the model, I of an expert.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, PrivateAttr
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
    """The statistic S_e of the experts of one layer."""

    reduce = {"sum_E": "sum", "tokens_E": "sum"}

    def __init__(self, experts: int):
        self.sum_E = torch.zeros(experts, dtype=torch.float64, device="cpu")
        self.tokens_E = torch.zeros(experts, dtype=torch.float64, device="cpu")

    def update(
        self, x_NH: Tensor, index_NK: Tensor, weight_NK: Tensor, expert: Callable[[int, Tensor], Tensor]
    ) -> None:
        """Add a batch.

        Args:
            x_NH: Tokens.
            index_NK: Their experts.
            weight_NK: The router's weights of these experts.
            expert: ``expert(e, x)`` [n, H] is the output of expert e for tokens [n, H].
        """
        least = torch.finfo(torch.float32).tiny
        gate_NK = weight_NK.double() / weight_NK.double().sum(1, keepdim=True).clamp_min(least)
        sorted_P, place_P = index_NK.flatten().sort(stable=True)  # P = N K places of tokens, expert after expert
        numbers = torch.arange(len(self.sum_E) + 1, device=sorted_P.device, dtype=sorted_P.dtype)
        ends = torch.searchsorted(sorted_P, numbers).tolist()
        sums: dict[int, Tensor] = {}
        for e, (start, stop) in enumerate(pairwise(ends)):
            if stop > start:
                tokens = place_P[start:stop] // index_NK.shape[1]
                norms = expert(e, x_NH[tokens]).double().norm(dim=1)
                sums[e] = (gate_NK.flatten()[place_P[start:stop]] * norms).sum().float()  # so that ranks change no bit
                self.tokens_E[e] += stop - start
        if sums:  # a GPU is waited for twice in a batch, not for each expert
            self.sum_E[list(sums)] += torch.stack(list(sums.values())).cpu()

    def value(self) -> Tensor:
        """S [E], float64; 0 for experts without a token."""
        return self.sum_E / self.tokens_E.clamp_min(1)


def experts_to_keep(saliency_E: Tensor, count: int, groups: int = 1) -> Tensor:
    """Indices of the ``count`` most salient experts, ascending; equally many of each of ``groups`` consecutive runs."""
    size = len(saliency_E) // groups
    best = saliency_E.reshape(groups, size).topk(count // groups, dim=1).indices
    return (best + size * torch.arange(groups, device="cpu")[:, None]).flatten().sort().values


def router_of(model: nn.Module, experts: str) -> tuple[str, nn.Module]:
    """The router of fused experts, by name: the sibling module whose weight has a row for each of them.

    Raises:
        ValueError: No such module, or more than one.
    """
    parent, count = experts.rpartition(".")[0], len(model.get_submodule(experts).get_parameter("down_proj"))
    siblings = dict(model.get_submodule(parent).named_children())
    weights = {name: module._parameters.get("weight") for name, module in siblings.items()}
    names = [
        name for name, weight in weights.items() if weight is not None and weight.ndim == 2 and len(weight) == count
    ]
    if len(names) != 1:
        raise ValueError(
            f"expected one router beside {experts!r}, a module with a weight of {count} rows, found {names}; add "
            f"{experts!r} to ignore"
        )
    return f"{parent}.{names[0]}".lstrip("."), siblings[names[0]]


class _Layer(NamedTuple):
    """The experts of one layer: their router, how many stay, and in how many groups of the router."""

    router: str
    experts: int
    groups: int


class REAPModifier(Modifier):
    """Remove the least salient experts of every layer of a mixture.

    The experts of a layer must be in one tensor, as in transformers 5. Run it alone, and quantize or prune weights in a
    later run. It is not a LayerwiseModifier: it removes experts after all batches, and no weight is solved.

    Args:
        sparsity: Share of the experts of a layer to remove, in [0, 1): ``floor(sparsity * E)`` of them, at the end of
            the calibration of all layers. At least as many stay as the router picks for a token, equally many in each
            group of a router with groups.
        ignore: Class names, dotted names or ``re:`` patterns of fused experts that keep all experts; all layers share
            one count in the config of a transformers model, so there it must name all or none.

    Raises:
        ValueError: A share outside of [0, 1), a model without fused experts, fewer experts left than a token needs.
    """

    needs: ClassVar[Needs] = Needs(data=True, changes_shapes=True, team="sums")

    sparsity: float = Field(default=0.25, ge=0, lt=1)
    ignore: Names = []

    _saliencies: dict[str, ExpertSaliency] = PrivateAttr(default_factory=dict)

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        """Experts get new numbers, so that names and statistics of ``other`` would be wrong."""
        if not other.acts_after_training:
            return None
        return "it renumbers the experts that the other works on: compress with it first, with the other in a new run"

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._find(state.model)
        return True

    def _find(self, model: nn.Module) -> dict[str, _Layer]:
        """The layers to prune, by the name of their fused experts."""
        experts = fused_experts(model)
        if not experts:
            raise ValueError(
                f"{type(model).__name__} has no experts in one tensor (gate_up_proj [E, 2 I, H], down_proj [E, H, I]), "
                f"as mixtures of transformers 5 have; there is nothing to remove"
            )
        ignored = select(model, self.ignore, field="ignore") if self.ignore else {}
        layers = {}
        for name, module in experts.items():
            if name in ignored:
                continue
            router, gate = router_of(model, name)
            total = len(module.get_parameter("down_proj"))
            groups = int(getattr(gate, "num_group", None) or getattr(gate, "n_group", None) or 1)
            count = total - math.floor(self.sparsity * total + 1e-9)
            count += -count % groups
            top = int(getattr(gate, "top_k", getattr(getattr(model, "config", None), "num_experts_per_tok", 1)))
            reachable = count * int(getattr(gate, "topk_group", groups)) // groups
            if reachable < top:
                raise ValueError(
                    f"sparsity={self.sparsity} leaves {count} of {total} experts in {name!r}, of which a token can "
                    f"reach {reachable}, and the router picks {top} for each token; take at most "
                    f"{max(0, total - top) / total:g}"
                )
            layers[name] = _Layer(router, count, groups)
        if layers and hasattr(model, "config"):
            _check_config(model, layers)
        return layers

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        for name in self._find(state.model):
            module = state.model.get_submodule(name)
            self._saliencies[name] = ExpertSaliency(len(module.get_parameter("down_proj")))
            self.hook(module, lambda m, inputs, name=name: self._observe(name, m, inputs))

    def _observe(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x_NH, index_NK, weight_NK = inputs[:3]
        if (mask := self.token_mask) is not None and mask.numel() == len(x_NH):
            mask_N = mask.flatten().to(x_NH.device)
            x_NH, index_NK, weight_NK = x_NH[mask_N], index_NK[mask_N], weight_NK[mask_N]
        with torch.no_grad():
            self._saliencies[name].update(x_NH, index_NK, weight_NK, lambda e, x: _output(module, e, x))

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        for name in [name for name in self._saliencies if name in state.modules]:
            state.team.reduce_(self._saliencies[name])

    def group_state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        statistics = {name: self._saliencies[name] for name in modules if name in self._saliencies}
        return {name: {"sum": s.sum_E.tolist(), "tokens": s.tokens_E.tolist()} for name, s in statistics.items()}

    def load_group_state(self, modules: Mapping[str, nn.Module], state: dict[str, Any]) -> None:
        for name, sums in state.items():
            statistic = self._saliencies[name]
            statistic.sum_E.copy_(torch.tensor(sums["sum"], dtype=torch.float64, device="cpu"))
            statistic.tokens_E.copy_(torch.tensor(sums["tokens"], dtype=torch.float64, device="cpu"))

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        layers = self._find(state.model)
        for name, layer in layers.items():
            self._prune(state, name, layer, _fields(state.model, layers))
        self._saliencies = {}
        self.remove_hooks()

    def _prune(self, state: State, name: str, layer: _Layer, config: dict[str, int]) -> None:
        start, model, statistic = time.perf_counter(), state.model, self._saliencies[name]
        if not statistic.tokens_E.sum():
            raise ValueError(f"the experts of {name!r} never saw data, so none can be chosen; do batches reach them?")
        router, count, groups = layer
        saliency_E = statistic.value()
        keep = experts_to_keep(saliency_E, count, groups)
        module, gate = model.get_submodule(name), model.get_submodule(router)
        total = len(saliency_E)
        if unseen := [str(e) for e in range(total) if not statistic.tokens_E[e]]:
            warnings.warn(f"{self.name}: no token was sent to experts {', '.join(unseen)} of {name!r}", stacklevel=2)
        params = sum(module.get_parameter(tensor).numel() for tensor in EXPERT_TENSORS)
        if count < total:
            if is_split(module):
                join(model, [name])
            cut = {f"{name}.{tensor}": {0: keep} for tensor in EXPERT_TENSORS}
            cut |= {f"{router}.{tensor}": {0: keep} for tensor in _rows(gate, total)}
            modules = {path: vars(model.get_submodule(path)) for path in (name, router, name.rpartition(".")[0])}
            attributes = {
                path: {field: count for field in COUNTS if values.get(field) == total}
                for path, values in modules.items()
            }
            cut_tensors(model, cut, attributes=attributes, config=config)
        saliencies = ", ".join(f"{e}: {s:.3g}" for e, s in enumerate(saliency_E.tolist()))
        removed = sorted(set(range(total)) - set(keep.tolist()))
        state.ledger.add(
            name,
            "reap",
            flag=f"kept {count} of {total} experts, without {removed}; saliencies {saliencies}",
            sparsity=1 - count / total,
            params=params * count // total,
            tokens=int(statistic.tokens_E.sum()),
            seconds=time.perf_counter() - start,
        )


class REAPPruningModifier(REAPModifier):
    """:class:`REAPModifier` under the name that llm-compressor gives it."""


def _output(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """The output of one expert for tokens [n, H]."""
    both, down = (module.get_parameter(name)[expert] for name in EXPERT_TENSORS)
    gated: Callable[[Tensor], Tensor] = getattr(module, "_apply_gate")  # noqa: B009  mypy takes attributes for tensors
    return nn.functional.linear(gated(nn.functional.linear(x, both)), down)


def _rows(gate: nn.Module, total: int) -> list[str]:
    """Parameters and buffers of the router with one entry for each expert."""
    tensors = [*gate.named_parameters(recurse=False), *gate.named_buffers(recurse=False)]
    return [name for name, tensor in tensors if tensor.ndim and len(tensor) == total]


def _fields(model: nn.Module, layers: Mapping[str, _Layer]) -> dict[str, int]:
    """New values of the config; all layers have one count there."""
    count = next((layer.experts for layer in layers.values()), 0)
    return {field: count for field in COUNTS if isinstance(getattr(getattr(model, "config", None), field, None), int)}


def _check_config(model: nn.Module, layers: Mapping[str, _Layer]) -> None:
    """ValueError where no config can state the new shapes."""
    shapes: dict[str, Sequence[int]] = {clean_name(n): list(p.shape) for n, p in model.named_parameters()}
    for name, (router, count, _) in layers.items():
        total = len(model.get_submodule(name).get_parameter("down_proj"))
        names = [f"{name}.{tensor}" for tensor in EXPERT_TENSORS]
        names += [f"{router}.{tensor}" for tensor in _rows(model.get_submodule(router), total)]
        shapes |= {n: [count, *shapes[n][1:]] for n in names if n in shapes}
    check_states(model, _fields(model, layers), shapes, "remove as many experts in every layer, and ignore none")
