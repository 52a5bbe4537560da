"""Decisions of the coordinator's brain: events in, rows and effects out."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh.errors import ParameshError
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator import catalog, membership, rows, state
from paramesh_coordinator.rows import ClientState, NodeState, PartitionState, Ref, Stage
from paramesh_coordinator.state import Draft, Ended, NodeKey, Registered, build_map

from tests.unit.coordinator.world import LIMITS, World, pending, table_spec


def reason_of(call: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(ParameshError) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    return caught.value.reason


def silent(world: World, node: NodeKey, silence: float = 2.1) -> None:
    world.do(lambda d: membership.silent(d, node, silence, 2.0))


def exit_of(world: World, name: str, incarnation: int = 1, code: int = -9) -> None:
    world.do(lambda d: membership.exit_of_server(d, Ref(name, incarnation), code))


# --- legal moves ---

ENUMS = [rows.NodeState, rows.ClientState, rows.PartitionState, rows.Stage]


@pytest.mark.parametrize("enum", ENUMS)
def test_every_state_has_a_row_of_legal_moves(enum: type) -> None:
    for old in enum:
        for new in enum:
            if new in rows._MOVES[enum][old]:
                assert rows.moved(old, new) is new
            else:
                with pytest.raises(ValueError, match="illegal move"):
                    rows.moved(old, new)


def test_moves_between_enums_are_illegal() -> None:
    with pytest.raises(ValueError, match="illegal move"):
        rows.moved(NodeState.LIVE, ClientState.LEFT)  # type: ignore[type-var]


# --- servers ---


def test_the_first_server_gets_the_ledger() -> None:
    world = World()
    world.server("a")
    (ledger,) = world.partitions()
    assert (ledger.partition, ledger.server, ledger.epoch, ledger.state) == (0, "a", 1, PartitionState.ONLINE)
    assert world.effects == [Registered(NodeKey("server", "a", 1))]


def test_the_ledger_waits_for_min_servers_and_so_do_tables() -> None:
    world = World(min_servers=2)
    world.server("a")
    assert world.partitions() == []
    assert reason_of(world.table) == "NOT_READY"
    world.server("b")
    world.table(table_spec(elements=2048))
    held = [row.server for row in world.partitions()]
    assert held[0] == "a"
    assert abs(held.count("a") - held.count("b")) <= 1


def test_a_repeated_registration_changes_nothing() -> None:
    world = World()
    world.server("a")
    version = world.state.job.map_version
    world.server("a")
    assert world.state.job.map_version == version
    assert world.effects == [Registered(NodeKey("server", "a", 1))]


def test_a_live_process_keeps_its_name() -> None:
    world = World()
    world.server("a", 1)
    assert reason_of(world.server, "a", 2) == "NODE_NAME"
    assert list(world.servers()) == [Ref("a", 1)]


@pytest.mark.parametrize("how", [{"replace": True}, {"gone": True}])
def test_a_new_incarnation_is_positive_death_of_the_old(how: dict[str, bool]) -> None:
    world = World()
    world.server("a", 1)
    world.table()
    world.server("a", 2, **how)
    old = world.servers()[Ref("a", 1)]
    assert (old.state, old.certain) == (NodeState.DEAD, True)
    assert "replaced by incarnation 2" in old.reason
    assert {row.state for row in world.partitions()} == {PartitionState.OFFLINE}
    assert Ended(NodeKey("server", "a", 1)) in world.effects


def test_a_successor_buries_one_that_fell_silent() -> None:
    world = World()
    world.server("a", 1)
    silent(world, NodeKey("server", "a", 1))
    world.server("a", 2)
    assert world.servers()[Ref("a", 1)].certain
    assert reason_of(world.server, "a", 1) == "INCARNATION"


def test_predecessors_that_held_nothing_are_forgotten() -> None:
    world = World()
    world.server("a", 1)
    for incarnation in range(2, 6):
        world.server("b", incarnation, replace=True)
    assert set(world.servers()) == {Ref("a", 1), Ref("b", 5)}


@pytest.mark.parametrize(
    ("name", "incarnation", "reason"),
    [
        ("", 1, "NAME"),
        ("a b", 1, "NAME"),
        ("../a", 1, "NAME"),
        ("a" * 257, 1, "NAME"),
        ("a\n", 1, "NAME"),
        ("a\0", 1, "NAME"),
        ("a", 0, "INCARNATION"),
    ],
)
def test_bad_identities_are_refused(name: str, incarnation: int, reason: str) -> None:
    world = World()
    assert reason_of(world.server, name, incarnation) == reason
    assert reason_of(world.host, name, incarnation) == reason
    assert reason_of(world.client, name, incarnation) == reason
    assert world.state.job.map_version == 0


@pytest.mark.parametrize("end", ["exit", "silence", "goodbye"])
def test_a_lost_server_takes_its_partitions_offline_and_says_why(end: str) -> None:
    world = World()
    world.server("a")
    world.server("b")
    world.table(table_spec(elements=2048))
    version = world.state.job.map_version
    if end == "exit":
        exit_of(world, "a")
    elif end == "silence":
        silent(world, NodeKey("server", "a", 1))
    else:
        world.do(lambda d: membership.server_left(d, Ref("a", 1)))
    assert world.state.job.map_version == version + 1
    for row in world.partitions():
        assert row.state is (PartitionState.OFFLINE if row.server == "a" else PartitionState.ONLINE)
        assert row.epoch == 1
    shown = build_map(world.state, 1)
    node = next(n for n in shown.nodes if n.ref.node == "a")
    assert node.state == (pb.NODE_STATE_LEFT if end == "goodbye" else pb.NODE_STATE_DEAD)
    assert (
        node.reason
        == {
            "exit": "process ended: SIGKILL",
            "silence": "silent for 2.1 s",
            "goodbye": "shut down",
        }[end]
    )
    assert world.effects == [Ended(NodeKey("server", "a", 1))]
    event, told = world.events()[-2:]
    lost = [row.partition for row in world.partitions() if row.state is PartitionState.OFFLINE]
    assert json.loads(event.evidence)["offline"] == lost
    assert (told.kind, json.loads(told.evidence)["partitions"]) == ("partition_offline", lost)
    remedy = "is heard again" if end == "silence" else "last checkpoint"
    assert remedy in json.loads(told.evidence)["remedy"]


def test_death_is_declared_once() -> None:
    world = World()
    world.server("a")
    exit_of(world, "a")
    events = len(world.events())
    exit_of(world, "a", code=1)
    silent(world, NodeKey("server", "a", 1))
    assert len(world.events()) == events
    assert world.servers()[Ref("a", 1)].reason == "process ended: SIGKILL"


def test_one_that_was_only_silent_comes_back_under_a_new_epoch() -> None:
    world = World()
    world.server("a")
    world.table()
    silent(world, NodeKey("server", "a", 1))
    world.server("a")
    assert {(row.state, row.epoch) for row in world.partitions()} == {(PartitionState.ONLINE, 2)}
    assert world.effects == [Registered(NodeKey("server", "a", 1))]


def test_one_that_certainly_ended_never_comes_back() -> None:
    world = World()
    world.server("a")
    silent(world, NodeKey("server", "a", 1))
    exit_of(world, "a")
    assert reason_of(world.server, "a") == "INCARNATION"
    assert {row.state for row in world.partitions()} == {PartitionState.OFFLINE}


def test_reports_on_strangers_change_nothing() -> None:
    world = World()
    world.server("a")
    before = world.state.job
    exit_of(world, "b")
    exit_of(world, "a", incarnation=2)
    world.do(lambda d: membership.server_left(d, Ref("x", 1)))
    world.do(lambda d: membership.client_left(d, 77))
    world.do(lambda d: membership.exit_of_slot(d, Ref("h", 1), "h/0", -9))
    silent(world, NodeKey.client(5))
    assert world.state.job == before


# --- hosts and clients ---


def test_ids_are_never_given_twice() -> None:
    world = World()
    world.host("h")
    ids = [world.client(f"h/{n}", n + 1, "h") for n in range(5)]
    world.restart()
    ids += [world.client(f"h/{n}", n + 100, "h") for n in range(5)]
    assert ids == list(range(1, 11))


def test_registering_again_gives_the_same_id() -> None:
    world = World()
    assert world.client("p/0", 7) == world.client("p/0", 7) == 1
    assert world.client("p/0", 8) == 2, "an unsupervised process may have several clients"
    assert world.client_row(1).state is ClientState.LIVE


def test_a_slot_that_registers_anew_evicts_its_older_client() -> None:
    world = World()
    world.server("a")
    world.host("h")
    world.host("g")
    first, other = world.client("h/0", 1, "h"), world.client("g/0", 1, "g")
    tool = world.client("h/0", 2, "h", role="tool")
    second = world.client("h/0", 3, "h")
    assert world.client_row(first).state is ClientState.EVICTED
    assert "registered anew" in world.client_row(first).reason
    assert {world.client_row(c).state for c in (second, other, tool)} == {ClientState.LIVE}
    assert [(op.stage, op.clients) for op in pending(world)] == [(Stage.EVICT, (first,))]
    assert reason_of(world.client, "h/0", 1, "h") == "EVICTED"


@pytest.mark.parametrize("host", ["nobody", "h"])
def test_a_client_names_a_live_supervisor(host: str) -> None:
    world = World()
    world.host("h", 5)
    assert reason_of(world.client, "h/0", 1, host, 4) == "UNKNOWN_NODE"


@pytest.mark.parametrize(
    ("code", "text"), [(-9, "SIGKILL"), (1, "exit code 1"), (0, "exit code 0"), (-99, "signal 99")]
)
def test_an_exit_report_evicts_the_slots_client_at_once(code: int, text: str) -> None:
    world = World()
    world.server("a")
    world.host("h")
    victim, other = world.client("h/0", 1, "h"), world.client("h/1", 2, "h")
    world.do(lambda d: membership.exit_of_slot(d, Ref("h", 1), "h/0", code))
    assert world.client_row(victim).state is ClientState.EVICTED
    assert world.client_row(victim).reason == f"{text} (exit report from host h)"
    assert world.client_row(other).state is ClientState.LIVE


def test_an_exit_after_a_goodbye_is_nothing() -> None:
    world = World()
    world.server("a")
    world.host("h")
    client = world.client("h/0", 1, "h")
    world.do(lambda d: membership.client_left(d, client))
    world.do(lambda d: membership.exit_of_slot(d, Ref("h", 1), "h/0", 0))
    assert world.client_row(client).state is ClientState.LEFT
    calls = world.confirm_everything()
    assert [call.stage for call in calls] == [Stage.FENCE], "leaving needs no EVICT"


def test_an_exit_report_of_an_earlier_supervisor_does_not_hit_the_later_ones_client() -> None:
    world = World()
    world.host("h", 1)
    world.host("h", 2, replace=True)
    client = world.client("h/0", 1, "h", 2)
    world.do(lambda d: membership.exit_of_slot(d, Ref("h", 1), "h/0", -9))
    assert world.client_row(client).state is ClientState.LIVE


@pytest.mark.parametrize("end", ["silence", "exit", "replaced", "goodbye"])
def test_clients_die_with_their_host(end: str) -> None:
    world = World()
    world.server("a")
    world.host("h")
    world.host("g")
    mine = [world.client(f"h/{n}", n + 1, "h") for n in range(2)]
    other, alone = world.client("g/0", 1, "g"), world.client("pid", 1)
    if end == "silence":
        silent(world, NodeKey("host", "h", 1))
    elif end == "exit":
        world.do(lambda d: membership.exit_of_host(d, Ref("h", 1), -9))
    elif end == "replaced":
        world.host("h", 2, replace=True)
    else:
        world.do(lambda d: membership.host_left(d, Ref("h", 1)))
    assert {world.client_row(c).state for c in mine} == {ClientState.EVICTED}
    assert all(world.client_row(c).reason.startswith("host h: ") for c in mine)
    assert {world.client_row(c).state for c in (other, alone)} == {ClientState.LIVE}
    assert sorted(op.clients[0] for op in pending(world)) == mine


def test_a_silent_host_that_speaks_again_is_live_but_its_clients_stay_evicted() -> None:
    world = World()
    world.host("h")
    client = world.client("h/0", 1, "h")
    silent(world, NodeKey("host", "h", 1))
    world.host("h")
    assert world.effects == [Registered(NodeKey("host", "h", 1))]
    assert world.client_row(client).state is ClientState.EVICTED
    assert world.client("h/0", 2, "h") == client + 1


def test_a_live_supervisor_keeps_its_name() -> None:
    world = World()
    world.host("h", 1)
    assert reason_of(world.host, "h", 2) == "NODE_NAME"


def test_only_lone_clients_are_watched() -> None:
    world = World()
    world.host("h")
    world.client("h/0", 1, "h")
    assert world.effects == []
    lone = world.client("pid", 1)
    assert world.effects == [Registered(NodeKey.client(lone))]
    silent(world, NodeKey.client(lone), 10.5)
    assert world.effects == [Ended(NodeKey.client(lone))]
    assert world.client_row(lone).reason == "silent for 10.5 s"
    assert world.state.beating() == [NodeKey("host", "h", 1)]


def test_closed_clients_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "KEPT_CLIENTS", 3)
    world = World()
    for n in range(8):
        client = world.client(f"p/{n}", n + 1)
        world.do(lambda d, c=client: membership.client_left(d, c))
    kept = world.client("live", 1)
    assert sorted(c.client_id for c in world.state.rows(rows.ClientRow).values()) == [6, 7, 8, kept]


# --- tables ---


def test_partition_ids_are_contiguous_and_in_order() -> None:
    world = World()
    world.server("a")
    one, two = world.table(table_spec("one", 1024)), world.table(table_spec("two", 512))
    assert (one.table_id, one.first_partition, one.partition_count) == (1, 1, 4)
    assert (two.table_id, two.first_partition, two.partition_count) == (2, 5, 2)
    assert [(p.partition, p.table_id, p.index) for p in world.partitions()[1:]] == [
        (1, 1, 0), (2, 1, 1), (3, 1, 2), (4, 1, 3), (5, 2, 0), (6, 2, 1),
    ]  # fmt: skip


def test_creating_a_table_again_gives_the_same_one() -> None:
    world = World()
    world.server("a")
    first = world.table()
    version = world.state.job.map_version
    assert world.table() == first
    assert world.state.job.map_version == version
    exit_of(world, "a")
    assert world.table() == first, "also when its servers are gone"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.tensors[0].shape.append(2), r"w \[1000\] there, w \[1000, 2\] here"),
        (lambda s: s.tensors.add(name="b", shape=[2], dtype=pb.DTYPE_FLOAT32), "1 tensors there, 2 here"),
        (lambda s: setattr(s.optimizer, "class_name", "Adam"), "optimizer SGD there, Adam here"),
        (lambda s: setattr(s, "group", "g1"), "group or partition_bytes differ"),
    ],
)
def test_another_schema_under_the_same_name_is_refused(change: object, text: str) -> None:
    world = World()
    world.server("a")
    world.table()
    other = table_spec()
    change(other)  # type: ignore[operator]
    before = world.state.job
    with pytest.raises(ParameshError, match=text) as caught:
        world.table(other)
    assert caught.value.reason == "SCHEMA"
    assert world.state.job == before


def test_a_table_needs_a_live_server() -> None:
    world = World()
    assert reason_of(world.table) == "NOT_READY"
    world.server("a")
    exit_of(world, "a")
    assert reason_of(world.table) == "NOT_READY"
    world.server("b")
    world.table()
    assert {p.server for p in world.partitions() if p.table_id} == {"b"}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        # Row 47: 10^12 rows x 10^6 columns.
        (pb.TensorSpec(name="w", shape=[10**12, 10**6], dtype=pb.DTYPE_FLOAT32), "QUOTA"),
        # Row 8: the product overflows.
        (pb.TensorSpec(name="w", shape=[2**63 - 1, 2**63 - 1], dtype=pb.DTYPE_FLOAT32), "SHAPE"),
        (pb.TensorSpec(name="w", shape=[-1], dtype=pb.DTYPE_FLOAT32), "SHAPE"),
        (pb.TensorSpec(name="w", shape=[0], dtype=pb.DTYPE_FLOAT32), "SHAPE"),
        (pb.TensorSpec(name="w", shape=[3]), "DTYPE"),
        (pb.TensorSpec(name="w", shape=[3], dtype=99), "DTYPE"),  # type: ignore[arg-type]
        (pb.TensorSpec(name="a\0b", shape=[3], dtype=pb.DTYPE_FLOAT32), "NAME"),
    ],
)
def test_absurd_tables_are_refused_before_anything_is_allocated(spec: pb.TensorSpec, reason: str) -> None:
    world = World()
    world.server("a")
    whole = table_spec()
    del whole.tensors[:]
    whole.tensors.append(spec)
    before = world.state.job
    assert reason_of(world.table, whole) == reason
    assert world.state.job == before


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (catalog.Limits(3999, 100), "4000 bytes of values, more than max_table_bytes"),
        (catalog.Limits(10_000, 3), "would have 4 partitions"),
        (catalog.Limits(10_000, 4), "the job would have 5 partitions"),
    ],
)
def test_quotas_of_the_job(limits: catalog.Limits, text: str) -> None:
    world = World()
    world.server("a")
    with pytest.raises(ParameshError, match=text) as caught:
        world.table(limits=limits)
    assert caught.value.reason == "QUOTA"
    world.table(limits=LIMITS)


def test_an_absurd_number_of_replicas_is_refused() -> None:
    spec = table_spec()
    spec.replicas = 8
    assert reason_of(World().table, spec) == "QUOTA"


# --- memory, store, audit ---


def test_a_refused_decision_leaves_no_trace() -> None:
    world = World()
    world.server("a")
    before, rows_before = world.state.job, world.store.scan("")
    assert reason_of(world.server, "a", 2) == "NODE_NAME"
    assert (world.state.job, world.store.scan("")) == (before, rows_before)


def test_rows_survive_the_store_whatever_they_hold() -> None:
    world = World()
    world.server("a/b.c-d", 2**64 - 1)
    world.host("h", 2**64 - 1)
    world.client("h/0", 2**64 - 1, "h", 2**64 - 1)
    world.restart()
    (server,) = world.servers().values()
    assert (server.incarnation, server.fingerprint, server.state) == (2**64 - 1, b"\x01\xff", NodeState.LIVE)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"name": 1}', b'{"nobody": "knows"}'])
def test_a_damaged_row_is_named(data: bytes) -> None:
    with pytest.raises(ValueError, match="server/a/1"):
        rows.decode("server/a/1", data)
    with pytest.raises(ValueError, match="unknown key 'elsewhere'"):
        rows.decode("elsewhere", data)


def test_audit_lines_are_bounded_and_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "KEPT_EVENTS", 5)
    world = World()
    for n in range(9):
        world.do(lambda d, n=n: d.audit("tested", str(n), number=n))
    assert [event.event for event in world.events()] == [5, 6, 7, 8, 9]
    assert world.events()[-1].subject == "8"


def test_a_draft_reads_its_own_writes() -> None:
    world = World()
    world.server("a")
    draft = Draft(world.state, 1, 0)
    (row,) = draft.rows(rows.ServerRow)
    draft.delete(row)
    assert draft.rows(rows.ServerRow) == []
    assert world.state.live_servers() == [row], "and nothing is known before it is committed"


def test_one_decision_is_one_version() -> None:
    world = World()
    world.server("a")
    world.table(table_spec(elements=4096))
    version = world.state.job.map_version
    exit_of(world, "a")
    assert world.state.job.map_version == version + 1


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_random_histories_keep_the_invariants(rng: random.Random, min_servers: int) -> None:
    """`World.do` checks 4, 22 and that the store tells the same story, after every decision."""
    _random_history(World(min_servers), rng)


REFUSALS = {"NODE_NAME", "INCARNATION", "UNKNOWN_NODE", "EVICTED", "NOT_READY", "SCHEMA"}
"""What a random event may be refused with."""


def _random_history(world: World, rng: random.Random) -> None:
    for _ in range(40):
        try:
            _random_event(world, rng)
        except ParameshError as error:
            if error.reason not in REFUSALS:
                raise


def _random_event(world: World, rng: random.Random) -> None:
    name, incarnation = rng.choice("abc"), rng.randint(1, 4)
    host, slot = rng.choice("hg"), f"{rng.choice('hg')}/{rng.randint(0, 1)}"
    events = [
        lambda: world.server(name, incarnation, replace=rng.random() < 0.5),
        lambda: silent(world, NodeKey("server", name, incarnation)),
        lambda: exit_of(world, name, incarnation),
        lambda: world.do(lambda d: membership.server_left(d, Ref(name, incarnation))),
        lambda: world.host(host, incarnation, replace=rng.random() < 0.5),
        lambda: silent(world, NodeKey("host", host, incarnation)),
        lambda: world.do(lambda d: membership.host_left(d, Ref(host, incarnation))),
        lambda: world.client(slot, rng.randint(1, 99), rng.choice(["", host]), incarnation),
        lambda: world.do(lambda d: membership.exit_of_slot(d, Ref(host, incarnation), slot, -9)),
        lambda: silent(world, NodeKey.client(rng.randint(1, 9))),
        lambda: world.table(table_spec(f"t{rng.randint(0, 3)}", rng.choice([512, 1024]))),
        world.confirm_everything,
        world.restart,
    ]
    rng.choice(events)()
