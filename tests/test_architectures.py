"""Architectures of transformers, a CNN as timm builds them and a plain Sequential, through the techniques and back.

Each is compressed, exported, and loaded by a process that does not know this package; its logits must be those of the
model in memory. ``make test`` runs every architecture through GPTQ and a few through all; ``make test-slow`` the rest.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from lightning_compress import (
    AWQModifier,
    GPTQModifier,
    Modifier,
    QuantizationModifier,
    SmoothQuantModifier,
    SparseGPTModifier,
    compress,
    load,
    save,
)
from lightning_compress.quant.record import Quantized
from tests.support.architecture_models import ARCHITECTURES
from tests.support.plain_reader import read_by_transformers

LAYERS = ["Linear", "Conv1D", "Conv1d", "Conv2d"]
HEADS = ["re:.*(lm_head|predictions.decoder|lm_head.decoder|vocab_projector|proj_out)$"]  # tied to the embedding
W4 = {"targets": LAYERS, "ignore": HEADS, "scheme": "W4A16", "group_size": -1}
RECIPES: dict[str, Callable[[], list[Modifier]]] = {
    "gptq": lambda: [GPTQModifier(**W4)],
    "rtn": lambda: [QuantizationModifier(**W4)],
    "awq": lambda: [AWQModifier(n_grid=4, **W4)],
    "smoothquant_gptq": lambda: [SmoothQuantModifier(), GPTQModifier(**W4)],
    "sparsegpt": lambda: [SparseGPTModifier(targets=LAYERS, ignore=HEADS, sparsity=0.5)],
}
# Mamba takes the weights of these and calls the modules never; AWQ has no convolutions.
BYPASSED = {f"mamba.{recipe}": ("conv1d", "dt_proj") for recipe in RECIPES} | {
    f"{name}.awq": ("convolution", "projection", "patch_embedding", "conv1", "conv2", "dwconv", "patch_embeddings",
                    "downsampling_layer.1")
    for name in ("vit", "resnet", "convnext", "clip", "whisper")
}  # fmt: skip
IN_ALL = ("qwen3",)  # through every recipe in the fast suite too

pytestmark = pytest.mark.filterwarnings("ignore:.*written with dense weights", "ignore:(targets|ignore)=.*matches none")


def cases(fast: bool) -> list[tuple[str, str]]:
    every = [(name, recipe) for name in ARCHITECTURES for recipe in RECIPES]
    return [case for case in every if (case[1] == "gptq" or case[0] in IN_ALL) == fast]


def compressed_and_read(root, wanted: Sequence[tuple[str, str]]):
    """By case: logits in memory, logits of the dense model, logits of the reader, the ledger."""
    in_memory, dense, ledgers, classes = {}, {}, {}, {}
    for name, recipe in wanted:
        case, architecture = f"{name}.{recipe}", ARCHITECTURES[name]
        model, batches = architecture.build(), architecture.batches()
        dense[case] = logits(model, batches[0])
        ledgers[case] = compress(model, RECIPES[recipe](), batches)
        in_memory[case] = logits(model, batches[0])
        save(model, root / case)
        save_file(batches[0], root / f"{case}.batch")
        classes[case] = architecture.model
    return in_memory, dense, read_by_transformers(root, classes), ledgers


def logits(model, batch):
    with torch.no_grad():
        out = model(**batch)
    return out.logits_per_image if "logits_per_image" in out else out.logits


def check(results, case):
    in_memory, dense, read, ledgers = (result[case] for result in results)
    assert_close(read, in_memory, rtol=0, atol=1e-4 * float(dense.abs().max().clamp_min(1)))
    assert 1e-3 < (in_memory - dense).norm() / dense.norm() < 1.5  # something was done, and not nonsense
    unseen = [row.module for row in ledgers if any("never saw" in flag for flag in row.flags)]
    assert not [module for module in unseen if not module.endswith(BYPASSED.get(case, ()))]
    assert all(row.error is None or 0 <= row.error < 1 for row in ledgers)


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return compressed_and_read(tmp_path_factory.mktemp("fast"), cases(fast=True))


@pytest.fixture(scope="module")
def bulk(tmp_path_factory):
    return compressed_and_read(tmp_path_factory.mktemp("bulk"), cases(fast=False))


@pytest.mark.parametrize("case", map(".".join, cases(fast=True)))
def test_plain_transformers_gives_the_logits_of_the_model_in_memory(fast, case):
    check(fast, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", map(".".join, cases(fast=False)))
def test_plain_transformers_gives_the_logits_of_every_other_technique(bulk, case):
    check(bulk, case)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_of_an_architecture_is_quantized(fast, name):
    """No layer is passed over: the ledger names every Linear, Conv1D and convolution but the tied head."""
    model = ARCHITECTURES[name].build()
    tied = {id(parameter) for embedding in embeddings(model) for parameter in embedding.parameters()}
    wanted = {
        path
        for path, module in model.named_modules()
        if {c.__name__ for c in type(module).__mro__} & set(LAYERS) and id(module.weight) not in tied
    }
    rows = {row.module for row in fast[3][f"{name}.gptq"] if row.technique == "gptq"}
    missed = wanted - rows
    assert not {path for path in missed if not path.endswith(("lm_head", "decoder", "proj_out"))}
    assert len(rows) >= 7


def embeddings(model):
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


class Residual(nn.Module):
    """conv-bn-relu twice beside a shortcut, and a squeeze, as timm's."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(x + y * self.squeeze(y))


class ImageNet(nn.Module):
    """As timm's networks: stem, stages, a pooled head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stages = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def sequential():
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


PLAIN = {"timm": (ImageNet, (4, 3, 16, 16)), "sequential": (sequential, (8, 16))}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PLAIN)
def test_models_of_plain_torch_go_through_and_come_back(name, recipe, tmp_path):
    build, shape = PLAIN[name]
    torch.manual_seed(0)
    model, batches = build().eval(), [torch.randn(shape) for _ in range(4)]
    with torch.no_grad():
        dense = model(batches[0])
        compress(model, RECIPES[recipe](), batches)
        wanted = model(batches[0])
        again = load(save(model, tmp_path / "out"), build())
        assert 1e-3 < (wanted - dense).norm() / dense.norm() < 1.5
        assert_close(again(batches[0]), wanted, rtol=0, atol=1e-6)
    assert Quantized.find(again).keys() == Quantized.find(model).keys()


def test_a_convolutional_net_is_read_by_plain_torch(tmp_path):
    """What stays dense on disk needs no loader at all."""
    torch.manual_seed(0)
    model, batches = ImageNet().eval(), [torch.randn(4, 3, 16, 16) for _ in range(2)]
    compress(model, GPTQModifier(targets=["Conv2d"], scheme="W4A16", group_size=-1), batches)
    plain = ImageNet().eval()
    plain.load_state_dict(load_file(save(model, tmp_path / "out") / "model.safetensors"))
    with torch.no_grad():
        assert_close(plain(batches[0]), model(batches[0]), rtol=0, atol=0)


def test_a_head_tied_to_the_embedding_is_refused():
    model = ARCHITECTURES["gemma2"].build()
    with pytest.raises(ValueError, match="the weight of 'lm_head' is shared with 'model.embed_tokens.weight'.*ignore"):
        compress(model, QuantizationModifier(scheme="W4A16", group_size=-1))
