"""Predictions of many pictures: in order, in flat memory, whole after any kill, harmless."""

from __future__ import annotations

import csv
import itertools
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_resnet.cli import main as cli
from keras_resnet.data.opening import image_source
from keras_resnet.data.packing import pack
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.sources import Images
from keras_resnet.data.walk import walk_pictures
from keras_resnet.inference import prediction_files
from keras_resnet.inference.batches import BatchPredictor
from keras_resnet.inference.predict import (
    iter_predictions,
    predict,
    write_predictions,
)
from keras_resnet.inference.prediction_files import Prediction, PredictionTable
from keras_resnet.models.zoo import create_model
from keras_resnet.runtimes.runner import Runner
from keras_resnet.system import files
from keras_resnet.system.errors import InputError, MissingDependencyError, NotFoundError

LONG = bool(os.environ.get("KERAS_RESNET_LONG"))
HOSTILE = [
    "<script>alert(1)</script>",
    "=HYPERLINK(\"http://x\";\"y\")",
    "a,b;c\t\"d\"",
    "two\nlines\r\nthree",
    "\u202egnp.exe",
    "-1",
    "+cmd|' /C calc'!A0",
    "\x1b[31mred",
]  # fmt: skip


class Brightness(Runner):
    """Class k is as likely as channel k is bright: arithmetic that a test can repeat."""

    name = "brightness"
    model_name = "brightness"
    num_classes = 3

    def __init__(self, class_names=("red", "green", "blue"), scale=1.0):
        self.scale = scale
        self.batches: list[int] = []
        self.info = {
            "class_names": list(class_names),
            "preprocess": Preprocess((8, 8), None).get_config(),
            "options": {"include_preprocessing": True},
        }

    def outputs(self, images):
        assert images.dtype == np.uint8
        self.batches.append(len(images))
        return images.mean(axis=(1, 2)).astype(np.float32) * np.float32(self.scale / 50)


def save_noise(folder, count, seed=0, size=8):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tint = rng.integers(0, 200, (count, 1, 1, 3))
    for i in range(count):
        pixels = (rng.integers(0, 56, (size, size, 3)) + tint[i]).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06}.png", compress_level=1)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Fifty pictures in nested folders, three of them unreadable, the names hostile."""
    top = save_noise(tmp_path / "pictures", 30)
    save_noise(top / "sub-a", 10, seed=1)
    save_noise(top / "sub" / "deep", 10, seed=2)
    for name in ("000003.png", "000004.png", "sub-a/000000.png"):
        (top / name).write_bytes(b"no picture")
    for i, name in enumerate(HOSTILE):
        name = name.replace("/", "_")
        os.rename(top / f"{i + 10:06}.png", top / f"{name}.png")
    return top


# --- finding and reading -------------------------------------------------------------------------


@pytest.mark.once
def test_folders_are_walked_lazily_in_the_order_of_training(folder, tmp_path):
    for hidden in (".hidden", "sub/.cache"):
        save_noise(folder / hidden, 1)
    (folder / "notes.txt").write_text("")
    (folder / "folder.png").mkdir()  # an image that cannot be read, for it is none
    expected = walk_pictures(str(folder), False)[0]
    pictures = Images([folder, folder / "sub"])
    assert list(pictures) == expected + walk_pictures(str(folder / "sub"), False)[0]
    assert len(pictures) == 61 and list(pictures) == list(pictures)
    assert list(Images(f"{folder}/")) == expected
    one = iter(pictures)
    next(one)
    save_noise(folder / "sub-a", 11, seed=1)  # not read before its turn
    assert len(list(one)) == 61
    assert pictures.unread == {(".txt", "no kind of image that is read"): 1}


@pytest.mark.once
def test_what_is_no_image_is_said_and_ends_nothing(tmp_path, caplog):
    save_noise(tmp_path, 2)
    (tmp_path / "film.mov").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    answers = predict(Brightness(), [tmp_path, tmp_path / "loop.png", f"{tmp_path}/p*.png"])
    assert sum(a.error is None for a in answers) == 2 and len(answers) == 6
    assert [r.getMessage() for r in caplog.records] == ["Not read: 1 file (1 .mov: a video)."]


