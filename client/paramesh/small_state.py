"""`paramesh.state`: schedulers, scalers and the like, the same on a worker that was restarted.

    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, ...)
    paramesh.state(scheduler=scheduler, scaler=scaler)

How a newcomer comes to agree with the others: the state's version is the number of committed
steps of the main group (the first optimizer's). When a step has a contributor that the step
before had not, the longest-joined of those who were in both puts the state as of that step
into the ledger, *inside* its `step()`, before the script calls `scheduler.step()`; the
newcomer takes it at the same place of the same step. Before that it starts from the latest
that was put, at most half a second old. Hyper-parameters of the optimizers and the counters
of barriers and means travel along, since a scheduler computes the next learning rate from
the present one.

The state is kept without pickle: `paramesh.plain` says which values are allowed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from paramesh.errors import ConfigError, ParameshError, refuse
from paramesh.plain import pack, unpack
from paramesh.session import current, registry
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1.types_pb2 import StepRecord
from paramesh.worker_cut import WorkerCut

if TYPE_CHECKING:
    import concurrent.futures

    from paramesh.membership import Session

__all__ = ["SmallState", "state"]

log = logging.getLogger(__name__)

KEY = "paramesh:state"

LIMIT = 4 << 20
"""Bytes of one value in the ledger; it is replicated and kept in memory."""

EVERY = 0.5
"""Seconds between two puts without a newcomer: what a restart of *all* workers may lose."""

SHARE = 0.02
"""Of the time, at most, that packing large state may take."""

ADOPT_TIMEOUT = 5.0
"""Seconds that a newcomer waits for the state as of its first step; the longest-joined puts
it within a call's time, unless it died in that very step."""


def state(**objects: Any) -> None:
    """Keep small state in the ledger, and restore it on a worker that joins later.

    Call it once, after making the objects. They are restored at once if the cluster has
    their state already, again when this script comes to the loop in which that was kept, and
    last in this worker's first step, from the others' state as of that step.

    Args:
        objects: by name, equal on every worker: anything with `state_dict()` and
            `load_state_dict()`, such as schedulers, GradScalers, an EMA of a small model. All
            together at most 4 MiB; for larger things there is `paramesh.save`.

    Raises:
        ConfigError: an object has no state_dict or load_state_dict.
        RequestRefused: FORMAT if its state holds what cannot be kept without pickle, naming
            it; STATE_TOO_LARGE.
    """
    for name, thing in objects.items():
        if not (callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))):
            raise ConfigError(f"state: {name} is a {type(thing).__name__} without state_dict and load_state_dict")
    registry().objects.update(objects)
    session = current()
    if session is None:
        _packed(objects, {})  # a script that runs alone must also run in a cluster
    else:
        session.small_state.added(objects)


