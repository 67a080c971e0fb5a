"""The weight of a layer as a matrix, and its inputs as the rows that this matrix multiplies.

The one file that knows how Linear, convolutions (transposed ones too) and the Conv1D of Hugging Face's GPT-2 store
their weight: all else sees W [R, C] and X [P, N, C] with y = x W^T.

A transposed convolution adds W[:, :, k] x[i] to its output at o = i stride - padding + k dilation. It is the ordinary
convolution, of stride 1 and with the kernel reversed, of an input with stride - 1 zeros after each value:

    y[o] = sum_k W[:, :, k]^T z[o + padding - k dilation]        z[i stride] = x[i], 0 elsewhere

An embedding (Embedding, EmbeddingBag) has a W too, with a row for each token, but multiplies nothing: a token selects
its row, y = W[token]. Its error is the error of each row by itself: there are no inputs that weigh columns.

Shapes: R rows (output features; of an embedding tokens), C columns (inputs of one output; of an embedding its
features), N tokens (a convolution: places of the window), P partitions (groups of a grouped convolution, each with its
own inputs; 1 for all others).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.layers.blank import is_blank
from lightning_compress.layers.expert import tokens_of
from lightning_compress.layers.weight_slice import WeightSlice

__all__ = ["CONVOLUTIONS", "SUPPORTED", "WeightLayout", "as_matrix", "check_weights_work", "input_layout",
           "inputs_as_rows", "is_embedding", "is_supported", "is_transposed", "layout_of", "only_input", "parameter_of",
           "partitions", "values_of_input", "weight_of", "write_matrix"]  # fmt: skip

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, *TRANSPOSED)
SUPPORTED = (
    "Linear, Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d, the Conv1D of transformers, LSTM, GRU, RNN and "
    "MultiheadAttention"
)
_Convolution = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class WeightLayout:
    """How a layer stores its weight; gradients pass in both directions.

    Args:
        kind: ``rows``: [R, ...]. ``columns``: [C, R]. ``inputs``: [inputs, R / groups, kernel ...], as transposed
            convolutions do.
        groups: Of a transposed convolution.
    """

    kind: Literal["rows", "columns", "inputs"] = "rows"
    groups: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor that is stored as the weight is, as [R, C]."""
        if self.kind == "inputs":
            return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
        return weight.t() if self.kind == "columns" else weight.flatten(1)

    def stored(self, W_RC: Tensor, shape: Sequence[int]) -> Tensor:
        """A matrix [R, C] as the layer stores it; ``shape`` is that of the weight."""
        if self.kind == "inputs":
            parts = W_RC.reshape(self.groups, shape[1], shape[0] // self.groups, *shape[2:])
            return parts.transpose(1, 2).flatten(0, 1)
        return W_RC.t() if self.kind == "columns" else W_RC.reshape(tuple(shape))


def layout_of(module: nn.Module) -> WeightLayout:
    """The layout of the weight of a module."""
    if isinstance(module, TRANSPOSED):
        return WeightLayout("inputs", module.groups)
    return WeightLayout("columns" if is_transposed(module) else "rows")


def check_weights_work(modules: Mapping[str, nn.Module], verb: str, in_place: bool = False) -> None:
    """ValueError names a module whose weight cannot be read or written, and says why and what to do.

    ``verb`` says what a modifier does to them, such as ``quantize``; ``in_place``: whether it computes in place, which
    tensors made under ``torch.inference_mode`` do not allow.
    """
    faults = {name: fault for name, module in modules.items() if (fault := _weight_fault(module, in_place))}
    for name, fault in faults.items():
        alike = [other for other, same in faults.items() if same == fault and other != name]
        more = f" (and {len(alike)} more: {', '.join(map(repr, alike[:3]))})" if alike else ""
        raise ValueError(f"cannot {verb} {name!r} ({type(modules[name]).__name__}){more}: {fault}, or add it to ignore")


def _weight_fault(module: nn.Module, in_place: bool) -> str | None:
    """Why the weight cannot be used, and what to do; None where it can, or where the module has no weight."""
    if isinstance(getattr(module, "parametrizations", None), nn.ModuleDict):
        return None  # the callers check those
    parameters = module._parameters
    if "weight" not in parameters and not isinstance(module, WeightSlice):
        return _computed(module)
    weight = module.whole if isinstance(module, WeightSlice) else parameters["weight"]
    if weight is None:
        return "its weight is None; give it one"
    if weight.is_meta and not is_blank(weight):
        return "its weight is on the meta device, so it has no values; load the weights first"
    if not weight.numel():
        return f"its weight has shape {list(weight.shape)}, so there is nothing in it; leave the layer out"
    if weight.dtype not in FLOATS:
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"its weight is {dtype}, expected float16, bfloat16, float32 or float64; start from the dense model"
    copied = "give it a copy: module.weight = nn.Parameter(module.weight.detach().clone())"
    if any(step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)):
        return f"the elements of its weight share memory (an expanded tensor); {copied}"
    if in_place and weight.is_inference():
        return f"its weight was made under torch.inference_mode and cannot be changed in place; {copied}"
    return None


