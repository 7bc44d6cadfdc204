"""The exponential moving average of torchvision's recipes: weights and batch-norm statistics.

Keras' `use_ema` averages trainable variables alone, so that the averaged weights meet batch-norm
statistics that belong to others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_resnet.system.errors import InputError, between, whole


def adjusted_decay(
    decay: float, batch_size: int, epochs: int, steps: int = 32, world_size: int = 1
) -> float:
    """Decay for a run of another length, batch size or spacing: what torchvision really uses.

    Its command line's `--model-ema-decay` is no decay itself, but
    `1 - min(1, (1 - decay) * world_size * batch_size * steps / epochs)` is
    (references/classification/train.py, after pycls).

    Args:
        decay: the recipe's `--model-ema-decay`.
        batch_size: images in a batch of one device.
        epochs: length of the run.
        steps: optimizer steps between two updates, `--model-ema-steps`.
        world_size: number of devices.

    Examples:
        >>> round(adjusted_decay(0.99998, batch_size=128, epochs=600, world_size=8), 6)
        0.998908
    """
    between("decay", decay, 0, 1)
    sizes = {"batch_size": batch_size, "epochs": epochs, "steps": steps, "world_size": world_size}
    for name, size in sizes.items():
        between(name, size, 0, ends="(]")
    return 1.0 - min(1.0, (1.0 - decay) * world_size * batch_size * steps / epochs)


class ModelEMA(keras.callbacks.Callback):
    """Averages all weights of a model while it trains, and validates with the averages.

    torchvision's `ExponentialMovingAverage` (references/classification/utils.py) in `fit`: after
    the first optimizer step of an epoch and every `steps` steps from there,
    `average = decay * average + (1 - decay) * weight`, for trainable weights and batch-norm
    statistics alike. The first update copies, and so does every update of the warm-up epochs.
    Integers are copied always. Averages of half-precision weights are kept in float32.

    During `model.fit(validation_data=...)`, and in `model.evaluate(callbacks=[ema])`, the model
    has the averaged weights; training continues with its own, equal to the bit.

    The work is done when the next batch begins: a callback that asks to be called when a batch
    ends makes Keras wait for the device there. `get_state` and the other methods bring the
    averages up to date first; call them when a batch or an epoch has ended, not from
    `on_train_batch_begin`.

    Args:
        decay: weight of the old average; `adjusted_decay` computes torchvision's.
        steps: optimizer steps between two updates. Where the optimizer accumulates gradients over
            k batches, a step is k batches of an epoch.
        warmup_epochs: epochs in whose course the averages are mere copies (the warm-up of the
            learning rate, in torchvision).
        evaluate: whether validation uses the averages.

    Raises:
        InputError: where an argument cannot work.

    Examples:
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> ema = ModelEMA(decay=0.9, steps=1)
        >>> x, y = np.ones((8, 2)), np.ones((8, 1))
        >>> history = model.fit(x, y, epochs=2, batch_size=4, callbacks=[ema], verbose=0)
        >>> ema.n_averaged
        4
        >>> ema.average_model().count_params() == model.count_params()
        True
    """

    def __init__(
        self, decay: float = 0.9999, steps: int = 1, warmup_epochs: int = 0, evaluate: bool = True
    ):
        super().__init__()
        self.decay = between("decay", decay, 0, 1)
        self.steps = whole("steps", steps, 1)
        between("warmup_epochs", warmup_epochs, 0)
        self.warmup_epochs = warmup_epochs
        self.evaluate = bool(evaluate)
        self.n_averaged = 0
        self._averages: list[Any] | None = None
        self._average_of: Any = None  # the model that the averages belong to
        self._own: list[Any] | None = None  # the model's weights, while it has the averages
        self._epoch = 0
        self._position = 0  # batches of this epoch that have been counted
        self._offset = 0  # batches of this epoch that an interrupted run had done
        self._running: int | None = None  # number of the batch that has begun
        self._accumulation = 1
        self._state: Mapping[str, np.ndarray] | None = None  # given before the model was known
        self._resumed = False

    # Averaging

    def build(self, model: keras.Model) -> None:
        """Makes the averages, equal to the weights; `fit` calls this for a model not seen yet."""
        if not model.weights:
            raise InputError(f"Model {model.name!r} has no weights yet: build it first.")
        self._average_of, self._own, self.n_averaged = model, None, 0
        self._averages = [
            keras.Variable(
                # a copy: JAX gives the memory of a weight away in the next training step
                ops.cast(ops.copy(ops.convert_to_tensor(w)), _average_dtype(w)),
                dtype=_average_dtype(w),
                trainable=False,
                name="average",
            )
            for w in model.weights
        ]
        floats = [(a, w) for a, w in self._pairs() if "float" in _dtype(a)]
        self._integers = [(a, w) for a, w in self._pairs() if "float" not in _dtype(a)]
        self._lerp = _make_lerp(floats, self.decay)
        if self._state is not None:
            state, self._state = self._state, None
            self.set_state(state)

    def update(self) -> None:
        """Takes the weights as they are into the averages, torch's `update_parameters`."""
        pairs = self._pairs()
        if self._own is not None:
            raise InputError("The model has its averaged weights: there is nothing to average.")
        if self.n_averaged == 0:
            _copy(pairs)
        else:
            _copy(self._integers)
            self._lerp()
        self.n_averaged += 1

    def _pairs(self) -> list[tuple[Any, Any]]:
        if self._averages is None:
            raise InputError(
                "No averages yet: pass this callback to `fit`, or call `build(model)`, first."
            )
        return list(zip(self._averages, self._average_of.weights, strict=True))

    def _count(self, done: int) -> None:
        """Updates, if one is due, after `done` batches of the epoch."""
        first = self._position // self._accumulation
        last = done // self._accumulation
        self._position = done
        # Due after the optimizer steps 0, steps, 2 * steps ... of an epoch.
        if -(-last // self.steps) > -(-first // self.steps):
            self._attach()
            self.update()
            if self._epoch < self.warmup_epochs:
                self.n_averaged = 0

    def _flush(self) -> None:
        """Counts the batch that has ended since the last one began."""
        if self._running is None:
            return
        done = self._running + getattr(self._model, "steps_per_execution", 1)
        known = (self.params or {}).get("steps")
        self._running = None
        self._count(self._offset + (min(done, known) if known else done))

    def _attach(self) -> keras.Model:
        # Through `model`, not `_model`: on JAX it hands the weights of the running epoch over.
        model = self.model
        if model is not None and model is not self._average_of:
            self.build(model)
        return model

    # The averaged weights in the model

    @contextlib.contextmanager
    def applied(self) -> Iterator[keras.Model]:
        """The model with its averaged weights; its own come back after the block, bit by bit.

        Examples:
            >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
            >>> ema = ModelEMA(decay=0.5)
            >>> ema.build(model)
            >>> model.layers[0].kernel.assign([[8.0]]) is None
            False
            >>> with ema.applied():
            ...     during = float(model.get_weights()[0][0, 0])
            >>> during != 8.0, float(model.get_weights()[0][0, 0])
            (True, 8.0)
        """
        self._flush()
        self._swap_in()
        try:
            yield self._average_of
        finally:
            self._swap_out()

    def _swap_in(self) -> None:
        pairs = self._pairs()
        if self._own is None:
            self._own = [ops.copy(ops.convert_to_tensor(w)) for _, w in pairs]
            for average, weight in pairs:
                weight.assign(ops.copy(ops.cast(average, _dtype(weight))))

    def _swap_out(self) -> None:
        if self._own is not None:
            for own, (_, weight) in zip(self._own, self._pairs(), strict=True):
                weight.assign(own)
            self._own = None

    def average_model(self) -> keras.Model:
        """A new model, built from the config of the averaged one, with the averaged weights."""
        self._flush()
        pairs = self._pairs()
        model = type(self._average_of).from_config(self._average_of.get_config())
        if [w.shape for w in model.weights] != [w.shape for _, w in pairs]:
            raise InputError(
                f"A {type(model).__name__} cannot be built from its config alone. "
                "Use `with ema.applied():` and save the model there."
            )
        for (average, _), weight in zip(pairs, model.weights, strict=True):
            weight.assign(ops.copy(ops.cast(average, _dtype(weight))))
        return model

    # State

    def get_state(self) -> dict[str, np.ndarray]:
        """Averages and counters as NumPy arrays by name, to be stored with a checkpoint.

        The averages are in the order of `model.weights`, without the weights' paths: Keras numbers
        layers anew in every process. `position` is the number of batches of `epoch` that the
        averages have seen.
        """
        self._flush()
        counts = {"n_averaged": self.n_averaged, "epoch": self._epoch, "position": self._position}
        state = {name: np.array(count, "int64") for name, count in counts.items()}
        for i, (average, _) in enumerate(self._pairs()):
            state[f"average/{i:05d}"] = np.array(ops.convert_to_numpy(average))
        return state

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from `get_state`; before `fit`, it waits for the model.

        The epoch that the state comes from is continued in its middle: the batch that `fit` then
        calls number 0 is number `position`.

        Raises:
            InputError: where the state is not one of this model.
        """
        if self._averages is None:
            self._state = dict(state)
            return
        stored = [state[key] for key in sorted(state) if key.startswith("average/")]
        shapes = [tuple(a.shape) for a in self._averages]
        if [tuple(s.shape) for s in stored] != shapes:
            raise InputError(
                f"The stored averages are not this model's: {len(stored)} arrays were stored, the "
                f"model has {len(shapes)} weights, and the shapes must agree. Build the model that "
                "the checkpoint was written from, or start without its averages."
            )
        for average, value in zip(self._averages, stored, strict=True):
            average.assign(value)
        self.n_averaged = int(state["n_averaged"])
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._running, self._resumed = None, True

    # What Keras calls

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Makes the averages and takes back what an interrupted validation left behind."""
        model = self._attach()
        self._swap_out()
        self._running = None
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        self._accumulation = getattr(optimizer, "gradient_accumulation_steps", None) or 1

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Counts the batches of the epoch from its beginning, or from where a run was cut."""
        self._offset = self._position if self._resumed and epoch == self._epoch else 0
        self._epoch, self._position, self._resumed = epoch, self._offset, False

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._count(self._offset + batch)
        self._running = batch

    def on_test_begin(self, logs: dict | None = None) -> None:
        self._flush()
        if self.evaluate and self._averages is not None and self.model is self._average_of:
            self._swap_in()

    def on_test_end(self, logs: dict | None = None) -> None:
        self._swap_out()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._flush()


def _make_lerp(pairs: list[tuple[Any, Any]], decay: float) -> Callable[[], None]:
    """A function that moves every first variable of `pairs` towards its second, in one go."""
    averages, weights = [a for a, _ in pairs], [w for _, w in pairs]
    backend = keras.backend.backend()
    if backend == "torch":
        import torch
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        multi_tensor_lerp = get_ema_multi_avg_fn(decay)

        def lerp():
            with torch.no_grad():
                old = [a.value for a in averages]
                new = [w.value.to(a.dtype) for a, w in zip(old, weights, strict=True)]
                if old:
                    multi_tensor_lerp(old, new, None)

        return lerp

    def moved(old, new):
        return [
            a + (1.0 - decay) * (ops.cast(w, _dtype(a)) - a) for a, w in zip(old, new, strict=True)
        ]

    if backend == "jax":
        import jax

        compiled = jax.jit(moved)

        def lerp():
            values = compiled([a.value for a in averages], [w.value for w in weights])
            for average, value in zip(averages, values, strict=True):
                average.assign(value)

        return lerp

    def lerp():
        values = moved([ops.convert_to_tensor(a) for a in averages], weights)
        for average, value in zip(averages, values, strict=True):
            average.assign(value)

    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(lerp)
    return lerp


def _copy(pairs: list[tuple[Any, Any]]) -> None:
    for average, weight in pairs:
        average.assign(ops.copy(ops.cast(weight, _dtype(average))))


def _dtype(variable: Any) -> str:
    return keras.backend.standardize_dtype(variable.dtype)


def _average_dtype(variable: Any) -> str:
    return "float32" if _dtype(variable) in ("float16", "bfloat16") else _dtype(variable)
