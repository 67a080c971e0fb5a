"""What each weight of a recurrent module or of an attention multiplies in a forward pass.

    attention     q_proj, k_proj, v_proj  query, key, value
                  out_proj                the output that a projection by the identity gives
    cell          ih, hh                  input, hidden state
    LSTM, GRU     ih_l0                   the input
                  hh_l0                   the hidden state before each step: h_0, then the outputs but the last
                  ih_l1, hh_l1, ...       the same with the outputs of the layer below

Each weight is a child of the module, and gets its input by a call whose result is not used: its hooks see the input,
and may change the weight, as a solver does that has then seen all batches. A layer runs again after such calls, so that
the layer above gets the outputs of the weights as they are now.

Of packed sequences the padding is left out. The projection of an LSTM (``proj_size``) multiplies values inside of a
cell, which no call of torch gives out: it sees no data.

Shapes: T steps, B sequences, C inputs, H hidden, L layers times directions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

__all__ = ["show_inputs"]


def show_inputs(home: Any, weights: Mapping[str, nn.Module], *args: Any, **kwargs: Any) -> None:
    """Call the weights of a module on what they multiply when the module is called with these arguments."""
    if isinstance(home, nn.MultiheadAttention):
        _attention(home, weights, args, kwargs)
    elif isinstance(home, nn.RNNCellBase):
        _cell(home, weights, *args, **kwargs)
    else:
        with torch.no_grad():
            _Recurrence(home, weights).run(*args, **kwargs)


def _attention(
    home: nn.MultiheadAttention, weights: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    inputs = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
    for name, x in {"q_proj": inputs["query"], "k_proj": inputs["key"], "v_proj": inputs["value"]}.items():
        if name in weights:
            weights[name](x)
    out = home.out_proj
    if out._forward_pre_hooks and "weight" in out._parameters:
        out(_before_projection(home, args, kwargs))


def _before_projection(home: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What ``out_proj`` multiplies: the output of the attention while its weight is the identity."""
    parameters = home.out_proj._parameters
    before = dict(parameters)
    weight = home.out_proj.weight
    identity = torch.eye(home.embed_dim, dtype=weight.dtype, device=weight.device)
    parameters["weight"] = nn.Parameter(identity, requires_grad=False)
    parameters["bias"] = nn.Parameter(torch.zeros_like(identity[0]), requires_grad=False)
    try:
        output: Tensor = type(home).forward(home, *args, **kwargs)[0]
        return output
    finally:
        parameters |= before


def _cell(home: Any, weights: Mapping[str, nn.Module], input: Tensor, hx: Any = None) -> None:
    hidden = hx[0] if isinstance(hx, tuple) else hx
    if hidden is None:
        hidden = input.new_zeros(*input.shape[:-1], home.hidden_size)
    for name, x in {"ih": input, "hh": hidden}.items():
        if name in weights:
            weights[name](x)


class _Recurrence:
    """One forward pass of an LSTM, GRU or RNN, layer by layer."""

    def __init__(self, home: Any, weights: Mapping[str, nn.Module]):
        self.home, self.weights = home, weights
        self.lengths_B: Tensor | None = None
        self.squeezed = False  # the input has no dimension of sequences

    def run(self, input: Tensor | PackedSequence, hx: Any = None) -> None:
        home = self.home
        if isinstance(input, PackedSequence):
            x_TBC, self.lengths_B = pad_packed_sequence(input)
        else:
            self.squeezed = input.ndim == 2
            x_TBC = input[:, None] if self.squeezed else input.transpose(0, 1) if home.batch_first else input
        states = self._states(x_TBC, hx)
        directions = 2 if home.bidirectional else 1
        x = input if isinstance(input, Tensor) else self._as_input(x_TBC)
        for layer in range(home.num_layers):
            outputs = []
            for backwards in range(directions):
                place = layer * directions + backwards
                suffix = f"_l{layer}{'_reverse' if backwards else ''}"
                state = [s_LBH[place : place + 1] for s_LBH in states]
                turned_TBC = self._turned(x_TBC) if backwards else x_TBC
                self._show(f"ih{suffix}", x)
                out_TBH = self._layer(place, turned_TBC, state)
                before_TBH = torch.cat([state[0].to(out_TBH.dtype), out_TBH[:-1]])
                self._show(f"hh{suffix}", self._as_input(self._turned(before_TBH) if backwards else before_TBH))
                out_TBH = self._layer(place, turned_TBC, state)
                outputs.append(self._turned(out_TBH) if backwards else out_TBH)
            x_TBC = torch.cat(outputs, -1)
            x = self._as_input(x_TBC)

    def _show(self, name: str, x: Tensor) -> None:
        if name in self.weights:
            self.weights[name](x)

    def _states(self, x_TBC: Tensor, hx: Any) -> list[Tensor]:
        """h_0, and of an LSTM c_0, [L, B, H] each."""
        home = self.home
        if hx is not None:
            each = list(hx) if isinstance(hx, tuple) else [hx]
            return [s[:, None] if self.squeezed else s for s in each]
        L, B = home.num_layers * (2 if home.bidirectional else 1), x_TBC.shape[1]
        sizes = [home.proj_size or home.hidden_size, home.hidden_size]
        return [x_TBC.new_zeros(L, B, H) for H in sizes[: 2 if home.mode == "LSTM" else 1]]

    def _layer(self, place: int, x_TBC: Tensor, state: list[Tensor]) -> Tensor:
        """The outputs of one layer in one direction, in the order of its steps."""
        home = self.home
        parameters = [getattr(home, name) for name in home._all_weights[place]]
        function: Any = getattr(torch, home.mode.lower())  # lstm, gru, rnn_tanh or rnn_relu
        options = (home.bias, 1, 0.0, False, False, False)  # layers, dropout, training, bidirectional, batch first
        start = tuple(s.contiguous() for s in state) if home.mode == "LSTM" else state[0].contiguous()
        out: Tensor = function(x_TBC, start, parameters, *options)[0]
        return out

    def _turned(self, x_TBC: Tensor) -> Tensor:
        """Each sequence from its end to its start; padding stays behind it."""
        if self.lengths_B is None:
            return x_TBC.flip(0)
        T = len(x_TBC)
        step_TB = torch.arange(T, device="cpu")[:, None]
        index_TB = torch.where(step_TB < self.lengths_B, self.lengths_B - 1 - step_TB, step_TB).to(x_TBC.device)
        return x_TBC.gather(0, index_TB[..., None].expand_as(x_TBC))

    def _as_input(self, x_TBC: Tensor) -> Tensor:
        """In the layout of the input of the module; of packed sequences, rows without padding."""
        if self.lengths_B is not None:
            steps_TB = torch.arange(len(x_TBC), device="cpu")[:, None] < self.lengths_B
            return x_TBC[steps_TB.to(x_TBC.device)]
        if self.squeezed:
            return x_TBC[:, 0]
        return x_TBC.transpose(0, 1) if self.home.batch_first else x_TBC
