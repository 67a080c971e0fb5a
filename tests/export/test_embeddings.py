"""Exported embeddings, read by plain transformers: alone, beside other schemes, shared, called in odd ways."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from lightning_compress import GPTQModifier, QuantizationModifier, compress, load, save
from lightning_compress.quant.record import Quantized
from tests.support.architecture_models import ARCHITECTURES
from tests.support.plain_reader import read_by_transformers

INT4 = {"num_bits": 4, "group_size": 16}
INT8 = {"num_bits": 8, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
TOKENS = {"num_bits": 8, "dynamic": True, "strategy": "token"}


def groups(table, linear=None, inputs=None):
    found = {"e": {"targets": ["Embedding"], "weights": table}}
    if linear is not None:
        found["l"] = {"targets": ["Linear"], "weights": linear, "input_activations": inputs}
    return {"config_groups": found}


ALONE = {"targets": ["Embedding", "Linear"], "scheme": "W4A16", "group_size": 16}
RECIPES = {
    "llama.alone": groups(INT4),
    "llama.asymmetric": groups(INT4 | {"symmetric": False}),
    "llama.with the layers": ALONE,
    "llama.beside": groups(INT4, INT8),
    "llama.beside, asymmetric": groups(INT4 | {"symmetric": False}, INT8),
    "llama.beside activations": groups(INT8, INT8, TOKENS),
    "llama.fp8 beside activations": groups(FP8, INT8, TOKENS),
    "llama.nvfp4 beside": {"config_groups": {"NVFP4A16": ["Embedding"], "l": {"targets": ["Linear"], "weights": INT8}}},
    "gemma2.beside": groups(INT4, INT8),
    "gpt2.beside": groups(INT8, INT4),
    "bert.beside": groups(INT4, INT8),
    "opt.beside activations": groups(INT8, INT8, TOKENS) | {"ignore": ["re:.*fc[12]$"]},  # those get rows
    "t5.with the layers": ALONE | {"ignore": ["re:.*relative_attention_bias"]},
}
DENSE = {
    "llama.nvfp4 beside": {"model.embed_tokens"},
    "opt.beside activations": {"model.decoder.embed_positions"},
    "t5.with the layers": {"shared", "encoder.embed_tokens", "decoder.embed_tokens"},
}

pytestmark = pytest.mark.filterwarnings("ignore:.*written with dense weights", "ignore:.*is walked as a whole")


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By case: logits of the model in memory, of the dense model, of lightning_compress.load, of the reader."""
    root, in_memory, dense, restored, classes = tmp_path_factory.mktemp("embeddings"), {}, {}, {}, {}
    for case, recipe in RECIPES.items():
        architecture = ARCHITECTURES[case.split(".")[0]]
        architecture = replace(architecture, sizes=architecture.sizes | {"tie_word_embeddings": False})
        model, batches = architecture.build(), architecture.batches(2)
        head = model.get_output_embeddings()
        if model.get_input_embeddings().weight is head.weight:  # T5 ties whatever it is told
            head.weight = nn.Parameter(head.weight.detach().flip(0))
            model.config.tie_word_embeddings = False
        dense[case] = logits(model, batches[0])
        compress(model, GPTQModifier(**recipe), batches)
        in_memory[case] = logits(model, batches[0])
        again = load(save(model, root / case), packed=False)
        assert Quantized.find(again).keys() == Quantized.find(model).keys()
        restored[case] = logits(again, batches[0])
        save_file(batches[0], root / f"{case}.batch")
        classes[case] = architecture.model
    return root, in_memory, dense, restored, read_by_transformers(root, classes)


@pytest.mark.parametrize("case", RECIPES)
def test_all_readers_give_the_logits_of_the_model_in_memory(runs, case):
    _, in_memory, dense, restored, read = (run if isinstance(run, type(runs[0])) else run[case] for run in runs)
    assert (in_memory - dense).norm() > 1e-3 * dense.norm()
    assert_close(read, in_memory, rtol=0, atol=1e-5)
    assert_close(restored, in_memory, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", RECIPES)
def test_embeddings_get_smaller_on_disk_but_for_those_that_are_named(runs, case):
    stored = load_file(runs[0] / case / "model.safetensors")
    tables = {name.rpartition(".")[0] for name in stored if "embed" in name or "shared" in name or ".wte." in name}
    tables = {name for name in tables if not name.endswith(("norm", "LayerNorm"))}
    assert tables
    for name in tables:
        weight = stored.get(f"{name}.weight")
        is_dense = weight is not None and weight.dtype == torch.float32
        assert is_dense == (name in DENSE.get(case, ())), name


def test_a_table_that_stays_dense_is_named_with_the_reason(tmp_path):
    model = ARCHITECTURES["llama"].build()
    compress(model, QuantizationModifier(**RECIPES["llama.nvfp4 beside"]), None)
    with pytest.warns(UserWarning, match=r"model.embed_tokens \(beside other schemes transformers cannot load it"):
        save(model, tmp_path / "nvfp4")
    model = ARCHITECTURES["opt"].build()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    compress(model, QuantizationModifier(**RECIPES["opt.beside activations"]), None)
    with pytest.warns(UserWarning, match=r"embed_positions \(transformers cannot call a packed OPTLearnedPositional"):
        save(model, tmp_path / "opt")


def test_plain_modules_come_back_with_their_tables(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(24, 16), nn.Flatten(), nn.Linear(96, 8))

    model, tokens = build(), torch.randint(24, (4, 6))
    compress(model, QuantizationModifier(**groups(INT4, INT8, TOKENS)), None)
    again = load(save(model, tmp_path / "plain"), build(), packed=False)
    assert torch.equal(again(tokens), model.eval()(tokens))
    assert "0.weight_packed" in load_file(tmp_path / "plain" / "model.safetensors")
    bag = nn.Sequential(nn.EmbeddingBag(24, 16))
    compress(bag, QuantizationModifier(targets=["EmbeddingBag"], scheme="W4A16", group_size=16), None)
    with pytest.warns(UserWarning, match="no loader reads a packed EmbeddingBag"):
        save(bag, tmp_path / "bag")
    restored = load(tmp_path / "bag", nn.Sequential(nn.EmbeddingBag(24, 16)), packed=False)
    assert torch.equal(restored(tokens), bag.eval()(tokens))
    assert list(Quantized.find(restored)) == ["0"]
