"""Keras' callbacks of a run: one list for all its calls of `fit`, which looks at every step."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_resnet.system.device import devices, fetch, set_random_state
from keras_resnet.system.errors import KerasResNetError
from keras_resnet.system.group import current
from keras_resnet.system.process import orphaned
from keras_resnet.system.progress import LINE_SECONDS, duration
from keras_resnet.training.loggers import Loggers


class TrainingError(KerasResNetError, ArithmeticError):
    """Training cannot go on, such as after a loss that is no number."""


class Interrupted(Exception):
    """Raised between two steps after Ctrl-C or SIGTERM."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run is run, as far as it does not change the result."""

    say: Callable[[str], None]  # prints a line
    bar: bool = False  # Keras' progress bar
    lines: bool = False  # where there is none: says every half minute how far an epoch is
    jit: bool = False  # compiles the training step
    checkpoint_steps: int | None = None  # between two checkpoints; `None` for none but by time
    checkpoint_seconds: float = 300.0
    keep: int = 0  # numbered models of the best epochs
    callbacks: Sequence[keras.callbacks.Callback] = ()  # the caller's own
    # Where each epoch's numbers go besides `history.csv`.
    loggers: Loggers = dataclasses.field(default_factory=lambda: Loggers([]))


@dataclasses.dataclass
class Position:
    """Where a run is, as its loop and its callbacks both see and move it."""

    steps: int  # of an epoch
    epoch: int = 0  # that comes next, or is under way
    step: int = 0  # of it, that comes next
    validating: bool = False  # its steps are done
    settled: bool = True  # no process has gradients that the others do not know
    # Set where the run shall end after the step under way.
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    metrics: list[np.ndarray] | None = None  # of an epoch that was cut, until it goes on
    # What draws random numbers outside Keras' variables, as last saved.
    random: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def stopping(self) -> bool:
        """Whether the run shall end here: it was told to, or nobody is left who could tell."""
        return self.stop.is_set() or orphaned()


