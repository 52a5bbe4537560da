"""A coordinator over gRPC, in one event loop with the nodes that it watches."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from paramesh.channel import PROTOCOL, grpc, header
from paramesh.errors import ConfigError, ParameshError
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator.config import CoordinatorConfig
from paramesh_coordinator.server import CoordinatorServer
from paramesh_coordinator.store import MemoryStore, StoreError

from tests.integration.coordinator_peers import BEAT, TIMEOUT, Caller, Scene, play, refusal, spec, until

# --- registration ---


def test_rows_42_and_43_one_name_one_process() -> None:
    async def body(scene: Scene) -> None:
        first = await scene.control()
        second = await scene.control()
        answer = await scene.call.server("a", 1, first.address)
        assert await scene.call.server("a", 1, first.address) == answer
        assert await refusal(scene.call.server("a", 2, second.address)) == "NODE_NAME"
        await scene.call.server("a", 2, second.address, replace=True)
        nodes = {n.ref.incarnation: n for n in (await scene.call.map()).nodes}
        assert nodes[1].state == pb.NODE_STATE_DEAD
        assert (nodes[2].state, nodes[2].address) == (pb.NODE_STATE_LIVE, second.address)

    play(body)


def test_a_successor_whose_predecessor_no_longer_listens_needs_no_replace() -> None:
    async def body(scene: Scene) -> None:
        first, second = await scene.control(), await scene.control()
        await scene.call.server("a", 1, first.address)
        await first.stop()
        await scene.call.server("a", 2, second.address)
        nodes = (await scene.call.map()).nodes
        assert [(n.ref.incarnation, n.state) for n in nodes] == [(1, pb.NODE_STATE_DEAD), (2, pb.NODE_STATE_LIVE)]

    play(body)


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:0", "127.0.0.1:70000", "0.0.0.0:7071", "closed"])
@pytest.mark.parametrize("field", ["address", "control_address"])
def test_row_44_an_address_that_cannot_be_dialled(address: str, field: str) -> None:
    async def body(scene: Scene) -> None:
        good = (await scene.control()).address
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            bad = f"127.0.0.1:{unused.getsockname()[1]}" if address == "closed" else address
            fields = {"address": good, "control_address": good} | {field: bad}
            assert await refusal(scene.call.server("a", 1, **fields)) == "ADDRESS"
        assert list((await scene.call.map()).nodes) == []

    play(body)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": 0}, "VERSION"),
        ({"protocol": PROTOCOL + 1}, "VERSION"),
        ({"job": "other"}, "WRONG_CLUSTER"),
        ({"generation": 0}, None),
    ],
)
def test_row_45_headers_are_checked_first(change: dict[str, Any], reason: str | None) -> None:
    async def body(scene: Scene) -> None:
        request = header("default", 1)
        for key, value in change.items():
            setattr(request, key, value)
        requests = [
            (scene.call.membership.RegisterHost, co.RegisterHostRequest(request=request, name="h", incarnation=1)),
            (scene.call.maps.GetMap, co.GetMapRequest(request=request)),
            (scene.call.admin.GetStatus, co.GetStatusRequest(request=request)),
            (scene.call.admin.ListEvents, co.ListEventsRequest(request=request)),
            (
                scene.call.membership.Deregister,
                co.DeregisterRequest(request=request, kind=co.NODE_KIND_HOST, name="x", incarnation=1),
            ),
        ]
        for method, message in requests:
            try:
                await method(message, timeout=5)
                got = None
            except grpc.RpcError as exc:
                from paramesh.status import from_rpc_error

                got = from_rpc_error(exc).reason
            assert got == reason, method

    play(body)


def test_clients_get_ids_once_and_the_map_with_them() -> None:
    async def body(scene: Scene) -> None:
        await scene.server("a")
        request = co.RegisterClientRequest(request=header("default"), slot="p/0", incarnation=7)
        first = await scene.call.call(scene.call.membership.RegisterClient, request)
        again = await scene.call.call(scene.call.membership.RegisterClient, request)
        assert first == again
        assert first.map.partitions[0].id == 0
        assert (first.heartbeat_interval_ms, first.failure_timeout_ms) == (100, 600)
        assert await scene.call.client("p/0", 8) == first.client_id + 1

    play(body)


# --- death ---


def test_a_silent_server_is_dead_in_time_and_the_watch_says_so() -> None:
    async def body(scene: Scene) -> None:
        await scene.server("a")
        _, heart = await scene.server("b")
        await scene.host("h")
        await scene.call.table(spec())
        watch = scene.call.maps.WatchMap(co.WatchMapRequest(request=header("default", 1)))
        seen = (await watch.read()).map
        await until(lambda: heart.answers > 3, 5, "beats")
        loop = asyncio.get_running_loop()
        await heart.stop()
        fell_silent = loop.time()
        while all(n.state == pb.NODE_STATE_LIVE for n in seen.nodes):
            async with asyncio.timeout(5):
                previous, seen = seen, (await watch.read()).map
            assert seen.version > previous.version
        assert loop.time() - fell_silent < TIMEOUT + 1.0
        (node,) = [n for n in seen.nodes if n.state == pb.NODE_STATE_DEAD]
        assert (node.ref.node, node.reason[:10]) == ("b", "silent for")
        for row in seen.partitions:
            lost = row.primary.node == "b"
            assert row.state == (pb.PARTITION_STATE_OFFLINE if lost else pb.PARTITION_STATE_ONLINE)
        watch.cancel()

    play(body)


def test_a_server_whose_beats_break_off_and_whose_ports_refuse_is_dead_at_once() -> None:
    """Killed together with its helper: nobody reports the exit, but its machine refuses connections."""

    async def body(scene: Scene) -> None:
        await scene.server("a")
        control, heart = await scene.server("b")
        _, listening = await scene.server("c")
        await scene.host("h")
        await until(lambda: heart.answers > 3 and listening.answers > 3, 5, "beats")
        await control.stop()
        await heart.stop()

        async def dead() -> list[str]:
            return [n.reason for n in (await scene.call.map()).nodes if n.state == pb.NODE_STATE_DEAD]

        assert await until(dead, TIMEOUT - 0.1, "positive death, sooner than by silence") == [
            "process ended: its ports refuse connections"
        ]
        await listening.stop()  # this one still listens, as a stopped process does: silence decides
        both = lambda: _two(dead)  # noqa: E731
        reasons = await until(both, 5, "the verdict for silence")
        assert [r for r in reasons if r.startswith("silent for")]

    async def _two(dead: Callable[[], Awaitable[list[str]]]) -> list[str] | None:
        reasons = await dead()
        return reasons if len(reasons) == 2 else None

    play(body)


def test_a_server_declared_dead_is_told_so_and_comes_back_under_a_new_epoch() -> None:
    """What a SIGSTOP of some seconds looks like: nothing is lost, so nothing stays lost."""

    async def body(scene: Scene) -> None:
        await scene.server("a")
        control, heart = await scene.server("b")
        await scene.host("h")
        await scene.call.table(spec())
        await until(lambda: heart.answers > 3, 5, "beats")
        await heart.stop()

        async def dead() -> bool:
            return any(n.state == pb.NODE_STATE_DEAD for n in (await scene.call.map()).nodes)

        await until(dead, 5, "the verdict")
        again = scene.heart(co.NODE_KIND_SERVER, "b")
        await until(lambda: again.unknown > 0, 5, "the word that it is unknown")
        await scene.call.server("b", 1, control.address)
        rows = [row for row in (await scene.call.map()).partitions if row.primary.node == "b"]
        assert {(row.state, row.epoch) for row in rows} == {(pb.PARTITION_STATE_ONLINE, 2)}
        told = again.unknown
        await until(lambda: again.answers > 3, 5, "fresh beats")
        assert again.unknown <= told + 1

    play(body)


def test_an_exit_report_evicts_then_fences_within_half_a_second() -> None:
    async def body(scene: Scene) -> None:
        ledger, _ = await scene.server("a")
        other, _ = await scene.server("b")
        await scene.host("h")
        victim = await scene.call.client("h/0", 1, "h", 1)
        loop = asyncio.get_running_loop()
        reported = loop.time()
        await scene.call.exit_of_slot("h", 1, "h/0", -9)
        await until(lambda: ledger.calls, 5, "the eviction")
        assert loop.time() - reported < 0.5
        await until(lambda: other.calls, 5, "the fence")
        assert ledger.calls[0] == ("evict", (victim,), 1)
        assert ("fence", (victim,), 1) in ledger.calls
        assert other.calls == [("fence", (victim,), 1)]

        async def settled() -> bool:
            return not (await scene.call.status()).pending

        await until(settled, 5, "the operation's end")
        kinds = await scene.call.kinds()
        assert kinds[-3:] == ["client_evicted", "evict_confirmed", "fence_confirmed"]

    play(body)


def test_eviction_is_repeated_until_the_ledger_confirms() -> None:
    async def body(scene: Scene) -> None:
        ledger, _ = await scene.server("a")
        await scene.host("h")
        victim = await scene.call.client("h/0", 1, "h", 1)
        ledger.failing = "NOT_READY"
        await scene.call.exit_of_slot("h", 1, "h/0", -9)
        (line,) = (await scene.call.status()).pending
        assert line.startswith(f"evict client {victim} at the ledger: SIGKILL")
        await scene.restart()
        assert (await scene.call.status()).pending == [line]
        ledger.failing = ""
        await until(lambda: len(ledger.calls) == 2, 10, "evict and fence")
        assert ledger.calls == [("evict", (victim,), 2), ("fence", (victim,), 2)]

    play(body)


def test_a_silent_host_takes_its_clients_with_it() -> None:
    async def body(scene: Scene) -> None:
        ledger, _ = await scene.server("a")
        heart = await scene.host("h")
        await scene.host("g")
        victim, other = await scene.call.client("h/0", 1, "h", 1), await scene.call.client("g/0", 1, "g", 1)
        await until(lambda: heart.answers > 3, 5, "beats")
        await heart.stop()
        await until(lambda: ("fence", (victim,), 1) in ledger.calls, 5, "the fence")
        assert await scene.client_state(other) == "live"
        request = co.CreateTableRequest(request=header("default", 1, victim), spec=spec())
        assert await refusal(scene.call.call(scene.call.catalog.CreateTable, request)) == "CLIENT_FENCED"

    play(body)


def test_a_client_without_a_supervisor_beats_for_itself() -> None:
    async def body(scene: Scene) -> None:
        await scene.server("a")
        await scene.host("h")
        beating, silent = await scene.call.client("p", 1), await scene.call.client("q", 1)
        heart = scene.heart(co.NODE_KIND_CLIENT, "", 0, beating)

        async def evicted() -> bool:
            return await scene.client_state(silent) == "evicted"

        await until(evicted, 5, "the silent one's end")
        assert await scene.client_state(beating) == "live"
        assert heart.unknown == 0

    play(body)


def test_a_supervised_client_may_beat_but_need_not() -> None:
    async def body(scene: Scene) -> None:
        await scene.server("a")
        await scene.host("h")
        client = await scene.call.client("h/0", 1, "h", 1)
        call = scene.call.membership.Heartbeat()
        await call.write(co.HeartbeatRequest(request=header("default", 1, client), kind=co.NODE_KIND_CLIENT))
        assert not (await call.read()).unknown
        call.cancel()

    play(body)


# --- tables ---


def test_a_table_waits_for_servers_up_to_the_callers_deadline() -> None:
    async def body(scene: Scene) -> None:
        assert await refusal(scene.call.table(spec(), timeout=0.7)) == "NOT_READY"
        waiting = asyncio.ensure_future(scene.call.table(spec(), timeout=10))
        await scene.server("a")
        assert not waiting.done()
        await scene.server("b")
        created = await waiting
        rows = [row for row in created.map.partitions if row.table_id == created.table_id]
        assert [row.id for row in rows] == [1, 2, 3, 4]
        held = [row.primary.node for row in rows]
        assert held.count("a") == held.count("b") == 2

    play(body, min_servers=2)


def test_two_who_create_one_table_at_once_get_the_same() -> None:
    async def body(scene: Scene) -> None:
        await scene.server("a")
        answers = await asyncio.gather(*(scene.call.table(spec()) for _ in range(8)))
        assert {answer.table_id for answer in answers} == {1}
        described = await scene.call.call(scene.call.catalog.DescribeTable, co.DescribeTableRequest(table_id=1))
        assert described.spec == spec()
        assert described.entry == answers[0].map.tables[0]
        other = spec()
        other.optimizer.class_name = "Adam"
        assert await refusal(scene.call.table(other)) == "SCHEMA"
        missing = co.DescribeTableRequest(table_id=9)
        assert await refusal(scene.call.call(scene.call.catalog.DescribeTable, missing)) == "UNKNOWN_TABLE"

    play(body)


# --- restart, takeover, store ---


def test_a_restart_evicts_nobody_and_knows_everybody(tmp_path: Path) -> None:
    """Invariant 19, with a dead time longer than the failure timeout."""

    async def body(scene: Scene) -> None:
        hearts = [(await scene.server("a"))[1], await scene.host("h")]
        clients = [await scene.call.client(f"h/{n}", n + 1, "h", 1) for n in range(3)]
        await scene.call.table(spec())
        before = await scene.call.map()
        await scene.coordinator.stop()
        away_until = asyncio.get_running_loop().time() + 2 * TIMEOUT
        await until(lambda: asyncio.get_running_loop().time() > away_until, 5, "the outage to last")
        await scene.restart()
        after = await scene.call.map()
        assert (after.term, after.generation) == (before.term + 1, before.generation)
        assert after.version > before.version
        assert (after.nodes, after.tables, after.partitions) == (before.nodes, before.tables, before.partitions)
        answered = [heart.answers for heart in hearts]
        many = 2 * int(TIMEOUT / BEAT)
        await until(
            lambda: all(h.answers > n + many for h, n in zip(hearts, answered, strict=True)),
            15,
            "two timeouts of beats",
        )
        assert [heart.unknown for heart in hearts] == [0, 0]
        assert {await scene.client_state(client) for client in clients} == {"live"}
        assert await scene.call.client("h/9", 99, "h", 1) == max(clients) + 1
        assert "coordinator_restarted" in await scene.call.kinds()

    play(body, state=tmp_path / "c.sqlite")


def test_a_deposed_coordinator_commits_nothing_and_says_so() -> None:
    """Row 15: the old one is resumed after a takeover."""

    async def body(scene: Scene) -> None:
        await scene.server("a")
        newer = CoordinatorServer(scene.config, MemoryStore(scene.medium))
        await newer.start()
        assert newer.term == scene.coordinator.term + 1
        assert await refusal(scene.call.host("h", 1)) == "STALE_TERM"
        deposed = await asyncio.wait_for(scene.coordinator.wait_deposed(), 5)
        assert deposed.reason == "STALE_TERM"
        assert await refusal(scene.call.map()) == "STALE_TERM"
        other = Caller(newer.address)
        await other.host("h", 1)
        await other.close()
        await newer.stop()

    play(body)


def test_a_server_that_knows_a_newer_term_deposes() -> None:
    async def body(scene: Scene) -> None:
        ledger, _ = await scene.server("a")
        await scene.host("h")
        await scene.call.client("h/0", 1, "h", 1)
        ledger.failing = "STALE_TERM"
        await scene.call.exit_of_slot("h", 1, "h/0", -9)
        assert (await asyncio.wait_for(scene.coordinator.wait_deposed(), 5)).reason == "STALE_TERM"

    play(body)


def test_a_store_that_fails_stops_decisions_and_nothing_else() -> None:
    """Row 34: disk full. Beats and maps go on; when there is room, the same request succeeds."""

    async def body(scene: Scene) -> None:
        _, heart = await scene.server("a")
        store = scene.coordinator._store
        assert store is not None
        commit, store.transact = store.transact, full  # type: ignore[method-assign]
        before = await scene.call.map()
        assert await refusal(scene.call.host("h", 1)) == "NOT_READY"
        answered = heart.answers
        await until(lambda: heart.answers > answered + 2, 5, "beats to be answered")
        assert await scene.call.map() == before
        store.transact = commit  # type: ignore[method-assign]
        await scene.call.host("h", 1)

    def full(*_: object) -> None:
        raise StoreError("disk full")

    play(body)


def test_a_caller_that_hangs_up_leaves_memory_and_store_equal() -> None:
    async def body(scene: Scene) -> None:
        await scene.server("a")
        calls = [asyncio.ensure_future(scene.call.client(f"p/{n}", n + 1)) for n in range(20)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        ids = [await scene.call.client(f"p/{n}", n + 1) for n in range(20)]
        assert len(set(ids)) == 20
        before = (await scene.call.status()).clients
        await scene.restart()
        assert (await scene.call.status()).clients == before

    play(body)


def test_a_port_that_is_taken_is_a_clear_error_and_raises_no_term(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        second = CoordinatorServer(CoordinatorConfig(bind=scene.coordinator.address, state=tmp_path / "other.sqlite"))
        with pytest.raises(ConfigError, match=r"bind: .* cannot be listened on"):
            await second.start()
        assert not (tmp_path / "other.sqlite").exists()
        await scene.call.map()

    play(body)


# --- what people see ---


def test_the_watch_starts_with_what_is_there_and_skips_what_is_known() -> None:
    async def body(scene: Scene) -> None:
        await scene.server("a")
        current = await scene.call.map()
        known = scene.call.maps.WatchMap(co.WatchMapRequest(request=header("default", 1), version=current.version))
        fresh = scene.call.maps.WatchMap(co.WatchMapRequest(request=header("default", 1)))
        assert (await fresh.read()).map == current
        first = asyncio.ensure_future(known.read())
        await scene.server("b")
        assert (await first).map.version > current.version
        for stream in (known, fresh):
            stream.cancel()

    play(body)


def test_a_quiet_watch_repeats_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    from paramesh_coordinator import servicer

    monkeypatch.setattr(servicer, "REPEAT_SECONDS", 0.1)

    async def body(scene: Scene) -> None:
        watch = scene.call.maps.WatchMap(co.WatchMapRequest(request=header("default", 1)))
        maps = [(await asyncio.wait_for(watch.read(), 5)).map for _ in range(3)]
        assert maps[0] == maps[1] == maps[2]
        watch.cancel()

    play(body)


def test_status_and_events_tell_the_story() -> None:
    async def body(scene: Scene) -> None:
        await scene.server("a")
        await scene.host("h")
        victim = await scene.call.client("h/0", 1, "h", 1)
        await scene.call.table(spec())
        await scene.call.exit_of_slot("h", 1, "h/0", 1)
        status = await scene.call.status()
        (server,) = status.servers
        assert (server.node.ref.node, server.primaries, server.replicas) == ("a", 5, 5)
        assert server.silence_ms < 1000 * TIMEOUT
        assert [(h.name, h.state) for h in status.hosts] == [("h", pb.NODE_STATE_LIVE)]
        (client,) = status.clients
        assert (client.client_id, client.state, client.reason) == (
            victim, "evicted", "exit code 1 (exit report from host h)",
        )  # fmt: skip
        events = await scene.call.events()
        assert [e.id for e in events] == list(range(1, len(events) + 1))
        evicted = next(e for e in events if e.kind == "client_evicted")
        assert json.loads(evicted.evidence)["exit_code"] == 1
        following = await scene.call.events(after=evicted.id - 1)
        assert following[0].id == evicted.id
        # The eviction is still being confirmed: events may come between two calls.
        before, newest = await scene.call.events(), await scene.call.events(limit=2)
        assert len(newest) == 2
        assert newest[1].id == newest[0].id + 1
        assert newest[1].id >= before[-1].id
        assert await scene.call.events(after=2**64 - 1) == []

    play(body)


def test_health_is_served() -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async def body(scene: Scene) -> None:
        stub = health_pb2_grpc.HealthStub(scene.call.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    play(body)


def test_a_bug_leaves_as_an_id_and_not_as_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from paramesh_coordinator import membership

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret path /etc/shadow")

    monkeypatch.setattr(membership, "register_host", broken)

    async def body(scene: Scene) -> None:
        with pytest.raises(ParameshError) as caught:
            await scene.call.host("h", 1)
        assert caught.value.reason == "INTERNAL"
        assert "secret" not in str(caught.value)
        assert await scene.call.client("p", 1) == 1, "and the next decision is taken"

    play(body)


def test_most_nodes_gone_at_once_are_dead_in_the_end() -> None:
    """Nobody reports their exits; the one that is left is heard all the time (decision 0009)."""

    async def body(scene: Scene) -> None:
        await scene.server("a")
        gone = [(await scene.server(name))[1] for name in ("b", "c", "d")]
        await until(lambda: all(heart.answers > 3 for heart in gone), 5, "beats")
        for heart in gone:
            await heart.stop()

        async def dead() -> bool:
            states = {n.ref.node: n.state for n in (await scene.call.map()).nodes}
            return [name for name, state in states.items() if state == pb.NODE_STATE_DEAD] == ["b", "c", "d"]

        await until(dead, 30, "the three to be declared dead")

    play(body)
