"""Several devices of one process: TensorFlow's replicas of a model, jax's shards of a batch.

On torch each device has a process (see `group`). Here one process feeds all, through what the
backend has for it: `tf.distribute.MirroredStrategy`, and arrays that lie on several devices of jax.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_resnet.system import group, process
from keras_resnet.system.errors import InputError

_BACKEND = keras.backend.backend()
if _BACKEND == "tensorflow":
    import tensorflow as tf
elif _BACKEND == "jax":
    import jax

_MACHINES = (
    "The devices of one machine train on {0}; several machines do on torch: set "
    "KERAS_BACKEND=torch, and start with torchrun. Received: {1}."
)


def join() -> group.Alone:
    """The group of a training: several devices, where they were asked for, or `group.join`'s.

    `--devices` asks for them; so does a `tf.distribute.MirroredStrategy` in whose scope the call
    stands, or a `keras.distribution.DataParallel` that was set.

    Raises:
        InputError: There are fewer, or what was asked for is not the devices of one machine.
    """
    found: group.Alone | None = None
    if _BACKEND == "tensorflow":
        found = _replicas()
    elif _BACKEND == "jax":
        found = _shards()
    return group.join(found)


def _count(there: int, kind: str) -> int:
    """How many devices `--devices` asks for; 1 on a CPU, unless it says how many."""
    asked = process.devices
    if asked == "all":
        return there if kind != "CPU" else 1
    if int(asked) > there and kind != "CPU":
        raise InputError(f"There are {there} {kind} devices here. Received: --devices {asked}.")
    return int(asked)


# --- TensorFlow ----------------------------------------------------------------------------------


def _replicas() -> group.Alone | None:
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        workers = list(json.loads(text).get("cluster", {}).get("worker", ()))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(
            'TF_CONFIG must be JSON such as {"cluster": {"worker": ["host:port"]}}: unset it to '
            f"train on one machine. Received: {text[:80]!r}."
        ) from None
    if len(workers) > 1:
        raise InputError(_MACHINES.format("TensorFlow", f"TF_CONFIG with {len(workers)} workers"))
    strategy = tf.distribute.get_strategy()
    if process.devices != "1" and not tf.distribute.has_strategy():
        cards = tf.config.list_physical_devices("GPU")
        kind = "GPU" if cards else "CPU"
        count = _count(len(cards), kind)
        if kind == "CPU" and count > 1:
            [processor] = tf.config.list_physical_devices("CPU")
            parts = [tf.config.LogicalDeviceConfiguration()] * count
            if tf.config.get_logical_device_configuration(processor) != parts:
                tf.config.set_logical_device_configuration(processor, parts)
        if count > 1:
            strategy = _mirrored(tuple(f"{kind}:{i}" for i in range(count)))
    if strategy.num_replicas_in_sync == 1:
        return None
    if not isinstance(strategy, tf.distribute.MirroredStrategy):
        raise InputError(_MACHINES.format("a MirroredStrategy", type(strategy).__name__))
    return _Mirrored(strategy)


@functools.cache  # a second one would take the messages of the first for its own
def _mirrored(devices: tuple[str, ...]) -> Any:
    return tf.distribute.MirroredStrategy(devices)


class _Mirrored(group.Alone):
    """A model on several devices of TensorFlow, each with its part of every batch."""

    def __init__(self, strategy: Any):
        self._strategy, self.devices = strategy, strategy.num_replicas_in_sync

    def check(self, recipe, compile, sync_bn):
        if compile:
            raise InputError(
                "The step of several devices is not compiled: leave out compile. "
                f"Received: {self.devices} devices."
            )
        if recipe.precision == "fp16" and recipe.accumulate > 1:
            raise InputError(
                "Several devices of TensorFlow accumulate no gradients of a scaled loss: pass "
                "precision='bf16' (--precision bf16), or accumulate=1. Received: precision='fp16', "
                f"accumulate={recipe.accumulate}."
            )
        return sync_bn

    def scope(self):
        return self._strategy.scope()

    def copy_first(self, variables):
        if not self.norms_together:  # else they are equal
            for variable in variables:
                variable.assign(keras.ops.convert_to_tensor(variable))

    def join_model(self, model, at, seed):
        # Keras would draw a batch to make the metrics from.
        hard = isinstance(model.loss, keras.losses.SparseCategoricalCrossentropy)
        shape, dtype = ((None,), "int32") if hard else (model.output_shape, "float32")
        model._symbolic_build(data_batch=(model.inputs[0], keras.KerasTensor(shape, dtype)))
        model._maybe_symbolic_build = lambda *_, **__: None
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        optimizer._all_reduce_sum_gradients = lambda pairs: pairs  # the step does it, once
        every = optimizer.gradient_accumulation_steps or 1
        _draw_apart(model)
        made = [_replicated_step(self._strategy, model, updates) for updates in (False, True)]

        def train(iterator):
            number = at.epoch * at.steps + at.step
            return made[(number + 1) % every == 0](iterator)

        model.train_function = train


def _draw_apart(model: keras.Model) -> None:
    """Has dropout draw other numbers on each device: all have the state of the first."""
    for layer in model._flatten_layers():
        generator = getattr(layer, "seed_generator", None)
        if generator is not None:
            generator.next = functools.partial(_next_apart, generator)
            group.leaving.callback(generator.__dict__.pop, "next", None)


def _next_apart(generator: Any, ordered: bool = True) -> Any:
    seed = type(generator).next(generator, ordered)
    replica = tf.distribute.get_replica_context()
    if replica is None:
        return seed
    number = tf.cast(replica.replica_id_in_sync_group, seed.dtype)
    return seed + tf.stack([number * 1_000_003, number * 0])


def _replicated_step(strategy: Any, model: keras.Model, updates: bool) -> Callable[[Any], dict]:
    """A step of `fit` with the gradient of the whole batch, however it is parted.

    Keras' own takes the mean of the replicas' means, and clips before it adds up. Nor can it
    accumulate gradients, for it would ask inside of a step whether it is the one to update at.
    """
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    every = optimizer.gradient_accumulation_steps or 1
    count = strategy.num_replicas_in_sync

    def step(data):
        x, y, counts = keras.utils.unpack_x_y_sample_weight(data)
        add_up = tf.distribute.get_replica_context().all_reduce
        size = tf.cast(tf.shape(x)[0], keras.config.floatx())
        share = size * count / add_up("SUM", size)
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            # Keras divides it by their number.
            loss = model.compute_loss(x, y, y_pred, counts, training=True)
            model._loss_tracker.update_state(loss * count, sample_weight=size)
            scaled = model.optimizer.scale_loss(loss * tf.cast(share, loss.dtype))
        weights = model.trainable_weights
        gradients = add_up("SUM", tape.gradient(scaled, weights))
        model.compute_metrics(x, y, y_pred, sample_weight=counts)
        if every == 1:
            model.optimizer.apply(gradients, weights)
            return
        held = optimizer._accumulated_gradients
        for sum_, gradient in zip(held, gradients, strict=True):
            sum_.assign_add(gradient)
        if updates:
            mean = optimizer._clip_gradients([sum_ / every for sum_ in held])
            optimizer._apply_weight_decay(weights)
            optimizer._backend_update_step(mean, weights, optimizer.learning_rate)
            for sum_ in held:
                sum_.assign(keras.ops.zeros_like(sum_))
        optimizer._iterations.assign_add(1)

    @tf.function(autograph=False)
    def run(iterator):
        strategy.run(step, args=(iterator.get_next(),))
        return model.get_metrics_result()  # of all replicas

    return run


@contextlib.contextmanager
def undistributed() -> Iterator[None]:
    """In which no `keras.distribution` is set: it parts no batch that its devices do not divide."""
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)


def predicted(model: keras.Model, images: Any) -> Any:
    """`predict_on_batch`, whatever devices share the batch: an array, or what the model gives.

    In the scope of a `tf.distribute` strategy each device answers for all images; the devices of
    a `keras.distribution` take batches that they divide.
    """
    distribution, count = keras.distribution.distribution(), len(images)
    missing = 0 if distribution is None else -count % distribution.num_model_replicas
    if missing:
        images = np.concatenate([images, np.repeat(images[:1], missing, axis=0)])
    return keras.tree.map_structure(lambda x: x[:count], model.predict_on_batch(images))


# --- jax -----------------------------------------------------------------------------------------


def _shards() -> group.Alone | None:
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise InputError(_MACHINES.format("jax", f"{jax.process_count()} processes"))
    distribution = keras.distribution.distribution()
    if distribution is not None:
        if not isinstance(distribution, keras.distribution.DataParallel):
            raise InputError(
                "Several devices of jax share the batch, and each has the whole model: set a "
                f"keras.distribution.DataParallel. Received: {type(distribution).__name__}."
            )
        # It could not part a batch that its devices do not divide.
        keras.distribution.set_distribution(None)
        group.leaving.callback(keras.distribution.set_distribution, distribution)
        devices = list(distribution.device_mesh.backend_mesh.devices.flat)
    elif process.devices != "1":
        if process.devices != "all":
            with contextlib.suppress(RuntimeError):  # computing has begun: as many as there are
                jax.config.update("jax_num_cpu_devices", int(process.devices))
        devices = jax.devices()
        devices = devices[: _count(len(devices), devices[0].platform.upper())]
    else:
        return None
    return _Sharded(devices) if len(devices) > 1 else None


class _Sharded(group.Alone):
    """A model on several devices of jax, each with its part of every batch.

    The step is that of one device, which XLA parts: a batch norm takes all images of a batch, and
    dropout draws the same numbers. A batch that the devices do not divide is computed by each.
    """

    def __init__(self, devices: Sequence[Any]):
        self.devices = len(devices)
        mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
        self._whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._parts = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))

    def check(self, recipe, compile, sync_bn):
        if sync_bn is False:
            raise InputError(
                "Several devices of jax compute a batch norm together: leave out sync_bn=False "
                f"(--no-sync-bn). Received: {self.devices} devices."
            )
        return True

    def join_model(self, model, at, seed):
        model.train_function = self._on_all(model.train_step)
        model.test_function = self._on_all(model.test_step)

    def _on_all(self, step: Callable) -> Callable:
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(None, self._whole))
        last = None

        def run(state, iterator):
            nonlocal last
            if state is not last:  # a callback has had it, or the epoch begins
                state = jax.device_put(state, self._whole)
            logs, last = compiled(state, jax.tree.map(self._spread, next(iterator)))
            return logs, last

        return run

    def _spread(self, array: Any) -> Any:
        return jax.device_put(array, self._whole if array.shape[0] % self.devices else self._parts)
