"""Each layer against torch's modules and against stock Keras layers, on the backend that runs."""

from __future__ import annotations

import contextlib
import os

import keras
import numpy as np
import pytest
from keras import ops

from keras_resnet.layers.conv import Conv2D, torch_kernel
from keras_resnet.layers.norm import BatchNormalization, Normalize
from keras_resnet.layers.pool import MaxPooling2D, ZeroPaddedShortcut

torch = pytest.importorskip("torch")
F = torch.nn.functional

BACKEND = os.environ["KERAS_BACKEND"]
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
FORMATS = ("channels_last", "channels_first")
torch_only = pytest.mark.skipif(BACKEND != "torch", reason="a property of the torch path")


def assert_close(actual, expected, dtype="float32", what=""):
    """Largest difference within the tolerance, relative to the largest value."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape, what
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    worst = float(np.abs(actual - expected).max(initial=0))
    assert worst <= TOLERANCE[dtype] * scale, f"{what}: off by {worst:.3g}, scale {scale:.3g}"


@pytest.fixture(autouse=True)
def float64_on_jax():
    """jax computes in float32 unless told otherwise."""
    if BACKEND != "jax":
        yield
        return
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def numpy(x) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float64")))


def vjp(layer, inputs, cotangent, training=False):
    """Output and the gradients of `sum(output * cotangent)` by inputs and trainable weights."""
    nested = isinstance(inputs, list)
    flat = inputs if nested else [inputs]
    if BACKEND == "torch":
        tensors = [ops.convert_to_tensor(x).requires_grad_() for x in flat]
        y = call(layer, tensors if nested else tensors[0], training)
        weights = [v.value for v in layer.trainable_variables]
        grads = torch.autograd.grad(
            (y * ops.convert_to_tensor(cotangent)).sum(), [*tensors, *weights]
        )
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        tensors = [tf.Variable(x) for x in flat]
        values = [tf.convert_to_tensor(t) for t in tensors]
        with tf.GradientTape() as tape:
            tape.watch(values)
            y = call(layer, values if nested else values[0], training)
            loss = tf.reduce_sum(y * cotangent)
        weights = [v.value for v in layer.trainable_variables]
        grads = tape.gradient(loss, [*values, *weights])
    else:
        import jax

        def loss(tensors, weights):
            given = list(tensors) if nested else tensors[0]
            options = {"training": training} if isinstance(layer, BatchNorms) else {}
            y, state = layer.stateless_call(
                weights, [v.value for v in layer.non_trainable_variables], given, **options
            )
            return (y * cotangent).sum(), (y, state)

        tensors = [jax.numpy.asarray(x) for x in flat]
        weights = [v.value for v in layer.trainable_variables]
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, (y, state)), grads = gradient(tensors, weights)
        grads = [*grads[0], *grads[1]]
        for variable, value in zip(layer.non_trainable_variables, state, strict=True):
            variable.assign(value)
    grads = [numpy(g) for g in grads]
    return numpy(y), grads[: len(flat)], grads[len(flat) :]


BatchNorms = (BatchNormalization, keras.layers.BatchNormalization)


def call(layer, x, training):
    return layer(x, training=training) if isinstance(layer, BatchNorms) else layer(x)


@contextlib.contextmanager
def where_implemented(data_format):
    """Skips where the backend cannot compute channels first on this machine."""
    if BACKEND != "tensorflow" or data_format == "channels_last":
        yield
        return
    import tensorflow as tf

    try:
        yield
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError) as error:
        pytest.skip(f"tensorflow on CPU: {str(error).splitlines()[0][:120]}")


def to_format(x, data_format):
    """From torch's NCHW."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if data_format == "channels_last" else x


def from_format(x, data_format):
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if data_format == "channels_last" else x


def leaf(x):
    return torch.tensor(x, requires_grad=True)


CONVS = {
    "stem": dict(kernel_size=7, strides=2, pad=3),
    "3x3": dict(kernel_size=3, pad=1),
    "3x3/2": dict(kernel_size=3, strides=2, pad=1),
    "1x1/2": dict(kernel_size=1, strides=2, use_bias=False),
    "biased 1x1": dict(kernel_size=1),
    "grouped/2": dict(kernel_size=3, strides=2, pad=1, groups=2),
    "dilated": dict(kernel_size=3, pad=2, dilation_rate=2),
    "one-sided pad": dict(kernel_size=(3, 1), pad=(1, 0)),
    "wide pad": dict(kernel_size=3, pad=2),
}


