"""The whole runs of the bench with tiny models on the CPU: the same code but for graphs and events."""

import dataclasses
import sys
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import decode, decoder, whole_gptq
from benchmarks.llama import LLAMA_3_8B, TINY, Body, Llama, random_llama
from lightning_compress.ops.w4a16_gemm import w4a16_gemm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    made = random_llama(Llama, TINY, CPU, torch.float32)
    for name, parameter in made.named_parameters():
        parameter.data.mul_(5 if "norm" not in name else 1)  # logits that differ
    return made


def test_the_model_is_transformers_llama(model):
    transformers = pytest.importorskip("transformers", reason="no transformers: pip install 'lightning-compress[hf]'")
    config = transformers.LlamaConfig(
        hidden_size=TINY.hidden, intermediate_size=TINY.intermediate, num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads, num_key_value_heads=TINY.kv_heads, vocab_size=TINY.vocabulary,
        rms_norm_eps=TINY.eps, rope_parameters={"rope_type": "default", "rope_theta": TINY.theta},
        tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict())
    ids = torch.randint(TINY.vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits)


def test_the_large_one_has_eight_billion_weights():
    with torch.device("meta"):
        large = Llama(LLAMA_3_8B)
    assert sum(p.numel() for p in large.parameters()) == 8_030_261_248  # of Meta-Llama-3-8B
    products = sum(N * K for N, K in LLAMA_3_8B.products.values())
    assert products == sum(m.weight.numel() for m in large.model.layers[0].modules() if isinstance(m, torch.nn.Linear))


def test_stages_add_up_to_the_whole():
    found = whole_gptq.run(whole_gptq.TINY, CPU)
    assert not found.note
    assert found.stages.keys() == set(whole_gptq.STAGES)
    assert min(found.stages.values()) > 0
    assert sum(found.stages.values()) == pytest.approx(found.whole, rel=0.05, abs=0.01)
    assert found.modules == 7 * TINY.layers
    assert found.forward_alone > 0
    text = "\n".join(whole_gptq.table(found))
    assert "| factorization | 0." in text
    assert "14 modules quantized" in text


