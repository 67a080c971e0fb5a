"""Every technique on a pretended GPU: no two devices meet, from calibration to the loaded model, at a stated cost.

Costs are those of ``compress`` for a Llama of two blocks and two batches, divided by its 14 Linears. A bound is the
measured number and a tenth more: lower it when a change makes it too high, and say why when it must become higher. AWQ
and SmoothQuant have a bound of their own for synchronizations: they find their pairs by running the first block of each
kind again and again, and compare the results. Of the copies, one per Linear is compressed-tensors' own (a scale of 0 is
replaced by a tensor made from a number).
"""

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lightning_compress as lc
from lightning_compress import (
    AWQModifier,
    GPTQModifier,
    KVCacheModifier,
    MagnitudePruningModifier,
    QuantizationModifier,
    REAPModifier,
    RotationModifier,
    SmoothQuantModifier,
    SparseGPTModifier,
    WandaPruningModifier,
)
from lightning_compress.quant.packed import PackedLinear, backends
from tests.support.fake_cuda import FakeCudaTensor, fake_cuda

LINEARS = 14
SYNCS = 12  # per Linear
PROBED = {"AWQ": 57, "SmoothQuant": 45}

HEAD = {"ignore": ["lm_head"]}
W4 = {"scheme": "W4A16", "group_size": 32, **HEAD}
STATIC = {
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False},
        }
    },
    **HEAD,
}

# name -> modifiers, launches per Linear, copies from pageable memory per Linear
CASES = {
    "GPTQ W4": (lambda: GPTQModifier(**W4), 405, 1.3),
    "GPTQ W4, static order": (lambda: GPTQModifier(actorder="static", **W4), 405, 1.2),
    "GPTQ W4, refined": (lambda: GPTQModifier(refine=True, **W4), 530, 1.3),
    "GPTQ W8A8": (lambda: GPTQModifier(scheme="W8A8", **HEAD), 343, 3.4),
    "GPTQ NVFP4": (lambda: GPTQModifier(scheme="NVFP4A16", **HEAD), 541, 32.7),
    "GPTQ MXFP4": (lambda: GPTQModifier(scheme="MXFP4A16", **HEAD), 241, 10.0),
    "minmax W4": (lambda: QuantizationModifier(**W4), 18, 0),
    "mse W4": (lambda: QuantizationModifier(scale_search="mse", **W4), 323, 1.2),
    "imatrix W4": (lambda: QuantizationModifier(scale_search="imatrix", **W4), 359, 1.2),
    "hessian W4": (lambda: QuantizationModifier(scale_search="hessian", **W4), 731, 1.2),
    "W8A8": (lambda: QuantizationModifier(scheme="W8A8", **HEAD), 18, 0),
    "static W8A8, histogram": (lambda: QuantizationModifier(observer="histogram", **STATIC), 128, 1.2),
    "static W8A8, average": (lambda: QuantizationModifier(observer="moving_average", **STATIC), 71, 1.2),
    "FP8": (lambda: QuantizationModifier(scheme="FP8", **HEAD), 106, 2.4),
    "NVFP4": (lambda: QuantizationModifier(scheme="NVFP4", **HEAD), 278, 4.9),
    "MXFP4": (lambda: QuantizationModifier(scheme="MXFP4", **HEAD), 100, 1.2),
    "SparseGPT 2:4": (lambda: SparseGPTModifier(mask_structure="2:4", **HEAD), 492, 0),
    "SparseGPT": (lambda: SparseGPTModifier(sparsity=0.5, **HEAD), 311, 0),
    "Wanda": (lambda: WandaPruningModifier(sparsity=0.5, **HEAD), 90, 0),
    "magnitude": (lambda: MagnitudePruningModifier(final_sparsity=0.5, **HEAD), 43, 0),
    "AWQ": (lambda: AWQModifier(n_grid=6, **W4), 830, 22.5),
    "SmoothQuant": (lambda: [SmoothQuantModifier(), QuantizationModifier(scheme="W8A8", **HEAD)], 540, 12.4),
    "rotation": (lambda: [RotationModifier(rotations=["R1"]), QuantizationModifier(**W4)], 98, 3.1),
    "KV cache": (lambda: KVCacheModifier(), 48, 0.5),
}


