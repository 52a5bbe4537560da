"""File descriptors: as many as this process may have, and connections that leave room for the rest.

Out of descriptors a process accepts nobody, opens no file and says so nowhere. So the soft limit
is raised to the hard one at the start, and a port takes fewer connections than there are
descriptors: the next one is closed at once, and those that train go on.
"""

from __future__ import annotations

import resource

__all__ = ["connections_within", "raise_limit"]

RESERVE = 256
"""Descriptors for everything else: files of checkpoints, pipes, own connections to other nodes, libraries."""


def raise_limit() -> int:
    """Raise this process's limit of open files as far as it may; what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS says infinity and takes less
            return soft
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def connections_within(asked: int, ports: int) -> int:
    """How many connections a port may have, so that all of them leave descriptors to spare.

    Args:
        asked: how many it should have.
        ports: that this process listens on.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return asked
    return max(16, min(asked, (limit - RESERVE) // ports))
