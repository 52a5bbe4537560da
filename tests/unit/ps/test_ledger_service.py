"""The Ledger service: waits without threads, deadlines, timers, orders of the coordinator."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from paramesh.channel import header
from paramesh.errors import ParameshError
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger_service import MARGIN_S, POLL_S, SAY_AFTER_S, LedgerService

from tests.unit.ps.ledger_world import spec
from tests.unit.ps.test_ledger_members import refused


class Context:
    """What the service asks of a gRPC context."""

    def __init__(self, remaining: float | None = 60.0):
        self._remaining = remaining

    def time_remaining(self) -> float | None:
        return self._remaining


def on_loop(scenario: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on an event loop, with a deadline, and see that it leaves nothing behind."""

    def test() -> None:
        async def bounded() -> None:
            await asyncio.wait_for(scenario(), 30)
            assert len(asyncio.all_tasks()) == 1

        asyncio.run(bounded())

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return test


def service(**config: int) -> LedgerService:
    values = {"start_workers": 1, "gather_ms": 2000} | config
    return LedgerService("job", 1, t.JobConfig(**values))


async def workers(served: LedgerService, count: int) -> None:
    """Join clients 1..count, open group 1, make them ACTIVE."""
    for client in range(1, count + 1):
        await served.Join(lg.JoinRequest(request=header("job", 1, client)), Context())
        await served.OpenGroup(lg.OpenGroupRequest(request=header("job", 1, client), spec=spec()), Context())
        await served.SetActivity(
            lg.SetActivityRequest(request=header("job", 1, client), activity=lg.ACTIVITY_ACTIVE), Context()
        )


def ready(
    served: LedgerService, client: int, step: int = 0, remaining: float | None = 60.0
) -> Awaitable[lg.ReadyResponse]:
    request = lg.ReadyRequest(request=header("job", 1, client), group=1, step=step, attempt=1, weight=1)
    return asyncio.ensure_future(served.Ready(request, Context(remaining)))


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until a condition holds; the test's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 (there is nothing to set an event)
        await asyncio.sleep(0)


def sleeping(served: LedgerService) -> int:
    return len(served._waits)


def test_every_call_of_the_contract_is_served() -> None:
    methods = lg.DESCRIPTOR.services_by_name["Ledger"].methods
    assert all(inspect.iscoroutinefunction(getattr(LedgerService, method.name)) for method in methods)


@on_loop
async def test_waiting_calls_end_with_the_decision_and_cost_no_thread() -> None:
    served = service()
    await workers(served, 100)
    threads = threading.active_count()
    calls = [ready(served, client) for client in range(1, 100)]
    await until(lambda: sleeping(served) == 99)
    last = await ready(served, 100)
    answers = await asyncio.gather(*calls)
    assert all(answer == last for answer in answers)
    assert len(last.record.contributors) == 100
    assert threading.active_count() == threads
    assert sleeping(served) == 0


@on_loop
async def test_a_poll_ends_before_the_callers_deadline_and_names_who_is_waited_for() -> None:
    served = service()
    await workers(served, 3)
    first = ready(served, 1)
    with refused("WAITING_FOR_WORKERS") as caught:
        await ready(served, 2, remaining=MARGIN_S + 0.02)
    assert caught.value.metadata == {"what": "step 0 of group g", "ranks": "2"}
    await ready(served, 3)
    await first
    assert (await ready(served, 2)).included, "the repeat finds the decision"


@on_loop
async def test_a_caller_without_patience_is_answered_at_once() -> None:
    served = service()
    await workers(served, 2)
    with refused("WAITING_FOR_WORKERS"):
        await ready(served, 1, remaining=0.1)
    assert (await ready(served, 2, remaining=0.1)).included


@on_loop
async def test_a_cancelled_call_leaves_nothing_behind() -> None:
    served = service()
    await workers(served, 2)
    call = asyncio.ensure_future(ready(served, 1))
    await until(lambda: sleeping(served) == 1)
    call.cancel()
    await until(lambda: sleeping(served) == 0)
    assert (await ready(served, 2)).included, "its contribution is staged and counts"


@on_loop
async def test_an_evicted_waiter_hears_of_it_and_the_others_go_on() -> None:
    served = service()
    await workers(served, 3)
    victim, survivor = ready(served, 1), ready(served, 2)
    await until(lambda: sleeping(served) == 2)
    assert await served.evict(1, term=1, why="SIGKILL")
    with refused("EVICTED"):
        await victim
    assert await served.evict(3, term=1, why="SIGKILL")
    assert len((await survivor).record.contributors) == 1
    assert not await served.evict(3, term=2, why="again")


@on_loop
async def test_an_older_term_is_refused_and_changes_nothing() -> None:
    served = service()
    await workers(served, 1)
    await served.evict(9, term=5, why="dead")
    with refused("STALE_TERM"):
        await served.evict(1, term=4, why="a paused leader")
    assert (await ready(served, 1)).included


