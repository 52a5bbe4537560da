"""The ledger: members, steps, clocks, data leases and small state of one job. Pure.

    ledger = Ledger(config, sink=log.append)
    answer = ledger.ready(request, now)     # a response, or Wait(key, what, who)
    ledger.take_woken()                     # keys whose waiters must ask again, the same
    ledger.tick(now)                        # at ledger.next_deadline(), at the latest

Events in, answers out: no threads, sockets, files or clocks; `now` is seconds of any clock
that only rises. Every call is repeatable, so a wait is nothing but asking again. The state
is a function of the records: `replay` on a fresh ledger gives an equal `state_digest`.

    follower = Ledger(config)
    follower.install(snapshot)              # or from nothing
    follower.replay([decode_record(data)])  # committed ones, in order
    follower.serve(log.append, config, now) # promoted: from here on it decides
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from paramesh.v1 import ledger_pb2 as pb
from paramesh.v1.types_pb2 import JobConfig

from paramesh_server.ledger_clip import Clips
from paramesh_server.ledger_clocks import Clocks
from paramesh_server.ledger_epochs import Epochs
from paramesh_server.ledger_groups import Groups, GroupState
from paramesh_server.ledger_leases import Leases
from paramesh_server.ledger_log import Desk, Key, Record, Wait
from paramesh_server.ledger_members import Members
from paramesh_server.ledger_pause import Pause
from paramesh_server.ledger_small import Figures, Gathers, SmallState
from paramesh_server.ledger_status import Status
from paramesh_server.ledger_steps import Steps
from paramesh_server.ledger_whole import Whole

__all__ = ["Ledger", "LedgerCut", "Record", "Wait"]


@dataclass(frozen=True, slots=True)
class LedgerCut:
    """The ledger's part of a checkpoint."""

    checkpoint: str
    lsn: int
    data: bytes
    """As `Ledger.capture` has it."""
    groups: dict[int, tuple[str, bool, int]]
    """For each group: name, whether it trains in steps, the next one."""
    steps: dict[int, int]
    """For each group that was marked, the step that carried the mark."""
    ranks: tuple[int, ...]
    """Members at the cut."""

    def torn(self) -> str:
        """Why this is no cut between two steps; empty: it is one."""
        for number, step in self.steps.items():
            name, _, next_step = self.groups[number]
            if next_step != step + 1:
                return f"group {name} had gone on to step {next_step} when the last group came to its marked one"
        return ""


def _drop(_: Record) -> None:
    """Nobody follows: with one replica records need not be kept."""


