"""The moving average against torch's AveragedModel under torchvision's rule."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from keras_resnet.system.errors import InputError
from keras_resnet.training.ema import ModelEMA, adjusted_decay
from keras_resnet.training.optimizers import SGD

torch = pytest.importorskip("torch")


def small_model(seed=0, dtype=None, **compile_options):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="fc1", dtype=dtype),
            keras.layers.BatchNormalization(name="bn1", momentum=0.9, dtype=dtype),
            keras.layers.Dense(3, name="fc2", dtype=dtype),
        ]
    )
    model.compile(SGD(0.1, momentum=0.9), loss="mse", **compile_options)
    return model


@pytest.fixture
def data(rng):
    x = rng.standard_normal((40, 6)).astype("float32")
    return x, rng.standard_normal((40, 3)).astype("float32")


class Weights(keras.callbacks.Callback):
    """Keeps the weights after every batch, by epoch."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append([])

    def on_train_batch_end(self, batch, logs=None):
        self.epochs[-1].append([np.array(w) for w in self.model.get_weights()])


def averages_of(ema):
    return [np.array(ops.convert_to_numpy(a)) for a in ema._averages]


def torchvision_ema(start, epochs, decay, steps, warmup_epochs):
    """references/classification: utils.ExponentialMovingAverage in train.train_one_epoch."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, array in enumerate(start):
                self.register_buffer(f"w{i}", torch.tensor(array))

    def ema_avg(avg_model_param, model_param, num_averaged):
        return decay * avg_model_param + (1 - decay) * model_param

    model = Model()
    model_ema = torch.optim.swa_utils.AveragedModel(model, "cpu", ema_avg, use_buffers=True)
    for epoch, batches in enumerate(epochs):
        for i, arrays in enumerate(batches):
            for buffer, array in zip(model.buffers(), arrays, strict=True):
                buffer.copy_(torch.tensor(array))
            if i % steps == 0:
                model_ema.update_parameters(model)
                if epoch < warmup_epochs:
                    model_ema.n_averaged.fill_(0)
    return [b.numpy() for b in model_ema.module.buffers()], int(model_ema.n_averaged)


def assert_close(got, expected, rtol=1e-6):
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=rtol, atol=rtol * np.abs(e).max())


@pytest.mark.parametrize(
    "steps, warmup_epochs",
    [
        (2, 2),
        *[
            pytest.param(s, w, marks=pytest.mark.once)
            for s, w in ((1, 0), (1, 1), (3, 0), (3, 2), (100, 0))
        ],
    ],
)
def test_the_averages_of_a_run_are_torchvisions(steps, warmup_epochs, data):
    x, y = data
    model = small_model()
    start = [np.array(w) for w in model.get_weights()]
    weights, ema = Weights(), ModelEMA(decay=0.8, steps=steps, warmup_epochs=warmup_epochs)
    model.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=[ema, weights])
    expected, count = torchvision_ema(start, weights.epochs, 0.8, steps, warmup_epochs)
    assert ema.n_averaged == count
    assert_close(averages_of(ema), expected)
    # Batch-norm statistics are among them, and they moved.
    moving = [i for i, w in enumerate(model.weights) if "moving" in w.path]
    assert len(moving) == 2
    assert all(np.abs(averages_of(ema)[i] - start[i]).max() > 1e-3 for i in moving)


def test_validation_sees_the_averages_and_training_does_not(data):
    x, y = data
    seen, raw, averaged = [], [], []

    class Spy(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            seen.append(self.model.get_weights())
            averaged.append(averages_of(ema))

        def on_epoch_end(self, epoch, logs=None):
            raw.append(self.model.get_weights())

    ema = ModelEMA(decay=0.9)
    model = small_model()
    options = {"batch_size": 8, "epochs": 3, "verbose": 0, "shuffle": False}
    history = model.fit(x, y, validation_data=(x, y), callbacks=[ema, Spy()], **options)
    for one, other in zip(seen, averaged, strict=True):
        assert_close(one, other, rtol=0)
    plain, weights = small_model(), Weights()
    plain.fit(x, y, callbacks=[weights], **options)
    for ours, other in zip(raw, weights.epochs, strict=True):
        assert_close(ours, other[-1], rtol=0)
    loss = ema.average_model()
    loss.compile(loss="mse")
    # Keras' running mean over batches of 8 and of 32 rounds differently.
    np.testing.assert_allclose(
        history.history["val_loss"][-1], loss.evaluate(x, y, verbose=0), rtol=1e-5
    )
    np.testing.assert_allclose(
        model.evaluate(x, y, verbose=0, callbacks=[ema]), loss.evaluate(x, y, verbose=0), rtol=1e-6
    )
    assert_close(model.get_weights(), raw[-1], rtol=0)


@pytest.mark.once
def test_validation_can_keep_the_models_own_weights(data):
    x, y = data
    losses = []
    for callbacks in ([ModelEMA(0.9, evaluate=False)], []):
        model = small_model()
        history = model.fit(
            x, y, batch_size=8, epochs=2, verbose=0, shuffle=False, validation_data=(x, y),
            callbacks=callbacks,
        )  # fmt: skip
        losses.append(history.history["val_loss"])
    assert losses[0] == losses[1]


def test_the_own_weights_come_back_to_the_bit_even_after_an_error(data):
    x, y = data
    model, ema = small_model(), ModelEMA(decay=0.9)
    model.fit(x, y, batch_size=8, epochs=1, verbose=0, callbacks=[ema])
    before = model.get_weights()
    with pytest.raises(RuntimeError, match="midway"), ema.applied() as inside:
        assert inside is model
        assert_close(model.get_weights(), averages_of(ema), rtol=0)
        assert np.abs(model.get_weights()[0] - before[0]).max() > 1e-5
        raise RuntimeError("midway")
    assert_close(model.get_weights(), before, rtol=0)


@pytest.mark.once
def test_a_validation_that_was_interrupted_is_mended_by_the_next_fit(data):
    x, y = data

    class Interrupt(keras.callbacks.Callback):
        armed = True

        def on_test_batch_begin(self, batch, logs=None):
            if self.armed:
                self.armed = False
                raise KeyboardInterrupt

    results = []
    for interrupted in (True, False):
        model, ema = small_model(), ModelEMA(decay=0.9)
        callbacks = [ema, Interrupt()] if interrupted else [ema]
        options = {"batch_size": 8, "shuffle": False, "verbose": 0, "validation_data": (x, y)}
        try:
            model.fit(x, y, epochs=1, callbacks=callbacks, **options)
        except KeyboardInterrupt:
            assert interrupted
        model.fit(x, y, epochs=1, callbacks=[ema], **options)
        results.append([model.get_weights(), averages_of(ema)])
    assert_close(results[0][0], results[1][0], rtol=0)
    assert_close(results[0][1], results[1][1], rtol=0)


class Cut(keras.callbacks.Callback):
    """Saves the averages' state after a batch, and stops there."""

    def __init__(self, ema, batch):
        super().__init__()
        self.ema, self.batch, self.state = ema, batch, None

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch:
            self.state = self.ema.get_state()
            self.model.stop_training = True


