"""The main job: a folder of pictures in, a run folder with a good classifier out."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet import augment as augmentation
from keras_resnet import plots
from keras_resnet.backends import (
    backend_line,
    backend_version,
    devices,
    make_deterministic,
    package_version,
)
from keras_resnet.data import (
    ImageDataset,
    check_classes,
    dataset_statistics,
    find_pictures,
    stratified_split,
)
from keras_resnet.ema import ModelEMA, adjusted_decay
from keras_resnet.errors import InputError, KerasResNetError
from keras_resnet.evaluation import Evaluation, evaluate, labels_by_name, load_model, split_folders
from keras_resnet.files import printable, write_json, write_text
from keras_resnet.optimizers import SGD
from keras_resnet.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from keras_resnet.recipes import Recipe, get_recipe
from keras_resnet.runs import Run, sync
from keras_resnet.schedules import (
    ConstantSchedule,
    CosineSchedule,
    MultiStepSchedule,
    OneCycleSchedule,
    StepSchedule,
)
from keras_resnet.specs import get_spec
from keras_resnet.costs import count_flops
from keras_resnet.transfer import freeze, load_pretrained, parts
from keras_resnet.zoo import create_model


class TrainingError(KerasResNetError, ArithmeticError):
    """Training cannot go on, such as after a loss that is no number."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `train` leaves behind; `print` it.

    Attributes:
        folder: The run folder.
        model: The best model, as in `best.keras`; `None` before the first whole epoch.
        history: Columns of `history.csv`, one value an epoch.
        evaluation: The best model on the validation pictures.
        test: The same on `test/`, where the folder has one.
        skipped: `(path, reason)` of pictures that could not be read.
        interrupted: Ctrl-C (or SIGTERM) ended it; the same call goes on from there.
    """

    folder: Path
    model: keras.Model | None
    history: dict[str, list[float]]
    evaluation: Evaluation | None = None
    test: Evaluation | None = None
    skipped: Sequence[tuple[str, str]] = ()
    interrupted: bool = False

    def __str__(self) -> str:
        lines = []
        for name, result in (("Validation", self.evaluation), ("Test", self.test)):
            if result is not None:
                lines += [f"{name} of the best model:", str(result), ""]
        lines.append(f"Run folder: {printable(self.folder)}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Data:
    """The datasets of a run."""

    train: ImageDataset
    val: ImageDataset
    test_folder: str | None
    names: list[str]
    preprocess: Preprocess
    train_size: int
    soft_labels: bool


def train(
    directory: str | os.PathLike,
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
    checkpoint_steps: int | None = None,
    checkpoint_seconds: float = 300.0,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    dry_run: bool = False,
    verbose: bool = True,
    **options: Any,
) -> TrainResult:
    """Fits a model on an image folder and writes a run folder.

    The run folder holds `best.keras` (highest validation accuracy), `last.keras`, `history.csv`,
    `curves.png`, `batch.png` (pictures as they are fed), `class_indices.json`, `config.json`,
    `train.log`, `skipped.csv` where pictures could not be read, and the best model's
    `evaluation.json`, `predictions.csv` and `confusion_matrix.png`. Models take pixel values and
    normalise them inside; class names and preprocessing travel in the file.

    A killed run goes on when the same call is made again: with the same weights, bit for bit on a
    CPU, as if it had not been killed.

    Args:
        directory: Class folders; or `train/` and `val/` (and `test/`) with class folders in them.
        recipe: A row of `RECIPES`, or its name.
        output: Where the run folder is made.
        name: The run folder's name; model and directory by default. A folder of a finished or
            different run is kept, and a new one made beside it.
        seed: Of the split, the initial weights, the order of the pictures and their augmentation.
        workers: Threads that read pictures; by default one a core.
        cache: `"ram"` or a folder: keep decoded pictures.
        exclude: Pictures to leave out: paths, or a file as `scan` writes.
        strict: Stop at a picture that cannot be read, instead of skipping it.
        exif: Turn pictures as their EXIF orientation says.
        restart: Start a new run even where an unfinished one could go on.
        deterministic: Only deterministic kernels, where the backend has a choice.
        compile: Compile the training step (`jit_compile`); jax always does.
        checkpoint_steps: Save the state every so many steps, besides the end of each epoch.
        checkpoint_seconds: And after so many seconds.
        callbacks: Further Keras callbacks.
        dry_run: Say what would happen, and do nothing.
        verbose: Print the progress.
        **options: Fields of `Recipe` to change: `model`, `weights`, `epochs`, `batch_size`,
            `image_size`, `learning_rate`, `val_split`, ...

    Returns:
        The `TrainResult`.

    Raises:
        NotFoundError: The directory, or a file of weights, does not exist.
        DataError: No class folders, one class only, an empty class, no readable picture.
        InputError: An option that cannot work.
        TrainingError: The loss is no number any more; the last good model is kept.
        SaveError: The disk is full; what was saved before is whole.
    """
    say = _printer(verbose)
    recipe = (recipe if isinstance(recipe, Recipe) else get_recipe(recipe)).with_options(**options)
    spec = get_spec(recipe.model)
    data = _datasets(directory, recipe, spec, seed, workers, cache, exclude, strict, exif)
    identity = {
        "directory": os.path.abspath(os.path.expanduser(os.fspath(directory))),
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "backend": keras.backend.backend(),
        "files": len(data.train.file_paths) + len(data.val.file_paths),
    }
    name = name or f"{recipe.model}-{Path(identity['directory']).name}"
    run = Run.find(output, name, identity, restart)
    say(_plan(run, recipe, data, seed))
    if dry_run:
        return TrainResult(run.folder, None, {})

    keras.utils.set_random_seed(seed)
    if deterministic:
        make_deterministic()
    model = _build(recipe, data, say)
    run.open()
    try:
        loop = _Loop(model, recipe, data, run, say, compile, callbacks)
        loop.checkpoint_steps, loop.checkpoint_seconds = checkpoint_steps, checkpoint_seconds
        run.write_config(
            **_facts(recipe, data, model), status="running", command=list(sys.argv)
        )
        _write_class_indices(run, data.names)
        interrupted = loop.run()
        return _finish(run, data, recipe, say, interrupted)
    finally:
        run.close()


def _printer(verbose: bool) -> Callable[[str], None]:
    def say(text: str) -> None:
        if verbose:
            print(text, flush=True)

    return say


# --- data ----------------------------------------------------------------------------------------


def _datasets(directory, recipe, spec, seed, workers, cache, exclude, strict, exif) -> Data:
    size = recipe.image_size or spec.input_size
    mean, std = {
        "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
        "half": ((0.5,) * 3, (0.5,) * 3),
        "dataset": (None, None),  # measured below, on the training pictures
    }.get(recipe.normalization, (None, None))
    if recipe.normalization not in ("imagenet", "half", "dataset"):
        raise InputError(
            f"normalization must be 'imagenet', 'half' or 'dataset', not {recipe.normalization!r}."
        )
    preprocess = _eval_preprocess(recipe, recipe.eval_size or size, mean, std, exif)
    folders = split_folders(directory)
    source = folders.get("train", os.fspath(directory))
    paths, labels, names = find_pictures(source, exclude=exclude)
    if "train" in folders and "val" in folders:
        val_paths, val_labels, found = find_pictures(folders["val"], exclude=exclude)
        val_labels = labels_by_name(val_labels, found, names, "The validation folder", "the training folder")
        train_paths, train_labels = paths, labels
    else:
        kept, held = stratified_split(labels, recipe.val_split, seed)
        train_paths, train_labels = [paths[i] for i in kept], labels[kept]
        val_paths, val_labels = [paths[i] for i in held], labels[held]
    soft = bool(recipe.mixup or recipe.cutmix or recipe.label_smoothing)
    common = {
        "batch_size": recipe.batch_size,
        "seed": seed,
        "workers": workers,
        "cache": cache,
        "on_error": "raise" if strict else "skip",
        "label_mode": "categorical" if soft else "int",
    }
    training = ImageDataset(
        train_paths,
        train_labels,
        names,
        preprocess=_eval_preprocess(recipe, size, mean, std, exif),
        augment=_augment(recipe, spec, size),
        drop_last="auto",
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        label_smoothing=recipe.label_smoothing,
        repeats=recipe.repeats,
        **common,
    )
    check_classes(training, f"{os.fspath(source)!r}")
    if recipe.normalization == "dataset":
        plain = ImageDataset(train_paths, None, preprocess=training.preprocess, shuffle=False,
                             workers=workers)  # fmt: skip
        mean, std = (tuple(float(v) for v in values) for values in dataset_statistics(plain))
        preprocess = dataclasses.replace(preprocess, mean=mean, std=std)
    validation = ImageDataset(
        val_paths, val_labels, names, preprocess=preprocess, shuffle=False, **common
    )
    return Data(training, validation, folders.get("test"), names, preprocess, size, soft)


def _eval_preprocess(recipe: Recipe, size: int, mean, std, exif: bool) -> Preprocess:
    # Up to 64 pixels a picture is its own crop; above, torchvision's 256 for 224.
    if recipe.resize_exact or (size <= 64 and recipe.eval_resize is None):
        resize, crop = (size, size), None
    else:
        resize, crop = recipe.eval_resize or round(size * 256 / 224), size
    return Preprocess(resize, crop, recipe.interpolation, mean, std, exif=exif)


def _augment(recipe: Recipe, spec, size: int):
    crop = recipe.crop
    if crop == "auto":
        crop = "padded" if spec.input_size <= 64 else "random_resized"
    steps: list[Any] = []
    if crop == "random_resized":
        steps.append(
            augmentation.RandomResizedCrop(
                size, scale=tuple(recipe.crop_scale), interpolation=recipe.interpolation
            )
        )
    elif crop == "padded":
        # He et al. 2015, section 4.2: 4 pixels on each side of 32.
        steps.append(augmentation.Resize((size, size), interpolation=recipe.interpolation))
        steps.append(augmentation.RandomCrop(size, padding=max(1, size // 8)))
    extra: list[Any] = []
    if recipe.flip:
        extra.append(augmentation.RandomHorizontalFlip(recipe.flip))
    if recipe.policy == "ta_wide":
        extra.append(augmentation.TrivialAugmentWide(interpolation=recipe.interpolation))
    elif recipe.policy == "ra":
        extra.append(augmentation.RandAugment(interpolation=recipe.interpolation))
    if recipe.color_jitter:
        extra.append(augmentation.ColorJitter(*(recipe.color_jitter,) * 3))
    if recipe.random_erasing:
        extra.append(augmentation.RandomErasing(recipe.random_erasing))
    if crop == "none":
        if not extra:
            return None  # the evaluation's own pixels
        fixed = _eval_preprocess(recipe, size, None, None, False)
        steps.append(augmentation.Resize(fixed.resize_size, interpolation=recipe.interpolation))
        if fixed.crop_size:
            steps.append(augmentation.CenterCrop(fixed.crop_size))
    return augmentation.Augment(steps + extra)


# --- model ---------------------------------------------------------------------------------------

_POLICIES = {"fp32": "float32", "bf16": "mixed_bfloat16", "fp16": "mixed_float16"}


@contextlib.contextmanager
def _dtype_policy(precision: str):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(_POLICIES[precision])
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _build(recipe: Recipe, data: Data, say) -> keras.Model:
    eval_size = data.preprocess.output_shape[0]
    sides = (data.train_size,) * 2 if data.train_size == eval_size else (None, None)
    last = keras.config.image_data_format() == "channels_last"
    with _dtype_policy(recipe.precision):
        model = create_model(
            recipe.model,
            num_classes=len(data.names),
            input_shape=(*sides, 3) if last else (3, *sides),
            include_preprocessing=True,
            mean=data.preprocess.mean,
            std=data.preprocess.std,
            dropout=recipe.dropout,
        )
    if recipe.weights is None:
        say("Weights: random. (weights='DEFAULT' starts from torchvision's for ImageNet.)")
    else:
        say(f"Weights: {load_pretrained(model, recipe.weights)}")
    model.info["class_names"] = list(data.names)
    model.info["preprocess"] = data.preprocess.get_config()
    return model


def make_optimizer(recipe: Recipe, steps_per_epoch: int, head: str = "fc"):
    """The optimizer and learning-rate schedule of a recipe.

    Args:
        recipe: The recipe.
        steps_per_epoch: Batches in an epoch.
        head: Name of the classification layer, which `backbone_rate` spares.

    Raises:
        InputError: `backbone_rate` with an optimizer that has one rate only.

    Example:
        >>> optimizer = make_optimizer(get_recipe("resnet_v1"), steps_per_epoch=5004)
        >>> round(float(optimizer.learning_rate), 6)
        0.1
    """
    common = {
        "steps_per_epoch": steps_per_epoch,
        "per": recipe.schedule_per,
        "warmup_epochs": recipe.warmup_epochs,
        "warmup_decay": recipe.warmup_decay,
    }
    rate, epochs = recipe.learning_rate, recipe.epochs
    if recipe.schedule == "constant":
        schedule = ConstantSchedule(rate, **common)
    elif recipe.schedule == "step":
        schedule = StepSchedule(rate, recipe.step_size, recipe.gamma, **common)
    elif recipe.schedule == "multistep":
        drops = [int(m * epochs) if m < 1 else int(m) for m in recipe.milestones]
        schedule = MultiStepSchedule(rate, drops, recipe.gamma, **common)
    elif recipe.schedule == "cosine":
        schedule = CosineSchedule(rate, epochs, **common)
    else:
        schedule = OneCycleSchedule(rate, epochs, steps_per_epoch)
    shared = {
        "global_clipnorm": recipe.clip_norm,
        "gradient_accumulation_steps": recipe.accumulate if recipe.accumulate > 1 else None,
    }
    if recipe.backbone_rate != 1 and recipe.optimizer != "sgd":
        raise InputError("backbone_rate needs optimizer='sgd'.")
    if recipe.optimizer == "sgd":
        multipliers = None
        if recipe.backbone_rate != 1:
            multipliers = {rf"^(?!(.*/)?{head}/)": recipe.backbone_rate}
        return SGD(
            schedule,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            decay_norms=recipe.norm_decay,
            decay_biases=recipe.bias_decay,
            rate_multipliers=multipliers,
            **shared,
        )
    if recipe.optimizer == "adamw":
        return keras.optimizers.AdamW(
            schedule, weight_decay=recipe.weight_decay, epsilon=1e-8, **shared
        )
    if recipe.weight_decay:
        raise InputError(
            f"weight_decay needs optimizer='sgd' or 'adamw', not {recipe.optimizer!r}: set "
            "weight_decay=0."
        )
    if recipe.optimizer == "adam":
        return keras.optimizers.Adam(schedule, epsilon=1e-8, **shared)  # torch's epsilon
    return keras.optimizers.RMSprop(schedule, **shared)


# --- the loop ------------------------------------------------------------------------------------


class _Interrupted(Exception):
    """Raised between two steps after Ctrl-C or SIGTERM."""


class _EpochBatches(keras.utils.PyDataset):
    """One epoch of a dataset from a batch on: what `fit` gets, so that any epoch can be resumed."""

    def __init__(self, dataset: ImageDataset, epoch: int, start: int):
        super().__init__(workers=dataset.workers, max_queue_size=dataset.max_queue_size)
        dataset.set_epoch(epoch)
        self.dataset, self.start = dataset, start

    def __len__(self):
        return len(self.dataset) - self.start

    def __getitem__(self, index):
        return _in_data_format(self.dataset[index + self.start])


class _ValidationBatches(_EpochBatches):
    """All of a dataset, in order."""

    def __init__(self, dataset: ImageDataset):
        super().__init__(dataset, 0, 0)


def _in_data_format(batch):
    images, labels = batch
    if keras.config.image_data_format() == "channels_first":
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images, labels


class _Loop:
    """Epochs of `model.fit`, one call each, with everything saved that continuing needs."""

    def __init__(self, model, recipe, data, run, say, compile, callbacks):
        self.model, self.recipe, self.data, self.run_folder = model, recipe, data, run
        self.say, self.jit, self.callbacks = say, compile, list(callbacks)
        self.steps = len(data.train)
        self.ema = None
        self.best = -math.inf
        self.stale = 0
        self.epoch, self.step = 0, 0
        self.until = recipe.unfreeze
        self.stop = threading.Event()
        self.checkpoint_steps: int | None = None
        self.checkpoint_seconds = 300.0
        self.saved_metrics: list[np.ndarray] | None = None

    def run(self) -> bool:
        """Trains to the end; gives whether it was interrupted."""
        self._compile(first=True)
        if self.run_folder.resumed:
            self._resume()
        else:
            self._draw_batch()
            # Before the first step: killed at any instant from here on, the run goes on.
            self._save_state(0, 0)
        with self._signals():
            try:
                while self.epoch < self.recipe.epochs and not self._out_of_patience():
                    if self.stop.is_set():
                        raise _Interrupted
                    self._unfreeze_gradually()
                    self._run_epoch()
            except _Interrupted:
                self._interrupted()
                return True
        return False

    def _compile(self, first: bool = False) -> None:
        report = freeze(self.model, self.until, freeze_norms=self.recipe.freeze_norms)
        if first or self.recipe.gradual:
            self.say(str(report))
        before = None if first else self.model.optimizer
        optimizer = make_optimizer(self.recipe, self.steps, self.model.layers[-1].name)
        soft = self.data.soft_labels
        loss = keras.losses.CategoricalCrossentropy if soft else (
            keras.losses.SparseCategoricalCrossentropy
        )  # fmt: skip
        self.model.compile(
            optimizer=optimizer,
            loss=loss(from_logits=True),
            metrics=["accuracy"],
            # "auto" compiles on TensorFlow, where XLA's convolutions are slow on a CPU.
            jit_compile=True if self.jit or keras.backend.backend() == "jax" else False,
        )
        self.model.optimizer.build(self.model.trainable_variables)
        if before is not None:
            _carry_over(before, self.model.optimizer)
        if self.recipe.ema and first:
            recipe = self.recipe
            decay = adjusted_decay(
                recipe.ema_decay, recipe.batch_size, recipe.epochs, recipe.ema_steps
            )
            self.ema = ModelEMA(decay, recipe.ema_steps, recipe.warmup_epochs)
            self.ema.build(self.model)

    def _unfreeze_gradually(self) -> None:
        """Unfreezes one part more after every `gradual` epochs."""
        if not self.recipe.gradual or self.recipe.unfreeze is None:
            return
        names = parts(self.model)
        start = self.recipe.unfreeze
        index = len(names) - 1 if start == "head" or start not in names else names.index(start)
        index = max(0, index - self.epoch // self.recipe.gradual)
        until = names[index] if index else None
        if until != self.until and not (until == names[-1] and self.until == "head"):
            self.until = until
            self._compile()

    # Going on.

    def _resume(self) -> None:
        progress = self.run_folder.read_progress()
        if progress["files"] != self._files():
            raise InputError(
                "The pictures have changed since this run was started; pass --restart to start a "
                "new one beside it."
            )
        self.until = progress["until"]
        if self.until != self.recipe.unfreeze:
            self._compile()
        # Compiled metrics are made at the first batch; testing changes no weight.
        images, labels = _in_data_format(self.data.val[0])
        self.model.test_on_batch(images[:1], labels[:1])
        progress, extra = self.run_folder.load_state(self.model)
        if self.ema is not None:
            self.ema.set_state(extra)
        self.epoch, self.step = progress["epoch"], progress["step"]
        self.best = -math.inf if progress["best"] is None else progress["best"]
        self.stale = progress["stale"]
        if self.step:
            self.saved_metrics = [
                keras.ops.convert_to_numpy(v) for v in self.model.metrics_variables
            ]
        self._note(f"Going on at epoch {self.epoch + 1}, step {self.step} of {self.steps}.")

    def _files(self) -> str:
        from hashlib import sha256

        names = "\0".join([*self.data.train.file_paths, "|", *self.data.val.file_paths])
        return sha256(names.encode("utf-8", "surrogateescape")).hexdigest()

    def _save_state(self, epoch: int, step: int) -> None:
        progress = {
            "epoch": epoch,
            "step": step,
            "best": None if self.best == -math.inf else self.best,
            "stale": self.stale,
            "until": self.until,
            "files": self._files(),
        }
        extra = {} if self.ema is None else self.ema.get_state()
        self.run_folder.save_state(self.model, progress, extra)

    # One epoch.

    def _run_epoch(self) -> None:
        started = time.perf_counter()
        batches = _EpochBatches(self.data.train, self.epoch, self.step)
        watcher = _Watcher(self)
        callbacks = [watcher, *self.callbacks] if self.ema is None else [
            self.ema, watcher, *self.callbacks
        ]  # fmt: skip
        try:
            self.model.fit(
                batches,
                epochs=self.epoch + 1,
                initial_epoch=self.epoch,
                validation_data=_ValidationBatches(self.data.val),
                shuffle=False,  # the dataset has shuffled already, by the seed
                callbacks=callbacks,
                verbose=1 if self._interactive() else 0,
            )
        except KerasResNetError:
            raise
        except Exception:
            # Backends wrap what went wrong in reading a picture in errors of their own.
            failure = self.data.train.failure or self.data.val.failure
            if isinstance(failure, KerasResNetError):
                raise failure from None
            raise
        logs = watcher.logs
        self._record(logs, time.perf_counter() - started)
        improved = logs["val_accuracy"] > self.best
        self.stale = 0 if improved else self.stale + 1
        if improved:
            self.best = logs["val_accuracy"]
        with self._averaged():
            self._describe(logs)
            if improved:
                self.run_folder.save_model(self.model, "best.keras")
        self.run_folder.save_model(self.model, "last.keras")
        self.epoch, self.step = self.epoch + 1, 0
        self._save_state(self.epoch, 0)
        self._write_views()

    def _averaged(self):
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def _interactive(self) -> bool:
        return self.say is not None and sys.stdout.isatty()

    def _record(self, logs: dict[str, float], seconds: float) -> None:
        row = {
            "accuracy": logs["accuracy"],
            "loss": logs["loss"],
            "val_accuracy": logs["val_accuracy"],
            "val_loss": logs["val_loss"],
            "learning_rate": logs["learning_rate"],
            "seconds": seconds,
        }
        for key, value in row.items():
            self.run_folder.history.setdefault(key, []).append(float(value))
        width = len(str(self.recipe.epochs))
        self._note(
            f"Epoch:{self.epoch + 1:{max(2, width)}d}, Train_acc:{row['accuracy'] * 100:.1f}%, "
            f"Train_loss:{row['loss']:.3f}, Val_acc:{row['val_accuracy'] * 100:.1f}%, "
            f"Val_loss:{row['val_loss']:.3f}, Lr:{row['learning_rate']:.2e}, {seconds:.1f} s"
        )

    def _describe(self, logs: dict[str, float]) -> None:
        self.model.info["training"] = {
            "recipe": self.recipe.name,
            "epoch": self.epoch + 1,
            "epochs": self.recipe.epochs,
            "val_accuracy": float(logs["val_accuracy"]),
            "val_loss": float(logs["val_loss"]),
            "train_pictures": self.data.train.num_samples,
            "val_pictures": self.data.val.num_samples,
            "keras_resnet": package_version(),
            "backend": keras.backend.backend(),
        }

    def _out_of_patience(self) -> bool:
        patience = self.recipe.patience
        if patience is None or self.stale < patience:
            return False
        self._note(f"Stopped early: no better validation accuracy for {patience} epochs.")
        return True

    # What a person looks at.

    def _note(self, line: str) -> None:
        self.say(line)
        self.run_folder.log(line)

    def _write_views(self) -> None:
        self.run_folder.write_history()
        run = self.run_folder
        run.guard(lambda path: plots.curves(run.history, path), run.path("curves.png"))
        write_skipped(run, self.skipped())

    def _draw_batch(self) -> None:
        images, labels, _ = self.data.train.take_samples(min(16, self.recipe.batch_size))
        titles = [self.data.names[label] for label in labels]
        run = self.run_folder
        run.guard(lambda path: plots.picture_grid(images, titles, path), run.path("batch.png"))

    def skipped(self) -> list[tuple[str, str]]:
        """Unreadable pictures of both parts."""
        return sorted({*self.data.train.skipped, *self.data.val.skipped})

    # Ctrl-C.

    @contextlib.contextmanager
    def _signals(self):
        """The first Ctrl-C or SIGTERM ends the run after the step it comes in, the second at once.

        In the middle of a step half of the weights would be new: such a state cannot be resumed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number, frame):
            if self.stop.is_set():
                raise KeyboardInterrupt
            self.stop.set()
            self.say("\nStopping after this step; once more to stop at once.")

        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupted(self) -> None:
        self._save_state(self.epoch, self.step)
        self.run_folder.save_model(self.model, "last.keras")
        if self.run_folder.history:
            self._write_views()
        self._note(
            f"Interrupted at epoch {self.epoch + 1}, step {self.step} of {self.steps}. "
            "The same command goes on from here."
        )


