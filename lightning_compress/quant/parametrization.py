"""Training through fake-quantization: the weight of a module, and its input, on their grids in every forward pass.

The weight becomes a parametrization (torch.nn.utils.parametrize): the optimizer moves the dense weight, the layer sees
its value on the grid. A state dict holds the dense weight under its own name and nothing else. So the modifier that put
this on keeps the scales (:meth:`FakeQuantize.state`, :meth:`FakeQuantize.load_state`).

:func:`finish` leaves, bit for bit, the values that the layer computed with: a weight on the grid and a
:class:`~lightning_compress.quant.record.Quantized`.

Shapes: R rows, C columns, G groups, as in layers/matrix.py.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_compress.layers.dense_keys import (
    original_weight,
    parametrization_of,
    parts_of,
    put_on,
    remove_hook,
    take_off,
    unparametrize,
)
from lightning_compress.layers.matrix import as_matrix, layout_of, write_matrix
from lightning_compress.layers.sharded import gathered, is_dtensor
from lightning_compress.layers.weight_slice import WeightSlice, owner_of
from lightning_compress.ops.fake_quant import learned_step, relative_step, replace_value, straight_through
from lightning_compress.quant.fake_quant import codes_of, latent_of, wide
from lightning_compress.quant.formats import (
    LARGEST_SCALE,
    global_scale_of,
    has_global_scale,
    is_microscaled,
    stored_scale,
)
from lightning_compress.quant.input_parametrization import FakeQuantizeInput
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.rounding import find_scales
from lightning_compress.quant.scales import expand

__all__ = ["FakeQuantize", "Lifted", "fake_quantize_of", "finish", "lift", "lower", "parametrize_weight",
           "restore_dense"]  # fmt: skip


class FakeQuantize(nn.Module):
    """The parametrization of a weight.

    Args:
        module: The layer, its weight still dense.
        scheme: The grids of its weight and its input.
        gradient: ``ste``: scales get no gradient; ``lsq``: the optimizer trains them.
        search: How scales are found: ``minmax`` or ``mse``.
        record: An earlier quantization, whose scales are used instead.
        constant: Weight of the newest batch in the moving average of static activations.
        learn_inputs: Train the scales of static activations after observation has ended.

    Attributes:
        active: False: the weight and the input pass unchanged.
        observing: With ``ste`` and ``minmax``: every forward pass computes the scales of the current weight.
        frozen: The scale is constant.
        change: With ``lsq`` the parameter behind the scale, in its shape: scale = start (1 + change), rounded to a
            scale that the format stores.
        global_scale: g of NVFP4, float32 [1].
    """

    keeps_zeros = True  # see pruning/masked.py
    passes_in_the_end = False  # see layers/matrix.py

    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None
    largest: Tensor | None  # the largest scale of the last forward pass, before it was rounded

    def __init__(
        self,
        module: nn.Module,
        scheme: QuantizationScheme,
        gradient: Literal["ste", "lsq"],
        search: Literal["minmax", "mse"],
        record: Quantized | None = None,
        constant: float = 0.01,
        learn_inputs: bool = False,
    ):
        super().__init__()
        W_RC = as_matrix(module)
        self.scheme, self.args, self.search = scheme, scheme.weights, search
        self.codes = codes_of(scheme.weights)
        self.layout = layout_of(module)
        self.active, self.frozen = False, False
        self.given = record is not None
        self.observing = gradient == "ste" and not self.given
        if record is not None:
            grid = (record.scale, record.zero_point, record.global_scale)
        else:
            g = self._own_global_scale(W_RC)
            grid = (*find_scales(W_RC, self.args, search, global_scale=g), g)
        largest = None if grid[2] is None else torch.zeros_like(grid[2])
        for name, tensor in zip(("scale", "zero_point", "global_scale", "largest"), (*grid, largest), strict=True):
            held = None if tensor is None else tensor.detach().to(W_RC.device, copy=True)
            self.register_buffer(name, held, persistent=False)
        self.change = nn.Parameter(torch.zeros_like(self.scale)) if gradient == "lsq" else None
        inputs = scheme.input_activations
        self.input = None if inputs is None else FakeQuantizeInput(inputs, constant, W_RC, learn_inputs)
        if record is not None and self.input is not None:
            self.input.take_record(record)

    def forward(self, weight: Tensor) -> Tensor:
        if is_dtensor(weight):  # between forward passes: torch's checkpoints get the attribute to learn its name
            return weight
        if not self.active:
            # DDP waits for the gradient of every parameter, and gets zeros
            unused = self.change if torch.is_grad_enabled() else None
            return weight if unused is None else weight + 0 * unused.sum()
        W_RC = self.matrix(weight)
        if self.change is not None and not self.frozen:
            zero = None if self.zero_point is None else self.zero_point.clone()
            Q_RC = self._on_grid(learned_step, W_RC, self._learned_scale(weight.dtype), zero)
        else:
            Q_RC = self._on_grid(straight_through, W_RC, *self.grid(W_RC))
            if self.change is not None and torch.is_grad_enabled():
                Q_RC = Q_RC + 0 * self.change.sum()
        return self.layout.stored(Q_RC, weight.shape).contiguous()

    def _on_grid(self, function: Any, W_RC: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The result of an op; scales of blocks are spread over rows, and the last blocks filled up."""
        if self.args.strategy != QuantizationStrategy.BLOCK:
            return function(W_RC, scale, zero, self.codes)
        (R, C), (b, g) = W_RC.shape, self.args.block_structure
        count = {"count": min(R, b) * min(C, g)} if function is learned_step else {}
        filled_RC = pad(W_RC, (0, -C % g))
        return function(filled_RC, expand(scale, R, self.args), None, self.codes, **count)[:, :C]

    def _learned_scale(self, dtype: torch.dtype) -> Tensor:
        """The scale with its gradient for ``change``, which passes the rounding of scales."""
        assert self.change is not None
        start = self.scale.clone()  # DDP writes buffers in place
        if not is_microscaled(self.args):
            return relative_step(start, self.change, dtype)
        scale = relative_step(start, self.change, torch.float32)
        self._note_largest(scale)
        return replace_value(scale, stored_scale(scale.detach(), self.args, self.global_scale), None)

    @torch.no_grad()
    def grid(self, W_RC: Tensor) -> tuple[Tensor, Tensor | None]:
        """The current scale and zero point, in the dtype that stores them."""
        if self.change is not None and not self.frozen:
            return self._learned_scale(W_RC.dtype), self.zero_point
        if self.observing and self.search == "minmax" and not self.frozen:
            if self.global_scale is not None:
                self._note_largest(wide(W_RC.detach()).abs().amax() / self.codes.high)
            return find_scales(W_RC.detach(), self.args, "minmax", global_scale=self.global_scale)
        zero = None if self.zero_point is None else self.zero_point.clone()
        if is_microscaled(self.args):  # g may have changed since
            return stored_scale(self.scale, self.args, self.global_scale), zero
        return self.scale.to(W_RC.dtype, copy=True), zero

    # -- the global scale ---------------------------------------------------------------------------------------------

    def _own_global_scale(self, W_RC: Tensor) -> Tensor | None:
        """g for this weight alone; None where the format has none."""
        return global_scale_of(*W_RC.detach().aminmax()) if has_global_scale(self.args) else None

    def fitting_global_scale(self) -> Tensor:
        """g, as often halved as the largest scale of the last forward pass needs to be one that can be stored.

        Other scales keep their values: their E4M3 numbers are halved too.
        """
        assert self.global_scale is not None
        assert self.largest is not None
        over = (self.largest * self.global_scale / LARGEST_SCALE).clamp(min=1.0)
        return self.global_scale * torch.exp2(-over.log2().ceil())

    def _note_largest(self, scale: Tensor) -> None:
        if self.largest is not None:
            self.largest.copy_(scale.detach().amax())

    # -- moments ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def derive(self, weight: Tensor, global_scale: Tensor | None = None) -> None:
        """Compute the scales from the weight, without learned changes; scales of a record, and frozen ones, stay.

        ``global_scale``: that of all weights that share one; by default of this weight alone.
        """
        if self.given or self.frozen:
            return
        W_RC = self.matrix(weight)
        g = self._own_global_scale(W_RC) if global_scale is None else global_scale
        self._put(*find_scales(W_RC, self.args, self.search, global_scale=g), g)
        if self.change is not None:
            self.change.zero_()

    @torch.no_grad()
    def take_record(self, record: Quantized) -> None:
        """Use the scales of an earlier quantization, also when other weights are loaded."""
        self._put(record.scale, record.zero_point, record.global_scale)
        if self.change is not None:
            self.change.zero_()
        self.given, self.observing = True, False
        if self.input is not None:
            self.input.take_record(record)

    @torch.no_grad()
    def stop_observing(self, weight: Tensor) -> None:
        """Keep the scales of activations from now on, and those of the weight unless they are learned."""
        if self.input is not None:
            self.input.observing = False
        if self.observing and not self.frozen:
            self._put(*find_scales(self.matrix(weight), self.args, self.search, global_scale=self.global_scale))
            self.observing = False

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Keep all scales from now on, learned ones too."""
        self.stop_observing(weight)
        self._put(*self.grid(self.matrix(weight)))
        self.frozen = True
        if self.input is not None:
            self.input.freeze()

    def state(self) -> dict[str, Any]:
        """Tensors and plain values: all facts that the dense weight does not contain."""
        flags = {"active": self.active, "observing": self.observing, "frozen": self.frozen, "given": self.given}
        tensors = {name: getattr(self, name) for name in ("scale", "zero_point", "global_scale", "change")}
        copies = {name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors.items()}
        return {**flags, **copies} | ({} if self.input is None else {"input": self.input.state()})

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state`."""
        self.active, self.observing = state["active"], state["observing"]
        self.frozen, self.given = state["frozen"], state["given"]
        self._put(state["scale"], state["zero_point"], state.get("global_scale"))
        if self.change is not None and state["change"] is not None:
            self.change.copy_(state["change"])
        if self.input is not None and state.get("input") is not None:
            self.input.load_state(state["input"])

    def record(self, W_RC: Tensor) -> Quantized:
        """The record of the current weight."""
        scale, zero = self.grid(W_RC)
        inputs = {} if self.input is None else self.input.record()
        g = None if self.global_scale is None else self.global_scale.clone()
        return Quantized(self.scheme, scale.clone(), None if zero is None else zero.clone(), global_scale=g, **inputs)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as [R, C], with its gradient."""
        return self.layout.matrix(weight)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """A cast of the model to 16 bits casts the scales of weights that store them so, and no others."""
        names = ("scale", "global_scale", "largest") if is_microscaled(self.args) else ()
        exact = {name: tensor for name in names if (tensor := self._buffers[name]) is not None}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            self._buffers[name] = tensor.to(self.scale.device)
        return self

    def _put(self, scale: Tensor, zero: Tensor | None, global_scale: Tensor | None = None) -> None:
        for held, tensor in ((self.scale, scale), (self.zero_point, zero), (self.global_scale, global_scale)):
            if held is not None and tensor is not None:
                held.copy_(tensor)


def parametrize_weight(module: nn.Module, fake: FakeQuantize, record: Quantized | None = None) -> None:
    """Put fake-quantization, not active yet, on its module.

    Where the record, that of ``fake``, holds latent values, the optimizer changes those: they round to the weight.
    """
    _take_latent(module, record)
    put_on(module, fake)
    owner = owner_of(module)
    if not any(hook is _derive_scales for hook in owner._load_state_dict_post_hooks.values()):
        owner.register_load_state_dict_post_hook(_derive_scales)
    if fake.input is not None:
        module.register_forward_pre_hook(_quantize_input)


@dataclass(frozen=True)
class Lifted:
    """Fake-quantization that was taken off a module for a while."""

    kind: type[nn.Module]  # the class of the module with its parametrization
    parametrizations: nn.Module  # of torch, with the dense weight
    fake: FakeQuantize


def lift(module: nn.Module) -> Lifted:
    """Take fake-quantization off for a while: the dense weight is an ordinary parameter again, the same object.

    Raises:
        ValueError: The weight is a slice, or has another parametrization too.
    """
    if isinstance(module, WeightSlice):
        raise ValueError(
            f"no modifier hands a part of {module.fused} over in training; quantize it before, or add it to ignore"
        )
    fake = fake_quantize_of(module)
    assert fake is not None
    parts = module.get_submodule("parametrizations")
    if sum(1 for _ in parts.children()) > 1 or sum(1 for _ in parts.get_submodule("weight").children()) > 1:
        raise ValueError(
            f"a {type(module).__name__} carries another parametrization beside fake-quantization, so that no quantizer "
            f"can hand it over; leave one of the two out"
        )
    lifted = Lifted(type(module), parts, fake)
    unparametrize(module)
    return lifted


@torch.no_grad()
def lower(module: nn.Module, lifted: Lifted, record: Quantized | None) -> None:
    """Put fake-quantization on again after :func:`lift`; with a record, on its grids."""
    _take_latent(module, record)
    if record is not None:
        lifted.fake.take_record(record)
    del module._parameters["weight"]
    module._modules["parametrizations"] = lifted.parametrizations
    module.__class__ = lifted.kind


def _take_latent(module: nn.Module, record: Quantized | None) -> None:
    """Write latent values of a record, if any, in place of the weight; not where the weight has changed since."""
    if record is None or record.latent is None:
        return
    Q_RC = as_matrix(module)
    latent, scale = (t.to(Q_RC.device, copy=True) for t in (record.latent, record.scale))
    zero = None if record.zero_point is None else record.zero_point.to(Q_RC.device)
    write_matrix(module, latent_of(latent, Q_RC, scale, zero, record.scheme.weights))


def fake_quantize_of(module: nn.Module) -> FakeQuantize | None:
    """The parametrization of a module's weight, or None."""
    return parametrization_of(module, FakeQuantize)


