"""Files of Keras models, by their names and headers: without Keras, and nothing in them is run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

from keras_resnet.errors import InputError, NotFoundError, did_you_mean, meant_path, reason_of
from keras_resnet.system.files import check_writable, printable
from keras_resnet.variants import list_models

TORCH_WRITTEN = (".pth", ".pt", ".safetensors")
KERAS_WRITTEN = (".keras", ".weights.h5")
_MOST = 64 * 2**20  # bytes of a description; those of this package's models have some 100,000


def find_keras_file(path: str | os.PathLike) -> Path:
    """The `.keras` file that a path means: itself, or a run folder's best.

    Raises:
        NotFoundError: There is no such file; a near name is suggested.
        InputError: It is no `.keras` file, or no whole one.

    Examples:
        >>> find_keras_file("no-such.keras")
        Traceback (most recent call last):
        ...
        keras_resnet.errors.NotFoundError: No model file at 'no-such.keras'.
    """
    given, path = os.fspath(path), Path(path).expanduser()
    if path.is_dir():
        if not run_models(path):
            raise NotFoundError(
                f"No best.keras or last.keras in the folder {str(path)!r}.{meant_run(path)}"
            )
        path = run_models(path)[0]
    if not path.exists():
        near = "" if path.suffix else did_you_mean(path.name, list_models())  # their weights
        raise NotFoundError(f"No model file at {given!r}.{meant_path(given) or near}")
    if path.suffix != ".keras":
        if run_models(path.parent):
            raise InputError(f"{str(path)!r} is not a .keras file.{meant_run(path.parent)}")
        raise InputError(
            f"{str(path)!r} is not a .keras file. A checkpoint of torch becomes one with: "
            f"keras-resnet convert {path.name} {path.stem}.keras"
        )
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{str(path)!r} is no whole .keras file ({path.stat().st_size:,} bytes, not a zip "
            "archive): it was cut off or is something else; copy or save it again."
        )
    _check_names(path)
    return path


def run_models(folder: Path) -> list[Path]:
    """The models of a run folder, the best one first; none of any other folder."""
    return [folder / name for name in ("best.keras", "last.keras") if (folder / name).is_file()]


def meant_run(folder: Path) -> str:
    """The run folder that is likely meant by another folder: the end of a message, or nothing."""
    if run_models(folder):
        return f" Did you mean the run folder {str(folder)!r}?"
    if run_models(folder.absolute().parent):
        return f" Did you mean the run folder {str(folder.absolute().parent)!r}?"
    runs = [path for path in folder.iterdir() if path.is_dir() and run_models(path)]
    if not runs:
        return ""
    newest = max(runs, key=lambda path: run_models(path)[0].stat().st_mtime)
    return f" It is a folder of runs: give one of them, such as {str(newest)!r}."


def target_ending(path: str | os.PathLike) -> str:
    """The ending of a file to write, which says its kind.

    Raises:
        NotFoundError: The folder that it shall be in does not exist.
        InputError: The ending is none that can be written, or nothing can be written there.
    """
    path = Path(path).expanduser()
    for ending in (*KERAS_WRITTEN, *TORCH_WRITTEN):
        if path.name.endswith(ending):
            check_writable(path)
            return ending
    raise InputError(
        f"{path.name!r} must end in one of {', '.join((*KERAS_WRITTEN, *TORCH_WRITTEN))}."
    )


@dataclasses.dataclass(frozen=True)
class KerasFile:
    """What a `.keras` file says of its model; `print` it.

    Attributes:
        name: The model's name.
        parameters: Numbers in its layers, batch-norm statistics included.
        classes: Units of its last layer, `None` where that is not a fully connected one.
        keras_version: Of the Keras that wrote it.
        info: What this package's models carry: variant, class names, preprocessing, origin.
    """

    name: str
    parameters: int
    classes: int | None
    keras_version: str
    info: dict[str, Any]

    def __str__(self) -> str:
        output = f", output (None, {self.classes})" if self.classes else ""
        text = f"{printable(self.name)}: {self.parameters:,} parameters{output}"
        return f"{text}\n{json.dumps(self.info, indent=2)}"

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def inspect_keras_file(path: str | os.PathLike) -> KerasFile:
    """Reads what a `.keras` file says of its model, and builds nothing.

    Raises:
        NotFoundError: There is no such file.
        InputError: It is no whole `.keras` file.
    """
    import h5py  # a quarter of a second

    path = find_keras_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            model = _json(archive, "config.json")["config"]
            version = str(_json(archive, "metadata.json").get("keras_version"))
            with archive.open("model.weights.h5") as stream, h5py.File(stream) as weights:
                sizes: list[int] = []
                weights.visititems(lambda name, item: sizes.append(_size(name, item)))
        last = model["layers"][-1]["config"]
        info = model.get("info", {})
        return KerasFile(model["name"], sum(sizes), last.get("units"), version, info)
    # What h5py and zipfile raise for a damaged file, and a description of another shape.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
            NotImplementedError, zipfile.BadZipFile) as error:  # fmt: skip
        raise InputError(
            f"{str(path)!r} cannot be read as a Keras model: {reason_of(error)}"
        ) from error


def _check_names(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            reason = "" if "config.json" in archive.namelist() else "it has no config.json"
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        reason = reason_of(error)
    if reason:
        raise InputError(f"{str(path)!r} cannot be read as a Keras model: {reason}.")


def _json(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    size = archive.getinfo(name).file_size
    if size > _MOST:
        raise ValueError(f"{name} has {size:,} bytes.")
    return json.loads(archive.read(name))


def _size(name: str, item: Any) -> int:
    """Numbers of a layer's weight; none of a group's, an optimizer's or a random generator's."""
    counts = name.startswith("layers/") and "/seed_generator/" not in name
    return math.prod(item.shape) if counts and hasattr(item, "shape") else 0
