"""What the page says to type is typed: the next run gives the module 8 bits, or leaves it dense, and no other one."""

import shlex

import pytest
from hydra.utils import instantiate

from lightning_compress import AllocateModifier, GPTQModifier, QuantizationModifier
from lightning_compress.training.overrides import leave_dense, more_bits
from tests.support.architecture_models import ARCHITECTURES

FIRST, SECOND = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"


def bits_of(modifier):
    model = ARCHITECTURES["llama"].build()
    return {name: scheme.weights.num_bits for name, scheme in modifier.assign(model).items()}


def quantizer(app_config, *overrides):
    """The quantizing modifier of the callback, as the app builds it from its command line."""
    callback = instantiate(app_config(*overrides).callbacks.compress)
    return next(m for m in callback.lifecycle.modifiers if hasattr(m, "assign"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["+compress=gptq_w4"],  # a preset, group_size=auto
        ["+compress=gptq_w4", "callbacks.compress.modifiers.gptq.scheme={W4A16:[Linear],W8A16:['re:.*down_proj']}"],
        ["+compress=gptq_w3"],  # config_groups
        ["+compress=gptq_w4", "callbacks.compress.modifiers.gptq.scheme={weights:{num_bits:4,group_size:auto}}",
         "callbacks.compress.modifiers.gptq.group_size=null"],
        ["+compress=rtn_w2"],
        ["+compress=awq_w4"],
        ["+compress=autoround_w4"],
    ],
    ids=lambda arguments: " ".join(arguments),
)  # fmt: skip
def test_the_override_for_more_bits_does_that_alone(app_config, arguments):
    modifier = quantizer(app_config, *arguments)
    before = bits_of(modifier)
    assert before[FIRST] < 8
    text = more_bits([modifier])[modifier.technique]["16"]
    typed = shlex.split(text.replace("MODULE", f"{FIRST},{SECOND}"))
    after = bits_of(quantizer(app_config, *arguments, *typed))
    assert after == before | {FIRST: 8, SECOND: 8}


@pytest.mark.parametrize("recipe", ["gptq_w4", "gptq_w3", "rtn_w4"])
def test_the_override_that_leaves_a_module_dense_does_that_alone(app_config, recipe):
    modifier = quantizer(app_config, f"+compress={recipe}")
    text = leave_dense([modifier])[modifier.technique]
    after = bits_of(quantizer(app_config, f"+compress={recipe}", *shlex.split(text.replace("MODULE", FIRST))))
    assert after == {name: bits for name, bits in bits_of(modifier).items() if name != FIRST}


def test_without_hydra_it_is_an_argument_that_python_takes():
    modifier = GPTQModifier(scheme="W4A16", group_size=8, ignore=["lm_head"])
    text = more_bits([modifier])["gptq"]["16"]
    assert text == "GPTQModifier(scheme={'W4A16': ['Linear'], 'W8A16': ['MODULE']})"
    changed = eval(text.replace("MODULE", FIRST).replace(")", ", group_size=8, ignore=['lm_head'])"))
    assert bits_of(changed) == bits_of(modifier) | {FIRST: 8}
    assert leave_dense([modifier]) == {"gptq": "GPTQModifier(ignore=['lm_head', 'MODULE'])"}


def test_there_is_no_text_where_it_would_have_no_effect():
    named = {"g": {"targets": [FIRST], "weights": {"num_bits": 4, "strategy": "channel"}}}
    assert more_bits([QuantizationModifier(config_groups=named)]) == {}
    assert more_bits([AllocateModifier(bits=5), GPTQModifier(scheme="allocated")]) == {}
    assert more_bits([QuantizationModifier(scheme="W4A16", targets=["re:.*up_proj"])]) == {}
