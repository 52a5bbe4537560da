"""The bad-input matrix (design 4, section 2): its 73 rows, and the table of what came of each.

A test says which rows it shows: `@pytest.mark.bad_input(26, got="DATA_LOSS CRC")`, or by a parameter `row`
that has a `number`. `make bad-input` runs them all and prints the table: one line a row, what the design
expects, what came. `got` is what the test has asserted; a test of the tables records the reason itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

ROWS: dict[int, tuple[str, str]] = {
    1: ("unknown table", "NOT_FOUND TABLE"),
    2: ("unknown or negative partition", "INVALID_ARGUMENT"),
    3: ("dtype is not the table's", "INVALID_ARGUMENT DTYPE"),
    4: ("dtype unknown or 0", "INVALID_ARGUMENT DTYPE"),
    5: ("shape or rank is not the table's", "INVALID_ARGUMENT SHAPE"),
    6: ("payload too short", "INVALID_ARGUMENT PAYLOAD_SIZE"),
    7: ("payload too long", "INVALID_ARGUMENT PAYLOAD_SIZE"),
    8: ("dimensions negative, overflowing", "INVALID_ARGUMENT SHAPE"),
    9: ("empty tensor, empty push", "INVALID_ARGUMENT (dense)"),
    10: ("NaN, infinity", "INVALID_ARGUMENT NON_FINITE, or the policy"),
    11: ("overflows the storage's type", "as 10"),
    12: ("subnormals, -0.0", "accepted, same bits"),
    13: ("row id negative or beyond", "OUT_OF_RANGE ROW"),
    14: ("row id of another partition", "FAILED_PRECONDITION WRONG_PARTITION"),
    15: ("duplicate ids", "OK, summed"),
    16: ("count of ids, order", "INVALID_ARGUMENT"),
    17: ("dtype of ids", "INVALID_ARGUMENT"),
    18: ("too many ids, too many rows", "RESOURCE_EXHAUSTED QUOTA"),
    19: ("message too large", "RESOURCE_EXHAUSTED (library)"),
    20: ("compressed message", "UNIMPLEMENTED (library)"),
    21: ("compression bomb", "RESOURCE_EXHAUSTED, if enabled"),
    22: ("codec bomb", "INVALID_ARGUMENT before allocating"),
    23: ("unknown codec, garbage", "INVALID_ARGUMENT CODEC"),
    24: ("top-k indices", "INVALID_ARGUMENT"),
    25: ("quantisation scale", "INVALID_ARGUMENT"),
    26: ("checksum differs", "DATA_LOSS CRC"),
    27: ("undecodable bytes", "INTERNAL (library)"),
    28: ("unknown method, cardinality", "UNIMPLEMENTED (library)"),
    29: ("unknown fields", "ignored"),
    30: ("required field absent", "INVALID_ARGUMENT"),
    31: ("names", "INVALID_ARGUMENT NAME"),
    32: ("epoch that is over", "FAILED_PRECONDITION STALE_EPOCH"),
    33: ("future epoch", "UNAVAILABLE UNKNOWN_EPOCH"),
    34: ("not the primary", "FAILED_PRECONDITION NOT_PRIMARY + hint"),
    35: ("another job", "FAILED_PRECONDITION JOB"),
    36: ("old generation", "ABORTED OLD_GENERATION"),
    37: ("lower term", "FAILED_PRECONDITION STALE_TERM"),
    38: ("orders to lead", "INVALID_ARGUMENT, FAILED_PRECONDITION"),
    39: ("sequence numbers", "protocol, section 3"),
    40: ("another's client id", "PERMISSION_DENIED"),
    41: ("evicted client", "FAILED_PRECONDITION CLIENT_FENCED"),
    42: ("registered again", "OK, same answer"),
    43: ("a live one's name", "ALREADY_EXISTS NODE_NAME"),
    44: ("address nobody can dial", "INVALID_ARGUMENT ADDRESS"),
    45: ("another protocol", "FAILED_PRECONDITION VERSION"),
    46: ("table again, other schema", "OK; ALREADY_EXISTS SCHEMA"),
    47: ("absurd table", "RESOURCE_EXHAUSTED QUOTA"),
    48: ("optimizer, its settings", "INVALID_ARGUMENT"),
    49: ("code by name", "INVALID_ARGUMENT"),
    50: ("floor far ahead", "DEADLINE_EXCEEDED; INVALID_ARGUMENT"),
    51: ("Ready late, early, unstaged", "OK; OUT_OF_RANGE; NOT_STAGED"),
    52: ("two contributions of one step", "INVALID_ARGUMENT SEQ_REUSED"),
    53: ("weights", "INVALID_ARGUMENT"),
    54: ("Append: gap, epoch, crc, partition", "OUT_OF_RANGE; FAILED_PRECONDITION; DATA_LOSS; INVALID_ARGUMENT"),
    55: ("snapshot: missing, repeated, endless", "ABORTED, DATA_LOSS; caps"),
    56: ("leases", "FAILED_PRECONDITION LEASE; INVALID_ARGUMENT; OUT_OF_RANGE"),
    57: ("checkpoint paths", "INVALID_ARGUMENT PATH"),
    58: ("checkpoint files missing, damaged", "NOT_FOUND; DATA_LOSS"),
    59: ("hostile manifest", "INVALID_ARGUMENT"),
    60: ("hostile safetensors", "DATA_LOSS"),
    61: ("pickle", "INVALID_ARGUMENT FORMAT"),
    62: ("newer format, other schema", "FAILED_PRECONDITION"),
    63: ("token absent, malformed, expired", "UNAUTHENTICATED; PERMISSION_DENIED"),
    64: ("token of another role", "PERMISSION_DENIED"),
    65: ("certificates", "handshake fails, counted"),
    66: ("other protocols on the port", "closed; the server lives"),
    67: ("token over an open channel", "refused at the start"),
    68: ("metadata too large", "RESOURCE_EXHAUSTED (library)"),
    69: ("deadline over; none", "DEADLINE_EXCEEDED; the server's own"),
    70: ("caller goes away", "CANCELLED; commits once"),
    71: ("10,000 streams, resets", "max_concurrent_streams"),
    72: ("flood of pings", "GOAWAY too_many_pings"),
    73: ("flags, variables", "exit 2, the key named"),
}
"""Number -> what is sent, and what the design expects."""

NOT_THERE = {
    **dict.fromkeys((13, 14, 15, 16, 17), "not there yet: embedding tables (a push carries no row ids on this wire)"),
    **dict.fromkeys((24, 25), "not there yet: codecs; today CODEC, before a byte is looked at (row 23)"),
}
"""Rows about what this release does not have. The first test that shows one takes its line here away."""


def rows_of(item: pytest.Item) -> dict[int, str]:
    """Rows of the matrix that a test shows -> what its marker says comes of them."""
    found: dict[int, str] = {}
    row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
    if getattr(row, "number", 0) in ROWS and getattr(row, "reason", ""):
        found[row.number] = row.reason
    for marker in item.iter_markers("bad_input"):
        found |= dict.fromkeys(marker.args, marker.kwargs.get("got", "as expected"))
    return found


@dataclass
class Result:
    """What came of one row's tests."""

    got: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)


