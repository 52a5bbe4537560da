"""Which replicas should change places. Pure: the same input gives the same plan.

    for move in rebalance(placed, loads): ...                # bytes, then requests, are even afterwards
    for move in empty(placed, loads, {"server-1"}): ...      # and nothing is left there

Greedy. Each step makes the sum of squares of primaries' bytes smaller, or leaves the primaries
alone and makes that of all bytes smaller, or makes that of requests smaller and leaves bytes as
even as they have to be; so it ends. Plans that are carried out whole end in an empty one; of an
exchange that was cut off after one half the next plan may take the half back. A partition is in a
plan at most once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from paramesh_coordinator.balance import Load

__all__ = ["UNEVEN", "Move", "Placed", "empty", "is_uneven", "rebalance"]

UNEVEN = 0.2
"""Part of the mean that a server may be above or below it: to mend less costs more than it gives."""


EXCHANGED = 32
"""Of each of two servers, so many partitions are looked at for an exchange."""

RATE_FLOOR = 1000
"""Requests a second of the busiest server below which they are no reason to move anything: it serves several
times as many."""


@dataclass(frozen=True)
class Placed:
    """One partition and who holds it, by name."""

    partition: int
    nbytes: int
    """Bytes of its values."""
    primary: str
    followers: tuple[str, ...] = ()
    """In sync."""
    rate: int = 0
    """Requests a second, of whoever leads it."""
    fixed: bool = False
    """It is on its way already, catching up or offline: counted, and left alone."""

    @property
    def holders(self) -> tuple[str, ...]:
        """Everybody who holds it, the primary first."""
        return (self.primary, *self.followers)

    def after(self, move: Move) -> Placed:
        """Who holds it when a move is done."""
        if move.swap:
            rest = [name for name in self.holders if name != move.target]
            return dataclasses.replace(self, primary=move.target, followers=tuple(rest))
        primary, *rest = (move.target if name == move.source else name for name in self.holders)
        return dataclasses.replace(self, primary=primary, followers=tuple(rest))


@dataclass(frozen=True)
class Move:
    """One replica goes from one server to another."""

    partition: int
    source: str
    target: str
    swap: bool = False
    """Only the primary's role goes, to one that is in sync: nothing is copied."""
    why: str = dataclasses.field(default="", compare=False)
    """For people: what is uneven."""


def is_uneven(values: Collection[int]) -> bool:
    """Whether a server holds more than `UNEVEN` above or below the mean."""
    mean = sum(values) / len(values) if values else 0.0
    return any(abs(value - mean) > UNEVEN * mean for value in values)


def rebalance(placed: Iterable[Placed], loads: Iterable[Load], draining: Collection[str] = ()) -> list[Move]:
    """Empty the draining servers, then even bytes: those of primaries first, then all; then requests.

    Args:
        placed: all partitions.
        loads: what each live server holds, what is on its way to it included.
        draining: names of servers that get nothing and keep nothing.
    """
    plan = _Plan(placed, loads, draining)
    plan.drain()
    while plan.primary_step() or plan.copy_step() or plan.rate_step():
        pass
    return plan.moves


def empty(placed: Iterable[Placed], loads: Iterable[Load], draining: Collection[str]) -> list[Move]:
    """Only empty the draining servers.

    What has nowhere to go, but is led there and in sync elsewhere, is led elsewhere; what has
    nowhere to go at all stays.
    """
    plan = _Plan(placed, loads, draining)
    plan.drain()
    return plan.moves


def _primary_bytes(load: Load) -> int:
    return load.nbytes


def _all_bytes(load: Load) -> int:
    return load.total


def _requests(load: Load) -> int:
    return load.rate


_SAYS: dict[Callable[[Load], int], tuple[str, str]] = {
    _primary_bytes: ("leads", "B"),
    _all_bytes: ("holds", "B"),
    _requests: ("serves", "requests/s"),
}
"""How a reason says what is uneven."""


