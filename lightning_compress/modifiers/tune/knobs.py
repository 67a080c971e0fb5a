"""What is left to train when codes and masks are fixed: scales, vectors such as norms and biases, kept weights.

A knob is a tensor d, float32, zero at first; writing it changes the model:

    scales     s = s0 (1 + d), as it is stored;   W = s (c - z), the codes c fixed;   dL/dd = sum_j g_j s0 (c_j - z)
    NVFP4      1/g = (1 + d) / g0, one d for the weights that share g0;               dL/dd = sum_j g_j W_j / (1 + d)
    inputs     s = s0 (1 + d), one d for layers of equal static scales;               dL/dd = s0 dL/ds  (LSQ)
    tensors    p = p0 + u d,  u = rms(p0);        of a sparse weight the nonzeros;    dL/dd = u g

So one learning rate suits all. With d = 0 the model is what it was, bit for bit. A scale that is stored coarsely (E4M3,
bfloat16) is rounded on the way, and the gradient passes the rounding.

Gradients are taken from a parameter as soon as the backward pass has made them, and released: no more than one weight
has a gradient at a time. Those of each batch are float32, and a sum of several is float64, so that neither the order
of batches nor the number of ranks changes a bit.

Shapes: R rows, C columns, G groups.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_compress.layers.matrix import as_matrix, parameter_of, write_matrix
from lightning_compress.quant.fake_quant import round_weight, wide
from lightning_compress.quant.formats import has_global_scale, is_microscaled
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.scales import expand, group_columns
from lightning_compress.quant.shared_scales import fused_with

__all__ = [
    "GlobalScaleKnob", "InputScaleKnob", "Knob", "ScaleKnob", "TensorKnob", "gradients_to", "has_fine_scales",
    "scale_knobs",
]  # fmt: skip

LEAST = 1e-3  # u of a tensor of zeros, such as a fresh bias


class Knob(ABC):
    """One trainable tensor.

    Attributes:
        tensors: Parameters of the model, or other tensors that it computes with, whose gradients are taken.
        change: d.
        sum: Inside of :func:`gradients_to` the sum of dL/dd over batches, float64; float32 where that is exact.
    """

    reduce = {"sum": "sum"}
    sum: Tensor

    def __init__(self, tensors: Sequence[Tensor], like: Tensor):
        self.tensors = tensors
        self.change = torch.zeros_like(like, dtype=torch.float32)

    @abstractmethod
    def gradient(self, gradient: Tensor, tensor: Tensor) -> Tensor:
        """dL/dd, float32, from that of one of the tensors."""

    @abstractmethod
    def write(self) -> None:
        """Change the model to d."""


class ScaleKnob(Knob):
    """The scales of a quantized module.

    Args:
        module: The module; its weight lies on its grid.
        record: Its record.
    """

    def __init__(self, module: nn.Module, record: Quantized):
        super().__init__([parameter_of(module)], record.scale)
        self.module, self.record = module, record
        args = record.scheme.weights
        assert args is not None
        self.args: QuantizationArgs = args
        self.start, self.first_global = wide(record.scale), record.global_scale

    def gradient(self, gradient: Tensor, tensor: Tensor) -> Tensor:
        G_RC = wide(as_matrix(self.module, like=gradient))
        return _per_scale(G_RC * self._units(), self.record.scale, self.args) * self.start

    def write(self) -> None:
        units_RC = self._units()
        scale = self._stored(self.start * (1 + self.change))
        Q_RC = round_weight(units_RC * _spread(scale, units_RC, self.args), scale, self.record.zero_point, self.args)
        write_matrix(self.module, Q_RC)
        self.record = replace(self.record, scale=scale, latent=None)
        self.record.attach(self.module)

    def _units(self) -> Tensor:
        """c - z, float32 or wider, [R, C]."""
        W_RC = wide(as_matrix(self.module))
        units_RC = W_RC / _spread(self.record.scale, W_RC, self.args)
        return units_RC.round_() if self.args.type == "int" else units_RC

    def _stored(self, scale: Tensor) -> Tensor:
        if has_global_scale(self.args):
            g0, g = self.first_global, self.record.global_scale
            assert g0 is not None
            assert g is not None
            least = torch.finfo(torch.float8_e4m3fn).smallest_normal
            return (scale * g0).clamp_(least, 448.0).to(torch.float8_e4m3fn).to(scale.dtype) / g
        return scale.to(self.record.scale.dtype)


class GlobalScaleKnob(Knob):
    """The global scale of NVFP4 of some weights, which stays one: layers that are fused in a server share it.

    Args:
        members: The scales of these weights; this knob is written after them.
    """

    def __init__(self, members: Sequence[ScaleKnob]):
        g = members[0].first_global
        assert g is not None
        super().__init__([tensor for member in members for tensor in member.tensors], g)
        self.start, self.members = g, {id(member.tensors[0]): member for member in members}

    def gradient(self, gradient: Tensor, tensor: Tensor) -> Tensor:
        module = self.members[id(tensor)].module
        total = (wide(as_matrix(module, like=gradient)) * wide(as_matrix(module))).sum()
        return total.to(self.change.device) / (1 + self.change)

    def write(self) -> None:
        for member in self.members.values():
            g = self.start / (1 + self.change)
            member.record = replace(member.record, global_scale=g.to(member.start.device))
            member.write()


class InputScaleKnob(Knob):
    """The static scale of the inputs of some modules, which stays one: layers of one input share it.

    Args:
        modules: Modules with equal input scales.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        scales = []
        for module in modules:
            record = Quantized.of(module)
            assert record is not None
            assert record.input_scale is not None
            scales.append(record.input_scale.clone())  # a leaf of its own
            replace(record, input_scale=scales[-1]).attach(module)
        super().__init__(scales, scales[0])
        self.start = wide(scales[0]).clone()

    def gradient(self, gradient: Tensor, tensor: Tensor) -> Tensor:
        return wide(gradient).to(self.start.device) * self.start

    def write(self) -> None:
        for scale in self.tensors:
            scale.copy_(self.start * (1 + self.change))


