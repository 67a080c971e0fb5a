"""Selecting modules by class, name and pattern; what is said when nothing matches."""

import warnings

import pytest
import torch
from compressed_tensors.utils.match import is_match
from torch import nn

import lightning_compress
from lightning_compress import (
    ConstantPruningModifier,
    FreezeModifier,
    MagnitudePruningModifier,
    QuantizationModifier,
    SparseGPTModifier,
    WandaPruningModifier,
    compress,
)
from lightning_compress.layers.matching import Names, clean_name, match_rank, select, select_weights, warn_of_left_out


class GatedLinear(nn.Linear):
    pass


@pytest.fixture
def model() -> nn.Module:
    def block():
        return nn.ModuleDict({"q_proj": nn.Linear(4, 4), "gate": GatedLinear(4, 4), "norm": nn.LayerNorm(4)})

    return nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "lm_head": nn.Linear(4, 8)})


def names(*args, **kwargs) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return list(select(*args, **kwargs))


def test_by_class_and_its_ancestors_in_model_order(model):
    assert names(model, "Linear") == [
        "layers.0.q_proj", "layers.0.gate", "layers.1.q_proj", "layers.1.gate", "lm_head",
    ]  # fmt: skip
    assert names(model, ["GatedLinear"]) == ["layers.0.gate", "layers.1.gate"]
    assert select(model, "Linear")["lm_head"] is model["lm_head"]


def test_by_name_and_by_pattern(model):
    assert names(model, ["lm_head", "layers.1.gate"]) == ["layers.1.gate", "lm_head"]
    assert names(model, r"re:layers\.\d+\.q_") == ["layers.0.q_proj", "layers.1.q_proj"]
    assert names(model, r"re:.*\.1\..*proj$") == ["layers.1.q_proj"]


def test_a_pattern_matches_from_the_beginning(model):
    with pytest.raises(ValueError, match="matches none"):
        select(model, "re:q_proj")


def test_a_module_that_several_targets_match_comes_once(model):
    assert names(model, ["Linear", "lm_head", "re:.*head"]).count("lm_head") == 1


def test_ignore(model):
    assert names(model, "Linear", ["GatedLinear", "lm_head", r"re:layers\.0"]) == ["layers.1.q_proj"]
    assert names(model, "Linear", "re:.*lm_head")[-1] == "layers.1.gate"


def test_ranks(model):
    head = model["lm_head"]
    ranks = [match_rank("lm_head", head, t) for t in ("lm_head", "re:lm", "Linear", "Module", "object", "head")]
    assert ranks == [3, 2, 1, 1, 0, 0]


class Mixin:
    pass


class MixedLinear(Mixin, nn.Linear):
    pass


@pytest.mark.parametrize("name", ["lm_head", "layers.0.q_proj", "layers.10.q_proj"])
@pytest.mark.parametrize("module", [nn.Linear(2, 2), MixedLinear(2, 2), nn.LayerNorm(2)], ids=str)
def test_a_target_matches_what_it_matches_for_readers_of_the_export(name, module):
    """vLLM and transformers read targets and ignore of an export by compressed-tensors."""
    classes, names = ["Linear", "MixedLinear", "Mixin", "Module", "object"], ["lm_head", "layers.0.q_proj"]
    targets = [*classes, *names, "re:layers.1", "re:.*head"]
    assert [match_rank(name, module, t) > 0 for t in targets] == [is_match(name, module, t) for t in targets]


# -- compiled modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "clean"),
    [("_orig_mod.a", "a"), ("a._orig_mod.b", "a.b"), ("a._orig_mod", "a"), ("_orig_mod", ""), ("my_orig_mod.a",) * 2],
)
def test_clean_name(name, clean):
    assert clean_name(name) == clean


