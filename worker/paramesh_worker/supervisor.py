"""The supervisor: keeps the training processes of one machine running, as torchrun does, and speaks for them.

    supervisor = Supervisor(config, command, environ=os.environ)
    exit_code = await supervisor.run()

Each slot ("host-a/0") holds one process at a time. The end of a process is reported to the coordinator
before anything else, so that the other workers' steps go on at once; then the policy of `restarts` decides.
When a slot fails for good all processes are asked to end: most failures are the script's and would come
everywhere, and a job that misses its start_workers would wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from paramesh.errors import refuse

from .command import Command
from .config import WorkerConfig
from .environment import Place, child_environment, wants_one_thread
from .last_words import LastWords
from .membership import REPORT_PATIENCE_S, CoordinatorLink
from .output import Printer
from .processes import Nursery, Process
from .restarts import Decision, Ended, RestartLimits, SlotHistory, Verdict, decide
from .stops import STOPPED_EXIT_CODE, watch_for_stops

__all__ = ["Supervisor", "host_id", "shell_code"]

log = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""How long a coordinator that does not answer is looked for at the start: machines of a fleet start in any
order, and a wrong address should still be told within a minute."""

STOPPING_REPORT_S = 0.5
"""How long an exit report is repeated while we stop: the coordinator may be stopping beside us."""


def shell_code(exit_code: int) -> int:
    """A child's exit code as a shell says it: 128 + the number of a signal."""
    return 128 - exit_code if exit_code < 0 else exit_code


