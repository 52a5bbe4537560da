"""Who is silent, and whether that counts. Pure: time is passed in.

    liveness.track(node, now)
    nonce = liveness.beat(node, echo, now)      # answer with it; None: not known here
    for silent in liveness.tick(now).dead: ...

Silence counts from the arrival of the last *fresh echo*: a beat that returns a nonce of
ours which it had not returned before. So a node that we cannot reach is silent even
though its own beats arrive. And it counts only while the coordinator itself ran and
heard: after a late tick, or while fewer than half of the nodes echo, the fault is as
likely ours (paused, cut off), and everybody gets a new grace.

The second doubt ends: when a witness was heard all the time for `DOUBT_TIMEOUTS` timeouts,
the others really are gone. A witness is on another machine than this one, if anybody is
(docs/decisions/0009-doubt-that-ends.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from paramesh_coordinator.state import NodeKey

__all__ = ["DOUBT_TIMEOUTS", "FRESH_BEATS", "Liveness", "Silent", "Verdict"]

FRESH_BEATS = 1.6
"""In beats (0.8 s of 0.5 s ones): an echo is fresh for one beat and the jitter of the next;
a tick that is later than this may have missed everybody's beats."""

LIVELY_BEATS = 2
"""Who was heard within as many beats may take others out of an in-sync set."""

DOUBT_TIMEOUTS = 5
"""Failure timeouts (10 s of the default 2 s) that most nodes may be silent before it is they who
are gone: longer than a switch takes to come back, shorter than people take to look."""


@dataclass(frozen=True)
class Silent:
    """A node whose time is over, with the evidence."""

    node: NodeKey
    silence: float
    """Seconds since its last fresh echo, or since the grace began."""
    timeout: float


@dataclass(frozen=True)
class Verdict:
    """What a tick found."""

    dead: tuple[Silent, ...] = ()
    grace: str = ""
    """Why the grace began anew; empty if it did not."""


@dataclass
class _Watched:
    """One node."""

    fresh: float
    """When its last fresh echo came."""
    echoed: int = 0
    """The highest nonce that it has returned; only rises, so a repeated echo is stale."""
    heard: bool = True
    """Whether it was ever heard by this coordinator: a registration or a fresh echo."""
    sent: int = 0
    """The last nonce that it was sent; 0 before the first."""
    remote: bool = False
    """Whether its beats came from another machine; False until one did."""


@dataclass
class Liveness:
    """Everybody's last sign of life.

    Args:
        interval: seconds between beats.
        failure_timeout: silence of a server or host that is death, seconds.
        client_timeout: the same of a client that beats for itself.
        now: the start; a grace of one timeout begins.
        first_nonce: a random number, so that an echo of an earlier coordinator is no echo.
    """

    interval: float
    failure_timeout: float
    client_timeout: float
    now: float
    first_nonce: int
    _nodes: dict[NodeKey, _Watched] = field(default_factory=dict)
    _grace: float = field(init=False)
    """Silence before this moment does not count."""
    _last_tick: float = field(init=False)
    _doubted: float | None = field(init=False, default=None)
    """Since when most nodes are silent while a witness is heard; None: they are not, or there is none."""
    _nonce: int = field(init=False)
    """The last nonce given out; only rises."""

    def __post_init__(self) -> None:
        self._grace = self._last_tick = self.now
        self._nonce = self.first_nonce

    def track(self, node: NodeKey, now: float, *, heard: bool = True) -> None:
        """Begin to watch a node, or count a repeated registration as a sign of life.

        Args:
            node: who.
            now: when.
            heard: False for one that the store says is live and that has not spoken to us yet.
        """
        watched = self._nodes.setdefault(node, _Watched(now))
        watched.fresh, watched.heard = now, heard

    def forget(self, node: NodeKey) -> None:
        """Stop watching."""
        self._nodes.pop(node, None)

    def beat(self, node: NodeKey, echo: int, now: float, *, remote: bool = False) -> int | None:
        """Take in a beat.

        Args:
            node: whose.
            echo: the nonce that it returns.
            now: seconds.
            remote: it came from another machine.

        Returns:
            The nonce to answer with, or None for a node that is not watched.
        """
        watched = self._nodes.get(node)
        if watched is None:
            return None
        watched.remote = remote
        if watched.echoed < echo <= watched.sent:
            watched.echoed = echo
            watched.fresh, watched.heard = now, True
        self._nonce += 1
        watched.sent = self._nonce
        if not watched.echoed:
            watched.echoed = self._nonce - 1  # a nonce of somebody else's, or of before, is no echo
        return self._nonce

    def silence(self, node: NodeKey, now: float) -> float:
        """Seconds since the last fresh echo, for people; 0 for a node that is not watched."""
        watched = self._nodes.get(node)
        return 0.0 if watched is None else max(0.0, now - watched.fresh)

    def fresh(self, node: NodeKey, now: float) -> bool:
        """Whether a node's echo came less than two beats ago; no grace counts here."""
        watched = self._nodes.get(node)
        return watched is not None and watched.heard and now - watched.fresh < LIVELY_BEATS * self.interval

    def tick(self, now: float) -> Verdict:
        """Judge everybody. Call it several times per beat."""
        late, self._last_tick = now - self._last_tick, now
        window = FRESH_BEATS * self.interval
        if late > window:
            self._doubted = None
            return self._renew(now, f"own tick came {late:.2f} s after the one before")
        fresh = [watched for watched in self._nodes.values() if now - watched.fresh <= window]
        if 2 * len(fresh) >= len(self._nodes):
            self._doubted = None
        elif not self._doubt_is_over(fresh, now):
            return self._renew(
                now, f"only {len(fresh)} of {len(self._nodes)} nodes were heard in the last {window:.2f} s"
            )
        return Verdict(tuple(self._silent(now)))

    def _doubt_is_over(self, fresh: list[_Watched], now: float) -> bool:
        """Whether a witness was heard for so long that those who are silent are really gone."""
        # On one machine there is no network to be cut off from, and everybody is a witness.
        network = any(watched.remote for watched in self._nodes.values())
        if not any(watched.remote or not network for watched in fresh):
            self._doubted = None
            return False
        if self._doubted is None:
            self._doubted = now
        return now - self._doubted > DOUBT_TIMEOUTS * self.failure_timeout

    def _renew(self, now: float, why: str) -> Verdict:
        self._grace = now
        return Verdict(grace=why)

    def _silent(self, now: float) -> Iterable[Silent]:
        for node, watched in self._nodes.items():
            timeout = self.client_timeout if node.kind == "client" else self.failure_timeout
            silence = now - max(watched.fresh, self._grace)
            if silence > timeout:
                yield Silent(node, silence, timeout)
