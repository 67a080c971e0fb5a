"""SmolLM2 moved off the 4-bit grid of its published weights, for statements about accuracy at 4 bits and below.

    make bench-moved                                # or: python benchmarks/moved_weights.py MODEL TEXTS OUT

The only SmolLM2 in a package is a GGUF file whose Linears are 4-bit integers with a scale and an offset for 32 columns:
rounding to 4 bits finds that grid again in part, and a technique that changes weights before (rotation, smoothing)
looks worse than it is. So each weight is moved by a uniform draw of up to half a step of its grid, as much as rounding
moved it, and a short training recovers the accuracy: Adam on KL(original || moved) over text that is neither in the
calibration rows nor in the evaluation windows. The result is not better than the original, but its weights are not on a
grid.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import smollm2
import torch
from torch import Tensor, nn

GROUP = 32  # columns that share a scale in the GGUF file
STEPS_OF_GRID = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4, help="of the first step, falling linearly to 0")
    parser.add_argument("--rows", type=int, default=4, help="rows of 256 tokens a step")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = smollm2.load_tokenizer(arguments.model)
    teacher, model = smollm2.load(arguments.model), smollm2.load(arguments.model)
    print(f"off the grid before: {off_grid(model, teacher):.3f} steps (root mean square; 0.289 where uniform)")
    for weight in linear_weights(model):
        weight.data += (torch.rand_like(weight) - 0.5) * step_of(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, arguments.steps)
    began = time.perf_counter()
    draws = training_rows(tokenizer, arguments.texts, arguments.rows)
    for step, ids in zip(range(arguments.steps), draws, strict=False):
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        found = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        loss = nn.functional.kl_div(found.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        print(f"step {step + 1}: KL {loss.item():.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    print(f"off the grid after: {off_grid(model, teacher):.3f} steps")
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def linear_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that lie on the grid: Linears, not the output layer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield module.weight


@torch.no_grad()
def step_of(weight: Tensor) -> Tensor:
    """The grid's step of each weight, [R, C]: a fifteenth of the range of its 32 columns."""
    low, high = weight.unflatten(1, (-1, GROUP)).aminmax(dim=-1)
    return ((high - low) / STEPS_OF_GRID).repeat_interleave(GROUP, 1)


@torch.no_grad()
def off_grid(model: nn.Module, original: nn.Module) -> float:
    """Root mean square distance to the nearest point of the original's grid, in steps of that grid."""
    total = count = 0.0
    for moved, weight in zip(linear_weights(model), linear_weights(original), strict=True):
        low = weight.unflatten(1, (-1, GROUP)).amin(-1).repeat_interleave(GROUP, 1)
        steps = (moved - low) / step_of(weight).clamp_min(1e-12)
        total += float((steps - steps.round()).square().sum())
        count += steps.numel()
    return (total / count) ** 0.5


def training_rows(tokenizer: object, texts: Path, rows: int, length: int = 256) -> Iterator[Tensor]:
    """Draws of rows that share no token with any calibration subset: int64, [rows, length]."""
    taken = torch.cat([smollm2.calibration_rows(tokenizer, texts, 16, length, subset) for subset in range(3)])
    ids = tokenizer((texts / "calib_mix.txt").read_text(encoding="utf8"), add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    stride, third = len(ids) // 16, len(ids) // 16 // 3
    free = [
        start
        for begin in range(0, stride * 16 - third, third)
        for start in range(begin + length, begin + third - length, length)
    ]
    windows = torch.tensor(ids).unfold(0, length, 1)
    assert not any(bool((windows[start] == row).all()) for start in free[:50] for row in taken)
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(free), generator=generator).tolist()
        for i in range(0, len(order) - rows + 1, rows):
            yield torch.stack([windows[free[k]] for k in order[i : i + rows]])


if __name__ == "__main__":
    main()
