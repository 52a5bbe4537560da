"""A real etcd of one member, in a folder that goes with it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.cluster.processes import TIED, free_port
from tests.cluster.waiting import wait_until

PROGRAM = "etcd"


class Etcd:
    """One member; started by `start`, ended by `stop`."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port, peer_port = free_port(), free_port()
        self.log = folder / "etcd.log"
        client, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{peer_port}"
        self._command = [
            *TIED, str(os.getpid()), _program(), "--name=one", f"--data-dir={folder / 'etcd'}",
            f"--listen-client-urls={client}", f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=one={peer}", *flags,
        ]  # fmt: skip
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """host:port of its clients' side."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, or start it again on what it kept."""
        with open(self.log, "ab") as log:
            self._popen = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        wait_until(self._listens, 20, "etcd to listen")

    def _listens(self) -> bool:
        assert self._popen is not None
        assert self._popen.poll() is None, f"etcd ended:\n{self.log.read_text()[-2000:]}"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._popen is not None
        self._popen.send_signal(number)

    def stop(self) -> None:
        """End it at once. Repeatable."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait(10)


def _program() -> str:
    found = shutil.which(PROGRAM)
    assert found, "these tests need the program etcd (apt-get install etcd-server); leave them out with -m 'not etcd'"
    return found


def available() -> bool:
    """Whether the program is here."""
    return shutil.which(PROGRAM) is not None


if __name__ == "__main__":
    sys.exit(0 if available() else 1)
