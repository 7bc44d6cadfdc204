"""What is frozen stays as it is, statistics too, and what is loaded is what was saved."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_resnet.models.zoo import create_model
from keras_resnet.recipes import get_recipe
from keras_resnet.system.errors import InputError, NotFoundError
from keras_resnet.training.freeze import freeze, load_pretrained, parts, starting_weights, to_fetch
from keras_resnet.training.loop import part_to_train
from keras_resnet.training.prepare import compile_model, make_optimizer
from keras_resnet.weights import download
from keras_resnet.weights.mapping import save_torchvision


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    return create_model("resnet_tiny", num_classes=3)


@pytest.fixture
def resnet20():
    return create_model("resnet20", num_classes=3, input_shape=(16, 16, 3))


def values(model):
    return {v.path: keras.ops.convert_to_numpy(v).copy() for v in model.weights}


def moved(model, before):
    """Names of the layers of which some weight or statistic has changed."""
    after = values(model)
    return {path.split("/")[-2] for path in before if not np.array_equal(before[path], after[path])}


def fit(model, recipe=None, head="fc"):
    recipe = recipe or get_recipe("finetune").with_options(schedule="constant", warmup_epochs=0)
    rng = np.random.default_rng(0)
    compile_model(model, make_optimizer(recipe, 0.1, head), soft_labels=False)
    model.fit(
        rng.standard_normal((8, 16, 16, 3)).astype("float32") + 1.0,
        rng.integers(0, 3, 8),
        batch_size=4,
        verbose=0,
    )


def layers_with_weights(model):
    return [layer.name for layer in model.layers if layer.weights]


@pytest.mark.parametrize("until", [pytest.param("head", marks=pytest.mark.once), "layer2"])
def test_frozen_layers_keep_weights_and_statistics_in_fit_and_after_recompiling(model, until):
    report = freeze(model, until)
    before = values(model)
    fit(model)
    fit(model)  # compiled again
    names = layers_with_weights(model)
    first = len(names) - 1 if until == "head" else names.index("layer2_0_conv1")
    assert moved(model, before) == set(names[first:]) == set(report.trained)
    assert report.frozen_norms + report.training_norms == 6
    assert report.training_norms == (0 if until == "head" else 3)
    assert report.trained_params + report.frozen_params == 5266 - 7 * 17  # 3 classes, not 10


def test_frozen_layers_stay_frozen_in_a_file(model, tmp_path):
    freeze(model, "layer2")
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    before = values(again)
    fit(again)
    assert "conv1" not in moved(again, before) and "fc" in moved(again, before)


def test_frozen_norms_behind_the_first_trained_part_keep_their_statistics(model):
    report = freeze(model, "layer2", freeze_norms=True)
    before = values(model)
    fit(model)
    assert report.training_norms == 0
    assert not [name for name in moved(model, before) if "bn" in name]


@pytest.mark.once
def test_everything_is_unfrozen_again(model):
    freeze(model, "head")
    report = freeze(model, None)
    before = values(model)
    fit(model)
    assert report.frozen == [] and moved(model, before) == set(layers_with_weights(model))


def test_the_backbone_learns_at_its_own_rate(model):
    recipe = get_recipe("finetune").with_options(
        backbone_rate=0.1, weight_decay=0.0, momentum=0.0, schedule="constant", warmup_epochs=0
    )
    compile_model(model, make_optimizer(recipe, 1.0, "fc"), soft_labels=False)
    before = values(model)
    ones = [keras.ops.ones(v.shape) for v in model.trainable_variables]
    model.optimizer.apply(ones, model.trainable_variables)
    after = values(model)
    for variable in model.trainable_variables:
        step = before[variable.path] - after[variable.path]
        expected = 1.0 if "fc/" in variable.path else 0.1
        np.testing.assert_allclose(step, expected, rtol=1e-4, err_msg=variable.path)


class Block(keras.layers.Layer):
    """A block that is one layer to the graph."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = keras.layers.Conv2D(4, 1)
        self.norm = keras.layers.BatchNormalization()

    def build(self, input_shape):
        self.conv.build(input_shape)
        self.norm.build(self.conv.compute_output_shape(input_shape))
        self.built = True

    def call(self, x, training=None):
        return self.norm(self.conv(x), training=training)


