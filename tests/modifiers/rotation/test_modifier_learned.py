"""Learning is part of calibration: R1 gets better on the data, the model computes what it did."""

import pytest
import torch
from torch.testing import assert_close

from lightning_compress import (
    AutoRoundModifier,
    AWQModifier,
    GPTQModifier,
    KVCacheModifier,
    QuantizationModifier,
    REAPModifier,
    RotationModifier,
    SmoothQuantModifier,
    SparseGPTModifier,
    SpinQuantModifier,
    WandaPruningModifier,
    compress,
)
from lightning_compress.modifiers.rotation.discover import discover
from lightning_compress.modifiers.rotation.learn import readers_of
from tests.support.rotation_models import build, logits, plant_outliers, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*shared its weight with the embeddings")
QUICK = {"learn": True, "learn_steps": 40, "learn_tokens": 128}


def losses(ledger):
    flag = next(f for row in ledger for f in row.flags if f.startswith("R1 learned"))
    before, _, after = flag.removeprefix("R1 learned: loss ").split()
    return float(before), float(after)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe", "t5"])
def test_no_output_changes_and_the_loss_falls(kind):
    model = build(kind)
    before = logits(model)
    batches = token_batches(2)
    if kind == "t5":
        batches = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches]
    ledger = compress(model, RotationModifier(**QUICK), batches)
    assert (logits(model) - before).abs().max() < 2e-5 * before.abs().max()
    first, last = losses(ledger)
    assert last < first


def test_it_is_seeded_and_differs_from_what_it_began_with():
    models = [build("llama", tie_word_embeddings=False) for _ in range(3)]
    for model, settings in zip(models, (QUICK, QUICK, {}), strict=True):
        compress(model, SpinQuantModifier(**settings), token_batches(2))
    one, two, random = (model.model.embed_tokens.weight for model in models)
    assert_close(one, two, rtol=0, atol=0)
    assert (one - random).abs().max() > 1e-3


def test_w4a4_after_rotation_loses_less():
    def error(*rotate):
        model = plant_outliers(build("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=False))
        before = logits(model)
        gptq = GPTQModifier(scheme="W4A4", group_size=-1, ignore=["re:.*lm_head"])
        compress(model, [*rotate, gptq], token_batches(4))
        return ((logits(model) - before).square().sum() / before.square().sum()).item()

    assert error(RotationModifier(**QUICK)) < 0.6 * error()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_a_reader_computes_the_output_of_the_weights_without_their_biases(kind):
    model = build(kind)
    trace, _ = discover(model)
    stream = next(space for space in trace.spaces if space.sources and not space.fixed)
    norm = stream.norms[0]
    x = torch.randn(5, 32)
    reader = readers_of(model, stream, norm, x, lambda name: False)
    normed = model.get_submodule(norm.module)(x)
    if kind == "gpt2":
        expected = normed @ model.transformer.h[0].attn.c_attn.weight
    else:
        attention = model.model.layers[0].self_attn
        expected = torch.cat([p(normed) for p in (attention.q_proj, attention.k_proj, attention.v_proj)], -1)
    assert_close(reader.Z_TC @ reader.V_OC.t(), expected, rtol=1e-3, atol=1e-3)
    assert readers_of(model, stream, norm, x, lambda name: True) is None


@pytest.mark.parametrize("settings", [{"rotations": ["R2"]}, {"transform_block_size": 8}])
def test_learning_refuses_other_rotations_and_blocks(settings):
    with pytest.raises(ValueError, match="learn=True trains all of R1.*name R1, and leave the block size out"):
        RotationModifier(learn=True, **settings)


def test_learning_needs_data():
    with pytest.raises(ValueError, match="RotationModifier needs calibration data"):
        compress(build("llama"), RotationModifier(learn=True))


def test_a_model_without_readers_cannot_be_learned():
    model = build("llama")
    with pytest.raises(ValueError, match="no weight reads the residual stream through a norm; set learn=False"):
        compress(model, RotationModifier(**QUICK, ignore=["re:.*"]), token_batches(1))


@pytest.mark.parametrize(
    "made",
    [
        lambda **window: RotationModifier(learn=True, **window),
        lambda **window: SmoothQuantModifier(**window),
        lambda **window: AWQModifier(scheme="W4A16", **window),
        lambda **window: AutoRoundModifier(scheme="W4A16", **window),
        lambda **window: QuantizationModifier(scheme="W4A16", **window),
        lambda **window: KVCacheModifier(**window),
        lambda **window: SparseGPTModifier(**window),
        lambda **window: WandaPruningModifier(**window),
        lambda **window: REAPModifier(**window),
    ],
)
@pytest.mark.parametrize(("window", "named"), [({"start": 0}, "start=0"), ({"start": 2, "end": 5}, "start=2, end=5")])
def test_a_window_in_training_is_refused_where_the_work_is_done_after_it(made, window, named):
    with pytest.raises(ValueError, match=f"{named} would do nothing: .*Modifier acts after training, on the final"):
        made(**window)