def test_names_in_a_compiled_model_are_those_of_the_plain_one(model):
    plain = select(model, "Linear")
    assert select(torch.compile(model), "Linear") == plain
    head = model["lm_head"]
    model["lm_head"] = torch.compile(head)
    model["layers"][0] = torch.compile(model["layers"][0])
    assert select(model, "Linear") == plain  # the Linear inside, not the wrapper around it
    assert select(model, "lm_head") == {"lm_head": head}


# -- errors ----------------------------------------------------------------------------------------------------------


def test_nothing_matches_and_the_near_misses_are_named(model):
    with pytest.raises(ValueError, match=r"targets=\['Linaer'\] matches none of .* 10 modules; did you mean 'Linear'"):
        select(model, "Linaer")
    with pytest.raises(ValueError, match=r"did you mean .*'lm_head'"):
        select(model, ["lm_haed"])
    with pytest.raises(ValueError, match=r"did you mean 'GatedLinear'\?"):
        select(model, ["gated"])
    with pytest.raises(ValueError, match=r"none of the model's 2 modules; its classes are \['Linear', 'ReLU'\]"):
        select(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["GRU"])
    with pytest.raises(ValueError, match=r"its classes are \['GatedLinear', 'LayerNorm', 'Linear', 'Module"):
        select(model, "zzz")
    with pytest.raises(ValueError, match=r"targets=\[\] matches none"):
        select(model, [])


def test_the_name_of_the_argument_is_in_the_message(model):
    with pytest.raises(ValueError, match=r"config_groups.mlp.targets=\['zzz'\] matches none"):
        select(model, "zzz", field="config_groups.mlp.targets")


def test_everything_is_ignored(model):
    with pytest.raises(ValueError, match=r"ignore=\['Linear'\] leaves nothing of the 2 modules that targets="):
        select(model, "GatedLinear", "Linear")


@pytest.mark.parametrize(
    ("field", "arguments"), [("targets", ("re:layers.(",)), ("ignore", ("Linear", ["re:layers.("]))]
)
def test_an_invalid_pattern_names_field_and_pattern(model, field, arguments):
    with pytest.raises(ValueError, match=rf"{field}: 're:layers\.\(' is not a valid regular expression: .*position"):
        select(model, *arguments)


def test_one_of_two_targets_matches_nothing(model):
    with pytest.warns(UserWarning, match=r"targets=\['Linaer'\] matches none.*did you mean 'Linear'"):
        assert list(select(model, ["lm_head", "Linaer"])) == ["lm_head"]


def test_a_misspelt_name_in_ignore_is_told_a_pattern_is_not(model):
    with pytest.warns(UserWarning, match=r"ignore=\['lm_haed'\] matches none.*'lm_head'"):
        select(model, "Linear", "lm_haed")
    assert names(model, "Linear", "re:.*router")  # recipes for many models


def stack(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def left_out(model: nn.Module, targets, ignore=()) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_left_out(model, select(model, targets, ignore), targets, ignore)
    return [str(one.message) for one in said]


def test_a_class_that_leaves_most_of_the_model_as_it_is_says_so():
    model = stack(nn.Embedding(50, 8), nn.Conv1d(8, 8, 3), nn.LSTM(8, 8), nn.Linear(8, 4))
    (message,) = left_out(model, ["Linear"])
    assert "reaches 32 of 736 weights" in message  # 32 + 8 * 8 * 3 + 2 * 4 * 8 * 8
    assert "1 LSTM (512), 1 Conv1d (192)" in message
    assert "to compress LSTM and Conv1d too, give targets=['Linear', 'LSTM', 'Conv1d']; to leave" in message


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("GRU", nn.GRU(8, 8)),
        ("RNN", nn.RNN(8, 64)),
        ("LSTMCell", nn.LSTMCell(8, 8)),
        ("MultiheadAttention", nn.MultiheadAttention(16, 2)),
    ],
)
def test_the_advice_names_the_class_that_can_be_a_target(kind, layer):
    (message,) = left_out(stack(layer, nn.Linear(8, 4)), ["Linear"])
    assert f"to compress {kind} too, give targets=['Linear', '{kind}']" in message
    assert set(select_weights(stack(layer, nn.Linear(8, 4)), ["Linear", kind])) > {"1"}  # and it is one


