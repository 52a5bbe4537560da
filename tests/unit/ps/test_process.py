"""How much a server takes on by itself."""

from __future__ import annotations

from paramesh_server.config import ServerConfig
from paramesh_server.process import LEAST_VALUES, memory_bytes, room_for_values

MIB = 1 << 20


def test_values_have_a_fourth_of_what_a_server_does_not_need_itself() -> None:
    assert room_for_values(768 * MIB) == 96 * MIB
    assert room_for_values(64 << 30) == ((64 << 30) - 384 * MIB) // 4


def test_toys_fit_into_any_memory() -> None:
    assert room_for_values(128 * MIB) == LEAST_VALUES


def test_a_server_is_bounded_unless_told_otherwise() -> None:
    assert ServerConfig("127.0.0.1:1").capacity_bytes == room_for_values(memory_bytes())
    assert ServerConfig("127.0.0.1:1", capacity_bytes=0).capacity_bytes == 0
