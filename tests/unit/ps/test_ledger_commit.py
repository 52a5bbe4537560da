"""Output commit: no answer of the ledger leaves before the records that it tells of are everywhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from paramesh.channel import header
from paramesh.errors import ParameshError, refuse
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger import Ledger, Record
from paramesh_server.ledger_codec import decode_record, encode_record
from paramesh_server.ledger_service import POLL_S, LedgerService

from tests.unit.ps.ledger_world import spec
from tests.unit.ps.test_ledger_members import refused
from tests.unit.ps.test_ledger_service import Context, on_loop, ready, sleeping, until, workers

CONFIG = t.JobConfig(start_workers=1, gather_ms=2000)


class Log:
    """A replicated log whose replicas acknowledge when the test says so."""

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.everywhere = 0
        """Records that every in-sync replica has."""
        self.open = True
        """Replicas acknowledge at once."""
        self.gone = False
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def append(self, record: Record) -> None:
        if self.gone:
            raise refuse("NOT_PRIMARY", "another server is primary")
        self.records.append(encode_record(record))
        if self.open:
            self.commit()

    async def committed(self, lsn: int) -> None:
        if lsn <= self.everywhere:
            return
        if self.gone:
            raise refuse("NOT_PRIMARY", "another server is primary")
        future = asyncio.get_running_loop().create_future()
        entry = (lsn, future)
        self._waiting.append(entry)
        try:
            await future
        finally:
            self._waiting.remove(entry)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def hold(self) -> None:
        self.open = False

    def commit(self, lsn: int | None = None) -> None:
        """Every replica has everything, or what is before a record."""
        self.everywhere = len(self.records) if lsn is None else lsn
        for wanted, future in self._waiting:
            if wanted <= self.everywhere and not future.done():
                future.set_result(None)

    def demote(self) -> None:
        self.gone = True
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(refuse("NOT_PRIMARY", "another server is primary"))

    def follower(self) -> Ledger:
        """A replica that has what is everywhere."""
        ledger = Ledger(CONFIG)
        ledger.replay(decode_record(data) for data in self.records[: self.everywhere])
        return ledger


def serve(log: Log, ledger: Ledger | None = None) -> LedgerService:
    ledger = ledger or Ledger(CONFIG)
    loop = asyncio.get_running_loop()
    ledger.serve(log.append, CONFIG, loop.time())
    return LedgerService("job", 1, CONFIG, ledger=ledger, committed=log.committed, now=loop.time)


def call(served: LedgerService, method: str, client: int = 1, **fields: Any) -> asyncio.Future[Any]:
    request = getattr(lg, f"{method}Request")(request=header("job", 1, client), **fields)
    return asyncio.ensure_future(getattr(served, method)(request, Context()))


async def turns() -> None:
    """Let everything run that can run."""
    for _ in range(10):
        await asyncio.sleep(0)


FIELDS: dict[str, dict[str, Any]] = {
    "SetActivity": {"activity": lg.ACTIVITY_IDLE},
    "OpenGroup": {"spec": spec()},
    "AwaitInit": {"group": 1},
    "CommitInit": {"group": 1, "init_attempt": 1},
    "Ready": {"group": 1, "step": 0, "weight": 1},
    "Clip": {"group": 1, "step": 0},
    "Clock": {"group": 2, "finished": 1},
    "GetSteps": {"group": 1},
    "ReportMissing": {"group": 1, "step": 0},
    "Lease": {"dataset": "d", "length": 8, "chunk": 2},
    "PutState": {"key": "k", "version": 1, "value": b"v"},
    "GetState": {"key": "k"},
    "Gather": {"name": "n"},
}
"""What each call says; the rest needs nothing."""

METHODS = [method.name for method in lg.DESCRIPTOR.services_by_name["Ledger"].methods]


@pytest.mark.parametrize("name", METHODS)
def test_no_answer_leaves_before_its_records_are_everywhere(name: str) -> None:
    """Invariant 1: also reads wait, and refusals: they tell of the state."""

    @on_loop
    async def scenario() -> None:
        log = Log()
        served = serve(log)
        await workers(served, 1)
        await call(served, "OpenGroup", spec=spec("clocks", mode=lg.MODE_SSP))
        log.hold()
        other = asyncio.ensure_future(served.evict(99, 1, "dead"))  # a record that is not everywhere
        answer = call(served, name, **FIELDS.get(name, {}))
        await until(lambda: log.waiting == 2)
        await turns()
        assert not answer.done()
        assert not other.done()
        log.commit()
        await asyncio.wait((answer,))
        assert not await other, "it was no member"
        error = answer.exception()
        assert error is None or isinstance(error, ParameshError)
        await served.close()

    scenario()


def test_refusals_that_tell_of_the_state_wait_too() -> None:
    @on_loop
    async def scenario() -> None:
        log = Log()
        served = serve(log)
        await workers(served, 1)
        log.hold()
        order = asyncio.ensure_future(served.evict(1, 1, "dead"))
        refusals = {
            "EVICTED": call(served, "SetActivity", activity=lg.ACTIVITY_ACTIVE),
            "NOT_MEMBER": call(served, "SetActivity", 7, activity=lg.ACTIVITY_ACTIVE),
            "UNKNOWN_GROUP": call(served, "GetSteps", group=9),
            "STEP_OUT_OF_RANGE": call(served, "Clip", group=1, step=3),
        }
        await until(lambda: log.waiting == 1 + len(refusals))
        assert not order.done()
        log.commit()
        assert await order
        for reason, refusal in refusals.items():
            with refused(reason):
                await refusal

    scenario()


@on_loop
async def test_what_is_wrong_with_a_request_alone_is_refused_at_once() -> None:
    log = Log()
    served = serve(log)
    log.hold()
    order = asyncio.ensure_future(served.evict(1, 5, "dead"))
    await until(lambda: log.waiting == 1)
    with refused("WRONG_CLUSTER"):
        await served.Join(lg.JoinRequest(request=header("another", 1, 2)), Context())
    with refused("STALE_TERM"):
        await served.evict(2, 4, "a paused leader")
    log.commit()
    await order


@on_loop
async def test_whoever_a_record_woke_waits_for_it_too() -> None:
    log = Log()
    served = serve(log)
    await workers(served, 3)
    early = [ready(served, client) for client in (1, 2)]
    await until(lambda: sleeping(served) == 2)
    log.hold()
    last = ready(served, 3)
    await until(lambda: log.waiting == 3)
    assert sleeping(served) == 0
    await turns()
    assert not any(answer.done() for answer in (*early, last))
    log.commit()
    records = [(await answer).record for answer in (*early, last)]
    assert len(records[0].contributors) == 3
    assert records[0] == records[1] == records[2]


@on_loop
async def test_an_answer_waits_for_no_later_record() -> None:
    log = Log()
    served = serve(log)
    await workers(served, 1)
    log.hold()
    first = call(served, "PutState", key="a", version=1, value=b"1")
    await until(lambda: log.waiting == 1)
    at = len(log.records)
    second = call(served, "PutState", key="b", version=1, value=b"2")
    await until(lambda: log.waiting == 2)
    log.commit(at)
    assert (await first).version == 1
    await turns()
    assert not second.done()
    log.commit()
    await second


@on_loop
async def test_a_call_cancelled_while_its_records_travel_leaves_nothing_behind() -> None:
    log = Log()
    served = serve(log)
    await workers(served, 1)
    log.hold()
    answer = call(served, "Gather", name="n", values=[2.0], weight=1)
    await until(lambda: log.waiting == 1)
    answer.cancel()
    await until(lambda: answer.done() and log.waiting == 0)
    assert sleeping(served) == 0
    log.commit()
    assert list((await call(served, "Gather", name="n", values=[2.0], weight=1)).values) == [2.0], "the repeat"


@on_loop
async def test_a_demoted_ledger_refuses_everybody_and_decides_nothing() -> None:
    log = Log()
    served = serve(log)
    await workers(served, 3)
    log.hold()
    sleepers = [ready(served, 1), call(served, "Gather", 2, name="n")]
    await until(lambda: sleeping(served) == 2)
    gated = call(served, "PutState", key="k", version=1, value=b"v")
    await until(lambda: log.waiting == 1)
    at = served.ledger.lsn
    log.demote()
    await served.close()
    for answer in (*sleepers, gated, ready(served, 2), call(served, "LedgerStatus")):
        with refused("NOT_PRIMARY"):
            await answer
    with refused("NOT_PRIMARY"):
        await served.evict(3, 1, "dead")
    with refused("NOT_PRIMARY"):
        await served.fence([3])
    assert served.ledger.lsn == at
    assert served._timer is None
    assert log.waiting == sleeping(served) == 0


@on_loop
async def test_a_timer_that_finds_the_log_closed_ends_the_ledger() -> None:
    """The tick's record is refused: nobody may wait for ever, and the timer must not spin."""
    log = Log()
    ledger = Ledger(CONFIG)
    config = t.JobConfig(start_workers=1, gather_ms=20)
    ledger.serve(log.append, config, asyncio.get_running_loop().time())
    served = LedgerService(
        "job", 1, config, ledger=ledger, committed=log.committed, now=asyncio.get_running_loop().time
    )
    await workers(served, 2)
    await call(served, "SetActivity", 2, activity=lg.ACTIVITY_BETWEEN)
    waiting = ready(served, 1)
    await until(lambda: sleeping(served) == 1)
    log.demote()
    with refused("NOT_PRIMARY"):
        await asyncio.wait_for(waiting, POLL_S / 2)
    assert served._timer is None


