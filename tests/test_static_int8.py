"""The recipes int8_static, gptq_int8_static and qat_int8_static, unedited, in a Trainer run of usual vision models."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from lightning_compress import CompressionCallback, compress, load
from lightning_compress.layers.matrix import is_supported
from lightning_compress.quant.record import Quantized
from lightning_compress.recipe import load_recipe
from tests.support.training_runs import quiet


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.low = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(12, 8, 2, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(x)
        return self.head(torch.cat([self.up(self.low(first)), first], 1)).mean((2, 3))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100}
        self.vit = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=10))

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(pixel_values=x).logits


def cnn() -> nn.Module:
    stages = [m for i, o in ((3, 16), (16, 32)) for m in (nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(512, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


def pitch() -> nn.Module:
    """As CREPE: convolutions over samples, ReLU before the norms, so that these cannot be folded."""
    stages = [nn.Conv1d(1, 8, 16, 4), nn.ReLU(), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 8), nn.ReLU(), nn.BatchNorm1d(8)]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(8 * 9, 10))


MODELS = {
    "cnn": (cnn, (3, 16, 16)), "mlp": (mlp, (30,)), "unet": (UNet, (3, 16, 16)), "vit": (ViT, (3, 16, 16)),
    "pitch": (pitch, (1, 76)),
}  # fmt: skip
CASES = [
    ("cnn", "int8_static", "bf16-true"), ("mlp", "gptq_int8_static", "32-true"),
    ("mlp", "qat_int8_static", "bf16-true"),
    ("unet", "gptq_int8_static", "32-true"), ("unet", "qat_int8_static", "32-true"), ("vit", "int8_static", "32-true"),
    ("pitch", "qat_int8_static", "bf16-true"),
]  # fmt: skip


class Classifier(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "recipe", "precision"), CASES)
def test_a_recipe_trains_and_exports_what_an_integer_runtime_computes(kind, recipe, precision, tmp_path):
    make, shape = MODELS[kind]
    torch.manual_seed(0)
    x, model = torch.randn(24, *shape), make()
    loader = DataLoader(TensorDataset(x, torch.randint(10, (24,))), 8)
    quiet(tmp_path, CompressionCallback(recipe=recipe), max_epochs=2, precision=precision).fit(
        Classifier(model), loader
    )
    model = model.eval()
    layers = {name: module for name, module in model.named_modules() if is_supported(module)}
    records = {name: record for name, (_, record) in Quantized.find(model).items()}
    assert records.keys() == layers.keys()
    for record in records.values():
        assert record.input_scale.shape == record.input_zero_point.shape == (1,)
        assert record.scale.shape[1] == 1
        assert record.zero_point is None
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        assert norm.num_batches_tracked > 0  # it was trained
        is_a_shift = bool((norm.weight == 1).all() and (norm.running_mean == 0).all())
        assert is_a_shift == (kind != "pitch")
    dtype = next(model.parameters()).dtype
    loaded = load(tmp_path / "compressed", make().to(dtype), packed=False).eval()
    assert torch.equal(loaded(x.to(dtype)), model(x.to(dtype)))


@pytest.mark.parametrize("scheme", ["INT8_STATIC", "INT8_STATIC_SYM"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(12, 5), (4, 12)),
        (nn.Conv1d(4, 6, 3, 2, 1), (4, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 6)),
        (nn.ConvTranspose1d(4, 6, 4, 2, 1), (2, 4, 7)),
        (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (2, 4, 5, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_integers_give_the_output_of_the_layer(layer, shape, scheme):
    """sum (q_x - z_x) q_w in integers, times both scales, plus the bias: all that QLinearConv and its kin compute."""
    torch.manual_seed(0)
    (recipe,) = (m for m in load_recipe("int8_static") if hasattr(m, "scheme"))
    quantizer = type(recipe)(**{**recipe.model_dump(exclude_unset=True), "scheme": scheme})
    layer = copy.deepcopy(layer).double()
    model, x = nn.Sequential(nn.ReLU(), layer), torch.randn(shape, dtype=torch.float64)
    compress(model, quantizer, [x])
    record, rectified = Quantized.of(layer), x.relu()
    zero = 0 if record.input_zero_point is None else int(record.input_zero_point)
    assert zero == (-128 if scheme == "INT8_STATIC" else 0)  # after a ReLU all codes are above zero
    codes = ((rectified / record.input_scale).round() + zero).clamp(-128, 127)
    per_row = record.scale.flatten()
    if getattr(layer, "transposed", False):  # [inputs, outputs / groups, ...]: the scale of a row by group and output
        by_group = per_row.view(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1).flatten(0, 1)
        weight = layer.weight / by_group.view(*by_group.shape, *[1] * (layer.weight.ndim - 2))
    else:
        weight = layer.weight / per_row.view(-1, *[1] * (layer.weight.ndim - 1))
    integers = weight.round()
    assert_close(integers, weight, rtol=0, atol=1e-6)
    assert integers.abs().max() <= 128
    product = product_of(layer, integers, codes - zero)
    shape_R = (1, -1) + (1,) * (product.ndim - 2)
    y = product * record.input_scale * per_row.view(shape_R) + layer.bias.view(shape_R)
    assert_close(y, model(x), rtol=0, atol=1e-9)


def product_of(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The layer's product of integers, without its bias."""
    twin = copy.deepcopy(layer)
    Quantized.detach(twin)
    twin.weight, twin.bias = nn.Parameter(weight), None
    assert torch.equal(x, x.round())
    return twin(x)
