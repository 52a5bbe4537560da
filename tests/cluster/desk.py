"""How a worker body and its test talk: events one way, gates the other, both by files.

Files, because they survive SIGKILL, need no connection, and work for threads and
processes alike. An event is one line of JSON appended in one write, so a killed worker
leaves whole lines only (but perhaps the last, which readers skip).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from tests.cluster.waiting import wait_until


class Desk:
    """A worker body's side.

    Attributes:
        args: What the test passed to `start_worker`.
        index: The worker's number in its cluster, from 0 (its rank may differ).
        incarnation: How often this worker was started before, from 0.
    """

    def __init__(self, folder: Path, index: int, args: dict[str, Any]) -> None:
        self._folder = folder
        self._events = folder / "events.jsonl"
        self.index = index
        self.args = args
        self.incarnation = int(os.environ.get("PARAMESH_RESTART", "0"))

    def emit(self, kind: str, **data: Any) -> None:
        """Tell the test something; `data` must be JSON. A monotonic time is added."""
        line = json.dumps({"kind": kind, "t": time.monotonic(), "pid": os.getpid(), **data}) + "\n"
        with open(self._events, "ab", buffering=0) as file:
            file.write(line.encode())

    def gate(self, name: str, deadline: float = 120.0) -> None:
        """Wait until the test opens the gate `name`; at once if it is open already."""
        wait_until((self._folder / f"gate-{name}").exists, deadline, f"gate {name} of worker {self.index}")

    def is_open(self, name: str) -> bool:
        """Whether the test has opened the gate `name`."""
        return (self._folder / f"gate-{name}").exists()


class DeskReader:
    """The test's side of one worker's desk."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Every event so far, in order; only those of `kind` if given."""
        path = self.folder / "events.jsonl"
        if not path.exists():
            return []
        events = []
        for line in path.read_bytes().split(b"\n"):
            try:
                event = json.loads(line)
            except ValueError:
                continue  # the torn last line of a killed worker
            if kind is None or event["kind"] == kind:
                events.append(event)
        return events

    def open_gate(self, name: str) -> None:
        """Let the body pass `Desk.gate(name)`."""
        (self.folder / f"gate-{name}").touch()
