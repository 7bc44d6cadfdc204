"""Files of Keras models, by their names and headers: without Keras, and nothing in them is run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import mmap
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from keras_resnet.system.errors import (
    InputError,
    NotFoundError,
    did_you_mean,
    meant_path,
    reason_of,
)
from keras_resnet.system.files import check_writable, printable, replace_file, to_json
from keras_resnet.variants import list_models
from keras_resnet.weights.h5_files import Window, each_dataset
from keras_resnet.weights.loaded import Member
from keras_resnet.weights.stand_ins import one_line
from keras_resnet.weights.zip_files import unpacked, zip_members

TORCH_WRITTEN = (".pth", ".pt", ".safetensors")
KERAS_WRITTEN = (".keras", ".weights.h5")
_PARTS = ("config.json", "metadata.json", "model.weights.h5")

# What a model file may hold at most, in brackets what this package's largest models do.
_DESCRIPTION = 8 << 20  # bytes of config.json (500,000)
_VALUES, _DEPTH = 500_000, 100  # of it (40,000, 12)
_CALLS = 10_000  # layers, and calls of layers (1,100)
_MEMBERS = 1_000  # files in the archive, which Keras unpacks (3)
MAX_TENSOR = 1 << 27  # numbers in the output of a layer for one image, in float32 half a GB
_REACH = 2_048  # pixels under a kernel, which are padded around an image


def find_keras_file(path: str | os.PathLike) -> Path:
    """The `.keras` file that a path means: itself, or a run folder's best.

    Raises:
        NotFoundError: There is no such file; a near name is suggested.
        InputError: It is no `.keras` file, or no whole one.
    """
    given, path = os.fspath(path), Path(path).expanduser()
    if path.is_dir():
        if not run_models(path):
            raise NotFoundError(
                f"No best.keras or last.keras in the folder {str(path)!r}.{meant_run(path)}"
            )
        path = run_models(path)[0]
    if not path.exists():
        if given in list_models():
            raise NotFoundError(f"{given!r} is a network's name; a .keras file of it is needed.")
        near = "" if path.suffix else did_you_mean(path.name, list_models())  # their weights
        raise NotFoundError(f"No model file at {given!r}.{meant_path(given) or near}")
    if path.suffix != ".keras":
        if run_models(path.parent):
            raise InputError(f"{str(path)!r} is not a .keras file.{meant_run(path.parent)}")
        raise InputError(
            f"{str(path)!r} is not a .keras file. A checkpoint of torch becomes one with: "
            f"keras-resnet convert {path.name} {path.stem}.keras"
        )
    if not path.is_file():
        raise InputError(f"{str(path)!r} is a device or a pipe; a .keras file is needed.")
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{str(path)!r} is no whole .keras file ({path.stat().st_size:,} bytes, not a zip "
            "archive): it was cut off or is something else; copy or save it again."
        )
    with _opened(path, "read"):
        pass
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
    """What a `.keras` file says of its model; `print` it."""

    name: str  # of the model
    parameters: int  # numbers in its layers, batch-norm statistics included
    classes: int | None  # units of its last layer, where that is a fully connected one
    keras_version: str  # of the Keras that wrote it
    info: dict[str, Any]  # variant, class names, preprocessing, origin

    def __str__(self) -> str:
        output = f", output (None, {self.classes})" if self.classes else ""
        text = f"{printable(self.name)}: {self.parameters:,} parameters{output}"
        return f"{text}\n{to_json(self.info, indent=2)}"

    def to_json(self) -> str:
        """The same as JSON."""
        return to_json(dataclasses.asdict(self), indent=2)


def inspect_keras_file(path: str | os.PathLike) -> KerasFile:
    """Reads what a `.keras` file says of its model, and builds nothing.

    Raises:
        NotFoundError: There is no such file.
        InputError: It is no whole `.keras` file, or one that would take the machine.
    """
    path = find_keras_file(path)
    with _opened(path, "read") as parts:
        model = _config(parts)
        version = str(json.loads(parts.read("metadata.json")).get("keras_version"))
        last = model["layers"][-1]["config"].get("units")
        classes = last if type(last) is int else None
        info, (parameters, _) = model.get("info", {}), _numbers(parts)
        return KerasFile(str(model["name"]), parameters, classes, version, info)


def keras_file_info(path: Path) -> Any:
    """The `info` that a `.keras` file holds, whatever that is; `None` where there is none.

    Raises:
        InputError: It is no whole `.keras` file, or one that would take the machine.
    """
    with _opened(path, "read") as parts:
        return _config(parts).get("info")


def write_info(path: Path, key: str, value: Any, output: str | os.PathLike | None = None) -> None:
    """Sets one entry of the `info` that a `.keras` file holds; `None` takes it out.

    The value is JSON-able; `output` is a file to write in the place of this one.

    Raises:
        InputError: It is another class of model, which has no `info`.
    """
    check_keras_file(path)  # before its members are unpacked
    with zipfile.ZipFile(path) as archive:
        parts = [(entry, archive.read(entry)) for entry in archive.infolist()]
    for i, (entry, data) in enumerate(parts):
        if entry.filename == "config.json":
            config = json.loads(data)
            if config.get("class_name") != "ImageModel":
                raise InputError(
                    f"{str(path)!r} holds a {config.get('class_name')}, which has no info: load "
                    "it, wrap it in kr.ImageModel, and save that."
                )
            info = config["config"].setdefault("info", {})
            info.pop(key, None)
            info.update({} if value is None else {key: value})
            parts[i] = entry, json.dumps(config).encode()

    def write(name: str) -> None:
        with zipfile.ZipFile(name, "w") as archive:
            for entry, data in parts:
                archive.writestr(entry, data)

    replace_file(path if output is None else output, write)


def check_keras_file(path: Path) -> int:
    """Looks at a `.keras` file before Keras does, which takes what is written there at its word.

    Returns:
        How many numbers its weights are.

    Raises:
        InputError: It is no whole `.keras` file, or one that would take the machine: sizes that
            no image classifier has, weights that are not in the file, links out of it.
    """
    with _opened(path, "loaded") as parts:
        _config(parts)
        return _numbers(parts)[1]


class _Parts:
    """A `.keras` file's archive, mapped."""

    def __init__(self, data: mmap.mmap):
        self.data, self.members = data, zip_members(data, len(data)) or {}
        if b"config.json" not in self.members:
            raise InputError("it has no config.json.")
        if len(self.members) > _MEMBERS:
            raise InputError(f"it has {len(self.members):,} parts; a model has {len(_PARTS)}.")

    def member(self, name: str) -> Member:
        if name.encode() not in self.members:
            raise InputError(f"it has no {name}.")
        return self.members[name.encode()]

    def read(self, name: str) -> bytes:
        member = self.member(name)
        if name.endswith(".json") and member.size > _DESCRIPTION:
            raise InputError(f"{name} has {member.size:,} bytes.")
        return unpacked(self.data, member, name)

    def file(self, name: str) -> IO[bytes]:
        """A member as a file; the bytes of one that is not packed are not copied."""
        member = self.member(name)
        if member.method != zipfile.ZIP_STORED:
            return io.BytesIO(self.read(name))
        return cast(IO[bytes], Window(self.data, member.start, member.size))


