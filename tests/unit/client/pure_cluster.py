"""The real, pure ledger behind the interface of `AsyncClient`: no sockets, no servers.

    cluster = PureCluster(start_workers=2)
    results = cluster.run(lambda session: ..., workers=2)     # each in a thread of its own

`Trainer` stands for a `DistributedOptimizer`: it opens a group and takes steps by Ready; the
record of every committed step is in `cluster.records`.
"""

import asyncio
import itertools
import threading
import time
from contextlib import suppress

from paramesh.config import ClientConfig
from paramesh.io import IoThread
from paramesh.membership import Session
from paramesh.session import using
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1.types_pb2 import LOSS_REDUCTION_MEAN, JobConfig
from paramesh_server.ledger import Ledger, Wait

DEADLINE = 30.0


class PureCluster:
    """A ledger and its waiters, on the IO loop."""

    def __init__(self, start_workers=1, min_workers=1, gather_ms=2000):
        self.ledger = Ledger(JobConfig(start_workers=start_workers, min_workers=min_workers, gather_ms=gather_ms))
        self.io = IoThread.get()
        self.records = {}
        """(group, step) -> StepRecord"""
        self.consumed = []
        """(client id, SampleRange) of contributions that are in a committed step."""
        self.calls = []
        """(client id, method) of every call, in order."""
        self._ids = itertools.count(1)
        self._changed = asyncio.Event()
        self.client_type = type("Client", (PureClient,), {"cluster": self})

    # -- on the loop

    async def ask(self, client_id, method, request):
        self.calls.append((client_id, method))
        while True:
            request.request.client_id = client_id
            if method == "ledger_status":
                answer = self.ledger.status(time.monotonic())
            else:
                answer = getattr(self.ledger, method)(request, time.monotonic())
            self.ledger.take_woken()
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            if not isinstance(answer, Wait):
                self._note(client_id, method, request, answer)
                return answer
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.02)
            self.ledger.tick(time.monotonic())

    def _note(self, client_id, method, request, answer):
        if method == "ready" and answer.included:
            self.records[request.group, request.step] = answer.record
            self.consumed += [(client_id, r) for r in request.samples]

    def connect(self):
        return self.client_type(next(self._ids))

    # -- for tests

    def session(self, slot="pure/0", rank=None):
        config = ClientConfig(coordinators="pure:1", slot=slot, host="pure", host_incarnation=1, rank=rank)
        client = self.connect()
        request = lg.JoinRequest(slot=slot, preferred_rank=rank or 0, has_preferred_rank=rank is not None)
        joined = self.io.run(client.ledger.join(request), DEADLINE, "join")
        return Session(config, self.io, client, joined)

    def evict(self, session):
        async def act():
            self.ledger.evict(session.client.client_id, "test", time.monotonic())
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

        self.io.run(act(), DEADLINE, "evict")

    def run(self, fn, workers=1, deadline=DEADLINE):
        """`fn(session)` in one thread per worker; results in rank order, the first error raised."""
        sessions = [self.session(f"pure/{i}", i) for i in range(workers)]
        results, errors = {}, []

        def work(session):
            try:
                with using(session):
                    results[session.config.rank] = fn(session)
                session.leave()
            except BaseException as error:
                errors.append(error)
                session.leave(gracefully=False)

        threads = [threading.Thread(target=work, args=(s,), daemon=True) for s in sessions]
        for thread in threads:
            thread.start()
        end = time.monotonic() + deadline
        for thread in threads:
            while thread.is_alive() and not errors:
                thread.join(0.05)
                assert time.monotonic() < end, f"worker threads hang; calls: {self.calls[-20:]}"
        if errors:
            raise errors[0]
        return [results[i] for i in range(workers)]


class _Ledger:
    def __init__(self, cluster, client):
        self._cluster, self._client = cluster, client

    def __getattr__(self, method):
        async def call(request, timeout=None):
            return await self._cluster.ask(self._client.client_id, method, request)

        return call


class PureClient:
    """What of `AsyncClient` a session uses."""

    cluster = None

    def __init__(self, client_id):
        self.client_id = client_id
        self.ledger = _Ledger(self.cluster, self)
        self.closed = False
        self.deregistered = False
        self.spoiled = False

    @classmethod
    async def connect(cls, coordinators, **_):
        return cls.cluster.connect()

    async def deregister(self, timeout=3.0):
        self.deregistered = True

    async def close(self):
        self.closed = True


class Trainer:
    """Takes steps of one group for one session."""

    def __init__(self, session, name="g0", mode=lg.MODE_SYNC):
        self.session = session
        spec = lg.GroupSpec(
            name=name, mode=mode, loss_reduction=LOSS_REDUCTION_MEAN, structure_digest=b"d", partitions=[1]
        )
        self._open = lambda: session.call(session.client.ledger.open_group(lg.OpenGroupRequest(spec=spec)), "open")
        self.param_groups = [{"params": [], "lr": 0.1}]
        self.position = None
        self.pulled = []
        """Positions that `on_active` moved to."""
        session.register(self)

    def on_active(self, positions):
        opened = self._open()
        self.group = opened.group
        if not opened.initialised:
            answer = self.session.call(
                self.session.client.ledger.await_init(lg.AwaitInitRequest(group=self.group)), "init"
            )
            if answer.owner:
                request = lg.CommitInitRequest(group=self.group, init_attempt=answer.init_attempt)
                self.session.call(self.session.client.ledger.commit_init(request), "commit init")
        if self.position != opened.position.next_step:
            self.position = opened.position.next_step
            self.pulled.append(self.position)

    def on_rejoined(self):
        self.position = None

    def step(self):
        session = self.session
        session.ensure_active()
        ranges, weight = session.deliveries.take(self.group)
        request = lg.ReadyRequest(
            group=self.group,
            step=self.position,
            attempt=1,
            weight=weight,
            samples=ranges,
            applied_through=self.position,
        )
        response = session.call(session.client.ledger.ready(request), f"step {self.position}")
        assert response.included, "too late"
        self.position += 1
        session.after_step(self.group, self.position - 1, response.record)
        return response.record
