"""Checks of an exported folder, from its list of files to the outputs of the model in it.

Code in the folder is never run, and pickles are never read: either fails the first check, after which none follows.
"""

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.export import hugging_face, verify
from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.export.tensor_file import TensorFolder
from lightning_compress.export.tensors import read_json
from lightning_compress.files.atomic_folder import files_and_manifest
from lightning_compress.layers.finite import is_finite
from lightning_compress.layers.matching import shortlist
from lightning_compress.quant.record import Quantized

__all__ = ["Check", "check_folder", "differences"]

CODE = {".py", ".so", ".dll", ".dylib", ".sh"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy"}


@dataclass(frozen=True)
class Check:
    """One check: what was looked at, and what was found; ``passed`` is None where it could not be made."""

    name: str
    passed: bool | None
    note: str


def check_folder(
    folder: str | Path, dense: str | Path | None = None, batches: Sequence[Mapping[str, Tensor]] = ()
) -> Iterator[Check]:
    """Check the folder of a model; each check is made when it is asked for.

    Args:
        folder: As ``save`` writes it.
        dense: Folder of the dense model, to compare outputs with.
        batches: Keyword arguments of calls; by default the dummy inputs of transformers.
    """
    folder = Path(folder).expanduser().resolve()
    for name, check in (("files", _files), ("tensors", _tensors)):
        result = _made(name, lambda check=check: check(folder))
        yield result
        if not result.passed:
            return
    if "model_type" not in read_json(folder / "config.json"):
        yield Check("model", None, "not of transformers: build the dense model, and call load(folder, model)")
        return
    models: list[nn.Module] = []
    result = _made("shapes", lambda: _shapes(folder, models))
    yield result
    if not models:
        return
    model = models[0]
    yield _made("codes", lambda: _codes(folder, model))
    yield _made("transformers", lambda: _transformers(folder, model, batches))
    if dense is not None:
        yield _made("dense", lambda: _dense(Path(dense).expanduser().resolve(), model, batches))


def _made(name: str, check: Any) -> Check:
    try:
        with warnings.catch_warnings(), hugging_face.no_progress_bar():
            warnings.simplefilter("ignore")  # of loading and saving, which the user did not ask for
            return Check(name, True, check())
    except (ValueError, RuntimeError, OSError) as error:
        return Check(name, False, str(error))


def _files(folder: Path) -> str:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    present, listed = files_and_manifest(folder)
    if unsafe := sorted(name for name in present if Path(name).suffix in CODE | PICKLES):
        raise ValueError(f"{_quoted(unsafe)}: code and pickles are never read; remove them if you do not need them")
    if not listed:
        raise ValueError("no export_manifest.json, so that nothing says which files there must be")
    if missing := sorted(listed - present):
        raise ValueError(f"{_quoted(missing)} missing, which export_manifest.json lists; copy the folder again")
    if "auto_map" in read_json(folder / "config.json"):
        raise ValueError("config.json names code of its own (auto_map), which is never run; remove that key")
    more = sorted(present - listed)
    return f"{len(listed)} files, as the manifest lists them" + (f"; besides {_quoted(more)}" if more else "")


def _quoted(names: Sequence[str]) -> str:
    return shortlist([repr(name) for name in names])


def _tensors(folder: Path) -> str:
    files = TensorFolder(folder)
    if broken := [name for name in files.files if not _sound(files.read(name))]:
        raise ValueError(f"NaN or infinity in {_quoted(broken)}")
    return f"{len(files.files)} tensors, all finite"


def _sound(tensor: Tensor) -> bool:
    """Without NaN and infinity; minus infinity is for ``load``, which knows the masks."""
    return is_finite(tensor) or bool((tensor.float() < torch.inf).all())


def _shapes(folder: Path, models: list[nn.Module]) -> str:
    models.append(load(folder, packed=False, fuse=False))
    records = Quantized.find(models[0])
    kind = type(models[0]).__name__
    return f"those of a {kind} with this config; {len(records)} modules are quantized"


def _codes(folder: Path, model: nn.Module) -> str:
    """Codes out of their range, or in padding, do not survive a round trip."""
    with tempfile.TemporaryDirectory() as work:
        try:
            again, stored = TensorFolder(save(model, Path(work, "again"))), TensorFolder(folder)
        except RuntimeError as error:  # what it advises is for a model that was changed in memory
            raise ValueError(f"codes out of their range: {str(error).partition(' (largest gap')[0]}") from error
        different = again.files.keys() ^ stored.files.keys()
        for name in again.files.keys() & stored.files.keys():
            one, two = again.read(name), stored.read(name)
            if one.dtype != two.dtype or not torch.equal(_bytes(one), _bytes(two)):
                different.add(name)
    if different:
        raise ValueError(f"loaded and saved again, {_quoted(sorted(different))} differ: codes out of their range?")
    return "loaded and saved again, all tensors have the same bytes"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _transformers(folder: Path, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> str:
    gap, fault = verify.answers(model, folder, (lambda: model(**batches[0])) if batches else None)
    if fault:
        raise ValueError(fault)
    return f"loads it in another process; its outputs differ by {100 * (gap or 0):.2g} % of their norm from load's"


def _dense(source: Path, model: Any, batches: Sequence[Mapping[str, Tensor]]) -> str:
    teacher = hugging_face.dense_model(source)
    calls = batches or [hugging_face.example_of(model)]
    with torch.no_grad():
        outputs = [(verify.largest(model(**batch)), verify.largest(teacher(**batch))) for batch in calls]
    if shapes := {(tuple(a.shape), tuple(b.shape)) for (a, _), (b, _) in outputs if a.shape != b.shape}:
        raise ValueError(f"outputs of other shapes than those of {source}: {shapes}")
    if "input_ids" in calls[0] and outputs[0][0][1] == "logits":
        is_causal = outputs[0][0][0].ndim == 3 and "CausalLM" in type(model).__name__
        tokens = [batch["input_ids"] for batch in calls] if batches and is_causal else None
        measured = differences([a for (a, _), _ in outputs], [b for _, (b, _) in outputs], tokens)
        return _text(measured, "token" if outputs[0][0][0].ndim == 3 else "output")
    gap = sum((a - b).norm() for (a, _), (b, _) in outputs) / sum(b.norm() for _, (b, _) in outputs)
    return f"{outputs[0][0][1]} differ by {100 * float(gap):.3g} % of their norm"


def differences(
    logits: Sequence[Tensor], dense_logits: Sequence[Tensor], tokens: Sequence[Tensor] | None = None
) -> dict[str, float]:
    """How far logits [B, T, V] are from those of the dense model, as means over tokens.

    Args:
        logits: Of each batch.
        dense_logits: The same of the dense model.
        tokens: The tokens [B, T] that were read, for the perplexities of a causal language model.
    """
    p, q = (torch.cat([x.flatten(0, -2).float() for x in which]) for which in (dense_logits, logits))
    measured = {
        "kl": float(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")),
        "same_token": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
    }
    if tokens is not None:
        targets = torch.cat([ids[:, 1:].flatten() for ids in tokens])
        for name, which in (("perplexity_dense", dense_logits), ("perplexity", logits)):
            predicted = torch.cat([x[:, :-1].flatten(0, 1).float() for x in which])
            measured[name] = float(F.cross_entropy(predicted, targets).exp())
    return measured


def _text(measured: Mapping[str, float], unit: str) -> str:
    same = 100 * measured["same_token"]
    text = f"KL {measured['kl']:.3g} nats for each {unit}, the likeliest one is the same in {same:.3g} %"
    if "perplexity" in measured:
        text += f", perplexity {measured['perplexity_dense']:.4g} -> {measured['perplexity']:.4g}"
    return text
