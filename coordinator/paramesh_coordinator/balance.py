"""Where partitions go. Pure and stable: the same input gives the same answer everywhere.

place([100, 100, 60], [Load("a"), Load("b", nbytes=50)])               # ["a", "b", "a"]
place_replicas([100, 100], 2, [Load("a"), Load("b"), Load("c")])       # [("a", "c"), ("b", "c")]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from paramesh.errors import refuse

__all__ = ["Load", "follower", "place", "place_replicas"]


@dataclass(frozen=True)
class Load:
    """What a server holds."""

    name: str
    nbytes: int = 0
    """Bytes of values that it is the primary of."""
    partitions: int = 0
    """Replicas of any kind. The ledger counts as one, so that on two servers a lone small table
    goes to the other."""
    capacity: int = 0
    """Bytes of values that it may hold, of whatever replicas; 0: no bound."""
    copies: int = 0
    """Bytes of values of its other replicas."""
    host: str = ""
    """The machine; equal ones fail together."""
    kind: bytes = b""
    """Fingerprint of its arithmetic: replicas of a partition must have equal ones."""
    rate: int = 0
    """Requests a second of the partitions that it is the primary of."""

    @property
    def total(self) -> int:
        """Bytes of all its replicas."""
        return self.nbytes + self.copies

    def takes(self, size: int) -> bool:
        """Whether a partition of `size` bytes fits."""
        return not self.capacity or self.total + size <= self.capacity

    def plus(self, size: int) -> Load:
        """The load with one more partition."""
        return dataclasses.replace(self, nbytes=self.nbytes + size, partitions=self.partitions + 1)

    def plus_copy(self, size: int) -> Load:
        """The load with one more partition that it follows."""
        return dataclasses.replace(self, copies=self.copies + size, partitions=self.partitions + 1)

    def without(self, size: int) -> Load:
        """The load with one partition less that it is the primary of."""
        return dataclasses.replace(self, nbytes=self.nbytes - size, partitions=self.partitions - 1)

    def without_copy(self, size: int) -> Load:
        """The load with one partition less that it follows."""
        return dataclasses.replace(self, copies=self.copies - size, partitions=self.partitions - 1)


def place(sizes: Sequence[int], loads: Sequence[Load]) -> list[str]:
    """Give each partition a primary, so that bytes end up even.

    Largest first onto the server with the fewest bytes: the fullest then holds at most
    one partition more than the emptiest, loads permitting. Ties go to the server with
    fewer partitions, then by name.

    Args:
        sizes: bytes of values of each partition.
        loads: the servers that may hold them; at least one.

    Returns:
        The server's name of each partition, in the order of `sizes`.

    Raises:
        StateRefused: QUOTA, if a partition fits nowhere.
    """
    return [names[0] for names in place_replicas(sizes, 1, loads)]


def place_replicas(sizes: Sequence[int], replicas: int, loads: Sequence[Load]) -> list[tuple[str, ...]]:
    """Give each partition a primary as `place` does, then followers where there is room.

    Primaries come first, all of them, so that they are as even as without followers, and
    no follower takes the room of a primary. Where servers are too few, or full, there are
    fewer followers.

    Returns:
        The servers' names of each partition, the primary first, in the order of `sizes`.

    Raises:
        StateRefused: QUOTA, if a partition has no room for its primary.
    """
    if not loads:
        raise ValueError("no servers to place on")
    now = {load.name: load for load in loads}
    placed: list[tuple[str, ...]] = [()] * len(sizes)
    largest_first = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    for index in largest_first:
        target = _primary(sizes[index], now.values())
        now[target.name] = target.plus(sizes[index])
        placed[index] = (target.name,)
    for _ in range(replicas - 1):
        for index in largest_first:
            found = follower(sizes[index], [now[name] for name in placed[index]], now.values())
            if found is not None:
                now[found.name] = found.plus_copy(sizes[index])
                placed[index] = (*placed[index], found.name)
    return placed


def _primary(size: int, loads: Collection[Load]) -> Load:
    fitting = [load for load in loads if load.takes(size)]
    if not fitting:
        raise refuse(
            "QUOTA",
            f"no server has room for a partition of {size} bytes; start another ps-server, or raise --capacity-bytes",
            partition_bytes=size,
        )
    return min(fitting, key=lambda load: (load.nbytes, load.partitions, load.name))


def follower(
    size: int, holders: Sequence[Load], loads: Collection[Load], avoid: Collection[str] = frozenset()
) -> Load | None:
    """Where one more replica of a partition goes, or None.

    Never beside another replica of it, nor where arithmetic differs from the primary's.
    On another host if there is a choice, then where fewest bytes are.

    Args:
        size: bytes of values.
        holders: who holds a replica now, the primary first.
        loads: the servers to choose from.
        avoid: names to take only if there is nobody else.
    """
    names, hosts = {load.name for load in holders}, {load.host for load in holders}
    fitting = [load for load in loads if load.name not in names and load.kind == holders[0].kind and load.takes(size)]
    return min(
        fitting,
        key=lambda load: (load.name in avoid, load.host in hosts, load.total, load.partitions, load.name),
        default=None,
    )
