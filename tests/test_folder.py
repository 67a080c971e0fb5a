"""From folder to folder, one block in memory at a time: the tensors and files of a run in memory."""

import subprocess
import sys
from collections import Counter

import pytest
import tokenizers
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_compress import GPTQModifier, QuantizationModifier, compress, compress_folder, load, save
from lightning_compress.calibration.activations import SegmentInputs
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.export.stream import ShardWriter
from lightning_compress.export.tensor_file import TensorFolder
from lightning_compress.files.atomic_folder import MANIFEST
from lightning_compress.oneshot import modifiers_of
from lightning_compress.recipe import dump_recipe

LAYERS, HIDDEN, TOKENS = 3, 128, 24
BATCHES = [
    {"input_ids": torch.randint(0, 64, (2, TOKENS), generator=torch.Generator().manual_seed(i))} for i in range(3)
]


def write_llama(folder, dtype=torch.float32, tied=False):
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_llama(tmp_path_factory.mktemp("dense") / "model")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    return folder


def check_equal(target, expected):
    """All tensors, and all files that hold no tensors."""
    ours, theirs = TensorFolder(target), TensorFolder(expected)
    assert ours.files.keys() == theirs.files.keys()
    for name in ours.files:
        one, two = ours.read(name), theirs.read(name)
        assert one.dtype == two.dtype
        assert torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8)), name

    def texts(folder):
        paths = (p for p in folder.iterdir() if ".safetensors" not in p.name and p.name != MANIFEST)
        return {path.name: path.read_bytes() for path in paths}

    assert texts(target) == texts(expected)


def in_memory(source, target, recipe, batches, **options):
    model = AutoModelForCausalLM.from_pretrained(source)
    ledger = compress(model, recipe, batches, **options)
    tokenizer = AutoTokenizer.from_pretrained(source) if (source / "tokenizer_config.json").exists() else None
    save(model, target, tokenizer=tokenizer, recipe=dump_recipe(modifiers_of(recipe)))
    return ledger


def rows_of(ledger):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in ledger.state_dict()]


NVFP4 = [QuantizationModifier, {"scheme": "NVFP4A16", "ignore": ["lm_head"]}]
EMBEDDINGS = [QuantizationModifier, {"scheme": "W8A16", "targets": ["Linear", "Embedding"]}]
HEAD = [GPTQModifier, {"scheme": "W4A16"}]


@pytest.mark.parametrize(
    ("recipe", "has_data"),
    [
        pytest.param("rtn_w4", False, id="rtn"),
        pytest.param("gptq_w4", True, id="gptq"),
        pytest.param("smoothquant", True, id="smoothquant", marks=pytest.mark.slow),
        pytest.param("kv_fp8", True, id="kv", marks=pytest.mark.slow),
        pytest.param(NVFP4, False, id="nvfp4"),
        pytest.param(EMBEDDINGS, False, id="embeddings"),
        pytest.param(HEAD, True, id="head"),
    ],
)
def test_tensors_and_files_are_those_of_a_run_in_memory(tmp_path, source, recipe, has_data):
    def build():
        return recipe if isinstance(recipe, str) else recipe[0](**recipe[1])

    batches = BATCHES if has_data else None
    ledger = compress_folder(source, tmp_path / "out", build(), batches)
    expected = in_memory(source, tmp_path / "memory", build(), batches)
    check_equal(tmp_path / "out", tmp_path / "memory")
    assert rows_of(ledger) == rows_of(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tied_embeddings_are_written_once(tmp_path, dtype):
    source = write_llama(tmp_path / "dense", dtype, tied=True)
    compress_folder(source, tmp_path / "out", "gptq_w4", BATCHES)
    in_memory(source, tmp_path / "memory", "gptq_w4", BATCHES)
    check_equal(tmp_path / "out", tmp_path / "memory")
    assert "lm_head.weight" not in TensorFolder(tmp_path / "out").files


@pytest.mark.parametrize(("recipe", "times"), [("rtn_w4", 1), ("gptq_w4", 2)])
def test_one_block_is_in_memory_and_each_is_read_at_most_twice(tmp_path, source, monkeypatch, recipe, times):
    reads, blocks = Counter(), set()
    read, build = TensorFolder.read, LlamaForCausalLM.__init__
    models = []

    def count(self, name):
        reads[name] += self.files[name].path.parent == source
        layers = models[-1].model.layers
        blocks.add(sum(any(not p.is_meta for p in layer.parameters()) for layer in layers))
        return read(self, name)

    def note(self, *args, **kwargs):
        models.append(self)
        build(self, *args, **kwargs)

    monkeypatch.setattr(TensorFolder, "read", count)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", note)
    compress_folder(source, tmp_path / "out", recipe, BATCHES if times == 2 else None)
    assert blocks == {0, 1}
    assert {reads[name] for name in reads if ".layers." in name} == {times}
    assert {reads[name] for name in reads if ".layers." not in name} == {1}


def test_the_export_loads(tmp_path, source):
    compress_folder(source, tmp_path / "out", "gptq_w4", BATCHES)
    model = AutoModelForCausalLM.from_pretrained(source)
    compress(model, "gptq_w4", BATCHES)
    with torch.no_grad():
        expected = model(**BATCHES[0]).logits
        torch.testing.assert_close(load(tmp_path / "out", packed=False)(**BATCHES[0]).logits, expected)
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")(**BATCHES[0]).logits, expected
        )


