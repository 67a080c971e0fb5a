"""Makes ``+compress=...`` resolve in any Hydra app of the environment: hands Hydra the folder of recipes.

Every Hydra app of the environment imports this file, so it imports the standard library and Hydra only. The folder
goes over as a ``file://`` path: for ``pkg://lightning_compress.conf`` Hydra would import the package, and torch with it
(12.5 s against 1.0 s to compose a config). It is appended last, so the app's own files win.

Hydra refuses to override a key that a config does not hold. The fields of a modifier are known to pydantic, which would
need torch, and not to Hydra; so a recipe's callback is left open: any field is set without ``++``, and a name that the
callback or the modifier does not take is refused where it is built, with near misses. A flag does that, which no YAML
file can carry: it comes from Hydra's config store, as ``compress/base/open``.

An installed wheel holds ``lightning_compress/conf/compress``; in a checkout, or an editable install, ``conf/`` lies
beside the package.
"""

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf


class LightningCompressSearchPathPlugin(SearchPathPlugin):
    """Appends the folder that holds ``compress/`` to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra before it composes a config."""
        folder = conf_folder()
        if folder is not None:
            search_path.append(provider="lightning-compress", path=f"file://{folder.as_posix()}")
            store_open_callback()


def store_open_callback() -> None:
    """Store ``compress/base/open``: a callback whose entries take keys that they do not hold yet."""
    callback = OmegaConf.create({}, flags={"struct": False})
    node = OmegaConf.create({"compress": callback})
    ConfigStore.instance().store(
        "open", node, group="compress/base", package="callbacks", provider="lightning-compress"
    )


def conf_folder() -> Path | None:
    """The folder that holds ``compress/``, found without importing the package; None when it is not installed."""
    spec = find_spec("lightning_compress")
    for location in spec.submodule_search_locations or [] if spec else []:
        for folder in (Path(location) / "conf", Path(location).parent / "conf"):
            if (folder / "compress").is_dir():
                return folder.resolve()
    return None
