"""A few damaged files for each reader, the same ones each time; ``make fuzz`` runs new ones."""

import pytest

from tests.fuzz.driver import run_case
from tests.fuzz.readers import READERS

CASES = {"load": 40}


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_files_are_read_right_or_named(tmp_path, reader):
    reader.make(tmp_path / "template")
    for number in range(CASES.get(reader.name, 60)):
        mutation, fault = run_case(reader, tmp_path / "template", tmp_path, 0, number)
        assert fault is None, f"case {number}: {mutation}\n{fault}"
