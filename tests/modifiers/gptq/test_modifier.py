"""GPTQ against the algorithm that it shortens (OBQ with an explicit inverse), against other forms, and in the walk."""

import warnings

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lightning_compress.core import Event, EventType, Lifecycle, State
from lightning_compress.layers.matrix import as_matrix, inputs_as_rows
from lightning_compress.layerwise.factor import factorize
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.gptq.solver import round_columns
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.scales import minmax
from tests.support.quantization_runs import attention, batches, calibrate, correlated, inputs_of, made, weights

FACTORIZE = "lightning_compress.layerwise.factor.factorize"


def grid(bits: int = 4, group: int = 16, symmetric: bool = True) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, group_size=group, symmetric=symmetric)


def test_the_walk_solves_each_module_with_its_own_inputs():
    model, data = attention(), batches()
    dense, X = weights(model), inputs_of(model, data)
    ledger = calibrate(model, made(scale_search="minmax"), data)
    for name in "qkvo":
        W, H, args = dense[f"{name}.weight"], X[name].t() @ X[name] / len(X[name]), grid()
        scale, zero = minmax(W, args)
        expected, _ = round_columns(W, scale, zero, args, factorize(H, 0.01, True))
        assert_close(model.get_parameter(f"{name}.weight"), expected, msg=name)
        assert torch.equal(Quantized.of(model.get_submodule(name)).scale, scale)
    assert [row.module for row in ledger] == ["q", "k", "v", "o"]


def test_the_ledger_tells_the_truth():
    model, data = attention(), batches()
    dense, X = weights(model), inputs_of(model, data)
    ledger = calibrate(model, made(), data)
    for row in ledger:
        W, Q = dense[f"{row.module}.weight"].double(), model.get_parameter(f"{row.module}.weight").detach().double()
        x = X[row.module].double()
        assert row.error == pytest.approx(
            float((x @ (W - Q).t()).square().sum() / (x @ W.t()).square().sum()), rel=1e-3
        )
        assert row.sqnr_db == pytest.approx(float(10 * (W.square().sum() / (W - Q).square().sum()).log10()), rel=1e-4)
        assert (row.technique, row.tokens, row.scheme, row.flags) == ("gptq", len(x), "W4A16 g16 sym", [])
        assert row.seconds > 0


def test_modules_that_share_their_input_share_the_work(monkeypatch):
    calls = []
    monkeypatch.setattr(FACTORIZE, lambda H, *a: calls.append(len(H)) or factorize(H, *a))
    shared, alone = attention(), attention()
    calibrate(shared, made(), batches())
    assert calls == [64, 32]
    calls.clear()
    calibrate(alone, made(share_inputs=False), batches())
    assert calls == [64, 64, 64, 32]
    for name, weight in weights(alone).items():
        assert_close(shared.get_parameter(name), weight)


def test_two_schemes_on_one_input_share_the_factor_only(monkeypatch):
    calls = []
    monkeypatch.setattr(FACTORIZE, lambda H, *a: calls.append(len(H)) or factorize(H, *a))
    model, plain = attention(), attention()
    calibrate(model, made(scheme={"W4A16": ["q", "v"], "W8A16": "k"}, ignore=[]), batches())
    assert calls == [64]
    assert [Quantized.of(m).scheme.weights.num_bits for m in (model.q, model.k, model.v)] == [4, 8, 4]
    calibrate(plain, made(targets=["q"], ignore=[]), batches())
    assert_close(model.q.weight, plain.q.weight)


def test_how_tokens_are_batched_changes_nothing():
    whole, parts, (x,) = attention(), attention(), batches(1)
    calibrate(whole, made(), [x])
    calibrate(parts, made(), [x[:1, :7], x[:1, 7:], x[1:, :30], x[1:, 30:]])
    for name, weight in weights(whole).items():
        assert_close(parts.get_parameter(name), weight)


