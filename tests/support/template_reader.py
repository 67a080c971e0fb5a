"""Load checkpoints of the template app in a process that cannot import lightning_compress.

python -m tests.support.template_reader
> /somewhere/compressed.ckpt             a path per line, on stdin
< [[0.1, ...], ...]                      the logits of the loaded model for one fixed batch, as JSON, on stdout
"""

import json
import sys
from importlib.abc import MetaPathFinder

import torch

from tests.support.template_app import SIDE, DigitsModule


class Blocked(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "lightning_compress":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def fixed_batch() -> torch.Tensor:
    return torch.linspace(-1, 1, 4 * SIDE * SIDE).view(4, 1, SIDE, SIDE)


def answer(path: str) -> str:
    try:
        module = DigitsModule.load_from_checkpoint(path, map_location="cpu", weights_only=False).eval()
        with torch.no_grad():
            return json.dumps(module(fixed_batch()).tolist())
    except Exception as error:
        return json.dumps(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    assert "lightning_compress" not in sys.modules
    sys.meta_path.insert(0, Blocked())
    for line in sys.stdin:
        print(answer(line.strip()), flush=True)
