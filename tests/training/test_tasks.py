"""Binary and multi-label models: losses, metrics, and trainings from labels to answers."""

import io
import json

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image

import keras_resnet as kr
from keras_resnet.data.folders import rarest, stratified_split
from keras_resnet.data.opening import opened
from keras_resnet.data.order import balanced_order
from keras_resnet.inference.calibration import (
    best_temperature,
    best_thresholds,
    coverage_curve,
    gives_answers,
)
from keras_resnet.inference.evaluate import measured
from keras_resnet.inference.prediction_files import Prediction
from keras_resnet.inference.service import Limits, open_service
from keras_resnet.models.meaning import Meaning
from keras_resnet.system.errors import InputError
from keras_resnet.training.metrics import AveragePrecision, LabelAccuracy
from keras_resnet.training.prepare import compile_model
from keras_resnet.weights.keras_files import write_info

ONCE = {"model": "resnet_tiny", "weights": None, "image_size": 16, "batch_size": 16, "workers": 0,
        "learning_rate": 0.05, "report": False, "verbose": False}  # fmt: skip


def loss_of(units, logits, targets, **options):
    x = keras.Input((2,))
    model = keras.Model(x, keras.layers.Dense(units)(x))
    compile_model(model, keras.optimizers.SGD(0.1), True, **options)
    return float(ops.convert_to_numpy(model.loss(ops.array(targets), ops.array(logits))))


@pytest.mark.parametrize("task", ["binary", "multi-label"])
def test_focal_loss_of_yes_and_no_is_its_formula(task):
    units, rng = (1 if task == "binary" else 4), np.random.default_rng(0)
    logits = rng.normal(0, 3, (6, units)).astype("f4")
    targets = (rng.random((6, units)) < 0.4).astype("f4")
    p = 1 / (1 + np.exp(-logits))
    of_true = p * targets + (1 - p) * (1 - targets)  # torchvision/ops/focal_loss.py, alpha=-1
    for gamma in (0.0, 2.0, 3.5):
        expected = ((1 - of_true) ** gamma * -np.log(of_true)).mean()
        found = loss_of(units, logits, targets, task=task, focal=gamma)
        assert found == pytest.approx(expected, rel=1e-4)


def test_focal_loss_of_classes_is_its_formula_and_without_gamma_the_cross_entropy():
    rng = np.random.default_rng(0)
    logits, true = rng.normal(0, 2, (6, 4)).astype("f4"), np.array([0, 1, 2, 3, 1, 1])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for gamma in (0.0, 2.0):  # Lin et al. 2017, equation 4
        of_true = p[np.arange(6), true]
        expected = (-((1 - of_true) ** gamma) * np.log(of_true)).mean()
        found = loss_of(4, logits, np.eye(4, dtype="f4")[true], focal=gamma)
        assert found == pytest.approx(expected, rel=1e-4)


def test_metrics_are_scikit_learns_and_take_smoothed_labels_for_what_they_were():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    true = (rng.random((300, 3)) < [0.5, 0.2, 0.1]).astype("f4")
    logits = (rng.normal(0, 1, true.shape) + 1.5 * true - 1).astype("f4")
    for labels in (true, true * 0.9 + 0.05):
        accuracy, precision = LabelAccuracy(), AveragePrecision(3)
        for part in (slice(0, 150), slice(150, 300)):
            accuracy.update_state(labels[part], logits[part])
            precision.update_state(labels[part], logits[part])
        assert float(accuracy.result()) == pytest.approx(((logits > 0) == true).mean())
        expected = metrics.average_precision_score(true, logits)
        assert float(precision.result()) == pytest.approx(expected, abs=0.01)  # 1,000 thresholds


@pytest.mark.once
@pytest.mark.parametrize("no, yes", [(-8, -6), (-60, -30), (-3.6, -3.4)])
def test_average_precision_of_rare_labels_is_that_of_their_ranks(no, yes):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    true = rng.random((400, 5)) < 0.03
    logits = np.where(true, yes, no) + rng.normal(0, (yes - no) / 10, true.shape).astype("f4")
    score = AveragePrecision(5)
    score.update_state(true.astype("f4"), logits)
    assert float(score.result()) == pytest.approx(
        metrics.average_precision_score(true, logits), abs=0.02
    )


