"""What an exported folder is worth, in a process of its own: plain transformers of the environment that wrote it.

    python benchmarks/scored.py FOLDER DENSE        # DENSE: the windows and the dense model's predictions, safetensors

The two libraries pin different versions of compressed-tensors, and what one writes the other's does not always read:
asymmetric zero points of llm-compressor 0.14 (compressed-tensors 0.19) do not load under 0.20. The last line printed is
`RESULT {"kl": [per window], "nll": [per window]}`.
"""

import argparse
import json
from pathlib import Path

import smollm2
import torch
from safetensors import safe_open


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--package", action="store_true", help="load it by this package, not by plain transformers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with safe_open(arguments.dense, "pt") as stored:
        windows = stored.get_tensor("windows")
        dense = smollm2.DenseLogits(*(stored.get_tensor(field) for field in ("classes", "log_p", "rest", "losses")))
    if arguments.package:
        import lightning_compress

        model = lightning_compress.load(arguments.folder).float().eval()
    else:
        model = smollm2.load(arguments.folder)
    kl, nll = smollm2.divergence(model, windows, dense)
    print("RESULT " + json.dumps({"kl": kl.tolist(), "nll": nll.tolist()}))


if __name__ == "__main__":
    main()