def test_hidden_states_on_the_disk_are_beside_the_target(tmp_path, source, monkeypatch):
    folders, kept = [], SegmentInputs.kept
    note = classmethod(lambda cls, device, folder: folders.append(folder) or kept(device, folder))
    monkeypatch.setattr(SegmentInputs, "kept", note)
    options = CalibrationOptions(walk="two_pass", cache_activations="disk")
    compress_folder(source, tmp_path / "new" / "out", "gptq_w4", BATCHES, options=options)
    assert folders == [tmp_path / "new"]
    in_memory(source, tmp_path / "memory", "gptq_w4", BATCHES, walk="two_pass")
    check_equal(tmp_path / "new" / "out", tmp_path / "memory")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(source, tmp_path, message, recipe="rtn_w4", batches=None, **options):
    with pytest.raises(ValueError, match=message):
        compress_folder(source, tmp_path / "refused", recipe, batches, **options)
    assert not (tmp_path / "refused").exists()
    return list(tmp_path.glob(".refused*"))


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("rotate", "RotationModifier acts on the whole model at once"),
        ("prune_2of4", "MagnitudePruningModifier acts during training"),
        ("tune", "TuneModifier looks at the whole dense model before the first block"),
        ("reap_25", "REAPModifier acts on the whole model at once"),
    ],
)
def test_modifiers_of_the_whole_model_are_refused(tmp_path, source, recipe, reason):
    assert not refused(
        source, tmp_path, f"{reason}, so that it cannot work on one block after another; leave it out", recipe
    )


def test_a_recipe_that_needs_data_says_so(tmp_path, source):
    refused(source, tmp_path, "GPTQModifier needs calibration data and there are no batches", "gptq_w4")


def test_other_folders_are_refused(tmp_path, source):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "has no model.safetensors; expected the safetensors files of a model")
    compress_folder(source, tmp_path / "out", "rtn_w4")
    refused(tmp_path / "out", tmp_path, "is quantized already: start from the folder of the dense model")
    with pytest.raises(ValueError, match="exists and is not empty"):
        compress_folder(source, tmp_path / "out", "rtn_w4")


def test_fused_experts_are_refused(tmp_path):
    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    refused(tmp_path / "dense", tmp_path, "holds all its experts in one tensor; compress the model in memory")


