"""The main job: a folder of images in, a run folder with a good classifier out."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_resnet import plots
from keras_resnet.data.cifar import not_here
from keras_resnet.data.dataset import ImageDataset
from keras_resnet.data.items import Source
from keras_resnet.data.labels import joined, multi_hot
from keras_resnet.data.listing import forget
from keras_resnet.data.opening import opened, place, title_of
from keras_resnet.inference.calibrate import calibrate
from keras_resnet.inference.evaluate import Evaluation, evaluate
from keras_resnet.inference.predict import PredictionFile, write_predictions
from keras_resnet.models.files import load_model
from keras_resnet.recipes import Recipe, get_recipe
from keras_resnet.system.device import backend_line, fastest_convolutions, make_deterministic
from keras_resnet.system.errors import between, reason_of, whole
from keras_resnet.system.files import printable, write_json
from keras_resnet.system.group import Alone, explained, leaving
from keras_resnet.system.process import restarted, threads_each, tune_process
from keras_resnet.system.progress import shows_bars
from keras_resnet.system.replicas import join
from keras_resnet.system.shown import Shown
from keras_resnet.training.batch_size import settle_batch_size
from keras_resnet.training.callbacks import Settings
from keras_resnet.training.freeze import starting_weights, to_fetch
from keras_resnet.training.loggers import Loggers
from keras_resnet.training.loop import Loop
from keras_resnet.training.prepare import Data, build_model, new_model, prepare_data
from keras_resnet.training.run_folder import Run, SaveError, facts_of
from keras_resnet.weights.keras_files import write_info

_OF_IMAGES = "seed", "cache", "exclude", "strict", "exif"  # what `prepare_data` takes as given


@dataclasses.dataclass(frozen=True, repr=False)
class TrainResult(Shown):
    """What `train` leaves behind; `print` it.

    Attributes:
        folder: The run folder.
        model: The best model, as in `best.keras`; `None` before the first whole epoch, and in all
            but the first of several processes.
        history: Columns of `history.csv`, one value an epoch.
        evaluation: The best model on the validation images; `None` of an interrupted run, and
            where nothing was held out (`val_split=0`).
        test: The same on `test/`, where the folder has one; a `PredictionFile` where its images
            have no labels.
        skipped: `(path, reason)` of images that could not be read.
        interrupted: Ctrl-C (or SIGTERM) ended it; the same call goes on from there.
    """

    folder: Path
    model: keras.Model | None
    history: dict[str, list[float]]
    evaluation: Evaluation | None = None
    test: Evaluation | PredictionFile | None = None
    skipped: Sequence[tuple[str, str]] = ()
    interrupted: bool = False

    def _shown(self):
        epochs = max(map(len, self.history.values()), default=0)
        parts = [str(self.folder), f"{epochs} epoch{'' if epochs == 1 else 's'}"]
        rows, word = [], "top-1"
        for name, result in (("validation", self.evaluation), ("test", self.test)):
            if isinstance(result, Evaluation):  # images without labels have predictions alone
                word, value = result.headline
                parts.append(f"{name} {word} {value:.2%}")
                rows.append((name, f"{value:.2%}", f"{result.loss:.4f}", f"{result.count:,}"))
        parts += ["interrupted"] if self.interrupted else []
        return ", ".join(parts), ("Best model", word.capitalize(), "Loss", "Images"), rows

    def __str__(self) -> str:
        lines = []
        for name, result in (("Validation", self.evaluation), ("Test", self.test)):
            if result is not None:
                lines += [f"{name} of the best model:", str(result), ""]
        if self.skipped:
            lines.append(f"{len(self.skipped)} unreadable images were skipped: see skipped.csv")
        lines.append(f"Run folder: {printable(self.folder)}")
        return "\n".join(lines)


@explained()
def train(
    directory: str | os.PathLike | Source,
    *,
    recipe: str | Recipe = "finetune",
    output: str | os.PathLike = "runs",
    name: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    cache: str | os.PathLike | None = None,
    exclude: Any = None,
    strict: bool = False,
    exif: bool = False,
    restart: bool = False,
    deterministic: bool = False,
    compile: bool = False,
    sync_bn: bool | None = None,
    checkpoint_steps: int | None = None,
    checkpoint_seconds: float = 300.0,
    keep: int = 0,
    log: str | Sequence[str] = (),
    report: bool = True,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    dry_run: bool = False,
    verbose: bool = True,
    **options: Any,
) -> TrainResult:
    """Fits a model on an image folder and writes a run folder.

    The run folder holds `best.keras` (highest validation accuracy; the last epoch's where nothing
    is held out), `last.keras`, `history.csv`,
    `curves.png`, `batch.png` (images as they are fed), `class_indices.json`, `config.json`,
    `train.log`, `skipped.csv` where images could not be read, and the best model's
    `evaluation.json`, `predictions.csv` and `confusion_matrix.png`; and `report.html`, which shows
    all of it, with `MODEL_CARD.md`. Models take pixel values and
    normalise them inside; class names and preprocessing travel in the file.

    Under torchrun (torch), in the scope of a `MirroredStrategy` (TensorFlow) or with a
    `DataParallel` set (jax), several devices share each batch; see `docs/devices.md`.

    A killed run goes on when the same call is made again: with the same weights, bit for bit on a
    CPU where it is `deterministic`, as if it had not been killed.

    Args:
        directory: Class folders; or `train/` and `val/` (and `test/`) with class folders in them.
        recipe: A row of `RECIPES`, or its name.
        output: Where the run folder is made.
        name: The run folder's name; model and directory by default. A folder of a finished or
            different run is kept, and a new one made beside it.
        seed: Of the split, the initial weights, the order of the images and their augmentation.
        workers: Threads that read images, of all processes of a machine; by default one a core.
        cache: `"ram"` or a folder: keep decoded images.
        exclude: Images to leave out: paths, or a file as `scan` writes.
        strict: Stop at an image that cannot be read, instead of skipping it.
        exif: Turn images as their EXIF orientation says.
        restart: Start a new run even where an unfinished one could go on.
        deterministic: Only deterministic kernels, where the backend has a choice.
        compile: Compile the training step (`jit_compile`); jax always does.
        sync_bn: Whether batch norms use all devices' images; by default of less than 16 a device.
        checkpoint_steps: Save the state every so many steps, besides the end of each epoch.
        checkpoint_seconds: And after so many seconds.
        keep: Also keep the models of so many best epochs, as `epoch-012.keras`.
        log: `"tensorboard"`, `"wandb"`, `"mlflow"`, or several of them.
        report: Write `report.html` and `MODEL_CARD.md` at the end.
        callbacks: Further Keras callbacks; `stop_training` ends the run after its epoch.
        dry_run: Say what would happen, and do nothing.
        verbose: Print the progress.
        **options: Fields of `Recipe` to change: `model`, `weights`, `epochs`, `batch_size`,
            `image_size`, `learning_rate`, `val_split`, ...

    Returns:
        The `TrainResult`.

    Raises:
        NotFoundError: The directory, or a file of weights, does not exist.
        DataError: No class folders, one class only, an empty class, no readable image.
        InputError: An option that cannot work.
        MissingDependencyError: A package that `log` needs is not installed.
        TrainingError: The loss is no number any more; the last good model is kept.
        SaveError: The disk is full; what was saved before is whole.
    """
    if dry_run and (first := not_here(directory)):
        print(first)
        return TrainResult(Path(output), None, {})
    directory = opened(directory)
    arguments = {
        "directory": place(directory),
        "seed": whole("seed", seed, 0),
        "exif": exif,
        "strict": strict,
        "exclude": plain_list(exclude),
        "workers": None if workers is None else whole("workers", workers, 0),
        "cache": None if cache is None else os.fspath(cache),
        "deterministic": deterministic,
        "compile": compile,
        "checkpoint_steps": checkpoint_steps,
        "checkpoint_seconds": between("checkpoint_seconds", checkpoint_seconds, 0),
        "keep": whole("keep", keep, 0),
        "log": [log] if isinstance(log, str) else list(log),
        "sync_bn": sync_bn,
        **({"source": dict(directory.asked)} if getattr(directory, "asked", None) else {}),
    }
    whole("checkpoint_steps", 1 if checkpoint_steps is None else checkpoint_steps, 1)
    tune_process()
    recipe = get_recipe(recipe).with_options(**options)
    group = join()
    sync_bn = group.check(recipe, compile, sync_bn)
    verbose = verbose and group.first
    loggers = Loggers(arguments["log"] if group.first else [])
    given = {name: arguments[name] for name in _OF_IMAGES} | {"workers": threads_each(workers)}
    if restart and group.first and isinstance(directory, (str, os.PathLike)):
        forget(directory)
    data = group.from_first(lambda: prepare_data(directory, recipe, look=not dry_run, **given))
    restart = restart and not group.any(restarted())  # torchrun gives all the same words again
    name = name or f"{recipe.model}-{title_of(directory)}"
    run = group.from_first(lambda: Run.find(output, name, identity_of(recipe, arguments), restart))
    run.writes, known = group.first, run.config.get("batch_size")
    recipe = group.from_first(lambda: settle_batch_size(recipe, data, known, group.devices))
    for dataset in filter(None, (data.train, data.val)):
        dataset.batch_size, dataset.part = recipe.batch_size, (group.rank, group.size)
    settings = Settings(
        say=run.say if verbose else run.log,
        bar=verbose and shows_bars(sys.stdout),
        lines=verbose and not shows_bars(sys.stdout),
        jit=compile,
        checkpoint_steps=checkpoint_steps,
        checkpoint_seconds=checkpoint_seconds,
        keep=keep,
        callbacks=tuple(callbacks),
        loggers=loggers,
    )
    few = recipe.batch_size < 16 * group.devices
    group.norms_together = group.devices > 1 and (few if sync_bn is None else sync_bn)
    leaving.callback(setattr, group, "norms_together", False)  # what trains next may do so alone
    settings.say(_plan(run, recipe, data, seed, group))
    if dry_run:
        return TrainResult(run.folder, None, {})
    if deterministic:
        make_deterministic()
    with fastest_convolutions():
        return _train(run, recipe, data, settings, arguments, report, group)


def identity_of(recipe: Recipe, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two calls the same run."""
    return {
        "directory": arguments["directory"],
        "recipe": dataclasses.asdict(recipe),
        "seed": arguments["seed"],
        "exif": arguments["exif"],
        "backend": keras.backend.backend(),
        "data_format": keras.config.image_data_format(),
    }


