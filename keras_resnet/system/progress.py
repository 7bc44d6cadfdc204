"""How far a long run is, for people: one changing line in a terminal, a line now and then else."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TextIO


class Progress(NamedTuple):
    """How far a run over many pictures is.

    Attributes:
        done: Pictures answered, those of an interrupted run included.
        total: Pictures in all.
        unreadable: Of those done.
    """

    done: int
    total: int
    unreadable: int = 0


class ProgressLine:
    """Prints `Progress`: call it with one as often as you like.

    The rate is that of the last half minute, so the time left follows a change of pace.

    Args:
        stream: Where to; stderr by default. In a terminal one line is written over and over,
            elsewhere a new one every half minute.
        clock: Seconds; for tests.

    Examples:
        >>> times = iter([0.0, 40.0])
        >>> line = ProgressLine(sys.stdout, clock=lambda: next(times))
        >>> line(Progress(0, 10_000))
        >>> line(Progress(2_000, 10_000, 3))
        2,000 of 10,000 (20%), 50 pictures/s, 2 min 40 s left, 3 unreadable
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._every = 0.2 if self._terminal else 30.0
        self._seen: deque[tuple[float, int]] = deque()
        self._printed: float | None = None
        self._open = False

    def __call__(self, progress: Progress) -> None:
        """Takes note, and prints where it is time to."""
        now = self._clock()
        self._seen.append((now, progress.done))
        while len(self._seen) > 2 and self._seen[1][0] < now - 30:
            self._seen.popleft()
        if self._printed is None:
            self._printed = now
        if now - self._printed < self._every:
            return
        self._printed = now
        text = self._text(progress)
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{text[:width]}")
            self._open = True
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def _text(self, progress: Progress) -> str:
        done, total, unreadable = progress
        (before, count), (now, _) = self._seen[0], self._seen[-1]
        rate = (done - count) / (now - before) if now > before else 0.0
        share = int(100 * done / total) if total else 100
        parts = [f"{done:,} of {total:,} ({share}%)"]
        if rate > 0:
            parts.append(f"{rate:,.0f} pictures/s" if rate >= 10 else f"{rate:.1f} pictures/s")
            parts.append(f"{duration((total - done) / rate)} left")
        if unreadable:
            parts.append(f"{unreadable:,} unreadable")
        return ", ".join(parts)

    def close(self) -> None:
        """Clears the line in a terminal: what is printed next stands alone."""
        if self._open:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._open = False


def duration(seconds: float) -> str:
    """Seconds in words.

    Examples:
        >>> duration(7), duration(95), duration(7320)
        ('7 s', '1 min 35 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
