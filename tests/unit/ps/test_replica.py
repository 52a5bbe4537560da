"""A follower's tail, a snapshot that comes late, and promotions that overtake each other."""

from __future__ import annotations

import pytest
from paramesh.errors import ParameshError
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb
from paramesh_server.insync import Ref
from paramesh_server.log import START, Position, Record, record_of
from paramesh_server.replica import Replica, Role
from ps_building import fresh, table

ME, OTHER = Ref("a", 1), Ref("b", 1)
SPEC = table([100], "SGD", {"lr": 0.5})


def fence(lsn: int, epoch: int) -> Record:
    """The smallest record there is: it forbids the client that its number names."""
    return record_of(rp.LogRecord(epoch=epoch, lsn=lsn, kind=rp.RECORD_KIND_FENCE, client_id=lsn), ())


def follower(*records: tuple[int, int]) -> Replica:
    """One that holds records (lsn, epoch), none of them committed."""
    replica, at = Replica(fresh(SPEC), ME), START
    for lsn, epoch in records:
        replica.offer(epoch, at, fence(lsn, epoch))
        at = Position(lsn, epoch)
    return replica


def reason(call: object, *arguments: object) -> str:
    with pytest.raises(ParameshError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.reason


def test_only_what_is_committed_is_applied() -> None:
    replica = follower((1, 1), (2, 1))
    assert not replica.due
    replica.learn(1, Position(2, 1), 1)
    replica.apply()
    assert (replica.machine.log.lsn, replica.last) == (1, Position(2, 1))


def test_a_new_primary_replaces_an_old_ones_tail_record_by_record() -> None:
    replica = follower((1, 1), (2, 1), (3, 1))
    replica.greet(2)
    assert replica.last == Position(3, 1)  # hearing of an epoch takes nothing away
    replica.offer(2, Position(1, 1), fence(2, 2))
    assert replica.last == Position(2, 2)
    assert reason(replica.offer, 1, Position(2, 1), fence(3, 1)) == "STALE_EPOCH"


def test_a_commit_counts_only_for_records_that_are_the_primarys() -> None:
    replica = follower((1, 1), (2, 1))
    replica.learn(2, START, 2)  # the new primary has committed 2, but of another record 2
    assert not replica.due
    replica.offer(2, START, fence(1, 2))
    replica.learn(2, Position(1, 2), 2)
    replica.apply()
    assert replica.machine.log.last == Position(1, 2)


def test_a_gap_is_told() -> None:
    replica = follower((1, 1))
    assert reason(replica.offer, 1, Position(2, 1), fence(3, 1)) == "LOG_GAP"
    assert reason(replica.offer, 1, Position(1, 7), fence(2, 1)) == "LOG_GAP"


def test_a_snapshot_that_comes_late_sets_nothing_back() -> None:
    """Its sender gave up on it and went on with the tail, which was acknowledged."""
    replica, late = follower((1, 1), (2, 1), (3, 1)), fresh(SPEC)
    late.log.reset(Position(2, 1))
    assert reason(replica.install, late) == "LOG_GAP"
    assert replica.last == Position(3, 1)
    newer = fresh(SPEC)
    newer.log.reset(Position(3, 1))
    replica.install(newer)
    assert replica.machine is newer


def test_a_snapshot_replaces_what_an_older_primary_left() -> None:
    replica, snapshot = follower((1, 1), (2, 1), (3, 1)), fresh(SPEC)
    replica.greet(2)
    snapshot.log.reset(Position(1, 2))
    replica.install(snapshot)
    assert replica.last == Position(1, 2)


def test_a_record_that_is_being_applied_is_not_replaced() -> None:
    replica = follower((1, 1))
    replica.learn(1, Position(1, 1), 1)
    machine = replica.machine
    replay, found = machine.replay, []

    def overtaken(record: Record) -> None:
        found.append(reason(replica.offer, 2, START, fence(1, 2)))
        replay(record)

    machine.replay = overtaken  # type: ignore[method-assign]
    replica.apply()
    assert found == ["DIVERGED"]
    assert replica.last == Position(1, 1)


def test_a_promotion_that_is_overtaken_ends() -> None:
    replica = follower((1, 1), (2, 1))
    replica.promise(2)
    replica.greet(3)
    assert reason(replica.take_over, 2) == "STALE_EPOCH"
    assert replica.role is Role.FOLLOWER
    assert replica.machine.log.lsn == 0


def test_a_promoted_replica_serves_when_its_epoch_is_everywhere() -> None:
    replica = follower((1, 1), (2, 1))
    replica.promise(2)
    replica.take_over(2)
    replica.lead(pb.Partition(version=1, epoch=2, isr=[ME.proto(), OTHER.proto()]), 0.0)
    assert replica.machine.log.last == Position(3, 2)
    assert not replica.serving
    replica.insync.acked(OTHER, 3, 0.0)
    assert replica.serving
