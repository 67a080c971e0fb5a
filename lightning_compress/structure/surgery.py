"""The cut itself: parameters, buffers, gradients and the optimizer's state shrink; module attributes follow.

Every cut leaves a step in the model's record, plain data in the order of the cuts. :func:`reshape` repeats them on a
freshly built dense model, so that a checkpoint of the small one fits.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_compress.layers.records import Record
from lightning_compress.structure.groups import Cut

__all__ = ["Structure", "change_attributes", "cut_layers", "cut_tensors", "record_of", "reshape", "tensors_of"]

Step = dict[str, Any]
Optimizers = Optimizer | Sequence[Optimizer] | None


@dataclass(frozen=True)
class Structure(Record):
    """The cuts that were made in a model, in their order.

    The model holds them as plain data, so that a pickled copy of it can be read without this package.
    """

    attribute = "_lightning_compress_structure"

    steps: tuple[Step, ...]

    def attach(self, module: nn.Module) -> None:
        setattr(module, self.attribute, self.to_json())

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        steps = getattr(module, cls.attribute, None)
        return None if steps is None else cls.from_json(steps)

    def to_json(self) -> list[Step]:
        return list(self.steps)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        return cls(tuple(data))


def record_of(model: nn.Module) -> list[Step]:
    """The cuts that were made in this model, in order; empty for a dense one."""
    structure = Structure.of(model)
    return [] if structure is None else structure.to_json()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under every name."""
    return {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}


