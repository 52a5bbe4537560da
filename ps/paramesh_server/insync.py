"""Whom a primary waits for, and what is committed. Pure: time is passed in.

    insync = InSync(me)
    insync.follow(row, now)                 # every map that shows the partition
    insync.appended(log.lsn, now)
    insync.acked(follower, lsn, now)
    insync.commit                           # everything up to here may be released
    wish = insync.wish(now)                 # ask the coordinator for this set, if not None

The rules are the protocol's, section 1. Two of them carry everything:
- A record is committed when all who *may* be in the in-sync set have it: the set of the last
  map, the one asked for while the outcome is unknown, and whoever is about to be asked for.
  So whatever set the coordinator promotes from, each member has every acknowledged record.
- A follower may have dropped its replica and made it again, empty, by rows that this primary never
  saw. So a learner counts for what it says at a greeting under the newest row, and after it.
- What became of a wish is known only by a map in which the row has changed: a refusal or
  silence is no outcome, since the call may still arrive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from paramesh.v1 import types_pb2 as pb

JOIN_LAG = 64
"""Records behind at which a learner is waited for: it is caught up but for what is in
flight, so waiting costs one round trip and not a catch-up."""

SILENT_S = 2.0
"""Seconds without an acknowledgement that is owed, after which a follower leaves the set:
the failure timeout, so that a stall is no longer than a detection."""

EARLY_RECORDS = 256
"""Records that a primary may acknowledge before its followers have them (acks=primary): at most so many go with it."""

EARLY_BYTES = 64 << 20
"""Bytes of such records, where there are more than `EARLY_ANYWAY` of them: they wait in memory."""

EARLY_ANYWAY = 4
"""Such records of any size: fewer would be no different from waiting."""

EARLY_S = 1.0
"""Seconds after a follower's last acknowledgement in which a primary acknowledges by itself: one that is cut off,
or was stopped for longer, must not go on for a client that cannot know. Half of the failure timeout."""

REPEAT_S = 0.5
"""Seconds after which an unanswered wish is asked again, the same."""


class Ref(NamedTuple):
    """One process: a node's name and its incarnation."""

    node: str
    incarnation: int

    @classmethod
    def of(cls, ref: pb.ReplicaRef) -> Ref:
        """From the wire."""
        return cls(ref.node, ref.incarnation)

    def proto(self) -> pb.ReplicaRef:
        """To the wire."""
        return pb.ReplicaRef(node=self.node, incarnation=self.incarnation)


@dataclass(frozen=True, slots=True)
class Wish:
    """An in-sync set to ask the coordinator for."""

    isr: frozenset[Ref]
    version: int
    """Of the row that it is compared with."""
    why: str


