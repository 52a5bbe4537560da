"""Whether an ended training process is started again: a pure policy.

The policy only decides; the supervisor acts on the answer, and says why:

    verdict = decide(history, Ended(exit_code=-9, ran_s=12.0), limits, stopping=False)
    if verdict.decision is Decision.RESTART:
        await asyncio.sleep(verdict.delay_s)

Time comes in as durations; nothing here reads a clock.
"""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass, replace

__all__ = ["Decision", "Ended", "RestartLimits", "SlotHistory", "Verdict", "Words", "decide", "describe_exit"]


USAGE_ERROR = 2
"""What argparse, click and Python itself exit with when the command line is wrong; the next one is the same."""

HOPELESS = frozenset(
    (
        # The settings, or the releases; values that are lost.
        *("CONFIG", "WRONG_CLUSTER", "VERSION", "UNIMPLEMENTED", "PARTITION_OFFLINE"),
        "PERMISSION_DENIED",
        # The script.
        *("TENSOR_MISMATCH", "DTYPE", "SHAPE", "NAME", "SCHEMA"),
        *("UNSUPPORTED_OPTIMIZER", "HYPER_PARAMETER", "STATE_TOO_LARGE"),
    )
)
"""Reasons of `paramesh.errors` that a new process of the same command meets again: what they are about is
the same for it. The others depend on the moment or on the data, and are restarted as a script's own errors are."""


RESTORED = "OLD_GENERATION"
"""The reason with which a worker of before ends when the job was taken back to a checkpoint."""


class Decision(enum.Enum):
    """What becomes of a slot whose process ended."""

    DONE = "done"
    """It finished, with exit code 0."""
    RESTART = "restart"
    """Start it again after the delay."""
    GIVE_UP = "give up"
    """It failed for good; the whole job ends with its exit code."""
    STOPPED = "stopped"
    """It ended because it was asked to."""


@dataclass(frozen=True)
class RestartLimits:
    """How often and how fast a slot may be restarted."""

    max_restarts: int = 3
    """Restarts that one slot may use up before it has failed for good."""
    healthy_s: float = 300.0
    """A process that ran this long proves that the script works: its slot's count starts at
    zero again, so that a week of training survives more than three preempted processes."""
    first_delay_s: float = 0.5
    """Pause before the second restart in a row; the first is immediate, because the usual single
    kill says nothing about the next try, and the others' steps wait for the newcomer's rank."""
    longest_delay_s: float = 10.0
    """Bound of the doubling pause; a script that fails at once fails for good within seconds."""


@dataclass(frozen=True)
class SlotHistory:
    """What a slot has been through; written by `decide` only."""

    used: int = 0
    """Restarts since the last healthy run, 0 <= used <= max_restarts."""
    total: int = 0
    """Restarts since the supervisor started; becomes PARAMESH_RESTART."""


@dataclass(frozen=True)
class Words:
    """The exception that ended a process, as the process itself told."""

    kind: str
    """Its class: "PartitionOffline"."""
    reason: str
    """The reason of one of Paramesh's own errors: "PARTITION_OFFLINE"; empty for others."""
    message: str
    of_the_script: bool = False
    """Whether the script cannot even be loaded: a SyntaxError or an ImportError."""


@dataclass(frozen=True)
class Ended:
    """How one process ended."""

    exit_code: int
    """As Python's returncode: negative for a signal."""
    ran_s: float
    """Seconds from its start to its end."""
    words: Words | None = None
    """What it said of its end; None if it said nothing."""

    @property
    def hopeless(self) -> str:
        """Why a restart cannot mend this end; empty if it may."""
        words = self.words
        if words is not None and words.reason in HOPELESS:
            return f"{words.reason}: {words.message}"
        if words is not None and words.of_the_script:
            return f"{words.kind}: {words.message}"
        if self.exit_code == USAGE_ERROR:
            return "code 2 stands for a wrong command line"
        return ""


@dataclass(frozen=True)
class Verdict:
    """A decision, with its reason for people."""

    decision: Decision
    history: SlotHistory
    """The slot's history from now on."""
    delay_s: float
    """Seconds to wait before the restart; 0 for the other decisions."""
    reason: str


def decide(history: SlotHistory, ended: Ended, limits: RestartLimits, *, stopping: bool) -> Verdict:
    """Judge the end of a slot's process.

    Args:
        history: the slot's history up to now.
        ended: how the process ended.
        limits: the policy's numbers.
        stopping: whether the supervisor had asked all processes to end.
    """
    how = describe_exit(ended.exit_code)
    if ended.exit_code == 0:
        return Verdict(Decision.DONE, history, 0.0, how)
    if stopping:
        return Verdict(Decision.STOPPED, history, 0.0, f"{how} after being asked to stop")
    if ended.hopeless:
        return Verdict(Decision.GIVE_UP, history, 0.0, f"{how}; a restart cannot mend that ({ended.hopeless})")
    if ended.words is not None and ended.words.reason == RESTORED:
        # Somebody took the job back to a checkpoint: no failure, and a new process belongs to the new generation.
        history = replace(history, total=history.total + 1)
        return Verdict(Decision.RESTART, history, 0.0, "the job was restored; started again at the checkpoint")
    if ended.ran_s >= limits.healthy_s:
        history = replace(history, used=0)
    if history.used >= limits.max_restarts:
        spent = f"all {limits.max_restarts} restarts are used" if limits.max_restarts else "restarts are off"
        return Verdict(Decision.GIVE_UP, history, 0.0, f"{how}; {spent}")
    delay_s = _delay(history.used, limits)
    history = SlotHistory(used=history.used + 1, total=history.total + 1)
    return Verdict(Decision.RESTART, history, delay_s, f"{how}; restart {history.used} of {limits.max_restarts}")


def _delay(used: int, limits: RestartLimits) -> float:
    """Nothing before the first restart, then doubling up to the bound."""
    if used == 0:
        return 0.0
    # The exponent is bounded so that a huge --max-restarts cannot overflow a float.
    return min(limits.first_delay_s * 2.0 ** min(used - 1, 32), limits.longest_delay_s)


def describe_exit(exit_code: int) -> str:
    """Say an exit code as people do: "killed by SIGKILL", "exited with code 1"."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"
