"""What a process takes on at once, and who is told to wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from paramesh.admission import CONTROL, LIMITED, Admission, key_of
from paramesh.bounds import Bounds
from paramesh.errors import ParameshError, refuse
from paramesh.retry import TOLD_MAX_S, told_to_wait

from tests.faults.fuzzing import calls

PUSH, PULL, READY = (
    f"/paramesh.v1.{name}" for name in ("ParameterServer/Push", "ParameterServer/Pull", "Ledger/Ready")
)
BEAT, HEALTH = "/paramesh.v1.Membership/Heartbeat", "/grpc.health.v1.Health/Check"


async def never() -> AsyncIterator[bytes]:
    """A stream that does not end and brings nothing."""
    await asyncio.Event().wait()
    yield b""


def test_every_call_is_either_limited_or_control_traffic():
    for rpc in calls():
        names = {rpc.service, f"{rpc.service}.{rpc.name}"}
        assert bool(names & LIMITED) != bool(names & CONTROL), rpc.path
        assert bool(key_of(rpc.path)) == bool(names & LIMITED)


def test_calls_are_counted_by_service_and_control_traffic_not_at_all():
    async def test() -> None:
        admission = Admission(Bounds(calls=2, uploads=9))
        first, _ = admission.enter(PUSH), admission.enter(PULL)
        with pytest.raises(ParameshError) as refused:
            admission.enter(PUSH)
        assert (refused.value.reason, admission.refused) == ("OVERLOADED", 1)
        assert admission.enter(READY).service == "Ledger"
        assert [admission.enter(method).service for method in (BEAT, HEALTH) for _ in range(9)] == [""] * 18
        admission.leave(first)
        admission.leave(first)  # twice is once
        admission.enter(PUSH)
        assert admission.calls == {"ParameterServer": 2, "Ledger": 1}

    asyncio.run(test())


def test_who_does_not_bring_its_message_makes_way_for_who_does(monkeypatch):
    """And keeps its place as long as nobody wants it."""
    monkeypatch.setattr("paramesh.admission.SLOW_S", 0.0)

    async def test() -> None:
        admission = Admission(Bounds(calls=9, uploads=1))
        slow = admission.enter(PUSH)
        reading = asyncio.ensure_future(admission.read(slow, never()))
        await asyncio.sleep(0)
        with pytest.raises(ParameshError) as refused:
            admission.enter(PUSH)
        assert "--max-uploads" in str(refused.value)
        with pytest.raises(ParameshError) as ended:
            await reading
        assert ended.value.reason == "OVERLOADED"
        admission.leave(slow)
        assert admission.enter(PUSH).reading

    asyncio.run(test())


def test_a_message_that_does_not_come_is_waited_for_so_long_and_no_longer():
    async def test() -> None:
        admission = Admission(Bounds(), patience=0.02)
        with pytest.raises(ParameshError) as refused:
            await admission.read(admission.enter(PUSH), never())
        assert refused.value.reason == "DEADLINE"

    asyncio.run(test())


def test_who_is_refused_waits_as_told_and_not_for_ever():
    assert told_to_wait(refuse("NOT_READY", "no")) == 0
    assert 0.1 <= told_to_wait(refuse("OVERLOADED", "no", retry_after_ms=100)) <= 0.15
    assert told_to_wait(refuse("OVERLOADED", "no", retry_after_ms=10**9)) <= 1.5 * TOLD_MAX_S
    assert told_to_wait(refuse("OVERLOADED", "no", retry_after_ms="soon")) == 0
