"""Where the numbers of every epoch go besides `history.csv`: TensorBoard, W&B, MLflow.

Each of them is an optional package, imported when it is asked for. None of them can end a run: one
that fails later, such as for want of a network, is named once and left out from there on.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import socket
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_resnet.system.errors import InputError, MissingDependencyError, did_you_mean, reason_of
from keras_resnet.system.files import shown_path

logger = logging.getLogger("keras_resnet")


def _tag(name: str) -> str:
    """A name in history.csv as one that groups well in a browser: `loss/train`, `loss/val`."""
    of, part = (name[4:], "val") if name.startswith("val_") else (name, "train")
    return f"{of}/{part}" if of in ("accuracy", "average_precision", "loss") else name


def _import(name: str, extra: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f'Logging to {extra} needs the package {name!r}: pip install "keras3-resnet[{extra}]".'
        ) from error


class TensorBoardLogger:
    """Scalars for TensorBoard, in the run folder's `tensorboard`; TensorFlow is not needed.

    tensorboardX writes them, or torch's own writer where that is installed instead.
    """

    def __init__(self) -> None:
        try:
            self._module = _import("tensorboardX", "tensorboard")
        except MissingDependencyError as missing:
            try:
                self._module = importlib.import_module("torch.utils.tensorboard")
            except ImportError:
                raise missing from None

    def start(self, folder: Path, name: str, config: Mapping[str, Any], resumed: Any) -> None:
        # The writers name the file after the machine. Two begun in the same second differ still.
        machine, socket.gethostname = socket.gethostname, lambda: "run"
        try:
            self._writer = self._module.SummaryWriter(
                os.fspath(folder / "tensorboard"), filename_suffix=f".{secrets.token_hex(4)}"
            )
        finally:
            socket.gethostname = machine

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(_tag(key), value, epoch)
        self._writer.flush()

    def finish(self, status: str) -> None:
        self._writer.close()


class WandbLogger:
    """A run in the Weights & Biases project `keras-resnet` (or `WANDB_PROJECT`)."""

    def __init__(self) -> None:
        self._module = _import("wandb", "wandb")

    def start(self, folder: Path, name: str, config: Mapping[str, Any], resumed: Any) -> str:
        self._run = self._module.init(
            project=os.environ.get("WANDB_PROJECT", "keras-resnet"),
            name=name,
            dir=os.fspath(folder),
            config=dict(config),
            id=resumed,
            resume="allow" if resumed else None,
        )
        return self._run.id

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=epoch)

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class MlflowLogger:
    """A run of MLflow, in the experiment that `MLFLOW_EXPERIMENT_NAME` says or `keras-resnet`."""

    def __init__(self) -> None:
        self._module = _import("mlflow", "mlflow")

    def start(self, folder: Path, name: str, config: Mapping[str, Any], resumed: Any) -> str:
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            self._module.set_experiment("keras-resnet")
        run = self._module.start_run(run_id=resumed, run_name=None if resumed else name)
        if not resumed:
            # MLflow refuses values of more than 500 letters, and changed ones on going on.
            self._module.log_params({key: str(value)[:500] for key, value in config.items()})
        return run.info.run_id

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self._module.log_metrics(dict(values), step=epoch)

    def finish(self, status: str) -> None:
        ends = {"finished": "FINISHED", "interrupted": "KILLED"}
        self._module.end_run(ends.get(status, "FAILED"))


LOGGERS = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger, "mlflow": MlflowLogger}


class Loggers:
    """Several loggers, out of `LOGGERS`, as one that does no harm.

    Raises:
        InputError: An unknown name.
        MissingDependencyError: The package is not installed; the message has the pip line.
    """

    def __init__(self, names: Sequence[str]):
        for name in names:
            if name not in LOGGERS:
                hint = did_you_mean(name, LOGGERS) or f" There are: {', '.join(LOGGERS)}."
                raise InputError(f"Unknown logger {name!r}.{hint}")
        self._loggers: dict[str, Any] = {name: LOGGERS[name]() for name in dict.fromkeys(names)}

    def start(
        self, folder: Path, name: str, config: Mapping[str, Any], ids: Mapping[str, str]
    ) -> dict[str, str]:
        """Starts them all.

        Of paths in `config`, which is noted beside the numbers, as much as is fit to be shown.
        `ids` are those of an earlier part of the same run, by logger; gives those to go on with.
        """
        found = dict(ids)
        config = {k: shown_path(v) if isinstance(v, str) else v for k, v in config.items()}
        for key in list(self._loggers):
            if begun := self._call(key, "start", folder, name, config, ids.get(key)):
                found[key] = begun
        return found

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Hands the numbers of an epoch, counted from 1, to all."""
        for key in list(self._loggers):
            self._call(key, "log", epoch, values)

    def finish(self, status: str) -> None:
        """Ends them all: `"finished"`, `"interrupted"` or `"failed"`."""
        for key in list(self._loggers):
            self._call(key, "finish", status)
        self._loggers.clear()

    def _call(self, key: str, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._loggers[key], method)(*arguments)
        except Exception as error:  # whatever a service raises: the training goes on
            logger.warning("Logging to %s stopped: %s", key, reason_of(error))
            del self._loggers[key]
            return None
