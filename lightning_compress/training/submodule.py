"""The module of a LightningModule that is the model: not one of its metrics, losses and teachers.

In this order: the module that the user names; the only child that is a transformers.PreTrainedModel; ``model``, ``net``
or ``backbone``; the only child with parameters. Where that is a bare layer, the LightningModule itself is the model.
"""

from difflib import get_close_matches

from torch import nn

from lightning_compress.layers.matching import is_layer, without_parallel

__all__ = ["choose", "is_compiled", "uncompiled"]

USUAL = ("model", "net", "backbone")


def choose(root: nn.Module, name: str | None = None) -> tuple[str, nn.Module]:
    """The module to compress, and its dotted name inside ``root`` (empty for ``root`` itself).

    Args:
        root: The LightningModule.
        name: Dotted name of the module, ``"."`` for ``root`` itself; None: as above. A single child that is
            a bare layer (``self.layer = nn.Linear(...)``) means ``root`` itself.

    Raises:
        ValueError: There is no such module, it is a metric, or several could be meant (they are listed).
    """
    if name == ".":
        return "", root
    if name is not None:
        return name, _named(root, name)
    children = {n: m for n, m in root.named_children() if not _is(m, "Metric", "MetricCollection")}
    pretrained = [n for n, m in children.items() if _is(uncompiled(m), "PreTrainedModel")]
    usual = [n for n in USUAL if n in children and any(True for _ in children[n].parameters())]
    weighted = [n for n, m in children.items() if any(True for _ in m.parameters())]
    names = pretrained[:1] if len(pretrained) == 1 else usual[:1] or weighted
    if len(names) != 1:
        kinds = {n: type(m).__name__ for n, m in children.items()}
        raise ValueError(
            f"cannot tell which module of {type(root).__name__} to compress: its children are {kinds}; "
            f"give module='<name>', or module='.' for all of it"
        )
    module = uncompiled(children[names[0]])
    return ("", root) if is_layer(module) and len(weighted) == 1 else (names[0], module)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` or DataParallel wraps around it."""
    return without_parallel(getattr(module, "_orig_mod", module) if _is(module, "OptimizedModule") else module)


def is_compiled(root: nn.Module) -> bool:
    """Whether a LightningModule is compiled, or anything inside it."""
    return getattr(root, "_compiler_ctx", None) is not None or any(_is(m, "OptimizedModule") for m in root.modules())


def _named(root: nn.Module, name: str) -> nn.Module:
    try:
        module = uncompiled(root.get_submodule(name))
    except AttributeError as error:
        near = get_close_matches(name, [n for n, _ in root.named_modules() if n], n=3)
        children = [n for n, _ in root.named_children()]
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"its children are {children}"
        raise ValueError(f"module={name!r}: {type(root).__name__} has no such module; {hint}") from error
    if _is(module, "Metric", "MetricCollection"):
        raise ValueError(f"module={name!r} is a torchmetrics {type(module).__name__}, expected the model")
    return module


def _is(module: nn.Module, *classes: str) -> bool:
    """By the class's name, so that neither transformers nor torchmetrics is imported."""
    return any(c.__name__ in classes for c in type(module).__mro__)
