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
- *Clocks.* Each member's own; all go on from the furthest, so that what is kept by clock is not older
  than what was kept before.
- *Floors.* Numbers of records that the restored logs may never reach again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as pb

from paramesh_server.ledger import Ledger
from paramesh_server.ledger_codec import decode_state, encode_state
from paramesh_server.ledger_groups import GroupState

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
    furthest = {number: max(group.clocks.values(), default=0) for number, group in before.groups.items()}
    scratch = Ledger(pb.JobConfig())
    scratch.install(data)
    scratch.serve(lambda _: None, pb.JobConfig(), 0.0)
    for client in sorted(before.members.members):
        scratch.leave(lg.LeaveRequest(request=pb.RequestHeader(client_id=client)), 0.0)
    state = decode_state(scratch.capture())
    state.members.started = False
    state.members.tombstones.clear()
    for number, group in state.groups.items():
        group.floors.clear()
        group.old_floors.clear()
        if group.spec.mode in (lg.MODE_SSP, lg.MODE_ASYNC):
            group.next_step = group.first_kept = max(group.next_step, furthest[number])
    state.small.update(_as_of_now(extra, state.groups.values()))
    return encode_state(state)


def _as_of_now(extra: Mapping[str, tuple[int, bytes]], groups: Iterable[GroupState]) -> dict[str, tuple[int, bytes]]:
    """Workers' own state of clocks of their own belongs to the clock that all go on from."""
    stands = {group.spec.mode in (lg.MODE_SSP, lg.MODE_ASYNC): group.next_step for group in groups if group.next_step}
    if set(stands) != {True}:
        return dict(extra)
    return {key: (stands[True], value) for key, (_, value) in extra.items()}
