"""What a model says of images, be they three or a hundred thousand: memory stays flat.

Folders are walked as they are needed, threads read ahead while the model computes, and
predictions are given, or written, as they come.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.sources import Images, Sources
from keras_resnet.inference.calibration import answer_of, gives_answers
from keras_resnet.inference.prediction_files import (
    Prediction,
    PredictionWriter,
    begun_engine,
    check_output,
    engine_called,
    errors_path,
    most_probable,
)
from keras_resnet.inference.stream import computed_rows, found_images
from keras_resnet.models.files import images_at_a_time, model_class_names, model_input
from keras_resnet.runtimes.averaged import Models, open_averaged
from keras_resnet.runtimes.runner import Runner
from keras_resnet.system.errors import between, whole
from keras_resnet.system.files import check_apart, printable
from keras_resnet.system.group import sharers
from keras_resnet.system.progress import Progress

logger = logging.getLogger("keras_resnet")


def _batches(
    runner: Runner, paths: Iterable[str], *, top: int, least: float, **options: Any
) -> Iterator[list[Prediction]]:
    """Predictions, a batch at a time; options as `computed_rows` takes them."""
    names, meaning = model_class_names(runner), runner.meaning()
    for batch in computed_rows(runner, paths, runner.log_probabilities, **options):
        yield [
            Prediction(path, [], row)
            if isinstance(row, str)
            else Prediction(
                path, most_probable(row, names, top), None, answer_of(meaning, row, names, least)
            )
            for path, row in batch
        ]


def runner_for(
    model: Models,
    images: Sequence[str] | Images,
    engine: str = "auto",
    preprocess: Preprocess | None = None,
    begun: Path | None = None,
    tta: str | None = None,
) -> Runner:
    """`open_averaged` for some images; for an output that was begun, what it was begun with."""
    if engine == "auto" and begun is not None:
        engine = begun_engine(begun)
    if isinstance(model, Runner) and tta is None:
        return model
    count = 0 if isinstance(model, Runner) else len(images)  # which may have to be read for it
    made: list[Runner] = []

    def make(engine: str) -> str:
        made.append(open_averaged(model, engine, tta, images=count, preprocess=preprocess))
        return engine_called(made[0].name)

    chosen = sharers().from_first(lambda: make(engine))
    if not made:  # one of several processes, which run the same engine
        make(chosen)
    logger.info("Engine: %s", made[0])
    return made[0]


def _check(top: int, batch_size: int, workers: int | None) -> None:
    whole("top", top, 1)
    whole("batch_size", batch_size, 1)
    if workers is not None:
        whole("workers", workers, 0)


def iter_predictions(
    model: Models,
    sources: Sources | Images,
    *,
    top: int = 5,
    batch_size: int = 32,
    workers: int | None = None,
    preprocess: Preprocess | None = None,
    engine: str = "auto",
    pixels: str | None = None,
    min_confidence: float = 0.0,
    tta: str | None = None,
) -> Iterator[Prediction]:
    """As `predict`, one `Prediction` at a time in the order of the files, in flat memory."""
    _check(top, batch_size, workers)
    images = found_images(sources)
    runner = runner_for(model, images, engine, preprocess, tta=tta)
    prepared = model_input(runner, preprocess, pixels)
    least = between("min_confidence", min_confidence, 0, 1)
    size = images_at_a_time(prepared[0], batch_size)
    batches = _batches(
        runner, images, top=top, batch_size=size, workers=workers, prepared=prepared, least=least
    )
    return itertools.chain.from_iterable(batches)


@overload
def predict(
    model: Models,
    sources: Sources,
    *,
    top: int = ..., batch_size: int = ..., workers: int | None = ...,
    preprocess: Preprocess | None = ..., engine: str = ..., pixels: str | None = ...,
    output: None = ..., restart: bool = ..., min_confidence: float = ..., tta: str | None = ...,
) -> list[Prediction]: ...  # fmt: skip
@overload
def predict(
    model: Models,
    sources: Sources,
    *,
    top: int = ..., batch_size: int = ..., workers: int | None = ...,
    preprocess: Preprocess | None = ..., engine: str = ..., pixels: str | None = ...,
    output: str | os.PathLike, restart: bool = ..., min_confidence: float = ...,
    tta: str | None = ...,
) -> PredictionFile: ...  # fmt: skip
def predict(
    model,
    sources,
    *,
    top=5,
    batch_size=32,
    workers=None,
    preprocess=None,
    engine="auto",
    pixels=None,
    output=None,
    restart=False,
    min_confidence=0.0,
    tta=None,
):
    """Classifies images.

    Args:
        model: A model, a `.keras` file or a run folder, or a `Runner`; the file is all that is
            needed. The name of a variant, `"resnet18"`, stands for torchvision's weights of it.
            Of several in a list, with the same classes, the mean of their probabilities counts.
        sources: An image, a folder (searched through), a shell pattern, or several of these. An
            image is a path, an array of 0..255 (uint8, or a batch of such), a Pillow image, the
            bytes of a file or an open one; those in memory are called `"image 1"` and so on.
        top: Classes to give an image, most probable first.
        batch_size: Images at a time, of 16.8 million pixels at most together; the result does not
            depend on it.
        workers: Threads that read images.
        preprocess: In place of the model's own.
        engine: What runs the model: see `open_runner`. Of many images it is ONNX Runtime or
            OpenVINO where one is installed and pays; `"keras"` is the model itself.
        pixels: What the model takes, where its layers do not tell: `"0..255"` where it normalises
            pixels itself, `"0..1"`, or `"normalized"` by the mean and deviation of its
            preprocessing.
        output: A file to write the predictions to as they come, in flat memory: see
            `write_predictions`.
        restart: With `output`: begin anew where an interrupted run could be gone on with.
        min_confidence: Answer `"unknown"` where the answer's probability is below.
        tta: `"flip"`: the mean of the probabilities of the image and its mirror image.

    Returns:
        A `Prediction` an image, in order; those of unreadable images hold an error. With
        `output`, a `PredictionFile` instead.

    Raises:
        InputError: The model has no head, or names no preprocessing; or it is unclear what its
            outputs say, or which pixels it takes.
        NotFoundError: A path does not exist.
        DataError: A folder holds no image.
    """
    options = {
        "min_confidence": min_confidence,
        "tta": tta,
        "top": top,
        "batch_size": batch_size,
        "workers": workers,
        "preprocess": preprocess,
        "engine": engine,
        "pixels": pixels,
    }
    if output is not None:
        return write_predictions(model, sources, output, restart=restart, **options)
    return list(iter_predictions(model, sources, **options))


@dataclasses.dataclass(frozen=True)
class PredictionFile:
    """What `write_predictions` has written.

    Attributes:
        path: The file.
        count: Images in it.
        unreadable: Of these, images that could not be read.
        errors: The list of those, or `None` where there are none.
        resumed: Images that an interrupted run had classified before.
        seconds: What this run took for the others.
    """

    path: Path
    count: int
    unreadable: int
    errors: Path | None
    resumed: int
    seconds: float

    def __str__(self) -> str:
        now = self.count - self.resumed
        rate = f", {now / self.seconds:,.0f} images/s" if now and self.seconds > 1 else ""
        before = f" ({self.resumed:,} of them by an earlier run)" if self.resumed else ""
        lines = [f"Written: {printable(self.path)}, {self.count:,} images{before}{rate}"]
        if self.errors is not None:
            lines.append(
                f"{self.unreadable:,} could not be read; {printable(self.errors)} says why."
            )
        return "\n".join(lines)


def write_predictions(
    model: Models,
    sources: Sources | Images,
    output: str | os.PathLike,
    *,
    top: int = 5,
    batch_size: int = 32,
    workers: int | None = None,
    preprocess: Preprocess | None = None,
    engine: str = "auto",
    pixels: str | None = None,
    restart: bool = False,
    min_confidence: float = 0.0,
    tta: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> PredictionFile:
    """Classifies images into a file, however many there are.

    Predictions are written as they come, to `output` with `.part` behind it; the output is there
    when the last one is. Interrupted or killed, the same call goes on where it was, and the file
    gets the same bytes. Unreadable images have their reason in the column `error`, and are listed
    in `NAME.errors.csv`.

    Args:
        model: As for `predict`.
        sources: As for `predict`; the same images, to go on with an interrupted run.
        output: `.csv` (path, class1, probability1, ..., error), `.jsonl` (an object a line) or
            `.parquet` (the columns of the CSV; needs pyarrow). In CSV a class name that a
            spreadsheet would take for a formula gets an apostrophe in front, and a path `./`.
        top: Classes to give an image, most probable first.
        batch_size: Images at a time.
        workers: Threads that read images.
        preprocess: In place of the model's own.
        engine: What runs the model: see `open_runner`.
        pixels: As for `predict`.
        restart: Begin anew where an interrupted run could be gone on with.
        min_confidence: As for `predict`.
        tta: As for `predict`.
        progress: Called after each batch.

    Returns:
        Where the file is, and what is in it.

    Raises:
        InputError: As `predict`; or an interrupted run of another model, other options or other
            images has left its `.part`; or the output is there and holds no predictions.
        NotFoundError: A path does not exist.
        DataError: A folder holds no image.
        MissingDependencyError: Parquet without pyarrow.
    """
    _check(top, batch_size, workers)
    path = check_output(output)
    images = found_images(sources)
    for written in (path, errors_path(path)):
        check_apart(written, images.given)
    total = len(images)
    runner = runner_for(model, images, engine, preprocess, None if restart else path, tta)
    prepared = model_input(runner, preprocess, pixels)
    top, batch_size = min(top, runner.num_classes), images_at_a_time(prepared[0], batch_size)
    started, group = time.monotonic(), sharers()
    # Names are all that is kept of images, and those in memory are called alike.
    restart = restart or bool(images.in_memory)
    identity = _identity(runner, prepared, top, min(batch_size, total)) if group.first else {}
    if gives_answers(runner.meaning(), min_confidence):
        limits = [*runner.meaning().thresholds, float(min_confidence)]
        identity["min_confidence or thresholds"] = repr(limits)  # text is compared exactly
    writer = PredictionWriter(path, top, identity, batch_size, restart)

    def report() -> int:
        if progress is not None:
            progress(Progress(writer.done, total, writer.unreadable))
        return writer.done

    def finish() -> PredictionFile:
        writer.finish()
        errors = errors_path(path) if writer.unreadable else None
        took = time.monotonic() - started
        return PredictionFile(path, writer.done, writer.unreadable, errors, writer.resumed, took)

    try:  # of several processes the first one alone writes
        done = group.from_first(lambda: writer.open(images) or report())
        rest = itertools.islice(iter(images), done, None)
        batches = _batches(
            runner, rest, top=top, batch_size=batch_size, workers=workers, prepared=prepared,
            least=min_confidence,
        )  # fmt: skip
        for batch in batches:
            writer.write(batch)
            report()
        return group.from_first(finish)
    finally:
        writer.close()


def _identity(
    runner: Runner, prepared: tuple[Preprocess, str], top: int, batch_size: int
) -> dict[str, Any]:
    """What must be the same for an interrupted run to be gone on with.

    A model is known by what it predicts for a fixed image: weights are, whatever file or engine
    holds them.
    """
    preprocess, fed = prepared
    height, width, channels = preprocess.output_shape
    shape = (height or 224, width or 224, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels //= (np.arange(channels) % 4 + 1).astype(np.uint8)  # not gray on the whole
    image = pixels if fed == "uint8" else preprocess.normalize(pixels)
    # A whole batch: what is compiled for it is used again.
    logs = runner.log_probabilities(np.stack([image] * batch_size))[0]
    names = json.dumps(model_class_names(runner))
    return {
        "engine": runner.name,
        "top": top,
        "preprocess": preprocess.get_config(),
        "class names": hashlib.sha256(names.encode()).hexdigest()[:16],
        "model's prediction for a test image": [float(v) for v in logs],
    }
