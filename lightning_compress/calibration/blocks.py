"""Find the repeated blocks of a model of any class, from its structure alone.

A block is a child of a container (``ModuleList``, ``Sequential``, ``ModuleDict``) in which its class occurs more than
once, such as the layers of a transformer or the stages of a CNN; of nested blocks the outermost is used. A class in
Hugging Face's ``_no_split_modules`` is a block even where it occurs only once.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_compress.layers.matching import clean_name, select

__all__ = ["find_blocks", "modules_of_block", "modules_outside"]

SMALLEST_SHARE = 0.01  # of the largest container's weights; a smaller list (of heads, say) holds no blocks


def find_blocks(model: nn.Module, blocks: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The blocks by dotted name, in the model's order; none of them lies inside another. Empty when there are none.

    Args:
        model: Any module.
        blocks: Class names, dotted names or ``re:`` patterns of the blocks; None: they are searched for.

    Raises:
        ValueError: ``blocks`` matches nothing, or is not a valid regular expression.
    """
    if blocks is not None:
        return _outermost({n: _uncompiled(m) for n, m in select(model, blocks, field="blocks").items()})
    hints = _no_split_classes(model)
    containers = [c for c in _containers(_uncompiled(model), "", hints, set()) if c]
    weights = [sum(_weights(block) for block in children.values()) for children in containers]
    large = [
        children
        for children, size in zip(containers, weights, strict=True)
        if size >= SMALLEST_SHARE * max(weights) or any(type(block).__name__ in hints for block in children.values())
    ]
    return _outermost({name: block for children in large for name, block in children.items()})


def modules_of_block(name: str, block: nn.Module) -> dict[str, nn.Module]:
    """The block and every module in it, by its dotted name inside the model."""
    return {clean_name(n): m for n, m in block.named_modules(prefix=name) if not n.endswith("_orig_mod")}


def modules_outside(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules in no block (embeddings, heads, poolers) by dotted name, without the model and what contains blocks."""
    inside = {module for block in blocks.values() for module in block.modules()}
    around = {name[:i] for name in blocks for i in range(len(name)) if name[i] == "."}
    named = {clean_name(n): m for n, m in model.named_modules() if not n.endswith("_orig_mod")}
    return {n: m for n, m in named.items() if n and n not in around and m not in inside}


def _containers(module: nn.Module, name: str, hints: set[str], seen: set[nn.Module]) -> Iterable[dict[str, nn.Module]]:
    """For each container, from the outside in, its children that are blocks; blocks are not searched."""
    if module in seen:
        return
    seen.add(module)
    children = {n: _uncompiled(c) for n, c in module.named_children()}
    blocks: dict[str, nn.Module] = {}
    if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        classes = Counter(type(c) for c in children.values() if any(True for _ in c.children()) and _weights(c))
        repeated = {c for c, times in classes.items() if times > 1 or c.__name__ in hints}
        blocks = {n: c for n, c in children.items() if type(c) in repeated}
        yield {f"{name}.{n}" if name else n: c for n, c in blocks.items()}
    for n, child in children.items():
        if n not in blocks:
            yield from _containers(child, f"{name}.{n}" if name else n, hints, seen)


def _no_split_classes(model: nn.Module) -> set[str]:
    """Class names in ``_no_split_modules`` of the model and of the models inside it."""
    hints: set[str] = set()
    for module in model.modules():
        named = getattr(module, "_no_split_modules", None)
        if isinstance(named, (list, tuple, set, frozenset)):
            hints.update(n for n in named if isinstance(n, str))
    return hints


def _outermost(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Without the blocks that lie inside others, each module once."""
    inside = {m for block in blocks.values() for m in block.modules() if m is not block}
    unique = {block: name for name, block in reversed(list(blocks.items()))}
    return {name: block for name, block in blocks.items() if block not in inside and unique[block] == name}


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` returned; hooks belong there."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module
