"""The arguments that every quantizing modifier shares: which modules are quantized, and how."""

import warnings
from functools import cached_property
from typing import Any, ClassVar

from compressed_tensors.quantization import QuantizationScheme
from pydantic import BaseModel, PrivateAttr, model_validator
from torch import nn

from lightning_compress.layers.matching import Names, listed, select_weights
from lightning_compress.quant.assignment import GroupSizeError, assign
from lightning_compress.quant.embeddings import Embeddings
from lightning_compress.quant.observers import is_observed
from lightning_compress.quant.schemes import GroupSize, describe, from_groups, from_inline, from_presets, is_special

__all__ = ["ALLOCATED", "QuantizationArguments"]

ALLOCATED = "allocated"
"""The ``scheme`` of a quantizer that gets its schemes from an AllocateModifier."""


class QuantizationArguments(BaseModel):
    """Mixin of modifiers.

    Args:
        targets: Class names, dotted names or ``re:`` patterns of the modules that are quantized, with ``scheme``.
        ignore: Class names, dotted names or ``re:`` patterns of modules that are left out.
        scheme: A preset (``W4A16``, ``W8A8``, ``FP8_DYNAMIC`` ...), a mapping of presets to their targets, or one
            scheme in full: ``{weights: {num_bits: 4, group_size: auto}}``. ``allocated``: that which an
            AllocateModifier before it chooses for each module.
        group_size: Takes the place of the preset's group size; -1 for one scale per row. Of a list each module gets the
            first that divides its columns; ``auto``: [128, 64, 32, -1], where the preset has groups.
        config_groups: Schemes in full, as in the ``quantization_config`` of compressed-tensors, in place of ``scheme``.
    """

    every_format: ClassVar[bool] = False
    """True for a modifier that finds scales and rounds by quant.scales and quant.fake_quant alone, so that formats work
    whose scales have a format of their own, or are shared by blocks."""

    embeddings: ClassVar[Embeddings] = "refused"
    """How embeddings among the targets are treated."""

    promotable: ClassVar[bool] = False
    """Whether it can compress again, from the dense weights, with more bits: nothing of its work is left elsewhere."""

    targets: Names = ["Linear"]
    ignore: Names = []
    scheme: str | dict[str, str | list[str] | dict[str, Any] | None] | None = None
    group_size: GroupSize | None = None
    config_groups: dict[str, Any] | None = None

    _planned: dict[str, QuantizationScheme] = PrivateAttr(default_factory=dict)
    _allocation: dict[str, Any] | None = PrivateAttr(default=None)  # config_groups; {}: all modules stay dense

    @model_validator(mode="after")
    def _scheme_is_known(self) -> "QuantizationArguments":
        if (self.scheme is None) == (self.config_groups is None):
            came = "neither" if self.scheme is None else "both"
            raise ValueError(f"expected either scheme (such as 'W4A16') or config_groups, got {came}")
        usual = type(self).model_fields["targets"].default  # dumped recipes and LightningCLI write the default
        if not (isinstance(self.scheme, str) or self._is_inline) and self.targets not in (usual, *usual):
            field = "config_groups" if self.scheme is None else "scheme as a mapping"
            raise ValueError(f"targets and {field} exclude each other: the targets are inside; leave targets out")
        if self.group_size is not None and (self.scheme is None or self._is_inline):
            field = "config_groups" if self.scheme is None else "a scheme in full"
            raise ValueError(f"group_size and {field} exclude each other: write group_size inside, under weights")
        if self.group_size is not None and self.scheme == ALLOCATED:
            raise ValueError("group_size and scheme='allocated' exclude each other: candidates have group sizes")
        for scheme in self.schemes:
            if not self.every_format and is_special(scheme):
                raise ValueError(
                    f"{describe(scheme)} has scales of a format of their own, or shared by blocks, which "
                    f"{type(self).__name__} does not know; QuantizationModifier, GPTQModifier, AutoRoundModifier and "
                    f"QATModifier do"
                )
        return self

    @cached_property
    def schemes(self) -> list[QuantizationScheme]:
        """The schemes in the order of the recipe; before an allocation, one that fits all targets."""
        if self.config_groups is not None:
            return from_groups(self.config_groups)
        assert self.scheme is not None
        if self.scheme == ALLOCATED:
            groups = self._allocation
            if groups is None:
                return from_presets("W8A16", listed(self.targets), -1)
            return from_groups(groups) if groups else []
        if self._is_inline:
            assert isinstance(self.scheme, dict)
            return from_inline(self.scheme, listed(self.targets))
        targets = listed(self.targets)
        presets: Any = self.scheme  # from_presets refuses values that are mappings
        return from_presets(presets, targets, self.group_size)

    @property
    def _is_inline(self) -> bool:
        return isinstance(self.scheme, dict) and "weights" in self.scheme

    @property
    def has_static_inputs(self) -> bool:
        """True when a scheme needs calibrated activation scales."""
        return any(is_observed(s.input_activations) for s in self.schemes)

    def claims(self, state: Any) -> dict[str, str]:
        """One quantizer for each module: :meth:`lightning_compress.core.Modifier.claims`."""
        ignore = listed(self.ignore)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # assign warns again
            names = {name for scheme in self.schemes for name in select_weights(state.model, scheme.targets, ignore)}
        return dict.fromkeys(sorted(names), "quantize")

    @property
    def planned(self) -> dict[str, QuantizationScheme]:
        """The last result of :meth:`assign`."""
        return dict(self._planned)

    def assign(self, model: nn.Module) -> dict[str, QuantizationScheme]:
        """Each module's scheme, by dotted name; ValueError as in :func:`lightning_compress.quant.assignment.assign`."""
        ignore = listed(self.ignore)
        if self.scheme == ALLOCATED and self._allocation is None:
            raise ValueError(
                "scheme='allocated' needs an AllocateModifier before it in the recipe, which chooses the scheme of "
                "each module; add one, or write a scheme such as 'W4A16'"
            )
        try:
            self._planned = assign(model, self.schemes, ignore, self.embeddings)
            return dict(self._planned)
        except GroupSizeError as error:
            override = getattr(self, "override", None)  # where Hydra built the modifier
            if override is None or (argument := self._group_size_of(error.scheme)) is None:
                raise
            raise ValueError(f"{error}{override(argument, error.size)}") from None

    def allocate(self, config_groups: dict[str, Any] | None) -> None:
        """With ``scheme='allocated'``: the schemes that were chosen; None: none is yet."""
        self._allocation = config_groups
        self.__dict__.pop("schemes", None)

    def _group_size_of(self, scheme: QuantizationScheme) -> str | None:
        """The argument that holds the group size of one of :attr:`schemes`."""
        if self.config_groups is None:
            return "scheme.weights.group_size" if self._is_inline else "group_size"
        named = zip(self.config_groups, self.schemes, strict=True)
        return next(
            (f"config_groups.{name}.weights.group_size" for name, candidate in named if candidate is scheme), None
        )
