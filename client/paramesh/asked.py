"""What a synchronous exchange remembers of a step between its Ready and its values; helpers of `exchange_sync`."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paramesh.errors import ParameshError
from paramesh.exchange import Table
from paramesh.hyper import Value
from paramesh.v1 import ledger_pb2


@dataclass
class Asked:
    """A Ready that the ledger may have taken note of."""

    request: ledger_pb2.ReadyRequest
    changes: Sequence[tuple[Table, dict[str, Value], dict[str, Value]]]
    """The settings it carries; see `Exchange.changed_settings`."""
    known: bool = False
    """Whether its answer has come."""

    def answered(self) -> None:
        """Its step is decided: the ledger has its settings, whether it counts or was too late."""
        self.known = True
        for table, current, _ in self.changes:
            table.sent = current


def name_attempts(request: ledger_pb2.ReadyRequest, attempts: Mapping[int, int]) -> None:
    """Names the attempt that counts in each partition: the lowest, and those that are above it."""
    request.attempt = min(attempts.values(), default=1)
    for partition, attempt in attempts.items():
        if attempt != request.attempt:
            request.overrides.add(partition=partition, attempt=attempt)


def set_all(events: Mapping[int, threading.Event]) -> None:
    """Wakes all who wait."""
    for event in events.values():
        event.set()


def was_overtaken(arriving: concurrent.futures.Future[None]) -> bool:
    """Whether a pull ended because the group is past the step whose values it asked for."""
    if not arriving.done() or arriving.cancelled():
        return False
    error = arriving.exception()
    return isinstance(error, ParameshError) and error.reason == "STEP_OUT_OF_RANGE"
