"""The weights for a target of the dense model against a slow least-squares solution, and the gate that refuses them."""

import warnings

import torch
from torch import nn

from lightning_compress import GPTQModifier, SparseGPTModifier, compress
from lightning_compress.layerwise.dense_target import DAMPENING, dense_step, moved
from lightning_compress.layerwise.layer import Hessian, Layer
from tests.layerwise.test_owners import Net, batches
from tests.support.quantization_runs import correlated, int4
from tests.support.smoothing_models import batches as moe_batches
from tests.support.smoothing_models import build, ignore, targets

C = 24


def hessian(X, dense, X_held_out, dense_held_out):
    """H and D of two halves with equal numbers of tokens."""
    pairs = ((X, dense), (X_held_out, dense_held_out))
    H = [x.T @ x / len(x) for x, _ in pairs]
    D = [(y - x).T @ x / len(x) for x, y in pairs]
    return Hessian(sum(H) / 2, 2 * len(X), ["layer"], (H[0], H[1]), sum(D) / 2, (D[0], D[1]))


def layer(rows=12):
    W = torch.randn(rows, C, generator=torch.Generator().manual_seed(0))
    return Layer("layer", nn.Linear(C, rows), W)


def streams(tokens, seed, drift, noise=0.01):
    """Inputs, and those of the dense model: a fixed linear function of them, and noise of the token."""
    X = correlated(tokens, C, seed)
    M = torch.randn(C, C, generator=torch.Generator().manual_seed(7)) * drift / C**0.5
    return X, X + X @ M + noise * torch.randn(tokens, C, generator=torch.Generator().manual_seed(seed + 100))


def test_the_weights_are_those_of_least_squares():
    """With ridge: min over V of sum ||W x_dense - V x||^2 / N + lambda ||V - W||^2, solved row by row in float64."""
    (X, dense), (X2, dense2) = streams(400, 1, 0.5), streams(400, 2, 0.5)
    both, part = hessian(X, dense, X2, dense2), layer()
    step, note = dense_step(both, [part])
    share = float(note.removeprefix("dense target "))
    assert share > 0.9
    tokens, targets = torch.cat([X, X2]).double(), torch.cat([dense, dense2]).double() @ part.W_RC.double().T
    ridge = DAMPENING * both.H_CC.diagonal().mean().double()
    rows = torch.cat([tokens, (ridge * len(tokens)).sqrt() * torch.eye(C, dtype=torch.float64)])
    pulled = torch.cat([targets, (ridge * len(tokens)).sqrt() * part.W_RC.double().T])
    exact = torch.linalg.lstsq(rows, pulled).solution.T
    expected = part.W_RC.double() + share * (exact - part.W_RC.double())
    torch.testing.assert_close(moved(part.W_RC, step).double(), expected, rtol=2e-2, atol=2e-3)


def test_the_share_has_the_least_error_on_the_other_half():
    """Ten of its neighbours do worse, judged on both halves by single tokens."""
    halves = streams(60, 1, 0.3, 2.0), streams(60, 2, 0.3, 2.0)
    part = layer()
    _, note = dense_step(hessian(*halves[0], *halves[1]), [part])
    share = float(note.removeprefix("dense target "))
    assert 0.05 < share < 0.95

    def error(share):
        total = 0.0
        for (X, dense), (X2, dense2) in (halves, halves[::-1]):
            H = X.T @ X / len(X)
            damped = H + DAMPENING * H.diagonal().mean() * torch.eye(C)
            S = ((dense - X).T @ X / len(X)) @ torch.linalg.inv(damped)
            W = part.W_RC + share * part.W_RC @ S
            total += float((part.W_RC @ dense2.T - W @ X2.T).square().sum())
        return total

    assert error(share) < min(error(share + d) for d in (-0.05, -0.02, 0.02, 0.05))


