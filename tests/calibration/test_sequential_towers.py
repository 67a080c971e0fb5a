"""Models of images and text through a calibration: towers stay, batches may mix, and the folder loads elsewhere."""

import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from lightning_compress import AWQModifier, GPTQModifier, compress, load
from lightning_compress.export.save import save
from lightning_compress.layers.towers import tower_of
from lightning_compress.quant.record import Quantized
from tests.support.multimodal_models import MODELS, TOWERS, batch_of, text_batch
from tests.support.plain_reader import read_by_transformers


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*left as it is by default, since it turns images")
        yield


def batches(name: str) -> list:
    return [batch_of(name) for _ in range(3)]


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model(**batch).logits


@pytest.mark.parametrize("name", MODELS)
def test_towers_stay_bit_for_bit_and_transformers_loads_the_folder(tmp_path, name):
    model, data = MODELS[name](), batches(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    dense = logits(model, data[0])
    ledger = compress(model, "gptq_w4", data)
    assert len({row.module for row in ledger}) == 14
    assert all("layers." in row.module and not tower_of(row.module, TOWERS[name]) for row in ledger)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{row.module}.weight" for row in ledger}
    expected = logits(model, data[0])
    assert (expected - dense).abs().max() > 1e-3
    with pytest.warns(UserWarning, match="no processor is saved"):
        save(model, tmp_path / "out")
    assert_close(logits(load(tmp_path / "out", packed=False), data[0]), expected, rtol=0, atol=0)
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    assert_close(logits(plain, data[0]), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_plain_transformers_in_a_process_of_its_own(tmp_path):
    expected, classes = {}, {}
    for name, build in MODELS.items():
        model, data = build(), batches(name)
        compress(model, "gptq_w4", data)
        expected[name], classes[name] = logits(model, data[0]), type(model).__name__
        with pytest.warns(UserWarning, match="no processor is saved"):
            save(model, tmp_path / name)
        save_file(data[0], tmp_path / f"{name}.batch")
    for name, answer in read_by_transformers(tmp_path, classes).items():
        assert_close(answer, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_towers_that_are_named_are_calibrated_too(name, walk):
    """Images reach the tower first, and the language model sees what the quantized tower makes of them."""
    model = MODELS[name]()
    modifier = GPTQModifier(scheme="W4A16", group_size="auto", targets=["Linear", *TOWERS[name]], ignore=["lm_head"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(targets=|never saw data|uses the weight of its out_proj)")
        ledger = compress(model, modifier, batches(name), walk=walk)
    inside = [row.module for row in ledger if tower_of(row.module, TOWERS[name])]
    assert len(inside) >= 10
    assert all(row.tokens for row in ledger if "attention" not in row.module)
    assert set(Quantized.find(model)) == {row.module for row in ledger}


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_a_folder_with_quantized_towers_is_loaded_by_transformers(tmp_path, name):
    model, data = MODELS[name](), batches(name)
    modifier = GPTQModifier(scheme="W4A16", group_size="auto", targets=["Linear", *TOWERS[name]], ignore=["lm_head"])
    compress(model, modifier, data)
    with pytest.warns(UserWarning, match="no processor is saved"):
        save(model, tmp_path / "out")
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    assert_close(logits(plain, data[0]), logits(model, data[0]), rtol=0, atol=0)


@pytest.mark.parametrize("first", ["text", "image"])
def test_batches_of_text_may_mix_with_batches_of_images(first, recwarn):
    """What calibrates is every row, in either order."""
    model, data = MODELS["llava"](), [batch_of("llava"), text_batch()]
    ledger = compress(model, "gptq_w4", data if first == "image" else data[::-1])
    assert {row.tokens for row in ledger} == {2 * 2 * 24}
    assert not [str(w.message) for w in recwarn if "no calibration batch" in str(w.message)]


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_text_alone_is_a_warning(name):
    model = MODELS[name]()
    match = rf"no calibration batch reached '{TOWERS[name][0]}'.* of this {type(model).__name__}: the batches hold text"
    with pytest.warns(UserWarning, match=match):
        compress(model, "gptq_w4", [text_batch(), text_batch()])


def test_smoothing_leaves_towers_too():
    model = MODELS["llava"]()
    before = {n: p.clone() for n, p in model.named_parameters()}
    compress(model, AWQModifier(scheme="W4A16", group_size="auto", ignore=["lm_head"]), batches("llava"))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(n.startswith("model.language_model.layers.") for n in changed)
    assert [n for n in changed if "norm" in n]


def test_the_plan_names_what_stays():
    text = str(compress(MODELS["llava"](), "gptq_w4", batches("llava"), plan=True))
    assert "model.vision_tower, which turns images or sounds into tokens" in " ".join(text.split())
