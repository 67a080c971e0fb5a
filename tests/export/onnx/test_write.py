import copy
import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from lightning_compress import FoldBatchNormModifier, QuantizationModifier, compress, load, save
from lightning_compress.export.onnx import write
from lightning_compress.export.onnx.noise import noisy_inputs
from lightning_compress.export.onnx.runtime import outputs_of
from lightning_compress.export.onnx.write import write_onnx
from lightning_compress.quant.packed import PackedLinear
from lightning_compress.quant.record import Quantized


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).to(dtype).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net(cnn, static8, images, tmp_path_factory):
    """A quantized CNN, and the folder of its file."""
    net = cnn()
    compress(net, [FoldBatchNormModifier(), QuantizationModifier(config_groups=static8())], [images])
    return net, save(net, tmp_path_factory.mktemp("cnn") / "out", format="onnx", sample=images, recipe={"a": 1})


def test_a_cnn_is_computed_in_integers_for_any_batch(net, images, fused):
    model, folder = net
    operators = fused(folder / "model.onnx")
    assert operators.count("QLinearConv") == 2
    assert operators.count("MatMulIntegerToFloat") == 2
    assert not {"Conv", "Gemm", "MatMul", "BatchNormalization"} & {*operators}
    for rows in (1, 7):
        x = images[:rows]
        (y,) = outputs_of(folder / "model.onnx", {"input": x}).values()
        assert (y - model(x)).norm() < 0.02 * model(x).norm()


def test_openvino_computes_the_same(net, images):
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(str(net[1] / "model.onnx"), "CPU")
    y = torch.from_numpy(compiled(images[:5].numpy())[0])
    assert (y - net[0](images[:5])).norm() < 0.02 * y.norm()


def test_the_folder(net):
    manifest = json.loads((net[1] / "export_manifest.json").read_text())
    assert manifest["files"] == ["model.onnx", "recipe.yaml"]
    assert str(write.__file__).encode() not in (net[1] / "model.onnx").read_bytes()  # no path of this machine
    assert b".py" not in (net[1] / "model.onnx").read_bytes()


def test_codes_and_scales_are_those_of_the_other_format(net, constants):
    model, folder = net
    tensors = constants(folder)
    for name, (module, record) in Quantized.find(model).items():
        codes = tensors[f"{name}.weight"]
        assert codes.dtype == torch.int8
        codes = codes.t() if isinstance(module, nn.Linear) else codes.flatten(1)
        assert torch.equal(codes.float() * record.scale, module.weight.detach().flatten(1))
        assert torch.equal(tensors[f"{name}.weight_scale"], record.scale.flatten())
        assert torch.equal(tensors[f"{name}.input_scale"], record.input_scale[0])
        assert f"{name}.bias" not in tensors


@pytest.mark.parametrize(("scheme", "dtype"), [("W4A16", torch.float32), ("W4A16_ASYM", torch.bfloat16)])
def test_int4_in_groups(scheme, dtype, tmp_path, constants, fused):
    """Codes as compressed-tensors packs them; in bfloat16 too, where the file is in float32."""
    model, x = mlp(dtype), torch.randn(4, 64).to(dtype)
    compress(model, QuantizationModifier(scheme=scheme, group_size=32))
    before = copy.deepcopy(model.state_dict())
    folder = save(model, tmp_path / "onnx", format="onnx", sample=x)
    tensors, packed = constants(folder), load_file(save(model, tmp_path / "packed") / "model.safetensors")
    for name in ("0", "2"):
        shape = packed[f"{name}.weight_shape"].tolist()
        assert torch.equal(tensors[f"{name}.weight"].t(), unpack_from_int32(packed[f"{name}.weight_packed"], 4, shape))
        assert torch.equal(tensors[f"{name}.weight_scale"].t(), packed[f"{name}.weight_scale"].float())
        assert (f"{name}.weight_zero_point" in tensors) == (scheme == "W4A16_ASYM")
    assert fused(folder / "model.onnx").count("MatMulNBits") == 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = load(tmp_path / "packed", mlp(dtype), packed=True)
    assert isinstance(again[0], PackedLinear)
    save(again, tmp_path / "again", format="onnx", sample=x)
    assert isinstance(again[0], PackedLinear)
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


