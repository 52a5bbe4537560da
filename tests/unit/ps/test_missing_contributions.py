"""NOT_STAGED from the server that says it to the client that reports it: one key, both sides."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from paramesh.client import AsyncClient
from paramesh.errors import ParameshError
from paramesh.retry import Backoff
from paramesh.status import error_detail, from_detail
from paramesh.v1 import ledger_pb2
from paramesh.v1 import types_pb2 as pb
from paramesh_server.decisions import gather, parts_of
from paramesh_server.staging import Budget, Staging
from ps_building import GROUP, contribution, random_gradients, ready, record, table


class NotingLedger:
    """Takes note of who is reported missing."""

    def __init__(self) -> None:
        self.reported: list[ledger_pb2.ReportMissingRequest] = []

    async def report_missing(self, request: ledger_pb2.ReportMissingRequest) -> ledger_pb2.ReportMissingResponse:
        self.reported.append(request)
        return ledger_pb2.ReportMissingResponse(degraded=[3])


def test_who_is_missing_where_and_when_reaches_the_ledger() -> None:
    layout = ready(table([8])).layout
    staging = Staging(Budget(1 << 20))
    staging.put(GROUP, 4, 1, 1, contribution(layout, random_gradients(layout, 1)))
    with pytest.raises(ParameshError) as caught:
        parts_of(record(4, [(1, 1.0), (2, 1.0), (3, 1.0)]), 9, staging)
    refusal = from_detail(error_detail(caught.value))  # over the wire

    client: Any = AsyncClient.__new__(AsyncClient)
    client.ledger, client._kept, client.client_id = NotingLedger(), {}, 1
    records = [record(4, [(1, 1.0), (2, 1.0), (3, 1.0)]), record(5, [(1, 1.0)])]
    asyncio.run(client._mend({9: refusal}, GROUP, records, 1, Backoff(first=0.0)))
    [reported] = client.ledger.reported
    assert (reported.group, reported.step, reported.partition) == (GROUP, 4, 9)
    assert list(reported.client_ids) == [2, 3]
    permission = pb.DegradedPartition(partition=9, client_ids=[3])
    assert [list(r.degraded) for r in records] == [[permission], []]
    with pytest.raises(ParameshError) as still:  # client 2 lives: it brings its contribution again
        gather(records[0], 9, staging)
    assert still.value.metadata["client_ids"] == "2"


def test_a_degraded_sum_is_the_mean_of_what_is_there() -> None:
    layout = ready(table([8])).layout
    staging = Staging(Budget(1 << 20))
    mine = contribution(layout, random_gradients(layout, 1))
    staging.put(GROUP, 4, 1, 1, mine)
    decision = record(4, [(1, 2.0), (2, 6.0)])
    decision.degraded.add(partition=8, client_ids=[2])
    with pytest.raises(ParameshError):
        gather(decision, 9, staging)  # permission for another partition
    decision.degraded.add(partition=9, client_ids=[2])
    decided = gather(decision, 9, staging)
    assert [(part.contribution, part.weight) for part in decided.parts] == [(mine, 2.0)]
    assert (decided.reduction.total_weight, decided.without) == (2.0, (2,))
