"""Images of more than 8 bits, which become one constant in 8: said, for they teach nothing."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from keras_resnet.data.items import taken
from keras_resnet.data.reading import head, in_flight
from keras_resnet.data.walk import FORMATS

_ENDINGS = tuple(e for kind in ("TIFF", "PNG", "PPM", "JPEG2000") for e in FORMATS[kind])
_SAMPLE = 2_000  # images whose heads are looked at before a training


def constant_images(paths: Sequence[str], threads: int) -> list[tuple[str, str]]:
    """Images whose values differ, and are all one in 8 bits: 16-bit gray and floats get clipped.

    torchvision's loader gives the same, so they are read, and said. Of others the head is read.

    Returns:
        (path, Pillow's mode) of each.
    """
    with ThreadPoolExecutor(threads or 1, "keras_resnet-depth") as pool:
        modes = list(pool.map(_lost_mode, paths))
    return [(path, mode) for path, mode in zip(paths, modes, strict=True) if mode]


def constant_line(paths: Sequence[str], threads: int) -> str:
    """One line about such images; empty where there are none. Of many images some are looked at."""
    count = len(paths)
    some = taken(paths, np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int))
    asked = [path for path in some if path.lower().endswith(_ENDINGS)]
    found = constant_images(asked, threads)
    if not found:
        return ""
    path, mode = found[0]
    of = f" of {len(some):,} looked at" if len(some) < count else ""
    return (
        f"{len(found):,} images{of} of 16-bit gray or float values become one constant in 8 bits, "
        f"and teach nothing, such as {path!r} ({mode}): channels=1 (--channels 1) keeps 16 bits."
    )


@in_flight
def _lost_mode(path: str) -> str | None:
    try:
        with head(path) as image:
            if not image.mode.startswith(("I", "F")):
                return None
            in_flight.take(image.width * image.height)
            values, mode = np.asarray(image), image.mode
            seen = image.convert("RGB").getextrema()
    except Exception:  # what cannot be read is said by its reader
        return None
    lost = all(low == high for low, high in seen) and values.min() != values.max()
    return mode if lost else None