# Each of jax' convolutions takes a second to compile: float64 there for one of them.
CONV_CASES = [
    (case, dtype)
    for case in CONVS
    for dtype in ("float32", "float64")
    if BACKEND != "jax" or dtype == "float32" or case == "3x3/2"
]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("case, dtype", CONV_CASES)
def test_convolution_and_its_gradients_are_torchs(case, data_format, dtype, rng):
    options = CONVS[case]
    batch, height, width = (1, 11, 14) if case == "3x3/2" else (3, 13, 10)
    x = rng.normal(size=(batch, 4, height, width)).astype(dtype)
    module = torch.nn.Conv2d(
        4,
        6,
        options["kernel_size"],
        stride=options.get("strides", 1),
        padding=options.get("pad", 0),
        dilation=options.get("dilation_rate", 1),
        groups=options.get("groups", 1),
        bias=options.get("use_bias", True),
        dtype=getattr(torch, dtype),
    )
    t = leaf(x)
    expected = module(t)
    cotangent = rng.normal(size=expected.shape).astype(dtype)
    expected_grads = torch.autograd.grad(
        (expected * torch.tensor(cotangent)).sum(), [t, *module.parameters()]
    )

    layer = Conv2D(6, data_format=data_format, dtype=dtype, **options)
    layer.build(to_format(x, data_format).shape)
    layer.set_weights(
        [module.weight.detach().numpy().transpose(2, 3, 1, 0)]
        + ([module.bias.detach().numpy()] if module.bias is not None else [])
    )
    with where_implemented(data_format):
        y, (dx,), grads = vjp(layer, to_format(x, data_format), to_format(cotangent, data_format))
    assert_close(from_format(y, data_format), expected.detach().numpy(), dtype, "output")
    assert tuple(layer.compute_output_shape(to_format(x, data_format).shape)) == y.shape
    assert_close(from_format(dx, data_format), expected_grads[0].numpy(), dtype, "input gradient")
    assert_close(
        grads[0], expected_grads[1].numpy().transpose(2, 3, 1, 0), dtype, "kernel gradient"
    )
    if module.bias is not None:
        assert_close(grads[1], expected_grads[2].numpy(), dtype, "bias gradient")


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("strides", [1, 2])
def test_convolution_without_pad_is_stock_keras(strides, padding, data_format, rng):
    x = to_format(rng.normal(size=(2, 4, 9, 12)).astype("float32"), data_format)
    options = dict(
        kernel_size=3, strides=strides, padding=padding, activation="relu", data_format=data_format
    )
    stock, layer = keras.layers.Conv2D(6, **options), Conv2D(6, **options)
    with where_implemented(data_format):
        expected = numpy(stock(x))
        layer.build(x.shape)
        layer.set_weights(stock.get_weights())
        assert_close(numpy(layer(x)), expected)


@pytest.mark.parametrize("data_format", FORMATS)
def test_pad_is_zero_padding_before_a_stock_convolution(data_format, rng):
    x = to_format(rng.normal(size=(2, 4, 9, 12)).astype("float32"), data_format)
    options = dict(kernel_size=3, strides=2, data_format=data_format)
    stock = keras.Sequential(
        [keras.layers.ZeroPadding2D(1, data_format=data_format), keras.layers.Conv2D(6, **options)]
    )
    with where_implemented(data_format):
        expected = numpy(stock(x))
        layer = Conv2D(6, pad=1, **options)
        layer.build(x.shape)
        layer.set_weights(stock.get_weights())
        assert_close(numpy(layer(x)), expected)


def torch_norm(channels, dtype, rng, **options):
    norm = torch.nn.BatchNorm2d(channels, dtype=getattr(torch, dtype), **options)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.tensor(rng.normal(size=channels)))
        norm.running_var.copy_(torch.tensor(rng.uniform(0.5, 2, size=channels)))
    return norm


