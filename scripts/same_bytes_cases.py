"""The cases of scripts/same_bytes.py: five tiny models, the recipes applied to them, and the results that are compared.

    python scripts/same_bytes_cases.py ROOT OUT CASE...      # with the package at ROOT on PYTHONPATH

This file makes the cases of both sides, so that it may only use names that every version of the package has.
"""

import contextlib
import csv
import hashlib
import io
import json
import re
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

LEFT_OUT = ("export_manifest.json",)  # it names the run
IMAGES, TOKENS, STEPS = 8, 12, 20

# -- the models --------------------------------------------------------------------------------------------------------


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96, tie_word_embeddings=False))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32, eos_token_id=2))


def mixture() -> Any:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    more = {"shared_expert_intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": 96}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **experts, **more))


def cnn() -> Any:
    """Plain, grouped and depthwise convolutions, each followed by BatchNorm."""
    from torch import nn

    shapes = [(3, 32, 3, 1), (32, 64, 3, 4), (64, 64, 3, 64), (64, 64, 1, 1)]
    layers = [
        m
        for i, o, k, groups in shapes
        for m in (nn.Conv2d(i, o, k, stride=2, padding=k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))


def mlp() -> Any:
    """Residual blocks of two Linears between an embedding of patches and a head."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x: Any) -> Any:
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.blocks = nn.Linear(48, 64), nn.ModuleList(Block() for _ in range(3))
            self.head = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            x = self.patches(nn.functional.unfold(x, 4, stride=4).mT)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    return Mlp()


MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2, "moe": mixture, "cnn": cnn, "mlp": mlp}


def build(name: str) -> Any:
    """The model, its weights large enough that every one of them matters to the outputs."""
    import torch

    torch.manual_seed(0)
    model = MODELS[name]()
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.is_floating_point():
            spread = 0.1 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
            tensor.copy_(torch.randn_like(tensor) * spread + (tensor if tensor.ndim < 2 else 0))
    return model.eval()


def inputs(name: str, count: int) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    if name in ("cnn", "mlp"):
        return [torch.randn(IMAGES, 3, 16, 16, generator=generator) for _ in range(count)]
    return [{"input_ids": torch.randint(3, 96, (4, TOKENS), generator=generator)} for _ in range(count)]


# -- the cases: name -> (recipe, or modifiers as (class, arguments); models; changes to fields) ------------------------

TEXT, ALL = ("llama", "gpt2", "moe"), tuple(MODELS)
CONVOLUTIONS = ["Linear", "Conv2d"]
LAYERS = {"gpt2": ["Conv1D"], "cnn": CONVOLUTIONS}  # instead of the recipes' Linear
HEAD = ["re:.*lm_head"]
W4 = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
STATIC = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
W8A8_STATIC = {"targets": CONVOLUTIONS, "weights": W8, "input_activations": STATIC}
Case = tuple[Any, tuple[str, ...], dict[str, Any]]

COMPRESSED: dict[str, Case] = {
    "rtn_w4": ("rtn_w4", ALL, {}),
    "rtn_w3": ("rtn_w3", ("llama", "mlp"), {}),
    "rtn_w4_bf16": ("rtn_w4", ("llama",), {}),
    "rtn_w4_hessian": ("rtn_w4_hessian", ("llama", "moe", "cnn"), {}),
    "gptq_w4": ("gptq_w4", ALL, {}),
    "gptq_w4_bf16": ("gptq_w4", ("llama",), {}),
    "gptq_w4_g64": ("gptq_w4_g64", ("llama",), {}),
    "gptq_w2": ("gptq_w2", ("llama", "mlp"), {}),
    "gptq_w4a4": ("gptq_w4a4", ("llama",), {}),
    "w8a8": ("w8a8", ("llama", "moe", "mlp"), {}),
    "mixed_w8a8_w4": ("mixed_w8a8_w4", ("llama", "moe"), {}),
    "nvfp4": ("nvfp4", ("llama", "mlp"), {}),
    "awq_w4": ("awq_w4", ("llama", "moe", "mlp"), {"n_grid": 6}),
    "autoround_w4": ("autoround_w4", ALL, {"iters": 4}),
    "smoothquant_w8a8": ("smoothquant_w8a8", TEXT, {}),
    "rotate": ("rotate", ("llama", "moe"), {}),
    "kv_fp8": ("kv_fp8", ("llama", "moe"), {}),
    "sparsegpt_50": ("sparsegpt_50", ALL, {}),
    "sparsegpt_2of4": ("sparsegpt_2of4", ("llama", "moe"), {}),
    "wanda_50": ("wanda_50", ALL, {}),
    "wanda_2of4_refined": ("wanda_2of4_refined", ("llama", "mlp"), {"regional_steps": 4}),
    "reap_25": ("reap_25", ("moe",), {}),
    "structured_25": ("structured_25", ("llama", "mlp"), {}),
    "depth_1": ("depth_1", ("llama", "gpt2", "mlp"), {}),
    # variants: what the recipes leave at their defaults
    "rtn_static": ([("QuantizationModifier", {"config_groups": {"a": W8A8_STATIC}, "ignore": HEAD})],
                   ("llama", "cnn"), {}),
    "rtn_histogram": ([("QuantizationModifier", {"config_groups": {"a": W8A8_STATIC}, "observer": "histogram"})],
                      ("mlp",), {}),
    "rtn_embedding": ([("QuantizationModifier", {"targets": ["Embedding"], "scheme": "W8A16", "group_size": -1})],
                      ("llama",), {}),
    "gptq_asymmetric": ([("GPTQModifier", {"config_groups": {"a": {"targets": CONVOLUTIONS, "weights": W4}},
                                           "actorder": None, "scale_search": "mse", "ignore": HEAD})],
                        ("llama", "mlp"), {}),
    "gptq_refined": ([("GPTQModifier", {"scheme": "W4A16", "group_size": 32, "refine": True, "actorder": "weight",
                                        "block_size": 32, "dampening_frac": 0.05})], ("llama",), {}),
    "sparsegpt_gptq": ([("SparseGPTModifier", {"targets": CONVOLUTIONS, "sparsity": 0.5, "sparsity_profile": "owl"}),
                        ("GPTQModifier", {"targets": CONVOLUTIONS, "scheme": "W8A16", "group_size": -1})],
                       ("llama", "cnn"), {}),
    "wanda_owl_refit": ([("WandaPruningModifier", {"targets": CONVOLUTIONS, "sparsity": 0.6, "refit_iterations": 5,
                                                   "sparsity_profile": "owl"})], ("llama", "moe", "cnn"), {}),
    "spinquant": ([("SpinQuantModifier", {"rotations": ["R1", "R2", "R4"], "allow_online": True}),
                   ("QuantizationModifier", {"scheme": "W4A16", "group_size": 32, "ignore": HEAD})], ("llama",), {}),
    "spinquant_learned": ([("SpinQuantModifier", {"learn": True, "learn_steps": 3, "learn_tokens": 48})],
                          ("llama",), {}),
    "quip": ([("QuIPModifier", {"rotations": ["u", "v"], "allow_online": True}),
              ("QuantizationModifier", {"scheme": "W4A16", "group_size": 32, "ignore": HEAD})], ("llama",), {}),
    "logarithmic": ([("LogarithmicEqualizationModifier", {}), ("QuantizationModifier", {"scheme": "W8A8"})],
                    ("llama",), {}),
    "fold_batchnorm": ([("FoldBatchNormModifier", {}), ("GPTQModifier", {"targets": CONVOLUTIONS, "scheme": "W8A8"})],
                       ("cnn",), {}),
    "kv_int8_head": ([("KVCacheModifier", {"format": "int8", "strategy": "head", "symmetric": False})], ("llama",), {}),
    "magnitude_constant": ([("MagnitudePruningModifier", {"final_sparsity": 0.5, "scope": "global"}),
                            ("ConstantPruningModifier", {}),
                            ("GPTQModifier", {"scheme": "W4A16", "group_size": 32, "ignore": HEAD})],
                           ("llama",), {}),
}  # fmt: skip

TRAINED: dict[str, Case] = {
    "fit_gptq_w4": ("gptq_w4", ("llama", "cnn"), {}),
    "fit_qat_w4": ("qat_w4", ("llama", "gpt2"), {}),
    "fit_qat_w8a8_static": ("qat_w8a8_static", ("cnn", "mlp"), {}),
    "fit_qat_w3_from_gptq": ("qat_w3_from_gptq", ("llama",), {}),
    "fit_magnitude_cubic": ("magnitude_cubic", ("llama", "cnn"), {}),
    "fit_prune_2of4": ("prune_2of4", ("mlp",), {}),
    "fit_movement_50": ("movement_50", ("llama", "mlp"), {}),
    "fit_learned_2of4": ("learned_2of4", ("llama", "mlp"), {}),
    "fit_distill": ("distill", ("llama", "mlp"), {}),
    "fit_structured_25": ("structured_25", ("mlp",), {}),
    "fit_depth_1": ("depth_1", ("llama",), {}),
    "fit_freeze": ([("FreezeModifier", {"targets": ["re:.*down.*"], "start": 0})], ("mlp",), {}),
    "fit_distill_hidden": ([("DistillationModifier", {"hidden": {"blocks.1": "blocks.1"}, "divergence": "reverse",
                                                      "schedule": "linear", "init_weight": 0.1, "start": 0,
                                                      "end": 20})],
                           ("mlp",), {}),
}  # fmt: skip


def names(only: str) -> list[str]:
    every = [f"{case}/{model}" for case, (_, models, _) in {**COMPRESSED, **TRAINED}.items() for model in models]
    return [name for name in ["recipes", *every] if re.search(only, name)]


def modifiers_of(recipe: Any, changes: dict[str, Any], kind: str) -> list[Any]:
    import lightning_compress
    from lightning_compress.recipe import load_recipe

    if not isinstance(recipe, str):
        return [getattr(lightning_compress, name)(**arguments) for name, arguments in recipe]
    modifiers = load_recipe(recipe)
    for i, modifier in enumerate(modifiers):
        arguments = {name: getattr(modifier, name) for name in modifier.model_fields_set} | (changes if i == 0 else {})
        if kind in LAYERS and getattr(modifier, "config_groups", None) is None and hasattr(modifier, "targets"):
            arguments["targets"] = LAYERS[kind]
        modifiers[i] = type(modifier)(**arguments)
    return modifiers


def recipes(root: Path) -> dict[str, dict[str, str]]:
    """Every recipe of the package with all its fields."""
    from lightning_compress.recipe import dump_recipe, load_recipe

    paths = sorted((root / "conf" / "compress").glob("*.yaml"))
    return {path.stem: {"modifiers": json.dumps(dump_recipe(load_recipe(path.stem)))} for path in paths}


def make(name: str, folder: Path) -> dict[str, dict[str, str]]:
    """{file: its parts, by name} of one case."""
    import torch

    from lightning_compress import compress, load, save

    case, _, kind = name.partition("/")
    recipe, _, changes = {**COMPRESSED, **TRAINED}[case]
    model, batches = build(kind), inputs(kind, 4)
    if case.endswith("_bf16"):
        model = model.bfloat16()
    if case in TRAINED:
        rows = trained(model, kind, modifiers_of(recipe, changes, kind), folder)
    else:
        rows = [asdict(row) for row in compress(model, modifiers_of(recipe, changes, kind), batches)]
        save(model.eval(), folder / "compressed")
    parts = {str(p.relative_to(folder / "compressed")): described(p) for p in files(folder / "compressed")}
    parts["modules.csv"] = {
        f"{row['module']} ({row['technique']}) {field}": str(value)
        for row in rows
        for field, value in row.items()
        if field != "seconds"
    }
    torch.manual_seed(0)
    loaded = load(folder / "compressed", None if kind in TEXT else build(kind)).eval()
    with torch.no_grad():
        outputs = loaded(**batches[0]).logits if kind in TEXT else loaded(batches[0])
    parts["outputs after load"] = {"outputs": digest(outputs.float().contiguous().numpy().tobytes())}
    return parts


def trained(model: Any, kind: str, modifiers: list[Any], folder: Path) -> list[dict[str, Any]]:
    """Rows of modules.csv of a short run of the Trainer with the callback."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.utils.data import DataLoader

    from lightning_compress import CompressionCallback

    class Training(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Any:
            return self.model(**x) if kind in TEXT else self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if kind in TEXT:
                return self.model(**batch, labels=batch["input_ids"]).loss
            return nn.functional.cross_entropy(self.model(batch), torch.arange(IMAGES))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder}
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = CompressionCallback(modifiers, verify=False, evaluate=False, calibration_batches=4)
    trainer = Trainer(callbacks=[callback], enable_model_summary=False, **options, **silent)
    torch.manual_seed(0)
    trainer.fit(Training().train(), DataLoader(inputs(kind, STEPS), batch_size=None))
    return list(csv.DictReader((folder / "report" / "modules.csv").open()))


# -- what is compared, and the process of one side ---------------------------------------------------------------------


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LEFT_OUT)


