"""Files of Keras models, by their names and headers: without Keras, and nothing in them is run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

from keras_resnet.errors import InputError, NotFoundError, did_you_mean, reason_of
from keras_resnet.system.files import printable

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
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in ("best.keras", "last.keras") if (path / name).is_file()]
        if not found:
            raise NotFoundError(f"No best.keras or last.keras in the folder {str(path)!r}.")
        path = found[0]
    if not path.exists():
        near = os.listdir(path.parent) if path.parent.is_dir() else []
        raise NotFoundError(f"No model file at {str(path)!r}.{did_you_mean(path.name, near)}")
    if path.suffix != ".keras":
        raise InputError(
            f"{str(path)!r} is not a .keras file. A checkpoint of torch becomes one with: "
            f"keras-resnet convert {path.name} {path.stem}.keras"
        )
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{str(path)!r} is no whole .keras file ({path.stat().st_size:,} bytes, not a zip "
            "archive): it was cut off or is something else; copy or save it again."
        )
    return path


def target_ending(path: str | os.PathLike) -> str:
    """The ending of a file to write, which says its kind.

    Raises:
        NotFoundError: The folder that it shall be in does not exist.
        InputError: The ending is none that can be written.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise NotFoundError(f"The folder {str(path.parent)!r} does not exist.")
    for ending in (*KERAS_WRITTEN, *TORCH_WRITTEN):
        if path.name.endswith(ending):
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


def _json(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    size = archive.getinfo(name).file_size
    if size > _MOST:
        raise ValueError(f"{name} has {size:,} bytes.")
    return json.loads(archive.read(name))


def _size(name: str, item: Any) -> int:
    """Numbers of a layer's weight; none of a group's, an optimizer's or a random generator's."""
    counts = name.startswith("layers/") and "/seed_generator/" not in name
    return math.prod(item.shape) if counts and hasattr(item, "shape") else 0
