"""Float32 products are full inside, and the user's setting comes back: after errors, beside threads, in both forms."""

import threading
from contextlib import suppress

import pytest
import torch

from lightning_compress.ops.float32_products import full_float32, matmul_precision, users_float32
from lightning_compress.ops.hadamard import hadamard_transform


def settings():
    values = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    with suppress(RuntimeError):
        values.append(torch.get_float32_matmul_precision())
    return values


def as_torch_begins():
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture(params=["high", "medium", "highest", "cuda", "all", "nothing"])
def users(request):
    """What a user has set, by the older interface, by the newer one, or not at all."""
    as_torch_begins()
    before = settings()
    match request.param:
        case "cuda":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        case "all":
            torch.backends.fp32_precision = "tf32"
        case "high" | "medium" | "highest":
            torch.set_float32_matmul_precision(request.param)
    yield settings()
    as_torch_begins()
    assert settings() == before


def is_full():
    return {*settings()} <= {"ieee", "none", "highest"}


def test_products_are_full_inside_and_the_users_again_afterwards(users):
    name = matmul_precision()
    with full_float32():
        assert is_full()
        assert matmul_precision() == name  # the user's
        with users_float32():
            assert settings() == users
            with full_float32(), full_float32():
                assert is_full()
            assert settings() == users
        assert is_full()
    assert settings() == users
    with users_float32():
        assert settings() == users


def test_an_error_leaves_the_users_setting(users):
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert settings() == users


def test_two_threads_leave_the_users_setting_whichever_leaves_first(users):
    entered, leave, states = threading.Event(), threading.Event(), []

    def other():
        with full_float32():
            entered.set()
            leave.wait()
            states.append(is_full())

    thread = threading.Thread(target=other)
    with full_float32():
        thread.start()
        entered.wait()
    assert is_full()  # the other one is inside
    leave.set()
    thread.join()
    assert states == [True]
    assert settings() == users


def test_a_base_of_hadamard_is_multiplied_in_full(monkeypatch):
    states, einsum = [], torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda *args: states.append(is_full()) or einsum(*args))
    torch.set_float32_matmul_precision("high")
    try:
        hadamard_transform(torch.ones(2, 12), torch.ones(12, 12))
        assert states == [True]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
