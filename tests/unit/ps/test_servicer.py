"""The data plane without a wire: framed requests in, outcomes and encoded frames out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from paramesh.channel import header
from paramesh.errors import ParameshError, refuse
from paramesh.framing import Framed, checksum, decode, verify
from paramesh.headroom import Headroom
from paramesh.routing import Routes
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb
from paramesh_server import servicer as servicer_module
from paramesh_server.counters import Counters
from paramesh_server.insync import Ref
from paramesh_server.partition import Partition
from paramesh_server.reads import Reads
from paramesh_server.room import Room
from paramesh_server.servicer import DataPlane, PlaneLimits
from paramesh_server.shards import LAG_ANYWAY, LAG_RECORDS, Shards
from ps_building import GROUP, fresh, random_gradients, raw, ready, record, table

T = TypeVar("T")
SPEC = table([100, 64], "SGD", {"lr": 0.5})
CLIENT = 5


ME = Ref("here", 1)


def lead_alone(shards: Shards, partition: Partition) -> None:
    """Hold a partition as its only replica."""
    held = shards.add(partition, ME)
    held.replica.lead(pb.Partition(id=partition.id, epoch=partition.epoch, version=1, isr=[ME.proto()]), 0.0)


class Context:
    """What the servicer asks of gRPC's context."""

    def __init__(self, remaining: float | None = 5.0) -> None:
        self._remaining = remaining

    def time_remaining(self) -> float | None:
        return self._remaining


def limits(in_flight: int = 1 << 30, queue: int = 1024, lag: int = 1 << 28) -> PlaneLimits:
    return PlaneLimits(in_flight, queue, lag)


class Plane:
    """A data plane over some partitions; the map says what else there is."""

    def __init__(
        self,
        *partitions: Partition,
        rows: Iterable[pb.Partition] = (),
        in_flight: int = 1 << 30,
        reachable: bool = True,
    ) -> None:
        self.counters = Counters()
        self.pool = ThreadPoolExecutor(2)
        self.looked = 0
        self.rows = list(rows)
        self.reachable = reachable
        self.shards = Shards(self.pool, lambda p: p == 50, self._look)
        self._take_map()
        for partition in partitions:
            lead_alone(self.shards, partition)
        self.plane = DataPlane("job", lambda: 3, self.shards, self.counters, limits(in_flight), Room(Headroom(0.0)))
        self.reads = Reads(self.plane, self.counters)

    def _take_map(self) -> None:
        nodes = [pb.Node(ref=pb.ReplicaRef(node="other", incarnation=1), address="h:1", state=pb.NODE_STATE_LIVE)]
        self.shards.routes = Routes(pb.PartitionMap(version=1, nodes=nodes, partitions=self.rows))

    async def _look(self) -> None:
        self.looked += 1
        if not self.reachable:
            raise refuse("UNREACHABLE", "no coordinator answered")
        self._take_map()

    async def push(self, *frames: Framed[ps.PushHeader]) -> list[ps.PartitionOutcome]:
        return list((await self.plane.Push(stream(frames), Context())).outcomes)  # type: ignore[arg-type]

    async def pull(self, partitions: Sequence[int] = (1,), remaining: float = 5.0, **fields: Any) -> list[Framed[Any]]:
        request = ps.PullRequest(
            request=header("job", 3, CLIENT),
            partitions=[ps.PartitionPull(partition=p, epoch=1, **fields.pop("asked", {})) for p in partitions],
            **fields,
        )
        context: Any = Context(remaining)
        return [decode(message, ps.PullHeader) async for message in self.reads.Pull(request, context)]


