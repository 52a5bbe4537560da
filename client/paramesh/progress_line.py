"""`paramesh.progress`: one line that says how far a loop is, on the chief only.

    for x, y in paramesh.progress(loader, label="epoch 3"):
        ...
        # epoch 3  120/938  12.8%  41.3 it/s  loss 0.4312

On a terminal the line is rewritten in place; elsewhere (a log file, CI) a plain line comes
every ten seconds and at the end. It shows what `paramesh.report` was given last.
"""

from __future__ import annotations

import operator
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO, TypeVar

from paramesh.session import current

__all__ = ["progress"]

T = TypeVar("T")

REDRAW = 0.1
"""Seconds between two drawings on a terminal: smooth to the eye, nothing to the loop."""

PLAIN_EVERY = 10.0
"""Seconds between two lines elsewhere."""


def progress(iterable: Iterable[T], *, label: str = "", total: int | None = None) -> Iterator[T]:
    """Go through an iterable and show how far it is.

    Args:
        iterable: such as a `DataLoader`.
        label: stands first in the line.
        total: number of items; default: `len(iterable)`, if it has one (a `DataLoader`'s in a
            cluster is a hint).

    Yields:
        What the iterable yields. Only the chief (rank 0) writes, to stderr.
    """
    session = current()
    if session is not None and session.rank != 0:
        yield from iterable
        return
    hint = total if total is not None else operator.length_hint(iterable, -1)
    line = _Line(sys.stderr, label, hint if hint > 0 else None)
    try:
        for item in iterable:
            yield item
            line.count(session.reporter.latest if session is not None else {})
    finally:
        line.end()


class _Line:
    """One progress line on a stream."""

    def __init__(self, stream: TextIO, label: str, total: int | None):
        self._stream = stream
        self._label = label
        self._total = total
        self._live = _is_terminal(stream)
        self._done = 0
        self._width = 0
        self._began = self._drawn = time.monotonic()
        self._figures: Mapping[str, Any] = {}

    def count(self, figures: Mapping[str, Any]) -> None:
        """One more item was done."""
        self._done += 1
        self._figures = figures
        now = time.monotonic()
        if now - self._drawn >= (REDRAW if self._live else PLAIN_EVERY):
            self._drawn = now
            self._write(end="" if self._live else "\n")

    def end(self) -> None:
        """The loop is over."""
        if self._done:
            self._write(end="\n")

    def _write(self, end: str) -> None:
        text = self._text()
        start = "\r" if self._live else ""
        padding = " " * max(0, self._width - len(text)) if self._live else ""
        self._width = len(text)
        try:
            self._stream.write(start + text + padding + end)
            self._stream.flush()
        except (OSError, ValueError):
            self._live = False  # a closed terminal must not end the training

    def _text(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._began)
        parts = [self._label] if self._label else []
        if self._total is None:
            parts.append(str(self._done))
        else:
            parts.append(f"{self._done}/{max(self._total, self._done)}")
            parts.append(f"{min(1.0, self._done / self._total):.1%}")
        parts.append(f"{self._done / seconds:.1f} it/s")
        parts += [f"{name} {value:.4g}" for name, value in self._figures.items()]
        return "  ".join(parts)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False