class Ledger:
    """One job's ledger. Not thread-safe; one driver calls it.

    Requests are those of the Ledger service; their headers are checked by the servicer, all
    but `client_id`. Methods raise typed errors (`paramesh.errors`), and then nothing changed.

    Args:
        config: the job's settings. They steer what is decided, never how a record is applied,
            so replicas may have those of different maps.
        sink: takes each record before it is applied. What it raises, the call that brought the
            decision about raises; the record is not applied then.
    """

    def __init__(self, config: JobConfig, sink: Callable[[Record], None] = _drop):
        self._desk = Desk(_copy(config), sink)
        self._members = Members(self._desk)
        self._groups = Groups(self._desk, self._members)
        self._epochs = Epochs(self._desk, self._members)
        self._leases = Leases(self._desk, self._members, self._groups, self._epochs)
        self._steps = Steps(self._desk, self._members, self._groups, self._epochs)
        self._clips = Clips(self._desk, self._members, self._steps)
        self.pause = Pause(self._desk, self._members)
        """Of asynchronous training, for a checkpoint."""
        self._clocks = Clocks(self._desk, self._members, self._groups, self._epochs, self.pause)
        self._small = SmallState(self._desk, self._members)
        self._gathers = Gathers(self._desk, self._members)
        self._figures = Figures(self._desk, self._members)
        self._whole = Whole(
            self._desk, self._members, self._groups, self._epochs, self._steps, self._small, self._gathers
        )
        self._status = Status(self._members, self._groups, self._steps, self._clocks, self._epochs)

    # ------------------------------------------------------------------ driving

    @property
    def lsn(self) -> int:
        """The number of the last record."""
        return self._desk.lsn

    @property
    def slots(self) -> dict[int, str]:
        """The slot of each member, by client id."""
        return {client: member.slot for client, member in self._members.state.members.items()}

    @property
    def tombstones(self) -> frozenset[int]:
        """Clients that were evicted."""
        return frozenset(self._members.state.tombstones)

    @property
    def following(self) -> bool:
        """Whether it replays another's records, and decides nothing."""
        return self._desk.sink is None

    def serve(self, sink: Callable[[Record], None], config: JobConfig, now: float) -> None:
        """Decide from here on: a follower is promoted, or a fresh ledger gets its log.

        What was volatile at the ledger before is gone; callers repeat it. The old one's last
        event may be here in part: what follows from the part is decided now.

        Args:
            sink: as in the constructor.
            config: the job's settings.
            now: seconds of this machine's clock; everything that is timed begins anew.
        """
        self._desk.sink, self._desk.config, self._desk.now = sink, _copy(config), now
        self._members.forget_times()
        self._members.start_if_enough()
        self._settle()

    def take_woken(self) -> set[Key]:
        """Keys whose waiters must ask again, since the last take."""
        woken, self._desk.woken = self._desk.woken, set()
        return woken

    def take_notices(self) -> list[str]:
        """Lines for the log, since the last take."""
        notices, self._desk.notices = self._desk.notices, []
        return notices

    def tick(self, now: float) -> None:
        """Act on time alone: gathers that ran out, members over the step timeout."""
        self._desk.now = now
        self._steps.tick()
        self._leases.tick()
        self.pause.tick()
        self._settle()

    def next_deadline(self) -> float | None:
        """When `tick` may find something to do; None: not before the next call."""
        parts = (self._steps, self._groups, self._leases, self.pause)
        times = (part.next_deadline() for part in parts)
        return min((time for time in times if time is not None), default=None)

    def update_config(self, config: JobConfig, now: float) -> None:
        """Adopt the job's settings as the map has them now. No record: the map is their truth."""
        if self._desk.config == config:
            return
        self._desk.config = _copy(config)
        if not self.following:
            self._desk.now = now
            self._members.start_if_enough()
            self._settle()

    def replay(self, records: Iterable[Record]) -> None:
        """Apply records of another ledger, in order; from then on this one follows.

        Raises:
            ValueError: a number is missing.
        """
        self._desk.sink = None
        for record in records:
            self._desk.apply(record)
        self._desk.woken.clear()  # nobody waits at a follower

    def want_cut(self, checkpoint: str) -> None:
        """Have the next decision of each group carry a checkpoint's id; "": no longer. Volatile."""
        self._steps.want_cut(checkpoint)

    def take_cut(self) -> LedgerCut | None:
        """The cut that was wanted, once every group has decided its marked step."""
        found = self._steps.taken_cut()
        return None if found is None else self.cut(*found)

    def cut(self, checkpoint: str, steps: dict[int, int] | None = None) -> LedgerCut:
        """The whole state now, and where every group stands.

        Args:
            checkpoint: whose.
            steps: for each group that was marked, the step that carried the mark.
        """
        ranks = tuple(sorted(member.rank for member in self._members.state.members.values()))
        state = {
            n: (g.spec.name, not self._clocks.has_clocks(g), self._stands(g)) for n, g in self._groups.state.items()
        }
        return LedgerCut(checkpoint, self.lsn, self.capture(), state, dict(steps or {}), ranks)

    def _stands(self, group: GroupState) -> int:
        return max(group.clocks.values(), default=group.next_step)

    def pause_clocks(self, checkpoint: str, now: float) -> tuple[bool, tuple[int, ...]]:
        """Hold finished clocks; whether no member is in the middle of one now, and which ranks are. Volatile."""
        self._desk.now = now
        self._clocks.pause(checkpoint)
        return self.pause.quiet, self._members.ranks(self.pause.missing())

    def resume_clocks(self, checkpoint: str, now: float) -> tuple[bool, list[int]]:
        """End a pause: whether it lasted, and who was evicted in the middle of a clock."""
        self._desk.now = now
        return self.pause.end(checkpoint)

    def capture(self) -> bytes:
        """The whole replicated state, with the number of the last record."""
        return self._whole.capture()

    def install(self, data: bytes) -> None:
        """Take over a captured state, on a fresh ledger; from then on it follows.

        Raises:
            RequestRefused: FORMAT; nothing changed.
            ValueError: this ledger has records already.
        """
        self._whole.install(data)

    def state_digest(self) -> str:
        """A hash of all replicated state."""
        return self._whole.digest()

    def _settle(self) -> None:
        """Draw every conclusion that the last event allows."""
        self._steps.settle()
        self._groups.settle()
        self._leases.settle()
        self._gathers.settle()

    def summary(self) -> str:
        """Where it stands, in one line for the log."""
        status = self._status.response()
        groups = ",".join(
            f"{g.name}@{g.max_clock if self._clocks.has_clocks(self._groups.state[g.group]) else g.next_step}"
            for g in status.groups
        )
        return (
            f"lsn={self.lsn} members={len(status.members)} active={self._members.active} groups={groups or 'none'} "
            f"open_epochs={len(self._epochs.open)} evictions={status.evictions} phase={status.phase!r}"
        )

    # ------------------------------------------------------------------ members

    def is_member(self, client_id: int) -> bool:
        """Whether a client has joined and not left."""
        return self._members.get(client_id) is not None

    def join(self, request: pb.JoinRequest, now: float) -> pb.JoinResponse:
        """Make a client a member; a member keeps its rank.

        Raises:
            RequestRefused: MISSING_FIELD, NAME.
            Fenced: EVICTED.
        """
        self._desk.now = now
        member = self._members.join(request)
        self._settle()
        return pb.JoinResponse(
            rank=member.rank,
            world_size=self._members.world_size(),
            groups=self._positions(member.client_id),
            config=self._desk.config,
        )

    def leave(self, request: pb.LeaveRequest, now: float) -> pb.LeaveResponse:
        """Take a member out gracefully; its leases return. No member: nothing to do."""
        self._desk.now = now
        if self._members.leave(request.request.client_id):
            self._settle()
        return pb.LeaveResponse()

    def evict(self, client_id: int, why: str, now: float) -> bool:
        """Take a dead client out for ever, member or not.

        Args:
            client_id: the client.
            why: for people.
            now: seconds.

        Returns:
            Whether it was a member until now.

        Raises:
            RequestRefused: MISSING_FIELD.
        """
        self._desk.now = now
        was_member = self._members.evict(client_id, why)
        self._settle()
        return was_member

    def set_activity(self, request: pb.SetActivityRequest, now: float) -> pb.SetActivityResponse:
        """Make a member ACTIVE, BETWEEN or IDLE; say where every group stands.

        Raises:
            RequestRefused: MISSING_FIELD.
            Fenced: EVICTED, NOT_MEMBER.
        """
        self._desk.now = now
        member = self._members.need(request.request.client_id)
        if request.activity == pb.ACTIVITY_ACTIVE:
            self.pause.check_entry(member)
            self._clocks.enter_all(member.client_id)
        self._members.set_activity(member, request.activity)
        self._settle()
        return pb.SetActivityResponse(groups=self._positions(member.client_id), world_size=self._members.world_size())

    def _positions(self, client_id: int) -> list[pb.GroupPosition]:
        return [self._position(group, client_id) for group in self._groups.state.values()]

    def _position(self, group: GroupState, client_id: int) -> pb.GroupPosition:
        has_clocks = self._clocks.has_clocks(group)
        return pb.GroupPosition(
            group=group.number,
            name=group.spec.name,
            next_step=self._clocks.position(group, client_id) if has_clocks else group.next_step,
            last=group.records.get(group.next_step - 1),
        )

    # ------------------------------------------------------------------ groups

    def open_group(self, request: pb.OpenGroupRequest, now: float) -> pb.OpenGroupResponse:
        """Declare a table group; the same on every member.

        Raises:
            RequestRefused: NAME, MISSING_FIELD, HYPER_PARAMETER.
            TensorMismatch: TENSOR_MISMATCH, naming the first tensor that differs.
            StateRefused: SCHEMA, QUOTA.
            Fenced: EVICTED, NOT_MEMBER.
        """
        self._desk.now = now
        member = self._members.need(request.request.client_id)
        group = self._groups.open(request.spec)
        self._clocks.enter(group, member.client_id)
        return pb.OpenGroupResponse(
            group=group.number,
            position=self._position(group, member.client_id),
            initialised=group.initialised,
            init_attempt=group.init_attempt,
        )

    def await_init(self, request: pb.AwaitInitRequest, now: float) -> pb.AwaitInitResponse | Wait:
        """First values are there, or the caller is to assign them, or wait.

        Raises:
            RequestRefused: UNKNOWN_GROUP.
            Fenced: EVICTED, NOT_MEMBER.
        """
        self._desk.now = now
        return self._groups.await_init(request.request.client_id, request.group)

    def commit_init(self, request: pb.CommitInitRequest, now: float) -> pb.CommitInitResponse:
        """Take the owner's word that first values are in every partition.

        Raises:
            RequestRefused: UNKNOWN_GROUP.
            Retryable: INITIALISING, they are somebody else's, or under another attempt.
            Fenced: EVICTED, NOT_MEMBER.
        """
        self._desk.now = now
        self._groups.commit_init(request.request.client_id, request.group, request.init_attempt)
        return pb.CommitInitResponse()

    # ------------------------------------------------------------------ steps

    def ready(self, request: pb.ReadyRequest, now: float) -> pb.ReadyResponse | Wait:
        """Take note of a staged contribution; answer the step's decision, or wait.

        Raises:
            RequestRefused: UNKNOWN_GROUP, MISSING_FIELD, WEIGHT, HYPER_PARAMETER, SEQ_REUSED,
                SAMPLE_RANGE, SAMPLE_OUT_OF_RANGE.
            StateRefused: SCHEMA, STEP_OUT_OF_RANGE, LEASE, QUOTA.
            Fenced: EVICTED, NOT_MEMBER; never for a decided step.
        """
        self._desk.now = now
        answer = self._steps.ready(request)
        self._leases.settle()
        return answer

    def clip(self, request: pb.ClipRequest, now: float) -> pb.ClipResponse | Wait:
        """Take squared norms of a decided step; answer its record with the factor, or wait.

        Raises:
            RequestRefused: UNKNOWN_GROUP, WRONG_PARTITION, NON_FINITE.
            StateRefused: SCHEMA, STEP_OUT_OF_RANGE.
        """
        self._desk.now = now
        return self._clips.clip(request)

    def get_steps(self, request: pb.GetStepsRequest, now: float) -> pb.GetStepsResponse:
        """Decided steps, for a partition that lacks them.

        Raises:
            RequestRefused: UNKNOWN_GROUP.
            StateRefused: STEP_OUT_OF_RANGE, forgotten.
        """
        self._desk.now = now
        return self._steps.get_steps(request.group, request.first, request.limit)

    def report_missing(self, request: pb.ReportMissingRequest, now: float) -> pb.ReportMissingResponse:
        """Say which contributions a partition may go without.

        Raises:
            RequestRefused: UNKNOWN_GROUP.
            StateRefused: SCHEMA, STEP_OUT_OF_RANGE.
        """
        self._desk.now = now
        return self._clips.report_missing(request)

    def clock(self, request: pb.ClockRequest, now: float) -> pb.ClockResponse | Wait:
        """Take note of a finished clock; answer when the next may start.

        Raises:
            RequestRefused: UNKNOWN_GROUP, CLOCK, WRONG_PARTITION, SAMPLE_RANGE, SAMPLE_OUT_OF_RANGE.
            StateRefused: SCHEMA, LEASE.
            Fenced: EVICTED, NOT_MEMBER.
        """
        self._desk.now = now
        answer = self._clocks.clock(request)
        self._leases.settle()
        return answer

    # ------------------------------------------------------------------ data

    def lease(self, request: pb.LeaseRequest, now: float) -> pb.LeaseResponse | Wait:
        """Hand out samples of an epoch, say that it is over, or wait.

        Raises:
            RequestRefused: NAME, MISSING_FIELD.
            StateRefused: SCHEMA, QUOTA.
            Fenced: EVICTED, NOT_MEMBER.
        """
        self._desk.now = now
        if self.pause.keeps_out(self._members.need(request.request.client_id)):
            return self.pause.wait()
        answer = self._leases.lease(request)
        self._settle()
        return answer

    def return_leases(self, request: pb.ReturnLeasesRequest, now: float) -> pb.ReturnLeasesResponse:
        """Take back samples that were not trained on; those not held are ignored.

        Raises:
            Fenced: EVICTED, NOT_MEMBER.
        """
        self._desk.now = now
        self._leases.return_leases(request)
        self._settle()
        return pb.ReturnLeasesResponse()

    # ------------------------------------------------------------------ small things

    def put_state(self, request: pb.PutStateRequest, now: float) -> pb.PutStateResponse:
        """Keep a value unless a higher version is kept.

        Raises:
            RequestRefused: NAME, MISSING_FIELD, STATE_TOO_LARGE.
            StateRefused: QUOTA.
            Fenced: EVICTED.
        """
        self._desk.now = now
        return pb.PutStateResponse(version=self._small.put(request))

    def get_state(self, request: pb.GetStateRequest, now: float) -> pb.GetStateResponse:
        """The value kept under a key.

        Raises:
            RequestRefused: NAME.
        """
        self._desk.now = now
        return self._small.get(request.key)

    def gather(self, request: pb.GatherRequest, now: float) -> pb.GatherResponse | Wait:
        """Bring values to a barrier or mean; answer when everybody is there.

        Raises:
            RequestRefused: NAME, WEIGHT, SEQ_REUSED.
            StateRefused: QUOTA, SCHEMA, STEP_OUT_OF_RANGE.
            Fenced: EVICTED, NOT_MEMBER.
        """
        self._desk.now = now
        return self._gathers.gather(request)

    def report(self, request: pb.ReportRequest, now: float) -> pb.ReportResponse:
        """Note figures, for people.

        Raises:
            RequestRefused: NAME.
            StateRefused: QUOTA.
            Fenced: EVICTED, NOT_MEMBER.
        """
        self._desk.now = now
        self._figures.report(request)
        return pb.ReportResponse()

    def status(self, now: float) -> pb.LedgerStatusResponse:
        """What psctl and ps-run show."""
        self._desk.now = now
        response = self._status.response()
        response.figures.extend(self._figures.mean())
        response.lsn = self.lsn
        return response


def _copy(config: JobConfig) -> JobConfig:
    fresh = JobConfig()
    fresh.CopyFrom(config)
    return fresh
