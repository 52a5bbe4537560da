"""The IO thread: deadlines say what was waited for; a fork gets its own."""

import asyncio
import os

import pytest
from paramesh.errors import Timeout
from paramesh.io import IoThread


def test_a_deadline_names_what_was_waited_for_and_cancels_it():
    io, cancelled = IoThread.get(), asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(Timeout, match=r"waited 0\.05 s for the moon"):
        io.run(forever(), 0.05, "the moon")

    async def seen() -> bool:
        return await asyncio.wait_for(cancelled.wait(), 5)

    assert io.run(seen(), 6, "the cancellation")


def test_errors_come_back_as_they_are():
    async def fails() -> None:
        raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        IoThread.get().run(fails(), 5, "nothing")


def test_a_forked_child_gets_its_own_thread():
    IoThread.get()

    async def pid() -> int:
        return os.getpid()

    child = os.fork()
    if child == 0:
        ok = not IoThread.running() and IoThread.get().run(pid(), 5, "the pid") == os.getpid()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
