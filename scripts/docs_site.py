"""Pages of the site besides docs/*.md: tutorials, the API by public name, README of kernels (a hook of mkdocs.yml)."""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Page of the API -> its title, and the public names on it. Every other public name is a modifier.
PAGES = {
    "callback": ("The callbacks", ["CompressionCallback", "QuantizationProbe", "before_sharding"]),
    "functions": (
        "compress, compress_folder, save, load, dequantize",
        ["compress", "compress_folder", "save", "load", "dequantize", "Plan"],
    ),
    "modifiers": ("Modifiers", []),
    "lifecycle": ("Modifier and events", ["Modifier", "ModifierInterface", "ModifierFactory", "EventType"]),
    "recipes": ("Recipes", ["recipe"]),
}


# The docstring of an enumeration describes all its members, so each member is shown without one.
MEMBERS = {"EventType": "\n    options: {show_if_no_docstring: true}"}


def public_names() -> dict[str, str]:
    """Each name at the top of the package -> the module that it comes from; this imports no torch."""
    sys.path.insert(0, str(ROOT))
    import lightning_compress
    from lightning_compress import modifiers

    modules = {name: f"lightning_compress.{module}" for name, module in lightning_compress._HOME.items()}
    return {"recipe": "lightning_compress", **modules, **modifiers._CONTRACT, **modifiers.modules()}


def api_pages() -> dict[str, str]:
    """Path of each page -> its Markdown: a title, and what mkdocstrings replaces by docstrings."""
    modules = public_names()
    placed = {name for _, names in PAGES.values() for name in names}
    rest = sorted(set(modules) - placed)
    if strangers := [name for name in rest if not name.endswith("Modifier")]:
        raise ValueError(f"no page for {', '.join(strangers)}; name one in PAGES of scripts/docs_site.py")
    return {
        f"api/{page}.md": "\n\n".join(
            [f"# {title}", *(f"::: {modules[name]}.{name}{MEMBERS.get(name, '')}" for name in names or rest)]
        )
        for page, (title, names) in PAGES.items()
    }


def kernel_pages() -> dict[str, str]:
    """Path of each page -> the README of its op."""
    ops = ROOT / "lightning_compress" / "ops"
    return {f"ops/{path.parent.name}.md": path.read_text() for path in sorted(ops.glob("*/README.md"))}


def tutorial_pages() -> dict[str, str]:
    """Path of each page -> its notebook as Markdown, with what the cells printed."""
    sys.path.insert(0, str(ROOT))
    from scripts import notebooks

    return {f"tutorials/{name}.md": notebooks.page(notebooks.FOLDER / f"{name}.ipynb") for name in notebooks.names()}


def on_config(config: Any) -> Any:
    kernels = next(entry for entry in config.nav if "Kernels" in entry)
    kernels["Kernels"] = [kernels["Kernels"], *kernel_pages()]
    tutorials = next(entry for entry in config.nav if "Tutorials" in entry)
    tutorials["Tutorials"] = list(tutorial_pages())
    config.nav.append({"API": [{title: f"api/{page}.md"} for page, (title, _) in PAGES.items()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, text in {**api_pages(), **kernel_pages(), **tutorial_pages()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Link pages of the site: the README of a kernel, a tutorial; other files outside docs/ are named only."""
    markdown = re.sub(r"\]\(tutorials/(\w+)\.ipynb\)", r"](tutorials/\1.md)", markdown)
    markdown = re.sub(r"\]\(\.\./lightning_compress/ops/(\w+)/README\.md\)", r"](ops/\1.md)", markdown)
    return re.sub(r"\[([^]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