def llama(**sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    two_blocks = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**{**two_blocks, "num_attention_heads": 4, "num_key_value_heads": 2, **sizes})
    return LlamaForCausalLM(config).eval().to(torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def loaded_before(tmp_path_factory):
    """What is imported at the first load must not see the pretended GPU: it would be kept for the whole process."""
    folder = tmp_path_factory.mktemp("before")
    lc.save(llama(), folder / "model")
    lc.load(folder / "model")


def tokens(batches: int) -> list[torch.Tensor]:
    return [torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(batches)]


@pytest.mark.parametrize("name", CASES)
def test_a_technique_stays_on_the_gpu_from_calibration_to_the_loaded_model(name, tmp_path):
    modifiers, launches, copies = CASES[name]
    with fake_cuda() as gpu, torch.no_grad():
        model, batches = llama().to("cuda:0"), [batch.to("cuda:0") for batch in tokens(2)]
        gpu.reset()
        lc.compress(model, modifiers(), batches, offload_device=None)
        costs = {"launches": launches, "syncs": PROBED.get(name, SYNCS), "pageable": copies}
        for kind, bound in costs.items():
            counter = getattr(gpu, kind)
            assert counter.total() <= bound * LINEARS, (kind, counter.total() / LINEARS, counter.most_common(8))
        lc.save(model, tmp_path / "model")
        loaded = lc.load(tmp_path / "model", device="cuda:0")
        logits, expected = (m(batches[0]).logits for m in (loaded, model))
        assert isinstance(logits, FakeCudaTensor)
        assert float((logits - expected).float().norm() / expected.float().norm()) < 0.1


def test_experts_are_removed_on_the_gpu_and_no_expert_is_waited_for(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    )  # fmt: skip
    with fake_cuda() as gpu, torch.no_grad():
        model = Qwen3MoeForCausalLM(config).eval().to("cuda:0")
        batches = [batch.to("cuda:0") for batch in tokens(3)]
        gpu.reset()
        lc.compress(model, REAPModifier(sparsity=0.25), batches, offload_device=None)
        syncs = sum(count for line, count in gpu.syncs.items() if line.startswith("modifiers/reap"))
        assert syncs == 2 * 2 * 3  # of each layer and batch
        lc.save(model, tmp_path / "model")
        loaded = lc.load(tmp_path / "model", device="cuda:0")
        assert_close(loaded(batches[0]).logits.cpu(), model(batches[0]).logits.cpu())


@pytest.mark.parametrize("name", ["GPTQ W4", "static W8A8, histogram", "Wanda"])
def test_a_batch_more_makes_the_host_wait_for_no_statistic(name):
    modifiers, _, _ = CASES[name]
    costs = []
    for count in (2, 5):
        with fake_cuda() as gpu, torch.no_grad():
            model, batches = llama().to("cuda:0"), [batch.to("cuda:0") for batch in tokens(count)]
            gpu.reset()
            lc.compress(model, modifiers(), batches, offload_device=None)
            costs.append((gpu.syncs.copy(), gpu.pageable.copy()))
    (syncs, copies), (more_syncs, more_copies) = costs
    more = more_syncs - syncs
    assert {line.partition(":")[0] for line in more} <= {"calibration/inputs.py", "calibration/activations.py"}, more
    assert more.total() <= 6 * 3  # of a batch: what its calls share with those of the batch before; the model's own
    assert not more_copies - copies


@pytest.mark.parametrize("name", ["GPTQ W4", "Wanda"])
def test_hidden_states_that_go_to_the_host_are_not_read_before_they_arrive(name):
    modifiers, _, _ = CASES[name]
    weights = []
    for place in ("cpu", None):
        with fake_cuda(), torch.no_grad():
            model, batches = llama().to("cuda:0"), [batch.to("cuda:0") for batch in tokens(2)]
            lc.compress(model, modifiers(), batches, offload_device=place)
            weights.append({key: value.cpu() for key, value in model.state_dict().items()})
    assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", pytest.param("NVFP4A16", marks=pytest.mark.slow)])
def test_loading_takes_little_more_memory_of_the_gpu_than_the_folder(scheme, tmp_path, monkeypatch):
    """Without fusing, which runs the model once: without kernels its products are dense. Chunks are small as layers."""
    monkeypatch.setattr(backends, "CHUNK", 2**13)
    model = llama(vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=6)
    lc.compress(model, QuantizationModifier(scheme=scheme, **HEAD))
    lc.save(model, tmp_path / "model")
    folder = sum(file.stat().st_size for file in (tmp_path / "model").iterdir())
    with fake_cuda() as gpu, torch.no_grad():
        loaded = lc.load(tmp_path / "model", device="cuda:0", fuse=False)
        assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == 6 * 7
        assert 0.9 * folder < gpu.live <= gpu.peak <= 1.15 * folder
