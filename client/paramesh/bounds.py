"""Numbers of the limits that several processes have, and their defaults. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CONNECTIONS = 4096
"""Of one port. Three times what a thousand workers and their supervisors need; each costs some 40 KiB."""

MAX_STREAMS = 2048
"""Of one connection; unlimited otherwise. A worker has some ten calls under way; hundreds of them may
share a connection when they share a process."""

RETRY_MS = 100
"""How long a refused caller is told to wait: some ten requests later there is room, or nobody's wait helps."""


@dataclass(frozen=True)
class Bounds:
    """How much at once."""

    calls: int = 4096
    """Calls of one service: a worker has some ten under way, a few of them waiting at the ledger."""

    uploads: int = 512
    """Calls whose request is not here in full. Each may hold a message outside of every other account; an
    honest one for a few milliseconds, so that hundreds of workers may push at once."""
