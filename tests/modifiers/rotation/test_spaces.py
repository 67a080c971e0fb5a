"""Spaces that are joined become one; a parameter is found in the module that runs."""

from torch import nn

from lightning_compress.modifiers.rotation.spaces import Norm, Slot, Space, Touch, owner_of

A, B, C = (Touch(Slot(name, "weight"), 0) for name in "abc")


def test_joined_spaces_have_the_touches_of_both_and_the_first_reason():
    one, two, three = Space(4, sources=[A]), Space(4, writers=[B, A]), Space(4, readers=[C])
    two.fix("tanh needs it as it is")
    three.fix("sin needs it as it is")
    one.join(two)
    three.join(two)  # through its root
    root = one.root()
    assert root is two.root() is three.root()
    assert set(root.touches) == {A, B, C}
    assert len(root.touches) == 3
    assert root.fixed == "sin needs it as it is"  # the one of three, the root
    one.join(three)
    assert one.root() is root
    assert len(root.writers) == 2


def test_a_space_is_centered_when_a_layer_norm_normalizes_it():
    space = Space(4, norms=[Norm("n", False, None, 0, None)])
    assert not space.centered
    space.norms.append(Norm("m", True, None, 0, None))
    assert space.centered


def test_a_tied_parameter_has_the_slot_of_the_module_that_runs():
    model = nn.ModuleDict({"table": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["table"].weight
    weight = model["head"].weight
    assert owner_of(model, weight, ["", "head"]) == Slot("head", "weight")
    assert owner_of(model, weight, [""]) == Slot("table", "weight")
    assert owner_of(model, nn.Parameter(weight.detach()), []) is None
    assert Slot("head", "weight").of(model) is weight
    assert Slot("", "shift").name == "shift"


def test_the_gain_of_a_norm_counts_its_offset():
    model = nn.Sequential(nn.RMSNorm(2))
    assert Norm("0", False, Slot("0", "weight"), 1, None).gain_of(model).tolist() == [2.0, 2.0]
    assert Norm("0", False, None, 0, None).gain_of(model) is None
