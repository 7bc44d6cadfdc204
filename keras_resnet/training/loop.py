"""The training loop: epochs of `model.fit` that can be killed at any instant and go on."""

from __future__ import annotations

import contextlib
import math
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NoReturn

import keras
import numpy as np

from keras_resnet import plots
from keras_resnet.data.dataset import ImageDataset
from keras_resnet.models.files import open_keras_file
from keras_resnet.recipes import Recipe
from keras_resnet.system.device import Sender, package_version, random_state, sync, without_waiting
from keras_resnet.system.errors import KerasResNetError
from keras_resnet.system.group import Alone
from keras_resnet.training.callbacks import (
    Interrupted,
    Position,
    RunCallbacks,
    Settings,
    TrainingError,
)
from keras_resnet.training.ema import ModelEMA, adjusted_decay
from keras_resnet.training.freeze import freeze, part_to_train
from keras_resnet.training.metrics import SCORES
from keras_resnet.training.prepare import Data, compile_model, make_optimizer, readable_batch
from keras_resnet.training.run_folder import Run
from keras_resnet.training.schedules import make_schedule

# A loss scale below it has been halved 25 times: it is not the scale that float16 cannot hold.
_LEAST_SCALE = 2.0**-10


class Loop:
    """Epochs of `model.fit`, one call each, with everything saved that going on needs.

    The model has its first weights, and the run folder is open; `seed` is of what is random in it.
    """

    def __init__(
        self,
        model: keras.Model,
        recipe: Recipe,
        data: Data,
        run: Run,
        settings: Settings,
        group: Alone,
        seed: int,
    ):
        self.model, self.recipe, self.data = model, recipe, data
        self.run_folder, self.settings, self.group, self.seed = run, settings, group, seed
        self.steps = len(data.train)
        self.schedule = make_schedule(recipe, self.steps)
        self.at = Position(self.steps)
        self.score, self.short = SCORES[data.task]
        self.best = -math.inf
        self.stale = 0  # epochs since the best
        self.until = recipe.unfreeze
        self.ema: ModelEMA | None = None
        self._skipped_before: list[tuple[str, str]] = []

    def run(self) -> bool:
        """Trains to the end; gives whether it was interrupted."""
        self._compile(first=True)
        if self.recipe.ema:
            recipe = self.recipe
            decay = adjusted_decay(
                recipe.ema_decay, recipe.batch_size, recipe.epochs, recipe.ema_steps
            )
            self.ema = ModelEMA(decay, recipe.ema_steps, recipe.warmup_epochs)
            self.ema.build(self.model)
        if self.run_folder.resumed:
            self._resume()
        else:
            if self.run_folder.extended:
                self._extend()
            # Before the first step: killed at any instant from here on, the run goes on.
            self._save_state()
        callbacks = RunCallbacks(
            self.model,
            self.at,
            self.settings,
            epochs=self.recipe.epochs,
            first=[] if self.ema is None else [self.ema],
            save=self._save_state,
            check_loss=self._check_loss,
        )
        with self._signals():
            try:
                while self.at.epoch < self.recipe.epochs and not self._out_of_patience():
                    if self.group.any(self.at.stopping):
                        raise Interrupted
                    self._unfreeze_gradually()
                    self._run_epoch(callbacks)
                    if self.model.stop_training:
                        self.settings.say("Stopped by a callback.")
                        break
            except Interrupted:
                self._interrupted()
                return True
            callbacks.finish()
        return False

    def _compile(self, first: bool = False) -> None:
        report = freeze(self.model, self.until, freeze_norms=self.recipe.freeze_norms)
        self.settings.say(str(report))
        before = None if first else self.model.optimizer
        head = self.model.layers[-1].name
        if report.trained == [head]:
            head = None
        optimizer = make_optimizer(self.recipe, self.schedule, head)
        compile_model(self.model, optimizer, jit=self.settings.jit, **self.data.objective)
        if before is not None:
            _carry_over(before, self.model.optimizer)
        self.group.join_model(self.model, self.at, self.seed)

    def _unfreeze_gradually(self) -> None:
        """Unfreezes one part more after every `gradual` epochs."""
        until = part_to_train(self.model, self.recipe, self.at.epoch)
        if until != self.until:
            self.until = until
            what = f"{until} and what follows" if until else "everything"
            self.settings.say(f"From epoch {self.at.epoch + 1} on {what} trains.")
            self._compile()

    # Going on.

    def _extend(self) -> None:
        """Goes on behind the last epoch of a finished run, whose state is in `last.keras`."""
        run = self.run_folder
        if self.group.first:
            run.read_history()
        run.history = self.group.from_first(lambda: run.history)
        self.at.epoch = len(run.history["loss"])
        accuracies = run.history.get(f"val_{self.score}")
        if accuracies:
            self.best = max(accuracies)
            self.stale = self.at.epoch - 1 - accuracies.index(self.best)
        until = part_to_train(self.model, self.recipe, self.at.epoch - 1)
        if until != self.until:
            self.until = until
            self._compile()
        if self.group.first:
            last = open_keras_file(run.path("last.keras"), compile=True)
            for variable, source in zip(self.model.weights, last.weights, strict=True):
                variable.assign(source)
            _carry_over(last.optimizer, self.model.optimizer)
        self.group.copy_first([*self.model.variables, *self.model.optimizer.variables])
        self.settings.say(f"Going on at epoch {self.at.epoch + 1}, step 1 of {self.steps}.")

    def _resume(self) -> None:
        run = self.run_folder
        progress = self.group.from_first(run.read_progress)
        run.check_files(progress["files"], self.data.fingerprint)
        if progress["until"] != self.until:
            self.until = progress["until"]
            self._compile()
        if progress["step"]:
            # Compiled metrics are made at the first batch; testing changes no weight.
            images, labels = readable_batch(self.data.val or self.data.train, 0)[:2]
            self.model.test_on_batch(images[:1], labels[:1])
        progress, extra, run.history = self.group.from_first(
            lambda: (*run.load_state(self.model), run.history)
        )
        self.group.copy_first([*self.model.variables, *self.model.optimizer.variables])
        if self.ema is not None:
            self.ema.set_state(extra)
        self.at.random = {k: v for k, v in extra.items() if k.startswith("random/")}
        self.at.epoch, self.at.step = progress["epoch"], progress["step"]
        self.best = -math.inf if progress["best"] is None else progress["best"]
        self.stale = progress["stale"]
        self._skipped_before = [tuple(item) for item in progress["skipped"]]
        if self.at.step:
            mine = [keras.ops.convert_to_numpy(v).copy() for v in self.model.metrics_variables]
            saved = progress.get("metrics") or self.group.from_first(lambda: [mine])
            self.at.metrics = self.group.own(saved)
        before = progress.get("devices") or len(progress.get("metrics", [[]]))
        if before != self.group.devices:
            self.settings.say(
                f"The run was on {before} devices, and is on {self.group.devices} from here: "
                "numbers may differ in their last digits."
            )
        if run.history:
            self._write_views()
        if self.at.epoch < self.recipe.epochs:
            self.settings.say(
                f"Going on at epoch {self.at.epoch + 1}, step {self.at.step + 1} of {self.steps}."
            )

    def _save_state(self) -> None:
        self._lost_steps()
        progress = {
            "epoch": self.at.epoch,
            "step": self.at.step,
            "best": None if self.best == -math.inf else self.best,
            "stale": self.stale,
            "until": self.until,
            "files": self.data.fingerprint,
            "devices": self.group.devices,
        }
        sync(self.model)
        metrics = [keras.ops.convert_to_numpy(v).copy() for v in self.model.metrics_variables]
        found = self.group.gather(([m.tolist() for m in metrics], self.skipped()))
        progress["metrics"] = [values for values, _ in found]
        self._skipped_before = sorted({item for _, items in found for item in items})
        progress["skipped"] = self._skipped_before
        self.at.random = random_state()
        averages = {} if self.ema is None else self.ema.get_state()
        self.run_folder.save_state(self.model, progress, {**averages, **self.at.random})

    # One epoch.

    def _run_epoch(self, callbacks: RunCallbacks) -> None:
        started = time.perf_counter()
        self.at.validating = False
        val = self.data.val
        batches = _EpochBatches(self.data.train, self.at.epoch, self.at.step)
        callbacks.begin_epoch(len(batches))
        try:
            # What is compiled holds no numbers that would have to be sent.
            with contextlib.nullcontext() if self.settings.jit else without_waiting():
                self.model.fit(
                    batches,
                    epochs=self.at.epoch + 1,
                    initial_epoch=self.at.epoch,
                    validation_data=None if val is None else _EpochBatches(val, 0, 0),
                    shuffle=False,  # the dataset has shuffled already, by the seed
                    callbacks=callbacks,
                    verbose=0,
                )
        except (KerasResNetError, Interrupted):
            raise
        except Exception:
            # Backends wrap what went wrong in reading an image in errors of their own.
            failure = self.data.train.failure or (val and val.failure)
            if isinstance(failure, KerasResNetError):
                raise failure from None
            raise
        measured = dict.fromkeys(("accuracy", self.score, "loss"))
        measured |= {} if val is None else dict.fromkeys(f"val_{name}" for name in measured)
        lost = self._lost_steps()
        row = {
            **{name: callbacks.logs[name] for name in measured},
            "learning_rate": self.schedule.value_at((self.at.epoch + 1) * self.steps - 1 - lost),
            "seconds": time.perf_counter() - started,
        }
        self._record(row)
        if lost:
            scale = float(keras.ops.convert_to_numpy(self.model.optimizer.dynamic_scale))
            self.settings.say(
                f"Steps skipped so far, for their gradients were beyond float16: {lost}. The loss "
                f"is scaled by {scale:g} now."
            )
        # Without validation the last epoch is the best.
        improved = val is None or row[f"val_{self.score}"] > self.best
        self.stale = 0 if improved else self.stale + 1
        self.best = max(self.best, row.get(f"val_{self.score}", -math.inf))
        with contextlib.nullcontext() if self.ema is None else self.ema.applied():
            self._describe(row)
            if improved:
                self.run_folder.save_model(self.model, "best.keras")
            self._keep_numbered()
        self.run_folder.save_model(self.model, "last.keras")
        self.at.epoch, self.at.step = self.at.epoch + 1, 0
        self._save_state()
        self._write_views()
        self.settings.loggers.log(self.at.epoch, row)

    def _record(self, row: dict[str, float]) -> None:
        for key, value in row.items():
            self.run_folder.history.setdefault(key, []).append(float(value))
        parts = [
            f"{part}_{self.short}:{row[key + self.score] * 100:.1f}%, "
            f"{part}_loss:{row[f'{key}loss']:.3f}"
            for part, key in (("Train", ""), ("Val", "val_"))
            if f"{key}loss" in row
        ]
        self.settings.say(
            f"Epoch:{self.at.epoch + 1:2d}, {', '.join(parts)}, Lr:{row['learning_rate']:.2e}, "
            f"{row['seconds']:.1f} s"
        )

    def _describe(self, row: dict[str, float]) -> None:
        self.model.info["training"] = {
            "recipe": self.recipe.name,
            "epoch": self.at.epoch + 1,
            "epochs": self.recipe.epochs,
            **{name: float(row[name]) for name in row if name.startswith("val_")},
            "train_pictures": self.data.train.num_samples,
            "val_pictures": self.data.val.num_samples if self.data.val else 0,
            "keras_resnet": package_version(),
            "backend": keras.backend.backend(),
        }

    def _keep_numbered(self) -> None:
        """Saves this epoch's model under its number where it is one of the best so far."""
        if not self.settings.keep:
            return
        history = self.run_folder.history
        accuracies = history.get(f"val_{self.score}", range(len(history["loss"])))
        # Of equal ones the earlier is kept, as in best.keras; without validation the last ones.
        ranked = sorted(range(len(accuracies)), key=lambda i: (-accuracies[i], i))
        kept = {f"epoch-{i + 1:03d}.keras" for i in ranked[: self.settings.keep]}
        name = f"epoch-{self.at.epoch + 1:03d}.keras"
        if name in kept:
            self.run_folder.save_model(self.model, name)
        for path in self.run_folder.folder.glob("epoch-*.keras"):
            if re.fullmatch(r"epoch-\d+\.keras", path.name) and path.name not in kept:
                path.unlink(missing_ok=True)

    def _out_of_patience(self) -> bool:
        patience = self.recipe.patience
        if patience is None or self.stale < patience:
            return False
        self.settings.say(f"Stopped early: no better validation accuracy for {patience} epochs.")
        return True

    # What a person looks at.

    def _write_views(self) -> None:
        run = self.run_folder
        run.write_history()
        run.guard(lambda path: plots.curves(run.history, path), run.path("curves.png"))
        run.write_skipped(self.skipped())

    def skipped(self) -> list[tuple[str, str]]:
        """Unreadable images of both parts, those met before a run was killed too."""
        held_out = self.data.val.skipped if self.data.val else ()
        return sorted({*self._skipped_before, *self.data.train.skipped, *held_out})

    # After each step.

    def _check_loss(self, loss: float, step: int) -> None:
        """Raises TrainingError where the loss is no number, and it is no step that was skipped."""
        half = self.recipe.precision == "fp16"
        if not (math.isfinite(loss) or (half and self._was_skipped())):
            remedy = "a lower learning_rate, or clip_norm=1"
            self._fail(
                f"The loss is {loss}", step, f"precision='bf16', {remedy}" if half else remedy
            )

    def _was_skipped(self) -> bool:
        """Whether a step that float16 could not hold has left no trace but in the mean loss."""
        sync(self.model)
        if not _is_finite(self.model.weights):
            return False
        for metric in self.model.metrics:
            # The mean begins anew; that of an epoch with nothing behind it stays no number.
            if self.at.step < self.steps and not _is_finite(metric.variables):
                metric.reset_state()
        return True

    def _lost_steps(self) -> int:
        """Steps that were skipped because float16 could not hold their gradients.

        Raises:
            TrainingError: It holds none, however little the loss is scaled.
        """
        if self.recipe.precision != "fp16":
            return 0
        sync(self.model)
        optimizer = self.model.optimizer
        scale = float(keras.ops.convert_to_numpy(optimizer.dynamic_scale))
        if not _LEAST_SCALE <= scale < math.inf:
            what = f"No gradient is within float16, with the loss scaled by {scale:g},"
            self._fail(what, self.at.step, "precision='bf16', or a lower learning_rate")
        # Not `iterations`, which are updates where gradients are accumulated.
        taken = int(keras.ops.convert_to_numpy(optimizer.inner_optimizer._iterations))
        return self.at.epoch * self.steps + self.at.step - taken

    def _fail(self, what: str, step: int, remedy: str) -> NoReturn:
        folder = str(self.run_folder.folder)
        kept = f"last.keras of epoch {self.at.epoch} in {folder!r}" if self.at.epoch else "none yet"
        message = (
            f"{what} at epoch {self.at.epoch + 1}, step {step}. The last good model: {kept}. "
            f"Try {remedy}."
        )
        self.run_folder.log(message)
        raise TrainingError(message)

    # Ctrl-C.

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends the run after the step it comes in, the second at once.

        In the middle of a step half of the weights would be new: such a state cannot be resumed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        began = 0.0

        def handle(number, frame):
            nonlocal began
            if self.at.stop.is_set():
                if self.group.size > 1 and time.monotonic() - began < 2:
                    return  # the same one once more: torchrun and SLURM both pass it on
                raise KeyboardInterrupt
            began = time.monotonic()
            self.at.stop.set()
            if self.group.size > 1 and number == signal.SIGTERM:
                return  # torchrun's to those that are left, where another one is lost
            what = "the validation" if self.at.validating else "this step"
            self.settings.say(f"\nStopping after {what}; once more to stop at once.")

        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupted(self) -> None:
        self._save_state()
        self.run_folder.save_model(self.model, "last.keras")
        if self.run_folder.history:
            self._write_views()
        self.settings.say(
            f"Interrupted at epoch {self.at.epoch + 1}, step {self.at.step} of {self.steps}. "
            "The same command goes on from here."
        )


