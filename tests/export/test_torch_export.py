"""torch.export of compressed models: what ExecuTorch and AOTInductor take."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import QuantizationModifier, compress, load, save

STATIC = {
    "all": {
        "targets": ["Linear", "Conv2d"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    }
}


def check(model, *args, tolerance=1e-5, **kwargs):
    """The program gives the outputs of the model, for a batch of another size too."""
    flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
    rows = {id(x): {0: torch.export.Dim.DYNAMIC} for x in flat}
    shapes = torch.utils._pytree.tree_map(lambda x: rows[id(x)], (list(args), kwargs))
    model.eval()
    more, named = torch.utils._pytree.tree_map(lambda x: torch.cat([x, x[:1]]), (args, kwargs))
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=(*shapes[0], *shapes[1].values()))
        for a, k in ((args, kwargs), (more, named)):
            y, expected = program.module()(*a, **k), model(*a, **k)
            y, expected = (out if isinstance(out, torch.Tensor) else out[0] for out in (y, expected))
            assert_close(y, expected, rtol=tolerance, atol=tolerance)
    return program


def test_a_cnn_with_static_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    x = torch.randn(3, 1, 8, 8)
    compress(model, QuantizationModifier(config_groups=STATIC), [x])
    check(model, x)


def mlp(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).to(dtype).eval()


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_an_mlp(tmp_path, scheme):
    model, x = mlp(torch.float32), torch.randn(3, 5, 64)
    arguments = {"group_size": 32} if scheme == "W4A16" else {}
    compress(model, QuantizationModifier(scheme=scheme, **arguments), [x])
    check(load(save(model, tmp_path / "out"), mlp(torch.float32), packed=False), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "scheme", ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W4A8", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16"]
)
def test_packed_weights(tmp_path, scheme, dtype):
    """A program made before any call, and one made after it; neither leaves tensors without data in the module."""
    model, x = mlp(dtype), torch.randn(3, 5, 64, dtype=dtype)
    arguments = {"group_size": 32} if scheme in ("W4A16", "W4A16_ASYM", "W8A16", "W4A8") else {}
    compress(model, QuantizationModifier(scheme=scheme, **arguments), [x])
    loaded = load(save(model, tmp_path / "out"), mlp(dtype), packed=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for _ in range(2):
        check(loaded, x, tolerance=tolerance)
        assert_close(loaded(x), model(x), rtol=tolerance, atol=tolerance)


def test_a_program_made_after_a_call_has_packed_weights_too(tmp_path):
    """A call leaves a dense weight in the module; the program must store the codes instead of it."""
    model, x = mlp(torch.float32), torch.randn(3, 64)
    compress(model, QuantizationModifier(scheme="W4A16", group_size=32), [x])
    loaded = load(save(model, tmp_path / "out"), mlp(torch.float32), packed=True)
    loaded(x)
    program = check(loaded, x)
    stored = [*program.constants.values(), *program.state_dict.values()]
    sizes = {tuple(value.shape) for value in stored if isinstance(value, torch.Tensor) and value.is_floating_point()}
    assert sizes.isdisjoint({(96, 64), (32, 96)}), sizes


def test_a_packed_decoder_and_a_process_without_this_package(tmp_path):
    """The file has packed weights, not dense ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4096}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=32, use_cache=False, **sizes)).eval()
    batch = {"input_ids": torch.randint(0, 50, (3, 8))}
    compress(model, QuantizationModifier(scheme="W4A16", group_size=64, ignore=["lm_head"]), [batch])
    loaded = load(save(model, tmp_path / "out"), packed=True)
    program = check(loaded, **batch)
    torch.export.save(program, tmp_path / "program.pt2")
    assert (tmp_path / "program.pt2").stat().st_size < 0.5 * 4 * sum(p.numel() for p in model.parameters())
    torch.save((batch["input_ids"], loaded(**batch).logits), tmp_path / "pair.pt")
    code = """
import sys, torch
ids, expected = torch.load("pair.pt")
y = torch.export.load("program.pt2").module()(input_ids=ids)
torch.testing.assert_close(y.logits if hasattr(y, "logits") else y[0], expected)
assert "lightning_compress" not in sys.modules
"""
    code = "import transformers\nfrom transformers import LlamaForCausalLM" + code  # its outputs are a class of its own
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_encoder_of_transformers():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)).eval()
    batch = {"input_ids": torch.randint(0, 50, (3, 8)), "attention_mask": torch.ones(3, 8, dtype=torch.int64)}
    groups = {"all": STATIC["all"] | {"targets": ["Linear"]}}
    compress(model, QuantizationModifier(config_groups=groups), [batch])
    check(model, **batch)