def test_a_drift_that_held_out_batches_do_not_have_is_refused():
    X, dense = streams(60, 1, 0.5)
    X2, other = streams(60, 2, 0.5)
    step, note = dense_step(hessian(X, dense, X2, 2 * X2 - other), [layer()])  # the other way round
    assert step is None
    assert note == "dense target refused on held-out batches"
    W = layer().W_RC
    assert moved(W, step) is W


def test_without_dense_inputs_or_a_second_batch_the_weights_stay():
    X, dense = streams(60, 1, 0.5)
    plain = Hessian(X.T @ X / 60, 60, ["layer"])
    assert dense_step(plain, [layer()]) == (None, "dense inputs not known: target of the layer")
    one = Hessian(X.T @ X / 60, 60, ["layer"], None, (dense - X).T @ X / 60)
    note = "one calibration batch: nothing held out to choose the target by"
    assert dense_step(one, [layer()]) == (None, note)
    same = hessian(X, X, X, X)
    assert dense_step(same, [layer()]) == (None, None)


def test_a_walk_gives_the_moments_of_both_streams(monkeypatch):
    """D of each layer from a compressed model that is run beside a dense one; zero in the first block."""
    seen = {}
    take = GPTQModifier.prepare

    def prepare(self, hessian, layers):
        seen.update({part.name: hessian.D_CC.clone() for part in layers if hessian.D_CC is not None})
        return take(self, hessian, layers)

    monkeypatch.setattr(GPTQModifier, "prepare", prepare)
    model, dense, data = Net(2), Net(2), batches(3)
    compress(model, GPTQModifier(scheme="W4A16", group_size=16, target="dense"), data, walk="two_pass")
    assert {name.partition(".")[0] for name in seen} == {"blocks"}  # the head has no dense inputs
    inputs = {}
    mixed = Net(2)
    mixed.blocks[0].load_state_dict(model.blocks[0].state_dict())  # as it was when the second block was calibrated
    for which, net in (("dense", dense), ("mixed", mixed)):
        for name, module in net.blocks[1].named_modules(prefix="blocks.1"):
            module.register_forward_pre_hook(
                lambda _m, x, key=(which, name): inputs.setdefault(key, []).append(x[0].detach().flatten(0, 1).double())
            )
        with torch.no_grad():
            for batch in data:
                net(batch)
    for name, D in seen.items():
        if name.startswith("blocks.0"):
            assert not D.any()
            continue
        x, y = (torch.cat(inputs[which, name]) for which in ("mixed", "dense"))
        torch.testing.assert_close(D.double(), (y - x).T @ x / len(x), rtol=1e-3, atol=1e-6)
        assert D.any()


def test_single_experts_of_a_mixture_keep_their_own_target():
    """Other tokens reach them in the dense model, at times as many."""
    model, data = build("mixtral"), moe_batches("mixtral")
    groups = {"all": {"targets": targets("mixtral"), "weights": int4(group_size=8)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ledger = compress(model, GPTQModifier(config_groups=groups, ignore=ignore(model), target="dense"), data)
    flags = {row.module: "; ".join(row.flags) for row in ledger if row.technique == "gptq"}
    experts = [name for name in flags if ".experts." in name]
    assert experts
    assert all(("dense inputs not known" in flags[name]) == (".experts." in name) for name in flags)


def test_a_modifier_with_the_target_comes_nearer_to_the_dense_model():
    """Both solvers; measured on batches of another seed."""
    unseen = torch.randn(64, 20, 48, generator=torch.Generator().manual_seed(50))
    data = batches(24)
    makers = (
        lambda target: GPTQModifier(scheme="W4A16", group_size=16, ignore="head", target=target),
        lambda target: SparseGPTModifier(ignore="head", sparsity=0.6, target=target),
    )
    for make in makers:
        errors = {}
        for target in ("layer", "dense"):
            model, dense = Net(4), Net(4)
            compress(model, make(target), data)
            with torch.no_grad():
                errors[target] = float((model(unseen) - dense(unseen)).square().mean())
        assert errors["dense"] < errors["layer"]