def nested(kind):
    """A backbone in a model of one's own, and the last layer's name."""
    keras.utils.set_random_seed(0)
    shape = (16, 16, 3)
    backbone = create_model("resnet_tiny", include_top=False, pooling="avg", input_shape=shape)
    inputs, dense = keras.Input(shape), keras.layers.Dense(3, name="mine")
    if kind == "sequential":
        return keras.Sequential([inputs, backbone, dense])
    if kind == "twice":
        backbone = keras.Sequential([keras.Input(shape), backbone], name="outer")
    if kind == "block":
        return keras.Model(inputs, dense(backbone(Block(name="block")(inputs)[..., :3])))
    if kind == "subclass":

        class Mine(keras.Model):
            def __init__(self):
                super().__init__()
                self.backbone, self.head = backbone, dense

            def call(self, x, training=None):
                return self.head(self.backbone(x, training=training))

        model = Mine()
        model(np.zeros((1, *shape), "float32"))
        return model
    return keras.Model(inputs, dense(backbone(inputs)))


def learn(model):
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).normal(1.0, 1.0, (4, 16, 16, 3)).astype("float32")
    model.fit(x, np.ones((4, 3), "float32"), verbose=0)


@pytest.mark.parametrize(
    "kind",
    [
        "functional",
        *(
            pytest.param(kind, marks=pytest.mark.once)
            for kind in ("sequential", "twice", "block", "subclass")
        ),
    ],
)
def test_models_inside_a_model_are_walked_through(kind):
    model = nested(kind)
    for part in ("head", "layer2"):
        before = values(model)
        report = freeze(model, part)
        learn(model)
        names = report.frozen + report.trained
        if part == "head":
            assert report.trained == ["mine"] and report.training_norms == 0
        else:
            assert report.trained[0].startswith("layer2_") and "conv1" in report.frozen
            assert report.frozen_norms > 0 and report.training_norms > 0
        assert moved(model, before) == set(report.trained)
        assert names[-1] == "mine" and len(names) > 8
        total = sum(np.prod(v.shape) for v in model.weights if "moving_" not in v.path)
        assert report.trained_params + report.frozen_params == total


def test_a_model_inside_that_was_frozen_as_a_whole_is_unfrozen(tmp_path):
    model = nested("functional")
    name = model.layers[1].name
    model.layers[1].trainable = False
    assert freeze(model, None).frozen == []
    report = freeze(model, name)
    assert report.frozen == [] and report.trained[-1] == "mine"
    model.trainable = False
    report = freeze(model, "layer2", freeze_norms=True)
    assert report.training_norms == 0
    model.save(tmp_path / "m.keras")
    for one in (model, keras.saving.load_model(tmp_path / "m.keras")):
        before = values(one)
        learn(one)
        assert moved(one, before) == set(report.trained)
    with pytest.raises(InputError, match=rf"Its parts: conv1, .*{name}, head"):
        freeze(model, "backbone")


def test_norms_in_a_block_of_ones_own_are_counted_and_frozen():
    model = nested("block")
    assert freeze(model, None).training_norms == freeze(model, "head").frozen_norms
    report = freeze(model, None, freeze_norms=True)
    before = values(model)
    learn(model)
    statistics = [path for path in before if "moving_" in path]
    after = values(model)
    assert report.training_norms == 0 and any("block/" in path for path in statistics)
    for path in statistics:
        np.testing.assert_array_equal(before[path], after[path], err_msg=path)


@pytest.mark.once
@pytest.mark.slow
def test_parts_go_from_the_input_to_the_head():
    assert parts(create_model("resnet20")) == ["conv1", "layer1", "layer2", "layer3", "linear"]
    assert parts(create_model("alexnet", input_shape=(63, 63, 3))) == ["features", "classifier"]
    relu = create_model("resnet50_v1_relu", input_shape=(64, 64, 3))
    assert [p for p in parts(relu) if p.startswith("stage")] == [f"stage{i}" for i in (1, 2, 3, 4)]


@pytest.mark.once
def test_gradual_unfreezing_goes_back_part_by_part(model):
    recipe = get_recipe("finetune").with_options(unfreeze="head", gradual=1)
    names = [part_to_train(model, recipe, epoch) for epoch in range(5)]
    assert names == ["head", "layer2", "layer1", None, None]
    from_stage = recipe.with_options(unfreeze="layer2", gradual=3)
    assert [part_to_train(model, from_stage, e) for e in (0, 2, 3, 6)] == [
        "layer2", "layer2", "layer1", None,
    ]  # fmt: skip


@pytest.mark.once
def test_an_unknown_part_is_suggested(model):
    with pytest.raises(InputError, match=r"no part 'layer5'.*Did you mean 'layer"):
        freeze(model, "layer5")


def assert_backbone_equal(model, source):
    for layer in (layer for layer in source.layers if layer.weights):
        pairs = zip(layer.get_weights(), model.get_layer(layer.name).get_weights(), strict=True)
        if layer.name == "fc":
            continue
        for a, b in pairs:
            np.testing.assert_array_equal(a, b, err_msg=layer.name)


