"""Which files below a folder are images, by their names, and what is said of the others."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from keras_resnet.system.errors import InputError, NotFoundError

logger = logging.getLogger("keras_resnet")

# What Pillow opens here, and what a file of each format is commonly called: kinds that Pillow
# decodes by itself. Others stay out whatever a file is called: EPS starts Ghostscript, and WMF,
# GRIB, BUFR, HDF5 and MPEG are known by name alone. TGA has no mark of its own, so it is last.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),  # a JPEG with further images behind it, as phones write
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),  # where the plug-in is installed
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "DIB": (".dib",),
    "ICO": (".ico",),
    "ICNS": (".icns",),
    "DDS": (".dds",),
    "PCX": (".pcx",),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SUN": (".ras",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "NPY": (".npy",),  # not Pillow's: an array of `np.save`
}
if importlib.util.find_spec("pillow_heif") is None:
    del FORMATS["HEIF"]

# torchvision/datasets/folder.py IMG_EXTENSIONS, and all else that is opened.
IMG_EXTENSIONS = tuple(dict.fromkeys(ending for all_of in FORMATS.values() for ending in all_of))
_KNOWN = frozenset(IMG_EXTENSIONS)
ENDINGS = ".jpg, .jpeg, .png, .bmp, .tif, .tiff, .webp, .avif, .gif and others that Pillow reads"

_NO_KIND = "no kind of image that is read"
_REASONS = {
    "HEIC needs a plug-in: pip install pillow-heif": (".heic", ".heif", ".hif"),
    "camera raw: convert them": (
        ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2",
    ),
    "a video": (".3gp", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"),
    "a drawing, not pixels": (".ai", ".emf", ".eps", ".pdf", ".ps", ".svg", ".wmf"),
    "an archive: unpack it": (".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip"),
}  # fmt: skip
_REASON_OF = {ending: reason for reason, endings in _REASONS.items() for ending in endings}

# What systems leave beside people's files: no class, no image, and nothing to speak of.
_LITTER = {
    "__macosx", "icon\r", "temporary items", "network trash folder",  # macOS
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler",
    "system volume information",  # Windows
    "lost+found", "@eadir", "#recycle", "@recycle", "__pycache__",
}  # fmt: skip


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or left there by a system.

    Examples:
        >>> [name for name in ("cat", ".git", "__MACOSX", "Thumbs.db") if is_litter(name)]
        ['.git', '__MACOSX', 'Thumbs.db']
    """
    plain = name.casefold()
    return plain.startswith(".") or plain in _LITTER or plain.endswith(":zone.identifier")


