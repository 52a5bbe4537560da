"""Which coordinator to ask next, when one does not answer or is not the one that leads. Pure.

turns = Rotation("host-a:7070,host-b:7070,host-c:7070")
while True:
    try: return await ask(turns.address)
    except ...: await asyncio.sleep(turns.failed(error))
"""

from __future__ import annotations

from paramesh.errors import Action, ParameshError
from paramesh.retry import Backoff

__all__ = ["Rotation"]

NEXT_S = 0.02
"""Before the next address of a round: they fail for reasons of their own, so one need not wait for the other,
but a bug must not become a hot loop."""

CAP_S = 0.5
"""Between rounds, at most: a new leader is there within some three seconds, and is found that much later."""

ELSEWHERE = frozenset({"UNREACHABLE", "DEADLINE", "STALE_TERM"})
"""What another coordinator may not say: no answer, and the last words of one that was replaced."""


class Rotation:
    """Addresses in turn; a standby's hint is followed once a round.

    Args:
        addresses: `host:port[,host:port...]`.
    """

    def __init__(self, addresses: str):
        self.addresses = [address.strip() for address in addresses.split(",") if address.strip()]
        self._given = len(self.addresses)
        self._at = 0
        self._tried = 0
        """Addresses that failed in this round."""
        self._followed = False
        self._backoff = Backoff(cap=CAP_S)

    @property
    def address(self) -> str:
        """Whom to ask now."""
        return self.addresses[self._at]

    def succeeded(self) -> None:
        """The address answered: the next failure begins a new round."""
        self._tried, self._followed = 0, False
        self._backoff = Backoff(cap=CAP_S)

    def failed(self, error: ParameshError | None = None) -> float:
        """Turn to the next address.

        Args:
            error: what the address in use answered; None: it broke off.

        Returns:
            Seconds to wait before asking it.
        """
        leader = error.metadata.get("leader", "") if error is not None else ""
        self._tried += 1
        if leader and leader != self.address and not self._followed:
            # Once a round: it may be dead, and named until its lease runs out.
            self._followed = True
            self._at = self._index(leader)
            return 0.0
        self._at = (self._at + 1) % len(self.addresses)
        if self._tried < len(self.addresses):
            return NEXT_S
        self._tried, self._followed = 0, False
        return self._backoff.next()

    def _index(self, address: str) -> int:
        """Where an address is in the list; one that was not given takes the place of the last such."""
        if address not in self.addresses:
            del self.addresses[self._given :]
            self.addresses.append(address)
        return self.addresses.index(address)


def elsewhere(error: ParameshError) -> bool:
    """Whether another coordinator, or the same one later, may answer better."""
    return error.reason in ELSEWHERE or error.action is Action.BACK_OFF
