"""Folders of pictures as batches: the same bytes on every backend, for any number of workers.

`image_dataset_from_directory` finds the pictures and their classes; `ImageDataset`, a
`keras.utils.PyDataset`, reads them. Whatever is random about a picture comes from a generator
seeded with (seed, epoch, position of the picture in `file_paths`), and about a batch with (seed,
epoch, position of the batch), so a batch depends on (seed, epoch, index) alone.

A picture that cannot be read is left out of its batch, which is then smaller by one; no other
picture moves. It is tried again in the next epoch: nothing depends on what was read before. Use
`verify` (one decode of every file) to drop such pictures from the dataset before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import numpy as np
from PIL import Image

from keras_resnet.data import augment, transforms
from keras_resnet.data.folders import _MIX, _ORDER, _PICTURE, _generator, _listed
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.reading import load
from keras_resnet.errors import DataError, InputError, NotFoundError
from keras_resnet.system.process import available_cores

logger = logging.getLogger("keras_resnet")

_PREFETCH_BYTES = 256 * 2**20  # batches that wait, at most


class Batch(NamedTuple):
    """One batch with the positions of its pictures in `file_paths`."""

    images: np.ndarray
    labels: np.ndarray | None
    indices: np.ndarray


def check_classes(dataset: ImageDataset, where: str = "The dataset") -> None:
    """Raises DataError unless there are pictures of two classes at least."""
    present = [name for name, count in dataset.class_counts.items() if count]
    if len(present) < 2:
        raise DataError(
            f"{where} has pictures of one class only ({_listed(present)}); a classifier needs two "
            f"or more class folders."
        )


# --- reading them --------------------------------------------------------------------------------


class ImageDataset(keras.utils.PyDataset):
    """Batches of pictures from files.

    Threads read ahead, whether batches are asked for by iterating, by `[index]` in order, or by
    Keras. Keras' own `workers` stay at 1: its queue keeps batches of a past epoch (TensorFlow
    backend). `fit` asks for batches in an order of its own unless it is called with
    `shuffle=False`; give that: the pictures are shuffled here, and runs can be repeated.

    Attributes:
        file_paths: all paths, in the order of the labels.
        labels: int32, aligned with `file_paths`; None where there are none.
        class_names: the name of each label.
        class_counts: pictures of each class.
        seed: of everything random.
        threads: that read ahead; 0 reads in the caller's thread.
        epoch: counts completed passes; set it with `set_epoch` to continue a run.
        skipped: (path, reason) of every picture that could not be read so far.
        failure: the exception that ended a batch, where a backend hides it behind its own.
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
        batch_size: int = 32,
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
        verify: bool = False,
        data_format: str = "channels_last",
    ) -> None:
        """Arguments are those of `image_dataset_from_directory`."""
        _one_of("data_format", data_format, ("channels_last", "channels_first"))
        _one_of("label_mode", label_mode, ("int", "categorical", "binary", None))
        _one_of("output", output, ("uint8", "float32"))
        _one_of("on_error", on_error, ("skip", "raise"))
        _one_of("drop_last", drop_last, (False, True, "auto"))
        _whole("batch_size", batch_size, 1)
        _whole("repeats", repeats, 1)
        if seed is not None:
            _whole("seed", seed, 0)
        if workers is not None:
            _whole("workers", workers, 0)
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}.")

        self.file_paths = [os.fspath(path) for path in file_paths]
        if not self.file_paths:
            raise DataError("A dataset needs at least one picture, got none.")
        self.labels, self.class_names = _checked_labels(labels, class_names, len(self.file_paths))
        self.preprocess = Preprocess() if preprocess is None else preprocess
        self.augment = augment
        self.batch_size = int(batch_size)
        self.shuffle = bool(shuffle)
        self.seed = int(np.random.SeedSequence().entropy % 2**32) if seed is None else int(seed)
        self.cache = None if cache is None else os.fspath(cache)
        self.output = output
        self.data_format = data_format
        self.on_error = on_error
        self.drop_last = drop_last
        self.label_smoothing = float(label_smoothing)
        self.repeats = int(repeats)
        self.mix = augment.Mix(mixup, cutmix) if mixup or cutmix else None
        self.threads = default_threads() if workers is None else int(workers)
        self.epoch = 0
        self.failure: Exception | None = None

        soft = self.mix is not None or self.label_smoothing > 0
        if soft and self.labels is None:
            raise InputError("mixup, cutmix and label_smoothing need labels.")
        if soft and label_mode == "binary":
            raise InputError("label_mode='binary' cannot hold mixed or smoothed labels.")
        if label_mode == "binary" and self.labels is not None and len(self.class_names) != 2:
            raise InputError(
                f"label_mode='binary' needs 2 classes, found {len(self.class_names)}: "
                f"{_listed(self.class_names)}."
            )
        self.label_mode = "categorical" if soft else label_mode

        self._skipped: dict[str, str] = {}
        self._cached: dict[int, np.ndarray] = {}
        self._cache_failed = False
        self._order: tuple[int, np.ndarray] | None = None
        self._begun = self._finished = self._iterated = False
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[tuple[int, int], Future] = {}
        self._last: tuple[int, int] | None = None
        if self.cache not in (None, "ram"):
            try:
                os.makedirs(self.cache, exist_ok=True)
            except OSError as error:
                raise DataError(f"The cache folder cannot be made: {error}") from error
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
            if not os.path.exists(path):
                raise NotFoundError(f"{os.fspath(path)!r} does not exist.")
        return cls(paths, labels, class_names, **arguments)

    # What is known about the data.

    @property
    def num_samples(self) -> int:
        """Pictures in the dataset."""
        return len(self.file_paths)

    @property
    def class_counts(self) -> dict[str, int]:
        """Pictures of each class, by name."""
        if self.labels is None:
            return {}
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(path, reason) of every picture that could not be read so far, sorted by path."""
        with self._lock:
            return sorted(self._skipped.items())

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self._epoch_order()[1]), self.batch_size)
        drop = self.drop_last is True or (self.drop_last == "auto" and rest == 1)
        return full + bool(rest and not (drop and full))

    # The order of an epoch.

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0, that order and augmentation are drawn for."""
        _whole("epoch", epoch, 0)
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
        """The epoch and the positions of its pictures, in order."""
        epoch, order = self.epoch, self._order
        if order is not None and order[0] == epoch:
            return order
        positions = np.arange(self.num_samples)
        if self.shuffle:
            positions = _generator(self.seed, _ORDER, epoch).permutation(self.num_samples)
        if self.repeats > 1:
            positions = augment.repeated_augmentation(positions, self.repeats)
        self._order = (epoch, positions)
        return self._order

    def batch_indices(self, index: int) -> np.ndarray:
        """Positions in `file_paths` of the pictures of a batch, unreadable ones included."""
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
            channels), or (n, channels, height, width) with `data_format="channels_first"`; uint8 in
            0..255 or normalised float32.

        Raises:
            DataError: an unreadable picture with `on_error="raise"`; a batch without any readable
                one; pictures of different sizes.
        """
        return self._as_fed(self.read_batch(index))

    def _as_fed(self, batch: Batch) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        images = batch.images
        if self.data_format == "channels_first":
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return images if batch.labels is None else (images, batch.labels)

    def read_batch(self, index: int) -> Batch:
        """Reads batch `index`, channels last, with the positions of the pictures that it holds."""
        index = self._checked(index)
        if index == len(self) - 1:
            self._finished = True
        return self._fetch(*self._epoch_order(), index)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray] | np.ndarray]:
        """Gives the batches of the current epoch in order."""
        for batch in self.batches():
            yield self._as_fed(batch)

    def batches(self) -> Iterator[Batch]:
        """Iterates like the dataset itself, channels last, with the positions of the pictures."""
        epoch, order = self._epoch_order()
        for index in range(len(self)):
            yield self._fetch(epoch, order, index)
        self._iterated = True

    def _fetch(self, epoch: int, order: np.ndarray, index: int) -> Batch:
        """Reads a batch, or takes it from those read ahead, and lets the threads read on."""
        if self.threads == 0:
            try:
                pictures = [self._one(epoch, order, p) for p in self._positions(order, index)]
                return self._assemble(epoch, order, index, pictures)
            except Exception as error:
                self.failure = error
                raise
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads, "keras_resnet-data")
            for key in [key for key in self._ahead if key[0] != epoch]:
                self._ahead.pop(key).cancel()
            batch = self._ahead.pop((epoch, index), None) or self._begin(epoch, order, index)
            if index == 0 or self._last == (epoch, index - 1):  # asked for in order
                depth = self._batches_ahead()
                for following in range(index + 1, min(index + 1 + depth, len(self))):
                    key = (epoch, following)
                    if key not in self._ahead and len(self._ahead) < depth:
                        self._ahead[key] = self._begin(epoch, order, following)
            self._last = (epoch, index)
        return batch.result()

    def _positions(self, order: np.ndarray, index: int) -> range:
        """Where the pictures of a batch stand in the order of the epoch."""
        return range(len(order))[index * self.batch_size : (index + 1) * self.batch_size]

    def _begin(self, epoch: int, order: np.ndarray, index: int) -> Future:
        """Hands a batch to the threads, which put it together as they finish its last part.

        In parts of a few pictures: were a batch one thread's, the others would wait for it at the
        end of every epoch, and the model for the first one.
        """
        positions = self._positions(order, index)
        size = max(1, len(positions) // (4 * self.threads))
        parts = [positions[i : i + size] for i in range(0, len(positions), size)]
        read: list[list | Exception] = [[] for _ in parts]
        batch, missing = Future(), len(parts)

        def work(number: int) -> None:
            nonlocal missing
            if not batch.cancelled():
                try:
                    read[number] = [self._one(epoch, order, p) for p in parts[number]]
                except Exception as error:
                    read[number] = error
            with self._lock:
                missing -= 1
                last = missing == 0
            if last and batch.set_running_or_notify_cancel():
                try:
                    for part in read:  # of several errors that of the first picture
                        if isinstance(part, Exception):
                            raise part
                    whole = [picture for part in read for picture in part]
                    batch.set_result(self._assemble(epoch, order, index, whole))
                except Exception as error:
                    self.failure = error
                    batch.set_exception(error)

        for number in range(len(parts)):
            self._pool.submit(work, number)
        return batch

    def _assemble(
        self, epoch: int, order: np.ndarray, index: int, pictures: list[tuple | None]
    ) -> Batch:
        """Puts the pictures of a batch, as `_one` gives them, together."""
        positions = self._positions(order, index)
        erasing = getattr(self.augment, "erasing", None)
        images, kept, erased = None, [], []
        for position, read in zip(positions, pictures, strict=True):
            if read is None:
                continue
            sample, (pixels, window) = int(order[position]), read
            if images is None:
                images = np.empty((len(positions), *pixels.shape), np.uint8)
            elif pixels.shape != images.shape[1:]:
                raise InputError(
                    f"Pictures of one batch have different sizes: {pixels.shape} of "
                    f"{self.file_paths[sample]!r} and {images.shape[1:]} before it. Give "
                    f"image_size, or a Preprocess with a crop_size."
                )
            images[len(kept)] = pixels
            erased.append(window)
            kept.append(sample)
        if images is None:
            path = self.file_paths[order[positions[0]]]
            raise DataError(
                f"None of the {len(positions)} pictures of batch {index} can be read; the first: "
                f"{self._skipped[path]} Build the dataset with verify=True to drop such pictures."
            )
        images, kept = images[: len(kept)], np.asarray(kept)
        if self.output == "float32":
            images = self.preprocess.normalize(images)
        for place, window in enumerate(erased):
            if window is not None:
                images[place] = erasing.apply(images[place], window, self._erase_value(erasing))
        labels = self._encoded(kept)
        if self.mix is not None:
            images, labels = self.mix(images, labels, _generator(self.seed, _MIX, epoch, index))
        if self.label_smoothing:
            labels = augment.smooth_labels(labels, self.label_smoothing)
        return Batch(images, labels, kept)

    def _one(self, epoch: int, order: np.ndarray, position: int) -> tuple | None:
        """The picture at a position of the epoch and where to erase it; None if unreadable."""
        sample = int(order[position])
        # The copies of a repeated picture stand in a row; each gets its own randomness.
        rng = _generator(self.seed, _PICTURE, epoch, sample, position % self.repeats)
        try:
            pixels = self._pixels(sample, rng)
        except (DataError, NotFoundError) as error:
            if self.on_error == "raise":
                raise
            self._skip(self.file_paths[sample], str(error))
            return None
        erasing = getattr(self.augment, "erasing", None)
        return pixels, None if erasing is None else erasing.sample(*pixels.shape[:2], rng)

    def _pixels(self, sample: int, rng: np.random.Generator) -> np.ndarray:
        """One uint8 picture as it is fed."""
        picture = self._source(sample)
        if self.augment is None:
            return picture
        try:
            return self.augment(picture, rng)
        except InputError as error:
            raise InputError(f"{self.file_paths[sample]!r}: {error}") from error

    def _source(self, sample: int) -> np.ndarray | Image.Image:
        """What is not random about a picture: the finished one, or the decoded one to augment."""
        if self.augment is None:
            return self._kept(sample, self.preprocess.pixels)
        if self.cache is None:
            return self._decoded(self.file_paths[sample])
        return self._kept(sample, lambda path: np.asarray(self._decoded(path)))

    def _decoded(self, path: str) -> np.ndarray | Image.Image:
        return load(path, exif=self.preprocess.exif, color_mode=self.preprocess.color_mode)

    def _kept(self, sample: int, make: Callable[[str], np.ndarray]) -> np.ndarray:
        path = self.file_paths[sample]
        if self.cache is None:
            return make(path)
        if self.cache == "ram":
            if sample not in self._cached:
                self._cached[sample] = make(path)
            return self._cached[sample]
        file = os.path.join(self.cache, self._cache_key(path) + ".npy")
        try:
            return np.load(file)
        except (OSError, ValueError):  # not there, or cut off while it was written
            pixels = make(path)
        partial = f"{file}.{os.getpid()}.{threading.get_ident()}"
        try:
            with open(partial, "wb") as stream:
                np.save(stream, pixels)
            os.replace(partial, file)
        except OSError as error:  # a full disk costs the cache, not the run
            with self._lock:
                first, self._cache_failed = not self._cache_failed, True
            if first:
                logger.warning("The cache %r takes no more pictures: %s", self.cache, error)
            with contextlib.suppress(OSError):
                os.remove(partial)
        return pixels

    def _cache_key(self, path: str) -> str:
        try:
            state = os.stat(path)
        except OSError:
            raise NotFoundError(f"{path!r} does not exist.") from None
        how = self.preprocess.to_json() if self.augment is None else self._decode_config()
        key = (os.path.abspath(path), state.st_size, state.st_mtime_ns, how)
        return hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).hexdigest()

    def _decode_config(self) -> str:
        return f"decoded {self.preprocess.color_mode} exif={self.preprocess.exif}"

    def _skip(self, path: str, reason: str) -> None:
        with self._lock:
            new = path not in self._skipped
            self._skipped[path] = reason
        if new:
            logger.warning("Skipped: %s", reason)

    def _encoded(self, indices: np.ndarray) -> np.ndarray | None:
        if self.labels is None or self.label_mode is None:
            return None
        labels = self.labels[indices]
        if self.label_mode == "categorical":
            one_hot = np.zeros((len(labels), len(self.class_names)), np.float32)
            one_hot[np.arange(len(labels)), labels] = 1
            return one_hot
        if self.label_mode == "binary":
            return labels.astype(np.float32)[:, None]
        return labels

    def _erase_value(self, erasing: transforms.RandomErasing) -> np.ndarray:
        """The value of erased pixels; it is given in normalised units, as in torchvision."""
        channels = self.preprocess.channels
        if self.output == "float32":
            return np.full(channels, erasing.value, np.float32)
        mean = np.broadcast_to(
            0.0 if self.preprocess.mean is None else self.preprocess.mean, channels
        )
        std = 1.0 if self.preprocess.std is None else np.asarray(self.preprocess.std)
        return np.clip(np.round((erasing.value * std + mean) * 255), 0, 255).astype(np.uint8)

    # Looking at the data.

    def verify(self) -> list[tuple[str, str]]:
        """Decodes every picture once, and drops those that cannot be read from the dataset.

        With `cache` the decoded pictures are kept, and not decoded again.

        Returns:
            (path, reason) of each one dropped.

        Raises:
            DataError: no picture can be read, or with `on_error="raise"` the first that cannot.
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
        if len(bad) == self.num_samples:
            raise DataError(
                f"None of the {self.num_samples} pictures can be read; the first: {bad[0][1]}"
            )
        if bad:
            good = [i for i, e in enumerate(errors) if e is None]
            self._cached = {n: self._cached[i] for n, i in enumerate(good) if i in self._cached}
            self.file_paths = [self.file_paths[i] for i in good]
            self.labels = None if self.labels is None else self.labels[good]
            self._order = None
            for batch in self._ahead.values():
                batch.cancel()
            self._ahead = {}
            for path, why in bad:
                self._skip(path, why)
        return bad

    def take_samples(self, count: int) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
        """The first pictures of the epoch as they are fed, before normalisation and mixing.

        Returns:
            uint8 (n, height, width, channels), int32 labels (n,) or None, their paths. n may be
            smaller than `count`: unreadable pictures are left out.
        """
        epoch, order = self._epoch_order()
        images, indices = [], []
        for position in range(len(order)):
            if len(images) == count:
                break
            read = self._one(epoch, order, position)
            if read is not None:
                images.append(read[0])
                indices.append(int(order[position]))
        if not images:
            raise DataError(f"None of the {self.num_samples} pictures can be read.")
        labels = None if self.labels is None else self.labels[indices]
        return np.stack(images), labels, [self.file_paths[i] for i in indices]

    def _batches_ahead(self) -> int:
        height, width, channels = self.preprocess.output_shape
        height, width = getattr(self.augment, "output_size", None) or (height, width)
        pixel = 4 if self.output == "float32" else 1
        size = self.batch_size * (height or 256) * (width or 256) * channels * pixel
        return max(self.threads, min(2 * self.threads + 2, _PREFETCH_BYTES // size))

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out threads, lock and cached pictures: another process makes its own."""
        return {**self.__dict__, "_lock": None, "_pool": None, "_ahead": {}, "_cached": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what `__getstate__` gave."""
        self.__dict__.update(state, _lock=threading.Lock())


def default_threads() -> int:
    """The processor's cores that this process may use, at most 8."""
    return min(8, available_cores())


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
        raise InputError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def _checked_labels(
    labels: Sequence[int] | None, class_names: Sequence[str] | None, count: int
) -> tuple[np.ndarray | None, list[str]]:
    names = [] if class_names is None else [str(name) for name in class_names]
    if labels is None:
        return None, names
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"labels must be one int a picture ({count}), got {labels.dtype} of shape "
            f"{labels.shape}."
        )
    if not names:
        names = [str(i) for i in range(int(labels.max()) + 1)]
    if labels.min() < 0 or labels.max() >= len(names):
        raise InputError(
            f"labels must lie in 0..{len(names) - 1} (classes {_listed(names)}), got "
            f"{labels.min()}..{labels.max()}."
        )
    return labels.astype(np.int32), names


def dataset_statistics(dataset: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every channel over all pixels of a dataset.

    Each pixel of each picture counts once, as the dataset feeds them (resized, augmented), before
    normalisation; the sums are whole numbers, so the result is exact to float64. Averaging the
    means of batches would weigh a smaller last batch wrongly, and averaging their standard
    deviations is wrong in itself.

    Returns:
        Two float64 arrays, one value a channel, for pixels in 0..1.
    """
    channels = dataset.preprocess.channels
    epoch, order = dataset._epoch_order()

    def histogram(position: int) -> np.ndarray | None:
        read = dataset._one(epoch, order, position)
        if read is None:
            return None
        planes = read[0].reshape(-1, channels).T
        return np.stack([np.bincount(plane, minlength=256) for plane in planes])

    # Counts of the 256 values of each channel hold all that is needed, in integers.
    counts = np.zeros((channels, 256), np.int64)
    with ThreadPoolExecutor(dataset.threads or 1) as pool:
        for one in pool.map(histogram, range(len(order))):
            counts += 0 if one is None else one
    total = counts.sum(1)
    if not total.all():
        raise DataError(f"None of the {dataset.num_samples} pictures can be read.")
    values = np.arange(256)
    mean = (counts @ values) / total / 255
    variance = (counts @ values**2) / total / 255**2 - mean**2
    return mean, np.sqrt(np.maximum(variance, 0))
