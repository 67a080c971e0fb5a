"""Select modules by class, by name, or by pattern.

A target is a class name (anywhere in the class's ancestry: ``Linear``), a dotted module name, or ``re:`` and a regular
expression that must match the dotted name from its beginning (as compressed-tensors and vLLM read it). Where several
targets match a module, the exact name beats the pattern, and the pattern beats the class.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import nn

from lightning_compress.layers.module_weights import ModuleWeight, reveal, weights_inside
from lightning_compress.layers.towers import find_towers, tower_of
from lightning_compress.layers.weight_slice import WeightSlice

__all__ = [
    "Names", "clean_name", "is_layer", "listed", "match_rank", "select", "select_weights", "shortlist",
    "unmatched_message", "warn_of_left_out", "without_parallel", "without_towers",
]  # fmt: skip

CAN_BE_TARGETS = (
    "Linear", "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d", "Conv1D",
    "LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "MultiheadAttention",
)  # fmt: skip
Names = str | list[str]
"""The type of ``targets`` and ``ignore`` in every modifier: one entry, or several."""

LEFT_OUT = 0.1  # of the weights: a patch embedding or the first convolution is less, and not a mistake


def clean_name(name: str) -> str:
    """The name without what ``torch.compile`` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def is_layer(module: nn.Module) -> bool:
    """Whether a module has no others inside, apart from what its tensors pass through (parametrizations)."""
    return all(name == "parametrizations" for name, _ in module.named_children())


