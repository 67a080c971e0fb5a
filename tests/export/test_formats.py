import pytest

from lightning_compress.export.formats import check_formats


def test_one_or_several():
    assert check_formats("export", "onnx") == ("onnx",)
    assert check_formats("export", ["compressed_tensors", "onnx"]) == ("compressed_tensors", "onnx")


@pytest.mark.parametrize("wrong", [[], 1, None, ["onnx", "onnx"], {}])
def test_other_values(wrong):
    with pytest.raises(ValueError, match="expected a format or a list of formats, of compressed_tensors, onnx"):
        check_formats("export", wrong)


def test_an_unknown_one():
    with pytest.raises(ValueError, match="export='pt' is not a format; expected compressed_tensors or onnx"):
        check_formats("export", ["onnx", "pt"])
