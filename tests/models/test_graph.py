"""A model run from flat lists against Keras' own walk through the same layers."""

from __future__ import annotations

import dataclasses
import os
import threading

import keras
import numpy as np
import pytest
from keras import ops
from rounding import allowed

from keras_resnet.layers.conv import Conv2D
from keras_resnet.layers.norm import BatchNormalization
from keras_resnet.models import torch_fused, torch_graph as graph
from keras_resnet.models.blocks import conv_block, identity_block
from keras_resnet.models.graph import Fused, fuse, graph_steps
from keras_resnet.models.image_model import ImageModel
from keras_resnet.models.torch_graph import DirectGraph
from keras_resnet.models.torch_step import DirectStep
from keras_resnet.models.zoo import create_model
from keras_resnet.runtimes.select import open_runner
from keras_resnet.training.optimizers import SGD
from keras_resnet.training.prepare import compile_model
from keras_resnet.variants import SPECS
from keras_resnet.weights.load import load_torchvision

torch = pytest.importorskip("torch")
BACKEND = os.environ["KERAS_BACKEND"]
torch_only = pytest.mark.skipif(BACKEND != "torch", reason="the lists are torch's")

# One of every kind of block, stem, shortcut and head, as small as they go.
VARIANTS = {
    "resnet18": 48,
    "resnet50": 48,
    "resnext50_32x4d": 48,
    "resnet50_v1_relu": 48,
    "resnet20": 16,
    "resnet34_cifar10": 16,
    "alexnet": 96,
    "alexnet_cifar10": 32,
}
QUICK = ("resnet18", "resnet20", "alexnet_cifar10")


class DirectModel(DirectGraph, keras.Model):
    """Any Functional model, run from lists."""


def randomized(model, seed=0):
    """Statistics and scales as after training: untouched ones hide what folding gets wrong."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.path.endswith(("gamma", "moving_variance")):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.path.endswith(("beta", "moving_mean", "bias")):
            variable.assign(rng.normal(0, 0.2, variable.shape))
    return model


def by_keras(model):
    """The same layers and weights, walked through by Keras."""
    return keras.Model(model.input, model.output)


def numpy(x):
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float64")))


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = numpy(actual), numpy(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def pictures(model, rng, count=2):
    shape = [64 if side is None else side for side in model.input_shape[1:]]
    return torch.tensor(rng.integers(0, 256, (count, *shape)).astype("float32"))


@pytest.fixture
def lists_run(monkeypatch):
    """Counts the runs of the two lists: a test of a path that did not run shows nothing."""
    counts = {"whole": 0, "folded": 0}
    list_call, folded_call = graph._List.__call__, graph._Folded.__call__

    def whole(self, *args):
        counts["whole"] += 1
        return list_call(self, *args)

    def folded(self, *args):
        counts["folded"] += 1
        counts["whole"] -= 1  # it runs a list of its own
        return folded_call(self, *args)

    monkeypatch.setattr(graph._List, "__call__", whole)
    monkeypatch.setattr(graph._Folded, "__call__", folded)
    return counts


@torch_only
@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "plain"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in VARIANTS]
)
def test_inference_folds_and_agrees_with_keras(name, onednn, lists_run, monkeypatch, rng):
    if not onednn:
        monkeypatch.setattr(torch_fused, "_has_onednn", lambda x: False)
    size = VARIANTS[name]
    model = randomized(create_model(name, input_shape=(size, size, 3), include_preprocessing=True))
    x = pictures(model, rng)
    before = x.clone()
    with torch.no_grad():
        expected = by_keras(model)(x, training=False)
        for _ in range(2):  # the first call packs the weights
            assert_close(model.predict_on_batch(x), expected)
        assert lists_run == {"whole": 0, "folded": 2}
        assert_close(model(x, training=False), expected)
    assert lists_run == {"whole": 1, "folded": 2}
    assert torch.equal(x, before)
    norms = [s for s in fuse(graph_steps(model)) if isinstance(s, Fused) and s.norm is not None]
    assert len(norms) == sum(isinstance(layer, BatchNormalization) for layer in model.layers)


def gradients_of(model, x):
    """The output of a training step, and the gradients of its squares' sum by the weights."""
    y = model(x, training=True)
    weights = [v.value for v in model.trainable_variables]
    return y.detach(), torch.autograd.grad(y.square().sum(), weights)