def scrambled_source():
    keras.utils.set_random_seed(7)
    source = create_model("resnet_tiny", num_classes=10)
    rng = np.random.default_rng(1)
    for weight in source.weights:
        weight.assign(rng.uniform(0.1, 1.0, weight.shape))
    return source


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.keras"])
def test_weights_go_under_a_new_head(model, tmp_path, name):
    source, path = scrambled_source(), tmp_path / name
    if path.suffix == ".keras":
        source.save(path)
    else:
        save_torchvision(source, path)
    head = [w.copy() for w in model.get_layer("fc").get_weights()]
    line = load_pretrained(model, path)
    assert name in line and "'fc' is new" in line and "\n" not in line
    assert_backbone_equal(model, source)
    for a, b in zip(head, model.get_layer("fc").get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_published_resnet20_goes_under_a_new_head(resnet20, shared):
    line = load_pretrained(resnet20, shared / "weights" / "resnet20-12fca82f.th")
    assert "resnet20-12fca82f.th" in line
    assert not np.allclose(resnet20.get_layer("bn1").get_weights()[2], 0)  # its running mean


@pytest.mark.once
@pytest.mark.slow
def test_weights_of_another_network_are_refused_and_nothing_is_changed(resnet20, tmp_path):
    path = tmp_path / "other.keras"
    create_model("resnet32", input_shape=(16, 16, 3)).save(path)
    create_model("resnet18", input_shape=(32, 32, 3)).save(tmp_path / "larger.keras")
    before = values(resnet20)
    with pytest.raises(InputError, match=r"resnet18.*do not fit resnet20"):
        load_pretrained(resnet20, tmp_path / "larger.keras")
    with pytest.raises(InputError, match=r"resnet32.*do not fit resnet20"):
        load_pretrained(resnet20, path)  # deeper, of equal shapes as far as they go
    assert moved(resnet20, before) == set()


@pytest.mark.once
@pytest.mark.slow
def test_weights_of_other_strides_are_refused(tmp_path):
    path = tmp_path / "v1.keras"
    create_model("resnet50_v1", input_shape=(32, 32, 3)).save(path)
    with pytest.raises(InputError, match=r"resnet50_v1.*first is 'layer2_0_conv1'"):
        load_pretrained(create_model("resnet50", input_shape=(32, 32, 3)), path)


@pytest.mark.once
def test_a_missing_file_is_named(model):
    for name in ("no-such.pth", "no-such.keras"):
        with pytest.raises(NotFoundError, match="no-such"):
            load_pretrained(model, name)


@pytest.mark.once
def test_the_head_stays_where_the_classes_are_the_same(tmp_path):
    names = ["ant", "bee", "caf\u00e9"]
    source = create_model("resnet_tiny", num_classes=3)
    source.info["class_names"] = ["caf\u00e9", "ant", "bee"]
    source.save(tmp_path / "best.keras")
    model = create_model("resnet_tiny", num_classes=3)
    for place in (tmp_path, tmp_path / "best.keras"):  # a run folder, or the file
        line = load_pretrained(model, place, ["ant", "bee", "cafe\u0301"])
        assert "stays, for the classes are the same" in line
    x = np.random.default_rng(0).random((2, *source.input_shape[1:]), dtype="float32")
    expected = keras.ops.convert_to_numpy(source(x))
    found = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(found, expected[:, [1, 2, 0]], rtol=1e-4, atol=1e-6)
    other = create_model("resnet_tiny", num_classes=3)
    before = other.layers[-1].get_weights()
    assert "is new" in load_pretrained(other, tmp_path, [*names[:2], "dog"])
    np.testing.assert_array_equal(other.layers[-1].get_weights()[0], before[0])


@pytest.mark.once
def test_auto_is_the_published_weights_where_they_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_RESNET_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("KERAS_RESNET_WEIGHTS_URL", "http://127.0.0.1:9")  # nobody listens
    weights, why = starting_weights("resnet18", "auto")
    assert weights is None and "Cannot download http://127.0.0.1:9/resnet18-" in why
    assert starting_weights("resnet_tiny", "auto") == (
        None, "torchvision publishes no weights for 'resnet_tiny'",
    )  # fmt: skip
    for given in (None, "DEFAULT", "file.pth"):
        assert starting_weights("resnet18", given) == (given, "")
    assert to_fetch("resnet18", "auto").startswith("http://127.0.0.1:9/resnet18-")
    assert "timm/resnet18" in to_fetch("resnet18", "timm/resnet18.a1_in1k")
    for model, given in (("resnet_tiny", "auto"), ("resnet18", None), ("resnet18", "file.pth")):
        assert to_fetch(model, given) is None
    monkeypatch.setattr(download, "weights_path", lambda entry, **_: entry.file_name)
    assert starting_weights("resnet18", "auto") == ("DEFAULT", "")
