"""Files of GGUF: tensors equal those of the model bit for bit, for the reader of gguf and for transformers."""

import json
import warnings

import pytest
import torch
from gguf import GGUFReader, quants
from torch.testing import assert_close
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from lightning_compress import GPTQModifier, QuantizationModifier, compress, load, save
from lightning_compress.export.gguf.write import FILE, write_gguf

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def name_of(on_disk):
    parts = on_disk.split(".")
    if parts[0] != "blk":
        return f"{OUTSIDE[parts[0]]}.{parts[1]}"
    return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"


def in_order_of_llama_cpp(name, weight):
    """Written out: row 2 i + h of a head is row i + h D / 2 of transformers, D = 16."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return weight
    heads = len(weight) // 16
    return weight[[16 * head + half * 8 + i for head in range(heads) for i in range(8) for half in range(2)]]


def tensors_of(folder):
    reader = GGUFReader(folder / FILE)
    return {
        t.name: (t.tensor_type.name, torch.tensor(quants.dequantize(t.data, t.tensor_type))) for t in reader.tensors
    }


def check(folder, model, moved):
    tensors, state = tensors_of(folder), model.state_dict()
    names = {name_of(name): value for name, value in tensors.items()}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert names.keys() == state.keys() - tied
    for name, (_, values) in names.items():
        expected = in_order_of_llama_cpp(name, state[name]) if moved else state[name]
        assert torch.equal(values.to(expected.dtype), expected), name
    return {name: type_ for name, (type_, _) in names.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("scheme", "group", "type_"), [("W4A16", 32, "Q4_0"), ("W8A16", 32, "Q8_0"), ("W4A16", -1, "Q4_0")], ids=str
)
def test_tensors_are_those_of_the_model_bit_for_bit(tmp_path, decoder, kind, scheme, group, type_):
    model = decoder(kind, tie_word_embeddings=kind == "qwen3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compress(model, QuantizationModifier(scheme=scheme, group_size=group, ignore=["lm_head"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = write_gguf(model, tmp_path / "out")
    types = check(folder, model, moved=kind == "llama")
    assert {types[f"model.layers.1.{name}.weight"] for name in NAMES.values() if name.endswith("_proj")} == {type_}
    assert types["model.embed_tokens.weight"] == "BF16"
    assert types["model.norm.weight"] == "F32"
    assert before.keys() == model.state_dict().keys()


def test_save_writes_the_same_file(tmp_path, decoder):
    model = decoder()
    folder = save(model, tmp_path / "saved", format="gguf", recipe={"modifiers": {}})
    write_gguf(model, tmp_path / "written")
    assert (folder / FILE).read_bytes() == (tmp_path / "written" / FILE).read_bytes()
    assert (folder / "recipe.yaml").read_text() == "modifiers: {}\n"
    with pytest.raises(ValueError, match="verify=True lets plain transformers load the folder, which has no"):
        save(model, tmp_path / "more", format="gguf", verify=True)
    with pytest.raises(ValueError, match="format='pt' is not a format; expected compressed_tensors or onnx or gguf"):
        save(model, tmp_path / "more", format="pt")


def test_biases_are_moved_with_their_rows(tmp_path, decoder):
    model = decoder(attention_bias=True)
    check(write_gguf(model, tmp_path / "out"), model, moved=True)


@pytest.mark.parametrize(("scheme", "group"), [("W4A16", 32), ("W8A16", 32)])
def test_the_reader_of_transformers_gets_the_same_tensors(tmp_path, decoder, scheme, group):
    ids = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))
    model = decoder()
    compress(model, GPTQModifier(scheme=scheme, group_size=group, ignore=["lm_head"]), [ids])
    folder = write_gguf(model, tmp_path / "out")
    again = load_gguf_checkpoint(folder / FILE, return_tensors=True, model_to_load=model)
    assert again["config"]["num_key_value_heads"] == 2
    state = model.state_dict()
    assert again["tensors"].keys() == state.keys()
    for name, tensor in again["tensors"].items():
        assert torch.equal(tensor.to(torch.bfloat16), state[name]), name


def test_a_packed_model_gives_the_same_file(tmp_path, decoder):
    model = decoder()
    compress(model, QuantizationModifier(scheme="W4A16", group_size=32, ignore=["lm_head"]))
    save(model, tmp_path / "folder")
    write_gguf(model, tmp_path / "dense")
    write_gguf(load(tmp_path / "folder", packed=True), tmp_path / "packed")
    assert (tmp_path / "dense" / FILE).read_bytes() == (tmp_path / "packed" / FILE).read_bytes()


def test_rounded_scales_are_counted(tmp_path, decoder):
    model = decoder(dtype=torch.float32)
    compress(model, QuantizationModifier(scheme="W4A16", group_size=32, ignore=["lm_head"]))
    with pytest.warns(UserWarning, match=r"scales do not fit into float16 exactly, .* by up to 0.04\d %; scales"):
        folder = write_gguf(model, tmp_path / "out")
    for name, (_, values) in tensors_of(folder).items():
        expected = in_order_of_llama_cpp(name_of(name), model.state_dict()[name_of(name)])
        assert_close(values, expected, rtol=2**-11, atol=0)


def test_what_the_blocks_cannot_hold_is_dense_and_named(tmp_path, decoder):
    model = decoder()
    args = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    groups = {"w": {"targets": ["re:.*q_proj"], "weights": args}}
    compress(model, QuantizationModifier(config_groups=groups))
    with pytest.warns(UserWarning, match=r"2 quantized modules are in model.gguf with dense weights, on their grid"):
        folder = write_gguf(model, tmp_path / "out")
    assert check(folder, model, moved=True)["model.layers.0.self_attn.q_proj.weight"] == "BF16"


def test_metadata(tmp_path, decoder):
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    folder = write_gguf(decoder(rope_parameters=rope), tmp_path / "out", recipe_yaml="a: 1\n")
    fields = {name: field.contents() for name, field in GGUFReader(folder / FILE).fields.items()}
    expected = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 128,
        "llama.embedding_length": 64, "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0,
        "llama.vocab_size": 96, "general.file_type": 32, "general.quantization_version": 2,
        "tokenizer.ggml.model": "none",
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    manifest = json.loads((folder / "export_manifest.json").read_text())
    assert manifest["files"] == [FILE, "recipe.yaml"]


def test_what_runs_beside_the_weights_is_refused_and_nothing_is_left(tmp_path, decoder):
    model = decoder()
    compress(model, QuantizationModifier(scheme="W8A8", ignore=["lm_head"]))
    with pytest.raises(ValueError, match="run with quantized inputs, which GGUF does not hold: compress weights alone"):
        write_gguf(model, tmp_path / "out")
    model = decoder()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="llama.cpp's llama has no tensor for 'extra.weight'"):
        write_gguf(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, decoder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'lightning-compress\[gguf\]'"):
        write_gguf(decoder(), tmp_path / "out")
