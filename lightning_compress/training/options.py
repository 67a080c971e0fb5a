"""The arguments of ``CompressionCallback``: checked in one place, and merged with those that a recipe sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lightning_compress.calibration.options import CalibrationOptions, check_flag, check_whole_number
from lightning_compress.core.lifecycle import modifiers_in_order
from lightning_compress.core.modifier import Modifier
from lightning_compress.export.formats import check_formats
from lightning_compress.export.gguf.write import check_package
from lightning_compress.export.onnx.expressible import check_packages
from lightning_compress.recipe import read_recipe
from lightning_compress.resume.folder_log import Resume, check_resume
from lightning_compress.training.gate import Gate, read_gates
from lightning_compress.training.hub import Hub, read_hub
from lightning_compress.training.promotion import check_promotable

__all__ = ["CallbackOptions", "read_arguments"]


@dataclass(frozen=True)
class CallbackOptions:
    """The arguments of :class:`lightning_compress.CompressionCallback` of the same names.

    Args:
        calibration: Those of them that calibration uses.
        recipe_name: Its argument ``recipe``, for the report.

    Raises:
        ValueError: A value has the wrong type, or is out of range.
    """

    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    module: str | None = None
    export_dir: str | None = None
    calibration_batches: int = 16
    load_best: bool = True
    evaluate: bool = True
    eval_batches: int | None = None
    allow_recipe_change: bool = False
    verify: bool | Literal["auto"] = "auto"
    resume: Resume = "auto"
    plan: bool | Literal["compare"] = False
    gate: dict[str, Any] | list[dict[str, Any]] | None = None
    on_gate: Literal["fail", "promote"] = "fail"
    hub: dict[str, Any] | None = None
    export: str | list[str] = "compressed_tensors"
    recipe_name: str | None = None

    def __post_init__(self) -> None:
        """Check types, too: Hydra and YAML pass on whatever the user wrote."""
        check_whole_number("calibration_batches", self.calibration_batches)
        if self.eval_batches is not None:
            check_whole_number("eval_batches", self.eval_batches)
        for name in ("load_best", "evaluate", "allow_recipe_change"):
            check_flag(name, getattr(self, name))
        if not isinstance(self.export_dir, str | Path | None):
            raise ValueError(f"export_dir={self.export_dir!r} is a {type(self.export_dir).__name__}, expected a path")
        if self.calibration_batches < 1:
            raise ValueError(f"calibration_batches={self.calibration_batches}: expected at least 1")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise ValueError(f"eval_batches={self.eval_batches}: expected at least 1; evaluate=False measures nothing")
        check_resume(self.resume)
        if self.plan not in (False, True, "compare"):
            raise ValueError(f"plan={self.plan!r}: expected True, False or 'compare'")
        if self.verify not in ("auto", True, False):
            raise ValueError(f"verify={self.verify!r}: expected 'auto', True or False")
        if self.on_gate not in ("fail", "promote"):
            raise ValueError(f"on_gate={self.on_gate!r}: expected 'fail' or 'promote'")
        if self.on_gate == "promote" and not self.gates:
            raise ValueError(
                "on_gate='promote' has no gate to reach: give one, such as gate={'metric': 'val/loss', ...}"
            )
        read_hub(self.hub)
        if "onnx" in self.formats:
            check_packages()
        if "gguf" in self.formats:
            check_package()
        if self.gates and not self.evaluate:
            raise ValueError(
                f"gate of {self.gates[0].metric!r} needs the metric, which evaluate=False does not measure"
            )

    @property
    def target(self) -> Hub | None:
        """The argument ``hub``, read."""
        return read_hub(self.hub)

    @property
    def formats(self) -> tuple[str, ...]:
        """The argument ``export`` as a tuple."""
        return check_formats("export", self.export)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The argument ``gate``, read."""
        return read_gates(self.gate)


def read_arguments(
    modifiers: Modifier | Sequence[Modifier] | Mapping[str, Modifier] | None,
    recipe: str | None,
    arguments: Mapping[str, Any],
) -> tuple[list[Modifier], CallbackOptions]:
    """Modifiers in order, and options; a setting of the recipe is used where the argument has its default.

    Args:
        modifiers: The callback's argument; those in a dict get their keys as names.
        recipe: The callback's argument.
        arguments: All other arguments, by name.

    Raises:
        ValueError: Neither or both of ``modifiers`` and ``recipe`` are given, an entry is not a modifier, the recipe
            sets something that is not an argument, or ``hub``, which is for the caller alone, or a value is wrong.
    """
    if (modifiers is None) == (recipe is None):
        both = "both" if modifiers is not None else "neither"
        raise ValueError(f"expected either modifiers or recipe, got {both}: CompressionCallback(recipe='gptq_w4')")
    settings: Mapping[str, Any] = {}
    if recipe is not None:
        content = read_recipe(recipe)
        modifiers, settings = content.modifiers, content.arguments
    if "hub" in settings:
        raise ValueError("the recipe sets hub, but no file says where weights go: CompressionCallback(hub=...) does")
    if unknown := sorted(settings.keys() - arguments.keys()):
        raise ValueError(
            f"the recipe sets {unknown}, which CompressionCallback does not take; it takes {sorted(arguments)}"
        )
    defaults = {f.name: f.default for f in (*fields(CalibrationOptions), *fields(CallbackOptions))}
    merged = {n: settings.get(n, value) if value == defaults[n] else value for n, value in arguments.items()}
    calibration = {f.name: merged.pop(f.name) for f in fields(CalibrationOptions) if f.name in merged}
    options = CallbackOptions(CalibrationOptions(**calibration), **merged, recipe_name=recipe)
    ordered = _named(modifiers)
    if options.on_gate == "promote":
        check_promotable(ordered)
    return ordered, options


def _named(modifiers: Any) -> list[Modifier]:
    """Modifiers in order; ValueError names an entry of a dict that is not one, as after an override with a typo."""
    for name, modifier in modifiers.items() if isinstance(modifiers, Mapping) else ():
        if not isinstance(modifier, Modifier):
            raise ValueError(
                f"modifiers.{name} is {modifier!r}, expected a Modifier; entries of the recipe that are modifiers: "
                f"{', '.join(n for n, m in modifiers.items() if isinstance(m, Modifier)) or 'none'}"
            )
        modifier.called(name)
    return modifiers_in_order(modifiers)
