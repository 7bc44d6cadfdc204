"""A look at an image folder before training: what is broken, double, mislabelled or lopsided.

`scan` reads every image once and deletes nothing; its report prints as a table, writes JSON, a
sheet of the worst images, and a list of files for `exclude=` of `image_dataset_from_directory`.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keras_resnet.data.folders import existing_folder, layout, plain_name, split_folders
from keras_resnet.data.items import Source, content_hash
from keras_resnet.data.looking import constant_images, file_head, load_shown
from keras_resnet.data.opening import no_columns, opened
from keras_resnet.data.reading import in_flight, read
from keras_resnet.data.walk import ENDINGS, FORMATS, extension, unread, unread_line, walk_pictures
from keras_resnet.system.errors import DataError, KerasResNetError
from keras_resnet.system.files import column, printable, replace_file, write_text
from keras_resnet.system.process import default_threads
from keras_resnet.system.shown import Shown


@dataclass(repr=False)
class ScanReport(Shown):
    """What `scan` found.

    Attributes:
        directory: that was scanned.
        pictures: files with an image's extension.
        splits: {"train", "val" or "test": the name of its folder}, where there are any.
        layout: the same in words.
        class_counts: {split: {class: readable images}}; the split is "" without train/ and val/.
        imbalance: {split: largest class / smallest class}.
        unreadable: (path, reason).
        wrong_extensions: (path, format that it really is).
        exact_duplicates: groups of files with the same bytes (SHA-256).
        near_duplicates: (path, path, distance): perceptual hashes that differ in few of 128 bits.
        across_splits: (path, path, "exact" or "near"): the same image in two splits.
        label_conflicts: (path, path, "exact" or "near"): the same image in two classes.
        alike_splits: (path, path, distance): images in two splits that are alike to a model.
        label_errors: (path, label, likely label, probability of it): suspected by a model.
        out_of_fold: Fraction of the labels that the model's vectors say right; below 0.8 the
            suspects are more likely its own errors, and no label is left out for them.
        constant: (path, mode) of 16-bit gray or float images whose values all become one in 8 bits.
        other_files: {extension: files} that are not read.
        not_read: the same in one line, with the reasons.
        formats: {format: images}.
        modes: {Pillow mode: images}.
        rotated: images whose EXIF orientation asks for a turn.
        sizes: smallest, median and largest width, height and width / height.
        smallest: paths of the images with the fewest pixels.
        mean: of each RGB channel over all pixels, in 0..1.
        std: the same.
    """

    directory: str
    pictures: int = 0
    splits: dict[str, str] = field(default_factory=dict)
    layout: str = ""
    class_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    imbalance: dict[str, float] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    wrong_extensions: list[tuple[str, str]] = field(default_factory=list)
    exact_duplicates: list[list[str]] = field(default_factory=list)
    near_duplicates: list[tuple[str, str, int]] = field(default_factory=list)
    across_splits: list[tuple[str, str, str]] = field(default_factory=list)
    label_conflicts: list[tuple[str, str, str]] = field(default_factory=list)
    alike_splits: list[tuple[str, str, float]] = field(default_factory=list)
    label_errors: list[tuple[str, str, str, float]] = field(default_factory=list)
    out_of_fold: float = 0.0
    constant: list[tuple[str, str]] = field(default_factory=list)
    other_files: dict[str, int] = field(default_factory=dict)
    not_read: str = ""
    formats: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    rotated: int = 0
    sizes: dict[str, list[float]] = field(default_factory=dict)
    smallest: list[str] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    # Split and classes of a source that is no folder.
    _places: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {}

    def to_json(self) -> str:
        """Returns everything as JSON text."""
        return json.dumps(asdict(self), indent=1)

    def _shown(self):
        rows = [
            (title, len(items), ", ".join("  ".join(map(self._short, item)) for item in items[:3]))
            for title, items in self._troubles()
            if items
        ]
        found = sum(count for _, count, _ in rows)
        classes = len({name for counts in self.class_counts.values() for name in counts} - {""})
        line = f"{self.directory!r}, {self.pictures:,} images, {classes} classes, "
        line += f"{found:,} findings" if found else "nothing wrong"
        return line, ("Trouble", "Found", "The first of them"), rows

    def __str__(self) -> str:
        """A table, with the first few files of every kind of trouble."""
        below = self.directory if self._places else os.path.relpath(self.directory)
        shown = self.directory if below.startswith(os.pardir) else below
        lines = [f"{shown!r}: {self.pictures} images"]
        lines += [f"  {text}" for text in (self.layout, self.not_read) if text]
        for split, counts in self.class_counts.items():
            total = f"  {split or 'all':12} {sum(counts.values()):7}"
            if set(counts) == {""}:
                lines.append(f"{total} without labels")
                continue
            ratio = self.imbalance[split]
            lines.append(f"{total} in {len(counts)} classes, largest / smallest {ratio:.3g}")
            if ratio > 3 and split in ("", "train"):
                lines[-1] += ": train with --class-weights balanced, or --sampler balanced"
            most = max(1, *counts.values())
            rows = [
                f"    {column(name or 'no label', 24)} {count:7}  {'#' * round(40 * count / most)}"
                for name, count in sorted(counts.items(), key=lambda item: -item[1])
            ]
            if len(rows) > 20:  # the largest and the smallest
                rows[10:-10] = [f"    ... and {len(rows) - 20} between"]
            lines += rows
        for title, items in self._troubles():
            lines.append(f"  {title:44} {len(items):6}")
            for item in items[:5]:
                lines.append("    " + "  ".join(self._short(part) for part in item))
            if len(items) > 5:
                lines.append(f"    ... and {len(items) - 5} more")
        lines.append(f"  {'turned by EXIF (ignored unless exif=True)':44} {self.rotated:6}")
        for title, counts in (("formats", self.formats), ("modes", self.modes)):
            if counts:
                listed = ", ".join(f"{n} {name}" for name, n in counts.items())
                lines.append(f"  {title:44} {listed}")
        for name, values in self.sizes.items():
            low, median, high = (f"{v:.4g}" for v in values)
            lines.append(f"  {name:44} {low} to {high}, median {median}")
        if self.mean:
            lines.append(f"  {'mean of the channels':44} {_numbers(self.mean)}")
            lines.append(f"  {'standard deviation':44} {_numbers(self.std)}")
        return "\n".join(lines)

    def _troubles(self) -> list[tuple[str, list[Sequence[Any]]]]:
        found: list[tuple[str, list[Sequence[Any]]]] = [
            ("cannot be read", self.unreadable),
            ("extension and content differ", self.wrong_extensions),
            ("one constant in 8 bits (16-bit gray, float)", self.constant),
            ("groups with the same bytes", self.exact_duplicates),
            ("pairs that look alike", self.near_duplicates),
            ("the same image in two splits", self.across_splits),
            ("the same image in two classes", self.label_conflicts),
        ]
        if self.out_of_fold or self.alike_splits:  # a model has looked
            found.append(("alike to the model in two splits", self.alike_splits))
            name = f"suspected labels (others right: {self.out_of_fold:.0%})"
            found.append((name, self.label_errors))
        return found

    def _short(self, part: Any) -> str:
        if isinstance(part, str) and part.startswith(self.directory) and not self._places:
            return repr(os.path.relpath(part, self.directory))
        return printable(part)

    def exclude_list(self) -> list[str]:
        """Files that training does better without.

        Unreadable ones; of equal files all but one; of files equal across splits the training
        copies, so that the validation set stays as it is; every copy of a file that lies in two
        classes of the training split. Images that merely look alike stay. What a model suspects of
        the training split: labels, and images that are alike to it in another split.
        """
        labels = self.label_errors if self.out_of_fold >= 0.8 else []
        suspects = [path for path, *_ in (*labels, *self.alike_splits)]
        out = {path for path in suspects if self.split_of(path) in ("", "train")}
        out |= {path for path, _ in self.unreadable}
        for group in self.exact_duplicates:
            training = [p for p in group if self.split_of(p) in ("", "train")]
            elsewhere = len(training) < len(group)
            conflicting = len({self.class_of(p) for p in training}) > 1
            out.update(training if elsewhere or conflicting else training[1:])
        return sorted(out)

    def write_exclude_list(self, path: str | os.PathLike) -> int:
        """Writes `exclude_list` for `exclude=`, one absolute path a line; returns how many."""
        out = [os.path.abspath(p) for p in self.exclude_list()]
        lines = [f"# {len(out)} files that keras_resnet scan suggests to leave out"]
        for name in out:
            plain = name.isprintable() and not name.startswith(("#", '"'))
            lines.append(name if plain else json.dumps(name))
        write_text(path, "\n".join(lines) + "\n")
        return len(out)

    def split_of(self, path: str) -> str:
        """The split that a file lies in, "" where the folder has none."""
        return self._place(path)[0]

    def class_of(self, path: str) -> str:
        """The class folder that a file lies in, or its label; "" where it has none."""
        return "|".join(self._place(path)[1])

    def _place(self, path: str) -> tuple[str, tuple[str, ...]]:
        if self._places:
            return self._places[path]
        parts = os.path.relpath(path, self.directory).split(os.sep)[:-1]
        kinds = {folder: kind for kind, folder in self.splits.items()}
        split = kinds[parts.pop(0)] if parts and parts[0] in kinds else ""
        return split, (plain_name(parts[0]) if parts else "",)

    def save_sheet(self, path: str | os.PathLike, limit: int = 60) -> int:
        """Draws the images that are wrong with their trouble and name; returns how many are drawn.

        What is wrong is marked in red; beside a copy stands the image that it is one of, unmarked.

        Args:
            path: of the image to write; its extension says the format.
            limit: images at most, shared among the kinds of trouble.

        Raises:
            DataError: the file cannot be written.
        """
        groups = [
            ("cannot be read", [item[:1] for item in self.unreadable]),
            ("two classes", [item[:2] for item in self.label_conflicts]),
            ("two splits", [item[:2] for item in self.across_splits]),
            ("same bytes", [item[:2] for item in self.exact_duplicates]),
            ("alike", [item[:2] for item in self.near_duplicates]),
            ("extension", [item[:1] for item in self.wrong_extensions]),
            ("one constant", [item[:1] for item in self.constant]),
            ("alike in two splits", [item[:2] for item in self.alike_splits]),
            *((f"{true}: {likely}?", [(path,)]) for path, true, likely, _ in self.label_errors),
        ]
        groups = [(title, items) for title, items in groups if items]
        share = max(2, limit // max(len(groups), 1))
        tiles = [
            ("" if number == 0 and title in ("same bytes", "alike") else title, name)
            for title, items in groups
            for number, name in [pair for item in items for pair in enumerate(item)][:share]
        ][:limit]
        side, caption, columns = 160, 30, 6
        rows = max(1, -(-len(tiles) // columns))
        sheet = Image.new("RGB", (columns * side, rows * (side + caption)), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
        if not tiles:
            draw.text((4, 4), "Nothing is wrong.", fill="black", font=font)
        for number, (title, name) in enumerate(tiles):
            left, top = number % columns * side, number // columns * (side + caption)
            try:
                thumbnail = load_shown(name)
                if isinstance(thumbnail, np.ndarray):
                    thumbnail = Image.fromarray(thumbnail)
                thumbnail.thumbnail((side - 6, side - 6))
                sheet.paste(thumbnail, (left + 3, top + 3))
            except KerasResNetError:
                draw.rectangle((left + 3, top + 3, left + side - 4, top + side - 4), fill="#dddddd")
            shown = name if self._places else os.path.relpath(name, self.directory)
            shown = shown.encode("ascii", "replace").decode()
            shown = shown if len(shown) <= 26 else "..." + shown[-23:]
            draw.text((left + 4, top + side), title, fill="#b00000", font=font)
            draw.text((left + 4, top + side + 13), repr(shown)[1:-1], fill="black", font=font)
        try:
            replace_file(path, sheet.save)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"The sheet {os.fspath(path)!r} cannot be written: {reason}."
            ) from error
        return len(tiles)


def scan(
    directory: str | os.PathLike | Source, *, threshold: int = 6, workers: int | None = None
) -> ScanReport:
    """What `keras_resnet.scan` reports without a model; arguments and errors are said there."""
    source = opened(directory, no_columns(directory, "weight"))
    paths: Sequence[str] = ()
    other: Sequence[str] = ()
    parts: dict[str, str] = {}
    if isinstance(source, Source):
        directory, paths = source.place, source
    else:
        directory = os.path.abspath(existing_folder(source))
        paths, other = walk_pictures(directory)
        parts = split_folders(directory)
    if not paths:
        raise DataError(
            f"{directory!r} holds no image: {len(other)} other files. Images end in {ENDINGS}."
        )
    threads = workers or default_threads()
    with ThreadPoolExecutor(threads, "keras_resnet-scan") as pool:
        looks = list(pool.map(_look, paths))
    report = ScanReport(directory, len(paths))
    report.unreadable = [(p, x) for p, x in zip(paths, looks, strict=True) if isinstance(x, str)]
    good = [(p, x) for p, x in zip(paths, looks, strict=True) if not isinstance(x, str)]
    report.splits = {kind: os.path.basename(path) for kind, path in parts.items()}
    if isinstance(source, Source):
        report._places, report.layout = _places(source), " ".join(source.notes)
    else:
        report.layout = layout(directory, parts)
    report.other_files = _counted(map(extension, other))
    report.not_read = unread_line(unread(other))
    deep = [path for path, look in good if look["mode"].startswith(("I", "F"))]
    report.constant = constant_images(deep, threads)
    _count_classes(report, paths, [path for path, _ in good])
    if good:
        _describe(report, good)
        _find_duplicates(report, good, threshold)
    return report


def _places(source: Source) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The split and the classes of each image that is no file of a folder; "" is none."""
    names, labels, splits = [*(source.class_names or []), ""], source.labels, source.splits

    def classes(index: int) -> tuple[str, ...]:
        label = -1 if labels is None or labels[index] is None else labels[index]
        return tuple(names[k] for k in (label or (-1,) if type(label) is tuple else (label,)))

    return {
        name: ("" if splits is None else splits[i], classes(i)) for i, name in enumerate(source)
    }


