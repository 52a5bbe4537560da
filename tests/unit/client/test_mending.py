"""What a client does between two tries of a request that partitions refused."""

from __future__ import annotations

import asyncio
from typing import Any

from paramesh.client import AsyncClient
from paramesh.errors import refuse
from paramesh.v1 import ledger_pb2, types_pb2


class FakeLedger:
    """A ledger that knows one decision."""

    def __init__(self, *records: types_pb2.StepRecord):
        self.records = records

    async def get_steps(self, request: ledger_pb2.GetStepsRequest) -> ledger_pb2.GetStepsResponse:
        return ledger_pb2.GetStepsResponse(records=self.records, next_step=len(self.records))


class NoWait:
    """A back-off that counts how often it is asked."""

    asked = 0

    def next(self) -> float:
        self.asked += 1
        return 0.0


def mend(have: list[types_pb2.StepRecord], ledger: FakeLedger) -> tuple[list[types_pb2.StepRecord], int]:
    client: Any = AsyncClient.__new__(AsyncClient)
    client.ledger = ledger
    backoff: Any = NoWait()
    failed = {1: refuse("NEED_STEPS", "behind", applied_step=0)}
    return asyncio.run(client._mend(failed, 1, have, 1, backoff)), backoff.asked


def test_the_ledgers_record_replaces_one_that_was_not_clipped_yet() -> None:
    bare = types_pb2.StepRecord(group=1, needs_clip=True)
    whole = types_pb2.StepRecord(group=1, needs_clip=True, has_clip_factor=True, clip_factor=0.5)
    assert mend([bare], FakeLedger(whole)) == ([whole], 0)


def test_steps_that_bring_nothing_new_are_asked_for_again_after_a_while() -> None:
    bare = types_pb2.StepRecord(group=1, needs_clip=True)
    assert mend([bare], FakeLedger(bare)) == ([bare], 1)
    assert mend([], FakeLedger()) == ([], 1)
    assert mend([], FakeLedger(bare)) == ([bare], 0)


def test_what_is_brought_again_carries_the_decision_that_names_it() -> None:
    """A client that was evicted after it was ready is fenced: only the record opens the door for it."""
    client: Any = AsyncClient.__new__(AsyncClient)
    brought: list[Any] = []

    async def restage(*asked: Any) -> bool:
        brought.append(asked)
        return True

    client._restage = restage
    backoff: Any = NoWait()
    record = types_pb2.StepRecord(group=1, step=4, contributors=[types_pb2.Contributor(client_id=9)])
    failed = {3: refuse("NOT_STAGED", "lacks", step=4, client_ids="9")}
    assert asyncio.run(client._mend(failed, 1, [record], 1, backoff)) == [record]
    assert brought == [(3, 1, 4, [9], [record])]
