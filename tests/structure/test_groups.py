"""Groups: how many units stay, what a cut leaves of each tensor, and where the units lie afterwards."""

import pytest
import torch

from lightning_compress.structure.groups import (
    Group,
    Slice,
    cut_of,
    group_from_state,
    group_state,
    moved,
    renumbered,
    units_to_keep,
    without_layers,
)


@pytest.mark.parametrize(
    ("dense", "ratio", "round_to", "kept"),
    [(48, 0.25, 1, 36), (48, 0.25, 16, 48), (48, 0.5, 16, 32), (10, 0.3, 1, 7), (7, 0.99, 1, 1), (5, 0.5, 8, 5)],
)
def test_units_that_stay_are_rounded_up(dense, ratio, round_to, kept):
    assert units_to_keep(dense, ratio, round_to) == kept


def test_a_cut_and_the_places_after_it_agree_with_plain_indexing():
    """Two groups side by side in one concatenated input: what stays lies where the renumbered groups say."""
    ones, twos = torch.arange(3)[:, None], torch.arange(4).view(2, 2)
    first = Group("a", 3, (Slice("a.weight", 0, ones), Slice("c.weight", 1, ones)))
    second = Group("b", 2, (Slice("b.weight", 0, twos), Slice("c.weight", 1, 3 + twos)))
    weight = torch.arange(7.0)[None]
    units = torch.tensor([0, 2])
    cut = cut_of([(first, units)], {"a.weight": (3, 5), "b.weight": (4, 5), "c.weight": (1, 7)})
    assert set(cut) == {"a.weight", "c.weight"}
    small = weight.index_select(1, cut["c.weight"][1])
    first, second = renumbered(first, units, cut), renumbered(second, None, cut)
    assert small[0, first.slices[1].index].tolist() == [[0.0], [2.0]]
    assert small[0, second.slices[1].index].tolist() == [[3.0, 4.0], [5.0, 6.0]]
    assert (first.units, first.dense) == (2, 3)
    (back,) = group_from_state(group_state([second]))
    assert torch.equal(back.slices[1].index, second.slices[1].index)


def test_names_follow_layers_that_went():
    assert [moved(f"model.layers.{i}.mlp", "model.layers", [0, 2]) for i in range(3)] == [
        "model.layers.0.mlp", None, "model.layers.1.mlp",
    ]  # fmt: skip
    assert moved("model.layers", "model.layers", [0]) == "model.layers"
    assert moved("model.layers_norm.weight", "model.layers", [0]) == "model.layers_norm.weight"
    group = Group("layers.1.mlp", 2, (Slice("layers.1.mlp.weight", 0, torch.arange(2)[:, None]),))
    assert without_layers(group, "layers", [0]) is None
    assert without_layers(group, "layers", [1]).slices[0].tensor == "layers.0.mlp.weight"
