"""The ledger of a checkpoint as a new generation of the job begins with it. Pure.

What comes back: groups with their steps, settings and first values; epochs with what was
consumed; small state; rounds of barriers. What does not:

- *Members.* Their processes belong to the generation before and are refused OLD_GENERATION.
  They leave here as they would gracefully, so what was leased and not consumed is dealt again.
- *Evictions.* A tombstone keeps delayed messages of a dead client out. The generation keeps
  out every client of before, dead or not, and client ids are never given twice, so no
  tombstone is needed; keeping them would only add up over restores.
- *The start.* `start_workers` must join again before the next step, so that samples are dealt
  among as many as they would have been. The last rank of each slot is kept for the same reason.
- *Floors.* Numbers of records that the restored logs may never reach again.
"""

from __future__ import annotations

from collections.abc import Mapping

from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as pb

from paramesh_server.ledger import Ledger
from paramesh_server.ledger_codec import decode_state, encode_state

__all__ = ["renewed"]


def renewed(data: bytes, extra: Mapping[str, tuple[int, bytes]]) -> bytes:
    """A captured state without its members, ready to be installed.

    Args:
        data: as `Ledger.capture` wrote it.
        extra: small state of the cut that came from workers: (version, value) by key.

    Raises:
        RequestRefused: FORMAT, these are not captured bytes.
    """
    before = decode_state(data)
    scratch = Ledger(pb.JobConfig())
    scratch.install(data)
    scratch.serve(lambda _: None, pb.JobConfig(), 0.0)
    for client in sorted(before.members.members):
        scratch.leave(lg.LeaveRequest(request=pb.RequestHeader(client_id=client)), 0.0)
    state = decode_state(scratch.capture())
    state.members.started = False
    state.members.tombstones.clear()
    for group in state.groups.values():
        group.floors.clear()
        group.old_floors.clear()
    state.small.update(extra)
    return encode_state(state)