def cut_tensors(
    model: nn.Module,
    cut: Cut,
    optimizers: Optimizers = None,
    attributes: Mapping[str, Mapping[str, int]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Replace tensors by smaller ones.

    Args:
        model: Its parameters are replaced by smaller ones (new objects), its buffers too.
        cut: Indices of each tensor that stay.
        optimizers: Optimizers whose groups get the new parameters, and whose state is cut in the same way.
        attributes: By module name, attributes that state sizes and do not follow from the shapes of its weights.
        config: New values of ``model.config``.

    Raises:
        ValueError: A tensor is parametrized, or an optimizer's state has a shape that cannot be cut. Nothing is
            changed in that case.
    """
    optimizers = _listed(optimizers)
    old = {name: _tensor(model, name) for name in cut}
    _check_optimizers(optimizers, old)
    shapes = {}
    new: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for name, along in cut.items():
            tensor = old[name]
            smaller = _selected(tensor, along)
            shapes[name] = list(smaller.shape)
            if isinstance(tensor, nn.Parameter):
                fresh = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
                fresh.grad = None if tensor.grad is None else _selected(tensor.grad, along)
                new[id(tensor)] = fresh
                for optimizer in optimizers:
                    _hand_over(optimizer, tensor, fresh, along)
                _replace_everywhere(model, tensor, fresh)
            else:
                _set(model, name, smaller)
    _follow(model, cut)
    _note(model, {"shapes": shapes}, attributes or {}, config or {})


def cut_layers(
    model: nn.Module,
    name: str,
    kept: Sequence[int],
    optimizers: Optimizers = None,
    attributes: Mapping[str, Mapping[str, int]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Remove modules from the ModuleList or Sequential ``name``, and their parameters from optimizers.

    The layers ``kept``, by ascending index, stay; names in ``attributes`` are those after the cut. Other arguments are
    as in :func:`cut_tensors`.
    """
    before = {id(p) for p in model.parameters()}
    _keep_layers(model, name, kept)
    removed = before - {id(p) for p in model.parameters()}
    for optimizer in _listed(optimizers):
        for group in optimizer.param_groups:
            for parameter in [p for p in group["params"] if id(p) in removed]:
                optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if id(p) not in removed]
    _note(model, {"layers": {name: list(kept)}}, attributes or {}, config or {})


def reshape(model: nn.Module, steps: Sequence[Step]) -> None:
    """Give a dense model (or one after the first of these steps) the shapes after ``steps``, filled with zeros.

    Call it before weights are loaded and before optimizers exist.

    Raises:
        ValueError: The model was cut in another way, or is another model.
    """
    past = record_of(model)
    if [_outline(s) for s in steps[: len(past)]] != [_outline(s) for s in past]:
        raise ValueError(
            f"this {type(model).__name__} was shrunk in another way than the model that was saved; build the dense "
            f"model, and use the recipe of the run that saved it"
        )
    for step in steps[len(past) :]:
        for name, layers in step.get("layers", {}).items():
            _keep_layers(model, name, layers)
        for name, shape in step.get("shapes", {}).items():
            tensor = _tensor(model, name)
            if len(shape) != tensor.dim() or any(s > t for s, t in zip(shape, tensor.shape, strict=True)):
                raise ValueError(
                    f"{name!r} has shape {tuple(tensor.shape)} in this model and {tuple(shape)} in the one that was "
                    f"saved, which only removed: build the dense model that the first run began with"
                )
            smaller = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
            if isinstance(tensor, nn.Parameter):
                _replace_everywhere(model, tensor, nn.Parameter(smaller, requires_grad=tensor.requires_grad))
            else:
                _set(model, name, smaller)
        _follow(model, step.get("shapes", {}))
        _note(model, {k: step[k] for k in ("layers", "shapes") if k in step}, step["attributes"], step["config"])


def change_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set attributes in which modules state their own sizes."""
    for name, values in attributes.items():
        for key, value in values.items():
            setattr(model.get_submodule(name), key, value)


# -- tensors ----------------------------------------------------------------------------------------------------------


def _selected(tensor: Tensor, along: Mapping[int, Tensor]) -> Tensor:
    tensor = tensor.detach()
    for dim, indices in along.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous()


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute in getattr(module, "parametrizations", {}):
        raise ValueError(
            f"{name!r} is parametrized (fake-quantized, say), so its shape cannot change: let structured pruning stand "
            f"before the other modifier in the recipe and prune at set-up, with start=0"
        )
    tensor = getattr(module, attribute, None)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"the model has no tensor {name!r}: it is not the model that was shrunk")
    return tensor


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, value)


def _replace_everywhere(model: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    """Replace a parameter in every module that holds it, so that tied weights stay tied."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = new


def _follow(model: nn.Module, names: Iterable[str]) -> None:
    """Update the sizes that modules of torch state beside their weights."""
    for path in {name.rpartition(".")[0] for name in names}:
        module = model.get_submodule(path)
        first = module._parameters.get("weight")
        tensor = module._buffers.get("running_mean") if first is None else first  # a norm without weights
        if tensor is not None:
            change_attributes(model, {path: _sizes(module, tensor.shape)})


def _sizes(module: nn.Module, shape: Sequence[int]) -> dict[str, Any]:
    """Attributes of a module whose weight has this shape."""
    if isinstance(module, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        groups = shape[0] if module.groups > 1 else 1  # depthwise: the graph refuses others
        return {"groups": groups, "out_channels": shape[0], "in_channels": shape[1] * groups}
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        depthwise = module.groups > 1
        groups, outputs = (shape[0], shape[0]) if depthwise else (1, shape[1])
        return {"groups": groups, "in_channels": shape[0], "out_channels": outputs}
    if isinstance(module, _NormBase):
        return {"num_features": shape[0]}
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": tuple(shape)}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    return {"nx": shape[0], "nf": shape[1]} if type(module).__name__ == "Conv1D" else {}  # of GPT-2, [in, out]


# -- optimizers -------------------------------------------------------------------------------------------------------


def _listed(optimizers: Any) -> list[Optimizer]:
    return [*optimizers] if isinstance(optimizers, list | tuple) else [o for o in [optimizers] if o is not None]


def _check_optimizers(optimizers: Sequence[Optimizer], old: Mapping[str, Tensor]) -> None:
    for optimizer in optimizers:
        for name, parameter in old.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for {name!r} "
                        f"{tuple(parameter.shape)}, which cannot be cut along: prune at set-up (start=0), or use an "
                        f"optimizer with a state like its parameters, such as AdamW or SGD"
                    )


def _hand_over(optimizer: Optimizer, old: Tensor, new: nn.Parameter, along: Mapping[int, Tensor]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = {
            key: _selected(value, along) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in optimizer.state.pop(old).items()
        }


# -- layers, and the record -------------------------------------------------------------------------------------------


def _keep_layers(model: nn.Module, name: str, kept: Sequence[int]) -> None:
    holder, _, attribute = name.rpartition(".")
    layers = model.get_submodule(name)
    if not isinstance(layers, nn.ModuleList | nn.Sequential) or max(kept) >= len(layers):
        raise ValueError(f"{name!r} is not a list of more than {max(kept)} layers: this is not the model that was cut")
    chosen = [layers[i] for i in kept]
    smaller = nn.ModuleList(chosen) if isinstance(layers, nn.ModuleList) else nn.Sequential(*chosen)
    setattr(model.get_submodule(holder), attribute, smaller)
    for index, layer in enumerate(chosen):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):  # index of its keys and values in a cache
                setattr(module, "layer_idx", index)  # noqa: B010  mypy takes attributes of modules for tensors


def _note(model: nn.Module, step: Step, attributes: Mapping[str, Mapping[str, int]], config: Mapping[str, Any]) -> None:
    change_attributes(model, attributes)
    for key, value in config.items():
        setattr(model.config, key, value)
    step = {**step, "attributes": {n: dict(v) for n, v in attributes.items()}, "config": dict(config)}
    Structure((*record_of(model), step)).attach(model)


def _outline(step: Step) -> tuple[Any, Any]:
    return step.get("layers"), {name: list(shape) for name, shape in step.get("shapes", {}).items()}
