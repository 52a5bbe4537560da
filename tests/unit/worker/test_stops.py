"""When a process counts as stopped: seen so for longer than the timeout, without a break."""

from __future__ import annotations

import os
import signal
import subprocess

from hypothesis import given
from hypothesis import strategies as st
from paramesh_worker.stops import StopWatch, process_state

from tests.cluster.waiting import wait_until


def first_alarm(looks: list[tuple[float, str]], timeout_s: float = 2.0) -> float | None:
    watch = StopWatch(timeout_s)
    return next((at for at, state in looks if watch.look(state, at)), None)


def every_quarter(states: str) -> list[tuple[float, str]]:
    return [(0.25 * index, state) for index, state in enumerate(states)]


def test_stopped_for_longer_than_the_timeout_is_an_alarm():
    assert first_alarm(every_quarter("S" + "T" * 9)) is None
    assert first_alarm(every_quarter("S" + "T" * 10)) == 2.5


def test_a_process_that_ran_in_between_starts_anew():
    assert first_alarm(every_quarter("T" * 8 + "R" + "T" * 9)) is None


def test_a_debuggers_stop_and_what_is_not_known_are_no_stop():
    assert first_alarm(every_quarter("t" * 100)) is None
    assert first_alarm([(0.25 * index, "") for index in range(100)]) is None


def test_when_we_were_stopped_too_nothing_is_known_of_the_time_between():
    """The whole machine was stopped for an hour: its processes run on with us, and must not be evicted by us."""
    looks = [(0.0, "S"), (0.25, "T"), (3600.0, "T"), (3600.25, "S")]
    assert first_alarm(looks) is None


@given(st.lists(st.tuples(st.floats(0.01, 5.0), st.sampled_from("STtRDZ")), max_size=60))
def test_an_alarm_means_that_every_look_of_the_last_two_seconds_saw_it_stopped(steps):
    watch, at, stopped_since = StopWatch(2.0), 0.0, None
    for gap, state in steps:
        at += gap
        stopped_since = (at if stopped_since is None else stopped_since) if state == "T" else None
        if watch.look(state, at):
            assert stopped_since is not None
            assert at - stopped_since > 2.0


def test_the_state_of_a_real_process():
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            os.kill(process.pid, signal.SIGSTOP)
            wait_until(lambda: process_state(process.pid) == "T", 10, "the stop")
        finally:
            process.kill()
    assert process_state(process.pid) == ""
