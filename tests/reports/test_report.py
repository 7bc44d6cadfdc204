"""Reports show what the run's files say, do no harm with any name, and open without a network."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import html.parser
import io
import json
import os
import pathlib
import platform
import re
import shutil
import socket
import sys
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.cli import main as cli
from keras_resnet.data.opening import opened
from keras_resnet.inference import embed as embedding
from keras_resnet.inference.calibration import accuracy_interval, calibration, paired_p_value
from keras_resnet.inference.evaluate import Evaluation
from keras_resnet.reports import figures as plots, report as reporting
from keras_resnet.reports.run_facts import RunFacts
from keras_resnet.reports.run_files import read_run
from keras_resnet.reports.wording import as_markdown
from keras_resnet.system.errors import InputError, NotFoundError
from keras_resnet.system.files import shown_path

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "line\nbreak\r\x1b[31m",
    "\u202egnp.exe\u2066",
    "{{ 7 * 7 }} {% raw %}",
    "</style></svg></title> & $\\alpha$ | `code` ]]>",
    "\u05d0\u05d1\u05d2 \u732b '",
    "a" * 300,
]
PLAIN = [f"class{i}" for i in range(len(HOSTILE))]


def make_rows(names, count=160, seed=0, folder="photos"):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        true = names[i % len(names)]
        right = rng.random() < 0.7
        predicted = (
            true if right else names[(i + 1 + int(rng.integers(len(names) - 1))) % len(names)]
        )
        right = true == predicted
        probability = float(rng.uniform(1 / len(names), 1))
        rows.append(
            {
                "path": f"{folder}/{i % len(names)}/{names[(i + 3) % len(names)][:40]}-{i}.png",
                "true": true,
                "predicted": predicted,
                "probability": probability,
                "true_probability": probability if right else (1 - probability) / 2,
            }
        )
    return rows


def make_run(folder, names=("ant", "bee", "cat"), seed=0, prefix="", **config):
    """A run folder as `train` writes it, by the package's own writers but without a model."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    folder.mkdir(parents=True, exist_ok=True)
    names, rows = list(names), make_rows(list(names), seed=seed)
    true, predicted = [r["true"] for r in rows], [r["predicted"] for r in rows]
    scores = precision_recall_fscore_support(true, predicted, labels=names, zero_division=0)
    per_class = [
        {"name": n, "precision": float(p), "recall": float(r), "f1": float(f), "count": int(c)}
        for n, p, r, f, c in zip(names, *scores, strict=True)
    ]
    Evaluation(
        loss=float(-np.log([r["true_probability"] for r in rows]).mean()),
        top1=float(np.mean([t == p for t, p in zip(true, predicted, strict=True)])),
        top5=0.9 if len(names) > 5 else None,
        count=len(rows),
        class_names=names,
        per_class=per_class,
        confusion=confusion_matrix(true, predicted, labels=names),
        rows=rows,
        skipped=[(f"photos/{names[0]}.png", f"cannot be read: {names[-1]}")],
    ).save(folder, prefix)
    history = {
        "accuracy": [0.4, 0.6, 0.9], "loss": [1.0, 0.8, 0.3], "val_accuracy": [0.5, 0.7, 0.65],
        "val_loss": [1.1, 0.9, 0.95], "learning_rate": [0.1, 0.01, 1e-3], "seconds": [3, 2, 2],
    }  # fmt: skip
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *history])
        writer.writerows([i + 1, *(v[i] for v in history.values())] for i in range(3))
    recipe = {"name": "finetune", "model": "resnet20", "epochs": 3, "weights": None,
              "milestones": [], "optimizer": names[0]}  # fmt: skip
    counts = {"train": {n: 8 for n in names}, "val": {n: 2 for n in names}}
    (folder / "config.json").write_text(
        json.dumps(
            {
                "directory": f"/data/{names[0]}", "recipe": recipe, "seed": 0, "backend": "torch",
                "class_counts": counts, "status": "finished", "devices": [names[1]],
                "versions": {"keras": "3.15.1", names[0]: names[1]},
                "command": ["x", "train", names[0], "--name", names[1]],
                "model": {"variant": "resnet20", "parameters": 269267, "weights": None},
                "begun": "2026-11-25T10:00:00+00:00", "ended": "2026-11-25T10:00:09+00:00",
                **config,
            }
        )
    )  # fmt: skip
    return folder


