"""Every row of the table: parameters, shapes, options, names."""

import gc
import json
import pathlib

import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.inference import grad_cam as explain
from keras_resnet.system.errors import InputError
from keras_resnet.variants import SPECS, conv_output_size
from keras_resnet.weights.mapping import expected_keys
from keras_resnet.weights.matching import multiply_adds, parameter_count, spec_shapes

REGISTRY = json.loads(
    (pathlib.Path(kr.__file__).parent / "weights/torchvision.json").read_text(encoding="utf-8")
)["weights"]
PUBLISHED = {row["model"]: row for row in REGISTRY}
# Small pictures keep the large networks cheap; alexnet_paper needs 63, torchvision's AlexNet too.
SUMS = [604.81055, 0.5647226]  # of the absolute values, for the seed below
SIDES = {name: max(spec.min_size, 32) for name, spec in SPECS.items()}


def trainable(model):
    return sum(int(np.prod(w.shape)) for w in model.trainable_weights)


# One of every block, stem, shortcut and head: no backend treats a deeper or wider row otherwise.
KINDS = {
    *("resnet18", "resnet50", "resnext50_32x4d", "resnet50_v1", "resnet50_v1_relu", "resnet20"),
    *("resnet34_cifar10", "resnet50d", "alexnet", "alexnet_paper", "alexnet_cifar10"),
}
QUICK = ("resnet18", "resnet20", "resnet50", "resnet34_cifar10", "alexnet_cifar10")
# Rows whose shapes tests/weights/test_load.py compares with timm's, without building them.
ALIKE = (
    *("resnet18d", "resnet34d", "resnet26d", "resnet101d", "resnet152d", "resnet26t"),
    *("resnetv2_34", "resnetv2_50", "resnetv2_101", "resnetv2_152"),
    *("resnet101_v2", "resnet152_v2"),  # with Keras' numbers of weights: test_dialects.py
)
# Deeper than these the blocks repeat, and to draw 500 MB of weights takes seconds.
DEEP = [
    name
    for name, spec in SPECS.items()
    if spec.input_size > 64 and sum(getattr(spec, "blocks", ())) > 16
]
ROWS = [
    pytest.param(
        name,
        marks=pytest.mark.long if name in DEEP else [] if name in QUICK else pytest.mark.slow,
    )
    for name in SPECS
    if name not in ALIKE
]


@pytest.fixture(scope="module", params=ROWS)
def built(request):
    """A row, built at its own size; one at a time, since the largest have 500 MB of weights."""
    gc.collect()  # the one before it, which pytest has let go by now
    return request.param, kr.create_model(request.param)


@pytest.mark.once
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_of_the_table_are_the_published_ones(name):
    assert parameter_count(SPECS[name]) == PUBLISHED[name]["num_params"]
    assert multiply_adds(SPECS[name]) / 1e9 == pytest.approx(PUBLISHED[name]["gflops"], abs=6e-4)


@pytest.mark.once
@pytest.mark.slow
def test_a_built_row_has_the_parameters_and_flops_of_the_table(built):
    name, model = built
    spec = SPECS[name]
    assert list(expected_keys(model).items()) == list(spec_shapes(spec).items())
    assert model.output_shape == (None, spec.num_classes)
    assert trainable(model) == parameter_count(spec)
    assert kr.count_flops(model) == multiply_adds(spec)


@pytest.mark.once
def test_grad_cam_looks_at_the_map_in_front_of_the_pooling(built):
    name, model = built
    tensor = explain._last_map(model)
    if "alexnet" in name:
        assert tensor is model.get_layer("maxpool5").output
    else:
        assert tensor is model.get_layer("avgpool").input


# Other backends' logits of these are compared with torchvision's in tests/weights/test_load.py.
COMPARED = ("resnet18", "resnext50_32x4d", "alexnet")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n,
            marks=pytest.mark.long
            if n not in KINDS
            else [pytest.mark.long("tensorflow", "jax")] * (n in COMPARED),
        )
        for n in SPECS
    ],
)
def test_logits_have_one_value_a_class(name, rng):
    side = SIDES[name]
    if name in ("alexnet_paper", "alexnet_cifar10"):
        side = SPECS[name].input_size  # flattened: the size is fixed
    small = kr.create_model(name, input_shape=(side, side, 3), num_classes=7)
    y = keras.ops.convert_to_numpy(small(rng.normal(size=(2, side, side, 3)).astype("float32")))
    assert y.shape == (2, 7)
    assert np.isfinite(y).all()
    assert y.dtype == np.float32


