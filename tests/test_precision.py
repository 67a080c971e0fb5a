"""Every modifier in every precision of the Trainer: what comes out is what the same weights give without a Trainer.

Those that act while training are run for two steps: what they leave is exported, and reloads equal.

16-mixed is not among them: torch has no autocast to float16 on the CPU of this suite.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_compress as lc
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.callback import CompressionCallback
from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.layerwise.input_hessian import InputHessian
from lightning_compress.modifiers.gptq import modifier as solver_file
from lightning_compress.quant.record import Quantized
from lightning_compress.training.options import CallbackOptions
from lightning_compress.training.post_training import PostTraining

DTYPES = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "64-true": torch.float64,
}
BATCHES, IDS = 2, torch.randint(0, 32, (2, 4, 12), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def llama(kind: str = "Llama", **settings: Any) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, tie_word_embeddings=False, **settings)
    return spread(getattr(transformers, f"{kind}ForCausalLM")(config).eval())


def mixture() -> nn.Module:
    return llama("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    return net


def spread(model: nn.Module) -> nn.Module:
    """Weights far enough apart for a model that answers."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 8
    return model


def made(name: str, **arguments: Any) -> Any:
    """What makes such a modifier."""
    return lambda: getattr(lc, f"{name}Modifier")(**arguments)


W4 = {"scheme": "W4A16", "group_size": 16}
AFTER = {  # what acts after training: model, modifier
    "gptq-w4": (llama, made("GPTQ", **W4, ignore=["lm_head"])),
    "gptq-w8a8": (llama, made("GPTQ", scheme="W8A8")),
    "gptq-refine": (llama, made("GPTQ", **W4, refine=True, dampening_frac="auto")),
    "rtn-fp8": (llama, made("Quantization", scheme="FP8")),
    "rtn-nvfp4": (llama, made("Quantization", scheme="NVFP4")),
    "rtn-mse": (llama, made("Quantization", **W4, scale_search="mse")),
    "rtn-imatrix": (llama, made("Quantization", **W4, scale_search="imatrix")),
    "rtn-hessian": (llama, made("Quantization", **W4, scale_search="hessian")),
    "rtn-w8a8-mixture": (mixture, made("Quantization", scheme="W8A8")),
    "rtn-w8a8-images": (convolutions, made("Quantization", scheme="W8A8", targets=["Conv2d"])),
    "awq": (llama, made("AWQ", **W4)),
    "smoothquant": (llama, made("SmoothQuant")),
    "equalization": (llama, made("LogarithmicEqualization")),
    "autoround": (llama, made("AutoRound", **W4, iters=3)),
    "sparsegpt": (llama, made("SparseGPT", sparsity=0.5)),
    "wanda": (llama, made("WandaPruning", sparsity=0.5)),
    "wanda-refined": (llama, made("WandaPruning", mask_structure="2:4", regional_rounds=1, regional_steps=2)),
    "magnitude": (llama, made("MagnitudePruning", final_sparsity=0.5)),
    "structured": (llama, made("StructuredPruning", ratio=0.25, importance="activation")),
    "structured-channels": (convolutions, made("StructuredPruning", ratio=0.25, dimension="channels")),
    "depth": (llama, made("DepthPruning", count=1)),
    "batch-norm": (convolutions, made("FoldBatchNorm")),
    "kv-cache": (llama, made("KVCache")),
    "reap": (mixture, made("REAP", sparsity=0.25)),
    "rotation": (llama, made("Rotation")),
    "spinquant": (llama, made("SpinQuant")),
    "quip": (llama, made("QuIP", rotations=["R1", "R2"])),
    "rotation-learned": (llama, made("Rotation", learn=True, learn_steps=2)),
}


SET_UP = {"batch-norm"}  # acts before the Trainer casts the model


def batches_of(model: nn.Module) -> Tensor:
    return IMAGES if isinstance(model, nn.Sequential) else IDS


class Module(LightningModule):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        answer = self.model(batch)
        return getattr(answer, "logits", answer).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(batches_of(self.model), batch_size=None)

    calibration_dataloader = train_dataloader


def in_trainer(
    model: nn.Module, modifier: Any, precision: Any, folder: Path, epochs: int = 0, **options: Any
) -> nn.Module:
    callback = CompressionCallback(modifier, calibration_batches=BATCHES, evaluate=False, load_best=False, **options)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = Trainer(
        precision=precision, max_epochs=epochs, callbacks=[callback], default_root_dir=folder,
        enable_checkpointing=False, **quiet,
    )  # fmt: skip
    trainer.fit(Module(model))
    return model


def by_hand(model: nn.Module, modifier: Any) -> nn.Module:
    batches = batches_of(model)
    dtype = next(model.parameters()).dtype
    lc.compress(model, modifier, list(batches.to(dtype) if batches.is_floating_point() else batches))
    return model


