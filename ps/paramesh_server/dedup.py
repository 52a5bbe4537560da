"""Exactly once: which pushes and assigns a partition has applied. Pure.

    verdict = dedup.admit(client, seq, digest)      # raises SEQ_* and CLIENT_FENCED
    if verdict is Verdict.NEW:
        dedup.record(client, seq, Entry(digest, lsn))

The rules are the table of the protocol, section 3. An entry is written by applying the
record that it is about, so it is wherever the record's effect is.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from paramesh.errors import ParameshError, refuse
from paramesh.v1 import replication_pb2 as rp

WINDOW = 5
"""Pushes a client may have in flight per partition. More hides no more latency at 2-3
GB/s, and every one of them is an entry in every replica's memory."""

ASSIGN_WINDOW = 64
"""Assigns of a client that are remembered. A client waits for each, so two would do; a
wide window costs a few bytes and forgives a tool that pipelines."""

Digest = bytes
"""What tells two pushes apart: presence, options and the frames' checksums, folded."""


def fold(*parts: object) -> Digest:
    """The digest of what a push was made of: the same on every replica.

    Args:
        parts: numbers, bytes, strings and tuples of them: what `repr` writes alike everywhere.
    """
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


class Verdict(enum.Enum):
    """What to do with a push whose sequence number is in order."""

    NEW = "new"
    """Append and apply it."""
    DUPLICATE = "duplicate"
    """It was applied: give the first answer."""
    HOLD = "hold"
    """An earlier one has not come: wait a little, then SEQ_GAP."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One applied push."""

    digest: Digest
    lsn: int
    """Number of the record that applied it, or of the NOOP that consumed it."""
    refused: tuple[str, str] | None = None
    """Reason and message, if the payload was bad and a NOOP took its place."""

    def error(self) -> ParameshError | None:
        """The first answer, if that was an error."""
        return refuse(*self.refused) if self.refused else None


class _Client:
    """The last few pushes of one client."""

    def __init__(self) -> None:
        self.last = 0
        self.entries: dict[int, Entry] = {}