class Page(html.parser.HTMLParser):
    """What a browser would find: tags, attributes, text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        if tag not in ("bdi", "span", "code", "a"):
            self.texts.append(" ")
        self.tags.append((tag, tuple(name for name, _ in attributes)))
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_data(self, data):
        if self.tags[-1:] and self.tags[-1][0] != "style":
            self.texts.append(data)

    def values(self, *names):
        return [value for _, name, value in self.attributes if name in names]


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


# --- numbers, against others' formulas -----------------------------------------------------------


@pytest.fixture
def answers(rng):
    confidence = rng.uniform(0.2, 1, 500)
    return confidence, rng.random(500) < confidence**1.5


@pytest.mark.once
def test_calibration_agrees_with_scikit_learn(answers):
    from sklearn.calibration import calibration_curve

    confidence, correct = answers
    result = calibration(confidence, correct)
    right, mean = calibration_curve(correct, confidence, n_bins=15)
    filled = result.counts > 0
    np.testing.assert_allclose(result.accuracy[filled], right)
    np.testing.assert_allclose(result.confidence[filled], mean)
    # torchmetrics, functional/classification/calibration_error.py, norm "l1" and "max".
    share = result.counts[filled] / 500
    assert result.error == pytest.approx(np.sum(np.abs(right - mean) * share))
    assert result.largest == pytest.approx(np.abs(right - mean).max())
    assert result.bias == pytest.approx(confidence.mean() - correct.mean())


@pytest.mark.once
def test_calibration_of_edges_and_of_one_prediction():
    assert calibration([0.0, 1.0], [False, True]).error == 0
    assert calibration([1.0], [False]).error == 1
    edges = np.linspace(0, 1, 16)
    assert calibration(edges, np.ones(16, bool)).counts.tolist() == [2, *[1] * 14]
    for bad in (([], []), ([0.5], [True, False]), ([1.5], [True]), ([np.nan], [True])):
        with pytest.raises(InputError):
            calibration(*bad)


@pytest.mark.once
@pytest.mark.parametrize("right,count", [(0, 1), (1, 1), (85, 153), (1000, 1000), (3, 7)])
def test_the_interval_is_wilsons(right, count):
    from scipy.stats import binomtest

    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert accuracy_interval(right, count) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.once
@pytest.mark.parametrize("a,b", [(0, 0), (1, 0), (12, 4), (30, 24), (0, 200), (500, 501)])
def test_the_paired_test_is_mcnemars(a, b):
    from scipy.stats import binomtest

    expected = binomtest(min(a, b), a + b, 0.5).pvalue if a + b else 1.0
    assert paired_p_value(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.once
def test_the_page_shows_what_the_files_say(tmp_path):
    folder = make_run(tmp_path / "run")
    found = page_of(kr.report(folder))
    data = json.loads((folder / "evaluation.json").read_text())
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = [r for r in rows if r["true"] != r["predicted"]]
    error = calibration([float(r["probability"]) for r in rows],
                        [r["true"] == r["predicted"] for r in rows]).error  # fmt: skip
    for text in (
        f"{data['top1']:.1%}", f"{data['loss']:.3f}", f"{error:.1%}", "160 validation images",
        f"{np.mean([r['f1'] for r in data['per_class']]):.3f}", f"{len(wrong)} images of 160",
        "269,267", "finetune", "24 training", "best validation accuracy at epoch 2",
        "cannot be read: cat", "KERAS_BACKEND=torch keras-resnet train ant --name bee",
        "10:00", "3.15.1",
    ):  # fmt: skip
        assert text in found.text, text
    # The surest of the wrong predictions, in order.
    surest = sorted(wrong, key=lambda r: -float(r["probability"]))[:12]
    shown = [found.text.index(pathlib.Path(r["path"]).name) for r in surest]
    assert shown == sorted(shown)
    card = (folder / "MODEL_CARD.md").read_text()
    assert (
        f"{data['top1']:.1%}" in card and f"| ant | {data['per_class'][0]['precision']:.1%}" in card
    )


@pytest.mark.once
def test_test_images_count_more_than_validation_images(tmp_path):
    folder = make_run(tmp_path / "run")
    make_run(folder, seed=5, prefix="test_")
    found = page_of(kr.report(folder))
    first, second = (json.loads((folder / f"{p}evaluation.json").read_text())["top1"]
                     for p in ("", "test_"))  # fmt: skip
    assert f"Accuracy {second:.1%} of 160 test images" in found.text
    assert f"{first:.1%} on the validation images, {second:.1%} on the test images" in found.text


# --- hostile names -------------------------------------------------------------------------------


def assert_harmless(path):
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    assert not {tag for tag, _ in found.tags} & {"script", "iframe", "object", "embed", "base"}
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    for link in found.values("href", "src", "xlink:href", "action", "srcset", "data"):
        assert link.startswith(("#", "data:image/", "data:,", "./")), link
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    # Control characters and marks that turn the writing direction are shown, not obeyed.
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    csp = next(v for v in found.values("content") if "default-src" in v)
    assert csp.startswith("default-src 'none'")
    return found


@pytest.mark.once
@pytest.mark.parametrize("copies", [1, 2])  # up to 12 classes a table, above a drawing
@pytest.mark.slow
def test_hostile_names_add_no_tag(tmp_path, copies):
    pages = []
    for kind in (PLAIN, HOSTILE):
        names = [f"{name}{i or ''}" for i in range(copies) for name in kind]
        folder = make_run(tmp_path / f"run{len(pages)}", names)
        pages.append(assert_harmless(kr.report(folder)))
    # Tag by tag the same page as with names that harm nobody.
    assert pages[0].tags == pages[1].tags
    assert "<script>alert(1)</script>" in pages[1].text and "\\u202egnp.exe" in pages[1].text
    assert "{{ 7 * 7 }} {% raw %}" in pages[1].text


@pytest.mark.once
@pytest.mark.slow
def test_hostile_folders_in_a_comparison(tmp_path):
    named = [make_run(tmp_path / "a" / f'"<b>{i}\u202e', HOSTILE, seed=i) for i in (0, 1)]
    plain = [make_run(tmp_path / "b" / f"run{i}", PLAIN, seed=i) for i in (0, 1)]
    for run in (named[0], plain[0]):
        kr.report(run)
    found, expected = (assert_harmless(kr.report(runs)) for runs in (named, plain))
    assert found.tags == expected.tags
    link = next(v for v in found.values("href") if v.startswith("./"))
    assert re.fullmatch(r"\./[\w%.-]+/report\.html", link)


@pytest.mark.once
def test_hostile_names_in_the_card(tmp_path):
    folder = make_run(tmp_path / "run", HOSTILE)
    kr.report(folder)
    text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    outside = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"<(?!!-- (end of )?yours -->)", outside)
    rows = [line for line in outside.splitlines() if line.startswith("| ")]
    assert len(rows) > 2 * len(HOSTILE)
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in rows}
    assert bars <= {3, 4, 6}  # two, three and five columns, whatever the names
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)


@pytest.mark.once
def test_markdown_renders_names_as_they_are():
    assert as_markdown("cat 1.5") == "cat 1.5"
    markdown = pytest.importorskip("markdown_it", reason="no Markdown renderer installed")
    for text in (*HOSTILE, "1. x", "- x", "# x", "[a](b)", "**b**", "https://e.x", "~~a~~"):
        page = Page(markdown.MarkdownIt("commonmark").render(as_markdown(text)))
        assert [tag for tag, _ in page.tags] == ["p"]


@pytest.mark.once
def test_names_that_a_spreadsheet_would_calculate_are_shown_as_they_are(tmp_path):
    names = ["=1+1", "'=1", "caf\udce9", "ant"]
    folder = make_run(tmp_path / "run", names)
    results = read_run(folder).main
    assert {row["true"] for row in results.rows} == set(names) == set(results.class_names)
    assert {row["path"].split("/")[-1].split("-")[0] for row in results.rows} == set(names)
    found = assert_harmless(kr.report(folder))
    assert "'=1+1" not in found.text and "It is =1+1" in found.text


@pytest.mark.once
@pytest.mark.parametrize("copies", [1, 2])  # up to 12 classes a table, above a drawing
def test_what_is_right_and_mistakes_have_two_colours(tmp_path, copies):
    folder = make_run(tmp_path / "run", [f"{name}{i}" for i in range(copies) for name in PLAIN])
    found = page_of(kr.report(folder))
    styles = [v for v in found.values("style") if "rgba(" in v]
    assert "mistakes are orange" in found.text
    if copies == 1:
        assert sum("--cell" in v for v in styles) == 8 and sum("--miss" in v for v in styles) == 56


# --- runs of all kinds ---------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["evaluation.json"], "no evaluation"),
        (["predictions.csv"], "single images and confidence are left out"),
        (["history.csv"], "not one epoch is through"),
        (["config.json"], "how it was trained is not known"),
        (["evaluation.json", "predictions.csv", "history.csv"], "no evaluation"),
        (["config.json", "history.csv"], "no history.csv"),
    ],
)
def test_what_is_missing_is_left_out_and_said(tmp_path, gone, said):
    folder = make_run(tmp_path / "run")
    for name in gone:
        (folder / name).unlink()
    found = assert_harmless(kr.report(folder))
    assert said in found.text and (folder / "MODEL_CARD.md").is_file()


@pytest.mark.once
@pytest.mark.parametrize(
    "names",  # the last three say nothing of one another
    [["config.json"], ["evaluation.json"], ["history.csv"], ["predictions.csv"],
     ["best.keras", "skipped.csv", "train.log"]],
)  # fmt: skip
@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff\xfe\x00", b'a,{"b\n1\n2,3,4\n'])
def test_damaged_files_cost_only_their_own_part(tmp_path, names, content):
    folder = make_run(tmp_path / "run")
    for name in names:
        (folder / name).write_bytes(content)
    assert_harmless(kr.report(folder))


@pytest.mark.once
def test_wrong_kinds_of_values_cost_only_their_own_part(tmp_path):
    config = {"recipe": [1], "class_counts": {"train": 3}, "versions": "x", "devices": 1,
              "model": 4, "command": "x", "preprocess": [], "augment": {"steps": 3},
              "status": 7, "directory": 3, "begun": 4}  # fmt: skip
    folder = make_run(tmp_path / "run", **config)
    assert_harmless(kr.report(folder))
    assert_harmless(kr.report([folder, make_run(tmp_path / "other")]))


@pytest.mark.once
@pytest.mark.parametrize(
    "wrong",
    [{"skipped": [1]}, {"class_names": 3}, {"per_class": [{"name": "ant"}]}, {"confusion": "x"},
     {"top1": "x"}, {"top5": "x", "loss": "x"}],
)  # fmt: skip
def test_wrong_kinds_of_results_cost_only_their_own_part(tmp_path, wrong):
    path = make_run(tmp_path / "run") / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    assert "finetune" in assert_harmless(kr.report(path.parent)).text


@pytest.mark.once
def test_uneven_classes_are_said_with_what_was_done_about_them(tmp_path):
    counts = {"train": {"ant": 40, "bee": 8, "cat": 8}}
    text = page_of(kr.report(make_run(tmp_path / "plain", class_counts=counts))).text
    assert "5.0 times as many" in text and "--class-weights balanced" in text
    assert re.search(r"Images Trained on ant [\d.%]+ [\d.%]+ [\d.]+ \d+ 40 ", text)
    recipe = {"name": "finetune", "model": "resnet20", "sampler": "balanced"}
    run = make_run(tmp_path / "sampled", class_counts=counts, recipe=recipe)
    assert "made up for by Sampler" in page_of(kr.report(run)).text


@pytest.mark.once
def test_every_rule_has_its_sentence():
    code = pathlib.Path(reporting.__file__).read_text(encoding="utf-8")
    said = (pathlib.Path(reporting.__file__).parent / "templates" / "sentences.html").read_text(
        encoding="utf-8"
    )
    named = re.findall(r'Finding\(\s*(?:"\w+"|kind), "(\w+)"', code)
    assert len(named) >= 10 and all(f"{{% macro {rule}(" in said for rule in named)


@pytest.mark.once
@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_numbers_that_are_none(tmp_path, value):
    folder = make_run(tmp_path / "run")
    path = folder / "evaluation.json"
    data = {**json.loads(path.read_text()), "loss": value}
    data["per_class"][0]["precision"] = value
    path.write_text(json.dumps(data))
    with open(folder / "history.csv", "a") as file:
        file.write("4,nan,nan,,inf,0.1,1\n")
    found = assert_harmless(kr.report(folder))
    assert "nan" not in found.text.lower().replace("nanc", "")


@pytest.mark.once
def test_a_folder_of_evaluate_alone_gets_a_report(tmp_path):
    folder = make_run(tmp_path / "run")
    for name in ("config.json", "history.csv"):
        (folder / name).unlink()
    assert "160 validation images" in page_of(kr.report(folder)).text


@pytest.mark.once
def test_an_interrupted_run_says_so(tmp_path):
    folder = make_run(tmp_path / "run", status="interrupted")
    (folder / "evaluation.json").unlink()
    found = page_of(kr.report(folder))
    assert "interrupted" in found.text and "This run is not complete" in found.text


@pytest.mark.once
def test_what_a_person_wrote_into_the_card_stays(tmp_path):
    folder = make_run(tmp_path / "run")
    kr.report(folder)
    path = folder / "MODEL_CARD.md"
    text = path.read_text()
    assert "Intended use" in text
    path.write_text(text.replace("*What is this model for, and who uses it?", "Counting *ants*. X"))
    kr.report(folder)
    assert "Counting *ants*. X" in path.read_text()
    assert path.read_text().count("<!-- yours -->") == 1


@pytest.mark.once
def test_images_are_found_from_another_folder(tmp_path):
    data = tmp_path / "photos"
    folder = make_run(tmp_path / "run", directory=str(data))
    row = read_run(folder).main.mistakes[0]
    assert read_run(folder).image(row["path"]) is None
    path = tmp_path / row["path"]
    path.parent.mkdir(parents=True)
    Image.new("RGB", (300, 200), (10, 200, 30)).save(path)
    facts = read_run(folder)
    assert pathlib.Path(facts.image(row["path"])).samefile(path)
    facts.config["directory"], facts.images = str(tmp_path / "gone"), str(data)  # it has moved
    assert pathlib.Path(facts.image(row["path"])).samefile(path)
    facts = read_run(folder)
    assert facts.image_sizes() == {"width": (300,) * 3, "height": (200,) * 3, "count": (1,) * 3}
    found = page_of(kr.report(folder))  # no model file: the image alone
    pictures = [v for v in found.values("src") if v.startswith("data:image/jpeg")]
    assert len(pictures) == 1
    with Image.open(io.BytesIO(base64.b64decode(pictures[0].split(",")[1]))) as picture:
        assert picture.size == (224, 224)
        assert np.abs(np.asarray(picture)[100, 100].astype(int) - (10, 200, 30)).max() < 8


# --- several runs --------------------------------------------------------------------------------


@pytest.mark.once
def test_runs_side_by_side(tmp_path):
    one = make_run(tmp_path / "one", seed=0)
    two = make_run(tmp_path / "two", seed=1)
    config = json.loads((two / "config.json").read_text())
    config["recipe"]["learning_rate"] = 0.25
    (two / "config.json").write_text(json.dumps(config))
    kr.report(one)
    path = kr.report([one, two])
    assert path == tmp_path / "comparison.html"
    found = assert_harmless(path)
    assert "./one/report.html" in found.values("href")
    scores = {f.name: json.loads((f / "evaluation.json").read_text())["top1"] for f in (one, two)}
    best = max(scores, key=scores.get)
    assert f"{best} has the highest accuracy on the validation images: {scores[best]:.1%}" in (
        found.text
    )
    assert "Learning rate" in found.text and "0.25" in found.text
    right = []
    for folder in (one, two):
        with open(folder / "predictions.csv", newline="") as file:
            right.append([r["true"] == r["predicted"] for r in csv.DictReader(file)])
    first, second = np.array(right)
    p = paired_p_value(int((first & ~second).sum()), int((second & ~first).sum()))
    assert f"{p:.3f}" in found.text and str(int((first & second).sum())) in found.text


@pytest.mark.once
def test_equal_runs_are_called_equal(tmp_path):
    one, two = (make_run(tmp_path / name) for name in ("one", "two"))
    found = page_of(kr.report([one, two]))
    score = json.loads((one / "evaluation.json").read_text())["top1"]
    said = f"one and two are equal in accuracy on the validation images: {score:.1%}"
    assert said in found.text and "has the highest accuracy" not in found.text
    assert "best" not in found.values("class")
    assert re.search(r"two \d+ 0 0 \d+ equal", found.text)
    # A third that is worse: the two are equal still, and marked.
    three = make_run(tmp_path / "three")
    path = three / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "top1": 0.1}))
    found = page_of(kr.report([one, three, two]))
    assert "one and two are equal in accuracy" in found.text
    assert found.values("class").count("best") == 2


@pytest.mark.once
def test_runs_of_several_labels_are_compared_by_their_average_precision(tmp_path):
    runs = [make_run(tmp_path / name, seed=i) for i, name in enumerate(["one", "two", "three"])]

    def several(run, precision, top1):
        path = run / "evaluation.json"
        more = {"task": "multi-label", "scores": {"average_precision": precision, "auc": 0.9}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **more, "top1": top1}))

    several(runs[0], 0.81, 0.2)
    found = page_of(kr.report(runs))  # of two tasks none is best
    assert "mean average precision and accuracy are not comparable" in found.text
    assert "All labels right / Accuracy" in found.text and "81.0%" in found.text
    assert "best" not in found.values("class") and "McNemar" not in found.text
    several(runs[1], 0.62, 0.4)
    found = assert_harmless(kr.report(runs[:2]))
    assert "one has the highest mean average precision on the validation images: 81.0%" in (
        found.text
    )
    assert "the one with the highest mean average precision, on the same images. An" in found.text
    assert "Mean average precision All labels right 95% interval" in found.text
    assert "Accuracy" not in found.text.replace("Validation accuracy", "").replace(
        "Training accuracy", ""
    )
    history = {"average_precision": [0.9] * 3, "val_average_precision": [0.4, 0.5, 0.6]}
    facts = read_run(runs[0])
    facts.history |= history
    [warning] = [found for found in reporting.findings(facts) if found.rule == "overfits"]
    assert warning.facts == {"train": 0.9, "val": 0.6, "score": "average_precision"}


@pytest.mark.once
def test_runs_on_other_images_are_not_compared_image_by_image(tmp_path):
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", names=("x", "y"))
    found = page_of(kr.report([one, two]))
    assert "not evaluated on the same images" in found.text
    assert "McNemar" not in found.text
    (two / "evaluation.json").unlink()
    assert "their accuracies are not comparable" in page_of(kr.report([one, two])).text
    (one / "evaluation.json").unlink()
    assert "None of these runs has been evaluated" in page_of(kr.report([one, two])).text


@pytest.mark.once
def test_runs_with_equal_names(tmp_path):
    runs = [make_run(tmp_path / str(i) / "run", seed=i) for i in range(5)]
    found = assert_harmless(kr.report(runs, tmp_path / "all.html"))
    assert "3/run" in found.text


# --- what cannot work ----------------------------------------------------------------------------


@pytest.mark.once
def test_wrong_paths_get_a_suggestion(tmp_path, capsys):
    folder = make_run(tmp_path / "resnet20-photos")
    (tmp_path / "empty").mkdir()
    for bad, message in [
        ([tmp_path / "resnet20-photo"], "Did you mean 'resnet20-photos'?"),
        ([tmp_path], "There are run folders in it: "),
        ([folder / "config.json"], "Its folder is one: "),
        ([tmp_path / "empty"], "is no run folder"),
        ([folder, folder], "named twice"),
        ([folder, "--output", tmp_path / "x.pdf"], "must end in .html"),
        ([folder, "--output", tmp_path / "no" / "x.html"], "does not exist"),
    ]:
        assert cli.main(["report", *map(str, bad)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and message in lines[0], lines
    with pytest.raises(NotFoundError):
        kr.report(tmp_path / "nowhere")
    with pytest.raises(InputError):
        kr.report([])


@pytest.mark.once
def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "a.html")]) == 0
    assert "a.html" in capsys.readouterr().out
    assert (tmp_path / "a.html").is_file() and (tmp_path / "MODEL_CARD.md").is_file()
    assert not (folder / "report.html").exists()


# --- figures for a page --------------------------------------------------------------------------


@pytest.mark.once
def test_figures_take_their_colours_from_the_page():
    values = np.array([0.2, 0.5, 0.9])
    matrix = np.arange(400).reshape(20, 20)
    confidence = np.linspace(0.05, 1, 60)
    drawn = [
        plots.lines_svg([(values, 1, "-"), (values[::-1], 9, plots.DASHES[1])], "a", percent=True,
                        mark=(3, 0.9)),
        plots.lines_svg([(values * 100, 1, "-"), ([np.nan] * 3, 2, "-")], "b"),
        plots.reliability_svg(calibration(confidence, confidence > 0.5), "c"),
        plots.confusion_svg(matrix, [*HOSTILE, *PLAIN, *"abcd"], "d"),
    ]  # fmt: skip
    for svg in drawn:
        colors = set(re.findall(r"#[0-9a-f]{6}", svg))
        assert not colors, colors
        assert "var(--" in svg and svg.startswith("<svg") and svg.endswith("</svg>")
        assert "<style" not in svg and "font-family" not in svg and "<script>alert" not in svg
    assert 'id="d-' in drawn[3] and drawn[0] == plots.lines_svg(
        [(values, 1, "-"), (values[::-1], 9, plots.DASHES[1])], "a", percent=True, mark=(3, 0.9)
    )


# --- written by train, and Grad-CAM in it --------------------------------------------------------


def write_pictures(folder, classes=("ant", "<b>bee"), count=8):
    rng = np.random.default_rng(0)
    for k, label in enumerate(classes):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 160, (24, 24, 3), dtype=np.uint8)
            pixels[..., k] += 60
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


TINY = {"model": "resnet_tiny", "image_size": 32, "epochs": 1, "batch_size": 4, "workers": 1,
        "val_split": 0.5, "verbose": False}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    data = write_pictures(tmp_path_factory.mktemp("data"))
    said = []
    result = kr.train(data, output=tmp_path_factory.mktemp("runs"), **TINY)
    return result, said


@pytest.mark.slow
def test_train_leaves_a_report_with_heat_maps(trained):
    result, _ = trained
    path = result.folder / "report.html"
    found = assert_harmless(path)
    assert (result.folder / "MODEL_CARD.md").is_file() and "<b>bee" in found.text
    wrong = sum(r["true"] != r["predicted"] for r in result.evaluation.rows)
    views = [v for v in found.values("alt") if "heat map" in v]
    # The mistakes for both classes, the others for the prediction.
    assert len(views) == 2 * wrong + min(8, 8 - wrong) and len(views) > 0
    assert "not where it was" not in found.text and "Without Grad-CAM" not in found.text
    assert keras.__version__ in found.text and keras.backend.backend() in found.text


def test_the_heat_map_in_the_page_is_grad_cams(trained):
    result, _ = trained
    row = min(result.evaluation.rows, key=lambda r: r["probability"])
    if row["true"] != row["predicted"]:
        row = max((r for r in result.evaluation.rows if r["true"] != r["predicted"]),
                  key=lambda r: r["probability"])  # fmt: skip
    found = page_of(result.folder / "report.html")
    file = pathlib.Path(row["path"]).name
    wanted = f"{file}, under a heat map of what speaks for {row['predicted']}"
    alts = found.values("alt")
    sources = [v for _, n, v in found.attributes if n == "src"]
    at = [i for i, alt in enumerate(alts) if alt == wanted]
    expected = next(
        iter(kr.iter_explanations(result.model, row["path"], class_name=row["predicted"]))
    ).overlay(least=128)
    close = []
    for i in at:  # both classes have a 3.png
        with Image.open(io.BytesIO(base64.b64decode(sources[i].split(",")[1]))) as picture:
            close.append(np.abs(np.asarray(picture).astype(int) - expected).mean() < 12)
    assert any(close)


def nearest_in(path):
    """What the page says of the training images beside each mistake."""
    pattern = (
        r'alt="(\d+\.png), a training image of ([^"]*)".*?<b>.*?</b> ([\d.]+)<span class="mono">'
    )
    cards = path.read_text(encoding="utf-8").split('<li class="image">')[1:]
    found = [re.findall(pattern, card) for card in cards if 'class="views near"' in card]
    return [[(file, html.unescape(label), float(x)) for file, label, x in of] for of in found]


def test_mistakes_stand_beside_the_training_images_nearest_to_them(
    trained, tmp_path, monkeypatch, capsys
):
    result, _ = trained
    held = {row["path"] for row in result.evaluation.rows}
    data = pathlib.Path(next(iter(held))).parents[1]
    training = sorted(str(p) for p in data.rglob("*.png") if str(p) not in held)
    other = dict(
        zip(result.evaluation.class_names, result.evaluation.class_names[::-1], strict=True)
    )
    rows = [dict(row) for row in result.evaluation.rows]
    for row in rows[1:7:2]:  # as if they were wrong
        row["predicted"] = other[row["true"]]
    evaluation, run = dataclasses.replace(result.evaluation, rows=rows), tmp_path / "run"
    shutil.copytree(result.folder, run)
    for folder in (run, tmp_path / "evaluated"):
        evaluation.save(folder)
    wrong = read_run(run).main.mistakes
    vectors = kr.embed(result.model, [*(row["path"] for row in wrong), *training]).vectors
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors[: len(wrong)] @ vectors[len(wrong) :].T
    expected = []
    for row in cosines:
        best = [(training[i].split(os.sep)[-2:], row[i]) for i in np.argsort(-row)[:3]]
        expected.append([(file, label, pytest.approx(x, abs=1e-3)) for (label, file), x in best])
    # The run's record says which they are, and for an evaluation that of its model.
    page = kr.report(run, model=result.model)
    assert len(wrong) == 3 and nearest_in(page) == expected
    assert "out of all 8." in page_of(page).text
    words = ["report", str(tmp_path / "evaluated")]
    capsys.readouterr()
    assert cli.main([*words, "--model", str(run)]) == 0
    assert "Comparing the mistakes with 8 training images ..." in capsys.readouterr().out
    assert nearest_in(tmp_path / "evaluated" / "report.html") == expected
    # What is not known, and what fails, is said in a line.
    assert cli.main(words) == 0
    lines = [page_of(tmp_path / "evaluated" / "report.html").text]
    lines.append(page_of(kr.report(tmp_path / "evaluated", model=result.model)).text)
    monkeypatch.setattr(embedding, "embed", lambda *_: 1 / 0)
    lines.append(page_of(kr.report(run, model=result.model)).text)
    monkeypatch.setattr(RunFacts, "image", lambda *_: None)
    lines.append(page_of(kr.report(run, model=result.model)).text)
    reasons = "there is no model", "what it was trained on is not", "division by", "the images are"
    for text, reason in zip(lines, reasons, strict=True):
        assert f"Without the nearest training images: {reason}" in text


@pytest.mark.once
def test_which_images_a_run_was_trained_on(tmp_path):
    folder = make_run(tmp_path / "run")
    pixels = np.zeros((200, 4, 4, 3), np.uint8)
    several = [[i % 3, (i + 1) % 3] if i % 2 else [] for i in range(200)]

    def run(images=None, rows=(), **config):
        found = read_run(folder)
        found.images = None if images is None else opened({"train": (pixels, several, list("abc"))})
        of = [{"path": f"train image {i + 1}"} for i in rows]
        found.results["validation"] = dataclasses.replace(found.results["validation"], rows=of)
        found.config |= config
        return found

    paths, labels, more = run(pixels, rows=range(150)).training_images(50)
    assert not more and paths == [f"train image {i + 1}" for i in range(150, 200)]
    assert labels[:4] == ["|", "b|c", "|", "a|b"]
    out = {"arguments": {"exclude": [f"train image {i + 1}" for i in range(150, 199)]}}
    # A part is drawn, always the same one; and of what was evaluated whole all but these few.
    drawn = run(pixels, rows=[0]).training_images(20)
    assert drawn[2] and drawn == run(pixels, rows=[0]).training_images(20)
    assert len(set(drawn[0])) == 20 and "train image 1" not in drawn[0]
    least = run(pixels, rows=range(200)).training_images(1000, {"train image 7"})[0]
    assert len(least) == 199 and "train image 7" not in least
    last = run(pixels, rows=range(150), **out).training_images(9)
    assert last == (["train image 200"], ["b|c"], False)
    for wrong, reason in ((run(), "not known"), (run(pixels), "which images were held out")):
        with pytest.raises(InputError, match=reason):
            wrong.training_images(9)


@pytest.mark.once
@pytest.mark.parametrize("error", [RuntimeError("no <room>\nleft"), KeyboardInterrupt()])
@pytest.mark.slow
def test_a_report_that_fails_fails_no_training(tmp_path, monkeypatch, capsys, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(reporting, "report", fail)
    data = write_pictures(tmp_path / "data")
    result = kr.train(data, output=tmp_path / "runs", **{**TINY, "verbose": True})
    assert result.evaluation is not None and not (result.folder / "report.html").exists()
    said = capsys.readouterr().out
    assert "No report (" in said and "keras-resnet report" in said
    assert json.loads((result.folder / "config.json").read_text())["status"] == "finished"


@pytest.mark.once
def test_no_report_where_none_is_wanted(tmp_path, capsys):
    data = write_pictures(tmp_path / "data")
    flags = ["--model", "resnet_tiny", "--image-size", "32", "--epochs", "1", "--batch-size", "4"]
    code = cli.main(["train", str(data), "--output", str(tmp_path / "runs"), "--no-report", *flags])
    assert code == 0 and "Report:" not in capsys.readouterr().out
    assert not list((tmp_path / "runs").glob("*/report.html"))


@pytest.mark.once
@pytest.mark.slow
def test_the_origin_of_the_weights_is_proven_again(tmp_path):
    source = kr.create_model("resnet_tiny", num_classes=7)
    kr.save_torchvision(source, tmp_path / "start.pth")
    data = write_pictures(tmp_path / "data")
    options = {**TINY, "weights": str(tmp_path / "start.pth"), "output": tmp_path / "runs"}
    result = kr.train(data, **options)
    found = page_of(result.folder / "report.html")
    assert "agrees with a forward pass in plain NumPy" in found.text
    digest = kr.inspect_checkpoint(tmp_path / "start.pth").hash()
    assert digest in found.text and "the head was new" in found.text
    (tmp_path / "start.pth").unlink()
    assert "the file is not here" in page_of(kr.report(result.folder)).text


# --- shown to other people -----------------------------------------------------------------------

# What a rerun needs, or where somebody looks up an image: the run's own records.
RECORDS = {"config.json", "train.log", "skipped.csv", "predictions.csv", "evaluation.json"}


@pytest.mark.once
@pytest.mark.slow
def test_nothing_that_is_shown_says_who_made_it_and_where(tmp_path, monkeypatch):
    home = tmp_path / "home" / "zyxwvutjane"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setattr(socket, "gethostname", lambda: "zyxwvuthost")
    monkeypatch.setattr(platform, "platform", lambda: "Linux-6.8.0-45-zyxwvut-x86_64")
    data = write_pictures(home / "my photos")
    (data / "ant" / "broken.png").write_bytes(b"no image")
    start = home / "start.pth"
    kr.save_torchvision(kr.create_model("resnet_tiny", num_classes=7), start)
    words = f"train _ --weights {start} --output={home / 'runs'} --model=resnet_tiny --workers 1 "
    words = (words + "--image-size 16 --epochs 1 --log tensorboard").split()
    words[1] = str(data)
    monkeypatch.setattr(sys, "argv", ["keras-resnet", *words])
    assert cli.main(words) == 0
    folder = home / "runs" / "resnet_tiny-my-photos"
    shutil.copytree(folder, tmp_path / "other" / "zyxwvutrun" / "copy")
    kr.report([folder, tmp_path / "other" / "zyxwvutrun" / "copy"])
    for where in (home, tmp_path / "nobody"):  # its own user, and somebody else, looks
        monkeypatch.setenv("HOME", str(where))
        kr.report(folder)
        shown = [p for p in (home / "runs").rglob("*") if p.is_file() and p.name not in RECORDS]
        assert {"report.html", "comparison.html", "MODEL_CARD.md", "best.keras"} < {
            path.name for path in shown
        }
        for path in shown:
            texts = [path.read_bytes(), os.fsencode(path.name)]
            if path.suffix == ".keras":
                with zipfile.ZipFile(path) as archive:
                    texts += map(archive.read, archive.namelist())
            assert not any(b"zyxwvut" in text for text in texts), path
        page, card = page_of(folder / "report.html").text, (folder / "MODEL_CARD.md").read_text()
        for text in (page, card.replace("\\", "")):
            assert "Linux-6.8" in text and "kr.load_model('best.keras')" in text
            begin = "~" if where == home else "..."
            command = f"train '{begin}/my photos' --weights {begin}/start.pth"
            assert command in text, command
        assert "ant/broken.png" in page
    assert "zyxwvut" not in repr(kr.scan(data)) + kr.scan(data)._repr_html_()


@pytest.mark.once
def test_paths_fit_to_be_shown(monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane")
    for text, shown in {
        "/home/jane": "~", "/home/jane/a b/c": "~/a b/c", "/home/janet/x": ".../x",
        "/mnt/jane's own/my flowers": ".../my flowers", "--output=/mnt/jane d/x": "--output=.../x",
        "--output=/home/jane/runs": "--output=~/runs", "~bob/flowers": ".../flowers",
        "../../jane/flowers": ".../flowers", "file:///mnt/jane/x/y": ".../y",
        r"C:\Users\jane\flowers": ".../flowers", r"\\host\share\x": ".../x",
        "'/mnt/j d/x.png' is 1/2 of '/x' and a/b": "'.../x.png' is 1/2 of '.../x' and a/b",
        "[Errno 2] No such file: /mnt/jane/b.png: x": "[Errno 2] No such file: .../b.png: x",
        # What stays as it is.
        **{text: text for text in (
            "flowers/roses", "~/a", "N/A", "cats / dogs", "a /b", "<b>x</b>", "</script>",
            "https://example.org/a/b", "javascript://%0aalert(1)//", "see ./a/b", "dir/home/jane/x",
            "=HYPERLINK(\"http://x\";\"y\")", "+cmd|' /C calc'!A0", "3 / 4", "-", "")},
    }.items():  # fmt: skip
        assert shown_path(text) == shown, text


# --- in a browser --------------------------------------------------------------------------------

CONTRAST = """() => {
  const parse = c => {
    const m = c.match(/[\\d.]+/g).map(Number);
    return m.length < 4 ? [...m, 1] : m;
  };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3]));
  const light = c => { const f = c.slice(0, 3).map(v => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 });
    return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2] };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const box = e.getBoundingClientRect();
    if (!own || !box.width || box.right < 0 || ["STYLE", "SCRIPT"].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const layers = [];
    for (let p = e; p; p = p.parentElement) layers.push(parse(getComputedStyle(p).backgroundColor));
    let back = [255, 255, 255];
    for (const layer of layers.reverse()) back = over(layer, back);
    const ink = over(parse(e.tagName === "text" ? style.fill : style.color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push([e.tagName, `${e.className}`, e.textContent.slice(0, 30), ratio]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
    if path is None:
        pytest.skip("no Chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(trained, tmp_path_factory):
    """A report of a training, one of hostile names, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = make_run(folder / "hostile", HOSTILE)
    runs = [make_run(folder / f"run{i}", seed=i) for i in range(3)]
    return [trained[0].folder / "report.html", kr.report(hostile), kr.report(runs)]


@pytest.mark.once
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.slow
def test_the_page_in_a_browser(browser, pages, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    trouble, asked = [], []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: trouble.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    try:
        for path in pages:
            asked.clear()
            page.goto(path.as_uri())
            assert [u for u in asked if not u.startswith("data:")] == [path.as_uri()]
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{path.name} is {wide} px too wide"
            assert page.evaluate(CONTRAST) == []
            dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", dark)[:3])) < 60) == (scheme == "dark")
            assert page.locator("img:not([alt]), img[alt='']").count() == 0
            assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
            assert page.locator("h1").count() == 1
        assert trouble == []
    finally:
        context.close()
