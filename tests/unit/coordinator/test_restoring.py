"""A restore as rows: one decision begins it, one ends it, and servers may go in between."""

import dataclasses

import pytest
from paramesh.archive import PartitionEntry, TableRecord
from paramesh.errors import ParameshError
from paramesh.manifest import Entry
from paramesh.routing import cut
from paramesh_coordinator import restoring
from paramesh_coordinator.catalog import Limits
from paramesh_coordinator.config import CoordinatorConfig, parse_every
from paramesh_coordinator.driver import fresh_job
from paramesh_coordinator.rows import NodeState, PartitionRow, PartitionState, Ref, ServerRow, decode, encode
from paramesh_coordinator.state import ClusterState, Draft

from tests.unit.client.test_manifest import GOOD, SPEC

SIZES = [layout.nbytes for layout in cut(SPEC)]
MANIFEST = dataclasses.replace(
    GOOD,
    tables=(TableRecord(1, "g/0", "g", 1, len(SIZES), SPEC.SerializeToString()),),
    partitions=(
        GOOD.partitions[0],
        *(
            PartitionEntry(1 + i, 1, i, size, 4, 4, 3, 1, f"partition-{1 + i}.safetensors")
            for i, size in enumerate(SIZES)
        ),
    ),
    files={"ledger.bin": Entry(1, "ab" * 32)},
)
LIMITS = Limits(1 << 40, 1 << 16)


def server(name, **fields):
    return ServerRow(name, 1, "h:1", "h:2", name, "1", b"x", 0, **fields)


class Job:
    """Decisions on a state in memory."""

    def __init__(self, *servers):
        self.state = ClusterState(fresh_job(CoordinatorConfig()))
        self.decide(lambda draft: [draft.put(server(name)) for name in servers])

    def decide(self, decision):
        draft = Draft(self.state, 1, 0)
        made = decision(draft)
        self.state.apply({key: row and decode(key, encode(row)) for key, row in draft.writes.items()})
        return made

    def parts(self):
        return sorted(self.state.rows(PartitionRow).values(), key=lambda row: row.partition)


def test_a_restore_begins_is_placed_and_ends() -> None:
    job = Job("a", "b")
    restoring.check(MANIFEST, LIMITS)
    job.decide(lambda draft: restoring.begin(draft, MANIFEST, "root/c"))
    assert (job.state.job.generation, job.state.job.restoring) == (3, "root/c")
    assert job.state.job.next_client == MANIFEST.next_client
    placed = job.decide(lambda draft: restoring.place(draft, MANIFEST, 2))
    assert placed.keys() == {p.partition for p in MANIFEST.partitions}
    assert {row.state for row in job.parts()} == {PartitionState.RESTORING}
    assert all(row.epoch > MANIFEST.partitions[-1].epoch for row in job.parts() if row.partition)
    assert not job.decide(lambda draft: restoring.finish(draft, {})), "nothing is confirmed yet"
    assert job.decide(lambda draft: restoring.finish(draft, placed))
    assert {row.state for row in job.parts()} == {PartitionState.ONLINE}
    assert job.state.job.restoring == ""


def test_a_server_that_is_lost_meanwhile_is_replaced() -> None:
    job = Job("a", "b")
    job.decide(lambda draft: restoring.begin(draft, MANIFEST, "root/c"))
    placed = job.decide(lambda draft: restoring.place(draft, MANIFEST, 1))
    gone = placed[0]
    row = next(r for r in job.state.live_servers() if r.ref == gone)
    job.decide(lambda draft: draft.put(dataclasses.replace(row, state=NodeState.DEAD)))
    assert not job.decide(lambda draft: restoring.finish(draft, placed))
    again = job.decide(lambda draft: restoring.place(draft, MANIFEST, 1))
    assert gone not in again.values()
    assert job.decide(lambda draft: restoring.finish(draft, again))


def test_it_waits_for_enough_servers() -> None:
    job = Job("a")
    job.decide(lambda draft: restoring.begin(draft, MANIFEST, "root/c"))
    assert job.decide(lambda draft: restoring.place(draft, MANIFEST, 2)) == {}
    assert job.parts() == []


def test_a_restore_replaces_one_that_failed() -> None:
    job = Job("a")
    job.decide(lambda draft: restoring.begin(draft, MANIFEST, "root/c"))
    job.decide(lambda draft: restoring.place(draft, MANIFEST, 1))
    job.decide(lambda draft: restoring.begin(draft, MANIFEST, "root/d"))
    assert (job.state.job.generation, job.state.job.restoring, job.parts()) == (4, "root/d", [])


def test_a_restore_takes_everything_of_before_away() -> None:
    job = Job("a")
    job.decide(lambda draft: draft.put(PartitionRow(40, 9, 0, 64, *Ref("a", 1))))
    job.decide(lambda draft: restoring.begin(draft, MANIFEST, "root/c"))
    assert job.parts() == []
    job.decide(lambda draft: restoring.place(draft, MANIFEST, 1))
    assert 40 not in {row.partition for row in job.parts()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spec": b"\xff\xff"}, "FORMAT"),
        ({"name": "other"}, "FORMAT"),
    ],
)
@pytest.mark.bad_input(62, got="SCHEMA and others")
def test_schemas_that_do_not_fit_are_refused(change, reason) -> None:
    spoilt = dataclasses.replace(MANIFEST, tables=(dataclasses.replace(MANIFEST.tables[0], **change),))
    with pytest.raises(ParameshError) as caught:
        restoring.check(spoilt, LIMITS)
    assert caught.value.reason == reason
    with pytest.raises(ParameshError) as caught:
        restoring.check(MANIFEST, Limits(1, 1 << 16))
    assert caught.value.reason == "QUOTA"


def test_when_to_make_one() -> None:
    assert parse_every("") == {}
    assert parse_every("10m") == {"checkpoint_seconds": 600.0}
    assert parse_every("500steps") == {"checkpoint_steps": 500}
    for bad in ("0s", "10", "m", "-1s", "1 h", "1e3s", "99999999999s"):
        with pytest.raises(ParameshError, match="checkpoint_every"):
            parse_every(bad)
    with pytest.raises(ParameshError, match="checkpoint-dir"):
        CoordinatorConfig(checkpoint_seconds=1.0)
