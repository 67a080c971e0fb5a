"""Fold a BatchNorm into the layer before it; the norm keeps a shift per channel.

    y = gamma (W x + b - mu) / sqrt(var + eps) + beta      in evaluation mode
      = (s W) x + s b + (beta - s mu)                      s = gamma / sqrt(var + eps), one per output channel

The layer takes s. The norm stays, with scale 1 and the shift beta - s mu, so that names and shapes of the model's
tensors do not change and any program that knows the architecture can load the weights; or it is removed, and the layer
gets a bias.

A layer that is quantized, with scales for each row, takes s into these: its codes stay, or change their sign with s. A
network that was trained through fake-quantization, norms and all, becomes one that integers compute.

The layer before a norm is found in the graph that torch.fx traces, of the whole model or, if that cannot be traced, of
its parts: the model is not run, and names and the order of registration are not used.
"""

import warnings
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.layers.matrix import CONVOLUTIONS, as_matrix, is_supported, write_matrix
from lightning_compress.quant.fake_quant import on_stored_grid, round_weight, wide
from lightning_compress.quant.formats import is_microscaled
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.scale_errors import integer_range

__all__ = ["Folding", "find_foldings", "fold", "fold_all"]


class Folding(NamedTuple):
    """Dotted names of a convolution or Linear, and of the BatchNorm that is folded into it."""

    layer: str
    norm: str


def fold_all(model: nn.Module, remove: bool = False, required: bool = True) -> list[Folding]:
    """Fold every BatchNorm for which this is possible; in evaluation mode outputs stay equal up to rounding.

    Args:
        model: Changed in place. Its norms are set to evaluation mode and must stay in it.
        remove: Replace the norms by ``nn.Identity``, and give the layers a bias.
        required: Whether it is an error if no norm can be folded.

    Returns:
        The foldings. A warning names each other norm, and the reason.

    Raises:
        ValueError: No norm can be folded, or a layer is quantized with scales that several rows share.
    """
    foldings, left = find_foldings(model)
    reasons = "; ".join(f"{name!r}: {why}" for name, why in left.items())
    if not foldings and required:
        raise ValueError(
            f"no BatchNorm to fold: {reasons or f'{type(model).__name__} has none'}; leave folding out for this model"
        )
    for layer_name, norm_name in foldings:
        record = Quantized.of(model.get_submodule(layer_name))
        if record is not None and not _has_scales_of_rows(record.scheme.weights):
            raise ValueError(
                f"{layer_name!r} is quantized already, and folding {norm_name!r} into it would take it off its "
                f"grid, whose scales several rows share; fold first, then quantize"
            )
    if left:
        warnings.warn(f"BatchNorm layers that were not folded: {reasons}", stacklevel=2)
    fresh = [f.norm for f in foldings if getattr(model.get_submodule(f.norm), "num_batches_tracked", None) == 0]
    if fresh:
        warnings.warn(
            f"BatchNorm layers that have seen no batch are folded with the statistics that they began with (mean 0, "
            f"variance 1), and keep them: {', '.join(map(repr, fresh[:5]))}; fold a model that is trained already",
            stacklevel=2,
        )
    for folding in foldings:
        layer, norm = (model.get_submodule(name) for name in folding)
        assert isinstance(norm, _BatchNorm)
        fold(layer, norm)
        if remove:
            _move_shift(layer, norm)
            parent, _, name = folding.norm.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
    return foldings


