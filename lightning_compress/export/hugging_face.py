"""Models of transformers: how their weights are saved, renamed, tied and loaded.

transformers is imported inside functions only.
"""

import copy
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor, nn

from lightning_compress.export.experts import names_of_experts
from lightning_compress.export.tensor_file import TensorFolder
from lightning_compress.export.tensors import DeferredTensor, naming, read_json
from lightning_compress.layers.blank import mark_blank
from lightning_compress.layers.towers import find_towers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "add_names_on_disk", "build", "change_json", "dense_config", "dense_model", "dummy_inputs", "example_of",
    "is_transformers", "names_on_disk", "no_progress_bar", "on_meta", "processors", "saved_names", "skeleton",
    "source_processors", "write", "write_configs",
]  # fmt: skip

COUNTS = re.compile(r"(layers?|blocks|experts|depths?|labels)$")  # keys of a config whose numbers become modules
BUFFERS = 2**28  # numbers in the buffers of a model that its files need not account for


def is_transformers(model: nn.Module) -> bool:
    """True for a model of transformers."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def write(model: "PreTrainedModel", state: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    """``save_pretrained`` with another state dict: weights under their names on disk, config, generation config."""
    _save_pretrained(model, folder, state_dict=state, max_shard_size=max_shard_bytes)
    if getattr(model.config, "tie_word_embeddings", False) and not _is_tied(model):
        change_json(folder / "config.json", tie_word_embeddings=False)


def write_configs(model: "PreTrainedModel", folder: str | Path) -> None:
    """``save_pretrained`` without weights and without its progress bar."""
    with no_progress_bar():
        _save_pretrained(model, folder, state_dict={})


def saved_names(model: "PreTrainedModel") -> dict[str, str]:
    """The names that ``save_pretrained`` gives to the tensors of a model; tied ones that it leaves out are missing."""
    marks: dict[int, Tensor] = {}  # a number in place of each tensor
    names: list[str] = []
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in marks:
            marks[id(tensor)] = torch.tensor([len(names)], dtype=torch.int64, device="cpu")
            names.append(name)
        state[name] = marks[id(tensor)]
    with tempfile.TemporaryDirectory() as folder, no_progress_bar():
        _save_pretrained(model, folder, state_dict=dict(state))
        saved = TensorFolder(Path(folder))
        places = {name: int(saved.read(name)) for name in saved.files}
    return {
        name if name in state and int(state[name]) == place else names[place]: name for name, place in places.items()
    }


@contextmanager
def no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _save_pretrained(model: "PreTrainedModel", folder: str | Path, **arguments: Any) -> None:
    """The method of the class, not a guarded one (guard.py); it sets two values of the config, which are restored."""
    before = {key: getattr(model.config, key, None) for key in ("dtype", "architectures")}
    try:
        type(model).save_pretrained(model, folder, **arguments)
    finally:
        for key, value in before.items():
            setattr(model.config, key, value)


def _is_tied(model: "PreTrainedModel") -> bool:
    """False when the embeddings of the model are two tensors, whatever its config says."""
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # models with several submodels, such as CLIP
        return True
    return inputs is None or outputs is None or inputs.weight is outputs.weight


def names_on_disk(model: "PreTrainedModel", names: Sequence[str]) -> dict[str, str]:
    """The names that ``save_pretrained`` gives to modules: transformers 5 renames some on their way to the disk."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {name: name for name in names}
    fused = names_of_experts(model)
    names = [name for name in names if name not in fused]
    marked = {
        f"{name}.weight": torch.tensor(place, dtype=torch.int64, device="cpu") for place, name in enumerate(names)
    }
    renamed = revert_weight_conversion(model, marked)
    return {names[int(mark)]: key.removesuffix(".weight") for key, mark in renamed.items()} | fused


def add_names_on_disk(model: "PreTrainedModel", config: QuantizationConfig) -> None:
    """Ignore modules by both their names: transformers matches those of the model, vLLM those on disk."""
    on_disk = names_on_disk(model, config.ignore)
    config.ignore = list(dict.fromkeys([*config.ignore, *(on_disk[name] for name in config.ignore)]))


