"""What is left to train when codes and masks are fixed: scales, vectors such as norms and biases, kept weights.

A knob is a tensor d, float32, zero at first; writing it changes the model:

    scales     s = s0 (1 + d), as it is stored;   W = s (c - z), the codes c fixed;   dL/dd = sum_j g_j s0 (c_j - z)
    tensors    p = p0 + u d,  u = rms(p0);        zeros of a sparse weight stay;      dL/dd = u g

So one learning rate suits all. With d = 0 the model is what it was, bit for bit. A scale that is stored coarsely (E4M3,
bfloat16) is rounded on the way, and the gradient passes the rounding.

Gradients are taken from a parameter as soon as the backward pass has made them, and released: no more than one weight
has a gradient at a time. Those of each batch are float32, and their sum is float64, so that neither the order of
batches nor the number of ranks changes a bit.

Shapes: R rows, C columns, G groups.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_compress.layers.matrix import as_matrix, parameter_of, write_matrix
from lightning_compress.quant.fake_quant import round_weight, wide
from lightning_compress.quant.formats import has_global_scale, is_microscaled
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.scales import expand, group_columns

__all__ = ["Knob", "ScaleKnob", "TensorKnob", "gradients_to", "has_fine_scales"]

LEAST = 1e-3  # u of a tensor of zeros, such as a fresh bias


class Knob(ABC):
    """One trainable tensor.

    Attributes:
        parameter: The parameter of the model whose gradient it takes.
        change: d.
        sum: The sum of dL/dd over batches, float64.
    """

    reduce = {"sum": "sum"}

    def __init__(self, parameter: nn.Parameter, like: Tensor):
        self.parameter = parameter
        self.change = torch.zeros_like(like, dtype=torch.float32)
        self.sum = torch.zeros_like(like, dtype=torch.float64)

    @abstractmethod
    def gradient(self, gradient: Tensor) -> Tensor:
        """dL/dd, float32, from that of the parameter."""

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
        super().__init__(parameter_of(module), record.scale)
        self.module, self.record = module, record
        args = record.scheme.weights
        assert args is not None
        self.args: QuantizationArgs = args
        self.start = wide(record.scale)

    def gradient(self, gradient: Tensor) -> Tensor:
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
            g = self.record.global_scale
            assert g is not None
            least = torch.finfo(torch.float8_e4m3fn).smallest_normal
            return (scale * g).clamp_(least, 448.0).to(torch.float8_e4m3fn).to(scale.dtype) / g
        return scale.to(self.record.scale.dtype)


class TensorKnob(Knob):
    """A parameter itself.

    Args:
        parameter: The parameter.
        sparse: Its zeros stay zero.
    """

    def __init__(self, parameter: nn.Parameter, sparse: bool = False):
        super().__init__(parameter, parameter.detach())
        self.start = parameter.detach().clone()
        self.unit = max(float(wide(self.start).square().mean().sqrt()), LEAST)
        self.kept = self.start != 0 if sparse else None

    def gradient(self, gradient: Tensor) -> Tensor:
        scaled = wide(gradient) * self.unit
        return scaled if self.kept is None else scaled * self.kept

    def write(self) -> None:
        change = self.change if self.kept is None else self.change * self.kept
        self.parameter.copy_(wide(self.start) + self.unit * change)


def has_fine_scales(record: Quantized) -> bool:
    """Whether the scales of a weight can take small steps: not where they are powers of two."""
    args = record.scheme.weights
    return args is not None and (not is_microscaled(args) or has_global_scale(args))


@contextmanager
def gradients_to(knobs: Sequence[Knob]) -> Iterator[None]:
    """Inside, backward passes add their gradients to the sums of the knobs, and leave none in the parameters."""
    groups: dict[nn.Parameter, list[Knob]] = {}  # experts may share one
    for knob in knobs:
        groups.setdefault(knob.parameter, []).append(knob)

    def take(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        for knob in groups[parameter]:
            knob.sum += knob.gradient(parameter.grad)
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(take) for parameter in groups]
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
