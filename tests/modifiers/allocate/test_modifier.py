"""Allocation through whole runs: budgets, modules that must be equal, the file, reuse, errors, export."""

import re
import warnings

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import nn

from lightning_compress import (
    AllocateModifier,
    AutoRoundModifier,
    AWQModifier,
    GPTQModifier,
    QATModifier,
    QuantizationModifier,
    TuneModifier,
    compress,
    load,
    save,
)
from lightning_compress.core import Lifecycle, State
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import describe
from tests.support.architecture_models import ARCHITECTURES
from tests.support.plain_reader import read_by_transformers

CANDIDATES = ["W3A16", "W4A16", "W8A16"]
QUANTIZERS = {
    "gptq": lambda **grid: [GPTQModifier(**grid)],
    "rtn": lambda **grid: [QuantizationModifier(**grid)],
    "rtn by the hessian": lambda **grid: [QuantizationModifier(scale_search="hessian", **grid)],
    "awq": lambda **grid: [AWQModifier(n_grid=3, **grid)],
    "awq, gptq": lambda **grid: [AWQModifier(n_grid=3, quantize=False, **grid), GPTQModifier(**grid)],
    "autoround": lambda **grid: [AutoRoundModifier(iters=2, **grid)],
    "gptq by the loss": lambda **grid: [GPTQModifier(objective="loss", **grid)],
    "awq by the loss": lambda **grid: [AWQModifier(n_grid=3, objective="loss", **grid)],
    "gptq for dense targets, tune": lambda **grid: [GPTQModifier(target="dense", **grid), TuneModifier(epochs=1)],
}


def llama():
    return ARCHITECTURES["llama"].build()


def batches(name="llama"):
    return ARCHITECTURES[name].batches(2)


def allocate(**arguments):
    return AllocateModifier(**{"bits": 5.5, "candidates": CANDIDATES, "group_size": 16} | arguments)


def run(model, modifiers, name="llama"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compress(model, modifiers, batches(name))


def schemes_of(model):
    return {name: describe(record.scheme) for name, (_, record) in Quantized.find(model).items()}


def mean_bits(ledger, technique):
    rows = [row for row in ledger if row.technique == technique and row.params]
    return sum(row.bits * row.params for row in rows) / sum(row.params for row in rows)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_file_alone_leads_to_the_same_model(name):
    models = llama(), llama()
    ledger = run(models[0], [allocate(), *QUANTIZERS[name](scheme="allocated", ignore=["lm_head"])])
    content = yaml.safe_load(ledger.files["allocation.yaml"])
    again = run(models[1], QUANTIZERS[name](**content, ignore=["lm_head"]))
    assert list(content) == ["config_groups"]
    assert len(set(schemes_of(models[0]).values())) > 1
    assert schemes_of(models[0]) == schemes_of(models[1])
    for (key, tensor), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(tensor, other), key
    rows = [row for row in ledger if row.technique != "allocate"]
    assert [(r.module, r.bits, r.bytes_after) for r in rows] == [(r.module, r.bits, r.bytes_after) for r in again]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in models[1].modules())