def norm_like(module, data_format, dtype, **options):
    axis = -1 if data_format == "channels_last" else 1
    layer = BatchNormalization(axis=axis, dtype=dtype, **options)
    layer.build(
        (None, None, None, module.num_features)
        if axis == -1
        else (None, module.num_features, None, None)
    )
    state = [module.weight, module.bias, module.running_mean, module.running_var]
    # Copies: on a CPU jax would share memory with torch's statistics, which change in place.
    layer.set_weights([t.detach().numpy().copy() for t in state])
    return layer


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("activation", ["relu", None])
def test_batch_norm_shortcut_and_relu_are_torchs(
    activation, with_shortcut, training, data_format, dtype, rng
):
    module = torch_norm(5, dtype, rng).train(training)
    layer = norm_like(module, data_format, dtype, activation=activation)
    for step, batch in enumerate((3, 1)):  # the second step starts from moved statistics
        arrays = [rng.normal(2, 3, size=(batch, 5, 7, 6)).astype(dtype) for _ in range(2)]
        arrays = arrays if with_shortcut else arrays[:1]
        leaves = [leaf(a) for a in arrays]
        expected = module(leaves[0])
        expected = expected + leaves[1] if with_shortcut else expected
        cotangent = rng.normal(size=expected.shape).astype(dtype)
        if activation:  # within a rounding error of nothing, the ReLU may open or not
            cotangent[np.abs(expected.detach().numpy()) < 1e-5] = 0
            expected = torch.relu(expected)
        expected_grads = torch.autograd.grad(
            (expected * torch.tensor(cotangent)).sum(), [*leaves, module.weight, module.bias]
        )
        given = [to_format(a, data_format) for a in arrays]
        y, dxs, grads = vjp(
            layer,
            given if with_shortcut else given[0],
            to_format(cotangent, data_format),
            training,
        )
        assert_close(from_format(y, data_format), expected.detach(), dtype, f"output {step}")
        actual_grads = [from_format(d, data_format) for d in dxs] + grads
        for i, (actual, wanted) in enumerate(zip(actual_grads, expected_grads, strict=True)):
            assert_close(actual, wanted, dtype, f"gradient {i} of step {step}")
        assert_close(numpy(layer.moving_mean), module.running_mean, dtype, "running mean")
        assert_close(numpy(layer.moving_variance), module.running_var, dtype, "running variance")


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("center, scale", [(True, True), (True, False), (False, True)])
def test_batch_norm_with_biased_variance_is_stock_keras(center, scale, training, data_format, rng):
    axis = -1 if data_format == "channels_last" else 1
    options = dict(axis=axis, momentum=0.7, epsilon=1e-3, center=center, scale=scale)
    stock = keras.layers.BatchNormalization(**options)
    layer = BatchNormalization(unbiased_variance=False, **options)
    shape = (4, 5, 3, 5) if axis == -1 else (4, 5, 5, 3)
    for norm in (stock, layer):
        norm.build(shape)
    layer.set_weights(stock.get_weights())
    for _ in range(2):
        x = rng.normal(1, 2, size=shape).astype("float32")
        cotangent = rng.normal(size=shape).astype("float32")
        expected = vjp(stock, x, cotangent, training)
        actual = vjp(layer, x, cotangent, training)
        assert_close(actual[0], expected[0], what="output")
        for a, e in zip(actual[1] + actual[2], expected[1] + expected[2], strict=True):
            assert_close(a, e, what="gradient")
        for a, e in zip(layer.get_weights(), stock.get_weights(), strict=True):
            assert_close(a, e, what="weights and statistics")


@pytest.mark.parametrize("shape", [(6, 5), (4, 7, 5), (2, 3, 4, 3, 5)])
def test_batch_norm_takes_other_ranks(shape, rng):
    x = rng.normal(size=shape).astype("float32")
    stock = keras.layers.BatchNormalization(epsilon=1e-5)
    layer = BatchNormalization()
    assert_close(numpy(layer(x, training=True)), numpy(stock(x, training=True)))
    assert_close(numpy(layer(x, training=False)), numpy(layer(x)))


def test_one_value_a_channel_leaves_finite_statistics():
    layer = BatchNormalization()
    layer(np.ones((1, 1, 1, 3), "float32"), training=True)
    assert_close(numpy(layer.moving_mean), np.full(3, 0.1))
    assert_close(numpy(layer.moving_variance), np.full(3, 0.9))


def test_a_frozen_norm_uses_and_keeps_its_statistics(rng):
    x = rng.normal(3, 2, size=(4, 5, 5, 3)).astype("float32")
    layer = BatchNormalization(activation="relu")
    layer(x, training=True)
    before = layer.get_weights()
    expected = numpy(layer(x, training=False))
    layer.trainable = False
    assert_close(numpy(layer(x, training=True)), expected)
    for a, b in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    layer.trainable = True
    layer(x, training=True)
    assert not np.array_equal(numpy(layer.moving_mean), before[2])


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("rank", [3, 4])
def test_what_a_mask_leaves_out_does_not_count(rank, unbiased, rng):
    x = rng.normal(2, 3, (2, 3, 4, 5)[:rank]).astype("float32")
    x[1, 2:] = 0
    masked = keras.layers.Masking()(x)
    layer = BatchNormalization(momentum=0.6, activation="relu", unbiased_variance=unbiased)
    stock = keras.layers.BatchNormalization(momentum=0.6, epsilon=1e-5)
    y = layer(masked, training=True)
    assert_close(numpy(y), np.maximum(numpy(stock(masked, training=True)), 0))
    assert y._keras_mask is not None, "the next layer sees it too"
    assert_close(numpy(layer.moving_mean), numpy(stock.moving_mean))
    count = int(x.any(-1).sum())
    factor = count / (count - 1) if unbiased else 1
    expected = 0.6 + (numpy(stock.moving_variance) - 0.6) * factor
    assert_close(numpy(layer.moving_variance), expected)
    with pytest.raises(ValueError, match="one dimension less"):
        layer(x, training=True, mask=np.ones(2, bool))


