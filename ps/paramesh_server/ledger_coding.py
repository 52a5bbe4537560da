"""Values as bytes, by their declared types. Pure; no pickle, nothing imported by name.

    coder = coder_of(StepDecided)          # once: from the dataclass's annotations
    coder.write(out, body)                 # appends to a bytearray
    body = coder.read(Reader(data))

Equal values give equal bytes, whatever the order of dicts and sets: keys are written in
rising order, integers in the fewest bytes, protobuf deterministically. Reading accepts only
what writing produces, and allocates nothing for what a length claims but the bytes that are
there: whatever else comes is FORMAT.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import types
import typing
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, Message
from paramesh.errors import ParameshError, refuse

from paramesh_server.ledger_deal import Deal

INT_BYTES = 10
"""Bytes of the longest integer: 70 bits, room for sums of 64-bit counts."""

INT_LIMIT = 1 << 7 * INT_BYTES

_FLOAT = struct.Struct("<d")

Write = Callable[[bytearray, Any], None]


class Reader:
    """Bytes that are read from the front.

    Attributes:
        at: the next byte.
    """

    __slots__ = ("_data", "at")

    def __init__(self, data: bytes):
        self._data = data
        self.at = 0

    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self.at

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            RequestRefused: FORMAT, they are not there.
        """
        end = self.at + count
        if end > len(self._data):
            raise bad(f"{count} bytes are announced at byte {self.at}, {self.left()} are there")
        taken = self._data[self.at : end]
        self.at = end
        return taken

    def integer(self) -> int:
        """The next integer.

        Raises:
            RequestRefused: FORMAT, it is cut off, too long, or not in its shortest form.
        """
        if self.at < len(self._data) and (byte := self._data[self.at]) < 0x80:
            self.at += 1  # most are this small
            return byte
        value = shift = 0
        for byte in self._data[self.at : self.at + INT_BYTES]:
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if not byte and shift:
                    raise bad(f"an integer before byte {self.at} is not in its shortest form")
                return value
            shift += 7
        raise bad(f"an integer before byte {self.at} has no end")

    def count(self) -> int:
        """The next number of items, each of at least one byte.

        Raises:
            RequestRefused: FORMAT, there cannot be so many.
        """
        count = self.integer()
        if count > self.left():
            raise bad(f"{count} items are announced at byte {self.at}, {self.left()} bytes are there")
        return count

    def end(self) -> None:
        """Refuse bytes that nobody has read.

        Raises:
            RequestRefused: FORMAT.
        """
        if self.left():
            raise bad(f"{self.left()} bytes follow the end")


