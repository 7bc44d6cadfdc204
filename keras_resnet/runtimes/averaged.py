"""Several models, or views of an image, whose answers are averaged: a runner as any other."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.models.files import model_class_names, model_input
from keras_resnet.models.meaning import Meaning
from keras_resnet.runtimes.runner import Runner
from keras_resnet.runtimes.select import open_runner
from keras_resnet.system.errors import InputError, one_of
from keras_resnet.system.files import printable

Model = keras.Model | Runner | str | os.PathLike
Models = Model | Sequence[Model]


class Averaged(Runner):
    """The mean of the probabilities of several runners, and with `flip` of mirror images.

    They are of one task, with the same classes and pixels; in another order classes are put into
    that of the first.

    Raises:
        InputError: They do not go together.
    """

    def __init__(
        self, members: Sequence[Runner], flip: bool = False, preprocess: Preprocess | None = None
    ):
        first, names = members[0], model_class_names(members[0])
        self.members, self.flip, self.given = list(members), flip, getattr(first, "given", first)
        self._orders = []
        for member in members:
            found = model_class_names(member)
            if sorted(found) != sorted(names) or member.task != first.task:
                other = sorted(set(found) ^ set(names))[:6] or [first.task, member.task]
                raise InputError(
                    f"{printable(first.model_name)!r} and {printable(member.model_name)!r} do not "
                    f"have the same classes, so that their mean says nothing: they differ in "
                    f"{', '.join(map(repr, other))}."
                )
            if model_input(member, preprocess) != model_input(first, preprocess):
                raise InputError(
                    f"{printable(first.model_name)!r} and {printable(member.model_name)!r} take "
                    f"images in different ways: {model_input(first, preprocess)} and "
                    f"{model_input(member, preprocess)}. Average their --json yourself."
                )
            self._orders.append([found.index(name) for name in names])
        several = f"{len(members)} models" if len(members) > 1 else ""
        self.name = ", ".join(filter(None, (first.name, several, "flip" if flip else "")))
        self.model_name = " and ".join(member.model_name for member in members)
        self.info, self.num_classes, self.task = first.info, first.num_classes, first.task
        self.gives_probabilities, self.why = True, first.why

    def meaning(self) -> Meaning:
        meaning = self.members[0].meaning()
        # Thresholds were chosen for one model alone, and temperatures are in the probabilities.
        thresholds = meaning.thresholds if len(self.members) == 1 else ()
        return dataclasses.replace(meaning, activated=True, temperature=1.0, thresholds=thresholds)

    @property
    def pixels(self) -> str:
        return self.members[0].pixels

    def fed(self, preprocess: Preprocess, fed: str) -> str:
        kinds = {member.fed(preprocess, fed) for member in self.members}
        if len(kinds) > 1:
            raise InputError("Models in different engines cannot be averaged: give --engine keras.")
        return kinds.pop()

    def at_once(self, batch_size: int) -> int:
        return min(member.at_once(batch_size) for member in self.members)

    def outputs(self, images: np.ndarray) -> np.ndarray:
        return np.exp(self.log_probabilities(images))

    def log_probabilities(self, images: np.ndarray) -> np.ndarray:
        views = [images, np.ascontiguousarray(images[:, :, ::-1])] if self.flip else [images]
        pairs = zip(self.members, self._orders, strict=True)
        logs = [one.log_probabilities(v)[:, order] for one, order in pairs for v in views]
        return np.logaddexp.reduce(logs) - np.log(len(logs))


def open_averaged(
    model: Models, engine: str = "keras", tta: str | None = None, **options: Any
) -> Runner:
    """`open_runner`, for several models in a list as well, whose probabilities are averaged.

    With `tta="flip"` those of mirror images as well. `engine` and `options` are `open_runner`'s.

    Raises:
        InputError: As `open_runner`; or models that do not go together.
    """
    one_of("tta", tta, (None, "flip"))
    models = list(model) if isinstance(model, (list, tuple)) else [model]
    if not models:
        raise InputError("No model is given: an empty list.")
    runners = [open_runner(one, engine, **options) for one in models]
    if len(runners) == 1 and tta is None:
        return runners[0]
    return Averaged(runners, tta == "flip", options.get("preprocess"))
