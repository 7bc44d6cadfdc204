"""A run folder's files, read as far as they are there and whole, into one `RunFacts`."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnet.reports.run_facts import Results, RunFacts
from keras_resnet.reports.wording import is_number
from keras_resnet.system.errors import InputError, NotFoundError, meant_path
from keras_resnet.system.files import csv_value, read_json
from keras_resnet.weights.keras_files import keras_file_info

# A folder with one of these is a run's, or what `evaluate --output` wrote.
_MARKS = ("config.json", "history.csv", "evaluation.json", "test_evaluation.json", "best.keras")
PARTS = {"test": "test_", "validation": ""}  # the part, and the prefix of its files
# Of `config.json`; a value of another kind is left out, as if it were not there.
_KINDS: dict[str, type] = {
    "status": str, "directory": str, "backend": str, "recipe": dict, "model": dict,
    "class_counts": dict, "preprocess": dict, "augment": dict, "versions": dict, "devices": list,
    "command": list, "start": list, "arguments": dict,
}  # fmt: skip


def read_run(folder: str | os.PathLike) -> RunFacts:
    """Reads a run folder; what is missing or damaged is left out and said in `missing`.

    Raises:
        NotFoundError: There is no such folder; a near name is suggested.
        InputError: It is a file, or no run folder.
    """
    folder = Path(folder).expanduser()
    check_run(folder)
    facts = RunFacts(folder)
    config = _json(folder / "config.json", facts.missing)
    facts.config = {k: v for k, v in config.items() if isinstance(v, _KINDS.get(k, object))}
    facts.info = _model_info(folder)
    facts.history = _history(folder / "history.csv", facts.missing)
    for part, prefix in PARTS.items():
        results = _results(folder, part, prefix, facts.missing)
        if results is not None:
            facts.results[part] = results
    if not facts.results:
        held_out = facts.recipe.get("val_split") != 0
        why = "nothing was held out (val_split=0), and there is no test/"
        facts.missing.append(f"no evaluation: {'no evaluation.json' if held_out else why}")
    with contextlib.suppress(OSError, KeyError, csv.Error):
        facts.skipped = [(r["path"], r["reason"]) for r in _table(folder / "skipped.csv")]
    facts.files = {
        p.name: p.stat().st_size for p in sorted(folder.glob("*.keras")) if p.name[0] != "."
    }
    if not facts.files:
        facts.missing.append("no model file: neither best.keras nor last.keras")
    begun, ended = _logged_times(folder / "train.log")
    facts.begun = _time(facts.config.get("begun")) or begun
    facts.ended = _time(facts.config.get("ended")) or ended
    return facts


def check_run(path: str | os.PathLike) -> None:
    """Says what is wrong with a path that is no run folder, and which is meant: see `read_run`."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise NotFoundError(f"No run folder at {os.fspath(path)!r}.{meant_path(path)}")
    if not folder.is_dir():
        hint = f" Its folder is one: {str(folder.parent)!r}." if _is_run(folder.parent) else ""
        raise InputError(f"{str(folder)!r} is a file; a run folder is needed.{hint}")
    if not _is_run(folder):
        below = [repr(str(p)) for p in sorted(folder.iterdir()) if p.is_dir() and _is_run(p)]
        hint = " It has none of: " + ", ".join(_MARKS) + "."
        if below:
            listed = ", ".join(below[:6])
            hint = f" There are run folders in it: {listed}{' ...' if len(below) > 6 else ''}."
        raise InputError(f"{str(folder)!r} is no run folder.{hint}")


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _MARKS)


def _json(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        found = read_json(path)
    except FileNotFoundError:
        if path.name == "config.json":
            missing.append("no config.json: how it was trained is not known")
    except (OSError, ValueError):
        missing.append(f"{path.name} cannot be read")
    else:
        return found if isinstance(found, dict) else {}
    return {}


def _model_info(folder: Path) -> dict[str, Any]:
    """`ImageModel.info` out of the model file, without loading the model."""
    for name in ("best.keras", "last.keras"):
        try:
            info = keras_file_info(folder / name)
        except InputError:
            continue
        if isinstance(info, dict):
            return info
    return {}


def _table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    # As csv_line wrote them: a class may be called "=1+1".
    return [{k: csv_value(v) if isinstance(v, str) else v for k, v in r.items()} for r in rows]


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _history(path: Path, missing: list[str]) -> dict[str, list[float]]:
    try:
        rows = _table(path)
    except FileNotFoundError:
        missing.append("no history.csv: not one epoch is through")
        return {}
    except (OSError, csv.Error):
        missing.append("history.csv cannot be read")
        return {}
    names = [name for name in (rows[0] if rows else ()) if name and name != "epoch"]
    return {name: [_number(row.get(name)) for row in rows] for name in names}


def _results(folder: Path, part: str, prefix: str, missing: list[str]) -> Results | None:
    found = _json(folder / f"{prefix}evaluation.json", missing)
    if not isinstance(found.get("count"), int) or found["count"] < 1:
        return None
    try:
        names = [str(name) for name in found.get("class_names") or ()]
        confusion = _confusion(found.get("confusion"), len(names))
        return Results(
            part=part,
            count=found["count"],
            top1=float(found["top1"]),
            top5=found.get("top5") if is_number(found.get("top5")) else None,
            loss=found.get("loss") if is_number(found.get("loss")) else None,
            class_names=names,
            per_class=[_scores(row) for row in found.get("per_class") or ()],
            confusion=confusion,
            rows=_predictions(folder / f"{prefix}predictions.csv", missing),
            skipped=[(str(path), str(reason)) for path, reason in found.get("skipped") or ()],
            task=str(found.get("task", "single-label")),
            scores={str(k): _number(v) for k, v in (found.get("scores") or {}).items()},
        )
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        missing.append(f"{prefix}evaluation.json cannot be read")
        return None


def _scores(row: dict[str, Any]) -> dict[str, Any]:
    numbers = {k: _number(row.get(k)) for k in ("precision", "recall", "f1")}
    more = ("average_precision", "threshold")
    numbers |= {k: _number(row[k]) for k in more if k in row}
    return {"name": str(row["name"]), "count": int(row["count"]), **numbers}


def _confusion(counts: Any, classes: int) -> np.ndarray | None:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        counts = np.asarray(counts, int)
        return counts if classes and counts.shape == (classes, classes) else None
    return None


def _predictions(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    numbers = ("probability", "true_probability")
    try:
        rows = [
            {k: row[k] for k in ("path", "true", "predicted", *numbers)} for row in _table(path)
        ]
        rows = [row | {k: _number(row[k]) for k in numbers} for row in rows]
    except (OSError, KeyError, csv.Error):
        missing.append(f"no {path.name}: single images and confidence are left out")
        return []
    return [row for row in rows if is_number(row["probability"])]


def _time(text: Any) -> datetime | None:
    """A time of `config.json`, as the clock on the wall showed it."""
    with contextlib.suppress(TypeError, ValueError):
        return datetime.fromisoformat(text).replace(tzinfo=None)
    return None


def _logged_times(path: Path) -> tuple[datetime | None, datetime | None]:
    """The first and the last time of `train.log`."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, None
    found = re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ", text, re.MULTILINE)
    return (_time(found[0]), _time(found[-1])) if found else (None, None)