@on_loop
async def test_a_ledger_that_its_successor_reaches_before_any_map_refuses_everybody() -> None:
    """Its coordinator is out of reach: the next primary's records come first, and it follows them at once."""
    log = Log()
    served = serve(log)
    await workers(served, 2)
    waiting = ready(served, 1)
    await until(lambda: sleeping(served) == 1)
    fresh, known = Log(), log.everywhere
    fresh.records, fresh.everywhere = log.records[:known], known
    promoted = serve(fresh, log.follower())
    await call(promoted, "PutState", key="k", version=1, value=b"v")
    served.ledger.replay([decode_record(data) for data in fresh.records[known:]])
    at = served.ledger.lsn
    put, get = call(served, "PutState", key="k", version=2, value=b"w"), call(served, "GetState", key="k")
    for answer in (ready(served, 2), put, get):
        with refused("NOT_PRIMARY"):
            await answer
    with refused("NOT_PRIMARY"):
        await served.evict(2, 1, "dead")
    served._tick()
    assert served._timer is None
    with refused("NOT_PRIMARY"):
        await asyncio.wait_for(waiting, POLL_S / 2)
    assert served.ledger.lsn == at
    await promoted.close()


@on_loop
async def test_a_promoted_ledger_goes_on_where_the_old_one_was() -> None:
    log = Log()
    served = serve(log)
    await workers(served, 2)
    waiting = ready(served, 1)
    await until(lambda: sleeping(served) == 1)
    log.hold()
    decided = ready(served, 2)
    await until(lambda: log.waiting == 2)
    log.demote()  # with a decision that nobody was told
    await served.close()
    for answer in (waiting, decided):
        with refused("NOT_PRIMARY"):
            await answer
    fresh = Log()
    fresh.records, fresh.everywhere = log.records[: log.everywhere], log.everywhere
    promoted = serve(fresh, log.follower())
    await promoted.evict(2, 1, "it was on the same host")
    step = (await ready(promoted, 1)).record
    assert [c.client_id for c in step.contributors] == [1], "the repeat decides anew"
    await promoted.close()


