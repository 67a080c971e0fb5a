import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import lightning_compress as lc
from lightning_compress.layers.matrix import (
    as_matrix,
    check_weights_work,
    input_layout,
    inputs_as_rows,
    is_embedding,
    is_supported,
    partitions,
    values_of_input,
    write_matrix,
)

CONVS = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    nn.Conv2d(4, 6, 2, padding="same"),  # an even kernel pads more on the right
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv2d(4, 8, 3, groups=4),  # depthwise
    nn.Conv1d(4, 6, 3, stride=2, padding=1),
    nn.Conv1d(4, 6, 2, padding="same", dilation=3),
    nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect", groups=2),
    nn.ConvTranspose2d(4, 6, 2, stride=2),  # of a UNet
    nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2)),
    nn.ConvTranspose2d(4, 6, 3, stride=2, padding=2, groups=2),
    nn.ConvTranspose2d(4, 8, 3, groups=4),  # depthwise
    nn.ConvTranspose2d(4, 6, 1, padding=1),  # cuts the edge of its input
    nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1),
    nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=2, output_padding=1, groups=2),
]
TRANSPOSED = [conv for conv in CONVS if conv.transposed]


def inputs_of(module: nn.Module) -> torch.Tensor:
    return torch.randn(3, 4, 11, 9) if len(module.kernel_size) == 2 else torch.randn(3, 4, 11)


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_a_convolution_is_its_matrix_times_its_rows(conv):
    x = inputs_of(conv)
    W_RC, X_PNC, P = as_matrix(conv), inputs_as_rows(conv, x), partitions(conv)
    y = torch.cat([X @ W.t() for X, W in zip(X_PNC, W_RC.chunk(P), strict=True)], -1) + conv.bias
    assert_close(
        y.view(3, -1, 6 if conv.out_channels == 6 else 8).mT, conv(x).detach().flatten(2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_the_second_moment_is_the_gradient_of_the_energy(conv):
    """d/dW of ||W x||^2 / 2 is W X^T X: autograd and unfold must agree on X^T X."""
    x, P = inputs_of(conv), partitions(conv)
    weight = conv.weight.detach().clone().requires_grad_()
    torch.func.functional_call(
        conv, {"weight": weight, "bias": torch.zeros_like(conv.bias)}, (x,)
    ).square().sum().backward()
    H_PCC = inputs_as_rows(conv, x).mT @ inputs_as_rows(conv, x)
    expected = torch.cat([W @ H for W, H in zip(as_matrix(conv).chunk(P), H_PCC, strict=True)])
    assert_close(as_matrix(conv, like=weight.grad) / 2, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("conv", TRANSPOSED, ids=str)
def test_rows_of_a_transposed_convolution_are_those_of_its_linear_map(conv):
    """The map as one large matrix, from basis inputs: entry (o, i) is the weight that joins them."""
    shape = (4, 3, 3) if len(conv.kernel_size) == 2 else (4, 5)
    with torch.no_grad():  # every weight is a number of its own
        conv.weight.copy_(torch.randperm(conv.weight.numel()).view(conv.weight.shape) + 1.0)
    basis = torch.eye(math.prod(shape)).view(-1, *shape)
    columns = [F.conv_transpose2d, F.conv_transpose1d][len(shape) == 2](
        basis, conv.weight, None, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
    ).flatten(2)  # [inputs, R, places]
    x = torch.randn(shape)
    W_RC, X_PNC = as_matrix(conv), inputs_as_rows(conv, x)
    rows_in_part = len(W_RC) // partitions(conv)
    for r in range(len(W_RC)):
        for n in range(columns.shape[2]):
            expected = {w: x.flatten()[i] for i, w in enumerate(columns[:, r, n].tolist()) if w}
            row = zip(W_RC[r].tolist(), X_PNC[r // rows_in_part, n], strict=True)
            assert {w: value for w, value in row if value} == expected


@pytest.mark.parametrize("conv", TRANSPOSED, ids=str)
def test_the_range_of_an_input_ignores_the_zeros_of_the_stride(conv):
    x = inputs_of(conv).abs() + 1
    assert torch.equal(values_of_input(conv, x), x)
    assert inputs_as_rows(conv, x).min() == 0 or conv.kernel_size == (1, 1)


def test_a_convolution_may_lack_the_batch():
    conv = nn.Conv2d(4, 6, 3)
    x = torch.randn(4, 7, 7)
    assert torch.equal(inputs_as_rows(conv, x), inputs_as_rows(conv, x[None]))


def test_the_conv1d_of_transformers_is_a_transposed_linear():
    layer, x = Conv1D(6, 4), torch.randn(2, 5, 4)  # nf = 6 outputs, nx = 4 inputs
    assert as_matrix(layer).shape == (6, 4)
    assert_close(inputs_as_rows(layer, x)[0] @ as_matrix(layer).t() + layer.bias, layer(x).reshape(10, 6))


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), Conv1D(6, 4), *CONVS[:1], *CONVS[-4:]], ids=str)
def test_writing_back_what_was_read_changes_nothing(layer):
    before = layer.weight.detach().clone()
    W_RC = as_matrix(layer).clone()
    write_matrix(layer, W_RC + 1)
    assert torch.equal(layer.weight, before + 1)
    write_matrix(layer, W_RC)
    assert torch.equal(layer.weight, before)
    assert layer.weight.requires_grad


def test_a_class_that_is_only_called_conv1d_is_not_transposed():
    conv = nn.Conv1d(2, 3, 1)
    assert as_matrix(conv).shape == (3, 2)


def test_padding_rows_are_left_out():
    layer, x = nn.Linear(4, 6), torch.arange(24.0).view(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.stack([x[0, 0], x[0, 1], x[1, 0]])
    assert torch.equal(inputs_as_rows(layer, x, mask)[0], expected)
    assert torch.equal(inputs_as_rows(layer, x.view(6, 4), mask)[0], expected)  # tokens flattened, as routers do
    assert inputs_as_rows(layer, x[:, :2], mask).shape == (1, 4, 4)  # other tokens: taken whole
    assert inputs_as_rows(layer, x[:, 0], mask).shape == (1, 2, 4)


def test_layouts_tell_windows_apart():
    assert input_layout(nn.Linear(4, 6)) == input_layout(nn.Linear(4, 2))
    assert input_layout(nn.Conv2d(4, 6, 3)) == input_layout(nn.Conv2d(4, 2, 3))
    assert input_layout(nn.Conv2d(4, 6, 3)) != input_layout(nn.Conv2d(4, 6, 3, padding=1))


def test_other_layers_are_refused():
    assert not is_supported(nn.ConvTranspose3d(2, 3, 1))
    assert not is_supported(nn.Embedding(3, 4))  # a matrix, but one that multiplies nothing
    assert not is_embedding(nn.Linear(3, 4))
    assert not is_supported(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    with pytest.raises(
        ValueError, match="weight of a Bilinear as a matrix; expected Linear, Conv1d, Conv2d, ConvTranspose1d, Conv"
    ):
        as_matrix(nn.Bilinear(3, 4, 5))


@pytest.mark.parametrize("table", [nn.Embedding(6, 4), nn.EmbeddingBag(6, 4)], ids=str)
def test_a_row_of_an_embedding_is_what_a_token_looks_up(table):
    assert is_embedding(table)
    W_RC = as_matrix(table).clone()
    tokens = torch.tensor([[5], [0], [2]])
    assert torch.equal(table(tokens).reshape(3, 4), W_RC[tokens[:, 0]])
    write_matrix(table, 2 * W_RC)
    assert torch.equal(table(tokens).reshape(3, 4), 2 * W_RC[tokens[:, 0]])


def test_unfold_order_is_the_order_of_the_weight():
    conv = nn.Conv2d(2, 1, 2, bias=False)
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert torch.equal(inputs_as_rows(conv, x)[0, 0], x.flatten())
    assert_close(F.linear(inputs_as_rows(conv, x)[0], as_matrix(conv)).flatten(), conv(x).detach().flatten())


def with_weight(weight: torch.Tensor | None, register: str | None = "parameter") -> nn.Linear:
    layer = nn.Linear(32, 32)
    del layer.weight
    if register == "parameter":
        layer.weight = nn.Parameter(weight, requires_grad=False)
    elif register == "buffer":
        layer.register_buffer("weight", weight)
    else:
        layer.weight = weight
    return layer


def under_inference_mode() -> nn.Linear:
    with torch.inference_mode():
        return nn.Linear(32, 32)


def dynamic(layer: nn.Linear) -> nn.Module:
    return quantize_dynamic(nn.Sequential(layer))[0]


W = torch.ones(32, 32)
ODD = {  # what it says of the weight; how to make it
    "weight_norm computes its weight; call torch.nn.utils.remove_weight_norm": lambda: weight_norm(nn.Linear(32, 32)),
    "spectral_norm computes its weight; call torch.nn.utils.remove_spectral": lambda: spectral_norm(nn.Linear(32, 32)),
    "prune computes its weight; call torch.nn.utils.prune.remove": lambda: prune.identity(nn.Linear(32, 32), "weight"),
    "its weight is a buffer, not a Parameter": lambda: with_weight(W, "buffer"),
    "its weight is a plain attribute, not a Parameter": lambda: with_weight(W, "attribute"),
    "its weight is a method, as in modules that torch.ao": lambda: dynamic(nn.Linear(32, 32)),
    "its weight is on the meta device": lambda: nn.Linear(32, 32, device="meta"),
    r"its weight has shape \[0, 32\], so there is nothing in it": lambda: with_weight(W[:0]),
    "its weight is complex64, expected float16, bfloat16": lambda: with_weight(W.to(torch.complex64)),
    "its weight is float8_e4m3fn, expected": lambda: with_weight(W.to(torch.float8_e4m3fn)),
    "its weight is int8, expected": lambda: with_weight(W.to(torch.int8)),
    "the elements of its weight share memory": lambda: with_weight(W[:1].expand(32, 32)),
}
WRITERS = [
    lambda: lc.QuantizationModifier(scheme="W8A16", group_size=-1),
    lambda: lc.GPTQModifier(scheme="W8A16", group_size=-1),
    lambda: lc.AWQModifier(scheme="W4A16", group_size=16),
    lambda: lc.AutoRoundModifier(scheme="W4A16", group_size=16),
    lambda: lc.QATModifier(scheme="W8A16", group_size=-1, start=0),
    lc.SmoothQuantModifier,
    lambda: lc.SparseGPTModifier(sparsity=0.5),
    lambda: lc.WandaPruningModifier(sparsity=0.5),
    lambda: lc.MagnitudePruningModifier(final_sparsity=0.5),
    lambda: lc.MovementPruningModifier(final_sparsity=0.5, end=2),
    lambda: lc.LearnedMaskModifier(end=2),
    lambda: lc.ConstantPruningModifier(start=0),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("message", ODD)
def test_every_modifier_says_why_a_weight_is_none_to_work_with(message):
    for writer in WRITERS:
        layer, modifier = ODD[message](), writer()
        with pytest.raises(ValueError, match=rf"cannot (quantize|smooth|prune) '0' \(Linear\): .*{message}"):
            lc.compress(nn.Sequential(layer, nn.ReLU(), nn.Linear(32, 32)), modifier, [torch.randn(4, 32)])


def test_a_weight_of_inference_mode_is_refused_by_those_that_change_it_in_place():
    layer = under_inference_mode()
    check_weights_work({"a": layer}, "quantize")
    with pytest.raises(ValueError, match="cannot prune 'a' .Linear.: its weight was made under torch.inference_mode"):
        check_weights_work({"a": layer}, "prune", in_place=True)


def test_layers_with_the_same_fault_are_named_together():
    layers = {name: nn.Linear(2, 2, device="meta") for name in "abc"}
    with pytest.raises(ValueError, match=r"cannot prune 'a' \(Linear\) \(and 2 more: 'b', 'c'\): its weight is on"):
        check_weights_work(layers, "prune")


def test_a_scripted_model_is_refused_as_such():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="match nothing, since the model is scripted"):
        lc.compress(scripted, lc.QuantizationModifier(scheme="W8A16", group_size=-1))
