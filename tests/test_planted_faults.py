"""The faults of planted_faults.py still fit the source: each is one patch of one line, caught by a test that exists."""

from pathlib import Path

import pytest
from planted_faults import FAULTS, PACKAGE, ROOT


@pytest.mark.parametrize("planted", FAULTS, ids=lambda planted: planted.what)
def test_a_fault_can_be_planted(planted):
    source = (ROOT / PACKAGE / planted.file).read_text()
    assert source.count(planted.old) == 1, f"{planted.file}: {planted.old!r}"
    assert planted.new != planted.old
    assert planted.old.strip("\n").count("\n") == 0
    for test in planted.tests:
        file, _, name = test.partition("::")
        tests = (Path(__file__).parent / file).read_text()
        assert not name or f"def {name.partition('[')[0]}(" in tests, test


def test_there_are_enough_of_them_and_none_is_twice():
    assert len(FAULTS) >= 40
    assert len({planted.what for planted in FAULTS}) == len({(f.file, f.old, f.new) for f in FAULTS}) == len(FAULTS)
