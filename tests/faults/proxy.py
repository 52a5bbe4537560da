"""A TCP proxy that cuts, freezes, slows and drops, one direction at a time.

    with Proxy(server_address) as proxy:      # clients use proxy.address
        proxy.cut()                           # resets every connection
        proxy.silence(down=True)              # requests arrive, answers do not

It runs on an event loop of its own thread, so that a test's own loop may be busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading

CHUNK = 64 << 10


class Proxy:
    """Forwards one address; a context manager."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = {"up": asyncio.Event(), "down": asyncio.Event()}
        """Set while bytes may pass in that direction."""
        self.cuts = 0
        self.address = ""

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *exc: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _call(self, coro) -> None:
        asyncio.run_coroutine_threadsafe(coro, self._loop).result(10)

    async def _listen(self) -> None:
        for event in self._open.values():
            event.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
        for task in asyncio.all_tasks(self._loop) - {asyncio.current_task()}:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, server_writer}
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(
                self._pump(reader, server_writer, self._open["up"]),
                self._pump(server_reader, writer, self._open["down"]),
            )

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, may: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await may.wait()
                writer.write(data)
                await writer.drain()
        self._writers.discard(writer)
        writer.close()

    async def _cut(self) -> None:
        for writer in self._writers:
            self.cuts += 1
            writer.transport.abort()
        self._writers.clear()

    def cut(self) -> None:
        """Reset every connection; new ones are accepted."""
        self._call(self._cut())

    async def _set(self, up: bool, down: bool) -> None:
        for name, silent in (("up", up), ("down", down)):
            (self._open[name].clear if silent else self._open[name].set)()

    def silence(self, *, up: bool = False, down: bool = False) -> None:
        """Hold back bytes of a direction, without closing anything; neither: let all pass."""
        self._call(self._set(up, down))