@torch_only
@pytest.mark.parametrize(
    "name",  # the grouped one has the others' stem, blocks and shortcuts
    [
        pytest.param(name, marks=pytest.mark.long if name in ("resnet18", "resnet50") else ())
        for name in VARIANTS
    ],
)
@pytest.mark.slow
def test_a_training_step_agrees_with_keras(name, lists_run, rng):
    size = VARIANTS[name]
    make = {"input_shape": (size, size, 3), "include_preprocessing": True, "dropout": 0.0}
    model = randomized(create_model(name, **make))
    plain = by_keras(create_model(name, **make))
    plain.set_weights(model.get_weights())
    x = pictures(model, rng, 3)
    start = [np.array(v) for v in plain.non_trainable_variables]  # a step changes no others
    y, gradients = gradients_of(model, x)
    expected, expected_gradients = gradients_of(plain, x)
    assert lists_run == {"whole": 1, "folded": 0}
    assert_close(y, expected)
    for a, b in zip(model.non_trainable_variables, plain.non_trainable_variables, strict=True):
        assert_close(a, b)
    largest = {}  # of a layer: the gradient of a bias before a norm is zero but for rounding
    for other, variable in zip(expected_gradients, model.trainable_variables, strict=True):
        layer = variable.path.split("/")[0]
        largest[layer] = max(largest.get(layer, 0.0), float(other.abs().max()))

    def worst(some, others):
        return max(
            float((one - other).abs().max()) / largest[variable.path.split("/")[0]]
            for one, other, variable in zip(some, others, model.trainable_variables, strict=True)
        )

    def again(change):
        for variable, value in zip(plain.non_trainable_variables, start, strict=True):
            variable.assign(value)
        return gradients_of(plain, change(x))[1]

    found = worst(gradients, expected_gradients)
    del gradients  # AlexNet's take 240 MB
    assert found <= allowed(2e-4, found, again, expected_gradients, worst)


@torch_only
def test_channels_first_agrees_with_keras(lists_run, rng):
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        model = randomized(create_model("resnet18", input_shape=(3, 48, 48)))
        x = pictures(model, rng)
        with torch.no_grad():
            assert_close(model.predict_on_batch(x), by_keras(model)(x, training=False))
        assert_close(model(x, training=True).detach(), by_keras(model)(x, training=True).detach())
    finally:
        keras.config.set_image_data_format(before)
    assert lists_run == {"whole": 1, "folded": 1}


@torch_only
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float64"])
def test_other_precisions_agree_with_keras(policy, lists_run, rng):
    keras.config.set_dtype_policy(policy)
    try:
        model = randomized(create_model("resnet20", include_preprocessing=True))
    finally:
        keras.config.set_dtype_policy("float32")
    x = pictures(model, rng, 8)
    # Keras' own average or classifier rounds to float32 under a float64 policy.
    tolerance = 1e-6 if policy == "float64" else 3e-2
    with torch.no_grad():
        if policy == "float64":
            folded = model._lists().folded(x, object())
            assert_close(folded, model._lists().whole(x, False), 1e-12)
            lists_run["folded"] -= 1
        assert_close(model.predict_on_batch(x), by_keras(model)(x, training=False), tolerance)
    if policy != "bfloat16":  # its norms would have running statistics in bfloat16
        y, expected = model(x, training=True), by_keras(model)(x, training=True)
        # Not Keras' own: from 3.16 on its sums round to float32 under this policy as well.
        assert y.dtype is getattr(torch, model.compute_dtype)
        assert_close(y.detach(), expected.detach(), tolerance)
    assert lists_run["folded"] == 1


@torch_only
def test_masks_and_renorm_are_left_to_keras(lists_run, rng):
    x = torch.tensor(rng.normal(2, 3, (2, 4, 4, 3)).astype("float32"))
    x[0, 2:] = 0

    def model(*layers):
        inputs = y = keras.Input((4, 4, 3))
        for layer in layers:
            y = layer(y)
        return DirectModel(inputs, y)

    masked = model(keras.layers.Masking(), BatchNormalization(momentum=0.0))
    masked(x, training=True)
    assert_close(masked.layers[-1].moving_mean, numpy(x)[x.any(-1).numpy()].mean(0))
    assert lists_run == {"whole": 0, "folded": 0}

    renormed = model(Conv2D(3, 1), BatchNormalization(renorm=True))
    stock = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, renorm=True)
    with torch.no_grad():
        maps = renormed.layers[1](x)
        assert_close(renormed(x, training=True), stock(maps, training=True))
        assert_close(renormed.predict_on_batch(x), stock(maps, training=False))
    assert_close(renormed.layers[-1].renorm_mean, stock.renorm_mean)
    assert lists_run == {"whole": 1, "folded": 1}


def _replace_data(variable):
    variable.value.data = variable.value.data * 1.5


def _one_of_all(variable):
    variable.value.detach().view(-1).numpy()[3] = 50.0


def _permute(variable):
    variable.value.data.copy_(variable.value.data.flip(-1))


def _from_vector(variable):
    value = torch.nn.utils.parameters_to_vector([variable.value])
    torch.nn.utils.vector_to_parameters(value, [variable.value])
    value.data.mul_(1.5)  # which the parameter is now a view of


