"""Predictions as files: written as they come, and gone on with after a kill.

What has been computed stands in a work file beside the output, `answers.csv.part`, in whole rows
and in the order of the pictures; `answers.csv` itself appears when the last picture is done. A run
that was killed cuts the work file back to its last whole batch, checks that its rows belong to the
same pictures, and goes on behind them: the result has the same bytes as if nothing had happened.
"""

from __future__ import annotations

import abc
import contextlib
import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_resnet.errors import InputError, MissingDependencyError, NotFoundError, did_you_mean
from keras_resnet.system.files import (
    csv_line,
    plain_path,
    printable,
    replace_file,
    valid_text,
    write_json,
)

PARQUET_ROWS = 4096  # pictures a row group, at least


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says of one picture.

    Attributes:
        path: The picture.
        classes: `(class name, probability)`, most probable first; empty where it cannot be read.
        error: Why it cannot be read, or `None`.
    """

    path: str
    classes: list[tuple[str, float]]
    error: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return printable(self.error)
        answers = ", ".join(f"{printable(name)} {p:.1%}" for name, p in self.classes)
        return f"{printable(self.path)}: {answers}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it.

        Examples:
            >>> Prediction("a.png", [("bee", 0.75)]).to_dict()
            {'path': 'a.png', 'classes': [{'name': 'bee', 'probability': 0.75}], 'error': None}
        """
        classes = [{"name": name, "probability": share} for name, share in self.classes]
        return {"path": self.path, "classes": classes, "error": self.error}


def columns(top: int) -> list[str]:
    """Names of a table's columns: path, then class and probability by rank, then the error."""
    ranks = [f"{name}{i}" for i in range(1, top + 1) for name in ("class", "probability")]
    return ["path", *ranks, "error"]


def _cells(prediction: Prediction, top: int) -> list[Any]:
    cells = [c for name, share in prediction.classes for c in (name, f"{share:.6f}")]
    return [*cells, *([None] * (2 * top - len(cells))), prediction.error]


def to_csv(predictions: Iterable[Prediction], top: int) -> str:
    """A CSV table with a line a picture."""
    lines = [csv_line(columns(top))]
    lines += [csv_line([plain_path(p.path), *_cells(p, top)]) for p in predictions]
    return "".join(lines)


class _Row(NamedTuple):
    """One finished picture in a work file: its path as it is written, and where its row ends."""

    path: str
    error: str | None
    end: int


class _Rows(abc.ABC):
    """The work file of one format.

    Attributes:
        work: The file, or the folder, that holds the finished rows.
        in_parts: Whether rows can be gone on with only behind some of them.
    """

    in_parts = False

    def __init__(self, work: Path, top: int):
        self.work, self.top = work, top

    def written_path(self, path: str) -> str:
        """A picture's path as a row has it."""
        return valid_text(path)

    @abc.abstractmethod
    def rows(self) -> Iterator[_Row]:
        """The whole rows in the work file; it ends where one is cut off or damaged."""

    @abc.abstractmethod
    def cut(self, end: int) -> None:
        """Opens the work file to write on behind a row's end; 0 is an empty file."""

    @abc.abstractmethod
    def write(self, predictions: Sequence[Prediction]) -> None:
        """Adds rows."""

    @abc.abstractmethod
    def finish(self, output: Path) -> None:
        """Makes the output out of the work file."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leaves the work file as it is."""

    def make(self) -> None:
        """Makes sure that there is a work file."""
        self.work.touch()

    @abc.abstractmethod
    def flush(self) -> None:
        """Brings what was written into the work file."""


class _Lines(_Rows):
    """Rows that are lines of text, behind each other in one file."""

    _stream = None

    def head(self) -> bytes:
        """What stands in front of the rows."""
        return b""

    @abc.abstractmethod
    def encode(self, prediction: Prediction) -> str:
        """A row as text."""

    def cut(self, end: int) -> None:
        self._stream = open(self.work, "r+b")  # noqa: SIM115 (until close)
        self._stream.truncate(end)
        self._stream.seek(end)
        if end == 0:
            self._stream.write(self.head())
            self._stream.flush()

    def write(self, predictions: Sequence[Prediction]) -> None:
        # One write: a process that is killed leaves whole batches, and the kernel keeps them.
        text = "".join(map(self.encode, predictions))
        self._stream.write(text.encode("utf-8"))
        self.flush()

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def finish(self, output: Path) -> None:
        os.fsync(self._stream.fileno())
        self.close()
        os.replace(self.work, output)


class _CsvRows(_Lines):
    def written_path(self, path: str) -> str:
        return valid_text(plain_path(path))

    def head(self) -> bytes:
        return csv_line(columns(self.top)).encode()

    def encode(self, prediction: Prediction) -> str:
        return csv_line([plain_path(prediction.path), *_cells(prediction, self.top)])

    def rows(self) -> Iterator[_Row]:
        end = 0

        def lines(stream):
            nonlocal end
            for line in stream:  # a path may hold a newline: a row is one line or more
                end += len(line)
                if not line.endswith(b"\n"):
                    return
                yield line.decode("utf-8")

        with open(self.work, "rb") as stream:
            reader = csv.reader(lines(stream), strict=True)
            with contextlib.suppress(csv.Error, UnicodeDecodeError):
                if next(reader, None) != columns(self.top):
                    return
                for cells in reader:
                    if len(cells) != 2 * self.top + 2:
                        return
                    yield _Row(cells[0], cells[-1] or None, end)


