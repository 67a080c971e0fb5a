import json

from lightning_compress.planning.plan import Plan, PlannedModule

PLAN = Plan(
    recipe=("GPTQModifier",),
    model="LlamaForCausalLM",
    modules=(
        *(PlannedModule(f"layers.{i}.up", "Linear", "quantize", "W4A16 g128", 1024, 4096, 544) for i in range(5)),
        PlannedModule("head", "Linear", "quantize", "W4A16 g128", 1024, 4096, 4096, "it shares its weight with 'in'"),
    ),
    left_out={f"layers.{i}.norm_in": "in ignore, as re:.*norm.*" for i in range(6)},
    warnings=("a warning of set-up",),
    bytes_before=40_000,
    bytes_after=20_000,
    blocks=5,
    batches=16,
    seconds={"calibration": 12.34},
    memory={"model": 40_000, "peak": 2**30},
    readers={"transformers": "", "vLLM": "3 bits need a recent version, and a kernel for the GPU"},
    unknown=("sizes after the cuts of X",),
)  # fmt: skip


def test_the_text_fits_80_columns_and_says_all():
    lines = str(PLAN).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for part in (
        "plan: GPTQModifier on LlamaForCausalLM",
        "quantize W4A16 g128 Linear 6 8.875 24 KiB 6.656 KiB",
        "16 batches, 5 blocks",
        "seconds of calibration 12.3",
        "memory, peak 1 GiB",
        "vLLM no: 3 bits need a recent version",
        "left as they are, in ignore, as re:.*norm.*: layers.0.norm_in, layers.1.norm_in, layers.2.norm_in and 3 more",
        "quantized, and written dense, since it shares its weight with 'in': head",
        "not estimated: sizes after the cuts of X",
        "warning: a warning of set-up",
    ):
        assert part in text, part


def test_a_refused_plan_shows_why_alone():
    text = str(Plan(("GPTQModifier",), "Net", refusals=("targets match nothing",)))
    assert text.split("\n")[1:4] == ["plan: GPTQModifier on Net: refused", "", "targets match nothing"]


def test_it_is_plain_json():
    assert json.loads(json.dumps(PLAN.to_json()))["modules"][0]["bytes_after"] == 544