def contents(model: nn.Module) -> dict[str, Tensor]:
    """Weights, buffers, and all tensors of the records of quantization."""
    records = {name: record for name, (_, record) in Quantized.find(model).items()}
    fields = {f"{name} {f}": value for name, record in records.items() for f, value in vars(record).items()}
    return {**model.state_dict(), **{name: value for name, value in fields.items() if isinstance(value, Tensor)}}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = contents(one), contents(other)
    assert ours.keys() == theirs.keys()
    differ = [n for n, t in ours.items() if t.dtype != theirs[n].dtype or not torch.equal(t, theirs[n])]
    assert not differ, f"{len(differ)} of {len(ours)} tensors differ, such as {differ[:3]}"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def pairs(rows: Iterable[str], columns: Iterable[Any], quick: Any) -> list[Any]:
    """All of them; slow but for one column, and for the modifiers that stand for the others."""
    few = {"gptq-w4", "rtn-imatrix", "smoothquant", "sparsegpt"}
    cannot = {("reap", "64-true")}  # torch's grouped product of experts takes no float64
    cells = [cell for cell in product(rows, columns) if cell not in cannot]
    marks = {(r, c): () if c == quick or r in few else pytest.mark.slow for r, c in cells}
    return [pytest.param(r, c, marks=mark, id=f"{r}-{c}") for (r, c), mark in marks.items()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "precision"), pairs(AFTER, DTYPES, "bf16-true"))
def test_a_trainer_in_this_precision_gives_what_compress_gives(name, precision, tmp_path):
    build, modifier = AFTER[name]
    dtype = DTYPES[precision]
    expected = by_hand(build(), modifier()).to(dtype) if name in SET_UP else by_hand(build().to(dtype), modifier())
    assert_same(in_trainer(build(), modifier(), precision, tmp_path), expected)
    assert torch.get_default_dtype() == torch.float32


MIXED = [
    "gptq-w4",
    "rtn-imatrix",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("awq", "smoothquant", "wanda", "rotation-learned")),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MIXED)
def test_mixed_precision_calibrates_the_model_as_it_was_trained_where_that_is_asked_for(name, tmp_path, monkeypatch):
    build, modifier = AFTER[name]
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_hand(build(), modifier())
    dtypes, update = set(), InputHessian.update
    monkeypatch.setattr(InputHessian, "update", lambda self, X: dtypes.add(X.dtype) or update(self, X))
    options = {"calibration_precision": "trained"}
    assert_same(in_trainer(build(), modifier(), "bf16-mixed", tmp_path, **options), expected)
    assert dtypes <= {torch.bfloat16}
    assert dtypes or name in ("rtn-imatrix", "smoothquant", "rotation-learned")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("choice", "device", "mixed"), [
    ("auto", "cuda", True), ("auto", "cpu", False), ("trained", "cpu", True), ("float32", "cuda", False),
])  # fmt: skip
def test_which_precision_calibrates_a_model_of_mixed_precision(choice, device, mixed):
    options = CallbackOptions(CalibrationOptions(calibration_precision=choice))
    trainer = SimpleNamespace(precision_plugin=MixedPrecision("bf16-mixed", "cpu"))
    module = SimpleNamespace(device=torch.device(device))
    post = PostTraining(trainer, module, None, None, SimpleNamespace(options=options), None, {})
    for as_trained in (post._calibrates_as_trained, False):
        with post._precision(as_trained):
            assert torch.is_autocast_enabled("cpu") == (mixed and as_trained)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_solver_multiplies_in_float32_whatever_the_model_may(precision, monkeypatch):
    seen = []

    def noting(function: Any) -> Any:
        return lambda *args, **kwargs: seen.append(torch.get_float32_matmul_precision()) or function(*args, **kwargs)

    for name in ("factorize_retrying", "output_error"):
        monkeypatch.setattr(solver_file, name, noting(getattr(solver_file, name)))
    model, forwards = llama(), set()
    model.register_forward_hook(lambda *_: forwards.add(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision(precision)
    try:
        by_hand(model, AFTER["gptq-w4"][1]())
        assert (len(seen), {*seen}, forwards) == (22, {"highest"}, {precision})
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "dtype"), pairs(AFTER, [torch.bfloat16, torch.float64], None))
def test_the_default_dtype_changes_nothing(name, dtype):
    build, modifier = AFTER[name]
    expected, model = by_hand(build(), modifier()), build()
    with default_dtype(dtype), warnings.catch_warnings():
        by_hand(model, modifier())
    assert_same(model, expected)


WINDOW = {"start": 0, "end": 2}
TRAINING = {  # what acts while the model trains
    "qat-w4": (llama, made("QAT", **W4, start=0)),
    "qat-w8a8": (llama, made("QAT", scheme="W8A8", start=0)),
    "magnitude": (llama, made("MagnitudePruning", final_sparsity=0.5, **WINDOW)),
    "movement": (llama, made("MovementPruning", final_sparsity=0.5, **WINDOW)),
    "learned-mask": (llama, made("LearnedMask", **WINDOW)),
    "constant": (llama, made("ConstantPruning", start=0)),
    "freeze": (llama, made("Freeze", targets=["lm_head"])),
    "structured": (llama, made("StructuredPruning", ratio=0.25, importance="taylor", start=1)),
    "depth": (llama, made("DepthPruning", count=1, start=1)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "precision"), pairs(TRAINING, DTYPES, "bf16-true"))
