"""What GPTQ chooses on held-out batches does better on inputs that it never saw, and is said in the ledger."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from lightning_compress.layerwise.factor import factorize
from lightning_compress.modifiers.gptq.held_out import DAMPENINGS, Choice, choose, damped
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.gptq.refinement import refined, weighted_error
from lightning_compress.modifiers.gptq.solver import Matrix, Solver
from tests.support.quantization_runs import attention, batches, calibrate, correlated

C = 64
W3 = QuantizationArgs(num_bits=3, type="int", symmetric=True, strategy="group", group_size=32)


def moment(tokens: int, seed: int) -> torch.Tensor:
    X = correlated(tokens, C, seed)
    return X.T @ X / tokens


def test_the_choice_is_the_best_of_all_on_the_other_half():
    W = torch.randn(32, C, generator=torch.Generator().manual_seed(0))
    matrix = Matrix(W, torch.ones(32, C, dtype=torch.bool))
    A, B, solver = moment(80, 1), moment(80, 2), Solver(W3, "hessian")
    errors = {}
    for dampening in DAMPENINGS:
        factor = factorize(A, dampening, True)
        solved = solver([matrix], factor)
        better = refined(solver, solved, [matrix], damped(A, factor))
        for name, found in ((False, solved), (True, better)):
            errors[dampening, name] = float(weighted_error(W, found[0].Q_RC, B).sum())
    found = choose(solver, [matrix], (A, B), DAMPENINGS, True, True)
    assert found is not None
    assert errors[found.dampening, found.refine] == min(errors.values())
    plain = choose(solver, [matrix], (A, B), DAMPENINGS, True, False)
    assert plain is not None
    assert (plain.refine, errors[plain.dampening, False]) == (False, min(errors[d, False] for d in DAMPENINGS))


def test_refinement_that_does_worse_on_held_out_inputs_is_not_chosen():
    """H of a few tokens with next to no damping is fitted, noise and all: other inputs lose more by it."""
    W = torch.randn(32, C, generator=torch.Generator().manual_seed(0))
    matrix = Matrix(W, torch.ones(32, C, dtype=torch.bool))
    A, B, solver = moment(16, 1), torch.eye(C), Solver(W3, "hessian")
    factor = factorize(A, 0.01, True)
    solved = solver([matrix], factor)
    better = refined(solver, solved, [matrix], damped(A, factor))
    errors = [float(weighted_error(W, found[0].Q_RC, B).sum()) for found in (solved, better)]
    assert errors[1] > errors[0]
    assert choose(solver, [matrix], (A, B), (0.01,), True, True) == Choice(0.01, False)
    other = choose(solver, [matrix], (A, A), (0.01,), True, True)
    assert other == Choice(0.01, True)


def test_a_half_of_which_no_h_is_positive_definite_gives_no_choice():
    matrix = Matrix(torch.ones(4, C), torch.ones(4, C, dtype=torch.bool))
    A = torch.full((C, C), float("nan"))
    assert choose(Solver(W3, "minmax"), [matrix], (A, A), (0.0,), True, True) is None


@pytest.mark.parametrize("groups", [1, 4])
def test_partitions_of_a_convolution_are_judged_by_their_own_inputs(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(32, 32, 4, groups=groups))
    scheme = {"conv": {"targets": ["Conv1d"], "weights": W3.model_dump(include={"num_bits", "type", "symmetric"})}}
    scheme["conv"]["weights"] |= {"strategy": "channel"}
    data = [torch.randn(4, 32, 20, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    modifier = GPTQModifier(config_groups=scheme, dampening_frac="auto", refine=True)
    (row,) = calibrate(model, modifier, data)
    assert any("damping" in flag for flag in row.flags)
    assert any("refined" in flag for flag in row.flags)
    codes = model[0].weight.detach().flatten(1)
    assert all(len(row.unique()) <= 8 for row in codes)


def test_unseen_inputs_lose_less():
    """Few tokens, many columns: the plain choice fits their noise. Summed over layers and seeds."""
    plain_error, chosen_error = 0.0, 0.0
    for seed in range(3):
        dense = attention(seed)
        data = batches(4, tokens=24, seed=10 * seed)
        unseen = correlated(4096, C, 1000 + seed)
        H = unseen.T @ unseen / len(unseen)
        made = {}
        for name, settings in (("plain", {}), ("chosen", {"dampening_frac": "auto", "refine": True})):
            model = attention(seed)
            calibrate(model, GPTQModifier(scheme="W3A16", group_size=32, **settings), data)
            made[name] = sum(
                float(weighted_error(getattr(dense, n).weight.data, getattr(model, n).weight.data, H).sum())
                for n in "qkv"
            )
        plain_error += made["plain"]
        chosen_error += made["chosen"]
    assert chosen_error < 0.95 * plain_error


def test_one_batch_leaves_nothing_to_hold_out_and_the_ledger_says_so():
    ledger = calibrate(attention(), GPTQModifier(scheme="W4A16", group_size=32, refine=True), batches(1))
    flags = [flag for row in ledger for flag in row.flags if "held out" in flag]
    assert len(flags) == 4


def test_all_batches_count_in_the_end():
    """Chosen on halves, solved on both: the ledger counts every token."""
    ledger = calibrate(attention(), GPTQModifier(scheme="W4A16", group_size=32, dampening_frac="auto"), batches(4))
    assert {row.tokens for row in ledger if row.module == "q"} == {4 * 96}


def test_other_words_than_auto_are_refused():
    with pytest.raises(ValueError, match="dampening_frac"):
        GPTQModifier(scheme="W4A16", dampening_frac="best")
    with pytest.raises(ValueError, match="dampening_frac"):
        GPTQModifier(scheme="W4A16", dampening_frac=-0.1)
