"""A TCP proxy that cuts, freezes, slows and drops, one direction at a time.

    with Proxy(server_address) as proxy:      # clients use proxy.address
        proxy.cut()                           # resets every connection
        proxy.silence(down=True)              # requests arrive, answers do not
        proxy.freeze()                        # what is connected now never gets a byte through again

It runs on an event loop of its own thread, so that a test's own loop may be busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading

CHUNK = 64 << 10


class Proxy:
    """Forwards one address; a context manager.

    Args:
        target: host:port.
        listen: host:port to listen on; port 0: any.
    """

    def __init__(self, target: str, listen: str = "127.0.0.1:0") -> None:
        self._listen_on = listen.rpartition(":")
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = {"up": asyncio.Event(), "down": asyncio.Event()}
        """Set while bytes may pass in that direction."""
        self._stuck: set[asyncio.StreamWriter] = set()
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
        self._server = await asyncio.start_server(self._serve, self._listen_on[0], int(self._listen_on[2]))
        self.address = f"{self._listen_on[0]}:{self._server.sockets[0].getsockname()[1]}"

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
                self._pump(reader, server_writer, "up"),
                self._pump(server_reader, writer, "down"),
            )

    def _saw(self, reader: asyncio.StreamReader, direction: str, data: bytes) -> None:
        """Bytes of a connection, before they go on."""

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                self._saw(reader, direction, data)
                await self._open[direction].wait()
                if writer in self._stuck:
                    await asyncio.Event().wait()
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

    async def _freeze(self) -> None:
        self._stuck |= self._writers

    def freeze(self) -> None:
        """Hold back all bytes of the connections there are, without closing any; new ones are none of these."""
        self._call(self._freeze())

    async def _set(self, up: bool, down: bool) -> None:
        for name, silent in (("up", up), ("down", down)):
            (self._open[name].clear if silent else self._open[name].set)()

    def silence(self, *, up: bool = False, down: bool = False) -> None:
        """Hold back bytes of a direction, without closing anything; neither: let all pass."""
        self._call(self._set(up, down))


class Tap(Proxy):
    """Keeps what passes, by connection and direction."""

    def __init__(self, target: str, listen: str) -> None:
        super().__init__(target, listen)
        self._seen: dict[tuple[int, str], bytearray] = {}
        self._readers: list[asyncio.StreamReader] = []
        """Held, so that no two have the same id."""

    def _saw(self, reader: asyncio.StreamReader, direction: str, data: bytes) -> None:
        if (id(reader), direction) not in self._seen:
            self._readers.append(reader)
        self._seen.setdefault((id(reader), direction), bytearray()).extend(data)

    def seen(self, direction: str = "") -> list[bytes]:
        """All that has passed so far, connection by connection; of one direction if it is named."""
        return [bytes(data) for (_, way), data in list(self._seen.items()) if direction in ("", way)]
