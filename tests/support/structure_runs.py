"""What the tests of structured pruning share: a residual CNN, a small Llama, a dense model masked as the small one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core import Lifecycle, State


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Residuals(nn.Module):
    """Residuals, BatchNorm, a depthwise convolution and a flatten: [N, 1, 8, 8] -> [N, 10]."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.first, self.second = Residual(width), Residual(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.depthwise(self.second(self.first(self.stem(x))))).flatten(1))


def residuals(seed: int = 0) -> Residuals:
    torch.manual_seed(seed)
    model = Residuals()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def images(seed: int = 0, count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(0, 10, (count,), generator=generator)


def llama(seed: int = 0, **sizes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    usual = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**usual, **heads, **sizes})).eval()


def tokens(seed: int = 0, count: int = 4) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 64, (count, 12), generator=torch.Generator().manual_seed(seed))}


def silenced(model: nn.Module, hooks: dict[str, Callable[[Tensor], Tensor]]) -> list[Any]:
    """The dense model with some units zeroed where they are read: an independent way to the output of the small one."""

    def zeroing(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda module, args: (change(args[0]), *args[1:])

    return [model.get_submodule(name).register_forward_pre_hook(zeroing(change)) for name, change in hooks.items()]


def initialized(model, *modifiers):
    """The lifecycle at the end of set-up, as compress() and the callback begin."""
    lifecycle = Lifecycle(modifiers)
    lifecycle.initialize(State(model=model))
    return lifecycle


def perceptron(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))


class Block(nn.Module):
    def __init__(self, width: int, size: float):
        super().__init__()
        self.inner = nn.Linear(width, width)
        nn.init.normal_(self.inner.weight, std=size)

    def forward(self, x):
        return x + self.inner(x)


class Tower(nn.Module):
    """Blocks of growing, then shrinking influence."""

    def __init__(self, sizes=(0.3, 0.001, 0.2, 0.002, 0.4)):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(16, size) for size in sizes)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)
