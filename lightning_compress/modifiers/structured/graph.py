"""Groups of channels in any network: torch-pruning traces channels through residuals, norms, concatenations.

Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900. The library gives the indices of layers
that belong to a channel; this package makes the cut. torch-pruning is an optional package.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_compress.layers.forward import gradients_for
from lightning_compress.structure.groups import Group, Slice

__all__ = ["CONVS", "check_installed", "find_channels", "output_size"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # weight [inputs, outputs, ...]
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def check_installed() -> Any:
    """The library; ImportError says how to get it."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "pruning channels follows them through the network with torch-pruning, which is not installed: "
            "pip install 'lightning-compress[structured]'"
        ) from error
    return torch_pruning


def output_size(module: nn.Module) -> int:
    """Output channels of a Linear or a convolution."""
    size: int = module.out_features if isinstance(module, nn.Linear) else module.out_channels  # type: ignore[assignment]
    return size


def find_channels(
    model: nn.Module, targets: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Group], list[str]]:
    """The group of every target's output channels; layers joined by a residual share one.

    The model runs once, in evaluation mode, on ``args`` and ``kwargs``; its modes are as before afterwards.

    Returns:
        Groups in the order of targets, and the targets that make the model's output, which have none.

    Raises:
        ValueError: Channels pass through a layer that cannot be cut, or a target takes no part in the forward pass.
        ImportError: torch-pruning is not installed.
    """
    library = check_installed()
    modes = {module: module.training for module in model.modules()}
    floats = [p for p in model.parameters() if p.is_floating_point()]  # the graph is read off autograd
    try:
        with torch.enable_grad(), gradients_for(model, floats), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = library.DependencyGraph().build_dependency(
                model,
                example_inputs=(args, dict(kwargs)),
                forward_fn=lambda module, inputs: module(*inputs[0], **inputs[1]),
                output_transform=_tensors,
                verbose=False,
            )
            return _groups(library, graph, model, targets)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _groups(
    library: Any, graph: Any, model: nn.Module, targets: Mapping[str, nn.Module]
) -> tuple[list[Group], list[str]]:
    names = {module: name for name, module in model.named_modules()}
    groups: list[Group] = []
    covered: set[str] = set()
    outputs = []
    for name, module in targets.items():
        if module not in graph.module2node:
            raise ValueError(f"target {name!r} took no part in the forward pass; add it to ignore")
        if name in covered:
            continue
        cut = library.prune_linear_out_channels if isinstance(module, nn.Linear) else library.prune_conv_out_channels
        size = output_size(module)
        items = graph.get_pruning_group(module, cut, idxs=list(range(size)))
        if not all(item.dep.target.outputs or not graph.is_out_channel_pruning_fn(item.dep.handler) for item in items):
            outputs.append(name)  # some of its channels leave the model
            continue
        slices: list[Slice] = []
        makers = _makers(graph, items, names)
        for item in items:
            dep, indices = item.dep, torch.tensor(item.idxs, dtype=torch.int64, device="cpu")
            layer = dep.target.module
            if isinstance(layer, nn.Parameter):
                path = next(n for n, p in model.named_parameters() if p is layer)
            elif layer in names:
                path = names[layer]
            else:
                continue  # an operation, such as an addition
            out = bool(graph.is_out_channel_pruning_fn(dep.handler))
            if out and isinstance(layer, (nn.Linear, *CONVS)):
                covered.add(path)
            roots = torch.tensor(item.root_idxs, dtype=torch.int64, device="cpu")
            index = _by_unit(indices, roots, size, path, name)
            slices += _slices(path, layer, index, out, makers)
        groups.append(Group(name, size, tuple(slices)))
    return groups, outputs


def _by_unit(indices: Tensor, roots: Tensor, size: int, path: str, maker: str) -> Tensor:
    """The indices of each channel, [U, K]."""
    order = torch.argsort(roots, stable=True)
    if len(roots) % size or not torch.equal(
        roots[order], torch.arange(size, device="cpu").repeat_interleave(len(roots) // size)
    ):
        raise ValueError(
            f"cannot prune through {path!r}: the channels of {maker!r} enter it unequally often; add {maker!r} to "
            f"ignore"
        )
    return indices[order].view(size, -1)


def _makers(graph: Any, items: Any, names: Mapping[nn.Module, str]) -> str:
    """The layers that compute the channels of a group, for messages."""
    layers = [i.dep.target.module for i in items if graph.is_out_channel_pruning_fn(i.dep.handler)]
    return ", ".join(dict.fromkeys(repr(names[m]) for m in layers if isinstance(m, (nn.Linear, *CONVS))))


def _slices(path: str, layer: Any, index: Tensor, out: bool, makers: str) -> list[Slice]:
    """The tensors of one layer that shrink; ``makers``: the layers that compute these channels."""
    if isinstance(layer, nn.Parameter):
        sides = [i for i, side in enumerate(layer.shape) if side > 1]
        return [Slice(path, sides[-1], index)] if sides else []
    tensors: list[tuple[str, int]]
    if isinstance(layer, CONVS) and layer.groups > 1:
        if not layer.groups == layer.in_channels == layer.out_channels:
            raise ValueError(
                f"cannot prune through {path!r}: a convolution with groups={layer.groups} that is not "
                f"depthwise; add the layers whose channels these are to ignore: {makers}"
            )
        tensors = [("weight", 0), ("bias", 0)]
    elif isinstance(layer, TRANSPOSED):
        tensors = [("weight", 1), ("bias", 0)] if out else [("weight", 0)]
    elif isinstance(layer, (nn.Linear, *CONVS)):
        tensors = [("weight", 0), ("bias", 0)] if out else [("weight", 1)]
    elif isinstance(layer, _NormBase):
        tensors = [(key, 0) for key in ("weight", "bias", "running_mean", "running_var")]
    elif isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1 and layer.weight is not None:
        tensors = [("weight", 0), ("bias", 0)]
    elif isinstance(layer, nn.Embedding):
        tensors = [("weight", 1)]
    elif isinstance(layer, nn.PReLU):
        tensors = [("weight", 0)] if layer.num_parameters > 1 else []
    elif next(layer.parameters(), None) is None and next(layer.buffers(), None) is None:
        return []
    else:
        raise ValueError(
            f"cannot prune through {path!r}, a {type(layer).__name__}: add the layers whose channels it reads to "
            f"ignore: {makers}"
        )
    consumer = not out and isinstance(layer, (nn.Linear, *CONVS))
    return [
        Slice(f"{path}.{key}", dim, index, consumer) for key, dim in tensors if getattr(layer, key, None) is not None
    ]


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value) if tensor.grad_fn is not None]