@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 4, 3)])
def test_renorm_is_kerass(shape, rng):
    options = {"renorm": True, "renorm_clipping": {"rmax": 2.0, "dmax": 1.0}}
    layer = BatchNormalization(activation="relu", **options)
    stock = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, **options)
    layer.build([shape, shape])
    stock.build(shape)
    for _ in range(3):
        x, shortcut = rng.normal(2, 3, (2, *shape)).astype("float32")
        for training in (True, False):
            expected = np.maximum(numpy(stock(x, training=training)) + shortcut, 0)
            assert_close(numpy(layer([x, shortcut], training=training)), expected)
    for ours, theirs in zip(layer.get_weights(), stock.get_weights(), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("size", [(7, 10), (1, 1), (112, 5)])
def test_max_pooling_of_negative_values_is_torchs(size, data_format, rng):
    x = -rng.uniform(1, 5, size=(2, 3, *size)).astype("float32")
    t = leaf(x)
    expected = F.max_pool2d(t, 3, 2, 1)
    cotangent = rng.normal(size=expected.shape).astype("float32")
    (expected_grad,) = torch.autograd.grad((expected * torch.tensor(cotangent)).sum(), [t])
    layer = MaxPooling2D(3, strides=2, pad=1, data_format=data_format)
    with where_implemented(data_format):
        y, (dx,), _ = vjp(layer, to_format(x, data_format), to_format(cotangent, data_format))
    assert_close(from_format(y, data_format), expected.detach())
    assert_close(from_format(dx, data_format), expected_grad)
    assert tuple(layer.compute_output_shape(to_format(x, data_format).shape)) == y.shape


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_max_pooling_without_pad_is_stock_keras(padding, rng):
    x = rng.normal(size=(2, 9, 8, 3)).astype("float32")
    expected = keras.layers.MaxPooling2D(3, strides=2, padding=padding)(x)
    assert_close(numpy(MaxPooling2D(3, strides=2, padding=padding)(x)), numpy(expected))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_the_parameter_free_shortcut_is_option_a(size, data_format, rng):
    x = rng.normal(size=(2, 4, *size)).astype("float32")
    expected = F.pad(torch.tensor(x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3))
    layer = ZeroPaddedShortcut(9, strides=2, data_format=data_format)
    given = to_format(x, data_format)
    assert tuple(layer.compute_output_shape(given.shape)) == tuple(layer(given).shape)
    assert_close(from_format(numpy(layer(given)), data_format), expected)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_normalize_is_torchvisions_to_tensor_and_normalize(dtype, data_format, torchvision, rng):
    x = rng.integers(0, 256, size=(2, 3, 4, 5)).astype(dtype)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    scaled = torch.tensor(x).float() / 255
    expected = torchvision.transforms.functional.normalize(scaled, mean, std)
    layer = Normalize(mean, std, data_format=data_format)
    assert_close(from_format(numpy(layer(to_format(x, data_format))), data_format), expected)


def small_graph(dtype=None, sides=(None, None)):
    """A stem and one residual block out of all the layers."""
    inputs = keras.Input((*sides, 3))
    x = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.2), data_format="channels_last", dtype=dtype)(
        inputs
    )
    options = dict(data_format="channels_last", use_bias=False, dtype=dtype)
    x = Conv2D(8, 7, strides=2, pad=3, **options)(x)
    x = BatchNormalization(activation="relu", dtype=dtype)(x)
    x = MaxPooling2D(3, strides=2, pad=1, data_format="channels_last", dtype=dtype)(x)
    y = Conv2D(12, 3, strides=2, pad=1, **options)(x)
    y = BatchNormalization(activation="relu", dtype=dtype)(y)
    y = Conv2D(12, 3, pad=1, **options)(y)
    shortcut = ZeroPaddedShortcut(12, 2, data_format="channels_last", dtype=dtype)(x)
    y = BatchNormalization(activation="relu", dtype=dtype)([y, shortcut])
    y = keras.layers.GlobalAveragePooling2D(data_format="channels_last", dtype=dtype)(y)
    return keras.Model(inputs, keras.layers.Dense(5, dtype=dtype)(y))


def pictures(rng, batch=2, height=33, width=40):
    return rng.integers(0, 256, size=(batch, height, width, 3)).astype("float32")


def test_open_sides_take_every_size(rng):
    model = small_graph()
    assert model.output_shape == (None, 5)
    for size in ((33, 40), (64, 20)):
        assert model(pictures(rng, 1, *size)).shape == (1, 5)