def test_what_no_modifier_can_reach_gets_no_advice_to_target_it():
    (message,) = left_out(stack(nn.Bilinear(8, 8, 8), nn.Linear(8, 4)), ["Linear"])
    assert "1 Bilinear (512); no modifier compresses the weights of Bilinear; to leave" in message
    assert "targets;" not in message


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        (["Linear", "Conv1d"], ["LSTM"]),  # all of it, or named as left out
        (["Linear"], ["Conv1d", "re:2"]),
        (["re:.*3"], []),  # a pattern is a choice
        (["3"], []),
        (["Conv1d"], []),  # so is another class
    ],
)
def test_what_was_chosen_one_by_one_is_not_questioned(targets, ignore):
    model = stack(nn.Embedding(50, 8), nn.Conv1d(8, 8, 3), nn.LSTM(8, 8), nn.Linear(8, 4))
    assert not left_out(model, targets, ignore)


def test_a_small_first_convolution_and_norms_are_nobodys_mistake():
    assert not left_out(stack(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 64)), ["Linear"])


def test_a_tied_weight_counts_once_and_as_reached():
    model = stack(nn.Linear(8, 8), nn.Bilinear(8, 1, 8))
    model[1].weight = model[0].weight
    assert not left_out(model, ["Linear"])


@pytest.mark.parametrize("name", [n for n in lightning_compress.__all__ if n.endswith("Modifier") and n != "Modifier"])
def test_every_modifier_takes_one_target_without_a_list(name):
    """As most recipes of llm-compressor write it: ``targets="Linear"``."""
    fields = getattr(lightning_compress, name).model_fields
    names = {field: fields[field].annotation for field in ("targets", "ignore") if field in fields}
    assert all(annotation in (Names, Names | None) for annotation in names.values()), names


def test_one_target_without_a_list_is_one_target():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[0].weight.data[0] = 0
    ledger = compress(model, [
        ConstantPruningModifier(targets="Linear", ignore="2"), FreezeModifier(targets="2"),
        MagnitudePruningModifier(targets="Linear", ignore="0", final_sparsity=0.5),
    ])  # fmt: skip
    assert {(row.module, row.sparsity) for row in ledger} == {("0", 0.25), ("2", 0.5)}


@pytest.mark.parametrize("modifier", [
    MagnitudePruningModifier(targets="re:.*mlp.*"), SparseGPTModifier(targets="re:.*mlp.*"),
    WandaPruningModifier(sparsity={"re:.*mlp.*": 0.5}), QuantizationModifier(targets="re:.*mlp.*", scheme="W8A8"),
])  # fmt: skip
def test_a_pattern_that_matches_a_container_means_its_layers(modifier):
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8))
    model = nn.ModuleDict({"mlp": mlp, "head": nn.Linear(8, 2)})
    ledger = compress(model, modifier, [torch.randn(8, 4)], forward=lambda model, x: model["mlp"](x))
    assert [row.module for row in ledger] == ["mlp.0"]


def test_classes_of_layers_may_be_listed_for_models_that_lack_them(recwarn):
    model = nn.Sequential(nn.Linear(2, 2))
    assert list(select(model, ["Linear", "Conv2d", "ConvTranspose1d"])) == ["0"]
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"targets=\['Conv4d'\] matches none"):
        select(model, ["Linear", "Conv4d"])


def test_what_a_long_list_of_classes_leaves_out_is_named_with_what_to_do():
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "volume": nn.Conv3d(2, 4, 3)})
    targets = ["Linear", "Conv1d", "Conv2d"]
    with pytest.warns(
        UserWarning, match="1 Conv3d .216.; no modifier compresses the weights of Conv3d; Structured"
    ) as log:
        warn_of_left_out(model, select(model, targets), targets)
    assert "StructuredPruningModifier(dimension='channels') makes Conv3d narrower; to leave" in str(log[0].message)
