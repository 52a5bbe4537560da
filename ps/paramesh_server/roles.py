"""From a map's row to a replica's role. The map is the order (docs/decisions/0005).

await take_role(slot, row, mine=row.primary == me, dead=dead)
"""

from __future__ import annotations

import logging
import time
from functools import partial

from paramesh.v1 import types_pb2 as pb

from paramesh_server.insync import Ref
from paramesh_server.replica import Role
from paramesh_server.shards import Slot

log = logging.getLogger(__name__)


async def take_role(slot: Slot, row: pb.Partition, *, mine: bool, dead: frozenset[Ref]) -> bool:
    """Lead, take over or follow, as a row says; idempotent.

    Args:
        slot: the replica.
        row: of the newest map.
        mine: it names this process as primary, and is not OFFLINE.
        dead: processes that the coordinator has declared dead.

    Returns:
        Whether the replica leads from now on, and did not before.
    """
    replica = slot.replica
    replica.version = max(replica.version, row.version)
    if not mine:
        if replica.role is Role.PRIMARY and row.epoch > replica.machine.epoch:
            log.warning("partition=%d deposed epoch=%d primary=%s", row.id, row.epoch, row.primary.node)
        replica.heed(row.epoch)
        return False
    fresh = replica.role is Role.FOLLOWER
    if fresh and (replica.promised or replica.last.lsn):
        replica.promise(row.epoch)
        await slot.run(partial(replica.take_over, row.epoch))
        log.warning("partition=%d promoted epoch=%d lsn=%d", row.id, row.epoch, replica.machine.log.lsn)
    elif not fresh and row.epoch > replica.machine.epoch:
        await slot.run(partial(replica.machine.raise_epoch, row.epoch), inline=True)
    replica.lead(row, time.monotonic(), dead)
    return fresh