@pytest.mark.parametrize(
    "layer",
    [
        Conv2D(6, 3, strides=2, pad=1, groups=2, use_bias=False, kernel_initializer="he_normal"),
        Conv2D(6, (3, 5), pad=(1, 2), activation="relu"),
        Conv2D(6, 3, padding="same", dilation_rate=2),
        BatchNormalization(axis=1, momentum=0.8, activation="relu", unbiased_variance=False),
        BatchNormalization(),
        MaxPooling2D(3, strides=2, pad=1),
        ZeroPaddedShortcut(8, strides=2),
        Normalize((0.1,), (0.5,)),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.slow
def test_config_makes_the_same_layer(layer):
    config = layer.get_config()
    again = type(layer).from_config(config)
    assert again.get_config() == config
    assert (
        keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(layer)
        ).get_config()
        == config
    )


def test_a_saved_model_loads_and_answers_alike(tmp_path, rng):
    model, x = small_graph(), pictures(rng)
    model(x, training=True)
    expected = numpy(model(x, training=False))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(numpy(loaded(x, training=False)), expected)
    clone = keras.models.clone_model(model)
    clone.load_weights(tmp_path / "model.weights.h5")
    assert_close(numpy(clone(x, training=False)), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("training", [True, False])
def test_mixed_precision_computes_in_half_and_keeps_float32(training, dtype, rng):
    policy = f"mixed_{dtype}"
    x = pictures(rng)
    model = small_graph()
    mixed = small_graph(dtype=policy)
    mixed.set_weights(model.get_weights())
    expected = numpy(model(x, training=training))
    y = mixed(x, training=training)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert_close(numpy(y), expected, dtype)
    for variable, reference in zip(mixed.variables, model.variables, strict=True):
        assert variable.dtype == "float32"
        assert_close(numpy(variable), numpy(reference), dtype, variable.path)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_statistics_of_large_half_precision_values_do_not_overflow(dtype, rng):
    x = (rng.normal(size=(8, 9, 9, 3)) * 1000).astype("float32")
    layer = BatchNormalization(dtype=dtype)
    y = numpy(layer(x, training=True))
    assert_close(y.std(axis=(0, 1, 2)), np.ones(3), "bfloat16")
    assert_close(
        numpy(layer.moving_variance) / (0.1 * x.var(axis=(0, 1, 2), ddof=1) + 0.9),
        np.ones(3),
        "bfloat16",
    )


def test_stateless_calls_change_no_variable(rng):
    model, x = small_graph(), pictures(rng)
    before = model.get_weights()
    y, state = model.stateless_call(
        [v.value for v in model.trainable_variables],
        [v.value for v in model.non_trainable_variables],
        x,
        training=True,
    )
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert_close(numpy(model(x, training=True)), numpy(y))
    for variable, value in zip(model.non_trainable_variables, state, strict=True):
        assert_close(numpy(variable), numpy(value), what=variable.path)


def test_a_scope_without_a_mapping_collects_the_statistics(rng):
    layer = BatchNormalization()
    x = rng.normal(size=(4, 3, 3, 2)).astype("float32")
    layer.build(x.shape)
    with keras.StatelessScope() as scope:
        layer(x, training=True)
    assert_close(numpy(layer.moving_mean), np.zeros(2))
    assert_close(numpy(scope.get_current_value(layer.moving_mean)), 0.1 * x.mean(axis=(0, 1, 2)))


def test_a_shared_layer_trains(rng):
    inputs = keras.Input((6, 6, 3))
    conv, norm = Conv2D(3, 3, pad=1), BatchNormalization(activation="relu")
    outputs = norm([norm(conv(norm(conv(inputs)))), inputs])
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(outputs))
    model.compile("sgd", "mse")
    x = rng.normal(size=(4, 6, 6, 3)).astype("float32")
    model.fit(x, np.zeros((4, 3), "float32"), verbose=0)
    assert np.isfinite(model.evaluate(x, np.zeros((4, 3), "float32"), verbose=0))


def test_quantize_leaves_the_layers_and_the_answer(rng):
    model, x = small_graph(), pictures(rng)
    expected = numpy(model(x, training=False))
    model.quantize("int8")
    assert model.layers[-1].quantization_mode == "int8"
    assert np.abs(numpy(model(x, training=False)) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.skipif(
    BACKEND == "jax", reason="Keras cannot checkpoint its own batch norm on jax either"
)
def test_gradient_checkpointing_gives_the_same_gradients(rng):
    x = rng.normal(size=(2, 9, 9, 3)).astype("float32")
    cotangent = rng.normal(size=(2, 5, 5, 4)).astype("float32")

    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = Conv2D(4, 3, strides=2, pad=1), BatchNormalization()

        def build(self, shape):
            self.conv.build(shape)
            self.norm.build(self.conv.compute_output_shape(shape))

        def call(self, x):
            return self.norm(self.conv(x), training=True)

    plain = Block()
    plain.build(x.shape)
    with keras.RematScope(mode="full"):
        checkpointed = Block()
    checkpointed.build(x.shape)
    checkpointed.set_weights(plain.get_weights())
    expected, actual = vjp(plain, x, cotangent), vjp(checkpointed, x, cotangent)
    assert_close(actual[0], expected[0])
    for a, e in zip(actual[1] + actual[2], expected[1] + expected[2], strict=True):
        assert_close(a, e)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="padding='valid'"):
        Conv2D(4, 3, pad=1, padding="same")
    with pytest.raises(ValueError, match="padding='valid'"):
        MaxPooling2D(3, pad=1, padding="same")
    with pytest.raises(ValueError, match="cannot drop channels"):
        ZeroPaddedShortcut(2)(np.zeros((1, 2, 2, 3), "float32"))
    with pytest.raises(ValueError, match="one value a channel"):
        Normalize((0.5,), (0.5,))(np.zeros((1, 2, 2, 3), "float32"))
    layer = Conv2D(4, 3)
    layer.build((None, 8, 8, 3))
    with pytest.raises(ValueError, match="expected axis -1"):
        layer(np.zeros((1, 8, 8, 5), "float32"))


# --- the fast paths -------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Counts the calls of torch's functions and of Keras' own `__call__`, by name."""
    counts = {}

    def count(owner, name, key):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[key] = counts.get(key, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for name in ("conv2d", "batch_norm", "max_pool2d"):
        count(F, name, name)
    count(keras.layers.Layer, "__call__", "Layer.__call__")
    return counts


@torch_only
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_one_kernel_a_layer_and_no_dispatch_by_keras(training, policy, counted, rng):
    model = small_graph(dtype=policy)
    x = pictures(rng)
    counted.clear()
    model(x, training=training)
    assert counted.pop("conv2d") == 3
    assert counted.pop("batch_norm") == 3
    assert counted.pop("max_pool2d") == 1
    # The model, Normalize, the option-A shortcut, the average and the classifier.
    assert counted.pop("Layer.__call__") == 5
    assert not counted


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a property of the tensorflow path")
@pytest.mark.parametrize("axis", [-1, 1, -3])
def test_tensorflow_runs_its_fused_kernel(axis, monkeypatch, rng):
    import tensorflow as tf

    calls = []
    original = tf.raw_ops.FusedBatchNormV3

    def counting(**kwargs):
        calls.append(kwargs["is_training"])
        return original(**kwargs)

    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormV3", counting)
    x = rng.normal(size=(2, 3, 4, 3)).astype("float32")
    layer = BatchNormalization(axis)
    layer([x, x], training=True)
    layer(x, training=False)
    assert calls == [True, False]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axis", [2, -2, -3])
def test_batch_norm_on_other_axes_is_stock_keras(axis, training, rng):
    x = rng.normal(2, 3, size=(4, 4, 4, 4)).astype("float32")  # no size tells the axes apart
    stock = keras.layers.BatchNormalization(axis, momentum=0.9, epsilon=1e-5)
    layer = BatchNormalization(axis, unbiased_variance=False)
    for norm in (stock, layer):
        norm.build(x.shape)
        norm.set_weights(np.arange(1.0, 17.0).reshape(4, 4))
    assert_close(numpy(layer(x, training=training)), numpy(stock(x, training=training)))
    for a, b in zip(layer.get_weights(), stock.get_weights(), strict=True):
        assert_close(a, b)


@pytest.mark.skipif(BACKEND == "torch", reason="counted above")
@pytest.mark.parametrize("case", ["stem", "3x3", "grouped/2", "1x1/2"])
def test_convolutions_pad_without_a_copy_and_jax_multiplies(case, monkeypatch, rng):
    x = rng.normal(size=(1, 8, 8, 4)).astype("float32")
    layer = Conv2D(6, data_format="channels_last", **CONVS[case])
    layer.build((None, None, None, 4))
    monkeypatch.delattr(ops, "pad")
    layer(x)
    if BACKEND == "jax":
        import jax

        program = str(jax.make_jaxpr(layer)(x))
        assert ("dot_general" in program) is ("conv_general_dilated" not in program)
        assert ("dot_general" in program) is (case == "1x1/2")


@pytest.mark.skipif(BACKEND == "torch", reason="torch says it in its own words")
def test_an_image_smaller_than_the_kernel_is_refused_by_a_layer_for_any_size():
    layer = Conv2D(2, 7, pad=1, data_format="channels_last")
    layer.build((None, None, None, 3))
    with pytest.raises(ValueError, match="zero or negative"):
        layer(np.ones((1, 4, 4, 3), "float32"))


KERNELS = [{}, {"groups": 2}, {"kernel_size": 1}, {"strides": 2, "padding": "same"}]


@torch_only
@pytest.mark.parametrize("filters", [6, 600], ids=["few", "more than positions"])
@pytest.mark.parametrize("options", KERNELS, ids=str)
def test_kernels_gradients_and_slots_are_contiguous(options, filters, tmp_path, rng):
    from keras_resnet.training.optimizers import SGD

    inputs = keras.Input((8, 8, 4))
    options = {"kernel_size": 3, "kernel_initializer": keras.initializers.HeNormal(3), **options}
    conv = Conv2D(filters, data_format="channels_last", **options)
    stock = keras.layers.Conv2D(filters, data_format="channels_last", **options)
    models = []
    for layer in (conv, stock):
        y = keras.layers.GlobalAveragePooling2D()(layer(inputs))
        models.append(keras.Model(inputs, y))
        models[-1].compile(SGD(0.1, momentum=0.9), "mse")
    x, y = rng.normal(size=(4, 8, 8, 4)), rng.normal(size=(4, filters))
    assert conv.kernel.value.is_contiguous()
    np.testing.assert_array_equal(numpy(conv.kernel), numpy(stock.kernel))
    for _ in range(2):
        losses = [model.train_on_batch(x, y) for model in models]
        assert_close(*losses)
    assert conv.kernel.value.grad.is_contiguous()
    assert_close(numpy(conv.kernel.value.grad), numpy(stock.kernel.value.grad))
    assert models[0].optimizer.momentums[0].value.is_contiguous()
    models[0].save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.load_state_dict(models[0].state_dict(), strict=False)
    assert all(p.is_contiguous() for p in loaded.parameters())


@torch_only
def test_what_torch_asks_of_parameters_holds(tmp_path, rng):
    from safetensors.torch import load_file, save_file

    model = small_graph()
    x, labels = pictures(rng), torch.tensor(rng.integers(0, 5, size=2))
    start = numpy(model(x, training=False))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector * 2, model.parameters())
    assert np.abs(numpy(model(x, training=False)) - start).max() > 1e-3
    model.load_state_dict(load_file(tmp_path / "m.safetensors"))
    np.testing.assert_array_equal(numpy(model(x, training=False)), start)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.LBFGS(weights, 0.1, max_iter=4), []

    def closure():
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x, training=True), labels))
        losses[-1].backward()
        return losses[-1]

    optimizer.step(closure)
    assert losses[-1] < losses[0]
    torch.nn.utils.clip_grad_norm_(weights, 1e-3)
    gradients = torch.cat([p.grad.view(-1) for p in weights])
    assert float(gradients.norm()) < 1.1e-3
    # Second derivatives and torch.func's transforms pass through the kernel's own function.
    image = torch.tensor(rng.normal(size=(1, 2, 5, 5)))
    kernel = torch.tensor(rng.normal(size=(3, 3, 2, 3)), requires_grad=True)

    def loss(kernel):
        return F.conv2d(image, torch_kernel(kernel, kernel.dtype)).square().sum()

    assert torch.autograd.gradgradcheck(loss, (kernel,))
    many = torch.stack([kernel, kernel * 2]).detach()
    each = torch.func.vmap(torch.func.grad(loss))(many)
    assert_close(numpy(each[1]), 2 * numpy(torch.func.grad(loss)(kernel.detach())), "float64")


