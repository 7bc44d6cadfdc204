"""Predictions as files: all at once, or as they come, to go on with after a kill.

What has been computed stands in a work file beside the output, `answers.csv.part`: a JSON object a
line, in the order of the images, whatever the output's format. `answers.csv` itself is made of it
when the last image is done. A run that was killed cuts the work file back to its last whole batch,
checks that its rows belong to the same images, and goes on behind them: the result has the same
bytes as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnet.data.looking import load_shown
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.sources import Images
from keras_resnet.inference.calibration import UNKNOWN
from keras_resnet.runtimes.rows import ENGINES
from keras_resnet.system.errors import DataError, InputError, did_you_mean, require
from keras_resnet.system.files import (
    check_writable,
    column,
    csv_line,
    drop_lock,
    named,
    plain_path,
    printable,
    read_json,
    replace_file,
    take_lock,
    text_width,
    to_json,
    valid_text,
    write_json,
    write_text,
)

PARQUET_ROWS = 4096  # images a row group


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        path: The image.
        classes: `(class name, probability)`, most probable first; empty where it cannot be read.
        error: Why it cannot be read, or `None`.
        answer: The classes that the model says the image shows, where that is more or less than the
            most probable one: of several labels, by thresholds, or `["unknown"]` by
            `min_confidence`.
    """

    path: str
    classes: list[tuple[str, float]]
    error: str | None = None
    answer: list[str] | None = None

    @property
    def said(self) -> str:
        """The answer as people read it; where there is none apart, the most probable class."""
        if self.answer is None:
            return "{} {:.1%}".format(*self.classes[0])
        return ", ".join(self.answer) or "none"

    def __str__(self) -> str:
        if self.error is not None:
            return printable(self.error)
        if self.answer is not None:
            return f"{printable(self.path)}: {printable(self.said)}"
        classes = ", ".join(f"{printable(name)} {p:.1%}" for name, p in self.classes)
        return f"{printable(self.path)}: {classes}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it.

        Examples:
            >>> Prediction("a.png", [("bee", 0.75)]).to_dict()
            {'path': 'a.png', 'classes': [{'name': 'bee', 'probability': 0.75}], 'error': None}
        """
        classes = [{"name": name, "probability": p} for name, p in self.classes]
        answer = {} if self.answer is None else {"answer": self.answer}
        return {"path": self.path, "classes": classes, "error": self.error, **answer}


class PredictionTable:
    """Predictions as lines of a table whose columns stay in place, for a terminal.

    `answers` says whether predictions have an answer, which stands first.

    Examples:
        >>> table = PredictionTable(["a.png", "bees/1.png"], ["ant", "bee"], top=2)
        >>> print(table.header)
        Image       Class       Class
        >>> print(table.line(Prediction("a.png", [("bee", 0.75), ("ant", 0.25)])))
        a.png       bee  75.0%  ant  25.0%
    """

    def __init__(
        self,
        paths: Sequence[str] | Images,
        class_names: Sequence[str],
        top: int,
        answers: bool = False,
    ):
        known = isinstance(paths, Images)
        widths = [] if known else [text_width(printable(p)) for p in paths]
        longest = paths.width if known else max(widths, default=0)
        self._path = min(60, max(5, longest))
        self._name = min(30, max(text_width(printable(n)) for n in class_names))
        self._top = min(top, len(class_names))
        self._answer = max(self._name, len(UNKNOWN)) if answers else 0

    @property
    def header(self) -> str:
        """The names of the columns."""
        cell = f"{'Class':{self._name + 7}}"
        answer = [f"{'Answer':{self._answer}}"] if self._answer else []
        return f"{'Image':{self._path}}  {'  '.join([*answer, *[cell] * self._top])}".rstrip()

    def line(self, prediction: Prediction) -> str:
        """One image; a path too long for its column loses its beginning, a name its middle."""
        path = printable(prediction.path)
        while text_width(path) > self._path:
            path = f"...{path.removeprefix('...')[1:]}"
        path += " " * (self._path - text_width(path))
        if prediction.error is not None:
            return f"{path}  {printable(prediction.error)}"
        cells = [f"{column(name, self._name)} {p:6.1%}" for name, p in prediction.classes]
        if self._answer:
            cells.insert(0, column(prediction.said, self._answer))
        return f"{path}  {'  '.join(cells)}"


def most_probable(logs: np.ndarray, names: Sequence[str], top: int) -> list[tuple[str, float]]:
    """The first classes by an image's log-probabilities, ties in the order of the classes."""
    order = np.argsort(-logs, kind="stable")[:top]
    return [(names[k], float(np.exp(logs[k]))) for k in order]