@on_loop
async def test_a_fenced_client_is_refused_without_an_evict() -> None:
    served = service()
    await served.fence([7, 8, 7])
    for client in (7, 8):
        with refused("EVICTED"):
            await served.Join(lg.JoinRequest(request=header("job", 1, client)), Context())


@on_loop
async def test_gathers_run_out_by_themselves() -> None:
    served = service(gather_ms=20)
    await workers(served, 2)
    request = lg.SetActivityRequest(request=header("job", 1, 2), activity=lg.ACTIVITY_BETWEEN)
    await served.SetActivity(request, Context())
    assert len((await ready(served, 1)).record.contributors) == 1
    assert served._timer is None


@on_loop
async def test_the_step_timeout_runs_out_by_itself() -> None:
    served = service(step_timeout_ms=20)
    await workers(served, 2)
    assert len((await ready(served, 1)).record.contributors) == 1


@on_loop
async def test_a_new_config_reaches_those_who_wait() -> None:
    served = service(start_workers=2)
    await workers(served, 1)
    call = ready(served, 1)
    await until(lambda: sleeping(served) == 1)
    served.update_config(t.JobConfig(start_workers=1))
    assert (await call).included


@on_loop
async def test_who_waits_when_the_ledger_moves_away_is_told() -> None:
    served = service()
    await workers(served, 2)
    request = lg.SetActivityRequest(request=header("job", 1, 2), activity=lg.ACTIVITY_BETWEEN)
    await served.SetActivity(request, Context())
    call = ready(served, 1)
    await until(lambda: sleeping(served) == 1)
    await served.close()
    with refused("NOT_PRIMARY"):
        await call


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (t.RequestHeader(job="job", generation=1, client_id=1, protocol=99), "VERSION"),
        (header("other", 1, 1), "WRONG_CLUSTER"),
        (header("job", 0, 1), "OLD_GENERATION"),
        (header("job", 1, 0), "MISSING_FIELD"),
        (header("job", 1, 77), "NOT_MEMBER"),
    ],
)
def test_invariant_27_every_call_checks_its_header_first(head: t.RequestHeader, reason: str) -> None:
    async def scenario() -> None:
        served = service()
        await workers(served, 1)
        before = served.ledger.state_digest()
        for name in ("SetActivity", "OpenGroup", "Lease", "Gather", "Ready", "AwaitInit"):
            method = lg.DESCRIPTOR.services_by_name["Ledger"].methods_by_name[name]
            request = getattr(lg, method.input_type.name)(request=head)
            if hasattr(request, "group"):
                request.group = 1
            with pytest.raises(ParameshError) as caught:
                await getattr(served, name)(request, Context())
            assert caught.value.reason == reason, name
        assert served.ledger.state_digest() == before

    asyncio.run(scenario())


def test_a_long_wait_is_logged_with_ranks_and_over_repeated_polls(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        clock = [0.0]
        served = LedgerService("job", 1, t.JobConfig(start_workers=1), now=lambda: clock[0])
        await workers(served, 3)
        for _ in range(2):  # each poll ends at 20 s and is repeated
            call = ready(served, 1)
            await until(lambda: sleeping(served) == 1)
            clock[0] += SAY_AFTER_S / 2 + 6
            served._waits.wake_all()
            with refused("WAITING_FOR_WORKERS"):
                await call
        said = [record.getMessage() for record in caplog.records if "long wait" in record.getMessage()]
        assert said == ["long wait what='step 0 of group g' seconds=42 waiting_for_ranks=1,2"]
        calls = [ready(served, client) for client in (2, 3)]
        await asyncio.gather(*calls, ready(served, 1))
        assert not served._waits._since

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())


@on_loop
async def test_a_wait_that_brings_its_own_end_about_is_not_slept_through() -> None:
    """A worker that comes to wait for leases lets the others' step go; the last one ends the epoch."""
    served = service()
    await workers(served, 2)

    def lease(client: int, **fields: Any) -> asyncio.Future[lg.LeaseResponse]:
        request = lg.LeaseRequest(request=header("job", 1, client), length=1, chunk=1, **fields)
        return asyncio.ensure_future(served.Lease(request, Context()))

    last = await lease(1)
    request = lg.ReadyRequest(request=header("job", 1, 1), group=1, attempt=1, weight=1, samples=last.leases)
    step = asyncio.ensure_future(served.Ready(request, Context()))
    await until(lambda: sleeping(served) == 1)
    parked = lease(2, wait=True)
    decided = await asyncio.wait_for(step, POLL_S / 2)  # not at the end of its poll
    assert len(decided.record.contributors) == 1
    assert not parked.done(), "the other is still in its loop"
    assert (await asyncio.wait_for(lease(1, wait=True), POLL_S / 2)).finished
    assert (await asyncio.wait_for(parked, POLL_S / 2)).finished
