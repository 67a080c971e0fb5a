"""``lightning-compress plan`` as a subcommand; what it prints is tested in tests/planning/test_folder.py."""

from lightning_compress.cli import main


def test_sizes_of_the_data_are_options(source, capsys):
    assert main(["plan", str(source), "gptq_w4", "--batches", "3", "--rows", "1", "--tokens", "8"]) == 0
    assert "(3 batches, 2 blocks)" in capsys.readouterr().out
    assert main(["plan", str(source), "gptq_w4", "--tokens", "0"]) == 2
    assert capsys.readouterr().err == "lightning-compress: tokens=0, expected at least 1\n"
