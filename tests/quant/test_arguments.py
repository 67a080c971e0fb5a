import pytest

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
        ({"config_groups": GROUPS, "targets": ["Linear"]}, "targets and config_groups exclude each other"),
        ({"scheme": {"W4A16": ["a"]}, "targets": ["Linear"]}, "targets and scheme as a mapping exclude each other"),
        ({"config_groups": GROUPS, "group_size": 32}, "group_size and config_groups exclude each other"),
        ({"scheme": "W4A17"}, "unknown scheme 'W4A17'; did you mean W4A16"),
    ],
)
def test_faults_come_when_the_arguments_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationArguments(**arguments)


def test_static_inputs_need_data():
    assert QuantizationArguments(scheme="FP8").has_static_inputs
    assert not QuantizationArguments(scheme="W8A8").has_static_inputs
    assert not QuantizationArguments(scheme="W4A16").has_static_inputs
