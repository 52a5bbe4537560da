"""Every row of the bad-input matrix has a test, or a line that says what this release lacks."""

from __future__ import annotations

import re
from pathlib import Path

from tests.faults import test_bad_replication
from tests.faults.bad_input_control_rows import CONTROL_ROWS
from tests.faults.bad_input_ledger_rows import LEDGER_ROWS
from tests.faults.bad_input_rows import DATA_ROWS
from tests.faults.bad_input_step_rows import STEP_ROWS
from tests.faults.matrix import NOT_THERE, ROWS

TESTS = Path(__file__).parents[1]
MARKER = re.compile(r"@pytest\.mark\.bad_input\(([\d, ]+),")


def marked() -> set[int]:
    """Rows that markers name."""
    found: set[int] = set()
    for path in TESTS.rglob("test_*.py"):
        for numbers in MARKER.findall(path.read_text(encoding="utf-8")):
            found |= {int(number) for number in numbers.split(",")}
    return found


def test_every_row_is_shown_or_excused_and_none_is_both() -> None:
    tables = (DATA_ROWS, STEP_ROWS, LEDGER_ROWS, CONTROL_ROWS, test_bad_replication.ROWS)
    shown = marked() | {row.number for table in tables for row in table}
    assert list(ROWS) == list(range(1, 74))
    assert ROWS.keys() - shown - NOT_THERE.keys() == set()
    assert shown & NOT_THERE.keys() == set(), "what is shown is there: take its line away"
    assert shown <= ROWS.keys()