CUTS = [
    pytest.param(*case, marks=[] if i == 0 else [pytest.mark.once])
    for i, case in enumerate([(1, 3, 2), (1, 2, 1), (1, 3, 1), (0, 1, 1), (0, 4, 2), (1, 5, 1)])
]


@pytest.mark.parametrize("epoch, done, accumulation", CUTS)
def test_a_run_cut_anywhere_continues_to_the_bit(epoch, done, accumulation, data):
    x, y = data
    options = {"gradient_accumulation_steps": accumulation} if accumulation > 1 else {}

    def make():
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        model.set_weights([np.ones((6, 3)), np.zeros(3)])
        model.compile(SGD(0.01, momentum=0.9, **options), loss="mse")
        return model, ModelEMA(decay=0.8, steps=2, warmup_epochs=1)

    def fit(model, callbacks, epochs, skip=0):
        for e in epochs:
            model.fit(
                x[skip * 8 :], y[skip * 8 :], batch_size=8, shuffle=False, verbose=0,
                initial_epoch=e, epochs=e + 1, callbacks=callbacks,
            )  # fmt: skip

    model, ema = make()
    fit(model, [ema], range(3))
    expected = ema.get_state(), model.get_weights()

    model, ema = make()
    cut = Cut(ema, done - 1)
    fit(model, [ema], range(epoch))
    fit(model, [ema, cut], [epoch])
    ema = ModelEMA(decay=0.8, steps=2, warmup_epochs=1)
    ema.set_state(cut.state)
    if done < 5:
        fit(model, [ema], [epoch], skip=done)
    fit(model, [ema], range(epoch + 1, 3))

    assert_close(model.get_weights(), expected[1], rtol=0)
    state = ema.get_state()
    assert state.keys() == expected[0].keys()
    assert state["n_averaged"] > 1
    for key in state:
        np.testing.assert_array_equal(state[key], expected[0][key])


@pytest.mark.once
def test_accumulated_batches_count_as_one_step(data):
    x, y = data
    counts = []
    for options in ({}, {"gradient_accumulation_steps": 5}):
        model = small_model()
        model.compile(SGD(0.1, **options), loss="mse")
        ema = ModelEMA(decay=0.8, steps=1)
        model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[ema])
        counts.append(ema.n_averaged)
    assert counts == [20, 4]


@pytest.mark.once
def test_a_second_fit_goes_on_averaging_and_counts_its_epochs_anew(data):
    x, y = data
    model, ema, weights = small_model(), ModelEMA(decay=0.8, steps=2), Weights()
    start = model.get_weights()
    for _ in range(2):
        model.fit(x, y, batch_size=8, epochs=1, verbose=0, callbacks=[ema, weights])
    expected, count = torchvision_ema(start, weights.epochs, 0.8, 2, 0)
    assert ema.n_averaged == count == 6
    assert_close(averages_of(ema), expected)


