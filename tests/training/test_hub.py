"""Pushing the export: the real client against a hub on this machine; nothing becomes public, no card is lost."""

import json

import huggingface_hub
import pytest

from lightning_compress import CompressionCallback
from lightning_compress.training.hub import Hub, read_hub
from tests.support.fake_hub import serving
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet


@pytest.fixture
def hub(monkeypatch):
    with serving() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server


def fit(folder, **hub):
    callback = CompressionCallback(RoundingModifier(), hub={"repo": "user/small", **hub})
    quiet(folder, callback).fit(Regression(), Sums())
    return {path.name: path.read_bytes() for path in (folder / "compressed").iterdir()}


def test_the_export_is_pushed_to_a_new_private_repository(hub, tmp_path):
    files = fit(tmp_path)
    assert hub.repos == {"user/small": {"private": True, "files": files}}
    assert hub.tokens == {"Bearer hf_test"}
    assert "README.md" in files


def test_a_public_repository_gets_nothing_of_a_private_run(hub, tmp_path):
    hub.repos["user/small"] = {"private": False, "files": {}}
    with pytest.warns(UserWarning, match=r"the push to user/small failed, while .*compressed is complete: .*is public"):
        files = fit(tmp_path / "private")
    assert files
    assert hub.repos["user/small"]["files"] == {}
    files = fit(tmp_path / "public", private=False)
    assert hub.repos["user/small"]["files"] == files


def test_a_card_of_the_user_stays_and_one_of_a_run_is_replaced(hub, tmp_path):
    hub.repos["user/small"] = {"private": True, "files": {"README.md": b"# my model"}}
    with pytest.warns(UserWarning, match=r"README.md in user/small was not written by a run, or edited, and stays"):
        files = fit(tmp_path / "one")
    assert hub.repos["user/small"]["files"] == files | {"README.md": b"# my model"}
    hub.repos["user/small"]["files"]["README.md"] = files["README.md"]
    assert hub.repos["user/small"]["files"] == fit(tmp_path / "two")


def test_a_push_that_fails_is_a_warning_with_the_command(hub, tmp_path):
    hub.refuses = 507
    command = f"hf upload user/small {tmp_path}/compressed . --private"
    with pytest.warns(UserWarning, match="the push to user/small failed") as caught:
        fit(tmp_path)
    assert any(str(warning.message).endswith(f"to repeat it: {command}") for warning in caught)
    assert hub.repos["user/small"]["files"] == {}


def test_a_model_that_fails_its_gate_is_not_pushed(hub, tmp_path):
    gate = {"metric": "val/mse", "max_increase": 0.0}
    callback = CompressionCallback(RoundingModifier(), hub={"repo": "user/small"}, gate=gate)
    with pytest.raises(Exception, match="val/mse"), pytest.warns(UserWarning, match="not pushed to user/small, since"):
        quiet(tmp_path, callback).fit(Regression(), Sums())
    assert hub.repos == {}
    assert json.loads((tmp_path / "compressed" / "export_manifest.json").read_text())["origin"]["gate"]


@pytest.mark.parametrize(
    ("offline", "message"), [(False, "there is no token: run `hf auth login`"), (True, "HF_HUB_OFFLINE is set")]
)
def test_what_prevents_a_push_is_an_error_before_training(hub, tmp_path, monkeypatch, offline, message):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    module = Regression()
    before = module.model[0].weight.clone()
    with pytest.raises(ValueError, match=message):
        quiet(tmp_path, CompressionCallback(RoundingModifier(), hub={"repo": "user/small"})).fit(module, Sums())
    assert before.equal(module.model[0].weight)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("user/name", r"hub='user/name': expected a mapping such as \{repo: user/name, private: true\}"),
        ({"repo": "user/name", "public": True}, "expected a mapping"),
        ({"private": True}, "repo=None, expected the name of a repository"),
        ({"repo": "name"}, "repo='name', expected the name of a repository"),
        ({"repo": "user/name", "private": "no"}, "private='no', expected true or false"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(value, message):
    with pytest.raises(ValueError, match=message):
        CompressionCallback(RoundingModifier(), hub=value)


def test_private_is_the_default():
    assert read_hub({"repo": "user/name"}) == Hub("user/name", private=True)
    assert read_hub(None) is None


def test_a_recipe_file_cannot_say_where_weights_go(tmp_path):
    path = tmp_path / "sent.yaml"
    modifiers = "{frozen: {type: FreezeModifier, targets: [Linear]}}"
    path.write_text(f"compress: {{hub: {{repo: user/leak, private: false}}, modifiers: {modifiers}}}")
    with pytest.raises(ValueError, match=r"the recipe sets hub, but no file says where weights go"):
        CompressionCallback(recipe=str(path))
