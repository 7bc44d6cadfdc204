"""Tables of images: a CSV, JSON Lines or Parquet file with a row an image."""

from __future__ import annotations

import ast
import contextlib
import csv
import itertools
import json
import os
import reprlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from keras_resnet.data.folders import listed, split_of, unlabelled
from keras_resnet.data.items import Files, Source
from keras_resnet.data.labels import LABEL_COLUMNS, numbered
from keras_resnet.data.rows import ParquetImages, unpacked
from keras_resnet.data.walk import is_picture
from keras_resnet.system.errors import DataError, InputError, NotFoundError, did_you_mean, require

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

# What people call each column; the first that is there is taken.
_CALLED = {
    "path": "path file filename file_name filepath file_path image image_path img img_path "
            "image_name image_file picture",
    "label": LABEL_COLUMNS,
    "split": "split subset set partition part",
    "weight": "sample_weight sample_weights",  # a `weight` may be that of what is shown
}  # fmt: skip

_CELLS = 4  # of a table in JSON for each byte of it, at most

# Columns of 0 and 1 about a row and not about what its image shows.
_ASIDE = (
    "fold kfold k_fold split subset index idx id unnamed:_0 weight weights sample_weight "
    "sample_weights valid val validation is_valid is_val is_validation is_train is_training "
    "is_test is_holdout holdout verified is_verified checked is_checked reviewed is_reviewed "
    "duplicate is_duplicate"
)


def open_table(path: str, columns: Mapping[str, str] | None = None) -> Source:
    """The images that a table names, in its order; paths count from the table's folder.

    Args:
        path: Of the table.
        columns: What its columns `"path"`, `"label"`, `"split"` and `"weight"` are called; guessed
            by default, `""` is none. Labels may be columns of 0 and 1: `"cat+dog"`. `"separator"`
            is what stands between several labels of an image; `|` always.

    Raises:
        NotFoundError: There is no such file, or none of the first images that it names.
        DataError: It cannot be read, or a row lacks something.
        InputError: It has no such column.
    """
    if not os.path.exists(path):
        raise NotFoundError(f"{path!r} does not exist.")
    try:
        table = _read(path)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"The table {path!r} cannot be read: {error}") from error
    if not table:
        raise DataError(f"The table {path!r} is empty.")
    given = {k: v for k, v in (columns or {}).items() if k != "separator"}
    several = given.get("label", "").split("+")
    if len(several) > 1 and given["label"] not in table and set(several) <= set(table):
        given["label"] = ""
    else:
        several = []
    used = _columns(path, table, given)
    note = ", ".join(f"{part} from {column!r}" for part, column in used.items())
    said = "label" in used or (columns or {}).get("label") == ""
    hot = {} if said else _hot_columns(table, set(used.values()), several)
    if several and list(hot) != several:
        wrong = next(name for name in several if name not in hot)
        raise DataError(f"The column {wrong!r} of {path!r} holds more than 0 and 1.")
    note += f", labels from {len(hot)} columns of 0 and 1: {listed(list(hot))}" if hot else ""
    aside = {"fold", "weight", "weights"} - {_plain(name) for name in (*used.values(), *hot)}
    unused = [name for name in table if _plain(name) in aside]
    notes = [f"Columns: {note}{f'; not used: {listed(unused)}' if unused else ''}."]
    values = {part: table[column] for part, column in used.items()}
    if not values["path"]:
        raise DataError(f"The table {path!r} has no row.")
    facts: dict[str, Any] = {"notes": tuple(notes), "place": os.path.abspath(path)}
    if "split" in values:
        facts["splits"] = _splits(path, values["split"])
    if "label" in values:
        names = _hub_names(path, used["label"])
        facts |= _labels(path, values["label"], facts.get("splits"), (columns or {}), names)
    elif hot:
        rows = list(zip(*hot.values(), strict=True))
        found = [None if None in row else tuple(np.flatnonzero(row).tolist()) for row in rows]
        one = all(of is None or len(of) == 1 for of in found)  # None: images to test on, say
        labels = np.fromiter([of[0] if of else -1 for of in found] if one else found,
                             np.int32 if one else object)  # fmt: skip
        facts |= {"labels": labels, "class_names": list(hot)}
    if "weight" in values:
        facts["weights"] = _weights(path, values["weight"])
    if isinstance(values["path"], Source):
        values["path"].__dict__.update(facts)
        return values["path"]
    return Files(_paths(path, values["path"]), **facts)


