"""Ids of clients: never reused, only rising, and marked with their owner's identity. Pure."""

from __future__ import annotations

from paramesh.identity import Identity

from paramesh_coordinator.state import Draft

__all__ = ["next_client"]


def next_client(draft: Draft, owner: Identity | None) -> int:
    """Take a client id. With an owner it ends with his mark, so that servers know whose it is by itself.

    Ids of both kinds come from one counter and only rise: those of before a restore are below those after it.
    """
    free = draft.job.next_client
    number = free if owner is None else owner.next_id(free)
    draft.change_job(next_client=number + 1)
    return number
