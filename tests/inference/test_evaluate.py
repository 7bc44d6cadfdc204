"""Measures equal scikit-learn's, predictions the model's, in the order of the files."""

from __future__ import annotations

import csv
import json
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from keras_resnet.cli import main as cli
from keras_resnet.data.directory import image_dataset_from_directory
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.sources import Images
from keras_resnet.inference.evaluate import Evaluation, evaluate
from keras_resnet.inference.predict import iter_predictions, predict
from keras_resnet.inference.prediction_files import Prediction, PredictionTable
from keras_resnet.models.files import load_model, model_preprocess
from keras_resnet.models.meaning import Meaning
from keras_resnet.models.zoo import create_model
from keras_resnet.runtimes.select import open_runner
from keras_resnet.system.errors import DataError, InputError, NotFoundError
from keras_resnet.system.files import text_width

NAMES = [f"class {i}" for i in range(7)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "pictures"
    rng = np.random.default_rng(0)
    for name in NAMES[:6]:  # one class of the model's has no folder
        (folder / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def build(raw=True, softmax=False):
    keras.utils.set_random_seed(3)
    model = create_model(
        "resnet_tiny",
        num_classes=7,
        input_shape=(16, 16, 3),
        include_preprocessing=raw,
        classifier_activation="softmax" if softmax else None,
    )
    # Statistics that tell classes apart; as built, all outputs would be alike.
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.name == "moving_mean":
            weight.assign(rng.normal(0, 0.5, weight.shape))
    model.info["class_names"] = list(NAMES)
    model.info["preprocess"] = Preprocess((16, 16), None).get_config()
    return model


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def expected(model, pictures):
    """Paths, labels and probabilities, by plain code."""
    paths = sorted(pictures.glob("*/*.png"))
    true = np.array([NAMES.index(path.parent.name) for path in paths])
    square = Preprocess((16, 16), None)
    logits = model.predict_on_batch(np.stack([square.pixels(path) for path in paths]))
    exps = np.exp(logits.astype(float) - logits.max(1, keepdims=True))
    return [str(p) for p in paths], true, exps / exps.sum(1, keepdims=True)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_evaluation_equals_scikit_learns(model, pictures, expected, batch_size):
    paths, true, probabilities = expected
    result = evaluate(model, pictures, batch_size=batch_size, workers=1)
    predicted = probabilities.argmax(1)
    labels = list(range(7))
    assert result.count == 24
    assert result.loss == pytest.approx(metrics.log_loss(true, probabilities, labels=labels), 1e-4)
    assert result.top1 == pytest.approx(metrics.accuracy_score(true, predicted))
    top5 = metrics.top_k_accuracy_score(true, probabilities, k=5, labels=labels)
    assert result.top5 == pytest.approx(top5)
    np.testing.assert_array_equal(
        result.confusion, metrics.confusion_matrix(true, predicted, labels=labels)
    )
    table = metrics.classification_report(
        true, predicted, labels=labels, target_names=NAMES, output_dict=True, zero_division=0
    )
    for row in result.per_class:
        theirs = table[row["name"]]
        assert row["precision"] == pytest.approx(theirs["precision"])
        assert row["recall"] == pytest.approx(theirs["recall"])
        assert row["f1"] == pytest.approx(theirs["f1-score"])
        assert row["count"] == theirs["support"]
    assert [row["path"] for row in result.rows] == paths
    assert [row["true"] for row in result.rows] == [NAMES[i] for i in true]
    np.testing.assert_allclose(
        [row["probability"] for row in result.rows], probabilities.max(1), rtol=1e-3
    )


def table_of(count):
    """An evaluation of so many classes, of which the first is mistaken for the second."""
    names = [f"class {i} " + "\u732b" * 30 for i in range(count)]
    confusion = 8 * np.eye(count, dtype=int)
    confusion[0, 1] = 4
    row = {"precision": 0.5, "recall": 0.5, "count": 8}
    per_class = [{"name": n, "f1": (i + 1) / count, **row} for i, n in enumerate(names)]
    return Evaluation(0.1, 0.9, 0.95, 800, names, per_class, confusion, [], [])


@pytest.mark.once
def test_the_table_of_many_classes_shows_the_worst():
    lines = str(table_of(1000)).split("\n")
    assert len(lines) < 20 and max(map(text_width, lines)) <= 100
    assert lines[3].startswith("class 0 \u732b") and lines[12].startswith("class 9 \u732b")
    assert "10 of 1,000 classes have the lowest F1" in lines[13]
    assert lines[-1].startswith("  class 0 \u732b") and lines[-1].endswith(": 4 (33%)")
    lines = str(table_of(30)).split("\n")
    assert len(lines) == 33 and len({text_width(line) for line in lines[2:]}) == 1


@pytest.mark.once
def test_columns_stay_in_place_with_names_of_wide_letters():
    table = PredictionTable(["a.png", "\u732b.png", "x" * 99], ["\u732b\u72ac", "ant", "b" * 50], 1)
    lines = [
        table.line(Prediction(path, [(name, 0.5)]))
        for path, name in [("a.png", "ant"), ("\u732b.png", "\u732b\u72ac"), ("x" * 99, "b" * 50)]
    ]
    assert {text_width(line) for line in lines} == {60 + 2 + 30 + 7}
    assert "b...b" in lines[2] and lines[2].startswith("...x")


def test_predictions_are_the_models_in_the_order_of_the_files(model, pictures, expected):
    paths, _, probabilities = expected
    answers = predict(model, pictures, top=3, batch_size=7, workers=1)
    assert [a.path for a in answers] == paths
    for answer, row in zip(answers, probabilities, strict=True):
        best = np.argsort(-row)[:3]
        assert [name for name, _ in answer.classes] == [NAMES[i] for i in best]
        np.testing.assert_allclose([p for _, p in answer.classes], row[best], rtol=1e-3)


def test_models_that_normalise_outside_or_end_in_softmax_answer_the_same(pictures, expected):
    _, _, probabilities = expected
    for options in ({"raw": False}, {"softmax": True}):
        answers = predict(build(**options), pictures, top=1, workers=1)
        np.testing.assert_allclose(
            [a.classes[0][1] for a in answers], probabilities.max(1), rtol=1e-3
        )


def test_a_dataset_is_evaluated_like_its_folder(model, pictures):
    dataset = image_dataset_from_directory(
        pictures, class_names=NAMES[:6], shuffle=False, preprocess=model_preprocess(model)
    )
    assert evaluate(model, dataset).loss == pytest.approx(evaluate(model, pictures).loss, rel=1e-5)
    shuffled = image_dataset_from_directory(pictures, image_size=16)
    with pytest.raises(InputError, match="shuffle=False"):
        evaluate(model, shuffled)


@pytest.fixture
def with_broken(pictures, tmp_path):
    """One readable picture among broken ones, so that whole batches cannot be read."""
    folder = tmp_path / "broken" / "class 0"
    folder.mkdir(parents=True)
    for i in range(5):
        (folder / f"{i}.png").write_bytes(b"broken")
    (folder / "2.png").write_bytes((pictures / "class 0" / "0.png").read_bytes())
    return folder.parent


def test_unreadable_pictures_are_counted_and_do_not_stop(model, with_broken):
    result = evaluate(model, with_broken, batch_size=2, workers=1)
    assert result.count == 1 and len(result.skipped) == 4
    answers = predict(model, with_broken, batch_size=2, workers=1)
    assert [bool(a.classes) for a in answers] == [False, False, True, False, False]
    assert "cannot be read" in answers[0].error
    with pytest.raises(DataError):
        evaluate(model, with_broken, strict=True)


@pytest.mark.once
def test_nothing_readable_is_an_error_of_one_line(model, with_broken):
    (with_broken / "class 0" / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match="None of the 5 images can be read"):
        evaluate(model, with_broken, batch_size=2)


@pytest.mark.once
def test_classes_that_the_model_does_not_know_are_named(model, pictures, tmp_path):
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "1.png").write_bytes((pictures / "class 0" / "0.png").read_bytes())
    with pytest.raises(InputError, match="does not have: 'unknown'"):
        evaluate(model, tmp_path)


@pytest.mark.once
def test_sources_are_files_folders_and_patterns_in_order(pictures):
    one = str(pictures / "class 3" / "1.png")
    found = list(Images([one, pictures / "class 1", str(pictures / "*" / "0.png")]))
    assert found[0] == one and len(found) == 1 + 4 + 6
    assert found[1:5] == sorted(str(p) for p in (pictures / "class 1").iterdir())
    assert found[5:] == sorted(str(p) for p in pictures.glob("*/0.png"))
    with pytest.raises(NotFoundError, match=r"No file matches"):
        Images(str(pictures / "*.gif"))
    with pytest.raises(NotFoundError, match=r"Did you mean '1.png'"):
        Images(str(pictures / "class 3" / "11.png"))


@pytest.mark.once
def test_predictions_come_while_the_rest_is_still_unread(model, pictures):
    stream = iter_predictions(model, pictures, batch_size=2, workers=0)
    first = next(stream)
    (pictures / "late").mkdir()
    (pictures / "late").rmdir()
    assert first.path.endswith("0.png")


@pytest.mark.once
def test_log_probabilities_survive_large_logits():
    logs = Meaning().log_probabilities(np.array([[1000.0, 0.0, -1000.0]]))
    np.testing.assert_allclose(logs, [[0.0, -1000.0, -2000.0]])


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "model.keras"
    model.save(path)
    return path


@pytest.mark.once
def test_the_commands_write_what_they_are_asked_for(file, pictures, expected, tmp_path, capsys):
    paths, _, probabilities = expected
    names = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "png")}
    code = cli.main(
        ["predict", str(file), str(pictures), "--top", "2", "--csv", str(names["csv"]), "--json",
         str(names["json"]), "--plot", str(names["png"]), "--workers", "1"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0 and out.count(".png ") >= 24
    with open(names["csv"], newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == paths
    np.testing.assert_allclose(
        [float(row["probability1"]) for row in rows], probabilities.max(1), atol=1e-4
    )
    assert [entry["path"] for entry in json.loads(names["json"].read_text())] == paths
    with Image.open(names["png"]) as picture:
        assert picture.height > 300

    output = tmp_path / "evaluated"
    code = cli.main(["evaluate", str(file), str(pictures), "--output", str(output)])
    assert code == 0 and "24 images: top-1" in capsys.readouterr().out
    assert {p.name for p in output.iterdir()} == {
        "evaluation.json", "predictions.csv", "confusion_matrix.png",
    }  # fmt: skip
    with open(output / "predictions.csv", newline="") as stream:
        assert [row["path"] for row in csv.DictReader(stream)] == paths


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{file}x", "{pictures}"], "Did you mean 'model.keras'"),
        (["predict", "{file}", "{pictures}/none.png"], "No file or folder"),
        (
            ["predict", "{file}", "{pictures}", "--top", "0"],
            "top must be a whole number of at least 1",
        ),
        (["predict", "{file}", "{pictures}", "--csv", "x.txt"], "must end in .csv"),
        (["predict", "{pictures}", "{pictures}"], "No best.keras"),
        (["predict", "{pictures}/class 0/0.png", "{pictures}"], "keras-resnet convert"),
        (["evaluate", "{file}", "{pictures}", "--split", "val"], "has no 'val' folder"),
        (["evaluate", "{file}", "{pictures}/class 0"], "no class folder"),
        (["evaluate", "{file}", "{pictures}", "--output", "/proc/none"], "/proc/none"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(file, pictures, capsys, arguments, message):
    words = [word.format(file=file, pictures=pictures) for word in arguments]
    assert cli.main(words) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and message in err


@pytest.mark.once
def test_a_damaged_file_is_no_model(tmp_path, file):
    path = tmp_path / "damaged.keras"
    path.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"damaged\.keras' is no whole .keras file \(5,000 b"):
        load_model(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(InputError, match=r"damaged\.keras' cannot be loaded"):
        load_model(path)


@pytest.mark.once
def test_a_model_without_a_head_or_preprocessing_is_said(pictures):
    with pytest.raises(InputError, match="no classification head"):
        predict(create_model("resnet20", include_top=False), pictures)
    bare = create_model("resnet20", num_classes=7)
    with pytest.raises(InputError, match="does not say how its images are prepared"):
        predict(bare, pictures)


def test_a_runner_is_opened_once_and_answers_as_the_model(file, model, pictures, expected):
    paths, _, probabilities = expected
    runner = open_runner(file)
    assert runner.name == f"keras/{keras.backend.backend()}"
    assert runner.info == model.info and runner.num_classes == 7
    assert open_runner(runner) is runner
    pixels = np.stack([Preprocess((16, 16), None).pixels(path) for path in paths])
    np.testing.assert_allclose(
        np.exp(runner.log_probabilities(pixels)), probabilities, rtol=1e-3, atol=1e-6
    )
    assert predict(runner, pictures, workers=1) == predict(file, pictures, workers=1)


@pytest.mark.once
def test_an_unknown_engine_is_said_before_any_work(file, pictures, capsys):
    assert cli.main(["predict", str(file), str(pictures), "--engine", "kers"]) == 2
    assert "Did you mean 'keras'?" in capsys.readouterr().err


@pytest.mark.once
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "x", "--imagesize", "2"], "train: unknown argument '--imagesize'. Did you mean"),
        (["train", "x", "--image-size", "abc"], "argument --image-size: invalid int value: 'abc'."),
        (["predict", "m.keras"], "predict: the following arguments are required: PATH."),
        (["predikt"], "invalid choice: 'predikt'"),
        (["inspect", "a.pth", "b.pth"], "inspect: unknown argument 'b.pth'."),
    ],
)
def test_words_that_cannot_be_parsed_get_one_line_too(words, told, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and err.startswith("keras-resnet: ")
    assert "\n" not in err and told in err and err.endswith(" --help.")
