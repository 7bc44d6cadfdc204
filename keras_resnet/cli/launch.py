"""`--devices`: on torch the command again, once a device, by torch's own launcher."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from keras_resnet.system import process
from keras_resnet.system.errors import InputError, require
from keras_resnet.system.files import take_lock
from keras_resnet.system.process import MEETING, chosen_backend, settled_code

_PREFIX, _LOCK = "keras_resnet-", "lock"


def number(devices: str) -> None:
    """It is a number of devices, or `all`."""
    if devices != "all" and not (devices.isdecimal() and int(devices)):
        raise InputError(
            f"--devices must be a whole number of at least 1, or all. Received: {devices!r}."
        )


def launch(
    words: Sequence[str], devices: str | None, restarts: int, compile: bool, dry_run: bool
) -> int | None:
    """Runs the command in one process a device; gives its exit code, `None` where one is enough.

    One takes all devices of TensorFlow or jax. Several meet in a folder and talk over the loopback
    interface: no port is open to others. For several machines there is torchrun.

    `restarts` is how often a lost process is replaced, all of them going on together; a dry run
    only checks that they could start.

    Raises:
        InputError: There are fewer devices, a step to compile, or another command than train to
            run on several of TensorFlow or jax.
    """
    devices, backend = devices or "1", chosen_backend()
    several = devices not in ("1", "all") or (backend == "torch" and _count(devices) > 1)
    if compile and several and backend != "jax":  # jax always does
        raise InputError(
            "The step of several devices is not compiled: leave out --compile. "
            f"Received: --devices {devices}."
        )
    if backend != "torch":
        if words[0] != "train" and devices != "1":
            raise InputError(
                f"{words[0]} takes several devices on torch alone: set KERAS_BACKEND=torch. "
                f"Received: --devices {devices}, and the backend {backend}."
            )
        process.devices, devices = devices, "1"
    if "LOCAL_RANK" in os.environ:
        return None  # one of those that torchrun has started
    count = _count(devices)
    if dry_run or (count == 1 and not restarts):
        return None
    require("torch", "torch", "--max-restarts")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # its own words fill a screen
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    # Nobody needs the server that each process would otherwise ask for the others' addresses.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    _sweep()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        held = take_lock(Path(folder, _LOCK))  # as long as this process lives
        os.environ[MEETING] = folder
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=os.path.join(folder, "rendezvous"),
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=restarts,
            logs_specs=DefaultLogsSpecs(log_dir=os.path.join(folder, "logs")),
        )
        code = 0
        try:
            elastic_launch(config, sys.executable)("-m", "keras_resnet", *words)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            code = failure.exitcode
        except SignalException:
            code = 130
        settled = settled_code(Path(folder))
        if held is not None:
            held.release()
    if settled is not None:
        return settled
    return _said(code, count, words[0])


def _said(code: int, count: int, command: str) -> int:
    """The exit code of a process that failed; says which signal ended it, where one did."""
    if code < 0:
        name = str(-code)
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
        then = "Give the same command again."
        if command == "train":
            then = (
                "The same command goes on from the last checkpoint; with --max-restarts it does so "
                "by itself."
            )
        print(
            f"keras-resnet: one of the {count} processes was ended by {name}. {then}",
            file=sys.stderr,
        )
        return 1
    return code


def _sweep() -> None:
    """Removes the folders of commands that were killed, which could not do it themselves."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):
            own = lock.parent.lstat().st_uid == getattr(os, "getuid", int)()
            if own and (held := take_lock(lock)) is not None:
                shutil.rmtree(lock.parent, ignore_errors=True)
                held.release()


def _count(devices: str) -> int:
    if devices == "1":
        return 1
    import torch

    there = torch.cuda.device_count()
    if devices == "all":
        return there or 1
    if there and int(devices) > there:
        raise InputError(f"CUDA devices here: {there}. Received: --devices {devices}.")
    return int(devices)
