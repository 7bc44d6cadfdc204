"""`evaluate`, `predict`, `explain`, `serve` and `report`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras_resnet as kr
from keras_resnet.cli import checks
from keras_resnet.cli.pipes import STDOUT, piped, say_backend
from keras_resnet.data.items import Files
from keras_resnet.data.opening import labelled, labelled_place
from keras_resnet.data.sources import Images
from keras_resnet.system.errors import InputError, require
from keras_resnet.system.files import printable
from keras_resnet.system.process import restarted, several, threads_each
from keras_resnet.weights.keras_files import find_keras_file, write_info
from keras_resnet.weights.published import named_variant


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that the processes of torchrun do together: each has a part of the images."""

    @functools.wraps(command)
    def run(**options: Any) -> Any:
        if not several():
            return command(**options)
        from keras_resnet.system.group import sharing

        with sharing():
            return command(**options | {"workers": threads_each(options["workers"])})

    return run


def _found(find: Callable[[], Any]) -> Any:
    """What is found; of several processes the first one alone looks."""
    if not several():
        return find()
    from keras_resnet.system.group import sharers

    return sharers().from_first(find)


def _open(
    model: str | list[str], engine: str, images: Sequence[str] | Images, tta: str | None,
    begun: Path | None = None,
):  # fmt: skip
    """A model, or several, ready to run; says which backend and engine do, and why."""
    for one in [model] if isinstance(model, str) else model:
        checks.runtime(one, engine)
    say_backend()
    from keras_resnet.inference.predict import runner_for

    runner = runner_for(model, images, engine, begun=begun, tta=tta)
    print(f"Engine: {runner}", flush=True)
    return runner


def _say_unreadable(count: int, images: Sequence[str] | Images) -> None:
    if count:
        print(f"{count} of {len(images)} images could not be read.", file=sys.stderr)


@_shared
def evaluate(
    model: str, directory: str, split: str | None, engine: str, columns: str | None,
    label_regex: str | None, tta: str | None, **options: Any,
) -> None:  # fmt: skip
    """Measures a model on a labelled folder."""
    images = checks.images(directory, columns, label_regex, ["weight"])
    print(printable(labelled_place(images, split)), flush=True)
    paths, labels, names = _found(lambda: labelled(images, split))
    runner = _open(model, engine, paths, tta)
    # Not the folder, which would be walked again.
    print(kr.evaluate(runner, Files(paths, labels=labels, class_names=names), **options))


@_shared
def predict(
    model: str, paths: list[str], output: str | None, restart: bool, engine: str,
    csv: str | None, json: str | None, plot: str | None, columns: str | None, tta: str | None,
    **options: Any,
) -> int:  # fmt: skip
    """Classifies images; 2 where none could be read."""
    models = [model]
    while len(paths) > 1 and (checks.is_model(paths[0]) or named_variant(paths[0])):
        checks.model(paths[0])
        models.append(paths.pop(0))
    wanted = [path for path in (csv, json, plot) if path is not None]
    if output is not None:
        if output == STDOUT:
            raise InputError("--output is a file that an interrupted run goes on with; for a pipe "
                             "give --csv - or --json -.")  # fmt: skip
        if wanted:
            raise InputError("--output stands alone: leave out --csv, --json and --plot.")
        images = checks.pictures(paths, columns)
        return _predict_to_file(models, images, output, tta, engine, restart, **options)
    from keras_resnet.inference.prediction_files import check_replaceable

    for path in (csv, json):
        if path not in (None, STDOUT):
            check_replaceable(Path(path).expanduser())
    images = checks.pictures(paths, columns)
    with piped(csv, json) as stdout:
        runner = _open(models, engine, images, tta)
        from keras_resnet.inference.calibration import gives_answers
        from keras_resnet.inference.prediction_files import PredictionTable, predictions_text
        from keras_resnet.models.files import model_class_names

        says = gives_answers(runner.meaning(), options["min_confidence"])
        table = PredictionTable(images, model_class_names(runner), options["top"], says)
        if stdout is None:
            print(table.header)
        kept, unreadable = [], 0
        for prediction in kr.iter_predictions(runner, images, **options):
            if stdout is None:
                print(table.line(prediction))
            unreadable += prediction.error is not None
            if wanted:
                kept.append(prediction)
        _say_unreadable(unreadable, images)
        if stdout is not None:
            stdout.write(predictions_text(kept, ".csv" if csv == STDOUT else ".json"))
        if unreadable == len(images):
            return 2
        for path in wanted if kept else ():  # the first of several processes has them
            if path != STDOUT:
                kr.save_predictions(kept, path)
                print(f"Written: {path}")
    return 0