def _computed(module: nn.Module) -> str | None:
    """Why ``weight`` is not a Parameter of the module; None where the module has no ``weight``."""
    parameters = module._parameters
    if "weight_g" in parameters:
        return "torch.nn.utils.weight_norm computes its weight; call torch.nn.utils.remove_weight_norm(module) first"
    if "weight_orig" in parameters and "weight_mask" in module._buffers:
        return "torch.nn.utils.prune computes its weight; call torch.nn.utils.prune.remove(module, 'weight') first"
    if "weight_orig" in parameters:
        return "torch.nn.utils.spectral_norm computes its weight; call torch.nn.utils.remove_spectral_norm first"
    weight = getattr(module, "weight", None)
    if callable(weight) and not isinstance(weight, Tensor):
        return "its weight is a method, as in modules that torch.ao has quantized; start from the float model"
    if isinstance(weight, Tensor):
        kind = "a buffer" if "weight" in module._buffers else "a plain attribute"
        return f"its weight is {kind}, not a Parameter; register it: module.weight = nn.Parameter(weight)"
    return None


def is_supported(module: nn.Module) -> bool:
    """True when its weight is a matrix that multiplies its inputs."""
    if isinstance(module, WeightSlice):
        return True
    if not isinstance(_stored(module), nn.Parameter):  # a computed weight cannot be written
        return False
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_transposed(module)


def is_embedding(module: nn.Module) -> bool:
    """True when its weight is a table whose rows are selected by token."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and isinstance(_stored(module), nn.Parameter)


def weight_of(module: nn.Module) -> Tensor:
    """The weight as the layer stores it, without gradient."""
    weight = _stored(module)
    assert isinstance(weight, Tensor)
    return weight.detach()


def parameter_of(module: nn.Module) -> nn.Parameter:
    """The parameter that holds the weight, in the layer's own layout; of a slice the one that it is a part of."""
    stored = module.whole if isinstance(module, WeightSlice) else _stored(module)
    assert isinstance(stored, nn.Parameter)
    return stored


def _stored(module: nn.Module) -> Any:
    """The weight, or the parameter behind parametrizations with ``passes_in_the_end``, which leave it as it is."""
    lists = getattr(module, "parametrizations", None)
    if not isinstance(lists, nn.ModuleDict) or "weight" not in lists:
        return getattr(module, "weight", None)
    passing = all(getattr(step, "passes_in_the_end", False) for step in lists["weight"].children())
    return module.get_parameter("parametrizations.weight.original") if passing else None


def as_matrix(module: nn.Module, like: Tensor | None = None) -> Tensor:
    """The weight as [R, C] in its own dtype: a view where the layout allows it, without gradient.

    ``like``: a tensor in the layout of the parameter, such as the gradient, to be used in place of the weight.
    """
    if not (is_supported(module) or is_embedding(module)):
        kinds = f"{SUPPORTED}, or an embedding"
        raise ValueError(f"cannot see the weight of a {type(module).__name__} as a matrix; expected {kinds}")
    if like is not None and isinstance(module, WeightSlice):
        like = module.slice_of(like)
    weight = weight_of(module) if like is None else like
    return layout_of(module).matrix(weight)


@torch.no_grad()
def write_matrix(module: nn.Module, W_RC: Tensor) -> None:
    """Put a matrix [R, C] back as the weight, in place, in the weight's own dtype and layout."""
    weight = weight_of(module)
    weight.copy_(layout_of(module).stored(W_RC, weight.shape))


