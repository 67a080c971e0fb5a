"""Every config composes, and recipes stack, change, sweep and complete as the README says."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import OmegaConf

import lightning_compress
from lightning_compress import CompressionCallback
from lightning_compress.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
RECIPES = sorted(p.stem for p in (CONF / "compress").glob("*.yaml"))
OPTIONS = [
    f"{group}={path.stem}"
    for group in ("model", "data", "trainer", "callbacks", "logger", "experiment")
    for path in sorted((CONF / group).glob("*.yaml"))
]


def modifiers(cfg: Any) -> dict[str, Any]:
    return OmegaConf.to_container(cfg.callbacks.compress.modifiers, resolve=True)  # type: ignore[return-value]


def app(*arguments: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    """``python train.py ...`` as a user runs it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | environ,
        capture_output=True,
        text=True,
        check=False,
    )


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_the_recipes_of_the_readme_are_there() -> None:
    assert {"gptq_w4", "gptq_w8", "rtn_w4", "rtn_w8", "w8a8", "gptq_w3", "gptq_w2", "rtn_w3", "rtn_w2"} <= set(RECIPES)


@pytest.mark.parametrize("path", sorted((CONF / "compress").rglob("*.yaml")), ids=lambda p: p.stem)
def test_a_file_of_compress_begins_with_its_package_and_says_what_it_does(path: Path) -> None:
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("# ") and "@package" not in line]
    assert comments
    if "scheme" not in path.parts:  # a scheme goes where the recipe that lists it says
        assert lines[0].startswith("# @package callbacks")  # a comment above it would void it
    if path.parent == CONF / "compress":
        assert any(f"+compress={path.stem}" in line for line in comments)


