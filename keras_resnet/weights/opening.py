"""Finds out what a weight file is, opens it, and says what else a file is that is none."""

from __future__ import annotations

import contextlib
import mmap
import os
import pathlib
import re
import stat
import struct
from collections.abc import Iterator
from typing import Any

from keras_resnet.system.errors import CheckpointError, KerasResNetError, NotFoundError, meant_path
from keras_resnet.weights.h5_files import SIGNATURE, load_h5
from keras_resnet.weights.loaded import Loaded
from keras_resnet.weights.pickle_names import IDENTIFIER
from keras_resnet.weights.pickles import Damaged, read_pickle
from keras_resnet.weights.safetensors_files import load_index, load_safetensors
from keras_resnet.weights.stand_ins import Budget, one_line
from keras_resnet.weights.stream_files import MAGIC, load_stream
from keras_resnet.weights.tar_files import is_tar, load_tar
from keras_resnet.weights.zip_files import load_zip

# Endings under which people call torch.load, which takes the bytes of a safetensors header's length
# for instructions of a pickle.
PICKLE_ENDINGS = (".pth", ".pt", ".th", ".tar", ".ckpt", ".bin")
H5_ENDINGS = (".h5", ".hdf5")

_SIGNATURES = (
    (b"\x1f\x8b", "it is gzip-compressed: unpack it with gunzip, and read what comes out"),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7z archive: unpack it first"),
    (b"\xfd7zXZ\0", "it is xz-compressed: unpack it first"),
    (b"BZh", "it is bzip2-compressed: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "it is zstd-compressed: unpack it first"),
    (b"Rar!", "it is a RAR archive: unpack it first"),
    (b"\x93NUMPY", "it is a NumPy .npy file: open it with numpy.load"),
    (b"GGUF", "it is a GGUF file, which holds language models"),
    (b"\x89PNG", "it is a PNG image"),
    (b"\xff\xd8\xff", "it is a JPEG image"),
    (b"%PDF", "it is a PDF document"),
)


def _what_else(data: Any, size: int, name: str) -> str | None:
    """Names a file that is no checkpoint by its first bytes."""
    head = bytes(data[:2048])
    for signature, text in _SIGNATURES:
        if head.startswith(signature):
            return text
    if head.startswith(b"version https://git-lfs"):
        found = re.search(rb"\nsize (\d{1,20})\n", head)
        real = f" of {int(found[1]):,} bytes" if found else ""
        return (
            f"it is a git-LFS pointer{real}, not the file itself: run `git lfs pull`, or download "
            f"the file from the web page"
        )
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        return (
            "it is a web page (HTML or XML), not weights: the download ended at a login, consent "
            "or error page. Fetch the direct link"
        )
    if name.lower().endswith(".onnx") or re.match(
        rb"\x08[\x01-\x0f]\x12.{1,40}(pytorch|onnx)", head
    ):
        return "it is an ONNX graph: export the state dict instead, torch.save(model.state_dict())"
    return None


@contextlib.contextmanager
def only_our_errors(path: Any, doing: str) -> Iterator[None]:
    """Puts the path before a message, and lets nothing but this package's errors out.

    What is read here was perhaps made to break the reader; a caller who catches CheckpointError
    must not meet an IndexError because of a damaged file.
    """
    try:
        yield
    except NotFoundError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"cannot {doing} {one_line(path, 500)}: {error}") from error.__cause__
    except KerasResNetError:
        raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"cannot {doing} {one_line(path, 500)}: {reason}") from error
    except Exception as error:
        raise CheckpointError(
            f"cannot {doing} {one_line(path, 500)}: it is damaged or not what it seems "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


def as_path(path: Any) -> pathlib.Path:
    """The path that an argument names; `~` is the user's own folder."""
    try:
        return pathlib.Path(os.fsdecode(path)).expanduser()
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"a path is needed, not {type(path).__name__}") from error