async def stream(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item


def on_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


def frames_of(
    partition: Partition, seed: int = 1, *, size: int = 0, client: int = CLIENT, **key: Any
) -> list[Framed[ps.PushHeader]]:
    """The frames of one contribution, staged unless `sequenced` is given."""
    layout = partition.layout
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for segment, gradient in zip(layout.segments, random_gradients(layout, seed), strict=True):
        flat[segment.offset : segment.offset + segment.nbytes] = gradient.view(torch.uint8)
    data = raw(flat)
    size = size or len(data)
    frames = []
    key = key or {"staged": ps.StagedKey(group=GROUP, step=partition.applied_step, attempt=1)}
    for at in range(0, len(data), size):
        piece = data[at : at + size]
        head = ps.PushHeader(request=header("job", 3, client), partition=partition.id, epoch=1, **key)
        head.frame.CopyFrom(frame_header(piece, at, at + size >= len(data)))
        frames.append(Framed(head, memoryview(piece)))
    return frames


def frame_header(piece: bytes, offset: int, last: bool) -> pb.Frame:
    return pb.Frame(
        offset=offset,
        length=len(piece),
        codec=pb.CODEC_NONE,
        checksum_kind=pb.CHECKSUM_KIND_CRC32,
        checksum=checksum((piece,), pb.CHECKSUM_KIND_CRC32),
        last=last,
    )


def sequenced(seq: int, **options: Any) -> dict[str, Any]:
    return {"sequenced": ps.SequenceKey(seq=seq, **options)}


def test_a_step_from_push_to_pull() -> None:
    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition)
        [outcome] = await plane.push(*frames_of(partition, size=128))
        assert (outcome.error.reason, outcome.duplicate, outcome.applied_step) == ("", False, 0)
        [again] = await plane.push(*frames_of(partition, size=128))
        assert again.duplicate
        replies = await plane.pull(at_step=True, step=1, group=GROUP, committed=[record(0, [(CLIENT, 1.0)])])
        assert b"".join(bytes(payload) for _, payload in replies) == raw(partition.flat)
        for head, payload in replies:
            verify(head.frame, payload)
            assert (head.applied_step, head.lsn) == (1, partition.log.lsn)
        assert replies[-1].header.frame.last
        assert plane.counters.in_flight == 0

    on_loop(test)


def test_partitions_of_one_stream_answer_each_for_itself() -> None:
    """Frames of several partitions may interleave; one refusal does not stop the others."""

    async def test() -> None:
        good, empty = ready(SPEC), fresh(SPEC)
        empty.id = 2
        plane = Plane(good, empty)
        ones, twos = frames_of(good, size=256), frames_of(empty, size=256)
        mixed = [frame for pair in zip(ones, twos, strict=True) for frame in pair]
        outcomes = {o.partition: o for o in await plane.push(*mixed)}
        assert outcomes[1].error.reason == ""
        assert outcomes[2].error.reason == "INITIALISING"
        assert plane.counters.refused["INITIALISING"] == 1
        assert good.staging.nbytes > 0

    on_loop(test)


async def refused(plane: Plane, *frames: Framed[ps.PushHeader]) -> str:
    """The reason of the one partition's refusal; nothing may have changed (invariant 27)."""
    partition = plane.shards.held[1].partition
    before = (partition.state_hash(), partition.staging.nbytes)
    [outcome] = await plane.push(*frames)
    assert (partition.state_hash(), partition.staging.nbytes) == before
    assert plane.counters.in_flight == 0
    return outcome.error.reason


def changed(frames: list[Framed[ps.PushHeader]], at: int = 0, payload: bytes | None = None, **fields: Any) -> list[Any]:
    frame = frames[at].header.frame
    for name, value in fields.items():
        setattr(frame, name, value)
    if payload is not None:
        frames[at] = Framed(frames[at].header, memoryview(payload))
    return frames


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda f: changed(f, payload=bytes(400)), "CRC"),
        (lambda f: changed(f, codec=99), "CODEC"),
        (lambda f: changed(f, codec=0), "CODEC"),
        (lambda f: changed(f, checksum_kind=9), "CODEC"),
        (lambda f: changed(f, length=64), "PAYLOAD_SIZE"),
        (lambda f: changed(f, offset=1 << 60), "PAYLOAD_SIZE"),
        (lambda f: changed(f, offset=4), "PAYLOAD_SIZE"),
        (lambda f: changed(f, last=False), "MISSING_FIELD"),
    ],
)
def test_damaged_frames_change_nothing(damage: Callable[[Any], Any], wanted: str) -> None:
    """Bad-input rows 6, 7, 23, 26: invariant 27."""

    async def test() -> None:
        partition = ready(SPEC)
        assert await refused(Plane(partition), *damage(frames_of(partition))) == wanted

    on_loop(test)


def test_a_push_must_say_what_it_is() -> None:
    async def test() -> None:
        partition = ready(SPEC)
        frames = frames_of(partition)
        frames[0].header.ClearField("staged")
        assert await refused(Plane(partition), *frames) == "MISSING_FIELD"
        assert await refused(Plane(partition), *frames_of(partition, staged=ps.StagedKey(group=1))) == "MISSING_FIELD"
        stale = frames_of(partition)
        stale[0].header.epoch = 9
        assert await refused(Plane(partition), *stale) == "UNKNOWN_EPOCH"

    on_loop(test)