def test_the_clock_gives_each_stage_its_own_time(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = whole_gptq.StageClock(CPU, "outside")
    with clock.stage("outer"), clock.stage("inner"):
        pass
    assert clock.seconds() == {"outside": 1.0 + 5.0, "outer": 2.0 + 4.0, "inner": 3.0}


def test_on_a_gpu_the_marks_are_events(monkeypatch):
    made = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            made.append(self)
            self.at = 1000.0 * len(made)

        def elapsed_time(self, other):
            assert waited
            return other.at - self.at

    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock = whole_gptq.StageClock(torch.device("cuda"), "outside")
    with clock.stage("inner"):
        pass
    assert not waited  # marks wait for nothing
    assert clock.seconds() == {"outside": 2.0, "inner": 1.0}


def test_what_is_timed_is_the_same_gptq():
    """Marks change nothing: weights are those that the plain modifier leaves."""
    from lightning_compress import GPTQModifier, compress

    job = whole_gptq.TINY
    ids = torch.randint(TINY.vocabulary, (job.rows, job.length), generator=torch.Generator().manual_seed(0))
    timed, plain = (random_llama(Body, TINY, CPU, torch.float32) for _ in range(2))
    whole_gptq.measure(timed, job, ids.split(job.batch), CPU, None, whole_gptq.Found())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": job.group}
    modifier = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})
    compress(plain, modifier, ids.split(job.batch))
    for (name, a), b in zip(timed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_a_deadline_leaves_the_whole_empty():
    found = whole_gptq.run(whole_gptq.TINY, CPU, end=time.monotonic() - 1)
    assert found.whole is None
    assert found.note.startswith("given up: no time was left after 0 of")
    assert "| whole |  |" in whole_gptq.table(found)


def test_what_is_cut_says_how_far_it_came_and_what_all_would_take(monkeypatch):
    """The deadline comes after the first of three: two blocks and what follows them."""
    now, clock = [0.0], time.perf_counter
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    found, job = whole_gptq.Found(), whole_gptq.TINY
    ids = torch.randint(TINY.vocabulary, (job.rows, job.length), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(whole_gptq, "print", lambda *words, flush: now.__setitem__(0, 2.0), raising=False)
    begun = clock()
    with pytest.raises(whole_gptq.OutOfTimeError, match="after 1 of 3 blocks"):
        whole_gptq.measure(random_llama(Body, TINY, CPU, torch.float32), job, ids.split(job.batch), CPU, 1.0, found)
    assert (found.whole, found.blocks) == (None, (1, 3))
    assert 0 < found.extrapolated <= 3 * (clock() - begun)
    assert sum(found.stages.values()) == pytest.approx(found.extrapolated / 3, rel=0.05, abs=0.01)
    assert "all 3 blocks at the pace of the first 1" in "\n".join(whole_gptq.table(found))


def test_without_the_packages_it_says_which(monkeypatch):
    monkeypatch.setattr(whole_gptq, "missing", lambda *names: ["pydantic"])
    found = whole_gptq.run(whole_gptq.TINY, CPU)
    assert found.skipped
    assert found.note == "not run: pydantic missing; put the wheels into BENCH_WHEELS"
    assert found.note in whole_gptq.table(found)


def test_a_failure_is_told_and_costs_no_other_section(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(whole_gptq, "warm_up", broken)
    monkeypatch.setattr(decode, "both", broken)
    assert whole_gptq.run(whole_gptq.TINY, CPU).note == "not run: RuntimeError: out of memory"
    assert decode.run(decode.TINY, CPU).note == "not run: RuntimeError: out of memory"


def dense_blocks(model):
    found = []
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        found.append(
            decoder.Block(
                (layer.input_layernorm.weight, layer.post_attention_layernorm.weight),
                (torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),),
                (a.o_proj.weight,),
                (torch.cat([m.gate_proj.weight, m.up_proj.weight]),),
                (m.down_proj.weight,),
            )
        )
    return found


def test_decoding_is_the_full_forward_pass(model):
    """Token after token with static buffers, against one pass over the whole row."""
    ends = model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight
    one = decoder.Decoder(TINY, dense_blocks(model), ends, positions=12)
    ids = [5, 17, 3]
    with torch.no_grad():
        for position, token in enumerate(ids):
            one.begin(token, position)
            logits = one.step()
        for _ in range(4):  # and on, with its own tokens
            ids.append(int(one.token))
            torch.testing.assert_close(logits[0], model(torch.tensor([ids[:-1]]))[0, -1], rtol=1e-4, atol=1e-5)
            assert int(one.position) == len(ids) - 1
            logits = one.step()


def test_packed_weights_decode_as_dense_ones():
    found = decode.run(decode.TINY, CPU)
    assert not found.note
    assert found.errors["W4"] < 1e-5
    assert 3 < found.bytes["bf16"] / found.bytes["W4"] < 4  # fp32 here, the output layer is dense in both
    assert not found.tokens_per_second
    assert found.ratio is None


def test_all_ways_are_timed(monkeypatch):
    """All but graphs, the clock and the compiler."""
    steps = []

    def captured(run):
        (step,) = run
        return lambda: steps.append(int(step.__self__.position)) or step()

    monkeypatch.setattr(decode, "captured", captured)
    monkeypatch.setattr(decode, "elapsed", lambda run: 0.125 * len(run()))
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph, dynamic: function)
    monkeypatch.setattr(decode, "in_turn", lambda runs, rounds, limit: {way: [run()] * 3 for way, run in runs.items()})
    found = decode.Found()
    with torch.no_grad():
        decode.measure(decode.TINY, decode.both(decode.TINY, CPU), None, found)
    assert found.tokens_per_second == dict.fromkeys(
        ["bf16, as it is", "W4, as it is", "bf16, compiled block", "W4, compiled block"], 4 / 0.5
    )
    assert found.ratio == 1.0
    assert steps == [8, 9, 10, 11] * 4
    late = decode.Found()
    decode.measure(decode.TINY, {}, time.monotonic() - 1, late)
    assert late.note == "no time was left"


def test_packed_weights_that_are_wrong_are_not_timed(monkeypatch):
    monkeypatch.setattr(decoder, "w4a16_gemm", lambda x, *weight: w4a16_gemm(x, *weight) * 1.01)
    monkeypatch.setattr(decode, "measure", lambda *arguments: pytest.fail("timed"))
    found = decode.run(dataclasses.replace(decode.TINY), CPU)
    assert found.note.startswith("wrong: relative error of logits")
    assert "at most 1e-04 was expected" in found.note


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="torch.compile needs an older Python")
def test_one_compilation_serves_all_blocks():
    count = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        for one in decode.both(decode.TINY, CPU).values():
            before = count.frame_count
            one.begin(3, decode.TINY.start)
            plain = one.step()
            one.step_block = torch.compile(decoder.decode_block, fullgraph=True, dynamic=False, backend=count)
            one.begin(3, decode.TINY.start)
            torch.testing.assert_close(one.step(), plain)
            assert count.frame_count == before + 1


def test_the_table_of_decoding():
    found = decode.Found(
        {"bf16, as it is": 200.0, "W4, as it is": 300.0, "W4, compiled block": 500.0},
        bytes={"bf16": 15_000_000_000, "W4": 5_000_000_000}, floor={"bf16": 250.0, "W4": 800.0},
    )  # fmt: skip
    assert found.ratio == 2.5
    lines = decode.table(found)
    assert "| bf16, as it is | 200.0 | 15.00 | 80% |" in lines
    assert "| bf16, compiled block |  | 15.00 |  |" in lines
    assert "| W4, compiled block | 500.0 | 5.00 | 62% |" in lines
