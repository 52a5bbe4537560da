"""The ledger's state as a whole: captured, installed, hashed. Pure.

    data = whole.capture()       # of a ledger at some record
    whole.install(data)          # on a fresh one: equal state, equal behaviour

What is derived from the state (indexes, counts) is derived again; what is volatile (Readys,
norms, timers) is not there, as after a replay: callers repeat it.
"""

from __future__ import annotations

from paramesh_server.ledger_codec import LedgerState, decode_state, encode_state
from paramesh_server.ledger_epochs import Epochs
from paramesh_server.ledger_groups import Groups
from paramesh_server.ledger_log import Desk, digest
from paramesh_server.ledger_members import Members
from paramesh_server.ledger_small import Gathers, SmallState
from paramesh_server.ledger_steps import Steps


class Whole:
    """All parts that hold replicated state."""

    def __init__(
        self,
        desk: Desk,
        members: Members,
        groups: Groups,
        epochs: Epochs,
        steps: Steps,
        small: SmallState,
        gathers: Gathers,
    ):
        self._desk = desk
        self._members = members
        self._groups = groups
        self._epochs = epochs
        self._steps = steps
        self._small = small
        self._gathers = gathers

    def _state(self) -> LedgerState:
        return LedgerState(
            self._desk.lsn,
            self._members.state,
            self._groups.state,
            self._epochs.state,
            self._small.state,
            self._gathers.state,
        )

    def capture(self) -> bytes:
        """The whole state, with the number of the last record that is in it."""
        return encode_state(self._state())

    def install(self, data: bytes) -> None:
        """Make a fresh ledger what the captured one was, as a follower.

        Raises:
            RequestRefused: FORMAT, these are not captured bytes; nothing changed.
            ValueError: this ledger has records already.
        """
        if self._desk.lsn:
            raise ValueError(f"this ledger is at record {self._desk.lsn}: only a fresh one takes a snapshot")
        state = decode_state(data)
        self._desk.sink, self._desk.lsn = None, state.lsn
        self._members.install(state.members)
        self._groups.install(state.groups)
        self._epochs.install(state.epochs)
        self._small.install(state.small)
        self._gathers.install(state.gathers)
        self._steps.installed()

    def digest(self) -> str:
        """A hash of all of it but the record's number."""
        state = self._state()
        return digest([state.members, state.groups, state.epochs, state.small, state.gathers])