class SmallState:
    """Keeps and restores one worker's small state. Training thread only."""

    def __init__(self, session: Session):
        self._session = session
        self._main: int | None = None
        """The group whose steps the version counts: the lowest that ever stepped here, or what
        the stored state says. None: not known yet."""
        self.version = 0
        """Committed steps of the main group, as this worker knows."""
        self._contributors: dict[int, set[int]] = {}
        """For each group, the client ids in its last record that this worker knows."""
        self._adopting = False
        """Whether this worker is a newcomer in the main group's next step."""
        self._keeper = session.rank == 0
        """Whether this worker was the longest-joined one in the last step."""
        self._put: concurrent.futures.Future[lg.PutStateResponse] | None = None
        self._put_at = -math.inf
        self._interval = EVERY
        self._last = b""
        """What was put last."""
        self._found = lg.GetStateResponse()
        """The newest stored state that this worker has seen."""
        self._waiting: dict[str, int] | None = None
        """The loops that had begun when that was kept, until this script has come as far."""
        self._looked = False
        self._began = False
        """Whether steps ever waited for this worker."""
        self.cut = WorkerCut(session, self._pack)
        """This worker's own part of checkpoints."""

    # ------------------------------------------------------------------ events

    def added(self, objects: Mapping[str, Any]) -> None:
        """The script named objects: check them, restore those that the ledger knows."""
        _packed(objects, {})
        self._first_look()
        if self._found.found:
            _load(self._content(), objects)

    def loop_began(self) -> None:
        """The script came to another loop over a loader, perhaps one that is over."""
        self._first_look()
        if self._waiting is not None:
            begun = self._session.data.loops
            if all(begun.get(name, 0) >= count for name, count in self._waiting.items()):
                self._restore()

    def _first_look(self) -> None:
        if not self._looked:
            self._looked = True
            if self._look():
                loops = self._content().get("loops")
                self._waiting = loops if isinstance(loops, dict) else {}

    def on_active(self, positions: Mapping[int, lg.GroupPosition]) -> None:
        """Steps wait for this worker from `positions` on."""
        for position in positions.values():
            if position.HasField("last"):
                self._contributors[position.group] = _ids(position.last)
        mine = self.version
        if self._main is None:
            behind = any(position.next_step for position in positions.values())
        else:
            main = positions.get(self._main)
            behind = main is not None and main.next_step > mine
            self.version = main.next_step if main is not None else mine
        if behind:
            self._adopting = True
            if not self._began:
                self.cut.began(max(position.next_step for position in positions.values()))
            self._first_look()
            known = self._found.version if self._waiting is None else -1
            # What was put last may be older than what this worker has, or restored already.
            if self._look() and self._found.version > max(mine, known) and not self._overtaken():
                self._restore()
        elif self._keeper and self.version:
            self._keep()
        self._began = True

    def _overtaken(self) -> bool:
        """Whether what was found is from before a loop that began here.

        Then this script has done already what comes between loops, such as a scheduler's step per epoch,
        and would have it undone. The steps that it missed are made up for in its first step.
        """
        loops, begun = self._content().get("loops"), self._session.data.loops
        return isinstance(loops, dict) and any(count < begun.get(name, 0) for name, count in loops.items())

    def on_rejoined(self) -> None:
        """This worker is somebody else now."""
        self._keeper = False

    def after_step(self, group: int, step: int, record: StepRecord | None) -> None:
        """A step was committed and its parameters are in place."""
        if self._main is None or (group < self._main and not self._adopting):
            self._main = group
        if group != self._main:
            return
        self.version = step + 1
        if record is not None and record.checkpoint:
            chief = self._session.client.client_id == min(_ids(record), default=0)
            self.cut.stepped(record.checkpoint, self.version, chief)
        adopting, self._adopting = self._adopting, False
        if record is None:  # ssp, async: each at its own clock; the most advanced one counts
            self._keep()
            return
        now, before = _ids(record), self._contributors.get(group)
        self._contributors[group] = now
        stayed = now if before is None else now & before
        if adopting:
            if stayed - {self._session.client.client_id}:
                self._adopt()
            return
        self._keeper = self._session.client.client_id == min(stayed or now, default=0)
        if self._keeper:
            self._keep(force=bool(before is not None and now - before))

    # ------------------------------------------------------------------ keeping

    @property
    def _objects(self) -> dict[str, Any]:
        return self._session.registry.objects

    def keep_now(self) -> None:
        """An epoch of `paramesh.epochs` begins: a restarted worker will begin here."""
        if self._keeper:
            self._keep(force=True)

    def _keep(self, *, force: bool = False) -> None:
        began = time.monotonic()
        if not force and (began - self._put_at < self._interval or (self._put and not self._put.done())):
            return
        session, data = self._session, self._pack()
        self._put_at = time.monotonic()
        self._interval = max(EVERY, (self._put_at - began) / SHARE)
        if data == self._last and not force:
            return
        self._last = data
        request = lg.PutStateRequest(key=KEY, version=self.version, value=data)
        self._put = session.submit(session.client.ledger.put_state(request))
        self._put.add_done_callback(_note)

    def _pack(self) -> bytes:
        """What all workers share, as it is now."""
        session = self._session
        return _packed(
            self._objects,
            {
                "group": self._main,
                "hyper": _hyper_parameters(session),
                "rounds": session.rounds,
                "loops": session.data.loops,
            },
        )

    # ------------------------------------------------------------------ restoring

    def _look(self) -> bool:
        """Fetch the newest stored state; whether there is one."""
        session = self._session
        self._found = session.request(
            lambda: session.client.ledger.get_state(lg.GetStateRequest(key=KEY)), "the workers' small state"
        )
        return self._found.found

    def _adopt(self) -> None:
        """Take the state as of the step just finished, which the longest-joined puts now."""
        session, version = self._session, self.version
        try:
            self._found = session.call(self._await_version(version), "the other workers' small state", ADOPT_TIMEOUT)
        except ParameshError as error:
            log.warning("small state not taken over version=%d reason=%s: %s", version, error.reason, error)
            return
        self._restore()

    async def _await_version(self, version: int) -> lg.GetStateResponse:
        while True:
            stored = await self._session.client.ledger.get_state(lg.GetStateRequest(key=KEY))
            if stored.found and stored.version >= version:
                return stored
            await asyncio.sleep(0.01)

    def _content(self) -> dict[str, Any]:
        content = unpack(self._found.value)
        if not isinstance(content, dict) or not isinstance(content.get("objects"), dict):
            raise refuse("FORMAT", f"the ledger's state {KEY!r} is not the workers' small state")
        return content

    def _restore(self) -> None:
        """Take over all of what was found."""
        content = self._content()
        self._waiting = None
        if isinstance(content.get("group"), int):
            self._main = content["group"]
        _load(content, self._objects)
        _set_hyper_parameters(self._session, content.get("hyper", []))
        self._session.skip_rounds(content.get("rounds", {}))
        log.info("small state restored version=%d names=%s", self._found.version, ",".join(self._objects))


