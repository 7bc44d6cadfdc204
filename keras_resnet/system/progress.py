"""How far a long run is, for people: one changing line in a terminal, a line now and then else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TextIO

from rich import progress as rich
from rich.console import Console
from rich.table import Column
from rich.text import Text

LINE_SECONDS = 30.0  # between two lines about a work, where there is no terminal


class Progress(NamedTuple):
    """How far a run over many images is."""

    done: int  # images predicted, those of an interrupted run included
    total: int
    unreadable: int = 0  # of those done


class _Words(rich.ProgressColumn):
    """A task in words."""

    def render(self, task: rich.Task) -> Text:
        """The line, with the rate of the last half minute: the time left follows a change of it."""
        done, total = int(task.completed), int(task.total or 0)
        rate = task.speed
        if not rate and task.elapsed:  # batches that take longer than that
            rate = (done - task.fields["before"]) / task.elapsed
        parts = [f"{done:,} of {total:,} ({int(100 * done / total) if total else 100}%)"]
        if rate:
            parts.append(f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.1f} images/s")
            parts.append(f"{duration((total - done) / rate)} left")
        if task.fields["unreadable"]:
            parts.append(f"{task.fields['unreadable']:,} unreadable")
        return Text(", ".join(parts))


class ProgressLine:
    """Prints `Progress`: call it with one as often as you like, inside `with`.

    Args:
        stream: Where to; stderr by default. In a terminal one line is written over and over, and
            cleared at the end; elsewhere there is a new one every half minute.
        clock: Seconds; for tests.

    Examples:
        >>> times = iter([0.0, 40.0])
        >>> with ProgressLine(sys.stdout, clock=lambda: next(times)) as line:
        ...     line(Progress(0, 10_000))
        ...     line(Progress(2_000, 10_000, 3))
        2,000 of 10,000 (20%), 50 images/s, 2 min 40 s left, 3 unreadable
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._console = Console(file=sys.stderr if stream is None else stream)
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._every = 0.2 if terminal else LINE_SECONDS
        self._clock, self._now, self._printed = clock, 0.0, 0.0
        self._words = _Words(table_column=Column(no_wrap=True))
        self._bar = rich.Progress(
            self._words,
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,  # what is printed there may go to a file
            get_time=lambda: self._now,
            disable=not terminal,
        )

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Clears the line in a terminal: what is printed next stands alone."""
        self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Takes note, and prints where it is time to."""
        self._now = self._clock()
        if not self._bar.tasks:
            self._printed = self._now
            self._bar.add_task("", total=progress.total, completed=progress.done,
                               before=progress.done, unreadable=0)  # fmt: skip
        task = self._bar.tasks[0]
        self._bar.update(task.id, completed=progress.done, unreadable=progress.unreadable)
        if self._now - self._printed < self._every:
            return
        self._printed = self._now
        if self._bar.disable:
            self._console.print(self._words.render(task), soft_wrap=True)
        else:
            self._bar.refresh()


def shows_bars(stream: TextIO) -> bool:
    """Whether a line can be written over and over there: a terminal, or a notebook's output."""
    return stream.isatty() or type(stream).__module__.startswith("ipykernel")


@contextlib.contextmanager
def byte_bar(
    label: str, size: int | None = None
) -> Iterator[Callable[[int, int | None], None] | None]:
    """A bar for bytes that are read or fetched, in a terminal; `None` for what takes no second.

    Yields:
        A function of the bytes done and those in all.
    """
    console = Console(stderr=True)
    if (size is not None and size < 50 * 2**20) or not console.is_terminal:
        yield None
        return
    columns = (
        rich.TextColumn("{task.description}", markup=False), rich.BarColumn(20),
        rich.TaskProgressColumn(), rich.DownloadColumn(binary_units=True),
        rich.TransferSpeedColumn(), rich.TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with rich.Progress(*columns, console=console, redirect_stdout=False) as bar:
        task = bar.add_task(label, total=size)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