def test_a_promoted_ledger_says_what_it_starts_with(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        log = Log()
        await workers(serve(log), 2)
        serve(log, log.follower())

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    said = [record.getMessage() for record in caplog.records if "promoted" in record.getMessage()]
    assert "members=2 active=2 groups=g@0 open_epochs=0 evictions=0" in said[-1]


@on_loop
async def test_a_follower_cannot_serve() -> None:
    follower = Ledger(CONFIG)
    follower.replay([])
    with pytest.raises(ValueError, match="follows another"):
        LedgerService("job", 1, CONFIG, ledger=follower)
    with pytest.raises(RuntimeError, match="decides nothing"):
        follower.evict(1, "dead", 0.0)


def unsuspended(made: Awaitable[Any]) -> bool:
    """Whether a coroutine ends without giving the loop a turn."""
    try:
        made.__await__().send(None)  # type: ignore[attr-defined]
    except StopIteration:
        return True
    return False


@on_loop
async def test_without_replicas_nothing_waits() -> None:
    served = LedgerService("job", 1, CONFIG)
    joins: Callable[[int], Awaitable[Any]] = lambda c: served.Join(  # noqa: E731
        lg.JoinRequest(request=header("job", 1, c)), Context()
    )
    assert unsuspended(joins(1))
    assert unsuspended(served.LedgerStatus(lg.LedgerStatusRequest(request=header("job", 1, 1)), Context()))
