"""Which session a piece of code belongs to: the process's own, or the context's.

    session = current()          # joins the cluster of the environment on first use
    if session is None: ...      # alone: no cluster is named, nothing was started

What a session can do is in `paramesh.membership`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from paramesh.config import ClientConfig
from paramesh.errors import refuse
from paramesh.registry import Registry

if TYPE_CHECKING:
    from paramesh.membership import Session

__all__ = ["Session", "current", "init", "registry", "shutdown", "using"]


def __getattr__(name: str) -> Any:
    """`Session` by its usual address, without importing protobuf for those who are alone."""
    if name == "Session":
        from paramesh.membership import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Process:
    """The one session that the environment names, joined on first use, left at exit."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._session: Session | None = None
        self._looked = False
        """Whether the environment was read; alone is decided once, until `init`."""
        self._crashed = False
        """Whether an exception nobody caught is ending the interpreter; set by excepthook."""
        self._guarded = False
        self.alone = Registry()
        """What the script made while no cluster is named."""

    def current(self) -> Session | None:
        if self._looked:
            return self._session
        return self.init(ClientConfig.from_environment())

    def init(self, config: ClientConfig) -> Session | None:
        with self._lock:
            if self._session is not None and not self._session.closed:
                return self._session
            self._session = None if config.alone else self._join(config)
            self._looked = True
            return self._session

    def _join(self, config: ClientConfig) -> Session:
        _refuse_in_data_workers()
        from paramesh.joining import set_local_device
        from paramesh.membership import Session

        session = Session.join(config)
        set_local_device(config)
        session.departure.install()
        if not self._guarded:
            self._guarded = True
            self._watch_for_crashes()
            atexit.register(self._at_exit)
        return session

    def _watch_for_crashes(self) -> None:
        previous = sys.excepthook

        def note(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            self._crashed = True
            previous(kind, error, trace)

        sys.excepthook = note

    def _at_exit(self) -> None:
        if self._session is not None:
            self._session.leave(gracefully=not self._crashed)

    def shutdown(self) -> None:
        with self._lock:
            if self._session is not None:
                self._session.leave()


_process = _Process()

_UNSET: Any = object()
_override: ContextVar[Session | None] = ContextVar("paramesh_session", default=_UNSET)


def _refuse_in_data_workers() -> None:
    """A spawned DataLoader worker inherits the environment; it must not join by it."""
    data = sys.modules.get("torch.utils.data")
    if data is not None and data.get_worker_info() is not None:
        raise refuse("FORKED", "a DataLoader worker cannot use the cluster: call Paramesh in the training process only")


def current() -> Session | None:
    """The session of this context: the one of `using`, else the process's; None: alone.

    The process's joins the cluster of the environment on first use.
    """
    override = _override.get()
    return _process.current() if override is _UNSET else override


def registry() -> Registry:
    """What the script has made: the current session's registry, or the process's when alone."""
    session = current()
    return _process.alone if session is None else session.registry


@contextlib.contextmanager
def using(session: Session | None) -> Iterator[Session | None]:
    """Make a session the current one of this thread (or task); None: alone.

    For in-process clusters, whose workers are threads of one process.
    """
    token = _override.set(session)
    try:
        yield session
    finally:
        _override.reset(token)


def init(coordinator: str | None = None, *, job: str | None = None, rank: int | None = None) -> bool:
    """Join the cluster now; otherwise the first use of the library does it.

    Args:
        coordinator: `host:port[,host:port]`; default: PARAMESH_COORDINATOR. Without either
            the process is alone and nothing is started.
        job: the cluster's name; default: PARAMESH_JOB.
        rank: the rank asked for; default: PARAMESH_RANK.

    Returns:
        Whether this process is now a member of a cluster.

    Raises:
        ConfigError: a variable or argument is wrong.
        Timeout: the cluster does not answer.
    """
    if _override.get() is not _UNSET:
        return _override.get() is not None
    environ = dict(os.environ)
    given = {"PARAMESH_COORDINATOR": coordinator, "PARAMESH_JOB": job, "PARAMESH_RANK": rank}
    environ.update({name: str(value) for name, value in given.items() if value is not None})
    return _process.init(ClientConfig.from_environment(environ)) is not None


def shutdown() -> None:
    """Leave the cluster: what was pushed is applied, leases return. A clean exit does the same."""
    override = _override.get()
    if override is _UNSET:
        _process.shutdown()
    elif override is not None:
        override.leave()
