"""Transposed convolutions with every technique that takes a Conv2d: a UNet, from compression to the folder and back."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.layers.matrix import as_matrix, inputs_as_rows, write_matrix
from lightning_compress.quant.record import Quantized
from tests.support.training_runs import quiet

LAYERS = ["Conv2d", "ConvTranspose2d"]
STATIC = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}


class UNet(nn.Module):
    """Two levels; the second way up has groups."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.up1 = nn.ConvTranspose2d(32, 8, 4, stride=2, padding=1, groups=2)
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x).relu()
        second = self.down2(first).relu()
        low = self.up2(self.middle(second).relu()).relu()
        up = self.up1(torch.cat([low, second], 1)).relu()
        return self.head(torch.cat([up, first], 1))


def case(dtype: torch.dtype = torch.float32) -> tuple[UNet, list[Tensor]]:
    torch.manual_seed(0)
    return UNet().to(dtype).eval(), [torch.randn(2, 1, 16, 16, dtype=dtype) for _ in range(4)]


def groups(bits: int) -> dict[str, dict[str, object]]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    return {"all": {"targets": LAYERS, "weights": weights}}


def only_up(bits: int) -> dict[str, dict[str, object]]:
    return {"all": {**groups(bits)["all"], "targets": ["ConvTranspose2d"]}}


MODIFIERS = {
    "rtn": lambda: lc.QuantizationModifier(config_groups=groups(8)),
    "gptq": lambda: lc.GPTQModifier(config_groups=groups(3)),
    "static": lambda: lc.GPTQModifier(
        config_groups={"all": {**groups(8)["all"], "input_activations": STATIC}}, observer="percentile"
    ),
    "wanda": lambda: lc.WandaPruningModifier(targets=LAYERS, sparsity=0.5),
    "sparsegpt": lambda: lc.SparseGPTModifier(targets=LAYERS, sparsity=0.5),
    "magnitude": lambda: lc.MagnitudePruningModifier(targets=LAYERS, final_sparsity=0.5, start=None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODIFIERS)
def test_a_unet_is_compressed_saved_and_loaded_bit_for_bit(name, dtype, tmp_path):
    model, batches = case(dtype)
    ledger = lc.compress(model, MODIFIERS[name](), batches)
    assert {"up2", "up1"} <= {row.module for row in ledger.rows}
    for layer in (model.up2, model.up1):
        W_RC = as_matrix(layer)
        if name in ("wanda", "sparsegpt", "magnitude"):
            share = (W_RC == 0).float().mean().item()
            assert abs(share - 0.5) < (0.2 if name == "magnitude" else 0.01)
            continue
        record = Quantized.of(layer)
        assert record.scale.shape == (len(W_RC), 1)
        codes_RC = W_RC.float() / record.scale.float()
        assert_close(codes_RC, codes_RC.round(), rtol=0, atol=0.5 if dtype == torch.bfloat16 else 1e-3)
        assert (record.input_scale is not None) == (name == "static")
    lc.save(model, tmp_path / "out")
    loaded = lc.load(tmp_path / "out", UNet().to(dtype)).eval()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(loaded(batches[0]), model(batches[0]))


def values(model: nn.Sequential, x: Tensor) -> Tensor:
    """The output without the bias."""
    return model(x) - model[0].bias[:, None, None]


def test_gptq_changes_the_output_of_a_transposed_convolution_less_than_rounding():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.ConvTranspose2d(8, 12, 4, stride=2, padding=1, groups=2)).eval()
    mixed = torch.randn(8, 8)  # correlated channels: what GPTQ lives on
    batches = [torch.einsum("bchw,cd->bdhw", torch.randn(4, 8, 6, 6), mixed) for _ in range(4)]
    errors = {}
    for modifier in (lc.QuantizationModifier(config_groups=only_up(3)), lc.GPTQModifier(config_groups=only_up(3))):
        model = copy.deepcopy(dense)
        ledger = lc.compress(model, modifier, batches)
        gap = sum((model(x) - dense(x)).square().sum() for x in batches)
        errors[type(modifier)] = (gap / sum(values(dense, x).square().sum() for x in batches)).item()
    assert errors[lc.GPTQModifier] < 0.8 * errors[lc.QuantizationModifier]
    (row,) = ledger.rows
    assert row.error == pytest.approx(errors[lc.GPTQModifier], rel=1e-4)  # what its Hessian predicts is what happens


