"""What the weights of recurrent modules and attentions multiply, beside recurrences written out step by step."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.testing import assert_close

from lightning_compress.layers.module_weights import reveal, weights_inside

C, H, B, T = 3, 5, 4, 6


def seen(home, *args, **kwargs):
    """The inputs of the weights of ``home`` in one call, rows only, by name; the outputs are those without hooks."""
    with torch.no_grad():
        expected = home(*args, **kwargs)
    reveal(home)
    rows: dict[str, torch.Tensor] = {}
    for name, weight in weights_inside(home).items():
        weight.register_forward_pre_hook(lambda m, x, name=name: rows.__setitem__(name, x[0].detach()))
    with torch.no_grad():
        assert_close(home(*args, **kwargs), expected, rtol=0, atol=0)
    return rows


def cell_of(home, layer, backwards):
    """The cell with the weights of one layer and direction."""
    kind = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}.get(home.mode)
    first = home.input_size if layer == 0 else home.hidden_size * (2 if home.bidirectional else 1)
    options = {} if kind else {"nonlinearity": home.mode.removeprefix("RNN_").lower()}
    cell = (kind or nn.RNNCell)(first, home.hidden_size, **options)
    suffix = f"_l{layer}{'_reverse' if backwards else ''}"
    cell.load_state_dict({name: getattr(home, name + suffix) for name in cell.state_dict()})
    return cell


def by_hand(home, x_TC, start=None):
    """Inputs of all weights for one sequence [T, C], step by step."""
    rows = {}
    for layer in range(home.num_layers):
        outputs = []
        for backwards in range(2 if home.bidirectional else 1):
            cell = cell_of(home, layer, backwards)
            place = layer * (2 if home.bidirectional else 1) + backwards
            h = torch.zeros(home.hidden_size) if start is None else start[0][place]
            c = torch.zeros(home.hidden_size) if start is None else start[1][place]
            before, after = [], []
            for x in x_TC.flip(0) if backwards else x_TC:
                before.append(h)
                h, c = cell(x, (h, c)) if home.mode == "LSTM" else (cell(x, h), c)
                after.append(h)
            turn = (lambda steps: steps[::-1]) if backwards else (lambda steps: steps)
            suffix = f"_l{layer}{'_reverse' if backwards else ''}"
            rows[f"ih{suffix}"], rows[f"hh{suffix}"] = x_TC, torch.stack(turn(before))
            outputs.append(torch.stack(turn(after)))
        x_TC = torch.cat(outputs, -1)
    return rows


KINDS = {
    "lstm": lambda: nn.LSTM(C, H),
    "lstm of two layers, both directions, batch first": lambda: nn.LSTM(C, H, 2, bidirectional=True, batch_first=True),
    "gru, both directions": lambda: nn.GRU(C, H, 2, bidirectional=True),
    "rnn, relu": lambda: nn.RNN(C, H, 2, nonlinearity="relu", batch_first=True),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_inputs_are_those_of_cells_run_step_by_step(kind):
    torch.manual_seed(0)
    home = KINDS[kind]().eval()
    x_BTC = torch.randn(B, T, C)
    rows = seen(home, x_BTC if home.batch_first else x_BTC.transpose(0, 1))
    assert rows.keys() == weights_inside(home).keys()
    for name, of_module in rows.items():
        expected = torch.stack([by_hand(home, x_TC)[name] for x_TC in x_BTC])
        assert_close(of_module if home.batch_first else of_module.transpose(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_sorted", [True, False])
@torch.no_grad()
def test_padding_of_packed_sequences_is_left_out(is_sorted):
    torch.manual_seed(0)
    home = nn.LSTM(C, H, 2, bidirectional=True).eval()
    lengths = [6, 4, 3, 1] if is_sorted else [3, 6, 1, 4]
    each = [torch.randn(length, C) for length in lengths]
    packed = pack_padded_sequence(pad_sequence(each), torch.tensor(lengths), enforce_sorted=is_sorted)
    start = (torch.randn(4, 4, H), torch.randn(4, 4, H))
    rows = seen(home, packed, start)
    for name, of_module in rows.items():
        hand = [by_hand(home, x, (start[0][:, b], start[1][:, b]))[name] for b, x in enumerate(each)]
        expected = torch.cat(hand)
        assert of_module.shape == expected.shape
        order = [torch.cdist(row[None], of_module).argmin() for row in expected]  # rows come step by step
        assert sorted(order) == list(range(len(expected)))
        assert_close(of_module[torch.stack(order)], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_sequence_without_a_batch_and_a_projection():
    home = nn.LSTM(C, H, proj_size=2).eval()
    x_TC = torch.randn(T, C)
    out_TH = home(x_TC)[0]
    rows = seen(home, x_TC)
    assert set(rows) == {"ih_l0", "hh_l0"}  # torch gives no call out what hr_l0 multiplies
    assert_close(rows["hh_l0"], torch.cat([torch.zeros(1, 2), out_TH[:-1]]), rtol=0, atol=1e-6)


@torch.no_grad()
def test_cells_and_attention_get_their_arguments():
    cell, x, h = nn.LSTMCell(C, H), torch.randn(B, C), torch.randn(B, H)
    rows = seen(cell, x, (h, torch.randn(B, H)))
    assert torch.equal(rows["ih"], x)
    assert torch.equal(rows["hh"], h)
    assert (seen(nn.GRUCell(C, H), x)["hh"] == 0).all()
    for sizes in ({}, {"kdim": 6, "vdim": 2}):
        home = nn.MultiheadAttention(4, 2, **sizes).eval()
        query, key, value = torch.randn(T, B, 4), torch.randn(7, B, home.kdim), torch.randn(7, B, home.vdim)
        rows = seen(home, query, value=value, key=key)
        assert all(torch.equal(rows[f"{name}_proj"], x) for name, x in {"q": query, "k": key, "v": value}.items())


@pytest.mark.parametrize("need_weights", [True, False])
@torch.no_grad()
def test_the_projection_of_an_attention_gets_what_it_multiplies(need_weights):
    home = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(B, T, 8)
    inputs = []
    home.out_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    home(x, x, x, need_weights=need_weights)
    assert not inputs  # the module alone reads the weight without a call
    reveal(home)
    weight, bias = home.out_proj.weight, home.out_proj.bias
    out = home(x, x, x, need_weights=need_weights)[0]
    assert home.out_proj.weight is weight
    assert home.out_proj.bias is bias
    assert_close(nn.functional.linear(inputs[0], weight, bias), out, rtol=0, atol=1e-6)