def plain_list(exclude: Any) -> str | list[str] | None:
    """The list of images to leave out as JSON can hold it."""
    if isinstance(exclude, (str, os.PathLike, type(None))):
        return exclude and os.fspath(exclude)
    return list(map(str, exclude))


def _train(
    run: Run,
    recipe: Recipe,
    data: Data,
    settings: Settings,
    arguments: dict[str, Any],
    with_report: bool,
    group: Alone,
) -> TrainResult:
    """Trains in a run folder, and evaluates and reports what came of it."""
    keras.utils.set_random_seed(arguments["seed"])
    if run.resumed or run.extended:
        run.check_files(run.config.get("files"), data.fingerprint)  # before it is written anew
        # Its weights are in what was saved, and where they came from in its record.
        with group.scope():
            start, model = run.config["start"], new_model(recipe, data)
        model.info.update({k: v for k, v in run.config.get("model", {}).items() if k == "weights"})
    else:
        start = group.from_first(lambda: starting_weights(recipe.model, recipe.weights))
        made: list[keras.Model] = []  # the others need not download or read them
        with group.scope():
            group.from_first(lambda: made.append(build_model(recipe, data, settings.say, start)))
            model = made[0] if made else new_model(recipe, data)
        group.copy_first(model.variables)
    # Before the folder is made: without one readable image there is nothing to keep.
    samples = group.from_first(lambda: data.train.take_samples(min(16, recipe.batch_size))[:2])
    group.from_first(run.open)
    status, failed = "failed", False
    try:
        # First of all, for by it the same command finds the folder again.
        run.write_config(
            **facts_of(recipe, data, model),
            arguments=arguments,
            start=list(start),
            files=data.fingerprint,
            command=list(sys.argv),
            status="running",
            begun=run.config.get("begun") or _now(),
        )
        if group.first:
            _write_start(run, data, samples)
        ids = settings.loggers.start(
            run.folder, run.folder.name, dataclasses.asdict(recipe), run.config.get("log_ids", {})
        )
        run.write_config(log_ids=ids)
        loop = Loop(model, recipe, data, run, settings, group, arguments["seed"])
        with group.scope():
            interrupted = loop.run()
        status = "interrupted" if interrupted else "finished"
        if not group.first:
            return TrainResult(run.folder, None, run.history, interrupted=interrupted)
        if data.val is not None:
            data.val.part = (0, 1)  # one process evaluates
        result = _finish(run, data, recipe, loop.skipped(), interrupted, settings.say)
        settings.say(f"\n{result}")
        if result.model is not None and not interrupted:
            if with_report:
                _report(run, result.model, data, settings.say)
            if result.evaluation is not None or data.val is None:
                run.drop_state()  # last of all: until here the same command goes on
        return result
    except Exception as error:
        failed = not isinstance(error, SaveError)  # with room on the disk the same command goes on
        raise
    finally:
        settings.loggers.finish(status)
        run.close(failed)


