import pytest
import torch
from torch import nn

from lightning_compress.export.onnx.sample import Call, call_of, named_tensors


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, first, second=None, *, flag=False):
        return self.layer(first)


@pytest.mark.parametrize(
    ("sample", "names"),
    [
        (torch.ones(2, 2), ["first"]),
        ((torch.ones(2, 2), torch.ones(2)), ["first", "second"]),
        ({"first": torch.ones(2, 2), "second": [torch.ones(2), torch.ones(2)], "flag": True},
         ["first", "second_0", "second_1"]),
    ],
)  # fmt: skip
def test_inputs_have_the_names_of_arguments(sample, names):
    assert list(call_of(Two(), sample).inputs(Two())) == names


def test_one_row_becomes_two():
    call = call_of(Two(), {"first": torch.ones(1, 2), "second": torch.ones(3)})
    assert call.kwargs["first"].shape == (2, 2)
    assert call.kwargs["second"].shape == (3,)


def test_what_is_not_a_sample():
    with pytest.raises(ValueError, match="sample is a int, expected a tensor, a tuple or a dict"):
        call_of(Two(), 3)
    with pytest.raises(ValueError, match="sample holds no tensor"):
        call_of(Two(), {"flag": True})


def test_models_of_transformers_have_inputs_of_their_own(tiny_llama):
    call = call_of(tiny_llama(), None)
    assert not call.is_real
    assert call.kwargs["use_cache"] is False
    assert [*call.inputs(tiny_llama())] == ["input_ids"]
    assert "labels" not in call_of(tiny_llama(), Call((), {**call.kwargs, "labels": torch.ones(2, 2)})).kwargs


def test_outputs_by_name():
    a, b = torch.ones(1), torch.ones(2)
    assert named_tensors(a) == {"output": a}
    assert named_tensors({"x": a, "y": (a, {"z": b}), "n": None}) == {"x": a, "y_0": a, "y_1_z": b}