# --- all at once ----------------------------------------------------------------------------------


def predictions_text(predictions: Sequence[Prediction], kind: str) -> str:
    """Predictions as the text of a `.csv` file, a line an image, or of a `.json` file."""
    if kind == ".json":
        return to_json([p.to_dict() for p in predictions], indent=2) + "\n"
    top = max([1, *(len(p.classes) for p in predictions)])
    return "".join(csv_lines(predictions, top, any(p.answer is not None for p in predictions)))


def save_predictions(predictions: Sequence[Prediction], path: str | os.PathLike) -> None:
    """Writes predictions as `.csv` (a line an image), `.json`, or an image sheet (`.png`, ...).

    Raises:
        InputError: The extension names no known form.
    """
    path = Path(path)
    if path.suffix.lower() in (".csv", ".json"):
        write_text(path, predictions_text(predictions, path.suffix.lower()))
    elif path.suffix.lower() in (".png", ".jpg", ".jpeg", ".svg", ".pdf"):
        # All of them short-sided to 256, so that one grid holds portraits and landscapes.
        square = Preprocess(256, 256)
        readable = [p for p in predictions if p.classes][:24]
        if not readable:
            raise DataError("There is no readable image to draw.")
        titles = [p.said for p in readable]
        from keras_resnet import plots  # matplotlib takes half a second

        plots.picture_grid(
            np.stack([square.pixels(load_shown(p.path)) for p in readable]), titles, path
        )
    else:
        raise InputError(
            f"Predictions are written as .csv, .json or .png. Received: {path.name!r}."
        )


# --- the formats ---------------------------------------------------------------------------------


def columns(top: int, answer: bool = False) -> list[str]:
    """Names of a table's columns: path, answer, class and probability by rank, error."""
    ranks = [f"{name}{i}" for i in range(1, top + 1) for name in ("class", "probability")]
    return ["path", *(["answer"] if answer else []), *ranks, "error"]


def table_row(prediction: Prediction, top: int, answer: bool) -> list[Any]:
    """A row of such a table."""
    classes = [*prediction.classes, *[(None, None)] * (top - len(prediction.classes))]
    said = [] if prediction.answer is None else prediction.answer
    text = None if prediction.answer is None else "|".join(said) or "|"
    ranks = itertools.chain.from_iterable(classes)
    return [prediction.path, *([text] if answer else []), *ranks, prediction.error]


def csv_lines(predictions: Iterable[Prediction], top: int, answer: bool = False) -> Iterator[str]:
    """The lines of a CSV table, one a prediction behind the names of the columns."""
    yield csv_line(columns(top, answer))
    for prediction in predictions:
        path, *cells = table_row(prediction, top, answer)
        cells = [f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells]
        yield csv_line([plain_path(path), *cells])


def _save_csv(work: Path, top: int, name: str) -> None:
    with open(name, "w", encoding="utf-8", newline="") as stream:
        stream.writelines(csv_lines((row for row, _ in _rows(work)), top, _has_answers(work)))


def _has_answers(work: Path) -> bool:
    return next((row.answer is not None for row, _ in _rows(work) if row.error is None), False)


def _save_jsonl(work: Path, top: int, name: str) -> None:
    shutil.copyfile(work, name)


