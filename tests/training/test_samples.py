"""Which samples calibrate."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler

from lightning_compress.training.samples import OwnBatches, first_batches, seeded_view, share_of

ROWS = torch.arange(40)


def drawn(loader, batches, seed=0):
    view, said = seeded_view(loader, batches, seed)
    return [batch.tolist() for batch in first_batches(view, batches)], said


def test_the_choice_is_the_seeds_and_in_order():
    loader = DataLoader(ROWS, 4, shuffle=True)
    (first, said), (again, _), (other, _) = drawn(loader, 3), drawn(loader, 3), drawn(loader, 3, seed=1)
    assert first == again != other
    flat = [i for batch in first for i in batch]
    assert flat == sorted(set(flat))
    assert len(flat) == 12
    assert said.startswith("12 of 40 samples, chosen with seed 0, in order: " + ", ".join(map(str, flat[:8])))


def test_the_global_random_state_stays():
    before = torch.get_rng_state()
    drawn(DataLoader(ROWS, 4, sampler=SubsetRandomSampler(range(20))), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_a_sampler_that_keeps_to_a_part_is_respected():
    """A training loader made with SubsetRandomSampler must not lend validation samples."""
    batches, said = drawn(DataLoader(ROWS, 4, sampler=SubsetRandomSampler(range(10, 20))), 9)
    assert sorted(i for batch in batches for i in batch) == list(range(10, 20))
    assert "10 of 10" in said


def test_the_collate_function_is_the_loaders():
    batches, _ = drawn(DataLoader(ROWS, 4, collate_fn=lambda rows: torch.stack(rows) + 1000), 1)
    assert min(batches[0]) >= 1000


def test_a_small_dataset_gives_what_it_has():
    batches, _ = drawn(DataLoader(ROWS[:6], 4, drop_last=True, shuffle=True), 5)
    assert [len(batch) for batch in batches] == [4]
    batches, _ = drawn(DataLoader(ROWS[:3], 4, drop_last=True), 5)
    assert batches == [[0, 1, 2]]


def test_what_cannot_be_indexed_comes_as_it_comes():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from range(100)

    for loader, reason in [
        (DataLoader(Stream(), 2), "an iterable dataset"),
        (DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 2, False)), "a batch sampler of its own"),
    ]:
        batches, said = drawn(loader, 3)
        assert len(batches) == 3
        assert reason in said


def test_ranks_share_a_loader():
    loader = DataLoader(ROWS[:10], 2)
    assert share_of(loader, 0, 1) is loader
    shares = [[i for batch in share_of(loader, rank, 3) for i in batch.tolist()] for rank in range(3)]
    assert shares == [[0, 3, 6, 9], [1, 4, 7, 0], [2, 5, 8, 1]]


def test_several_loaders_go_side_by_side():
    loaders = {"a": DataLoader(ROWS, 2), "b": DataLoader(ROWS + 100, 3)}
    view, said = seeded_view(loaders, 2, 0)
    batches = first_batches(view, 2)
    assert [sorted(batch) for batch in batches] == [["a", "b"]] * 2
    assert len(batches[0]["a"]) == 2
    assert min(batches[0]["b"]) >= 100
    assert "a: 4 of 40" in said
    view, _ = seeded_view(list(loaders.values()), 2, 0)
    assert isinstance(first_batches(view, 1)[0], list)


class Owner:
    def __init__(self, *returned):
        self.returned = list(returned)

    def calibration_dataloader(self):
        return self.returned.pop(0)


@pytest.mark.parametrize("make", [list, iter, lambda rows: DataLoader(rows, None)], ids=["list", "iterator", "loader"])
def test_a_look_at_the_first_own_batch_loses_none(make):
    own, owners = OwnBatches(), [object(), Owner(make([1, 2, 3]), make([4, 5]))]
    assert own.first(owners) == [1]
    assert first_batches(own.loader(owners), 9) == [1, 2, 3]
    assert first_batches(own.loader(owners), 9) == [4, 5]
    assert OwnBatches().first([object()]) is OwnBatches().loader([object()]) is None
    assert OwnBatches().first([Owner([])]) == []


@pytest.mark.parametrize(
    ("returned", "told"), [(None, "None"), (torch.ones(2), "a Tensor"), ({"a": [1]}, "a dict"), (3, "a int")]
)
def test_what_holds_no_batches_is_named(returned, told):
    with pytest.raises(ValueError, match=rf"Owner.calibration_dataloader\(\) returned {told}, expected a DataLoader"):
        OwnBatches().first([Owner(returned)])