@in_flight
def _look(path: str) -> dict[str, Any] | str:
    """Everything to know about one image; the reason where it cannot be read."""
    try:
        pixels = load_shown(path)
        _, data = read(path)
        kind, mode, turn = "array", "RGB" if np.ndim(data) == 3 else "L", 1
        if isinstance(data, bytes):
            kind, mode, _, turn = file_head(data, orientation=True)
        image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
        return {
            "sha256": content_hash(data),
            "hash": difference_hash(image),
            "format": kind,
            "mode": mode,
            "turned": turn in range(2, 9),
            "size": image.size,
            "counts": np.reshape(image.histogram(), (3, 256)),
        }
    except KerasResNetError as error:
        return str(error)
    except Exception as error:  # a file that changed since, or EXIF data that Pillow cannot read
        return f"{path!r} cannot be read: {type(error).__name__}: {error}"


def _counted(items: Iterable[str]) -> dict[str, int]:
    return dict(Counter(items).most_common())


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _count_classes(report: ScanReport, paths: Sequence[str], readable: Sequence[str]) -> None:
    """Counts readable images; a class of which none can be read counts 0."""
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for step, those in ((0, paths), (1, readable)):
        for path in those:
            split, names = report._place(path)
            for name in names:
                counts[split][name] = counts[split].get(name, 0) + step
    report.class_counts = dict(counts)
    report.imbalance = {
        split: max(numbers.values()) / max(min(numbers.values()), 1)
        for split, numbers in counts.items()
    }


