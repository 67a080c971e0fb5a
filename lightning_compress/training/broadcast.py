"""What rank 0 made of the model after training goes to the other ranks: structure, weights, records.

Calibration changes more than numbers: blocks, channels and experts are removed, tied weights are untied, layers carry
scales. All ranks first build the same tensors and compare them, and only then are weights sent one by one: a rank that
waits for a tensor which no other rank has waits for ever. What spawned workers cannot send back is named.
"""

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.layers.module_weights import reveal
from lightning_compress.layers.records import Record
from lightning_compress.layers.split_experts import is_split, join, split
from lightning_compress.modifiers.rotation.online import OnlineRotations
from lightning_compress.quant.kv_cache import QuantizedCache
from lightning_compress.quant.record import Quantized
from lightning_compress.structure.surgery import record_of, reshape
from lightning_compress.team import Team

__all__ = ["beside_weights", "mend", "send_weights", "share", "spawns_workers", "ties", "warn_of_workers"]

KINDS: tuple[type[Record], ...] = (Quantized, QuantizedCache, OnlineRotations)
"""The records that are sent after the weights; the cuts go before, since they make the shapes of the weights."""


@dataclass(frozen=True)
class _Structure:
    """How the tensors of a model lie.

    Args:
        cuts: What was cut away, as in structure/surgery.py.
        owners: By each parameter's name the first name of the same tensor.
        tied: By module name the ``tie_word_embeddings`` of its config.
    """

    cuts: list[dict[str, Any]]
    owners: dict[str, str]
    tied: dict[str, bool]


def share(model: nn.Module, device: torch.device, team: Team) -> None:
    """Make the model of every rank that of rank 0; every rank calls this, with its device.

    ValueError, on every rank, when rank 0 changed the model in a way that the others cannot repeat.
    """
    if team.alone:
        return
    structure = team.result(lambda: _structure_of(model), "sending the structure of the model")
    fault = ""
    try:
        _apply(model, structure)
    except Exception as error:  # raised on every rank: the others would wait for this one
        fault = f"{type(error).__name__}: {error}"
    reports = team.gather((fault, _outline(model)))
    for rank, (fault, outline) in enumerate(reports):
        if fault or outline != reports[0][1]:
            differing = sorted(name for name, *_ in set(outline) ^ set(reports[0][1])) or ["their order"]
            raise ValueError(
                f"after training the model was changed on rank 0 alone, and rank {rank} cannot follow: "
                f"{fault or f'tensors differ, such as {differing[0]}'}; change the model at set-up, which all ranks "
                f"do, or train on one device"
            )
    send_weights(team, model)
    are_split, records = team.result(lambda: _records(model), "sending scales")
    if team.rank != 0:
        if are_split:
            split(model)
        reveal(model)
        _attach(model, records, device)
        join(model)  # slices that carry no record


def send_weights(team: Team, module: nn.Module) -> None:
    """Every rank gets the parameters and buffers of rank 0."""
    team.broadcast_([t.data for t in (*module.parameters(), *module.buffers())])


def mend(model: nn.Module, team: Team) -> None:
    """Compare what all ranks made of the model together; where they differ, a warning, and all get that of rank 0."""
    if team.alone:
        return
    sums = _checksums(model)
    ranks = team.gather(sums, "calibration")
    for rank, other in enumerate(ranks):
        if differing := sorted(name for name in {*other, *ranks[0]} if other.get(name) != ranks[0].get(name)):
            rank_zero_warn(
                f"after calibration {len(differing)} tensors of rank {rank} differ from those of rank 0, such as "
                f"{differing[0]}; all ranks get those of rank 0 (ranks compute equal bits on machines of one kind, "
                f"with equal numbers of threads)"
            )
            share(model, next(model.parameters()).device, team)
            return


def _checksums(model: nn.Module) -> dict[str, int]:
    """By name a checksum of each parameter, each buffer, and each tensor of a record."""
    tensors: dict[str, Tensor] = dict((*model.named_parameters(), *model.named_buffers()))
    for kind in KINDS:
        for name, (_, record) in kind.find(model).items():
            fields = {f"{name}.{field}": value for field, value in vars(record).items() if isinstance(value, Tensor)}
            tensors |= fields
    as_bytes = {name: t.detach().cpu().contiguous().view(-1).view(torch.uint8) for name, t in tensors.items()}
    return {name: crc32(value.numpy().data) for name, value in as_bytes.items()}


def ties(model: nn.Module) -> int:
    """How many names there are of parameters that have another name already."""
    return sum(name != owner for name, owner in _structure_of(model).owners.items())


def beside_weights(model: nn.Module) -> list[str]:
    """What belongs to the compressed model and is not in its weights."""
    schemes = [record.scheme for _, record in Quantized.find(model).values()]
    present = {
        "the quantization of activations": any(scheme.input_activations is not None for scheme in schemes),
        "the quantization of the KV cache": bool(QuantizedCache.find(model)),
        "the rotations that run beside modules": bool(OnlineRotations.find(model)),
    }
    return [name for name, is_present in present.items() if is_present]


def spawns_workers(trainer: Trainer) -> bool:
    """Whether workers train in processes of their own and send weights back to the main process, and nothing else."""
    return any(c.__name__ == "_MultiProcessingLauncher" for c in type(trainer.strategy.launcher).__mro__)


def warn_of_workers(trainer: Trainer, model: nn.Module, ties_before: int) -> None:
    """Name what the main process does not get back from spawned workers; ``ties_before`` is :func:`ties` before."""
    if not spawns_workers(trainer):
        return
    if record_of(model):
        rank_zero_warn(
            "the main process keeps the model as it was before this fit: the tensors that were trained are smaller; "
            "test with ckpt_path='best', or load(folder, model)"
        )
        return
    missing = beside_weights(model)
    if ties(model) < ties_before:
        missing.append("that weights were untied (both get the values of one)")
    if missing:
        rank_zero_warn(
            f"the main process gets the compressed weights back from its workers, but not {', nor '.join(missing)}; "
            f"what is exported has all: load(folder, model) before testing"
        )


def _structure_of(model: nn.Module) -> _Structure:
    """How the tensors of this model lie."""
    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    owners = {name: first.setdefault(id(parameter), name) for name, parameter in names}
    configs = {name: getattr(module, "config", None) for name, module in model.named_modules()}
    ties = {name: getattr(config, "tie_word_embeddings", None) for name, config in configs.items()}
    tied = {name: value for name, value in ties.items() if isinstance(value, bool)}
    return _Structure(record_of(model), owners, tied)


def _apply(model: nn.Module, structure: _Structure) -> None:
    reshape(model, structure.cuts)
    for name, owner in _structure_of(model).owners.items():
        if owner != name and structure.owners.get(name, owner) == name:
            path, _, attribute = name.rpartition(".")
            parameter = model.get_parameter(name)
            untied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(model.get_submodule(path), attribute, untied)
    for name, tied in structure.tied.items():
        config: Any = model.get_submodule(name).config
        config.tie_word_embeddings = tied


def _outline(model: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]


def _records(model: nn.Module) -> tuple[bool, list[tuple[str, Record]]]:
    """Whether experts are split into modules, and what modules carry beside their tensors, by name, on the CPU."""
    cpu = torch.device("cpu")
    records = [(name, record.to(cpu)) for kind in KINDS for name, (_, record) in kind.find(model).items()]
    return any(is_split(module) for module in model.modules()), records


def _attach(model: nn.Module, records: list[tuple[str, Record]], device: torch.device) -> None:
    for name, record in records:
        record.to(device).attach(model.get_submodule(name))
