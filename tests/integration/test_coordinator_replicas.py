"""Replicas over gRPC: who dies, who takes over, who catches up, and what watchers see of it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from paramesh.channel import header
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator import errands

from tests.integration.coordinator_peers import BEAT, Heart, Scene, play, refusal, spec, until

R2 = {"replicas": 2, "min_servers": 2}


def ref(name: str, incarnation: int = 1) -> pb.ReplicaRef:
    return pb.ReplicaRef(node=name, incarnation=incarnation)


async def learns(scene: Scene, partition: int, name: str, deadline: float = 10.0) -> pb.Partition:
    """The row once a server is catching up with it."""

    async def look() -> pb.Partition | None:
        row = await scene.call.partition(partition)
        return row if any(one.node == name for one in row.learners) else None

    return await until(look, deadline, f"{name} to be a learner of partition {partition}")  # type: ignore[no-any-return]


async def is_online(scene: Scene, partition: int, under: int) -> pb.Partition:
    """The row once it is online under an epoch."""

    async def look() -> pb.Partition | None:
        row = await scene.call.partition(partition)
        return row if row.epoch >= under and row.state != pb.PARTITION_STATE_OFFLINE else None

    return await until(look, 10, f"partition {partition} under epoch {under}")  # type: ignore[no-any-return]


def test_a_killed_server_is_replaced_at_once_and_the_next_one_catches_up() -> None:
    async def body(scene: Scene) -> None:
        for name in "ab":
            await scene.server(name)
        await scene.call.table(spec())
        before = await scene.call.map()
        watch = scene.call.maps.WatchMap(co.WatchMapRequest(request=header("default", 1), version=before.version))
        lost = before.partitions[1].primary.node
        (other,) = {"a", "b"} - {lost}
        await scene.call.exit_of_server(lost)
        shown = (await watch.read()).map
        watch.cancel()
        assert shown.version == before.version + 1, "one decision, one version"
        for old, row in zip(before.partitions, shown.partitions, strict=True):
            assert (row.primary.node, list(row.isr)) == (other, [ref(other)])
            assert row.state == pb.PARTITION_STATE_DEGRADED
            assert row.epoch == old.epoch + (old.primary.node == lost)
        await scene.server(lost, 2)
        row = await learns(scene, 0, lost)
        answer = await scene.call.change_isr(row, [ref(other), ref(lost, 2)], "caught up")
        assert list(answer.done) == [0]
        assert answer.map.partitions[0].state == pb.PARTITION_STATE_ONLINE
        assert answer.map.partitions[0].version > row.version
        assert not answer.map.partitions[0].learners
        again = await scene.call.change_isr(row, [ref(other)], "stale")
        assert not again.done
        assert again.map.partitions[0] == answer.map.partitions[0], "the map shows what is instead"
        kinds = await scene.call.kinds()
        assert kinds.index("server_dead") < kinds.index("learner_added") < kinds.index("isr_grown")

    play(body, **R2)


def test_a_silent_primary_is_replaced_and_dropped_by_its_successor_and_learns_when_it_is_back() -> None:
    async def body(scene: Scene) -> None:
        hearts: dict[str, Heart] = {}
        for name in "ab":
            _, hearts[name] = await scene.server(name)
        # Half of the nodes must be heard, else the coordinator thinks that itself is cut off.
        await scene.host("h")
        row = await scene.call.partition(0)
        lost, other = (one.node for one in row.isr)
        await hearts[lost].stop()
        row = await is_online(scene, 0, row.epoch + 1)
        assert list(row.isr) == [ref(other), ref(lost)], "silence takes nobody out of the set"
        answer = await scene.call.change_isr(row, [ref(other)], "no acknowledgement for 2.0 s")
        assert list(answer.done) == [0]
        assert list(answer.map.partitions[0].isr) == [ref(other)]
        control = await scene.control()
        await scene.call.server(lost, 1, control.address)
        scene.heart(co.NODE_KIND_SERVER, lost)
        row = await learns(scene, 0, lost)
        assert list(row.isr) == [ref(other)]

    play(body, **R2)


def test_a_second_failover_for_silence_waits_for_positive_death() -> None:
    async def body(scene: Scene) -> None:
        hearts = {name: (await scene.server(name))[1] for name in "ab"}
        await scene.host("h")
        row = await scene.call.partition(0)
        first, second = (one.node for one in row.isr)
        await hearts[first].stop()
        await is_online(scene, 0, 2)
        control = await scene.control()
        await scene.call.server(first, 1, control.address)
        scene.heart(co.NODE_KIND_SERVER, first)
        await hearts[second].stop()

        async def offline() -> bool:
            return (await scene.call.partition(0)).state == pb.PARTITION_STATE_OFFLINE

        await until(offline, 10, "the second silence to be noticed")
        told = [event for event in await scene.call.events(limit=1000) if event.kind == "partition_offline"]
        assert "failed over for silence less than 30 s ago" in told[-1].evidence
        await scene.call.exit_of_server(second)
        row = await scene.call.partition(0)
        assert (row.primary.node, row.epoch, list(row.isr)) == (first, 3, [ref(first)])

    play(body, **R2)


def test_a_primary_that_is_not_heard_drops_nobody() -> None:
    async def body(scene: Scene) -> None:
        hearts = {name: (await scene.server(name))[1] for name in "ab"}
        row = await scene.call.partition(0)
        primary, other = (one.node for one in row.isr)
        await hearts[primary].stop()

        async def unheard() -> bool:
            servers = (await scene.call.status()).servers
            return any(s.node.ref.node == primary and s.silence_ms > 2000 * BEAT for s in servers)

        await until(unheard, 5, "two beats of silence")
        row = await scene.call.partition(0)
        answer = await scene.call.change_isr(row, [ref(primary)], "it does not answer me")
        assert not answer.done
        assert ref(other) in answer.map.partitions[0].isr

    play(body, **R2)


def test_an_eviction_goes_to_the_new_primary_of_the_ledger() -> None:
    async def body(scene: Scene) -> None:
        controls = {name: (await scene.server(name))[0] for name in "ab"}
        await scene.host("h")
        lost, other = (one.node for one in (await scene.call.partition(0)).isr)
        controls[lost].failing = "NOT_READY"
        victim = await scene.call.client("h/0", 1, "h", 1)
        await scene.call.exit_of_slot("h", 1, "h/0", -9)
        assert "evict" not in [what for what, _, _ in controls[other].calls]
        await scene.call.exit_of_server(lost)
        await until(lambda: ("evict", (victim,), 1) in controls[other].calls, 10, "EVICT at the new ledger")

        async def nothing_pending() -> bool:
            return not (await scene.call.status()).pending

        await until(nothing_pending, 10, "EVICT and FENCE to be confirmed")

    play(body, **R2)


def test_a_goodbye_hands_over_what_others_have_in_sync() -> None:
    async def body(scene: Scene) -> None:
        for name in "ab":
            await scene.server(name)
        await scene.call.table(spec())
        leaving = (await scene.call.partition(1)).primary.node
        request = co.DeregisterRequest(kind=co.NODE_KIND_SERVER, name=leaving, incarnation=1)
        await scene.call.call(scene.call.membership.Deregister, request)
        shown = await scene.call.map()
        assert {row.state for row in shown.partitions} == {pb.PARTITION_STATE_DEGRADED}
        assert all(row.primary.node != leaving and len(row.isr) == 1 for row in shown.partitions)

    play(body, **R2)


def test_a_restarted_coordinator_knows_the_sets_and_goes_on_planning() -> None:
    async def body(scene: Scene) -> None:
        await scene.server("a")
        await scene.call.table(spec())
        await scene.server("b")
        before = await learns(scene, 0, "b")
        await scene.restart()
        assert await scene.call.partition(0) == before
        answer = await scene.call.change_isr(before, [ref("a"), ref("b")], "caught up")
        assert list(answer.done) == [0]
        for partition in range(1, 5):
            row = await learns(scene, partition, "b")
            assert (await scene.call.change_isr(row, [ref("a"), ref("b")])).done

    play(body, replicas=2)


def test_a_request_of_another_job_or_generation_changes_nothing() -> None:
    async def body(scene: Scene) -> None:
        await scene.server("a")
        request = co.ChangeIsrRequest(request=header("other", 1), primary=ref("a"))
        assert await refusal(scene.call.call(scene.call.replicas.ChangeIsr, request)) == "WRONG_CLUSTER"
        request = co.ChangeIsrRequest(request=header("default", 0), primary=ref("a"))
        assert await refusal(scene.call.call(scene.call.replicas.ChangeIsr, request)) == "OLD_GENERATION"

    play(body)


def test_promotion_with_loss_has_to_be_meant() -> None:
    async def body(scene: Scene) -> None:
        await scene.server("a")
        await scene.server("b")
        await learns(scene, 0, "b")
        await scene.call.exit_of_server("a")
        request = co.PromoteReplicaRequest(partition=0, server="b")
        assert await refusal(scene.call.call(scene.call.admin.PromoteReplica, request)) == "MISSING_FIELD"
        request.accept_loss = True
        row = (await scene.call.call(scene.call.admin.PromoteReplica, request)).map.partitions[0]
        assert (row.primary.node, row.epoch, list(row.isr)) == ("b", 2, [ref("b")])

    play(body, replicas=2)


def test_a_state_file_of_before_replication_is_taken_over(tmp_path: Path) -> None:
    state = tmp_path / "old.sqlite"

    async def first(scene: Scene) -> None:
        await scene.server("a")
        await scene.call.table(spec())

    play(first, state=state)
    with sqlite3.connect(state) as db:
        for key, value in db.execute("SELECT key, value FROM rows WHERE key LIKE 'partition/%'").fetchall():
            row = json.loads(value)
            for name in ("isr", "learners", "replicas", "version"):
                del row[name]
            db.execute("UPDATE rows SET value = ? WHERE key = ?", (json.dumps(row).encode(), key))
        db.execute("PRAGMA user_version = 1")

    async def second(scene: Scene) -> None:
        shown = await scene.call.map()
        assert [list(row.isr) for row in shown.partitions] == [[ref("a")]] * 5
        assert {row.version for row in shown.partitions} == {shown.version}

    play(second, state=state)
    with sqlite3.connect(state) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,), "an older release says that it cannot read it"


def test_an_eviction_does_not_wait_for_a_ledger_that_is_led_elsewhere_by_now(monkeypatch) -> None:
    """Were the call to the silent one not cut short, its deadline would outlive the test."""
    monkeypatch.setattr(errands, "CALL_SECONDS", 600.0)

    async def body(scene: Scene) -> None:
        first, _ = await scene.server("a")
        second, _ = await scene.server("b")
        await scene.host("h")
        before = (await scene.call.partition(0)).primary.node
        silent, other = (first, second) if before == "a" else (second, first)
        silent.answering.clear()
        victim = await scene.call.client("h/0", 1, "h", 1)
        await scene.call.exit_of_slot("h", 1, "h/0", -9)
        await scene.call.exit_of_server(before)
        await until(lambda: ("fence", (victim,), 1) in other.calls, 10, "the eviction, then the fence")
        assert other.calls == [("evict", (victim,), 1), ("fence", (victim,), 1)]
        silent.answering.set()

    play(body, **R2)