@pytest.mark.parametrize(
    ("request_header", "wanted"),
    [
        (header("job", 3, 0), "MISSING_FIELD"),
        (header("job", 2, CLIENT), "OLD_GENERATION"),  # invariant 25
        (header("elsewhere", 3, CLIENT), "WRONG_CLUSTER"),
        (pb.RequestHeader(job="job", generation=3, client_id=CLIENT), "VERSION"),
        (pb.RequestHeader(job="elsewhere", generation=1), "VERSION"),  # the first check wins
    ],
)
def test_headers_are_checked_in_order(request_header: pb.RequestHeader, wanted: str) -> None:
    """Invariant 25: an old generation changes nothing and is not acknowledged."""

    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition)
        frames = frames_of(partition)
        frames[0].header.request.CopyFrom(request_header)
        with pytest.raises(ParameshError) as caught:
            await plane.push(*frames)
        assert caught.value.reason == wanted
        assert partition.staging.nbytes == 0
        assert plane.counters.in_flight == 0

    on_loop(test)


def test_a_flood_is_told_to_wait() -> None:
    """Invariant 26: unfinished streams hold a bounded number of bytes."""

    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition, in_flight=600)
        with pytest.raises(ParameshError) as caught:
            await plane.push(*frames_of(partition, size=128))
        assert caught.value.reason == "OVERLOADED"
        assert int(caught.value.metadata["retry_after_ms"]) > 0
        assert plane.counters.in_flight == 0

    on_loop(test)


def test_a_partition_with_too_much_to_do_says_so() -> None:
    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition)
        plane.plane._limits = limits(queue=0)
        with pytest.raises(ParameshError) as refused:
            await plane.plane.find(partition.id, partition.epoch)
        assert (refused.value.reason, "--max-queue" in str(refused.value)) == ("OVERLOADED", True)

    on_loop(test)


def test_a_primary_whose_followers_lack_too_much_takes_no_more(monkeypatch) -> None:
    """A few records may be as large as they are; many, or more bytes than the limit, are held for nobody."""

    async def test() -> None:
        held = next(iter(Plane(ready(SPEC)).shards.held.values()))
        held.replica.insync.commit = held.partition.log.lsn - LAG_ANYWAY
        held.check_lag(0)
        held.replica.insync.commit -= 1
        held.check_lag(1 << 20)
        monkeypatch.setattr(held.partition.log, "bytes_after", lambda _: 100)
        with pytest.raises(ParameshError) as refused:
            held.check_lag(99)
        assert (refused.value.reason, "--max-lag-bytes" in str(refused.value)) == ("OVERLOADED", True)
        held.replica.insync.commit = held.partition.log.lsn - LAG_RECORDS - 1
        with pytest.raises(ParameshError):
            held.check_lag(1 << 30)

    on_loop(test)


def test_more_than_a_partition_can_take_is_not_kept() -> None:
    """Invariant 26: what cannot fit is let go while the stream still runs."""

    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition)
        first = frames_of(partition)[0]
        first.header.frame.last = False
        most = 0

        async def endless() -> AsyncIterator[Framed[ps.PushHeader]]:
            nonlocal most
            for _ in range(50):
                yield first
                most = max(most, plane.counters.in_flight)
            last = frames_of(partition)[0]
            yield last

        answer = await plane.plane.Push(endless(), Context())  # type: ignore[arg-type]
        assert answer.outcomes[0].error.reason == "PAYLOAD_SIZE"
        assert most <= partition.layout.nbytes
        assert plane.counters.in_flight == 0

    on_loop(test)


def test_frames_after_the_last_one_are_refused() -> None:
    async def test() -> None:
        partition = ready(SPEC)
        with pytest.raises(ParameshError) as caught:
            await Plane(partition).push(*frames_of(partition), *frames_of(partition))
        assert caught.value.reason == "PAYLOAD_SIZE"

    on_loop(test)