def _describe(report: ScanReport, good: Sequence[tuple[str, dict[str, Any]]]) -> None:
    report.formats = _counted(look["format"] for _, look in good)
    report.modes = _counted(look["mode"] for _, look in good)
    report.rotated = sum(look["turned"] for _, look in good)
    report.wrong_extensions = [
        (path, look["format"])
        for path, look in good
        if look["format"] in FORMATS
        and os.path.splitext(path)[1].lower() not in FORMATS[look["format"]]
    ]
    width, height = np.array([look["size"] for _, look in good]).T
    shapes = {"width": width, "height": height, "width / height": width / height}
    for name, values in shapes.items():
        report.sizes[name] = [float(f(values)) for f in (np.min, np.median, np.max)]
    report.smallest = [good[i][0] for i in np.argsort(width * height, kind="stable")[:6]]
    counts = np.sum([look["counts"] for _, look in good], axis=0)
    total, values = counts.sum(1), np.arange(256)
    mean = counts @ values / total / 255
    std = np.sqrt(np.maximum(counts @ values**2 / total / 255**2 - mean**2, 0))
    report.mean, report.std = mean.tolist(), std.tolist()


def _find_duplicates(
    report: ScanReport, good: Sequence[tuple[str, dict[str, Any]]], threshold: int
) -> None:
    paths = [path for path, _ in good]
    by_hash = defaultdict(list)
    for path, look in good:
        by_hash[look["sha256"]].append(path)
    report.exact_duplicates = [group for group in by_hash.values() if len(group) > 1]

    # One of each group of equal files stands for it.
    first = {group[0] for group in by_hash.values()}
    kept = [i for i, path in enumerate(paths) if path in first]
    bits = np.array([good[i][1]["hash"] for i in kept])
    report.near_duplicates = [
        (paths[kept[a]], paths[kept[b]], distance) for a, b, distance in near_pairs(bits, threshold)
    ]

    for found, of in (
        (report.across_splits, report.split_of),
        (report.label_conflicts, lambda path: report.class_of(path) or None),  # none is no other
    ):
        for group in report.exact_duplicates:
            found += [(a, b, "exact") for a, b in _apart(group, of)]
        for a, b, _ in report.near_duplicates:
            found += [(*pair, "near") for pair in _apart([a, b], of)]


