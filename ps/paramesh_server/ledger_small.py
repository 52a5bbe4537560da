"""Small things that the ledger keeps: workers' state, barriers and means, figures. Pure.

small.put(request)              # versions only rise
gathers.gather(request)         # GatherResponse, or Wait for the other members
figures.report(request)         # the latest loss, for people
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from paramesh.errors import refuse
from paramesh.routing import check_name
from paramesh.v1.ledger_pb2 import (
    Figure,
    GatherRequest,
    GatherResponse,
    GetStateResponse,
    PutStateRequest,
    ReportRequest,
)

from paramesh_server.ledger_log import Desk, Gathered, GatherEntered, Left, StatePut, Wait, require
from paramesh_server.ledger_members import Members

STATE_BYTES = 4 << 20
"""Bytes of one value. Larger things belong in a checkpoint or a table."""

STATE_TOTAL_BYTES = 256 << 20
"""Bytes of all values. A server must not be filled through the side door."""

STATE_KEYS = 65_536

GATHER_VALUES = 1 << 18
"""Numbers in one round, and numbers remembered for each name: 2 MiB."""

GATHER_ROUNDS = 4096
"""Rounds remembered for each name, so that a restarted worker passes those it missed."""

GATHER_NAMES = 4096

FIGURES = 256
"""Figures of one member."""


class SmallState:
    """Values by key; the highest version stays."""

    def __init__(self, desk: Desk, members: Members):
        self._desk = desk
        self._members = members
        self.state: dict[str, tuple[int, bytes]] = {}
        """For each key, (version, value)."""
        self._bytes = 0
        """Of all values."""
        desk.on(StatePut, self._apply)

    def install(self, state: dict[str, tuple[int, bytes]]) -> None:
        """Replace the state by a snapshot's; derive what is derived."""
        self.state = state
        self._bytes = sum(len(value) for _, value in state.values())

    def put(self, request: PutStateRequest) -> int:
        """Keep a value unless a higher version is kept; returns the version kept.

        Raises:
            RequestRefused: NAME, MISSING_FIELD, STATE_TOO_LARGE.
            StateRefused: QUOTA.
            Fenced: EVICTED.
        """
        require(request.request.client_id, "request.client_id")
        self._members.refuse_evicted(request.request.client_id)
        check_name(request.key, "state key")
        if len(request.value) > STATE_BYTES:
            raise refuse(
                "STATE_TOO_LARGE",
                f"state {request.key} has {len(request.value)} bytes, at most {STATE_BYTES} fit; keep large state "
                "in a checkpoint",
                key=request.key,
            )
        version, value = self.state.get(request.key, (-1, b""))
        if request.version < version:
            return version
        total = self._bytes + len(request.value) - len(value)
        if total > STATE_TOTAL_BYTES or (version < 0 and len(self.state) >= STATE_KEYS):
            raise refuse("QUOTA", f"small state holds at most {STATE_TOTAL_BYTES} bytes in {STATE_KEYS} keys")
        if (version, value) != (request.version, request.value):
            self._desk.commit(StatePut(request.key, request.version, request.value))
        return request.version

    def get(self, key: str) -> GetStateResponse:
        """The value kept under a key, if any.

        Raises:
            RequestRefused: NAME.
        """
        check_name(key, "state key")
        if key not in self.state:
            return GetStateResponse()
        version, value = self.state[key]
        return GetStateResponse(found=True, version=version, value=value)

    def _apply(self, body: StatePut) -> None:
        self._bytes += len(body.value) - len(self.state.get(body.key, (0, b""))[1])
        self.state[body.key] = (body.version, body.value)


@dataclass(slots=True)
class GatherState:
    """What replicas agree on about one named barrier or mean."""

    next_round: int = 0
    results: dict[int, tuple[tuple[float, ...], int]] = field(default_factory=dict)
    """For each remembered round, (values, count), contiguous up to `next_round - 1`."""
    numbers: int = 0
    """Values in `results`."""
    members: set[int] = field(default_factory=set)
    """Who takes part in the next one: who took part in the last, or was told its result."""