@torch_only
@pytest.mark.parametrize("training", [True, False])
def test_in_place_operations_pass_torchs_gradient_check(training, rng):
    layer = BatchNormalization(activation="relu", dtype="float64")
    conv = Conv2D(3, 3, pad=1, activation="relu", dtype="float64")
    x, shortcut = (torch.tensor(rng.normal(size=(2, 4, 3, 3)), requires_grad=True) for _ in "ab")

    def block(x, shortcut):
        return layer([conv(x), shortcut], training=training)

    block(x, shortcut)
    before = shortcut.detach().clone()
    assert torch.autograd.gradcheck(block, (x, shortcut), atol=1e-6)
    assert torch.equal(shortcut.detach(), before), "the shortcut is another layer's tensor"


@torch_only
def test_a_feature_map_that_is_also_an_output_is_not_overwritten(rng):
    inputs = keras.Input((6, 6, 3))
    a = Conv2D(3, 3, pad=1, data_format="channels_last")(inputs)
    b = BatchNormalization(activation="relu")(a)
    c = BatchNormalization(activation="relu")([a, b])
    x = rng.normal(size=(2, 6, 6, 3)).astype("float32")
    model = keras.Model(inputs, [a, b, c])
    together = [numpy(y) for y in model(x, training=False)]
    for y, output in zip(together, (a, b, c), strict=True):
        assert_close(numpy(keras.Model(inputs, output)(x, training=False)), y)


