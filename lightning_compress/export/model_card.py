"""The model card: README.md of an exported folder, as Hugging Face reads it: YAML between lines of dashes, then text.

It holds no time and no path of this machine, and the tensors of equal models give equal cards, byte for byte. A card
ends in a comment with its checksum: one that a user has edited stays as README.md when a run replaces its export, and
the new card is MODEL_CARD.md beside it. ``base_model`` is named where it is known to be a repository of the hub,
because its config lies in the cache; ``license`` is that of the README.md beside the weights of the base.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lightning_compress.export.contents import Contents
from lightning_compress.export.online import online_entries
from lightning_compress.export.readers import foreign_kind, server_fault
from lightning_compress.export.transform_config import rotation_note
from lightning_compress.layers.matching import clean_name
from lightning_compress.layers.matrix import is_supported
from lightning_compress.quant.schemes import describe

__all__ = ["CARD", "is_edited", "write_card"]

CARD = "README.md"
SECOND = "MODEL_CARD.md"  # where the user has a README.md
END = "<!-- lightning_compress: checksum of the text above, "
LARGEST = 2**20  # bytes of a README.md that is read
REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
INHERITED = ("license", "license_name", "license_link")
SHOWN = 12  # kinds of modules that stay dense


def write_card(
    contents: Contents,
    folder: Path,
    *,
    weight_bytes: int,
    fault: str,
    recipe_yaml: str | None = None,
    origin: Mapping[str, Any] | None = None,
    replaced: Path | None = None,
) -> None:
    """Write the card into a folder that is being written.

    Args:
        contents: What the folder holds.
        folder: Folder with all other files.
        weight_bytes: Bytes of its tensors.
        fault: Why plain transformers cannot load it; empty where it can.
        recipe_yaml: The text of recipe.yaml.
        origin: As in the manifest; of it ``metric`` and ``gate``.
        replaced: The folder that this one will replace, whose card the user may have edited.
    """
    text = _card(contents, weight_bytes, fault, recipe_yaml, origin or {})
    card = f"{text}\n{END}{_checksum(text)} -->\n"
    earlier = replaced / CARD if replaced is not None else None
    if earlier is not None and earlier.is_file() and is_edited(earlier):
        (folder / CARD).write_bytes(earlier.read_bytes())
        warnings.warn(f"{earlier} was edited, and stays; the card of this export is {SECOND} beside it", stacklevel=4)
    name = SECOND if (folder / CARD).exists() else CARD  # also where a processor wrote one
    (folder / name).write_text(card, encoding="utf-8")


def _card(contents: Contents, weight_bytes: int, fault: str, recipe_yaml: str | None, origin: Mapping[str, Any]) -> str:
    base, license_ = _base(contents.model) if contents.is_transformers else (None, {})
    kind = type(contents.model).__name__
    tags = ["compressed-tensors"] if contents.packed or contents.caches else []
    library = "transformers" if contents.is_transformers else "lightning-compress"
    head: dict[str, Any] = {"library_name": library, **license_, "tags": [*tags, "lightning-compress"]}
    if base is not None:
        head |= {"base_model": base} | ({"base_model_relation": "quantized"} if contents.packed else {})
    sections = [
        f"# {base or kind}, compressed",
        f"`{kind}`, compressed with lightning-compress" + (f" from {base}." if base else "."),
        _results(contents, weight_bytes, origin),
        "## What is compressed",
        *_compressed(contents),
        "## How to load it",
        *_loading(contents, fault),
    ]
    if note := rotation_note(contents.model):
        sections.append(note)
    if recipe_yaml is not None:
        sections += ["## Recipe", f"```yaml\n{recipe_yaml}```"]
    front = yaml.safe_dump(head, sort_keys=True, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _results(contents: Contents, weight_bytes: int, origin: Mapping[str, Any]) -> str:
    tensors = {id(tensor): tensor for tensor in contents.model.state_dict(keep_vars=True).values()}.values()
    dense = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    rows = [["weights", _size(dense), _size(weight_bytes)]]
    for name, entry in (origin.get("metric") or {}).items():
        before, after, error = entry.get("before"), entry.get("after"), entry.get("standard_error")
        change = f" ({after - before:+.3g}" if None not in (before, after) else ""
        change += change and (f" ± {error:.2g})" if error is not None else ")")
        rows.append([f"`{name}`", _number(before), _number(after) + change])
    failed = [f"\n\nIt failed its gate: {text}." for text in origin.get("gate") or []]
    return _table(["", "dense", "compressed"], rows) + "".join(failed)


def _compressed(contents: Contents) -> list[str]:
    """Schemes and their modules, what is dense on disk, and what was never quantized."""
    schemes: dict[str, list[str]] = {}
    for name, (_, record) in contents.records.items():
        schemes.setdefault(describe(record.scheme), []).append(name)
    rows = [[f"`{scheme}`", str(len(names)), _kinds(names)] for scheme, names in schemes.items()]
    texts = [_table(["scheme", "modules", "names"], rows)] if rows else ["No weight is quantized."]
    if contents.caches:
        texts.append(f"The KV cache of {len(contents.caches)} attention modules is quantized.")
    reasons: dict[str, list[str]] = {}
    for name, reason in contents.dense.items():
        reasons.setdefault(reason, []).append(name)
    texts += [
        f"Quantized, and written with dense weights, since {why}: {_kinds(names)}." for why, names in reasons.items()
    ]
    modules = {clean_name(n): m for n, m in contents.model.named_modules() if is_supported(m) or _embeds(m)}
    if dense := [name for name in modules if name not in contents.records]:
        texts.append(f"Not quantized: {_kinds(dense)}.")
    return texts


def _loading(contents: Contents, fault: str) -> list[str]:
    model: Any = contents.model
    if not contents.is_transformers:
        return [
            f"With lightning_compress alone: {foreign_kind(model)}.",
            _code('import lightning_compress\n\nmodel = lightning_compress.load("FOLDER", build())'),
        ]
    rotated, turned = len(online_entries(model)), bool(rotation_note(model))
    lost = f"it refuses the folder, since rotations run beside {rotated} modules" if rotated else ""
    fault = lost or fault or ("it does not turn the inputs of modules, as said below" if turned else "")
    schemes = [record.scheme for _, record in contents.packed.values()]
    faults = {"`lightning_compress.load`": "", "transformers": fault, "vLLM": lost or server_fault(schemes)}
    rows = [[reader, "yes" if not why else f"no: {why}"] for reader, why in faults.items()]
    blocks = [_table(["reader", "reads it"], rows)]
    if not fault:
        import transformers

        kind = type(model).__name__
        kind = kind if hasattr(transformers, kind) else "AutoModel"
        blocks.append(_code(f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("FOLDER")'))
    if not faults["vLLM"] and model.can_generate():
        blocks.append(_code("vllm serve FOLDER", "bash"))
    blocks.append(_code('import lightning_compress\n\nmodel = lightning_compress.load("FOLDER")'))
    return blocks


def _base(model: Any) -> tuple[str | None, dict[str, str]]:
    """The repository of the base where it is known, and the keys of its license."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name:
        return None, {}
    if Path(name).is_dir():
        front = _front_matter(Path(name) / CARD)
        base = front.get("base_model")
        base = base[0] if isinstance(base, list) and len(base) == 1 else base
        known = base if isinstance(base, str) and REPOSITORY.fullmatch(base) else None
    elif REPOSITORY.fullmatch(name) and _cached(name, "config.json"):
        readme = _cached(name, CARD)
        known, front = name, _front_matter(readme) if readme else {}
    else:
        return None, {}
    return known, {key: front[key] for key in INHERITED if isinstance(front.get(key), str)}