def test_padding_changes_nothing():
    plain, padded, (x,) = attention(), attention(), batches(1)
    calibrate(plain, made(), [x[:1], x[1:, :20]])
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[1, 20:] = False
    ledger = calibrate(padded, made(), [x.masked_fill(~mask[..., None], 100.0)], [mask])
    assert ledger.rows[0].tokens == 68
    for name, weight in weights(plain).items():
        assert_close(padded.get_parameter(name), weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_than_rounding_on_every_module_and_better_still_with_scales_by_the_hessian(bits):
    errors = {}
    data = batches()
    X = inputs_of(attention(), data)
    for name, modifier in {
        "rtn": QuantizationModifier(scheme=f"W{bits}A16", group_size=16, ignore="spare"),
        "minmax": made(scheme=f"W{bits}A16", scale_search="minmax"),
        "mse": made(scheme=f"W{bits}A16", scale_search="mse"),
        "hessian": made(scheme=f"W{bits}A16"),
    }.items():
        model = attention()
        dense = weights(model)
        calibrate(model, modifier, data)
        errors[name] = {
            n: (X[n] @ (dense[f"{n}.weight"] - model.get_parameter(f"{n}.weight")).t()).square().sum().item()
            for n in "qkvo"
        }
    for n in "qkvo":
        assert errors["minmax"][n] < 0.9 * errors["rtn"][n]
        assert errors["hessian"][n] < 0.9 * errors["minmax"][n]
        assert errors["mse"][n] < errors["rtn"][n]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grain", [{"group_size": 16}, {"strategy": "channel"}, {"strategy": "tensor"}], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_weight_is_on_the_grid_that_is_exported(bits, grain, symmetric):
    config = {"g": {"targets": ["q", "o"], "weights": {"num_bits": bits, "symmetric": symmetric, **grain}}}
    model = attention()
    calibrate(model, GPTQModifier(config_groups=config), batches(2))
    for layer in (model.q, model.o):
        record = Quantized.of(layer)
        args = record.scheme.weights
        zero = torch.zeros_like(record.scale, dtype=torch.int8) if record.zero_point is None else record.zero_point
        codes = quantize(layer.weight, record.scale, zero, args, dtype=torch.int8)
        assert codes.min() >= -(2 ** (bits - 1))
        assert codes.max() <= 2 ** (bits - 1) - 1
        assert torch.equal(dequantize(codes, record.scale, zero, args), layer.weight)


def test_weights_on_their_grid_stay_as_they_are():
    model = attention()
    codes = torch.randint(-8, 8, (64, 64))
    codes[:, 0::16], codes[:, 1::16] = -8, 7
    model.q.weight.data = codes * 0.25
    before = model.q.weight.clone()
    calibrate(model, GPTQModifier(scheme="W4A16_ASYM", group_size=16, targets=["q"]), batches(1))
    assert torch.equal(model.q.weight, before)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3)], ids=str
)
def test_convolutions(conv):
    """The output error, measured by the convolution itself, is what the ledger says, and below that of rounding."""
    torch.manual_seed(0)
    conv.reset_parameters()
    model = nn.Sequential(conv)
    dense = conv.weight.detach().clone()
    data = [torch.randn(3, 4, 9, 9) * torch.tensor([5.0, 1, 1, 0.1])[:, None, None] for _ in range(4)]
    data = [x.cumsum(-1) for x in data] if isinstance(conv, nn.Conv2d) else [x[..., 0].cumsum(-1) for x in data]

    def output_error(weight: Tensor) -> float:
        run = lambda w, x: torch.func.functional_call(conv, {"weight": w, "bias": torch.zeros(6)}, (x,)).square().sum()  # noqa: E731
        return float(sum(run(dense - weight, x) for x in data) / sum(run(dense, x) for x in data))

    modifier = GPTQModifier(scheme="W3A16", group_size=-1, targets=[type(conv).__name__])
    (row,) = calibrate(model, modifier, data).rows
    assert row.error == pytest.approx(output_error(conv.weight.detach()), rel=1e-3)
    scale = dense.flatten(1).abs().amax(1) / 3.5
    scale = scale.view(-1, *[1] * (dense.ndim - 1))
    assert row.error < 0.7 * output_error((dense / scale).round().clamp(-4, 3) * scale)


def test_the_conv1d_of_transformers_is_a_transposed_linear():
    torch.manual_seed(0)
    linear, conv1d = nn.Linear(32, 24), Conv1D(24, 32)
    conv1d.weight.data = linear.weight.data.t().clone()
    for layer in (linear, conv1d):
        modifier = GPTQModifier(scheme="W4A16", group_size=16, targets=[type(layer).__name__])
        calibrate(nn.Sequential(layer), modifier, [correlated(100, 32).view(2, 50, 32)])
    assert torch.equal(conv1d.weight.t(), linear.weight)
    assert torch.equal(Quantized.of(conv1d).scale, Quantized.of(linear).scale)


def test_low_precision_weights():
    model = attention().bfloat16()
    calibrate(model, made(scheme="W8A16"), [x.bfloat16() for x in batches(1)])
    record = Quantized.of(model.q)
    assert record.scale.dtype == model.q.weight.dtype == torch.bfloat16
    codes = (model.q.weight.view(64, 4, 16).float() / record.scale[..., None].float()).round()
    assert torch.equal((codes * record.scale[..., None].float()).bfloat16().view(64, 64), model.q.weight)