@torch.no_grad()
def fold(layer: nn.Module, norm: _BatchNorm) -> None:
    """Move the scale of a norm into the layer before it; from then on the norm adds a shift, in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean_R, var_R = norm.running_mean.double(), norm.running_var.double()
    scale_R = (var_R + norm.eps).rsqrt()
    if norm.affine:
        scale_R = scale_R * norm.weight.double()
    _scale_rows(layer, scale_R)
    if isinstance(layer.bias, Tensor):
        layer.bias.copy_(layer.bias.double() * scale_R)
    shift_R = -mean_R * scale_R
    if norm.affine:
        norm.bias.copy_(norm.bias.double() + shift_R)
        norm.weight.fill_(1.0).requires_grad_(False)  # the layer's weight has that freedom already
        norm.running_mean.zero_()
    else:
        norm.running_mean.copy_(-shift_R)
    norm.running_var.fill_(1.0 - norm.eps)
    norm.eval()


def _has_scales_of_rows(args: QuantizationArgs) -> bool:
    return args.strategy in ("channel", "group") and not is_microscaled(args)


def _scale_rows(layer: nn.Module, s_R: Tensor) -> None:
    """Multiply the rows of the weight by s; of a quantized one the scales, and by -1 its codes where s is negative."""
    W_RC, record = as_matrix(layer), Quantized.of(layer)
    if record is None:
        write_matrix(layer, W_RC.double() * s_R[:, None])
        return
    args, scale, zero = record.scheme.weights, record.scale, record.zero_point
    columns = W_RC.shape[1] // scale.shape[1]
    codes_RC = W_RC.double() / scale.double().repeat_interleave(columns, 1)  # without the zero point
    scale = (scale.double() * torch.where(s_R == 0, 1.0, s_R.abs())[:, None]).to(scale.dtype)  # no scale is 0
    if zero is not None:
        zero = torch.where(s_R[:, None] < 0, sum(integer_range(args)) - zero.double(), zero.double()).to(zero.dtype)
    signed_RC = codes_RC * s_R.sign()[:, None] * scale.double().repeat_interleave(columns, 1)
    Q_RC = round_weight(signed_RC.to(wide(W_RC).dtype), scale, zero, args)
    write_matrix(layer, on_stored_grid(Q_RC, scale, zero, args, W_RC.dtype))
    replace(record, scale=scale, zero_point=zero, latent=None).attach(layer)


@torch.no_grad()
def _move_shift(layer: nn.Module, norm: _BatchNorm) -> None:
    """Add the shift of a folded norm to the bias of the layer."""
    assert norm.running_mean is not None
    shift_R = norm.bias.detach().clone() if norm.affine else -norm.running_mean
    if isinstance(layer.bias, Tensor):
        layer.bias.add_(shift_R)
    else:
        layer.bias = nn.Parameter(shift_R.to(layer.get_parameter("weight").dtype))


def find_foldings(model: nn.Module) -> tuple[list[Folding], dict[str, str]]:
    """Norms whose only input is the output of a Linear or convolution without other uses; for others the reason."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    before: dict[str, list[tuple[str | None, int]]] = {name: [] for name in norms}
    calls: Counter[str] = Counter()
    _trace(model, "", before, calls)
    modules = dict(model.named_modules())
    foldings: list[Folding] = []
    left: dict[str, str] = {}
    for name, norm in norms.items():
        layer, uses = before[name][0] if len(before[name]) == 1 else (None, 0)
        if not before[name]:
            left[name] = "torch.fx could not trace the module that calls it"
        elif len(before[name]) > 1:
            left[name] = "it is called several times"
        elif layer is None or not _folds_into(modules[layer], norm):
            left[name] = "no Linear or convolution of its width comes right before it"
        elif norm.running_mean is None:
            left[name] = "it keeps no running statistics"
        elif uses > 1 or calls[layer] > 1:
            left[name] = f"the output of {layer!r} is used elsewhere too"
        else:
            foldings.append(Folding(layer, name))
    return foldings, left


def _folds_into(layer: nn.Module, norm: _BatchNorm) -> bool:
    """Whether the channels of the norm are the rows of the layer's weight."""
    fits = isinstance(layer, CONVOLUTIONS) or (isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d))
    return fits and is_supported(layer) and len(as_matrix(layer)) == norm.num_features


def _trace(
    module: nn.Module, prefix: str, before: dict[str, list[tuple[str | None, int]]], calls: Counter[str]
) -> None:
    """Record the input of each norm: the module that computes it (None: an operation), and its number of uses."""
    if not any(isinstance(m, _BatchNorm) for m in module.modules()):
        return
    if (graph := _graph(module)) is None:
        for name, child in module.named_children():
            _trace(child, f"{prefix}{name}.", before, calls)
        return
    names = {node: f"{prefix}{node.target}" for node in graph.nodes if node.op == "call_module"}
    calls.update(names.values())
    for node, name in names.items():
        if name in before:
            source = node.args[0] if node.args else None
            known = names.get(source) if isinstance(source, fx.Node) else None
            before[name].append((known, len(source.users) if isinstance(source, fx.Node) else 0))


def _graph(module: nn.Module) -> fx.Graph | None:
    """The graph of its forward pass, with modules of torch.nn as leaves; None if it depends on the data."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | _BatchNorm):
        return None
    try:
        return fx.Tracer().trace(module)
    except Exception:  # on a proxy a forward pass can raise any error
        return None
