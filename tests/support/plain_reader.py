"""A process without this package loads exported folders with plain transformers and computes their logits."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

READER = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
root = sys.argv[1]
logits, failed = {}, []
for name, model_class in json.load(open(f"{root}/cases.json")).items():
    try:
        model = getattr(transformers, model_class).from_pretrained(f"{root}/{name}").eval()
        with torch.no_grad():
            out = model(**load_file(f"{root}/{name}.batch"))
    except Exception as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
        continue
    logits[name] = (out.logits_per_image if "logits_per_image" in out else out.logits).contiguous()
assert not failed, failed
assert not [m for m in sys.modules if m.startswith("lightning")], "the reader must not know this package"
save_file(logits, f"{root}/read")
"""


def read_by_transformers(root: Path, classes: Mapping[str, str]) -> dict[str, Tensor]:
    """Logits that the process computes: of ROOT/name, a folder, on ROOT/name.batch, in one import for all of them.

    Args:
        root: Where the folders are, and where files of this reader go.
        classes: By name, the class of transformers that loads it.
    """
    (root / "cases.json").write_text(json.dumps(classes))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER, str(root)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(root / "read")


ONE_BY_ONE = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
for line in sys.stdin:
    folder, batch, answer = json.loads(line)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            save_file({"logits": model(**load_file(batch), use_cache=False).logits.contiguous()}, answer)
        assert not [m for m in sys.modules if m.startswith("lightning")], "the reader must not know this package"
        failed = ""
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    print(json.dumps(failed), flush=True)
"""


@contextmanager
def plain_transformers(root: Path) -> Iterator[Any]:
    """A function from an exported folder and a batch to logits, computed by one process; its files in ``root``."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-c", ONE_BY_ONE]
    with subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None

        def read(folder: Path, batch: Mapping[str, Tensor]) -> Tensor:
            save_file(dict(batch), root / "batch")
            print(json.dumps([str(folder), str(root / "batch"), str(root / "answer")]), file=reader.stdin, flush=True)
            failed = json.loads(reader.stdout.readline())
            assert not failed, failed
            return load_file(root / "answer")["logits"]

        yield read
        reader.stdin.close()
