"""The scales of SmoothQuant are those of the paper, shared by all layers of one source."""

import copy

import pytest
import torch

from lightning_compress import SmoothQuantModifier, compress
from lightning_compress.modifiers.smoothing.smoothquant import smoothing_scale
from tests.support.smoothing_models import C, batches, build, ignore, output, targets


def smoothed(name, data, **arguments):
    model = build(name)
    dense = copy.deepcopy(model)
    compress(model, SmoothQuantModifier(targets=targets(name), ignore=ignore(model), **arguments), data)
    return model, dense


def test_the_scales_are_those_of_the_paper():
    data = batches("relu")
    model, dense = smoothed("relu", data, smoothing_strength=0.75)
    inputs = []
    handle = dense[0].fc1.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].reshape(-1, C)))
    for batch in data:
        output(dense, batch)
    handle.remove()
    x, w = torch.cat(inputs).abs().amax(0), dense[0].fc1.weight.detach().abs().amax(0)
    s = x**0.75 / w**0.25
    assert torch.allclose(dense[0].norm.weight / s, model[0].norm.weight, rtol=1e-4)
    assert torch.allclose(dense[0].norm.bias / s, model[0].norm.bias, rtol=1e-4)


def test_layers_of_one_source_share_the_scale_of_all_their_weights():
    model, dense = smoothed("llama", batches("llama"))
    layer, before = model.model.layers[0], dense.model.layers[0]
    s = before.input_layernorm.weight / layer.input_layernorm.weight
    for name in ("q_proj", "k_proj", "v_proj"):
        W, W_before = (m.self_attn.get_submodule(name).weight for m in (layer, before))
        factor = W / W_before
        if name == "v_proj":  # a source itself: rows are divided
            factor = factor / factor[:, :1] * s[0]
        assert torch.allclose(factor, s.expand_as(W), rtol=1e-3)


def test_the_formula():
    x, w = torch.tensor([4.0, 9.0, 0.0, 5.0]), torch.tensor([1.0, 4.0, 2.0, 0.0])
    assert torch.allclose(smoothing_scale(x, w, 0.5), torch.tensor([2.0, 1.5, 1.0, 1.0]))
    assert torch.allclose(smoothing_scale(x, w, 1.0), torch.tensor([4.0, 9.0, 1.0, 1.0]))
    assert torch.allclose(smoothing_scale(x, w, 0.0), torch.tensor([1.0, 0.25, 1.0, 1.0]))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"smoothing_strength": 1.5}, "smoothing_strength=1.5"),
    ({"smoothing_strenght": 0.5}, "did you mean 'smoothing_strength'"),
    ({"mappings": []}, "mappings is empty"),
    ({"mappings": ["fc1"]}, r"mappings\[0\]='fc1': expected"),
])  # fmt: skip
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SmoothQuantModifier(**arguments)
