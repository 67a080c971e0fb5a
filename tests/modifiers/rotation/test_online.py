"""Online rotations: refused unless allowed; then exact here and through load, and refused by other loaders."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import GPTQModifier, QuIPModifier, RotationModifier, SpinQuantModifier, compress, load, save
from lightning_compress.modifiers.rotation.hadamard import hadamard
from lightning_compress.modifiers.rotation.online import OnlineRotation, OnlineRotations
from tests.support.rotation_models import build, logits, token_batches

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*shared its weight with the embeddings"),
    pytest.mark.filterwarnings("ignore:.*rotations run beside"),
]
UNTIED = {"tie_word_embeddings": False}
ALL = ["R1", "R2", "R4"]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("n", "block"), [(24, 12), (16, 16), (36, 36)])
def test_an_online_rotation_is_a_product_with_its_matrix(side, n, block):
    torch.manual_seed(0)
    linear, x = nn.Linear(n, n).double(), torch.randn(5, n, dtype=torch.float64)
    signs = tuple(int(s) for s in torch.randint(0, 2, (block,)) * 2 - 1)
    online = OnlineRotation(side, signs)
    M = torch.block_diag(*[torch.tensor(signs).double()[:, None] * hadamard(block) / block**0.5] * (n // block))
    assert_close(torch.block_diag(*[online.matrix()] * (n // block)), M, rtol=0, atol=1e-12)
    expected = linear(x @ M) if side == "input" else linear(x) @ M.t()
    OnlineRotations((online,)).attach(linear)
    assert_close(linear(x), expected, rtol=0, atol=1e-12)
    x.requires_grad_()
    plain = nn.functional.linear(x @ M if side == "input" else x, linear.weight, linear.bias)
    plain = plain if side == "input" else plain @ M.t()
    inputs = (x, linear.weight, linear.bias)
    gradients = (torch.autograd.grad(y.sin().sum(), inputs) for y in (linear(x), plain))
    for gradient, expected_gradient in zip(*gradients, strict=True):
        assert_close(gradient, expected_gradient, rtol=0, atol=1e-11)
    assert_close(copy.deepcopy(linear)(x), expected, rtol=0, atol=1e-12)
    OnlineRotations.detach(linear)
    assert not linear._forward_pre_hooks
    assert not linear._forward_hooks
    assert not OnlineRotations.find(linear)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("settings", [
    {"rotations": ALL}, {"rotations": ["R4"]}, {"rotations": ["v"]}, {"rotations": ["v", "u"]},
    {"rotations": ["v", "u"], "transform_block_size": 4}, {"rotations": ["u"], "transform_type": "hadamard"},
], ids=str)  # fmt: skip
def test_no_output_changes(kind, settings):
    if kind == "gemma2" and "R4" in settings["rotations"]:
        pytest.skip("its stream cannot be turned, so that R4 has no weights")
    model = build(kind)
    before = logits(model)
    targets = {"targets": ["Conv1D"]} if kind == "gpt2" else {}
    compress(model, RotationModifier(allow_online=True, **settings, **targets))
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()
    beside = OnlineRotations.find(model)
    assert beside
    if settings["rotations"] == ALL:
        names = {"gpt2": "mlp.c_proj", "opt": "fc2"}
        assert all(name.endswith(names.get(kind, "down_proj")) for name in beside)
        assert len(beside) == 2
    if settings["rotations"] == ["v", "u"] and kind == "llama":
        rotations = {name.rpartition(".")[2]: record.rotations for name, (_, record) in beside.items()}
        sides = {name: {rotation.side for rotation in both} for name, both in rotations.items()}
        only_output = {key: {"output"} for key in ("q_proj", "k_proj", "gate_proj", "up_proj")}
        assert sides == {**only_output, "down_proj": {"input"}}


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_gptq_after_rotation_sees_rotated_inputs(walk):
    """With R4 the Hessian of down_proj is the one of rotated inputs."""
    model = build("llama", **UNTIED)
    before = logits(model)
    gptq = GPTQModifier(scheme="W4A16", group_size=-1, ignore=["re:.*lm_head"])
    ledger = compress(model, [RotationModifier(rotations=ALL, allow_online=True), gptq], token_batches(4), walk=walk)
    errors = {row.module: row.error for row in ledger if row.technique == "gptq"}
    assert len(errors) == 14
    assert max(errors.values()) < 0.02
    assert (logits(model) - before).square().sum() < 0.05 * before.square().sum()


@pytest.mark.parametrize(("modifier", "beside"), [
    (RotationModifier(rotations=ALL, allow_online=True), 2),
    (QuIPModifier(rotations=["v", "u"], allow_online=True, transform_block_size=8), 10),
], ids=["R4", "QuIP"])  # fmt: skip
def test_load_computes_the_same_and_other_loaders_refuse_the_folder(tmp_path, modifier, beside):
    model = build("llama", **UNTIED)
    compress(model, [modifier, GPTQModifier(scheme="W4A4", group_size=-1, ignore=["re:.*lm_head"])], token_batches(3))
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert len(OnlineRotations.find(again)) == beside
    assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert_close(logits(load(tmp_path / "out", build("llama", **UNTIED))), logits(model), rtol=0, atol=0)
    save(again, tmp_path / "twice")
    assert all((tmp_path / "twice" / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="rotations run beside its modules, which packed modules cannot have"):
        load(tmp_path / "out", packed=True)
    program = (
        "import sys, transformers\n"
        "for name in ('AutoModelForCausalLM', 'LlamaForCausalLM'):\n"
        "    try:\n"
        "        getattr(transformers, name).from_pretrained(sys.argv[1])\n"
        "        print('loaded')\n"
        "    except Exception as error:\n"
        "        print(str(error).replace(chr(10), ' '))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], env=environment, capture_output=True, text=True
    )
    messages = process.stdout.splitlines()
    assert len(messages) == 2, process.stderr[-2000:]
    assert all("online rotations: lightning_compress.load" in line for line in messages), messages
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] != ["LlamaForCausalLM"]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: RotationModifier(rotations=["R3"], allow_online=True), "R3 turns queries and keys .* no loader would"),
    (lambda: RotationModifier(rotations=ALL), "R4 must run beside .*transformers 5.23 .*allow_online=True"),
    (lambda: SpinQuantModifier(rotations=["R4"]), "SpinQuantModifier: .*R4 must run beside modules"),
    (lambda: QuIPModifier(rotations=["v", "u"]), "QuIPModifier: .*u must run beside modules"),
])  # fmt: skip
def test_online_rotations_are_refused_unless_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_modules_that_v_cannot_fuse_are_named_and_nothing_changes():
    model = build("llama")
    weights = copy.deepcopy(model.state_dict())
    message = r"v: no weight can take in the rotation beside 2 modules, such as model.layers.0.mlp.down_proj.*allow_onl"
    with pytest.raises(ValueError, match=message):
        compress(model, QuIPModifier())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_v_needs_nothing_online_where_everything_is_fused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(32, 16), nn.RMSNorm(16)
            self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, ids):
            x = self.table(ids)
            return self.head(self.norm(x + self.first(x)))

    torch.manual_seed(0)
    model, ids = Net(), torch.arange(20).reshape(2, 10)
    before = model(ids)
    compress(model, QuIPModifier(ignore=["head"]))
    assert not OnlineRotations.find(model)
    assert_close(model(ids), before, rtol=0, atol=1e-5)


def test_experts_in_one_tensor_cannot_be_rotated_online():
    with pytest.raises(ValueError, match=r"R4: 'model.layers.0.mlp.experts.down_proj' is not the weight of one module"):
        compress(build("mixtral"), RotationModifier(rotations=ALL, allow_online=True))


def test_an_online_size_without_a_hadamard_matrix():
    with pytest.raises(ValueError, match="R4 rotates 92 features: no Hadamard .* set transform_block_size$"):
        compress(build("llama", intermediate_size=92), RotationModifier(rotations=["R4"], allow_online=True))