@pytest.mark.once
def test_all_eleven_of_torchvisions_are_there():
    assert set(PUBLISHED) <= set(SPECS)
    assert len(PUBLISHED) == 11


@pytest.mark.once
@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_cifar_resnets_have_the_parameters_of_the_papers_table_6(depth, millions):
    model = kr.create_model(f"resnet{depth}")
    assert trainable(model) / 1e6 == pytest.approx(millions, rel=0.025)
    convs = [x for x in model.layers if isinstance(x, keras.layers.Conv2D)]
    assert len(convs) + 1 == depth


@pytest.mark.once
def test_names_follow_the_reference_implementations_module_paths():
    names = {layer.name for layer in kr.ResNet50(input_shape=(64, 64, 3)).layers}
    assert {"conv1", "bn1", "layer1_0_downsample_0", "layer4_2_bn3", "fc"} <= names
    names = {layer.name for layer in kr.AlexNetCIFAR10().layers}
    assert {"conv1_0", "conv5_0", "fc1_1", "fc2_0", "fc3_0"} <= names
    names = {layer.name for layer in kr.ResNet34CIFAR10().layers}
    assert {"conv1_0", "conv1_1", "layer1_0_0_longway_0", "layer2_0_0_shortway_0",
            "layer4_2_longway_4", "fc"} <= names  # fmt: skip


@pytest.mark.once
def test_every_row_has_a_named_builder():
    builders = [
        getattr(kr, n) for n in dir(kr) if n.startswith(("ResNe", "SERes", "Wide", "AlexNet"))
    ]
    assert all(getattr(kr, builder.__name__) is builder for builder in builders)
    built = {b.__doc__.split("`")[1] for b in builders}
    assert built == {name for name, spec in SPECS.items() if not spec.hidden}


@pytest.mark.slow
def test_output_is_logits_unless_softmax_is_asked_for(rng):
    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    keras.utils.set_random_seed(0)
    logits = kr.ResNet20()(x)
    keras.utils.set_random_seed(0)
    probabilities = kr.ResNet20(classifier_activation="softmax")(x)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(keras.ops.softmax(logits)),
        keras.ops.convert_to_numpy(probabilities),
        rtol=1e-5,
        atol=1e-6,
    )


