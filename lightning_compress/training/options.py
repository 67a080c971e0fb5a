"""The arguments of ``CompressionCallback``: checked in one place, and merged with those that a recipe sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lightning_compress.calibration.options import CalibrationOptions, check_flag, check_whole_number
from lightning_compress.core.lifecycle import modifiers_in_order
from lightning_compress.core.modifier import Modifier

__all__ = ["CallbackOptions", "merge_options", "named_modifiers"]


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
        if self.verify not in ("auto", True, False):
            raise ValueError(f"verify={self.verify!r}: expected 'auto', True or False")


def merge_options(
    arguments: Mapping[str, Any], settings: Mapping[str, Any] | None = None, recipe_name: str | None = None
) -> CallbackOptions:
    """Options from the callback's arguments; a setting of the recipe is used where the argument has its default.

    Args:
        arguments: All arguments but ``modifiers`` and ``recipe``, by name.
        settings: Settings of the recipe.
        recipe_name: Name of the recipe.

    Raises:
        ValueError: The recipe sets something that is not an argument, or a value is wrong.
    """
    settings = settings or {}
    if unknown := sorted(settings.keys() - arguments.keys()):
        raise ValueError(
            f"the recipe sets {unknown}, which CompressionCallback does not take; it takes {sorted(arguments)}"
        )
    defaults = {f.name: f.default for f in (*fields(CalibrationOptions), *fields(CallbackOptions))}
    merged = {n: settings.get(n, value) if value == defaults[n] else value for n, value in arguments.items()}
    calibration = {f.name: merged.pop(f.name) for f in fields(CalibrationOptions) if f.name in merged}
    return CallbackOptions(CalibrationOptions(**calibration), **merged, recipe_name=recipe_name)


def named_modifiers(modifiers: Modifier | Sequence[Modifier] | Mapping[str, Modifier]) -> list[Modifier]:
    """Modifiers in order; those in a dict get their keys as names.

    Raises:
        ValueError: An entry of the dict is not a modifier, as after an override with a misspelled key.
    """
    for name, modifier in modifiers.items() if isinstance(modifiers, Mapping) else ():
        if not isinstance(modifier, Modifier):
            raise ValueError(
                f"modifiers.{name} is {modifier!r}, expected a Modifier; entries of the recipe that are modifiers: "
                f"{', '.join(n for n, m in modifiers.items() if isinstance(m, Modifier)) or 'none'}"
            )
        modifier.called(name)
    return modifiers_in_order(modifiers)
