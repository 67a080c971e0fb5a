"""A scheme for each module, chosen before any is compressed: the least loss within a number of bits or bytes.

    min  sum over groups of dL(group, scheme)   with  bytes of all groups <= budget             (knapsack.py)

dL comes from a backward pass of the dense model (sensitivity.py), bytes are those that are stored (options.py).
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import yaml
from compressed_tensors.quantization import QuantizationScheme
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.files.atomic_file import whole_file
from lightning_compress.layers.matching import listed
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.layers.memory import bytes_of
from lightning_compress.layerwise.quantizer import LayerwiseQuantizer
from lightning_compress.layerwise.token_weights import GRADIENTS
from lightning_compress.modifiers.allocate.knapsack import choose
from lightning_compress.modifiers.allocate.options import DENSE, Group, choice_of, groups_of, parse_candidates, stored
from lightning_compress.modifiers.allocate.sensitivity import Sensitivities
from lightning_compress.quant.arguments import ALLOCATED, QuantizationArguments
from lightning_compress.quant.assignment import assign
from lightning_compress.quant.config_groups import config_groups
from lightning_compress.quant.schemes import GroupSize, describe

__all__ = ["AllocateModifier"]

FILE = "allocation.yaml"
UNSHARDED = "its gradients are those of the whole model; take config_groups that it chose for the unsharded model"

logger = logging.getLogger(__name__)


class AllocateModifier(Modifier):
    """Choose the scheme of each module for the quantizer behind it, whose ``scheme`` is ``allocated``.

    The modules are the targets of that quantizer. What servers fuse (query, key and value; gate and up; the experts of
    a mixture) gets one scheme. The choice is written as ``config_groups``: given to the quantizer, it leads to the same
    schemes without this modifier.

    Args:
        bits: Mean bits per weight of these modules, at most; scales and zero points count.
        bytes: In place of ``bits``: size of the exported model with all its tensors, at most, as a number or such as
            ``3GB``. Modules of other quantizers count as dense.
        candidates: What a module can get: names of presets, with a group size where one is written (``W3A16 g64``,
            ``W8A16 channel``); schemes in full, ``{weights: {num_bits: 3, group_size: 64}}``; ``dense``.
        group_size: Of presets without one, as for a quantizer.
        objective: Whose gradients count. ``loss``: of the cross entropy, labels drawn from the model's logits.
            ``output``: for models without classes, of the squared error of the output. ``training_step``: of the loss
            that the LightningModule trains on.
        path: File for the choice. In a Trainer's run it is in the report's folder as well, as ``allocation.yaml``.
    """

    technique: ClassVar[str] = "allocate"

    bits: Annotated[float, Field(gt=0)] | None = None
    bytes: int | str | None = None
    candidates: list[str | dict[str, Any]] = [
        "W2A16 g64", "W2A16 g32", "W3A16", "W3A16 g32", "W4A16 channel", "W4A16", "W4A16 g32", "W5A16", "W6A16",
        "W8A16 channel",
    ]  # fmt: skip
    group_size: GroupSize = "auto"
    objective: Literal["loss", "output", "training_step"] = "loss"
    path: str | None = None

    _quantizers: list[LayerwiseQuantizer] = PrivateAttr(default_factory=list)
    _groups: list[Group] = PrivateAttr(default_factory=list)
    _sensitivities: Sensitivities | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _budget_and_candidates(self) -> "AllocateModifier":
        if (self.bits is None) == (self.bytes is None):
            came = "neither" if self.bits is None else "both"
            raise ValueError(f"expected either bits (such as 4.25) or bytes (such as '3GB'), got {came}")
        if self.bytes is not None:
            bytes_of(self.bytes, "bytes")
        if len(self.candidates) < 2:
            raise ValueError(f"candidates={self.candidates}: expected at least two, such as ['W3A16', 'W4A16']")
        parse_candidates(self.candidates, self.group_size)
        return self

    @property
    def needs(self) -> Needs:
        gradients = GRADIENTS[self.objective]
        return Needs(data=True, survey=True, gradients=gradients, one_pass=True, team="sums", sharded=UNSHARDED)

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        if isinstance(other, AllocateModifier):
            return "one of them chooses the schemes of all modules; leave the other out"
        if not (isinstance(other, QuantizationArguments) and other.scheme == ALLOCATED):
            return None
        if earlier:
            return f"it chooses the schemes of {other.name}, so place it before that"
        if not isinstance(other, LayerwiseQuantizer) or other.start is not None:
            return f"{other.name} needs its schemes before calibration; give it config_groups of an earlier allocation"
        if not any(other is quantizer for quantizer in self._quantizers):
            self._quantizers.append(other)
        return None

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        if not self._quantizers:
            raise ValueError(
                f"{self.name} has no quantizer behind it that takes its choice; add one, such as "
                f"GPTQModifier(scheme='allocated')"
            )
        for quantizer in self._quantizers:
            self._check_candidates(type(quantizer))
        self._set_up(state)
        return True

    def _check_candidates(self, kind: Any) -> None:
        """ValueError names a candidate that this class of quantizers does not take."""
        for candidate, scheme in zip(self.candidates, self._schemes, strict=True):
            try:
                if scheme is not None:
                    kind(config_groups={"candidate": scheme})
            except ValueError as error:
                raise ValueError(f"{self.name}: candidate {candidate!r}: {error}") from error

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._set_up(state)
        modules = {name: module for group in self._groups for name, module in group.modules.items()}
        self._sensitivities = Sensitivities(modules)
        self._sensitivities.watch(self)

    def on_block_surveyed(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._sensitivities is None:
            return
        self.remove_hooks()
        sensitivities, self._sensitivities = self._sensitivities, None
        losses = sensitivities.losses(self._groups, state.team, self.name)
        budget = self._budget(state.model)
        choice = state.team.result(lambda: choose([g.sizes for g in self._groups], losses, budget), self.name)
        self._report(state, choice)
        for quantizer in self._quantizers:
            quantizer.change_schemes(state.model, config_groups(choice_of(self._groups, choice)))

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        """Nothing is left to do in the walk, so that it may take one pass."""

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._groups = []

    def group_state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {}

    def survey_state(self) -> dict[str, Tensor] | None:
        return None if self._sensitivities is None else self._sensitivities.state_dict()

    def load_survey_state(self, state: dict[str, Tensor]) -> None:
        assert self._sensitivities is not None
        self._sensitivities.load_state_dict(state)

    # -- the choice ---------------------------------------------------------------------------------------------------

    @property
    def _schemes(self) -> list[QuantizationScheme | None]:
        return parse_candidates(self.candidates, self.group_size)

    def _set_up(self, state: State) -> None:
        """Options of the model as it is now, checked against the budget; quantizers get the largest ones for now."""
        model, first = state.model, self._quantizers[0]
        lists = [(listed(quantizer.targets), listed(quantizer.ignore)) for quantizer in self._quantizers]
        for quantizer, pair in zip(self._quantizers, lists, strict=True):
            if pair != lists[0]:
                raise ValueError(
                    f"{first.name} and {quantizer.name} have scheme='allocated' and different targets or ignore; give "
                    f"them the same"
                )
            quantizer.allocate(None)
        names = assign(model, first.schemes, listed(first.ignore))
        modules = {name: model.get_submodule(name) for name in names}
        self._groups = groups_of(modules, self._schemes, on_disk=self.bytes is not None)
        least, most = (sum(extreme(group.sizes) for group in self._groups) for extreme in (min, max))
        budget, asked = self._budget(model), f"bits={self.bits:g}" if self.bytes is None else f"bytes={self.bytes!r}"
        if budget < least:
            raise ValueError(
                f"{self.name}: {asked} is less than the smallest candidates take, {self._amount(model, least)}; ask "
                f"for more, or add smaller candidates"
            )
        if budget > most:
            warnings.warn(
                f"{self.name}: {asked} is more than the largest candidates take, {self._amount(model, most)}; ask for "
                f"less, or add larger candidates",
                stacklevel=2,
            )
        largest = [max(range(len(group.sizes)), key=group.rank) for group in self._groups]
        for quantizer in self._quantizers:
            quantizer.allocate(config_groups(choice_of(self._groups, largest)))

    def _budget(self, model: nn.Module) -> int:
        """Bytes of the weights of all groups, at most."""
        if self.bytes is None:
            assert self.bits is not None
            return math.floor(self.bits * self._weights / 8)
        return bytes_of(self.bytes, "bytes") - self._others(model)

    def _amount(self, model: nn.Module, size: int) -> str:
        """A size of all groups in the unit of the argument."""
        if self.bytes is None:
            return f"{8 * size / self._weights:.4g} bits per weight"
        return f"{size + self._others(model):,} bytes, {self._others(model):,} of them in tensors that stay dense"

    @property
    def _weights(self) -> int:
        return sum(as_matrix(module).numel() for group in self._groups for module in group.modules.values())

    def _others(self, model: nn.Module) -> int:
        """Bytes of all tensors but the weights of the groups; those that modules share count once."""
        tensors = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
        dense = sum(stored(None, module, True) for group in self._groups for module in group.modules.values())
        return sum(tensors.values()) - dense

    def _report(self, state: State, choice: Sequence[int]) -> None:
        """The model's row of the ledger, rows of modules that stay dense, and the file."""
        size = sum(group.sizes[k] for group, k in zip(self._groups, choice, strict=True))
        counts: Counter[str] = Counter()
        for group, k in zip(self._groups, choice, strict=True):
            for name, scheme in group.schemes[k].items():
                counts[DENSE if scheme is None else describe(scheme)] += 1
                if scheme is None:
                    W_RC = as_matrix(group.modules[name])
                    facts = {"bits": 8.0 * W_RC.element_size(), "params": W_RC.numel()}
                    size_of = {"bytes_before": W_RC.nbytes, "bytes_after": W_RC.nbytes}
                    state.ledger.add(name, self.technique, flag="stays dense", **facts, **size_of)
        amount = self._amount(state.model, size)
        schemes = ", ".join(f"{count} x {scheme}" for scheme, count in sorted(counts.items()))
        state.ledger.add("model", self.technique, flag=f"{amount}: {schemes}")
        logger.info("%s: %s: %s", self.name, amount, schemes)
        content = {"config_groups": config_groups(choice_of(self._groups, choice))}
        text = f"# {self.name}: {amount}\n" + yaml.safe_dump(content, sort_keys=False, width=120)
        state.ledger.files[FILE] = text
        if self.path is not None and state.team.rank == 0:
            with whole_file(self.path) as path:
                path.write_text(text, encoding="utf-8")
