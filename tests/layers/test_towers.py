"""Towers of multimodal models: which modules they are, and that targets reach them only where they name them."""

import pytest
from torch import nn

from lightning_compress.layers.matching import select_weights, warn_of_left_out
from lightning_compress.layers.towers import find_towers, tower_of
from tests.support.architecture_models import ARCHITECTURES
from tests.support.multimodal_models import MODELS, TOWERS, llava


@pytest.mark.parametrize("name", MODELS)
def test_everything_with_weights_is_a_tower_the_language_model_or_the_head(name):
    model = MODELS[name]()
    assert list(find_towers(model)) == TOWERS[name]
    rest = {id(p) for m in (model.get_decoder(), model.lm_head) for p in m.parameters()}
    inside = {id(p) for tower in find_towers(model).values() for p in tower.parameters()}
    assert not rest & inside
    assert rest | inside == {id(p) for p in model.parameters()}
    wrapped = nn.ModuleDict({"net": model})
    assert list(find_towers(wrapped)) == [f"net.{tower}" for tower in TOWERS[name]]
    assert list(find_towers(model.model)) == [tower.removeprefix("model.") for tower in TOWERS[name]]


@pytest.mark.parametrize("name", ["llama", "clip", "whisper", "vit"])
def test_models_without_a_language_model_beside_have_none(name):
    assert find_towers(ARCHITECTURES[name].build()) == {}


def test_a_tower_is_not_named_by_the_beginning_of_its_name():
    towers = ["model.visual"]
    assert tower_of("model.visual", towers) == tower_of("model.visual.blocks.0", towers) == "model.visual"
    assert tower_of("model.visual_head", towers) is tower_of("model", towers) is None


@pytest.mark.parametrize(
    ("targets", "inside", "outside"),
    [
        (["Linear"], 0, 15),
        (["Linear", "Conv2d", "re:.*_proj"], 0, 15),
        (["re:.*self_attn.*"], 0, 8),
        (["Linear", "model.vision_tower"], 12, 15),
        (["Linear", "Conv2d", "model.vision_tower", "model.multi_modal_projector"], 15, 15),
        (["re:.*self_attn.*", "model.vision_tower"], 8, 8),
        ([r"re:model\.vision_tower.*self_attn"], 8, 0),
        (["Linear", "model.multi_modal_projector.linear_1"], 1, 15),
        (["re:.*fc1"], 2, 0),
    ],
    ids=["class", "classes", "both", "tower", "towers", "pattern and tower", "only there", "name", "one"],
)
def test_targets_reach_towers_where_they_name_them(targets, inside, outside):
    model = llava()
    chosen = select_weights(model, targets)
    assert sum(tower_of(name, TOWERS["llava"]) is not None for name in chosen) == inside
    assert sum(tower_of(name, TOWERS["llava"]) is None for name in chosen) == outside


def test_classes_that_only_towers_have_are_refused():
    with pytest.raises(
        ValueError, match=r"\['Conv2d'\] matches .*patch_embedding', all in .*\['Conv2d', 'model.vision_t"
    ):
        select_weights(llava(), "Conv2d")
    with pytest.raises(ValueError, match=r"name towers alone: .* as in \['Linear', 'model.vision_tower'\]"):
        select_weights(llava(), "model.vision_tower")


def test_left_towers_are_named_with_the_pattern_that_includes_them(recwarn):
    model = llava()
    text = (
        r"'model.vision_tower' \([\d,]+ weights\), 'model.multi_modal_projector' \(8,320 weights\) of this LlavaForCo.*"
        r"as in targets=\['Linear', 'model.vision_tower', 'model.multi_modal_projector'\]; .*add \['re:model"
    )
    with pytest.warns(UserWarning, match=text):
        warn_of_left_out(model, select_weights(model, "Linear"), "Linear")
    recwarn.clear()
    ignore = [r"re:model\.(vision|multi)"]
    warn_of_left_out(model, select_weights(model, "Linear", ignore), "Linear", ignore)
    targets = ["Linear", *TOWERS["llava"]]
    warn_of_left_out(model, select_weights(model, targets), targets)
    assert not recwarn.list
