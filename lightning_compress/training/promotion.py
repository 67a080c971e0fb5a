"""Promotion: where a gate does not hold, modules with the largest errors get more bits, and all is compressed again.

    W2 -> W3 -> W4 -> W8 -> dense          one step for a module that is promoted
    round r of R                           the worst modules go a step up, 1 / 2^(R - r) of all weights
    the last round                         all modules get 8 bits at least; where they have them, the worst half a step

Errors are those of the report, of outputs where there is data. What servers fuse is promoted together. Each round
begins with the dense weights, which lie in a file meanwhile: so its result is that of a run with these schemes, and a
run that is killed begins anew from its checkpoint, with the schemes of the recipe.
"""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_compress.core.lifecycle import Lifecycle
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.state import State
from lightning_compress.layers.split_experts import join
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.config_groups import Schemes, config_groups, fused_groups, raised
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import describe
from lightning_compress.resume.folder_log import remove as remove_log

__all__ = ["FILE", "Promotion", "check_promotable", "promoted"]

FILE = "promotion.yaml"
HIGHEST = 8  # bits that all modules get before the run gives up
HALF = 0.5


def check_promotable(modifiers: Sequence[Modifier]) -> None:
    """ValueError where a modifier of the recipe cannot compress again with more bits; the message says what to do."""
    advice = "on_gate='fail' works with every recipe"
    for modifier in modifiers:
        quantizer = modifier if isinstance(modifier, QuantizationArguments) else None
        if quantizer is None or not quantizer.promotable or modifier.start is not None:
            raise ValueError(
                f"on_gate='promote' compresses again from the dense weights with more bits, which {modifier.name} "
                f"does not allow: it works where all modifiers round after training (QuantizationModifier, "
                f"GPTQModifier, AWQModifier); {advice}"
            )
        for scheme in quantizer.schemes:
            if scheme.weights.type != "int":
                raise ValueError(
                    f"on_gate='promote' raises the bits of integers, and {modifier.name} has {describe(scheme)}; "
                    f"{advice}"
                )


def promoted(
    schemes: Schemes, errors: Mapping[str, float], sizes: Mapping[str, int], round_: int, rounds: int
) -> Schemes:
    """The schemes of the next round; those that change are new objects.

    Args:
        schemes: Of each module; None: it is dense.
        errors: Of modules; of those without one it is 0.
        sizes: Weights of each module.
        round_: From 1 to ``rounds``.
        rounds: How many there are.
    """
    low = [name for name, scheme in schemes.items() if scheme is not None and scheme.weights.num_bits < HIGHEST]
    if round_ == rounds and low:
        return {**schemes, **{name: raised(schemes[name], HIGHEST) for name in low}}

    def mean_error(group: Sequence[str]) -> float:
        weights = sum(sizes.get(name, 0) for name in group)
        return sum(errors.get(name, 0.0) * sizes.get(name, 0) for name in group) / max(weights, 1)

    groups = [group for group in fused_groups(schemes) if any(schemes[name] is not None for name in group)]
    share = min(0.5 ** (rounds - round_), 1.0 if low else HALF)
    chosen, weights, enough = dict[str, Any](), 0, share * sum(sizes.values())
    for group in sorted(groups, key=mean_error, reverse=True):
        if weights >= enough:
            break
        chosen |= {name: raised(schemes[name]) for name in group if schemes[name] is not None}
        weights += sum(sizes.get(name, 0) for name in group)
    return {**schemes, **chosen}