def test_the_column_order_is_written_into_the_scheme():
    for order, expected in (("static", "static"), ("weight", "weight"), (None, None)):
        model = attention()
        calibrate(model, made(actorder=order), batches(1))
        assert Quantized.of(model.q).scheme.weights.actorder == expected


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_activations_names_module_and_batch(bad):
    data = batches(3)
    data[1][1, 4, 3] = bad
    with pytest.raises(ValueError, match=r"input 1 \(counted from 0\) of 'q' holds NaN or Inf"):
        calibrate(attention(), made(), data)


def few() -> list[Tensor]:
    return [correlated(20, 64).view(1, 20, 64)]


def test_rank_deficient_without_damping_is_an_error_that_says_what_to_do():
    message = (
        r"H of 'q', 'k', 'v' is not positive definite with dampening_frac=0 \(20 tokens for 64 columns\); raise "
        r"dampening_frac .*, calibrate on more tokens, or set on_failure='retry' or 'round'"
    )
    with pytest.raises(ValueError, match=message):
        calibrate(attention(), made(dampening_frac=0), few())


def test_retry_raises_the_damping_and_says_so():
    retried, plain = attention(), attention()
    ledger = calibrate(retried, made(dampening_frac=0, on_failure="retry"), few())
    assert all(row.flags == ["damping raised to 0.01"] for row in ledger)
    calibrate(plain, made(dampening_frac=0.01), few())
    for name, weight in weights(plain).items():
        assert_close(retried.get_parameter(name), weight)


def test_retry_gives_up_beyond_one(monkeypatch):
    tried = []
    monkeypatch.setattr(FACTORIZE, lambda H, dampening, _: tried.append(dampening))
    with pytest.raises(ValueError, match="dampening_frac=1 "):
        calibrate(attention(), made(dampening_frac=0.03, on_failure="retry"), few())
    assert tried == pytest.approx([0.03, 0.3, 1.0])


def test_round_falls_back_and_says_so():
    model, plain = attention(), attention()
    ledger = calibrate(model, made(dampening_frac=0, on_failure="round", scale_search="mse"), few())
    assert all(row.flags == ["H not positive definite; rounded to nearest"] and row.tokens == 20 for row in ledger)
    calibrate(plain, QuantizationModifier(scheme="W4A16", group_size=16, ignore="spare", scale_search="mse"), [])
    for name, weight in weights(plain).items():
        assert torch.equal(model.get_parameter(name), weight)


def test_inputs_that_are_all_zero_are_rounded_to_nearest():
    model, plain = attention(), attention()
    calibrate(model, made(targets=["q"], ignore=[]), [torch.zeros(1, 9, 64)])
    calibrate(plain, QuantizationModifier(scheme="W4A16", group_size=16, targets=["q"]), [])
    assert torch.isfinite(model.q.weight).all()
    assert (model.q.weight - plain.q.weight).abs().max() < Quantized.of(plain.q).scale.max()


def test_modules_that_part_after_sharing():
    class Parting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(16, 16), nn.Linear(16, 16), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.a(x) + self.b(x if self.calls == 1 else x * 2)

    data = [correlated(40, 16).view(2, 20, 16) for _ in range(2)]
    with pytest.raises(ValueError, match="'b' received the same input tensor as 'a' in some .* set share_inputs=False"):
        calibrate(Parting(), GPTQModifier(scheme="W4A16", group_size=16), data)
    assert len(calibrate(Parting(), GPTQModifier(scheme="W4A16", group_size=16, share_inputs=False), data)) == 2


def test_an_input_by_keyword_cannot_be_seen():
    model = attention()
    model.forward = lambda x: model.q(input=x)
    with pytest.raises(ValueError, match="'q' was called with keyword arguments alone"):
        calibrate(model, made(targets=["q"], ignore=[]), batches(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"actorder": "group"}, "compressed-tensors 0.20 dropped it with its weight_g_idx .* use 'static'"),
        ({"actorder": "dynamic"}, "compressed-tensors 0.20 dropped it"),
        ({"actorder": "random"}, "actorder"),
        ({"block_size": 0}, "block_size"),
        ({"dampening_frac": -1}, "dampening_frac"),
        ({"scale_search": "max"}, "scale_search"),
        ({"on_failure": "ignore"}, "on_failure"),
        ({"damp": 1}, "damp"),
    ],
)
def test_arguments_that_do_not_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        made(**arguments)


