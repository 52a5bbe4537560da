"""A cluster under `psctl certs`: it trains, psctl works, and certificates and their CA change under load."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from paramesh.credentials import LOOK_S
from paramesh.identity import Role
from paramesh.security import Security

from tests.cluster.secure import Authority, SecureCluster

LENGTH = 64


@pytest.fixture
def cluster() -> Iterator[SecureCluster]:
    with SecureCluster(servers=2, replicas=2, start_workers=2) as cluster:
        yield cluster


def psctl(cluster: SecureCluster, security: Security, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("psctl")
    return subprocess.run(
        [program, "--coordinator", cluster.coordinator_address, *arguments], capture_output=True, text=True,
        timeout=60, env=cluster.env | security.environment(), check=False,
    )  # fmt: skip


def further(cluster: SecureCluster, seconds: float = 0.0) -> None:
    """Wait until both workers have made another step, and one so much later."""
    then = time.monotonic() + seconds
    made = lambda: all(worker.last("step")["t"] > then for worker in cluster.workers)  # noqa: E731
    cluster.wait_until(made, 60, "further steps")


MORE_THAN_A_LOOK = 1.2 * LOOK_S
"""Files are looked at so often."""


def test_it_trains_while_certificates_and_their_ca_are_replaced(cluster, monkeypatch) -> None:
    """A second CA is believed too, then issues everything, then alone is believed; a server is restarted after it.

    No step fails: no worker is restarted, and the parameters count every sample that a step was made of.
    """
    cluster.start_workers(
        2, "tests.cluster.bodies:tally", length=LENGTH, batch=4, epochs=10_000, seconds=0.01, stop_at="enough"
    )
    further(cluster)
    status = json.loads(psctl(cluster, cluster.admin, "status", "--json").stdout)
    assert [server["state"] for server in status["servers"]] == ["live", "live"]

    first, second = cluster.authority, Authority(cluster.directory / "second")
    of_the_first = first.issue(Role.ADMIN, "alice")
    cluster.believe(first, second)
    further(cluster, MORE_THAN_A_LOOK)
    cluster.authority = second
    cluster.reissue()
    further(cluster, MORE_THAN_A_LOOK)
    cluster.believe(second)
    further(cluster, MORE_THAN_A_LOOK)

    assert psctl(cluster, cluster.admin, "status").returncode == 0
    refused = psctl(cluster, of_the_first, "status")
    assert (refused.returncode, "no coordinator answers" in refused.stderr) == (1, True), refused.stderr
    cluster.kill("server-1")
    further(cluster)
    cluster.restart("server-1")
    cluster.wait_until(lambda: cluster.live_servers() == ["server-0", "server-1"], 60, "server-1 to be back")
    further(cluster)

    for worker in cluster.workers:
        worker.open_gate("enough")
    cluster.wait_for_workers(60)
    assert [event["incarnation"] for worker in cluster.workers for event in worker.events("hello")] == [0, 0]
    trained = Counter(n for worker in cluster.workers for event in worker.events("step") for n in event["samples"])
    for variable, path in cluster.worker.environment().items():
        monkeypatch.setenv(variable, path)
    (counts,) = cluster.table_values().values()
    assert counts.tolist() == [trained[number] for number in range(LENGTH)]
