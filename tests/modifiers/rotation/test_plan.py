"""The matrices of a plan: every kind, seeds, sizes that have none."""

import copy

import pytest
import torch

from lightning_compress import RotationModifier, compress
from lightning_compress.modifiers.rotation.fuse import Turn
from lightning_compress.modifiers.rotation.plan import Matrices, RotationPlan
from lightning_compress.modifiers.rotation.spaces import Norm, Slot, Space, Touch
from tests.support.rotation_models import build, logits, output_change

pytestmark = pytest.mark.filterwarnings("ignore:.*shared its weight with the embeddings")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [
    {"transform_type": "hadamard"}, {"transform_type": "random-matrix"}, {"transform_block_size": 8},
    {"transform_type": "random-matrix", "transform_block_size": 4}, {"seed": 5},
], ids=str)  # fmt: skip
def test_every_kind_of_matrix(kind, settings):
    model = build(kind)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    compress(model, RotationModifier(**settings))
    assert output_change(model, before) < 1e-5
    standard = build(kind)
    compress(standard, RotationModifier())
    name = "model.embed_tokens.weight" if kind == "llama" else "transformer.wte.weight"
    assert not torch.equal(model.state_dict()[name], weights[name])
    same = kind == "gpt2" and settings == {"transform_type": "hadamard"}  # there it needs signs
    assert torch.equal(model.state_dict()[name], standard.state_dict()[name]) == same


def test_a_size_without_a_hadamard_matrix():
    settings = {"hidden_size": 60 * 2 - 28, "num_attention_heads": 2, "num_key_value_heads": 2}
    message = (
        r"R1 rotates 92 features: no Hadamard matrix of order 92 .* nearest orders are 88 and 96, and blocks of 4 "
        r"divide it; set transform_block_size, or transform_type='random-matrix'"
    )
    with pytest.raises(ValueError, match=message):
        compress(build("llama", **settings), RotationModifier())
    model = build("llama", **settings)
    before = logits(model)
    compress(model, RotationModifier(rotations=["R1"], transform_type="random-matrix"))
    assert output_change(model, before) < 1e-5


def test_a_block_that_does_not_divide():
    with pytest.raises(ValueError, match="transform_block_size=24 does not divide the 32 features of R1"):
        compress(build("llama"), RotationModifier(transform_block_size=24))


def test_matrices_come_one_after_the_other_from_one_seed():
    one, other = Matrices("random-hadamard", None, 3), Matrices("random-hadamard", None, 3)
    first, second = one("R1", 8), one("R1", 8)
    assert torch.equal(first, other("R1", 8))
    assert torch.equal(second, other("R1", 8))
    assert not torch.equal(first, second)
    assert set(one.signs("R4", 16)) == {-1, 1}
    assert Matrices("hadamard", 4, 0).signs("R4", 16) == (1, 1, 1, 1)
    assert len(Matrices("random-matrix", 3, 0)("R1", 6)) == 3


def test_a_learned_matrix_replaces_its_first_one_everywhere():
    R, other, learned = torch.eye(2), torch.eye(2), torch.ones(2, 2)
    touch, norm, space = Touch(Slot("a", "weight"), 0), Norm("n", False, None, 0, None), Space(2)
    plan = RotationPlan([Turn(touch, R), Turn(touch, other)], [(norm, R)], {}, [(space, R)])
    plan.swap(R, learned)
    assert [turn.matrix is learned for turn in plan.turns] == [True, False]
    assert plan.norms[0][1] is learned
    assert plan.streams[0][1] is learned