@pytest.mark.once
def test_predictions_are_right_and_in_order_whatever_cannot_be_read(folder):
    answers = list(iter_predictions(Brightness(), folder, top=2, batch_size=7, workers=3))
    paths = walk_pictures(str(folder), False)[0]
    assert [a.path for a in answers] == paths
    names = ["red", "green", "blue"]
    for answer in answers:
        if answer.error is not None:
            assert "cannot be read" in answer.error and not answer.classes
            continue
        mean = np.asarray(Image.open(answer.path)).mean(axis=(0, 1)) / 50
        shares = np.exp(mean) / np.exp(mean).sum()
        order = np.argsort(-shares)[:2]
        assert [n for n, _ in answer.classes] == [names[i] for i in order]
        np.testing.assert_allclose([p for _, p in answer.classes], shares[order], rtol=1e-4)
    assert sum(a.error is not None for a in answers) == 3
    assert answers == predict(Brightness(), folder, top=2, batch_size=50, workers=0)


@pytest.mark.once
def test_batches_keep_their_size_where_pictures_are_missing(folder):
    runner = Brightness()
    predict(runner, folder, batch_size=8)
    assert runner.batches == [8] * 6 + [2]  # else every size would be compiled anew


@pytest.mark.once
def test_reading_goes_on_while_the_model_computes_and_stays_bounded(folder, monkeypatch):
    begun = []
    pixels = Preprocess.pixels
    monkeypatch.setattr(Preprocess, "pixels", lambda self, x: begun.append(x) or pixels(self, x))
    stream = iter_predictions(Brightness(), folder, batch_size=4, workers=2)
    next(stream)
    deadline = time.monotonic() + 5
    while len(begun) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)  # the consumer does nothing: the threads read on
    time.sleep(0.1)
    assert 8 < len(begun) <= 4 + 2 * 4 + 2
    stream.close() if hasattr(stream, "close") else None


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    """20,000 pictures with KERAS_RESNET_LONG=1; the growth after the first thousand counts."""
    status = "/proc/self/statm"
    if not os.path.exists(status):
        pytest.skip("resident memory is read from /proc")
    count = 20_000 if LONG else 2_500
    save_noise(tmp_path / "pictures", count, size=32)
    for i in range(0, count, 50):
        (tmp_path / "pictures" / f"{i:06}.png").write_bytes(b"broken")
    name = "resnet20" if LONG else "resnet_tiny"
    model = create_model(name, input_shape=(32, 32, 3), include_preprocessing=True)
    model.info["preprocess"] = Preprocess((32, 32), None).get_config()
    seen = {}

    def progress(now):
        with open(status) as stream:
            seen[now.done] = int(stream.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    result = write_predictions(
        model, tmp_path / "pictures", tmp_path / "a.csv", workers=2, progress=progress
    )
    assert result.count == count and result.unreadable == count // 50
    first = next(value for done, value in seen.items() if done >= 1000)
    growth = max(value for done, value in seen.items() if done >= 1000) - first
    print(f"{count} pictures on {keras.backend.backend()}: {first:.0f} MB + {growth:.1f} MB")
    assert growth <= 50


# --- files ---------------------------------------------------------------------------------------


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.once
def test_every_format_says_the_same(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    expected = predict(Brightness(), folder)
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        result = predict(Brightness(), folder, output=tmp_path / name, batch_size=16)
        assert (result.count, result.unreadable, result.resumed) == (50, 3, 0)
        assert result.errors == tmp_path / "a.errors.csv"
        errors = read_csv(result.errors)
        assert [e["path"] for e in errors] == [p.path for p in expected if p.error]
        assert all("cannot be read" in e["reason"] for e in errors)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [p.to_dict() for p in expected]
    table = pyarrow.read_table(tmp_path / "a.parquet").to_pylist()
    rows = read_csv(tmp_path / "a.csv")
    for prediction, row, entry in zip(expected, rows, table, strict=True):
        assert row["path"] == entry["path"] == prediction.path
        assert (row["error"] or None) == entry["error"] == prediction.error
        for i, (name, share) in enumerate(prediction.classes, 1):
            assert row[f"class{i}"] == entry[f"class{i}"] == name
            assert float(row[f"probability{i}"]) == pytest.approx(share, abs=1e-6)
            assert entry[f"probability{i}"] == pytest.approx(share)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.csv", "a.errors.csv", "a.jsonl", "a.parquet", "pictures",
    ]  # fmt: skip


@pytest.mark.once
def test_parquet_comes_in_row_groups(folder, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(prediction_files, "PARQUET_ROWS", 10)
    predict(Brightness(), folder, output=tmp_path / "a.parquet", batch_size=7)
    found = pyarrow.ParquetFile(tmp_path / "a.parquet").metadata
    groups = [found.row_group(i).num_rows for i in range(found.num_row_groups)]
    assert groups == [10, 10, 10, 10, 10]


@pytest.mark.once
def test_hostile_names_do_no_harm_in_csv(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    runner = Brightness(class_names=["=1+1", "-1", "@SUM(A1)"])
    names = [f"{name.replace('/', '_')}.png" for name in HOSTILE]
    predict(runner, names, output=tmp_path / "a.csv", top=3)
    text = (tmp_path / "a.csv").read_bytes().decode("utf-8")
    rows = read_csv(tmp_path / "a.csv")
    for name, row in zip(names, rows, strict=True):
        assert os.path.samefile(row["path"], name)  # the path still opens the file
        for cell in row.values():
            assert not cell.startswith(("=", "+", "@", "\t", "\r")) or cell == "-1"
        assert {row[f"class{i}"] for i in (1, 2, 3)} == {"'=1+1", "-1", "'@SUM(A1)"}
    # Split at semicolons, as some spreadsheets do, no cell begins a formula either.
    for row in csv.reader(text.splitlines(), delimiter=";"):
        assert not any(cell.startswith(("=", "+", "@")) for cell in row)


@pytest.mark.once
def test_names_that_are_no_utf8_are_written_as_valid_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        with open(name, "wb") as stream:
            Image.new("RGB", (8, 8)).save(stream, "PNG")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    predict(Brightness(), tmp_path, output=tmp_path / "a.csv")
    assert read_csv(tmp_path / "a.csv")[0]["path"].endswith("caf\\udce9.png")
    predict(Brightness(), tmp_path, output=tmp_path / "a.jsonl")
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert os.fsencode(row["path"]) == name


@pytest.mark.once
def test_hostile_names_do_no_harm_in_a_terminal(folder):
    pictures = Images(folder)
    table = PredictionTable(pictures, ["red\n\x1b[2J", "\u202ex"], top=2)
    lines = [table.header] + [table.line(Prediction(p, [("\x1b[2J", 0.5)])) for p in pictures]
    assert all(line.isprintable() for line in lines)


# --- interrupted and gone on with ----------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def whole(folder, tmp_path):
    """An uninterrupted output of each format, made with batches of four."""

    def make(name):
        path = tmp_path / f"whole{name}"
        if not path.exists():
            predict(Brightness(), folder, output=path, batch_size=4)
        return path.read_bytes()

    return make


def begin(folder, output, after, **options):
    """Runs until `after` pictures are done, then dies."""

    def progress(now):
        if now.done >= after:
            raise Killed

    with pytest.raises(Killed):
        write_predictions(Brightness(), folder, output, batch_size=4, progress=progress, **options)


@pytest.mark.once
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_killed_run_goes_on_and_nothing_tells(folder, tmp_path, whole, suffix, monkeypatch):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
        monkeypatch.setattr(prediction_files, "PARQUET_ROWS", 10)
    expected = whole(suffix)
    output = tmp_path / f"answers{suffix}"
    begin(folder, output, 17)
    assert (tmp_path / f"answers{suffix}.part").read_bytes().count(b"\n") == 20
    assert not output.exists()
    runner = Brightness()
    result = write_predictions(runner, folder, output, batch_size=4)
    assert result.resumed == 20
    assert sum(runner.batches[1:]) == 30  # the first one asks who it is
    assert output.read_bytes() == expected
    assert result.unreadable == 3 and len(read_csv(result.errors)) == 3
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.once
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.slow
def test_a_work_file_cut_off_anywhere_is_gone_on_with(folder, tmp_path, whole, suffix):
    expected = whole(suffix)
    output = tmp_path / f"answers{suffix}"
    begin(folder, output, 50)
    part = tmp_path / f"answers{suffix}.part"
    note = (tmp_path / f"answers{suffix}.part.json").read_bytes()
    full = part.read_bytes()
    assert full == whole(".jsonl")
    lengths = [0, 1, *random.Random(0).sample(range(len(full)), 60), len(full) - 1, len(full)]
    for length in lengths:
        # What was lost may be there as zeros after a power cut.
        for tail in (b"", b"\0" * 100, b'"', b"half a row"):
            part.write_bytes(full[:length] + tail)
            (tmp_path / f"answers{suffix}.part.json").write_bytes(note)
            result = write_predictions(Brightness(), folder, output, batch_size=4, workers=0)
            assert output.read_bytes() == expected, (length, tail)
            if not tail:
                assert result.resumed >= full[:length].count(b".png") - 16
            output.unlink()


@pytest.mark.once
def test_what_was_begun_otherwise_is_said_and_kept(folder, tmp_path, capsys):
    output = tmp_path / "answers.csv"
    begin(folder, output, 20)
    part = (tmp_path / "answers.csv.part").read_bytes()

    def again(runner=None, source=folder, **options):
        return write_predictions(
            runner or Brightness(), source, output, **{"batch_size": 4, **options}
        )

    with pytest.raises(InputError, match="top was 3 and is 2"):
        again(top=2)
    with pytest.raises(InputError, match="prediction for a test image changed"):
        again(Brightness(scale=1.01))
    with pytest.raises(InputError, match="class names changed"):
        again(Brightness(class_names="abc"))
    with pytest.raises(InputError, match="preprocess changed"):
        again(preprocess=Preprocess(8, 8))
    with pytest.raises(InputError, match=r"with other images: number 1 was .*000000.png"):
        again(source=folder / "sub")
    (folder / "000001.png").rename(folder / "000001a.png")
    with pytest.raises(InputError, match=r"number 5 was .*000001.png'.*000001a.png"):
        again()
    assert (tmp_path / "answers.csv.part").read_bytes() == part and not output.exists()
    result = again(Brightness(scale=1.01), top=2, restart=True)
    assert result.resumed == 0 and result.count == 50
    # A finished run is made again, not gone on with.
    assert again(Brightness(scale=1.02)).resumed == 0
    # Another number of pictures a batch is no other answer.
    begin(folder, output, 20)
    assert again(batch_size=7).resumed == 14
    for before, now in ((0.99, 0.0), (0.5, 0.5004), (0.0, 0.99)):
        begin(folder, output, 20, min_confidence=before, restart=True)
        with pytest.raises(InputError, match="begun otherwise: min_confidence or thresholds"):
            again(min_confidence=now)
        assert again(min_confidence=before).resumed == 20


@pytest.mark.once
def test_an_earlier_output_stays_until_the_new_one_is_whole(folder, tmp_path):
    output = tmp_path / "answers.csv"
    predict(Brightness(), folder, output=output)
    before = output.read_bytes()
    with pytest.raises(Killed):
        write_predictions(
            Brightness(scale=2), folder, output, batch_size=4,
            progress=lambda now: (_ for _ in ()).throw(Killed) if now.done > 20 else None,
        )  # fmt: skip
    assert output.read_bytes() == before
    for name in ("000003.png", "000004.png", "sub-a/000000.png"):
        save_noise(folder / name.replace(".png", ".d"), 1)
        (folder / name).unlink()
    result = predict(Brightness(), folder, output=output, restart=True)
    assert result.unreadable == 0 and not (tmp_path / "answers.errors.csv").exists()


@pytest.mark.once
def test_two_processes_do_not_write_one_output(folder, tmp_path):
    output = tmp_path / "answers.csv"

    def progress(now):
        if now.done == 8:
            with pytest.raises(InputError, match="Another process is writing"):
                write_predictions(Brightness(), folder, output, batch_size=4)

    result = write_predictions(Brightness(), folder, output, batch_size=4, progress=progress)
    assert result.count == 50


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_any_instant_the_command_goes_on_to_equal_files():
    pytest.importorskip("pyarrow")
    kills = os.environ.get("KERAS_RESNET_KILLS", "6")
    script = os.path.join(os.path.dirname(__file__), "kill_predict.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", kills],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"{kills} kills" in done.stdout


def test_a_run_that_is_killed_while_it_finishes_leaves_nothing_in_the_end(
    folder, tmp_path, whole, monkeypatch
):
    """As it writes the list of unreadable images, and as it writes the output itself."""
    expected, output = whole(".csv"), tmp_path / "new" / "out.csv"
    output.parent.mkdir()
    for count in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(files, "_PROCESS", f"000{count}")  # others, of the same number
            left = iter(range(count))

            def write(path, save, left=left, last=count - 1):
                if next(left, None) == last:
                    save(files.beside(path))
                    raise KeyboardInterrupt
                files.replace_file(path, save)

            patch.setattr(prediction_files, "replace_file", write)
            with pytest.raises(KeyboardInterrupt):
                write_predictions(Brightness(), folder, output, batch_size=4)
    assert sum("-kr" in name for name in os.listdir(output.parent)) == 1
    write_predictions(Brightness(), folder, output, batch_size=4)
    assert sorted(os.listdir(output.parent)) == ["out.csv", "out.errors.csv"]
    assert output.read_bytes() == expected


def test_a_full_disk_names_the_file_and_can_be_gone_on_from(folder, tmp_path, whole):
    expected, output = whole(".csv"), tmp_path / "out.csv"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_predictions(Brightness(), folder, output, batch_size=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == f"{output}.part"
    assert write_predictions(Brightness(), folder, output, batch_size=4).resumed > 0
    assert output.read_bytes() == expected


# --- command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model = create_model(
        "resnet_tiny", num_classes=3, input_shape=(16, 16, 3), include_preprocessing=True
    )
    model.info["class_names"] = ["<b>", "=1+1", "c"]
    model.info["preprocess"] = Preprocess((16, 16), None).get_config()
    path = tmp_path_factory.mktemp("model") / "model.keras"
    model.save(path)
    return str(path)


def test_the_command_writes_and_goes_on(file, folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "answers.csv"
    command = ["predict", file, str(folder), "--output", str(output), "--batch-size", "8"]
    written = prediction_files.PredictionWriter.write
    calls = itertools.count(1)

    def interrupted(self, predictions):
        written(self, predictions)
        if next(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prediction_files.PredictionWriter, "write", interrupted)
        assert cli.main(command) == 130
    said = capsys.readouterr()
    assert "Interrupted at 16 of 50 images" in said.err and ".part" in said.err
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "Going on behind 24 of 50 images." in out
    assert "50 images (24 of them by an earlier run)" in out
    assert "3 could not be read; " in out
    rows = read_csv(output)
    assert len(rows) == 50 and rows[0]["class1"] in ("<b>", "'=1+1", "c")
    assert "sub-a" in rows[-1]["path"] or "deep" in rows[-1]["path"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "answers.txt"], "must end in .csv, .jsonl or .parquet"),
        (["--output", "none/answers.csv"], "'none' does not exist"),
        (["--output", "a.csv", "--json", "b.json"], "--output stands alone"),
        (
            ["--output", "a.csv", "--batch-size", "0"],
            "batch_size must be a whole number of at least 1",
        ),
        (["--workers", "-1"], "workers must be a whole number of at least 0"),
    ],
)
def test_bad_options_are_said_in_one_line(file, folder, tmp_path, capsys, monkeypatch, arguments,
                                          message):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", file, str(folder), *arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures"]


