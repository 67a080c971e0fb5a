"""Mixtures of toy size: what is said of plain transformers is what it does, and groups stand as it takes them."""

import warnings

import pytest
import torch
from lightning import LightningModule, Trainer
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_compress import CompressionCallback
from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.modifiers.constant import ConstantPruningModifier
from lightning_compress.modifiers.qat import QATModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_experts_per_tok": 2}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 64}
MIXTURES = {
    "Olmoe": {"num_experts": 4},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 64, "num_key_value_heads": 2},
    "Qwen3Moe": EXPERTS | {"head_dim": 8, "num_key_value_heads": 2},
    "DeepseekV2": {"n_routed_experts": 4, "moe_intermediate_size": 64, "n_shared_experts": 1, "q_lora_rank": 32,
                   "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
                   "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
}  # fmt: skip
IDS = torch.arange(24).reshape(2, 12)
OTHERS = ["lm_head", "re:.*gate$"]
EXPERT, ATTENTION = "re:.*experts[.].*", "re:.*self_attn.*"
W4, W8 = {"scheme": "W4A16", "group_size": 32}, {"scheme": "W8A16", "group_size": -1}
FP8, NVFP4, INT8 = {"scheme": "FP8_DYNAMIC"}, {"scheme": "NVFP4A16"}, {"scheme": "W8A8"}
MXFP4, MXFP8 = {"scheme": "MXFP4A16"}, {"scheme": "MXFP8A16"}


def mixture(name):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | MIXTURES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def told_by_save(model, folder):
    """What save says that plain transformers will do with the folder."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        save(model, folder)
    return " ".join(str(warning.message) for warning in told if "this folder" in str(warning.message))


READ, FAILS, GARBAGE = "", "will fail to load this folder:", "will load this folder without an error, with random exp"
CASES = [
    *[(name, *case) for name in MIXTURES for case in ((W4, [], READ), (INT8, [], FAILS), (NVFP4, [], GARBAGE))],
    ("Olmoe", W8, [], READ),
    ("Olmoe", FP8, [], READ),
    ("Olmoe", MXFP4, [], READ),
    ("Olmoe", MXFP8, [], FAILS),
    ("Olmoe", W4, [EXPERT], FAILS),
    ("Olmoe", INT8, [EXPERT], FAILS),
    ("Olmoe", NVFP4, [EXPERT], FAILS),
    *[(name, FP8, [EXPERT], READ) for name in MIXTURES],
    ("Olmoe", MXFP8, [EXPERT], READ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "scheme", "ignore", "outcome"), CASES)
def test_save_says_what_plain_transformers_does(name, scheme, ignore, outcome, tmp_path):
    model = mixture(name)
    compress(model, QuantizationModifier(ignore=OTHERS + ignore, **scheme), None)
    told, wanted = told_by_save(model, tmp_path / "out"), logits(model)
    assert_close(logits(load(tmp_path / "out", packed=False)), wanted, rtol=0, atol=1e-6)
    if outcome == FAILS:
        assert FAILS in told
        with pytest.raises(RuntimeError):
            type(model).from_pretrained(tmp_path / "out")
        return
    gap = (logits(type(model).from_pretrained(tmp_path / "out").eval()) - wanted).norm() / wanted.norm()
    if outcome == GARBAGE:
        assert GARBAGE in told
        assert gap > 0.5
    else:
        assert told == ""
        assert gap < (1e-5 if scheme in (W4, W8) else 0.03)  # inputs of experts are not quantized there


TWO = [
    ([[*OTHERS, EXPERT], W8], [[*OTHERS, ATTENTION], W4]),  # experts by name, behind attention by name
    ([[*OTHERS, EXPERT], INT8], [[*OTHERS, ATTENTION], W4]),
    ([OTHERS, W8 | {"targets": [ATTENTION + "proj"]}], [OTHERS, W4 | {"targets": ["re:.*mlp.*proj"]}]),
    ([OTHERS, W4 | {"targets": ["re:.*q_proj"]}], [OTHERS, FP8 | {"targets": ["re:.*(k|v|o)_proj"]}]),  # dense ones
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("two", TWO, ids=["two of weights", "int8 beside", "patterns", "dense"])
def test_the_group_that_transformers_takes_for_experts_is_theirs(two, tmp_path):
    """It takes the first that it can; behind another group experts became garbage, without an error or a warning."""
    model = mixture("Olmoe")
    compress(model, [QuantizationModifier(ignore=ignore, **scheme) for ignore, scheme in two], None)
    assert told_by_save(model, tmp_path / "out") == ""
    read, wanted = type(model).from_pretrained(tmp_path / "out").eval(), logits(model)
    assert (logits(read) - wanted).norm() < 0.01 * wanted.norm()
    assert_close(logits(load(tmp_path / "out", packed=False)), wanted, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_experts_of_several_schemes_are_told_to_be_unreadable(tmp_path):
    model = mixture("Olmoe")
    schemes = [W4 | {"targets": ["re:.*experts.*(gate|up)_proj"]}, W8 | {"targets": ["re:.*experts.*down_proj"]}]
    compress(model, [QuantizationModifier(**scheme) for scheme in schemes], None)
    assert "without an error, and answer garbage: it unpacks all experts alike" in told_by_save(model, tmp_path / "two")
    model = mixture("Olmoe")
    compress(model, QuantizationModifier(targets=["re:.*experts.[01].*proj"], **FP8), None)
    told = told_by_save(model, tmp_path / "some")
    assert "without an error, and answer garbage: it takes all experts for quantized ones, and here some are" in told


class Fit(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("modifier", "said"),
    [
        (QuantizationModifier(ignore=OTHERS, **INT8), "but fail to load this folder: of the formats of experts it un"),
        (QuantizationModifier(ignore=OTHERS, **NVFP4), "but load this folder without an error, with random expe"),
        (QATModifier(ignore=[*OTHERS, EXPERT], **W4), "but fail to load this folder: it takes the weights that it"),
        (QATModifier(ignore=OTHERS, **W4), ""),
        (QuantizationModifier(ignore=OTHERS, **W4), ""),
    ],
)
def test_a_run_says_before_it_begins_what_plain_transformers_will_not_read(modifier, said, tmp_path):
    class Stop(CompressionCallback):
        def on_fit_start(self, trainer, pl_module):
            raise KeyError("set up")

    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        callbacks=[Stop([modifier])], enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    fit, loader = Fit(mixture("Olmoe")), DataLoader(IDS, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(KeyError, match="set up"):
            trainer.fit(fit, loader)
    told = [str(w.message) for w in caught if "will not read what this run exports" in str(w.message)]
    assert len(told) == bool(said)
    assert said in "".join(told)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("modifier", [QATModifier(ignore=[*OTHERS, EXPERT], **W4), ConstantPruningModifier()])
def test_experts_that_are_ignored_or_only_masked_stay_as_they_are_without_a_trainer_too(modifier):
    """It took a view of an expert for a layer with a weight of its own, and failed for want of a Parameter."""
    model = mixture("Olmoe")
    attention = model.model.layers[0].self_attn.q_proj
    before, dense = model.model.layers[0].mlp.experts.down_proj.clone(), attention.weight.clone()
    compress(model, modifier, None)
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, before)
    assert torch.equal(attention.weight, dense) == isinstance(modifier, ConstantPruningModifier)
