"""TuneModifier on small models: nearer to the dense one, the same after a reload."""

import copy
import logging
import re
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress import (
    GPTQModifier,
    QuantizationModifier,
    RotationModifier,
    SparseGPTModifier,
    TuneModifier,
    compress,
    load,
    save,
)
from lightning_compress.calibration.group_log import NoLog
from lightning_compress.calibration.sequential import calibrate
from lightning_compress.core import Lifecycle, State
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.shared_scales import fused_with
from lightning_compress.team import Team
from tests.modifiers.test_ranks import facts
from tests.support.processes import run_processes

GRID = {"num_bits": 2, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
W2 = {"config_groups": {"g": {"targets": ["Linear"], "weights": GRID}}, "ignore": ["lm_head"]}
STATIC = {
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False},
}


def llama(dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim > 1 else 1
    return model.to(dtype)


def ids(count=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(48, (4, 24), generator=generator)} for _ in range(count)]


def tuned(modifiers, batches=None, model=None, **arguments):
    model = llama() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ledger = compress(model, modifiers, ids() if batches is None else batches, **arguments)
    return model, ledger


def divergence(model, dense, batches):
    """KL(dense || model), mean over tokens, by torch."""
    with torch.no_grad():
        pairs = [(model(**b).logits.log_softmax(-1), dense(**b).logits.log_softmax(-1)) for b in batches]
    return sum(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item() for q, p in pairs) / len(pairs)


def test_the_model_comes_nearer_to_the_dense_one():
    """On fresh tokens as well, and the ledger says by how much on those that were held out."""
    plain, _ = tuned(GPTQModifier(**W2))
    model, ledger = tuned([GPTQModifier(**W2), TuneModifier(epochs=6, lr=5e-3)])
    dense, fresh = llama(), ids(seed=2)
    assert divergence(model, dense, fresh) < 0.9 * divergence(plain, dense, fresh)
    row = ledger.rows[-1]
    assert (row.module, row.technique) == ("model", "tune")
    held_out = [ids()[4]]  # the middle one of eight
    assert row.error == pytest.approx(divergence(model, dense, held_out), rel=0.02)  # logits are kept in half precision
    before, after = re.search(r": ([\d.]+) -> ([\d.]+), epoch 6 of 6$", row.flags[0]).groups()
    assert float(before) == pytest.approx(divergence(plain, dense, held_out), rel=0.02)
    assert float(after) == pytest.approx(row.error, rel=1e-3)
    for (name, a), (_, b) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b) == (name in ("lm_head.weight", "model.embed_tokens.weight")), name
        assert b.requires_grad
        assert b.grad is None


def test_progress_names_it_while_the_blocks_are_finished():
    lines = []
    tuned([GPTQModifier(**W2), TuneModifier(epochs=1)], ids(3), progress=lambda *line: lines.append(line))
    assert [line for line in lines if line[0].startswith("TuneModifier")] == [
        ("TuneModifier: batch 2", 3, 4),  # held out
        ("TuneModifier: batch 1", 3, 4), ("TuneModifier: batch 3", 3, 4),
        ("TuneModifier: batch 2", 3, 4),
    ]  # fmt: skip


