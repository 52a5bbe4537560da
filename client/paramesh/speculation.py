"""Pushing gradients while backward still runs. A bet, checked at `step()`.

    speculation = Speculation(plans, push); speculation.watch()     # hooks on the parameters
    ... backward ...                                                # partitions leave when complete
    held = speculation.settle(partition, presence, parts)           # at step(): what was sent, if it is the same
    speculation.next_step(position)

Truth is `p.grad` at `step()`: clipping, unscaling and a second backward change it after the hooks have
fired, and in-place edits do not always show in a version counter. So every byte that was sent is compared
with what the gradient is then, and what differs is sent again with a higher attempt. The first two steps
only count how often each parameter's hook fires; two mismatching steps end the betting, and say so.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paramesh.encoded import Encoded
from paramesh.errors import ParameshError
from paramesh.tensors import Bytes, TablePlan, flat_bytes

if TYPE_CHECKING:
    import concurrent.futures

log = logging.getLogger(__name__)

OBSERVED_STEPS = 2
"""Steps that only count: the first may be a warm-up with another shape; two that agree are a habit."""

MISTAKES = 2
"""Mismatching steps after which betting ends: each costs a push, and a habit that broke twice is none."""

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


@dataclass
class Staged:
    """One partition that was pushed during backward."""

    encoded: Encoded
    attempt: int
    future: concurrent.futures.Future[object]
    """Done when the servers hold it."""


Push = Callable[[int, Encoded], Staged]
"""Freezes and pushes (partition, bytes) for the step at hand, under an attempt of its choice."""


class Speculation:
    """Watches the gradients of some tables.

    Args:
        plans: The tables, placed.
        push: Sends one partition; called on the thread that runs backward.
        ready: Whether parameters are those of a step, so that a gradient may count at all.
    """

    def __init__(self, plans: Sequence[TablePlan], push: Push, ready: Callable[[], bool]):
        self._plans = plans
        self._push = push
        self._ready = ready
        self._lock = threading.Lock()
        """Hooks fire on the threads of backward, one per GPU; all fields below are under it."""
        self._fired: dict[int, int] = {}
        """id of parameter -> how often its hook fired in this step."""
        self._expected: dict[int, int] = {}
        """id of parameter -> how often it did in the step before."""
        self._agreeing = 0
        """Steps in a row whose counts were the same."""
        self._waiting: dict[int, int] = {}
        """partition -> parameters whose gradient is not complete yet."""
        self._staged: dict[int, Staged] = {}
        self._mistakes = 0
        """Mismatching steps so far."""
        self._mistaken = False
        """Whether something of this step had to be sent again."""
        self.enabled = True
        self.paused = False
        """Inside no_sync: count, do not push."""
        self._holders: dict[int, list[tuple[TablePlan, int]]] = {}
        """id of parameter -> partitions that hold a part of it."""
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(self) -> None:
        """Puts hooks on the parameters; not on GPUs, where a hook would have to wait for the device."""
        for plan in self._plans:
            for parameter, partitions in zip(plan.parameters, plan.partitions_by_parameter(), strict=True):
                if parameter.device.type != "cpu":
                    return self._stop_watching()
                self._holders[id(parameter)] = [(plan, partition) for partition in partitions]
                if parameter.requires_grad:
                    register: Any = parameter.register_post_accumulate_grad_hook
                    self._handles.append(register(self._on_gradient))
        return None

    def _stop_watching(self) -> None:
        self.enabled = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ------------------------------------------------------------------ during backward

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        with self._lock:
            fired = self._fired[id(parameter)] = self._fired.get(id(parameter), 0) + 1
            if fired != self._expected.get(id(parameter), 0) or not self._betting():
                return
            complete = []
            for plan, partition in self._holders[id(parameter)]:
                self._waiting[partition] -= 1
                if not self._waiting[partition]:
                    complete.append((plan, partition))
            for plan, partition in complete:
                self._send(plan, partition)

    def _betting(self) -> bool:
        return self.enabled and not self.paused and self._agreeing >= OBSERVED_STEPS - 1 and self._ready()

    def _send(self, plan: TablePlan, partition: int) -> None:
        gradients = [plan.parameters[s.tensor].grad for s in plan.layout(partition).segments]
        if any(g is not None and (g.layout is not torch.strided or g.device.type != "cpu") for g in gradients):
            return  # `step` says what is wrong with it
        flats: list[Bytes | None] = [None] * len(plan.parameters)
        for segment, gradient in zip(plan.layout(partition).segments, gradients, strict=True):
            if gradient is not None and flats[segment.tensor] is None:
                flats[segment.tensor] = flat_bytes(gradient.to(plan.parameters[segment.tensor].dtype))
        presence, parts = plan.gather(partition, flats)
        encoded = Encoded.from_parts(partition, presence, parts)
        try:
            self._staged[partition] = self._push(partition, encoded)
        except ParameshError as error:  # `step` meets it too, and may raise it: backward must not
            log.debug("not pushed early partition=%d why=%s", partition, error)

    # ------------------------------------------------------------------ at step()

    def settle(self, partition: int, presence: bytes, parts: Sequence[tuple[int, memoryview]]) -> Staged | None:
        """Returns what was pushed of a partition if it is what the gradient is now.

        Args:
            partition: Its id.
            presence: The presence bits of now.
            parts: Offsets and bytes of now, ascending.
        """
        staged = self._staged.get(partition)
        if staged is None:
            return None
        if staged.encoded.presence == presence and same_bytes(staged.encoded, parts):
            return staged
        self._mistaken = True
        return None

    def next_step(self) -> None:
        """The step is over: learn from it, and wait for the next backward."""
        with self._lock:
            self._agreeing = self._agreeing + 1 if self._fired == self._expected else 0
            self._expected, self._fired = self._fired, {}
            if self._mistaken:
                self._mistakes += 1
            self._mistaken = False
            self._reset()
        if self._mistakes >= MISTAKES and self.enabled:
            log.info(
                "speculation=off why='gradients changed after backward in %d steps (clipping or unscaling, "
                "perhaps); they are pushed at step() from here on'",
                self._mistakes,
            )
            self._stop_watching()

    def discard(self) -> None:
        """Parameters were replaced: what was pushed for the old step is nobody's."""
        with self._lock:
            self._mistaken = False
            self._reset()

    def _reset(self) -> None:
        self._staged = {}
        self._waiting = {}
        for plan in self._plans:
            for parameter in plan.parameters:
                for _, partition in self._holders.get(id(parameter), ()):
                    expects = 1 if self._expected.get(id(parameter)) else 0
                    self._waiting[partition] = self._waiting.get(partition, 0) + expects


def same_bytes(encoded: Encoded, parts: Sequence[tuple[int, memoryview]]) -> bool:
    """Whether a frozen contribution holds exactly these bytes; padding is not looked at.

    Compares memory, not numbers: -0.0 and 0.0 differ, a NaN equals itself.
    """
    frames = [(offset, length, buffers) for offset, length, buffers in encoded.frames()]
    at = 0
    for offset, part in parts:
        done = 0
        while done < part.nbytes:
            while at < len(frames) and frames[at][0] + frames[at][1] <= offset + done:
                at += 1
            if at == len(frames) or frames[at][0] > offset + done or len(frames[at][2]) != 1:
                return False
            begin = offset + done - frames[at][0]
            length = min(part.nbytes - done, frames[at][1] - begin)
            if _memcmp(_address(frames[at][2][0]) + begin, _address(part) + done, length):
                return False
            done += length
    return True


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