class InSync:
    """One partition's in-sync set, as its primary sees it.

    Args:
        me: the primary.
        silent: seconds after which a follower that owes an acknowledgement leaves.
        inherited: what was in the log when this process became primary. Any of it may have been
            acknowledged by those before, so nobody joins without it.

    Attributes:
        isr: the set of the newest map.
        learners: who is catching up, of the newest map.
        last: the last record appended here.
        commit: everything up to here is in the log of every replica that may be in sync.
    """

    def __init__(self, me: Ref, silent: float = SILENT_S, inherited: int = 0) -> None:
        self.me = me
        self._inherited = inherited
        self.isr: frozenset[Ref] = frozenset({me})
        self.learners: frozenset[Ref] = frozenset()
        self.last = 0
        self.commit = 0
        self._silent = silent
        self._version = 0
        self._wish: Wish | None = None
        self._asked = 0.0
        self._dead: frozenset[Ref] = frozenset()
        self._joining: set[Ref] = set()
        """Learners that are waited for already, and not asked for yet."""
        self._acked: dict[Ref, int] = {}
        self._heard: dict[Ref, float] = {}
        """When each acknowledged anything last."""
        self._since: dict[Ref, float] = {}
        """Since when each owes an acknowledgement, or when it last gave one."""

    @property
    def version(self) -> int:
        """Of the newest row."""
        return self._version

    @property
    def followers(self) -> frozenset[Ref]:
        """Everybody whom records are sent to."""
        return (self.isr | self.learners | self._waiting()) - {self.me}

    @property
    def held(self) -> int:
        """Everything up to here is with all who are waited for; payloads need not be kept for them."""
        return min((self._acked.get(ref, 0) for ref in self._waiting()), default=self.last)

    def _waiting(self) -> frozenset[Ref]:
        wished = self._wish.isr if self._wish is not None else frozenset()
        return (self.isr | wished | self._joining) - {self.me}

    def waiting_for(self) -> list[str]:
        """Names of those who lack committed-to-be records, for people."""
        return sorted(ref.node for ref in self._waiting() if self._acked.get(ref, 0) < self.last)

    def follow(self, row: pb.Partition, now: float, dead: frozenset[Ref] = frozenset()) -> None:
        """Take a map's row; older ones than the newest are passed over.

        Args:
            row: the partition's.
            now: seconds.
            dead: processes that the coordinator has declared dead. One that was only silent
                stays in the set until this primary, which lives, asks to drop it: at once.
        """
        self._dead = dead
        if row.version <= self._version:
            return
        self._version = row.version
        self.isr = frozenset(map(Ref.of, row.isr))
        self.learners = frozenset(map(Ref.of, row.learners))
        if self._wish is not None and row.version > self._wish.version:
            self._wish = None  # decided, or never to be: the row that it was compared with is gone
        self._joining.clear()
        for ref in self.learners:  # each is greeted anew, and says what it has now
            self._acked.pop(ref, None)
        for ref in self.followers:
            self._since.setdefault(ref, now)
        self._forget_strangers()
        self._advance()

    def _forget_strangers(self) -> None:
        for ref in set(self._acked) - self.followers:
            del self._acked[ref]
            self._since.pop(ref, None)
            self._heard.pop(ref, None)

    def appended(self, lsn: int, now: float) -> None:
        """A record is in the log here."""
        for ref in self.followers:
            if self._acked.get(ref, 0) >= self.last:  # owed nothing until now
                self._since[ref] = now
        self.last = lsn
        self._advance()

    def acked(self, ref: Ref, lsn: int, now: float, version: int | None = None) -> None:
        """A follower has everything up to `lsn`; never less than it said before.

        Args:
            ref: who.
            lsn: the last record in its memory.
            now: seconds.
            version: of the row under which its stream began; None: the newest. A learner's word under
                an older one counts for nothing.
        """
        if ref not in self.followers or (ref in self.learners and version not in (None, self._version)):
            return
        self._heard[ref] = now
        if lsn > self._acked.get(ref, 0) or lsn >= self.last:
            self._since[ref] = now
        self._acked[ref] = max(lsn, self._acked.get(ref, 0))
        if ref in self.learners and self.last - lsn <= JOIN_LAG:
            self._joining.add(ref)  # from here on nothing is released that it lacks
        self._advance()

    def lost(self, ref: Ref) -> None:
        """The stream to a follower broke. Who was only waited for is waited for no longer."""
        self._joining.discard(ref)
        self._advance()

    def _advance(self) -> None:
        self.commit = max(self.commit, min(self.held, self.last))

    def unheard(self, now: float) -> bool:
        """Whether a follower in sync has said nothing for so long that another may have been promoted."""
        return any(now - self._heard.get(ref, -self._silent) >= self._silent for ref in self.isr - {self.me})

    def early(self, lsn: int, nbytes: int, now: float) -> bool:
        """Whether a record may be acknowledged before the followers have it (acks=primary).

        Args:
            lsn: the record.
            nbytes: of all records that they lack.
            now: seconds.
        """
        if lsn - self.commit > EARLY_RECORDS or (nbytes > EARLY_BYTES and lsn - self.commit > EARLY_ANYWAY):
            return False
        return all(ref in self._heard and now - self._heard[ref] < EARLY_S for ref in self._waiting())

    def wish(self, now: float) -> Wish | None:
        """What to ask the coordinator for now; the same again while the outcome is unknown."""
        if self._wish is not None:
            if now - self._asked < REPEAT_S:
                return None
            self._asked = now
            return self._wish
        if not self._joining and self.held >= self.last:
            return None  # everybody has everything: the usual case, twenty times a second and partition
        self._drop_slow_learners(now)
        gone = {ref for ref in self.isr - {self.me} if self._owes_since(ref, now) >= self._patience(ref)}
        come = {ref for ref in self._joining if self._acked.get(ref, 0) >= max(self.commit, self._inherited)} - self.isr
        if not gone and not come:
            return None
        self._asked = now
        self._wish = Wish((self.isr - gone) | come | {self.me}, self._version, self._why(gone, come))
        return self._wish

    def _patience(self, ref: Ref) -> float:
        return 0.0 if ref in self._dead else self._silent

    def _owes_since(self, ref: Ref, now: float) -> float:
        """Seconds that an acknowledgement has been owed; below 0 if none is."""
        if self._acked.get(ref, 0) >= self.last:
            return -1.0
        return now - self._since.get(ref, now)

    def _drop_slow_learners(self, now: float) -> None:
        slow = {ref for ref in self._joining if self._owes_since(ref, now) >= self._silent}
        if slow:
            self._joining -= slow
            self._advance()

    def _why(self, gone: Iterable[Ref], come: Iterable[Ref]) -> str:
        parts = [f"no acknowledgement from {ref.node} for {self._patience(ref):g} s" for ref in sorted(gone)]
        return "; ".join([*parts, *(f"{ref.node} has caught up" for ref in sorted(come))])
