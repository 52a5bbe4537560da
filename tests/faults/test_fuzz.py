"""Every call of every service gets messages built at random, and bytes of such ones mutated, at real ports.

Passed is: no status UNKNOWN or INTERNAL and no traceback in a log, the processes live and serve, memory
is bounded, and a refused call left the state as it was. `FUZZ_SEED=17` repeats a run, and
`FUZZ_EXAMPLES=50` sends more of each.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import hypothesis
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import strategies as st
from paramesh.channel import HEARTBEAT_OPTIONS
from paramesh.errors import ParameshError
from paramesh.status import from_rpc_error
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import recovery_pb2 as rc

from tests.cluster.processes import ProcessCluster
from tests.faults.fuzzing import Rpc, built, calls, mutated
from tests.faults.process_bench import ProcessBench

CALL_S = 0.25
"""Of one call: what waits for others ends by it."""

GROWTH = 192 << 20
"""Bytes that a process may grow by: far less than one message that is believed about its size."""

CONTROL = ("Replication", "ServerControl", "CheckpointControl")
DATA = ("ParameterServer", "Ledger", "Recovery")
BAD = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


class Fuzz:
    """A live cluster and one connection to each of its ports."""

    def __init__(self, bench: ProcessBench) -> None:
        self.bench = bench
        self.channels = {
            address: grpc.insecure_channel(address, options=HEARTBEAT_OPTIONS)
            for address in (bench.server, bench.control, bench.cluster.address)
        }
        self.refused = self.sent = 0

    def address(self, rpc: Rpc) -> str:
        """Where a call is served."""
        if rpc.service in DATA:
            return self.bench.server
        return self.bench.control if rpc.service in CONTROL else self.bench.cluster.address

    def send(self, rpc: Rpc, messages: list[bytes]) -> None:
        """Send one call; fails if its answer is none that a server may give."""
        before = (self.bench.state(), self.bench.ledger_state())
        status = self._call(rpc, messages)
        self.sent += 1
        assert status not in BAD, f"{rpc.path} {status} for {[m.hex() for m in messages]}"
        # A call whose deadline passed may have been taken all the same; one that was refused may not.
        if status not in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED):
            self.refused += 1
            assert (self.bench.state(), self.bench.ledger_state()) == before, f"{rpc.path} changed something"
        self._be_good(self.address(rpc))

    def _call(self, rpc: Rpc, messages: list[bytes]) -> grpc.StatusCode:
        kind = f"{'stream' if rpc.many else 'unary'}_{'stream' if rpc.streams else 'unary'}"
        call = getattr(self.channels[self.address(rpc)], kind)(rpc.path)
        try:
            answer = call(iter(messages) if rpc.many else messages[0], timeout=CALL_S)
            for one in answer if rpc.streams else [answer]:
                assert b"internal error" not in one, f"{rpc.path} for {[m.hex() for m in messages]}"
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    def _be_good(self, address: str) -> None:
        """A well-formed request on the same connection, so that it is not cut for what came before."""
        channel, header = self.channels[address], self.bench.tool._client.header()
        request: Any = {
            self.bench.server: ("Ledger/LedgerStatus", lg.LedgerStatusRequest(request=header)),
            self.bench.control: ("Recovery/Testify", rc.TestifyRequest(request=header)),
            self.bench.cluster.address: ("MapService/GetMap", co.GetMapRequest(request=header)),
        }[address]
        try:
            channel.unary_unary(f"/paramesh.v1.{request[0]}")(request[1].SerializeToString(), timeout=10)
        except grpc.RpcError as error:
            refusal: ParameshError = from_rpc_error(error)
            raise AssertionError(f"{request[0]} no longer served: {refusal.reason}: {refusal}") from None

    def healthy(self) -> None:
        """All ports say that they serve; no process ended, none wrote a traceback, none grew."""
        for channel in self.channels.values():
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for name, process in self.bench.processes.processes.items():
            assert process.exit_code is None, f"{name} ended"
            text = process.log_path.read_text(errors="replace")
            assert "Traceback" not in text, f"{name}:\n{process.tail()}"
        assert self.bench.values()


@pytest.fixture
def fuzz() -> Iterator[Fuzz]:
    with ProcessCluster(client_timeout=600.0, gather=0.0) as cluster:
        bench = ProcessBench(cluster)
        bench.new_client()
        yield Fuzz(bench)
        bench.close()


def resident(cluster: ProcessCluster) -> dict[str, int]:
    """Bytes of memory of each process."""
    return {
        name: int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096
        for name, process in cluster.processes.items()
    }


def run(fuzz: Fuzz, seed: int, examples: int) -> None:
    """Send so many built and so many mutated requests to every call."""
    print(f"FUZZ_SEED={seed}")
    before = resident(fuzz.bench.processes)
    header = fuzz.bench.client.header()
    quick = hypothesis.settings(
        max_examples=examples, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    for rpc in calls():
        _examples(fuzz, rpc, header, hypothesis.seed(seed), quick)
    fuzz.healthy()
    grown = {name: nbytes - before[name] for name, nbytes in resident(fuzz.bench.processes).items()}
    print(f"{fuzz.sent} calls, {fuzz.refused} refused, grown by { ({n: g >> 20 for n, g in grown.items()}) } MiB")
    assert max(grown.values()) < GROWTH, grown


def _examples(fuzz: Fuzz, rpc: Rpc, header: Any, seeded: Any, settings: hypothesis.settings) -> None:
    """The examples of one call."""
    count = st.integers(0, 3) if rpc.many else st.just(1)

    @seeded
    @settings
    @hypothesis.given(st.data(), count, st.booleans())
    def one(data: st.DataObject, many: int, change: bool) -> None:
        messages = [data.draw(built(rpc.request, header)).SerializeToString() for _ in range(many)]
        if change:
            messages = [data.draw(mutated(message)) for message in messages]
        fuzz.send(rpc, messages)

    one()


def test_no_message_breaks_a_server_or_a_coordinator(fuzz: Fuzz) -> None:
    """A few of each, the same at every run."""
    run(fuzz, int(os.environ.get("FUZZ_SEED", "1")), int(os.environ.get("FUZZ_EXAMPLES", "5")))


@pytest.mark.soak
def test_no_message_breaks_a_server_or_a_coordinator_for_long(fuzz: Fuzz) -> None:
    run(fuzz, int(os.environ.get("FUZZ_SEED", str(random.SystemRandom().randrange(1 << 32)))), 100)
