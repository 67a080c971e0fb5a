"""Files of recipes: where they are, YAML that reads as it looks, and ``defaults`` resolved by Hydra's config loader.

``hydra.compose`` works on singletons of the app that is running (GlobalHydra, the job's name, the version base), and a
recipe may be read in the midst of a run. So this calls the loader that ``compose`` calls, and leaves the app's alone.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import OmegaConf

from hydra_plugins.lightning_compress_searchpath import conf_folder, store_open_callback

__all__ = ["check_plain", "locate", "read_file", "recipe_folder"]

DEPTH = 40  # of mappings and lists inside of each other; the deepest recipe of the package has 7
ENTRIES = 100_000  # with every alias written out
ITSELF = "_recipe_"  # the name of the file that is composed; its own may hold characters that Hydra refuses


def recipe_folder() -> Path:
    """``conf/compress``: in the package (wheel), or beside it (checkout)."""
    folder = conf_folder()
    assert folder is not None, "lightning_compress is imported, so it can be found"
    return folder / "compress"


def locate(source: str | Path) -> Path:
    """The file of a recipe that is given by its name or its path; ValueError when there is none."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise ValueError(f"recipe {str(source)!r}: there is no such file")
        return path
    known = {p.stem: p for p in sorted(recipe_folder().glob("*.yaml"))}
    if path.name not in known:
        near = get_close_matches(path.name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"no recipe is called {path.name!r}; {hint} (a file of yours is given by its path, x.yaml)")
    return known[path.name]


def read_file(path: Path) -> Any:
    """What a file holds and what its ``defaults`` name, as ``+compress=NAME`` puts both into the config of an app.

    What ``defaults`` names is looked for beside the file, then among the recipes of this package.

    Raises:
        ValueError: One of the files is not YAML that reads as it looks, holds an interpolation, or is not there.
    """
    content = _parsed(path)
    if not isinstance(content, Mapping) or "defaults" not in content:
        return content
    try:
        return _composed(path.absolute())
    except RecursionError:
        raise ValueError(f"{path}: the files in its defaults name each other in a circle") from None
    except Exception as error:  # of Hydra, OmegaConf and their parsers, of many kinds
        reason = re.split(r"\s*\n(?:Config search|Search) path:", str(error) or str(error.__cause__))[0]
        reason = re.sub(f"In '?compress/{ITSELF}'?: ", "", reason)
        raise ValueError(f"{path}: its defaults cannot be composed: {reason}") from error


def _composed(path: Path) -> Any:
    Plugins.instance()  # registers Hydra's kinds of config sources
    store_open_callback()
    search_path = ConfigSearchPathImpl()
    search_path.append("hydra", "pkg://hydra.conf")
    search_path.append("schema", "structured://")
    loader = ConfigLoaderImpl(search_path)
    loader.repository.get_sources().insert(0, _RecipeFiles(path))
    config = loader.load_configuration(None, [f"+compress={ITSELF}"], RunMode.RUN, from_shell=False)
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return OmegaConf.to_container(config, resolve=False, throw_on_missing=True)


class _RecipeFiles(ConfigSource):
    """The group ``compress``: the file that is composed, the files beside it, then those of this package."""

    def __init__(self, path: Path):
        super().__init__("recipe", "recipe://")
        self.file = path

    @staticmethod
    def scheme() -> str:
        return "recipe"

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._find(config_path)
        assert path is not None
        header = self._get_header_dict(path.read_text("utf-8-sig"))
        return ConfigResult("recipe", str(path), OmegaConf.create(_parsed(path)), header)

    def available(self) -> bool:
        return True

    def is_config(self, config_path: str) -> bool:
        return self._find(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        return any(folder.is_dir() for folder in self._places(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return sorted({path.stem for folder in self._places(config_path) for path in folder.glob("*.yaml")})

    def _find(self, config_path: str) -> Path | None:
        if config_path == f"compress/{ITSELF}":
            return self.file
        files = self._places(f"{config_path.removesuffix('.yaml')}.yaml")
        return next((path for path in files if path.is_file()), None)

    def _places(self, config_path: str) -> tuple[Path, ...]:
        group, *names = config_path.split("/")
        if group not in ("compress", "compress.yaml") or ".." in names:
            return ()
        return self.file.parent.joinpath(*names), recipe_folder().joinpath(*names)


class _Loader(yaml.SafeLoader):
    """Of YAML 1.1 what reads as it looks: no key twice, no number in base 8 or 60, no digits with underscores."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands here twice; the last would win", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        is_int, text = node.tag.endswith(":int"), self.construct_scalar(node)
        value = self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)
        if "_" in text or ":" in text or re.fullmatch(r"[-+]?0[0-9]+", text):
            raise yaml.constructor.ConstructorError(
                None, None, f"{text} would be read as {value}; write that, or {text!r} in quotes", node.start_mark
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def _parsed(path: Path) -> Any:
    """What one file holds; ValueError names it, whatever is wrong."""
    try:
        content = yaml.load(path.read_bytes().decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}); save it in that encoding") from error
    except RecursionError:
        raise ValueError(f"{path} is not a recipe: hundreds of mappings and lists stand in each other") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:  # !!int x, !!bool x ...
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    check_plain(content, str(path))
    return content


def check_plain(content: Any, origin: str) -> None:
    """Raise ValueError for an interpolation, a value inside of itself, and too many values, with aliases written out.

    An interpolation is refused even in ``defaults``: it calls whatever the running app has registered as a resolver.
    """
    measured: dict[int, tuple[Any, int, int]] = {}  # with the object, so that its id stays taken
    around: set[int] = set()

    def measure(value: Any) -> tuple[int, int]:
        """Its entries, and how many mappings and lists stand in each other."""
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{origin}: {value!r} is an interpolation, which only Hydra resolves; write a value")
        if isinstance(value, str | bytes) or not isinstance(value, Mapping | Sequence):
            return 1, 0
        if id(value) in around:
            raise ValueError(f"{origin} is not a recipe: an alias in it stands inside of what it names")
        if id(value) not in measured:
            around.add(id(value))
            inner = [measure(item) for item in ([*value, *value.values()] if isinstance(value, Mapping) else value)]
            around.remove(id(value))
            entries, depth = 1 + sum(n for n, _ in inner), 1 + max((d for _, d in inner), default=0)
            measured[id(value)] = value, entries, depth
            if depth > DEPTH or entries > ENTRIES:
                raise ValueError(
                    f"{origin} is not a recipe: with its aliases written out it has more than {ENTRIES:,} entries, or "
                    f"more than {DEPTH} mappings and lists in each other"
                )
        return measured[id(value)][1:]

    try:
        measure(content)
    except RecursionError:
        raise ValueError(f"{origin} is not a recipe: hundreds of mappings and lists stand in each other") from None
