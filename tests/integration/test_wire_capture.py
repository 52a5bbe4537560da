"""What somebody on the wire sees between any two processes of a cluster, with certificates and without.

Every process listens on 127.0.0.2 and says 127.0.0.1, where a proxy of the same port listens: whoever dials it goes
through the proxy, so that no pair is left out.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from collections.abc import Iterator

import pytest
from paramesh.security import PLAIN, Security

from tests.cluster.processes import free_port
from tests.cluster.secure import SecureCluster
from tests.cluster.secure_bodies import GRADIENT, TABLE, VALUE
from tests.faults.proxy import Tap

TENSORS = [struct.pack("<8f", *[value] * 8) for value in (VALUE, GRADIENT)]
"""Eight elements in a row."""

TLS_HANDSHAKE = b"\x16\x03"
"""How a TLS connection begins: a handshake record of version 3.x."""


class TappedCluster(SecureCluster):
    """Two servers, two replicas, a proxy before each port."""

    def __init__(self, *, secure: bool) -> None:
        super().__init__(servers=2, replicas=2)
        self._secure = secure
        self._taps = contextlib.ExitStack()
        self.taps: dict[str, Tap] = {}

    def _tap(self, name: str, port: int) -> str:
        tap = Tap(f"127.0.0.2:{port}", f"127.0.0.1:{port}")
        self.taps[name] = self._taps.enter_context(tap)
        return f"127.0.0.2:{port}"

    def _security(self, node: str) -> Security:
        return super()._security(node) if self._secure else PLAIN

    def _coordinator_command(self) -> list[str]:
        behind = self._tap("coordinator", self.port)
        return [behind if word == self.coordinator_address else word for word in super()._coordinator_command()]

    def _server_command(self, index: int) -> list[str]:
        data, control = self._tap(f"data-{index}", free_port()), self._tap(f"control-{index}", free_port())
        return [sys.executable, "-m", "paramesh_server.cli", "--coordinator", self.coordinator_address,
                "--name", f"server-{index}", "--bind", data, "--control-bind", control,
                "--advertise", "127.0.0.1"]  # fmt: skip

    @property
    def admin(self) -> Security:  # type: ignore[override]
        return super().admin if self._secure else PLAIN

    def stop(self) -> None:
        super().stop()
        self._taps.close()


@pytest.fixture
def tapped(request: pytest.FixtureRequest) -> Iterator[TappedCluster]:
    with TappedCluster(secure=request.param) as cluster:
        cluster.start_worker("tests.cluster.secure_bodies:secret")
        cluster.wait_for_workers(90)
        assert cluster.workers[0].last("final")["value"] == pytest.approx(VALUE)
        yield cluster


def where(cluster: TappedCluster, needle: bytes) -> set[str]:
    """The kinds of ports on whose connections these bytes passed."""
    return {name.split("-")[0] for name, tap in cluster.taps.items() if any(needle in data for data in tap.seen())}


@pytest.mark.soak
@pytest.mark.parametrize("tapped", [False], indirect=True, ids=["plain"])
def test_in_the_clear_everything_can_be_read(tapped: TappedCluster) -> None:
    """What the other test looks for is there to be found."""
    assert where(tapped, TABLE.encode()) >= {"coordinator"}
    assert where(tapped, TENSORS[0]) == {"data", "control"}
    assert where(tapped, TENSORS[1]) >= {"data"}


@pytest.mark.parametrize("tapped", [True], indirect=True, ids=["tls"])
def test_under_tls_nothing_can_be_read(tapped: TappedCluster) -> None:
    """Every connection to every port is TLS from its first byte, and no table name or element of a tensor passes."""
    dialled = {name.split("-")[0] for name, tap in tapped.taps.items() if tap.seen("up")}
    assert dialled == {"coordinator", "data", "control"}
    for name, tap in tapped.taps.items():
        assert all(data.startswith(TLS_HANDSHAKE) for data in tap.seen("up")), name
    for needle in (TABLE.encode(), *TENSORS, b"paramesh.v1"):
        assert where(tapped, needle) == set()
