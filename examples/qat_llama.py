"""Quantize a small Llama to 2 bits: by rounding, and by quantization-aware training with the dense model as teacher.

    python -m examples.qat_llama

Prints perplexities, also of the dense model after as many steps, and the folder that transformers loads.
36 seconds on one CPU core.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence

import lightning

from examples.data_stdlib import StdlibBytes
from examples.model_llama import LlamaDemo
from examples.quiet import quiet_trainer
from lightning_compress import CompressionCallback, DistillationModifier, QATModifier, QuantizationModifier, compress

SCHEME = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": "W2A16", "group_size": 64}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, round, train through fake-quantization; print and return perplexities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="steps of dense training")
    parser.add_argument("--qat-steps", type=int, default=80, help="steps through fake-quantization")
    parser.add_argument("--width", type=int, default=128, help="width of the residual stream, a multiple of 64")
    parser.add_argument("--library", default=None, help="a folder of *.py files; by default Python's own library")
    parser.add_argument("--out", default=None, help="an empty folder for the results; by default a temporary one")
    chosen = parser.parse_args(arguments)
    folder = chosen.out or tempfile.mkdtemp(prefix="qat_llama_")

    lightning.seed_everything(0, verbose=False)
    data = StdlibBytes(block_length=64, batch_size=16, val_blocks=256, folder=chosen.library)
    module = LlamaDemo(hidden_size=chosen.width, intermediate_size=2 * chosen.width, num_layers=2, num_heads=2)
    trainer = quiet_trainer(folder, steps=chosen.steps, validate=False)
    trainer.fit(module, data)
    numbers = {"dense": perplexity(trainer, module, data)}

    rounded = copy.deepcopy(module)
    compress(rounded.model, QuantizationModifier(**SCHEME))
    numbers["2 bits, rounded"] = perplexity(quiet_trainer(folder), rounded, data)

    module.lr = 1e-3  # further training uses a lower learning rate
    longer = copy.deepcopy(module)
    trainer = quiet_trainer(folder, steps=chosen.qat_steps, validate=False)
    trainer.fit(longer, data)
    numbers["dense, trained on"] = perplexity(trainer, longer, data)

    stages = [DistillationModifier(teacher="self", weight=0.5), QATModifier(scale_search="mse", **SCHEME)]
    trainer = quiet_trainer(folder, CompressionCallback(stages), steps=chosen.qat_steps, validate=False)
    trainer.fit(module, data)
    numbers["2 bits, trained"] = perplexity(trainer, module, data)

    for name, value in numbers.items():
        print(f"{name:18} perplexity {value:7.3f}")
    print(f"transformers.AutoModelForCausalLM.from_pretrained('{folder}/compressed')")
    return numbers


def perplexity(trainer: lightning.Trainer, module: LlamaDemo, data: StdlibBytes) -> float:
    """Perplexity per byte on the test text."""
    (found,) = trainer.test(module, data, verbose=False)
    return found["test/perplexity"]


if __name__ == "__main__":
    main()