class _JsonRows(_Lines):
    def written_path(self, path: str) -> str:
        return path

    def encode(self, prediction: Prediction) -> str:
        return json.dumps(prediction.to_dict()) + "\n"

    def rows(self) -> Iterator[_Row]:
        end = 0
        with open(self.work, "rb") as stream:
            for line in stream:
                end += len(line)
                try:
                    row = json.loads(line)
                    found = _Row(row["path"], row["error"], end)
                except (ValueError, KeyError, TypeError):
                    return
                if not line.endswith(b"\n"):
                    return
                yield found


class _ParquetRows(_Rows):
    """Rows in a folder of small Parquet files, one a row group of the output.

    A Parquet file cannot be read before its end is written; whole small ones can.
    """

    in_parts = True

    def __init__(self, work: Path, top: int):
        super().__init__(work, top)
        self._parquet = _import_parquet()
        self._waiting: list[Prediction] = []
        self._count = 0

    def make(self) -> None:
        self.work.mkdir(exist_ok=True)

    def _parts(self) -> list[Path]:
        return sorted(self.work.glob("[0-9]*.parquet"))

    def rows(self) -> Iterator[_Row]:
        for number, part in enumerate(self._parts()):
            if part.name != self._name(number):
                return
            table = self._parquet.read_table(part, columns=["path", "error"])
            last = table.num_rows - 1
            for i, row in enumerate(table.to_pylist()):
                # Only whole files are gone on behind.
                yield _Row(row["path"], row["error"], number + 1 if i == last else -1)

    def cut(self, end: int) -> None:
        for number, part in enumerate(self._parts()):
            if number >= end:
                part.unlink()
        self._count = end

    def write(self, predictions: Sequence[Prediction]) -> None:
        self._waiting += predictions
        if len(self._waiting) >= PARQUET_ROWS:
            self.flush()

    @staticmethod
    def _name(number: int) -> str:
        return f"{number:08}.parquet"

    def flush(self) -> None:
        if not self._waiting:
            return
        table = self._table()
        replace_file(
            self.work / self._name(self._count),
            lambda name: self._parquet.write_table(table, name),
        )
        self._count += 1
        self._waiting = []

    def _table(self):
        import pyarrow

        found = self._waiting
        arrays = [pyarrow.array([valid_text(p.path) for p in found], pyarrow.string())]
        for i in range(self.top):
            known = [p.classes[i] if i < len(p.classes) else (None, None) for p in found]
            names = [None if name is None else valid_text(name) for name, _ in known]
            arrays.append(pyarrow.array(names, pyarrow.string()))
            arrays.append(pyarrow.array([share for _, share in known], pyarrow.float64()))
        errors = [None if p.error is None else valid_text(p.error) for p in found]
        arrays.append(pyarrow.array(errors, pyarrow.string()))
        return pyarrow.Table.from_arrays(arrays, names=columns(self.top))

    def finish(self, output: Path) -> None:
        def join(name: str) -> None:
            parts = self._parts()
            schema = self._parquet.read_schema(parts[0])
            with self._parquet.ParquetWriter(name, schema) as writer:
                for part in parts:
                    writer.write_table(self._parquet.read_table(part))

        replace_file(output, join)
        shutil.rmtree(self.work)

    def close(self) -> None:
        pass  # every file is whole


def _import_parquet():
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependencyError(
            'Parquet needs the package pyarrow: pip install "keras3-resnet[parquet]".'
        ) from error


FORMATS: dict[str, type[_Rows]] = {
    ".csv": _CsvRows, ".jsonl": _JsonRows, ".parquet": _ParquetRows,
}  # fmt: skip


def errors_path(output: Path) -> Path:
    """Where the unreadable pictures of an output are listed: `answers.errors.csv`."""
    return output.with_name(f"{output.stem}.errors.csv")


def check_output(output: str | os.PathLike) -> Path:
    """The path of an output, before any work is done for it.

    Raises:
        InputError: The extension names no known format, or there is a folder of that name.
        MissingDependencyError: Parquet without pyarrow.
        NotFoundError: The folder that it shall be in does not exist.
    """
    path = Path(output).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"The output must end in .csv, .jsonl or .parquet. Received: {os.fspath(output)!r}."
            f"{did_you_mean(path.suffix, FORMATS)}"
        )
    if path.suffix.lower() == ".parquet":
        _import_parquet()
    if path.is_dir():
        raise InputError(f"The output {str(path)!r} is a folder; a file's name is needed.")
    if not path.parent.is_dir():
        raise NotFoundError(f"The output's folder {str(path.parent)!r} does not exist.")
    return path