class DenseWeights:
    """The tensors of a model in a file without a name, which the system removes with the process."""

    def __init__(self, model: nn.Module, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (close)
        for tensor in _tensors(model).values():
            self._file.write(_bytes(tensor.detach().cpu().contiguous()).numpy().data)
        self.names = list(_tensors(model))

    def restore(self, model: nn.Module) -> None:
        """Write them back; ValueError where the model has other tensors by now."""
        tensors = _tensors(model)
        if list(tensors) != self.names:
            changed = sorted({*tensors} ^ {*self.names})
            raise ValueError(f"cannot go back to the dense model: {', '.join(changed[:3])} came or went meanwhile")
        self._file.seek(0)
        for tensor in tensors.values():
            saved = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            self._file.readinto(_bytes(saved).numpy().data)
            tensor.data.copy_(saved)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


@dataclass
class Promotion:
    """The rounds of one run; every rank calls the methods.

    Args:
        lifecycle: Its modifiers are replaced in each round.
        state: With the dense model.
        rounds: How many there may be.
        folder: Folder of the run, on rank 0 for the dense weights.
        log: Folder of the log of the calibration, which belongs to one round.
    """

    lifecycle: Lifecycle
    state: State
    rounds: int
    folder: Path
    log: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    _schemes: dict[str, list[Any]] = field(default_factory=dict)  # of each module, one for each round that changed it
    _sizes: dict[str, int] = field(default_factory=dict)
    _dense: DenseWeights | None = None

    def __post_init__(self) -> None:
        def save() -> None:
            self._dense = DenseWeights(self.state.model, self.folder)

        self.state.team.result(save, "saving the dense weights")

    def begin_round(self, seed: int) -> bool:
        """Dense weights, new schemes, and modifiers that have them; False where no round or no scheme is left."""
        team, number = self.state.team, len(self.history) + 1
        plan = team.result(lambda: self._plan(number), "choosing what to promote") if number <= self.rounds else None
        if plan is None:
            return False
        groups, entry = plan
        self.history.append(entry)
        rank_zero_info(
            f"the gate does not hold; round {number} of promotion: {len(entry['promoted'])} modules get more bits"
        )
        self._undo()
        torch.manual_seed(seed)
        pairs = zip(self.lifecycle.modifiers, groups, strict=True)
        self.lifecycle.modifiers[:] = [
            modifier.anew(scheme=None, group_size=None, targets=None, config_groups=group) for modifier, group in pairs
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # set-up has warned
            self.lifecycle.initialize(self.state)
        return True

    def end(self) -> dict[str, Any]:
        """What the report shows: the rounds; in the ledger flags of promoted modules, and the schemes as a file."""
        if self._dense is not None:
            self._dense.close()
        if not self.history:
            return {}
        names = {row.module: row.technique for row in self.state.ledger}
        for name, step in self._changes().items():
            if name in names:
                self.state.ledger.add(name, names[name], flag=f"promoted {step}")
        self.state.ledger.files[FILE] = self._file()
        return {"promotion": self.history}

    def note(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """The gates after a round."""
        if self.history:
            self.history[-1]["gates"] = [str(entry["text"]) for entry in entries]

    # -- one round ----------------------------------------------------------------------------------------------------

    @property
    def _planned(self) -> list[dict[str, Any]]:
        """The schemes of each modifier that are not dense."""
        return [modifier.planned for modifier in self.lifecycle.modifiers]  # type: ignore[attr-defined]

    def _plan(self, number: int) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
        """The config_groups of each modifier, and an entry of the report; None where nothing can be promoted."""
        present = {name: scheme for planned in self._planned for name, scheme in planned.items()}
        if not self._schemes:
            self._schemes = {name: [scheme] for name, scheme in present.items()}
        schemes = {name: steps[-1] for name, steps in self._schemes.items()}
        self._sizes |= {row.module: row.params for row in self.state.ledger if row.params}
        errors = {row.module: row.error for row in self.state.ledger if row.error is not None}
        chosen = promoted(schemes, errors, self._sizes, number, self.rounds)
        changed = [name for name in chosen if chosen[name] is not schemes[name]]
        groups = [config_groups({name: chosen[name] for name in planned}) for planned in self._planned]
        if not changed or not all(groups):
            return None
        for name in changed:
            self._schemes[name].append(chosen[name])
        steps = {name: f"{_title(schemes[name])} -> {_title(chosen[name])}" for name in changed}
        return groups, {"round": number, "promoted": steps}

    def _undo(self) -> None:
        """The dense model, without a record."""
        model, team = self.state.model, self.state.team
        for module, _ in Quantized.find(model).values():
            Quantized.detach(module)
        join(model)
        self.state.ledger.load_state_dict([])

        def restore() -> None:
            assert self._dense is not None
            self._dense.restore(model)
            remove_log(self.log)

        team.result(restore, "going back to the dense weights")
        team.broadcast_([tensor.data for tensor in _tensors(model).values()])

    def _changes(self) -> dict[str, str]:
        """The first and the last scheme of the modules that were promoted."""
        steps = {name: [_title(scheme) for scheme in each] for name, each in self._schemes.items()}
        return {name: f"from {titles[0]} to {titles[-1]}" for name, titles in steps.items() if len(titles) > 1}

    def _file(self) -> str:
        """The schemes as an AllocateModifier writes them; by modifier where there are several."""
        groups = {
            key: {"config_groups": modifier.config_groups}  # type: ignore[attr-defined]
            for key, modifier in zip(self.lifecycle.keys(), self.lifecycle.modifiers, strict=True)
        }
        content = next(iter(groups.values())) if len(groups) == 1 else {"modifiers": groups}
        title = f"# promoted in {len(self.history)} rounds: {len(self._changes())} modules\n"
        return title + yaml.safe_dump(content, sort_keys=False, width=120)


def _title(scheme: Any) -> str:
    return "dense" if scheme is None else describe(scheme)