class _Watcher(keras.callbacks.Callback):
    """Looks after every step: is the loss a number, is it time to save, was Ctrl-C pressed."""

    def __init__(self, loop: _Loop):
        super().__init__()
        self.loop = loop
        self.first = loop.step
        self.saved_at = time.monotonic()
        self.logs: dict[str, float] = {}

    def on_epoch_begin(self, epoch, logs=None):
        saved = self.loop.saved_metrics
        if saved is not None:
            for variable, value in zip(self.model.metrics_variables, saved, strict=True):
                variable.assign(value)
            self.loop.saved_metrics = None

    def on_train_batch_end(self, batch, logs=None):
        loop = self.loop
        loop.step = self.first + batch + 1
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise TrainingError(
                f"The loss is {logs['loss']} at epoch {loop.epoch + 1}, step {loop.step}. The last "
                f"good model is last.keras of epoch {loop.epoch} in {str(loop.run_folder.folder)!r}"
                f"{'' if loop.epoch else ' (none yet)'}. Try a lower learning_rate, or clip_norm=1."
            )
        if loop.step == loop.steps:
            return  # the end of the epoch saves, after the validation
        if loop.stop.is_set():
            raise _Interrupted
        due = loop.checkpoint_steps is not None and loop.step % loop.checkpoint_steps == 0
        if due or time.monotonic() - self.saved_at > loop.checkpoint_seconds:
            loop._save_state(loop.epoch, loop.step)
            self.saved_at = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        self.logs = dict(logs or {})
        self.logs["learning_rate"] = float(
            keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
        )


