import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from torch import nn

from lightning_compress import QuantizationModifier, compress, save
from lightning_compress.export.onnx import expressible
from lightning_compress.export.onnx.expressible import check_packages, check_schemes
from lightning_compress.quant.schemes import from_groups

REFUSED = {
    "W8A8": "scales by token that follow the data, and DynamicQuantizeLinear has one scale for all of a batch",
    "FP8": "its weights are 8-bit floats",
    "NVFP4A16": "its weights are 4-bit floats",
    "MXFP4A16": "its weights are 4-bit floats",
    "W4AFP8": "its inputs are 8-bit floats, expected 8-bit integers; take static inputs with one scale for each tensor",
}


@pytest.mark.parametrize("preset", REFUSED)
def test_schemes_that_onnx_cannot_express(preset):
    scheme = preset_name_to_scheme(preset, ["Linear"])
    with pytest.raises(ValueError, match=f"^'a.b' cannot be written as ONNX: .*{REFUSED[preset]}"):
        check_schemes({"a.b": scheme})


def test_schemes_that_it_can(static8):
    schemes = [preset_name_to_scheme(name, ["Linear"]) for name in ("W4A16", "W8A16", "W4A16_ASYM")]
    check_schemes({str(i): scheme for i, scheme in enumerate([*schemes, *from_groups(static8())])})


def test_a_refusal_leaves_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    compress(model, QuantizationModifier(scheme="FP8_DYNAMIC"))
    with pytest.raises(ValueError, match="'0' cannot be written as ONNX"):
        save(model, tmp_path / "out", format="onnx", sample=torch.randn(2, 32))
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(expressible, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(
        ValueError, match=r"needs packages that are not installed \(onnxruntime\): pip install 'lightning-comp.*x\]'"
    ):
        check_packages()