class PredictionWriter:
    """Writes an output in pieces, behind those that an interrupted run has left.

    Args:
        output: The file to make, as `check_output` gave it.
        top: Classes a picture.
        identity: What makes the answers what they are, JSON-able: numbers in it may differ a
            little, as answers of one model do between two machines.
        step: Pictures a batch. Rows are gone on with behind a whole number of batches, so that
            the same pictures are computed together as without the interruption.
        restart: Drop what an interrupted run has left.

    Attributes:
        done: Rows that are there.
        unreadable: Of these, pictures that could not be read.
        resumed: Rows that were there when the writer was opened.
    """

    def __init__(
        self,
        output: Path,
        top: int,
        identity: dict[str, Any],
        step: int,
        restart: bool = False,
    ):
        self.output = output
        self.done = self.unreadable = self.resumed = 0
        self._step = step
        self._identity = identity
        self._restart = restart
        self._note = output.with_name(f"{output.name}.part.json")
        work = output.with_name(f"{output.name}.part")
        self._rows = FORMATS[output.suffix.lower()](work, top)
        self._lock: int | None = None

    def open(self, paths: Iterable[str]) -> None:
        """Takes the work file, and finds out how far it goes.

        Args:
            paths: All the pictures in order; as many are taken as there are rows.

        Raises:
            InputError: Another process writes to it, or it was begun with another model, other
                options or other pictures.
        """
        self._rows.make()
        self._take_lock()
        end = 0
        if not self._restart and self._note.is_file():
            self._check_identity()
            end = self._find_end(paths)
        if end == 0:
            # In this order: the rows that are there may be another model's.
            self._note.unlink(missing_ok=True)
            self._rows.cut(0)
            write_json(self._note, self._identity)
        else:
            self._rows.cut(end)
        self.resumed = self.done

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: without the guard
            return
        self._lock = os.open(self._rows.work, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise InputError(
                f"Another process is writing {str(self.output)!r}. Wait for it, or give another "
                "output."
            ) from None

    def _check_identity(self) -> None:
        try:
            before = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        now = json.loads(json.dumps(self._identity))
        changed = [k for k in now if not _alike(before.get(k), now[k])]
        if changed:
            self.close()
            said = ", ".join(_change(k, before.get(k), now[k]) for k in changed)
            raise InputError(
                f"{str(self._rows.work)!r} was begun otherwise: {said}. Give the same model and "
                "options to go on, or --restart (restart=True) to begin anew."
            )

    def _find_end(self, paths: Iterable[str]) -> int:
        """The end of the last row to keep; counts the rows up to there."""
        end = unreadable = count = 0
        last_end = -1
        wanted = iter(paths)
        for row in self._rows.rows():
            path = next(wanted, None)
            if path is None or self._rows.written_path(path) != row.path:
                self.close()
                raise InputError(
                    f"{str(self._rows.work)!r} was begun with other pictures: number {count + 1} "
                    f"was {row.path!r}, now it is {path!r}. Give the same pictures to go on, or "
                    "--restart (restart=True) to begin anew."
                )
            count += 1
            unreadable += row.error is not None
            last_end = row.end
            if last_end >= 0 and (self._rows.in_parts or count % self._step == 0):
                self.done, self.unreadable, end = count, unreadable, last_end
        if last_end >= 0 and next(wanted, None) is None:  # every row was there already
            self.done, self.unreadable, end = count, unreadable, last_end
        return end

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Adds rows of the next pictures."""
        self._rows.write(predictions)
        self.done += len(predictions)
        self.unreadable += sum(p.error is not None for p in predictions)

    def finish(self) -> None:
        """Puts the output in its place, and the list of unreadable pictures beside it."""
        self._rows.flush()
        errors = errors_path(self.output)
        if self.unreadable:
            replace_file(errors, self._write_errors)
        else:
            errors.unlink(missing_ok=True)  # of an earlier run
        self._rows.finish(self.output)
        self._note.unlink(missing_ok=True)
        self.close()

    def _write_errors(self, name: str) -> None:
        with open(name, "w", encoding="utf-8", newline="") as stream:
            stream.write(csv_line(["path", "reason"]))
            for row in self._rows.rows():
                if row.error is not None:
                    stream.write(csv_line([plain_path(row.path), row.error]))

    def close(self) -> None:
        """Leaves what is there for the next run."""
        self._rows.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def work(self) -> Path:
        """Where the rows are before the output is whole."""
        return self._rows.work


def _alike(before: Any, now: Any) -> bool:
    numbers = isinstance(now, list) and now and all(isinstance(v, float) for v in now)
    if numbers and isinstance(before, list) and len(before) == len(now):
        return bool(np.allclose(before, now, rtol=1e-3, atol=1e-3, equal_nan=True))
    return before == now


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(now, int | str) and not re.fullmatch(r"[0-9a-f]{16}", str(now)):
        return f"{name} was {before!r} and is {now!r}"
    return f"{name} changed"
