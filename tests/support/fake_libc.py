"""Stands in for the C library, and notes the calls about memory."""

from typing import Any


class FakeLibrary:
    """Notes its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def malloc_trim(self, padding: int) -> None:
        self.calls.append("trim")

    def mallopt(self, option: int, value: int) -> None:
        self.calls.append((option, value))
