"""Models whose compression stopped half-way."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.export.save import save
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from tests.support.architecture_models import ARCHITECTURES


class Interrupting(Modifier):
    """Raises as Ctrl-C does, at the end of its block number ``after``."""

    needs: ClassVar[Needs] = Needs(calibration=True)
    after: int = 2

    def on_initialize(self, state: State, **kwargs) -> bool:
        return True

    def on_block_end(self, state: State, event: Event, **kwargs) -> None:
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


def test_a_half_compressed_model_is_neither_saved_nor_compressed_again(tmp_path):
    model, batches = ARCHITECTURES["llama"].build(), [torch.arange(8).reshape(1, 8)]
    with pytest.raises(KeyboardInterrupt):
        compress(model, [QuantizationModifier(scheme="W8A16", group_size=-1), Interrupting()], batches)
    message = "the compression of this LlamaForCausalLM was interrupted by KeyboardInterrupt: .* the dense model anew"
    for again in (lambda: save(model, tmp_path / "out"), lambda: compress(model, Interrupting(), batches)):
        with pytest.raises(ValueError, match=message):
            again()
    with pytest.raises(ValueError, match=r"the compression of 'model' \(LlamaForCausalLM\) was interrupted"):
        save(nn.ModuleDict({"model": model}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_changed_nothing_leaves_no_mark(tmp_path):
    model, batches = ARCHITECTURES["llama"].build(), [torch.arange(8).reshape(1, 8)]
    with pytest.raises(KeyboardInterrupt):
        compress(model, Interrupting(after=1), batches)
    with pytest.raises((IndexError, RuntimeError)):
        compress(model, GPTQModifier(scheme="W8A16", group_size=-1), [batches[0] + 1000])  # no such tokens
    compress(model, QuantizationModifier(scheme="W8A16", group_size=-1))
    save(model, tmp_path / "out")
