import pytest
from hydra.core.hydra_config import HydraConfig
from torch import nn

from lightning_compress import CompressionCallback, QuantizationModifier
from lightning_compress.quant.arguments import QuantizationArguments

GROUPS = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}}


def test_one_scheme_or_many():
    assert QuantizationArguments(scheme="W4A16").schemes[0].targets == ["Linear"]
    assert QuantizationArguments(scheme="W4A16", targets="re:.*q").schemes[0].targets == ["re:.*q"]
    assert (
        QuantizationArguments(scheme={"W4A16": "up", "W8A16": ["down"]}, group_size=64).schemes[1].weights.group_size
        == 64
    )
    assert QuantizationArguments(config_groups=GROUPS).schemes[0].weights.num_bits == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected either scheme .* or config_groups, got neither"),
        ({"scheme": "W4A16", "config_groups": GROUPS}, "got both"),
        ({"config_groups": GROUPS, "targets": ["re:.*"]}, "targets and config_groups exclude each other"),
        ({"scheme": {"W4A16": ["a"]}, "targets": "re:.*"}, "targets and scheme as a mapping exclude each other"),
        ({"config_groups": GROUPS, "group_size": 32}, "group_size and config_groups exclude each other"),
        ({"scheme": {"weights": {"num_bits": 4}}, "group_size": 32}, "group_size and a scheme in full exclude each"),
        ({"scheme": {"weights": {"num_bits": 4}, "inputs": None}}, "scheme: unknown key 'inputs'"),
        ({"scheme": {"weights": None}}, "scheme: it quantizes no weights"),
        ({"scheme": {"W4A16": {"num_bits": 4}}}, r"scheme\['W4A16'\] is .*, expected targets, such as \['Linear'\]"),
        ({"scheme": "W4A17"}, "unknown scheme 'W4A17'; did you mean W4A16"),
    ],
)
def test_faults_come_when_the_arguments_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationArguments(**arguments)


def test_a_scheme_in_full_is_that_of_config_groups():
    """As in llm-compressor, where ``scheme`` may be a QuantizationScheme's mapping."""
    inline = {"weights": {"num_bits": 4, "group_size": "auto"}, "input_activations": {"num_bits": 8, "dynamic": True}}
    (made,) = QuantizationArguments(scheme=inline, targets="re:.*up").schemes
    assert [made] == QuantizationArguments(config_groups={"g": {"targets": ["re:.*up"], **inline}}).schemes


def test_static_inputs_need_data():
    assert QuantizationArguments(scheme="FP8").has_static_inputs
    assert not QuantizationArguments(scheme="W8A8").has_static_inputs
    assert not QuantizationArguments(scheme="W4A16").has_static_inputs


@pytest.mark.parametrize(
    ("arguments", "size", "typed"),
    [
        ({"scheme": "W4A16"}, 128, "gptq.group_size=64"),
        ({"scheme": {"weights": GROUPS["g"]["weights"]}}, 32, "gptq.scheme.weights.group_size=16"),
        ({"config_groups": {"w3": GROUPS["g"]}}, 32, "gptq.config_groups.w3.weights.group_size=16"),
    ],
)
def test_a_size_that_does_not_fit_names_what_to_type_in_a_hydra_app(monkeypatch, arguments, size, typed):
    model = nn.Sequential(nn.Linear(576 if size == 128 else 48, 8))
    modifier = QuantizationModifier(**arguments)
    CompressionCallback({"gptq": modifier})
    with pytest.raises(ValueError, match=f"group_size={size} does not divide") as caught:
        modifier.assign(model)
    assert "callbacks" not in str(caught.value)  # in plain Python there is no command line
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    with pytest.raises(ValueError, match=f"; on the command line: callbacks.compress.modifiers.{typed}$"):
        modifier.assign(model)
