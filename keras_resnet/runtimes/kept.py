"""What a model file became for an engine: converted and compared once, then kept for this user.

Not beside the model file: what lies there comes with it from wherever it comes, and a file of an
engine that was put beside a model would be run in its place, at worst with code in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from keras_resnet.runtimes.rows import Format
from keras_resnet.system.device import installed_version, package_version
from keras_resnet.system.files import (
    cache_home,
    read_json,
    remove_leftovers,
    temporary_prefix,
    write_json,
)
from keras_resnet.weights.download import file_sha256, local_path
from keras_resnet.weights.keras_files import find_keras_file
from keras_resnet.weights.published import named_variant, resolve_weights

TOLERANCE = 1e-4  # of the largest output, as `export` has it


@dataclasses.dataclass(frozen=True)
class Kept:
    """How an engine does with a model."""

    path: Path | None  # the exported file, where there is one
    difference: float | None = None  # of its outputs from the model's, relative to the largest
    seconds: float | None = None  # it took for an image, in a batch
    model_seconds: float | None = None  # the model took

    @property
    def differs(self) -> bool:
        """Whether its outputs are not the model's."""
        # Written so that a nan differs; in JSON it is null.
        return self.difference is None or not self.difference <= TOLERANCE

    @property
    def refused(self) -> str:
        """Why it does not run the model unasked; empty where it may."""
        if self.differs:
            return (
                f"differs from the model by {self.difference or math.nan:.2g} of the largest output"
            )
        if self.seconds is None or self.model_seconds is None:
            return "was asked for, and not timed beside the model"
        return f"was no faster: {self}" if self.seconds >= self.model_seconds else ""

    def __str__(self) -> str:
        if self.seconds is None or self.model_seconds is None:
            return "times not known"
        return f"{self.seconds * 1000:.3g} ms an image, the model {self.model_seconds * 1000:.3g}"


def source_of(model: str | os.PathLike) -> Path | None:
    """The file that `load_model` would open; `None` for published weights that are not here yet.

    Raises:
        NotFoundError: There is no such file.
        InputError: It is no model file.
    """
    variant = named_variant(model)
    return find_keras_file(model) if variant is None else local_path(resolve_weights(variant))


def find(source: Path, row: Format) -> Kept | None:
    """What is known of a model file as it is now, in the engine as it is installed now."""
    path = _file(source, row)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        record = read_json(f"{path}.json")
        files = record.pop("files")
        if record.pop("of") == _of(source, row):
            if not files:
                return Kept(None, **record)
            if all(file_sha256(one) == files[one.name] for one in row.runner.files(path)):
                return Kept(path, **record)
    return None


def keep(source: Path, row: Format, found: Kept) -> Kept:
    """Moves a file from its `workplace` to the folder around it, with what is known of it."""
    files, target = {}, _file(source, row)
    record = {"of": _of(source, row), "files": files, **dataclasses.asdict(found)}
    del record["path"]
    for one in [] if found.differs else row.runner.files(found.path):
        place = target.with_suffix(one.suffix)
        files[place.name] = file_sha256(one)
        os.replace(one, place)
    write_json(f"{target}.json", record)
    return dataclasses.replace(found, path=target)


@contextlib.contextmanager
def workplace(source: Path | None) -> Iterator[tuple[Path, bool]]:
    """A folder for a file to come, and whether it can be kept."""
    temporary = functools.partial(tempfile.TemporaryDirectory, ignore_cleanup_errors=True)
    made = None
    with contextlib.suppress(OSError):  # a folder that cannot be written
        if source is not None:
            folder = _folder(source)
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            made = temporary(prefix=temporary_prefix("engine"), dir=folder)
    with made or temporary() as name:
        yield Path(name), made is not None


def _folder(source: Path) -> Path:
    """Where the files of a model file are kept: in the user's cache."""
    name = hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:16]
    return cache_home() / "engines" / name


def _file(source: Path, row: Format) -> Path:
    return _folder(source) / f"{source.name}{row.suffix}"


def _of(source: Path, row: Format) -> dict[str, str]:
    """What a comparison is true of."""
    return {
        "model": file_sha256(source),
        row.module: f"{installed_version(row.module)} on {row.runner.accelerator() or 'CPU'}",
        "keras_resnet": package_version(),
    }
