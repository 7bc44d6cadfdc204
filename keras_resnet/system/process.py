"""Settings of the process: the backend, and how fast a CPU computes by freed memory and threads.

Needs neither Keras nor a backend: most of them count only before a backend is imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import platform
import sys
from pathlib import Path

from keras_resnet.errors import InputError, MissingDependencyError, did_you_mean

_SWITCH = "KERAS_RESNET_TUNE"
_done = False


def tune_process() -> None:
    """Keeps freed memory and fits the number of threads to the cores; once a process.

    `train`, `evaluate` and `predict` call it first. `KERAS_RESNET_TUNE=0` in the environment turns
    it off, and what the environment or the caller has set already stays.

    - glibc gives big blocks back to the system as soon as they are freed, and gets them back page
      by page: up to a third of a training step on a CPU. It is told to keep them (`mallopt`); the
      process then holds on to its peak.
    - In a container whose share is below the machine's cores, a backend would start a thread a
      core and wait for the slowest.
    - OpenMP's threads wait busily for their next task, and take the cores from those that read
      images: a step of a small network took 320 ms beside one busy process, and 1,000 ms without
      this. They are told to sleep soon, where no backend has been imported yet (on the command
      line, that is).
    """
    global _done
    if _done or os.environ.get(_SWITCH) == "0":
        return
    _done = True
    keep_freed_memory()
    fit_threads()


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed pages; gives whether it took the setting."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def available_cores() -> int:
    """Cores that the process may use: those it is bound to, and no more than its container's share.

    Examples:
        >>> 1 <= available_cores() <= (os.cpu_count() or 1)
        True
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = min(bound or 1, cgroup_cores(Path("/sys/fs/cgroup")))
    return max(1, math.ceil(share))


def default_threads() -> int:
    """Threads that read images: the cores that this process may use, at most 8."""
    return min(8, available_cores())


def cgroup_cores(root: Path) -> float:
    """The share of processor time that a control group allows, in cores; infinity for no limit.

    Args:
        root: Where the groups are mounted: `cpu.max` of version 2, or `cpu/` of version 1.
    """
    try:
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (root / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
        except OSError:
            return math.inf
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return math.inf
    return share if share > 0 else math.inf  # -1 is version 1's word for no limit


def fit_threads() -> None:
    """Gives the backend as many threads as there are cores to run them."""
    cores = available_cores()
    fewer = cores < (os.cpu_count() or 1)
    if "torch" not in sys.modules:
        if "OMP_WAIT_POLICY" not in os.environ:
            # GNU's default is 300,000. On free cores 5,000 cost 4 % of a small network's step,
            # sleeping at once ("PASSIVE") 16 %.
            os.environ.setdefault("GOMP_SPINCOUNT", "5000")
        if fewer:
            os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    elif fewer and "OMP_NUM_THREADS" not in os.environ:
        torch = sys.modules["torch"]
        if torch.get_num_threads() > cores:
            torch.set_num_threads(cores)
    if fewer and "tensorflow" not in sys.modules:
        # TensorFlow counts the cores that the process is bound to, not the container's share.
        for kind in ("INTRAOP", "INTEROP"):
            os.environ.setdefault(f"TF_NUM_{kind}_THREADS", str(cores))


def choose_backend() -> None:
    """Says in one line what Keras would say in a traceback: the chosen backend is not there.

    Where neither KERAS_BACKEND nor keras.json chooses and one backend alone is installed, it is
    that one; every command prints which one runs.
    """
    known = ("torch", "tensorflow", "jax")
    chosen = os.environ.get("KERAS_BACKEND")
    if not chosen:
        home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
        try:
            chosen = json.loads((home / "keras.json").read_text(encoding="utf-8")).get("backend")
        except (OSError, ValueError):
            chosen = None
    installed = [name for name in known if importlib.util.find_spec(name)]
    if not chosen:
        if len(installed) == 1:
            os.environ["KERAS_BACKEND"] = installed[0]
            return
        chosen = "tensorflow"  # Keras' own default
    if chosen not in known:
        raise InputError(
            f"KERAS_BACKEND is {chosen!r}; it must be torch, tensorflow or jax."
            f"{did_you_mean(chosen, known)}"
        )
    if chosen not in installed:
        other = f"set KERAS_BACKEND={installed[0]}, or " if installed else ""
        raise MissingDependencyError(
            f"Keras is set to the {chosen} backend, which is not installed: {other}"
            f"pip install 'keras3-resnet[{chosen}]'"
        )
