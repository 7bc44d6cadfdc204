"""The run folder: where it is, what is in it, and how a killed run goes on from it."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet.models.summary import count_flops
from keras_resnet.recipes import Recipe, younger_fields
from keras_resnet.system.device import (
    backend_version,
    cudnn_benchmark,
    devices,
    package_version,
    sync,
    tf32_allowed,
)
from keras_resnet.system.errors import InputError, KerasResNetError, reason_of
from keras_resnet.system.files import (
    csv_line,
    drop_lock,
    plain_path,
    read_json,
    replace_file,
    take_lock,
    write_json,
    write_text,
)
from keras_resnet.system.process import system_name
from keras_resnet.training.prepare import Data

logger = logging.getLogger("keras_resnet")

_STATE = "state.npz"
# What a killed process leaves behind: files.replace_file's, and Keras' own while it saves. All of
# it goes, whichever process made it: whoever has the lock of the folder is alone there.
_TEMPORARY = re.compile(r"\..+-[0-9a-f]{8}\.\w+|tmp[a-z0-9_]{8}")


class SaveError(KerasResNetError, OSError):
    """A file of the run could not be written; what was saved before is whole."""


class Run:
    """One run folder."""

    def __init__(self, folder: Path, config: dict[str, Any], note: str = ""):
        self.folder, self.config = folder, config  # what `config.json` holds
        self.note = note  # about the run that was found before, or empty
        self.writes = True  # of several processes, one does
        self.history: dict[str, list[float]] = {}  # columns of `history.csv`, one value an epoch
        # An unfinished run was found here; or a finished one, which gets more epochs.
        self.resumed = (folder / _STATE).is_file()
        self.extended = not self.resumed and (folder / "last.keras").is_file()
        self._lock = None
        self._unlogged: list[str] = []  # until there is a folder
        self._made: list[Path] = []  # this folder and those above, where they were not there

    # Finding the folder.

    @classmethod
    def find(
        cls, output: str | os.PathLike, name: str, identity: dict[str, Any], restart: bool
    ) -> Run:
        """The unfinished run of the same configuration, or a new folder beside those there are.

        One that differs by having had fewer epochs, finished or not, is gone on with as well; with
        `restart` none is. To the name of a new folder `-2`, `-3` ... are added where it is taken.

        Raises:
            InputError: The output is a file.
        """
        output = Path(output).expanduser()
        if output.exists() and not output.is_dir():
            raise InputError(f"The output {str(output)!r} is a file; a folder is needed.")
        name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
        identity = {**identity, "fingerprint": fingerprint(identity)}
        taken, note = 0, ""
        for folder in sorted(output.iterdir()) if output.is_dir() else []:
            match = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", folder.name)
            if not match or _is_blank(folder):
                continue
            taken = max(taken, int(match[1] or 1))
            config = _read_config(folder)
            if restart or not isinstance(config.get("recipe"), dict):
                continue
            changes = _changes(config, identity)
            goes_on, note = _goes_on(folder, config, changes)
            if goes_on:
                config.setdefault("start", [config["recipe"].get("weights"), ""])
                return cls(folder, {**config, **identity}, note)
        folder = output / (name if taken == 0 else f"{name}-{taken + 1}")
        return cls(folder, identity, note)

    def open(self) -> None:
        """Makes the folder and takes its lock.

        Raises:
            InputError: Another process is training in it, or it cannot be made.
        """
        if not self.writes:
            return
        new = not self.folder.exists() or _is_blank(self.folder)
        above = [folder for folder in self.folder.parents if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.folder / ".lock")
        except OSError as error:
            raise InputError(f"Cannot write to {str(self.folder)!r}: {error.strerror}.") from None
        if self._lock is None:
            raise InputError(
                f"Another process is training in {str(self.folder)!r}. Wait for it, or pass "
                "--restart to start a new run beside it."
            )
        for path in self.folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)
        self._made = [self.folder, *above] if new else []
        for line in self._unlogged:
            self._append(line)
        self._unlogged.clear()
        logger.addFilter(self._overhear)

    def close(self, failed: bool = False) -> None:
        """Gives the lock back.

        Where the run has `failed`, its folder goes again if it holds no step yet.
        """
        if self._lock is None:
            return
        logger.removeFilter(self._overhear)
        drop_lock(self._lock)
        self._lock = None
        if failed and self._made:
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in self._made[1:]:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def check_files(self, before: str | None, now: str) -> None:
        """The images are those that the run was started on, as far as it says so.

        Raises:
            InputError: Images or their classes have changed.
        """
        if before not in (None, now):
            raise InputError(
                f"The images or their classes have changed since the run in {str(self.folder)!r} "
                "was started. Pass --restart to start a new one beside it."
            )

    # What is written.

    def path(self, name: str) -> Path:
        """A file of the run."""
        return self.folder / name

    def log(self, text: str) -> None:
        """Adds lines with the time to `train.log`, as soon as there is one."""
        now = time.strftime("%F %T")
        lines = "".join(f"{now} {line.rstrip()}\n" for line in text.split("\n") if line.strip())
        if self._lock is None:
            self._unlogged.append(lines)
        else:
            self._append(lines)

    def _append(self, lines: str) -> None:
        self.guard(_append, self.path("train.log"), lines)

    def _overhear(self, record: logging.LogRecord) -> bool:
        """Logs what the package prints otherwise, such as images that cannot be read."""
        with contextlib.suppress(SaveError):
            self.log(record.getMessage())
        return True

    def say(self, text: str) -> None:
        """Prints lines, and logs them."""
        print(text, flush=True)
        self.log(text)

    def write_config(self, **changes: Any) -> None:
        """Writes `config.json` with some entries changed."""
        self.config.update(changes)
        self.guard(write_json, self.path("config.json"), self.config)

    def write_history(self) -> None:
        """Writes `history.csv`: a row an epoch, counted from 1."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["epoch", *self.history])
        for epoch, row in enumerate(itertools.zip_longest(*self.history.values()), 1):
            cells = (f"{c:.8g}" if isinstance(c, float) else c for c in row)
            writer.writerow([epoch, *cells])
        self.guard(write_text, self.path("history.csv"), text.getvalue())

    def write_skipped(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Writes `skipped.csv` where any image could not be read."""
        if skipped:
            lines = [csv_line(["path", "reason"])]
            lines += [csv_line([plain_path(path), reason]) for path, reason in skipped]
            self.guard(write_text, self.path("skipped.csv"), "".join(lines))

    def save_model(self, model: keras.Model, name: str) -> None:
        """Saves the model as `name` in the folder, whole or not at all."""
        sync(model)
        self.guard(replace_file, self.path(name), model.save)

    def guard(self, write: Callable[..., Any], path: Path, *arguments: Any) -> None:
        """Calls `write(path, ...)`, and turns a full disk into one clear sentence.

        Raises:
            SaveError: The file could not be written.
        """
        if not self.writes:
            return
        try:
            write(path, *arguments)
        except OSError as error:
            reason = error.strerror or reason_of(error)
            raise SaveError(
                f"Cannot save {path.name} in {str(self.folder)!r}: {reason}. What was saved "
                "before is whole; make room and run the same command to go on."
            ) from error

    def read_history(self) -> None:
        """Reads `history.csv` back.

        Raises:
            InputError: It cannot be read.
        """
        with self._reading("history.csv") as path, open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
            names = [name for name in rows[0] if name != "epoch"]
            self.history = {name: [float(row[name]) for row in rows] for name in names}
            self.history["loss"]

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        try:
            yield self.path(name)
        except KerasResNetError:
            raise
        except (OSError, ValueError, LookupError, TypeError, EOFError, csv.Error,
                zipfile.BadZipFile) as error:  # fmt: skip
            raise InputError(
                f"{str(self.path(name))!r} cannot be read ({reason_of(error)}); pass --restart to "
                "start again."
            ) from error

    # The state that a killed run goes on from.

    def save_state(
        self, model: keras.Model, progress: dict[str, Any], extra: dict[str, np.ndarray]
    ) -> None:
        """Saves weights, optimizer, metrics, random state and progress in one file.

        `progress` is JSON-able: epoch, step and so on; `extra`, further arrays, such as averages.
        """
        sync(model)
        if progress["epoch"] or progress["step"]:
            self._made = []  # worth keeping from here on
        arrays = {f"extra/{key}": np.asarray(value) for key, value in extra.items()}
        for group, variables in _variables(model).items():
            for i, variable in enumerate(variables):
                arrays[f"{group}/{i}"] = keras.ops.convert_to_numpy(variable)
        text = json.dumps({**progress, "history": self.history})
        arrays["progress"] = np.frombuffer(text.encode(), np.uint8)
        self.guard(replace_file, self.path(_STATE), lambda name: _savez(name, arrays))

    def load_state(self, model: keras.Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Puts back what `save_state` saved; gives progress and the further arrays.

        Raises:
            InputError: The file does not fit the model.
        """
        with self._reading(_STATE) as path, np.load(path) as file:
            progress = json.loads(bytes(file["progress"]).decode())
            self.history = progress.pop("history")
            groups = _variables(model)
            if progress["step"] == 0:  # they begin anew, and before the first step there are none
                del groups["metric"]
            for group, variables in groups.items():
                for i, variable in enumerate(variables):
                    key = f"{group}/{i}"
                    if key not in file or file[key].shape != tuple(variable.shape):
                        raise InputError(
                            f"{str(self.path(_STATE))!r} does not fit this model at "
                            f"{variable.path!r}; pass --restart to start again."
                        )
                    variable.assign(file[key])
            extra = {k[6:]: file[k] for k in file.files if k.startswith("extra/")}
        return progress, extra

    def read_progress(self) -> dict[str, Any]:
        """How far the run in this folder came."""
        with self._reading(_STATE) as path, np.load(path) as file:
            return json.loads(bytes(file["progress"]).decode())

    def drop_state(self) -> None:
        """Removes the state of a run that has finished."""
        self.path(_STATE).unlink(missing_ok=True)


def facts_of(recipe: Recipe, data: Data, model: keras.Model) -> dict[str, Any]:
    """What `config.json` says of a run beside its options."""
    backend = keras.backend.backend()
    return {
        "model": {
            "variant": recipe.model,
            "parameters": sum(math.prod(v.shape) for v in model.trainable_variables),
            "multiply_adds": count_flops(model, data.train_size),
            "weights": model.info.get("weights"),
        },
        "class_counts": {
            "train": data.train.class_counts,
            "val": data.val.class_counts if data.val else {},
        },
        "preprocess": data.preprocess.get_config(),
        "augment": None if data.train.augment is None else data.train.augment.get_config(),
        "devices": devices(),
        "tf32": tf32_allowed(),
        "cudnn_benchmark": cudnn_benchmark(),
        "dtype_policy": model.dtype_policy.name,
        "batch_size": recipe.batch_size,
        "versions": {
            "keras_resnet": package_version(),
            "keras": keras.__version__,
            backend: backend_version(),
            "numpy": np.__version__,
            "pillow": importlib.metadata.version("pillow"),
            "python": platform.python_version(),
            "platform": system_name(),
        },
    }


def fingerprint(config: dict[str, Any]) -> str:
    """A short hash of what makes two runs the same run."""
    young, recipe = younger_fields(), config["recipe"]
    recipe = {k: v for k, v in recipe.items() if k not in young or v != young[k]}
    text = json.dumps({**config, "recipe": recipe}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _changes(config: dict[str, Any], identity: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between a run that was found and one that is asked for: name to both values.

    The words of a recipe do not count, and `"auto"` is what version 0.1 called None: a run that
    knows nothing of its start is from there.
    """
    before = json.loads(json.dumps(config, default=str))
    after = json.loads(json.dumps(identity, default=str))
    for one in (before, after):
        one |= younger_fields()
        one |= {k: v for k, v in one.pop("recipe").items() if k not in ("source", "aim")}
    if "start" not in before and after["weights"] == "auto" and before.get("weights") is None:
        before["weights"] = "auto"
    keys = {*after, "folds"} - {"fingerprint"}  # an older run has fewer; "folds" most have not
    names = {name for name in keys if before.get(name) != after.get(name)}
    if "epochs" in names and after["warmup_epochs"] >= before.get("epochs", 0):
        names.discard("warmup_epochs")  # cut by a short trial; it is over
    return {name: (before.get(name), after.get(name)) for name in sorted(names)}


def _goes_on(
    folder: Path, config: dict[str, Any], changes: dict[str, tuple[Any, Any]]
) -> tuple[bool, str]:
    """Whether a run is gone on with, and a line that says so or why not."""
    name = folder.name
    finished, state = config.get("status") == "finished", (folder / _STATE).is_file()
    if not changes:
        # Killed before the first state was saved, a run starts anew where it was. The state goes
        # last of all, and an extended run has one from its start.
        note = f"The run {name!r} is the same, and finished; this is one beside it."
        return (True, "") if state or not finished else (False, note)
    if set(changes) == {"epochs"} and changes["epochs"][1] > (changes["epochs"][0] or 0):
        before, after = changes["epochs"]
        averaged = config["recipe"].get("ema") and not state
        if not averaged and (state or (folder / "last.keras").is_file()):
            rates = f"From there on its rates are those of {after} epochs."
            return True, f"Extends the run {name!r} of {before} epochs to {after}. {rates}"
        note = "its averaged weights were not kept" if averaged else "it holds no model"
        return False, f"The run {name!r} of {before} epochs cannot be extended, for {note}."
    told = ", ".join(f"{key} ({old!r} there)" for key, (old, _) in changes.items())
    return False, f"This is another run than {name!r}: it differs in {told}."


def _is_blank(folder: Path) -> bool:
    """Whether a folder holds nothing but what a killed process left before it wrote anything."""
    return folder.is_dir() and all(
        path.name in (".lock", "train.log") or _TEMPORARY.fullmatch(path.name)
        for path in folder.iterdir()
    )


def _read_config(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        config = read_json(folder / "config.json")
        return config if isinstance(config, dict) else {}
    return {}


def results_of(folder: Path) -> dict[str, Any] | None:
    """The figures of a run that is through; `None` of any other."""
    config = _read_config(folder)
    if config.get("status") != "finished" or (folder / _STATE).is_file():
        return None
    results = config.get("results") or {}
    return {**results, **results.pop("val_scores", {})} if results else None


def _variables(model: keras.Model) -> dict[str, list[keras.Variable]]:
    """Everything that changes in training: weights, random state, optimizer, metrics."""
    weights = list(model.variables)
    seen = {id(v) for v in weights}
    metrics = [v for v in model.metrics_variables if id(v) not in seen]
    return {"model": weights, "metric": metrics, "optimizer": list(model.optimizer.variables)}


def _append(path: Path, line: str) -> None:
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(line)


def _savez(name: str, arrays: dict[str, np.ndarray]) -> None:
    with open(name, "wb") as stream:
        np.savez(stream, **arrays)
