"""The restart policy: a table of ends and what they come to."""

from __future__ import annotations

import pytest
from paramesh.errors import REASONS, Action
from paramesh_worker import restarts
from paramesh_worker.restarts import Decision, Ended, RestartLimits, SlotHistory, Words, decide, describe_exit

LIMITS = RestartLimits(max_restarts=3, healthy_s=300.0, first_delay_s=0.5, longest_delay_s=10.0)


def judge(exit_code: int, *, used: int = 0, ran_s: float = 1.0, stopping: bool = False, limits=LIMITS):
    return decide(SlotHistory(used=used, total=used), Ended(exit_code, ran_s), limits, stopping=stopping)


def test_exit_code_zero_is_done_also_while_stopping():
    assert judge(0).decision is Decision.DONE
    assert judge(0, stopping=True).decision is Decision.DONE


@pytest.mark.parametrize("exit_code", [1, 3, 127, -9, -11])
def test_an_abnormal_end_is_restarted(exit_code: int):
    verdict = judge(exit_code)
    assert verdict.decision is Decision.RESTART
    assert verdict.history == SlotHistory(used=1, total=1)


@pytest.mark.parametrize(
    ("exit_code", "words", "why"),
    [
        (2, None, "code 2 stands for a wrong command line"),
        (1, Words("PartitionOffline", "PARTITION_OFFLINE", "ps-0 is lost"), "PARTITION_OFFLINE: ps-0 is lost"),
        (1, Words("ConfigError", "CONFIG", "PARAMESH_EVERY: is 0"), "CONFIG: PARAMESH_EVERY: is 0"),
        (1, Words("SyntaxError", "", "invalid syntax", of_the_script=True), "SyntaxError: invalid syntax"),
    ],
)
def test_what_a_restart_cannot_mend_is_given_up_at_once_with_the_reason(exit_code, words, why):
    verdict = decide(SlotHistory(), Ended(exit_code, 1.0, words), LIMITS, stopping=False)
    assert verdict.decision is Decision.GIVE_UP
    assert verdict.reason == f"exited with code {exit_code}; a restart cannot mend that ({why})"
    assert verdict.history == SlotHistory()
    assert decide(SlotHistory(), Ended(exit_code, 1.0, words), LIMITS, stopping=True).decision is Decision.STOPPED


@pytest.mark.parametrize(
    "words", [Words("RuntimeError", "", "out of memory"), Words("Unavailable", "UNREACHABLE", "no coordinator")]
)
def test_a_scripts_own_error_and_what_may_pass_are_restarted(words: Words):
    assert decide(SlotHistory(), Ended(1, 1.0, words), LIMITS, stopping=False).decision is Decision.RESTART


def test_no_reason_that_the_library_repeats_by_itself_is_hopeless():
    assert {REASONS[reason].action for reason in restarts.HOPELESS} == {Action.RAISE}


@pytest.mark.parametrize("exit_code", [1, -15, -2])
def test_an_end_that_was_asked_for_is_not_restarted(exit_code: int):
    assert judge(exit_code, stopping=True).decision is Decision.STOPPED


def test_restarts_run_out():
    history = SlotHistory()
    for used in range(1, 4):
        verdict = decide(history, Ended(1, 1.0), LIMITS, stopping=False)
        assert (verdict.decision, verdict.history.used) == (Decision.RESTART, used)
        history = verdict.history
    verdict = decide(history, Ended(1, 1.0), LIMITS, stopping=False)
    assert verdict.decision is Decision.GIVE_UP
    assert verdict.reason == "exited with code 1; all 3 restarts are used"


def test_zero_restarts_gives_up_at_once():
    verdict = judge(-9, limits=RestartLimits(max_restarts=0))
    assert verdict.decision is Decision.GIVE_UP
    assert verdict.reason == "killed by SIGKILL; restarts are off"


def test_five_minutes_of_health_give_all_restarts_back_but_keep_the_total():
    assert judge(1, used=3, ran_s=299.9).decision is Decision.GIVE_UP
    verdict = decide(SlotHistory(used=3, total=7), Ended(1, 300.0), LIMITS, stopping=False)
    assert verdict.decision is Decision.RESTART
    assert verdict.history == SlotHistory(used=1, total=8)
    assert verdict.delay_s == 0.0


def test_the_first_restart_is_immediate_then_the_delay_doubles_up_to_its_bound():
    many = RestartLimits(max_restarts=8)
    delays = [judge(1, used=used, limits=many).delay_s for used in range(8)]
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_huge_count_does_not_overflow_the_delay():
    assert judge(1, used=5000, limits=RestartLimits(max_restarts=10_000)).delay_s == 10.0


def test_exits_in_words():
    assert describe_exit(3) == "exited with code 3"
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-200) == "killed by signal 200"


def test_a_restored_job_uses_up_no_restart() -> None:
    """Somebody took it back to a checkpoint: its workers end with OLD_GENERATION, which is no failure."""
    words = Words("StateRefused", "OLD_GENERATION", "generation 1 is over")
    history = SlotHistory(used=3, total=3)
    verdict = decide(history, Ended(1, 5.0, words), RestartLimits(max_restarts=3), stopping=False)
    assert (verdict.decision, verdict.delay_s) == (Decision.RESTART, 0.0)
    assert verdict.history == SlotHistory(used=3, total=4)
