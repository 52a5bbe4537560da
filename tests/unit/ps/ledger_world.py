"""A ledger, a clock and words to drive both, for the tests of the ledger.

Every word also checks what must hold after every event: a second ledger that is fed the
records only, as bytes, has an equal state and equal bytes of it (the state is a function of the
records), and a refused request changed nothing (invariant 27).

    world.fail_during(keep)       # the primary dies in the next event, its answer is lost

Then the second ledger takes over with the first `keep` of that event's records, and whoever
asked asks again. All records of earlier events are there: their answers were given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from paramesh.errors import ParameshError
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger import Ledger, Record, Wait
from paramesh_server.ledger_codec import decode_record, encode_record
from paramesh_server.ledger_restore import renewed

T = TypeVar("T")

DIGEST = b"\x01" * 32


def spec(name: str = "g", mode: int = lg.MODE_SYNC, **fields: Any) -> lg.GroupSpec:
    """A group's spec."""
    values: dict[str, Any] = {
        "structure_digest": DIGEST,
        "tensor_names": ["w", "b"],
        "partitions": [1, 2],
        "loss_reduction": t.LOSS_REDUCTION_MEAN,
    }
    return lg.GroupSpec(name=name, mode=lg.Mode.ValueType(mode), **(values | fields))


def setting(name: str, number: float, table: int = 1) -> t.TableHyperParameters:
    """One hyper-parameter of one table."""
    return t.TableHyperParameters(table_id=table, hyper_parameters=[t.HyperParameter(name=name, number=number)])


def ranges(response: lg.LeaseResponse) -> list[tuple[int, int]]:
    """Leased ranges as pairs."""
    return [(r.begin, r.end) for r in response.leases]