@pytest.mark.once
def test_no_table_of_the_user_is_written_over(file, tmp_path, capsys, monkeypatch):
    save_noise(tmp_path / "a", 2)
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("foto,label\na/000000.png,cat\na/000001.png,dog\n")
    Path("a.errors.csv").write_text("path,reason\na/000000.png,none\n")
    os.symlink("t.csv", "same.csv")
    before = {name: Path(name).read_bytes() for name in ("t.csv", "a.errors.csv")}
    for words, message in (
        (["t.csv", "--output", "t.csv"], "would be written over what is read"),
        (["t.csv", "--output", "same.csv"], "would be written over what is read"),
        (["t.csv", "--csv", "./t.csv"], "would be written over what is read"),
        (["a/000000.png", "--plot", "a/000000.png"], "written over what is read"),
        (["a", "--output", "t.csv"], "holds no predictions"),
        (["a", "--csv", "t.csv"], "holds no predictions"),
    ):
        assert cli.main(["predict", file, *words]) == 2
        assert message in capsys.readouterr().err
    pixels = Path("a/000001.png").read_bytes()
    Path("predictions.csv").write_text("path,label\na/000000.png,0\na/000001.png,1\n")
    for words, message in (  # an image, or a table, in a folder that is read or written to
        (["predict", file, "a", "--plot", "a/000001.png"], "is an image in 'a'"),
        (["scan", ".", "--sheet", "./a/000001.png"], "is an image in '.'"),
        (["explain", file, "a", "--output", "a"], "'a/000000.png' is read: give another folder"),
        (["evaluate", file, "predictions.csv", "--output", "."], "written over what is read"),
    ):
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err
    assert Path("a/000001.png").read_bytes() == pixels
    os.unlink("predictions.csv")
    with pytest.raises(InputError, match="written over what is read"):  # its list of the unreadable
        predict(Brightness(), "a.errors.csv", output="a.csv")
    for ending in (".csv", ".jsonl", ".parquet"):
        for _ in range(2):  # what was written here is written anew
            predict(Brightness(), image_source("t.csv", columns={"path": "foto"}),
                    output=f"b{ending}")  # fmt: skip
    Path("b.jsonl").write_text('{"path": "a/000000.png", "label": "cat"}\n')
    Path("b.parquet").write_bytes(b"PAR1")
    for name in ("b.jsonl", "b.parquet"):
        with pytest.raises(InputError, match="holds no predictions"):
            predict(Brightness(), "a", output=name)
    for name, output in (("--csv", "c.csv"), ("--json", "c.json")):
        for _ in range(2):
            assert cli.main(["predict", file, "t.csv", "--columns", "path=foto", name, output]) == 0
    assert {name: Path(name).read_bytes() for name in before} == before