def test_codes_are_those_of_the_quantizer():
    plain, _ = tuned(GPTQModifier(**W2))
    model, _ = tuned([GPTQModifier(**W2), TuneModifier(epochs=3, vectors=False)])
    for (name, a), b in zip(plain.named_modules(), model.modules(), strict=True):
        record = getattr(a, "_lightning_compress_quantized", None)
        if record is not None:
            other = b._lightning_compress_quantized
            assert not torch.equal(record.scale, other.scale), name
            codes = [
                (m.weight.detach().unflatten(1, (-1, 16)) / r.scale[..., None]).round()
                for m, r in ((a, record), (b, other))
            ]
            assert torch.equal(*codes), name
        elif a.__class__.__name__ == "LlamaRMSNorm":
            assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize(
    "quantizer",
    [
        GPTQModifier(**W2),
        QuantizationModifier(scheme="W8A8", ignore=["lm_head"]),
        QuantizationModifier(scheme="NVFP4", ignore=["lm_head"]),
        QuantizationModifier(scheme="MXFP4", ignore=["lm_head"]),
        QuantizationModifier(scheme="FP8_DYNAMIC", ignore=["lm_head"]),
        QuantizationModifier(scheme=STATIC, ignore=["lm_head"]),
    ],
    ids=["W2", "W8A8", "NVFP4", "MXFP4", "FP8", "static"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_export_computes_what_the_model_computes(tmp_path, quantizer, dtype):
    model, ledger = tuned([copy.deepcopy(quantizer), TuneModifier(epochs=2)], model=llama(dtype))
    save(model, tmp_path / "folder")
    loaded = load(tmp_path / "folder", packed=False)
    for (name, weight), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
    if dtype == torch.float32:  # .to(bfloat16) has rounded what rotary embeddings are computed from
        with torch.no_grad():
            assert torch.equal(loaded(**ids()[0]).logits, model(**ids()[0]).logits)
    assert ledger.rows[-1].technique == "tune"


def test_static_input_scales_are_trained_and_layers_of_one_input_keep_one():
    scheme = {part: args | {"num_bits": 4} for part, args in STATIC.items()}
    plain, _ = tuned(QuantizationModifier(scheme=scheme, ignore=["lm_head"]))
    tune = TuneModifier(epochs=2, lr=3e-3)
    model, ledger = tuned([QuantizationModifier(scheme=scheme, ignore=["lm_head"]), tune])
    assert "epoch" in ledger.rows[-1].flags[0]
    before, after = (
        {name: record.input_scale for name, (_, record) in Quantized.find(m).items()} for m in (plain, model)
    )
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) / 2
    for name, scale in after.items():
        assert not scale.requires_grad
        for other in fused_with(name, after):
            assert torch.equal(scale, after[other])


def test_where_nothing_is_gained_every_bit_is_the_quantizers(caplog):
    plain, _ = tuned(GPTQModifier(**W2))
    with caplog.at_level(logging.INFO, "lightning_compress.modifiers.tune.modifier"):
        model, ledger = tuned([GPTQModifier(**W2), TuneModifier(lr=1e3, epochs=5)])
    assert facts(model, ledger)[0] == facts(plain, ledger)[0]
    assert ledger.rows[-1].flags == ["KL to the dense model on held-out batches: no gain"]
    assert "held-out batches: no gain" in caplog.text


def test_kept_weights_of_a_sparse_model():
    """The masks are those of the pruner alone, whose walk must be the same."""
    pruner = SparseGPTModifier(sparsity=0.6, ignore=["lm_head"])
    plain, _ = tuned(pruner.model_copy(deep=True))
    model, _ = tuned([pruner, TuneModifier(sparse_weights=True, lr=1e-2, epochs=6)])
    dense, fresh = llama(), ids(seed=2)
    assert divergence(model, dense, fresh) < 0.8 * divergence(plain, dense, fresh)
    for name, parameter in model.named_parameters():
        before = plain.get_parameter(name)
        assert torch.equal(parameter == 0, before == 0), name


def test_what_the_function_that_runs_the_model_returns_does_not_matter():
    """As a calibration_step, which needs no result."""

    def forward(model, batch):
        model(**batch)

    results = [
        tuned([QuantizationModifier(**W2), TuneModifier(epochs=1)], ids(2), **arguments)
        for arguments in ({}, {"forward": forward})
    ]
    assert facts(*results[0]) == facts(*results[1])


def test_padding_does_not_count():
    """What stands in the padding changes no bit of what is learned from the tokens before it."""

    def batches(filler):
        made = []
        for batch in ids():
            mask = torch.ones_like(batch["input_ids"])
            mask[2:, 15:] = 0
            made.append({"input_ids": torch.where(mask.bool(), batch["input_ids"], filler), "attention_mask": mask})
        return made

    modifiers = lambda: [GPTQModifier(**W2), TuneModifier(epochs=2)]  # noqa: E731
    (a, rows), (b, _) = (tuned(modifiers(), batches(filler)) for filler in (3, 40))
    assert facts(a, rows)[0] == facts(b, rows)[0]


def test_models_without_classes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8))
    plain, dense = copy.deepcopy(model), copy.deepcopy(model)
    batches = list(torch.randn(6, 32, 16))
    scheme = {"num_bits": 2, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"config_groups": {"g": {"targets": ["Linear"], "weights": scheme}}}
    compress(plain, QuantizationModifier(**groups), batches)
    ledger = compress(model, [QuantizationModifier(**groups), TuneModifier(loss="mse", lr=2e-2, epochs=30)], batches)
    fresh = torch.randn(64, 16)
    with torch.no_grad():
        before, after = ((m(fresh) - dense(fresh)).square().mean() for m in (plain, model))
        held_out = (model(batches[3]) - dense(batches[3])).square().sum() / dense(batches[3]).square().sum()
    assert after < 0.8 * before
    assert ledger.rows[-1].error == pytest.approx(float(held_out), rel=1e-4)
    with pytest.raises(ValueError, match=r"TuneModifier: found no logits in an output of type dict; .* or loss: mse"):
        compress(Answers(), [QuantizationModifier(**groups), TuneModifier()], batches)


