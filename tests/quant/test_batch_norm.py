"""Folding BatchNorm: outputs as before, names as before, and only where the graph says so."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant.batch_norm import find_foldings, fold_all
from lightning_compress.quant.record import Quantized


def lived(model: nn.Module, *shape: int) -> nn.Module:
    """Norms with statistics, scales and shifts of their own."""
    torch.manual_seed(1)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        for tensor in (norm.weight, norm.bias) if norm.affine else ():
            nn.init.uniform_(tensor, -1.5, 1.5)
    for _ in range(3):
        model(3 * torch.randn(shape) + 1)
    return model.eval()


class Residual(nn.Module):
    """Registered in another order than it runs in; one output has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2, self.norm1, self.norm3 = nn.BatchNorm2d(6), nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 6, 3, groups=2)
        self.conv3 = nn.Conv2d(6, 6, 1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = self.norm2(self.conv2(x))
        y = self.conv3(x)
        return self.head((self.norm3(y) + y).mean((2, 3)))


class Branching(nn.Module):
    """Cannot be traced, but its parts can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, affine=False), nn.ReLU())
        self.norm, self.last = nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.norm(self.last(x)) if x.sum() > -1e9 else x


@pytest.mark.parametrize("remove", [False, True])
def test_outputs_stay_and_the_right_pairs_are_found(remove):
    torch.manual_seed(0)
    model, x = lived(Residual(), 8, 3, 6, 6), torch.randn(4, 3, 6, 6)
    before, keys = model(x), list(model.state_dict())
    with pytest.warns(UserWarning, match="not folded: 'norm3': the output of 'conv3' is used elsewhere too"):
        found = fold_all(model, remove)
    assert {f.norm: f.layer for f in found} == {"norm1": "conv1", "norm2": "conv2", "head.2": "head.1"}
    assert_close(model(x), before, rtol=0, atol=1e-5)
    assert before.abs().max() > 100 * 1e-5
    if remove:
        assert isinstance(model.norm1, nn.Identity)
        assert model.conv1.bias.shape == (4,)
    else:
        assert list(model.state_dict()) == keys
        assert (model.norm1.weight == 1).all()
        assert not model.norm1.training
        fresh = Residual().eval()
        fresh.load_state_dict(model.state_dict())  # whoever knows the architecture
        assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("remove", [False, True])
def test_norms_after_transposed_convolutions(remove):
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6),
    )  # fmt: skip
    model, x = lived(model, 8, 3, 6, 6), torch.randn(4, 3, 6, 6)
    before = model(x)
    assert [f.layer for f in fold_all(model, remove)] == ["0", "3"]
    assert_close(model(x), before, rtol=0, atol=1e-5)


def test_parts_of_a_model_that_cannot_be_traced():
    model, x = lived(Branching(), 8, 2, 9), torch.randn(3, 2, 9)
    before = model(x)
    with pytest.warns(UserWarning, match="'norm': torch.fx could not trace the module that calls it"):
        found = fold_all(model)
    assert [f.norm for f in found] == ["first.1"]
    assert_close(model(x), before, rtol=0, atol=1e-5)


def test_a_resnet_of_transformers():
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model, x = lived(ResNetModel(config), 4, 3, 32, 32), torch.randn(2, 3, 32, 32)
    before = model(x).pooler_output
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(fold_all(model)) == len(norms) == 6
    assert all((m.weight == 1).all() for m in norms)
    assert_close(model(x).pooler_output, before, rtol=0, atol=1e-5)


class Twice(nn.Module):
    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.layer, self.conv, self.norm, self.other = layer, nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.layer:
            return self.norm(self.conv(x)) + self.conv(self.other(x))
        return self.norm(self.norm(self.conv(x)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Twice(layer=True), "the output of 'conv' is used elsewhere too"),
        (Twice(layer=False), "it is called several times"),
        (nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.BatchNorm1d(4)), "no Linear or convolution of its width"),
        (nn.Sequential(nn.ConvTranspose3d(2, 4, 1), nn.BatchNorm3d(4)), "no Linear or convolution of its width"),
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(3)), "no Linear or convolution of its width"),
        (nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4, track_running_stats=False)), "no running statistics"),
        (nn.Sequential(nn.Linear(2, 2)), "Sequential has none"),
    ],
    ids=["layer twice", "norm twice", "relu between", "transposed", "other width", "no statistics", "none"],
)
def test_nothing_to_fold(model, reason):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"no BatchNorm to fold: .*{reason}.*leave folding out"):
        fold_all(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert find_foldings(model)[0] == []


def test_a_scale_that_rows_share_cannot_take_the_norm():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    compress(model, QuantizationModifier(config_groups=scheme(8, "tensor")))
    with pytest.raises(ValueError, match="'0' is quantized already, and folding '1'.*fold first, then quantize"):
        fold_all(model)


def scheme(bits: int, strategy: str = "channel", symmetric: bool = True) -> dict[str, object]:
    size = {"group_size": 6} if strategy == "group" else {}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, **size}
    return {"all": {"targets": ["Conv2d", "ConvTranspose2d", "Linear"], "weights": weights}}


def codes_of(layer: nn.Module) -> Tensor:
    record = Quantized.of(layer)
    W_RC = as_matrix(layer).double()
    return (W_RC / record.scale.double().repeat_interleave(W_RC.shape[1] // record.scale.shape[1], 1)).round()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(8, "channel", True), (4, "group", True), (8, "channel", False)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_folding_into_a_quantized_layer_keeps_its_codes(grid, dtype, tmp_path):
    """Integers before and after are the same, up to the sign of the norm's scale, and so is the output."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), nn.BatchNorm2d(4)
    )
    model = lived(model, 8, 2, 6, 6).to(dtype)
    with torch.no_grad():
        model[1].weight[0], model[1].weight[1] = 0, -1.5
    compress(model, QuantizationModifier(config_groups=scheme(*grid)))
    x = torch.randn(4, 2, 6, 6, dtype=dtype)
    before, codes = model(x), {i: codes_of(model[i]) for i in (0, 3)}
    signs = {i: model[i + 1].weight.double().sign()[:, None] for i in (0, 3)}
    assert [f.layer for f in fold_all(model)] == ["0", "3"]
    for i in (0, 3):
        low = -(2 ** (grid[0] - 1))
        expected = codes[i] * signs[i]
        expected = expected.clamp(max=-low - 1) if grid[2] else expected  # the lowest code has no counterpart
        assert torch.equal(codes_of(model[i]), expected)
    step = 0.1 if grid[0] == 4 else 2e-2 if dtype == torch.bfloat16 else 1e-2
    assert (model(x) - before).abs().max() < step * before.abs().max()
    save(model, tmp_path / "out")  # refuses weights that are not on the grid
    fresh = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), nn.BatchNorm2d(4)
    )
    assert torch.equal(load(tmp_path / "out", fresh.to(dtype)).eval()(x), model(x))


def test_a_model_without_norms_is_left_as_it_is_where_none_is_required():
    model = nn.Sequential(nn.Linear(2, 2))
    assert fold_all(model, required=False) == []
    model = lived(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2)), 8, 2)
    with pytest.warns(UserWarning, match="not folded: '1': no Linear or convolution of its width"):
        assert fold_all(model, required=False) == []