def test_partitions_that_are_not_here() -> None:
    async def test() -> None:
        mine = pb.Partition(id=50, primary=pb.ReplicaRef(node="me", incarnation=1), epoch=1)
        theirs = pb.Partition(id=8, primary=pb.ReplicaRef(node="other", incarnation=1), epoch=4)
        plane = Plane(ready(SPEC), rows=[mine, theirs])
        [reply] = await plane.pull([8])
        assert reply.header.error.reason == "NOT_PRIMARY"
        assert reply.header.error.metadata["primary"] == "h:1"
        assert plane.looked == 0
        [reply] = await plane.pull([99])
        assert (reply.header.error.reason, plane.looked) == ("WRONG_PARTITION", 1)
        unreachable = Plane(ready(SPEC), reachable=False)
        [reply] = await unreachable.pull([99])
        assert reply.header.error.reason == "NOT_READY"

    on_loop(test)


def test_a_request_that_meets_a_restore_is_asked_again() -> None:
    """Its partition is in no map any more; it was refused WRONG_PARTITION, which no worker comes back from."""

    async def test() -> None:
        plane = Plane(ready(SPEC), rows=[])
        plane.shards.routes = Routes(pb.PartitionMap(version=9, generation=4))
        with pytest.raises(ParameshError) as caught:
            raise plane.shards._elsewhere(8)
        assert caught.value.reason == "NOT_READY"

    on_loop(test)


def test_a_request_waits_for_a_partition_that_is_being_made() -> None:
    async def test() -> None:
        partition = ready(SPEC)
        partition.id = 50
        plane = Plane(rows=[pb.Partition(id=50, epoch=1)])
        pulling = asyncio.ensure_future(plane.pull([50]))
        await asyncio.sleep(0)
        lead_alone(plane.shards, partition)
        [reply] = await pulling
        assert reply.header.error.reason == ""
        failed = Plane(rows=[pb.Partition(id=50, epoch=1)])
        pulling = asyncio.ensure_future(failed.pull([50]))
        await asyncio.sleep(0)
        failed.shards.fail(50, refuse("UNSUPPORTED_OPTIMIZER", "Muon"))
        [reply] = await pulling
        assert reply.header.error.reason == "UNSUPPORTED_OPTIMIZER"

    on_loop(test)


def test_pulls_of_one_state_share_one_encoding() -> None:
    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition)
        await plane.push(*frames_of(partition))
        decision = [record(0, [(CLIENT, 1.0)])]
        pulls = [plane.pull(at_step=True, step=1, group=GROUP, committed=decision) for _ in range(8)]
        replies = await asyncio.gather(*pulls)
        assert len({bytes(reply[0].payload) for reply in replies}) == 1
        assert plane.counters.encodings == 1
        await plane.pull()
        assert plane.counters.encodings == 1
        await plane.push(*frames_of(partition, **sequenced(1)))
        await plane.pull()
        assert plane.counters.encodings == 2

    on_loop(test)


def test_a_pull_ahead_of_its_decision_needs_steps() -> None:
    async def test() -> None:
        plane = Plane(ready(SPEC))
        [reply] = await plane.pull(at_step=True, step=4, group=GROUP)
        assert reply.header.error.reason == "NEED_STEPS"
        assert reply.header.error.metadata["applied_step"] == "0"

    on_loop(test)


def test_a_pull_waits_for_its_floor() -> None:
    """Invariant 13: a client never reads below what it was acknowledged."""

    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition)
        floor = {"floor_lsn": 2, "floor_epoch": 1}
        pulling = asyncio.ensure_future(plane.pull(asked=floor))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not pulling.done()
        [outcome] = await plane.push(*frames_of(partition, **sequenced(1)))
        assert outcome.lsn == 2
        [reply] = await pulling
        assert reply.header.lsn == 2
        [late] = await plane.pull(asked={"floor_lsn": 3, "floor_epoch": 1}, remaining=0.01)
        assert late.header.error.reason == "DEADLINE"
        [far] = await plane.pull(asked={"floor_lsn": 1 << 40, "floor_epoch": 1})
        assert far.header.error.reason == "FLOOR"

    on_loop(test)


def test_a_push_that_overtook_its_predecessor_is_held() -> None:
    """Invariant 2: both are applied, in order, once."""

    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition)
        second = asyncio.ensure_future(plane.push(*frames_of(partition, 2, **sequenced(2))))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not second.done()
        [first] = await plane.push(*frames_of(partition, 1, **sequenced(1)))
        assert [first.lsn, (await second)[0].lsn] == [2, 3]
        assert partition.pushes == 2

    on_loop(test)


def test_a_gap_that_stays_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(servicer_module, "GAP_S", 0.01)
        partition = ready(SPEC)
        assert await refused(Plane(partition), *frames_of(partition, 2, **sequenced(2))) == "SEQ_GAP"

    on_loop(test)


