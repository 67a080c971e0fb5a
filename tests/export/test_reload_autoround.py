"""Learned rounding is written bit for bit: a process without this package computes the logits of what is in memory."""

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from lightning_compress import AutoRoundModifier, compress, load, save
from lightning_compress.quant.record import Quantized
from tests.support.smoothing_models import batches, build, ignore, output, targets

CASES = {
    "w2": ("llama", {"num_bits": 2, "group_size": 16}),
    "w3_channel": ("opt", {"num_bits": 3, "strategy": "channel"}),
    "w4_asymmetric": ("phi3", {"num_bits": 4, "group_size": 16, "symmetric": False}),
    "w4_conv1d": ("gpt2", {"num_bits": 4, "group_size": 16}),
    "w4a8": ("llama", {"num_bits": 4, "group_size": 16}),
}
TOKENS = {"num_bits": 8, "dynamic": True, "strategy": "token"}


@pytest.mark.filterwarnings("ignore:.*written with dense weights")
def test_plain_transformers_gives_the_logits_of_the_model_in_memory(tmp_path, read_by_transformers):
    logits, classes = {}, {}
    for case, (name, weights) in CASES.items():
        data, model = batches(name), build(name)
        dense = output(model, data[0])
        classes[case] = type(model).__name__
        inputs = {"input_activations": TOKENS} if "a8" in case else {}
        scheme = {"targets": targets(name), "weights": weights, **inputs}
        compress(model, AutoRoundModifier(config_groups={"all": scheme}, ignore=ignore(model), iters=5), data)
        logits[case] = output(model, data[0])
        assert not torch.equal(logits[case], dense)
        save(model, tmp_path / case)
        save_file(data[0], tmp_path / f"{case}.batch")
        again = load(tmp_path / case, packed=False)
        for module_name, (module, _) in Quantized.find(model).items():
            assert torch.equal(again.get_submodule(module_name).weight, module.weight)
    read = read_by_transformers(tmp_path, classes)
    for case, ours in logits.items():
        assert_close(read[case], ours, rtol=0, atol=1e-4 * ours.abs().max().item(), msg=case)
