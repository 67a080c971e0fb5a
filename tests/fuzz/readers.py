"""The readers that are fuzzed: what each reads whole, what is damaged of it, and how it is read."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lightning_compress import QuantizationModifier, compress, load, save
from lightning_compress.modifiers.distillation.answer_cache import AnswerCache
from lightning_compress.recipe import read_recipe
from tests.fuzz.mutations import mutated_bytes, mutated_json

__all__ = ["READERS", "Reader"]


@dataclass(frozen=True)
class Reader:
    """One reader.

    Args:
        name: On the command line.
        make: Writes what it reads whole into a folder that is not there yet.
        mutate: Damages it, and says how.
        read: Reads it.
    """

    name: str
    make: Callable[[Path], None]
    mutate: Callable[[random.Random, Path], str]
    read: Callable[[Path], None]


def damage(rng: random.Random, folder: Path) -> str:
    """Damage one file of a folder, a JSON file by its values most of the time, others by their bytes."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    kinds = ["json"] * 6 if path.suffix == ".json" else ["header"] * 2 if path.suffix == ".safetensors" else []
    kind = rng.choice([*kinds, "bytes", "bytes", "gone" if rng.random() < 0.2 else "bytes"])
    data = path.read_bytes()
    if kind == "gone":
        path.unlink()
        return f"{path.name} is gone"
    if kind == "header":
        size = int.from_bytes(data[:8], "little")
        header, note = mutated_json(rng, data[8 : 8 + size])
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
        return f"{path.name}, header, {note}"
    changed, note = mutated_json(rng, data) if kind == "json" else mutated_bytes(rng, data)
    path.write_bytes(changed)
    return f"{path.name}, {note}"


# -- load -------------------------------------------------------------------------------------------------------------


def make_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    compress(model, [QuantizationModifier(scheme="W4A16", group_size=16, targets=["Linear"], ignore=["lm_head"])])
    save(model, folder, max_shard_bytes=8_000)


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8)).eval()


def make_own(folder: Path) -> None:
    model = conv_net()
    compress(model, [QuantizationModifier(scheme="W4A16", group_size=2, targets=["Conv2d", "Linear"])])
    save(model, folder)


# -- recipes ----------------------------------------------------------------------------------------------------------

RECIPES = Path(__file__).parents[2] / "conf" / "compress"
TOKENS = (
    "[", "]", "{", "}", ":", "- ", "\n", "  ", "&a ", "*a", "!!python/object:os.system", "null", "010", "1:20", ".nan",
    "<<: *a", "modifiers:", "type: GPTQModifier", "_target_: os.system", "${oc.env:HOME}", "re:(", "\t", "'", "é",
    "2:4", "defaults: [", "defaults: {", "_self_", "../", "@", "modifier/gptq", "optional ", "# @package ", "hydra/",
)  # fmt: skip


def make_recipes(folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in RECIPES.glob("*.yaml"):
        (folder / path.name).write_bytes(path.read_bytes())


def damage_recipe(rng: random.Random, folder: Path) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    data, notes = path.read_bytes(), []
    for other in folder.iterdir():
        if other != path:
            other.unlink()
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.3:
            data, note = mutated_bytes(rng, data)
        else:
            at, token = rng.randrange(len(data) + 1), rng.choice(TOKENS)
            data, note = data[:at] + token.encode() + data[at:], f"{token!r} put in at byte {at}"
        notes.append(note)
    path.write_bytes(data)
    return f"{path.name}, {'; '.join(notes)}"


def read_one_recipe(folder: Path) -> None:
    (path,) = folder.iterdir()
    read_recipe(path)


# -- the teacher's cache ----------------------------------------------------------------------------------------------

IDENTITY = {"teacher": "abc", "top_k": 2}


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def answer(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    log_p, rest = torch.randn(number % 4, 2, generator=generator), torch.randn(number % 4, generator=generator)
    return {"log_p": log_p.half(), "rest": rest}


def make_cache(folder: Path) -> None:
    cache = AnswerCache(folder, IDENTITY, 1e9, shard=120)
    for number in range(12):
        cache.put(key(number), answer(number))
    cache.close()


def read_cache(folder: Path) -> None:
    """An answer is the one that was put in, or it is not there; a damaged file is never an error."""
    cache = AnswerCache(folder, IDENTITY, 1e9)
    for number in range(12):
        found, right = cache.get(key(number)), answer(number)
        if found is not None and not (
            found.keys() == right.keys()
            and all(torch.equal(found[k], right[k]) and found[k].dtype == right[k].dtype for k in right)
        ):
            raise AssertionError(f"the answer to sample {number} is not the one that was put in: {found}")


# -- the log of a calibration -----------------------------------------------------------------------------------------


def small_stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)), nn.Linear(8, 2)).eval()


def logged(folder: Path) -> list[torch.Tensor]:
    model, inputs = small_stack(), [torch.ones(2, 8), torch.eye(8)]
    compress(model, [QuantizationModifier(scheme="W8A8", group_size=-1, scale_search="hessian")], inputs, log=folder)
    return list(model.state_dict().values())


def read_log(folder: Path) -> None:
    """A calibration goes on from what is whole, and ends with the same weights."""
    if not all(torch.equal(one, other) for one, other in zip(logged(folder), LOGGED, strict=True)):
        raise AssertionError("the weights are not those of an unbroken calibration")


LOGGED: list[torch.Tensor] = []


def make_log(folder: Path) -> None:
    LOGGED[:] = logged(folder)


READERS = (
    Reader("load", make_llama, damage, lambda folder: load(folder) and None),
    Reader("load_into", make_own, damage, lambda folder: load(folder, conv_net()) and None),
    Reader("recipe", make_recipes, damage_recipe, read_one_recipe),
    Reader("cache", make_cache, damage, read_cache),
    Reader("log", make_log, damage, read_log),
)