@pytest.mark.parametrize("bits", [5.1, 5.6, 7.0, 10.0])
def test_bits_are_those_of_the_ledger_and_within_the_budget(bits):
    model = llama()
    ledger = run(model, [allocate(bits=bits), GPTQModifier(scheme="allocated", ignore=["lm_head"])])
    assert bits - 0.5 < mean_bits(ledger, "gptq") <= bits
    (row,) = [row for row in ledger if row.technique == "allocate"]
    assert row.flags[0].startswith(f"{mean_bits(ledger, 'gptq'):.4g} bits per weight: ")
    schemes = schemes_of(model)
    for block in (0, 1):
        layer = f"model.layers.{block}"
        assert len({schemes[f"{layer}.self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert len({schemes[f"{layer}.mlp.{x}_proj"] for x in ("gate", "up")}) == 1


@pytest.mark.parametrize(
    ("candidates", "limit"),
    [(CANDIDATES, 33_000), (["W4A16_ASYM", "W8A16 channel", "dense"], 60_000), (["W4A16", "FP8_DYNAMIC"], 32_000)],
)
def test_bytes_are_those_of_the_exported_tensors(candidates, limit, tmp_path):
    model = llama()
    quantizer = GPTQModifier(scheme="allocated", ignore=["lm_head"])
    ledger = run(model, [allocate(bits=None, bytes=limit, candidates=candidates), quantizer])
    save(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        size = sum(file.get_tensor(name).nbytes for name in list(file.keys()))
    (row,) = [row for row in ledger if row.module == "model"]
    assert row.flags[0].startswith(f"{size:,} bytes, ")
    assert 0.9 * limit < size <= limit
    with torch.no_grad():
        expected, got = (m(**batches()[0]).logits for m in (model, load(tmp_path / "out")))
    torch.testing.assert_close(got, expected)


def test_plain_transformers_reads_what_is_mixed(tmp_path):
    from safetensors.torch import save_file

    model = llama()
    run(
        model,
        [
            allocate(bits=6.3, candidates=["W3A16", "W4A16", "W5A16"]),
            GPTQModifier(scheme="allocated", ignore=["lm_head"]),
        ],
    )
    assert len(set(schemes_of(model).values())) == 3
    save(model, tmp_path / "mixed")
    save_file(dict(batches()[0]), tmp_path / "mixed.batch")
    logits = read_by_transformers(tmp_path, {"mixed": "LlamaForCausalLM"})["mixed"]
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**batches()[0]).logits)


class Blocks(nn.Module):
    """Blocks of which the third one counts most."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(4))
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x + layer(x) * (4 if i == 2 else 0.02)
        return self.head(x)


def test_what_the_loss_depends_on_gets_more_bits():
    torch.manual_seed(1)
    model, data = Blocks(), [torch.randn(64, 32) for _ in range(3)]
    grid = {"scheme": "allocated", "ignore": ["head"]}
    ledger = compress(model, [allocate(bits=6.4, candidates=["W3A16", "W8A16"]), GPTQModifier(**grid)], data)
    bits = {row.module: row.bits for row in ledger if row.technique == "gptq"}
    most = sorted(bits, key=bits.__getitem__)[-2:]
    assert sorted(most) == ["layers.2.0", "layers.2.2"]
    assert min(bits.values()) < 6


def test_experts_of_a_mixture_are_equal_and_dense_modules_are_rows_of_the_ledger(tmp_path):
    model = ARCHITECTURES["mixtral"].build() if "mixtral" in ARCHITECTURES else ARCHITECTURES["qwen3_moe"].build()
    path = tmp_path / "deep" / "choice.yaml"
    modifier = allocate(bits=12.0, candidates=["W4A16", "dense"], path=str(path))
    ledger = run(model, [modifier, QuantizationModifier(scheme="allocated", ignore=["lm_head", "re:.*(gate|router)$"])])
    schemes = schemes_of(model)
    dense = {row.module for row in ledger if "stays dense" in row.flags}
    assert dense
    assert schemes
    assert not dense & schemes.keys()
    mixtures = {}
    for name in [*schemes, *dense]:
        if ".experts." in name:
            mixtures.setdefault(name.partition(".experts.")[0], set()).add(schemes.get(name))
    assert mixtures
    assert all(len(each) == 1 for each in mixtures.values())
    assert path.read_text() == ledger.files["allocation.yaml"]
    targets = [t for group in yaml.safe_load(path.read_text())["config_groups"].values() for t in group["targets"]]
    assert len(targets) < len(schemes)  # one pattern for all experts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": None}, "expected either bits (such as 4.25) or bytes (such as '3GB'), got neither"),
        ({"bytes": "1GB"}, "expected either bits (such as 4.25) or bytes (such as '3GB'), got both"),
        ({"bits": None, "bytes": "3 GO"}, "bytes='3 GO': expected bytes, as a number or such as '300MB' or '2GiB'"),
        ({"candidates": ["W4A16"]}, "candidates=['W4A16']: expected at least two, such as ['W3A16', 'W4A16']"),
        ({"candidates": ["W4A16", "W4A61"]}, "candidate 'W4A61': unknown scheme 'W4A61'; did you mean W4A16"),
        ({"candidates": ["W4A16", "FP8"]}, "candidate 'FP8' has static scales of activations"),
        ({"candidates": ["W4A16", {"weights": {"bits": 3}}]}, "unknown key 'bits'"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate(**arguments)


def initialize(*modifiers):
    Lifecycle(modifiers).initialize(State(model=llama()))


GPTQ = {"scheme": "allocated", "ignore": ["lm_head"]}
RECIPES = {
    "no quantizer": (lambda: [allocate()], "AllocateModifier has no quantizer behind it that takes its choice"),
    "another scheme": (lambda: [allocate(), GPTQModifier(scheme="W4A16")], "has no quantizer behind it"),
    "no allocation": (lambda: [GPTQModifier(**GPTQ)], "scheme='allocated' needs an AllocateModifier before it"),
    "order": (lambda: [GPTQModifier(**GPTQ), allocate()], "chooses the schemes of GPTQModifier, so place it before"),
    "training": (lambda: [allocate(), QATModifier(**GPTQ)], "QATModifier needs its schemes before calibration"),
    "two": (lambda: [allocate(), allocate(), GPTQModifier(**GPTQ)], "one of them chooses the schemes of all modules"),
    "two lists": (
        lambda: [allocate(), AWQModifier(quantize=False, scheme="allocated"), GPTQModifier(**GPTQ)],
        "AWQModifier and GPTQModifier have scheme='allocated' and different targets or ignore",
    ),
    "too few bits": (
        lambda: [allocate(bits=3.5), GPTQModifier(**GPTQ)],
        "AllocateModifier: bits=3.5 is less than the smallest candidates take, 5.097 bits per weight; ask for more",
    ),
    "too few bytes": (
        lambda: [allocate(bits=None, bytes="10kB"), GPTQModifier(**GPTQ)],
        "AllocateModifier: bytes='10kB' is less than the smallest candidates take, ",
    ),
    "columns": (
        lambda: [allocate(group_size=48), GPTQModifier(**GPTQ)],
        "no group size of the candidates divides the input columns of 'model.layers.0.self_attn.q_proj' (32)",
    ),
    "a format": (
        lambda: [allocate(candidates=["W4A16", "NVFP4A16"]), AWQModifier(**GPTQ)],
        "candidate 'NVFP4A16': AWQModifier: NVFP4A16 g16 has scales of a format of their own",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_are_checked_at_set_up(case):
    recipe, message = RECIPES[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        initialize(*recipe())


def test_a_budget_above_all_candidates_is_a_warning():
    with pytest.warns(UserWarning, match=r"bits=12 is more than the largest candidates take, 10\.\d+ bits per weight"):
        initialize(allocate(bits=12), GPTQModifier(**GPTQ))


def test_group_size_is_that_of_the_candidates():
    with pytest.raises(ValueError, match="group_size and scheme='allocated' exclude each other"):
        GPTQModifier(scheme="allocated", group_size=64)


def test_modules_without_data_count_as_others_do():
    class Unused(Blocks):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(32, 32)

    model = Unused()
    with pytest.warns(UserWarning, match="no gradient of the calibration batches reached 'other'"):
        compress(
            model,
            [allocate(bits=6.3), QuantizationModifier(scheme="allocated", ignore=["head"])],
            [torch.randn(16, 32)],
        )
    assert Quantized.of(model.other) is not None