def without_parallel(model: nn.Module) -> nn.Module:
    """The module inside DataParallel or DistributedDataParallel, which put ``module.`` before all names."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def select(
    model: nn.Module, targets: str | Sequence[str], ignore: str | Sequence[str] = (), *, field: str = "targets"
) -> dict[str, nn.Module]:
    """Modules that match a target and no entry of ``ignore``, by dotted name, in the model's order.

    Args:
        model: Names are relative to it.
        targets: Class names, dotted names, ``re:`` patterns.
        ignore: The same, for what is left out.
        field: Name of the argument, for messages.

    Warns of a target, and of a name or class in ``ignore``, that matches nothing while others do; not of the class of
    a layer that modifiers compress, such as ``Conv2d``, since recipes list them for many models.

    Raises:
        ValueError: A pattern is not a valid regular expression, nothing matches, everything that matches is ignored, or
            what matches holds packed weights (its class says which other it ``stands_for``).
    """
    targets, ignore = listed(targets), listed(ignore)
    check_patterns(targets, field)
    check_patterns(ignore, "ignore")
    named = {clean_name(n): m for n, m in model.named_modules() if clean_name(n)}  # of a compiled module, the inner
    named = {name: module for name, module in named.items() if getattr(module, "is_target", True)}
    if not named:
        raise ValueError(
            f"the model is a {type(model).__name__} without modules inside, and {field} choose among those by name and "
            f"class: compress nn.Sequential(model), which shares its weights"
        )
    _refuse_packed(named, targets, ignore)
    hits = {t: {n for n, m in named.items() if match_rank(n, m, t)} for t in [*targets, *ignore]}
    matched = [n for n in named if any(n in hits[t] for t in targets)]
    if not matched:
        if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
            raise ValueError(
                f"{field}={targets} match nothing, since the model is scripted (torch.jit), so that its layers have "
                f"lost their classes: compress the model that was scripted"
            )
        raise ValueError(unmatched_message(targets, named, field))
    for target in targets:
        if not hits[target] and target not in CAN_BE_TARGETS:  # recipes name all kinds of layers
            warnings.warn(unmatched_message([target], named, field), stacklevel=2)
    for entry in ignore:
        if not hits[entry] and not entry.startswith("re:"):  # recipes for many models ignore patterns freely
            warnings.warn(unmatched_message([entry], named, "ignore"), stacklevel=2)
    chosen = {n: named[n] for n in matched if not any(n in hits[t] for t in ignore)}
    if not chosen:
        raise ValueError(
            f"ignore={ignore} leaves nothing of the {len(matched)} modules that {field}={targets} matches, "
            f"such as {matched[0]!r}; narrow it"
        )
    return chosen


def select_weights(
    model: nn.Module, targets: str | Sequence[str], ignore: str | Sequence[str] = (), *, field: str = "targets"
) -> dict[str, nn.Module]:
    """As :func:`select`, but of what patterns match only modules that hold a matrix themselves.

    So ``re:.*mlp.*`` means the layers of an MLP, not the MLP around them nor its activation function. A module that is
    named, or matched by its class, needs no matrix. An LSTM, GRU or MultiheadAttention stands for its weights, which
    the model gets as modules (layers/module_weights.py). Towers of multimodal models (layers/towers.py) are left out.
    A tower that is named in ``targets`` is open to the other targets; patterns that match nothing outside of towers,
    and names of modules in them, reach those.

    Raises:
        ValueError: As in :func:`select`, or a pattern matches no module that holds a matrix.
    """
    targets = listed(targets)
    check_patterns(targets, field)
    closed = _closed_towers(model, targets)

    def matches(name: str, module: nn.Module) -> bool:
        return any(match_rank(name, module, target) and not tower_of(name, closed[target]) for target in targets)

    reveal(model, lambda name, module: matches(clean_name(name), module))
    chosen = without_towers(model, select(model, targets, ignore, field=field), targets, field=field)
    chosen = {name: module for name, module in chosen.items() if not weights_inside(module)}
    if not chosen:
        raise ValueError(f"ignore={listed(ignore)} leaves no weight of those that {field}={targets} match; narrow it")
    selected: dict[str, nn.Module] = {}
    for target in targets:
        matched = {name: module for name, module in chosen.items() if match_rank(name, module, target)}
        layers = {n: m for n, m in matched.items() if not target.startswith("re:") or _holds_matrix(m)}
        if matched and not layers:
            some = ", ".join(f"{name!r} ({type(m).__name__})" for name, m in [*matched.items()][:3])
            raise ValueError(
                f"{field}={target!r} matches {some}, which hold no matrix of their own; to mean the layers inside, let "
                f"the pattern match their names too, as in 're:.*mlp.*'"
            )
        selected |= layers
    return {name: module for name, module in chosen.items() if name in selected}


def without_towers(
    model: nn.Module, chosen: Mapping[str, nn.Module], targets: str | Sequence[str], *, field: str = "targets"
) -> dict[str, nn.Module]:
    """Those modules of :func:`select` that are in no tower of a multimodal model, or in one that targets name.

    Raises:
        ValueError: All of them are in towers that are not named.
    """
    targets = listed(targets)
    closed = _closed_towers(model, targets)
    opened = {clean_name(name) for name in find_towers(model)} & set(targets)
    remaining = {
        name: module
        for name, module in chosen.items()
        if name not in opened
        and any(match_rank(name, module, target) and not tower_of(name, closed[target]) for target in targets)
    }
    if not remaining and opened >= set(chosen):
        raise ValueError(
            f"{field}={targets} name towers alone: add which of their layers, as in {['Linear', *targets]}"
        )
    if not remaining:
        name = next(name for name in chosen if name not in opened)
        raise ValueError(
            f"{field}={targets} matches modules such as {name!r}, all in what turns images or sounds into tokens, "
            f"which is left out unless it is named: {field}={[*targets, tower_of(name, find_towers(model))]}"
        )
    return remaining


def _closed_towers(model: nn.Module, targets: Sequence[str]) -> dict[str, list[str]]:
    """For each target the towers that it does not reach: all, unless it or another target names them."""
    towers = [clean_name(name) for name in find_towers(model)]
    named = {clean_name(n): m for n, m in model.named_modules() if clean_name(n)} if towers else {}

    def names_towers(target: str) -> bool:
        hits = [name for name, module in named.items() if match_rank(name, module, target) > 1]
        return bool(hits) and all(tower_of(name, towers) for name in hits)

    closed = [tower for tower in towers if tower not in targets]
    return {target: [] if names_towers(target) else closed for target in targets}


def _holds_matrix(module: nn.Module) -> bool:
    """Also where a parametrization computes it, or where it is not a Parameter."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False), getattr(module, "weight", None)]
    return hasattr(module, "parametrizations") or any(isinstance(t, torch.Tensor) and t.ndim > 1 for t in tensors)