@pytest.mark.once
def test_labels_that_are_several_are_batched_split_weighed_and_smoothed():
    sets = [(0,)] * 40 + [(0, 1)] * 5 + [()] * 5
    labels = np.fromiter(sets, object)
    kept, held = stratified_split(labels, 0.2, 0)
    assert len(held) == 10 and sorted(set(labels[held])) == [(), (0,), (0, 1)]
    assert len(kept) + len(held) == 50
    images = opened((np.zeros((50, 4, 4, 3), np.uint8), labels, ["a", "b", "c"]))
    shared = {
        "preprocess": kr.Preprocess(4, None),
        "shuffle": False,
        "batch_size": 50,
        "workers": 0,
    }
    plain = kr.ImageDataset(images, labels, ["a", "b", "c"], **shared)
    assert plain.class_counts == {"a": 45, "b": 5, "c": 0} and plain.label_mode == "multi_hot"
    hot = plain[0][1]
    np.testing.assert_array_equal(hot[[0, 40, 45]], [[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    soft = kr.ImageDataset(images, labels, ["a", "b", "c"], label_smoothing=0.2, **shared)[0][1]
    # keras.losses.BinaryCrossentropy(label_smoothing=0.2) makes them of these.
    np.testing.assert_allclose(soft, 0.8 * hot + 0.5 * 0.2, rtol=1e-6)
    binary = kr.ImageDataset(images, [0, 1] * 25, ["a", "b"], label_smoothing=0.2,
                             label_mode="binary", **shared)[0][1]  # fmt: skip
    np.testing.assert_allclose(binary[:2], [[0.1], [0.9]], rtol=1e-6)
    drawn = np.bincount(rarest(labels)[balanced_order(labels, np.random.default_rng(0))])
    assert drawn.tolist() in ([17, 17, 16], [17, 16, 17], [16, 17, 17])
    with pytest.raises(InputError, match="label_mode='categorical' is for one label an image"):
        kr.ImageDataset(images, labels, ["a", "b", "c"], label_mode="categorical", **shared)


def test_several_labels_are_learned_from_in_a_compiled_step():
    x = keras.Input((3,))
    model = keras.Model(x, keras.layers.Dense(3, kernel_initializer="zeros")(x))
    compile_model(model, keras.optimizers.SGD(5.0), True, task="multi-label", focal=1.0)
    labels = np.array([[1, 0, 0.5], [0, 1, 0], [0, 0, 1], [1, 1, 0]], "f4")
    logs = [model.train_on_batch(labels, labels, return_dict=True) for _ in range(12)]
    assert set(logs[0]) == {"loss", "accuracy", "average_precision"}
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"] and logs[-1]["accuracy"] > 0.7


def coloured(count, seed=0):
    """Images whose three channels are three labels, of which an image has none to all."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 3)) < 0.4).astype(int)
    noise = rng.integers(0, 40, (count, 16, 16, 3))
    return (noise + 150 * labels[:, None, None, :]).astype(np.uint8), labels, ["r", "g", "b"]


@pytest.mark.once
def test_images_with_several_labels_are_learned_mixed_and_smoothed(tmp_path):
    data = coloured(64)
    run = kr.train(data, epochs=3, mixup=0.2, label_smoothing=0.1, output=tmp_path, **ONCE)
    assert run.history["val_average_precision"][-1] > 0.7
    result = run.evaluation
    assert result.task == "multi-label" and result.headline[1] > 0.7 and result.confusion is None
    assert {row["true"] for row in result.rows} > {"|", "g"}
    model = kr.load_model(run.folder / "best.keras")
    assert model.info["options"]["task"] == "multi-label"
    again = kr.evaluate(model, data[:2])  # labels without names are numbers of the classes
    assert again.scores["average_precision"] > 0.7 and again.class_names == ["r", "g", "b"]
    written = json.loads((run.folder / "evaluation.json").read_text())
    assert written["scores"] == result.scores and written["confusion"] is None


@pytest.mark.once
def test_two_classes_are_one_output_that_is_yes_or_no(tmp_path):
    x, labels, _ = coloured(64)
    data = x, labels[:, 0], ["plain", "red"]
    run = kr.train(data, epochs=2, task="binary", focal=1.0, output=tmp_path, **ONCE)
    assert run.model.output_shape == (None, 1) and run.evaluation.task == "binary"
    assert set(run.evaluation.scores) == {"average_precision", "auc", "f1"}
    assert run.evaluation.confusion.shape == (2, 2)
    with pytest.raises(InputError, match=r"task='binary' is for two classes\. Received: 3"):
        kr.train((x, np.arange(64) % 3), task="binary", output=tmp_path, **ONCE)
    with pytest.raises(InputError, match="calibrate=True needs images to validate on"):
        kr.train(data, calibrate=True, val_split=0, output=tmp_path, **ONCE)
    with pytest.raises(InputError, match="several labels each: task='single-label' takes one"):
        kr.train(coloured(8), task="single-label", output=tmp_path, **ONCE)
    with pytest.raises(InputError, match="several labels, and 'resnet_tiny' is a binary model"):
        kr.evaluate(run.model, (x, labels[:, [0, 0]], ["plain", "red"]))


@pytest.mark.once
def test_scores_of_several_labels_are_scikit_learns():
    from sklearn import metrics

    rng = np.random.default_rng(0)
    hits = rng.random((200, 3)) < [0.5, 0.2, 0.05]
    logits = rng.normal(0, 1, hits.shape) + 2 * hits - 1
    meaning = Meaning("multi-label", thresholds=(0.5, 0.4, 0.2))
    logs = meaning.log_probabilities(logits)
    p, paths = np.exp(logs), [f"{i}.png" for i in range(200)]
    result = measured(meaning, logs, hits, paths, ["a", "b", "c"], [])
    said = p >= (0.5, 0.4, 0.2)
    assert result.top1 == metrics.accuracy_score(hits, said)
    expected = {"average_precision": metrics.average_precision_score(hits, p),
                "auc": metrics.roc_auc_score(hits, p),
                "f1": metrics.f1_score(hits, said, average="macro"),
                "micro_f1": metrics.f1_score(hits, said, average="micro")}  # fmt: skip
    expected["calibration_error"] = kr.calibration(p.ravel(), hits.ravel()).error
    assert result.scores == pytest.approx(expected)
    assert result.calibration_error == expected["calibration_error"]
    assert result.loss == pytest.approx(metrics.log_loss(hits.ravel(), p.ravel()))
    assert [row["threshold"] for row in result.per_class] == [0.5, 0.4, 0.2]
    of_answer = np.where(said, p, 1 - p).prod(axis=1)
    np.testing.assert_allclose([row["probability"] for row in result.rows], of_answer)
    assert "mean average precision" in str(result) and "Threshold" in str(result)


# --- how sure a model may be ---------------------------------------------------------------------


@pytest.mark.once
def test_a_temperature_is_the_one_that_made_the_logits_too_sure():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 3))
    gumbel = rng.gumbel(size=logits.shape)
    true = (logits + gumbel).argmax(1)  # drawn by these logits' softmax
    hits = np.eye(3, dtype=bool)[true]
    sure = Meaning().log_probabilities(3 * logits)
    assert best_temperature(Meaning(), sure, hits) == pytest.approx(3, rel=0.1)
    yes = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    for task, given, said in (
        ("multi-label", logits, yes),
        ("binary", logits[:, :1], np.stack([~yes[:, 0], yes[:, 0]], axis=1)),
    ):
        found = best_temperature(Meaning(task), Meaning(task).log_probabilities(2 * given), said)
        assert found == pytest.approx(2, rel=0.1)
        # Dividing logits and cooling what was made of them are one.
        cooled = Meaning(task, temperature=2.0).log_probabilities(60 * given)
        np.testing.assert_allclose(cooled, Meaning(task).log_probabilities(30 * given), atol=1e-9)
    right = np.eye(3, dtype=bool)
    assert best_temperature(Meaning(), Meaning().log_probabilities(9 * right), right) is None


@pytest.mark.once
def test_thresholds_are_those_of_the_highest_f1():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    hits = rng.random((60, 3)) < [0.5, 0.1, 0]
    p = np.clip(rng.normal(0.3, 0.15, hits.shape) + 0.2 * hits, 0, 1).round(2)  # with ties
    found = best_thresholds(p, hits)
    assert found[2] == 0.5
    for k in (0, 1):
        best = max(f1_score(hits[:, k], p[:, k] >= edge) for edge in np.unique(p[:, k]))
        assert f1_score(hits[:, k], p[:, k] >= found[k]) == pytest.approx(best)
    found = coverage_curve([0.9, 0.5, 0.5, 0.2], [True, True, False, False])
    np.testing.assert_allclose(found, [[0.25, 0.75, 1], [1, 2 / 3, 0.5], [0.9, 0.5, 0.2]])


@pytest.mark.once
def test_what_is_measured_is_kept_in_the_file_and_followed_everywhere(tmp_path):
    x, labels, names = coloured(60)
    options = {**ONCE, "epochs": 2, "output": tmp_path, "calibrate": True, "patience": 9}
    run = kr.train((x, labels, names), **options)
    best = run.folder / "best.keras"
    kept = kr.load_model(best).info["calibration"]
    assert len(kept["thresholds"]) == 3 and kept == run.model.info["calibration"]
    assert " Temperature: " in (run.folder / "train.log").read_text()  # also where it is none
    assert [row["threshold"] for row in run.evaluation.per_class] == kept["thresholds"]
    kr.calibrate(best, (x, labels, names), output=tmp_path / "again.keras", temperature=False)
    info = {"temperature": 2.5, "thresholds": [0.9, 0.5, 0.1]}
    write_info(best, "calibration", info)
    model = kr.load_model(best)
    plain = kr.load_model(tmp_path / "again.keras")
    assert set(plain.info["calibration"]) == {"thresholds"}
    z = model.predict_on_batch(x[:8].astype("f4"))
    np.testing.assert_array_equal(z, plain.predict_on_batch(x[:8].astype("f4")))
    p = 1 / (1 + np.exp(-z / 2.5))
    found = kr.predict(best, list(x[:8]))
    for one, row in zip(found, p, strict=True):
        assert dict(one.classes) == pytest.approx(dict(zip(names, row, strict=True)), rel=1e-4)
        assert one.answer == [
            n for n, v, t in zip(names, row, (0.9, 0.5, 0.1), strict=True) if v >= t
        ]
    said = (p >= [0.9, 0.5, 0.1]) == labels[:8]
    assert kr.evaluate(best, (x[:8], labels[:8], names)).top1 == said.all(axis=1).mean()
    service = open_service(model, "keras", Limits())
    data = io.BytesIO()
    Image.fromarray(x[0]).save(data, "png")
    [result] = service.results([("a.png", data.getvalue)], heat=False)
    assert result.to_dict()["answer"] == found[0].answer
    page = kr.report(run.folder).read_text()
    for text in (
        "Mean average precision",
        "All labels right",
        "says which of 3 classes",
        "Threshold",
        "Right, of those it is surest of",
        "best validation average",
    ):
        assert text in page  # fmt: skip
    assert "Mean average precision" in (run.folder / "MODEL_CARD.md").read_text()
    write_info(best, "calibration", None)
    assert "calibration" not in kr.load_model(best).info
    for wrong in ({"temperature": 0}, {"temperature": "2"}, {"thresholds": [0.5]}):
        model.info["calibration"] = wrong
        with pytest.raises(InputError, match="calibration"):
            kr.predict(model, list(x[:1]))


@pytest.mark.once
@pytest.mark.slow
def test_exported_files_answer_as_the_model(tmp_path):
    pytest.importorskip("onnxruntime")
    x, _, names = coloured(6)
    model = kr.create_model("resnet_tiny", num_classes=3, include_preprocessing=True)
    model.info["options"]["task"], model.info["class_names"] = "multi-label", names
    model.info["preprocess"] = kr.Preprocess(16, 16).get_config()
    model.info["calibration"] = {"temperature": 3.0, "thresholds": [0.5, 0.52, 0.48]}
    kr.export(model, tmp_path / "m.onnx", format="onnx")
    expected, found = (kr.predict(of, list(x)) for of in (model, tmp_path / "m.onnx"))
    for one, other in zip(found, expected, strict=True):
        assert one.answer == other.answer
        assert dict(one.classes) == pytest.approx(dict(other.classes), rel=1e-3)


@pytest.mark.once
def test_below_the_least_confidence_the_answer_is_unknown(tmp_path):
    model = kr.create_model("resnet_tiny", num_classes=2, include_preprocessing=True)
    model.info["class_names"] = ["ant", "bee"]
    model.info["preprocess"] = kr.Preprocess(16, 16).get_config()
    images = list(coloured(4)[0])
    plain = kr.predict(model, images)
    assert all(one.answer is None and "answer" not in one.to_dict() for one in plain)
    sure = sorted(one.classes[0][1] for one in plain)
    least = (sure[1] + sure[2]) / 2
    found = kr.predict(model, images, min_confidence=least)
    expected = [[c[0][0]] if c[0][1] >= least else ["unknown"] for c in (p.classes for p in plain)]
    assert [one.answer for one in found] == expected and expected.count(["unknown"]) == 2
    for kind in ("csv", "jsonl", "parquet"):
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"{i}.png")
        output = tmp_path / f"answers.{kind}"
        kr.predict(model, tmp_path, output=output, min_confidence=least)
        kr.predict(model, tmp_path, output=output, min_confidence=least)  # over itself
        if kind == "csv":
            lines = output.read_text().splitlines()
            assert lines[0].startswith("path,answer,class1,probability1")
            assert [line.split(",")[1] for line in lines[1:]] == [of for [of] in expected]
    with pytest.raises(InputError, match="min_confidence"):
        kr.predict(model, images, min_confidence=1.5)
    with pytest.raises(InputError, match="min_confidence"):  # of several labels too
        gives_answers(Meaning("multi-label"), 50)
    assert str(Prediction("a.png", [("bee", 0.5)], None, ["unknown"])) == "a.png: unknown"