@pytest.mark.parametrize(
    "stack", ["smoothquant,gptq_w8a8", "rotate,gptq_w4a4", "awq,gptq_w4", "sparsegpt_2of4,gptq_w4"]
)
def test_a_stack_is_named_with_when_to_take_it(stack: str) -> None:
    first = (CONF / "compress" / f"{stack.partition(',')[0]}.yaml").read_text()
    assert f"'+compress=[{stack}]'" in first
    assert "use it" in first.lower()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_puts_one_callback_among_the_callbacks(app_config: Any, name: str) -> None:
    cfg = app_config(f"+compress={name}")
    assert "compress" not in cfg
    assert list(cfg.callbacks)[-1] == "compress"
    callback = instantiate(cfg.callbacks.compress)
    assert isinstance(callback, CompressionCallback)
    assert [type(m).__name__ for m in callback.lifecycle.modifiers] == [
        m["_target_"].rsplit(".", 1)[1] for m in modifiers(cfg).values()
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_hydra_and_recipe_by_name_build_the_same_modifiers(app_config: Any, name: str) -> None:
    by_hydra = instantiate(app_config(f"+compress={name}").callbacks.compress).lifecycle.modifiers
    assert [m.model_dump() for m in by_hydra] == [m.model_dump() for m in load_recipe(name)]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_blocks_and_the_difference(name: str) -> None:
    text = (CONF / "compress" / f"{name}.yaml").read_text()
    assert "_target_" not in text
    defaults = yaml.safe_load(text)["defaults"]
    assert defaults[0] == "base/callback" or defaults[0] in RECIPES
    assert ("_self_" in defaults) == ("\ncompress:" in text)


def test_arguments_arrive_as_plain_lists(app_config: Any) -> None:
    callback = instantiate(app_config("+compress=gptq_w4").callbacks.compress)
    assert type(callback.lifecycle.modifiers[0].targets) is list


@pytest.mark.parametrize("order", [["rtn_w4", "gptq_w4"], ["gptq_w4", "rtn_w4"]], ids="-".join)
def test_stacked_recipes_merge_into_one_callback_in_the_order_of_the_command_line(
    app_config: Any, order: list[str]
) -> None:
    cfg = app_config(f"+compress=[{','.join(order)}]")
    assert list(modifiers(cfg)) == [name.split("_")[0] for name in order]


@pytest.mark.parametrize("stack", ["smoothquant,gptq_w8a8", "awq,gptq_w4"])
def test_what_smooths_stands_before_what_quantizes_and_leaves_that_to_it(app_config: Any, stack: str) -> None:
    first, second = instantiate(app_config(f"+compress=[{stack}]").callbacks.compress).lifecycle.modifiers
    assert [type(m).__name__ for m in (first, second)] == [
        {"smoothquant": "SmoothQuantModifier", "awq": "AWQModifier"}[stack.split(",")[0]],
        "GPTQModifier",
    ]
    assert not getattr(first, "quantize", False)


def test_an_argument_is_overridden(app_config: Any) -> None:
    cfg = app_config("+compress=gptq_w4", "callbacks.compress.modifiers.gptq.scheme=W8A16")
    assert modifiers(cfg)["gptq"]["scheme"] == "W8A16"


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_an_argument_that_the_recipe_does_not_spell_out_is_set_with_and_without_a_plus(
    app_config: Any, plus: str
) -> None:
    at = f"{plus}callbacks.compress"
    cfg = app_config("+compress=gptq_w4", f"{at}.calibration_batches=3", f"{at}.modifiers.gptq.actorder=null")
    callback = instantiate(cfg.callbacks.compress)
    assert callback.options.calibration_batches == 3
    assert callback.lifecycle.modifiers[0].actorder is None


def test_every_field_of_every_modifier_is_set_without_a_plus(app_config: Any) -> None:
    blocks = sorted(path.stem for path in (CONF / "compress" / "modifier").glob("*.yaml"))
    stack = f"+compress=[{','.join(['base/callback', *(f'modifier/{name}' for name in blocks)])}]"
    kinds = {name: entry["_target_"].rpartition(".")[2] for name, entry in unset(app_config(stack)).items()}
    fields = {name: [*getattr(lightning_compress, kind).model_fields] for name, kind in kinds.items()}
    at = "callbacks.compress.modifiers"
    cfg = app_config(stack, *(f"{at}.{name}.{field}={field}" for name, each in fields.items() for field in each))
    assert len(fields) == len(blocks)
    for name, each in fields.items():
        assert {field: modifiers(cfg)[name][field] for field in each} == {field: field for field in each}


def unset(cfg: Any) -> dict[str, Any]:
    return OmegaConf.to_container(cfg.callbacks.compress.modifiers)  # type: ignore[return-value]


def test_a_mapping_of_ones_own_takes_the_place_of_nothing_and_of_a_number(app_config: Any) -> None:
    at = "callbacks.compress.modifiers"
    cfg = app_config("+compress=sparsegpt_50", f"{at}.sparsegpt.sparsity={{Conv2d: 0.7, Linear: 0.2}}")
    assert modifiers(cfg)["sparsegpt"]["sparsity"] == {"Conv2d": 0.7, "Linear": 0.2}
    cfg = app_config("+compress=distill", f"{at}.distill.hidden={{first: second}}")
    assert instantiate(cfg.callbacks.compress).lifecycle.modifiers[0].hidden == {"first": "second"}


def test_a_key_that_the_modifier_lacks_is_refused_with_a_near_miss(app_config: Any) -> None:
    cfg = app_config("+compress=gptq_w4", "callbacks.compress.modifiers.gptq.schema=W8A16")
    with pytest.raises(Exception, match="unknown argument 'schema'; did you mean 'scheme'") as caught:
        instantiate(cfg.callbacks.compress)
    assert "callbacks.compress.modifiers.gptq" in with_notes(caught.value)


def test_a_key_that_the_callback_lacks_is_named(app_config: Any) -> None:
    cfg = app_config("+compress=gptq_w4", "callbacks.compress.calibrationbatches=3")
    with pytest.raises(Exception, match="calibrationbatches") as caught:
        instantiate(cfg.callbacks.compress)
    assert "callbacks.compress" in with_notes(caught.value)


def with_notes(error: BaseException) -> str:
    """Hydra 1.4 adds the place in the config as a note, Hydra 1.3 to the message."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def test_what_is_not_of_the_recipe_stays_closed(app_config: Any) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        app_config("+compress=gptq_w4", "callbacks.model_chekpoint.monitor=x")
    assert "Key 'model_chekpoint' is not in struct" in str(caught.value.__cause__)


def test_entries_of_one_name_are_merged_key_by_key(app_config: Any) -> None:
    assert modifiers(app_config("+compress=[prune_2of4,magnitude_cubic]"))["magnitude"] == {
        "_target_": "lightning_compress.MagnitudePruningModifier", "targets": ["Linear"], "ignore": ["re:.*lm_head"],
        "mask_structure": "2:4", "final_sparsity": 0.5, "schedule": "cubic", "unit": "fraction", "start": 0.1,
        "end": 0.75, "update": 0.01,
    }  # fmt: skip
    hessian = modifiers(app_config("+compress=[rtn_w4_hessian,rtn_w8]"))["rtn"]
    assert (hessian["scale_search"], hessian["scheme"], hessian["group_size"]) == ("hessian", "W8A16", -1)


def test_an_unknown_recipe_lists_the_known_ones(app_config: Any) -> None:
    with pytest.raises(MissingConfigException, match=r"compress/gptq_w5(?s:.*)gptq_w4"):
        app_config("+compress=gptq_w5")


def test_compress_without_a_plus_says_so(app_config: Any) -> None:
    with pytest.raises(ConfigCompositionException, match="append to your default list use \\+compress=gptq_w4"):
        app_config("compress=gptq_w4")


def test_a_debug_config_without_callbacks_still_compresses(app_config: Any) -> None:
    """As the template's debug=default does: callbacks is null, the recipe is merged afterwards."""
    cfg = app_config("+compress=gptq_w4", "~callbacks")
    assert list(cfg.callbacks) == ["compress"]


# -- recipes of the user's own --------------------------------------------------------------------------------------

PARTS = """\
# @package callbacks
defaults:
  - base/callback
  - modifier/gptq
  - scheme/int4_g64@compress.modifiers.gptq.config_groups.most
  - scheme/int8_channel@compress.modifiers.gptq.config_groups.down
  - _self_

compress:
  calibration_batches: 5
  modifiers:
    gptq:
      config_groups:
        down:
          targets: ["re:.*down_proj"]
"""

CHANGED = """\
# @package callbacks
defaults:
  - gptq_w4
  - _self_

compress:
  modifiers:
    gptq:
      dampening_frac: 0.05
"""


@pytest.fixture
def own_recipes(tmp_path: Path) -> Path:
    folder = tmp_path / "mine" / "compress"
    folder.mkdir(parents=True)
    (folder / "parts.yaml").write_text(PARTS)
    (folder / "changed.yaml").write_text(CHANGED)
    return folder.parent


def own(own_recipes: Path, name: str) -> Any:
    run = app("--config-dir", str(own_recipes), f"+compress={name}", "--cfg", "job", "--package", "callbacks.compress")
    assert run.returncode == 0, run.stderr
    return yaml.safe_load(run.stdout)


def test_a_users_recipe_is_put_together_from_parts(own_recipes: Path) -> None:
    recipe = own(own_recipes, "parts")
    groups = recipe["modifiers"]["gptq"]["config_groups"]
    assert recipe["_target_"] == "lightning_compress.CompressionCallback"
    assert recipe["calibration_batches"] == 5
    assert groups["most"]["weights"]["group_size"] == 64
    assert groups["down"]["targets"] == ["re:.*down_proj"]
    assert groups["down"]["weights"]["num_bits"] == 8
    assert isinstance(instantiate(OmegaConf.create(recipe)), CompressionCallback)


def test_a_users_recipe_changes_one_of_ours(own_recipes: Path) -> None:
    recipe = own(own_recipes, "changed")
    assert recipe["modifiers"]["gptq"]["scheme"] == "W4A16"
    assert instantiate(OmegaConf.create(recipe)).lifecycle.modifiers[0].dampening_frac == 0.05


@pytest.mark.parametrize("name", ["gptq_w2", "awq", "smoothquant_w8a8"])
def test_a_copy_of_one_recipe_works_in_an_app_of_the_users(tmp_path: Path, name: str) -> None:
    """An app in the style of the lightning-hydra-template, with a copy of one file and nothing else of ours."""
    (tmp_path / "compress").mkdir()
    (tmp_path / "compress" / "copied.yaml").write_bytes((CONF / "compress" / f"{name}.yaml").read_bytes())
    (tmp_path / "train.yaml").write_text("defaults: [_self_, {callbacks: default}]\nseed: null\n")
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "default.yaml").write_text("lr_monitor: {_target_: some.Monitor}\n")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        copied, ours = (compose("train", [f"+compress={n}"]) for n in ("copied", name))
    assert list(copied.callbacks) == ["lr_monitor", "compress"]
    assert copied == ours
    by_path = CompressionCallback(recipe=str(tmp_path / "compress" / "copied.yaml"))
    assert by_path.recipe == instantiate(copied.callbacks.compress).recipe


