"""What quantizers on calibration data share: schemes by layer, static activation scales, embeddings, global scales."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from pydantic import PrivateAttr
from torch import Tensor, nn

from lightning_compress.core import State
from lightning_compress.layers.matrix import is_embedding, values_of_input, write_matrix
from lightning_compress.layerwise.layer import Layer, Solved
from lightning_compress.layerwise.modifier import LayerwiseModifier
from lightning_compress.pruning.arguments import share_of_zeros, zeros_stay
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.fake_quant import latent_of, on_stored_grid
from lightning_compress.quant.observers import Observer, ObserverName, is_observed, make_observer
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.rounding import check_dense, input_scales, round_embeddings, round_module
from lightning_compress.quant.shared_scales import GlobalScales
from lightning_compress.quant.weight_metrics import weight_facts

__all__ = ["LayerwiseQuantizer"]


class LayerwiseQuantizer(QuantizationArguments, LayerwiseModifier):
    """Base class of modifiers that quantize layers on calibration data: implement ``solve``.

    Args:
        observer: How static activation scales are found: ``minmax``, ``moving_average``, ``mse``, ``percentile`` or
            ``histogram``.
        averaging_constant: Weight of the newest batch in ``moving_average``.
        preserve_zeros: Weights that are zero stay zero, so that a pruned model stays pruned. None: in modules where at
            least a third of the weights are zero.
    """

    if TYPE_CHECKING:  # fields of the modifiers, each with a default and choices of its own
        scale_search: str
        observer: ObserverName
        averaging_constant: float
        preserve_zeros: bool | None = None

    _schemes: dict[str, QuantizationScheme] = PrivateAttr(default_factory=dict)  # of the layers that are left
    _observers: dict[str, Observer] = PrivateAttr(default_factory=dict)  # of static activations
    _globals: GlobalScales = PrivateAttr(default_factory=lambda: GlobalScales({}, {}))

    @property
    def keeps_latents(self) -> bool:
        """True where the values before rounding are kept beside each weight."""
        return False

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        self._schemes = self.assign(model)
        return {name: model.get_submodule(name) for name in self._schemes}

    def change_schemes(self, model: nn.Module, config_groups: dict[str, Any]) -> None:
        """After CALIBRATION_START, with ``scheme='allocated'``: the schemes of all targets; others stay dense."""
        self.allocate(config_groups)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CALIBRATION_START has warned
            layers = self.find_layers(model)
        for name in [name for name in self._layers if name not in layers]:
            self.finish(name)
        self.set_up()

    def set_up(self) -> None:
        self._globals = GlobalScales(self._layers, self._schemes)
        self._observers = {}
        for name, scheme in self._schemes.items():
            args = scheme.input_activations
            if is_observed(args) and not is_embedding(self._layers[name]):
                self._observers[name] = make_observer(self.observer, args, self.averaging_constant)

    def watches(self, name: str, module: nn.Module) -> bool:
        return not is_embedding(module)

    def observe(self, name: str, module: nn.Module, x: Tensor) -> None:
        super().observe(name, module, x)
        self.observe_range(name, module, x)

    def observe_range(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Take an input into the observer of a static activation, where the layer has one."""
        if name in self._observers:
            try:
                self._observers[name].update(values_of_input(module, x, self.token_mask), self.batch_number)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from error

    def weights_of(self, name: str) -> QuantizationArgs:
        """The grid of a layer's weight."""
        args = self._schemes[name].weights
        assert args is not None
        return args

    def check(self, name: str, module: nn.Module) -> None:
        check_dense(name, module)

    def solve_seen(self, state: State, names: Iterable[str]) -> None:
        names = list(names)
        self.round_tables(state, names)
        self.reduce_ranges(state, names)
        for name in names:
            self._globals.of(name)  # on every rank, before it gets one of the layers that share it
        super().solve_seen(state, names)

    def reduce_ranges(self, state: State, names: Sequence[str]) -> None:
        """Combine the observers of layers over ranks."""
        for name in names:
            if name in self._observers and name in self._layers:
                self._observers[name].read()
                state.team.reduce_(self._observers[name])

    def round_tables(self, state: State, names: Sequence[str]) -> None:
        """Round those of ``names`` that are embeddings, which no statistic is for."""
        arguments = (self.scale_search, self._globals, self.keeps_latents)
        for name, facts in round_embeddings(names, dict(self._layers), self._schemes, *arguments):
            self.finish(name)
            state.ledger.add(name, self.technique, **facts)

    def round(self, state: State, name: str, flag: str | None, tokens: int | None = None, **arguments: Any) -> None:
        """Round a layer to nearest.

        Args:
            state: For the ledger.
            name: The layer, one that is left.
            flag: A remark for the ledger.
            tokens: For the ledger.
            **arguments: Further ones of :func:`round_module`.
        """
        arguments = {
            "scale_search": self.scale_search,
            "observer": self._observers.get(name),
            "global_scale": self._globals.of(name),
            "keep_latent": self.keeps_latents,
            **arguments,
        }
        scheme = self._schemes[name]
        facts = round_module(name, self.finish(name), scheme, **arguments)
        state.ledger.add(name, self.technique, flag=flag, tokens=tokens, **facts)

    def write(self, layer: Layer, solved: Solved) -> dict[str, Any]:
        """Attach scales and zero points (``solved.parts``, or what partitions share), and write the weight."""
        W_RC, args = layer.W_RC, self.weights_of(layer.name)
        scale, zero_point = layer.common or (solved.parts["scale"], solved.parts["zero_point"])
        assert scale is not None
        Q_RC, A_RC = on_stored_grid(solved.W_RC, scale, zero_point, args, W_RC.dtype), solved.parts.get("latent")
        latent_RC = None if A_RC is None else latent_of(A_RC, Q_RC, scale, zero_point, args)
        inputs = input_scales(self._observers.get(layer.name), W_RC)
        extras = {"latent": latent_RC, "global_scale": self._globals.of(layer.name), **inputs}
        quantized = Quantized(self._schemes[layer.name], scale, zero_point, **extras)
        facts = weight_facts(W_RC, Q_RC, quantized)
        if zeros_stay(W_RC, self.preserve_zeros):
            facts["sparsity"] = share_of_zeros(solved.W_RC)
        write_matrix(layer.module, Q_RC)
        quantized.attach(layer.module)
        return facts

    def unseen(self, state: State, layers: Mapping[str, nn.Module]) -> None:
        for name in layers:
            if name in self._observers:  # without a static input scale no reader could use it
                state.ledger.add(name, self.technique, flag="never saw data; left as it was", tokens=0)
            else:
                self.round(state, name, "never saw data; rounded to nearest", 0)
        warnings.warn(
            f"{self.name}: {', '.join(layers)} never saw data and were rounded to nearest (with static "
            f"activations: left as they were); were they called, in these batches, as modules of their own? "
            f"(nn.MultiheadAttention uses the weight of its out_proj directly)",
            stacklevel=2,
        )

    def finish(self, name: str) -> nn.Module:
        self._schemes.pop(name, None)
        return super().finish(name)

    def reset(self) -> None:
        super().reset()
        self._schemes, self._observers, self._globals = {}, {}, GlobalScales({}, {})
