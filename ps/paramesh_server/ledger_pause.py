"""A moment in which no asynchronous worker is in the middle of a clock, for a checkpoint. Pure.

    pause.begin("checkpoint-000007")     # finished clocks are held from here on
    pause.quiet                          # every ACTIVE member's is: no update is half applied
    whole, torn = pause.end("checkpoint-000007")

A worker pushes only while it is ACTIVE, and only between an answer to `Clock` and the next
`Clock`. So while all ACTIVE members wait in `Clock` and nobody becomes ACTIVE, whatever a
partition has of one update, every partition has. Volatile: a new primary of the ledger has no
pause, and the checkpoint is made anew (docs/decisions/0013).
"""

from __future__ import annotations

from paramesh.errors import refuse
from paramesh.v1.ledger_pb2 import ACTIVITY_ACTIVE

from paramesh_server.ledger_log import Desk, Left, Wait
from paramesh_server.ledger_members import Members, MemberState

PAUSE_S = 30.0
"""Seconds after which a pause ends by itself: a worker that evaluates, or a coordinator that died in
between, must not stop the others for long."""

KEY = ("pause",)


class Pause:
    """Holds finished clocks while a checkpoint of level `aligned` is cut."""

    def __init__(self, desk: Desk, members: Members) -> None:
        self._desk = desk
        self._members = members
        self._checkpoint = ""
        self._until = 0.0
        self._held: set[int] = set()
        """Members that wait in `Clock` since the pause began."""
        self._begun: set[int] = set()
        """Members that trained when the pause began, and have not finished their clock."""
        self._torn: set[int] = set()
        self._told: dict[int, tuple[str, bool]] = {}
        """For each member whose clock is a checkpoint's cut: its id, and whether it keeps what all share."""
        desk.on(Left, self._apply_left)

    @property
    def on(self) -> bool:
        """Whether clocks are held."""
        return bool(self._checkpoint)

    @property
    def quiet(self) -> bool:
        """Whether no member is in the middle of a clock."""
        return self.on and not self.missing()

    def missing(self) -> list[int]:
        """ACTIVE members whose clock is not held yet."""
        members = self._members.state.members.values()
        return [m.client_id for m in members if m.activity == ACTIVITY_ACTIVE and m.client_id not in self._held]

    def begin(self, checkpoint: str) -> None:
        """Hold clocks for a checkpoint; the same again changes nothing, another one replaces it."""
        if checkpoint == self._checkpoint:
            return
        self._checkpoint, self._until = checkpoint, self._desk.now + PAUSE_S
        self._held.clear()
        self._torn.clear()
        self._begun = set(self.missing())

    def end(self, checkpoint: str) -> tuple[bool, list[int]]:
        """Let everybody go on.

        Returns:
            Whether the pause was this one's and quiet until now; who was evicted in the middle of a clock.
        """
        if checkpoint != self._checkpoint:
            return False, []
        whole, torn = self.quiet, sorted(self._torn)
        if whole:
            self._told = {client: (checkpoint, client == min(self._held)) for client in self._held}
        self._stop()
        return whole, torn

    def _stop(self) -> None:
        self._checkpoint = ""
        self._held.clear()
        self._desk.wake(KEY)

    # ------------------------------------------------------------------ asking

    def hold(self, client_id: int) -> Wait | None:
        """What a finished clock is answered while the pause lasts."""
        if not self.on:
            return None
        self._held.add(client_id)
        self._begun.discard(client_id)
        return self.wait()

    def wait(self) -> Wait:
        """Until the pause is over."""
        checkpoint = self._checkpoint
        return Wait(KEY, f"checkpoint {checkpoint} to be cut", lambda: self._members.ranks(self.missing()))

    def keeps_out(self, member: MemberState) -> bool:
        """Whether a member that does not train now must not begin."""
        return self.on and member.activity != ACTIVITY_ACTIVE

    def check_entry(self, member: MemberState) -> None:
        """Refuse a member that would become ACTIVE.

        Raises:
            Retryable: NOT_READY.
        """
        if self.keeps_out(member):
            raise refuse("NOT_READY", f"training is paused for checkpoint {self._checkpoint}")

    def told(self, client_id: int) -> tuple[str, bool]:
        """The checkpoint whose cut a member's last clock is, and whether it keeps what all share; ("", False): none."""
        return self._told.get(client_id, ("", False))

    def went_on(self, client_id: int) -> None:
        """A member has finished another clock: the cut is behind it."""
        self._told.pop(client_id, None)

    # ------------------------------------------------------------------ time, members

    def tick(self) -> None:
        """End a pause that takes too long."""
        if self.on and self._desk.now >= self._until:
            ranks = self._members.ranks(self.missing())
            self._desk.notice(f"pause for checkpoint {self._checkpoint} given up: ranks {ranks} are not between clocks")
            self._stop()

    def next_deadline(self) -> float | None:
        """When a pause ends by itself."""
        return self._until if self.on else None

    def _apply_left(self, body: Left) -> None:
        if self.on and body.evicted and body.client_id in self._begun:
            self._torn.add(body.client_id)
        self._begun.discard(body.client_id)
        self._held.discard(body.client_id)
        self._told.pop(body.client_id, None)
