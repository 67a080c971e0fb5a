"""The cases of each op: a file named as its folder under ops/, with a function ``cases(tiny) -> list[Case]``.

A file that is put here takes part; nothing has to be entered elsewhere. What it imports (contestants) it imports inside
functions, unless it is torch or ``lightning_compress.ops``.
"""

import importlib
import pkgutil
from collections.abc import Sequence

from benchmarks.op_case import LLAMA, Call, Case, Trial

__all__ = ["LLAMA", "Call", "Case", "Trial", "cases"]

FIRST = ("w4a16_gemm", "hessian", "gptq_block", "w8a8_gemm")  # what decides, should time run out


def cases(ops: Sequence[str] = (), *, tiny: bool = False) -> list[Case]:
    """All cases, those that decide first; ``tiny`` ones run on a CPU in a second.

    Args:
        ops: Only these; empty: all.
        tiny: Shapes for the check of correctness.

    Raises:
        ValueError: There are no cases for this op.
    """
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    known = [*(op for op in FIRST if op in found), *sorted(found - set(FIRST))]
    if unknown := [op for op in ops if op not in known]:
        raise ValueError(f"no cases of {', '.join(unknown)}; expected some of {', '.join(known)}")
    chosen = [importlib.import_module(f"{__name__}.{op}") for op in known if not ops or op in ops]
    return [case for module in chosen for case in module.cases(tiny)]
