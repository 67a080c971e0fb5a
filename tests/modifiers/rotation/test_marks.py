"""Marks of tensors: products begin spaces, sums join them, norms are recorded once."""

import pytest
import torch
from torch import nn

from lightning_compress.modifiers.rotation.marks import AttentionValue, Mark, Marks
from lightning_compress.modifiers.rotation.spaces import Norm, Slot, Touch

RMS = Norm("norm", False, None, 0, None)


@pytest.fixture
def marks():
    return Marks(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4, bias=False)}))


def test_a_product_reads_one_space_and_writes_another(marks):
    x, out, a = torch.zeros(2, 4), torch.zeros(2, 4), marks.model["a"]
    space = marks.new_space(4)
    marks.put(x, Mark(space, RMS))
    marks.multiply(x, a.weight, (-2, -1), a.bias, out)
    (product,) = marks.products
    assert space.readers == [product.reads] == [Touch(Slot("a", "weight"), 1, RMS)]
    assert product.writes == (Touch(Slot("a", "weight"), 0), Touch(Slot("a", "bias"), 0))
    assert marks.get(out).space is product.output_space
    assert marks.touched == {id(a.weight), id(a.bias)}
    assert not marks.heads


def test_a_product_of_mixed_values_is_a_head(marks):
    x, out, b = torch.zeros(2, 4), torch.zeros(2, 4), marks.model["b"]
    value = AttentionValue((Touch(Slot("a", "weight"), 0),), 2)
    marks.put_value(x, value)
    marks.multiply(x, b.weight, (-2, -1), None, out)
    assert not marks.heads  # not mixed over tokens
    marks.put_value(x, AttentionValue(value.touches, 2, mixed=True))
    marks.multiply(x, b.weight, (-2, -1), None, out)
    assert [(head.value, head.output, head.size) for head in marks.heads] == [
        (value.touches, Touch(Slot("b", "weight"), 1), 2)
    ]


def test_rows_of_values_count_from_their_first_row():
    value = AttentionValue((Touch(Slot("qkv", "weight"), 0, start=8, stop=24),), 16)
    (touch,) = value.rows(4, 8).touches
    assert (touch.start, touch.stop, value.rows(4, 8).width) == (12, 16, 4)


def test_the_reason_of_a_fixed_space_names_the_module_that_ran(marks):
    x = torch.zeros(4)
    marks.put(x, Mark(marks.new_space(4)))
    marks.inside = ["", "layers.0"]
    marks.need_all("sin", (x,))
    marks.need(x, "too late")
    assert marks.get(x).space.fixed == "sin needs it as it is in 'layers.0'"
    marks.put(x, None)
    assert marks.get(x) is None


def test_vectors_behind_one_norm_may_be_added_those_behind_two_fix_the_space(marks):
    one, two, out = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    spaces = [marks.new_space(4), marks.new_space(4)]
    marks.put(one, Mark(spaces[0]))
    marks.put(two, Mark(spaces[1]))
    marks.unite("add", one, two, out)
    assert marks.get(out).space.root() is spaces[0]
    assert spaces[1].root() is spaces[0]
    marks.normalize(RMS, one, out)
    assert spaces[0].norms == [RMS]
    assert not spaces[0].fixed
    marks.unite("add", one, out, two)
    assert spaces[0].fixed == "the output of 'norm' is added to it"
