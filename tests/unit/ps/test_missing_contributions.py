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
from paramesh_server.decisions import parts_of
from paramesh_server.staging import Budget, Staging
from ps_building import GROUP, contribution, random_gradients, ready, record, table


class NotingLedger:
    """Takes note of who is reported missing."""

    def __init__(self) -> None:
        self.reported: list[ledger_pb2.ReportMissingRequest] = []

    async def report_missing(self, request: ledger_pb2.ReportMissingRequest) -> None:
        self.reported.append(request)


def test_who_is_missing_where_and_when_reaches_the_ledger() -> None:
    layout = ready(table([8])).layout
    staging = Staging(Budget(1 << 20))
    staging.put(GROUP, 4, 1, 1, contribution(layout, random_gradients(layout, 1)))
    with pytest.raises(ParameshError) as caught:
        parts_of(record(4, [(1, 1.0), (2, 1.0), (3, 1.0)]), 9, staging)
    refusal = from_detail(error_detail(caught.value))  # over the wire

    client: Any = AsyncClient.__new__(AsyncClient)
    client.ledger = NotingLedger()
    records = [record(4, [(1, 1.0), (2, 1.0), (3, 1.0)]), record(5, [(1, 1.0)])]
    asyncio.run(client._mend({9: refusal}, GROUP, records, 1, Backoff(first=0.0)))
    [reported] = client.ledger.reported
    assert (reported.group, reported.step, reported.partition) == (GROUP, 4, 9)
    assert list(reported.client_ids) == [2, 3]