def skeleton(
    folder: Path, config: Mapping[str, Any], tensors: int, dtype: torch.dtype | None = None
) -> "PreTrainedModel":
    """The model that config.json describes, without weights.

    ``tensors`` is their number in the folder: no config may describe more layers. ``dtype`` replaces that of the
    config.
    """
    import transformers

    path = folder / "config.json"
    named = config.get("architectures") or [""]
    architecture = named[0] if isinstance(named, list) else named
    model_class = getattr(transformers, architecture, None) if architecture and isinstance(architecture, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(
            f"transformers has no model {architecture!r}, which {path} names; "
            f"build the dense model and call load(folder, model)"
        )
    _check_counts(path, config, tensors)
    with torch.device("meta"):
        with naming(path):
            settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        expected = model_class.config_class  # type: ignore[attr-defined]
        if expected is not None and not isinstance(settings, expected):
            raise ValueError(
                f"{path}: model_type {config.get('model_type')!r} does not belong to the architecture {architecture!r}"
            )
        settings.dtype = settings.dtype if dtype is None else dtype
        with naming(path):
            model: PreTrainedModel = model_class(dense_config(settings))
    return model


def on_meta(folder: Path, tensors: int, dtype: torch.dtype) -> "PreTrainedModel":
    """The model that ``from_pretrained`` would give, in evaluation mode; all tensors that files hold are blanks."""
    layout = skeleton(folder, read_json(folder / "config.json"), tensors, dtype)
    with torch.device("meta"):
        model: PreTrainedModel = type(layout)._from_config(dense_config(layout.config))  # in its dtype
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for tensor in model.state_dict(keep_vars=True).values():
        mark_blank(tensor)
        tensor._is_hf_initialized = True  # transformers computes the other buffers alone
    model.initialize_weights()
    _add_generation_config(model, folder)
    return model.eval()


def dense_model(folder: Path, dtype: torch.dtype | None = None) -> "PreTrainedModel":
    """The model of a folder in safetensors files, in evaluation mode; code in the folder is not run.

    Raises:
        ValueError: It is quantized, not a model that transformers has, or its files do not fill the model.
    """
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        raise ValueError(f"{folder} is quantized already: start from the folder of the dense model")
    layout = skeleton(folder, config, len(TensorFolder(folder).files), dtype)
    with naming(folder / "config.json"), no_progress_bar():
        model, info = type(layout).from_pretrained(
            folder, dtype=layout.config.dtype or "auto", use_safetensors=True, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    if missing := sorted(map(str, info["missing_keys"])):
        raise ValueError(f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}")
    dense: PreTrainedModel = model.eval()
    return dense


def processors(folder: Path) -> list[Any]:
    """The processor or the tokenizer of a folder, in a list; empty where it has none."""
    from transformers import AutoProcessor, AutoTokenizer

    kinds = {AutoProcessor: ("processor_config.json", "preprocessor_config.json")}
    kinds |= {AutoTokenizer: ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")}
    for kind, files in kinds.items():
        if any((folder / file).exists() for file in files):
            with naming(folder / files[0]):
                return [kind.from_pretrained(folder, trust_remote_code=False)]
    return []


class ProcessorFiles:
    """The files of a processor and its tokenizer, copied from one folder to another; they are not read."""

    NAMES = re.compile(
        r"((video_|image_)?(pre)?processor_config|special_tokens_map|added_tokens|vocab)\.json|(tokenizer|chat_template).*"
        r"|merges\.txt|vocab\.txt|.*(spiece|bpe)\.model|.*\.tiktoken"
    )

    def __init__(self, folder: Path):
        files = [path for path in folder.iterdir() if path.is_file() and self.NAMES.fullmatch(path.name)]
        self.files = sorted(files)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the files."""
        for path in self.files:
            shutil.copyfile(path, Path(folder) / path.name)


def source_processors(model: nn.Module) -> list[ProcessorFiles]:
    """The processor of the local folder that a multimodal model is from; a warning where there is none."""
    towers = find_towers(model)
    if not towers or not is_transformers(model):
        return []
    folder = Path(str(getattr(model, "name_or_path", None) or "."))
    files = ProcessorFiles(folder) if folder.name and folder.is_dir() else None
    if files is not None and any("processor" in path.name for path in files.files):
        return [files]
    warnings.warn(
        f"this {type(model).__name__} has {next(iter(towers))!r}, and no processor is saved with it, since it is not "
        f"from a local folder that holds one; pass tokenizer=AutoProcessor.from_pretrained(...), or with a Trainer "
        f"make it an attribute of the LightningModule or datamodule named processor",
        stacklevel=3,
    )
    return []


def _add_generation_config(model: "PreTrainedModel", folder: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").exists():
        with naming(folder / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def _check_counts(path: Path, tree: Any, tensors: int) -> None:
    """ValueError names the key that states far more layers, experts or labels than the files have tensors."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        _check_counts(path, value, tensors)
        if COUNTS.search(str(key)):
            limit = max(1024, tensors) if not str(key).endswith("labels") else 10**6
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int | float) and count > limit:
                    raise ValueError(
                        f"{path}: {key} is {count!s:.30}, and the files beside it hold {tensors:,} tensors; copy the "
                        f"folder again"
                    )


def _check_sizes(path: Path, layout: "PreTrainedModel", weights: Mapping[str, DeferredTensor]) -> None:
    """ValueError before memory is allocated that the files do not fill.

    A tied weight may be counted twice; buffers such as masks and tables of positions are computed.
    """
    stored = sum(tensor.numel() for tensor in weights.values())
    needed = sum(parameter.numel() for parameter in layout.parameters())
    buffers = sum(buffer.numel() for buffer in layout.buffers())
    if needed > 2 * stored or buffers > 2 * stored + BUFFERS:
        raise ValueError(
            f"{path} describes a model of {needed:,} weights and {buffers:,} numbers in buffers, and the files beside "
            f"it hold {stored:,}; copy the folder again"
        )


def build(
    folder: Path, layout: "PreTrainedModel", weights: Mapping[str, DeferredTensor], extra: Collection[str] = ()
) -> "PreTrainedModel":
    """Let transformers load dense ``weights``, under their names on disk, into a new model like ``layout``.

    Each is made when its parameter is filled.

    ``extra`` are names that the class may lack, since they were added to the model that is filled.
    """
    _check_sizes(folder / "config.json", layout, weights)
    slices = _Slices(weights)
    with slices.raising(), naming(folder / "config.json"), _one_by_one():
        model, info = type(layout).from_pretrained(
            None, config=dense_config(layout.config), state_dict=slices.by_name, output_loading_info=True
        )
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if name not in extra]
    if bad := {kind: sorted(map(str, names))[:5] for kind, names in info.items() if names}:
        raise ValueError(
            f"{folder} does not fit {type(layout).__name__}: {bad}; where modules were added to the model before "
            f"it was saved, add them to a dense one too and call load(folder, model)"
        )
    model.name_or_path = model.config._name_or_path = str(folder)  # of which the model card tells base and license
    _add_generation_config(model, folder)
    return model


class _Slices:
    """Weights as transformers reads them; what goes wrong meanwhile, which it turns into an error of its own."""

    def __init__(self, weights: Mapping[str, DeferredTensor]):
        self._error: Exception | None = None
        self.by_name = {name: replace(weight, make=partial(self._made, weight)) for name, weight in weights.items()}

    def _made(self, weight: DeferredTensor) -> Tensor:
        try:
            return weight[...]
        except Exception as error:
            self._error = self._error or error
            raise

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raise the first error of a weight, in place of one that follows from it."""
        try:
            yield
        except Exception:
            if self._error is None:
                raise
        if self._error is not None:
            raise self._error


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Inside, transformers reads weights as it needs them; by default threads read all of them ahead."""
    key = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def example_of(model: "PreTrainedModel") -> dict[str, Tensor]:
    """Inputs that the model can be called with, on its device."""
    return {name: value.to(model.device) for name, value in dummy_inputs(model).items()}


def dummy_inputs(model: "PreTrainedModel") -> dict[str, Tensor]:
    """The dummy inputs of transformers; for a model of pictures, which has token ids there, a picture of noise."""
    if model.main_input_name != "pixel_values" or "pixel_values" in model.dummy_inputs:
        return dict(model.dummy_inputs)
    size = getattr(model.config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = (1, getattr(model.config, "num_channels", 3), height, width)
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(model.dtype)}


def dense_config(config: Any) -> Any:
    """A copy of a config that names no quantization."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def change_json(path: Path, **values: Any) -> None:
    """Set keys of the object in a JSON file."""
    text = json.dumps(read_json(path) | values, indent=2, sort_keys=True)
    path.write_text(f"{text}\n", encoding="utf-8")