def host_id() -> str:
    """What tells machines apart: the kernel's boot id, else the host's name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


class Supervisor:
    """Runs `config.nproc` processes of one command until they are done, failed or asked to end."""

    def __init__(self, config: WorkerConfig, command: Command, *, environ: Mapping[str, str], printer: Printer):
        self._config = config
        self._command = command
        self._environ = environ
        self._printer = printer
        self._limits = RestartLimits(max_restarts=config.max_restarts)
        self._incarnation = secrets.randbits(63) | 1
        """Random, per start; never zero, which the coordinator refuses."""
        self._link = CoordinatorLink(
            addresses=config.coordinator.split(","),
            job=config.job,
            name=config.name,
            incarnation=self._incarnation,
            slots=config.nproc,
            host_id=host_id(),
            security=config.security,
        )
        self._logs: list[BinaryIO] = []
        """One open file per slot when there is a log folder, else empty."""
        self._words = [LastWords(f"paramesh-worker-{index}") for index in range(config.nproc)]
        self._stopping = asyncio.Event()
        """Set once, when the processes are to end: a signal came or a slot failed for good."""
        self._killing = asyncio.Event()
        """Set when the processes' grace is over at once: a second signal came."""
        self._signal = 0
        """The signal that made us stop; 0 if none did."""
        self._failure: int | None = None
        """Exit code of the first slot that failed for good."""

    async def run(self) -> int:
        """Register, run the processes to their end, say goodbye.

        Returns:
            0, or the exit code of the first process that failed for good, or 128 + the number of the signal
            that ended us before the processes were done.

        Raises:
            ParameshError: the coordinator did not answer, or refused us; no process was started.
        """
        self._open_logs()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            if not await self._register():
                return 128 + self._signal
            if wants_one_thread(self._environ, self._config.nproc):
                log.warning(
                    "OMP_NUM_THREADS=1 is set for each of the %d processes, so that they do not overload the"
                    " machine; set it yourself to tune it",
                    self._config.nproc,
                )
            return await self._supervise()
        finally:
            await self._link.close()
            for file in self._logs:
                file.close()
            for words in self._words:
                words.close()

    async def _register(self) -> bool:
        """Register; False if a signal came first."""
        registering = asyncio.create_task(self._link.start(PATIENCE_S))
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((registering, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not registering.done():
            registering.cancel()
            return False
        registering.result()
        return True

    async def _supervise(self) -> int:
        with contextlib.closing(Nursery()) as nursery:
            ender = asyncio.create_task(self._end_when_stopping(nursery))
            slots = [asyncio.create_task(self._run_slot(nursery, index)) for index in range(self._config.nproc)]
            try:
                decisions = await asyncio.gather(*slots)
            finally:
                ender.cancel()
        if self._failure is not None:
            return shell_code(self._failure)
        if self._signal and any(decision is not Decision.DONE for decision in decisions):
            return 128 + self._signal
        return 0

    async def _run_slot(self, nursery: Nursery, index: int) -> Decision:
        """Keep one slot running until it is done, stopped or failed for good."""
        history = SlotHistory()
        while not self._stopping.is_set():
            process = await self._start(nursery, index, history)
            exit_code = await self._end_of(process, index)
            ended = Ended(exit_code, time.monotonic() - process.started, self._words[index].read(process.pid))
            # Before anything else: the other workers' current step waits for this.
            patience_s = STOPPING_REPORT_S if self._stopping.is_set() else REPORT_PATIENCE_S
            await self._link.report_exit(self._slot(index), exit_code, patience_s)
            await process.drained()
            verdict = decide(history, ended, self._limits, stopping=self._stopping.is_set())
            self._tell(index, process, exit_code, verdict)
            if verdict.decision is Decision.GIVE_UP and self._failure is None:
                self._failure = exit_code
                self._stopping.set()
            if verdict.decision is not Decision.RESTART:
                return verdict.decision
            history = verdict.history
            if self._logs:
                await self._printer.write(self._logs[index].fileno(), b"--- restart %d ---\n" % history.total)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(verdict.delay_s):
                    await self._stopping.wait()
        return Decision.STOPPED

    async def _end_of(self, process: Process, index: int) -> int:
        """Wait for a process's end; tell the coordinator meanwhile when it is stopped, as that looks like health."""
        slot = self._slot(index)

        async def report(patience_s: float) -> bool:
            said = await self._link.report_exit(slot, STOPPED_EXIT_CODE, patience_s, quietly=True)
            if said:
                log.warning("worker %d (%s) is stopped (SIGSTOP); the others go on without it", index, slot)
            return said

        watching = asyncio.create_task(watch_for_stops(process.pid, self._link.failure_timeout_s, report))
        try:
            return await process.exited()
        finally:
            watching.cancel()

    async def _start(self, nursery: Nursery, index: int, history: SlotHistory) -> Process:
        place = Place(
            coordinator=self._config.coordinator,
            job=self._config.job,
            host=self._config.name,
            host_incarnation=self._incarnation,
            local_rank=index,
            restart=history.total,
            error_file=self._words[index].path,
        )
        self._words[index].forget()

        async def sink(stream: int, lines: list[bytes]) -> None:
            await self._show(index, stream, lines)

        process = await nursery.spawn(
            f"worker {index}",
            self._command.argv(sys.executable),
            env=child_environment(self._environ, place, self._config.nproc) | self._config.security.environment(),
            sink=sink,
        )
        log.info("started worker=%d pid=%d slot=%s restart=%d", index, process.pid, place.slot, history.total)
        self._emit(event="started", worker=index, pid=process.pid, restart=history.total)
        return process

    # Stopping.

    def _on_signal(self, number: int) -> None:
        if self._stopping.is_set():
            log.warning("second signal: killing what is left")
            self._killing.set()
            return
        log.info(
            "signal=%s forwarded; processes alive after %g s are killed",
            signal.Signals(number).name, self._config.grace,
        )  # fmt: skip
        self._signal = number
        self._stopping.set()

    async def _end_when_stopping(self, nursery: Nursery) -> None:
        """Pass the signal on when stopping begins, and kill what is left after the grace."""
        await self._stopping.wait()
        for process in nursery.alive:
            process.send(self._signal or signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.grace):
                await self._killing.wait()
        for process in nursery.alive:
            log.warning("killing %s: it has not ended yet", process.name)
        nursery.kill()

    # What people and ps-run see.

    def _slot(self, index: int) -> str:
        return f"{self._config.name}/{index}"

    def _tell(self, index: int, process: Process, exit_code: int, verdict: Verdict) -> None:
        """Say what a process's end means."""
        who = f"worker {index} ({self._slot(index)})"
        failed = verdict.decision is Decision.GIVE_UP
        if failed:
            tail = "\n".join(f"  | {line}" for line in process.tail.lines()) or "  | (it wrote nothing)"
            log.error("%s failed: %s. Its last lines:\n%s", who, verdict.reason, tail)
        elif verdict.decision is Decision.RESTART:
            log.warning("%s %s, in %g s", who, verdict.reason, verdict.delay_s)
        else:
            log.info("%s %s", who, verdict.reason)
        self._emit(
            event="ended",
            worker=index,
            exit_code=exit_code,
            decision=verdict.decision.value,
            reason=verdict.reason,
            lines=process.tail.lines() if failed else [],
        )

    def _emit(self, **event: Any) -> None:
        """Write an event for ps-run, if it listens."""
        if self._config.events_fd >= 0:
            self._printer.post(self._config.events_fd, json.dumps(event).encode() + b"\n")

    async def _show(self, index: int, stream: int, lines: list[bytes]) -> None:
        """Write lines of a process where the settings say."""
        if self._logs:
            await self._printer.write(self._logs[index].fileno(), b"".join(line + b"\n" for line in lines))
        if self._config.tee or not self._logs:
            prefix = b"[worker %d] " % index
            await self._printer.write(stream, b"".join(prefix + line + b"\n" for line in lines))

    def _open_logs(self) -> None:
        if not self._config.log_dir:
            return
        folder = Path(self._config.log_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(self._config.nproc):
                self._logs.append((folder / f"worker-{index}.log").open("ab", buffering=0))
        except OSError as error:
            raise refuse("CONFIG", f"argument --log-dir: {folder}: {error.strerror}") from error
