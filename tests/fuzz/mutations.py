"""Damage done to files: bytes as disks and transfers damage them, values as hands and other programs write them."""

import copy
import json
import random
from typing import Any

__all__ = ["mutated_bytes", "mutated_json"]

JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 10**7, 10**12, 2**63, 2**200, 0.5, -1.0, float("nan"), float("inf"), 1e308,
    "", "x", "../x", "/etc/hostname", "\0", "é" * 300, "float32", "re:(", [], [[]], [None], ["x"], {}, {"x": 1},
)  # fmt: skip


def mutated_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One change of the bytes, and what it was."""
    if not data:
        return b"\0", "one byte put in"
    at = rng.randrange(len(data))
    kind = rng.choice(["bit", "cut", "zeros", "insert", "empty", "noise", "swap", "utf-16"])
    if kind == "bit":
        bit = rng.randrange(8)
        changed = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        return changed, f"bit {bit} of byte {at} flipped"
    if kind == "cut":
        return data[:at], f"cut after {at} bytes"
    if kind == "zeros":
        return data[:at] + bytes(len(data) - at), f"zeros from byte {at} on"
    if kind == "insert":
        extra = rng.randbytes(rng.randint(1, 9))
        return data[:at] + extra + data[at:], f"{extra!r} put in at byte {at}"
    if kind == "empty":
        return b"", "emptied"
    if kind == "noise":
        noise = rng.randbytes(min(16, len(data) - at))
        return data[:at] + noise + data[at + len(noise) :], f"{noise!r} written over byte {at}"
    if kind == "swap":
        middle = len(data) // 2
        return data[middle:] + data[:middle], "halves swapped"
    return data.decode("latin-1").encode("utf-16"), "in UTF-16"


def mutated_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One to three changes of values or keys of a JSON document, and what they were."""
    tree, notes = json.loads(data), []
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        path = rng.choice(places)
        kind = rng.choice(["junk", "junk", "junk", "drop", "move", "number"])
        tree, note = _changed(rng, tree, path, kind, places)
        notes.append(f"{'.'.join(map(str, path)) or 'root'}: {note}")
    return json.dumps(tree).encode(), "; ".join(notes)


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:20]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _places(value, (*path, key))


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _changed(
    rng: random.Random, tree: Any, path: tuple[Any, ...], kind: str, places: list[tuple[Any, ...]]
) -> tuple[Any, str]:
    tree = copy.deepcopy(tree)
    old = _at(tree, path)
    if kind == "drop" and path:
        del _at(tree, path[:-1])[path[-1]]
        return tree, "dropped"
    if kind == "move":
        source = rng.choice(places)
        new, note = copy.deepcopy(_at(tree, source)), f"takes the value of {'.'.join(map(str, source)) or 'root'}"
    elif kind == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        new = rng.choice([old + 1, old * 2, old // 2, -old, old * 1000])
        note = f"{old} becomes {new}"
    else:
        new = rng.choice(JUNK)
        note = f"becomes {new!r:.60}"
    if not path:
        return new, note
    _at(tree, path[:-1])[path[-1]] = new
    return tree, note
