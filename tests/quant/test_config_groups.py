"""The choice as config_groups: what a quantizer reads from it is what was chosen."""

import pytest
import yaml
from torch import nn

from lightning_compress.modifiers.allocate.options import choice_of, groups_of, parse_candidates
from lightning_compress.quant.assignment import assign
from lightning_compress.quant.config_groups import config_groups
from lightning_compress.quant.schemes import from_groups

CANDIDATES = ["W2A16", "W4A16_ASYM g16", "W8A16 channel", "W8A8", "FP8_BLOCK", "MXFP4A16", "NVFP4A16", "dense"]


@pytest.mark.parametrize("shift", range(len(CANDIDATES)))
def test_a_quantizer_reads_what_was_chosen(shift):
    model = nn.ModuleDict({name: nn.Linear(128, 8) for name in ("a", "b", "c")})
    groups = groups_of(dict(model.items()), parse_candidates(CANDIDATES, 32), on_disk=False)
    choice = [(shift + i * i) % len(CANDIDATES) for i in range(3)]
    chosen = {name: group.schemes[k][name] for group, k in zip(groups, choice, strict=True) for name in group.modules}
    content = yaml.safe_load(yaml.safe_dump(config_groups(choice_of(groups, choice))))
    schemes = assign(model, from_groups(content), [])
    assert schemes.keys() == {name for name, scheme in chosen.items() if scheme is not None}
    for name, scheme in schemes.items():
        assert scheme.model_dump(exclude={"targets"}) == chosen[name].model_dump(exclude={"targets"})


def test_experts_are_one_pattern_for_each_projection():
    names = [f"moe.experts.{i}.{name}" for i in range(12) for name in ("up", "down")] + ["moe.gate"]
    groups = groups_of(
        {name: nn.Linear(32, 8) for name in names}, parse_candidates(["W4A16", "W8A16"], 32), on_disk=False
    )
    content = config_groups(choice_of(groups, [1, 0]))
    targets = {name: group["targets"] for name, group in content.items()}
    assert targets["w8a16_g32_sym"] == ["re:moe\\.experts\\.\\d+\\.up$", "re:moe\\.experts\\.\\d+\\.down$"]
    assert targets["w4a16_g32_sym"] == ["moe.gate"]
