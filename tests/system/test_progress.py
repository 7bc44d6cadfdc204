"""Progress for people: one changing line in a terminal, few lines elsewhere."""

import io
import re

import pytest

from keras_resnet.system import progress
from keras_resnet.system.progress import Progress, ProgressLine

pytestmark = pytest.mark.once


class Stream(io.StringIO):
    """A stream that keeps what is written, and may be a terminal."""

    def __init__(self, terminal):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal


def screens(text):
    """What a terminal shows after each piece of text: its lines that are not empty."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece == "\x1b[1A":
            row -= 1
        elif not piece.startswith("\x1b"):
            lines[row] = lines[row][:column] + piece + lines[row][column + len(piece) :]
            column += len(piece)
        yield [line for line in lines if line]


def run(stream, seconds):
    """100 images a second in as many steps as there are seconds."""
    now = 0.0
    with ProgressLine(stream, clock=lambda: now) as line:
        for now in seconds:
            line(Progress(int(now * 100), 10_000, 7))
    return stream.getvalue()


def test_a_terminal_shows_one_changing_line_and_none_at_the_end(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    seen = list(screens(run(Stream(True), range(101))))
    assert max(map(len, seen)) == 1 and seen[-1] == []
    shown = {line.rstrip() for lines in seen for line in lines}
    assert "5,000 of 10,000 (50%), 100 images/s, 50 s left, 7 unreadable" in shown
    assert len(shown) >= 100


def test_a_narrow_terminal_still_shows_one_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    seen = list(screens(run(Stream(True), range(101))))
    assert max(map(len, seen)) == 1 and seen[-1] == []
    assert all(len(line) <= 30 for lines in seen for line in lines)


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_elsewhere_there_is_a_line_every_half_minute(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    lines = run(Stream(term == "dumb"), range(101)).splitlines()
    assert lines[0] == "3,000 of 10,000 (30%), 100 images/s, 1 min 10 s left, 7 unreadable"
    assert len(lines) == 3 and "\r" not in "".join(lines)


def test_batches_of_a_minute_have_a_rate_too():
    lines = run(Stream(False), range(0, 101, 50)).splitlines()
    assert lines == [
        "5,000 of 10,000 (50%), 100 images/s, 50 s left, 7 unreadable",
        "10,000 of 10,000 (100%), 100 images/s, 0 s left, 7 unreadable",
    ]


@pytest.mark.parametrize(
    ("size", "terminal", "drawn"), [(10, True, False), (2**30, False, False), (2**30, True, True)]
)
def test_bytes_get_a_bar_where_it_takes_time_and_somebody_looks(monkeypatch, size, terminal, drawn):
    monkeypatch.setenv("TERM", "xterm")
    stream = Stream(terminal)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with progress.byte_bar("sha256 of [a]", size) as show:
        assert (show is not None) == drawn
        if drawn:
            show(size // 2, size)
            show(size, size)
    assert ("sha256 of [a]" in stream.getvalue()) == drawn