def open_file(path: pathlib.Path) -> Loaded:
    """Opens, maps and understands a file; no tensor's bytes are touched.

    Here it is decided whether a file is *safe* (`Loaded.refused` is empty, and nothing is raised):
    every reader that `torch.load(weights_only=False)` would try, in its order and whatever the file
    is called, finds nothing to run, and the same numbers as ours. The readers are zip (TorchScript
    where the archive holds constants.pkl), tar, and the stream of pickles, which is also what is
    tried where `tarfile` stumbles over a later member, and on a safetensors file by another name.
    So whatever is no zip is looked at as a stream too: the first pickle may ask for nothing, and
    may not be a stream's magic number. Where readers could disagree about a file (two directories,
    names that differ in case, a tensor changed after it was made), it is refused.

    Not promised: what other programs find in it, and `torch.load` with options that trust its
    layout (`mmap=True` of a compressed archive, `calculate_storage_offsets`).
    """
    _check_path(path)
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size, ending = len(data), path.suffix.lower()
    if ending == ".distcp" or path.name == ".metadata":
        raise CheckpointError(f"it is a part of a folder that torch.distributed wrote: {_GATHER}")
    if path.name.lower().endswith(".json"):
        return load_index(data, path, open_file)
    # In the order in which PyTorch asks. What it would take for a tar is one here too.
    if data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return load_zip(data, size, path.name)
    if is_tar(data):
        return _no_stream(load_tar(data, size, path.name))
    if size >= 10 and data[8:9] == b"{" and struct.unpack_from("<Q", data, 0)[0] < 1 << 40:
        loaded = load_safetensors(data, size, path.name)
        if ending in PICKLE_ENDINGS:
            raise CheckpointError(
                f"it is a safetensors file called {ending}, which PyTorch would run as a pickle: "
                f"rename it to end in .safetensors"
            )
        return _no_stream(loaded)
    if data[:8] == SIGNATURE:
        if ending not in H5_ENDINGS:  # libhdf5 is C that parses: it gets what is meant for it
            raise CheckpointError(
                "it is an HDF5 file, Keras' weights perhaps: rename it to end in .weights.h5 or .h5"
            )
        return load_h5(data, size, path.name)
    other = _what_else(data, size, path.name)
    if other:
        raise CheckpointError(other)
    if data[257:262] == b"ustar":
        return load_tar(data, size, path.name)  # a damaged one
    if size >= 8 and ending == ".safetensors":
        return _no_stream(load_safetensors(data, size, path.name))
    try:
        loaded = load_stream(data, size, path.name)
    except CheckpointError as error:
        if data[:1] == b"\x80":
            raise
        raise CheckpointError(_unknown(data)) from error
    if data[:1] != b"\x80" and not all(IDENTIFIER.fullmatch(n) for n in loaded.refused):
        raise CheckpointError(_unknown(data))
    return loaded


def _no_stream(loaded: Loaded) -> Loaded:
    """The same, and what its first bytes ask for where they are run as a pickle: see `open_file`.

    Raises:
        CheckpointError: They begin a stream of pickles, or a pickle beyond our limits.
    """
    names: dict[str, None] = {}
    value = None
    with contextlib.suppress(Damaged):
        value, _ = read_pickle(loaded.data, 0, loaded.size, Budget(), names)
    loaded.refused |= {name: None for name in names if IDENTIFIER.fullmatch(name)}
    if value == MAGIC:
        raise CheckpointError(f"it is two files in one: {loaded.format}, and a stream of pickles")
    return loaded


_GATHER = (
    "gather it with python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER "
    "weights.pth, and read that"
)


def _check_path(path: pathlib.Path) -> None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"no file {one_line(path, 500)}.{meant_path(path)}") from None
    if stat.S_ISDIR(status.st_mode):
        names = sorted(os.listdir(path))
        if ".metadata" in names and any(name.endswith(".distcp") for name in names):
            raise CheckpointError(f"it is a folder that torch.distributed wrote: {_GATHER}")
        kinds = (".pth", ".pt", ".th", ".tar", ".safetensors")
        indices = [name for name in names if name.endswith(".index.json")]
        inside = (indices or [name for name in names if name.endswith(kinds)])[:3]
        hint = f" It holds {', '.join(map(one_line, inside))}." if inside else ""
        raise CheckpointError(f"it is a folder; name a file.{hint}")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("it is no regular file")
    if status.st_size == 0:
        raise CheckpointError("it is empty (0 bytes): download it again")


def _unknown(data: Any) -> str:
    return (
        f"it begins with {bytes(data[:8])!r}, so it is none of PyTorch's zip, stream or tar "
        f"formats, nor safetensors"
    )
