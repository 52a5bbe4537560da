"""The two small programs that make sure nothing outlives its parent; run by path, never imported
by the processes they become.

    python -I -S child.py exec PARENT_PID PROGRAM ARGS...
        Asks the kernel to kill this process when PARENT_PID dies (`PR_SET_PDEATHSIG`), then becomes
        PROGRAM. The setting survives `exec`, so that even a parent ended by SIGKILL leaves nothing. It is
        done here and not in subprocess's `preexec_fn`, which may deadlock in a process with threads.

    python -I -S child.py janitor
        Reads `+PID` and `-PID` lines from stdin, and at its end kills every process of the sessions that are
        still listed: the training processes' own children, which the kernel's promise above does not cover.

Only the standard library is used and `-I -S` keeps everything else off the path: a start
takes 20 ms, and a user's file named `signal.py` cannot get in the way.
"""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def become(parent: int, argv: list[str]) -> None:
    """Tie this process's life to `parent`'s and exec `argv`; exit 127 if it cannot be run."""
    import ctypes

    # A Ctrl-C that comes before the program runs ends this quietly.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # Asked too late if the parent died before the call: then nobody would ever send the signal.
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
    # Python ignores SIGPIPE and keeps that over exec, unlike a shell.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.stderr.write(f"cannot run {argv[0]!r}: {error.strerror}\n")
        os._exit(127)


PARENT, SESSION = 1, 3
"""Fields of /proc/PID/stat, counted from the state, which is 0."""


def processes(field: int, value: int) -> list[int]:
    """The pids of all processes whose PARENT or SESSION is `value`; zombies do not count."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                # The command in parentheses may hold spaces and parentheses: fields count from the last one.
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if fields[0] != b"Z" and int(fields[field]) == value:
            found.append(int(entry))
    return found


def kill_session(session: int) -> None:
    """SIGKILL the process group of a session's leader, and what else is left in the session."""
    try:
        os.killpg(session, signal.SIGKILL)
    except OSError:
        pass
    for pid in processes(SESSION, session):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass


def janitor() -> None:
    """Follow the list on stdin; when it ends, kill the sessions that are still on it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sessions: set[int] = set()
    for line in sys.stdin:
        if line.startswith("+"):
            sessions.add(int(line[1:]))
        else:
            sessions.discard(int(line[1:]))
    for session in sessions:
        kill_session(session)


if __name__ == "__main__":
    if sys.argv[1] == "exec":
        become(int(sys.argv[2]), sys.argv[3:])
    else:
        janitor()