@torch.no_grad()
def finish(module: nn.Module, stays: bool = False) -> Quantized:
    """Take fake-quantization off: the weight stays on its grid, and gets the record of it.

    ``stays``: it is kept, but lets the weight, now on its grid, and the input pass.
    """
    fake = fake_quantize_of(module)
    assert fake is not None
    quantized = fake.record(fake.matrix(original_weight(module)))
    if stays:
        original_weight(module).copy_(fake(original_weight(module)))
        _let_pass(fake)
    else:
        _take_off(module, leave_parametrized=True)
    quantized.attach(module)
    return quantized


@torch.no_grad()
def restore_dense(module: nn.Module, stays: bool = False) -> None:
    """Take fake-quantization off and restore the dense weight; ``stays`` as in :func:`finish`."""
    if stays:
        fake = fake_quantize_of(module)
        assert fake is not None
        _let_pass(fake)
    else:
        _take_off(module, leave_parametrized=False)


def _let_pass(fake: FakeQuantize) -> None:
    fake.active, fake.passes_in_the_end = False, True


def _take_off(module: nn.Module, leave_parametrized: bool) -> None:
    fake = fake_quantize_of(module)
    assert fake is not None
    if not leave_parametrized:
        fake.active = False
    take_off(module, FakeQuantize, leave_parametrized)
    owner = owner_of(module)
    if not any(fake_quantize_of(part) for part in parts_of(owner)):
        remove_hook(owner._load_state_dict_post_hooks, _derive_scales)
    remove_hook(module._forward_pre_hooks, _quantize_input)


def _derive_scales(module: nn.Module, incompatible_keys: Any) -> None:
    """Compute the scales of weights that were loaded; a modifier that kept scales restores them afterwards."""
    for layer in parts_of(module):
        if (fake := fake_quantize_of(layer)) is not None:
            with gathered(module):
                fake.derive(original_weight(layer))


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    fake = fake_quantize_of(module)
    if fake is None or fake.input is None or not fake.active or not args or not args[0].numel():
        return None
    return (fake.input(module, args[0]), *args[1:])