def test_preprocessing_inside_takes_bytes_and_floats_alike(rng):
    pixels = rng.integers(0, 256, size=(2, 32, 32, 3), dtype=np.uint8)
    keras.utils.set_random_seed(0)
    inside = kr.ResNet20(include_preprocessing=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    keras.utils.set_random_seed(0)
    plain = kr.ResNet20()
    x = (pixels.astype("float32") / 255 - np.float32([0.5, 0.4, 0.3])) / np.float32([0.2, 0.3, 0.4])
    expected = keras.ops.convert_to_numpy(plain(x))
    for fed in (pixels, pixels.astype("float32")):
        got = inside.predict(fed, verbose=0)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pooling", "rank"), [(None, 4), ("avg", 2), ("max", 2)])
def test_without_head_gives_features(pooling, rank):
    model = kr.ResNet18(include_top=False, pooling=pooling, input_shape=(64, 64, 3))
    assert len(model.output_shape) == rank
    assert model.output_shape[-1] == 512


@pytest.mark.slow
@pytest.mark.long("tensorflow", "jax")
def test_any_size_is_taken_where_sides_are_open(rng):
    for name in ("resnet18", "alexnet"):
        model = kr.create_model(name, input_shape=(None, None, 3), num_classes=3)
        for size in ((64, 96), (97, 65)):
            x = rng.normal(size=(1, *size, 3)).astype("float32")
            assert tuple(model(x).shape) == (1, 3)


def test_other_channel_counts(rng):
    model = kr.ResNet20(input_shape=(32, 32, 1), include_preprocessing=True)
    assert tuple(model(np.zeros((1, 32, 32, 1), "uint8")).shape) == (1, 10)
    assert kr.ResNet18(input_shape=(32, 32, 5), num_classes=2).count_params() > 0


def test_input_tensor_builds_on_another_graph(rng):
    inputs = keras.Input((40, 40, 3))
    x = keras.layers.CenterCrop(32, 32)(inputs)
    model = kr.ResNet20(input_tensor=x)
    assert model.input_shape == (None, 40, 40, 3)
    assert tuple(model(np.zeros((1, 40, 40, 3), "float32")).shape) == (1, 10)


@pytest.mark.once
def test_dropout_and_name():
    model = kr.ResNet18(dropout=0.3, name="mine", input_shape=(32, 32, 3), num_classes=2)
    assert model.name == "mine"
    assert model.get_layer("dropout").rate == 0.3
    assert kr.AlexNet(num_classes=2).get_layer("dropout1").rate == 0.5


@pytest.mark.once
def test_create_model_takes_its_name_by_keyword_too():
    assert kr.create_model(name="resnet20").info["variant"] == "resnet20"


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kr.create_model("resnet5O"), "Did you mean .*'resnet50'"),
        (lambda: kr.ResNet50(num_classes=0), "num_classes must be a whole number of at least 1"),
        (lambda: kr.ResNet50(input_shape=(224, 224)), "three positive sizes"),
        (lambda: kr.ResNet50(input_shape=(3, 224, 224)), r"give input_shape=\(224, 224, 3\), or"),
        (lambda: kr.ResNet50(input_shape=(1, None, None)), r"input_shape=\(None, None, 1\)"),
        (lambda: kr.AlexNet(input_shape=(62, 224, 3)), "at least 63x63"),
        (lambda: kr.AlexNetCIFAR10(input_shape=(None, None, 3)), "fixed size"),
        (lambda: kr.ResNet18(include_top=False, pooling="mean"), "'avg' or 'max'"),
        (lambda: kr.ResNet18(dropout=1.0), "dropout must be at least 0 and below 1"),
        (lambda: kr.ResNet18(include_preprocessing=True, mean=(0.5,)), "1 values for 3 channels"),
        (lambda: kr.ResNet18(classes=3, num_classes=4), "one thing. Received: 3 and 4"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.once
def test_names_in_another_case_are_hinted_at():
    for name, meant in (
        ("resnet50", "ResNet50"), ("Resnet18", "ResNet18"), ("wide_resnet50_2", "WideResNet50_2"),
        ("Predict", "predict"), ("load_models", "load_model"),
    ):  # fmt: skip
        with pytest.raises(AttributeError, match=f"{name}.*Did you mean '{meant}'"):
            getattr(kr, name)
    assert not hasattr(kr, "anything_else_at_all")


@pytest.mark.once
def test_channels_first_shapes_are_turned_too():
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(InputError, match=r"give input_shape=\(3, 224, 224\), or call"):
            kr.ResNet50(input_shape=(224, 224, 3))
    finally:
        keras.config.set_image_data_format("channels_last")


@pytest.mark.once
def test_arguments_of_keras_applications_are_taken():
    assert kr.ResNet20(classes=3).output_shape == (None, 3)
    bare = kr.ResNet20(include_top=False, pooling="max", classifier_activation="softmax")
    assert bare.output_shape == (None, 64), "what is the head's counts with a head alone"
    inputs = keras.layers.Conv2D(3, 2, strides=2)(keras.Input((66, 66, 4)))
    assert kr.ResNet20(input_tensor=inputs, include_top=False).input_shape == (None, 66, 66, 4)


@pytest.mark.long("tensorflow", "jax")
def test_feature_extractor_gives_a_map_at_each_stride(rng):
    model = kr.ResNet50(input_shape=(64, 64, 3), include_top=False)
    features = kr.feature_extractor(model)
    x = rng.normal(size=(1, 64, 64, 3)).astype("float32")
    shapes = [tuple(y.shape) for y in features(x)]
    assert shapes == [(1, 16, 16, 256), (1, 8, 8, 512), (1, 4, 4, 1024), (1, 2, 2, 2048)]
    last = keras.ops.convert_to_numpy(features(x)[-1])
    np.testing.assert_allclose(last, keras.ops.convert_to_numpy(model(x)), rtol=1e-5, atol=1e-6)
    assert [y.shape[-1] for y in kr.feature_extractor(kr.ResNet20(), (1, 2, 4)).outputs] == [
        16, 32, 64,
    ]  # fmt: skip
    with pytest.raises(InputError, match="There are: 1, 2, 4"):
        kr.feature_extractor(kr.ResNet20(), (8,))
    # Zeros put around a map for the pooling are no map.
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.ZeroPadding2D(1)(keras.layers.Conv2D(4, 2, strides=2)(inputs))
    padded = keras.Model(inputs, keras.layers.Conv2D(5, 3, strides=2)(x))
    maps = kr.feature_extractor(padded, (2, 4)).outputs
    assert [y.shape for y in maps] == [(None, 8, 8, 4), (None, 4, 4, 5)]


def test_info_travels_in_the_model_file(tmp_path, rng):
    model = kr.ResNet20(num_classes=2)
    model.info["class_names"] = ["Äpfel", "a 'quoted'\nname"]
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.info == model.info
    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(loaded(x)), keras.ops.convert_to_numpy(model(x)), rtol=1e-6
    )


