"""The network of the simulation: calls and streams that are late, lost, doubled, cut one way.

    answer = await net.call(process, "a", "push", request, timeout=3.0)    # raises ParameshError
    stream = net.open(process, "b", "append")
    stream.send(item); item = await stream.get()

An address is a name; whichever process of that name runs when a request arrives gets it, as
with a port that is used again. A stream is in order and loses nothing but its end, as TCP is:
what is lost breaks it, and what was on its way may still arrive after its sender knows.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Any

from paramesh.errors import ParameshError, refuse

from tests.simulation.kernel import Future, Kernel, Process, Signal


class StreamEnded(Exception):
    """The other side closed it, or it broke."""


@dataclass
class Weather:
    """How unkind the network is; all are probabilities per message."""

    lost: float = 0.0
    doubled: float = 0.0
    slow: float = 0.0
    """Of a delay of up to `slow_s` instead of a millisecond."""
    slow_s: float = 0.5


class Network:
    """Who is where, and what happens between them."""

    def __init__(self, kernel: Kernel, rng: random.Random) -> None:
        self.kernel = kernel
        self.weather = Weather()
        self.latency = 0.003
        """Seconds at most, of a message in fair weather."""
        self.nodes: dict[str, Any] = {}
        """Address -> the node there: has `process` and the methods that are called."""
        self.cuts: dict[tuple[str, str], None] = {}
        """(from, to) that nothing passes."""
        self._rng = rng
        self._streams: list[Stream] = []
        self._serving: dict[Process, dict[Future, str]] = {}

    def blocked(self, src: str, dst: str) -> bool:
        """Whether nothing passes."""
        return (src, dst) in self.cuts

    def delay(self) -> float:
        """Seconds for one message."""
        rng = self._rng
        if rng.random() < self.weather.slow:
            return rng.uniform(0.0, self.weather.slow_s)
        return rng.uniform(0.1, 1.0) * self.latency

    def loses(self) -> bool:
        """Whether this message is lost."""
        return self._rng.random() < self.weather.lost

    # --- calls ---

    async def call(self, src: Process, to: str, method: str, request: Any, timeout: float) -> Any:
        """One call; raises what it was refused with, UNREACHABLE or DEADLINE."""
        answer = Future()
        if not self.blocked(src.name, to) and not self.loses():
            self.kernel.at(self.delay(), None, self._arrive, src, to, method, request, answer)
            if self._rng.random() < self.weather.doubled:
                late = self.delay() + self._rng.uniform(0.0, 3.0)
                self.kernel.at(late, None, self._arrive, src, to, method, request, Future())
        elif self._rng.random() < 0.5:
            self.kernel.at(self.delay(), src, answer.fail, refuse("UNREACHABLE", f"{to} is cut off"))
        if not await self.kernel.wait(answer, timeout):
            raise refuse("DEADLINE", f"{to} did not answer {method}")
        return await answer

    def ghost(self, src: Process, to: str, method: str, request: Any, late: float) -> None:
        """A copy of a request, that was on its way all the time."""
        self.kernel.at(late, None, self._arrive, src, to, method, request, Future())

    def _arrive(self, src: Process, to: str, method: str, request: Any, answer: Future) -> None:
        node = self.nodes.get(to)
        if node is None or not node.process.alive:
            self.kernel.at(self.delay(), src, answer.fail, refuse("UNREACHABLE", f"nobody listens at {to}"))
            return
        self._serving.setdefault(node.process, {})[answer] = src.name
        self.kernel.at(0.0, node.process, self._serve, src, node, method, request, answer)

    def _serve(self, src: Process, node: Any, method: str, request: Any, answer: Future) -> None:
        self.kernel.spawn(node.process, self._served(src, node, method, request, answer), method)

    async def _served(self, src: Process, node: Any, method: str, request: Any, answer: Future) -> None:
        result: Any
        try:
            result = await getattr(node, method)(request)
        except ParameshError as error:
            result = error
        self._serving.get(node.process, {}).pop(answer, None)
        if self.blocked(node.process.name, src.name) or self.loses():
            if self._rng.random() < 0.5:
                lost = refuse("UNREACHABLE", f"the connection to {node.process.name} broke")
                self.kernel.at(self.delay(), src, answer.fail, lost)
            return
        give = answer.fail if isinstance(result, ParameshError) else answer.set
        self.kernel.at(self.delay(), src, give, result)

    # --- streams ---

    def open(self, src: Process, to: str, method: str) -> Stream:
        """A stream that a process begins."""
        stream = Stream(self, src, to)
        self._streams.append(stream)
        if self.blocked(src.name, to) or self.loses():
            stream.stall()
        else:
            self.kernel.at(self.delay(), None, self._accept, stream, to, method)
        return stream

    def _accept(self, stream: Stream, to: str, method: str) -> None:
        node = self.nodes.get(to)
        if node is None or not node.process.alive:
            stream.stall(quick=True)
            return
        stream.accepted(node.process)
        self.kernel.spawn(node.process, getattr(node, method)(stream.far), method)

    def died(self, process: Process) -> None:
        """Connections of a process that was killed are reset."""
        for stream in self._streams:
            if process in (stream.near.process, stream.far.process):
                stream.stall(quick=True)
        self._streams = [stream for stream in self._streams if not stream.over]
        for answer in self._serving.pop(process, {}):
            self.kernel.at(self.delay(), None, answer.fail, refuse("UNREACHABLE", f"{process.name} died"))

    def reset(self) -> None:
        """One connection breaks."""
        alive = [stream for stream in self._streams if not stream.over]
        if alive:
            self._rng.choice(alive).stall(quick=True)


class End:
    """One side of a stream."""

    def __init__(self, stream: Stream, process: Process | None, name: str) -> None:
        self.stream = stream
        self.process = process
        self.name = name
        self._queue: deque[Any] = deque()
        self._moved = Signal()
        self.ended = False
        self.last = 0.0
        """When the last message that was sent to here arrives."""

    def send(self, item: Any) -> None:
        """To the other side, in order."""
        self.stream.carry(self, item)

    async def get(self) -> Any:
        """The next one from the other side.

        Raises:
            StreamEnded: none comes any more.
        """
        while not self._queue:
            if self.ended:
                raise StreamEnded
            await self._moved.next
        return self._queue.popleft()

    def arrive(self, item: Any) -> None:
        """A message is here."""
        if not self.ended:
            self._queue.append(item)
            self._moved.fire()

    def end(self) -> None:
        """Nothing comes any more."""
        self.ended = True
        self._moved.fire()


class Stream:
    """A connection of two ends."""

    def __init__(self, net: Network, src: Process, to: str) -> None:
        self._net = net
        self.near = End(self, src, src.name)
        self.far = End(self, None, to)
        self.over = False
        self._early: list[Any] = []

    def accepted(self, process: Process) -> None:
        """The far process has it; what was sent before follows."""
        self.far.process = process
        early, self._early = self._early, []
        for item in early:
            self._deliver(self.far, item)

    def carry(self, source: End, item: Any) -> None:
        """One message from an end to the other."""
        target = self.far if source is self.near else self.near
        if self.over:
            return
        if self._net.blocked(source.name, target.name):
            self.stall()
        elif self._net.loses():
            self.stall(quick=True)
        elif target.process is None:
            self._early.append(item)
        else:
            self._deliver(target, item)

    def _deliver(self, target: End, item: Any) -> None:
        kernel = self._net.kernel
        target.last = max(target.last, kernel.now + self._net.delay())
        kernel.at(target.last - kernel.now, target.process, target.arrive, item)

    def stall(self, quick: bool = False) -> None:
        """Nothing passes any more; both ends notice, sooner or later."""
        if self.over:
            return
        self.over = True
        rng, kernel = self._net._rng, self._net.kernel
        for end in (self.near, self.far):
            if end.process is None:
                continue
            notice = rng.uniform(0.0, 0.01) if quick else rng.uniform(0.2, 2.5)
            # What is on its way may still arrive, or not.
            if rng.random() < 0.7:
                notice += max(0.0, end.last - kernel.now)
            kernel.at(notice, end.process, end.end)

    def cancel(self) -> None:
        """The near side gives up."""
        if not self.over:
            self.near.end()
            self.stall(quick=True)