# What is used of Keras' internals: a release that moves them must fail here.


@torch_only
def test_keras_still_says_which_layers_to_checkpoint(counted, rng):
    x = torch.tensor(rng.normal(size=(1, 4, 4, 2)).astype("float32"), requires_grad=True)
    for mode, calls in ((None, 1), ("full", 2)):
        with keras.RematScope(mode=mode):
            layer = Conv2D(2, 3, data_format="channels_last")
        layer.build(x.shape)
        counted.clear()
        layer(x).sum().backward()
        assert counted["conv2d"] == calls, "forward once, and once more in the backward pass"


@torch_only
def test_keras_still_ties_masks_to_tensors():
    x = keras.layers.Masking()(torch.ones(1, 2, 2, 3))
    conv = Conv2D(2, 1)
    conv.build(x.shape)
    with pytest.warns(UserWarning, match="does not support masking"):
        conv(x)


def test_a_scope_knows_the_scope_around_it():
    from keras_resnet.layers.torch_call import in_stateless_scope

    assert not in_stateless_scope()
    with keras.StatelessScope():
        assert in_stateless_scope()
    assert not in_stateless_scope()


@torch_only
def test_torch_hooks_run(rng):
    layer, seen = Conv2D(2, 1), []
    x = torch.ones(1, 2, 2, 3)
    layer(x)
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer(x)
    assert seen == [(1, 2, 2, 2)]


@torch_only
@pytest.mark.parametrize(
    "outer, inner", [("mixed_bfloat16", "float32"), ("float32", "mixed_float16")]
)
def test_a_layer_keeps_its_own_policy_inside_a_model_of_another(outer, inner, rng):
    x = rng.normal(size=(2, 6, 6, 4)).astype("float32")
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(outer)
        inputs = keras.Input((6, 6, 4))
        first, second = (Conv2D(4, 3, dtype=inner, data_format="channels_last") for _ in "ab")
        model = keras.Model(inputs, second(first(inputs)))
    finally:
        keras.config.set_dtype_policy(policy)
    y = model(x)
    assert keras.backend.standardize_dtype(y.dtype) == inner.removeprefix("mixed_")
    expected = first(x)
    expected = second(expected)
    assert_close(numpy(y), numpy(expected))