class _Plan:
    """Loads and places as of the moves planned so far."""

    def __init__(self, placed: Iterable[Placed], loads: Iterable[Load], draining: Collection[str]) -> None:
        self.moves: list[Move] = []
        self._draining = frozenset(draining)
        self._loads = {load.name: load for load in sorted(loads, key=lambda load: load.name)}
        known = [p for p in placed if all(name in self._loads for name in p.holders)]
        self._placed = {p.partition: p for p in sorted(known, key=lambda p: p.partition) if not p.fixed}
        """What may still be moved; a planned one is taken out."""

    def _open(self) -> list[Load]:
        return [load for load in self._loads.values() if load.name not in self._draining]

    def _take(self, move: Move) -> None:
        size = self._placed.pop(move.partition)
        source, target = self._loads[move.source], self._loads[move.target]
        role = move.source == size.primary
        if move.swap:
            source, target = source.plus_copy(size.nbytes), target.without_copy(size.nbytes)
        self._loads[source.name] = source.without(size.nbytes) if role else source.without_copy(size.nbytes)
        self._loads[target.name] = target.plus(size.nbytes) if role else target.plus_copy(size.nbytes)
        if role and size.rate:
            for name, change in ((source.name, -size.rate), (target.name, size.rate)):
                self._loads[name] = dataclasses.replace(self._loads[name], rate=self._loads[name].rate + change)
        self.moves.append(move)

    # Draining.

    def drain(self) -> None:
        """The biggest first: they are the hardest to find a place for."""
        for part in sorted(self._placed.values(), key=lambda p: (-p.nbytes, p.partition)):
            leaving = [name for name in part.holders if name in self._draining]
            if leaving and (move := self._away(part, leaving[0])) is not None:
                self._take(move)

    def _away(self, part: Placed, source: str) -> Move | None:
        weigh = _primary_bytes if source == part.primary else _all_bytes
        fitting = [load for load in self._open() if self._fits(part, load)]
        others = {self._loads[name].host for name in part.holders if name != source}
        best = min(
            fitting,
            key=lambda load: (load.host in others, weigh(load), load.total, load.partitions, load.name),
            default=None,
        )
        if best is not None:
            return Move(part.partition, source, best.name, why=f"{source} drains")
        heirs = [self._loads[name] for name in part.followers if name not in self._draining]
        if source != part.primary or not heirs:
            return None
        heir = min(heirs, key=lambda load: (load.nbytes, load.name))
        return Move(part.partition, source, heir.name, swap=True, why=f"{source} drains")

    def _fits(self, part: Placed, load: Load) -> bool:
        kind = self._loads[part.primary].kind
        return load.name not in part.holders and load.kind == kind and load.takes(part.nbytes)

    # Evening out.

    def primary_step(self) -> bool:
        """Move or swap one primary, if that makes them more even; whether it did."""
        return self._step(_primary_bytes, self._primaries, lambda part: part.nbytes)

    def copy_step(self) -> bool:
        """Move one follower, if that makes all bytes more even; whether it did."""
        return self._step(_all_bytes, self._copies, lambda part: part.nbytes)

    def rate_step(self) -> bool:
        """Move or swap one primary, if that makes requests more even, and bytes not uneven; whether it did.

        Bytes come first: where a plan for them would move it back, it stays.
        """
        if max((load.rate for load in self._open()), default=0) < RATE_FLOOR:
            return False
        return self._step(_requests, self._light_primaries, lambda part: part.rate) or self._exchange()

    def _exchange(self) -> bool:
        """Two primaries of about one size change places, the hotter against the cooler one; whether two did."""
        for source, target, gap in _gaps(self._open(), _requests):
            hot = sorted(self._primaries(source, target), key=lambda m: -self._placed[m.partition].rate)[:EXCHANGED]
            cold = sorted(self._primaries(target, source), key=lambda m: self._placed[m.partition].rate)[:EXCHANGED]
            found = [
                (abs(change - gap / 2), one, other)
                for one in hot
                for other in cold
                if one.swap == other.swap
                and 0 < (change := self._placed[one.partition].rate - self._placed[other.partition].rate) < gap
                and self._leaves_bytes(one, other, source.name, target.name)
            ]
            if found:
                _, one, other = min(found, key=lambda f: (not f[1].swap, f[0], f[1].partition, f[2].partition))
                why = f"{source.name} serves {source.rate} requests/s, {target.name} {target.rate}"
                self._take(dataclasses.replace(one, why=why))
                self._take(dataclasses.replace(other, why=f"{why}; in exchange for partition {one.partition}"))
                return True
        return False

    def _leaves_bytes(self, one: Move, other: Move, source: str, target: str) -> bool:
        size = self._placed[one.partition].nbytes - self._placed[other.partition].nbytes
        return self._bytes_stay(source, target, size, one.swap)

    def _bytes_stay(self, source: str, target: str, size: int, swap: bool) -> bool:
        """Whether bytes stay as even as they have to be when so many go from one to the other, with the lead."""
        if size < 0:
            source, target, size = target, source, -size
        lead = {load.name: load.nbytes for load in self._open()}
        hold = {load.name: load.total for load in self._open()}
        return _stays_even(lead, source, target, size) and (swap or _stays_even(hold, source, target, size))

    def _step(
        self,
        weigh: Callable[[Load], int],
        candidates: Callable[[Load, Load], Iterator[Move]],
        amount: Callable[[Placed], int],
    ) -> bool:
        for source, target, gap in _gaps(self._open(), weigh):
            # Less than the gap: else the two would only change places.
            found = [m for m in candidates(source, target) if 0 < amount(self._placed[m.partition]) < gap]
            if found:
                # What costs no copying first, then what closes the gap best.
                best = min(
                    found, key=lambda m: (not m.swap, abs(amount(self._placed[m.partition]) - gap / 2), m.partition)
                )
                says, unit = _SAYS[weigh]
                why = f"{source.name} {says} {weigh(source)} {unit}, {target.name} {weigh(target)}"
                self._take(dataclasses.replace(best, why=why))
                return True
        return False

    def _light_primaries(self, source: Load, target: Load) -> Iterator[Move]:
        """Those whose going leaves bytes as even as they have to be, or makes them more so."""
        for move in self._primaries(source, target):
            if self._bytes_stay(source.name, target.name, self._placed[move.partition].nbytes, move.swap):
                yield move

    def _primaries(self, source: Load, target: Load) -> Iterator[Move]:
        for part in self._placed.values():
            if part.primary == source.name:
                if target.name in part.followers:
                    yield Move(part.partition, source.name, target.name, swap=True)
                elif self._fits(part, target) and self._keeps_hosts(part, source, target):
                    yield Move(part.partition, source.name, target.name)

    def _copies(self, source: Load, target: Load) -> Iterator[Move]:
        for part in self._placed.values():
            movable = source.name in part.followers and self._fits(part, target)
            if movable and self._keeps_hosts(part, source, target):
                yield Move(part.partition, source.name, target.name)

    def _keeps_hosts(self, part: Placed, source: Load, target: Load) -> bool:
        """Evenness is not worth two replicas on one machine."""
        others = {self._loads[name].host for name in part.holders if name != source.name}
        return target.host not in others or source.host in others


def _stays_even(values: dict[str, int], source: str, target: str, size: int) -> bool:
    """Whether what goes from one to the other leaves all within bounds, or is less than the gap between them."""
    if size < values[source] - values[target] or not size:
        return True
    after = values | {source: values[source] - size, target: values[target] + size}
    return not is_uneven(after.values())


def _gaps(loads: Sequence[Load], weigh: Callable[[Load], int]) -> list[tuple[Load, Load, int]]:
    """From whom to whom bytes should go, the widest gap first; only where the mean is missed by much."""
    if not is_uneven([weigh(load) for load in loads]):
        return []
    mean = sum(map(weigh, loads)) / len(loads)
    pairs = [
        (high, low, weigh(high) - weigh(low))
        for high in loads
        for low in loads
        if weigh(high) > weigh(low) and (weigh(high) > (1 + UNEVEN) * mean or weigh(low) < (1 - UNEVEN) * mean)
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[0].name, pair[1].name))