def _carry_over(before, after) -> None:
    """Momentum and step count of the last optimizer into the next, weight by weight."""
    old = {v.path.split("/", 1)[-1]: v for v in before.variables}
    for variable in after.variables:
        source = old.get(variable.path.split("/", 1)[-1])
        if source is not None and tuple(source.shape) == tuple(variable.shape):
            variable.assign(source)


# --- before and after ----------------------------------------------------------------------------


def _plan(run: Run, recipe: Recipe, data: Data, seed: int) -> str:
    verb = "Goes on in" if run.resumed else "Writes to"
    height, width, _ = data.preprocess.output_shape
    counts = ", ".join(f"{printable(n)} {c:,}" for n, c in list(data.train.class_counts.items())[:8])
    more = len(data.names) - 8
    return "\n".join(
        [
            f"Backend: {backend_line()}",
            f"Pictures: {data.train.num_samples:,} for training, {data.val.num_samples:,} for "
            f"validation, {len(data.names)} classes ({counts}{f', {more} more' if more > 0 else ''})",
            f"Model: {recipe.model}, {data.train_size}x{data.train_size} pixels in training, "
            f"{height}x{width} in validation; recipe {recipe.name}, {recipe.epochs} epochs of "
            f"{len(data.train):,} steps of {recipe.batch_size}, {recipe.optimizer} at "
            f"{recipe.learning_rate:g}, seed {seed}",
            f"{verb}: {printable(run.folder)}",
        ]
    )