# --- before and after ----------------------------------------------------------------------------


def _plan(run: Run, recipe: Recipe, data: Data, seed: int, group: Alone) -> str:
    height, width, _ = data.preprocess.output_shape
    counts = [f"{printable(n)} {c:,}" for n, c in data.train.class_counts.items()]
    if len(counts) > 8:
        counts[8:] = [f"{len(counts) - 8} more"]
    held_out = "none held out for validation: best.keras is the last epoch"
    if data.val is not None:
        held_out = f"{data.val.num_samples:,} for validation"
    again = run.resumed or run.extended
    fetched = None if again else to_fetch(recipe.model, recipe.weights)
    return "\n".join(
        [
            f"Backend: {backend_line()}",
            *group.notes(recipe.batch_size, data.train.threads),
            *data.notes,
            *([run.note] if run.note else []),
            f"Images: {data.train.num_samples:,} for training, {held_out}, "
            f"{len(data.names)} classes ({', '.join(counts)})",
            f"Model: {recipe.model}, {data.train_size}x{data.train_size} pixels in training, "
            f"{height}x{width} in validation; recipe {recipe.name}, {recipe.epochs} epochs of "
            f"{len(data.train):,} steps of {recipe.batch_size}, {recipe.optimizer} at "
            f"{recipe.learning_rate:g}, {recipe.precision}, seed {seed}",
            *([f"Weights: to be downloaded from {fetched}"] if fetched else []),
            f"{'Goes on in' if again else 'Writes to'}: {printable(run.folder)}",
        ]
    )


