"""Where partitions go. Pure and stable: the same input gives the same answer everywhere.

place([100, 100, 60], [Load("a"), Load("b", nbytes=50)])   # ["a", "b", "a"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paramesh.errors import refuse

__all__ = ["Load", "place"]


@dataclass(frozen=True)
class Load:
    """What a server holds."""

    name: str
    nbytes: int = 0
    """Bytes of values."""
    partitions: int = 0
    """The ledger counts as one, so that on two servers a lone small table goes to the other."""
    capacity: int = 0
    """Bytes of values that it may hold; 0: no bound."""

    def takes(self, size: int) -> bool:
        """Whether a partition of `size` bytes fits."""
        return not self.capacity or self.nbytes + size <= self.capacity

    def plus(self, size: int) -> Load:
        """The load with one more partition."""
        return Load(self.name, self.nbytes + size, self.partitions + 1, self.capacity)


def place(sizes: Sequence[int], loads: Sequence[Load]) -> list[str]:
    """Give each partition a server, so that bytes end up even.

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
    if not loads:
        raise ValueError("no servers to place on")
    now = {load.name: load for load in loads}
    placed = [""] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = [load for load in now.values() if load.takes(sizes[index])]
        if not fitting:
            raise refuse(
                "QUOTA",
                f"no server has room for a partition of {sizes[index]} bytes; start another ps-server, or "
                "raise --capacity",
                partition_bytes=sizes[index],
            )
        target = min(fitting, key=lambda load: (load.nbytes, load.partitions, load.name))
        now[target.name] = target.plus(sizes[index])
        placed[index] = target.name
    return placed
