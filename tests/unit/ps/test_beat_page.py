"""The page that a server shares with the helper that beats for it."""

from __future__ import annotations

import os

import pytest
from paramesh.v1 import coordinator_pb2 as co
from paramesh_server.beat import PAGE, Figures, Page

FULL = Figures(1, 2, 3, 4, 5, 6, 70, "partition 8", ((1, 10), (9, 1 << 40)), True)


@pytest.fixture
def fd():
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


def test_the_reader_has_what_the_writer_wrote(fd):
    writer, reader = Page(fd, 0.5), Page(fd, 0.5)
    assert reader.read() == Figures()
    for figures in (FULL, Figures(applied_lsn=1), FULL):
        writer.write(figures)
        assert reader.read() == figures


def test_a_page_that_is_being_written_gives_the_last_whole_one(fd):
    writer, reader = Page(fd, 0.5), Page(fd, 0.5)
    writer.write(FULL)
    assert reader.read() == FULL
    os.pwrite(fd, b"\xff", PAGE.size + 3)
    assert reader.read() == FULL
    os.pwrite(fd, b"\xff" * 4, 0)  # a length beyond what is there
    assert reader.read() == FULL


def test_a_page_that_nobody_writes_any_more_is_a_loop_that_stands_still(fd):
    writer, reader = Page(fd, 1e-9), Page(fd, 1e-9)
    writer.write(Figures(applied_lsn=7))
    page = os.pread(fd, 1 << 16, 0)
    length, checksum, written = PAGE.unpack_from(page)
    os.pwrite(fd, PAGE.pack(length, checksum, written - 9.0), 0)
    read = reader.read()
    assert (read.applied_lsn, read.stalled_at) == (7, "the event loop")
    assert read.stalled_ms >= 9000


def test_a_beat_carries_all_of_it():
    beat = FULL.put(co.HeartbeatRequest(name="a"))
    assert (beat.name, beat.stalled_ms, beat.stalled_at, beat.rss_bytes) == ("a", 70, "partition 8", 6)
    assert beat.memory_tight
    assert [(load.partition, load.requests) for load in beat.loads] == [(1, 10), (9, 1 << 40)]
