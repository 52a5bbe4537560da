"""Lines: split, kept, printed."""

from __future__ import annotations

import asyncio
import logging
import os

import pytest
from paramesh_worker.output import LONGEST_LINE, LineSplitter, Printer, PrinterHandler, Tail


def feed(*chunks: bytes) -> list[bytes]:
    splitter = LineSplitter()
    return [line for chunk in chunks for line in splitter.feed(chunk)] + splitter.close()


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"a\nb\n"], [b"a", b"b"]),
        ([b"a", b"b\nc"], [b"ab", b"c"]),
        ([b"\n\n"], [b"", b""]),
        ([b"a\r\nb\r", b"\nc"], [b"a", b"b", b"c"]),
        ([b""], []),
        ([b"10%\r20%\r", b"30%\r", b"done\n"], [b"done"]),
        ([b"10%\r20%\r"], [b"20%"]),
    ],
)
def test_lines(chunks: list[bytes], lines: list[bytes]):
    assert feed(*chunks) == lines


def test_any_cut_of_the_stream_gives_the_same_lines():
    text = b"one\r\n\xc3\xa4\ntwo 1%\rtwo 2%\rtwo 3%\n\nlast"
    whole = feed(text)
    for cut in range(len(text) + 1):
        assert feed(text[:cut], text[cut:]) == whole


def test_a_line_without_end_is_cut_so_that_memory_stays_bounded():
    splitter = LineSplitter()
    lines = [line for _ in range(100) for line in splitter.feed(b"x" * 4096)]
    assert lines
    assert max(map(len, lines)) <= LONGEST_LINE + 4096


def test_the_tail_keeps_the_last_lines_and_no_blank_ones():
    tail = Tail(limit=3)
    tail.extend([b"1", b"", b"2", b"  ", b"3", b"4", b"\xff"])
    assert tail.lines() == ["3", "4", "\ufffd"]


def test_the_printer_writes_in_order_and_outlives_a_reader_that_went_away():
    read_end, write_end = os.pipe()

    async def write() -> None:
        for index in range(100):
            await printer.write(write_end, b"%d\n" % index)

    printer = Printer()
    asyncio.run(write())
    assert os.read(read_end, 1 << 16) == b"".join(b"%d\n" % index for index in range(100))
    os.close(read_end)

    async def write_to_nobody() -> None:
        await asyncio.wait_for(printer.write(write_end, b"x"), 5)
        await asyncio.wait_for(printer.write(write_end, b"y"), 5)

    asyncio.run(write_to_nobody())
    printer.close()
    os.close(write_end)


def test_a_full_pipe_holds_the_writer_and_not_the_loop():
    read_end, write_end = os.pipe()
    printer = Printer()
    data = b"x" * (1 << 20)

    async def main() -> bytes:
        writing = asyncio.create_task(printer.write(write_end, data))
        turns = 0
        while turns < 100:  # The loop turns while nobody reads.
            await asyncio.sleep(0)
            turns += 1
        assert not writing.done()
        got = b""
        while len(got) < len(data):
            got += await asyncio.to_thread(os.read, read_end, 1 << 16)
        await asyncio.wait_for(writing, 5)
        return got

    assert asyncio.run(main()) == data
    printer.close()
    os.close(read_end)
    os.close(write_end)


def test_logging_through_the_printer():
    read_end, write_end = os.pipe()
    printer = Printer()
    logger = logging.Logger("test")
    logger.addHandler(PrinterHandler(printer, write_end))
    logger.warning("key=%d", 3)
    printer.close()
    assert os.read(read_end, 100) == b"key=3\n"
    os.close(read_end)
    os.close(write_end)