def _cached(repository: str, name: str) -> Path | None:
    """A file of a repository in the local cache of Hugging Face; the network is not used."""
    from transformers.utils import cached_file

    try:
        path = cached_file(repository, name, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(path) if path else None


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the top of a README.md; empty where there is none, or it is not a mapping."""
    try:
        if path.stat().st_size > LARGEST:
            return {}
        match = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8"), re.DOTALL)
        content = yaml.safe_load(match[1]) if match else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def is_edited(path: Path) -> bool:
    """Whether a card is not as :func:`write_card` wrote it."""
    if path.stat().st_size > LARGEST:
        return True
    text, end, checksum = path.read_text(encoding="utf-8", errors="replace").rpartition(f"\n{END}")
    return not end or checksum != f"{_checksum(text)} -->\n"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _embeds(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _kinds(names: Iterable[str]) -> str:
    """Names, those that differ by numbers alone once, with ``*`` in the place of the numbers."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    kinds = [kind if len(group) > 1 else group[0] for kind, group in groups.items()]
    more = f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else ""
    return ", ".join(f"`{kind}`" for kind in kinds[:SHOWN]) + more


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _size(number: int) -> str:
    exponent = min(3, max(0, int(math.log(number, 1000)))) if number else 0
    return f"{number / 1000**exponent:.4g} {('B', 'KB', 'MB', 'GB')[exponent]}"