@pytest.mark.once
def test_initial_weights_are_torchvisions_distributions():
    model = kr.ResNet50(input_shape=(64, 64, 3))
    kernel = keras.ops.convert_to_numpy(model.get_layer("layer3_1_conv2").kernel)
    # kaiming_normal_, fan_out, relu: std = sqrt(2 / (out * k * k)).
    assert kernel.std() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    dense = model.get_layer("fc")
    bound = 2048**-0.5
    for values in (dense.kernel, dense.bias):
        values = keras.ops.convert_to_numpy(values)
        assert np.abs(values).max() <= bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    norm = model.get_layer("bn1")
    assert (norm.momentum, norm.epsilon) == (0.9, 1e-5)


def test_a_seed_gives_the_same_weights_on_every_backend():
    keras.utils.set_random_seed(3)
    model = kr.ResNet20()
    kernel = keras.ops.convert_to_numpy(model.get_layer("layer2_1_conv2").kernel)
    head = keras.ops.convert_to_numpy(model.get_layer("linear").bias)
    # Drawn by NumPy 2.4 from Keras' seeds; the same file runs on all three backends.
    assert [float(np.abs(kernel).sum()), float(np.abs(head).sum())] == pytest.approx(SUMS, rel=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "alexnet"])
@pytest.mark.slow
def test_initial_weights_spread_as_torchvisions(name, torchvision):
    state = torchvision.models.get_model(name).state_dict()
    ours = kr.to_torchvision(kr.create_model(name))
    for key, tensor in state.items():
        if tensor.numel() >= 20_000:
            assert ours[key].std() == pytest.approx(float(tensor.std()), rel=0.05), key


@pytest.mark.once
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(224, 11, 4, 2), (55, 3, 2, 0), (27, 5, 1, 2), (13, 3, 1, 1), (224, 7, 2, 3), (33, 3, 2, 1)],
)
def test_output_size_formula_is_torchs(size, kernel, stride, padding):
    torch = pytest.importorskip("torch")
    x = torch.zeros(1, 1, size, size)
    y = torch.nn.functional.conv2d(x, torch.zeros(1, 1, kernel, kernel), None, stride, padding)
    assert conv_output_size(size, kernel, stride, padding) == y.shape[-1]


@pytest.mark.once
def test_list_models_takes_patterns():
    assert kr.list_models("resnext*") == ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]
    assert "alexnet_paper" in kr.list_models("alexnet")
    assert set(SPECS) - set(kr.list_models()) == {"resnet_tiny"}
    assert kr.list_models("resnet_tiny") == ["resnet_tiny"]


@pytest.mark.once
def test_summary_is_what_torchsummary_prints():
    table = kr.summary(kr.create_model("resnet50"))
    assert table.trainable_params == 25_557_032
    rows = {row.name: row for row in table.rows}
    assert rows["conv1"].output_shape == (112, 112, 64)
    assert rows["conv1"].params == 9_408
    assert rows["layer4_2_conv3"].params == 1_048_576
    assert rows["fc"].params == 2_049_000
    assert table.input_mib == pytest.approx(0.57, abs=0.005)
    assert "Total params" in str(table)
    open_sides = kr.create_model("resnet18", input_shape=(None, None, 3))
    assert kr.count_flops(open_sides, 224) == kr.count_flops(kr.create_model("resnet18"))
    with pytest.raises(InputError, match="any size"):
        kr.summary(open_sides)
