import gc

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_compress.layerwise.input_hessian import HessianPool, InputHessian, NonFiniteHessianError
from tests.support.quantization_runs import correlated


def feed(pool: HessianPool, name: str, x: Tensor, layout: str = "features last") -> None:
    pool.update(name, x, layout, lambda: x.reshape(1, -1, x.shape[-1]))


def moment(pool: HessianPool, name: str) -> Tensor:
    shared = pool.get(name)
    assert shared is not None
    assert shared.statistic is not None
    return shared.statistic.value()[0]


def test_splitting_the_batch_changes_nothing():
    x = correlated(600, 40)
    whole, parts = InputHessian(1, 40), InputHessian(1, 40)
    whole.update(x[None])
    for piece in x.split([7, 230, 363]):
        parts.update(piece[None])
    assert_close(parts.value(), whole.value())
    assert_close(whole.value()[0], (x.double().t() @ x.double() / 600).float())
    assert parts.tokens == whole.tokens == 600


def test_the_order_of_batches_and_how_ranks_share_them_change_no_bit():
    batches = correlated(24 * 64, 100).mul(torch.logspace(-3, 3, 100)).split(64)

    def value(*shares: list[Tensor]) -> Tensor:
        stats = [InputHessian(1, 100) for _ in shares]
        for stat, share in zip(stats, shares, strict=True):
            for x in share:
                stat.update(x[None])
        for stat in stats[1:]:
            stats[0].sums_PT += stat.sums_PT
            stats[0].tokens += stat.tokens
        return stats[0].value()

    whole = value(list(batches))
    assert torch.equal(value(list(batches[::-1])), whole)
    for ranks in (2, 3, 4):
        assert torch.equal(value(*[list(batches[rank::ranks]) for rank in range(ranks)]), whole)


def test_partitions_are_kept_apart():
    x = torch.randn(3, 50, 8)
    stat = InputHessian(3, 8)
    stat.update(x[:, :20])
    stat.update(x[:, 20:])
    assert_close(stat.value(), torch.stack([p.t() @ p / 50 for p in x]))


def test_take_gives_the_value_and_lets_the_sum_go():
    stat = InputHessian(1, 4)
    stat.update(torch.ones(1, 2, 4))
    assert torch.equal(stat.take(), torch.ones(1, 4, 4))
    assert stat.sums_PT.numel() == 0
    assert stat.tokens == 2


def test_one_tensor_one_statistic():
    pool, xs = HessianPool(), [torch.randn(5, 8) for _ in range(3)]
    for x in xs:
        for name in "qkv":
            feed(pool, name, x)
        feed(pool, "o", x.clone())
    assert pool.get("q") is pool.get("k") is pool.get("v")
    assert pool.get("o") is not pool.get("q")
    assert torch.equal(moment(pool, "q"), moment(pool, "o"))
    assert pool.get("q").statistic.tokens == 15


def test_members_may_come_in_any_order():
    pool, xs = HessianPool(), [torch.randn(5, 8) for _ in range(3)]
    for x, order in zip(xs, ("qk", "kq", "qk"), strict=True):
        for name in order:
            feed(pool, name, x)
    assert_close(moment(pool, "k"), torch.cat(xs).t() @ torch.cat(xs) / 15)


def test_in_lockstep_a_later_module_joins_a_statistic_that_was_used():
    pool, xs = HessianPool(), [torch.randn(5, 8) for _ in range(3)]
    for x in xs:
        feed(pool, "q", x)
    used = pool.get("q")
    for x in xs:
        feed(pool, "k", x)
    assert pool.get("k") is used


def test_without_sharing_each_has_its_own():
    pool, x = HessianPool(share=False), torch.randn(5, 8)
    feed(pool, "q", x)
    feed(pool, "k", x)
    assert pool.get("q") is not pool.get("k")


def test_another_layout_does_not_share():
    pool, x = HessianPool(), torch.randn(5, 8)
    feed(pool, "a", x, "3x3")
    feed(pool, "b", x, "1x1")
    assert pool.get("a") is not pool.get("b")


