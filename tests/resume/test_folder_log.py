"""A calibration that is stopped at any group and goes on ends as the unbroken one; other logs are refused."""

import json
import warnings

import pytest
import torch
from torch import nn

from lightning_compress import compress
from lightning_compress.calibration.gradient_survey import Gradients
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.core import Modifier, Needs
from lightning_compress.layers.records import Record
from lightning_compress.modifiers.allocate.modifier import AllocateModifier
from lightning_compress.modifiers.autoround.modifier import AutoRoundModifier
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.kv_cache import KVCacheModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.modifiers.reap import REAPModifier
from lightning_compress.modifiers.rotation.modifier import RotationModifier
from lightning_compress.modifiers.smoothing.awq import AWQModifier
from lightning_compress.modifiers.smoothing.smoothquant import SmoothQuantModifier
from lightning_compress.modifiers.sparsegpt import SparseGPTModifier
from lightning_compress.modifiers.tune.modifier import TuneModifier
from lightning_compress.modifiers.wanda.modifier import WandaPruningModifier
from lightning_compress.resume.folder_log import FolderLog, remove

W4 = {"scheme": "W4A16", "group_size": 32, "ignore": ["lm_head"]}
STATIC = {"scheme": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}, "ignore": ["lm_head"]}
RECIPES = {
    "gptq": lambda: [GPTQModifier(**W4, keep_latents=True)],
    "gptq in two passes": lambda: [GPTQModifier(**W4 | {"ignore": []})],
    "data-free": lambda: [QuantizationModifier(scheme="FP8", ignore=["lm_head"])],
    "static": lambda: [QuantizationModifier(**STATIC, targets=["Linear"])],
    "awq": lambda: [AWQModifier(**W4, n_grid=3)],
    "awq by the loss": lambda: [AWQModifier(**W4, n_grid=3, objective="loss")],
    "smoothquant, gptq": lambda: [SmoothQuantModifier(ignore=["lm_head"]), GPTQModifier(**W4)],
    "owl": lambda: [SparseGPTModifier(sparsity_profile="owl", ignore=["lm_head"], sparsity=0.5)],
    "wanda, cache": lambda: [WandaPruningModifier(sparsity=0.5, ignore=["lm_head"]), KVCacheModifier(strategy="head")],
    "rotation, autoround": lambda: [RotationModifier(rotations=["R1"]), AutoRoundModifier(**W4, iters=3)],
    "sparsegpt by the loss": lambda: [SparseGPTModifier(objective="loss", ignore=["lm_head"], sparsity=0.5)],
    "owl by the loss": lambda: [
        SparseGPTModifier(sparsity_profile="owl", objective="loss", ignore=["lm_head"], sparsity=0.5)
    ],
    "gptq by the loss, targets of the dense model": lambda: [GPTQModifier(**W4, objective="loss", target="dense")],
    "gptq by the loss": lambda: [GPTQModifier(**W4, objective="loss")],
    "gptq by the loss, tune": lambda: [GPTQModifier(**W4, objective="loss"), TuneModifier(epochs=1)],
    "allocate, gptq": lambda: [
        AllocateModifier(bits=5.2, candidates=["W3A16", "W4A16", "W8A16"]),
        GPTQModifier(scheme="allocated", ignore=["lm_head"]),
    ],
    "allocate, gptq for dense targets, tune": lambda: [
        AllocateModifier(bits=5.2, candidates=["W3A16", "W4A16", "W8A16"]),
        GPTQModifier(scheme="allocated", ignore=["lm_head"], target="dense"),
        TuneModifier(epochs=1),
    ],
    "gptq, tune": lambda: [GPTQModifier(**W4), TuneModifier(epochs=1)],
    "reap": lambda: [REAPModifier(sparsity=0.5)],
}


class Killed(BaseException):
    """In place of a kill."""


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def mixture():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, num_attention_heads=4)).eval()


def ids(batches=3):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 64, (2, 32), generator=generator)} for _ in range(batches)]


def bits(value):
    return (
        str(value.dtype),
        list(value.shape),
        value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes(),
    )


def contents(model, ledger):
    """All bits of a model and its records, and the rows of the ledger without seconds."""
    tensors = {name: bits(value) for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        for record in [value for value in vars(module).values() if isinstance(value, Record)]:
            fields = vars(record).items()
            tensors |= {f"{name}.{k}": bits(v) if isinstance(v, torch.Tensor) else v for k, v in fields}
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in ledger.state_dict()]
    return tensors, rows


@pytest.fixture
def stopping(monkeypatch):
    """``stopping.at = n`` stops the next run after n groups were stored; ``stopping.stored`` lists their titles."""
    whole = FolderLog.store

    class Stopping:
        at = None
        stored: list = []

    def store(self, title, modules):
        whole(self, title, modules)
        Stopping.stored.append(title)
        if Stopping.at is not None and len(Stopping.stored) == Stopping.at:
            Stopping.at = None
            raise Killed

    monkeypatch.setattr(FolderLog, "store", store)
    Stopping.stored = []
    return Stopping


