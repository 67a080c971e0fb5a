from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from lightning_compress.calibration.activations import (
    HIDDEN,
    BatchRunner,
    BlockCall,
    SegmentInputs,
    find_nonfinite,
    put,
    small_sample,
    take,
    tensors_of,
    token_mask,
)
from tests.support.fake_cuda import fake_cuda

# -- how a batch enters -----------------------------------------------------------------------------------------------


def test_tensors_go_where_the_model_is():
    model = nn.Linear(2, 2, device="meta")
    assert BatchRunner(model, lambda m, b: b["x"][0].device.type)({"x": [torch.ones(2)]}) == "meta"


def test_masks():
    keep = torch.tensor([[1, 0], [1, 1]])
    assert token_mask({"attention_mask": keep}).tolist() == [[True, False], [True, True]]
    assert token_mask({"attention_mask": torch.ones(2, 2)}) is None
    assert token_mask({"attention_mask": torch.ones(2, 1, 2, 2)}) is None
    assert token_mask({}) is None
    assert token_mask(torch.ones(2, 2)) is None


# -- inputs of a segment -----------------------------------------------------------------------------------------------


def test_what_blocks_and_batches_share_is_kept_once():
    inputs = SegmentInputs(torch.device("cpu"))
    for i in range(3):
        mask, table = torch.full((2, 2), i), torch.arange(4)  # a mask per batch, always the same table
        call = BlockCall((HIDDEN, None), {"mask": mask, "table": (table, [table])})
        inputs.add(torch.full((2,), float(i)), {"a": call, "b": BlockCall((HIDDEN,), {"mask": mask})})
    tables = [calls["a"].kwargs["table"] for calls in inputs.calls]
    assert len({id(t) for outer, (inner,) in tables for t in (outer, inner)}) == 1
    for i, calls in enumerate(inputs.calls):
        assert calls["a"].kwargs["mask"] is calls["b"].kwargs["mask"]
        assert calls["a"].kwargs["mask"][0, 0] == i


def test_arguments_come_back_with_the_hidden_state_in_its_place():
    inputs = SegmentInputs(None)
    hidden, mask = torch.ones(2), torch.zeros(2)
    inputs.add(hidden, {"a": BlockCall((1, HIDDEN), {"mask": mask}), "b": BlockCall((), {"x": HIDDEN})})
    args, kwargs = inputs.arguments(0, "a", None, copy=False)
    assert args[0] == 1
    assert args[1] is hidden
    assert kwargs["mask"] is mask
    inputs.replace(0, torch.full((2,), 2.0))
    assert inputs.arguments(0, "b", None, copy=False)[1]["x"].tolist() == [2, 2]
    inputs.arguments(0, "a", None, copy=True)[0][1].zero_()  # a block that writes into its input
    assert inputs.hidden[0].tolist() == [2, 2]
    assert inputs.arguments(0, "never captured", None, copy=False)[0][0] is inputs.hidden[0]


def test_a_copy_to_the_host_is_waited_for_by_all_but_its_gpu():
    with fake_cuda() as gpu:
        inputs, hidden = SegmentInputs(torch.device("cpu")), torch.ones(2, dtype=torch.float32, device="cuda:0")
        inputs.add(hidden, {})
        with pytest.raises(RuntimeError, match="before it has arrived"):
            inputs.hidden[0].sum()
        for reader, waits in (("cuda:0", 0), ("cuda:1", 1), ("cpu", 1), (None, 1)):
            inputs.replace(0, hidden + 1)
            gpu.reset()
            (moved,), _ = inputs.arguments(0, "block", reader and torch.device(reader), copy=False)
            assert moved.device == torch.device(reader or "cpu")
            assert gpu.syncs.total() == waits
            assert moved.cpu().tolist() == [2, 2]
        assert inputs.read(0).tolist() == [2, 2]  # waited for already
        assert gpu.pageable.total() == 0


Pair = namedtuple("Pair", "hidden weights")


@pytest.mark.parametrize(
    ("output", "at"),
    [
        (torch.ones(1), None),
        ((torch.ones(1), 5), 0),
        ([4, torch.ones(1)], 1),
        ({"h": torch.ones(1)}, "h"),
        (Pair(torch.ones(1), 3), 0),
    ],
)
def test_outputs_are_built_as_they_were(output, at):
    hidden = torch.full((1,), 7.0)
    built = put(output, at, hidden)
    assert type(built) is type(output)
    assert take(built, at) is hidden
    assert take(output, at) is not hidden


# -- is it finite -----------------------------------------------------------------------------------------------------


def test_padding_is_not_looked_at():
    x, mask = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    x[1, 2, 0] = torch.nan
    assert find_nonfinite([x], mask) == "NaN"
    mask[1, 2] = False
    assert find_nonfinite([x], mask) is None
    assert find_nonfinite([x[0]], mask) is None
    assert find_nonfinite([x.flatten()], mask) == "NaN"  # no tokens to tell apart
    assert find_nonfinite({"a": (torch.tensor(torch.inf),)}, None) == "Inf"


# -- a small sample ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "shapes"),
    [
        (torch.ones(4, 3, 8, 8), [(1, 3, 8, 8)]),
        ((torch.ones(4, 100), torch.ones(4)), [(1, 100), (1,)]),
        ({"input_ids": torch.ones(4, 100).long(), "attention_mask": torch.ones(4, 100).bool()}, [(1, 32), (1, 32)]),
        (UserDict({"input_ids": torch.ones(1, 100).long()}), [(1, 32)]),
        ({"input_ids": torch.ones(4, 100).long(), "target": torch.ones(4, 100)}, [(1, 100), (1, 100)]),
    ],
)
def test_a_small_sample_is_one_row_and_of_ids_a_few(batch, shapes):
    assert [tuple(t.shape) for t in tensors_of(small_sample(batch))] == shapes


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(4, 3), torch.ones(2, 7)),  # nodes and edges of a graph, say
        (torch.ones(4, 3), torch.tensor(2)),
        torch.ones(1, 3),  # small enough
        {"input_ids": torch.ones(1, 8).long()},
        "text",
    ],
)
def test_no_sample_is_cut_where_it_is_not_clear_how(batch):
    assert small_sample(batch) is None