def test_a_tensor_changed_in_place_is_another_input():
    pool, x = HessianPool(), torch.ones(5, 8)
    feed(pool, "a", x)
    x.mul_(2)
    feed(pool, "b", x)
    assert_close(moment(pool, "a"), torch.ones(8, 8))
    assert_close(moment(pool, "b"), torch.full((8, 8), 4.0))


def test_a_dead_tensor_is_never_mistaken_for_a_new_one():
    pool = HessianPool()
    for i in range(8):  # the allocator reuses the ids of dead objects
        x = torch.full((2, 4), float(i))
        feed(pool, f"m{i}", x)
        del x
        gc.collect()
    for i in range(8):
        assert_close(moment(pool, f"m{i}"), torch.full((4, 4), float(i) ** 2))


def test_the_same_module_called_twice_with_one_tensor_counts_twice():
    pool, x, y = HessianPool(), torch.ones(1, 4), torch.zeros(1, 4)
    for name in ("a", "a", "b", "b"):
        feed(pool, name, x)
    feed(pool, "a", y)
    feed(pool, "b", y)
    assert pool.get("b").statistic.tokens == 3
    assert_close(moment(pool, "a"), torch.full((4, 4), 2 / 3))


def test_modules_that_diverge_after_sharing_are_named():
    pool, x, y = HessianPool(), torch.randn(5, 8), torch.randn(5, 8)
    for name in "qk":
        feed(pool, name, x)
    feed(pool, "q", y)
    with pytest.raises(ValueError, match=r"'k' received the same input tensor as 'q' in some .*share_inputs=False"):
        feed(pool, "k", torch.randn(5, 8))


def test_a_module_that_missed_a_batch_of_the_others_is_named():
    pool, x = HessianPool(), torch.randn(5, 8)
    for name in "qk":
        feed(pool, name, x)
    feed(pool, "q", torch.randn(5, 8))
    with pytest.raises(ValueError, match="'k' received the same input tensor as 'q' in some"):
        pool.get("k")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_name_module_and_batch(bad):
    pool = HessianPool()
    feed(pool, "model.down", torch.randn(5, 8))
    x = torch.randn(5, 8)
    x[3, 2] = bad
    with pytest.raises(ValueError, match=r"input 1 \(counted from 0\) of 'model\.down' holds NaN or Inf"):
        feed(pool, "model.down", x)


def test_squares_beyond_float32_and_another_width_have_separate_messages():
    pool = HessianPool()
    feed(pool, "a", torch.randn(5, 8))
    with pytest.raises(NonFiniteHessianError, match=r"input 1 \(counted from 0\) of 'a' holds numbers up to 1e\+20"):
        feed(pool, "a", torch.full((2, 8), 1e20))
    pool = HessianPool()
    feed(pool, "a", torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"input 1 \(counted from 0\) of 'a': 1 x 6 input columns, expected 1 x 8"):
        feed(pool, "a", torch.randn(5, 6))


def test_a_module_without_tokens_has_no_statistic():
    pool = HessianPool()
    assert pool.get("a") is None
    feed(pool, "a", torch.zeros(0, 8))
    assert pool.get("a") is None


def test_dropped_statistics_are_freed_and_stale_ones_go():
    pool, x, y = HessianPool(), torch.randn(5, 8), torch.randn(5, 8)
    feed(pool, "q", x)
    feed(pool, "o", y)
    pool.get("q"), pool.get("o")
    del x
    gc.collect()
    pool.drop_stale(pool.alive())  # nobody can join q's any more; o's input is still alive
    assert pool.get("q") is None
    assert pool.get("o") is not None
    pool.drop("o")
    assert pool.get("o") is None
    assert not pool._inputs


def test_a_statistic_made_under_inference_mode_can_be_used_outside():
    pool = HessianPool()
    with torch.inference_mode():
        for _ in range(2):
            feed(pool, "a", torch.ones(3, 4))
    assert_close(moment(pool, "a"), torch.ones(4, 4))