def _facts(recipe: Recipe, data: Data, model: keras.Model) -> dict[str, Any]:
    backend = keras.backend.backend()
    size = data.train_size
    return {
        "model": {
            "variant": recipe.model,
            "parameters": sum(math.prod(v.shape) for v in model.trainable_variables),
            "multiply_adds": count_flops(model, size),
            "weights": model.info.get("weights"),
        },
        "class_counts": data.train.class_counts,
        "pictures": {"train": data.train.num_samples, "val": data.val.num_samples},
        "preprocess": data.preprocess.get_config(),
        "augment": None if data.train.augment is None else data.train.augment.get_config(),
        "devices": devices(),
        "versions": {
            "keras_resnet": package_version(),
            "keras": keras.__version__,
            backend: backend_version(),
            "numpy": np.__version__,
            "pillow": importlib.metadata.version("pillow"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "data_format": keras.config.image_data_format(),
    }


def _write_class_indices(run: Run, names: Sequence[str]) -> None:
    write_json(run.path("class_indices.json"), {str(i): name for i, name in enumerate(names)})


def write_skipped(run: Run, skipped: Sequence[tuple[str, str]]) -> None:
    """Writes `skipped.csv` where any picture could not be read."""
    if skipped:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([("path", "reason"), *skipped])
        run.guard(write_text, run.path("skipped.csv"), text.getvalue())


def _finish(run: Run, data: Data, recipe: Recipe, say, interrupted: bool) -> TrainResult:
    skipped = sorted({*data.train.skipped, *data.val.skipped})
    best = run.path("best.keras")
    model = load_model(best) if best.is_file() else None
    if model is None:
        return TrainResult(run.folder, None, run.history, None, None, skipped, interrupted)
    options = {"batch_size": recipe.batch_size, "workers": data.val.workers}
    result = evaluate(model, data.val, **options)
    run.guard(lambda folder: result.save(folder), run.folder)
    test = None
    if data.test_folder is not None and not interrupted:
        test = evaluate(model, data.test_folder, **options)
        run.guard(lambda folder: test.save(folder, prefix="test_"), run.folder)
    outcome = TrainResult(run.folder, model, run.history, result, test, skipped, interrupted)
    if not interrupted:
        run.write_config(
            status="finished",
            results={
                "val_accuracy": result.top1,
                "val_loss": result.loss,
                "test_accuracy": None if test is None else test.top1,
            },
        )
        run.drop_state()
    say("\n" + str(outcome))
    if skipped:
        say(f"{len(skipped)} unreadable pictures were skipped: {printable(run.path('skipped.csv'))}")
    return outcome