def _paths(path: str, names: Sequence[Any]) -> list[str]:
    folder = os.path.dirname(path)
    paths = []
    for row, name in enumerate(names, 1):
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"Row {row:,} of {path!r} has no path. Received: {name!r}.")
        paths.append(os.path.join(folder, os.path.expanduser(name.strip())))
    if not any(map(os.path.exists, paths[:100])):
        raise NotFoundError(
            f"None of the first images of the table {path!r} is there, such as {paths[0]!r}: paths "
            "count from the table's folder."
        )
    return paths


def _labels(
    path: str,
    values: Sequence[Any],
    splits: np.ndarray | None,
    columns: Mapping[str, str],
    names: list[str] | None,
) -> dict[str, Any]:
    """The labels of the rows and what the classes are called."""
    apart = columns.get("separator", "|")
    given = [_label(path, row, value, apart) for row, value in enumerate(values, 1)]
    labels, names = numbered(given, names)
    where = np.flatnonzero(unlabelled(labels))
    if labels.dtype == object:  # an empty cell is none of the classes, where others have some
        for kind in ("",) if splits is None else set(splits):
            part = where if splits is None else where[splits[where] == kind]
            known = ~unlabelled(labels if splits is None else labels[splits == kind])
            if known.any():
                for row in part:
                    labels[row] = () if isinstance(values[row], str) else None
        where = np.flatnonzero(unlabelled(labels))
    if splits is not None:
        where = where[splits[where] != "test"]
    if len(where):
        raise DataError(f"Row {where[0] + 1:,} of {path!r} has no label.")
    return {"labels": labels, "class_names": names}


def _plain(name: Any) -> str:
    return str(name).strip().lower().replace(" ", "_")


def _hot_columns(
    table: Mapping[str, Any], used: Set[str], given: Sequence[str]
) -> dict[str, list[int | None]]:
    """The columns of 0 and 1, one a label; none where it is one alone, which may be anything."""
    cells = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1}
    found = {}
    for name in given or [name for name in table if name and _plain(name) not in _ASIDE.split()]:
        column = table[name]
        if name not in used and not isinstance(column, Source):
            plain = (
                cell if isinstance(cell, (str, float, int)) else cell and "?" for cell in column
            )
            texts = ["" if cell is None or cell != cell else str(cell).strip() for cell in plain]
            if set(texts) & {*cells} and set(texts) <= {*cells, ""}:
                found[str(name)] = [cells.get(text) for text in texts]
    return found if given or len(found) > 1 else {}


