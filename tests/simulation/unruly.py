"""A follower whose primaries' messages come in any order: what it applies is what they committed.

The shells send more gently than that (a stream is in order, and begins where two logs match), so the
simulation of clusters cannot tell whether `Replica` itself looks at what a record follows, or at whose
record a commit is about. Here nothing but `Replica` stands between the messages and the state.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from paramesh.errors import ParameshError
from paramesh.v1 import replication_pb2 as rp
from paramesh_server.insync import Ref
from paramesh_server.log import START, Position, Record, record_of
from paramesh_server.partition import Partition
from paramesh_server.replica import Replica
from paramesh_server.staging import Budget

from tests.simulation.world import SPECS, layouts

PASSING = ("STALE_EPOCH", "LOG_GAP", "DIVERGED")


@dataclass(frozen=True)
class Message:
    """A record after the one before it, or a notice of the commit; as `AppendHeader` has it."""

    epoch: int
    previous: Position
    commit: int
    record: Record | None


def empty() -> Partition:
    """A replica that was just made."""
    return Partition(1, 1, layouts(1)[0], SPECS[0], epoch=0, budget=Budget(1 << 20))


def record(at: Position) -> Record:
    """The only one of its place: it forbids a client whose number no other record has."""
    client = at.epoch * 1000 + at.lsn
    return record_of(rp.LogRecord(epoch=at.epoch, lsn=at.lsn, kind=rp.RECORD_KIND_FENCE, client_id=client), ())


def reigns(rng: random.Random) -> tuple[list[Message], list[Position]]:
    """Everything that a few primaries, one after the other, may send; and the log that they commit.

    Each keeps what is committed, drops some of the rest, and appends more: what was not committed may be
    replaced. Commits only rise.
    """
    log, commit, messages = [START], 0, list[Message]()
    for epoch in range(1, rng.randint(3, 5)):
        log = log[: rng.randint(commit, len(log) - 1) + 1]
        for lsn in range(len(log), len(log) + rng.randint(1, 4)):
            log.append(Position(lsn, epoch))
        top = rng.randint(commit, len(log) - 1)
        commit = top if top and log[top].epoch == epoch else commit
        for index in range(1, len(log)):
            messages.append(Message(epoch, log[index - 1], commit, record(log[index])))
            messages.append(Message(epoch, log[index], commit, None))
    return messages, log[: commit + 1]


def deliver(replica: Replica, message: Message) -> None:
    """As `Inbound` does, but for nothing that comes before."""
    try:
        if message.record is not None:
            replica.offer(message.epoch, message.previous, message.record)
            header = message.record.header
            replica.learn(message.epoch, Position(header.lsn, header.epoch), message.commit)
        else:
            replica.learn(message.epoch, message.previous, message.commit)
        replica.apply()
    except ParameshError as error:
        if error.reason not in PASSING:
            raise


def check(replica: Replica, committed: list[Position]) -> None:
    """Invariants 6 and 7: nothing is applied but what is, or will be, committed."""
    applied = [Position(header.lsn, header.epoch) for header in replica.machine.log.tail()]
    assert applied == committed[1 : len(applied) + 1]


def unruly(seed: int) -> None:
    """One world: some of the messages, some twice, mostly in order of epochs, in no other order."""
    rng = random.Random(seed)
    messages, committed = reigns(rng)
    came = [message for message in messages if rng.random() < 0.8] + rng.sample(messages, len(messages) // 3)
    came.sort(key=lambda message: (message.epoch + 2 * (rng.random() < 0.1), rng.random()))
    replica = Replica(empty(), Ref("a", 1))
    for message in came:
        deliver(replica, message)
        check(replica, committed)
    for message in [m for m in messages if m.epoch == messages[-1].epoch and m.record is not None]:
        deliver(replica, message)
    check(replica, committed)
    assert replica.machine.log.lsn == len(committed) - 1, "a last primary that repeats everything is understood"
