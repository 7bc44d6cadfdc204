"""Learning rates that change by epoch or by step, with the values of `torch.optim.lr_scheduler`.

Every schedule is a table: the rates are computed once in double precision, one an epoch (or one a
step), and looked up by integer arithmetic. In float32, `step / steps_per_epoch` slips over epoch
boundaries in long runs and `1 + cos(x)` loses its digits near the end of a run; a table does
neither, and gives every backend the same rates to half a unit in the last place.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_resnet.recipes import Recipe
from keras_resnet.system.errors import InputError, between, one_of, whole


@dataclasses.dataclass(eq=False, repr=False)
class Schedule(keras.optimizers.schedules.LearningRateSchedule, abc.ABC):
    """Base of the schedules: a table of rates with a warm-up in front.

    All lengths (`warmup_epochs`, `epochs`, `step_size`, `milestones`) are in epochs, and the steps
    and milestones of the main part are counted from the end of the warm-up, as torch's
    `SequentialLR` counts them. After the last entry of the table the rate stays what it is. All but
    `initial` and what a schedule has of its own are given by keyword.

    Args:
        initial: the rate after the warm-up, `lr` in torch.
        steps_per_epoch: calls of the optimizer in one epoch (batches, also when it accumulates
            gradients: Keras' schedules see every batch).
        warmup_epochs: epochs of warm-up before the main part.
        warmup_decay: the rate starts at `initial * warmup_decay`
            (torchvision references/classification/train.py, `--lr-warmup-decay`).
        warmup_method: `"linear"` (torch `LinearLR`) or `"constant"` (torch `ConstantLR`).
        per: `"epoch"`: the rate changes between epochs alone, as in torchvision's references;
            `"step"`: it changes every step, like a torch scheduler whose lengths are all
            multiplied by `steps_per_epoch`.

    Raises:
        InputError: where an argument cannot work.
    """

    initial: float
    _: dataclasses.KW_ONLY
    steps_per_epoch: int = 1
    warmup_epochs: int = 0
    warmup_decay: float = 0.01
    warmup_method: str = "linear"
    per: str = "epoch"

    def __post_init__(self) -> None:
        one_of("per", self.per, ("epoch", "step"))
        one_of("warmup_method", self.warmup_method, ("linear", "constant"))
        self.initial = between("initial", self.initial, 0)
        self.steps_per_epoch = whole("steps_per_epoch", self.steps_per_epoch, least=1)
        self.warmup_epochs = whole("warmup_epochs", self.warmup_epochs, least=0)
        self.warmup_decay = between("warmup_decay", self.warmup_decay, 0, 1)
        self._tensors: dict[tuple, Any] = {}

    @abc.abstractmethod
    def _main(self) -> np.ndarray:
        """Rates of the main part in float64, one a unit (epoch or step), from its beginning."""

    def _units(self, epochs: int) -> int:
        return epochs if self.per == "epoch" else epochs * self.steps_per_epoch

    @functools.cached_property
    def _table(self) -> np.ndarray:
        warmup = np.arange(self._units(self.warmup_epochs), dtype="float64")
        if self.warmup_method == "linear":
            risen = warmup / max(len(warmup), 1)
            factors = self.warmup_decay + (1 - self.warmup_decay) * risen
        else:
            factors = np.full_like(warmup, self.warmup_decay)
        return np.concatenate([self.initial * factors, self._main()])

    @property
    def _steps_per_entry(self) -> int:
        return self.steps_per_epoch if self.per == "epoch" else 1

    def value_at(self, step: int) -> float:
        """Rate of optimizer step `step`, counted from 0, as a Python float in double precision."""
        return float(self._table[min(int(step) // self._steps_per_entry, len(self._table) - 1)])

    def __call__(self, step: Any) -> Any:
        """Rate of step `step` (an integer, a Keras variable or a traced tensor) in `floatx()`."""
        if isinstance(step, (int, np.integer)):
            return ops.convert_to_tensor(self.value_at(step), dtype=keras.config.floatx())
        entry = ops.floor_divide(ops.cast(step, "int32"), self._steps_per_entry)
        entry = ops.minimum(entry, len(self._table) - 1)
        return ops.take(self._tensor_beside(entry), entry)

    def _tensor_beside(self, entry: Any) -> Any:
        dtype = keras.config.floatx()
        if keras.backend.backend() != "torch":  # there it becomes a constant of the traced graph
            return ops.convert_to_tensor(self._table, dtype=dtype)
        key = dtype, str(entry.device)
        if key not in self._tensors:  # eager: do not send the table to the device every step
            self._tensors[key] = ops.convert_to_tensor(self._table, dtype=dtype)
        return self._tensors[key]

    def get_config(self) -> dict[str, Any]:
        # Of a subclass with a constructor of its own, what that adds is its own to say.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


@keras.saving.register_keras_serializable(package="keras_resnet")
@dataclasses.dataclass(eq=False, repr=False)
class ConstantSchedule(Schedule):
    """The same rate throughout, after the warm-up.

    Examples:
        >>> schedule = ConstantSchedule(0.1, steps_per_epoch=10, warmup_epochs=1, warmup_decay=0.1)
        >>> [round(schedule.value_at(step), 3) for step in (0, 9, 10, 1000)]
        [0.01, 0.01, 0.1, 0.1]
    """

    def _main(self) -> np.ndarray:
        return np.array([self.initial])


@keras.saving.register_keras_serializable(package="keras_resnet")
@dataclasses.dataclass(eq=False, repr=False)
class StepSchedule(Schedule):
    """The rate times `gamma` every `step_size` epochs: torch's `StepLR`, and torchvision's default.

    With `step_size=1` it is torch's `ExponentialLR`.

    Args:
        step_size: epochs between two drops.
        gamma: factor of a drop, above 0 and below 1.

    Examples:
        >>> schedule = StepSchedule(0.1, step_size=30, gamma=0.1, steps_per_epoch=5004)
        >>> [round(schedule.value_at(5004 * epoch), 5) for epoch in (0, 29, 30, 60, 89)]
        [0.1, 0.1, 0.01, 0.001, 0.001]
    """

    step_size: int = 30
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.step_size = whole("step_size", self.step_size, least=1)
        self.gamma = between("gamma", self.gamma, 0, 1, ends="()")

    def _main(self) -> np.ndarray:
        # The table ends where the rate is no normal float32 any more.
        smallest = float(np.finfo("float32").tiny)
        drops = 0
        if self.initial > smallest:
            drops = math.ceil(math.log(smallest / self.initial) / math.log(self.gamma))
        rates = self.initial * self.gamma ** np.arange(drops + 1, dtype="float64")
        return np.repeat(rates, self._units(self.step_size))


@keras.saving.register_keras_serializable(package="keras_resnet")
@dataclasses.dataclass(eq=False, repr=False)
class MultiStepSchedule(Schedule):
    """The rate times `gamma` at every milestone: torch's `MultiStepLR`.

    Args:
        milestones: epochs, counted from the end of the warm-up, at whose beginning the rate drops;
            one that is named twice drops it twice.
        gamma: factor of a drop.

    Examples:
        >>> schedule = MultiStepSchedule(0.1, milestones=[100, 150], steps_per_epoch=391)
        >>> [round(schedule.value_at(391 * epoch), 5) for epoch in (99, 100, 150)]
        [0.1, 0.01, 0.001]
    """

    milestones: Iterable[int]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.milestones = sorted(whole("milestones", m, least=0) for m in self.milestones)
        self.gamma = between("gamma", self.gamma, 0, ends="(]")

    def _main(self) -> np.ndarray:
        milestones = np.array([self._units(m) for m in self.milestones], dtype="int64")
        units = np.arange(milestones.max(initial=0) + 1)
        passed = np.searchsorted(milestones, units, side="right")
        return self.initial * self.gamma ** passed.astype("float64")


@keras.saving.register_keras_serializable(package="keras_resnet")
@dataclasses.dataclass(eq=False, repr=False)
class CosineSchedule(Schedule):
    """Half a cosine from `initial` to `lr_min`: torch's `CosineAnnealingLR`, with a warm-up.

    torchvision references/classification/train.py, `--lr-scheduler cosineannealinglr`:
    `T_max` is `epochs - warmup_epochs`, `eta_min` is `lr_min`.

    Args:
        epochs: length of the whole run, the warm-up included.
        lr_min: the rate at the end, kept from there on.

    Examples:
        >>> schedule = CosineSchedule(0.5, epochs=600, warmup_epochs=5, steps_per_epoch=1252)
        >>> [round(schedule.value_at(1252 * epoch), 4) for epoch in (0, 4, 5, 302, 599)]
        [0.005, 0.401, 0.5, 0.2507, 0.0]
    """

    epochs: int
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        epochs = self.epochs = whole("epochs", self.epochs, least=1)
        if epochs <= self.warmup_epochs:
            raise InputError(
                f"epochs must be more than the {self.warmup_epochs} of warm-up. Received: {epochs}."
            )
        self.lr_min = between("lr_min", self.lr_min, 0)

    def _main(self) -> np.ndarray:
        length = self._units(self.epochs - self.warmup_epochs)
        remaining = np.arange(length, -1, -1, dtype="float64") / length
        # (1 + cos(pi t/T)) / 2, written so that the last rates keep all their digits.
        return self.lr_min + (self.initial - self.lr_min) * np.sin(np.pi / 2 * remaining) ** 2


@keras.saving.register_keras_serializable(package="keras_resnet")
class OneCycleSchedule(Schedule):
    """Up to `max_lr` and far down again: torch's `OneCycleLR` (Smith and Topin 2018).

    It changes the rate alone; torch's also cycles the momentum unless `cycle_momentum=False`.

    Args:
        max_lr: the highest rate.
        epochs: length of the cycle.
        steps_per_epoch: calls of the optimizer in one epoch.
        pct_start: part of the cycle in which the rate rises.
        anneal_strategy: `"cos"` or `"linear"`.
        div_factor: the first rate is `max_lr / div_factor`.
        final_div_factor: the last rate is the first one over `final_div_factor`.
        three_phase: fall to the first rate, as long as the rise took, before the last descent.
        per: `"step"` as torch, or `"epoch"`.

    Examples:
        >>> schedule = OneCycleSchedule(0.1, epochs=10, steps_per_epoch=100)
        >>> [round(schedule.value_at(step), 6) for step in (0, 299, 999)]
        [0.004, 0.1, 0.0]
    """

    def __init__(
        self,
        max_lr: float,
        epochs: int,
        steps_per_epoch: int = 1,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        per: str = "step",
    ):
        super().__init__(max_lr, steps_per_epoch=steps_per_epoch, per=per)
        self.max_lr = self.initial
        one_of("anneal_strategy", anneal_strategy, ("cos", "linear"))
        self.epochs = whole("epochs", epochs, least=1)
        self.pct_start = between("pct_start", pct_start, 0, 1)
        self.anneal_strategy = anneal_strategy
        self.div_factor = between("div_factor", div_factor, 0, ends="(]")
        self.final_div_factor = between("final_div_factor", final_div_factor, 0, ends="(]")
        self.three_phase = bool(three_phase)

    def get_config(self) -> dict[str, Any]:
        names = inspect.signature(OneCycleSchedule).parameters
        return {name: getattr(self, name) for name in names}

    def _main(self) -> np.ndarray:
        total = self._units(self.epochs)
        first = self.initial / self.div_factor
        last = first / self.final_div_factor
        top = self.pct_start * total - 1  # a step number, not always a whole one, as in torch
        ends, rates = [0.0, top], [first, self.initial]
        if self.three_phase:
            ends.append(2 * self.pct_start * total - 2)
            rates.append(first)
        ends.append(total - 1)
        rates.append(last)

        steps = np.arange(total, dtype="float64")
        phase = np.searchsorted(np.array(ends[1:-1]), steps, side="left")
        start, end = np.array(ends)[phase], np.array(ends)[phase + 1]
        # A cycle so short that a phase has no length is at the phase's end at once.
        length = end - start
        done = np.divide(steps - start, length, out=np.ones_like(steps), where=length != 0)
        before, after = np.array(rates)[phase], np.array(rates)[phase + 1]
        left = np.sin(np.pi / 2 * (1 - done)) ** 2 if self.anneal_strategy == "cos" else 1 - done
        return after + (before - after) * left


def make_schedule(recipe: Recipe, steps_per_epoch: int) -> Schedule:
    """The learning rates of a recipe."""
    rate, epochs = recipe.learning_rate, recipe.epochs
    common = {
        "steps_per_epoch": steps_per_epoch,
        "per": recipe.schedule_per,
        "warmup_epochs": recipe.warmup_epochs,
        "warmup_decay": recipe.warmup_decay,
    }
    if recipe.schedule == "constant":
        return ConstantSchedule(rate, **common)
    if recipe.schedule == "step":
        return StepSchedule(rate, recipe.step_size, recipe.gamma, **common)
    if recipe.schedule == "multistep":
        drops = [int(m * epochs if m < 1 else m) for m in recipe.milestones]
        return MultiStepSchedule(rate, drops, recipe.gamma, **common)
    if recipe.schedule == "cosine":
        return CosineSchedule(rate, epochs, **common)
    return OneCycleSchedule(rate, epochs, steps_per_epoch)