def _refuse_packed(named: Mapping[str, nn.Module], targets: Sequence[str], ignore: Sequence[str]) -> None:
    def matches(name: str, module: nn.Module, entries: Sequence[str]) -> bool:
        return any(entry == getattr(module, "stands_for", None) or match_rank(name, module, entry) for entry in entries)

    stand_ins = {n: m for n, m in named.items() if hasattr(type(m), "stands_for")}
    packed = [n for n, m in stand_ins.items() if matches(n, m, targets) and not matches(n, m, ignore)]
    if packed:
        more = f" and {len(packed) - 1} more hold" if len(packed) > 1 else " holds"
        raise ValueError(
            f"{packed[0]!r}{more} packed weights, which cannot be changed; load the folder with packed=False to "
            f"compress or train it further"
        )


def match_rank(name: str, module: nn.Module, target: str) -> int:
    """3 for the exact name, 2 for a pattern, 1 for a class of its ancestry, 0 for no match.

    A weight of an LSTM or another module of that kind matches what that module matches, and is not a ``Linear``.
    """
    if target.startswith("re:"):
        return 2 if re.match(target[3:], name) else 0
    if target == name:
        return 3
    if isinstance(module, ModuleWeight):
        return match_rank(name.rpartition(".")[0], module.home, target)
    return 1 if any(c.__name__ == target for c in type(module).__mro__ if issubclass(c, nn.Module)) else 0


def warn_of_left_out(
    model: nn.Module, chosen: Mapping[str, nn.Module], targets: str | Sequence[str], ignore: str | Sequence[str] = ()
) -> None:
    """Warn where ``Linear`` in ``targets``, as in every recipe, leaves much of a model as it is: GPT-2, CNN, LSTM.

    What counts are weights (parameters of two dimensions and more) that are in no embedding and that ``ignore`` does
    not name. Names, patterns, and other classes alone are a choice, of which nothing warns.

    ``chosen`` are the modules that :func:`select` returned for ``targets`` and ``ignore``. Towers of multimodal models
    that ``targets`` match and do not name are a warning of their own.
    """
    targets, ignore = listed(targets), listed(ignore)
    towers = _warn_of_towers(model, chosen, targets, ignore)
    classes = {c.__name__ for m in model.modules() for c in type(m).__mro__}
    if "Linear" not in targets or not set(targets) <= classes | set(CAN_BE_TARGETS):
        return
    held = {id(p) for m in chosen.values() for p in m.parameters() if p.ndim > 1}
    held |= {id(m.whole) for m in chosen.values() if isinstance(m, WeightSlice)}  # of a slice the tensor of all
    seen, reached, left = set(held), 0, dict[str, list[int]]()
    for name, module in model.named_modules():
        weights = {id(p): p.numel() for p in module.parameters(recurse=False) if p.ndim > 1}
        reached += sum(size for key, size in weights.items() if key in held)
        size = sum(size for key, size in weights.items() if key not in seen)
        seen |= set(weights)
        passed = tower_of(clean_name(name), towers) or any(match_rank(name, module, e) for e in ignore)
        if size and "Embedding" not in type(module).__name__ and not passed:
            left.setdefault(type(module).__name__, []).append(size)
    lost = sum(map(sum, left.values()))
    if lost <= LEFT_OUT * (reached + lost):
        return
    kinds = sorted(left.items(), key=lambda kind: -sum(kind[1]))[:3]
    named = ", ".join(f"{len(sizes)} {kind} ({sum(sizes):,})" for kind, sizes in kinds)
    possible = [kind for kind, _ in kinds if kind in CAN_BE_TARGETS]
    beyond = [kind for kind, _ in kinds if kind not in CAN_BE_TARGETS]
    advice = [f"to compress {' and '.join(possible)} too, give targets={[*targets, *possible]}"] if possible else []
    advice += [f"no modifier compresses the weights of {' or '.join(beyond)}"] if beyond else []
    if narrower := [kind for kind in beyond if kind in ("Conv3d", "ConvTranspose3d")]:
        advice.append(f"StructuredPruningModifier(dimension='channels') makes {' and '.join(narrower)} narrower")
    warnings.warn(
        f"targets={targets} reaches {reached:,} of {reached + lost:,} weights and leaves the others as they are: "
        f"{named}; {'; '.join(advice)}; to leave them as they are without this warning, add them to ignore "
        f"(embeddings are not counted)",
        stacklevel=3,
    )