# What can be done to a weight; most of it goes past torch's count of changes.
CHANGES = {
    "assign": lambda v: v.assign(v * 1.5),
    "in place": lambda v: v.value.detach().mul_(1.5),
    "data =": _replace_data,
    "data.copy_": lambda v: v.value.data.copy_(v.value.data * 1.5),
    "data.mul_": lambda v: v.value.data.mul_(1.5),
    "data[...] =": lambda v: v.value.data[..., ::2].fill_(3.0),
    "nn.init": lambda v: torch.nn.init.uniform_(v.value.data, 1.0, 2.0),
    "NumPy": lambda v: np.multiply(v.value.detach().numpy(), 1.5, v.value.detach().numpy()),
    "DLPack": lambda v: np.from_dlpack(v.value.detach()).__imul__(1.5),
    "one element": _one_of_all,
    "permuted": _permute,
    "vector_to_parameters": _from_vector,
}


@torch_only
@pytest.mark.parametrize("which", ["conv1/kernel", "bn1/gamma", "layer2_0_bn2/moving_variance"])
def test_a_changed_weight_is_noticed(which, rng):
    keras.utils.set_random_seed(0)  # by chance the one element may be a channel that is off
    model = randomized(create_model("resnet_tiny"))
    model.compile(loss="mae")
    x = pictures(model, rng) / 255
    y = np.zeros((2, *model.output_shape[1:]), "float32")
    plain = by_keras(model)
    plain.compile(loss="mae")
    variable = next(v for v in model.variables if v.path.endswith(which))
    ways = {
        "direct": lambda one: numpy(one(x, training=False)),
        "on batch": lambda one: one.predict_on_batch(x),
        "predict": lambda one: one.predict(x.numpy(), verbose=0),
        "evaluate": lambda one: np.array(one.evaluate(x.numpy(), y, verbose=0)),
        "test on batch": lambda one: np.array(one.test_on_batch(x, y)),
    }
    start = variable.value.detach().clone()
    for name, change in CHANGES.items():
        with torch.no_grad():
            before = [way(model) for way in ways.values()]
            change(variable)
            for (way, run), old in zip(ways.items(), before, strict=True):
                found, expected = run(model), run(plain)
                np.testing.assert_allclose(found, expected, 1e-4, 1e-5, err_msg=f"{name}, {way}")
                assert not np.array_equal(found, old), (name, way)
            variable.value.data = start.clone()


