"""What ``load`` returns computes on packed weights: logits, tokens, saving, Trainer.test, sharding, fused siblings."""

import copy
import warnings

import lightning
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.ops.w8a8_gemm.cpu import is_exact
from lightning_compress.quant.packed import PackedLinear, fuse_siblings

SCHEMES = ["W4A16", "W4A16_ASYM", "W3A16", "W8A16", "W8A8", "W4A8", "W4AFP8"]
SCHEMES += ["FP8", "FP8_DYNAMIC", "NVFP4A16", "NVFP4", "MXFP4"]
IDS = torch.arange(24).reshape(2, 12)
LINEARS = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
NAMES = [f"{layer}.{name}" for layer in (0, 1) for name in LINEARS]
needs_int8 = pytest.mark.skipif(not is_exact(), reason="this CPU has no VNNI: int8 products are made dense")
needs_bf16 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU has no packed products in bfloat16"
)
pytestmark = pytest.mark.filterwarnings("ignore:config.json says dtype bfloat16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_llama):
    """By scheme, a folder that ``save`` wrote; float32, and W4A16 and W8A8 in bfloat16."""
    root, found = tmp_path_factory.mktemp("running"), {}
    for scheme in [*SCHEMES, "W4A16 bfloat16"]:
        model = tiny_llama(torch.bfloat16 if "bfloat16" in scheme else torch.float32)
        compress(model, QuantizationModifier(scheme=scheme.split()[0], ignore=["lm_head"]), [{"input_ids": IDS}])
        found[scheme] = save(model, root / scheme.replace(" ", "_"))
    return found


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def packed_names(model):
    return [name.removeprefix("model.layers.") for name, m in model.named_modules() if isinstance(m, PackedLinear)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_logits_are_those_of_the_dense_load(folders, scheme):
    """Where inputs are quantized, sums in another order may move a code: one step of one input, less than 2 %."""
    packed, dense = load(folders[scheme], packed=True), load(folders[scheme], packed=False)
    assert packed_names(packed) == NAMES
    assert packed_names(dense) == []
    tolerance = 1e-5 if "A16" in scheme else 0.02
    difference = logits(packed) - logits(dense)
    assert difference.norm() < tolerance * logits(dense).norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_packed_linear_computes_what_the_dense_one_does(folders, scheme):
    """On equal inputs, so that no code moves."""
    packed, dense = load(folders[scheme], packed=True), load(folders[scheme], packed=False)
    for name in NAMES:
        mine, other = (model.get_submodule(f"model.layers.{name}") for model in (packed, dense))
        x = torch.randn(1, 5, mine.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert_close(mine(x), other(x), rtol=1e-5, atol=1e-5)


def test_by_default_what_the_device_has_a_way_for_is_packed(folders):
    assert packed_names(load(folders["W8A8"])) == (NAMES if is_exact() else [])
    assert packed_names(load(folders["W4A16"])) == []  # float32 tokens: a dense Linear is as quick
    assert packed_names(load(folders["FP8"])) == []
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert packed_names(load(folders["W4A16 bfloat16"])) == (NAMES if fast else [])


@pytest.mark.parametrize("scheme", [*SCHEMES, "W4A16 bfloat16"])
def test_a_packed_model_saves_the_same_bytes(folders, scheme, tmp_path):
    model = load(folders[scheme], packed=True)
    on_disk = load_file(folders[scheme] / "model.safetensors")
    for again in ("before", "after"):  # once again when calls have stacked siblings
        assert model.state_dict().keys() == on_disk.keys()
        save(model, tmp_path / again)
        assert {f.name: f.read_bytes() for f in folders[scheme].iterdir()} == {
            f.name: f.read_bytes() for f in (tmp_path / again).iterdir()
        }
        assert packed_names(model) == NAMES
        logits(model)


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC", "NVFP4"])
def test_generate_gives_the_tokens_of_the_dense_load(folders, scheme):
    assert torch.equal(*(generated(load(folders[scheme], packed=packed)) for packed in (True, False)))


@needs_int8
def test_generate_in_int8_takes_tokens_that_the_dense_load_rates_best(folders):
    """Or within a tenth of the spread of the best: a code that moves may turn a tie."""
    tokens = generated(load(folders["W8A8"]))
    with torch.no_grad():
        rated = load(folders["W8A8"], packed=False)(input_ids=tokens).logits[:, 5:-1]
    taken = rated.gather(-1, tokens[:, 6:, None])[..., 0]
    assert (rated.amax(-1) - taken).max() < 0.1 * rated.std()


def generated(model):
    return model.generate(IDS[:, :6], max_new_tokens=8, do_sample=False, pad_token_id=63)


@needs_int8
def test_siblings_make_one_product(folders, monkeypatch):
    fused, apart = load(folders["W8A8"], fuse=True), load(folders["W8A8"], fuse=False)
    layer = fused.model.layers[0]
    groups = {id(m.siblings): m.siblings for m in fused.modules() if isinstance(m, PackedLinear) and m.siblings}
    assert [len(group.layers) for group in groups.values()] == [3, 2, 3, 2]
    assert layer.self_attn.o_proj.siblings is None
    made = []
    product = PackedLinear.product
    monkeypatch.setattr(PackedLinear, "product", lambda self, x, bias=None: made.append(self) or product(self, x, bias))
    found = logits(fused)
    assert len(made) == 2 * (2 + 2)  # q/k/v, o, gate/up, down
    expected = logits(apart)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    query, key = (layer.self_attn.get_submodule(name).stored("weight") for name in ("q_proj", "k_proj"))
    assert key.untyped_storage().data_ptr() == query.untyped_storage().data_ptr()  # one copy
    state = apart.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in fused.state_dict().items())
    assert torch.equal(logits(copy.deepcopy(fused)), found)
    fused.load_state_dict({name: torch.zeros_like(value) if "k_proj.weight" in name else value
                           for name, value in state.items()})  # fmt: skip
    with torch.no_grad():
        assert layer.self_attn.k_proj(torch.ones(1, 2, 128)).abs().max() == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fused_products_equal_separate_ones(folders, scheme):
    model = load(folders[scheme], packed=True, fuse=False)
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = [getattr(attention, f"{name}_proj")(x) for name in "qkv"]
    groups = fuse_siblings(model, input_ids=IDS)
    if scheme == "FP8":  # one scale for all rows of a weight
        assert groups == []
        return
    assert tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv") in groups
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for found, expected in zip([getattr(attention, f"{name}_proj")(x) for name in "qkv"], apart, strict=True):
                assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_int8
def test_siblings_that_get_another_tensor_are_given_up(folders):
    model = load(folders["W8A8"], fuse=True)
    q, k = model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj
    one, other = torch.randn(1, 2, 128), torch.randn(1, 2, 128)
    with torch.no_grad():
        expected = k.product(other)
        q(one)
        one.add_(1)  # changed in place: it is not the same x
        assert_close(k(one), k.product(one))
        assert q.siblings is None
        assert_close(k(other), expected)


def test_what_cannot_be_fused_is_said(folders):
    with pytest.raises(ValueError, match="nothing to fuse, no Linear of it is packed; or leave fuse out"):
        load(folders["W8A8"], packed=False, fuse=True)
    with pytest.raises(ValueError, match="no packed Linears with equal schemes multiply the same tensor"):
        load(folders["FP8"], packed=True, fuse=True)


def test_nothing_to_pack_is_said(tmp_path, tiny_llama):
    folder = save(tiny_llama(), tmp_path / "dense")
    with pytest.raises(ValueError, match="holds no quantized Linear with a weight of its own; leave packed out"):
        load(folder, packed=True)


class Testing(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def test_step(self, batch, batch_idx):
        self.log("loss", self.model(input_ids=batch, labels=batch).loss)


def test_trainer_test_runs_on_it(folders, tmp_path):
    losses = []
    for packed in (True, False):
        trainer = lightning.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        module = Testing(load(folders["W8A8"], packed=packed))
        losses += [trainer.test(module, torch.utils.data.DataLoader(IDS, 2), verbose=False)[0]["loss"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_fully_sharded(folders, tmp_path):
    """FSDP2 shards parameters; packed weights are buffers and stay whole on each rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = load(folders["W4A16"], packed=True)
    expected = logits(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert_close(logits(model), expected)
        state = model.state_dict()
        assert type(state["model.layers.0.mlp.up_proj.weight_packed"]) is torch.Tensor
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_of_its_own_is_packed_too(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))

    model = build()
    compress(model, QuantizationModifier(targets=["Linear"], scheme="W4A16", group_size=32))
    again = load(save(model, tmp_path / "out"), build(), packed=True)
    assert [type(m) for m in again] == [PackedLinear, nn.ReLU, PackedLinear]
    x = torch.randn(3, 64)
    assert_close(again(x), model.eval()(x))
    with pytest.raises(ValueError, match="not a model of transformers; call quant.packed.fuse_siblings"):
        load(tmp_path / "out", build(), packed=True, fuse=True)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W8A8", "FP8", "NVFP4A16"])
def test_another_dtype_is_that_of_plain_transformers(folders, scheme):
    """Bit for bit: weights and scales are rounded to it where transformers rounds them."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folders[scheme], dtype=torch.bfloat16)
    mine = load(folders[scheme], packed=False, dtype=torch.bfloat16)
    assert {p.dtype for p in mine.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(mine), logits(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = load(folders[scheme], packed=True, dtype=torch.bfloat16)
    assert (logits(packed) - logits(plain)).norm() < 0.02 * logits(plain).norm()


@needs_bf16
def test_what_another_dtype_would_pack_is_said(folders, tmp_path):
    message = (
        r"packed 0 of 14 quantized modules; 14 stay dense: this cpu has no packed product in float32; "
        r"load\(folder, dtype=torch.bfloat16\) packs 14 of them, packed=False keeps all dense without this warning"
    )
    with pytest.warns(UserWarning, match=message):
        load(folders["W4A16"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packed_names(load(folders["W4A16"], dtype=torch.bfloat16)) == NAMES
        load(folders["W4A16"], packed=False)
    again = save(load(folders["W4A16"], dtype=torch.bfloat16), tmp_path / "again")
    assert torch.equal(logits(load(again)), logits(load(folders["W4A16"], dtype=torch.bfloat16)))


def test_what_was_packed_is_logged(folders, caplog):
    with caplog.at_level("INFO"):
        load(folders["W4A16"], packed=True)
    assert "packed 14 of 14 quantized modules" in caplog.text


def test_no_dtype_is_advised_for_a_model_that_was_handed_in(folders, tiny_llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folders["W4A16"], tiny_llama())


def test_a_dtype_is_for_models_that_are_built_here(folders, tiny_llama):
    for model, dtype in ((tiny_llama(), torch.bfloat16), (None, torch.int8)):
        with pytest.raises(ValueError, match=rf"dtype={dtype} is for a model of transformers that is built here"):
            load(folders["W4A16"], model, dtype=dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packed", [False, True])
def test_onnx_runtime_computes_the_same_for_dynamic_scales(tmp_path, packed):
    for needed in ("onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    import onnxruntime

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)).eval()

    net, x = build(), torch.randn(4, 1, 8, 8)
    compress(net, QuantizationModifier(scheme="W8A8", targets=["Linear", "Conv2d"]), [x])
    net = load(save(net, tmp_path / "net"), build(), packed=packed)
    batch = ({0: torch.export.Dim("batch", min=2)},)
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False, dynamic_shapes=batch)
    session, other = onnxruntime.InferenceSession(tmp_path / "net.onnx"), torch.randn(7, 1, 8, 8)
    (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert_close(torch.from_numpy(y), net(other).detach(), rtol=1e-5, atol=1e-6)
