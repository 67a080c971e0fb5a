"""Peak memory in bytes, whatever the system counts in."""

import builtins
import resource
import sys
from types import SimpleNamespace

import pytest

from lightning_compress.training import results


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_unit_of_the_system(monkeypatch, platform, unit):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    assert results.peak_memory_bytes() == 5000 * unit


def test_it_is_that_of_this_process():
    assert 10 * 2**20 < results.peak_memory_bytes() < 2**40


def test_a_system_without_the_module_resource(monkeypatch):
    real = builtins.__import__

    def of_windows(name, *args, **kwargs):
        if name == "resource":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", of_windows)
    assert results.peak_memory_bytes() is None
