"""What psctl draws, from the dictionaries that `inspection` gives."""

from __future__ import annotations

from typing import Any

import pytest
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator import display, inspection
from rich.console import RenderableType


def text(drawn: RenderableType) -> str:
    console = display.make_console(160)
    with console.capture() as capture:
        console.print(drawn)
    return capture.get()


def ledger_answer() -> lg.LedgerStatusResponse:
    return lg.LedgerStatusResponse(
        members=[
            lg.Member(client_id=7, rank=1, slot="h/1", activity=lg.ACTIVITY_IDLE, clock=4, samples=640),
            lg.Member(client_id=5, rank=0, slot="h/0", activity=lg.ACTIVITY_ACTIVE, clock=5, samples=700),
        ],
        groups=[
            lg.GroupStatus(name="net", mode=lg.MODE_SYNC, next_step=12, waiting_for=[1], skipped_steps=3),
            lg.GroupStatus(name="emb", mode=lg.MODE_SSP, min_clock=4, max_clock=6, widest_gap=2, staleness=3),
        ],
        epochs=[lg.EpochStatus(dataset="train", epoch=2, length=1000, consumed=640)],
        figures=[lg.Figure(name="loss", value=0.25), lg.Figure(name="gap", value=float("nan"))],
        evictions=1,
        phase="training",
    )


def clients() -> list[co.ClientStatus]:
    return [
        co.ClientStatus(client_id=3, slot="h/0", role="worker", state="evicted", reason="SIGKILL"),
        co.ClientStatus(client_id=5, slot="h/0", role="worker", state="live"),
        co.ClientStatus(client_id=7, slot="h/1", role="worker", state="live"),
    ]


def status(**change: Any) -> dict[str, Any]:
    server = {
        "name": "server-0", "state": "live", "reason": "", "address": "127.0.0.1:9", "silence_s": 0.31,
        "partitions": 3, "online": 2, "value_bytes": 3 << 20, "bytes_in": 1 << 30, "bytes_out": 0,
    }  # fmt: skip
    lost = server | {"name": "server-1", "state": "dead", "reason": "process ended: SIGKILL"}
    page = {
        "job": "default", "coordinator": "127.0.0.1:7070", "term": 2, "map_version": 9, "generation": 1,
        "uptime_s": 61.2, "partitions": {"online": 4, "degraded": 2, "offline": 1},
        "servers": [server, lost], "ledger": inspection._ledger(ledger_answer()), "tables": [],
        "workers": inspection._workers(clients(), ledger_answer()),
        "pending": ["fence client 3 at every server: SIGKILL"],
    }  # fmt: skip
    return page | change


def test_the_page_has_it_all() -> None:
    drawn = text(display.draw_status(status()))
    for words in (
        "term 2", "map 9", "server-0  live", "3.0 MiB", "1.0 GiB", "0.3 s", "process ended: SIGKILL",
        "training  2 members  1 evicted  gap nan  loss 0.25", "epoch 2 of train: 640 of 1000 samples",
        "fence client 3 at every server", "partitions 4 online, 2 degraded, 1 offline",
    ):  # fmt: skip
        assert words in drawn, (words, drawn)
    lines = [" ".join(line.split()) for line in drawn.splitlines()]
    assert "net sync 12 - - 3 1" in lines
    assert "emb ssp - 4..6 2 (bound 3) - -" in lines


def test_a_ledger_that_does_not_answer_hides_nothing_else() -> None:
    drawn = text(display.draw_status(status(ledger={"error": "server 'server-0' is lost"})))
    assert "server 'server-0' is lost" in drawn
    assert "server-1" in drawn


def test_an_empty_cluster_says_what_comes_next() -> None:
    drawn = text(display.draw_status(status(servers=[], workers=[], pending=[], partitions={})))
    assert "start ps-server" in drawn
    assert "start ps-worker" in drawn
    assert "first worker" in text(display.draw_tables([]))


def test_workers_join_clients_and_members_in_rank_order() -> None:
    rows = inspection._workers(clients(), ledger_answer())
    assert [(r["client_id"], r["rank"], r["activity"]) for r in rows] == [
        (5, 0, "active"),
        (7, 1, "idle"),
        (3, None, None),
    ]
    assert rows[2]["reason"] == "SIGKILL"


def test_a_member_that_the_coordinator_forgot_is_still_shown() -> None:
    rows = inspection._workers([], ledger_answer())
    assert [(r["client_id"], r["state"]) for r in rows] == [(5, "unknown"), (7, "unknown")]


def test_without_a_ledger_workers_have_no_rank() -> None:
    assert [r["rank"] for r in inspection._workers(clients(), "lost")] == [None, None, None]


def test_only_the_newest_of_the_gone_are_drawn() -> None:
    gone = [co.ClientStatus(client_id=n, slot=f"h/{n}", state="left") for n in range(1, 31)]
    drawn = text(display.draw_workers(inspection._workers(gone, "lost")))
    assert "and 20 more that are over" in drawn
    assert "h/30" in drawn
    assert "h/20 " not in drawn


def test_partitions_show_who_has_them() -> None:
    a, b, c = (pb.ReplicaRef(node=name, incarnation=0xAB) for name in "abc")
    row = pb.Partition(
        id=3, table_id=1, index=2, epoch=4, primary=a, isr=[a, b], learners=[c], version=17,
        state=pb.PARTITION_STATE_DEGRADED,
    )  # fmt: skip
    shown = inspection._partition(row, "net")
    assert (shown["in_sync"][1], shown["version"]) == ({"name": "b", "incarnation": "ab"}, 17)
    lines = [" ".join(line.split()) for line in text(display.draw_partitions([shown])).splitlines()]
    assert lines[-1] == "3 net 2 degraded 4 a a, b c"
    assert "enough servers" in text(display.draw_partitions([]))


def test_an_event_is_one_line() -> None:
    event = {"id": 5, "wall_time_ms": 0, "kind": "client_evicted", "subject": "h/0", "evidence": {"why": "SIGKILL"}}
    line = display.draw_event(event).plain
    assert line.startswith("     5 19")
    assert line.endswith('client_evicted h/0  why="SIGKILL"')


@pytest.mark.parametrize(
    ("text", "evidence"),
    [('{"why": "x"}', {"why": "x"}), ("not JSON", {"evidence": "not JSON"}), ("[1]", {"evidence": [1]})],
)
def test_evidence_is_an_object_whatever_came(text: str, evidence: dict[str, Any]) -> None:
    assert inspection._evidence(text) == evidence


def test_markup_in_names_is_not_obeyed() -> None:
    """Names may hold what rich takes for markup; nothing a worker sends may style or break the page."""
    row = inspection._workers([co.ClientStatus(client_id=1, slot="h/[red]0", state="live", reason="[/]")], "lost")
    drawn = text(display.draw_workers(row))
    assert "h/[red]0" in drawn
    assert "[/]" in drawn
