"""A teacher is found wherever it may come from, frozen; what cannot be a teacher is refused with what to do."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import nn

from lightning_compress.modifiers.distillation.teacher_source import build_teacher
from tests.support.training_loop import network
from tests.support.training_runs import Regression, Sums, quiet

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def config(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return transformers.LlamaConfig(**{**sizes, "num_hidden_layers": 1, **changes})


@pytest.mark.parametrize("prefix", ["", "model.", "model._orig_mod.", "net.backbone."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_are_found_under_any_prefix(tmp_path, prefix, suffix):
    weights = {f"{prefix}{key}": value for key, value in network(4).state_dict().items()}
    weights["loss.weight"] = torch.ones(3)
    path = tmp_path / f"teacher{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    assert torch.equal(build_teacher(str(path), network())(X), network(4)(X))


def test_a_checkpoint_of_lightning(tmp_path):
    torch.manual_seed(3)
    module = Regression()
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(module, Sums())
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    teacher = build_teacher(tmp_path / "teacher.ckpt", Regression().model)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), module.model.parameters(), strict=True))


def test_tied_weights_need_to_be_there_once(tmp_path):
    save_file({"embed.weight": Tied(5).embed.weight.detach()}, tmp_path / "t.safetensors")
    ids = torch.arange(6)[None]
    assert torch.equal(build_teacher(str(tmp_path / "t.safetensors"), Tied())(ids), Tied(5)(ids))


def test_a_hugging_face_folder_of_another_size_and_class(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    student = transformers.LlamaForCausalLM(config())
    wide = transformers.LlamaForCausalLM(config(hidden_size=32, num_hidden_layers=3))
    wide.save_pretrained(tmp_path / "wide")
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    other.save_pretrained(tmp_path / "gpt2")
    ids = torch.arange(8)[None]
    for folder, original in (("wide", wide), ("gpt2", other)):
        teacher = build_teacher(str(tmp_path / folder), student)
        assert type(teacher) is type(original)
        with torch.no_grad():
            torch.testing.assert_close(teacher(ids).logits, original.eval()(ids).logits)


def test_files_that_are_not_a_teacher_are_refused(tmp_path):
    def refuse(name, message):
        with pytest.raises(ValueError, match=message):
            build_teacher(str(tmp_path / name), network())

    refuse("nowhere.ckpt", "no such file or folder; 'self' distils from the model itself")
    torch.save({"state_dict": network()}, tmp_path / "pickle.ckpt")
    refuse(
        "pickle.ckpt",
        "is damaged, or holds objects, which can run code and are not read.*of your own runs.*state_dict'",
    )
    torch.save([1, 2], tmp_path / "list.pt")
    refuse("list.pt", "holds a list, expected a state_dict or a Lightning checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x80\x00\x00\x00\x00\x00\x00\x00{}")
    refuse("cut.safetensors", "is not a complete safetensors file")
    save_file({"0.weight": torch.zeros(32, 16)}, tmp_path / "part.safetensors")
    refuse("part.safetensors", r"lacks 3 tensors of the model or .*: \['0.bias'.* of another size as a folder")
    (tmp_path / "folder").mkdir()
    refuse("folder", "Sequential has no from_pretrained: expected a Hugging Face folder")
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    refuse("folder", "NoSuchModel has no from_pretrained")


class Evil:
    def __reduce__(self):
        import os

        return os.mkdir, ("owned",)


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": network().state_dict(), "extra": Evil()}, "evil.ckpt")
    with pytest.raises(ValueError, match="is damaged, or holds objects, which can run code and are not read"):
        build_teacher("evil.ckpt", network())
    assert not (tmp_path / "owned").exists()


def test_a_lightning_module_as_the_model_is_copied_without_its_trainer(tmp_path):
    class Whole(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x):
            return self.layer(x)

    module = Whole()
    module.trainer = quiet(tmp_path)
    teacher = build_teacher("self", module)
    assert teacher._trainer is None
    assert torch.equal(teacher(X), module(X))


def test_a_folder_of_pickled_objects_is_refused_without_torchs_advice(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.LlamaForCausalLM(config()).config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    torch.save({"model.norm.weight": nn.Linear(1, 1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is damaged, or holds objects") as caught:
        build_teacher(str(tmp_path), transformers.LlamaForCausalLM(config()))
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "config.json is not the config of a model: AttributeError"),
        ('{"archi', "config.json is not the config of a model: JSONDecodeError"),
        ('{"architectures": 3}', "config.json is not the config of a model: TypeError"),
        ('{"architectures": [3]}', "names 3 in architectures, expected the name of a class"),
    ],
    ids=["list", "half", "number", "names"],
)
def test_a_damaged_config_of_a_teacher_is_named(tmp_path, text, told):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        build_teacher(str(tmp_path), nn.Linear(2, 2))


def test_a_damaged_folder_of_a_teacher_is_named(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.LlamaForCausalLM(config()).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"teacher='.*' cannot be loaded: Safetensor"):
        build_teacher(str(tmp_path), transformers.LlamaForCausalLM(config()))
