"""The demo's data keep their parts apart, and its schedule rises and falls."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.data import SequentialSampler

from examples.causal_lm import lr_share
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
        "train", "val", "test", "calibration",
    ]


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
    with pytest.raises(ValueError, match=r"the train text holds \d+ tokens, less than one block of 10000"):
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
    with pytest.raises(ValueError, match=r"'nowhere' is no text file, and no folder with \.txt or \.md files"):
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
