"""The ledger's records and whole state as bytes, for replicas and checkpoints. Pure.

    data = encode_record(record)        # the payload of a replicated log entry
    record = decode_record(data)        # or FORMAT
    data = encode_state(state)          # everything that replicas agree on

What may be read is a closed list: the bodies below and the types in their fields. The first
byte is a version; it rises when a field or a body changes its meaning or place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from paramesh_server import ledger_log as bodies
from paramesh_server.ledger_coding import Reader, bad, coder_of, write_integer
from paramesh_server.ledger_epochs import EpochsState
from paramesh_server.ledger_groups import GroupState
from paramesh_server.ledger_log import KINDS, Record
from paramesh_server.ledger_members import MembersState
from paramesh_server.ledger_small import GatherState

RECORD_VERSION = 1
STATE_VERSION = 1

TAGS: dict[int, type] = {
    1: bodies.Joined,
    2: bodies.Started,
    3: bodies.Left,
    4: bodies.ActivitySet,
    5: bodies.GroupOpened,
    6: bodies.InitOwned,
    7: bodies.InitCommitted,
    8: bodies.StepDecided,
    9: bodies.HyperNoted,
    10: bodies.ClipSet,
    11: bodies.Degraded,
    12: bodies.ClockEntered,
    13: bodies.ClockFinished,
    14: bodies.EpochOpened,
    15: bodies.Dealt,
    16: bodies.Leased,
    17: bodies.Returned,
    18: bodies.MovedOn,
    19: bodies.EpochClosed,
    20: bodies.StatePut,
    21: bodies.Gathered,
    22: bodies.Delivered,
    23: bodies.GatherEntered,
}
"""Every body by its number on the wire. Numbers are never reused."""

_BODIES = {tag: coder_of(body) for tag, body in TAGS.items()}
_TAG_OF = {body: tag for tag, body in TAGS.items()}


@dataclass(slots=True)
class LedgerState:
    """Everything that replicas of the ledger agree on."""

    lsn: int = 0
    """The last record that is in it."""
    members: MembersState = field(default_factory=MembersState)
    groups: dict[int, GroupState] = field(default_factory=dict)
    epochs: EpochsState = field(default_factory=EpochsState)
    small: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    gathers: dict[str, GatherState] = field(default_factory=dict)


_STATE = coder_of(LedgerState)


def encode_record(record: Record) -> bytes:
    """A record as bytes; equal records give equal bytes.

    Raises:
        KeyError: its body is none of the ledger's.
        ValueError: an integer in it is negative.
    """
    tag = _TAG_OF[type(record.body)]
    out = bytearray((RECORD_VERSION, tag))
    write_integer(out, record.lsn)
    _BODIES[tag].write(out, record.body)
    return bytes(out)


def decode_record(data: bytes) -> Record:
    """The record that `encode_record` wrote.

    Raises:
        RequestRefused: FORMAT, these are not its bytes.
    """
    reader = Reader(data)
    _check_version(reader, RECORD_VERSION)
    tag = reader.take(1)[0]
    if tag not in _BODIES:
        raise bad(f"no record has number {tag}")
    lsn = reader.integer()
    body = _BODIES[tag].read(reader)
    reader.end()
    return Record(lsn, KINDS[TAGS[tag]], body)


def encode_state(state: LedgerState) -> bytes:
    """A whole state as bytes; equal states give equal bytes."""
    out = bytearray((STATE_VERSION,))
    _STATE.write(out, state)
    return bytes(out)


def decode_state(data: bytes) -> LedgerState:
    """The state that `encode_state` wrote; it shares nothing with the bytes or any other.

    Raises:
        RequestRefused: FORMAT, these are not its bytes.
    """
    reader = Reader(data)
    _check_version(reader, STATE_VERSION)
    state: LedgerState = _STATE.read(reader)
    reader.end()
    return state


def shape() -> str:
    """What is written, in words: a test notices when it changes without a new version."""
    lines = [f"{tag} {coder.shape}" for tag, coder in _BODIES.items()]
    return "\n".join([*lines, _STATE.shape])


def _check_version(reader: Reader, expected: int) -> None:
    version = reader.take(1)[0]
    if version != expected:
        raise bad(f"version {version}, read here is {expected}")