class _EpochBatches(keras.utils.PyDataset):
    """One epoch of a dataset from a batch on: what `fit` gets, so that any epoch can be resumed."""

    def __init__(self, dataset: ImageDataset, epoch: int, start: int):
        # Keras' own threads stay out of it: the dataset reads ahead by itself.
        super().__init__(workers=1, use_multiprocessing=False)
        dataset.set_epoch(epoch)
        self.dataset, self.start = dataset, start
        self._send = Sender()
        dataset.empty = self._send.empty

    def __len__(self) -> int:
        return len(self.dataset) - self.start

    def __getitem__(self, index: int) -> tuple:
        return self._send(readable_batch(self.dataset, index + self.start))


def _is_finite(variables: Iterable[keras.Variable]) -> bool:
    return all(np.isfinite(keras.ops.convert_to_numpy(v)).all() for v in variables)


def _carry_over(before: keras.optimizers.Optimizer, after: keras.optimizers.Optimizer) -> None:
    """Momentum and step count of the last optimizer into the next, weight by weight."""
    old = {v.path.split("/", 1)[-1]: v for v in before.variables}
    for variable in after.variables:
        source = old.get(variable.path.split("/", 1)[-1])
        if source is not None and tuple(source.shape) == tuple(variable.shape):
            variable.assign(source)
