"""A file is the old or the new one, whole, at any instant."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import stat
import subprocess
import sys

import pytest

from keras_resnet.system import files
from keras_resnet.system.errors import InputError
from keras_resnet.system.files import (
    check_writable_folder,
    csv_line,
    csv_value,
    printable,
    replace_file,
    shortened,
    text_width,
    write_json,
    write_text,
)

pytestmark = pytest.mark.once


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "model.keras"
    path.write_text("old")

    def write(name):
        with open(name, "w") as file:
            file.write("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["model.keras"]


KILLED = """
import os, signal, sys
from keras_resnet.system.files import replace_file
def write(name):
    open(name, "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
replace_file(sys.argv[1], write)
"""


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path, monkeypatch):
    for name in ("out.errors.csv", "no-suffix"):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)])
        assert [left.split("-kr")[0] for left in os.listdir(tmp_path)] == [
            f".{name.removesuffix('.csv')}"
        ]
    parent, own = os.getppid(), os.getpid()
    monkeypatch.setattr(files, "_PROCESS", "abcd")
    (tmp_path / f".exporting-kr{own}.0000-abcd_fgh").mkdir()
    stays = [".photo-12345678.png", f".live-kr{parent}.abcd-12345678.csv", "kr1.abcd-12345678.csv"]
    goes = [f".out-kr{own}.0000-12345678.csv", f".a-kr{10**30}.0000-12345678.csv"]
    for name in stays + goes:
        (tmp_path / name).touch()
    with pytest.raises(OSError, match="it"):

        def write(name):
            write_text(tmp_path / "other.csv", "x")  # takes nothing of this process' own
            assert not os.path.exists(name)
            open(name, "w").close()
            write_text(tmp_path / "other.csv", "x")
            assert os.path.exists(name)
            raise OSError("it")

        replace_file(tmp_path / "out.csv", write)
    assert sorted(os.listdir(tmp_path)) == sorted([*stays, "other.csv"])


@pytest.mark.parametrize("kind", ["text", "stream", "library"])
def test_a_full_disk_names_the_file(tmp_path, kind):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            if kind == "text":
                write_text(tmp_path / "a.csv", "x" * 2000)
            elif kind == "library":  # which says it in words of its own

                def write(name):
                    open(name, "w").close()
                    raise RuntimeError("Can't decrement id ref count")

                replace_file(tmp_path / "a.csv", write)
            else:
                with files.named(tmp_path / "a.csv"), open(tmp_path / "a.csv", "wb", 0) as stream:
                    while True:
                        stream.write(bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(tmp_path / "a.csv")
    assert os.listdir(tmp_path) == (["a.csv"] if kind == "stream" else [])


def test_the_new_file_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    seen = []

    def write(name):
        # A writer that chooses its format by the extension must see the right one.
        seen.append((os.path.splitext(name)[1], os.path.dirname(name), path.read_text()))
        with open(name, "w") as file:
            file.write("new")

    replace_file(path, write)
    assert path.read_text() == "new" and seen == [(".txt", str(tmp_path), "old")]
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_data_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *a: (order.append("replace"), replace(*a)))
    write_text(tmp_path / "a.txt", "x")
    assert order == ["fsync", "replace", "fsync"]  # the file, its new name, the folder


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "a.json").st_mode) == 0o640


def test_text_is_written_byte_by_byte_as_given(tmp_path):
    text = "a\r\nb\n\udcff\u00e9"  # a file name that is no UTF-8
    write_text(tmp_path / "a.csv", text)
    assert (tmp_path / "a.csv").read_bytes() == b"a\r\nb\n\xff\xc3\xa9"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name.jpg", "plain name.jpg"),
        ("caf\u00e9 \u732b", "caf\u00e9 \u732b"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\nb", "a\\nb"),
        ("a\u202eb", "a\\u202eb"),
        ("a\udcffb", "a\\udcffb"),
    ],
)
def test_names_do_no_harm_in_a_terminal(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    """As root, a file moved to /dev/null would take its place."""
    path = tmp_path / "out"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(InputError, match=f"is a .*{kind}"):
        write_text(path, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not path.is_file()


HOLD = """
import sys, time
from keras_resnet.system.files import drop_lock, take_lock
folder, holds = sys.argv[1], 0
end = time.monotonic() + 3
while time.monotonic() < end:
    lock = take_lock(f"{folder}/lock")
    if lock is not None:
        open(f"{folder}/holder", "x").close()  # fails where another process holds it too
        holds += 1
        __import__("os").unlink(f"{folder}/holder")
        drop_lock(lock)
print(holds)
"""


def test_a_lock_has_one_holder_whoever_removes_its_file(tmp_path):
    """Removed after it is given back, a lock's file lets a second and a third process hold it."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    holds = [int(process.communicate(timeout=60)[0] or -1) for process in processes]
    assert min(holds) >= 0 and sum(holds) > 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["=1+1", "'=1", "''=1", "'", "'tis", "-1", "'-1", "@x", "\t=1", "\uff1dx", '"=1"', "a\nb",
     "=1;2\r", "caf\udce9", "1.5", " x "],
)  # fmt: skip
def test_a_csv_cell_is_read_as_it_was_meant(name):
    line = csv_line([name, "b"])
    [cell, _] = next(csv.reader(io.StringIO(line, newline="")))
    assert csv_value(cell) == name


def test_json_keeps_its_values_and_a_row_of_numbers_is_one_line(tmp_path):
    value = {
        "confusion": [[1, 0], [-2, 3.5e-7]],
        "text": ["[\n1,\n2]", "a b"],
        "none": [],
        "n": [[]],
    }
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == value
    assert "    [1,0],\n    [-2,3.5e-07]\n" in text

    write_json(tmp_path / "b.json", {"confusion": [[0] * 1000] * 1000})
    assert (tmp_path / "b.json").stat().st_size < 2.1e6  # 11 MB with a line a number


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("cat", 8, "cat"),
        ("a" * 200, 10, "aaaaa...aa"),
        ("\u732b" * 30, 10, "\u732b\u732b...\u732b"),  # two columns each
        ("\u732b" * 5, 10, "\u732b" * 5),
        ("one two three four", 12, "one tw...our"),
        ("Chevrolet Silverado 1500 Hybrid", 24, "Chevrolet Silv... Hybrid"),
        ("a\nb  c", 24, "a\\nb c"),
        ("abcdefg", 2, "a...g"),  # at least its ends
    ],
)
def test_long_names_lose_letters_and_never_all_of_them(text, width, shown):
    assert shortened(text, width) == shown
    assert width < 5 or text_width(shown) <= width


def test_no_accent_is_left_without_its_letter():
    cut = shortened("e\u0301" * 30, 11)
    assert cut == "e\u0301" * 6 + "..." + "e\u0301" * 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are POSIX'")
def test_a_folder_without_a_name_of_its_own_can_be_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (".", "", "./", ".."):
        check_writable_folder(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="no regular file"):
        files.read_json(tmp_path / "config.json")
