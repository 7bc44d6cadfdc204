"""Images in, rows out: threads read ahead while the model computes, and memory stays flat."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.sources import Images, Sources
from keras_resnet.data.walk import unread_line
from keras_resnet.runtimes.runner import Runner
from keras_resnet.system.errors import DataError, InputError, NotFoundError
from keras_resnet.system.group import Alone, sharers
from keras_resnet.system.process import default_threads

logger = logging.getLogger("keras_resnet")

_AHEAD_BYTES = 256 * 2**20  # images that wait for the model, at most (a batch always may)


# Of a batch: each path, and its pixels or why it cannot be read.
_Read = list[tuple[str, np.ndarray | str]]


def _read_ahead(
    paths: Iterable[str], read: Callable[[str], Any], batch_size: int, threads: int, size: int
) -> Iterator[_Read]:
    """Reads images in threads, a bounded number of them ahead; `size` is bytes an image."""
    paths = iter(paths)
    if threads == 0:
        while batch := [(path, read(path)) for path in itertools.islice(paths, batch_size)]:
            yield batch
        return
    window = max(batch_size, min(2 * batch_size + threads, _AHEAD_BYTES // size))
    pool = ThreadPoolExecutor(threads, "keras_resnet-predict")

    def begin(count: int) -> list:
        return [(path, pool.submit(read, path)) for path in itertools.islice(paths, count)]

    try:
        waiting = deque(begin(window))
        while waiting:
            batch = []
            while waiting and len(batch) < batch_size:
                path, future = waiting.popleft()
                batch.append((path, future.result()))
                waiting.extend(begin(1))  # one by one: the threads never stand still
            yield batch
    finally:  # also where the reader of this generator stops early
        pool.shutdown(wait=False, cancel_futures=True)


def _computed(compute: Callable[[np.ndarray], np.ndarray], batch: _Read) -> _Read:
    """A row of what is computed of the images of a batch, in place of each image's pixels."""
    found = [(path, one) for path, one in batch if not isinstance(one, str)]
    if not found:
        return batch
    blank = np.zeros_like(found[0][1])
    for path, pixels in found:
        if pixels.shape != blank.shape:
            raise InputError(
                "Images of one batch must be of one size; give a Preprocess with a crop_size, or "
                f"batch_size=1. Received: {blank.shape}, and {pixels.shape} of {path!r}."
            )
    # An image that cannot be read leaves a black one, whose row is thrown away: batches of every
    # size would each be compiled anew on jax.
    images = np.stack([blank if isinstance(one, str) else one for _, one in batch])
    rows = zip(batch, compute(images), strict=True)
    return [(path, one if isinstance(one, str) else row) for (path, one), row in rows]


def computed_rows(
    runner: Runner,
    paths: Iterable[str],
    compute: Callable[[np.ndarray], np.ndarray],
    *,
    batch_size: int,
    workers: int | None,
    prepared: tuple[Preprocess, str],
) -> Iterator[_Read]:
    """What is computed of images, a batch at a time: each path, and its row or why there is none.

    `compute` gives a row an image of a batch; `prepared` is what `model_input` gives.
    """
    preprocess = prepared[0]
    raw = runner.fed(*prepared) == "uint8"

    def read(path: str) -> np.ndarray | str:
        try:
            pixels = preprocess.pixels(path)
        except (DataError, NotFoundError) as error:
            return str(error)
        return pixels if raw else preprocess.normalize(pixels)

    height, width, channels = preprocess.output_shape
    size = (height or 256) * (width or 256) * channels * (1 if raw else 4)
    threads, group = default_threads() if workers is None else workers, sharers()
    paths, known = itertools.tee(paths) if group.size > 1 else (paths, ())
    batches = _read_ahead(group.share(paths, batch_size), read, batch_size, threads, size)
    found = runner.in_turn(lambda batch: _computed(compute, batch), batches, batch_size)
    return found if group.size == 1 else _joined(group, found, known)


def _joined(group: Alone, batches: Iterator[_Read], paths: Iterable[str]) -> Iterator[_Read]:
    """The rows of all processes, each of which has found the images by itself."""
    paths = iter(paths if group.first else ())
    # Names alone travel: some can read their image, which may lie in them.
    sent = ([(str(path), row) for path, row in batch] for batch in batches)
    for batch in group.in_order(sent):
        names = list(itertools.islice(paths, len(batch)))
        if [path for path, _ in batch] != names:
            break
        yield [(path, row) for path, (_, row) in zip(names, batch, strict=True)]
    else:
        if next(paths, None) is None:
            return
    raise DataError("Images have come or gone since the processes began: give the command again.")


def found_images(sources: Sources | Images) -> Images:
    """The images, with a line about other files in their folders."""
    images = sources if isinstance(sources, Images) else Images(sources)
    if images.unread and sharers().first:
        logger.warning("%s", unread_line(images.unread))
    return images
