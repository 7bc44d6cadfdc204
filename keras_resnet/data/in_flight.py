"""How many pixels all threads of the process hold decoded at a time: a bound on their memory."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

from PIL import Image

from keras_resnet.system.process import give_back_memory


class Gate(contextlib.ContextDecorator):
    """Bounds what all threads hold at a time.

    What a thread takes counts until its outermost `with` block, or decorated function, ends. A
    thread that holds something waits for no more: it might wait for itself.

    Args:
        most: Gives how much may be held; more than that at once goes alone.
        large: So much was worth giving its memory back to the system.
    """

    def __init__(self, most: Callable[[], int], large: int):
        self._most, self._large = most, large
        self._reset()
        if hasattr(os, "register_at_fork"):  # of a child, no other thread holds anything
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._held, self._mine = 0, threading.local()
        self._turn, self._changed = threading.Lock(), threading.Condition()

    def take(self, amount: int) -> None:
        """Waits until so much fits; in turn, so that what is large is not overtaken for ever."""
        mine = self._mine
        with contextlib.nullcontext() if mine.held else self._turn, self._changed:
            while self._held and self._held + amount > self._most() and not mine.held:
                self._changed.wait()
            self._held += amount
            mine.held += amount

    def __enter__(self) -> Gate:
        mine = self._mine.__dict__
        mine["depth"], mine["held"] = mine.get("depth", 0) + 1, mine.get("held", 0)
        return self

    def __exit__(self, *_: Any) -> None:
        mine = self._mine
        mine.depth -= 1
        if not mine.depth and mine.held:
            if mine.held >= self._large:
                give_back_memory()
            with self._changed:
                self._held -= mine.held
                mine.held = 0
                self._changed.notify_all()


def most_pixels() -> int:
    """Of one image, and of all that are being read: Pillow's limit, of its setting."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 2**27)


# Pixels that are decoded and not yet made small: 4 to 16 bytes each, by the format. Functions that
# do both are decorated with it. JPEGs are not decoded smaller (Pillow's draft mode): that gives
# other pixels.
in_flight = Gate(most_pixels, 2**25)

# Bytes of files that are being decoded.
files_read = Gate(lambda: 2**29, 2**27)