@torch_only
def test_a_weight_that_a_callback_assigns_is_noticed(rng):
    model = randomized(create_model("resnet_tiny"))
    plain = by_keras(model)
    kernel = model.get_layer("conv1").kernel
    x, start = pictures(model, rng, 4).numpy() / 255, kernel.numpy()

    class Assign(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            kernel.assign(start * 1.5)

    first, second = np.split(model.predict(x, 2, verbose=0, callbacks=[Assign()]), 2)
    assert_close(plain.predict(x[2:], verbose=0), second)
    kernel.assign(start)
    assert_close(plain.predict(x[:2], verbose=0), first)


@torch_only
def test_sizes_and_batches_may_change(rng):
    model = randomized(create_model("resnet20", input_shape=(None, None, 3)))
    plain = by_keras(model)
    with torch.no_grad():
        for count, size in ((1, 32), (4, 32), (3, 48), (1, 32), (2, 33)):
            x = torch.tensor(rng.normal(size=(count, size, size, 3)).astype("float32"))
            assert_close(model.predict_on_batch(x), plain(x, training=False))
            assert_close(model(x, training=False), plain(x, training=False))
    kept = [len(c._weights) for c in model._lists().folded._list.convolutions]
    assert max(kept) <= torch_fused._KEPT_SIZES


@torch_only
@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_excitation_and_group_norm_are_timms_in_float64(dtype, torchvision, monkeypatch, rng):
    """Forward, backward and prediction, with no call of a layer by Keras in between."""
    timm = pytest.importorskip("timm")
    resnet, size = timm.models.resnet, 32
    options = {"num_classes": 5, "block": resnet.Bottleneck}
    for name, keywords in (
        ("seresnet50", {"block_args": {"attn_layer": "se"}}),
        ("resnet50_gn", {"norm_layer": timm.layers.GroupNorm}),
    ):
        module = resnet.ResNet(layers=(1, 1, 1, 1), **options, **keywords).double().eval()
        norms = [m for m in module.modules() if hasattr(m, "weight") and m.weight.ndim == 1]
        for norm in norms:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.uniform_(norm.bias, -0.2, 0.2)
        row = dataclasses.replace(SPECS[name], blocks=(1, 1, 1, 1))
        monkeypatch.setitem(SPECS, name, row)
        model = create_model(name, num_classes=5, input_shape=(size, size, 3))
        load_torchvision(model, module.state_dict())
        with monkeypatch.context() as patch:
            for kind in (keras.layers.GroupNormalization, keras.layers.Multiply):
                patch.setattr(kind, "call", lambda self, inputs: pytest.fail("run by Keras"))
            images = torch.tensor(rng.normal(size=(2, size, size, 3)))
            expected = module(images.permute(0, 3, 1, 2))
            found = model(images, training=False)
            assert_close(found, expected, 1e-12)
            assert_close(model.predict_on_batch(images), expected, 1e-12)
            found.square().sum().backward()
            expected.square().sum().backward()
        theirs = [parameter.grad.norm() for parameter in module.parameters()]
        ours = [variable.value.grad.norm() for variable in model.trainable_variables]
        np.testing.assert_allclose(sorted(ours), sorted(theirs), rtol=1e-10)


@torch_only
@pytest.mark.parametrize(
    "kind", [keras.layers.Identity, keras.layers.GaussianNoise, keras.layers.Reshape]
)
def test_no_map_is_overwritten_that_another_value_is_a_view_of(kind, rng):
    given = {keras.layers.GaussianNoise: (0.1,), keras.layers.Reshape: ((8, 8, 16),)}
    x = keras.Input((8, 8, 8))
    y = main = conv_block(x, 3, [4, 4, 16], stage=1, block="a", strides=1)
    other = aux = kind(*given.get(kind, ()))(y)
    for block in "bcd":
        main = identity_block(main, 3, [4, 4, 16], stage=1, block=block)
    for block in "ef":
        aux = identity_block(aux, 3, [4, 4, 16], stage=1, block=block)
    out = keras.layers.Concatenate()([main, keras.layers.Add()([aux, other])])
    model = randomized(DirectModel(x, out))
    images = torch.tensor(rng.normal(size=(2, 8, 8, 8)).astype("float32"))
    assert_close(model.predict_on_batch(images), by_keras(model)(images, training=False))


@torch_only
def test_an_addition_that_spreads_one_of_the_two_is_not_fused(rng):
    x = keras.Input((8, 8, 8))
    y = Conv2D(8, 3, pad=1)(x)
    pooled = keras.layers.GlobalAveragePooling2D(keepdims=True)(y)
    for maps, context in ((y, Conv2D(8, 1)(pooled)), (Conv2D(8, 1)(y), pooled)):
        model = DirectModel(x, keras.layers.Add()([maps, context]))
        images = torch.tensor(rng.normal(size=(2, 8, 8, 8)).astype("float32"))
        assert_close(model.predict_on_batch(images), by_keras(model)(images, training=False))


@torch_only
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_what_an_activations_gradient_needs_is_not_overwritten(activation, rng):
    x = keras.Input((8, 8, 3))
    y = keras.layers.ReLU()(Conv2D(4, 3, activation=activation)(x))
    y = keras.layers.ReLU()(BatchNormalization(activation=activation)(y))
    model = DirectModel(x, y)
    images = torch.tensor(rng.normal(size=(2, 8, 8, 3)).astype("float32"))
    model(images, training=True).sum().backward()
    found = [v.value.grad.clone() for v in model.trainable_variables]
    for variable in model.trainable_variables:
        variable.value.grad = None
    by_keras(model)(images, training=True).sum().backward()
    for one, variable in zip(found, model.trainable_variables, strict=True):
        np.testing.assert_allclose(one, variable.value.grad, atol=1e-5)


@torch_only
def test_weights_that_changed_while_another_thread_folded_them_are_folded_anew(monkeypatch, rng):
    model = randomized(create_model("resnet_tiny", num_classes=3, input_shape=(32, 32, 3)))
    x = torch.tensor(rng.normal(size=(2, 32, 32, 3)).astype("float32"))
    fold, changed = torch_fused.FusedConvolution._fold, []

    def slow(self, x):
        found = fold(self, x)
        if not changed:
            changed.append(model.set_weights([w + 0.1 for w in model.get_weights()]))
            monkeypatch.setattr(torch_fused.FusedConvolution, "_fold", fold)
            other = threading.Thread(target=model.predict_on_batch, args=(x_of_model,))
            other.start()
            other.join()
        return found

    x_of_model = x
    monkeypatch.setattr(torch_fused.FusedConvolution, "_fold", slow)
    model.predict_on_batch(x)
    with torch.no_grad():
        assert_close(model.predict_on_batch(x), by_keras(model)(x, training=False))


@torch_only
def test_the_short_step_asks_what_keras_asks(rng):
    x, y = rng.normal(size=(4, 32, 32, 3)).astype("float32"), np.array([0, 1, 2, 0])
    model = create_model("resnet_tiny", num_classes=3, input_shape=(32, 32, 3))
    compile_model(model, SGD(0.1), False)
    model.fit(x, y, verbose=0)
    with pytest.raises(ValueError, match=r"incompatible|expected shape"):
        model.fit(np.zeros((4, 64, 32, 3), "float32"), y, verbose=0)
    model.trainable = False
    model.get_layer("fc").trainable = True
    compile_model(model, SGD(0.1), False)
    before = [np.array(v) for v in model.trainable_variables + model.get_layer("fc").weights]
    model.fit(x, y, verbose=0)
    after = [np.array(v) for v in model.trainable_variables + model.get_layer("fc").weights]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@torch_only
def test_only_onednns_kernels_are_folded_for_each_size(monkeypatch, rng):
    """On CUDA, which has no oneDNN, a new size or batch folds nothing anew."""
    model = randomized(create_model("resnet_tiny", input_shape=(None, None, 3)))
    plain, folds = by_keras(model), []
    fold = torch_fused.FusedConvolution._fold
    monkeypatch.setattr(
        torch_fused.FusedConvolution, "_fold", lambda *a: folds.append(a) or fold(*a)
    )
    there = torch_fused._has_onednn(torch.zeros(1))
    for onednn in {False, there}:
        monkeypatch.setattr(torch_fused, "_has_onednn", lambda x, onednn=onednn: onednn)
        model._lists().folded._contents = None  # as if a weight had changed
        folds.clear()
        for count, size in ((1, 32), (3, 32), (2, 48)):
            x = torch.tensor(rng.normal(size=(count, size, size, 3)).astype("float32"))
            with torch.no_grad():
                assert_close(model.predict_on_batch(x), plain(x, training=False))
        convolutions = model._lists().folded._list.convolutions
        assert len(folds) == len(convolutions) * (3 if onednn else 1)


@torch_only
def test_numpy_pictures_and_predict_take_the_lists(lists_run, rng):
    model = create_model("resnet20")
    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    first = model.predict_on_batch(x)
    assert_close(model.predict(x, verbose=0), first)
    assert lists_run == {"whole": 0, "folded": 2}


@torch_only
def test_gradients_by_the_input_pass_through_the_whole_list(lists_run, rng):
    model = randomized(create_model("resnet20"))
    plain = by_keras(model)

    def gradient(one, change=lambda x: x):
        x = change(torch.full((2, 32, 32, 3), 0.3)).requires_grad_()
        return torch.autograd.grad(one(x, training=False)[:, 3].sum(), x)[0]

    def difference(one, other):
        return float((one - other).abs().max() / other.abs().max())

    ours, theirs = gradient(model), gradient(plain)
    assert lists_run == {"whole": 1, "folded": 0}
    found = difference(ours, theirs)
    assert found <= allowed(1e-5, found, lambda change: gradient(plain, change), theirs, difference)


@torch_only
def test_a_hook_is_not_passed_by(lists_run, rng):
    model, seen = create_model("resnet20"), []
    layer = model.get_layer("layer2_0_conv1")
    handle = layer.register_forward_hook(lambda *args: seen.append(args))
    x = pictures(model, rng)
    model.predict_on_batch(x)
    assert len(seen) == 1 and lists_run == {"whole": 0, "folded": 0}
    handle.remove()
    model.predict_on_batch(x)
    assert len(seen) == 1 and lists_run == {"whole": 0, "folded": 1}


class Doubled(Conv2D):
    """Somebody's own layer, which takes the place of `call`'s parts."""

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel * 2)