def test_a_push_whose_turn_comes_when_too_few_are_in_sync_is_refused() -> None:
    """Invariant 10: they were enough when it came, and are not when it would be appended."""

    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition)
        held, other = plane.shards.held[partition.id], Ref("there", 1)
        held.min_isr = 2
        held.replica.insync.follow(pb.Partition(version=2, isr=[ME.proto(), other.proto()]), 0.0)
        await held._lock.acquire()
        waiting = asyncio.ensure_future(refused(plane, *frames_of(partition, 1, **sequenced(1))))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        held.replica.insync.follow(pb.Partition(version=3, isr=[ME.proto()]), 0.0)
        held._lock.release()
        assert await waiting == "NOT_ENOUGH_REPLICAS"
        assert partition.pushes == 0

    on_loop(test)


def test_damaged_bytes_do_not_consume_the_sequence_number() -> None:
    """CRC is repeated with the same seq; a payload that cannot fit consumes it."""

    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition)
        torn = changed(frames_of(partition, 1, **sequenced(1)), payload=bytes(partition.layout.nbytes))
        assert await refused(plane, *torn) == "CRC"
        short = frames_of(partition, 1, size=256, **sequenced(1))[-1:]
        short[0].header.ClearField("presence")
        [outcome] = await plane.push(*short)
        assert outcome.error.reason == "PAYLOAD_SIZE"
        [outcome] = await plane.push(*frames_of(partition, 1, **sequenced(2)))
        assert outcome.error.reason == ""

    on_loop(test)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"grad_scale": float("nan")}, "WEIGHT"),
        ({"hyper_parameters": [pb.TableHyperParameters(table_id=1, hyper_parameters=[pb.HyperParameter(name="lr")])]},
         "HYPER_PARAMETER"),
    ],
)  # fmt: skip
def test_options_that_are_wrong_consume_the_sequence_number(options: dict[str, Any], wanted: str) -> None:
    """Their successors must pass: a refused seq becomes a NOOP."""

    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition)
        for _ in range(2):  # the duplicate hears the same
            [outcome] = await plane.push(*frames_of(partition, 1, **sequenced(1, **options)))
            assert outcome.error.reason == wanted
        assert partition.log.lsn == 2
        [outcome] = await plane.push(*frames_of(partition, 1, **sequenced(2)))
        assert outcome.lsn == 3

    on_loop(test)


def test_work_that_began_ends_although_the_caller_left() -> None:
    """Bad-input row 70: a cancelled push is applied once, and its repetition is a duplicate."""

    async def test() -> None:
        partition = ready(table([200_000]))
        plane = Plane(partition)
        pushing = asyncio.ensure_future(plane.push(*frames_of(partition, 1, **sequenced(1))))
        while not plane.shards.held[1].queue:  # noqa: ASYNC110 - nothing tells that work began
            await asyncio.sleep(0)
        pushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pushing
        [outcome] = await plane.push(*frames_of(partition, 1, **sequenced(1)))
        assert (outcome.duplicate, partition.pushes) == (True, 1)

    on_loop(test)


def test_a_partition_is_not_touched_while_work_of_a_caller_that_left_still_runs() -> None:
    """The lock belongs to the work, not to the caller: two sums at a time would tear the values."""

    async def test() -> None:
        held = Plane(ready(SPEC)).shards.held[1]
        begun, release, order = threading.Event(), threading.Event(), list[str]()

        def slow() -> None:
            begun.set()
            release.wait(10)
            order.append("first")

        leaving = asyncio.ensure_future(held.run(slow, inline=False))
        while not begun.is_set():  # noqa: ASYNC110 - set in a thread
            await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        second = asyncio.ensure_future(held.run(lambda: order.append("second"), inline=True))
        for _ in range(5):
            await asyncio.sleep(0)
        assert order == []
        release.set()
        await second
        assert order == ["first", "second"]

    on_loop(test)


def assign_frames(partition: Partition, seed: int, **fields: Any) -> list[Framed[ps.AssignHeader]]:
    frames = []
    for framed in frames_of(partition, seed):
        head = ps.AssignHeader(request=framed.header.request, partition=partition.id, epoch=1, **fields)
        head.frame.CopyFrom(framed.header.frame)
        frames.append(Framed(head, framed.payload))
    return frames


