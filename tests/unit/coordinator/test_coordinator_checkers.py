"""Silence: when it counts, and when it is our own fault. Time is a number here."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh_coordinator.checkers import DOUBT_TIMEOUTS, FRESH_BEATS, Liveness
from paramesh_coordinator.state import NodeKey

BEAT, TIMEOUT, CLIENT_TIMEOUT, TICK = 0.5, 2.0, 10.0, 0.1
A, B, C = (NodeKey("server", name, 1) for name in "abc")
LONE = NodeKey.client(7)


class Clock:
    """Drives a Liveness: nodes beat every BEAT and echo, ticks come every TICK."""

    def __init__(
        self, nodes: Iterable[NodeKey], first_nonce: int = 1000, remote: Iterable[NodeKey] | None = None
    ) -> None:
        """`remote`: who is on another machine than the coordinator; None: everybody."""
        self.now = 0.0
        self.remote = set(nodes if remote is None else remote)
        self.liveness = Liveness(BEAT, TIMEOUT, CLIENT_TIMEOUT, 0.0, first_nonce)
        self.echo: dict[NodeKey, int] = {}
        self.dead: dict[NodeKey, float] = {}
        self.graces: list[str] = []
        self._next: dict[NodeKey, float] = {}
        for node in nodes:
            self._watch(node)

    def _watch(self, node: NodeKey) -> None:
        self.liveness.track(node, self.now)
        self.echo[node], self._next[node] = 0, self.now

    def add(self, node: NodeKey) -> None:
        """A remote node registers now."""
        self.remote.add(node)
        self._watch(node)

    def run(self, until: float, silent: Iterable[NodeKey] = (), deaf: Iterable[NodeKey] = ()) -> None:
        """Let time pass. `silent` do not beat; `deaf` beat but get no answer (a one-way cut)."""
        while self.now < until:
            self.now = round(self.now + TICK, 6)
            for node, due in self._next.items():
                if node in silent or due > self.now:
                    continue
                self._next[node] = self.now + BEAT
                nonce = self.liveness.beat(node, self.echo[node], self.now, remote=node in self.remote)
                if nonce is not None and node not in deaf:
                    self.echo[node] = nonce
            self.tick()

    def tick(self) -> None:
        verdict = self.liveness.tick(self.now)
        if verdict.grace:
            self.graces.append(verdict.grace)
        for silent in verdict.dead:
            self.dead.setdefault(silent.node, self.now)
            self.liveness.forget(silent.node)


def test_who_beats_lives() -> None:
    clock = Clock([A, B, C])
    clock.run(60)
    assert clock.dead == {}
    assert clock.graces == []


def test_who_falls_silent_is_dead_after_the_timeout_and_not_before() -> None:
    clock = Clock([A, B, C])
    clock.run(10)
    clock.run(20, silent=[C])
    assert list(clock.dead) == [C]
    assert 10 + TIMEOUT - BEAT < clock.dead[C] <= 10 + TIMEOUT + 2 * TICK


def test_one_that_never_beats_has_the_timeout_from_its_registration() -> None:
    clock = Clock([A, B])
    clock.run(5)
    clock.liveness.track(C, clock.now)
    clock.run(10)
    assert TIMEOUT < clock.dead[C] - 5 <= TIMEOUT + 2 * TICK


def test_a_repeated_registration_is_a_sign_of_life() -> None:
    clock = Clock([A, B, C])
    for second in range(1, 11):
        clock.run(second, silent=[C])
        clock.liveness.track(C, clock.now)
    assert clock.dead == {}


def test_a_one_way_cut_is_silence_although_beats_arrive() -> None:
    clock = Clock([A, B, C])
    clock.run(10)
    clock.run(20, deaf=[C])
    assert list(clock.dead) == [C]


def test_a_made_up_echo_is_no_echo() -> None:
    clock = Clock([A, B, C])
    clock.run(1)
    for step in range(40):
        clock.echo[C] = 10**15 + step
        clock.run(clock.now + TICK, deaf=[C])
    assert list(clock.dead) == [C]


def test_an_echo_of_an_earlier_coordinator_is_no_echo() -> None:
    clock = Clock([A, B, C], first_nonce=5000)
    for echo in range(1, 5000, 125):
        clock.echo[C] = echo
        clock.run(clock.now + TICK, deaf=[C])
    assert list(clock.dead) == [C]


def test_slow_answers_are_no_silence() -> None:
    """A machine under load answers a beat only after the next was sent: the echo lags by two."""
    liveness = Liveness(BEAT, TIMEOUT, CLIENT_TIMEOUT, 0.0, 1)
    for node in (A, B):
        liveness.track(node, 0.0)
    answers = {A: [0, 0], B: [0, 0]}
    for step in range(1, 200):
        now = step * TICK
        for node, got in answers.items():
            if step % 5 == 0:
                nonce = liveness.beat(node, got[-2], now)
                assert nonce is not None
                got.append(nonce)
        assert liveness.tick(now).dead == ()


def test_an_unknown_node_gets_no_nonce() -> None:
    liveness = Liveness(BEAT, TIMEOUT, CLIENT_TIMEOUT, 0.0, 1)
    assert liveness.beat(A, 0, 0.0) is None
    liveness.track(A, 0.0)
    assert liveness.beat(A, 0, 0.1) is not None
    liveness.forget(A)
    assert liveness.beat(A, 0, 0.2) is None
    assert liveness.silence(A, 5.0) == 0.0


def test_a_client_on_its_own_has_ten_seconds() -> None:
    clock = Clock([A, B, LONE])
    clock.run(10)
    clock.run(10 + CLIENT_TIMEOUT - BEAT, silent=[LONE])
    assert clock.dead == {}
    clock.run(30, silent=[LONE])
    assert list(clock.dead) == [LONE]


def test_a_paused_coordinator_declares_nobody_dead() -> None:
    """SIGSTOP for a minute, SIGCONT: the first tick is late, and the beats of the minute are lost."""
    clock = Clock([A, B, C])
    clock.run(10)
    clock.now += 60
    clock.tick()
    assert "own tick" in clock.graces[-1]
    clock.run(clock.now + 30)
    assert clock.dead == {}


def test_after_a_pause_the_dead_get_one_timeout_of_grace() -> None:
    clock = Clock([A, B, C])
    clock.run(10)
    clock.now += 60
    woke = clock.now
    clock.tick()
    clock.run(woke + 10, silent=[C])
    assert list(clock.dead) == [C]
    assert TIMEOUT < clock.dead[C] - woke <= TIMEOUT + 2 * TICK


@pytest.mark.parametrize("silent", [[B, C], [A, B, C]])
def test_a_coordinator_that_is_cut_off_declares_nobody_dead(silent: list[NodeKey]) -> None:
    """A is on its own machine: hearing it says nothing about the network."""
    clock = Clock([A, B, C], remote=[B, C])
    clock.run(10)
    clock.run(70, silent=silent)
    assert clock.dead == {}
    assert f"only {3 - len(silent)} of 3" in clock.graces[-1]
    clock.run(130)
    assert clock.dead == {}


FOREVER = 600.0
BOUND = (DOUBT_TIMEOUTS + 1) * TIMEOUT + FRESH_BEATS * BEAT + 2 * TICK
"""Seconds after which more than half of the nodes are dead, if somebody testifies that we are not cut off."""


def test_when_more_than_half_are_gone_at_once_they_are_dead_in_the_end() -> None:
    """A rack loses power: nobody reports their exits, and A, on a third machine, is heard all the time."""
    clock = Clock([A, B, C])
    clock.run(10)
    clock.run(FOREVER, silent=[B, C])
    assert set(clock.dead) == {B, C}
    assert all(10 + DOUBT_TIMEOUTS * TIMEOUT < at <= 10 + BOUND for at in clock.dead.values())


def test_on_one_machine_there_is_no_network_to_be_cut_off_from() -> None:
    clock = Clock([A, B, C], remote=[])
    clock.run(10)
    clock.run(FOREVER, silent=[B, C])
    assert set(clock.dead) == {B, C}


def test_tools_that_were_killed_do_not_keep_a_dead_server_alive() -> None:
    tools = [NodeKey.client(number) for number in range(20)]
    clock = Clock([A, B, *tools])
    clock.run(10)
    clock.run(FOREVER, silent=[B, *tools])
    assert set(clock.dead) == {B, *tools}


def test_a_witness_must_be_heard_all_the_time() -> None:
    """One that comes and goes shows a network that comes and goes."""
    clock = Clock([A, B, C])
    clock.run(10)
    while clock.now < 200:
        clock.run(clock.now + DOUBT_TIMEOUTS * TIMEOUT / 2, silent=[B, C])
        clock.run(clock.now + 2 * BEAT, silent=[A, B, C])
    assert clock.dead == {}


def test_a_pause_of_our_own_begins_the_doubt_anew() -> None:
    clock = Clock([A, B, C])
    clock.run(10)
    clock.run(10 + DOUBT_TIMEOUTS * TIMEOUT, silent=[B, C])
    clock.now += 5
    clock.tick()
    woke = clock.now
    clock.run(FOREVER, silent=[B, C])
    assert min(clock.dead.values()) > woke + DOUBT_TIMEOUTS * TIMEOUT


def test_who_comes_while_all_others_are_gone_is_a_witness() -> None:
    """All remote nodes died; a replacement registers: that, too, shows that the network is there."""
    clock = Clock([A, B, C], remote=[B, C])
    clock.run(10)
    clock.run(100, silent=[B, C])
    assert clock.dead == {}
    newcomer = NodeKey("host", "new", 1)
    clock.add(newcomer)
    clock.run(100 + BOUND, silent=[B, C])
    assert set(clock.dead) == {B, C}


def test_those_who_are_heard_again_before_the_doubt_ends_live() -> None:
    clock = Clock([A, B, C])
    clock.run(10)
    clock.run(10 + DOUBT_TIMEOUTS * TIMEOUT, silent=[B, C])
    clock.run(FOREVER)
    assert clock.dead == {}


def test_half_of_the_nodes_are_enough_to_judge_the_rest() -> None:
    clock = Clock([A, B])
    clock.run(10)
    clock.run(20, silent=[B])
    assert list(clock.dead) == [B]


def test_a_restart_begins_with_a_grace_that_nobody_dies_in() -> None:
    clock = Clock([A, B, C])
    clock.run(TIMEOUT - TICK, silent=[A, B, C])
    assert clock.dead == {}


def test_silence_is_shown_from_the_last_fresh_echo() -> None:
    clock = Clock([A, B, C])
    clock.run(10)
    clock.run(11.5, silent=[A])
    assert 1.5 <= clock.liveness.silence(A, clock.now) <= 1.5 + BEAT + TICK


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.1, 6), st.sampled_from(["all", "pause", "cut", "one silent", "one deaf"])),
        max_size=12,
    )
)
def test_nobody_dies_who_beats_whatever_happens_to_us(history: list[tuple[float, str]]) -> None:
    """A is heard whenever we run and listen; only C ever misbehaves."""
    clock = Clock([A, B, C])
    for seconds, what in history:
        if what == "pause":
            clock.now += seconds
            clock.tick()
        else:
            silent = {"cut": [A, B, C], "one silent": [C]}.get(what, [])
            clock.run(clock.now + seconds, silent=silent, deaf=[C] if what == "one deaf" else [])
    assert set(clock.dead) <= {C}


def test_only_an_echo_of_the_last_two_beats_is_fresh_and_one_from_the_store_was_never_heard() -> None:
    clock = Clock([A, B])
    clock.run(10)
    assert clock.liveness.fresh(A, clock.now)
    clock.run(11, silent=[A])
    assert clock.liveness.fresh(B, clock.now)
    assert not clock.liveness.fresh(A, clock.now)
    assert not clock.liveness.fresh(C, clock.now), "unknown"
    clock.liveness.track(C, clock.now, heard=False)
    assert not clock.liveness.fresh(C, clock.now), "a restarted coordinator has not heard it yet"
    first = clock.liveness.beat(C, 0, clock.now)
    assert first is not None
    assert not clock.liveness.fresh(C, clock.now), "a first beat echoes nothing"
    clock.liveness.beat(C, first, clock.now)
    assert clock.liveness.fresh(C, clock.now)
