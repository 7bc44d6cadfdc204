"""What a model's head sees: the head's own arithmetic on it gives the model's outputs."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.cli.main import main
from keras_resnet.system.errors import DataError, InputError


def head_of(model):
    return next(layer for layer in reversed(model.layers) if isinstance(layer, keras.layers.Dense))


def tiny(**options):
    model = kr.create_model("resnet_tiny", num_classes=3, input_shape=(16, 16, 3), **options)
    model.info["preprocess"] = kr.Preprocess(16, 16).get_config()
    return model


@pytest.fixture
def folder(tmp_path, rng):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "2.png").write_bytes(b"no image")
    return tmp_path / "photos"


def wrapped(model):
    """A head of one's own on a model in a model, with what stands behind it."""
    inner = kr.create_model("resnet_tiny", include_top=False, input_shape=(16, 16, 3))
    layers = keras.layers
    head = [layers.GlobalAveragePooling2D(), layers.Dropout(0.2), layers.Dense(3), layers.Softmax()]
    made = keras.Sequential([keras.Input((16, 16, 3)), inner, *head])
    made.info = model.info
    return made


@pytest.mark.parametrize("inside", [True, False])
def test_the_head_on_the_vectors_gives_the_models_outputs(folder, inside):
    model = tiny(include_preprocessing=inside)
    found = kr.embed(model, folder, batch_size=2)
    assert [path[-5:] for path in found.paths] == ["0.png", "1.png", "3.png", "4.png"]
    assert len(found.skipped) == 1 and "2.png" in found.skipped[0][0]
    kernel, bias = (keras.ops.convert_to_numpy(v) for v in head_of(model).weights)
    logits = found.vectors @ kernel + bias
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    for row, prediction in zip(logits, kr.predict(model, found.paths, top=3), strict=True):
        names = [int(name) for name, _ in prediction.classes]
        np.testing.assert_allclose(
            np.exp(row[names]), [p for _, p in prediction.classes], rtol=1e-4
        )


@pytest.mark.once
def test_models_of_ones_own_and_without_a_head_have_vectors(folder):
    model, path = tiny(), str(folder / "0.png")
    own = wrapped(model)
    kernel, bias = (keras.ops.convert_to_numpy(v) for v in own.layers[-2].weights)
    logits = kr.embed(own, path).vectors @ kernel + bias
    chances = np.exp(logits) / np.exp(logits).sum()
    answer = dict(kr.predict(own, path, top=3)[0].classes)
    np.testing.assert_allclose(chances[0], [answer[str(i)] for i in range(3)], rtol=1e-4)
    bare = kr.create_model("resnet_tiny", include_top=False, input_shape=(16, 16, 3))
    bare.info["preprocess"] = model.info["preprocess"]
    pooled = kr.embed(bare, path).vectors
    maps = bare.predict_on_batch(kr.Preprocess(16, 16)(path)[None])
    np.testing.assert_allclose(pooled, np.asarray(maps).mean((1, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.once
def test_vectors_are_written_as_they_are(folder, tmp_path, capsys):
    import pyarrow.parquet

    tiny(include_preprocessing=True).save(tmp_path / "m.keras")
    model = str(tmp_path / "m.keras")
    assert main(["embed", model, str(folder), "--output", str(tmp_path / "x.npz")]) == 0
    assert "4 images, " in capsys.readouterr().out
    found = kr.embed(model, folder, output=tmp_path / "x.parquet")
    with np.load(tmp_path / "x.npz") as file:
        assert file["paths"].tolist() == found.paths
        np.testing.assert_array_equal(file["vectors"], found.vectors)
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pydict()
    assert table["path"] == found.paths
    np.testing.assert_array_equal(np.float32(table["vector"]), found.vectors)
    with pytest.raises(InputError, match=r"written as .npz or .parquet. Received: 'x.csv'"):
        kr.embed(model, folder, output="x.csv")
    with pytest.raises(DataError, match="None of the 1 images can be read"):
        kr.embed(model, folder / "2.png")
    pyarrow.parquet.write_table(pyarrow.table({"path": found.paths}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="written over what is read"):
        kr.embed(model, tmp_path / "t.parquet", output=tmp_path / "t.parquet")