@contextlib.contextmanager
def _opened(path: Path, doing: str) -> Iterator[_Parts]:
    """The parts of a `.keras` file; what cannot be made of them is one error, in one line."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _Parts(data)
    # h5py alone raises a dozen kinds for a damaged file.
    except Exception as error:
        reason = one_line(reason_of(error), 300)
        if isinstance(error, (AttributeError, LookupError, TypeError)):
            reason = f"its parts are not as Keras writes them ({reason})."
        raise InputError(f"{str(path)!r} cannot be {doing} as a Keras model: {reason}") from error


# --- what config.json says -----------------------------------------------------------------------


def _config(parts: _Parts) -> dict[str, Any]:
    """The model's own description, after a look at every number that makes a size."""
    config = json.loads(parts.read("config.json"))
    waiting, values, calls = [(config, 0)], 0, 0
    while waiting:
        value, depth = waiting.pop()
        children = list(value.values() if isinstance(value, dict) else value)
        values += len(children)
        if isinstance(value, dict):
            calls += _calls(value)
            _check_sizes(value)
        if values > _VALUES or depth > _DEPTH or calls > _CALLS:
            raise InputError(
                f"its config.json has more than {_VALUES:,} values, {_CALLS:,} calls of layers or "
                f"{_DEPTH} levels, which no image classifier has."
            )
        waiting.extend((v, depth + 1) for v in children if isinstance(v, (dict, list)))
    return config["config"]


def _calls(value: dict[str, Any]) -> int:
    """Layers of a model, or calls of a layer, that an object of the description holds."""
    layers, nodes = (
        found if isinstance(found := value.get(key), list) else []
        for key in ("layers", "inbound_nodes")
    )
    if any(isinstance(node, dict) and not _takes_tensor(node) for node in nodes):
        raise InputError("a layer of it is called on constants, which would be computed at once.")
    return len(layers) + len(nodes)


def _takes_tensor(value: Any) -> bool:
    if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        return "config" in value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_takes_tensor, inside))


_NUMERIC = re.compile(r"(bool|u?int|b?float|complex)[0-9a-z_]*")  # of NumPy, no text of any length


def _check_sizes(value: dict[str, Any]) -> None:
    """Refuses sizes that take memory before, or beside, what a layer puts out.

    Raises:
        InputError: One is too large.
    """
    for key, size in value.items():
        if key.endswith("shape") or key == "height":
            count = _product(size) * _product(value.get("width") if key == "height" else 1)
            if count > MAX_TENSOR:
                raise InputError(f"a tensor of it has {count:,} values ({key}).")
    reach = max([1, *_whole(value.get("kernel_size")), *_whole(value.get("pool_size"))])
    reach *= max([1, *_whole(value.get("dilation_rate"))])
    if reach > _REACH:
        raise InputError(f"a kernel of it reaches over {reach:,} pixels.")
    if value.get("class_name") in ("__numpy__", "__tensor__"):
        dtype = value["config"]["dtype"]
        if not _NUMERIC.fullmatch(dtype):
            raise InputError(f"an array of it is of the type {dtype!r}.")


def _product(shape: Any) -> int:
    """Values of a tensor of that shape, of the largest one where there are several."""
    if isinstance(shape, list) and any(isinstance(one, list) for one in shape):
        return max(map(_product, shape))
    return math.prod(_whole(shape))


def _whole(value: Any) -> list[int]:
    """The whole numbers in a size as Keras writes them: one, a list, or lists in a list."""
    if isinstance(value, list):
        return [number for one in value for number in _whole(one)]
    return [int(value)] if isinstance(value, (int, float)) and value >= 1 else []


# --- what model.weights.h5 holds -----------------------------------------------------------------


def _numbers(parts: _Parts) -> tuple[int, int]:
    """How many numbers the layers have, batch-norm statistics included, and the whole file."""
    own = every = 0
    size = parts.member("model.weights.h5").size

    def look(name: str, item: Any, file: Any) -> None:
        nonlocal own, every
        count = math.prod(item.shape)
        every += count
        own += count if name.startswith("layers/") and "/seed_generator/" not in name else 0

    with parts.file("model.weights.h5") as file:
        each_dataset(file, size, look)
    return own, every
