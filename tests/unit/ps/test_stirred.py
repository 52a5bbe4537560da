"""Who waits for a replica to move misses nothing that moves after he asked."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from paramesh_server.insync import Ref
from paramesh_server.log import Log
from paramesh_server.replica import Replica
from paramesh_server.shards import Slot


def test_a_stir_before_the_waiting_task_runs_is_not_missed() -> None:
    """A sender that went to sleep at that moment sent the next record a second late."""

    async def body() -> None:
        machine: Any = SimpleNamespace(id=1, epoch=1, log=Log())
        with ThreadPoolExecutor(1) as pool:
            slot = Slot(Replica(machine, Ref("a", 1)), pool)
            waiting = asyncio.ensure_future(slot.stirred(60.0))
            slot.stir()
            await asyncio.wait_for(waiting, 5.0)

    asyncio.run(body())
