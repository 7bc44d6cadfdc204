"""Loggers write what was logged, go on after a break, and cannot end a run."""

from __future__ import annotations

import struct
import sys
import types

import pytest

from keras_resnet.system.errors import InputError, MissingDependencyError
from keras_resnet.training import loggers
from keras_resnet.training.loggers import Loggers

pytestmark = pytest.mark.once

VALUES = {"accuracy": 0.5, "val_accuracy": 0.25, "loss": 1.5, "learning_rate": 0.1}


def read_scalars(folder):
    """`(tag, step, value)` of every scalar in a folder's event files.

    An event file is TFRecords (length, its checksum, data, its checksum) of Event messages.
    """
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            at += 12 + length + 4
    return found


def test_tensorboard_files_hold_the_numbers_of_every_epoch(tmp_path):
    pytest.importorskip("tensorboardX")
    for epochs in ((1, 2), (3,)):  # the second part is a run that went on
        many = Loggers(["tensorboard"])
        many.start(tmp_path, "run", {}, {})
        for epoch in epochs:
            many.log(epoch, VALUES)
        many.finish("finished")
    scalars = read_scalars(tmp_path / "tensorboard")
    assert {step for _, step, _ in scalars} == {1, 2, 3}
    assert dict((tag, value) for tag, step, value in scalars if step == 2) == pytest.approx(
        {"accuracy/train": 0.5, "accuracy/val": 0.25, "loss/train": 1.5, "learning_rate": 0.1}
    )
    assert "tensorflow" not in type(loggers.TensorBoardLogger()).__module__


def test_tensorboard_falls_back_to_torchs_writer(monkeypatch):
    fake = types.ModuleType("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert loggers.TensorBoardLogger()._module is fake


class FakeRun:
    """What the tests need of a W&B run, with its names."""

    def __init__(self, calls, id):
        self.calls, self.id = calls, id or "abc123"

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


def test_wandb_gets_the_config_the_numbers_and_the_end(monkeypatch, tmp_path):
    calls = []

    def init(*, project, name, dir, config, id, resume):
        calls.append(("init", project, name, config, id, resume))
        return FakeRun(calls, id)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    many = Loggers(["wandb"])
    ids = many.start(tmp_path, "run", {"epochs": 3}, {})
    many.log(1, VALUES)
    many.finish("interrupted")
    again = Loggers(["wandb"])
    assert again.start(tmp_path, "run", {"epochs": 3}, ids) == ids == {"wandb": "abc123"}
    assert calls == [
        ("init", "keras-resnet", "run", {"epochs": 3}, None, None),
        ("log", VALUES, 1),
        ("finish", 1),
        ("init", "keras-resnet", "run", {"epochs": 3}, "abc123", "allow"),
    ]


def test_mlflow_gets_parameters_once_and_goes_on_with_its_run(monkeypatch, tmp_path):
    calls = []
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def start_run(run_id=None, run_name=None):
        calls.append(("start", run_id, run_name))
        return run

    fake = types.SimpleNamespace(
        set_experiment=lambda name: calls.append(("experiment", name)),
        start_run=start_run,
        log_params=lambda params: calls.append(("params", params)),
        log_metrics=lambda metrics, step: calls.append(("metrics", metrics, step)),
        end_run=lambda status: calls.append(("end", status)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    many = Loggers(["mlflow"])
    ids = many.start(tmp_path, "run", {"source": "x" * 900, "epochs": 3}, {})
    many.log(1, VALUES)
    many.finish("finished")
    again = Loggers(["mlflow"])
    again.start(tmp_path, "run", {"epochs": 3}, ids)
    again.finish("failed")
    assert calls == [
        ("experiment", "keras-resnet"),
        ("start", None, "run"),
        ("params", {"source": "x" * 500, "epochs": "3"}),
        ("metrics", VALUES, 1),
        ("end", "FINISHED"),
        ("experiment", "keras-resnet"),
        ("start", "r1", None),
        ("end", "FAILED"),
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_pip_line(monkeypatch, name):
    for module in ("tensorboardX", "torch.utils.tensorboard", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf'pip install "keras3-resnet\[{name}\]"'):
        Loggers([name])


def test_an_unknown_logger_is_suggested():
    with pytest.raises(InputError, match=r"Did you mean 'wandb'\?"):
        Loggers(["wand"])


def test_a_logger_that_fails_is_named_once_and_left_out(monkeypatch, tmp_path, caplog):
    def init(**arguments):
        raise ConnectionError("no network\nand more")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    many = Loggers(["wandb"])
    assert many.start(tmp_path, "run", {}, {}) == {}
    many.log(1, VALUES)
    many.finish("finished")
    assert [r.getMessage() for r in caplog.records] == [
        "Logging to wandb stopped: no network and more"
    ]