def _label(path: str, row: int, value: Any, apart: str, inside: bool = False) -> Any:
    """A label, several of them, or None; `inside` a list there is no further one."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]") and not inside:  # as pandas writes a list
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                return _label(path, row, ast.literal_eval(text), apart)
        if apart != "|" and apart in text:
            return text.replace(apart, "|")
        return text or None
    if isinstance(value, (list, tuple)) and not inside:
        return [_label(path, row, one, apart, inside=True) for one in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or value != value:
        return None
    if not isinstance(value, (int, float)):
        what = reprlib.repr(value)  # a list may be nested deep
        raise DataError(f"Row {row:,} of {path!r} has no label. Received: {what}.")
    return value


def _weights(path: str, values: Sequence[Any]) -> np.ndarray:
    """What each row counts in training; where it says nothing, 1."""
    weights = np.ones(len(values), np.float32)
    for row, value in enumerate(values):
        if value is None or value != value or str(value).strip() == "":
            continue
        try:
            weights[row] = value
        except (TypeError, ValueError, OverflowError):
            weights[row] = -1
        if not 0 <= weights[row] < np.inf:
            raise DataError(
                f"Row {row + 1:,} of {path!r} has a weight that is no number from 0 on. Received: "
                f"{str(value)[:80]!r}. columns={{'weight': ''}} (--columns weight=) takes none."
            )
    return weights


def _splits(path: str, values: Sequence[Any]) -> np.ndarray:
    values = [value if isinstance(value, str) else reprlib.repr(value) for value in values]
    kinds = {value: split_of(value) for value in set(values)}
    unknown = sorted(value for value, kind in kinds.items() if kind is None)
    if unknown:
        raise DataError(
            f"The table {path!r} has splits that are neither train, val nor test: "
            f"{listed(unknown)}."
        )
    return np.asarray([kinds[value] for value in values])


def _columns(path: str, table: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """Which column is what; images that lie in the table itself go before paths."""
    there = list(table)
    inside = [name for name in there if isinstance(table[name], Source)]
    given = {**({"path": inside[0]} if inside else {}), **given}
    for part, column in given.items():
        if part not in _CALLED:
            raise InputError(f"A column is for path, label, split or weight. Received: {part!r}.")
        if column not in there and (column or part == "path"):
            raise InputError(
                f"The table {path!r} has no column {column!r}.{did_you_mean(column, there)} It "
                f"has: {listed(list(there))}."
            )
    plain = {_plain(name): name for name in reversed(there)}
    guessed = {
        part: next((plain[name] for name in names.split() if name in plain), None)
        for part, names in _CALLED.items()
    }
    used = {part: given.get(part, name) for part, name in guessed.items()}
    if used["path"] is None:
        raise InputError(
            f"The table {path!r} has no column of paths that is known. It has: "
            f"{listed(list(there))}. Say which: columns={{'path': NAME}} (--columns path=NAME)."
        )
    return {part: name for part, name in used.items() if name}


# What rows call the images that lie in them, as datasets and shards do.
_INSIDE = "image", "img", "picture", "bytes", "jpg", "jpeg", "png", "webp"


def image_column(batch: Any, given: str | None = None) -> str:
    """The column of a batch that holds images, guessed if not given: what lies in rows is first."""
    if not isinstance(batch, Mapping):
        raise InputError(
            "A batch is a dict of columns: map_batches(batch_format='numpy'). Received: "
            f"{type(batch).__name__}."
        )
    names = [given] if given is not None else [*_INSIDE, *_CALLED["path"].split()]
    plain = {name if given is not None else name.lower(): name for name in reversed(list(batch))}
    found = next((plain[name] for name in names if name in plain), None)
    if found is None:
        which = "no column of images that is known" if given is None else f"no column {given!r}"
        raise InputError(
            f"The batch has {which}. It has: {listed(list(batch))}. Say which: column=NAME."
        )
    return found


# --- reading -------------------------------------------------------------------------------------


def _read(path: str) -> dict[str, Sequence[Any]]:
    """A table's columns by their names."""
    ending = os.path.splitext(path)[1].lower()
    if ending == ".parquet":
        return _read_parquet(path)
    with open(path, "rb") as file:
        if b"\0" in file.read(1024):
            raise ValueError("it is no UTF-8 but UTF-16, or no text: save it as UTF-8")
    if ending in (".jsonl", ".ndjson"):
        return _read_jsonl(path)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        file.seek(0)
        marks = {mark: first.count(mark) for mark in ",;\t|"}
        mark = "\t" if ending == ".tsv" else max(marks, key=lambda mark: marks[mark])
        rows = csv.reader(file, delimiter=mark)
        names = next(rows, [])
        if any(is_picture(cell.strip()) for cell in names):  # no header
            rows = itertools.chain([names], rows)
            names = ["path", "label", "split"][: len(names)]
        columns: list[list[str]] = [[] for _ in names]
        for number, row in enumerate(rows, 1):
            if not row:
                continue
            if len(row) != len(names):
                raise ValueError(f"row {number:,} has {len(row)} cells, the header {len(names)}")
            for column, cell in zip(columns, row, strict=True):
                column.append(cell)
    return dict(zip(names, columns, strict=True))


def _read_jsonl(path: str) -> dict[str, Sequence[Any]]:
    columns: dict[str, list[Any]] = {}
    count = 0
    with open(path, encoding="utf-8-sig") as file:
        most = _CELLS * os.fstat(file.fileno()).st_size + 1_000_000
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number:,}, column {error.colno}: {error.msg}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number:,} is no object")
            if "\\ud" in line.lower():  # half a character, which no text can hold
                json.dumps(row, ensure_ascii=False).encode()
            for name, value in row.items():
                column = columns.setdefault(name, [])
                column += [None] * (count - len(column))
                column.append(value)
            count += 1
            if count * len(columns) > most:  # it would be as many empty cells
                raise ValueError(f"its {count:,} rows have {len(columns):,} different keys")
    for column in columns.values():
        column += [None] * (count - len(column))
    return columns


def _read_parquet(path: str) -> dict[str, Sequence[Any]]:
    require("pyarrow", "parquet", "A Parquet table")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        images = [
            field.name
            for field in file.schema_arrow
            if pyarrow.types.is_binary(field.type)
            or (pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
        ]
        plain = [name for name in file.schema_arrow.names if name not in images]
        table = unpacked(path, file, plain).to_pydict()
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        return table | {name: ParquetImages(path, name, groups) for name in images[:1]}
    except pyarrow.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _hub_names(path: str, column: str) -> list[str] | None:
    """The classes' names that Hugging Face's datasets write into a Parquet file, or None."""
    if not path.lower().endswith(".parquet"):
        return None
    import pyarrow.parquet

    try:
        said = json.loads(pyarrow.parquet.read_schema(path).metadata[b"huggingface"])
        feature = said["info"]["features"][column]
        names = feature.get("feature", feature)["names"]  # of a list those of each
        return [str(name) for name in names] if isinstance(names, list) else None
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        return None