def test_as_far_off_as_noise_moves_the_model(static8, tmp_path, monkeypatch):
    """Inputs halfway between two codes: an output that differs by as much as the model's under noise is accepted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8)).eval()
    compress(model, QuantizationModifier(config_groups=static8()), [torch.randn(16, 64)])
    scale = Quantized.of(model[0]).input_scale.reshape(())
    x = (scale * (torch.arange(128, dtype=torch.float32).view(2, 64) % 7 + 0.5)).expand(2, 64)
    with noisy_inputs(model):
        other = model(x)
    gap = float((other - model(x)).norm() / model(x).norm())
    assert gap > 0.02
    monkeypatch.setattr(write, "outputs_of", lambda *args: {"output": other})
    with pytest.warns(UserWarning, match="hang on the last bits of float32: they move by"):
        save(model, tmp_path / "out", format="onnx", sample=x)
    assert (tmp_path / "out" / "model.onnx").is_file()
    monkeypatch.setattr(write, "outputs_of", lambda *args: {"output": model(x) + 3 * (other - model(x))})
    with pytest.raises(ValueError, match=f"expected at most {200 * gap:.3g} %; nothing is written"):
        save(model, tmp_path / "not", format="onnx", sample=x)


def test_a_failure_leaves_nothing_and_the_model_as_it_was(cnn, static8, images, tmp_path, monkeypatch):
    model = cnn()
    compress(model, QuantizationModifier(config_groups=static8()), [images])
    expected, names = model(images), [name for name, _ in model.named_parameters()]
    monkeypatch.setattr(write, "outputs_of", lambda *args: {"output": 1.5 * expected})
    message = r"'output' differs by 50 % of its norm on the sample, expected at most 2 %; nothing is written"
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "out", format="onnx", sample=images)
    assert not list(tmp_path.iterdir())
    assert torch.equal(model(images), expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model[0]) is nn.Conv2d


def test_rounded_outputs_that_change_too_much_are_left_out(cnn, static8, images, tmp_path, monkeypatch):
    model = cnn()
    compress(model, QuantizationModifier(config_groups=static8()), [images])
    gaps = iter([(0.01, "output"), (0.06, "output")])
    monkeypatch.setattr(write, "difference", lambda *args: next(gaps))
    with pytest.warns(UserWarning, match="2 convolutions run in float32: with rounded outputs 'output' differs by 6 %"):
        file = write_onnx(model, tmp_path / "out", sample=images)
    assert file.difference == 0.01
    assert sorted(path.name for path in file.folder.iterdir()) == ["export_manifest.json", "model.onnx"]


def test_nothing_quantized_and_one_row(tmp_path):
    model, x = mlp(), torch.randn(1, 64)
    folder = save(model, tmp_path / "out", format="onnx", sample=x)
    (y,) = outputs_of(folder / "model.onnx", {"input": x.expand(3, -1)}).values()
    assert_close(y, model(x.expand(3, -1)).detach())
    with pytest.raises(ValueError, match="is not empty"):
        save(model, folder, format="onnx", sample=x)
    save(model, folder, format="onnx", sample=x, overwrite=True)


def test_an_encoder_of_transformers(tmp_path, static8, fused):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)).eval()
    batch = {"input_ids": torch.randint(0, 50, (3, 8)), "attention_mask": torch.ones(3, 8, dtype=torch.int64)}
    compress(model, QuantizationModifier(config_groups=static8(targets=["Linear"])), [batch])
    folder = save(model, tmp_path / "out", format="onnx", sample=batch | {"labels": None})
    assert fused(folder / "model.onnx").count("MatMulIntegerToFloat") == 7  # q, k and v too
    longer = {name: value.repeat(2, 2) for name, value in batch.items()}
    outputs = outputs_of(folder / "model.onnx", longer)
    assert [*outputs] == ["last_hidden_state", "pooler_output"]
    assert_close(outputs["last_hidden_state"], model(**longer).last_hidden_state.detach(), rtol=0, atol=0.02)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"


def test_modules_that_the_call_does_not_reach_are_named(tmp_path):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    model = Half().eval()
    compress(model, QuantizationModifier(scheme="W4A16", group_size=32))
    with pytest.warns(UserWarning, match="does not use 1 quantized modules, such as idle"):
        save(model, tmp_path / "out", format="onnx", sample=torch.randn(2, 32))


@pytest.mark.filterwarnings("ignore:.*were assigned during export")
def test_weights_of_a_recurrent_module_stay_float(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    model, x = Recurrent().eval(), torch.randn(4, 5, 8)
    compress(model, QuantizationModifier(scheme="W8A16", group_size=-1, targets=["Linear", "LSTM"]))
    with pytest.warns(UserWarning, match="2 weights of recurrent and attention modules, such as lstm.ih_l0"):
        save(model, tmp_path / "out", format="onnx", sample=x)


def test_arguments_of_other_formats(tmp_path):
    for arguments, message in (
        ({"format": "tflite"}, "format='tflite' is not a format; expected compressed_tensors or onnx"),
        ({"sample": torch.ones(1)}, "sample is for format='onnx'"),
        ({"format": "onnx", "verify": True}, "a file of ONNX is always checked"),
        ({"format": "onnx"}, "give sample=x, a batch of real inputs of this Sequential"),
    ):
        with pytest.raises(ValueError, match=message):
            save(mlp(), tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())