def test_wanda_ranks_by_the_norms_of_what_a_weight_multiplies():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    x = torch.randn(3, 4, 5, 5)
    x[:, 1] *= 10
    W_RC, norms = as_matrix(layer).clone(), inputs_as_rows(layer, x).square().sum(1).sqrt()
    lc.compress(nn.Sequential(layer), lc.WandaPruningModifier(targets=["ConvTranspose2d"], sparsity=0.5), [x])
    for part, (W, norm) in enumerate(zip(W_RC.chunk(2), norms, strict=True)):
        score = W.abs() * norm
        keep = score > score.kthvalue(W.shape[1] // 2, 1, keepdim=True).values
        assert torch.equal(as_matrix(layer).chunk(2)[part] != 0, keep)


class Denoiser(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self.net(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_unet_trains_through_fake_quantization_and_reloads(precision, tmp_path):
    model, batches = case()
    dense = as_matrix(model.up1).clone()
    scheme = {"all": {**groups(8)["all"], "input_activations": STATIC}}
    loader = DataLoader(TensorDataset(torch.cat(batches)), 2)
    callback = lc.CompressionCallback(lc.QATModifier(config_groups=scheme))
    quiet(tmp_path, callback, max_epochs=2, precision=precision).fit(Denoiser(model), loader)
    for layer in (model.up1, model.up2):
        record, W_RC = Quantized.of(layer), as_matrix(layer)
        codes_RC = W_RC.double() / record.scale.double()
        assert (codes_RC - codes_RC.round()).abs().max() < (0.51 if precision == "bf16-true" else 1e-3)
    assert not torch.equal(as_matrix(model.up1).float(), dense)
    loaded = lc.load(tmp_path / "compressed", UNet().to(model.head.weight.dtype)).eval()
    x = batches[0].to(model.head.weight.dtype)
    assert torch.equal(loaded(x), model.eval()(x))


def test_channels_are_pruned_through_transposed_convolutions_of_a_unet(tmp_path):
    model, batches = case()
    model.up1 = nn.ConvTranspose2d(32, 8, 4, stride=2, padding=1)
    with torch.no_grad():  # channels that carry nothing: without them the output is the same
        for layer in (model.down1, model.down2, model.middle, model.up2, model.up1):
            weight = as_matrix(layer).clone()
            weight[::2] = 0
            write_matrix(layer, weight)
            layer.bias[::2] = 0
    before, size = model(batches[0]), sum(p.numel() for p in model.parameters())
    lc.compress(model, lc.StructuredPruningModifier(dimension="channels", ratio=0.5, start=None), batches[:1])
    assert (model.up2.in_channels, model.up2.out_channels) == (8, 8)
    assert (model.up1.in_channels, model.up1.out_channels) == (16, 4)
    assert sum(p.numel() for p in model.parameters()) < 0.3 * size
    assert_close(model(batches[0]), before)
    lc.save(model, tmp_path / "out")
    fresh = UNet()
    fresh.up1 = nn.ConvTranspose2d(32, 8, 4, stride=2, padding=1)
    assert torch.equal(lc.load(tmp_path / "out", fresh).eval()(batches[0]), model(batches[0]))


def test_what_pruning_cannot_pass_names_the_layers_to_ignore():
    model, batches = case()
    prune = lambda **ignore: lc.StructuredPruningModifier(dimension="channels", ratio=0.5, start=None, **ignore)  # noqa: E731
    with pytest.raises(
        ValueError, match=r"cannot prune through 'up1': a convolution with groups=2 .* ignore: "
    ) as error:
        lc.compress(model, prune(), batches[:1])
    named = str(error.value).rpartition("ignore: ")[2].replace("'", "").split(", ")
    assert "down2" in named
    model, batches = case()
    with pytest.raises(ValueError, match="ignore: 'up2'"):
        lc.compress(model, prune(ignore=named), batches[:1])
    model, batches = case()
    with pytest.raises(ValueError, match="ignore: 'up1'"):
        lc.compress(model, prune(ignore=[*named, "up2"]), batches[:1])
    model, batches = case()
    lc.compress(model, prune(ignore=[*named, "up2", "up1"]), batches[:1])
    assert model.down1.out_channels == 4