class Dedup:
    """Sequence numbers and assign ids that a partition has seen, and fenced clients."""

    def __init__(self) -> None:
        self._clients: dict[int, _Client] = {}
        self._assigns: dict[int, dict[int, int]] = {}
        self._fenced: set[int] = set()
        self._fenced_through = 0
        """Every id up to this one is fenced: bounds the set, as ids are never reused."""

    def check_client(self, client: int) -> None:
        """Refuse a client that was fenced.

        Raises:
            Fenced: CLIENT_FENCED.
        """
        if self.fenced(client):
            raise refuse("CLIENT_FENCED", f"client {client} was evicted; it joins as a new one", client=client)

    def fenced(self, client: int) -> bool:
        """Whether a client is forbidden for ever."""
        return client <= self._fenced_through or client in self._fenced

    def admit(self, client: int, seq: int, digest: Digest) -> Verdict:
        """Judge one push by its sequence number.

        Raises:
            ParameshError: MISSING_FIELD, CLIENT_FENCED, SEQ_REUSED, SEQ_TOO_OLD, SEQ_TOO_FAR.
        """
        self.check_client(client)
        if seq < 1:
            raise refuse("MISSING_FIELD", "seq counts from 1", field="seq")
        known = self._clients.get(client)
        last = known.last if known else 0
        if seq == last + 1:
            return Verdict.NEW
        if known is None and seq > WINDOW:
            # Its entries may have died with a FENCE that we have yet to see: never guess.
            raise refuse("CLIENT_FENCED", f"client {client} is not known here and starts at seq {seq}")
        if seq > last + WINDOW:
            raise refuse("SEQ_TOO_FAR", f"seq {seq} is more than {WINDOW} above {last}", last=last)
        if seq > last:
            return Verdict.HOLD
        entry = known.entries.get(seq) if known else None
        if entry is None:
            raise refuse("SEQ_TOO_OLD", f"seq {seq} is older than the window; the last is {last}", last=last)
        if entry.digest != digest:
            raise refuse("SEQ_REUSED", f"seq {seq} of client {client} came before with other bytes", seq=seq)
        return Verdict.DUPLICATE

    def entry(self, client: int, seq: int) -> Entry:
        """The entry of a push that `admit` called a duplicate."""
        return self._clients[client].entries[seq]

    def last(self, client: int) -> int:
        """The last seq of a client that was applied or passed over; 0 if none was."""
        known = self._clients.get(client)
        return known.last if known is not None else 0

    def pass_over(self, client: int, through: int) -> int:
        """Take a client's numbers up to `through` as used up, by updates that were lost; how many those are."""
        known = self._clients.setdefault(client, _Client())
        lost = max(0, through - known.last)
        known.last += lost
        known.entries = {seq: entry for seq, entry in known.entries.items() if seq > known.last - WINDOW}
        return lost

    def record(self, client: int, seq: int, entry: Entry) -> None:
        """Remember an applied push; `admit` called it new."""
        known = self._clients.setdefault(client, _Client())
        known.last = seq
        known.entries[seq] = entry
        known.entries.pop(seq - WINDOW, None)

    def assigned(self, client: int, assign_id: int) -> int:
        """The record number of an assign, 0 if it has not been applied.

        Raises:
            ParameshError: MISSING_FIELD, CLIENT_FENCED, SEQ_TOO_OLD.
        """
        self.check_client(client)
        if assign_id < 1:
            raise refuse("MISSING_FIELD", "assign_id counts from 1", field="assign_id")
        done = self._assigns.get(client, {})
        if assign_id not in done and len(done) >= ASSIGN_WINDOW and assign_id < min(done):
            raise refuse("SEQ_TOO_OLD", f"assign {assign_id} is older than the last {ASSIGN_WINDOW}")
        return done.get(assign_id, 0)

    def record_assign(self, client: int, assign_id: int, lsn: int) -> None:
        """Remember an applied assign."""
        done = self._assigns.setdefault(client, {})
        done[assign_id] = lsn
        if len(done) > ASSIGN_WINDOW:
            del done[min(done)]

    def fence(self, client: int) -> bool:
        """Forbid a client for ever; true if it was not yet."""
        if self.fenced(client):
            return False
        self._clients.pop(client, None)
        self._assigns.pop(client, None)
        self._fenced.add(client)
        while self._fenced_through + 1 in self._fenced:
            self._fenced_through += 1
            self._fenced.remove(self._fenced_through)
        return True

    def capture(self, into: rp.ReplicaState) -> None:
        """Write everything that is remembered into a snapshot."""
        for client in sorted({*self._clients, *self._assigns}):
            memory = into.clients.add(client_id=client)
            known = self._clients.get(client)
            if known is not None:
                memory.last = known.last
                for seq, entry in sorted(known.entries.items()):
                    reason, message = entry.refused or ("", "")
                    memory.entries.add(seq=seq, lsn=entry.lsn, digest=entry.digest, reason=reason, message=message)
            for assign_id, lsn in self._assigns.get(client, {}).items():
                memory.assigns[assign_id] = lsn
        into.fenced_through = self._fenced_through
        into.fenced.extend(sorted(self._fenced))

    @classmethod
    def restored(cls, state: rp.ReplicaState) -> Dedup:
        """What a snapshot remembers; the inverse of `capture`."""
        dedup = cls()
        for memory in state.clients:
            if memory.last:
                known = dedup._clients[memory.client_id] = _Client()
                known.last = memory.last
                for entry in memory.entries:
                    refused = (entry.reason, entry.message) if entry.reason else None
                    known.entries[entry.seq] = Entry(entry.digest, entry.lsn, refused)
            if memory.assigns:
                dedup._assigns[memory.client_id] = dict(sorted(memory.assigns.items()))
        dedup._fenced_through = state.fenced_through
        dedup._fenced = set(state.fenced)
        return dedup

    def canonical(self) -> Iterator[bytes]:
        """The state in one fixed order, for hashing."""
        for client, known in sorted(self._clients.items()):
            yield repr((client, known.last)).encode()
            for seq, entry in sorted(known.entries.items()):
                yield repr((seq, entry.digest, entry.lsn, entry.refused)).encode()
        yield repr([(client, sorted(done.items())) for client, done in sorted(self._assigns.items())]).encode()
        yield repr((self._fenced_through, sorted(self._fenced))).encode()
