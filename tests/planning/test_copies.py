import copy

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress.planning.copies import first_blocks, without_weights


class Stack(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(blocks))
        self.head = nn.Linear(8, 3)
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x + self.shift)


def llama(layers=4):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, tie_word_embeddings=True, **sizes))


def test_a_copy_without_weights_has_names_shapes_and_ties():
    model = llama()
    copied = without_weights(model)
    shapes = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    assert {name: (t.shape, t.dtype) for name, t in copied.state_dict().items()} == shapes
    assert all(t.is_meta for t in (*copied.parameters(), *copied.buffers()))
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert not any(p.is_meta for p in model.parameters())


def test_the_first_blocks_compute_what_they_do_in_the_model():
    model, x = Stack(), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    small, blocks = first_blocks(model, 2)
    expected = x
    for block in model.blocks[:2]:
        expected = expected + block(expected)
    torch.testing.assert_close(small(x), model.head(expected + model.shift))
    assert blocks == 4
    assert len(model.blocks) == 4
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_of_a_model_of_transformers_the_config_changes_with_the_blocks():
    model = llama()
    small, blocks = first_blocks(model, 1)
    assert (blocks, small.config.num_hidden_layers, model.config.num_hidden_layers) == (4, 1, 4)
    ids = torch.tensor([[1, 2, 3]])
    shallow = LlamaForCausalLM(copy.deepcopy(small.config))
    shallow.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(small.eval()(ids).logits, shallow.eval()(ids).logits)


def test_blocks_without_weights_get_random_ones():
    small, blocks = first_blocks(without_weights(llama().to(torch.bfloat16)), 2)
    assert blocks == 4
    assert len(small.model.layers) == 2
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert torch.isfinite(small(torch.tensor([[1, 2, 3]])).logits).all()


def test_no_list_of_blocks_no_copy():
    assert first_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), 1) is None
    assert first_blocks(Stack(2), 2) is None