def test_blocks_that_are_not_a_chain_are_refused(tmp_path):
    config = T5Config(
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        vocab_size=64,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    batches = [batch | {"decoder_input_ids": batch["input_ids"][:, :4]} for batch in BATCHES]
    recipe = GPTQModifier(scheme="W8A16", group_size=32, ignore=["lm_head"])
    assert not refused(tmp_path / "dense", tmp_path, "not one chain of 4 blocks", recipe, batches)


def test_a_block_that_does_not_fit_is_refused_with_what_it_takes(tmp_path, source):
    message = "memory=0 MB, and a block takes about 1 MB: 1 MB for its weights, 0 MB for the modules outside"
    refused(source, tmp_path, message, memory="300kB")


def test_what_a_block_leaves_of_the_memory_chooses_the_walk(tmp_path, source, caplog):
    with caplog.at_level("INFO", logger="lightning_compress"):
        compress_folder(source, tmp_path / "little", "gptq_w4", BATCHES, memory=1_400_000)
        assert "two passes over 3 blocks: one pass takes about" in caplog.text
        caplog.clear()
        compress_folder(source, tmp_path / "much", "gptq_w4", BATCHES, memory="1GB")
        assert "one pass over 3 blocks" in caplog.text


def test_a_missing_tensor_is_named(tmp_path, source):
    model = AutoModelForCausalLM.from_pretrained(source)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "dense", state_dict=state)
    refused(tmp_path / "dense", tmp_path, r"other names or parts in its files \('model.layers.1.mlp.up_proj.weight' is")


def test_a_block_of_nan_is_named(tmp_path, source):
    model = AutoModelForCausalLM.from_pretrained(source)
    nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, torch.nan)
    model.save_pretrained(tmp_path / "dense")
    refused(tmp_path / "dense", tmp_path, r"NaN or Inf in the weights \['model.layers.1.mlp.up_proj.weight'\]")


# -- after a kill -----------------------------------------------------------------------------------------------------


def killed_at(number, monkeypatch, *args, **options):
    """Run until a shard is to be written, and stop there; nothing is cleaned up that a kill would leave."""

    def write(self, n, *args, **kwargs):
        if n == number:
            raise KeyboardInterrupt
        return real(self, n, *args, **kwargs)

    real = ShardWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            compress_folder(*args, **options)


@pytest.mark.parametrize("number", [2, LAYERS + 1])
@pytest.mark.parametrize(("recipe", "times"), [("rtn_w4", 1), ("gptq_w4", 2)])
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, source, monkeypatch, recipe, times, number):
    batches = BATCHES if times == 2 else None
    killed_at(number, monkeypatch, source, tmp_path / "out", recipe, batches)
    assert not (tmp_path / "out").exists()
    written = Counter()
    real = ShardWriter.write

    def count(self, n, *args, **kwargs):
        written[n] += 1
        return real(self, n, *args, **kwargs)

    monkeypatch.setattr(ShardWriter, "write", count)
    ledger = compress_folder(source, tmp_path / "out", recipe, batches, resume="must")
    assert written == dict.fromkeys(range(number, LAYERS + 2), 1)
    assert rows_of(ledger) == rows_of(in_memory(source, tmp_path / "memory", recipe, batches))
    check_equal(tmp_path / "out", tmp_path / "memory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "out"]


def test_another_recipe_model_or_data_is_refused_with_the_difference(tmp_path, source, monkeypatch):
    killed_at(2, monkeypatch, source, tmp_path / "out", "gptq_w4", BATCHES)

    def told(source=source, recipe="gptq_w4", batches=BATCHES):
        with pytest.raises(ValueError, match="belong to another run: .*; resume='never' begins anew") as error:
            compress_folder(source, tmp_path / "out", recipe, batches)
        return str(error.value)

    assert "the recipe: " in told(recipe="rtn_w4", batches=None)
    assert "the data: 3 calibration batches, now 2" in told(batches=BATCHES[:2])
    assert "the model: " in told(source=write_llama(tmp_path / "other"))
    compress_folder(source, tmp_path / "out", "rtn_w4", resume="never")
    in_memory(source, tmp_path / "memory", "rtn_w4", None)
    check_equal(tmp_path / "out", tmp_path / "memory")


def test_there_must_be_something_to_go_on_with(tmp_path, source):
    with pytest.raises(ValueError, match="resume='must', and .*holds no run to go on with"):
        compress_folder(source, tmp_path / "out", "rtn_w4", resume="must")
    assert not list(tmp_path.iterdir())


def test_a_second_run_is_told_who_writes(tmp_path, source):
    code = (
        "import sys; from pathlib import Path; from lightning_compress.resume.holder import Holder; "
        "h = Holder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".out.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"is in use by process {other.pid} on "):
            compress_folder(source, tmp_path / "out", "rtn_w4")
        other.communicate("")
    compress_folder(source, tmp_path / "out", "rtn_w4")