class Gathers:
    """Barriers and means. A round waits for the members that are at it.

    That is those who took part in the round before, or were told its result (a restarted
    worker passes the rounds it missed, and counts from then on); in round 0 all members.
    """

    def __init__(self, desk: Desk, members: Members):
        self._desk = desk
        self._members = members
        self.state: dict[str, GatherState] = {}
        self._arrived: dict[str, dict[int, GatherRequest]] = {}
        """For each name, who is in the open round with what. Volatile: callers repeat it."""
        desk.on(Gathered, self._apply)
        desk.on(GatherEntered, self._apply_entered)
        desk.on(Left, self._apply_left)

    def install(self, state: dict[str, GatherState]) -> None:
        """Replace the state by a snapshot's."""
        self.state = state

    def gather(self, request: GatherRequest) -> GatherResponse | Wait:
        """Bring values to a round; answer its mean when everybody is there.

        Raises:
            RequestRefused: NAME, WEIGHT, SEQ_REUSED.
            StateRefused: QUOTA, SCHEMA (other number of values), STEP_OUT_OF_RANGE (a later round).
            Fenced: EVICTED, NOT_MEMBER.
        """
        member = self._members.need(request.request.client_id)
        self._check(request)
        gather = self.state.get(request.name, GatherState())
        if request.round < gather.next_round:
            if request.round == gather.next_round - 1 and member.client_id not in gather.members:
                self._desk.commit(GatherEntered(request.name, member.client_id))
            return self._result(gather, request.round)
        if request.round > gather.next_round:
            raise refuse(
                "STEP_OUT_OF_RANGE",
                f"round {request.round} of {request.name} is not the next one, {gather.next_round}",
                next_round=gather.next_round,
            )
        self._arrive(member.client_id, request)
        self.settle()
        if request.name in self.state and request.round < self.state[request.name].next_round:
            return self._result(self.state[request.name], request.round)
        return Wait(
            ("gather", request.name, request.round),
            f"round {request.round} of {request.name}",
            lambda: self._members.ranks(self._missing(request.name)),
        )

    def _check(self, request: GatherRequest) -> None:
        check_name(request.name, "name")
        if request.name not in self.state and len(self.state) + len(self._arrived) >= GATHER_NAMES:
            raise refuse("QUOTA", f"at most {GATHER_NAMES} names of barriers and means")
        if len(request.values) > GATHER_VALUES:
            raise refuse("QUOTA", f"at most {GATHER_VALUES} values in one round of {request.name}")
        if not 0 <= request.weight < math.inf:
            raise refuse("WEIGHT", f"weight {request.weight} of {request.name} must be finite and >= 0")

    def _arrive(self, client_id: int, request: GatherRequest) -> None:
        arrived = self._arrived.get(request.name, {})
        plain = GatherRequest(name=request.name, round=request.round, values=request.values, weight=request.weight)
        for other, theirs in arrived.items():
            if other == client_id and theirs.SerializeToString() != plain.SerializeToString():
                raise refuse("SEQ_REUSED", f"round {request.round} of {request.name} came with other values before")
            if len(theirs.values) != len(plain.values):
                raise refuse(
                    "SCHEMA",
                    f"round {request.round} of {request.name} has {len(theirs.values)} values on other workers, "
                    f"{len(plain.values)} here",
                )
        self._arrived.setdefault(request.name, {})[client_id] = plain

    def _missing(self, name: str) -> list[int]:
        gather = self.state.get(name)
        here = self._arrived.get(name, {})
        members = self._members.state.members
        expected = set(members) if gather is None else gather.members
        return [c for c in expected if c in members and c not in here]

    def settle(self) -> None:
        """Complete every round whose members are all there."""
        if not self._members.state.started:
            return
        for name, arrived in list(self._arrived.items()):
            if arrived and not self._missing(name):
                ranks = {c: self._members.state.members[c].rank for c in arrived}
                ordered = sorted(arrived, key=ranks.__getitem__)
                values = mean([arrived[c] for c in ordered])
                self._desk.commit(Gathered(name, next(iter(arrived.values())).round, values, tuple(ordered)))

    @staticmethod
    def _result(gather: GatherState, number: int) -> GatherResponse:
        values, count = gather.results.get(number, ((), 0))
        return GatherResponse(values=values, count=count)

    def _apply(self, body: Gathered) -> None:
        gather = self.state.setdefault(body.name, GatherState())
        gather.next_round = body.round + 1
        gather.results[body.round] = (body.values, len(body.client_ids))
        gather.numbers += len(body.values)
        gather.members = set(body.client_ids)
        while len(gather.results) > 1 and (len(gather.results) > GATHER_ROUNDS or gather.numbers > GATHER_VALUES):
            values, _ = gather.results.pop(gather.next_round - len(gather.results))  # the oldest
            gather.numbers -= len(values)
        self._arrived.pop(body.name, None)
        self._desk.wake(("gather", body.name, body.round))

    def _apply_entered(self, body: GatherEntered) -> None:
        self.state[body.name].members.add(body.client_id)

    def _apply_left(self, body: Left) -> None:
        for gather in self.state.values():
            gather.members.discard(body.client_id)
        for name, arrived in list(self._arrived.items()):
            request = arrived.pop(body.client_id, None)
            if request is not None:
                self._desk.wake(("gather", name, request.round))
            if not arrived:
                del self._arrived[name]


def mean(requests: list[GatherRequest]) -> tuple[float, ...]:
    """The mean by position, weighted; plain if every weight is zero. fp64, in the order given."""
    weights = [request.weight for request in requests]
    if not sum(weights):
        weights = [1.0] * len(requests)
    total = sum(weights)
    columns = zip(*(request.values for request in requests), strict=True)
    return tuple(sum(w * v for w, v in zip(weights, column, strict=True)) / total for column in columns)


class Figures:
    """The latest figures of every member. Volatile: for people."""

    def __init__(self, desk: Desk, members: Members):
        self._members = members
        self._latest: dict[int, dict[str, float]] = {}
        desk.on(Left, self._apply_left)

    def report(self, request: ReportRequest) -> None:
        """Note figures.

        Raises:
            RequestRefused: NAME.
            StateRefused: QUOTA.
            Fenced: EVICTED, NOT_MEMBER.
        """
        member = self._members.need(request.request.client_id)
        latest = dict(self._latest.get(member.client_id, {}))
        for figure in request.figures:
            check_name(figure.name, "figure")
            latest[figure.name] = figure.value
        if len(latest) > FIGURES:
            raise refuse("QUOTA", f"a worker reports at most {FIGURES} figures")
        self._latest[member.client_id] = latest

    def _apply_left(self, body: Left) -> None:
        self._latest.pop(body.client_id, None)

    def mean(self) -> list[Figure]:
        """The latest of each name, averaged over the members that reported it."""
        by_name: dict[str, list[float]] = {}
        for latest in self._latest.values():
            for name, value in latest.items():
                by_name.setdefault(name, []).append(value)
        return [Figure(name=name, value=sum(vs) / len(vs)) for name, vs in sorted(by_name.items())]
