"""The watermark, by the container's limit (cgroup v2 and v1) and by the machine's memory."""

from __future__ import annotations

import os
from pathlib import Path

from paramesh.headroom import LOOK_S, Headroom

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


class Root:
    """A file system with as much of /proc and /sys as is looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 0.0
        self.write("proc/meminfo", f"MemTotal: {1000 * 1024} kB\nMemFree: 1 kB\n")

    def write(self, name: str, text: object) -> None:
        """Put a file."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(str(text))

    def headroom(self, watermark: float = 0.9) -> Headroom:
        """Of this root; a look is always due."""

        def clock() -> float:
            self.now += LOOK_S
            return self.now

        return Headroom(watermark, self.path, clock)


def test_cgroup_v2_without_the_cache_that_the_kernel_can_drop(tmp_path):
    root = Root(tmp_path)
    root.write("proc/self/cgroup", "0::/pod/app\n")
    root.write("sys/fs/cgroup/pod/app/memory.max", "max\n")
    root.write("sys/fs/cgroup/pod/memory.max", 100 * MIB)
    root.write("sys/fs/cgroup/pod/memory.current", 95 * MIB)
    root.write("sys/fs/cgroup/pod/memory.stat", f"anon 5\ninactive_file {20 * MIB}\n")
    headroom = root.headroom()
    assert (headroom.limit, headroom.tight, headroom.used) == (100 * MIB, False, 75 * MIB)
    root.write("sys/fs/cgroup/pod/memory.stat", "inactive_file 0\n")
    assert headroom.tight
    assert "95 of 100 MiB" in str(headroom)


def test_the_tightest_of_several_limits_counts(tmp_path):
    root = Root(tmp_path)
    root.write("proc/self/cgroup", "0::/a/b\n")
    root.write("sys/fs/cgroup/a/b/memory.max", 300 * MIB)
    root.write("sys/fs/cgroup/a/memory.max", 200 * MIB)
    assert root.headroom().limit == 200 * MIB


def test_cgroup_v1_and_its_number_for_no_limit(tmp_path):
    root = Root(tmp_path)
    root.write("proc/self/cgroup", "4:cpu,memory:/docker/x\n1:name=systemd:/y\n0::/\n")
    folder = "sys/fs/cgroup/memory"  # of the host is /docker/x; in a container its own is the root
    root.write(f"{folder}/memory.limit_in_bytes", 50 * MIB)
    root.write(f"{folder}/memory.usage_in_bytes", 49 * MIB)
    root.write(f"{folder}/memory.stat", "total_inactive_file 0\n")
    assert (root.headroom().limit, root.headroom().tight) == (50 * MIB, True)
    root.write(f"{folder}/memory.limit_in_bytes", 2**63 - 4096)
    assert root.headroom().limit == 1000 * MIB


def test_without_a_limit_it_is_this_process_against_the_machine(tmp_path):
    root = Root(tmp_path)
    root.write("proc/self/statm", f"9 {950 * MIB // PAGE} 3\n")
    assert root.headroom().tight
    assert not root.headroom(0.0).tight, "0: never"


def test_it_eases_some_way_below_the_watermark_only(tmp_path):
    root = Root(tmp_path)
    seen = []
    headroom = root.headroom()
    for share in (0.89, 0.91, 0.89, 0.86, 0.84, 0.89):
        root.write("proc/self/statm", f"9 {int(share * 1000 * MIB) // PAGE} 3\n")
        seen.append(headroom.tight)
    assert seen == [False, True, True, True, False, False]
