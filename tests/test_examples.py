"""The demo's data keep their parts apart, and its schedule rises and falls."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM

from examples import distill_narrow, generate_packed, prune_cnn, qat_llama
from examples.causal_lm import lr_share
from examples.data_shapes import draw
from examples.data_stdlib import StdlibBytes, part_of
from examples.data_text import cut, text_files
from examples.token_blocks import Blocks, Draws, spread

SIZES = {"block_length": 16, "batch_size": 4, "train_blocks": 8, "val_blocks": 8, "test_blocks": 8}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Files whose bytes tell which file they are from."""
    for i in range(80):
        (tmp_path / f"m{i}.py").write_bytes(bytes([i]) * 64)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_bytes(bytes([255]) * 64)
    return tmp_path


def test_every_file_goes_to_the_one_part_that_its_name_says(library: Path) -> None:
    streams = StdlibBytes(folder=str(library)).streams()
    found = {part: set(stream.tolist()) for part, stream in streams.items()}
    assert sum(map(len, found.values())) == 80 == len(set().union(*found.values()))
    for part, files in found.items():
        assert all(part_of(f"m{i}.py") == part for i in files)


def test_the_split_stays_as_it_is() -> None:
    """Numbers in the README depend on it."""
    assert [part_of(name) for name in ("_markupbase.py", "glob.py", "os.py", "ast.py")] == [
        "train",
        "val",
        "test",
        "calibration",
    ]


def test_workers_without_torchdata_are_refused(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    data = StdlibBytes(**SIZES, calibration_blocks=4, folder=str(library), num_workers=2)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"num_workers=2 needs torchdata.*lightning-compress\[loaders\]"):
        data.train_dataloader()


def test_only_training_shuffles_and_each_part_has_its_size(library: Path) -> None:
    data = StdlibBytes(**SIZES, calibration_blocks=4, folder=str(library))
    data.setup("fit")
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.calibration_dataloader()]
    assert [type(loader.sampler) for loader in loaders] == [Draws, *[SequentialSampler] * 3]
    assert [sum(len(b["input_ids"]) for b in loader) for loader in loaders] == [8, 8, 8, 4]
    first = next(iter(data.val_dataloader()))["input_ids"]
    assert first.dtype == torch.int64
    assert first.shape == (4, 16)
    assert torch.equal(first, next(iter(data.val_dataloader()))["input_ids"])


def test_setup_again_reads_nothing(library: Path) -> None:
    data = StdlibBytes(**SIZES, calibration_blocks=4, folder=str(library))
    data.setup("fit")
    before = dict(data.parts)
    data.setup("test")
    assert all(data.parts[part] is blocks for part, blocks in before.items())


def test_a_folder_without_python_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \*\.py files; set data.folder"):
        StdlibBytes(folder=str(tmp_path)).setup("fit")


def test_too_little_text_is_refused(library: Path) -> None:
    data = StdlibBytes(**{**SIZES, "block_length": 10_000}, calibration_blocks=4, folder=str(library))
    with pytest.raises(ValueError, match=r"the train text has \d+ tokens, less than one block of 10000"):
        data.setup("fit")


def test_blocks_are_consecutive_and_the_rest_is_left_out() -> None:
    blocks = Blocks(torch.arange(11, dtype=torch.uint8), 4)
    assert [b["input_ids"].tolist() for b in (blocks[0], blocks[1])] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(blocks) == 2


def test_spread_covers_all_of_the_stream() -> None:
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(7, 7).tolist() == list(range(7))


def test_cut_gives_consecutive_pieces_in_proportion() -> None:
    pieces = cut(torch.arange(100), [0.8, 0.08, 0.08, 0.04])
    assert [len(p) for p in pieces] == [80, 8, 8, 4]
    assert torch.equal(torch.cat(pieces), torch.arange(100))
    assert [len(p) for p in cut(torch.arange(100), [0.8])] == [100]