@pytest.mark.once
def test_parquet_without_pyarrow_names_the_pip_line(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"keras3-resnet\[parquet\]"):
        predict(Brightness(), folder, output=tmp_path / "a.parquet")
    with pytest.raises(NotFoundError):
        predict(Brightness(), tmp_path / "none", output=tmp_path / "a.csv")


# --- batches that an engine hands out ------------------------------------------------------------


def mapped(columns, size, *arguments, **options):
    """What Ray Data's map_batches does: the class and its arguments travel, batches come."""
    kind, arguments, options = pickle.loads(pickle.dumps((BatchPredictor, arguments, options)))
    work = pickle.loads(pickle.dumps(kind(*arguments, **options)))
    count = len(next(iter(columns.values())))
    batches = [{k: v[i : i + size] for k, v in columns.items()} for i in range(0, count, size)]
    answers = [work(batch) for batch in batches]
    assert all(len({len(v) for v in answer.values()}) == 1 for answer in answers)
    return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


def texts(values):
    return np.array([*values, None], object)[:-1]  # of one type, whatever they are


@pytest.mark.once
@pytest.mark.parametrize("kind", ["path", "bytes", "dict", "array", "arrays"])
def test_batches_of_rows_are_classified_by_a_class_that_travels(folder, kind):
    count = 20 if kind in ("path", "bytes", "dict") else 3
    paths = [*list(Images(folder))[:count], str(folder / "none.png")]
    found = list(iter_predictions(Brightness(), paths[:-1], top=2))
    if kind == "path":
        rows = {"path": texts(paths)}
    elif kind == "bytes":
        rows = {"bytes": texts([*(Path(p).read_bytes() for p in paths[:-1]), None])}
    elif kind == "dict":
        contents = [{"bytes": Path(p).read_bytes(), "path": None} for p in paths[:-1]]
        rows = {"image": texts([*contents, {"bytes": None, "path": paths[-1]}])}
    else:
        pixels = [np.asarray(Image.open(p)) for p in paths[:-1]]
        rows = {"image": np.stack(pixels) if kind == "array" else texts([*pixels, float("nan")])}
    rows["key"] = np.arange(len(next(iter(rows.values()))))
    answer = mapped(rows, 7, Brightness(), top=2)
    assert list(answer) == [
        *(["path"] if kind == "path" else []), "key", "class1", "probability1", "class2",
        "probability2", "error",
    ]  # fmt: skip
    for i, one in enumerate(found):
        assert bool(answer["error"][i]) == (one.error is not None)
        for rank, (name, probability) in enumerate(one.classes, 1):
            assert answer[f"class{rank}"][i] == name
            assert answer[f"probability{rank}"][i] == pytest.approx(probability, rel=1e-6)
    if kind != "array":  # the last row has no image
        assert answer["class1"][-1] == "" and np.isnan(answer["probability1"][-1])
        assert answer["error"][-1].endswith(("does not exist.", "the row has no image."))