class Table:
    """The results of a run."""

    def __init__(self) -> None:
        self.results: dict[int, Result] = defaultdict(Result)

    def note(self, number: int, got: str, failed: str = "") -> None:
        """A test of a row ended; `failed`: its name, if it did."""
        result = self.results[number]
        if failed:
            result.failed.append(failed)
        else:
            result.got[got] += 1

    def missing(self) -> list[int]:
        """Rows that are not shown and not excused, or failed."""
        return [n for n in ROWS if self.results[n].failed or not (self.results[n].got or n in NOT_THERE)]

    def lines(self) -> Iterable[str]:
        """The table."""
        yield f"{'row':>3}  {'input':<37} {'expected':<46} got"
        for number, (what, expected) in ROWS.items():
            yield f"{number:>3}  {what:<37} {expected[:46]:<46} {self._said(number)}"
        shown = sum(bool(self.results[n].got) and not self.results[n].failed for n in ROWS)
        absent = [n for n in NOT_THERE if not self.results[n].got]
        cases = sum(result.got.total() for result in self.results.values())
        yield f"{len(ROWS)} rows: {shown} as stated ({cases} cases), {len(absent)} not there yet, "
        yield f"{len(self.missing())} failed or not shown: {self.missing() or 'none'}"

    def _said(self, number: int) -> str:
        result = self.results[number]
        if result.failed:
            return f"FAILED: {', '.join(result.failed)[:200]}"
        if result.got:
            return ", ".join(f"{got} x{count}" if count > 1 else got for got, count in result.got.most_common())
        return NOT_THERE.get(number, "NOT SHOWN")
