"""Block Hadamards: the function stays, weights are products with the matrix, one input is turned once; refusals."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_compress import (
    BlockHadamardModifier,
    CompressionCallback,
    GPTQModifier,
    QATModifier,
    QuantizationModifier,
    compress,
    load,
)
from lightning_compress.modifiers.rotation import online
from lightning_compress.modifiers.rotation.online import OnlineRotations
from lightning_compress.quant.record import Quantized
from tests.support.rotation_models import build, logits, token_batches
from tests.support.training_runs import StopAfter, quiet

WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}


def sylvester(order):
    """The matrix by the parity of common bits: H_ij = (-1)^|i & j|."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)]).double()


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_weights_are_turned_by_the_matrix_and_the_function_stays(block):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 8, bias=False)).double()
    x, dense = torch.randn(5, 128).double(), copy.deepcopy(model)
    compress(model, BlockHadamardModifier(block_size=block))
    for index in (0, 2):
        B = torch.block_diag(*[sylvester(block)] * (dense[index].in_features // block)) / block**0.5
        assert_close(model[index].weight, dense[index].weight @ B, rtol=0, atol=1e-14)
    assert_close(model(x), dense(x), rtol=0, atol=1e-13)
    assert_close(copy.deepcopy(model)(x), dense(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
def test_any_model_of_transformers_computes_the_same(kind):
    model = build(kind)
    before = logits(model)
    compress(model, BlockHadamardModifier(block_size=16, targets=["Linear", "Conv1D"] if kind == "gpt2" else "Linear"))
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()
    assert len(OnlineRotations.find(model)) == {"llama": 14, "qwen2": 14, "gpt2": 8, "gemma2": 14}[kind]


def test_layers_with_one_input_turn_it_once(monkeypatch):
    model, inputs = build("llama", **WIDTHS), []
    compress(model, BlockHadamardModifier(block_size=32))
    transform = online.fast_hadamard_transform
    monkeypatch.setattr(
        online, "fast_hadamard_transform", lambda x, **more: (inputs.append(x), transform(x, **more))[1]
    )
    logits(model)
    assert len(inputs) == 8  # of each of two blocks: q k v, o, gate up, down


def test_a_changed_input_is_turned_again_and_gradients_reach_it():
    torch.manual_seed(0)
    first, second = nn.Linear(32, 4).double(), nn.Linear(32, 4).double()
    dense = copy.deepcopy(first), copy.deepcopy(second)
    pair = nn.ModuleList([first, second])
    compress(pair, BlockHadamardModifier())
    x = torch.randn(3, 32).double()
    with torch.no_grad():
        assert_close(first(x), dense[0](x))
        x.mul_(2)
        assert_close(second(x), dense[1](x))  # not the result of the tensor before
    with torch.inference_mode():
        y = torch.randn(3, 32).double()
        assert_close(first(y), dense[0](y))
        y.add_(1)
        assert_close(second(y), dense[1](y))
    leaf = x.clone().requires_grad_()
    for source in (leaf, leaf * 1):
        with torch.no_grad():
            first(source)  # its result must not serve the calls with a gradient
        turned = torch.autograd.grad((first(source) * second(source).sin()).sum(), leaf)
        plain = torch.autograd.grad((dense[0](leaf) * dense[1](leaf).sin()).sum(), leaf)
        assert_close(turned, plain, rtol=0, atol=1e-12)


def test_outliers_cost_mxfp4_less():
    """Single columns that are 30 times larger set the scale of their group of 32: the others round to zero."""
    torch.manual_seed(0)
    W_RC = torch.randn(64, 128)
    W_RC[:, ::32] *= 30
    errors = []
    for steps in ([], [BlockHadamardModifier()]):
        layer = nn.Sequential(nn.Linear(128, 64, bias=False))
        layer[0].weight.data.copy_(W_RC)
        compress(layer, [*steps, QuantizationModifier(scheme="MXFP4A16")])
        effective_RC = layer(torch.eye(128)).t()
        errors.append((effective_RC - W_RC).square().mean().item())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
@pytest.mark.parametrize("scheme", ["MXFP4A16", "NVFP4"])
def test_gptq_sees_turned_inputs(walk, scheme):
    model = build("llama", **WIDTHS)
    before = logits(model)
    recipe = [BlockHadamardModifier(), GPTQModifier(scheme=scheme, ignore=["re:.*lm_head"])]
    ledger = compress(model, recipe, token_batches(4), walk=walk)
    assert max(row.error for row in ledger if row.technique == "gptq") < 0.05
    assert len(Quantized.find(model)) == 14
    assert (logits(model) - before).square().sum() < 0.1 * before.square().sum()


# -- training on a grid -----------------------------------------------------------------------------------------------


class Language(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = build("llama", **WIDTHS)

    def training_step(self, batch, batch_idx):
        return self.net(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def recipe(start=0):
    return [BlockHadamardModifier(start=start), QATModifier(scheme="MXFP4A16", ignore=["re:.*lm_head"])]


def test_qat_trains_on_the_grid_of_turned_weights(tmp_path):
    rows = [{"input_ids": row} for batch in token_batches(4) for row in batch["input_ids"]]
    late = CompressionCallback(recipe(start=None), module="net")
    with pytest.raises(ValueError, match="BlockHadamardModifier cannot work beside QATModifier.*give start=0"):
        quiet(tmp_path / "no", late).fit(Language(), DataLoader(rows, 4))
    backwards = CompressionCallback(recipe()[::-1], module="net")
    with pytest.raises(ValueError, match="place it after the rotation"):
        quiet(tmp_path / "no", backwards).fit(Language(), DataLoader(rows, 4))
    model = Language()
    before = model.net(**token_batches(1)[0]).logits
    callback = CompressionCallback(recipe(), module="net", evaluate=False)
    quiet(tmp_path, callback, max_epochs=1).fit(model, DataLoader(rows, 4))
    again = load(tmp_path / "compressed")
    assert len(OnlineRotations.find(again)) == 14
    with torch.no_grad():
        after = model.net.eval()(**token_batches(1)[0]).logits
        assert_close(again(**token_batches(1)[0]).logits, after, rtol=0, atol=0)
    assert 0 < (after - before).square().sum() < 0.2 * before.square().sum()


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("widths", "block", "message"), [
    ((48, 96), 32, r"block_size=32 does not divide the 48 input features of '0' \(1 layers: 0\); take block_size=16,"),
    ((64, 192), 128, r"the 64 input features of '0' \(2 layers: 0, 1\); take block_size=64, the largest"),
    ((20, 64), 16, r"the 20 input features of '0' .*none of \[16, 32, 64, 128\] divides 20; add these layers to"),
    ((48, 40), 32, r"blocks of \[16\] divide 48, but no block divides those of all targets"),
])  # fmt: skip
def test_widths_that_no_block_divides_are_named_with_blocks_that_do(widths, block, message):
    model = nn.Sequential(nn.Linear(widths[0], widths[1]), nn.Linear(widths[1], 4))
    with pytest.raises(ValueError, match=message):
        compress(model, BlockHadamardModifier(block_size=block))


def test_convolutions_are_left_out_and_named():
    model = nn.Sequential(nn.Conv2d(16, 4, 1), nn.Flatten(), nn.Linear(16, 4))
    weight = model[0].weight.clone()
    with pytest.warns(UserWarning, match="turns the inputs of Linears alone and leaves out 0"):
        compress(model, BlockHadamardModifier(block_size=16, targets=["Linear", "Conv2d"]))
    assert torch.equal(model[0].weight, weight)
    assert list(OnlineRotations.find(model)) == ["2"]
    with pytest.raises(ValueError, match=re.escape("targets=['Conv2d'] holds no Linear, only ['Conv2d']")):
        compress(nn.Sequential(nn.Conv2d(16, 4, 1)), BlockHadamardModifier(targets=["Conv2d"]))


def test_layers_that_cannot_be_turned_are_named():
    tied = build("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"'lm_head' shares its weight with 'model.embed_tokens'.*to ignore"):
        compress(tied, BlockHadamardModifier(ignore=[]))
    with pytest.raises(ValueError, match=r"'.*experts.*' is a slice of a tensor that holds all experts.*to ignore"):
        compress(build("mixtral", **WIDTHS), BlockHadamardModifier(ignore=["lm_head", "re:.*gate"]))
    twice = nn.Sequential(nn.Linear(32, 4))
    compress(twice, BlockHadamardModifier())
    with pytest.raises(ValueError, match="the inputs of '0' are turned already"):
        compress(twice, BlockHadamardModifier(block_size=16))
    quantized = nn.Sequential(nn.Linear(32, 4))
    compress(quantized, GPTQModifier(scheme="MXFP4A16"), [torch.randn(8, 32)])
    with pytest.raises(ValueError, match="'0' is quantized, or parametrized, already"):
        compress(quantized, BlockHadamardModifier())
    with pytest.raises(ValueError, match=r"start=3.*give start=0, or leave all three out"):
        BlockHadamardModifier(start=3)


def test_one_weight_in_two_layers_is_turned_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    x = torch.randn(4, 32)
    before = model(x)
    compress(model, BlockHadamardModifier())
    assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_a_run_that_resumes_ends_as_one_that_was_not_cut(tmp_path):
    """The checkpoint holds turned weights: they are not turned again, and inputs are."""
    rows = [{"input_ids": row} for batch in token_batches(2) for row in batch["input_ids"]]
    exports = []
    for name, cut in (("one", None), ("two", 3)):
        for attempt in range(2 if cut else 1):
            callback = CompressionCallback(recipe(), module="net", evaluate=False)
            last = tmp_path / name / "last.ckpt"
            saving = ModelCheckpoint(last.parent, save_last=True)
            stop = [StopAfter(cut)] if cut and not attempt else []
            trainer = quiet(tmp_path / name, callback, saving, *stop, max_epochs=2)
            with pytest.raises(KeyError) if stop else nullcontext():
                trainer.fit(Language(), DataLoader(rows, 4), ckpt_path=str(last) if attempt else None)
        exports.append(load(tmp_path / name / "compressed"))
    assert_close(logits(exports[1]), logits(exports[0]), rtol=0, atol=0)
