"""Folders of images as batches: the same bytes on every backend, for any number of workers.

`image_dataset_from_directory` finds the images and their classes; `ImageDataset`, a
`keras.utils.PyDataset`, reads them. Whatever is random about an image comes from a generator
seeded with (seed, epoch, position of the image in `file_paths`), and about a batch with (seed,
epoch, position of the batch), so a batch depends on (seed, epoch, index) alone.

An image that cannot be read is left out of its batch, which is then smaller by one; no other image
moves, and it is tried again in the next epoch. `verify` (one decode of every file) drops such ones.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import numpy as np
from PIL import Image

from keras_resnet.data.folders import Stream, flat, generator, mixed_with, part_of
from keras_resnet.data.items import Item, Source, taken
from keras_resnet.data.labels import checked_labels, checked_mode, described, encoded, printed
from keras_resnet.data.mixing import Mix, smooth_labels
from keras_resnet.data.order import epoch_order
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.reading import ImageCache, ReadAhead, in_flight, load, stacked
from keras_resnet.system.device import in_data_format
from keras_resnet.system.errors import DataError, InputError, NotFoundError, between, one_of, whole
from keras_resnet.system.process import default_threads
from keras_resnet.system.shown import Shown

logger = logging.getLogger("keras_resnet")

_PREFETCH_BYTES = 256 * 2**20  # batches that wait, at most


class Batch(NamedTuple):
    """One batch with the positions of its images in `file_paths`; weights stand with the labels."""

    images: np.ndarray
    labels: np.ndarray | tuple[np.ndarray, np.ndarray] | None
    indices: np.ndarray


class ImageDataset(Shown, keras.utils.PyDataset):
    """Batches of images from files.

    Threads read ahead, whether batches are asked for by iterating, by `[index]` in order, or by
    Keras. Keras' own `workers` stay at 1: its queue keeps batches of a past epoch (TensorFlow
    backend). `fit` asks for batches in an order of its own unless it is called with
    `shuffle=False`; give that: the images are shuffled here, and runs can be repeated.

    Attributes:
        file_paths: all paths, in the order of the labels; or a `Source`.
        labels: int32, aligned with `file_paths`, or tuples of several; None where there are none.
        class_names: the name of each label; None where there are none.
        weights: float32, what each image counts, as a labelled `Source` says; a batch's third part.
        seed: of everything random.
        threads: that read ahead; 0 reads in the caller's thread.
        part: (which, of how many): of each batch, the part that this process reads.
        epoch: counts completed passes; set it with `set_epoch` to continue a run.
        failure: the exception that ended a batch, where a backend hides it behind its own.
        empty: makes the array that a batch is put together in; `np.empty`, unless a device asks
            for memory of its own kind.
    """

    def __init__(
        self,
        file_paths: Sequence[str | os.PathLike],
        labels: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        *,
        label_mode: str | None = "int",
        preprocess: Preprocess | None = None,
        augment: Callable | None = None,
        batch_size: int | None = 32,
        shuffle: bool = True,
        seed: int | None = None,
        workers: int | None = None,
        cache: str | os.PathLike | None = None,
        output: str = "uint8",
        on_error: str = "skip",
        drop_last: bool | str = False,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        repeats: int = 1,
        sampler: str | None = None,
        verify: bool = False,
        data_format: str = "channels_last",
    ) -> None:
        """Arguments are those of `image_dataset_from_directory`."""
        one_of("data_format", data_format, ("channels_last", "channels_first"))
        one_of("label_mode", label_mode, ("int", "categorical", "binary", "multi_hot", None))
        one_of("output", output, ("uint8", "float32", "pixels"))
        one_of("on_error", on_error, ("skip", "raise"))
        one_of("drop_last", drop_last, (False, True, "auto"))
        self.batched = batch_size is not None
        batch_size = whole("batch_size", batch_size, 1) if self.batched else 1
        whole("repeats", repeats, 1)
        one_of("sampler", sampler, (None, "balanced"))
        for name, value in (("seed", seed), ("workers", workers)):
            whole(name, 0 if value is None else value, 0)
        between("label_smoothing", label_smoothing, 0, 1, ends="[)")

        lazy = isinstance(file_paths, Source)
        self.file_paths = file_paths if lazy else [os.fspath(path) for path in file_paths]
        if not self.file_paths:
            raise DataError("A dataset needs at least one image. Received: none.")
        self.labels, self.class_names = checked_labels(labels, class_names, len(self.file_paths))
        self.preprocess = Preprocess() if preprocess is None else preprocess
        self.augment = augment
        self.batch_size, self.shuffle = batch_size, bool(shuffle or sampler)
        self.seed = int(np.random.SeedSequence().entropy % 2**32 if seed is None else seed)
        self.cache = None if cache is None else os.fspath(cache)
        self.output, self.data_format = output, data_format
        self.on_error, self.drop_last, self.sampler = on_error, drop_last, sampler
        self.label_smoothing, self.repeats = float(label_smoothing), int(repeats)
        self.mix = Mix(mixup, cutmix) if mixup or cutmix else None
        self.threads = default_threads() if workers is None else int(workers)
        self.epoch, self.part = 0, (0, 1)
        self.weights = None if labels is None else getattr(file_paths, "weights", None)
        self.failure: Exception | None = None

        names = None if self.labels is None else self.class_names
        soft = self.mix is not None or self.label_smoothing > 0
        self.label_mode = checked_mode(label_mode, names, soft, sampler, self.labels)
        self._skipped: dict[str, str] = {}
        self._order: tuple[int, np.ndarray] | None = None
        self._begun = self._finished = self._iterated = False
        self._lock = threading.Lock()
        self._ahead: ReadAhead | None = None
        self.empty: Callable[..., np.ndarray] = np.empty
        self._cache = ImageCache(self.cache)
        super().__init__()
        if verify:
            self.verify()

    @classmethod
    def from_files(
        cls,
        paths: Sequence[str | os.PathLike],
        labels: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        **arguments: Any,
    ) -> ImageDataset:
        """Builds a dataset from a list of files, without a look at folders.

        Raises:
            NotFoundError: one of the files does not exist.
        """
        for path in paths:
            if not isinstance(path, Item) and not os.path.exists(path):
                raise NotFoundError(f"{os.fspath(path)!r} does not exist.")
        return cls(paths, labels, class_names, **arguments)

    # What is known about the data.

    @property
    def num_samples(self) -> int:
        """Images in the dataset."""
        return len(self.file_paths)

    @property
    def class_counts(self) -> dict[str, int]:
        """Images of each class, by name."""
        if self.labels is None:
            return {}
        counts = np.bincount(flat(self.labels), minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(path, reason) of every image that could not be read so far, sorted by path."""
        with self._lock:
            return sorted(self._skipped.items())

    _shown, __str__ = described, printed

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self._epoch_order()[1]), self.batch_size)
        drop = self.drop_last is True or (self.drop_last == "auto" and rest == 1)
        return full + bool(rest and not (drop and full))

    # The order of an epoch.

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0, that order and augmentation are drawn for."""
        whole("epoch", epoch, 0)
        self.epoch = int(epoch)
        self._begun = self._finished = self._iterated = False

    def on_epoch_begin(self) -> None:
        """Notes that Keras begins a pass."""
        self._begun, self._finished = True, False

    def on_epoch_end(self) -> None:
        """Moves on to the next epoch after a complete pass; Keras calls it.

        Keras also calls it where no pass was made (at the start of `fit`, and after it has built a
        model from one batch), how often depends on the backend: those calls count for nothing.
        """
        if (self._begun and self._finished) or self._iterated:
            self.epoch += 1
        self._begun = self._finished = self._iterated = False

    def _epoch_order(self) -> tuple[int, np.ndarray]:
        """The epoch and the positions of its images, in order."""
        epoch, order = self.epoch, self._order
        if order is not None and order[0] == epoch:
            return order
        positions = epoch_order(
            self.num_samples, self.labels, generator(self.seed, Stream.ORDER, epoch),
            shuffle=self.shuffle, sampler=self.sampler, repeats=self.repeats,
        )  # fmt: skip
        self._order = (epoch, positions)
        return self._order

    def batch_indices(self, index: int) -> np.ndarray:
        """Positions in `file_paths` of the images of a batch, unreadable ones included."""
        start = self._checked(index) * self.batch_size
        return self._epoch_order()[1][start : start + self.batch_size]

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Batch {index} of {len(self)}.")
        return index % len(self)

    # Batches.

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        """Reads batch `index` of the current epoch.

        Returns:
            (images, labels), or images alone without labels. Images are (n, height, width,
            channels), or (n, channels, height, width) with `data_format="channels_first"`; of the
            type that `output` says. With `batch_size=None` one image, without the first axis.

        Raises:
            DataError: an unreadable image with `on_error="raise"`; a batch without any readable
                one; images of different sizes.
        """
        return self._as_fed(self.read_batch(index))

    def _as_fed(self, batch: Batch) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        images, labels = in_data_format(batch.images, self.data_format), batch.labels
        parts = (images, *(labels if isinstance(labels, tuple) else (labels,)))
        if not self.batched:
            parts = tuple(None if part is None else part[0] for part in parts)
        return parts[0] if labels is None else parts

    def read_batch(self, index: int) -> Batch:
        """Reads batch `index`, channels last, with the positions of the images that it holds."""
        index = self._checked(index)
        self._finished |= index == len(self) - 1
        return self._fetch(*self._epoch_order(), index)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray] | np.ndarray]:
        """Gives the batches of the current epoch in order."""
        for batch in self.batches():
            yield self._as_fed(batch)

    def batches(self) -> Iterator[Batch]:
        """Iterates like the dataset itself, channels last, with the positions of the images."""
        epoch, order = self._epoch_order()
        for index in range(len(self)):
            try:
                batch = self._fetch(epoch, order, index)
            except DataError:
                if self.batched or self.on_error == "raise":
                    raise
                continue  # one image, which is then among those skipped
            yield batch
        self._iterated = True

    def _fetch(self, epoch: int, order: np.ndarray, index: int) -> Batch:
        """Reads a batch, or takes it from those read ahead, and lets the threads read on."""
        if self._ahead is None:
            self._ahead = ReadAhead(self.threads)

        def parts(number: int) -> list[Callable[[], list[tuple | None]]]:
            # In parts of a few images: were a batch one thread's, the others would wait for it at
            # the end of every epoch, and the model for the first one.
            positions = self._positions(order, number)
            size = max(1, len(positions) // (4 * self.threads or 1))
            return [
                lambda some=positions[i : i + size]: [self._one(epoch, order, p) for p in some]
                for i in range(0, max(1, len(positions)), size)
            ]

        try:
            join = functools.partial(self._assemble, epoch, order)
            depth = self._batches_ahead()
            return self._ahead.get(epoch, index, parts, join, count=len(self), depth=depth)
        except Exception as error:
            self.failure = error
            raise

    def _positions(self, order: np.ndarray, index: int, part: tuple | None = None) -> range:
        """Where the images of a batch stand in the order of the epoch: of this process' part."""
        whole = range(len(order))[index * self.batch_size : (index + 1) * self.batch_size]
        return part_of(whole, *(part or self.part))

    def _assemble(
        self, epoch: int, order: np.ndarray, index: int, pictures: list[tuple | None]
    ) -> Batch:
        """Puts the images of a batch, as `_one` gives them, together."""
        positions, whole = (self._positions(order, index, p) for p in (self.part, (0, 1)))
        erasing = getattr(self.augment, "erasing", None)
        found = [(p, read) for p, read in zip(positions, pictures, strict=True) if read is not None]
        if not found and all(self._one(epoch, order, p) is None for p in whole):
            path = self.file_paths[order[whole[0]]]
            raise DataError(
                f"None of the {len(whole)} images of batch {index} can be read; the first: "
                f"{self._skipped[path]} Build the dataset with verify=True to drop such images."
            )
        borrows = self.part != (0, 1) and self.mix is not None and bool(found)
        if borrows:  # its first image is mixed with the last one before it that can be read
            others = mixed_with(whole, positions.start)
            tried = ((p, self._one(epoch, order, p)) for p in others)
            found.insert(0, next(one for one in tried if one[1] is not None))
        samples = order[[position for position, _ in found]]
        pixels, names = [r[0] for _, r in found], [self.file_paths[i] for i in samples]
        none = (0, *self._fed_size(), self.preprocess.channels)
        images = stacked(pixels, names, self.empty) if found else np.zeros(none, np.uint8)
        if self.output == "float32":
            images = self.preprocess.normalize(images)
        elif self.output == "pixels":
            images = images.astype(np.float32)
        value = None if erasing is None else erasing.value_in(self.preprocess, self.output)
        for place, (_, (_, window)) in enumerate(found):
            if window is not None:
                images[place] = erasing.apply(images[place], window, value)
        labels = weights = None
        if self.labels is not None and self.label_mode is not None:
            weights = None if self.weights is None else self.weights[samples]
            labels = encoded(self.labels[samples], self.label_mode, len(self.class_names))
        if self.mix is not None:
            rng = generator(self.seed, Stream.MIX, epoch, index)
            images, labels, weights = self.mix.weighed(images, labels, weights, rng)
        if borrows:
            images, labels, samples = images[1:], labels[1:], samples[1:]
            weights = weights if weights is None else weights[1:]
        if self.label_smoothing:
            labels = smooth_labels(labels, self.label_smoothing, self.label_mode != "categorical")
        return Batch(images, labels if weights is None else (labels, weights), samples)

    def _one(self, epoch: int, order: np.ndarray, position: int) -> tuple | None:
        """The image at a position of the epoch and where to erase it; None if unreadable."""
        sample = int(order[position])
        # Each copy of an image gets its own randomness; those of a repeated one stand in a row.
        copy = position if self.sampler else position % self.repeats
        rng = generator(self.seed, Stream.IMAGE, epoch, sample, copy)
        try:
            pixels = self._pixels(sample, rng)
        except (DataError, NotFoundError) as error:
            if self.on_error == "raise":
                raise
            self._skip(self.file_paths[sample], str(error))
            return None
        erasing = getattr(self.augment, "erasing", None)
        return pixels, None if erasing is None else erasing.sample(*pixels.shape[:2], rng)

    @in_flight
    def _pixels(self, sample: int, rng: np.random.Generator) -> np.ndarray:
        """One uint8 image as it is fed."""
        image = self._source(sample)
        if self.augment is None:
            return image
        try:
            return self.augment(image, rng)
        except InputError as error:
            raise InputError(f"{self.file_paths[sample]!r}: {error}") from error

    def _source(self, sample: int) -> np.ndarray | Image.Image:
        """What is not random about an image: the finished one, or the decoded one to augment."""
        path = self.file_paths[sample]
        if self.augment is None:
            return self._cache.get(path, self.preprocess.pixels, self.preprocess.to_json())
        if not self._cache:
            return self._decoded(path)
        how = f"decoded {self.preprocess.color_mode} exif={self.preprocess.exif}"
        return self._cache.get(path, lambda path: np.asarray(self._decoded(path)), how)

    def _decoded(self, path: str) -> np.ndarray | Image.Image:
        return load(path, exif=self.preprocess.exif, color_mode=self.preprocess.color_mode)

    def _skip(self, path: str, reason: str) -> None:
        with self._lock:
            new = path not in self._skipped
            self._skipped[path] = reason
        if new:
            logger.warning("Skipped: %s", reason)

    # Looking at the data.

    def verify(self) -> list[tuple[str, str]]:
        """Decodes every image once, and drops those that cannot be read from the dataset.

        With `cache` the decoded images are kept, and not decoded again.

        Returns:
            (path, reason) of each one dropped.

        Raises:
            DataError: no image can be read, or with `on_error="raise"` the first that cannot.
        """

        def reason(sample: int) -> Exception | None:
            try:
                self._source(sample)
            except (DataError, NotFoundError) as error:
                return error
            return None

        with ThreadPoolExecutor(self.threads or 1, "keras_resnet-verify") as pool:
            errors = list(pool.map(reason, range(self.num_samples)))
        bad = [(self.file_paths[i], str(e)) for i, e in enumerate(errors) if e is not None]
        if bad and self.on_error == "raise":
            raise next(e for e in errors if e is not None)
        count = self.num_samples
        if len(bad) == count:
            raise DataError(f"None of the {count} images can be read; the first: {bad[0][1]}")
        if bad:
            good = [i for i, e in enumerate(errors) if e is None]
            self.file_paths = taken(self.file_paths, good)
            self.labels = None if self.labels is None else self.labels[good]
            self.weights = None if self.weights is None else self.weights[good]
            self._order = self._ahead = None
            for path, why in bad:
                self._skip(path, why)
        return bad

    def take_samples(self, count: int) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
        """The first images of the epoch as they are fed, before normalisation and mixing.

        Returns:
            uint8 (n, height, width, channels), int32 labels (n,) or None, their paths. n may be
            smaller than `count`: unreadable images are left out.
        """
        epoch, order = self._epoch_order()
        reads = ((int(i), self._one(epoch, order, place)) for place, i in enumerate(order))
        found = list(itertools.islice(((i, read[0]) for i, read in reads if read), count))
        if not found:
            raise DataError(f"None of the {self.num_samples} images can be read.")
        indices = [i for i, _ in found]
        labels = None if self.labels is None else self.labels[indices]
        return np.stack([p for _, p in found]), labels, [self.file_paths[i] for i in indices]

    def _fed_size(self) -> tuple[int | None, int | None]:
        return getattr(self.augment, "output_size", None) or self.preprocess.output_shape[:2]

    def _batches_ahead(self) -> int:
        height, width = self._fed_size()
        pixel = 1 if self.output == "uint8" else 4
        size = self.batch_size * (height or 256) * (width or 256) * self.preprocess.channels * pixel
        return max(self.threads, min(2 * self.threads + 2, _PREFETCH_BYTES // size))

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out threads, lock and cached images: another process makes its own."""
        own = {"_lock": None, "_ahead": None, "_cache": None, "empty": np.empty}
        return {**self.__dict__, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what `__getstate__` gave."""
        self.__dict__.update(state, _lock=threading.Lock(), _cache=ImageCache(state["cache"]))