class Answers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x):
        return {"embedding": self.linear(x)}


def test_half_precision_of_a_run_reaches_the_model_and_nothing_else():
    """The default dtype is bfloat16, as inside of a Trainer; blocks are computed again with it in the backward pass."""
    seen = set()

    def look(module, args):
        seen.add((torch.get_default_dtype(), torch.is_grad_enabled()))

    model = llama(torch.bfloat16)
    model.model.layers[0].mlp.register_forward_pre_hook(look)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model, ledger = tuned([GPTQModifier(**W2), TuneModifier(epochs=2)], model=model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == {(torch.bfloat16, False), (torch.bfloat16, True)}
    plain, _ = tuned([GPTQModifier(**W2), TuneModifier(epochs=2)], model=llama(torch.bfloat16))
    assert facts(model, ledger)[0] == facts(plain, ledger)[0]


def interruptible(rank, count):
    """As in a Trainer: what may end the calibration asks all ranks, which have unequal numbers of batches."""
    warnings.simplefilter("ignore")
    team, calls = Team.of_processes(), []

    def interrupt():
        calls.append(sum(team.gather(1)))

    model, lifecycle = llama(), Lifecycle([GPTQModifier(**W2), TuneModifier(epochs=2)])
    state = State(model=model, team=team)
    lifecycle.initialize(state)
    calibrate(lifecycle, state, ids(count), log=NoLog(interrupt=interrupt))
    return len(calls), set(calls), facts(model, state.ledger)


def test_ranks_with_unequal_numbers_of_batches_may_be_interrupted(tmp_path):
    [alone] = run_processes(partial(interruptible, count=4), tmp_path / "1", 1)
    ends = run_processes(partial(interruptible, count=4), tmp_path / "3", 3)
    assert [(calls, together) for calls, together, _ in ends] == [(alone[0], {3})] * 3
    assert alone[0] > 2 * 3  # each step of tuning, besides modules and blocks
    assert [end for *_, end in ends] == [alone[2]] * 3


def test_what_it_refuses():
    gptq = GPTQModifier(**W2)
    with pytest.raises(ValueError, match="nothing would be trained"):
        tuned(TuneModifier(scales=False, vectors=False))
    with pytest.raises(ValueError, match=r"TuneModifier cannot work beside GPTQModifier: .* place it last"):
        tuned([TuneModifier(), gptq])
    with pytest.raises(ValueError, match="needs at least two calibration batches, one of them held out, and got 1"):
        tuned([GPTQModifier(**W2), TuneModifier()], ids(1))
    with pytest.raises(ValueError, match="found nothing to train"):
        tuned(TuneModifier(vectors=False))


def test_after_a_rotation_the_answers_are_those_of_the_dense_model():
    model, ledger = tuned([RotationModifier(rotations=["R1"]), GPTQModifier(**W2), TuneModifier(epochs=3)])
    assert ledger.rows[-1].error == pytest.approx(divergence(model, llama(), [ids()[4]]), rel=0.02)