@pytest.mark.once
@pytest.mark.parametrize(
    "batch, options, message",
    [
        ({"x": [1]}, {}, "no column of images that is known. It has: 'x'. Say which: column=NAME"),
        ({"image": [1]}, {"column": "jpg"}, "no column 'jpg'. It has: 'image'"),
        ([1], {}, "A batch is a dict of columns: .* Received: list"),
        (None, {"top": 0}, "top must be a whole number"),
    ],
)
def test_batches_without_images_are_said(batch, options, message):
    with pytest.raises(InputError, match=message):
        BatchPredictor(Brightness(), **options)(batch)


@pytest.mark.once
@pytest.mark.long
def test_ray_classifies_tables_and_shards(tmp_path):
    ray = pytest.importorskip("ray")
    images = [*Images(save_noise(tmp_path / "pictures" / "noise", 20))]
    keras.utils.set_random_seed(0)
    model = create_model("resnet_tiny", num_classes=3, input_shape=(16, 16, 3))
    model.info["preprocess"] = Preprocess((16, 16), None).get_config()
    model.save(tmp_path / "model.keras")
    expected = [one.classes[0] for one in iter_predictions(model, images)]
    (tmp_path / "t.csv").write_text("\n".join(["path", *images]))
    pack(tmp_path / "pictures", tmp_path / "shards")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        for rows in (
            ray.data.read_csv(str(tmp_path / "t.csv")),
            ray.data.read_webdataset(str(tmp_path / "shards"), decoder=None),
            ray.data.read_images(images),
        ):
            answer = rows.map_batches(
                BatchPredictor,
                fn_constructor_args=[str(tmp_path / "model.keras")],
                fn_constructor_kwargs={"workers": 1},
                batch_size=8,
                compute=ray.data.ActorPoolStrategy(size=1),
            ).take_all()
            found = sorted((row["class1"], row["probability1"]) for row in answer)
            for one, other in zip(found, sorted(expected), strict=True):
                assert one == (other[0], pytest.approx(other[1], rel=1e-5))
    finally:
        ray.shutdown()