def _save_parquet(work: Path, top: int, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    answer = _has_answers(work)
    kinds = dict.fromkeys(("path", "answer", "error"), pyarrow.string())
    kinds |= {f"class{i}": pyarrow.string() for i in range(1, top + 1)}
    schema = pyarrow.schema([(c, kinds.get(c, pyarrow.float64())) for c in columns(top, answer)])
    rows = (
        [valid_text(c) if isinstance(c, str) else c for c in table_row(row, top, answer)]
        for row, _ in _rows(work)
    )
    with pyarrow.parquet.ParquetWriter(name, schema) as writer:
        while group := list(itertools.islice(rows, PARQUET_ROWS)):
            arrays = zip(*group, strict=True)
            writer.write_table(pyarrow.table(list(map(list, arrays)), schema=schema))


# Each makes a file of a name out of a whole work file.
FORMATS: dict[str, Callable[[Path, int, str], None]] = {
    ".csv": _save_csv, ".jsonl": _save_jsonl, ".parquet": _save_parquet,
}  # fmt: skip


def errors_path(output: Path) -> Path:
    """Where the unreadable images of an output are listed: `answers.errors.csv`."""
    return output.with_name(f"{output.stem}.errors.csv")


def check_output(output: str | os.PathLike) -> Path:
    """The path of an output, before any work is done for it; or raises why it can be none."""
    path = Path(output).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"The output must end in .csv, .jsonl or .parquet. Received: {os.fspath(output)!r}."
            f"{did_you_mean(path.suffix, FORMATS)}"
        )
    if path.suffix.lower() == ".parquet":
        require("pyarrow", "parquet", "Parquet")
    check_writable(path)
    for written in (path, errors_path(path)):
        check_replaceable(written)
    return path


# How a file that was written here begins; of Parquet the columns, as a line.
_TABLE = re.compile(r"path(,answer)?(,class\d+,probability\d+)+,error\r?\n|path,reason\r?\n")
_OBJECTS = re.compile(r'\[\]|\[?\s*\{\s*"path": "(?:[^"\\]|\\.)*",\s*"classes": ')


def check_replaceable(path: Path) -> None:
    """Raises InputError where another file than predictions is there, a table of the user's say."""
    if not path.is_file() or not path.stat().st_size:
        return
    ending = path.suffix.lower()
    if ending == ".parquet":
        import pyarrow
        import pyarrow.parquet

        text = ""
        with contextlib.suppress(pyarrow.ArrowException, OSError):
            text = ",".join(pyarrow.parquet.read_schema(path).names) + "\n"
    else:
        with open(path, encoding="utf-8", errors="replace", newline="") as stream:
            text = stream.read(2**16)
    if not (_TABLE if ending in (".csv", ".parquet") else _OBJECTS).match(text):
        raise InputError(
            f"{str(path)!r} is there, and holds no predictions: give another name, or delete it."
        )


def begun_engine(output: Path) -> str:
    """The engine of an interrupted run, which goes on with it; `"auto"` where there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return engine_called(read_json(_note(output))["engine"])
    return "auto"


def engine_called(name: str) -> str:
    """The engine of a runner by its name, `keras/torch` say; `"auto"` where it is a file's own."""
    word = re.split("[/, ]", name)[0]
    return word if word in ENGINES else "auto"


def _note(output: Path) -> Path:
    return output.with_name(f"{output.name}.part.json")


# --- the work file -------------------------------------------------------------------------------


def _rows(work: Path) -> Iterator[tuple[Prediction, int]]:
    """The whole rows of a work file and where each ends, up to one that is cut off or damaged."""
    end = 0
    with open(work, "rb") as stream:
        for line in stream:
            end += len(line)
            try:
                row = json.loads(line)
                classes = [(c["name"], c["probability"]) for c in row["classes"]]
                prediction = Prediction(row["path"], classes, row["error"], row.get("answer"))
            except (ValueError, KeyError, TypeError, RecursionError):
                return
            if not line.endswith(b"\n"):
                return
            yield prediction, end