def test_what_acts_while_training_does_so_in_this_precision(name, precision, tmp_path):
    build, modifier = TRAINING[name]
    model = in_trainer(build(), modifier(), precision, tmp_path, epochs=1)
    assert next(model.parameters()).dtype == DTYPES[precision]
    assert all(tensor.isfinite().all() for tensor in contents(model).values())
    assert_same(load(tmp_path / "compressed", packed=False), model)


F64 = [{"scheme": "W4A16", "group_size": 16}, {"scheme": "W8A16", "group_size": -1}, {"scheme": "W8A8"},
       {"scheme": "W4A16_ASYM", "group_size": 16}, {"scheme": "FP8_DYNAMIC"}, {"scheme": "FP8"},
       {"scheme": "NVFP4"}]  # fmt: skip


@pytest.mark.parametrize("name", ["Quantization", "GPTQ"])
@pytest.mark.parametrize("arguments", F64, ids=lambda a: a["scheme"])
def test_a_float64_model_is_rounded_as_a_float64_reader_multiplies(name, arguments, tmp_path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)).double()

    torch.manual_seed(1)
    batches, model = list(torch.randn(3, 8, 32, dtype=torch.float64)), net()
    lc.compress(model, made(name, **arguments)(), batches, walk="whole")
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved", net(), packed=False)
    assert_same(loaded, model)
    assert torch.equal(loaded(batches[0]), model(batches[0]))


def records_are_finite(model: nn.Module) -> bool:
    """Scales above 0 and finite, in the weight and in the record."""
    records = [record for _, record in Quantized.find(model).values()]
    scales = [getattr(record, name) for record in records for name in SCALES]
    return all(bool((scale.isfinite() & (scale.float() > 0)).all()) for scale in scales if scale is not None)


SCALES = ("scale", "global_scale", "input_scale", "input_global_scale")
DEAD = [("Quantization", "NVFP4"), ("Quantization", "FP8"), ("GPTQ", "NVFP4"), ("GPTQ", "W8A8")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "scheme"), DEAD)
def test_experts_that_see_zeros_or_nothing_get_finite_scales_and_a_flag(name, scheme, tmp_path):
    model = mixture()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[0, :32] = 0  # silu(0) * up: what down_proj gets is 0
    ignore, batches = ["lm_head", "re:.*gate$"], [IDS[0][:1, :2]]  # two tokens: some experts get none
    batches.append(torch.arange(32)[None])  # ... but the first one does get some
    ledger = lc.compress(model, made(name, scheme=scheme, ignore=ignore)(), batches, moe_calibrate_all_experts=True)
    flagged = [row.module for row in ledger if any("its input was 0 throughout" in flag for flag in row.flags)]
    assert flagged == ["model.layers.0.mlp.experts.0.down_proj"]
    assert records_are_finite(model)
    save(model, tmp_path / "saved")
    with torch.no_grad():
        assert load(tmp_path / "saved")(input_ids=IDS[0]).logits.isfinite().all()


FP16 = ["gptq-w4", "gptq-w8a8", "rtn-imatrix", "rtn-fp8", "rtn-nvfp4", "awq", "smoothquant", "sparsegpt"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", [0.0, -3.0], ids=["large", "negative means"])
@pytest.mark.parametrize("name", FP16)
def test_float16_activations_of_30000_and_negative_means_leave_finite_weights(name, bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 16)).half()
    net[0].weight.data.fill_(1.0 if bias else 1e4)
    net[0].bias.data.fill_(bias)
    net[1].weight.data.mul_(0.02)
    modifier = AFTER[name][1]()
    if "ignore" in modifier.model_fields_set:
        modifier.ignore = []
    lc.compress(net, modifier, [torch.randn(64, 32).half() for _ in range(3)], walk="whole")
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert records_are_finite(net)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Quantization", "GPTQ"])
@pytest.mark.parametrize("arguments", [W4, {"scheme": "W8A8"}], ids=["W4A16", "W8A8"])
def test_every_tensor_of_a_model_of_several_dtypes_keeps_its_own(name, arguments, tmp_path):
    model = llama().to(torch.bfloat16)
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    model.lm_head.weight.data = model.lm_head.weight.data.float()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    lc.compress(model, made(name, **arguments, ignore=["lm_head"])(), list(IDS))
    save(model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    for key in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"):
        assert stored[key].dtype == before[key].dtype
        assert torch.equal(stored[key], before[key])
    assert {t.dtype for n, t in stored.items() if n.endswith("weight_scale")} == {torch.bfloat16}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(model.state_dict()[n].dtype == t.dtype for n, t in before.items())
