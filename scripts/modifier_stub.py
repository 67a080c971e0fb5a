"""Writes lightning_compress/modifiers/__init__.pyi, the names that type checkers and editors see:  make format"""

from itertools import groupby
from pathlib import Path

from lightning_compress import modifiers

HEAD = '"""Every modifier, for type checkers and editors. Written by scripts/modifier_stub.py; do not edit."""\n\n'


def stub() -> str:
    """The text of the stub: an import for each module, and ``__all__``."""
    homes = {**modifiers.modules(), **modifiers._CONTRACT}
    by_module = groupby(sorted(homes, key=lambda name: (homes[name], name)), key=lambda name: homes[name])
    imports = "".join(f"from {module} import {', '.join(names)}\n" for module, names in by_module)
    return HEAD + imports + "\n__all__ = [\n" + "".join(f'    "{name}",\n' for name in sorted(homes)) + "]\n"


if __name__ == "__main__":
    Path(modifiers.__file__).with_suffix(".pyi").write_text(stub(), encoding="utf-8")
