"""MLPs, heads and lists of layers are found by the names of their layers."""

import pytest
import torch
from torch import nn

from lightning_compress.structure.blocks import find_heads, find_layers, find_mlps, head_counts
from tests.support.structure_runs import llama


def test_the_parts_of_a_llama():
    model = llama(num_hidden_layers=2)  # 8 query heads of 4 numbers on 4 key/value heads, 48 neurons
    mlps, heads = find_mlps(model), find_heads(model)
    assert [(group.name, group.units) for group in mlps] == [(f"model.layers.{i}.mlp", 48) for i in range(2)]
    tensors = [(piece.tensor.rpartition("mlp.")[2], piece.dim, piece.consumer) for piece in mlps[0].slices]
    assert tensors == [("gate_proj.weight", 0, False), ("up_proj.weight", 0, False), ("down_proj.weight", 1, True)]
    assert [(group.name, group.units) for group in heads] == [(f"model.layers.{i}.self_attn", 4) for i in range(2)]
    by_name = {piece.tensor.rpartition("attn.")[2]: piece.index for piece in heads[0].slices}
    assert by_name["k_proj.weight"][1].tolist() == [4, 5, 6, 7]
    assert by_name["q_proj.weight"][1].tolist() == list(range(8, 16))  # two query heads share a key head
    assert find_layers(model) == "model.layers"


def test_heads_are_counted_in_proportion():
    module = nn.Module()
    module.num_heads, module.num_key_value_heads = 8, 4
    assert head_counts(module, 3, 4) == {"num_heads": 6, "num_key_value_heads": 3}


def test_sides_that_do_not_fit_make_no_group():
    mlp = nn.Module()
    mlp.fc1, mlp.fc2 = nn.Linear(4, 8), nn.Linear(6, 4)
    assert find_mlps(nn.Sequential(mlp)) == []
    mlp.fc2 = nn.Linear(8, 4)
    (group,) = find_mlps(nn.Sequential(mlp))
    assert [(piece.tensor, piece.dim) for piece in group.slices] == [
        ("0.fc1.weight", 0), ("0.fc1.bias", 0), ("0.fc2.weight", 1)
    ]  # fmt: skip
    assert torch.equal(group.slices[0].index.flatten(), torch.arange(8))


def test_ambiguous_lists_must_be_named():
    model = nn.ModuleDict({side: nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3)) for side in "ab"})
    with pytest.raises(ValueError, match=r"found \['a', 'b'\]; name it: blocks='model.layers'"):
        find_layers(model)
    assert find_layers(model, "b") == "b"
    with pytest.raises(ValueError, match=r"blocks='c' is not a ModuleList or Sequential of layers; the model has"):
        find_layers(model, "c")