def is_picture(name: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return has_image_ending(name) and not is_litter(name)


def has_image_ending(name: str) -> bool:
    """The same of a name that is known to be no litter."""
    return name[name.rfind(".") :].lower() in _KNOWN


def entries(folder: str) -> tuple[list[str], list[str], list[str]]:
    """Names of a folder's files, of its folders, and of folders that links lead to, each sorted.

    A link to a file is a file, and so is whatever is neither file nor folder (its reader says so);
    also an empty folder that is called as an image is.
    """
    files, folders, links = [], [], []
    with os.scandir(folder) as found:
        for entry in found:
            if is_litter(entry.name):
                continue
            if not _is_folder(entry) or (is_picture(entry.name) and _is_empty(entry.path)):
                files.append(entry.name)
            else:
                (links if entry.is_symlink() else folders).append(entry.name)
    return sorted(files), sorted(folders), sorted(links)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_empty(folder: str) -> bool:
    try:
        with os.scandir(folder) as found:
            return next(found, None) is None
    except OSError:
        return True


def walk(
    folder: str, follow_links: bool = True, failed: list[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Gives the folders below a folder and itself, each with the names of its files.

    Folders that cannot be read are added to `failed`.

    Each real folder comes once, so links may lead in circles; one that several paths lead to
    comes under a path without links, where there is one.
    """
    waiting, linked, seen = deque([folder]), deque(), set()
    while waiting or linked:
        root = (waiting or linked).popleft()
        try:
            state = os.stat(root)
            mark = (state.st_dev, state.st_ino) if state.st_ino else os.path.realpath(root)
            if mark in seen:
                continue
            seen.add(mark)
            files, folders, links = entries(root)
        except OSError as error:
            logger.warning("The folder %r cannot be read: %s.", root, error.strerror)
            if failed is not None:
                failed.append(root)
            continue
        yield root, files
        waiting.extend(os.path.join(root, name) for name in folders)
        if follow_links:
            linked.extend(os.path.join(root, name) for name in links)


def images_of(names: Iterable[str]) -> list[str]:
    """The images among the names of a folder: arrays count where there is nothing else.

    Examples:
        >>> images_of(["a.png", "a.npy", "a.txt"]), images_of(["a.npy"])
        (['a.png'], ['a.npy'])
    """
    found = [name for name in names if is_picture(name)]
    return [name for name in found if not name.lower().endswith(".npy")] or found


def walk_pictures(folder: str, follow_links: bool = True) -> tuple[list[str], list[str]]:
    """Images and other files below a folder, in torchvision's order, without hidden ones."""
    pictures: list[str] = []
    other: list[str] = []
    for root, names in sorted(walk(folder, follow_links)):
        images = set(images_of(names))
        for name in names:
            (pictures if name in images else other).append(os.path.join(root, name))
    return pictures, other


def picture_folders(folder: str) -> tuple[list[str], Counter]:
    """The folders below a folder that hold images themselves, in the order of `walk_pictures`.

    File names are looked at and forgotten: memory grows with folders, not with files. Those of no
    images are counted as `unread` does.
    """
    found, others = [], Counter()
    for root, names in walk(folder):
        images = set(images_of(names))
        if images:
            found.append(root)
        if len(images) < len(names):
            others += unread(name for name in names if name not in images)
    return sorted(found), others


def holds_picture(folder: str) -> bool:
    """Whether there is an image anywhere below a folder."""
    return any(is_picture(name) for _, names in walk(folder) for name in names)


def extension(path: str) -> str:
    """How a file's name ends, in words where it has no ending."""
    return os.path.splitext(path)[1].lower() or "no extension"


def unread(paths: Iterable[str], reason: str | None = None) -> Counter:
    """Counts files that are not read by extension and reason, which the extension says."""
    endings = map(extension, paths)
    return Counter((ending, reason or _REASON_OF.get(ending, _NO_KIND)) for ending in endings)


def unread_line(counts: Mapping[tuple[str, str], int]) -> str:
    """One line that says what was not read and why; empty where all was."""
    if not counts:
        return ""
    total = sum(counts.values())
    common = Counter(counts).most_common()
    shown = [f"{n:,} {ending}: {reason}" for (ending, reason), n in common[:8]]
    if len(common) > 8:
        shown.append(f"{sum(n for _, n in common[8:]):,} others")
    return f"Not read: {total:,} file{'s' if total > 1 else ''} ({'; '.join(shown)})."


def left_out(directory: str, exclude: Any) -> set[str]:
    """Absolute paths to leave out; relative ones count from the directory.

    A file has one path a line, `#` before a comment, and a JSON string where a name holds a
    newline or begins with `#` or `"`.
    """
    if exclude is None:
        return set()
    if isinstance(exclude, str | os.PathLike):
        try:
            with open(exclude, encoding="utf-8", errors="surrogateescape") as file:
                lines = [line.rstrip("\r\n") for line in file]
        except OSError as error:
            raise NotFoundError(
                f"The exclude list {os.fspath(exclude)!r} cannot be read: {error.strerror}."
            ) from None
        try:
            exclude = [
                json.loads(line) if line.startswith('"') else line
                for line in lines
                if line.strip() and not line.startswith("#")
            ]
        except ValueError as error:
            raise InputError(
                f"The exclude list {os.fspath(exclude)!r} has a line that begins with a quotation "
                f"mark and is no JSON string: {error}."
            ) from None
    return {os.path.abspath(os.path.join(directory, os.fspath(path))) for path in exclude}
