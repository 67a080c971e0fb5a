"""Folded scales are in the weights: a process without this package computes the logits of the model in memory."""

import pytest
import torch
from safetensors.torch import save_file

from lightning_compress import (
    AWQModifier,
    GPTQModifier,
    LogarithmicEqualizationModifier,
    SmoothQuantModifier,
    compress,
    save,
)
from tests.support.smoothing_models import batches, build, change, ignore, output, planted, targets

BITS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
CASES = {
    "smoothquant_gptq_w8a8": ("llama", lambda m, t, i: [
        SmoothQuantModifier(targets=t, ignore=i), GPTQModifier(scheme="W8A8", targets=t, ignore=i),
    ]),
    "equalized_w8a8": ("opt", lambda m, t, i: [
        LogarithmicEqualizationModifier(targets=t, ignore=i),
        # plain transformers takes one scale for all rows that fc1 and fc2 of OPT get, [batch * tokens, features]
        GPTQModifier(scheme="W8A8", targets=t, ignore=[*i, "re:.*fc[12]$"]),
    ]),
    "awq_w4": ("gemma3", lambda m, t, i: [AWQModifier(config_groups=m, ignore=i, n_grid=5)]),
    "awq_gptq_w4": ("phi3", lambda m, t, i: [
        AWQModifier(config_groups=m, ignore=i, quantize=False, n_grid=5), GPTQModifier(config_groups=m, ignore=i),
    ]),
    "awq_conv1d": ("gpt2", lambda m, t, i: [AWQModifier(config_groups=m, ignore=i, n_grid=5)]),
    "awq_encoder": ("bert", lambda m, t, i: [AWQModifier(config_groups=m, ignore=i, n_grid=5)]),
    "awq_t5": ("t5", lambda m, t, i: [AWQModifier(config_groups=m, ignore=i, n_grid=5)]),
    "smoothquant_vit": ("vit", lambda m, t, i: [
        SmoothQuantModifier(targets=t, ignore=i), GPTQModifier(scheme="W8A8", targets=t, ignore=i),
    ]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*written with dense weights")
def test_plain_transformers_gives_the_logits_of_the_model_in_memory(tmp_path, read_by_transformers):
    logits, classes = {}, {}
    for case, (name, make) in CASES.items():
        data = batches(name)
        model = planted(build(name), data[0], factor=8)
        dense = output(model, data[0])
        classes[case] = type(model).__name__
        compress(model, make({"all": {"targets": targets(name), "weights": BITS}}, targets(name), ignore(model)), data)
        logits[case] = output(model, data[0])
        assert not torch.equal(logits[case], dense)
        save(model, tmp_path / case)
        save_file(data[0], tmp_path / f"{case}.batch")
    read = read_by_transformers(tmp_path, classes)
    for case, ours in logits.items():
        assert float((read[case] - ours).norm() / ours.norm()) < 1e-4, case


def test_a_smoothed_model_without_a_quantizer_is_a_plain_checkpoint(tmp_path):
    """Nothing of the folding is left in the file but the values."""
    model = build("llama")
    dense = build("llama")
    compress(model, SmoothQuantModifier(ignore=["lm_head"]), batches("llama"))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert change(again, dense, batches("llama", seed=3)) < 1e-5