def test_orders_that_contradict():
    weights = {"num_bits": 4, "group_size": 16, "actorder": "weight"}
    groups = {"g": {"targets": ["q"], "weights": weights}}
    with pytest.raises(ValueError, match="actorder=None of the modifier contradicts actorder=.*weight.* of the scheme"):
        Lifecycle([GPTQModifier(config_groups=groups, actorder=None)]).initialize(State(model=attention()))
    Lifecycle([GPTQModifier(config_groups=groups)]).initialize(State(model=attention()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["Lin"]}, "matches none of the model's 5 modules; did you mean 'Linear'"),
        ({"ignore": ["Linear"]}, "leaves nothing"),
        ({"group_size": 24}, r"group_size=24 does not divide the input columns of 'q' \(64\)"),
        ({"group_size": 128}, "group_size=128 is larger than the input columns"),
    ],
)
def test_faults_come_at_initialize(arguments, message):
    with pytest.raises(ValueError, match=message):
        Lifecycle([made(**arguments)]).initialize(State(model=attention()))


def one_pass(model: nn.Module, modifier: GPTQModifier, data: list[Tensor]) -> State:
    """What the walk in lockstep does, by hand, for q, k, v and o of the little attention."""
    lifecycle, state = Lifecycle([modifier]), State(model=model)
    lifecycle.initialize(state)
    lifecycle.emit(state, Event(EventType.CALIBRATION_START))
    outputs: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}

    def ready(name: str, inputs: list[Tensor]) -> list[Tensor]:
        module = model.get_submodule(name)
        for x in inputs:  # every batch arrives ...
            for hook in list(module._forward_pre_hooks.values()):
                hook(module, (x,))
        lifecycle.emit(state.but(modules={name: module}), Event(EventType.MODULE_READY))
        with lifecycle.paused():
            return [module(x) for x in inputs]  # ... and goes on through the finished module

    with torch.no_grad():
        for name in "qkv":
            outputs[name] = ready(name, data)
        mixed = [torch.softmax(q[..., :32] * k, -1) * v for q, k, v in zip(*outputs.values(), strict=True)]
        ready("o", mixed)
    modules = {name: module for name, module in model.named_modules() if name}
    lifecycle.emit(state.but(block=model, modules=modules), Event(EventType.BLOCK_END))
    assert not modifier._pool._of
    lifecycle.emit(state, Event(EventType.CALIBRATION_END))
    lifecycle.finalize(state)
    return state


def test_in_one_pass_modules_reuse_the_statistic_and_the_factor(monkeypatch):
    calls = []
    monkeypatch.setattr(FACTORIZE, lambda H, *a: calls.append(len(H)) or factorize(H, *a))
    model, plain, data = attention(), attention(), batches()
    state = one_pass(model, made(), data)
    assert calls == [64, 32]
    assert [row.module for row in state.ledger] == ["q", "k", "v", "o"]
    calibrate(plain, made(), data)
    for name in "qkv":
        assert_close(model.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert not torch.equal(model.o.weight, plain.o.weight)  # it saw what the finished q, k and v gave


def test_statistics_are_freed_when_they_are_used():
    modifier = made()
    model = attention()
    calibrate(model, modifier, batches(1))
    assert not modifier._pool._of
    assert not modifier._prepared
    assert not modifier.hooked


def test_nothing_is_warned_of_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(attention(), made(), batches(1))


def test_two_runs_give_the_same_bits():
    first, second = attention(), attention()
    for model in (first, second):
        calibrate(model, made(scheme="W3A16"), batches())
    assert all(torch.equal(second.get_parameter(name), weight) for name, weight in weights(first).items())


def test_inference_mode_leaves_weights_that_can_be_trained():
    model = attention()
    with torch.inference_mode():
        calibrate(model, made(), batches(1))
    assert not model.q.weight.is_inference()
    assert not Quantized.of(model.q).scale.is_inference()
    model(batches(1)[0]).sum().backward()
    assert as_matrix(model.q).shape == inputs_as_rows(model.q, batches(1)[0]).shape[2:] * 2


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).eval()