def partitions(module: nn.Module) -> int:
    """P: rows [p * R / P, (p + 1) * R / P) of W multiply partition p of the inputs."""
    return module.groups if isinstance(module, CONVOLUTIONS) else 1


def input_layout(module: nn.Module) -> Hashable:
    """Modules of equal layout turn one input tensor into the same rows."""
    if isinstance(module, CONVOLUTIONS):
        window = (module.kernel_size, module.stride, module.dilation, module.padding, module.padding_mode)
        return (type(module).__name__, module.groups, *window, module.output_padding)
    return "features last"


def inputs_as_rows(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The input of one call as X [P, N, C].

    Args:
        module: The layer.
        x: Its input: [..., C] for Linear and Conv1D, [batch, channels, length] or [batch, channels, height, width]
            (the batch may be missing) for convolutions.
        mask: True for tokens that count, bool [batch, tokens]. It applies where the leading shape of x is the mask's,
            where x holds the same tokens flattened into one dimension, or some of them (layers/expert.py); other
            inputs are not masked.
    """
    if not isinstance(module, CONVOLUTIONS):
        if mask is not None and x.ndim > 1:
            mask = mask.to(x.device)
            if (tokens_N := tokens_of(x)) is not None:  # tokens that the router sent here
                x = x[mask.flatten()[tokens_N]]
            elif x.shape[:-1] == mask.shape:
                x = x[mask]
            elif x.ndim == 2 and len(x) == mask.numel():
                x = x[mask.flatten()]
        return x.detach().reshape(1, -1, x.shape[-1])
    return _windows(module, x.detach())


def values_of_input(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The values of an input for statistics of its range: :func:`inputs_as_rows`, without the zeros between values."""
    return x.detach() if isinstance(module, TRANSPOSED) else inputs_as_rows(module, x, mask)


def only_input(name: str, inputs: tuple[Any, ...]) -> Tensor:
    """The tensor among the positional arguments of a call, which hooks get.

    Raises:
        ValueError: It was passed by keyword; the message names the module.
    """
    if not inputs:
        raise ValueError(
            f"{name!r} was called with keyword arguments alone, which hooks do not get; call it as layer(x)"
        )
    return inputs[0]


def _windows(module: _Convolution, x: Tensor) -> Tensor:
    """[P, N, C] with N = batch x places of the window and C = channels of the partition x kernel."""
    spatial = len(module.kernel_size)
    x, stride = x[None] if x.ndim == spatial + 1 else x, module.stride
    if isinstance(module, TRANSPOSED):
        x, stride = _spread(x, stride), (1,) * spatial
    pads = _padding(module)
    if any(pads):
        x = F.pad(x, pads) if module.padding_mode == "zeros" else F.pad(x, pads, mode=module.padding_mode)
    x = x[:, :, None] if spatial == 1 else x  # a Conv1d is a Conv2d of height 1
    flat = [(1, *v) if spatial == 1 else v for v in (module.kernel_size, module.dilation, stride)]
    columns = F.unfold(x, flat[0], dilation=flat[1], stride=flat[2])  # [batch, channels * kernel, places]
    if isinstance(module, TRANSPOSED):
        columns = columns.unflatten(1, (-1, math.prod(module.kernel_size))).flip(2).flatten(1, 2)
    return columns.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """x with stride - 1 zeros between neighbours of each spatial dimension."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    every = slice(None)
    spread[(every, every, *[slice(None, None, s) for s in stride])] = x
    return spread


def _padding(module: _Convolution) -> list[int]:
    """(left, right) of each dimension, the last one first, as ``F.pad`` expects; negative ones cut."""
    pads: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if isinstance(module, TRANSPOSED):
            edge = module.dilation[axis] * (module.kernel_size[axis] - 1) - int(module.padding[axis])
            pads += [edge, edge + module.output_padding[axis]]
        elif module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [0, 0] if module.padding == "valid" else [int(module.padding[axis])] * 2
    return pads


def is_transposed(module: nn.Module) -> bool:
    """The Conv1D of transformers (weight [in, out]), recognized by name so that transformers need not be installed."""
    return any(c.__name__ == "Conv1D" and "transformers" in c.__module__ for c in type(module).__mro__)