def test_text_files_are_a_file_a_folder_or_a_list(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c.bin"):
        (tmp_path / name).write_text("x")
    assert [p.name for p in text_files(str(tmp_path))] == ["a.md", "b.txt"]
    assert [p.name for p in text_files([str(tmp_path / "c.bin"), str(tmp_path / "b.txt")])] == ["c.bin", "b.txt"]
    with pytest.raises(ValueError, match=r"'nowhere' is neither a text file nor a folder with \.txt or \.md files"):
        text_files("nowhere")


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth() -> None:
    shares = [lr_share(step, 100, 0.05) for step in range(101)]
    assert shares[0] == pytest.approx(0.2)
    assert shares[4] == shares[5] == 1.0
    assert all(a >= b for a, b in pairwise(shares[5:]))
    assert shares[100] == pytest.approx(0.1)


def test_draws_differ_between_epochs_and_not_between_ranks() -> None:
    """Each rank makes its own sampler, and Lightning hands every rank its share of what the sampler draws."""
    ranks = [Draws(100, 40), Draws(100, 40)]
    first, second = ([list(draws) for draws in ranks] for _ in range(2))
    assert first[0] == first[1] != second[0] == second[1]
    assert len(set(first[0])) == 40 == len(ranks[0])


def test_shapes_are_drawn_the_same_each_time_and_differ_between_classes() -> None:
    images, labels = draw(64, 0.0, seed=3)
    assert images.shape == (64, 1, 16, 16)
    assert labels.bincount().tolist() == [8] * 8
    assert all(torch.equal(a, b) for a, b in zip(draw(64, 0.0, seed=3), (images, labels), strict=True))
    lit = [(images[labels == c] > 0).float().mean().item() for c in range(8)]
    disc, ring, square, frame, plus, cross, rows, columns = lit
    assert square > max(disc, frame, plus, cross, rows, columns)  # the others are cut out of it
    assert disc > 0.1 < ring


def test_the_qat_example(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    short = ["--steps", "4", "--qat-steps", "2", "--width", "64", "--library", str(library), "--out", str(out)]
    numbers = qat_llama.main(short)
    assert list(numbers) == ["dense", "2 bits, rounded", "dense, trained on", "2 bits, trained"]
    assert all(1 < value < 1000 for value in numbers.values())
    assert numbers["2 bits, rounded"] != numbers["dense"]
    printed = capsys.readouterr().out
    assert f"2 bits, trained    perplexity {numbers['2 bits, trained']:7.3f}" in printed
    model = AutoModelForCausalLM.from_pretrained(out / "compressed", dtype=torch.float32)
    model(input_ids=torch.arange(8)[None])  # unpacks
    weight = model.model.layers[0].mlp.down_proj.weight
    assert max(len(group.unique()) for group in weight.reshape(-1, 64)) <= 4


def test_the_pruning_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = prune_cnn.main(
        ["--epochs", "2", "--width", "4", "--images", "256", "--sparsity", "0.75", "--out", str(tmp_path / "out")]
    )
    assert list(numbers) == ["dense", "pruned at once", "dense, trained on", "pruned on a schedule", "zeros"]
    assert numbers["zeros"] == pytest.approx(75, abs=0.2)
    assert "pruned on a schedule" in capsys.readouterr().out
    exported = load_file(tmp_path / "out" / "compressed" / "model.safetensors")
    assert (exported["stage3.0.weight"] == 0).float().mean() == pytest.approx(0.75, abs=0.01)
    assert (exported["stage1.0.weight"] != 0).all()


def test_the_distillation_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = distill_narrow.main(["--epochs", "1", "--width", "8", "--images", "640", "--out", str(tmp_path / "out")])
    assert list(numbers) == ["teacher", "student alone", "student, taught"]
    assert numbers["student alone"] != numbers["student, taught"]
    assert "student, taught" in capsys.readouterr().out
    state = torch.load(tmp_path / "out" / "compressed.ckpt", weights_only=True)
    assert state["state_dict"]["model.stage1.0.weight"].shape == (2, 1, 3, 3)
    widths = {"stage2": (16, 4), "stage3": (32, 8)}
    saved = state["callbacks"]["CompressionCallback"]["modifiers"]["DistillationModifier"]["projections"]["weights"]
    assert {name: tuple(weight.shape) for name, weight in saved.items()} == widths
    exported = load_file(tmp_path / "out" / "compressed" / "model.safetensors")
    assert exported.keys() == {key.removeprefix("model.") for key in state["state_dict"]}


def test_every_example_that_runs_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    for example in (qat_llama, prune_cnn, distill_narrow, generate_packed):
        with pytest.raises(SystemExit) as left:
            example.main(["--help"])
        assert left.value.code == 0
        assert f"python -m {example.__name__}" in capsys.readouterr().out


def test_packed_weights_generate_the_same_tokens_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = generate_packed.main(["--layers", "1", "--new-tokens", "4", "--backend", "eager"])
    assert list(tokens) == ["eager", "compiled"]
    assert torch.equal(*tokens.values())
    assert tokens["eager"].shape == (4,)
    assert capsys.readouterr().out.count("tokens per second") == 3
