"""peft on what ``load`` returns; without peft the same mechanism is held by test_weight.py and test_dequantize.py."""

import pytest
import torch

from lightning_compress import dequantize
from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress

peft = pytest.importorskip("peft")
IDS = torch.arange(24).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "NVFP4A16"])
def test_train_packed_merge_dense_compress_again(tmp_path, tiny_llama, scheme):
    model = tiny_llama()
    compress(model, QuantizationModifier(scheme=scheme, ignore=["lm_head"]))
    folder = save(model, tmp_path / "first")
    losses, config = {}, peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"])
    for packed in (False, True):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(load(folder, packed=packed), config)
        losses[packed] = train(adapted)
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert losses[True][-1] < losses[True][0] - 0.3
    for safe in (True, False):
        with pytest.raises(ValueError, match="load the folder with packed=False, merge there"):
            adapted.merge_and_unload(safe_merge=safe)
    adapted.save_pretrained(tmp_path / "adapter")
    dense = peft.PeftModel.from_pretrained(load(folder, packed=False), tmp_path / "adapter")
    before = logits(dense)
    assert (logits(adapted) - before).norm() < 0.02 * before.norm()
    merged = dense.merge_and_unload()
    assert (logits(merged) - before).norm() < 0.02 * before.norm()
    dequantize(merged)
    compress(merged, QuantizationModifier(scheme=scheme, ignore=["lm_head"]))
    assert torch.equal(logits(load(save(merged, tmp_path / "second"), packed=False)), logits(merged))
