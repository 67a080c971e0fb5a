"""Base class of techniques that solve layers one by one from statistics of their inputs.

    CALIBRATION_START    find the layers, hook them
    each batch           the hook passes the input of a layer to :meth:`LayerwiseModifier.observe`
    MODULE_READY         one-pass walk: all batches have arrived at these layers     -> solve, write, report
    BLOCK_END            two-pass walk: all layers of the block have seen their data -> solve, write, report
    CALIBRATION_END      layers that never saw data: :meth:`LayerwiseModifier.unseen`; remove hooks and statistics

A technique states its layers (``find_layers``) and implements ``solve``, tensors in and tensors out. Layers that
receive the very same tensor share one Hessian, and what ``prepare`` makes of it. A grouped convolution is split here
into as many independent problems as it has partitions, so that ``solve`` sees one weight matrix and one Hessian. With
several ranks, each with its own batches, a Hessian is added up on its owner, who solves its layers and sends them to
all (owners.py).

Shapes: R rows, C columns (inputs), P partitions of a grouped convolution (1 for all other layers).
"""

import time
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, State
from lightning_compress.core.precision import as_product_sees
from lightning_compress.layers.matrix import as_matrix, input_layout, inputs_as_rows, only_input
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.layerwise.dense_inputs import DenseInputs
from lightning_compress.layerwise.input_hessian import HessianPool, SharedHessian
from lightning_compress.layerwise.layer import Hessian, Layer, Solved
from lightning_compress.layerwise.owners import Owners, from_owner, gather_hessians
from lightning_compress.layerwise.per_hessian import PerHessian
from lightning_compress.layerwise.pieces import collect, cut, share
from lightning_compress.layerwise.token_weights import GRADIENTS, Objective, TokenWeights
from lightning_compress.team import Team

__all__ = ["LayerwiseModifier"]