def _predict_to_file(
    model: list[str], images: Images, name: str, tta: str | None, engine: str, restart: bool,
    **options: Any,
) -> int:  # fmt: skip
    from keras_resnet.inference.prediction_files import check_output
    from keras_resnet.system.progress import Progress, ProgressLine

    output, last = check_output(name), Progress(0, 0)
    restart = restart and not restarted()  # torchrun gives all the same words again
    runner = _open(model, engine, images, tta, None if restart else output)

    def progress(now: Progress) -> None:
        nonlocal last
        if last.total == 0 and now.done:
            print(f"Going on behind {now.done:,} of {now.total:,} images.", flush=True)
        last = now
        line(now)

    try:
        with ProgressLine() as line:
            result = kr.write_predictions(
                runner, images, output, restart=restart, progress=progress, **options
            )
    except KeyboardInterrupt:
        if not last.total:
            raise
        print(
            f"Interrupted at {last.done:,} of {last.total:,} images, kept in "
            f"{printable(output)}.part. The same command goes on.",
            file=sys.stderr,
        )
        return 130
    print(result)
    return 2 if result.unreadable == result.count else 0


def explain(
    model: str, paths: list[str], output: str, top: int, columns: str | None, **options: Any
) -> int:
    """Draws where a model looked; 2 where no image could be read."""
    images = list(checks.pictures(paths, columns))
    say_backend()
    from keras_resnet.inference.explain import overlay_names
    from keras_resnet.inference.prediction_files import PredictionTable
    from keras_resnet.models.files import model_class_names

    folder, written = Path(output).expanduser(), 0
    read = {os.path.realpath(image) for image in images}
    for name in overlay_names(images):
        if os.path.realpath(folder / name) in read:
            raise InputError(f"{str(folder / name)!r} is read: give another folder for the output.")
    loaded = kr.load_model(model)
    table = PredictionTable(images, model_class_names(loaded), top)
    found = kr.iter_explanations(loaded, images, top=top, **options)
    print(table.header)
    for explanation, name in zip(found, overlay_names(images), strict=True):
        print(table.line(explanation.prediction))
        if explanation.heatmap is not None:
            folder.mkdir(parents=True, exist_ok=True)
            kr.save_overlay(explanation, folder / name)
            written += 1
    _say_unreadable(len(images) - written, images)
    if written:
        count = "1 image" if written == 1 else f"{written} images"
        print(f"Written: {count} in {printable(folder)}")
    return 0 if written else 2


@_shared
def embed(model: str, paths: list[str], output: str, columns: str | None, **options: Any) -> None:
    """Writes images as vectors."""
    images = checks.pictures(paths, columns)
    say_backend()
    print(f"{kr.embed(model, images, output=output, **options)}\nWritten: {printable(output)}")


def calibrate(
    model: str, directory: str | None, remove: bool, output: str | None, columns: str | None,
    label_regex: str | None, **options: Any,
) -> None:  # fmt: skip
    """Measures how sure a model may be, or forgets it."""
    if (directory is None) != remove:
        raise InputError("calibrate needs images that the model was not trained on, or --remove.")
    file = find_keras_file(model)
    written = output or file
    if directory is None:
        write_info(file, "calibration", None, output)
    else:
        images = checks.images(directory, columns, label_regex, ["weight"])
        say_backend()
        print(kr.calibrate(file, images, output=output, **options))
    print(f"Written: {printable(written)}")


def serve(
    model: str, max_mb: float, max_megapixels: float, max_pictures: int, **options: Any
) -> None:
    """Serves a page until Ctrl-C."""
    require("gradio", "serve", "serve")
    checks.runtime(model, options["engine"])
    limits = kr.Limits(max_mb, max_megapixels, max_pictures)
    say_backend()
    kr.serve(model, limits=limits, **options)


def report(runs: list[str], output: str | None, **options: Any) -> None:
    """Writes a run, or several side by side, as a page."""
    written = kr.report(runs if len(runs) > 1 else runs[0], output, say=print, **options)
    print(f"Written: {printable(written)}")
