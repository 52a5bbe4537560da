"""A cluster of real processes with several coordinators on a real etcd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.cluster import inspection
from tests.cluster.etcd import Etcd
from tests.cluster.processes import START_DEADLINE, ProcessCluster, free_port


class SeveralCluster(ProcessCluster):
    """Coordinators are named "coordinator-0", "coordinator-1", ...; everybody is given all their addresses."""

    def __init__(
        self, servers: int = 1, directory: Path | None = None, replicas: int = 1, coordinators: int = 3, **config: Any
    ) -> None:
        super().__init__(servers, directory, replicas, **config)
        self.ports = [free_port() for _ in range(coordinators)]
        self.etcd = Etcd(self.directory)

    @property
    def coordinator_address(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self.ports)

    @property
    def coordinators(self) -> dict[str, str]:
        """Address of each, by name."""
        return {f"coordinator-{index}": f"127.0.0.1:{port}" for index, port in enumerate(self.ports)}

    def start(self) -> None:
        self.etcd.start()
        for name, address in self.coordinators.items():
            command = self._coordinator_command()
            command[command.index("--bind") + 1] = address
            command[command.index("--state") + 1] = f"etcd://{self.etcd.endpoint}/paramesh/test"
            self._launch(name, command)
        for index in range(self.server_count):
            self._launch(f"server-{index}", self._server_command(index))
        self.wait_until(self._all_registered, START_DEADLINE, f"{self.server_count} servers to register")

    def stop(self) -> None:
        super().stop()
        self.etcd.stop()

    def leader(self) -> tuple[str, int] | None:
        """Name and term of the coordinator that leads; None while none does."""
        found = []
        for name, address in self.coordinators.items():
            try:
                found.append((name, inspection.partition_map(address).term))
            except inspection.grpc.RpcError:
                continue
        return max(found, key=lambda one: one[1], default=None)

    def wait_for_leader(self, above: int = 0, deadline: float = 20.0) -> tuple[str, int]:
        """The leader of a term above one."""
        return self.wait_until(
            lambda: (now := self.leader()) and now[1] > above and now, deadline, f"a leader above term {above}"
        )