def described(path: Path) -> dict[str, str]:
    """The sha256 of a file; and to name what differs, the sha256 of each of its tensors, or its lines."""
    content = path.read_bytes()
    parts = {"": digest(content)}
    if path.suffix == ".safetensors":
        size = struct.unpack("<Q", content[:8])[0]
        for name, tensor in json.loads(content[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in tensor["data_offsets"])
                parts[name] = f"{tensor['dtype']} {tensor['shape']} {digest(content[begin:end])[:16]}"
    else:
        lines = content.decode().splitlines()
        parts |= {
            f"line {i}": line if len(line) < 200 else digest(line.encode())[:16] for i, line in enumerate(lines, 1)
        }
    return parts


def worker(root: str, out: str, chosen: list[str]) -> None:
    """Run cases with the package at ``root`` and write their results to ``out``."""
    import logging
    import warnings

    import torch
    import transformers

    import lightning_compress

    if Path(lightning_compress.__file__).resolve().parents[1] != Path(root).resolve():
        raise SystemExit(f"expected the package of {root}, got {lightning_compress.__file__}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in chosen:
        begun = time.process_time()
        with tempfile.TemporaryDirectory(prefix="same-bytes-") as folder:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    results[name] = recipes(Path(root)) if name == "recipes" else make(name, Path(folder))
            except Exception as error:
                results[name] = {"error": {"": f"{type(error).__name__}: {error}"}}
        print(f"  {name:34} {time.process_time() - begun:6.2f} s", file=sys.stderr, flush=True)
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], sys.argv[3:])
