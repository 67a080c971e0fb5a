"""Registers that an asynchronous product still reads when the machine code of sm_90 writes them.

A WGMMA (HGMMA, QGMMA, IGMMA) whose first operand is in registers reads them until a wait says that its group has ended.
ptxas of CUDA 12.9 can place writes before that wait, and the sums are wrong without any message (triton #11781).
Every path through the code is followed, loops and branches among them.
"""

import re
from dataclasses import dataclass

__all__ = ["Hazards", "hazards"]

PRODUCT = re.compile(r"[HQI]GMMA\.64x(\d+)x\d+\S* R(\d+), (?:R(\d+)|gdesc)")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
OPERAND = 4  # registers of 64 rows of a product: 8 words of 16 bits, 16 of 8 bits, 4 of 32 bits
NOT_WRITTEN = (  # their first register is read
    "BAR", "BRX", "JMX", "RET", "CALL", "WARPSYNC", "NANOSLEEP", "R2P", "ISETP", "FSETP", "HSETP2", "DSETP",
)  # fmt: skip
LEAVES = ("EXIT", "RET", "BRA", "JMP")  # without a predicate, nothing follows

Pending = dict[int, int]  # register -> number of groups that were closed since its product, its own among them


@dataclass(frozen=True)
class Hazards:
    """``products``: number of those with an operand in registers; ``writes``: the writes that are too early."""

    products: int
    writes: list[str]


def hazards(code: str) -> Hazards:
    """Reads what ``nvdisasm -c`` prints for one kernel."""
    instructions, targets = _parse(code)
    states: dict[int, Pending] = {0: {}}
    writes: set[str] = set()
    todo = [0]
    while todo:
        n = todo.pop()
        predicate, text = instructions[n]
        pending, early = _step(text, states[n])
        writes |= {f"R{register} of a product in flight: {text}" for register in early}
        following = [] if re.split(r"[. ]", text)[0] in LEAVES and not predicate else [n + 1]
        if target := re.search(r"`\((\.L_\w+)\)", text):
            following.append(targets.get(target[1], len(instructions)))
        for m in following:
            if m < len(instructions) and (merged := _merge(states.get(m), pending)) != states.get(m):
                states[m] = merged
                todo.append(m)
    matches = [PRODUCT.match(text) for _, text in instructions]
    return Hazards(sum(1 for match in matches if match and match[3]), sorted(writes))


def _parse(code: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(predicate, instruction) in the order of the code, and the position of each label."""
    instructions: list[tuple[str, str]] = []
    targets: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            targets[label[1]] = len(instructions)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*(.*?)\s*;", line):
            instructions.append((match[1] or "", match[2]))
    return instructions, targets


def _merge(old: Pending | None, new: Pending) -> Pending:
    """What may be in flight where two paths meet: of a register the product that was started last."""
    old = old or {}
    return {r: min(old.get(r, new.get(r, 0)), new.get(r, old.get(r, 0))) for r in old.keys() | new.keys()}


def _step(text: str, pending: Pending) -> tuple[Pending, set[int]]:
    """What is in flight after an instruction, and which registers of it the instruction writes."""
    if wait := WAIT.match(text):
        return {r: groups for r, groups in pending.items() if groups <= int(wait[1], 16)}, set()
    early = _written(text) & pending.keys()
    if product := PRODUCT.match(text):
        if product[3]:
            pending = pending | dict.fromkeys(range(int(product[3]), int(product[3]) + OPERAND), 0)
        if "gsb0" in text:
            pending = {r: groups + 1 for r, groups in pending.items()}
    return pending, early


def _written(text: str) -> set[int]:
    """Registers that an instruction writes, at least: those from its first operand on that is a register."""
    if product := PRODUCT.match(text):
        return set(range(int(product[2]), int(product[2]) + int(product[1]) // 2))
    match = re.match(r"(\S+) (?:!?U?P\w+, )*R(\d+)\b", text)
    if match is None or match[1].startswith(NOT_WRITTEN):
        return set()
    if match[1].endswith((".128", ".M88.4")) or ".128." in match[1]:
        width = 4
    else:
        width = 2 if re.search(r"\.64\b|\.WIDE\b|M88\.2|^CS2R$", match[1]) else 1
    return set(range(int(match[2]), int(match[2]) + width))