def test_steps_per_execution_average_once_an_execution(backend, data):
    if backend == "torch":
        pytest.skip("Keras runs one step per execution on torch")
    x, y = data
    model, ema, weights = small_model(steps_per_execution=2), ModelEMA(0.8, steps=2), Weights()
    start = model.get_weights()
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[ema, weights])
    expected, count = torchvision_ema(start, weights.epochs, 0.8, 1, 0)
    assert ema.n_averaged == count == 6
    assert_close(averages_of(ema), expected)


def test_the_average_model_stands_by_itself(data, tmp_path):
    x, y = data
    model, ema = small_model(), ModelEMA(decay=0.9)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[ema])
    before = model.get_weights()
    average = ema.average_model()
    assert_close(average.get_weights(), averages_of(ema), rtol=0)
    assert type(average) is type(model) and average is not model
    average.save(tmp_path / "average.keras")
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    again = keras.models.load_model(tmp_path / "average.keras")
    assert_close(again.get_weights(), average.get_weights(), rtol=0)
    assert np.abs(model.get_weights()[0] - before[0]).max() > 1e-5


def test_half_precision_weights_are_averaged_in_float32(data):
    x, y = data
    model = small_model(dtype="bfloat16")
    weights, ema = Weights(), ModelEMA(decay=0.99)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[ema, weights])
    epochs = [[[w.astype("float32") for w in arrays] for arrays in e] for e in weights.epochs]
    expected, _ = torchvision_ema(epochs[0][0], epochs, 0.99, 1, 0)
    assert_close(averages_of(ema), expected)
    own = model.get_weights()
    with ema.applied():
        assert {keras.backend.standardize_dtype(w.dtype) for w in model.weights} == {"bfloat16"}
    assert_close(model.get_weights(), own, rtol=0)


def test_integers_are_copied(rng):
    class Counter(keras.layers.Layer):
        def build(self, shape):
            self.count = self.add_weight(shape=(), dtype="int32", trainable=False, name="count")
            self.scale = self.add_weight(shape=(2,), initializer="ones", name="scale")

        def call(self, x):
            return x * self.scale

    model = keras.Sequential([keras.Input((2,)), Counter()])
    ema = ModelEMA(decay=0.5)
    ema.build(model)
    for i in range(3):
        model.layers[0].count.assign(i + 7)
        model.layers[0].scale.assign([2.0**i, 1.0])
        ema.update()
    averages = {w.name: a for w, a in zip(model.weights, averages_of(ema), strict=True)}
    assert averages["count"] == 9
    np.testing.assert_allclose(averages["scale"], [0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 4, 1.0])


@pytest.mark.once
def test_no_batch_waits_for_the_device_or_goes_through_numpy(data, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    model, ema = small_model(), ModelEMA(decay=0.9)
    ema.set_model(model)
    ema.on_train_begin()
    ema.on_epoch_begin(0)
    ema.on_train_batch_begin(0)
    ema.on_train_batch_begin(1)
    with Record():
        ema.on_train_batch_begin(2)
    assert ema.n_averaged == 2
    assert [name for name in seen if "lerp" in name] == ["aten._foreach_lerp_.Scalar"]
    assert not [n for n in seen if "_local_scalar_dense" in n or "copy" in n or "clone" in n]
    # Keras runs batch-end hooks in the background unless some callback insists on its own.
    hooks = keras.callbacks.CallbackList([ema], add_history=True, model=model)
    assert hooks._async_train


@pytest.mark.once
def test_averages_have_the_strides_of_their_weights():
    model = keras.Sequential([keras.Input((3, 4)), keras.layers.Dense(5)])
    kernel = model.layers[0].kernel
    kernel.value.data = kernel.value.data.t().contiguous().t()
    ema = ModelEMA()
    ema.build(model)
    assert ema._averages[0].value.stride() == kernel.value.stride() == (1, 4)


@pytest.mark.once
def test_the_adjusted_decay_is_the_references():
    # train.py: adjust = world_size * batch_size * model_ema_steps / epochs
    #           alpha = min(1.0, (1.0 - model_ema_decay) * adjust); decay = 1.0 - alpha
    assert adjusted_decay(0.99998, 128, 600, 32, 8) == 1.0 - min(
        1.0, (1.0 - 0.99998) * (8 * 128 * 32 / 600)
    )
    assert adjusted_decay(0.9, 1024, 10) == 0.0
    with pytest.raises(InputError, match="epochs must be above 0"):
        adjusted_decay(0.9, 32, 0)


@pytest.mark.once
@pytest.mark.parametrize(
    "options, message",
    [
        ({"decay": 1.5}, "decay must be at least 0 and at most 1"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InputError, match=message):
        ModelEMA(**options)


@pytest.mark.once
def test_what_cannot_work_says_what_to_do(data):
    with pytest.raises(InputError, match="call `build"):
        ModelEMA().average_model()
    with pytest.raises(InputError, match="build it first"):
        ModelEMA().build(keras.Sequential([keras.layers.Dense(1)]))
    other, ema = ModelEMA(), ModelEMA()
    other.build(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]))
    ema.build(small_model())
    with pytest.raises(InputError, match="2 arrays were stored, the model has 8"):
        ema.set_state(other.get_state())
    with ema.applied(), pytest.raises(InputError, match="nothing to average"):
        ema.update()
