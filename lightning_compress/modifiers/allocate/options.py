"""What each group of modules can get, in how many bytes. A group is what servers fuse, so that it must have one scheme.

Groups are query, key and value; gate and up; all experts of a mixture; else a module by itself. Bytes are those that
the ledger reports: codes, scales and zero points.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lightning_compress.layers.matching import shortlist
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.quant.config_groups import fused_groups
from lightning_compress.quant.observers import is_observed
from lightning_compress.quant.packing import is_packable
from lightning_compress.quant.schemes import GroupSize, SizedByModule, from_inline, from_presets
from lightning_compress.quant.weight_metrics import planned_bytes

__all__ = ["DENSE", "Group", "choice_of", "groups_of", "parse_candidates", "stored"]

DENSE = "dense"
ANY = ("Linear",)  # targets, which are not used
_NAMED = re.compile(r"(\S+) (?:g(\d+)|(channel))")


@dataclass(frozen=True)
class Group:
    """Modules that get one candidate, and what each candidate that fits them means.

    Args:
        modules: By dotted name.
        schemes: For each candidate the scheme of each module; None: it stays dense.
        sizes: For each candidate the bytes of all its modules.
    """

    modules: dict[str, nn.Module]
    schemes: list[dict[str, QuantizationScheme | None]]
    sizes: list[int]

    def rank(self, option: int) -> tuple[bool, int]:
        """The largest option that is not dense has the highest rank."""
        return None not in self.schemes[option].values(), self.sizes[option]


def parse_candidates(
    candidates: Sequence[str | Mapping[str, Any]], group_size: GroupSize
) -> list[QuantizationScheme | None]:
    """The schemes of candidates; None for ``dense``.

    Args:
        candidates: Names of presets, with a group size of their own where one is written (``W3A16 g64``, ``W8A16
            channel``), schemes in full, or ``dense``.
        group_size: Of the presets without one.

    Raises:
        ValueError: A preset is unknown, or a scheme needs calibrated scales of activations.
    """
    schemes: list[QuantizationScheme | None] = []
    for candidate in candidates:
        if candidate == DENSE:
            schemes.append(None)
            continue
        try:
            scheme = _preset(candidate, group_size) if isinstance(candidate, str) else from_inline(candidate, ANY)[0]
        except ValueError as error:
            raise ValueError(f"candidate {candidate!r}: {error}") from error
        if is_observed(scheme.input_activations):
            raise ValueError(
                f"candidate {candidate!r} has static scales of activations, which must be calibrated before schemes "
                f"are chosen; take one with dynamic activations, or none"
            )
        schemes.append(scheme)
    return schemes


def groups_of(
    modules: Mapping[str, nn.Module], candidates: Sequence[QuantizationScheme | None], on_disk: bool
) -> list[Group]:
    """The groups of these modules in their order, each with the candidates that fit all of its modules.

    Args:
        modules: By dotted name.
        candidates: As :func:`parse_candidates` gives them.
        on_disk: Count bytes as exported, where modules that no reader unpacks (convolutions) stay dense.

    Raises:
        ValueError: No candidate fits a group; the message names it.
    """
    groups = []
    for names in fused_groups(modules):
        group = {name: modules[name] for name in names}
        options = [{name: _sized(scheme, module) for name, module in group.items()} for scheme in candidates]
        fitting = [each for each in options if all(_fits(each[name], module) for name, module in group.items())]
        if not fitting:
            columns = [f"{name!r} ({as_matrix(module).shape[1]})" for name, module in group.items()]
            raise ValueError(
                f"no group size of the candidates divides the input columns of {shortlist(columns)}; add a candidate "
                f"with group_size 'auto', or add them to ignore"
            )
        sizes = [sum(stored(each[name], group[name], on_disk) for name in group) for each in fitting]
        groups.append(Group(group, fitting, sizes))
    return groups


def choice_of(groups: Sequence[Group], choice: Sequence[int]) -> dict[str, QuantizationScheme | None]:
    """The scheme of each module, where ``choice`` has the number of the candidate of each group; None: dense."""
    pairs = zip(groups, choice, strict=True)
    return {name: scheme for group, option in pairs for name, scheme in group.schemes[option].items()}


def stored(scheme: QuantizationScheme | None, module: nn.Module, on_disk: bool) -> int:
    """Bytes of the weight of a module with this scheme; None: dense."""
    W_RC = as_matrix(module)
    if scheme is None or (on_disk and not (is_packable(module) or isinstance(module, WeightSlice))):
        return W_RC.numel() * W_RC.element_size()
    return planned_bytes(W_RC, scheme)


def _preset(candidate: str, group_size: GroupSize) -> QuantizationScheme:
    """A preset with the group size that its name ends with, or where it has groups of integers with the usual one."""
    if (match := _NAMED.fullmatch(candidate)) is not None:
        return from_presets(match[1], ANY, int(match[2] or -1))[0]
    (scheme,) = from_presets(candidate, ANY)
    has_groups = scheme.weights is not None and scheme.weights.type == "int" and scheme.weights.group_size
    return from_presets(candidate, ANY, group_size)[0] if has_groups else scheme


def _sized(scheme: QuantizationScheme | None, module: nn.Module) -> QuantizationScheme | None:
    return scheme.sized(as_matrix(module).shape[1]) if isinstance(scheme, SizedByModule) else scheme


def _fits(scheme: QuantizationScheme | None, module: nn.Module) -> bool:
    """Whether groups of columns divide the weight."""
    args = () if scheme is None else (scheme.weights, scheme.input_activations)
    columns = as_matrix(module).shape[1]
    return all(arg is None or (arg.group_size or 0) <= 0 or columns % arg.group_size == 0 for arg in args)
