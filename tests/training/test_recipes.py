"""Recipes hold the published numbers, and each of them trains."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from keras_resnet.cli import main as cli
from keras_resnet.data.labels import class_weights
from keras_resnet.recipes import RECIPES, Recipe, get_recipe
from keras_resnet.system.errors import InputError
from keras_resnet.training.prepare import (
    _check_sizes,
    evaluation_preprocess,
    make_optimizer,
    prepare_data,
    recipe_augment,
)
from keras_resnet.training.schedules import make_schedule
from keras_resnet.variants import get_spec


@pytest.mark.once
@pytest.mark.parametrize(
    ("variant", "side", "told"),
    [
        ("resnet18", 32, True),
        ("resnet50", 63, True),
        ("resnet50", 64, False),
        ("resnext50_32x4d", 48, True),
        ("alexnet", 64, False),
        ("resnet20", 32, False),
        ("resnet34_cifar10", 32, False),  # made for it
        ("resnet_tiny", 16, False),
    ],
)
def test_images_that_are_tiny_for_a_network_are_warned_about(variant, side, told, caplog):
    _check_sizes(variant, image_size=224, eval_size=side)
    expected = f"Images of {side}x{side} are tiny for {variant}"
    assert [expected in record.getMessage() for record in caplog.records] == [True] * told


@pytest.fixture(scope="module")
def published(shared):
    return json.loads((shared / "torchvision_weights.json").read_text())


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("resnet_v1", "resnet_v1"),
        ("alexnet", "alexnet"),
        ("resnet50_v2", "new_recipe_fixres"),
    ],
)
def test_the_numbers_are_torchvisions(published, name, row):
    recipe, theirs = get_recipe(name), published["recipes"][row]
    ours = {
        "optimizer": recipe.optimizer,
        "momentum": recipe.momentum,
        "nesterov": recipe.nesterov,
        "interpolation": recipe.interpolation,
        "hflip_prob": recipe.flip,
        "global_batch": recipe.batch_size,
        "epochs": recipe.epochs,
        "lr": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "label_smoothing": recipe.label_smoothing,
        "mixup_alpha": recipe.mixup,
        "cutmix_alpha": recipe.cutmix,
        "auto_augment": recipe.policy,
        "random_erase": recipe.random_erasing,
        "lr_warmup_epochs": recipe.warmup_epochs,
        "model_ema": recipe.ema,
        "lr_scheduler": {"step": "steplr", "cosine": "cosineannealinglr"}[recipe.schedule],
        "amp": recipe.precision != "fp32",
        "train_crop_size": recipe.image_size or get_spec(recipe.model).input_size,
    }
    assert ours == {key: theirs[key] for key in ours}
    assert list(recipe.crop_scale) == theirs["random_resized_crop"]["scale"]
    assert (theirs["norm_weight_decay"] is None) == recipe.norm_decay
    if recipe.schedule == "step":
        assert (recipe.step_size, recipe.gamma) == (theirs["lr_step_size"], theirs["lr_gamma"])
    if recipe.ema:
        assert (recipe.ema_steps, recipe.ema_decay) == (
            theirs["model_ema_steps"],
            theirs["model_ema_decay"],
        )
        assert recipe.warmup_decay == theirs["lr_warmup_decay"]
    if name == "resnet50_v2":
        assert recipe.repeats == 4 and recipe.eval_resize == 232


@pytest.mark.once
def test_the_accuracies_aimed_at_are_the_registrys(published):
    for name, model, tag in (
        ("resnet50_v2", "resnet50", "IMAGENET1K_V2"),
        ("alexnet", "alexnet", "IMAGENET1K_V1"),
        *(("resnet_v1", f"resnet{depth}", "IMAGENET1K_V1") for depth in (18, 34, 50, 101, 152)),
    ):
        (row,) = [e for e in published["entries"] if (e["model"], e["tag"]) == (model, tag)]
        assert f"{row['acc1']:.3f}" in get_recipe(name).aim


@pytest.mark.once
def test_cifars_schedule_is_that_of_the_paper():
    # He et al. 2015, section 4.2: 45,000 pictures by 128, drops at 32k and 48k of 64k steps.
    recipe = get_recipe("cifar")
    steps = 45_000 // 128 + 1
    schedule = make_schedule(recipe, steps)
    assert recipe.epochs * steps == pytest.approx(64_000, rel=0.01)
    changes = [s for s in range(1, 64_000) if schedule.value_at(s) != schedule.value_at(s - 1)]
    assert changes == pytest.approx([32_000, 48_000], rel=0.01)
    assert schedule.value_at(0) == 0.1 and schedule.value_at(63_999) == pytest.approx(1e-3)


@pytest.mark.once
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_its_source_and_builds_its_parts(name, capsys):
    recipe = RECIPES[name]
    assert recipe.name == name and recipe.source and recipe.aim
    optimizer = make_optimizer(recipe, make_schedule(recipe, 10), head="fc")
    assert float(optimizer.learning_rate) <= recipe.learning_rate * 1.0001
    size = recipe.image_size or get_spec(recipe.model).input_size
    augment = recipe_augment(recipe, size)
    picture = np.zeros((size + 10, size + 20, 3), np.uint8)
    if augment is not None:
        assert augment(picture, np.random.default_rng(0)).shape == (size, size, 3)
    pixels = evaluation_preprocess(recipe, recipe.eval_size or size).pixels(picture)
    assert pixels.shape == ((recipe.eval_size or size),) * 2 + (3,)
    assert cli.main(["train", "anywhere", "--recipe", name, "--show"]) == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Recipe)[3:]:
        assert field.name in shown


@pytest.mark.once
def test_a_recipes_augmentation_is_the_preset_of_torchvisions_references():
    augment = recipe_augment(get_recipe("resnet50_v2"), 176)
    assert [type(step).__name__ for step in (*augment.steps, augment.erasing)] == [
        "RandomResizedCrop",
        "RandomHorizontalFlip",
        "TrivialAugmentWide",
        "RandomErasing",
    ]
    assert augment.steps[2].interpolation == "bilinear" and augment.erasing.p == 0.1


@pytest.mark.once
def test_every_field_of_a_recipe_is_an_option_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help-all"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Recipe)[3:]:
        assert f"--{field.name.replace('_', '-')}" in shown


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, "Did you mean 'epochs'"),
        ({"optimizer": "sgdd"}, "Did you mean 'sgd'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
        ({"label_smoothing": 2.0}, "label_smoothing must be at least 0 and at most 1"),
        ({"model": "resnet19"}, "Did you mean"),
        ({"optimizer": "rmsprop"}, "weight_decay"),
        ({"optimizer": "adamw", "backbone_rate": 0.1}, "backbone_rate"),
        ({"class_weights": "ant=0"}, r"'ant=1,bee=20'. Received: 'ant=0'"),
        ({"class_weights": "inverse"}, r"'ant=1,bee=20'. Received: 'inverse'"),
        ({"sampler": "balance"}, "Did you mean 'balanced'"),
        ({"class_weights": "balanced", "sampler": "balanced"}, "give one of them"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        get_recipe("finetune").with_options(**options)


@pytest.mark.once
def test_a_short_trial_of_a_long_recipe_keeps_a_warm_up():
    assert get_recipe("resnet50_v2").with_options(epochs=3).warmup_epochs == 1


def test_adamw_spares_norms_and_biases_where_the_recipe_does():
    import keras

    recipe = get_recipe("finetune").with_options(
        optimizer="adamw", norm_decay=False, bias_decay=False, weight_decay=0.1
    )
    inputs = keras.Input((4,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(3)(inputs))
    model = keras.Model(inputs, x)
    optimizer = make_optimizer(recipe, 0.5)
    optimizer.build(model.trainable_variables)
    before = {v.path: keras.ops.convert_to_numpy(v) + 1.0 for v in model.trainable_variables}
    for variable in model.trainable_variables:
        variable.assign(before[variable.path])
    nothing = [keras.ops.zeros(v.shape) for v in model.trainable_variables]
    optimizer.apply(nothing, model.trainable_variables)
    for variable in model.trainable_variables:
        left = keras.ops.convert_to_numpy(variable) / before[variable.path]
        expected = 0.95 if variable.path.endswith("kernel") else 1.0
        np.testing.assert_allclose(left, expected, rtol=1e-6, err_msg=variable.path)


@pytest.mark.once
def test_class_weights_are_scikit_learns_or_those_given():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 2], [100, 5, 20])
    counts = dict(zip(("ant", "bee", "cat"), np.bincount(labels).tolist(), strict=True))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights("balanced", counts) == pytest.approx(expected.tolist())
    given = get_recipe("finetune").with_options(class_weights="bee=20, cat=2").class_weights
    assert class_weights(given, counts) == [1, 20, 2]
    with pytest.raises(InputError, match="Did you mean 'bee'"):
        class_weights({"bees": 2}, counts)


@pytest.mark.once
@pytest.mark.parametrize("mixup", [0.0, 0.3])
def test_class_weights_make_the_loss_torchs(mixup, rng):
    torch = pytest.importorskip("torch")
    labels, weights = np.array([0, 1, 1, 1, 0, 1]), [3.0, 0.5]
    arrays = rng.integers(0, 256, (6, 8, 8, 3), np.uint8), labels, ["ant", "bee"]
    recipe = get_recipe("cifar").with_options(
        model="resnet_tiny", mixup=mixup, val_split=0, normalization="imagenet"
    )
    weighed = recipe.with_options(class_weights="ant=3,bee=0.5")
    [(_, y)], [(_, same, counts)] = (
        list(prepare_data(arrays, one, workers=0).train) for one in (recipe, weighed)
    )
    logits = torch.from_numpy(rng.normal(size=(6, 2)).astype("float32"))
    torchs = torch.nn.functional.cross_entropy(
        logits, torch.as_tensor(y).long() if y.ndim == 1 else torch.as_tensor(y),
        torch.tensor(weights), reduction="none",
    )  # fmt: skip
    ours = torch.nn.functional.cross_entropy(
        logits, torch.as_tensor(same).long() if y.ndim == 1 else torch.as_tensor(same),
        reduction="none",
    )  # fmt: skip
    np.testing.assert_allclose(ours.numpy() * counts, torchs, rtol=1e-5)