class World:
    """A ledger under test, at a time of its own."""

    def __init__(self, **config: int):
        values = {"start_workers": 1, "min_workers": 1, "gather_ms": 2000} | config
        self.records: list[Record] = []
        """All that followers have."""
        self.config = t.JobConfig(**values)
        self.ledger = Ledger(self.config, self._append)
        self.shadow = Ledger(t.JobConfig())
        """A follower."""
        self.now = 100.0
        self.check = True
        self.failovers = 0
        self._tail: list[bytes] = []
        """Records of the event under way."""
        self._keep: int | None = None

    def _append(self, record: Record) -> None:
        self._tail.append(encode_record(record))

    def _replicate(self, keep: int | None = None) -> None:
        """Let the follower have the records of the last event, or the first `keep` of them."""
        records = [decode_record(data) for data in self._tail[:keep]]
        self._tail.clear()
        self.records += records
        self.shadow.replay(records)

    def snapshot(self) -> None:
        """Replace the follower by one that is made from a snapshot of it."""
        fresh = Ledger(t.JobConfig())
        fresh.install(self.shadow.capture())
        assert fresh.state_digest() == self.shadow.state_digest()
        assert fresh.summary() == self.shadow.summary(), "what is derived is derived alike"
        self.shadow = fresh

    def fail_during(self, keep: int) -> None:
        """Have the primary die during the next event; the follower has `keep` of its records."""
        self._keep = keep

    @property
    def fails(self) -> bool:
        """Whether the primary is still to die in an event."""
        return self._keep is not None

    def promote(self) -> None:
        """Let the follower serve, and a new one follow."""
        self._keep = None
        self.failovers += 1
        self.ledger, self.shadow = self.shadow, Ledger(t.JobConfig())
        self.shadow.replay(self.records)
        self.now += 1.0
        self.ledger.serve(self._append, self.config, self.now)
        self._replicate()

    def restore(self) -> None:
        """Go on as a new generation from a checkpoint of now."""
        data = renewed(self.ledger.capture(), {})
        self.ledger, self.shadow = Ledger(t.JobConfig()), Ledger(t.JobConfig())
        for one in (self.ledger, self.shadow):
            one.install(data)
        self.records.clear()
        self.ledger.serve(self._append, self.config, self.now)
        self._replicate()

    def do(self, event: Callable[[float], T]) -> T:
        """Give the ledger an event, and check what must hold after each."""
        if self._keep is not None:
            self._fail(event)
        before = (self.ledger.lsn, self.ledger.state_digest()) if self.check else None
        try:
            answer = event(self.now)
        except ParameshError:
            assert before is None or before == (self.ledger.lsn, self.ledger.state_digest())
            raise
        self._replicate()
        assert not self.check or self.shadow.state_digest() == self.ledger.state_digest()
        assert not self.check or self.shadow.capture() == self.ledger.capture()
        return answer

    def _fail(self, event: Callable[[float], object]) -> None:
        """Die in an event whose answer nobody gets."""
        with contextlib.suppress(ParameshError):
            event(self.now)
        self._replicate(self._keep)
        self.promote()

    def pass_time(self, seconds: float) -> None:
        """Let time pass; tick when the ledger asked for it, as its driver does."""
        until = self.now + seconds
        while (at := self.ledger.next_deadline()) is not None and at <= until:
            self.now = max(self.now, at)
            self.do(lambda now: self.ledger.tick(now))
            assert self.ledger.next_deadline() != at, "a tick that changes nothing would spin"
        self.now = until

    # ------------------------------------------------------------------ members

    def join(self, client: int, slot: str = "", rank: int | None = None) -> lg.JoinResponse:
        request = lg.JoinRequest(
            request=header(client), slot=slot, preferred_rank=rank or 0, has_preferred_rank=rank is not None
        )
        return self.do(lambda now: self.ledger.join(request, now))

    def leave(self, client: int) -> None:
        self.do(lambda now: self.ledger.leave(lg.LeaveRequest(request=header(client)), now))

    def evict(self, client: int) -> bool:
        return self.do(lambda now: self.ledger.evict(client, "killed", now))

    def activity(self, client: int, activity: int) -> lg.SetActivityResponse:
        request = lg.SetActivityRequest(request=header(client), activity=lg.Activity.ValueType(activity))
        return self.do(lambda now: self.ledger.set_activity(request, now))

    def active(self, *clients: int) -> None:
        for client in clients:
            self.activity(client, lg.ACTIVITY_ACTIVE)

    def between(self, client: int) -> None:
        self.activity(client, lg.ACTIVITY_BETWEEN)

    def idle(self, client: int) -> None:
        self.activity(client, lg.ACTIVITY_IDLE)

    def workers(self, count: int, mode: int = lg.MODE_SYNC, **fields: Any) -> None:
        """Join clients 1..count as ranks 0..count-1, open group 1, make them ACTIVE."""
        for client in range(1, count + 1):
            self.join(client)
        for client in range(1, count + 1):
            self.open(client, spec(mode=mode, **fields))
        self.active(*range(1, count + 1))

    # ------------------------------------------------------------------ groups and steps

    def open(self, client: int, group: lg.GroupSpec | None = None) -> lg.OpenGroupResponse:
        request = lg.OpenGroupRequest(request=header(client), spec=group or spec())
        return self.do(lambda now: self.ledger.open_group(request, now))

    def await_init(self, client: int, group: int = 1) -> lg.AwaitInitResponse | Wait:
        request = lg.AwaitInitRequest(request=header(client), group=group)
        return self.do(lambda now: self.ledger.await_init(request, now))

    def commit_init(self, client: int, attempt: int, group: int = 1) -> None:
        request = lg.CommitInitRequest(request=header(client), group=group, init_attempt=attempt)
        self.do(lambda now: self.ledger.commit_init(request, now))

    def ready(self, client: int, step: int, group: int = 1, **fields: Any) -> lg.ReadyResponse | Wait:
        fields = {"weight": 1.0, "attempt": 1} | fields
        request = lg.ReadyRequest(request=header(client), group=group, step=step, **fields)
        return self.do(lambda now: self.ledger.ready(request, now))

    def decided(self, client: int, step: int, **fields: Any) -> lg.ReadyResponse:
        answer = self.ready(client, step, **fields)
        assert not isinstance(answer, Wait), f"step {step} waits for ranks {answer.who()}"
        return answer

    def waits(self, client: int, step: int, **fields: Any) -> tuple[int, ...]:
        answer = self.ready(client, step, **fields)
        assert isinstance(answer, Wait), f"step {step} is decided"
        return answer.who()

    def step(self, step: int, *clients: int, **fields: Any) -> t.StepRecord:
        """Everybody is ready; returns the decision."""
        for client in clients[:-1]:
            self.waits(client, step, **fields)
        return self.decided(clients[-1], step, **fields).record

    def clip(self, client: int, step: int, norms: dict[int, float]) -> lg.ClipResponse | Wait:
        parts = [lg.PartitionSquaredNorm(partition=p, squared_norm=n) for p, n in norms.items()]
        request = lg.ClipRequest(request=header(client), group=1, step=step, norms=parts)
        return self.do(lambda now: self.ledger.clip(request, now))

    def clock(
        self,
        client: int,
        finished: int,
        floors: dict[int, tuple[int, int]] | None = None,
        samples: Sequence[t.SampleRange] = (),
    ) -> lg.ClockResponse | Wait:
        told = [lg.Floor(partition=p, epoch=e, lsn=n) for p, (e, n) in (floors or {}).items()]
        request = lg.ClockRequest(request=header(client), group=1, finished=finished, floors=told, samples=samples)
        return self.do(lambda now: self.ledger.clock(request, now))

    # ------------------------------------------------------------------ data

    def lease(self, client: int, epoch: int = 0, **fields: Any) -> lg.LeaseResponse | Wait:
        fields = {"dataset": "d", "length": 20, "chunk": 2} | fields
        request = lg.LeaseRequest(request=header(client), epoch=epoch, **fields)
        return self.do(lambda now: self.ledger.lease(request, now))

    def leased(self, client: int, epoch: int = 0, **fields: Any) -> list[t.SampleRange]:
        answer = self.lease(client, epoch, **fields)
        assert isinstance(answer, lg.LeaseResponse), "it waits"
        return list(answer.leases)

    def give_back(self, client: int, *leases: t.SampleRange, epoch: int = 0) -> None:
        request = lg.ReturnLeasesRequest(request=header(client), dataset="d", epoch=epoch, leases=leases)
        self.do(lambda now: self.ledger.return_leases(request, now))

    # ------------------------------------------------------------------ small things

    def gather(
        self, client: int, number: int, values: Sequence[float] = (), weight: float = 1.0, name: str = "n"
    ) -> lg.GatherResponse | Wait:
        request = lg.GatherRequest(request=header(client), name=name, round=number, values=values, weight=weight)
        return self.do(lambda now: self.ledger.gather(request, now))

    def status(self) -> lg.LedgerStatusResponse:
        return self.do(lambda now: self.ledger.status(now))


def header(client: int) -> t.RequestHeader:
    """A request's header; the servicer checks the rest of it."""
    return t.RequestHeader(client_id=client)
