"""A follower of the ledger takes over: what was answered holds, what was not is asked again."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger import Ledger, Wait
from paramesh_server.ledger_clip import DEGRADE_AFTER_S
from paramesh_server.ledger_steps import KEEP_STEPS

from tests.unit.ps.ledger_world import World, header, ranges


def fail_over(world: World) -> None:
    """The primary dies; everything it answered is at the follower."""
    world.fail_during(0)
    world.status()


@pytest.fixture(params=["replayed", "installed"])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prepare(world: World, how: str) -> None:
    if how == "installed":
        world.snapshot()


# ------------------------------------------------------------------ an event that is here in part


def test_a_job_starts_though_the_record_that_says_so_was_lost() -> None:
    """The last of `start_workers` joined, and that much reached the follower: nobody joins any more."""
    world = World(start_workers=2)
    world.join(1)
    world.fail_during(keep=1)
    world.join(2)
    assert world.failovers == 1
    assert world.status().phase == "starting"


def test_a_step_is_decided_though_the_record_that_says_so_was_lost() -> None:
    world = World()
    world.workers(2)
    for client in (1, 2):
        world.leased(client, length=4, want=2)
    one = [t.SampleRange(dataset="d", begin=0, end=2)]
    world.waits(1, 0, samples=one)
    world.fail_during(keep=1)
    world.leave(2)  # its range returns; that record is there, the step that it let go is not
    assert len(world.decided(1, 0, samples=one).record.contributors) == 1
    assert ranges(world.lease(1, length=4)) == [(2, 4)]  # type: ignore[arg-type]


# ------------------------------------------------------------------ what was volatile and must not be


def test_a_loop_that_broke_off_is_not_waited_for_after_a_failover(how: str) -> None:
    """It declared what it had once, and never again: the others would wait for ever."""
    world = World()
    world.workers(2)
    mine, theirs = (world.leased(client, length=4, call=1) for client in (1, 2))
    world.leased(1, length=4, call=2, delivered=mine)  # the client's `break`
    world.between(1)
    prepare(world, how)
    fail_over(world)
    world.waits(2, 0, samples=theirs)
    world.pass_time(30)  # the first is gathered, and falls idle
    world.decided(2, 0, samples=theirs)
    world.between(2)
    answer = world.lease(2, length=4, call=2, wait=True)
    assert isinstance(answer, lg.LeaseResponse), f"waits for ranks {answer.who()}"
    assert answer.finished


def test_who_caught_up_with_a_mean_is_in_the_next_one_after_a_failover(how: str) -> None:
    """A restarted worker was told the last round; the next must not go without it."""
    world = World()
    world.workers(1)
    assert not isinstance(world.gather(1, 0, [1.0]), Wait)
    world.join(2)
    told = world.gather(2, 0, [5.0])
    assert isinstance(told, lg.GatherResponse)
    assert told.count == 1
    prepare(world, how)
    fail_over(world)
    first = world.gather(1, 1, [1.0])
    assert isinstance(first, Wait), "the round is complete without rank 1"
    assert first.who() == (1,)
    last = world.gather(2, 1, [3.0])
    assert isinstance(last, lg.GatherResponse)
    assert (list(last.values), last.count) == ([2.0], 2)


def test_the_oldest_round_goes_first_also_after_a_snapshot() -> None:
    """Which one was a question of the order in which a dict had been filled."""
    world = World()
    world.workers(1)
    many = [0.0] * (1 << 17)
    for number in range(3):  # two rounds of these are all that is remembered
        world.gather(1, number, many)
        world.snapshot()
    old, kept = world.gather(1, 0, many), world.gather(1, 1, many)
    assert isinstance(old, lg.GatherResponse)
    assert isinstance(kept, lg.GatherResponse)
    assert (old.count, kept.count) == (0, 1)


# ------------------------------------------------------------------ time


def test_an_evicted_contributor_has_its_whole_time_at_the_new_primary(how: str) -> None:
    """A replay stamps no times: 0 of another clock made every eviction look long past."""
    world = World()
    world.workers(2)
    world.step(0, 1, 2)
    world.evict(2)
    prepare(world, how)
    fail_over(world)

    def missing() -> list[int]:
        request = lg.ReportMissingRequest(request=header(1), group=1, step=0, partition=1, client_ids=[2])
        return list(world.do(lambda now: world.ledger.report_missing(request, now)).degraded)

    assert missing() == []
    world.pass_time(DEGRADE_AFTER_S)
    assert missing() == [2]


def test_a_slow_member_has_its_whole_step_timeout_at_the_new_primary(how: str) -> None:
    world = World(step_timeout_ms=5000)
    world.workers(2)
    world.waits(1, 0)
    world.pass_time(4)
    prepare(world, how)
    fail_over(world)
    assert world.waits(1, 0) == (1,)
    world.pass_time(4)
    assert world.waits(1, 0) == (1,)
    world.pass_time(2)
    assert len(world.decided(1, 0).record.contributors) == 1


# ------------------------------------------------------------------ what a follower holds


def test_a_follower_collects_nothing_that_nobody_takes() -> None:
    world = World()
    world.workers(1)
    for step in range(50):
        world.decided(1, step)
    assert world.shadow.take_woken() == set()
    assert world.shadow.take_notices() == []


def test_a_follower_takes_settings_and_decides_nothing() -> None:
    """Maps of different age: a follower's settings steer nothing until it serves."""
    world = World(start_workers=2)
    world.join(1)
    lsn = world.shadow.lsn
    world.shadow.update_config(t.JobConfig(start_workers=1), 1e9)
    assert world.shadow.lsn == lsn
    world.join(2)
    assert world.shadow.state_digest() == world.ledger.state_digest()
    with pytest.raises(RuntimeError, match="decides nothing"):
        world.shadow.evict(1, "dead", 0.0)


