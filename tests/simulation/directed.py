"""Rules that no seed shows the lack of, because another mechanism stands before them: each by itself.

Each function drives the real core, and fails by an AssertionError without its rule.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from paramesh import files
from paramesh.async_client import AsyncClient
from paramesh.channel import header
from paramesh.errors import ParameshError
from paramesh.files import Folder
from paramesh.framing import decode
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb
from paramesh_server.insync import InSync, Ref
from paramesh_server.ledger import Ledger, Record
from paramesh_server.ledger_service import LedgerService
from paramesh_server.log import START, Position
from paramesh_server.replica import Replica

from tests.simulation.unruly import empty, record, unruly

ME, OTHER = Ref("a", 1), Ref("b", 1)
WORLDS = 60


def unruly_messages() -> None:
    """A follower applies what is committed, though messages come in any order (`unruly.py`)."""
    for seed in range(WORLDS):
        unruly(seed)


def older_tail_is_not_acknowledged() -> None:
    """A follower has records of an older primary beyond those that the new one has sent it."""
    replica = Replica(empty(), ME)
    for lsn in (1, 2, 3):
        replica.offer(1, Position(lsn - 1, int(lsn > 1)), record(Position(lsn, 1)))
    replica.offer(2, START, record(Position(1, 1)))
    assert (replica.last, replica.matched) == (Position(3, 1), 1)
    replica.offer(2, Position(1, 1), record(Position(2, 2)))
    assert replica.matched == 2


def learner_of_another_row() -> None:
    """A follower left and came back, empty, and its primary hears only of the latter: it has nothing yet.

    In a cluster three more things must meet: a wish that is decided late, after the follower has caught up;
    a map that does not arrive while the next one does; and a follower that stops when it is greeted.
    """
    insync = InSync(ME)
    insync.follow(pb.Partition(version=1, isr=[ME.proto(), OTHER.proto()]), 0.0)
    insync.appended(5, 0.0)
    insync.acked(OTHER, 5, 0.0, 1)
    insync.follow(pb.Partition(version=3, isr=[ME.proto()], learners=[OTHER.proto()]), 1.0)
    insync.acked(OTHER, 0, 1.0, 3)  # the greeting: an empty replica
    assert insync.wish(1.0) is None, "a learner is asked for that has nothing"
    insync.acked(OTHER, 5, 1.1, 3)
    wish = insync.wish(1.1)
    assert wish is not None
    assert OTHER in wish.isr


def _bare_client() -> Any:
    """A real client's methods, without a connection: client 9, and a map in which partitions are of epoch 3."""
    routes = SimpleNamespace(
        partition=lambda number: pb.Partition(id=number, epoch=3), primary=lambda _: (SimpleNamespace(address="a"), 3)
    )
    stand_ins = {
        "client_id": 9, "push_timeout": 1.0, "routes": routes, "header": staticmethod(pb.RequestHeader),
        "lane": None, "_kept": None, "_seq": {},
    }  # fmt: skip
    kind: Any = type("BareClient", (AsyncClient,), stand_ins)
    return kind.__new__(kind)


def pulls_name_a_floor() -> None:
    """A real client's pull says what it must reflect; `unit/ps/test_servicer.py -k floor`: a server waits."""
    asked = _bare_client()._pull_of(1, {1: (3, 70)})
    assert (asked.floor_epoch, asked.floor_lsn) == (3, 70)


def decisions_come_along() -> None:
    """A real client brings a contribution again with the decision that names it: else a fenced one is refused."""
    client = _bare_client()
    encoded = SimpleNamespace(partition=3, messages=lambda head: [b"bytes"])
    client._kept = {1: SimpleNamespace(step=4, contributions={(3, 1): encoded})}
    sent: list[bytes] = []

    async def push(messages: list[bytes], _: float) -> list[ps.PartitionOutcome]:
        sent.extend(messages)
        return []

    client.lane = lambda _: SimpleNamespace(push=push)
    record_ = pb.StepRecord(group=1, step=4, contributors=[pb.Contributor(client_id=9)])
    assert asyncio.run(client._restage(3, 1, 4, [9], [record_]))
    assert list(decode(sent[0], ps.PushHeader).header.committed) == [record_]


def deposed_ledger_refuses() -> None:
    """The successor's stream reaches a ledger before the map does; in a cluster, nobody asks it in between."""
    config, sent = pb.JobConfig(start_workers=1), list[Record]()

    async def ask() -> None:
        old, new = Ledger(config), Ledger(config)
        old.serve(lambda _: None, config, 0.0)
        new.serve(sent.append, config, 0.0)
        service = LedgerService("job", 1, config, ledger=old, now=lambda: 0.0)
        new.evict(7, "dead", 0.0)
        old.replay(sent)
        why = "a ledger that follows another took a member"
        try:
            await service.Join(lg.JoinRequest(request=header("job", 1, 8)), None)  # type: ignore[arg-type]
        except (ParameshError, RuntimeError) as error:
            why = getattr(error, "reason", repr(error))
        assert why == "NOT_PRIMARY"

    asyncio.run(ask())


def folders_are_synced() -> None:
    """After a power cut a name is where it was at the last fsync of its folder: the simulation has no disk."""
    acts: list[tuple[str, str]] = []
    replace, fsync, exchange = os.replace, os.fsync, files._exchange

    def renamed(old: str, new: str) -> None:
        replace(old, new)
        acts.append(("rename", os.path.realpath(new)))

    def swapped(one: str, other: str) -> bool:
        done = exchange(one, other)
        if done:
            acts.append(("rename", os.path.realpath(other)))
        return done

    def synced(handle: int) -> None:
        fsync(handle)
        acts.append(("sync", os.path.realpath(f"/proc/self/fd/{handle}")))

    with (
        tempfile.TemporaryDirectory() as root,
        mock.patch.object(files, "_rename", renamed),
        mock.patch.object(files, "_exchange", swapped),
        mock.patch.object(os, "fsync", synced),
    ):
        folder = Folder(Path(root) / "checkpoint")
        folder.write({"a.bin": b"first"}.items(), {"format": 1})
        folder.write({"a.bin": b"second"}.items(), {"format": 1})
        files.write_file(Path(root) / "alone.bin", b"x")
    renames = [(at, place) for at, (act, place) in enumerate(acts) if act == "rename"]
    assert len(renames) == 3
    for at, place in renames:
        assert ("sync", os.path.dirname(place)) in acts[at:], f"{place} may be gone after a power cut"
    for at, place in renames[:2]:
        assert any(act == "sync" and done.startswith(place) for act, done in acts[:at]), f"{place} may be empty"
