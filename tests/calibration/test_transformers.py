"""The walk on models of transformers: language models, an encoder, a vision model, an encoder-decoder."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import AutoRoundModifier, AWQModifier, GPTQModifier, SmoothQuantModifier, compress
from lightning_compress.calibration import calibrate
from lightning_compress.calibration.options import CalibrationOptions
from tests.support.calibration_models import LockstepWatcher, Watcher, inputs_of, started

transformers = pytest.importorskip("transformers")

COMMON = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TOKENS = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}


def tokens(masked):
    """Three batches, the second one padded at the left or not at all."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 32, (2, 6), generator=generator)} for _ in range(3)]
    for i, batch in enumerate(batches):
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, : 2 * (i == 1)] = 0
        batch |= {"attention_mask": mask, "labels": batch["input_ids"]} if masked else {}
    return batches


def make(name):
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**COMMON, **TOKENS, num_key_value_heads=1)
        return transformers.LlamaForCausalLM(config), tokens(masked=True)
    if name == "gemma":  # local and global layers with masks of their own
        config = transformers.Gemma3TextConfig(
            **COMMON,
            **TOKENS,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
        return transformers.Gemma3ForCausalLM(config), tokens(masked=True)
    if name == "gpt2":
        config = transformers.GPT2Config(**TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        return transformers.GPT2LMHeadModel(config), tokens(masked=False)
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**COMMON, **TOKENS)), tokens(masked=True)
    if name == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**COMMON, image_size=8, patch_size=4))
        return model, [(torch.randn(2, 3, 8, 8), torch.zeros(2)) for _ in range(3)]
    config = transformers.T5Config(
        **TOKENS, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # T5 ties whatever it is told
    return model, tokens(masked=True)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "bert", "vit", "t5"])
def test_every_target_sees_what_the_finished_model_shows_it(name):
    model, batches = make(name)
    dense = copy.deepcopy(model)
    watcher = LockstepWatcher(targets=["Linear", "Conv1D", "Conv2d"])
    calibrate(*started(watcher, model=model), batches, options=CalibrationOptions(walk="auto"))
    assert {("MODULE_READY", target) for target in watcher.inputs} <= set(watcher.events)
    targets = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D", "Conv2d")]
    assert sorted(watcher.finished) == sorted(targets)

    def run(batch):
        if isinstance(batch, tuple):
            return lambda m: m(batch[0])
        batch = {k: v for k, v in batch.items() if k != "labels" or name == "t5"}
        return lambda m: m(**batch, **({"use_cache": False} if name != "bert" else {}))

    wanted = inputs_of(model.eval(), list(watcher.inputs), [run(batch) for batch in batches])
    for target in wanted:
        for got, expected in zip(watcher.inputs[target], wanted[target], strict=True):
            assert torch.equal(got, expected), target
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_walks_agree(name):
    seen = []
    for watcher, walk in [(LockstepWatcher(change=False), "auto"), (Watcher(change=False), "two_pass")]:
        model, batches = make(name)
        calibrate(*started(watcher, model=model), batches, options=CalibrationOptions(walk=walk))
        seen.append(watcher.inputs)
    assert all(torch.equal(a, b) for n in seen[0] for a, b in zip(seen[0][n], seen[1][n], strict=True))


def test_blocks_run_once_per_batch_and_the_first_batch_once_more():
    model, batches = make("llama")
    counts = {m: [0] for m in model.modules() if isinstance(m, nn.Linear)}
    for module, count in counts.items():
        forward = module.forward
        module.forward = lambda x, f=forward, c=count: (c.__setitem__(0, c[0] + 1), f(x))[1]
    calibrate(*started(LockstepWatcher(targets=["re:.*_proj"]), model=model), batches)
    last = "model.layers.2.mlp.down_proj"  # nobody needs what comes out of it
    for name, module in model.named_modules():
        if module in counts:
            wanted = 1 if name in (last, "lm_head") else 1 + len(batches)
            assert counts[module] == [wanted], name


def test_the_decoder_has_a_mask_of_its_own():
    model, batches = make("t5")
    keep = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    batches = [{**b, "decoder_input_ids": b["input_ids"], "decoder_attention_mask": keep} for b in batches]
    for where, masks in [("encoder", [b["attention_mask"] for b in batches]), ("decoder", [keep] * 3)]:
        watcher = Watcher(targets=[f"{where}.block.1.layer.0.SelfAttention.q"])
        calibrate(*started(watcher, model=copy.deepcopy(model)), batches)
        wanted = [None if bool(mask.all()) else mask.bool().tolist() for mask in masks]
        assert [None if mask is None else mask.tolist() for mask in watcher.masks] == wanted


# -- batches of several lengths ---------------------------------------------------------------------------------------

LENGTHS = (40, 12, 5) * 4
TECHNIQUES = {
    "GPTQ": lambda: GPTQModifier(scheme="W4A16", group_size=32, ignore=["lm_head"]),
    "AWQ": lambda: AWQModifier(scheme="W8A16", group_size=-1, ignore=["lm_head"]),
    "AWQ by the layer": lambda: AWQModifier(scheme="W8A16", group_size=-1, ignore=["lm_head"], loss="layer"),
    "SmoothQuant": lambda: SmoothQuantModifier(),
    "AutoRound": lambda: AutoRoundModifier(scheme="W4A16", group_size=32, ignore=["lm_head"], iters=5, batch_size=16),
}


@pytest.mark.parametrize("make_modifier", TECHNIQUES.values(), ids=TECHNIQUES)
def test_batches_of_several_lengths_count_as_one_padded_batch_in_any_order(make_modifier):
    """Counted is every token once, so neither padding nor the last batch has a weight of its own."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 64, (1, length), generator=generator) for length in LENGTHS]
    alone = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    wide = [{k: nn.functional.pad(t, (0, 40 - t.shape[1])) for k, t in batch.items()} for batch in alone]
    padded = [{key: torch.cat([batch[key] for batch in wide]) for key in wide[0]}]

    def compressed(batches):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, pad_token_id=0, **sizes))
        with torch.no_grad():
            model.model.embed_tokens.weight[:, :4] *= 20  # so that scales are not decided by rounding
        ledger = compress(model, make_modifier(), batches)
        assert {row.tokens for row in ledger} == {sum(LENGTHS)}
        return model.state_dict()

    expected = compressed(alone)
    for batches in (padded, alone[::-1]):
        for name, weight in compressed(batches).items():
            changed = (weight - expected[name]).abs() > 1e-4 * expected[name].abs().max()
            assert changed.float().mean() < 0.002, name  # numbers on the edge between two codes