def test_an_installed_ledger_keeps_what_a_straggler_may_still_need() -> None:
    """Who has not told how far it is counts as not having applied what is kept."""
    world = World()
    world.workers(2, backup_workers=1)
    steps = KEEP_STEPS + 10
    for step in range(steps):
        world.decided(1, step, applied_through=step)
    world.snapshot()
    fail_over(world)
    world.decided(1, steps, applied_through=steps)
    request = lg.GetStepsRequest(group=1, first=0)
    assert world.do(lambda now: world.ledger.get_steps(request, now)).records


def test_samples_of_one_epoch_are_bounded() -> None:
    """2^63 samples, consumed twice, were more than the status and a record can say."""
    world = World()
    world.workers(1)
    with pytest.raises(Exception, match="at most") as caught:
        world.lease(1, length=1 << 63, chunk=1 << 62)
    assert getattr(caught.value, "reason", "") == "QUOTA"


# ------------------------------------------------------------------ means, by random histories


class GatherModel(RuleBasedStateMachine):
    """Members join, catch up, go; the primary dies. A round has everybody's number, once.

    Every member that was told a round, or took part in it, is in the next, unless it is gone;
    everybody is told the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.ids = 0
        self.at: dict[int, int] = {}
        """For each member, the round that it asks for next."""
        self.results: dict[int, lg.GatherResponse] = {}
        self.expected: set[int] = set()
        """Who must be in the next round."""
        self.waiting: set[int] = set()

    @initialize()
    def begin(self) -> None:
        self.join()
        self.join()

    @precondition(lambda self: len(self.at) < 5)
    @rule()
    def join(self) -> None:
        self.ids += 1
        self.world.join(self.ids)
        self.at[self.ids] = 0

    @precondition(lambda self: len(self.at) > 1)
    @rule(number=st.integers(0, 4), how=st.sampled_from(["leave", "evict"]))
    def end(self, number: int, how: str) -> None:
        client = self.pick(number)
        getattr(self.world, how)(client)
        del self.at[client]
        self.waiting.discard(client)
        self.expected.discard(client)
        self.ask_again()

    def pick(self, number: int) -> int:
        return list(self.at)[number % len(self.at)]

    @rule(number=st.integers(0, 4))
    def gather(self, number: int) -> None:
        client = self.pick(number)
        self.ask(client)
        self.ask_again()

    @rule(number=st.integers(0, 4), keep=st.integers(0, 2), event=st.sampled_from(["gather", "join", "leave", "evict"]))
    def failover(self, number: int, keep: int, event: str) -> None:
        self.world.fail_during(keep)
        if event == "gather":
            self.ask(self.pick(number))
        elif event == "join" and len(self.at) < 5:
            self.join()
        elif event in ("leave", "evict") and len(self.at) > 1:
            self.end(number, event)
        if self.world.fails:
            self.world.promote()
        self.ask_again()

    @rule()
    def snapshot(self) -> None:
        self.world.snapshot()

    def ask_again(self) -> None:
        for _ in range(2):  # the last may complete it for the first
            for client in sorted(self.waiting):
                self.ask(client)

    def ask(self, client: int) -> None:
        number = self.at[client]
        answer = self.world.gather(client, number, [float(client)])
        if isinstance(answer, Wait):
            self.waiting.add(client)
            assert answer.who(), "waits for nobody"
            return
        self.waiting.discard(client)
        self.at[client] += 1
        if number in self.results:
            assert answer == self.results[number], "a result never changes"
            if number == max(self.results):
                self.expected.add(client)
            return
        took_part = {c for c, at in self.at.items() if at == number and c in self.waiting} | {client}
        if number:
            missing = self.expected - took_part
            assert not missing, f"complete without {missing}"
        assert answer.count == len(took_part)
        assert list(answer.values) == [sum(map(float, sorted(took_part))) / len(took_part)]
        self.results[number] = answer
        self.expected = took_part


def test_a_mean_has_everybodys_number_once_whatever_fails() -> None:
    quick = settings(
        max_examples=60,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(GatherModel, settings=quick)


def test_a_follower_that_never_served_is_like_one_that_did() -> None:
    """Digest, bytes and the next decision agree, whichever way a ledger came to its state."""
    world = World()
    world.workers(2)
    world.step(0, 1, 2)
    replayed, installed = Ledger(world.config), Ledger(world.config)
    replayed.replay(world.records)
    installed.install(world.ledger.capture())
    for ledger in (replayed, installed):
        ledger.serve(lambda _: None, world.config, 5.0)
    answers = []
    for ledger in (world.ledger, replayed, installed):
        for client in (1, 2):
            request = lg.ReadyRequest(request=header(client), group=1, step=1, weight=1, attempt=1)
            answer = ledger.ready(request, world.now)
        answers.append(answer)
    assert isinstance(answers[0], lg.ReadyResponse)
    assert answers[0] == answers[1] == answers[2]
    assert world.ledger.capture() == replayed.capture() == installed.capture()