class RunCallbacks(keras.callbacks.CallbackList):
    """One list for all `fit` calls of a run, which looks at every step without waiting for it.

    Keras' list turns the numbers of a step into Python's as soon as a callback wants to see it
    end, and so waits for the device. Here the loss is looked at some steps later on an
    accelerator; what the caller's callbacks get is unchanged. Those that come `first` go before
    them. `check_loss` gets a loss that is no number, and the step's number.
    """

    def __init__(
        self,
        model: keras.Model,
        at: Position,
        settings: Settings,
        *,
        epochs: int,
        first: Sequence[keras.callbacks.Callback],
        save: Callable[[], None],
        check_loss: Callable[[float, int], None],
    ):
        super().__init__(
            [*first, *settings.callbacks],
            add_history=True,
            add_progbar=settings.bar,
            model=model,
            verbose=int(settings.bar),
            epochs=epochs,
            steps=at.steps,
        )
        self._run_model, self._at, self._settings = model, at, settings
        self._group = current()  # the processes of the run, which save and end at the same step
        self._save, self._check_loss = save, check_loss
        steps, tests = ("on_batch_end", "on_train_batch_end"), ("on_test_batch_end",)
        self._heard = settings.bar or _any_has(settings.callbacks, steps)
        self._heard_in_tests = _any_has(settings.callbacks, tests)
        self._lag = 0 if devices()[0] == "cpu" else 16
        self._losses: deque[tuple[int, Callable[[], np.ndarray]]] = deque()
        self._bad: list[tuple[float, int]] = []  # losses that are no numbers, with their steps
        self._save_due = self._stop_due = False
        self._begun = False
        self._first = 0
        self._saved_at = 0.0
        self._began_at = self._told_at = 0.0
        self.logs: dict[str, Any] = {}

    def begin_epoch(self, steps: int) -> None:
        """Gets ready for one call of `fit` with so many steps."""
        self._first = self._at.step
        self._saved_at = self._began_at = self._told_at = time.monotonic()
        self._losses.clear()
        self._bad.clear()
        self._save_due = self._stop_due = False
        self._group.ask(False, False, False, False)
        self.set_params({**self.params, "steps": steps})

    def finish(self) -> None:
        """Tells the callbacks that the whole run has ended."""
        if self._begun:
            super().on_train_end(self.logs)

    def on_train_begin(self, logs=None):
        """Begins the run, at the first of its calls of `fit`."""
        if not self._begun:
            self._begun = True
            super().on_train_begin(logs)

    def on_train_end(self, logs=None):
        """Nothing: `finish` ends the run."""

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        saved, self._at.metrics = self._at.metrics, None
        if saved is not None:  # the part of the epoch before the run was killed counts
            for variable, value in zip(self._run_model.metrics_variables, saved, strict=True):
                variable.assign(value)

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            # Only here: at the start of `fit` torch's data loader draws from the same numbers.
            set_random_state(self._at.random)
        super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        """Looks at a step, and saves or ends the run where it is time to."""
        at, settings = self._at, self._settings
        at.step = self._first + batch + 1
        self._losses.append((at.step, fetch(logs["loss"])))
        if len(self._losses) > 2 * self._lag:  # rarely, for TensorFlow then waits for the device
            self._look(self._lag)
        if self._heard:
            super().on_train_batch_end(batch, logs)
        if settings.lines and time.monotonic() - self._told_at > LINE_SECONDS:
            self._tell(f"step {at.step:,} of {at.steps:,}", logs)
        model = self._run_model
        late = time.monotonic() - self._saved_at > settings.checkpoint_seconds
        ends = getattr(model, "stop_training", False)  # `fit` makes it
        late, stop, model.stop_training, bad = self._group.ask(
            late, at.stopping, ends, bool(self._bad)
        )
        if bad:
            self._judge()
        if at.step == at.steps:
            self._look_at_all()  # a bad epoch is not to be saved
            model.stop_training = self._group.any(model.stop_training or ends)
            self._group.add_up(model.metrics_variables)
            at.validating = True
            return  # the end of the epoch saves, after the validation
        due = settings.checkpoint_steps and at.step % settings.checkpoint_steps == 0
        self._save_due = self._save_due or bool(due or late)
        self._stop_due = self._stop_due or stop
        if (self._save_due or self._stop_due) and at.settled:
            self._look_at_all()
            if self._stop_due:
                raise Interrupted
            self._save()
            self._save_due, self._saved_at = False, time.monotonic()

    def on_test_begin(self, logs=None):
        """Begins a validation, with the first process' statistics of batch norms in all."""
        super().on_test_begin(logs)
        self._group.copy_first(self._run_model.non_trainable_variables)

    def on_test_end(self, logs=None):
        """Ends a validation, with the numbers of all processes."""
        self._group.add_up(self._run_model.metrics_variables)
        if logs is not None and self._group.size > 1:
            result = self._run_model.get_metrics_result()
            logs.update({k: float(keras.ops.convert_to_numpy(v)) for k, v in result.items()})
        super().on_test_end(logs)

    def on_test_batch_end(self, batch, logs=None):
        if self._heard_in_tests:
            super().on_test_batch_end(batch, logs)
        if self._settings.lines and time.monotonic() - self._told_at > LINE_SECONDS:
            self._tell(f"validation, batch {batch + 1:,}", logs)

    def _tell(self, where: str, logs: dict[str, Any]) -> None:
        """Says one line about the epoch, for those who look at a file or a pipe."""
        now, at = time.monotonic(), self._at
        self._told_at = now
        numbers = [f"{k} {float(keras.ops.convert_to_numpy(v)):.3f}" for k, v in logs.items()]
        left = []
        if not at.validating:
            pace = (now - self._began_at) / (at.step - self._first)
            left = [f"{duration(pace * (at.steps - at.step))} left"]
        line = ", ".join([where, *numbers, *left])
        self._settings.say(f"Epoch {at.epoch + 1} of {self.params['epochs']}: {line}")

    def _look(self, lag: int = 0) -> None:
        while len(self._losses) > lag:
            step, loss = self._losses.popleft()
            value = float(loss())
            if not math.isfinite(value):
                self._bad.append((value, step))
                self._losses.clear()  # those behind it are means with it

    def _look_at_all(self) -> None:
        self._look()
        if self._group.any(bool(self._bad)):
            self._judge()

    def _judge(self) -> None:
        # Where another process' loss is no number, this one's need not be yet.
        value, step = self._bad[0] if self._bad else (math.nan, self._at.step)
        self._bad.clear()
        self._check_loss(value, step)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self.logs = {k: float(keras.ops.convert_to_numpy(v)) for k, v in (logs or {}).items()}


def _any_has(callbacks: Sequence[keras.callbacks.Callback], names: Sequence[str]) -> bool:
    """Whether a callback has a method of its own of one of these names."""
    base = keras.callbacks.Callback
    # Of the instance: a LambdaCallback keeps its functions there.
    return any(
        getattr(getattr(callback, name, None), "__func__", None) is not getattr(base, name)
        for callback in callbacks
        for name in names
    )