def run(recipe, folder, **arguments):
    model = mixture() if recipe == "reap" else llama()
    walk = "two_pass" if recipe == "gptq in two passes" else "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ledger = compress(model, RECIPES[recipe](), ids(), log=folder, walk=walk, **arguments)
    return contents(model, ledger)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_goes_on_is_equal_bit_for_bit(tmp_path, stopping, recipe):
    unbroken = run(recipe, tmp_path / "unbroken")
    titles = list(stopping.stored)
    for stop in range(1, len(titles)):
        stopping.stored.clear()
        stopping.at, folder = stop, tmp_path / str(stop)
        with pytest.raises(Killed):
            run(recipe, folder)
        assert run(recipe, folder, resume="must") == unbroken
        assert stopping.stored == titles  # no group twice


@pytest.mark.parametrize(
    ("recipe", "forwards"), [("gptq by the loss", 0), ("owl by the loss", 0), ("gptq by the loss, tune", 3)]
)
def test_a_survey_is_done_once(tmp_path, monkeypatch, recipe, forwards):
    """TuneModifier does not give its answers to the log: it surveys again, without a backward pass."""
    passes = {"forward": 0, "backward": 0}
    run_batch, store = Gradients.run, FolderLog.store_survey

    def counted(self, *args):
        passes["backward"] += 1
        run_batch(self, *args)

    def progress(text, *numbers):
        passes["forward"] += text.startswith("survey")

    def stop(self):
        store(self)
        raise Killed

    unbroken = run(recipe, tmp_path / "unbroken")
    monkeypatch.setattr(Gradients, "run", counted)
    monkeypatch.setattr(FolderLog, "store_survey", stop)
    with pytest.raises(Killed):
        run(recipe, tmp_path / "log", progress=progress)
    assert passes == {"forward": 3, "backward": 3}
    files = list(tmp_path.glob("log/.groups.partial/*.safetensors"))
    assert len(files) == 1
    tokens, groups = 3 * 64, 3 * 4 + 1  # of three blocks q k v, o, gate up, down; and the head
    assert files[0].stat().st_size < 4 * tokens * groups + 20_000
    monkeypatch.setattr(FolderLog, "store_survey", store)
    passes.update(forward=0, backward=0)
    assert run(recipe, tmp_path / "log", resume="must", progress=progress) == unbroken
    assert passes == {"forward": forwards, "backward": 0}


def test_the_weights_are_those_of_a_run_without_a_log(tmp_path):
    """But for the sign of zeros, which codes do not hold."""
    tensors, rows = run("smoothquant, gptq", tmp_path / "log")
    plain, plain_rows = run("smoothquant, gptq", None)
    assert rows == plain_rows
    assert tensors.keys() == plain.keys()
    for name in (name for name in plain if name.endswith("proj.weight")):
        one, other = (torch.frombuffer(bytearray(t[name][2]), dtype=torch.float32) for t in (tensors, plain))
        assert torch.equal(one, other)


def test_a_finished_log_gives_everything_again_without_a_solve(tmp_path, stopping):
    unbroken = run("gptq", tmp_path / "log")
    stopping.stored.clear()
    assert run("gptq", tmp_path / "log", resume="must") == unbroken
    assert stopping.stored == []
    assert run("gptq", tmp_path / "log", resume="never") == unbroken
    assert len(stopping.stored) == 5


def test_only_what_changed_is_stored(tmp_path):
    run("gptq", tmp_path / "log")
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("log/.groups.partial/*.safetensors"))]
    embeddings = 64 * 64 * 4
    assert sizes[0] < 100 > sizes[-1]  # embeddings, final norm and head
    assert all(size > embeddings for size in sizes[1:-1])


# -- damage -----------------------------------------------------------------------------------------------------------


def damaged(folder, how):
    path = sorted(folder.glob(".groups.partial/*.safetensors"))[2]
    content = bytearray(path.read_bytes())
    if how == "a flipped byte":
        content[-1] ^= 1
    path.write_bytes(content[:-100] if how == "a truncated shard" else content)
    if how == "a missing shard":
        path.unlink()


@pytest.mark.parametrize("how", ["a flipped byte", "a truncated shard", "a missing shard"])
def test_a_bad_shard_and_all_after_it_are_done_again(tmp_path, stopping, caplog, how):
    unbroken = run("gptq", tmp_path / "log")
    titles = list(stopping.stored)
    damaged(tmp_path / "log", how)
    stopping.stored.clear()
    assert run("gptq", tmp_path / "log") == unbroken
    assert stopping.stored == titles[2:]
    assert "shard 3 and those after it are done again" in caplog.text


