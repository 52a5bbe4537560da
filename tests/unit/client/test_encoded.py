"""Contributions: cut once, summed once, kept as bytes; a new header re-encodes nothing."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh.encoded import Encoded
from paramesh.framing import decode, verify
from paramesh.v1 import parameter_server_pb2 as ps


def layout(sizes: list[int], gaps: list[int]) -> list[tuple[int, np.ndarray]]:
    rng = np.random.default_rng(1)
    offset, parts = 0, []
    for size, gap in zip(sizes, gaps, strict=True):
        offset = -(-offset // 64) * 64 + 64 * gap
        parts.append((offset, rng.standard_normal(size).astype(np.float32)))
        offset += size * 4
    return parts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 900), st.integers(0, 3)), min_size=1, max_size=8), st.integers(1, 12))
def test_frames_rebuild_the_layout(shape, blocks):
    parts = layout([s for s, _ in shape], [g for _, g in shape])
    encoded = Encoded.from_parts(5, b"\x07", parts, frame_bytes=64 * blocks)
    end = parts[-1][0] + parts[-1][1].nbytes
    wanted, got = bytearray(end), bytearray(end)
    for offset, values in parts:
        wanted[offset : offset + values.nbytes] = values.tobytes()
    frames = [decode(m, ps.PushHeader) for m in encoded.messages(ps.PushHeader(epoch=3))]
    for header, payload in frames:
        verify(header.frame, payload)
        assert header.frame.offset % 64 == 0
        assert header.frame.length == len(payload) <= 64 * blocks
        got[header.frame.offset : header.frame.offset + len(payload)] = payload
    assert got == wanted
    assert [h.frame.last for h, _ in frames] == [False] * (len(frames) - 1) + [True]
    assert [h.presence for h, _ in frames] == [b"\x07"] + [b""] * (len(frames) - 1)


def test_a_new_header_sends_the_kept_bytes_not_the_gradient():
    gradient = np.ones(1000, np.float32)
    encoded = Encoded.from_parts(1, b"", [(0, gradient)])
    first = encoded.messages(ps.PushHeader(epoch=1))
    assert encoded.messages(ps.PushHeader(epoch=1)) is first, "made once"
    gradient[:] = 7
    again = decode(encoded.messages(ps.PushHeader(epoch=2))[0], ps.PushHeader)
    assert again.header.epoch == 2
    assert np.frombuffer(again.payload, np.float32).tolist() == [1.0] * 1000
    verify(again.header.frame, again.payload)


def test_nothing_present_is_one_empty_frame():
    (message,) = Encoded.from_parts(1, b"\x00", []).messages(ps.PushHeader())
    header, payload = decode(message, ps.PushHeader)
    assert header.frame.last
    assert header.frame.length == len(payload) == 0