def test_first_values_then_a_snapshot() -> None:
    async def test() -> None:
        partition = fresh(SPEC)
        plane = Plane(partition)
        context: Any = Context()
        frames = assign_frames(partition, 3, assign_id=1, init_attempt=1)
        [outcome] = (await plane.plane.Assign(stream(frames), context)).outcomes
        assert outcome.error.reason == ""
        [again] = (await plane.plane.Assign(stream(frames), context)).outcomes
        assert (again.duplicate, again.lsn) == (True, outcome.lsn)
        request = ps.SnapshotRequest(
            request=header("job", 3), partitions=[ps.PartitionPull(partition=p, epoch=1) for p in (1, 9)]
        )
        cut = [decode(m, ps.SnapshotHeader) async for m in plane.reads.Snapshot(request, context)]
        assert [bytes(payload) for head, payload in cut if head.partition == 1 and payload] == [raw(partition.flat)]
        assert [head.partition for head, _ in cut if head.partition_done] == [1, 9]
        assert cut[-1].header.error.reason == "WRONG_PARTITION"

    on_loop(test)


def test_norms_and_inspect() -> None:
    async def test() -> None:
        partition = ready(SPEC)
        plane = Plane(partition)
        context: Any = Context()
        await plane.push(*frames_of(partition, 4))
        request = ps.NormsRequest(
            request=header("job", 3),
            partitions=[ps.PartitionPull(partition=p, epoch=1) for p in (1, 9)],
            committed=[record(0, [(CLIENT, 2.0)], needs_clip=True)],
        )
        norms = (await plane.plane.Norms(request, context)).norms
        wanted = sum(float((g.double() ** 2).sum()) for g in random_gradients(partition.layout, 4))
        assert norms[0].squared_norm == pytest.approx(wanted)
        assert norms[1].error.reason == "WRONG_PARTITION"
        inspect = ps.InspectRequest(request=header("job", 3), state_hash=True)
        [info] = (await plane.plane.Inspect(inspect, context)).partitions
        assert info.state_hash == partition.state_hash()
        assert info.staged_bytes == partition.staging.nbytes > 0
        assert await plane.plane.fence([CLIENT, 6]) == 1
        [outcome] = await plane.push(*frames_of(partition, 4))
        assert outcome.error.reason == "CLIENT_FENCED"

    on_loop(test)


def test_what_found_a_partition_before_it_was_dropped_leaves_nothing_behind() -> None:
    """Invariant 26: bytes staged in a partition that is gone would count against the budget for ever."""

    async def test() -> None:
        partition = ready(table([200_000]))  # too big for the event loop: its checks run in the pool
        rows = [pb.Partition(id=1, primary=pb.ReplicaRef(node="other", incarnation=1), epoch=2)]
        plane = Plane(partition, rows=rows)
        held, release = plane.shards.held[1], threading.Event()
        for _ in range(2):
            plane.pool.submit(release.wait, 10)
        pushes = [
            asyncio.ensure_future(plane.push(*frames))
            for frames in (frames_of(partition), frames_of(partition, **sequenced(1)))
        ]
        while plane.pool._work_queue.qsize() < 2:  # noqa: ASYNC110 - both have found it and are being checked
            await asyncio.sleep(0)
        await plane.shards.drop(1)
        release.set()
        assert [(await push)[0].error.reason for push in pushes] == ["NOT_PRIMARY"] * 2
        assert partition.staging.nbytes == plane.counters.in_flight == partition.pushes == 0
        await held.close()

    on_loop(test)


def test_fences_and_inspections_pass_over_a_partition_that_goes_away() -> None:
    async def test() -> None:
        going, staying = ready(SPEC), ready(SPEC)
        staying.id = 2
        plane = Plane(going, staying)
        held = plane.shards.held[1]
        begun, release = threading.Event(), threading.Event()
        blocked = asyncio.ensure_future(held.run(lambda: (begun.set(), release.wait(10)), inline=False))
        while not begun.is_set():  # noqa: ASYNC110 - set in a thread
            await asyncio.sleep(0)
        closing = asyncio.ensure_future(held.close())
        await asyncio.sleep(0)
        fencing = asyncio.ensure_future(plane.plane.fence([CLIENT]))
        context: Any = Context()
        inspecting = asyncio.ensure_future(plane.plane.Inspect(ps.InspectRequest(request=header("job", 3)), context))
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(blocked, closing)
        assert await fencing == 1
        assert staying.dedup.fenced(CLIENT)
        assert [info.partition for info in (await inspecting).partitions] == [2]

    on_loop(test)
