"""Workers' small state, barriers and means, figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from paramesh.v1 import ledger_pb2 as lg
from paramesh_server import ledger_small
from paramesh_server.ledger import Wait

from tests.unit.ps.ledger_world import World, header
from tests.unit.ps.test_ledger_members import refused


def put(world: World, key: str, version: int, value: bytes, client: int = 1) -> int:
    request = lg.PutStateRequest(request=header(client), key=key, version=version, value=value)
    return world.do(lambda now: world.ledger.put_state(request, now)).version


def got(world: World, key: str) -> tuple[bool, int, bytes]:
    answer = world.do(lambda now: world.ledger.get_state(lg.GetStateRequest(key=key), now))
    return answer.found, answer.version, answer.value


@pytest.fixture
def world() -> World:
    world = World()
    world.join(1)
    return world


def test_state_is_kept_by_key_and_survives_its_worker(world: World) -> None:
    assert got(world, "scheduler") == (False, 0, b"")
    assert put(world, "scheduler", 3, b"x") == 3
    world.evict(1)
    assert got(world, "scheduler") == (True, 3, b"x")


def test_a_lower_version_never_replaces_a_higher(world: World) -> None:
    put(world, "k", 5, b"five")
    assert put(world, "k", 4, b"four") == 5
    assert got(world, "k") == (True, 5, b"five")
    assert put(world, "k", 6, b"") == 6
    assert got(world, "k") == (True, 6, b"")


def test_an_equal_version_replaces_and_a_repeat_is_no_record(world: World) -> None:
    put(world, "k", 0, b"a")
    lsn = world.ledger.lsn
    put(world, "k", 0, b"a")
    assert world.ledger.lsn == lsn
    put(world, "k", 0, b"b")
    assert got(world, "k") == (True, 0, b"b")


@pytest.mark.parametrize("key", ["", "a b", "x" * 257, "a/../b", "käse", "a\n", "a\0"])
def test_bad_keys_are_refused(world: World, key: str) -> None:
    with refused("NAME"):
        put(world, key, 1, b"")
    with refused("NAME"):
        got(world, key)


def test_a_value_is_at_most_4_mib(world: World) -> None:
    put(world, "k", 1, bytes(4 << 20))
    with refused("STATE_TOO_LARGE"):
        put(world, "k", 2, bytes((4 << 20) + 1))


def test_all_values_together_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_small, "STATE_TOTAL_BYTES", 10)
    put(world, "a", 1, bytes(6))
    with refused("QUOTA"):
        put(world, "b", 1, bytes(5))
    put(world, "a", 2, bytes(10))
    put(world, "a", 3, b"")
    put(world, "b", 1, bytes(10))


def test_evicted_and_nameless_clients_put_nothing(world: World) -> None:
    world.evict(2)
    with refused("EVICTED"):
        put(world, "k", 1, b"", client=2)
    with refused("MISSING_FIELD"):
        put(world, "k", 1, b"", client=0)


# ---------------------------------------------------------------------- barriers and means


def three() -> World:
    world = World()
    for client in (1, 2, 3):
        world.join(client)
    return world


def through(world: World, client: int, number: int, values: Sequence[float] = (), **fields: float) -> lg.GatherResponse:
    answer = world.gather(client, number, values, **fields)  # type: ignore[arg-type]
    assert isinstance(answer, lg.GatherResponse), f"waits for {answer.who()}"
    return answer


def test_a_barrier_waits_for_every_member() -> None:
    world = three()
    first = world.gather(2, 0)
    assert isinstance(first, Wait)
    assert first.who() == (0, 2)
    world.gather(1, 0)
    world.ledger.take_woken()
    assert through(world, 3, 0).count == 3
    assert first.key in world.ledger.take_woken()
    assert through(world, 2, 0).count == 3


def test_a_mean_is_weighted_by_position() -> None:
    world = three()
    world.gather(1, 0, [1.0, 10.0], weight=1)
    world.gather(2, 0, [2.0, 20.0], weight=3)
    answer = through(world, 3, 0, [5.0, 50.0], weight=0)
    assert list(answer.values) == [7 / 4, 70 / 4]
    assert list(through(world, 1, 0, [9.0, 9.0]).values) == [7 / 4, 70 / 4], "a round is over once"


def test_all_weights_zero_is_the_plain_mean() -> None:
    world = three()
    world.gather(1, 0, [1.0], weight=0)
    world.gather(2, 0, [2.0], weight=0)
    assert list(through(world, 3, 0, [6.0], weight=0).values) == [3.0]


def test_nan_is_a_number_here() -> None:
    world = World()
    world.join(1)
    assert math.isnan(through(world, 1, 0, [math.nan]).values[0])


@pytest.mark.parametrize("end", ["evict", "leave"])
def test_members_that_go_are_dropped_from_the_wait(end: str) -> None:
    world = three()
    world.gather(1, 0, [1.0])
    world.gather(3, 0, [9.0])
    getattr(world, end)(3)
    assert isinstance(world.gather(1, 0, [1.0]), Wait)
    getattr(world, end)(2)
    assert list(through(world, 1, 0, [1.0]).values) == [1.0], "its values go with it"


def test_rounds_follow_each_other_by_name() -> None:
    world = World()
    world.join(1)
    assert through(world, 1, 0).count == 1
    assert through(world, 1, 1).count == 1
    assert through(world, 1, 0, name="other").count == 1  # type: ignore[arg-type]
    with refused("STEP_OUT_OF_RANGE"):
        world.gather(1, 3)


def test_a_restarted_worker_passes_the_rounds_that_it_missed() -> None:
    world = World()
    world.join(1)
    world.join(2)
    for number in range(3):
        world.gather(1, number, [float(number)])
        through(world, 2, number, [float(number)])
    world.evict(2)
    world.join(3)
    assert [list(through(world, 3, number, [7.0]).values) for number in range(3)] == [[0.0], [1.0], [2.0]]
    waiting = world.gather(1, 3, [1.0])
    assert isinstance(waiting, Wait)
    assert waiting.who() == (1,), "it has caught up: it counts"
    assert list(through(world, 3, 3, [2.0]).values) == [1.5]


def test_a_joiner_that_is_not_at_it_holds_nobody_up() -> None:
    world = World()
    world.join(1)
    through(world, 1, 0)
    world.join(2)
    assert through(world, 1, 1).count == 1


def test_rounds_too_old_to_be_remembered_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_small, "GATHER_ROUNDS", 4)
    world = World()
    world.join(1)
    for number in range(6):
        through(world, 1, number, [1.0])
    assert through(world, 1, 0, [1.0]).count == 0
    assert through(world, 1, 2, [1.0]).count == 1


def test_means_wait_for_the_start() -> None:
    world = World(start_workers=2)
    world.join(1)
    answer = world.gather(1, 0)
    assert isinstance(answer, Wait)
    world.join(2)
    assert isinstance(world.gather(1, 0), Wait)
    assert through(world, 2, 0).count == 2


def test_other_values_are_refused() -> None:
    world = three()
    world.gather(1, 0, [1.0])
    with refused("SEQ_REUSED"):
        world.gather(1, 0, [2.0])
    with refused("SCHEMA"):
        world.gather(2, 0, [1.0, 2.0])
    with refused("WEIGHT"):
        world.gather(2, 0, [1.0], weight=-1)
    with refused("NAME"):
        world.gather(2, 0, [1.0], name="a b")
    with refused("NOT_MEMBER"):
        world.gather(9, 0, [1.0])


# ---------------------------------------------------------------------- figures


def report(world: World, client: int, **figures: float) -> None:
    parts = [lg.Figure(name=name, value=value) for name, value in figures.items()]
    request = lg.ReportRequest(request=header(client), figures=parts)
    world.do(lambda now: world.ledger.report(request, now))


def test_figures_are_the_latest_averaged_over_members() -> None:
    world = three()
    report(world, 1, loss=9.0)
    report(world, 1, loss=1.0, accuracy=0.5)
    report(world, 2, loss=3.0)
    report(world, 3, loss=100.0)
    world.evict(3)
    assert {f.name: f.value for f in world.status().figures} == {"loss": 2.0, "accuracy": 0.5}


def test_figures_are_bounded_and_named() -> None:
    world = three()
    with refused("QUOTA"):
        report(world, 1, **{f"f{i}": 1.0 for i in range(300)})
    with refused("NAME"):
        report(world, 1, **{"a b": 1.0})
    assert not world.status().figures