class TensorKnob(Knob):
    """A parameter itself.

    Args:
        parameter: The parameter.
        sparse: Its zeros stay zero; the knob has an entry for each other element alone.
    """

    def __init__(self, parameter: nn.Parameter, sparse: bool = False):
        values = parameter.detach()
        self.mask = values != 0 if sparse else None
        self.start = values.clone() if self.mask is None else values[self.mask]
        super().__init__([parameter], self.start)
        self.parameter = parameter
        self.unit = max(float(wide(values).square().mean().sqrt()), LEAST)

    def gradient(self, gradient: Tensor, tensor: Tensor) -> Tensor:
        return wide(gradient if self.mask is None else gradient[self.mask]) * self.unit

    def write(self) -> None:
        values = wide(self.start) + self.unit * self.change
        if self.mask is None:
            self.parameter.copy_(values)
        else:
            self.parameter.masked_scatter_(self.mask, values.to(self.parameter.dtype))


def has_fine_scales(record: Quantized) -> bool:
    """Whether the scales of a weight can take small steps: not where they are powers of two."""
    args = record.scheme.weights
    return args is not None and (not is_microscaled(args) or has_global_scale(args))


def scale_knobs(model: nn.Module) -> list[Knob]:
    """All scales that can take small steps: of weights, global ones, and those of static inputs."""
    quantized, inputs = Quantized.find(model), defaultdict[Any, list[nn.Module]](list)
    for name, (module, record) in quantized.items():
        if (scale := record.input_scale) is not None and scale.numel() == 1:
            inputs[*fused_with(name, quantized), float(scale)].append(module)
    input_knobs = [InputScaleKnob(modules) for modules in inputs.values()]  # first: they renew the records
    knobs, globals_ = list[ScaleKnob](), defaultdict[Any, list[ScaleKnob]](list)
    for name, (module, record) in Quantized.find(model).items():
        if has_fine_scales(record):
            knobs.append(ScaleKnob(module, record))
            if record.global_scale is not None:
                globals_[*fused_with(name, quantized), float(record.global_scale)].append(knobs[-1])
    return [*knobs, *(GlobalScaleKnob(members) for members in globals_.values()), *input_knobs]


@contextmanager
def gradients_to(knobs: Sequence[Knob], several: bool = True) -> Iterator[None]:
    """Inside, backward passes add their gradients to the sums of the knobs, and leave none in the tensors.

    Args:
        knobs: The knobs; their sums begin at zero.
        several: Sums are of more than one batch.
    """
    groups: dict[Tensor, list[Knob]] = {}  # experts may share one
    for knob in knobs:
        exact = torch.float64 if several or len(knob.tensors) > 1 else torch.float32
        knob.sum = torch.zeros_like(knob.change, dtype=exact)
        for tensor in knob.tensors:
            groups.setdefault(tensor, []).append(knob)

    def take(tensor: Tensor) -> None:
        assert tensor.grad is not None
        for knob in groups[tensor]:
            knob.sum += knob.gradient(tensor.grad, tensor)
        tensor.grad = None

    handles = [tensor.register_post_accumulate_grad_hook(take) for tensor in groups]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spread(scale: Tensor, W_RC: Tensor, args: QuantizationArgs) -> Tensor:
    """The scale of each weight, [R, C] or what broadcasts to it, in the dtype of W."""
    R, C = W_RC.shape
    s_RG = expand(scale, R, args).to(W_RC.dtype)
    return s_RG if s_RG.shape[1] == 1 else s_RG.repeat_interleave(group_columns(args, C), 1)[:, :C]


def _per_scale(value_RC: Tensor, scale: Tensor, args: QuantizationArgs) -> Tensor:
    """The sum over the weights of each scale, in its shape."""
    R, C = value_RC.shape
    g = group_columns(args, C)
    value_RG = pad(value_RC, (0, -C % g)).unflatten(1, (-1, g)).sum(-1)
    if args.strategy == QuantizationStrategy.BLOCK:
        b, _ = args.block_structure
        return pad(value_RG, (0, 0, 0, -R % b)).unflatten(0, (-1, b)).sum(1)
    return value_RG.sum().reshape(1) if scale.numel() == 1 else value_RG.view_as(scale)