def _write_start(run: Run, data: Data, samples: tuple) -> None:
    """Writes what is known before the first step: the classes, and images as they are fed."""
    for _, reason in data.val.skipped if data.val else ():  # said before there was a log
        run.log(f"Skipped: {reason}")
    classes = {str(i): name for i, name in enumerate(data.names)}
    run.guard(write_json, run.path("class_indices.json"), classes)
    images, labels = samples
    titles = [joined(hits, data.names) for hits in multi_hot(labels, len(data.names))]
    run.guard(lambda path: plots.picture_grid(images, titles, path), run.path("batch.png"))


def _finish(
    run: Run,
    data: Data,
    recipe: Recipe,
    skipped: Sequence[tuple[str, str]],
    interrupted: bool,
    say: Callable[[str], None],
) -> TrainResult:
    """Evaluates the best model of a run that is through, and writes what it predicts."""
    best = run.path("best.keras")
    if interrupted:
        run.write_config(status="interrupted")
        model = load_model(best) if best.is_file() else None
        return TrainResult(run.folder, model, run.history, None, None, skipped, interrupted)
    run.write_config(status="finished", ended=_now())
    model = result = test = None
    with _spared("evaluation", say, " The same command tries again."):
        model = load_model(best)
        if data.val is not None:
            if recipe.calibrate or data.task != "single-label":
                found = calibrate(model, data.val, temperature=recipe.calibrate)
                result = found.after
                run.guard(write_info, best, "calibration", model.info["calibration"])
                if recipe.calibrate:
                    say(f"\nCalibrated on the validation images:\n{found}")
            else:
                result = evaluate(model, data.val, engine="keras")
            run.guard(result.save, run.folder)
    if data.test is not None and model is not None:
        with _spared("results of the test images", say):
            test = _test(model, data.test, recipe, run)
    run.write_config(
        results={
            "val_accuracy": None if result is None else result.top1,
            "val_loss": None if result is None else result.loss,
            "test_accuracy": test.top1 if isinstance(test, Evaluation) else None,
            **({"val_scores": result.scores} if result and result.scores else {}),
            "skipped": len(skipped),
        }
    )
    return TrainResult(run.folder, model, run.history, result, test, skipped)


def _test(
    model: keras.Model, images: ImageDataset, recipe: Recipe, run: Run
) -> Evaluation | PredictionFile:
    """Measures the model on the test images, or where they have no labels predicts them."""
    if images.labels is None:
        return write_predictions(
            model,
            images.file_paths,
            run.path("test_predictions.csv"),
            batch_size=recipe.batch_size,
            workers=images.threads,
            engine="keras",
            restart=True,
        )
    result = evaluate(model, images, engine="keras")
    run.guard(lambda folder: result.save(folder, prefix="test_"), run.folder)
    return result


@contextlib.contextmanager
def _spared(what: str, say: Callable[[str], None], later: str = "") -> Iterator[None]:
    """Says what goes wrong behind the last epoch: it cannot make a finished run unfinished.

    Raises:
        SaveError: The disk is full: with room on it the same command does the rest.
    """
    try:
        yield
    except SaveError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        say(f"No {what} ({printable(reason_of(error))}).{later}")


def _now() -> str:
    """The time here, with its distance from UTC."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _report(run: Run, model: keras.Model, data: Data, say: Callable[[str], None]) -> None:
    with _spared("report", say, f" Later: keras-resnet report {printable(run.folder)}"):
        from keras_resnet.reports.report import report  # of no use before there is a result

        parts = ("train", data.train), ("val", data.val), ("test", data.test)
        found = ((kind, part.file_paths) for kind, part in parts if part is not None)
        images = {kind: paths for kind, paths in found if isinstance(paths, Source)}
        written = report(run.folder, model=model, images=images, say=say)
        say(f"Report: {printable(written)}")
