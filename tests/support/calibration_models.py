"""What the tests of calibration share: small models of many shapes, and a modifier that writes down what it sees."""

from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from lightning_compress.core import Event, Ledger, Lifecycle, Modifier, Needs, State
from lightning_compress.layers.matching import match_rank

C = 8


class Watcher(Modifier):
    """Keeps the inputs of its targets, and rounds their weights to a sixteenth when their time has come."""

    needs: ClassVar[Needs] = Needs(data=True)

    targets: list[str] = Field(default=["Linear", "Conv2d"])
    change: bool = True

    inputs: dict[str, list[Tensor]] = Field(default_factory=dict)  # copies
    objects: list[tuple[str, Tensor]] = Field(default_factory=list)  # the very tensors, in order
    masks: list[Tensor | None] = Field(default_factory=list)
    events: list[tuple[str, str]] = Field(default_factory=list)  # (event, block or modules)
    finished: list[str] = Field(default_factory=list)
    _names: dict[nn.Module, str] = PrivateAttr(default_factory=dict)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        where = ",".join(state.modules) if event.type_.name == "MODULE_READY" else state.block_name
        self.events.append((event.type_.name, where))

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        for name, module in state.model.named_modules():
            if any(match_rank(name, module, target) for target in self.targets):
                self._names[module] = name
                self.hook(module, self.see)

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.inputs.setdefault(self._names[module], []).append(args[0].clone())
        self.objects.append((self._names[module], args[0]))
        self.masks.append(self.token_mask)

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        self.finish(state)

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.finish(state)

    def finish(self, state: State) -> None:
        for name, module in state.modules.items():
            if module in self._names and name not in self.finished:
                self.finished.append(name)
                if self.change:
                    module.weight.data = (module.weight.data * 16).round() / 16

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()


class LockstepWatcher(Watcher):
    """The same, module by module."""

    needs: ClassVar[Needs] = Needs(data=True, one_pass=True)


class OwnPassWatcher(Watcher):
    """The same, before others look."""

    needs: ClassVar[Needs] = Needs(data=True, own_pass=True)


class Mixer(nn.Module):
    """q, k, v of one tensor, a mask, an output, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        y = torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        return x + scale * self.out(y * mask)


class Layered(nn.Module):
    """Layers that get different masks, local and global, as keyword arguments; embedding and head outside."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(C, C)
        self.layers = nn.ModuleList(Mixer() for _ in range(layers))
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        local = (x.detach().sum(-1, keepdim=True) > 0).to(x.dtype)  # depends on the batch
        for i, layer in enumerate(self.layers):
            x = layer(x, mask=local if i % 2 else 1 - local, scale=0.5 + i)
        return self.head(self.norm(x))


class ConvBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, stride=stride, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.act(x)))  # writes into its input


class Stages(nn.Module):
    """A CNN whose stages change the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stages = nn.Sequential(ConvBlock(4, 4, 1), ConvBlock(4, 6, 2), ConvBlock(6, 8, 2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, None]:
        return torch.tanh(self.own(x)) + self.other(memory).mean(1, keepdim=True), None


class EncoderDecoder(nn.Module):
    """The decoder's blocks read what the encoder made of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Mixer() for _ in range(2))
        self.between = nn.Linear(C, C)
        self.decoder = nn.ModuleList(Cross() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.encoder:
            x = block(x, torch.ones_like(x))
        x = self.between(x)
        for block in self.decoder:
            y = block(y, memory=x)[0]
        return y


class Biased(nn.Module):
    """As T5: the first block makes a bias that the others get back, so their arguments cannot be had from stubs."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.bias = nn.Linear(C, C), nn.Linear(C, C)

        def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            bias = self.bias(x) if bias is None else bias
            return torch.tanh(self.lin(x)) + bias, bias

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Biased.Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


class Dense(nn.Module):
    """A head that reads every block's output: stubs would mislead it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixer() for _ in range(3))
        self.head = nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask, outputs = torch.ones_like(x), []
        for block in self.blocks:
            x = block(x, mask)
            outputs.append(x)
        return self.head(sum(outputs))


def seeded(model_class: type[nn.Module], *args: Any) -> nn.Module:
    """A model with weights that are the same each time, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return model_class(*args)


def make_batches(number: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*shape, generator=generator) for _ in range(number)]


def started(*modifiers: Modifier, model: nn.Module) -> tuple[Lifecycle, State]:
    """A lifecycle that is ready to calibrate."""
    lifecycle, state = Lifecycle(modifiers), State(model=model, ledger=Ledger())
    lifecycle.initialize(state)
    return lifecycle, state


def inputs_of(model: nn.Module, names: list[str], runs: list[Any]) -> dict[str, list[Tensor]]:
    """Inputs of modules in plain forward passes; each run is called with the model."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _m, a, n=n: seen[n].append(a[0].clone())) for n in names
    ]
    with torch.no_grad():
        for run in runs:
            run(model)
    for handle in handles:
        handle.remove()
    return seen


def plain(forward: Any, batches: list[Tensor]) -> list[Any]:
    """Runs for :func:`inputs_of`: each batch through the model, by ``forward`` if there is one."""
    return [lambda model, x=x: (forward or (lambda m, y: m(y)))(model, x) for x in batches]