def _apart(group: Sequence[str], of: Callable[[str], Any]) -> list[tuple[str, str]]:
    """Each file with the first one of every other split or class: all pairs would be too many."""
    first: dict[Any, str] = {}
    for path in group:
        first.setdefault(of(path), path)
    first.pop(None, None)
    place = {path: i for i, path in enumerate(group)}
    pairs = {
        tuple(sorted((path, other), key=place.__getitem__))
        for path in group
        for kind, other in first.items()
        if of(path) not in (kind, None)
    }
    return sorted(pairs, key=lambda pair: [place[path] for path in pair])


# --- which images are alike, by a few bits of each ------------------------------------------------


def difference_hash(image: Image.Image) -> np.ndarray:
    """128 bits: whether brightness rises to the right and downwards, on a grid of 9 x 9.

    The gradient hash of Krawetz ("Kind of Like That", hackerfactor.com, 2013), in both directions.
    """
    grid = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BOX), np.int16)
    right = grid[:8, 1:] > grid[:8, :-1]
    down = grid[1:, :8] > grid[:-1, :8]
    return np.concatenate([right.ravel(), down.ravel()])


def near_pairs(bits: np.ndarray, threshold: int) -> list[tuple[int, int, int]]:
    """All pairs of rows that differ in at most `threshold` bits: (row, row, distance), sorted.

    Cut into threshold + 1 bands, two such rows agree in one band at least (pigeonhole), so only
    rows that share a band are compared: no pair is missed, and few are compared in vain.
    Bits are bool (rows, bits), more than the threshold.
    """
    found: dict[tuple[int, int], int] = {}
    packed = np.packbits(bits, axis=1)
    ones = np.array([bin(i).count("1") for i in range(256)], np.uint8)
    for band in np.array_split(np.arange(bits.shape[1]), threshold + 1):
        keys = np.packbits(bits[:, band], axis=1)
        _, group = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(group.ravel(), kind="stable")
        starts = np.flatnonzero(np.diff(group.ravel()[order], prepend=-1))
        for members in np.split(order, starts[1:]):
            for place, row in enumerate(members[:-1]):
                rest = members[place + 1 :]
                distance = ones[packed[rest] ^ packed[row]].sum(1, dtype=np.int64)
                for near in np.flatnonzero(distance <= threshold):
                    pair = (int(row), int(rest[near]))
                    found[min(pair), max(pair)] = int(distance[near])
    return sorted((a, b, distance) for (a, b), distance in found.items())
