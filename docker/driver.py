"""Waits for the job of a compose file to end, shows what became of it, and says so by its exit status.

`docker compose up --exit-code-from driver` ends everything when the first container ends, which may be a worker that
is done a moment before the others. So SIGTERM has the driver wait for the others (compose stops it first, since it
depends on all of them) instead of ending it.

Environment: PARAMESH_COORDINATOR, DRIVER_WORKERS (how many machines with workers there are),
DRIVER_DEADLINE (seconds, 600).
"""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

POLL_S = 0.5
ALONE_S = 15.0
"""After SIGTERM: so long without any worker means that none comes any more. Above what a machine takes to register."""


def status() -> dict[str, Any]:
    """What `psctl status` says; empty while nobody answers."""
    done = subprocess.run(["psctl", "status", "--json"], capture_output=True, text=True)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def verdict(found: dict[str, Any], machines: int) -> str | None:
    """None while the job goes on; empty when every worker is done; else what went wrong."""
    hosts = found.get("hosts", [])
    if len([host for host in hosts if host["state"] != "live"]) < machines:
        return None
    # A slot's last process is what counts: those before it were restarted.
    last = {worker["slot"]: worker for worker in found["workers"] if worker["role"] == "worker"}
    wrong = [f"{slot}: {one['reason']}" for slot, one in last.items() if one["reason"] != "left"]
    return ", ".join(wrong) if last else "no worker ever joined"


class Asked:
    """Whether the driver was asked to end, and since when no worker has been there."""

    def __init__(self) -> None:
        self.stopping = False
        self._seen = time.monotonic()
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        print("driver: waiting for the workers to end", flush=True)
        self.stopping, self._seen = True, time.monotonic()

    def in_vain(self, found: dict[str, Any]) -> bool:
        """Whether there is nobody to wait for."""
        if any(host["state"] == "live" for host in found.get("hosts", [])):
            self._seen = time.monotonic()
        return self.stopping and time.monotonic() - self._seen > ALONE_S


def main() -> int:
    """Wait, show, judge."""
    asked = Asked()
    machines = int(os.environ["DRIVER_WORKERS"])
    end = time.monotonic() + float(os.environ.get("DRIVER_DEADLINE", "600"))
    while time.monotonic() < end:
        found = status()
        wrong = verdict(found, machines)
        if wrong is None and not asked.in_vain(found):
            time.sleep(POLL_S)
            continue
        if wrong is None:
            wrong = "no worker is there any more, and not all had come"
        subprocess.run(["psctl", "status"])
        print(f"driver: {wrong or 'every worker is done'}", flush=True)
        return 1 if wrong else 0
    print("driver: the job did not end in time", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
