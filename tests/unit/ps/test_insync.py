"""The in-sync set: whoever the coordinator may promote has every acknowledged record."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from paramesh.errors import ParameshError
from paramesh.v1 import types_pb2 as pb
from paramesh_server.insync import JOIN_LAG, REPEAT_S, SILENT_S, InSync, Ref, Wish
from paramesh_server.replica import Replica
from ps_building import fresh, table

ME, B, C, D = (Ref(name, 1) for name in "abcd")


def row(version: int, isr: set[Ref], learners: set[Ref]) -> pb.Partition:
    return pb.Partition(
        version=version, isr=[r.proto() for r in sorted(isr)], learners=[r.proto() for r in sorted(learners)]
    )


class Model(RuleBasedStateMachine):
    """A primary, its followers, a coordinator, and calls and maps that come late, twice or never."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.version = 1
        self.isr, self.learners = {ME, B}, {C}
        self.has = dict.fromkeys((B, C, D), 0)
        self.calls: list[Wish] = []
        self.maps = [row(1, self.isr, self.learners)]
        self.primary = InSync(ME)
        self.primary.follow(self.maps[0], 0.0)
        self.lsn = 0

    @rule(count=st.integers(1, JOIN_LAG + 2))
    def append(self, count: int) -> None:
        for _ in range(count):
            self.lsn += 1
            self.primary.appended(self.lsn, self.now)

    @rule(who=st.sampled_from([B, C, D]), part=st.floats(0, 1))
    def replicate(self, who: Ref, part: float) -> None:
        if who in self.primary.followers:
            self.has[who] += round((self.lsn - self.has[who]) * part)
            self.primary.acked(who, self.has[who], self.now)

    @rule(who=st.sampled_from([B, C, D]))
    def replicate_without_an_answer(self, who: Ref) -> None:
        if who in self.primary.followers:
            self.has[who] = self.lsn

    @rule(who=st.sampled_from([B, C, D]))
    def stream_breaks(self, who: Ref) -> None:
        self.primary.lost(who)

    @rule(seconds=st.sampled_from([0.1, REPEAT_S, SILENT_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def ask(self) -> None:
        wish = self.primary.wish(self.now)
        if wish is not None:
            self.calls.append(wish)

    @rule(which=st.integers(0, 50), keep=st.booleans())
    def call_arrives(self, which: int, keep: bool) -> None:
        if self.calls:
            call = self.calls[which % len(self.calls)]
            if not keep:
                self.calls.remove(call)
            if call.version == self.version:
                assert call.isr <= self.isr | self.learners
                self._decide(set(call.isr))

    @rule(who=st.sampled_from([B, C, D]))
    def plan(self, who: Ref) -> None:
        """The coordinator plans a learner, or gives one up."""
        if who not in self.isr:
            self.learners ^= {who}
            self._decide(self.isr)

    @rule(who=st.sampled_from([B, C, D]))
    def positive_death(self, who: Ref) -> None:
        self.learners.discard(who)
        self._decide(self.isr - {who})

    def _decide(self, isr: set[Ref]) -> None:
        self.version += 1
        self.isr = set(isr)
        self.learners -= self.isr
        self.maps.append(row(self.version, self.isr, self.learners))

    @rule(which=st.integers(0, 50))
    def map_arrives(self, which: int) -> None:
        self.primary.follow(self.maps[which % len(self.maps)], self.now)

    @invariant()
    def everybody_in_sync_has_what_was_released(self) -> None:
        for ref in self.isr - {ME}:
            assert self.has[ref] >= self.primary.commit, f"{ref} lacks what was acknowledged"

    @invariant()
    def commit_is_in_the_log(self) -> None:
        assert self.primary.commit <= self.lsn


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def primary(isr: set[Ref], learners: set[Ref] = frozenset()) -> InSync:  # type: ignore[assignment]
    made = InSync(ME)
    made.follow(row(1, isr, set(learners)), 0.0)
    return made


def test_alone_everything_is_committed_at_once() -> None:
    alone = primary({ME})
    alone.appended(3, 0.0)
    assert (alone.commit, alone.wish(100.0)) == (3, None)


def test_a_silent_follower_leaves_and_until_the_map_says_so_it_is_waited_for() -> None:
    p = primary({ME, B})
    p.appended(1, 10.0)
    assert p.wish(10.0 + SILENT_S - 0.01) is None
    wish = p.wish(10.0 + SILENT_S)
    assert wish is not None
    assert wish.isr == {ME}
    assert "no acknowledgement from b" in wish.why
    assert (p.commit, p.waiting_for()) == (0, ["b"])
    p.follow(row(2, {ME}, set()), 13.0)
    assert p.commit == 1


def test_idle_followers_owe_nothing() -> None:
    p = primary({ME, B})
    p.appended(1, 0.0)
    p.acked(B, 1, 0.1)
    assert p.wish(1000.0) is None
    p.appended(2, 1000.0)
    assert p.wish(1000.0 + SILENT_S / 2) is None  # the debt is young


def test_the_same_wish_is_repeated_until_the_row_changes() -> None:
    p = primary({ME, B})
    p.appended(1, 0.0)
    first = p.wish(SILENT_S)
    assert p.wish(SILENT_S + REPEAT_S / 2) is None
    p.acked(B, 1, SILENT_S + REPEAT_S / 2)  # it speaks again, but the call may still arrive
    assert p.wish(SILENT_S + REPEAT_S) == first
    p.follow(row(2, {ME, B}, set()), 5.0)  # another change of the row: the call can never count now
    assert p.wish(5.0 + SILENT_S) is None


def test_a_learner_is_asked_for_only_with_everything_released() -> None:
    p = primary({ME}, {C})
    p.appended(JOIN_LAG + 10, 0.0)
    p.acked(C, 5, 0.0)
    assert p.wish(0.0) is None
    p.acked(C, 12, 0.0)  # close enough to be waited for, not to be in the set
    p.appended(JOIN_LAG + 11, 0.0)
    assert p.commit == JOIN_LAG + 10
    assert p.wish(0.1) is None
    p.acked(C, JOIN_LAG + 10, 0.2)
    wish = p.wish(0.2)
    assert wish is not None
    assert wish.isr == {ME, C}
    assert p.commit == JOIN_LAG + 10


def test_a_learner_that_was_asked_for_is_waited_for_until_the_outcome_is_known() -> None:
    p = primary({ME}, {C})
    p.appended(1, 0.0)
    p.acked(C, 1, 0.0)
    assert p.wish(0.0) is not None
    p.appended(2, 0.1)
    p.lost(C)
    assert p.commit == 1  # the call may have arrived: C may be the one that is promoted
    p.follow(row(2, {ME}, {C}), 0.2)
    assert p.commit == 2


def test_a_learner_that_was_not_asked_for_is_dropped_freely() -> None:
    p = primary({ME, B}, {C})
    p.appended(1, 0.0)
    p.acked(C, 1, 0.0)
    p.appended(2, 0.0)
    p.acked(B, 2, 0.0)
    assert p.commit == 1
    p.lost(C)
    assert p.commit == 2


def test_who_was_declared_dead_is_asked_away_at_once() -> None:
    """A promotion for silence leaves the set as it is: the new primary, which lives, trims it."""
    p = InSync(ME)
    p.follow(row(1, {ME, B}, set()), 0.0, frozenset({B}))
    assert p.wish(0.0) is None  # it owes nothing yet
    p.appended(1, 0.0)
    wish = p.wish(0.0)
    assert wish is not None
    assert wish.isr == {ME}
    assert p.commit == 0


def test_a_new_primary_asks_for_a_learner_only_with_all_that_it_took_over() -> None:
    """What the primaries before have acknowledged is in its log, whatever it knows to be committed."""
    p = InSync(ME, inherited=4)
    p.follow(row(1, {ME, B}, {C}), 0.0)
    p.appended(4, 0.0)
    p.acked(C, 2, 0.0)
    assert p.commit == 0  # B has said nothing yet
    assert p.wish(0.1) is None
    p.acked(C, 4, 0.2)
    wish = p.wish(0.2)
    assert wish is not None
    assert wish.isr == {ME, B, C}


def test_a_learner_counts_for_what_it_says_under_the_newest_row() -> None:
    """It was in sync, was dropped and forgot everything, and learns: the primary saw only the ends of that."""
    p = primary({ME, B})
    p.appended(3, 0.0)
    p.acked(B, 3, 0.0, version=1)
    p.follow(row(3, {ME}, {B}), 1.0)
    p.acked(B, 3, 1.0, version=1)  # an old stream, of the replica that is gone
    assert p.wish(1.1) is None
    p.acked(B, 0, 1.2, version=3)
    assert p.wish(1.2) is None
    p.acked(B, 3, 1.3, version=3)
    wish = p.wish(1.3)
    assert wish is not None
    assert wish.isr == {ME, B}


def test_a_follower_that_knows_only_an_older_row_is_not_greeted_yet() -> None:
    replica = Replica(fresh(table([8])), B)
    replica.version = 2
    with pytest.raises(ParameshError) as caught:
        replica.greet(1, version=3)
    assert caught.value.reason == "NOT_READY"
    replica.greet(1, version=2)
