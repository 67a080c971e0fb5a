"""BatchNorm into the layer before it: what remains of the norm is a shift per channel.

    y = gamma (W x + b - mu) / sqrt(var + eps) + beta      in evaluation mode
      = (s W) x + s b + (beta - s mu)                      s = gamma / sqrt(var + eps), one per output channel

The layer takes s. The norm stays where it is, with scale 1 and the shift beta - s mu, so that neither names nor shapes
of the model's tensors change and whoever knows the architecture loads the weights; or it goes, and the layer gets a
bias.

Which layer stands before a norm is read from the graph that torch.fx traces, of the whole model or, where that cannot
be traced, of its parts: nothing is run, and nothing is guessed from names or from the order of registration.
"""

import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.layers.matrix import is_supported
from lightning_compress.quant.record import Quantized

__all__ = ["Folding", "find_foldings", "fold", "fold_all"]

FEATURES_FIRST = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Folding:
    """A norm and the layer that takes it.

    Args:
        layer: Dotted name of the convolution or Linear.
        norm: Dotted name of the BatchNorm.
    """

    layer: str
    norm: str


def fold_all(model: nn.Module, remove: bool = False) -> list[Folding]:
    """Fold every BatchNorm that can be; evaluated, the model computes what it did, but for rounding.

    Args:
        model: Changed in place. Its norms are put into evaluation mode and have to stay there.
        remove: Take the norms out (an ``nn.Identity`` stands in), and give the layers a bias.

    Returns:
        What was folded. A warning names each norm that was not, and why.

    Raises:
        ValueError: Nothing can be folded, or a layer is quantized already.
    """
    found, left = find_foldings(model)
    reasons = "; ".join(f"{name!r}: {why}" for name, why in left.items())
    if not found:
        raise ValueError(
            f"no BatchNorm to fold: {reasons or f'{type(model).__name__} has none'}; leave folding out for this model"
        )
    for folding in found:
        if Quantized.of(model.get_submodule(folding.layer)) is not None:
            raise ValueError(
                f"{folding.layer!r} is quantized already, and folding {folding.norm!r} into it would take it off its "
                f"grid; fold first, then quantize"
            )
    if left:
        warnings.warn(f"BatchNorm layers that were not folded: {reasons}", stacklevel=2)
    fresh = [f.norm for f in found if getattr(model.get_submodule(f.norm), "num_batches_tracked", None) == 0]
    if fresh:
        warnings.warn(
            f"BatchNorm layers that have seen no batch are folded with the statistics that they began with (mean 0, "
            f"variance 1), and keep them: {', '.join(map(repr, fresh[:5]))}; fold a model that is trained already",
            stacklevel=2,
        )
    for folding in found:
        layer, norm = (model.get_submodule(name) for name in (folding.layer, folding.norm))
        assert isinstance(norm, _BatchNorm)
        fold(layer, norm)
        if remove:
            _move_shift(layer, norm)
            parent, _, name = folding.norm.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
    return found


@torch.no_grad()
def fold(layer: nn.Module, norm: _BatchNorm) -> None:
    """Move the scale of a norm into the layer before it; the norm adds a shift from then on, in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean_R, var_R = norm.running_mean.double(), norm.running_var.double()
    scale_R = (var_R + norm.eps).rsqrt()
    if norm.affine:
        scale_R = scale_R * norm.weight.double()
    weight, bias = layer.get_parameter("weight"), layer.bias
    weight.copy_(weight.double() * scale_R.view(-1, *[1] * (weight.ndim - 1)))
    if isinstance(bias, Tensor):
        bias.copy_(bias.double() * scale_R)
    shift_R = -mean_R * scale_R
    if norm.affine:
        norm.bias.copy_(norm.bias.double() + shift_R)
        norm.weight.fill_(1.0).requires_grad_(False)  # the layer's weight has that freedom already
        norm.running_mean.zero_()
    else:
        norm.running_mean.copy_(-shift_R)
    norm.running_var.fill_(1.0 - norm.eps)
    norm.eval()


@torch.no_grad()
def _move_shift(layer: nn.Module, norm: _BatchNorm) -> None:
    """The shift of a folded norm, into the bias of the layer."""
    assert norm.running_mean is not None
    shift_R = norm.bias.detach().clone() if norm.affine else -norm.running_mean
    if isinstance(layer.bias, Tensor):
        layer.bias.add_(shift_R)
    else:
        layer.bias = nn.Parameter(shift_R.to(layer.get_parameter("weight").dtype))


def find_foldings(model: nn.Module) -> tuple[list[Folding], dict[str, str]]:
    """Norms whose only input is the output of a Linear or convolution that nobody else uses; of others the reason."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    before: dict[str, list[tuple[str | None, int]]] = {name: [] for name in norms}
    calls: Counter[str] = Counter()
    _trace(model, "", before, calls)
    modules = dict(model.named_modules())
    found: list[Folding] = []
    left: dict[str, str] = {}
    for name, norm in norms.items():
        layer, uses = before[name][0] if len(before[name]) == 1 else (None, 0)
        if not before[name]:
            left[name] = "torch.fx could not trace the module that calls it"
        elif len(before[name]) > 1:
            left[name] = "it is called several times"
        elif layer is None or not _folds_into(modules[layer], norm):
            left[name] = "no Linear, Conv1d or Conv2d of its width comes right before it"
        elif norm.running_mean is None:
            left[name] = "it keeps no running statistics"
        elif uses > 1 or calls[layer] > 1:
            left[name] = f"the output of {layer!r} is used elsewhere too"
        else:
            found.append(Folding(layer, name))
    return found, left


def _folds_into(layer: nn.Module, norm: _BatchNorm) -> bool:
    """Whether the channels of the norm are the rows of the layer's weight."""
    fits = isinstance(layer, FEATURES_FIRST) or (isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d))
    return fits and is_supported(layer) and len(layer.get_parameter("weight")) == norm.num_features


def _trace(
    module: nn.Module, prefix: str, before: dict[str, list[tuple[str | None, int]]], calls: Counter[str]
) -> None:
    """Note the input of each norm: the module that made it (None: something else) and how many use that."""
    if not any(isinstance(m, _BatchNorm) for m in module.modules()):
        return
    graph = _graph(module)
    if graph is None:
        for name, child in module.named_children():
            _trace(child, f"{prefix}{name}.", before, calls)
        return
    made = {node: f"{prefix}{node.target}" for node in graph.nodes if node.op == "call_module"}
    calls.update(made.values())
    for node, name in made.items():
        if name in before:
            source = node.args[0] if node.args else None
            known = made.get(source) if isinstance(source, fx.Node) else None
            before[name].append((known, len(source.users) if isinstance(source, fx.Node) else 0))


def _graph(module: nn.Module) -> fx.Graph | None:
    """The graph of its forward pass, modules of torch.nn being leaves; None where it depends on the data."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | _BatchNorm):
        return None
    try:
        return fx.Tracer().trace(module)
    except Exception:  # on a proxy a forward pass may raise anything
        return None
