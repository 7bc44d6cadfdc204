"""Batches of Keras' own folder loader feed the models."""

import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr


@pytest.fixture
def folder(tmp_path, rng):
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / name).mkdir()
        for i in range(6):
            noise = rng.integers(-40, 40, size=(36, 40, 3))
            Image.fromarray((level + noise).astype("uint8")).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_kerass_own_loader_feeds_a_model_that_preprocesses(folder, backend):
    if backend != "tensorflow":
        pytest.importorskip("tensorflow", reason="Keras' folder loader is TensorFlow's")
    dataset = keras.utils.image_dataset_from_directory(
        folder, image_size=(32, 32), batch_size=4, seed=0, verbose=False
    )
    model = kr.create_model(
        "resnet_tiny", input_shape=(32, 32, 3), num_classes=2, include_preprocessing=True
    )
    model.compile(
        kr.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(dataset, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert model.predict(dataset, verbose=0).shape == (12, 2)


def test_our_loader_feeds_fit_evaluate_and_predict(folder):
    train, val = kr.image_dataset_from_directory(
        folder, image_size=(32, 32), batch_size=4, validation_split=0.34, subset="both", seed=0
    )
    model = kr.create_model(
        "resnet_tiny",
        input_shape=(32, 32, 3),
        num_classes=len(train.class_names),
        include_preprocessing=True,
    )
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    history = model.fit(train, validation_data=val, epochs=2, shuffle=False, verbose=0).history
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert model.predict(val, verbose=0).shape == (4, 2)
    measured = model.evaluate(val, verbose=0, return_dict=True)
    assert measured["accuracy"] == pytest.approx(history["val_accuracy"][-1])