class PredictionWriter:
    """Writes an output in pieces, behind those that an interrupted run has left.

    Args:
        output: The file to make, as `check_output` gave it.
        top: Classes an image.
        identity: What makes the predictions what they are, JSON-able: numbers in it may differ a
            little, as predictions of one model do between two machines.
        step: Images a batch. Rows are gone on with behind a whole number of batches, so that the
            same images are computed together as without the interruption.
        restart: Drop what an interrupted run has left.

    Attributes:
        done: Rows that are there.
        unreadable: Of these, images that could not be read.
        resumed: Rows that were there when the writer was opened.
    """

    def __init__(self, output: Path, top: int, identity: dict[str, Any], step: int, restart: bool):
        self.output = output
        self.done = self.unreadable = self.resumed = 0
        self._top, self._identity, self._step, self._restart = top, identity, step, restart
        self._work = output.with_name(f"{output.name}.part")
        self._note = _note(output)
        self._stream = self._lock = None

    def open(self, paths: Iterable[str]) -> None:
        """Takes the work file, and finds out how far it goes: as many images as it has rows.

        Raises:
            InputError: Another process writes to it, or it was begun with another model, other
                options or other images.
        """
        self._lock = take_lock(self.output.with_name(f".{self.output.name}.lock"))
        if self._lock is None:
            raise InputError(
                f"Another process is writing {str(self.output)!r}. Wait for it, or give another "
                "output."
            )
        self._stream = open(self._work, "ab")  # noqa: SIM115 (until close)
        end = 0
        if not self._restart and self._note.is_file():
            self._check_identity()
            end = self._find_end(paths)
        if end == 0:
            # In this order: the rows that are there may be another model's.
            self._note.unlink(missing_ok=True)
            self._stream.truncate(0)
            write_json(self._note, self._identity)
        else:
            self._stream.truncate(end)
        self.resumed = self.done

    def _check_identity(self) -> None:
        before = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            before = dict(read_json(self._note))
        now = json.loads(json.dumps(self._identity))
        changed = [k for k in before | now if not _alike(before.get(k), now.get(k))]
        if changed:
            said = ", ".join(_change(k, before.get(k), now.get(k)) for k in changed)
            raise InputError(
                f"{str(self._work)!r} was begun otherwise: {said}. Give the same model and "
                "options to go on, or --restart (restart=True) to begin anew."
            )

    def _find_end(self, paths: Iterable[str]) -> int:
        """The end of the last row to keep; counts the rows up to there."""
        end = unreadable = count = last_end = 0
        wanted = iter(paths)
        for row, last_end in _rows(self._work):
            path = next(wanted, None)
            if path != row.path:
                raise InputError(
                    f"{str(self._work)!r} was begun with other images: number {count + 1} "
                    f"was {row.path!r}, now it is {path!r}. Give the same images to go on, or "
                    "--restart (restart=True) to begin anew."
                )
            count += 1
            unreadable += row.error is not None
            if count % self._step == 0:
                self.done, self.unreadable, end = count, unreadable, last_end
        if next(wanted, None) is None:  # every row was there already
            self.done, self.unreadable, end = count, unreadable, last_end
        return end

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Adds rows of the next images."""
        # One write: a process that is killed leaves whole batches, and the kernel keeps them.
        lines = "".join(to_json(p.to_dict()) + "\n" for p in predictions)
        with named(self._work):
            self._stream.write(lines.encode())
            self._stream.flush()
        self.done += len(predictions)
        self.unreadable += sum(p.error is not None for p in predictions)

    def finish(self) -> None:
        """Puts the output in its place, and the list of unreadable images beside it."""
        errors = errors_path(self.output)
        if self.unreadable:
            replace_file(errors, self._save_errors)
        else:
            errors.unlink(missing_ok=True)  # of an earlier run
        save = FORMATS[self.output.suffix.lower()]
        replace_file(self.output, lambda name: save(self._work, self._top, name))
        self._stream.close()  # Windows deletes no open file
        self._work.unlink()
        self._note.unlink(missing_ok=True)
        self.close()

    def _save_errors(self, name: str) -> None:
        with open(name, "w", encoding="utf-8", newline="") as stream:
            stream.write(csv_line(["path", "reason"]))
            for row, _ in _rows(self._work):
                if row.error is not None:
                    stream.write(csv_line([plain_path(row.path), row.error]))

    def close(self) -> None:
        """Leaves what is there for the next run."""
        if self._stream is not None:
            with contextlib.suppress(OSError):  # a full disk once more, which `write` has said
                self._stream.close()
        if self._lock is not None:
            drop_lock(self._lock)
            self._lock = None


def _alike(before: Any, now: Any) -> bool:
    lists = isinstance(before, list) and isinstance(now, list) and len(before) == len(now) > 0
    if lists and all(isinstance(v, float) for v in [*before, *now]):
        return bool(np.allclose(before, now, rtol=1e-3, atol=1e-3, equal_nan=True))
    return before == now


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(now, int | str) and not re.fullmatch(r"[0-9a-f]{16}", str(now)):
        return f"{name} was {before!r} and is {now!r}"
    return f"{name} changed"