Read = Callable[[Reader], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Coder:
    """How values of one type are written and read."""

    write: Write
    read: Read
    shape: str
    """The type in words, for a test that notices when what is written changes."""


def bad(what: str) -> ParameshError:
    """The refusal of bytes that writing cannot have produced."""
    return refuse("FORMAT", f"not a ledger's bytes: {what}; the sender runs another release, or they are damaged")


@functools.cache
def coder_of(kind: Any) -> Coder:
    """The coder of a declared type.

    Args:
        kind: int, bool, float, str, bytes, a protobuf message, `Deal`, a dataclass of such, or
            a tuple, list, set, dict or `| None` of such.

    Raises:
        TypeError: another type; a mistake of whoever declared it.
    """
    if kind in _PLAIN:
        return _PLAIN[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and args[-1] is Ellipsis:
        return _floats() if args[0] is float else _sequence(coder_of(args[0]), tuple)
    if origin is tuple:
        return _pairing([coder_of(arg) for arg in args])
    if origin is list:
        return _sequence(coder_of(args[0]), list)
    if origin is set:
        return _set(coder_of(args[0]))
    if origin is dict:
        return _dict(coder_of(args[0]), coder_of(args[1]))
    if origin is types.UnionType and len(args) == 2 and args[1] is type(None):
        return _optional(coder_of(args[0]))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    if isinstance(kind, type) and issubclass(kind, Message):
        return _message(kind)
    raise TypeError(f"{kind} has no coding")


# ------------------------------------------------------------------ plain values


def write_integer(out: bytearray, value: int) -> None:
    """Append an integer.

    Raises:
        ValueError: it is negative, or has more than 70 bits.
    """
    if not 0 <= value < INT_LIMIT:
        raise ValueError(f"{value} is not a count")
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _write_bool(out: bytearray, value: bool) -> None:
    out.append(bool(value))


def _read_bool(reader: Reader) -> bool:
    byte = reader.take(1)[0]
    if byte > 1:
        raise bad(f"byte {reader.at - 1} is neither yes nor no")
    return byte == 1


def _write_float(out: bytearray, value: float) -> None:
    out += _FLOAT.pack(value)


def _read_float(reader: Reader) -> float:
    return float(_FLOAT.unpack(reader.take(8))[0])


def _write_bytes(out: bytearray, value: bytes) -> None:
    write_integer(out, len(value))
    out += value


def _read_bytes(reader: Reader) -> bytes:
    return reader.take(reader.integer())


def _write_str(out: bytearray, value: str) -> None:
    _write_bytes(out, value.encode())


def _read_str(reader: Reader) -> str:
    try:
        return _read_bytes(reader).decode()
    except UnicodeDecodeError as error:
        raise bad(f"a text before byte {reader.at} is not UTF-8") from error


def _write_deal(out: bytearray, deal: Deal) -> None:
    _RUNS.write(out, deal.runs)
    _INTS.write(out, deal.taken)


def _read_deal(reader: Reader) -> Deal:
    runs, taken = _RUNS.read(reader), _INTS.read(reader)
    try:
        return Deal.restored(runs, taken)
    except ValueError as error:
        raise bad(f"before byte {reader.at}: {error}") from error


_PLAIN: dict[Any, Coder] = {
    int: Coder(write_integer, Reader.integer, "int"),
    bool: Coder(_write_bool, _read_bool, "bool"),
    float: Coder(_write_float, _read_float, "float"),
    bytes: Coder(_write_bytes, _read_bytes, "bytes"),
    str: Coder(_write_str, _read_str, "str"),
    Deal: Coder(_write_deal, _read_deal, "Deal(runs, taken)"),
}


def _message(kind: type[Message]) -> Coder:
    def write(out: bytearray, value: Message) -> None:
        _write_bytes(out, value.SerializeToString(deterministic=True))

    def read(reader: Reader) -> Message:
        raw = _read_bytes(reader)
        try:
            return kind.FromString(raw)
        except DecodeError as error:
            raise bad(f"what ends at byte {reader.at} is no {kind.DESCRIPTOR.name}") from error

    return Coder(write, read, kind.DESCRIPTOR.full_name)


# ------------------------------------------------------------------ containers


def _sequence(item: Coder, made: Callable[[list[Any]], Any]) -> Coder:
    def write(out: bytearray, value: Any) -> None:
        write_integer(out, len(value))
        for one in value:
            item.write(out, one)

    def read(reader: Reader) -> Any:
        return made([item.read(reader) for _ in range(reader.count())])

    return Coder(write, read, f"[{item.shape}]")


def _floats() -> Coder:
    def write(out: bytearray, value: tuple[float, ...]) -> None:
        write_integer(out, len(value))
        out += struct.pack(f"<{len(value)}d", *value)

    def read(reader: Reader) -> tuple[float, ...]:
        count = reader.count()
        raw = reader.take(8 * count)
        return struct.unpack(f"<{count}d", raw)

    return Coder(write, read, "[float]")


def _pairing(items: list[Coder]) -> Coder:
    def write(out: bytearray, value: tuple[Any, ...]) -> None:
        for item, one in zip(items, value, strict=True):
            item.write(out, one)

    def read(reader: Reader) -> tuple[Any, ...]:
        return tuple([item.read(reader) for item in items])

    return Coder(write, read, f"({', '.join(item.shape for item in items)})")


def _rising(reader: Reader, key: Any, previous: Any) -> None:
    if previous is not None and not previous < key:
        raise bad(f"keys before byte {reader.at} do not rise")


def _set(item: Coder) -> Coder:
    def write(out: bytearray, value: set[Any]) -> None:
        write_integer(out, len(value))
        for one in sorted(value):
            item.write(out, one)

    def read(reader: Reader) -> set[Any]:
        result: set[Any] = set()
        previous = None
        for _ in range(reader.count()):
            one = item.read(reader)
            _rising(reader, one, previous)
            result.add(one)
            previous = one
        return result

    return Coder(write, read, f"{{{item.shape}}}")


def _dict(key: Coder, item: Coder) -> Coder:
    def write(out: bytearray, value: dict[Any, Any]) -> None:
        write_integer(out, len(value))
        for name in sorted(value):
            key.write(out, name)
            item.write(out, value[name])

    def read(reader: Reader) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        previous = None
        for _ in range(reader.count()):
            name = key.read(reader)
            _rising(reader, name, previous)
            result[name] = item.read(reader)
            previous = name
        return result

    return Coder(write, read, f"{{{key.shape}: {item.shape}}}")


def _optional(item: Coder) -> Coder:
    def write(out: bytearray, value: Any) -> None:
        out.append(value is not None)
        if value is not None:
            item.write(out, value)

    def read(reader: Reader) -> Any:
        return item.read(reader) if _read_bool(reader) else None

    return Coder(write, read, f"{item.shape}?")


def _dataclass(kind: type) -> Coder:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    coders = [coder_of(hints[name]) for name in names]
    writers = [(name, coder.write) for name, coder in zip(names, coders, strict=True)]

    def write(out: bytearray, value: Any) -> None:
        for name, write_field in writers:
            write_field(out, getattr(value, name))

    def read(reader: Reader) -> Any:
        return kind(*[coder.read(reader) for coder in coders])

    fields = ", ".join(f"{name}: {coder.shape}" for name, coder in zip(names, coders, strict=True))
    return Coder(write, read, f"{kind.__name__}({fields})")


_INTS = coder_of(list[int])
_RUNS = coder_of(list[tuple[int, int]])
