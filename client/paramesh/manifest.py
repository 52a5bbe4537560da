"""MANIFEST.json: strictly read, so that nothing hostile gets further than a typed error. Pure.

    document = parse(data, "runs/1")              # JSON objects, no duplicates, no NaN, not deep
    files = file_entries(document, "runs/1")      # {"a.safetensors": Entry(bytes, sha256)}

A manifest comes from a disk or a bucket that others may write to. It is data only: numbers,
strings, lists, objects.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from paramesh.errors import ParameshError, refuse

__all__ = ["MAX_BYTES", "Entry", "Fields", "check_name", "encode", "file_entries", "parse"]

MAX_BYTES = 64 << 20
"""Of a manifest: 100 000 files with their digests are some 20 MB."""

MAX_DEPTH = 200
"""Levels of nesting: an optimizer's state_dict in `paramesh.save`'s has some ten, and `plain` ends at 64."""

NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")

_HEX = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as the manifest lists it."""

    bytes: int
    sha256: str


def check_name(name: str, what: str = "checkpoint") -> str:
    """A name that is one folder or file, wherever it is joined to.

    Raises:
        RequestRefused: PATH.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or set(name) == {"."} or name.startswith("-"):
        raise refuse(
            "PATH",
            f"{what} {str(name)[:80]!r} is no name: letters, digits, '_', '.', '-', at most 100; no path",
            name=str(name)[:80],
        )
    return name


def _bad(where: str, why: str) -> ParameshError:
    return refuse("FORMAT", f"{where}/MANIFEST.json is not a manifest: {why[:200]}", path=where)


def encode(document: Mapping[str, Any]) -> bytes:
    """A manifest's bytes; equal documents give equal bytes.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False).encode()


def parse(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that a manifest is.

    Args:
        data: the file, or its first `MAX_BYTES + 1` bytes.
        where: the folder, for errors.

    Raises:
        RequestRefused: FORMAT, saying what is wrong.
    """
    if len(data) > MAX_BYTES:
        raise _bad(where, f"it has more than {MAX_BYTES} bytes")
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _bad(where, why) from None
    if not isinstance(document, dict):
        raise _bad(where, f"it is a {type(document).__name__}, not an object")
    if _depth(document) > MAX_DEPTH:
        raise _bad(where, f"it is nested deeper than {MAX_DEPTH} levels")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} comes twice")
    return made


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is out of range")
    return number


def _depth(document: object) -> int:
    """Levels of nesting, without recursion."""
    level, depth = [document], 0
    while level:
        depth += 1
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = below
    return depth


def file_entries(document: Mapping[str, Any], where: str) -> dict[str, Entry]:
    """The files that a manifest lists.

    Raises:
        RequestRefused: FORMAT.
    """
    listed = document.get("files")
    if not isinstance(listed, dict):
        raise _bad(where, "it lists no files")
    entries = {}
    for name, entry in listed.items():
        if not NAME.fullmatch(name) or set(name) == {"."}:
            raise _bad(where, f"it names the file {name[:80]!r}")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise _bad(where, f"the entry of {name} is not bytes and sha256")
        size, digest = entry["bytes"], entry["sha256"]
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise _bad(where, f"bytes of {name} are {size!r:.40}")
        if not isinstance(digest, str) or not _HEX.fullmatch(digest):
            raise _bad(where, f"sha256 of {name} is {digest!r:.40}")
        entries[name] = Entry(size, digest)
    return entries


class Fields:
    """Typed access to an object of a manifest: a wrong type is refused by the key's name.

    Args:
        document: the object.
        where: the folder, for errors.
        known: all keys that it may have; None: any.
    """

    def __init__(self, document: object, where: str, known: frozenset[str] | None = None) -> None:
        if not isinstance(document, dict):
            raise _bad(where, f"{document!r:.40} is not an object")
        unknown = sorted(set(document) - known) if known is not None else []
        if unknown:
            raise _bad(where, f"the key {unknown[0][:80]!r} is not known")
        self._document = document
        self._where = where

    def _get(self, key: str, kind: type[T]) -> T:
        value = self._document.get(key)
        if type(value) is not kind:
            raise _bad(self._where, f"{key} is {'missing' if value is None else repr(value)[:40]}")
        return value

    def number(self, key: str, low: int = 0, high: int = 1 << 63) -> int:
        """An integer within low..high-1."""
        value = self._get(key, int)
        if not low <= value < high:
            raise _bad(self._where, f"{key} is {value!r:.40}, outside its range")
        return value

    def text(self, key: str) -> str:
        """A string."""
        return self._get(key, str)

    def flag(self, key: str) -> bool:
        """A bool."""
        return self._get(key, bool)

    def objects(self, key: str, known: frozenset[str]) -> list[Fields]:
        """A list of objects."""
        return [Fields(item, self._where, known) for item in self._get(key, list)]

    def refuse(self, why: str) -> ParameshError:
        """The error of something that is wrong with it, for the caller to raise."""
        return _bad(self._where, why)