class LayerwiseModifier(Modifier):
    """Base class of modifiers that solve layers from statistics of their inputs.

    Implement :meth:`find_layers` and :meth:`solve`; the others have defaults.
    """

    technique: ClassVar[str]
    """Name of the technique in the ledger."""

    _layers: dict[str, nn.Module] = PrivateAttr(default_factory=dict)  # those that are not solved yet
    _pool: HessianPool = PrivateAttr(default_factory=HessianPool)
    _owners: Owners = PrivateAttr(default_factory=Owners)
    _prepared: PerHessian[list[Any]] = PrivateAttr(default_factory=PerHessian)  # by partition
    _token_weights: TokenWeights | None = PrivateAttr(default=None)  # where tokens are weighed by the loss
    _dense_inputs: DenseInputs = PrivateAttr(default_factory=DenseInputs)  # with needs.dense_inputs

    # -- what a technique implements ----------------------------------------------------------------------------------

    @abstractmethod
    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers to solve, by dotted name; ValueError where one cannot be."""

    def solve(self, layer: Layer, prepared: Any) -> Solved:
        """The new weight of a layer.

        Args:
            layer: The layer, or one partition of it.
            prepared: Result of :meth:`prepare` for the Hessian of its inputs.
        """
        raise NotImplementedError(f"{type(self).__name__} implements neither solve nor solve_together")

    def prepare(self, hessian: Hessian, layers: Sequence[Layer]) -> Any:
        """Compute what solving needs of a Hessian, once for all layers that share it; None: :meth:`give_up` layers.

        Args:
            hessian: Hessian of the inputs of these layers.
            layers: The layers that are solved first.
        """
        return hessian

    def solve_together(self, layers: Sequence[Layer], prepared: Any) -> list[Solved]:
        """Solutions for layers of one Hessian and one :meth:`group_of`."""
        return [self.solve(layer, prepared) for layer in layers]

    def group_of(self, name: str) -> Hashable:
        """Layers of one Hessian and one group are solved together."""
        return name

    def rows_apart(self, name: str) -> bool:
        """True where the rows of a layer are solved independently of one another: large ones then are in pieces."""
        return False

    def common(self, layer: Layer, prepared: Sequence[Any]) -> Any:
        """What the partitions of a grouped convolution share, such as a scale of the whole tensor."""
        return None

    def check(self, name: str, module: nn.Module) -> None:
        """ValueError where a layer cannot be solved, such as one that another modifier quantized."""

    @abstractmethod
    def write(self, layer: Layer, solved: Solved) -> dict[str, Any]:
        """Put the solution into the module (:func:`write_matrix`); returns facts for its row of the ledger."""

    def give_up(self, state: State, name: str, tokens: int) -> None:
        """Handle a layer for which :meth:`prepare` returned None."""
        raise AssertionError(f"{self.name} gives no layer up")

    @abstractmethod
    def unseen(self, state: State, layers: Mapping[str, nn.Module]) -> None:
        """Handle layers that never saw data: write their rows of the ledger, and warn by name."""

    @property
    def holds_out(self) -> bool:
        """True where :attr:`Hessian.halves` are needed."""
        return False

    @property
    def token_objective(self) -> Objective:
        """By what tokens are weighed: the argument ``objective``, where the technique has it."""
        return getattr(self, "objective", "layer")

    @property
    def aims_at_dense(self) -> bool:
        """Whether :attr:`Hessian.D_CC` is needed: the argument ``target``, where the technique has it."""
        return bool(getattr(self, "target", "layer") == "dense")

    def weighed_parents(self, model: nn.Module) -> dict[str, nn.Module]:
        """Modules around layers whose outputs are weighed by the ``objective``, too."""
        return {}

    def set_up(self) -> None:
        """Prepare for a calibration; the layers are known, and not hooked yet."""

    # -- statistics ---------------------------------------------------------------------------------------------------

    def watches(self, name: str, module: nn.Module) -> bool:
        """True where the inputs of a layer are observed."""
        return True

    def observe(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Take one input of a layer into its statistic."""

        def rows() -> Tensor:
            return self.rows(name, module, as_product_sees(x))

        def dense_rows() -> Tensor | None:
            dense = self._dense_inputs.get(name, x, self.batch_number)
            return None if dense is None else self.rows(name, module, as_product_sees(dense))

        self._pool.update(name, x, input_layout(module), rows, self.batch_number, dense_rows)

    def rows(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        """An input as :func:`inputs_as_rows`; with an ``objective`` each token times the root of its weight."""
        if self._token_weights is None:
            return inputs_as_rows(module, x, self.token_mask)
        return self._token_weights.rows(name, module, x, self.token_mask, self.batch_number)

    def sees_dense(self, name: str) -> bool:
        """Whether the inputs of a layer are now those of the dense model, in a survey."""
        return self._token_weights is not None and not self._token_weights.closed

    def survey(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Look at one input of a layer of the dense model."""

    def _arrive(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = only_input(name, inputs)
        if self.dense_pass:
            if self.aims_at_dense and not isinstance(module, WeightSlice):  # experts get other tokens there
                self._dense_inputs.keep(name, x, self.batch_number)
        else:
            (self.survey if self.sees_dense(name) else self.observe)(name, module, x)

    # -- events -------------------------------------------------------------------------------------------------------

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self.find_layers(state.model)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._layers = dict(self.find_layers(state.model))
        self._pool = HessianPool(getattr(self, "share_inputs", True), self.holds_out, self.aims_at_dense)
        self.set_up()
        self._token_weights = None
        if GRADIENTS[self.token_objective]:
            self._token_weights = TokenWeights(self._layers, self.weighed_parents(state.model))
            self._token_weights.watch(self)
        for name, module in self._layers.items():
            if self.watches(name, module):
                self.hook(module, partial(self._arrive, name))

    def on_block_surveyed(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._token_weights is not None and not self._token_weights.closed:
            self._token_weights.close(state.team)

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        self.solve_seen(state, state.modules)

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.solve_seen(state, state.modules)
        self._pool.drop(*state.modules)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.solve_seen(state, list(self._layers))
        if self._layers:
            self.unseen(state, dict(self._layers))
        self.reset()

    def reset(self) -> None:
        """Remove all statistics and hooks."""
        self._layers, self._pool, self._owners, self._token_weights = {}, HessianPool(), Owners(), None
        self._prepared.clear()
        self._dense_inputs = DenseInputs()
        self.remove_hooks()

    def survey_state(self) -> dict[str, Tensor] | None:
        return None if self._token_weights is None else self._token_weights.state_dict()

    def load_survey_state(self, state: dict[str, Tensor]) -> None:
        if self._token_weights is not None:
            self._token_weights.load_state_dict(state)

    def group_state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any] | None:
        return {"finished": [name for name in modules if name not in self._layers]}

    def load_group_state(self, modules: Mapping[str, nn.Module], state: dict[str, Any]) -> None:
        for name in state["finished"]:
            if name in self._layers:
                self.finish(name)

    # -- solving ------------------------------------------------------------------------------------------------------

    def seen(self, state: State, names: Iterable[str], everywhere: bool = False) -> dict[str, SharedHessian]:
        """Statistics of the layers among ``names`` that remain and have seen data, on any rank.

        Their sums over ranks are on their owners, with ``everywhere`` on all ranks.
        """
        layers = {name: self._layers[name] for name in names if name in self._layers}
        if layers and not state.team.alone:
            return gather_hessians(state.team, self._pool, layers, None if everywhere else self._owners)
        self._pool.drop_stale(self._pool.alive())
        return {name: shared for name in layers if (shared := self._pool.get(name)) is not None}

    def solve_seen(self, state: State, names: Iterable[str]) -> None:
        """Solve the layers among ``names`` that remain and have seen data."""
        groups: dict[tuple[SharedHessian, Hashable], list[str]] = {}
        for name, shared in self.seen(state, names).items():
            groups.setdefault((shared, self.group_of(name)), []).append(name)
        with torch.inference_mode(False), torch.no_grad():
            for (shared, _), members in groups.items():
                self._solve_group(state, shared, members)

    def _solve_group(self, state: State, shared: SharedHessian, names: Sequence[str]) -> None:
        """Solve layers on the rank that owns their Hessian; all ranks get them, and a row in their ledgers.

        Ranks share the work on large layers, in pieces of rows.
        """
        team, owner, what = state.team, shared.owner or 0, f"{self.name} of {names[0]}"
        modules = {name: self._layers[name] for name in names}
        weights = [as_matrix(module) for module in modules.values()]
        pieces, device = self._pieces(names, shared.partitions), weights[0].device
        sizes = [sum(rows.stop - rows.start for _, rows in piece) for piece in pieces]
        ranks = self._owners.deal(team, owner, sizes, shared.shape[1], device.type) if len(pieces) > 1 else [owner]
        if set(ranks) == {owner}:
            rows = from_owner(team, modules, owner, lambda: self._solve(shared, names), what)
        else:
            rows = self._solve_in_team(team, shared, names, ranks, what)
        if rows is None:
            for name in names:
                self.give_up(state, name, shared.tokens)
            return
        for name, row in rows.items():
            self.finish(name)
            state.ledger.add(name, self.technique, **row)

    def _solve(self, shared: SharedHessian, names: Sequence[str]) -> dict[str, dict[str, Any]] | None:
        """Solve layers and write their weights; their rows for the ledger, or None where they are given up."""
        start = time.perf_counter()
        layers = self.begin(names)
        prepared = self.prepared(shared, layers)
        if any(one is None for one in prepared):
            return None
        if len(prepared) > 1:
            layers = [replace(layer, common=self.common(layer, prepared)) for layer in layers]
        problems = self._split(layers, prepared)
        return self._written(layers, problems, [self.solve_together(*one) for one in problems], shared.tokens, start)

    def _solve_in_team(
        self, team: Team, shared: SharedHessian, names: Sequence[str], ranks: Sequence[int], what: str
    ) -> dict[str, dict[str, Any]] | None:
        """The same in pieces, each by one of ``ranks``; called by all."""
        start, owner, layers = time.perf_counter(), shared.owner or 0, self.begin(names)
        device = layers[0].W_RC.device
        if team.agree(team.rank != owner and shared not in self._prepared, what):
            prepared = share(team, owner, lambda: self.prepared(shared, layers), device, what)
            self._prepared[shared] = prepared
        if any(one is None for one in self._prepared[shared]):
            return None
        problems = self._split(layers, self._prepared[shared])
        solved = collect(team, owner, ranks, lambda i: self.solve_together(*problems[i]), device, what)
        modules = {name: self._layers[name] for name in names}
        work = partial(self._written, layers, problems, solved, shared.tokens, start)
        return from_owner(team, modules, owner, work, what)

    def _pieces(self, names: Sequence[str], P: int) -> list[list[tuple[int, slice]]]:
        """Pieces of layers as :func:`cut` gives them; one where rows are not independent of one another."""
        weights = [as_matrix(self._layers[name]) for name in names]
        if P == 1 and all(self.rows_apart(name) for name in names):
            return cut([len(W_RC) for W_RC in weights], weights[0].device.type)
        return [[(i, slice(0, len(W_RC))) for i, W_RC in enumerate(weights)]]

    def _split(self, layers: Sequence[Layer], prepared: Sequence[Any]) -> list[tuple[list[Layer], Any]]:
        """What is solved together, and what :meth:`prepare` made for it: partitions, or pieces of rows."""
        if (P := len(prepared)) > 1:
            parts = zip(*[layer.parts(P) for layer in layers], strict=True)
            return [(list(part), one) for part, one in zip(parts, prepared, strict=True)]
        pieces = self._pieces([layer.name for layer in layers], P)
        if len(pieces) == 1:
            return [(list(layers), prepared[0])]
        return [([layers[i].of(rows) for i, rows in piece], prepared[0]) for piece in pieces]

    def _written(
        self,
        layers: Sequence[Layer],
        problems: Sequence[tuple[list[Layer], Any]],
        solutions: Sequence[Sequence[Solved]],
        tokens: int,
        start: float,
    ) -> dict[str, dict[str, Any]]:
        """Write the solutions of layers; their rows for the ledger."""
        seconds = (time.perf_counter() - start) / sum(len(layer.W_RC) for layer in layers)
        parts: dict[str, list[Solved]] = {layer.name: [] for layer in layers}
        for (part, _), each in zip(problems, solutions, strict=True):
            for layer, solved in zip(part, each, strict=True):
                parts[layer.name].append(solved)
        return {
            layer.name: self._row(layer, Solved.join(parts[layer.name]), tokens, seconds * len(layer.W_RC))
            for layer in layers
        }

    def _row(self, layer: Layer, solved: Solved, tokens: int, seconds: float) -> dict[str, Any]:
        """Write a solution into its layer; the row for the ledger."""
        start = time.perf_counter()
        facts = {"error": solved.relative_error, "tokens": tokens, **self.write(layer, solved)}
        return {"flag": solved.flag, "seconds": seconds + time.perf_counter() - start, **facts}

    def conclude(self, state: State, layer: Layer, solved: Solved, tokens: int, seconds: float) -> None:
        """Write a solution into its layer, and its row into the ledger; the layer is finished."""
        row = self._row(layer, solved, tokens, seconds)
        self.finish(layer.name)
        state.ledger.add(layer.name, self.technique, **row)

    def begin(self, names: Iterable[str]) -> list[Layer]:
        """These layers, without partitions; ValueError where one cannot be solved."""
        modules = {name: self._layers[name] for name in names}
        for name, module in modules.items():
            self.check(name, module)
        return [Layer(name, module, as_matrix(module)) for name, module in modules.items()]

    def finish(self, name: str) -> nn.Module:
        """Remove the hooks of a layer that is finished."""
        module = self._layers.pop(name)
        self._dense_inputs.drop(name)
        self.remove_hooks(module)
        return module

    def prepared(self, shared: SharedHessian, layers: Sequence[Layer]) -> list[Any]:
        """Results of :meth:`prepare` for each partition of a Hessian, once for all layers that share it."""
        if shared not in self._prepared:
            parts = zip(*[layer.parts(shared.partitions) for layer in layers], strict=True)
            self._prepared[shared] = [
                self.prepare(hessian, part) for hessian, part in zip(shared.take(), parts, strict=True)
            ]
        return self._prepared[shared]
