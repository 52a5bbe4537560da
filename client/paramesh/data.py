"""`DataLoader`: torch's, with an epoch's batches dealt out among the workers.

    loader = paramesh.DataLoader(dataset, batch_size=64, shuffle=True, seed=0)
    for epoch in range(10):
        for x, y in loader:       # the k-th loop is epoch k of the whole cluster
            ...

Inside is a `torch.utils.data.DataLoader`; alone it is handed out as it is. In a cluster
its index batches are leases: ranges of the epoch's permutation that the ledger gives to
one worker at a time, takes back when a worker dies, and counts when a step commits.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sized
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
import torch.utils.data

from paramesh.errors import ConfigError, Fenced
from paramesh.leases import EpochTerms, LeasedEpoch, permutation
from paramesh.profiling import phase
from paramesh.routing import check_name
from paramesh.session import current

if TYPE_CHECKING:
    from paramesh.membership import Session

__all__ = ["DataLoader"]

T_co = TypeVar("T_co", covariant=True)


class DataLoader(Generic[T_co]):
    """Loads a dataset, each epoch's batches shared out among the workers of the cluster.

    Takes torch's arguments, by torch's names and order, and refuses those that cannot work
    in a cluster (also alone, so that a script that runs here runs there). The k-th
    `iter(loader)` is epoch k of the whole cluster: one that is finished yields nothing, so a
    worker restarted in epoch 7 passes quickly through 0 to 6. Loops of all workers end
    together, when every sample was part of a committed step (or was delivered).

    Args:
        dataset: map-style: `__len__` and `__getitem__`.
        batch_size: samples of one batch of one worker; None: samples, unbatched.
        shuffle: a fresh permutation each epoch, from `seed` and the epoch alone.
        sampler: refused; so are `batch_sampler`, and `generator` together with shuffle.
        num_workers: processes that load; batches are counted when delivered to the loop.
        drop_last: drop the last, smaller batch of the *epoch* (not of each worker).
        seed: of the permutation; the same on every worker.
        name: tells several loaders apart. Default: by the order of construction, which must
            then be the same on every worker; name those that only some of them make.
        train: whether batches count as the next step's samples. Default: unless gradients
            are off (`torch.no_grad()`) when the loop starts. An evaluating loop is shared out
            too, so all workers must run it (`paramesh.mean` brings the results together); for
            one that runs on the chief only, take torch's own loader inside `paramesh.pause()`.
        collate_fn, pin_memory, timeout, worker_init_fn, multiprocessing_context, generator,
            prefetch_factor, persistent_workers, pin_memory_device: as torch's.

    Raises:
        ConfigError: an argument cannot work; the message says what to do instead.
        RequestRefused: NAME, if `name` is not of [A-Za-z0-9_.:/-].
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset[T_co],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        seed: int = 0,
        name: str | None = None,
        train: bool | None = None,
    ):
        _check(dataset, sampler, batch_sampler, generator if shuffle else None, in_order)
        _check_numbers(batch_size, seed)
        if name:
            check_name(name, "DataLoader name")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = bool(shuffle)
        self.drop_last = drop_last
        self.seed = seed
        self.num_workers = num_workers
        self._train = train
        self._name = name
        self._ahead = num_workers * (prefetch_factor or 2)
        self._inner: Callable[..., torch.utils.data.DataLoader[T_co]] = _maker(
            dataset,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            generator=generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            **({"pin_memory_device": pin_memory_device} if pin_memory_device else {}),
        )
        self._plain: _Alone[T_co] | None = None
        self._leased: _Leased[T_co] | None = None
        if name is None and (session := current()) is not None:
            self._name_for(session)

    # ------------------------------------------------------------------ the loop

    def __iter__(self) -> Iterator[T_co]:
        session = current()
        if session is None:
            if self._plain is None:
                self._plain = _Alone(self)
            return self._plain.start()
        if self._leased is None:
            self._leased = _Leased(self)
        training = torch.is_grad_enabled() if self._train is None else self._train
        return self._leased.start(session, self._name_for(session), training)

    def __len__(self) -> int:
        """Batches per epoch: exactly, alone; in a cluster a hint, this worker's even share."""
        session = current()
        world = 1 if session is None else max(1, session.world_size)
        return -(-self._chunks() // world)

    @property
    def name(self) -> str:
        """The key under which the ledger knows this loader's epochs; alone: as given, or ""."""
        session = current()
        return (self._name or "") if session is None else self._name_for(session)

    def _chunks(self) -> int:
        length, size = len(cast(Sized, self.dataset)), self.batch_size or 1
        return length // size if self.drop_last else -(-length // size)

    def _name_for(self, session: Session) -> str:
        if self._name is None:
            self._name = session.data.next_loader_name()
        return self._name

    def __repr__(self) -> str:
        return (
            f"paramesh.DataLoader(name={self._name!r}, samples={len(cast(Sized, self.dataset))}, "
            f"batch_size={self.batch_size}, shuffle={self.shuffle}, drop_last={self.drop_last})"
        )


class _Alone(Generic[T_co]):
    """Torch's loader as it is, over the same permutations as in a cluster of one."""

    def __init__(self, owner: DataLoader[T_co]):
        self._sampler = _SeededSampler(owner)
        self._loader = owner._inner(batch_size=owner.batch_size, sampler=self._sampler, drop_last=owner.drop_last)
        self._epoch = 0

    def start(self) -> Iterator[T_co]:
        self._sampler.epoch = self._epoch
        self._epoch += 1
        return iter(self._loader)


class _SeededSampler(torch.utils.data.Sampler[int]):
    """The samples of one epoch, in the order of `(seed, epoch)`."""

    def __init__(self, owner: DataLoader[Any]):
        self._length = len(cast(Sized, owner.dataset))
        self._shuffle = owner.shuffle
        self._seed = owner.seed
        self.epoch = 0
        """Which epoch the next `iter` is; set by its only user before each."""

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        if not self._shuffle:
            return iter(range(self._length))
        return iter(permutation(self._length, self._seed, self.epoch).tolist())


class _Source:
    """What torch's loader takes for its (batch) sampler: whichever epoch runs now."""

    def __init__(self, batched: bool) -> None:
        self.epoch: LeasedEpoch | None = None
        self._batched = batched

    def __iter__(self) -> Iterator[Any]:
        assert self.epoch is not None
        return iter(self.epoch) if self._batched else (indices[0] for indices in self.epoch)


class _Leased(Generic[T_co]):
    """Torch's loader fed by leases."""

    def __init__(self, owner: DataLoader[T_co]):
        self._owner = weakref.proxy(owner)
        self._ahead = owner._ahead
        self._source = _Source(batched=owner.batch_size is not None)
        self._loader = (
            owner._inner(batch_size=None, sampler=self._source)
            if owner.batch_size is None
            else owner._inner(batch_sampler=self._source)
        )

    def start(self, session: Session, name: str, training: bool) -> Iterator[T_co]:
        """Count the epoch now, as torch does at `iter`; lease at the first `next`."""
        number = session.data.next_epoch(name)
        if number is None:
            return iter(())
        owner = self._owner
        terms = EpochTerms(
            dataset=name,
            epoch=number,
            length=len(owner.dataset),
            chunk=owner.batch_size or 1,
            drop_last=owner.drop_last,
            seed=owner.seed,
            shuffle=owner.shuffle,
        )
        return self._batches(session, LeasedEpoch(session, terms, ahead=self._ahead, training=training), training)

    def _batches(self, session: Session, epoch: LeasedEpoch, training: bool) -> Iterator[T_co]:
        pid = os.getpid()
        session.opened(epoch, training=training)
        try:
            while epoch.refill():
                self._source.epoch = epoch
                batches = iter(self._loader)
                while True:
                    with phase("data"):
                        batch = next(batches, _END)
                    if batch is _END or epoch.stale:
                        break
                    if training:
                        _become_active(session)
                        if epoch.stale:  # found out only now that it had been evicted
                            break
                    epoch.deliver()
                    yield cast(T_co, batch)
                    if epoch.stale:
                        break
                del batches
        finally:
            if pid == os.getpid():  # a forked worker that drops its copy must not speak for us
                epoch.close()
                session.ended(epoch)
        if training and pid == os.getpid():
            session.catch_up()


_END: Any = object()


def _become_active(session: Session) -> None:
    """Steps wait for this worker; one that turns out to be evicted meanwhile joins anew, its leases are gone."""
    try:
        session.ensure_active()
    except Fenced:
        session.rejoin()


def _maker(dataset: Any, **arguments: Any) -> Callable[..., Any]:
    """A maker of torch loaders with everything but the sampling settled."""

    def make(**sampling: Any) -> Any:
        return torch.utils.data.DataLoader(dataset, **sampling, **arguments)

    return make


def _refused(argument: str, message: str) -> ConfigError:
    return ConfigError(f"paramesh.DataLoader: {message}", metadata={"argument": argument})


def _check(dataset: Any, sampler: Any, batch_sampler: Any, generator: Any, in_order: bool) -> None:
    """Refuse what cannot be dealt out among workers."""
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise _refused(
            "dataset",
            "an iterable-style dataset cannot be leased by index. Give it __len__ and __getitem__, or keep "
            "torch's own DataLoader over it and split its stream by paramesh.rank() and world_size()",
        )
    if not hasattr(dataset, "__len__"):
        raise _refused("dataset", "the dataset needs a __len__: its samples are leased by index")
    for argument, value in (("sampler", sampler), ("batch_sampler", batch_sampler)):
        if value is not None:
            raise _refused(
                argument,
                f"{argument}= cannot work: the ledger decides which worker gets which samples. Use shuffle= and "
                "seed=; to choose or repeat samples, wrap the dataset in torch.utils.data.Subset(dataset, indices)",
            )
    if generator is not None:
        raise _refused(
            "generator",
            "generator= with shuffle=True cannot work: every worker must derive the same permutation. Use seed=",
        )
    if not in_order:
        raise _refused("in_order", "in_order=False cannot work: batches are bound to leases in order")


def _check_numbers(batch_size: Any, seed: Any) -> None:
    whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if batch_size is not None and not (whole and batch_size > 0):
        raise _refused("batch_size", f"batch_size={batch_size!r} is not a whole number above 0, or None")
    if not (isinstance(seed, int) and 0 <= seed < 2**64):
        raise _refused("seed", f"seed={seed!r} is not a whole number from 0 to 2**64 - 1")
