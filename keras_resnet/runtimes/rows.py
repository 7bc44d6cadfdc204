"""The formats and engines by name: a table that needs neither Keras nor any runtime."""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

from keras_resnet.system.errors import InputError, NotFoundError, did_you_mean, require
from keras_resnet.system.files import check_writable, check_writable_folder

# Of the engines that take a Keras model, and those that an exported file names by itself.
ENGINES = ("keras", "auto", "openvino", "onnxruntime", "torch")


@dataclasses.dataclass(frozen=True)
class Format:
    """A row of `FORMATS`."""

    name: str  # what users call it
    keras_name: str  # what `keras.Model.export` calls it
    suffix: str  # of its files; "" for a folder
    # Backend that can write it -> {import name of a package: pip extra that has it}.
    needs: dict[str, dict[str, str]]
    home: str  # the file in this folder whose `Runner` finishes, describes and runs it
    module: str  # import name of the package that runs the files
    extra: str  # the pip extra that has it

    @property
    def runner(self) -> Any:
        """The class that finishes and runs the files: a subclass of `runner.FileRunner`."""
        return importlib.import_module(f"keras_resnet.runtimes.{self.home}").Runner


# Left out, with Keras 3.15: on jax, OpenVINO (its converter knows no XlaCallModule, which jax2tf
# writes) and ONNX (by jax2onnx, with 50 packages more); on torch, SavedModel (by torch_xla, and
# Keras' call of torch.export fails) and LiteRT (by litert-torch, for one batch size alone).
_ROWS = (
    ("onnx", "onnx", ".onnx",
     {"torch": {"onnx": "onnx"}, "tensorflow": {"onnx": "onnx", "tf2onnx": "onnx"}},
     "onnx", "onnxruntime", "onnx"),
    ("openvino", "openvino", ".xml",
     {"torch": {"openvino": "openvino"}, "tensorflow": {"openvino": "openvino"}},
     "openvino", "openvino", "openvino"),
    ("saved_model", "tf_saved_model", "", {"tensorflow": {}, "jax": {"tensorflow": "tensorflow"}},
     "saved_model", "tensorflow", "tensorflow"),
    ("litert", "litert", ".tflite", {"tensorflow": {}}, "litert", "ai_edge_litert", "litert"),
    ("torch", "torch", ".pt2", {"torch": {}}, "torch_program", "torch", "torch"),
)  # fmt: skip
FORMATS = {row[0]: Format(*row) for row in _ROWS}


def get_format(name: str) -> Format:
    """A row of `FORMATS` by its name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in FORMATS:
        hint = did_you_mean(name, FORMATS) or f" There are: {', '.join(FORMATS)}."
        raise InputError(f"Unknown format {name!r}.{hint}")
    return FORMATS[name]


def format_for(path: str | os.PathLike, name: str | None) -> str:
    """The format of a file to write, by its name or by the path's suffix.

    Raises:
        InputError: Neither says which, or the two disagree.
    """
    path, suffix = Path(path), Path(path).suffix
    by_suffix = {row.suffix: row.name for row in FORMATS.values() if row.suffix}
    if name is None:
        if suffix not in by_suffix:
            raise InputError(
                f"{path.name!r} names no format: it ends in {', '.join(by_suffix)}, or format= "
                "says which."
            )
        return by_suffix[suffix]
    wanted = get_format(name).suffix
    if wanted and suffix != wanted:
        raise InputError(f"A file of the format {name} ends in {wanted!r}, not {path.name!r}.")
    if not wanted and suffix in (*by_suffix, ".keras"):
        raise InputError(f"{name} is a folder; {path.name!r} looks like a file.")
    return name


def format_of_file(path: str | os.PathLike) -> str | None:
    """The format of an exported file or folder, by its suffix; `None` for anything else."""
    path = Path(path)
    if path.is_dir():
        return "saved_model" if (path / "saved_model.pb").is_file() else None
    return next((row.name for row in FORMATS.values() if row.suffix == path.suffix != ""), None)


def default_path(model: str | os.PathLike, format: str) -> Path:
    """Where a model file's export goes unless it is said: beside it."""
    path, suffix = Path(model).expanduser(), get_format(format).suffix
    if path.is_dir():
        path = path / "best.keras"
    return path.with_suffix(suffix) if suffix else path.with_name(f"{path.stem}_{format}")


def check_target(path: str | os.PathLike, name: str) -> None:
    """Says before any work that a file of a format cannot be written.

    Raises:
        NotFoundError: The folder that it shall be in does not exist.
        InputError: Something else is there, or nothing can be written there.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise NotFoundError(f"The folder {str(path.parent)!r} does not exist.")
    if FORMATS[name].suffix:
        check_writable(path)
        return
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and format_of_file(path) != name):
        raise InputError(f"{str(path)!r} is there, and is no {name}: it is left alone.")
    check_writable_folder(path)


def require_runtime(name: str) -> None:
    """Raises MissingDependencyError where the package that runs a format's files is missing."""
    row = get_format(name)
    require(row.module, row.extra, f"Running {name} files")


def check_engine(name: str) -> None:
    """Raises InputError where there is no engine of the name."""
    if name not in ENGINES:
        hint = did_you_mean(name, ENGINES) or f" There are: {', '.join(ENGINES)}."
        raise InputError(f"Unknown engine {name!r}.{hint}")
