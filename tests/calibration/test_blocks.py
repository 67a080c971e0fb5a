import pytest
from torch import nn

from lightning_compress.calibration.blocks import find_blocks, modules_of_block, modules_outside
from tests.support.calibration_models import Biased, C, EncoderDecoder, Layered, Mixer, Stages

transformers = pytest.importorskip("transformers")


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3)


class ResNet(nn.Module):
    """Four lists of blocks; the first holds a hundredth of the last one's weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 3)
        for i, width in enumerate((2, 8, 16, 32), 1):
            self.add_module(f"layer{i}", nn.Sequential(Residual(width), Residual(width)))
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(2, 1)) for _ in range(2)])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Mixer() for _ in range(4))


class Hinted(nn.Module):
    _no_split_modules = ["Mixer", "NotThere"]

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Mixer()])


def tiny(name):
    """Tiny models of transformers, with the names that their blocks have there."""
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **common)), "model.layers"
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1
        )
        return transformers.GPT2LMHeadModel(config), "transformer.h"
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=3200, **common)), "encoder.layer"
    return transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **common)), "layers"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_layers_of_transformers(name):
    """Bert's embedding holds most of its weights, and is no block."""
    model, where = tiny(name)
    assert list(find_blocks(model)) == [f"{where}.0", f"{where}.1"]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Layered(3), ["layers.0", "layers.1", "layers.2"]),
        (EncoderDecoder(), ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]),
        (Stages(), ["stages.0", "stages.1", "stages.2"]),
        (nn.Sequential(Mixer(), nn.Tanh(), Mixer(), nn.Linear(C, C)), ["0", "2"]),
        (nn.ModuleDict({"a": Mixer(), "b": Mixer()}), ["a", "b"]),
        (nn.ModuleList(Experts() for _ in range(2)), ["0", "1"]),  # the outermost
        (nn.ModuleList(Biased() for _ in range(2)), ["0", "1"]),
        (ResNet(), [f"layer{i}.{j}" for i in (2, 3, 4) for j in (0, 1)]),  # the others are too small
        (Hinted(), ["layers.0"]),
        (nn.ModuleList([Mixer()]), []),  # once is no repetition
        (nn.Sequential(nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)), []),  # single layers are no blocks
        (nn.Linear(C, C), []),
    ],
    ids=lambda x: type(x).__name__,
)
def test_repeated_children_are_blocks(model, names):
    assert list(find_blocks(model)) == names


def test_the_user_names_them():
    model = Layered(3)
    assert list(find_blocks(model, "Mixer")) == ["layers.0", "layers.1", "layers.2"]
    assert list(find_blocks(model, ["re:layers"])) == ["layers"]  # what lies inside it is no block
    assert list(find_blocks(model, ["layers.1", "re:.*[.]2$", "layers.1.q"])) == ["layers.1", "layers.2"]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("Mixr", r"blocks=\['Mixr'\] matches none of the model's .*did you mean 'Mixer'"),
        (["re:("], r"blocks: 're:\(' is not a valid regular expression"),
    ],
)
def test_names_that_match_nothing(blocks, message):
    with pytest.raises(ValueError, match=message):
        find_blocks(Layered(2), blocks)


def test_every_module_is_in_a_block_or_outside_or_around():
    model = EncoderDecoder()
    blocks = find_blocks(model)
    inside = [n for name, block in blocks.items() for n in modules_of_block(name, block)]
    outside = modules_outside(model, blocks)
    around = ["", "encoder", "decoder"]
    assert sorted([*inside, *outside, *around]) == sorted(n for n, _ in model.named_modules())
    assert list(outside) == ["between"]
    assert inside[:2] == ["encoder.0", "encoder.0.q"]
