"""Units of transformer blocks by the names of their layers: neurons of MLPs, attention heads, lists of layers.

In an MLP, act(gate(x)) * up(x) -> down, a neuron is a row of gate, a row of up and a column of down. In an attention,
q, k, v -> o, a unit is a key/value head with all query heads that share it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.structure.groups import Group, Slice

__all__ = ["find_heads", "find_layers", "find_mlps", "head_counts"]

# (layers that make the neurons, the layer that reads them), as the families of transformers name them
MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),  # T5 1.1
    (("wi",), "wo"),
    (("fc1",), "fc2"),  # OPT, CLIP, timm's ViT
    (("c_fc",), "c_proj"),  # GPT-2
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Bloom
    (("lin1",), "lin2"),  # DistilBERT
    (("linear1",), "linear2"),  # nn.TransformerEncoderLayer
    (("intermediate.dense",), "output.dense"),  # BERT, ViT
)
OUTPUTS = ("o_proj", "out_proj")


def find_mlps(model: nn.Module) -> list[Group]:
    """One group for each MLP; a unit is a neuron of its hidden layer."""
    groups = []
    for name, module in model.named_modules():
        for makers, reader in MLPS:
            if not all(_matrix(_child(module, child)) for child in (*makers, reader)):
                continue
            prefix = f"{name}." if name else ""
            rows = [_sides(_child(module, maker))[0] for maker in makers]
            columns = _sides(_child(module, reader))[1]
            if len({*rows, columns}) > 1:
                continue
            index = torch.arange(columns, device="cpu")[:, None]
            slices = [s for maker in makers for s in _rows(model, f"{prefix}{maker}", index)]
            groups.append(Group(name or makers[0], columns, (*slices, _columns(model, f"{prefix}{reader}", index))))
            break
    return groups


def find_heads(model: nn.Module) -> list[Group]:
    """One group for each attention; a unit is a key/value head with the query heads that share it."""
    groups = []
    for name, module in model.named_modules():
        output = next((o for o in OUTPUTS if _matrix(_child(module, o))), None)
        dim = getattr(module, "head_dim", None)
        q, k, v = (_child(module, p) for p in ("q_proj", "k_proj", "v_proj"))
        if output is None or not isinstance(dim, int) or not all(map(_matrix, (q, k, v))):
            continue
        wide, narrow = _sides(q)[0], _sides(k)[0]
        if narrow % dim or wide % narrow or _sides(v)[0] != narrow or _sides(_child(module, output))[1] != wide:
            continue
        keys = torch.arange(narrow, device="cpu").view(narrow // dim, -1)
        queries = torch.arange(wide, device="cpu").view(narrow // dim, -1)
        slices = [
            *_rows(model, f"{name}.q_proj", queries),
            *_rows(model, f"{name}.k_proj", keys),
            *_rows(model, f"{name}.v_proj", keys),
            _columns(model, f"{name}.{output}", queries),
        ]
        groups.append(Group(name, len(keys), tuple(slices)))
    return groups


def head_counts(module: nn.Module, kept: int, dense: int) -> dict[str, int]:
    """Attributes of an attention module that count its heads, after ``kept`` of ``dense`` key/value heads stay."""
    names = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "embed_dim", "all_head_size")
    values = {name: getattr(module, name, None) for name in names}
    return {name: value * kept // dense for name, value in values.items() if isinstance(value, int)}


def find_layers(model: nn.Module, name: str | None = None) -> str:
    """The dotted name of the model's list of blocks: the longest ModuleList or Sequential of one class of blocks.

    Raises:
        ValueError: No list, several of one length, or ``name`` is not a list of modules.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    }
    if name is not None:
        if name not in lists:
            raise ValueError(
                f"blocks={name!r} is not a ModuleList or Sequential of layers; the model has {list(lists)}"
            )
        return name
    alike = {
        path: len(module)
        for path, module in lists.items()
        if len({type(block) for block in module}) == 1 and next(module[0].children(), None) is not None
    }
    longest = [path for path, length in alike.items() if length == max(alike.values())]
    if len(longest) != 1:
        raise ValueError(
            f"cannot tell which list of blocks is meant, found {longest or 'none'}; name it: blocks='model.layers'"
        )
    return longest[0]


def _child(module: nn.Module, name: str) -> Any:
    for attribute in name.split("."):
        module = getattr(module, attribute, None)  # type: ignore[assignment]
    return module


def _matrix(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _sides(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a layer."""
    rows, columns = module.get_parameter("weight").shape if "weight" in module._parameters else _features(module)
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)


def _features(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a parametrized layer, in the order of its weight."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.nx, module.nf


def _rows(model: nn.Module, name: str, index: Tensor) -> Iterator[Slice]:
    module = model.get_submodule(name)
    yield Slice(f"{name}.weight", 1 if type(module).__name__ == "Conv1D" else 0, index)
    if getattr(module, "bias", None) is not None:
        yield Slice(f"{name}.bias", 0, index)


def _columns(model: nn.Module, name: str, index: Tensor) -> Slice:
    transposed = type(model.get_submodule(name)).__name__ == "Conv1D"
    return Slice(f"{name}.weight", 0 if transposed else 1, index, consumer=True)
