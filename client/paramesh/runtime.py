"""The small public functions: who am I, wait for the others, tell people.

    paramesh.rank(), paramesh.world_size(), paramesh.is_chief(), paramesh.device()
    accuracy = paramesh.mean(correct / total, weight=total)
    paramesh.report(loss=loss.item())

All of them work alone too: rank 0 of 1, nothing started, nothing waited for.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from paramesh.errors import ConfigError
from paramesh.routing import check_name
from paramesh.session import current
from paramesh.v1 import ledger_pb2 as lg

if TYPE_CHECKING:
    import torch

    from paramesh.membership import Session

__all__ = [
    "Pause",
    "barrier",
    "device",
    "epochs",
    "is_chief",
    "mean",
    "pause",
    "rank",
    "report",
    "world_size",
]

V = TypeVar("V")

MOST_VALUES = 65536
"""Numbers in one `mean`: they pass through the ledger as doubles, half a megabyte of them.
Tensors of a model belong into `DistributedOptimizer`, not here."""


def device() -> torch.device:
    """This process's device: the GPU of its local rank, else the CPU.

    Processes of one machine share its GPUs in turn when there are fewer than processes. In a
    cluster it also becomes torch's current device.
    """
    import torch

    from paramesh.config import ClientConfig

    if not torch.cuda.is_available():
        return torch.device("cpu")
    session = current()
    config = ClientConfig.from_environment() if session is None else session.config
    chosen = torch.device("cuda", config.local_rank % torch.cuda.device_count())
    if session is not None:
        torch.cuda.set_device(chosen)
    return chosen


def rank() -> int:
    """This worker's rank, from 0; kept over restarts by its supervisor's slot. Alone: 0."""
    session = current()
    return 0 if session is None else session.rank


def world_size() -> int:
    """How many workers there are now; before the first step, at least as many as the job starts with.
    Alone: 1. It changes when workers come, die or leave.
    """
    session = current()
    return 1 if session is None else session.roster.world_size()


def is_chief() -> bool:
    """Whether this worker has the lowest rank of those that live now. Alone: True."""
    session = current()
    return session is None or session.rank == 0 or session.roster.is_lowest()


def barrier(name: str = "") -> None:
    """Wait until every worker has come here; the k-th call of a name meets the others' k-th.

    A worker that dies is no longer waited for. After 30 s the log names who is missing.

    Args:
        name: [A-Za-z0-9_.:/-], tells barriers apart that not all workers reach in one order.

    Raises:
        RequestRefused: NAME.
        Timeout: DEADLINE, after half an hour.
        PartitionOffline: the ledger's server is lost.
    """
    label = _label("barrier", name)
    session = current()
    if session is not None:
        _gather(session, label, [], 1.0, f"workers at barrier {name!r}")


def mean(value: V, weight: float = 1.0, name: str = "") -> V:
    """The weighted mean of every worker's value; all must call it the same number of times.

    Args:
        value: a number, a tensor (averaged by element), or a dict of them with the same keys
            on every worker. At most 65536 numbers in all.
        weight: how much this worker's value counts, such as its number of samples; >= 0.
        name: [A-Za-z0-9_.:/-], tells means apart that not all workers call in one order.

    Returns:
        The mean, of the type, shape, dtype and device of `value`; an integer or bool comes
        back as float (a tensor of them as float32). Alone: `value` itself.

    Raises:
        ConfigError: the value cannot be averaged, or the weight is negative or not finite.
        RequestRefused: NAME.
        Timeout: a worker did not come within half an hour.
    """
    if not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(f"mean: weight={weight!r} is not a finite number >= 0")
    numbers, rebuild = _flatten(value)
    label = _label("mean", name)
    session = current()
    if session is None:
        return cast(V, rebuild(numbers))
    return cast(V, rebuild(_gather(session, label, numbers, weight, f"workers at mean {name!r}")))


def _label(kind: str, name: str) -> str:
    """The ledger's name of a rendezvous; wrong ones are refused alone too."""
    label = f"{kind}:{name}"
    check_name(label, f"{kind} name")
    return label


def _gather(session: Session, name: str, values: list[float], weight: float, what: str) -> list[float]:
    number = session.next_round(name)
    response = session.request(
        lambda: session.client.ledger.gather(lg.GatherRequest(name=name, round=number, values=values, weight=weight)),
        what,
    )
    # A round that is too old to be remembered was over long before this worker was restarted
    # and ran its script up to here: its own value is as good as any.
    return list(response.values) if response.count else values


def _flatten(value: Any) -> tuple[list[float], Any]:
    """The numbers of a value, and how to put numbers back in their place."""
    if isinstance(value, Mapping):
        keys = sorted(value, key=str)
        parts = [_flatten(value[key]) for key in keys]
        numbers = [number for part, _ in parts for number in part]
        return _bounded(numbers), lambda found: _rebuild_dict(value, keys, parts, found)
    if isinstance(value, bool | int | float):
        return [float(value)], lambda found: found[0]
    import torch

    if isinstance(value, torch.Tensor) and not value.is_complex():
        flat = value.detach().to(torch.float64).reshape(-1)
        if flat.numel() > MOST_VALUES:
            raise ConfigError(f"mean: {flat.numel()} numbers are more than {MOST_VALUES}")
        kind = value.dtype if value.is_floating_point() else torch.float32
        return (
            flat.tolist(),
            lambda found: (
                torch.tensor(found, dtype=torch.float64).reshape(value.shape).to(device=value.device, dtype=kind)
            ),
        )
    if hasattr(value, "item") and not isinstance(value, torch.Tensor):  # a numpy scalar
        return [float(value.item())], lambda found: found[0]
    raise ConfigError(f"mean: a {type(value).__name__} is no number, real tensor or dict of them")


def _rebuild_dict(value: Any, keys: list[Any], parts: list[Any], found: list[float]) -> dict[Any, Any]:
    at, means = 0, {}
    for key, (numbers, rebuild) in zip(keys, parts, strict=True):
        means[key] = rebuild(found[at : at + len(numbers)])
        at += len(numbers)
    return {key: means[key] for key in value}


def _bounded(numbers: list[float]) -> list[float]:
    if len(numbers) > MOST_VALUES:
        raise ConfigError(f"mean: {len(numbers)} numbers are more than {MOST_VALUES}")
    return numbers


def report(**figures: Any) -> None:
    """Show progress figures, such as `report(loss=loss)`; never waits.

    `ps-run` and `psctl status` show the latest of each name, averaged over the workers. At
    most two reports a second are sent, the others dropped, so it may stand in the inner loop.

    Args:
        figures: numbers or one-element tensors; a tensor on a GPU is read (which waits for
            the GPU) only when the report is sent.
    """
    session = current()
    if session is not None:
        session.reporter.report(figures)


def epochs(count: int) -> Iterator[int]:
    """`range(count)` that starts where the cluster is: a restarted worker skips what is over.

    Args:
        count: epochs in all.
    """
    session = current()
    return iter(range(count)) if session is None else session.data.epochs(count)


class Pause(contextlib.AbstractContextManager["Pause"]):
    """What `pause()` returns: as a context manager, it ends the pause at the block's end."""

    def __init__(self, session: Session | None):
        self._session = session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._session is not None and not self._session.closed:
            self._session.set_between()


def pause() -> Pause:
    """Let the others' steps go on without this worker, until it takes its next batch or step.

        with paramesh.pause():
            evaluate()          # rank 0 alone, for minutes; nobody waits

    As a plain call it holds until the next batch of a `DataLoader` or the next `step()`.
    """
    session = current()
    if session is not None:
        session.set_idle()
    return Pause(session)