# Exports and compilers.


@pytest.mark.skipif(BACKEND == "jax", reason="Keras exports jax models through tensorflow")
@pytest.mark.slow
def test_an_exported_model_answers_alike(tmp_path, rng):
    model, x = small_graph(sides=(33, 40)), pictures(rng, batch=1)  # Keras fixes torch's batch
    model(pictures(rng, batch=4), training=True)
    expected = numpy(model(x, training=False))
    if BACKEND == "torch":
        model.export(tmp_path / "model.pt2", format="torch", verbose=False)
        exported = torch.export.load(tmp_path / "model.pt2").module()
        y = exported(torch.tensor(x))
    else:
        import tensorflow as tf

        model.export(tmp_path / "model", verbose=False)
        loaded = tf.saved_model.load(tmp_path / "model")
        y = loaded.serve(x)
    y = y[0] if isinstance(y, (list, tuple)) else y
    assert_close(numpy(y), expected)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "jax", reason="jax compiles in every other test")
@pytest.mark.skipif(
    BACKEND == "torch" and "KERAS_RESNET_SLOW" not in os.environ,
    reason="torch takes minutes to compile; set KERAS_RESNET_SLOW",
)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_compiled_training_step_is_the_eager_one(policy, monkeypatch, rng):
    if BACKEND == "torch":
        # Keras breaks the graph at its own layers; torch 2.13 then takes later layers' sizes for
        # symbols and its Inductor cannot order the strides of a permuted output by them.
        monkeypatch.setattr(torch._dynamo.config, "automatic_dynamic_shapes", False)
    x = pictures(rng, 4, 17, 17)
    y = rng.integers(0, 5, size=4)
    weights, losses = small_graph().get_weights(), []
    for jit_compile in (False, True):
        model = small_graph(dtype=policy)
        model.set_weights(weights)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.01), loss, jit_compile=jit_compile)
        losses.append([model.train_on_batch(x, y) for _ in range(2)])
        losses[-1] += [float(np.mean(w)) for w in model.get_weights()]
    assert_close(losses[1], losses[0], "float32" if policy == "float32" else "bfloat16")


@torch_only
@pytest.mark.slow
def test_twenty_training_steps_in_float64_are_torchvisions(torchvision, rng):
    import copy

    from keras_resnet.models.zoo import create_model
    from keras_resnet.training.optimizers import SGD

    reference = torchvision.models.resnet18(num_classes=7).double().train()
    head = copy.deepcopy(reference.fc)  # Keras' own mean and Dense compute in float32 at most
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("float64")
        inputs = keras.Input((32, 32, 3), dtype="float64")
        model = create_model("resnet18", input_tensor=inputs, include_top=False)
    finally:
        keras.config.set_dtype_policy(policy)
    ours = {  # layer1.0.conv1.weight -> the variables of layer1_0_conv1
        "weight": lambda layer: layer.gamma if isinstance(layer, BatchNorms) else layer.kernel,
        "bias": lambda layer: layer.beta,
        "running_mean": lambda layer: layer.moving_mean,
        "running_var": lambda layer: layer.moving_variance,
    }
    pairs = []
    for name, tensor in reference.state_dict().items():
        path, _, kind = name.rpartition(".")
        if kind in ours and path != "fc":
            pairs.append((ours[kind](model.get_layer(path.replace(".", "_"))), tensor))
    assert len(pairs) == len(model.variables)

    def keras_order(tensor):
        return tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor

    for variable, tensor in pairs:
        variable.assign(keras_order(tensor))

    x = torch.tensor(rng.normal(size=(4, 32, 32, 3)))
    y = torch.tensor(rng.integers(0, 7, size=4))
    options = dict(momentum=0.9, weight_decay=1e-4)
    theirs = torch.optim.SGD(reference.parameters(), 0.01, **options)
    of_head, mine = torch.optim.SGD(head.parameters(), 0.01, **options), SGD(0.01, **options)
    losses = []
    for _ in range(20):
        expected = F.cross_entropy(reference(x.permute(0, 3, 1, 2)), y)
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        loss = F.cross_entropy(head(model(x, training=True).mean((1, 2))), y)
        model.zero_grad()
        of_head.zero_grad()
        loss.backward()
        of_head.step()
        mine.apply([v.value.grad for v in model.trainable_variables], model.trainable_variables)
        losses.append((loss.item(), expected.item()))
    losses = np.array(losses)
    assert losses[-1, 1] < 0.5 * losses[0, 1], "it learns"
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-7)
    for variable, tensor in pairs:
        np.testing.assert_allclose(numpy(variable), keras_order(tensor), rtol=1e-4, atol=1e-7)