def tokens(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 64, (2, 40), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("walk", ["one_pass", "two_pass", "whole"])
def test_every_walk_quantizes_every_target(walk):
    model = llama()
    ledger = compress(model, GPTQModifier(scheme="W4A16", group_size=16, ignore="lm_head"), tokens(), walk=walk)
    assert len(ledger) == 14
    assert all(not row.flags and row.tokens == 240 and row.error < 0.02 for row in ledger)
    assert Quantized.of(model.lm_head) is None


def test_in_one_pass_every_module_is_solved_with_the_inputs_that_it_gets_in_the_end():
    """All that comes before a module is finished when its H is taken: so H can be found again from the final model."""
    model, dense = llama(), weights(llama())
    modifier = GPTQModifier(scheme="W4A16", group_size=16, scale_search="minmax", ignore="lm_head")
    compress(model, modifier, tokens(), walk="one_pass")
    rows: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if Quantized.of(module) is not None:
            keep = lambda _, args, name=name: rows.setdefault(name, []).append(args[0].flatten(0, 1))  # noqa: E731
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in tokens():
            model(**batch)
    for name, parts in rows.items():
        W, X, args = dense[f"{name}.weight"], torch.cat(parts), grid()
        expected, _ = round_columns(W, *minmax(W, args), args, factorize(X.t() @ X / len(X), 0.01, True))
        off = (model.get_parameter(f"{name}.weight") - expected).abs() > 1e-4
        assert off.float().mean() < 0.01, name  # a code may fall to the other side of a boundary in float32


def test_the_walks_agree_where_they_should():
    """The first block's q, k and v see the same inputs in every walk."""
    models = {}
    for walk in ("one_pass", "two_pass", "whole"):
        models[walk] = llama()
        compress(models[walk], GPTQModifier(scheme="W3A16", group_size=16, ignore="lm_head"), tokens(), walk=walk)
    for name in "qkv":
        first, *others = (m.model.layers[0].self_attn.get_submodule(f"{name}_proj").weight for m in models.values())
        for other in others:
            assert_close(other, first)


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_gptq_is_closer_to_the_dense_model_than_rounding(walk):
    data = [torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(5))]
    with torch.no_grad():
        logits = llama()(data[0]).logits.log_softmax(-1)
        far = {}
        for name, modifier in {
            "rtn": QuantizationModifier(scheme="W3A16", group_size=16, ignore="lm_head"),
            "minmax": GPTQModifier(scheme="W3A16", group_size=16, ignore="lm_head", scale_search="minmax"),
            "hessian": GPTQModifier(scheme="W3A16", group_size=16, ignore="lm_head"),
        }.items():
            model = llama()
            compress(model, modifier, tokens(8), walk=walk)
            got = model(data[0]).logits.log_softmax(-1)
            far[name] = nn.functional.kl_div(got, logits, log_target=True, reduction="sum").item()
    assert far["hessian"] < far["minmax"] < far["rtn"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [1, 2], ids=["linear", "grouped conv"])
def test_no_row_loses_more_than_with_min_max_scales(symmetric, groups):
    """At 2 bits and with strongly correlated inputs the diagonal of H alone shrinks ranges too far."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(64, 24, 1, groups=groups)).eval()
    mix = torch.randn(4, 64)
    data = [torch.randn(4, 32, 4) @ mix + 0.05 * torch.randn(4, 32, 64) for _ in range(3)]
    data = [x.mT.contiguous() for x in data]
    W = as_matrix(model[0]).clone()
    # [P, N, C] of all batches: the H of each partition, with the damping that the modifier adds
    X = torch.cat([inputs_as_rows(model[0], x) for x in data], 1)
    H = X.mT @ X / X.shape[1]
    H += 0.01 * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(H.shape[1])
    losses = {}
    for search in ("hessian", "minmax"):
        with torch.no_grad():
            model[0].weight.copy_(W.view_as(model[0].weight))
        groups_of = {"targets": ["Conv1d"], "weights": {"num_bits": 2, "group_size": 16, "symmetric": symmetric}}
        quantize_it = GPTQModifier(config_groups={"g": groups_of}, scale_search=search)
        compress(nn.Sequential(model), quantize_it, data, walk="whole")
        E = (as_matrix(model[0]) - W).view(groups, -1, H.shape[1])
        losses[search] = ((E @ H) * E).sum(-1).flatten()
        quantized = Quantized.of(model[0])
        grid_of = (quantized.scale, quantized.zero_point, quantized.scheme.weights)
        codes = quantize(as_matrix(model[0]), *grid_of, dtype=torch.int8)
        assert_close(dequantize(codes, *grid_of), as_matrix(model[0]), rtol=1e-6, atol=1e-6)
        Quantized.detach(model[0])
    assert (losses["hessian"] <= losses["minmax"] * 1.0001).all()
    assert losses["hessian"].sum() < 0.95 * losses["minmax"].sum()
