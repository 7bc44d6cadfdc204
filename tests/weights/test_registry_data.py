"""The registry of torchvision's weight files and the class names, against torchvision's own."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

import keras_resnet

pytestmark = pytest.mark.once

FOLDER = pathlib.Path(keras_resnet.__file__).parent / "weights"
REGISTRY = json.loads((FOLDER / "torchvision.json").read_text(encoding="utf-8"))
WEIGHTS = REGISTRY["weights"]
MODELS = list(dict.fromkeys(entry["model"] for entry in WEIGHTS))
each_file = pytest.mark.parametrize(
    "entry", WEIGHTS, ids=[f"{entry['model']}-{entry['tag']}" for entry in WEIGHTS]
)


def theirs(torchvision, entry):
    return torchvision.models.get_model_weights(entry["model"])[entry["tag"]]


def test_every_file_of_the_eleven_models_is_listed_once(torchvision):
    listed = [(entry["model"], entry["tag"]) for entry in WEIGHTS]
    enums = {model: torchvision.models.get_model_weights(model) for model in MODELS}
    assert len(MODELS) == 11
    assert listed == [(model, member.name) for model, enum in enums.items() for member in enum]
    assert len(listed) == 18
    known = torchvision.models.list_models(
        module=torchvision.models, include=["*resnet*", "*resnext*", "alexnet"]
    )
    assert sorted(MODELS) == known


@each_file
def test_file_facts_are_torchvisions(torchvision, entry):
    weights = theirs(torchvision, entry)
    assert entry["url"] == weights.url
    assert entry["file_name"] == weights.url.rsplit("/", 1)[1]
    assert re.search(r"-([0-9a-f]{8})\.pth$", weights.url)[1] == entry["sha256_prefix"]
    assert entry["file_size_mb"] == weights.meta["_file_size"]
    default = torchvision.models.get_model_weights(entry["model"]).DEFAULT
    assert entry["is_default"] is (weights is default)


@each_file
def test_model_facts_and_accuracies_are_torchvisions(torchvision, entry):
    weights = theirs(torchvision, entry)
    assert entry["num_params"] == weights.meta["num_params"]
    assert entry["gflops"] == weights.meta["_ops"]
    assert entry["min_size"] == list(weights.meta["min_size"])
    measured = weights.meta["_metrics"]["ImageNet-1K"]
    assert (entry["acc1"], entry["acc5"]) == (measured["acc@1"], measured["acc@5"])


@each_file
def test_preprocessing_is_torchvisions(torchvision, entry):
    preset = theirs(torchvision, entry).transforms()
    assert [entry["resize_size"]] == preset.resize_size
    assert [entry["crop_size"]] == preset.crop_size
    assert entry["interpolation"] == preset.interpolation.value
    assert entry["mean"] == preset.mean
    assert entry["std"] == preset.std


@each_file
def test_the_recipe_is_the_one_that_torchvision_cites(torchvision, entry):
    cited = theirs(torchvision, entry).meta["recipe"]
    recipe = REGISTRY["recipes"][entry["recipe"]]
    assert (
        cited.removeprefix("https://github.com/pytorch/vision/")
        in {
            "alexnet": ("tree/main/references/classification#alexnet-and-vgg",),
            "resnet_v1": ("tree/main/references/classification#resnet",),
            "resnext_v1": ("tree/main/references/classification#resnext",),
            "wrn_szagoruyko": ("pull/912#issue-445437439",),
            "new_recipe": ("issues/3995#new-recipe",),
            "new_recipe_fixres": ("issues/3995#new-recipe-with-fixres",),
            "new_recipe_fixres_ra4": ("issues/3995#issuecomment-1013906621", "pull/5935"),
        }[entry["recipe"]]
    )
    if "val_resize_size" in recipe:
        assert (entry["resize_size"], entry["crop_size"]) == (
            recipe["val_resize_size"],
            recipe["val_crop_size"],
        )


@each_file
def test_sizes_agree_with_the_stated_number_formats(torchvision, entry):
    with pytest.importorskip("torch").device("meta"):
        state = torchvision.models.get_model(entry["model"]).state_dict()
    vectors = sum(t.numel() for k, t in state.items() if t.ndim == 1)
    matrices = sum(t.numel() for k, t in state.items() if t.ndim > 1)
    width = {"float32": 4, "float16, batch norms float32": 2}[entry["dtype"]]
    stored = entry["file_size_mb"] * 2**20
    # Names and headers: some hundred bytes a tensor.
    assert 0 < stored - (4 * vectors + width * matrices) < 1000 * len(state)
    assert entry["format"] in ("zip", "pickle stream")
    has_norms = any(name.endswith("running_var") for name in state)
    assert (entry["num_batches_tracked"] is None) is not has_norms


def test_older_and_quantised_names_are_no_current_ones():
    current = {entry["file_name"] for entry in WEIGHTS}
    older = REGISTRY["older_file_names_still_in_caches"]
    assert older.keys() <= set(MODELS)
    assert all(
        re.fullmatch(rf"{model}-.*[0-9a-f]{{8}}\.pth", name) for model, name in older.items()
    )
    assert not current & (set(older.values()) | set(REGISTRY["quantized_not_importable"]))


def test_quantised_names_are_torchvisions(torchvision):
    models = torchvision.models.list_models(module=torchvision.models.quantization)
    urls = [
        member.url
        for model in models
        for member in torchvision.models.get_model_weights(model)
        if "resnet" in model or "resnext" in model
    ]
    names = {url.rsplit("/", 1)[1] for url in urls}
    assert names == set(REGISTRY["quantized_not_importable"])


def test_class_names_are_torchvisions_in_their_order(torchvision):
    names = json.loads((FOLDER / "imagenet_classes.json").read_text(encoding="utf-8"))
    assert len(names) == 1000
    for model in MODELS:
        for member in torchvision.models.get_model_weights(model):
            assert member.meta["categories"] == names
