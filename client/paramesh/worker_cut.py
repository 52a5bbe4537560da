"""A worker's own part of a checkpoint by the cluster: what the servers do not have.

When a step is the cut of a checkpoint (its record says so), every worker puts into the ledger
what it needs to go on after that step: its random generators and buffers such as BatchNorm's;
one of them also what all share (`paramesh.state`, hyper-parameters, counters). It does so when
the script comes for its next batch, because what follows a step in the loop (a scheduler's
step) belongs to it. The coordinator fetches it and writes it beside the partitions.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paramesh.errors import ParameshError
from paramesh.plain import pack, unpack
from paramesh.v1 import ledger_pb2 as lg

if TYPE_CHECKING:
    import concurrent.futures

    from paramesh.membership import Session

__all__ = ["WorkerCut"]

log = logging.getLogger(__name__)

SHARED = "paramesh:cut:shared"

OWN = "paramesh:cut:own:{rank}"

LIMIT = (4 << 20) - 1024
"""Bytes of one value in the ledger, less the checkpoint's id."""


class WorkerCut:
    """Keeps and restores one worker's own state. Training thread only.

    Args:
        session: whose.
        shared: packs what all workers share, as of now.
    """

    def __init__(self, session: Session, shared: Callable[[], bytes]) -> None:
        self._session = session
        self._shared = shared
        self._due: tuple[str, int, bool] | None = None
        """(checkpoint, version, whether this worker puts what is shared): not put yet."""
        self._resume_at = 0
        """The step at which this process began; its own state of that step is looked for. 0: no."""

    def stepped(self, checkpoint: str, version: int, chief: bool) -> None:
        """A step is a checkpoint's cut.

        Args:
            checkpoint: its id.
            version: committed steps.
            chief: this worker puts what is shared.
        """
        self._due = (checkpoint, version, chief)

    def began(self, step: int) -> None:
        """This process takes part from `step` on, and has no state of its own yet."""
        self._resume_at = step

    def between_steps(self) -> None:
        """The script comes for a batch, or for a step, or ends."""
        if self._due is not None:
            (checkpoint, version, chief), self._due = self._due, None
            self._keep(checkpoint, version, chief)
        if self._resume_at:
            step, self._resume_at = self._resume_at, 0
            self._restore(step)

    # ------------------------------------------------------------------ keeping

    def _keep(self, checkpoint: str, version: int, chief: bool) -> None:
        values = [(OWN.format(rank=self._session.rank), self._own())]
        if chief:
            values.append((SHARED, self._shared()))
        for key, data in values:
            if len(data) > LIMIT:
                log.warning("%s of %d bytes does not fit into checkpoint %s", key, len(data), checkpoint)
                continue
            value = b"checkpoint " + checkpoint.encode() + b"\n" + data
            put = self._session.submit(
                self._session.client.ledger.put_state(lg.PutStateRequest(key=key, version=version, value=value))
            )
            put.add_done_callback(_note)

    def _own(self) -> bytes:
        own: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(),
        }
        if torch.cuda.is_available():
            own["cuda"] = torch.cuda.get_rng_state()
        own["buffers"] = [
            {name: buffer.detach().cpu() for name, buffer in model.named_buffers()} for model in self._models()
        ]
        data = pack(own)
        if len(data) > LIMIT:
            log.warning("buffers of %d bytes do not fit into a checkpoint; random generators go alone", len(data))
            data = pack(own | {"buffers": []})
        return data

    def _models(self) -> list[torch.nn.Module]:
        optimizers = self._session.registry.optimizers
        return list({id(optimizer.model): optimizer.model for optimizer in optimizers}.values())

    # ------------------------------------------------------------------ restoring

    def _restore(self, step: int) -> None:
        key = OWN.format(rank=self._session.rank)
        found = self._session.request(
            lambda: self._session.client.ledger.get_state(lg.GetStateRequest(key=key)), "this worker's own state"
        )
        if not found.found or found.version != step:
            return
        try:
            self._take(unpack(_without_id(found.value)))
        except (ParameshError, KeyError, TypeError, ValueError, RuntimeError) as error:
            log.warning("own state of step %d is not restored: %s", step, error)
            return
        log.info("own state restored rank=%d step=%d", self._session.rank, step)

    def _take(self, own: dict[str, Any]) -> None:
        with torch.no_grad():
            for model, buffers in zip(self._models(), own["buffers"], strict=False):
                for name, buffer in model.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])
        random.setstate(own["python"])
        np.random.set_state(own["numpy"])
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
        torch.set_rng_state(own["torch"])


def _without_id(value: bytes) -> bytes:
    """What was packed: with the checkpoint's id before it as a worker put it, without as it was restored."""
    told, _, rest = value.partition(b"\n")
    return rest if told.startswith(b"checkpoint ") else value


def _note(done: concurrent.futures.Future[lg.PutStateResponse]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.warning("own state not kept: %s", error)
