"""Models of transformers: their configs are not changed by saving, and are checked before loading."""

import copy
import json
from pathlib import Path

import pytest
import torch

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from tests.support.export_models import assert_same_records
from tests.support.multimodal_models import llava


def test_a_hugging_face_config_does_not_change(tmp_path, tiny_llama, quantize, scheme_of):
    model = quantize(tiny_llama(), scheme_of("W4A16"))
    before = copy.deepcopy(model.config.to_dict())
    save(model, tmp_path / "out")
    assert model.config.to_dict() == before


def test_a_model_of_several_parts(tmp_path, quantize, scheme_of):
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision, text = {"image_size": 32, "patch_size": 16}, {"vocab_size": 64, "eos_token_id": 2, "bos_token_id": 1}
    model = quantize(CLIPModel(CLIPConfig(text_config=sizes | text, vision_config=sizes | vision)), scheme_of("W4A16"))
    save(model, tmp_path / "out")
    assert_same_records(model, load(tmp_path / "out", packed=False))


def test_tied_weights_as_a_list_are_refused_by_save(tmp_path, tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    model._tied_weights_keys = ["lm_head.weight"]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\._tied_weights_keys is a list, and transformers 5 saves"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers is 1000000000000, and the files beside it hold \d+ te"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, and the files"),
        ({"vocab_size": 10**12}, r"describes a model of [\d,]{15,} weights and .* hold [\d,]+; copy"),
        ({"num_hidden_layers": "two"}, "config.json: "),
        ({"hidden_act": "nothing"}, "config.json: KeyError: 'nothing'"),
        ({"architectures": ["OPTForCausalLM"]}, "'llama' does not belong to the architecture 'OPTForCausalLM'"),
        ({"quantization_config": []}, r"config.json: quantization_config must be an object, got \[\]"),
        ({"quantization_config": {"config_groups": 3}}, "config.json, quantization_config: "),
    ],
    ids=["layers", "labels", "vocabulary", "a word", "activation", "architecture", "a list", "groups"],
)
def test_load_of_a_config_that_does_not_fit(tmp_path, tiny_llama, quantize, scheme_of, settings, message):
    save(quantize(tiny_llama(), scheme_of("W4A16"), ["lm_head"]), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=rf"{path.parent}.*{message}"):
        load(path.parent)


@pytest.mark.parametrize("name", ["pipeline", "Trainer", "LlamaConfig", "MyOwnModel"])
def test_only_a_model_of_transformers_is_built(tmp_path, tiny_llama, quantize, scheme_of, name):
    save(quantize(tiny_llama(), scheme_of("W4A16")), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    with pytest.raises(ValueError, match=rf"transformers has no model '{name}'.*build the dense model and call load"):
        load(tmp_path / "out", packed=False)


def test_dummy_inputs_of_a_model_of_pictures_are_pictures():
    from transformers import ViTConfig, ViTModel

    from lightning_compress.export.hugging_face import dummy_inputs, example_of

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTModel(ViTConfig(**sizes, image_size=[8, 16], patch_size=4)).to(torch.bfloat16)
    (pixels,) = dummy_inputs(model).values()
    assert (pixels.shape, pixels.dtype) == ((1, 3, 8, 16), torch.bfloat16)
    assert model(**example_of(model)).last_hidden_state.shape == (1, 9, 16)


def test_the_processor_of_the_folder_that_a_multimodal_model_is_from(tmp_path, quantize, scheme_of):
    dense, copied = tmp_path / "dense", tmp_path / "out"
    llava().save_pretrained(dense)
    files = {
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.jinja",
        "chat_template.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "merges.txt", "spiece.model",
    }  # fmt: skip
    for name in [*files, "training_args.bin", "README.md", "optimizer.pt", "modeling_llava.py"]:
        (dense / name).write_text(f"{name} of the source")
    model = type(llava()).from_pretrained(dense)
    save(quantize(model, scheme_of("W4A16", group_size=64), ["re:model.(vision|multi)"]), copied)
    added = {path.name for path in copied.iterdir() if path.read_bytes().endswith(b"of the source")}
    assert added == files
    again = save(load(copied, packed=False), tmp_path / "again")
    assert {path.name: path.read_bytes() for path in copied.iterdir() if path.name in files} == {
        path.name: path.read_bytes() for path in again.iterdir() if path.name in files
    }


def test_a_processor_that_is_passed_takes_the_place_of_that_of_the_folder(tmp_path):
    class Processor:
        def save_pretrained(self, folder):
            (Path(folder) / "processor_config.json").write_text("passed")

    model = llava()
    model.name_or_path = str(tmp_path)
    (tmp_path / "processor_config.json").write_text("of the source")
    (tmp_path / "tokenizer.json").write_text("of the source")
    save(model, tmp_path / "out", tokenizer=Processor())
    assert (tmp_path / "out" / "processor_config.json").read_text() == "passed"
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("source", ["", "organisation/model", "tokenizer"], ids=["none", "hub", "without"])
def test_a_multimodal_model_without_a_processor_is_a_warning(tmp_path, source):
    model = llava()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    model.name_or_path = str(tmp_path / "tokenizer") if source == "tokenizer" else source
    with pytest.warns(UserWarning, match=r"has 'model.vision_tower', and no processor is saved .* pass tokenizer=Auto"):
        save(model, tmp_path / "out")
