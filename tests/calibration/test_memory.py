"""Memory of a walk: what is freed goes back to the system, and nothing keeps activations."""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress import compress
from lightning_compress.calibration import calibrate
from lightning_compress.calibration.activations import tensors_of
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.layers import memory
from tests.support.calibration_models import C, Layered, LockstepWatcher, make_batches, seeded, started
from tests.support.fake_libc import FakeLibrary


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_a_walk_returns_memory_after_each_block(walk, monkeypatch):
    library, trims = FakeLibrary(), []
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)

    class Noting(LockstepWatcher):
        def on_block_end(self, state, event, **kwargs):
            super().on_block_end(state, event, **kwargs)
            trims.append(library.calls.count("trim"))

    calibrate(*started(Noting(), model=seeded(Layered)), make_batches(2, 2, 5, C), CalibrationOptions(walk=walk))
    assert library.calls[:2] == [(-3, 2**22), (-1, 2**25)]
    assert library.calls[-1] == (-1, 2**26)
    assert trims[1:] == sorted(set(trims[1:]))  # between every two blocks


@pytest.mark.parametrize(
    ("recipe", "walk"),
    [
        ("gptq_w4", "one_pass"),
        ("gptq_w4", "two_pass"),
        ("gptq_w8a8", "whole"),
        ("sparsegpt_50", "auto"),
        ("wanda_2of4_refined", "auto"),
        ("awq_w4", "auto"),
        ("smoothquant_w8a8", "auto"),
        ("kv_fp8", "auto"),
    ],
)
def test_no_activation_outlives_a_walk(recipe, walk):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    batches = [{"input_ids": torch.randint(0, 64, (2, 16))} for _ in range(3)]
    outputs = []

    def note(_module, _args, output):
        outputs.extend(weakref.ref(tensor) for tensor in tensors_of(output))

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        compress(model, recipe, batches, walk=walk)
    finally:
        handle.remove()
    gc.collect()
    assert len(outputs) > 50
    assert sum(reference() is not None for reference in outputs) == 0


def test_inputs_of_the_probe_are_released_before_the_walk():
    model, inputs, alive = nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, 3)), [], []

    class Counting(LockstepWatcher):
        def see(self, module, args):
            alive.append(sum(reference() is not None for reference in inputs))

    model[2].register_forward_pre_hook(lambda _m, args: inputs.append(weakref.ref(args[0])))
    calibrate(*started(Counting(), model=model), make_batches(1, 4, C), CalibrationOptions(walk="two_pass"))
    assert alive == [0, 1]  # at model[0] none, at model[2] its own