def _warn_of_towers(
    model: nn.Module, chosen: Mapping[str, nn.Module], targets: Sequence[str], ignore: Sequence[str]
) -> dict[str, nn.Module]:
    """Name the towers of which nothing is chosen although targets match their layers; returns all that stay."""
    towers = {clean_name(name): tower for name, tower in find_towers(model).items()}
    towers = {name: tower for name, tower in towers.items() if not any(tower_of(n, [name]) for n in chosen)}
    modules = {clean_name(name): module for name, module in model.named_modules() if towers}
    matched = {
        tower_of(name, towers): name
        for name, module in modules.items()
        if any(match_rank(name, module, t) for t in targets) and not any(match_rank(name, module, e) for e in ignore)
    }
    if names := [name for name in towers if name in matched]:
        sizes = ", ".join(f"{name!r} ({sum(p.numel() for p in towers[name].parameters()):,} weights)" for name in names)
        patterns = [f"re:{re.escape(name)}" for name in names]
        warnings.warn(
            f"{sizes} of this {type(model).__name__}: left as it is by default, since it turns images or sounds into "
            f"tokens; to compress it too, name it, as in targets={[*targets, *names]}; to leave it out without this "
            f"warning, add {patterns} to ignore",
            stacklevel=4,
        )
    return towers


def check_patterns(entries: Iterable[str], field: str) -> None:
    """ValueError names the field and the pattern that is not a valid regular expression."""
    for entry in entries:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise ValueError(f"{field}: {entry!r} is not a valid regular expression: {error}") from error


def unmatched_message(targets: Sequence[str], named: dict[str, nn.Module], field: str) -> str:
    """What to say when nothing matches: near misses among names and classes."""
    classes = sorted({type(m).__name__ for m in named.values()})
    known = [*classes, *named]
    near = [hit for t in targets for hit in _near(t.removeprefix("re:"), known)]
    hint = f"did you mean {', '.join(map(repr, dict.fromkeys(near)))}?" if near else f"its classes are {classes}"
    return f"{field}={list(targets)} matches none of the model's {len(named)} modules; {hint}"


def _near(target: str, known: Sequence[str]) -> list[str]:
    """Misspelled, or a part of a name; a word of three letters has no other near misses."""
    parts = [name for name in known if len(target) > 2 and target.lower() in name.lower()]
    return (get_close_matches(target, known, n=3) or parts)[:3]


def shortlist(items: Iterable[str], separator: str = ", ") -> str:
    """The first five items, and how many more there are."""
    items = list(items)
    return separator.join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def listed(entries: str | Sequence[str]) -> list[str]:
    """The entries as a list; a single one may stand without."""
    return [entries] if isinstance(entries, str) else list(entries)