def _load(content: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
    for name, thing in objects.items():
        if name in content["objects"]:
            thing.load_state_dict(content["objects"][name])
        else:
            log.warning("small state of %r is not known to the other workers", name)


def _ids(record: StepRecord) -> set[int]:
    return {contributor.client_id for contributor in record.contributors}


def _note(done: concurrent.futures.Future[lg.PutStateResponse]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.warning("small state not kept: %s", error)


def _packed(objects: Mapping[str, Any], more: Mapping[str, Any]) -> bytes:
    data = pack({"objects": {name: thing.state_dict() for name, thing in objects.items()}, **more})
    if len(data) > LIMIT:
        sizes = {name: len(pack(thing.state_dict())) for name, thing in objects.items()}
        largest = max(sizes, key=sizes.__getitem__)
        raise refuse(
            "STATE_TOO_LARGE",
            f"state: {len(data)} bytes are more than {LIMIT}; the largest is {largest!r} with {sizes[largest]}. "
            "Keep large things local, or write them with paramesh.save",
            limit=LIMIT,
            largest=largest,
        )
    return data


def _hyper_parameters(session: Session) -> list[list[dict[str, Any]]]:
    """Every optimizer's settings, per param group, without the parameters."""
    return [
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for optimizer in session.registry.optimizers
    ]


def _set_hyper_parameters(session: Session, stored: Any) -> None:
    optimizers = session.registry.optimizers
    if not isinstance(stored, list) or len(stored) != len(optimizers):
        return  # made later in the script: they are set when this worker takes its first step
    for optimizer, groups in zip(optimizers, stored, strict=True):
        for group, settings in zip(optimizer.param_groups, groups, strict=False):
            for key, value in settings.items():
                if isinstance(group.get(key), torch.Tensor):
                    group[key].fill_(value)
                elif key in group:
                    group[key] = value