@pytest.mark.parametrize("path", sorted((CONF / "compress" / "scheme").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_scheme_builds_a_modifier(app_config: Any, path: Path) -> None:
    at = "callbacks.compress.modifiers.gptq.config_groups.all"
    cfg = app_config("+compress=[base/callback,modifier/gptq]", f"+compress/scheme@{at}={path.stem}")
    instantiate(cfg.callbacks.compress)


def test_every_modifier_has_a_file() -> None:
    files = (CONF / "compress" / "modifier").glob("*.yaml")
    entries = [entry for path in files for entry in yaml.safe_load(path.read_text()).values()]
    named = {entry["_target_"].rpartition(".")[2] for entry in entries}
    modifiers = {name for name in lightning_compress.__all__ if name.endswith("Modifier")}
    other_names = {"QuIPModifier", "SpinQuantModifier", "REAPPruningModifier"}  # of RotationModifier, REAPModifier
    assert modifiers - named == {"Modifier"} | other_names


# -- the demo app's other configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(app_config: Any, option: str) -> None:
    name = option.split("=")[1]
    overrides = [option, *{"hf": ["model.path=m"], "text": ["data.path=t", "data.tokenizer=m"]}.get(name, [])]
    cfg = app_config(*overrides)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def test_every_option_says_what_it_does() -> None:
    for path in [CONF / "train.yaml", *(p for g in CONF.iterdir() if g.is_dir() for p in g.glob("*.yaml"))]:
        lines = path.read_text().splitlines()
        assert lines[1 if "@package" in lines[0] else 0].startswith("# "), path


def test_an_experiment_brings_its_recipe_and_gives_way_to_another(app_config: Any) -> None:
    cfg = app_config("experiment=gptq_w3")
    assert list(modifiers(cfg)) == ["gptq"]
    assert cfg.callbacks.compress.calibration_batches == 32
    assert list(modifiers(app_config("experiment=gptq_w3", "compress=rtn_w3"))) == ["rtn"]


def test_demo_widths_divide_by_128(app_config: Any) -> None:
    model = app_config().model
    assert all(width % 128 == 0 for width in (model.vocab_size, model.hidden_size, model.intermediate_size))


# -- the command line -----------------------------------------------------------------------------------------------


def test_cfg_job_prints_the_recipe() -> None:
    run = app("+compress=gptq_w4", "--cfg", "job")
    assert run.returncode == 0, run.stderr
    assert yaml.safe_load(run.stdout)["callbacks"]["compress"]["modifiers"]["gptq"]["scheme"] == "W4A16"


def test_tab_completion_offers_recipes() -> None:
    line = "python train.py +compress=gptq"
    run = app("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert "+compress=gptq_w4" in run.stdout.split()


def test_help_and_searchpath_name_the_recipes() -> None:
    assert "lightning-compress" in app("--info", "searchpath").stdout
    assert "gptq_w4" in app("--help").stdout


MODIFIERS = sorted({n for n in lightning_compress.__all__ if n.endswith("Modifier")} - {"Modifier"})
NEEDED = {
    "MovementPruningModifier": {"end": 4},
    "LearnedMaskModifier": {"end": 4},
    "AllocateModifier": {"bits": 4.25},
    "DepthPruningModifier": {"count": 1},
}


@pytest.mark.parametrize("name", MODIFIERS)
def test_strategies_that_spawn_can_send_every_modifier(name: str) -> None:
    kind = getattr(lightning_compress, name)
    schemed = {"scheme": "W4A16"} if "scheme" in kind.model_fields else {}
    callback = CompressionCallback(kind(**schemed, **NEEDED.get(name, {})))
    sent = pickle.loads(pickle.dumps(callback))
    assert sent.recipe == callback.recipe
    assert [type(modifier) for modifier in sent.lifecycle.modifiers] == [kind]
    assert vars(sent.lifecycle.modifiers[0]) == vars(callback.lifecycle.modifiers[0])