def test_a_shard_of_another_group_is_done_again(tmp_path, stopping):
    unbroken = run("gptq", tmp_path / "log")
    entry = tmp_path / "log/.groups.partial/log/00002.json"
    content = json.loads(entry.read_text())
    content["facts"]["title"] = "another"
    entry.write_text(json.dumps(content))
    stopping.stored.clear()
    model = llama()
    with pytest.warns(UserWarning, match="shard 2 of .* is damaged, or not that of model.layers.0: it and"):
        ledger = compress(model, RECIPES["gptq"](), ids(), log=tmp_path / "log")
    assert contents(model, ledger) == unbroken
    assert len(stopping.stored) == 4


def test_a_plan_that_cannot_be_read_is_refused(tmp_path):
    run("gptq", tmp_path / "log")
    (tmp_path / "log/.groups.partial/log/plan.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read: .*; resume='never' begins anew"):
        run("gptq", tmp_path / "log")


# -- another calibration ----------------------------------------------------------------------------------------------


def test_another_recipe_model_data_or_walk_is_refused_with_the_difference(tmp_path):
    folder = tmp_path / "log"
    recipe = RECIPES["gptq"]
    compress(llama(), recipe(), ids(), log=folder)
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1

    def refused(message, model=None, modifiers=None, batches=None, **arguments):
        with pytest.raises(ValueError, match=message):
            compress(model or llama(), modifiers or recipe(), batches or ids(), log=folder, **arguments)

    before = sorted(path.name for path in folder.rglob("*"))
    again = "belongs to another calibration: the "
    refused(again + "recipe: modifiers.GPTQModifier.dampening_frac: 0.01 -> 0.1; resume='never' begins anew",
            modifiers=[GPTQModifier(**W4, keep_latents=True, dampening_frac=0.1)])  # fmt: skip
    refused(again + r"model: 1 entries, such as model.layers.1.mlp.up_proj.weight \(float32 \[96, 64\] sha256", other)
    refused(again + "data: 3 calibration batches, now 2", batches=ids(2))
    changed = ids()
    changed[1]["input_ids"][0, 0] ^= 1
    refused(again + "data: 1 of 3 calibration batches, the first one is number 1", batches=changed)
    refused(again + "walk: walk: 'auto' -> 'two_pass'", walk="two_pass")
    refused("resume='maybe': expected 'auto', 'never', 'must'", resume="maybe")
    assert sorted(path.name for path in folder.rglob("*")) == before
    compress(other, recipe(), ids(), log=folder, resume="never")


def test_must_needs_a_log(tmp_path):
    with pytest.raises(ValueError, match=f"resume='must', and {tmp_path}/log holds no log"):
        compress(llama(), RECIPES["gptq"](), ids(), log=tmp_path / "log", resume="must")
    with pytest.raises(ValueError, match="resume='must' needs a log that the calibration goes on from"):
        compress(llama(), RECIPES["gptq"](), ids(), resume="must")


def test_a_log_that_may_be_replaced_warns_and_begins_anew(tmp_path):
    from lightning_compress.core import Ledger, Lifecycle, State

    def begun(recipe):
        log, lifecycle, state = FolderLog(tmp_path, replaces=True), Lifecycle(recipe), State(llama(), ledger=Ledger())
        log.begin(lifecycle, state, ids(), {}, CalibrationOptions())
        log.close()

    begun(RECIPES["gptq"]())
    with pytest.warns(UserWarning, match="is not used, as it differs in the recipe"):
        begun(RECIPES["awq"]())
    begun(RECIPES["awq"]())
    remove(tmp_path)
    assert not tmp_path.exists()


def test_a_modifier_that_cannot_go_on_is_named(tmp_path):
    class OwnModifier(Modifier):
        needs = Needs(data=True)

        def on_initialize(self, state, **kwargs):
            return True

    with pytest.raises(ValueError, match="OwnModifier cannot go on after a kill, as the class has no group_state"):
        compress(nn.Linear(4, 4), OwnModifier(), [torch.ones(1, 4)], log=tmp_path / "log")
    assert not (tmp_path / "log").exists()


# -- disks ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_and_the_next_goes_on(tmp_path, stopping, monkeypatch):
    import lightning_compress.export.stream as stream

    unbroken = run("gptq", tmp_path / "unbroken")
    titles, write_file = list(stopping.stored), stream.write_file

    def full(tensors, path):
        if "00003" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write_file(tensors, path)

    monkeypatch.setattr(stream, "write_file", full)
    with pytest.raises(OSError, match="model-00003.* failed: .*No space left on device"):
        run("gptq", tmp_path / "log")
    files = sorted(path.name for path in tmp_path.glob("log/.groups.partial/*.safetensors"))
    assert [name[:11] for name in files] == ["model-00001", "model-00002"]
    monkeypatch.setattr(stream, "write_file", write_file)
    stopping.stored.clear()
    assert run("gptq", tmp_path / "log") == unbroken
    assert stopping.stored == titles[2:]


def test_a_folder_that_cannot_be_written_is_named_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write into .*/file/log: .*; choose another folder for the log"):
        run("gptq", tmp_path / "file" / "log")