class Noisy(Conv2D):
    """Somebody's own layer, of which training is another thing."""

    def call(self, inputs, training=None):
        self.add_loss(ops.mean(inputs))
        return super().call(inputs) + (5.0 if training else 1.0)


class Wrapped(BatchNormalization):
    """Somebody's own layer, which wraps the call itself."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 3


class Seen(keras.layers.Layer):
    """Says whether its input has a mask."""

    def call(self, x, mask=None):
        return x * (1.0 if mask is None else 100.0)


def particular_graphs():
    """Graphs with a layer for which `Layer.__call__` does something."""
    x = keras.Input((8, 8, 4))
    l2 = {"activity_regularizer": keras.regularizers.L2(0.1)}

    def conv(kind=Conv2D, **kwargs):
        return kind(4, 3, pad=1, **kwargs)

    def head(y):
        return keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(y))

    yield "activity of a convolution", x, BatchNormalization()(conv(**l2)(x))
    yield "activity of a norm", x, BatchNormalization(activation="relu", **l2)(conv()(x))
    yield "activity of a dense layer", x, keras.layers.Dense(2, **l2)(head(conv()(x)))
    pooled = keras.layers.GlobalAveragePooling2D(**l2)
    yield "activity of an average", x, keras.layers.Dense(2)(pooled(conv()(x)))
    a, b = conv()(x), conv()(x)
    yield "activity of a sum", x, keras.layers.Add(**l2)([a, b])
    yield "activity of a ReLU", x, keras.layers.ReLU(**l2)(conv()(x))
    yield "own convolution_op", x, BatchNormalization()(conv(Doubled)(x))
    yield "own call and add_loss", x, BatchNormalization()(conv(Noisy)(x))
    yield "own __call__", x, Wrapped()(conv()(x))
    inner = keras.Model(x, conv(**l2)(x))
    yield "activity inside a model", x, BatchNormalization()(inner(x))
    yield "add_loss", x, keras.layers.ActivityRegularization(l1=0.1)(conv()(x))
    with keras.RematScope(mode="full"):
        yield "rematerialized", x, BatchNormalization()(conv()(x))
    y = keras.layers.Flatten()(x)
    y = keras.layers.Dense(3, activation="relu")(keras.layers.Masking()(y))
    yield "a mask behind a dense layer", x, Seen()(keras.layers.ReLU()(y))
    lora = conv()
    y = BatchNormalization()(lora(x))
    lora.enable_lora(2, lora_alpha=4)
    lora.lora_kernel_b.assign(np.ones(lora.lora_kernel_b.shape))
    yield "LoRA", x, y


@torch_only
def test_what_keras_does_around_a_layers_call_is_done(rng):
    x = rng.normal(size=(3, 8, 8, 4)).astype("float32")
    for what, inputs, outputs in particular_graphs():
        model, plain = DirectModel(inputs, outputs), keras.Model(inputs, outputs)
        y = np.zeros((3, *model.output_shape[1:]), "float32")
        for one in (model, plain):
            one.compile(loss="mse")
        found, expected = model.predict(x, verbose=0), plain.predict(x, verbose=0)
        np.testing.assert_allclose(found, expected, 1e-4, 1e-5, err_msg=what)
        found, expected = model.evaluate(x, y, verbose=0), plain.evaluate(x, y, verbose=0)
        np.testing.assert_allclose(found, expected, 1e-4, err_msg=what)
        losses = []
        for one in (model, plain):
            found = numpy(one(torch.tensor(x), training=True).detach())
            losses.append(
                [found.mean(), found.std(), *(float(loss.detach()) for loss in one.losses)]
            )
        np.testing.assert_allclose(*losses, 1e-4, 1e-5, err_msg=what)


@torch_only
def test_what_is_changed_about_a_layer_later_is_noticed(rng):
    x = rng.normal(size=(2, 16, 16, 3)).astype("float32")
    model = randomized(create_model("resnet_tiny", include_preprocessing=True))
    plain = by_keras(model)
    norm, conv = model.get_layer("bn1"), model.get_layer("layer1_0_conv1")

    def replace_call():
        call = conv.call
        conv.call = lambda inputs: call(inputs) * 2

    for change in (
        lambda: setattr(norm, "activation", keras.activations.gelu),
        lambda: setattr(norm, "epsilon", 0.5),
        lambda: setattr(conv, "dilation_rate", (2, 2)) or setattr(conv, "pad", (2, 2)),
        lambda: setattr(conv, "activation", keras.activations.tanh),
        lambda: setattr(model.layers[-1], "activation", keras.activations.softmax),
        lambda: setattr(model.get_layer("preprocessing"), "mean", (0.1, 0.2, 0.3)),
        lambda: setattr(norm, "activity_regularizer", keras.regularizers.L2(0.1)),
        replace_call,
    ):
        before = model.predict_on_batch(x)
        change()
        assert_close(model.predict_on_batch(x), plain.predict_on_batch(x))
        with torch.no_grad():
            assert_close(model(x, training=False), plain(x, training=False))
        changed = not np.allclose(before, model.predict_on_batch(x), rtol=1e-3)
        assert changed == (norm.activity_regularizer is None or "call" in vars(conv))


@torch_only
def test_hooks_around_every_module_run(rng):
    model, seen = create_model("resnet_tiny"), []
    hook = torch.nn.modules.module.register_module_forward_hook
    handle = hook(lambda module, *args: seen.append(module.name))
    try:
        model.predict_on_batch(rng.normal(size=(1, 16, 16, 3)).astype("float32"))
    finally:
        handle.remove()
    assert {"conv1", "bn1", model.layers[-1].name} <= set(seen)


@torch_only
def test_the_model_alone_is_called_by_keras(monkeypatch, rng):
    model, calls = create_model("resnet20", include_preprocessing=True), []
    call = keras.layers.Layer.__call__

    def counting(self, *args, **kwargs):
        calls.append(self.name)
        return call(self, *args, **kwargs)

    x = pictures(model, rng)
    monkeypatch.setattr(keras.layers.Layer, "__call__", counting)
    model(x, training=True)
    model.predict_on_batch(x)
    assert calls == ["resnet20", "resnet20"]


@torch_only
def test_maps_are_let_go_and_odd_graphs_are_left_to_keras(rng):
    x = rng.normal(size=(2, 4, 4, 3)).astype("float32")
    inputs = keras.Input((4, 4, 3))
    y = BatchNormalization()(inputs)
    plain = DirectModel(inputs, BatchNormalization()([y, inputs]))
    assert [sorted(step.freed) for step in graph_steps(plain)] == [[], [0, 1]]
    for odd in (
        DirectModel(inputs, [y, inputs]),
        DirectModel(inputs, ops.relu(y)),
        DirectModel({"a": inputs}, keras.layers.Dropout(0.5)(y, training=True)),
    ):
        assert graph_steps(odd) is None
        odd({"a": x} if isinstance(odd.input, dict) else x, training=False)
    assert plain(keras.Input((4, 4, 3))).shape == (None, 4, 4, 3)  # a symbolic call


def awkward_graphs():
    """Graphs in which a fusion would be wrong, or must look twice."""

    def conv(**kwargs):
        return Conv2D(8, 3, pad=1, **kwargs)

    x = keras.Input((8, 8, 8))
    y = conv()(x)
    yield (
        "two users",
        x,
        keras.layers.Add()([BatchNormalization()(y), y]),
    )
    x = keras.Input((8, 8, 8))
    y = conv(activation="relu")(x)
    yield "relu before the norm", x, BatchNormalization(activation="relu")(y)
    x = keras.Input((8, 8, 8))
    yield "norm before the convolution", x, conv()(BatchNormalization(activation="relu")(x))
    x = keras.Input((8, 8, 8))
    a, b = conv()(x), conv()(x)
    yield "sum of two", x, keras.layers.ReLU()(keras.layers.Add()([a, b]))
    x = keras.Input((8, 8, 8))
    a = conv()(x)
    yield (
        "shortcut used again",
        x,
        keras.layers.Add()([BatchNormalization()([conv()(a), a]), conv()(a)]),
    )
    x = keras.Input((8, 8, 8))
    yield "the input as shortcut", x, BatchNormalization(activation="relu")([conv()(x), x])
    x = keras.Input((8, 8, 8))
    shared = conv()
    yield "a layer called twice", x, BatchNormalization()(shared(BatchNormalization()(shared(x))))
    x = keras.Input((8, 8, 8))
    yield "another activation", x, BatchNormalization(activation="gelu")(conv()(x))
    x = keras.Input((8, 8, 8))
    yield "doubled", x, (lambda a: keras.layers.Add()([a, a]))(conv()(x))
    x = keras.Input((8, 8, 8))
    yield "same padding", x, BatchNormalization()(Conv2D(8, 3, 2, padding="same")(x))
    x = keras.Input((8, 8, 8))
    yield "dropout at the end", x, keras.layers.Dropout(0.5)(conv()(x))
    x = keras.Input((8, 8, 8))
    y = keras.layers.ReLU()(conv()(x))
    yield (
        "dense sums",
        x,
        keras.layers.Add()([keras.layers.Dense(4)(keras.layers.Flatten()(y)) for _ in range(2)]),
    )


def assert_gradients_agree(model, plain, x, what):
    """Each within the tolerance of its largest value, or of one where that is less."""

    def difference(some, others):
        return max(
            float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
            for a, b in zip(some, others, strict=True)
        )

    def of_plain(change):
        return gradients_of(plain, change(x))[1]

    expected = gradients_of(plain, x)[1]
    found = difference(gradients_of(model, x)[1], expected)
    assert found <= allowed(1e-3, found, of_plain, expected, difference), what


@torch_only
@pytest.mark.parametrize("training", [True, False])
def test_awkward_graphs_agree_with_keras(training, lists_run, rng):
    for what, inputs, outputs in awkward_graphs():
        model = randomized(DirectModel(inputs, outputs))
        plain = keras.models.clone_model(by_keras(model))
        plain.set_weights(model.get_weights())
        if training and "dropout" in what:
            continue
        x = torch.tensor(rng.normal(size=(2, 8, 8, 8)).astype("float32"))
        before = x.clone()
        with torch.set_grad_enabled(training):
            for _ in range(2):
                expected = plain(x, training=training)
                y = model(x, training=True) if training else model.predict_on_batch(x)
                y = ops.convert_to_tensor(y)
                assert np.abs(numpy(y.detach()) - numpy(expected.detach())).max() < 1e-4, what
        if training:
            assert_gradients_agree(model, plain, x, what)
        assert torch.equal(x, before), what
        assert lists_run["whole" if training else "folded"] > 0, what
        lists_run.update(whole=0, folded=0)


class OwnLoss(DirectStep, keras.Model):
    """Computes its loss itself."""

    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


class AddsLoss(keras.layers.Layer):
    """Adds a loss."""

    def call(self, x):
        self.add_loss(ops.mean(x))
        return x


def steps_to_take(name):
    """A model to train a few steps, and weights of the images."""
    inputs = keras.Input((16, 16, 3))
    if name in ("own loss", "added loss", "regularizer"):
        penalty = keras.regularizers.L2(0.1) if name == "regularizer" else None
        x = Conv2D(4, 3, kernel_regularizer=penalty)(inputs)
        x = AddsLoss()(x) if name == "added loss" else x
        x = keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x))
        return (OwnLoss if name == "own loss" else ImageModel)(inputs, x), None
    model = create_model("resnet_tiny", include_preprocessing=True)
    if name == "a part, weighted":
        model.get_layer("conv1").trainable = model.get_layer("bn1").trainable = False
        return model, torch.tensor([0.5, 1.0, 2.0, 0.0])
    return model, None


@torch_only
@pytest.mark.parametrize(
    "name, short",
    [
        ("all", True),
        ("a part, weighted", True),
        ("mixed_bfloat16", True),
        ("mixed_float16", True),
        ("own loss", False),
        ("added loss", False),
        ("regularizer", False),
    ],
)
def test_the_short_step_is_keras_own_to_the_bit(name, short, monkeypatch, rng):
    x, y = torch.tensor(rng.integers(0, 256, (4, 16, 16, 3), "uint8")), torch.tensor([0, 1, 2, 3])
    long_step, long_steps, found = keras.Model.train_step, [], []
    monkeypatch.setattr(
        keras.Model, "train_step", lambda *given: long_steps.append(0) or long_step(*given)
    )
    policy = keras.config.dtype_policy()
    for by_keras_step in (False, True):
        if by_keras_step:
            monkeypatch.setattr(DirectStep, "train_step", keras.Model.train_step)
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(name if name.startswith("mixed") else policy)
        try:
            model, weights = steps_to_take(name)
            randomized(model)
            compile_model(model, SGD(0.01, momentum=0.9, weight_decay=0.01), False)
        finally:
            keras.config.set_dtype_policy(policy)
        logs = [model.train_on_batch(x, y, sample_weight=weights) for _ in range(3)]
        held = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
        found.append([*map(numpy, held), np.array(logs)])
        assert len(long_steps) == (3 if by_keras_step else 0 if short else 3)
        long_steps.clear()
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@torch_only
@pytest.mark.slow
def test_training_is_noticed_whoever_updates_the_weights(rng):
    """Batch norm and fused optimizers change tensors without torch's count of it."""
    x = torch.tensor(rng.normal(size=(4, 32, 32, 3)).astype("float32"))
    labels = torch.tensor([0, 1, 2, 3])

    def ours(model, loss):
        loss.backward()
        weights = model.trainable_variables
        with torch.no_grad():
            optimizer = SGD(0.1, momentum=0.9)
            optimizer.apply([v.value.grad for v in weights], weights)

    def torchs(model, loss):
        loss.backward()
        torch.optim.AdamW(model.parameters(), 0.1, fused=True).step()

    def statistics_alone(model, loss):
        pass

    for name, update in [
        ("resnet20", ours), ("resnet20", torchs), ("resnet20", statistics_alone),
        ("alexnet_cifar10", ours), ("alexnet_cifar10", torchs),
    ]:  # fmt: skip
        model = create_model(name, dropout=0.0) if "alex" in name else create_model(name)
        plain = by_keras(model)
        before = model.predict_on_batch(x)
        # Also with frozen statistics, and through another model over the same layers.
        for through, training in ((model, True), (model, False), (plain, True)):
            if update is statistics_alone and not training:
                continue
            logits = through(x, training=training)
            update(model, torch.nn.functional.cross_entropy(logits, labels))
            after = model.predict_on_batch(x)
            assert_close(after, plain.predict_on_batch(x))
            assert not np.allclose(before, after, rtol=1e-3)
            before = after


@torch_only
def test_a_runner_looks_at_the_weights_once_and_the_next_one_anew(rng):
    model = create_model("resnet_tiny")
    x = rng.normal(size=(2, 16, 16, 3)).astype("float32")
    runner = open_runner(model)
    before = runner.outputs(x)
    model.layers[1].kernel.value.data.mul_(2)
    np.testing.assert_array_equal(runner.outputs(x), before)  # as on the other backends
    after = open_runner(model).outputs(x)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, model.predict_on_batch(x), atol=1e-5)
