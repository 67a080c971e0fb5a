"""W2 of a real model by training: SmolLM2-135M from GPTQ through QAT and distillation, KL along the way.

    make bench-qat-smollm2                          # or: python benchmarks/bench_qat_smollm2.py --help

Symmetric integers of 2 bits in groups of 64, `lm_head` dense, weights off their published grid (`make bench-moved`).
GPTQ on 16 x 256 tokens, with dense targets, is the start; then a Trainer run with QATModifier and DistillationModifier
from the dense model, AdamW, cosine. Tokens: whole documents of the calibration sources (material.py: train_mix.txt), in
random order, none twice; evaluation texts are others. KL to the dense model as in bench_accuracy.py, by the
model in training, at equal distances; the last one is that of the finished run.
"""

import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import machine
import smollm2
import torch
from bench_accuracy import cached_dense_logits
from measured_run import resident
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import CompressionCallback, DistillationModifier, GPTQModifier, QATModifier, compress

LENGTH = 256  # tokens of a row


class Student(lightning.LightningModule):
    """A causal language model on its own loss, which distillation replaces (`weight: 1`)."""

    def __init__(self, model: nn.Module, lr: float, steps: int):
        super().__init__()
        self.model, self.lr, self.steps = model, lr, steps

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[0], use_cache=False).loss
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0, betas=(0.9, 0.95))
        warm = 3  # a warm-up of 24 steps stayed on the plateau of the start: KL 2.27 after 49,000 tokens, 1.06 with 3

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Divergence(lightning.Callback):
    """KL to the dense model every so many steps."""

    def __init__(self, windows: Tensor, dense: smollm2.DenseLogits, every: int, tokens: int):
        self.windows, self.dense, self.every, self.tokens = windows, dense, every, tokens
        self.points: list[dict[str, Any]] = []
        self.began, self.away = time.process_time(), 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0:
            self.note(module.model, trainer.global_step)

    def note(self, model: nn.Module, step: int) -> None:
        began, training = time.process_time(), model.training
        kl, nll = smollm2.divergence(model.eval(), self.windows, self.dense)
        model.train(training)
        self.away += time.process_time() - began
        seconds = time.process_time() - self.began - self.away
        self.points.append({"tokens": step * self.tokens, "kl": kl.tolist(), "nll": nll.tolist(), "cpu_s": seconds})
        print(f"{step * self.tokens} tokens: KL {kl.mean():.4f}, {seconds:.0f} CPU s", flush=True)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    lightning.seed_everything(arguments.seed, verbose=False)
    folder, texts = arguments.material / "models" / arguments.model, arguments.material / "texts"
    tokenizer, dense = smollm2.load_tokenizer(folder), smollm2.load(folder)
    windows = smollm2.windows_of_all(tokenizer, texts, 3)
    work = arguments.material / f"gradients-{arguments.model}"
    work.mkdir(exist_ok=True)
    wanted = cached_dense_logits(folder, windows, work)
    grid = {"num_bits": arguments.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": grid}}, "ignore": ["re:.*lm_head"]}
    model = copy.deepcopy(dense)
    calibration = smollm2.calibration_rows(tokenizer, texts, 16, LENGTH)
    batches = [{"input_ids": pair} for pair in calibration.split(2)]
    compress(model, GPTQModifier(**scheme, target="dense", keep_latents=True), batches)
    rows = training_rows(tokenizer, texts, arguments.tokens // LENGTH, arguments.seed)
    steps = len(rows) // arguments.batch
    watch = Divergence(windows, wanted, max(1, steps // 20), arguments.batch * LENGTH)
    watch.note(model, 0)
    modifiers = {"distill": DistillationModifier(teacher=dense, weight=1.0), "qat": QATModifier(**scheme, start=0)}
    run = tempfile.TemporaryDirectory(dir=work)
    trainer = lightning.Trainer(
        default_root_dir=run.name, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, precision=arguments.precision,
        callbacks=[CompressionCallback(modifiers, evaluate=False, verify=False), watch],
    )  # fmt: skip
    with run:
        trainer.fit(Student(model, arguments.lr, steps), DataLoader(TensorDataset(rows), arguments.batch))
    watch.note(model, steps)
    lines = report(watch, wanted, arguments)
    print("\n".join(lines))
    (work / f"qat-{arguments.tokens}-{arguments.lr:g}.json").write_text(json.dumps(watch.points))
    if not arguments.dry:
        title = f"W{arguments.bits} by training: {arguments.model}, {arguments.tokens} tokens"
        facts = {
            "dense_nll": wanted.losses.tolist(),
            "points": watch.points,
            "lr": arguments.lr,
            "precision": arguments.precision,
        }
        print("written:", machine.write(f"qat-{arguments.model}", title, lines, facts, arguments.machine))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--material", type=Path, default=Path("benchmarks/work"), help="what `make bench-data` filled")
    parser.add_argument("--model", default="smollm2-moved", choices=["smollm2", "smollm2-moved"])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=163_840, help="of training")
    parser.add_argument("--batch", type=int, default=4, help="rows of 256 tokens")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--precision", default="bf16-mixed", help="of the Trainer: 32-true, bf16-mixed")
    parser.add_argument("--seed", type=int, default=0)
    machine.add_arguments(parser)
    return parser.parse_args()


def training_rows(tokenizer: Any, texts: Path, rows: int, seed: int) -> Tensor:
    """Rows of the training text in random order, none twice: int64, [rows, 256]."""
    text = (texts / "train_mix.txt").read_text(encoding="utf8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    pieces = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    if len(pieces) < rows:
        raise SystemExit(f"train_mix.txt has {len(pieces)} rows of {LENGTH} tokens, {rows} were asked for")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return pieces[order[:rows]]


def report(watch: Divergence, dense: smollm2.DenseLogits, arguments: argparse.Namespace) -> list[str]:
    """The curve as Markdown."""
    texts = smollm2.EVALUATION_TEXTS
    rows = []
    for point in watch.points:
        kl, nll = (torch.tensor(point[field], dtype=torch.float64) for field in ("kl", "nll"))
        both = [f"{math.exp(part.mean()):.4g}" for part in nll.chunk(len(texts))]
        rows.append([f"{point['tokens']:,}", f"{kl.mean():.4f}", *both, f"{point['cpu_s']:.0f}"])
    return [
        *machine.table(["tokens", "KL, nats per token", *(f"ppl {text}" for text in texts), "CPU s"], rows),
        "",
        f"0: GPTQ with dense targets, 4,096 calibration tokens. Then steps of {arguments.batch} x {LENGTH} tokens, "
        f"peak learning rate {arguments.lr:g}, {arguments.precision}; peak memory "
        f"{resident('VmHWM'):.0f} MiB. Dense: perplexity "
        f"{', '.join(f'{smollm2.perplexity(part):.2f}' for part in dense.losses.chunk(len(texts)))}.",
    ]


if __name__ == "__main__":
    main()
