"""Settings of the process: the backend, and how fast a CPU computes by freed memory and threads.

Needs neither Keras nor a backend: most of them count only before a backend is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import math
import os
import platform
import random
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from keras_resnet.system.errors import InputError, MissingDependencyError, did_you_mean

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
    trim_threshold, mmap_max = -1, -4  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
    libc = _glibc()
    return bool(libc and libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))


def give_back_memory() -> None:
    """Gives freed pages back to the system.

    glibc keeps them for each thread, and no other thread gets them: after huge images, gigabytes.
    """
    if libc := _glibc():
        libc.malloc_trim(0)


def free_memory(root: Path = Path("/")) -> float:
    """Bytes that this process can still get, as its system and its container say; else infinity."""
    free = 1024 * _number(root / "proc/meminfo", r"^MemAvailable:\s+(\d+)", math.inf)
    for folder, limit, used, cache in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        group = root / "sys/fs/cgroup" / folder
        taken = _number(group / used) - _number(group / "memory.stat", rf"^{cache} (\d+)")
        free = min(free, _number(group / limit, r"^(\d+)", math.inf) - taken)
    return free


def peak_memory(anew: bool = False) -> float:
    """The most bytes that this process has had in memory, on Linux (or has `anew`); 0 elsewhere."""
    if anew:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return 1024 * _number(Path("/proc/self/status"), r"^VmHWM:\s+(\d+)")


def _number(path: Path, pattern: str = r"^(\d+)", missing: float = 0.0) -> float:
    """A number in a file of the system; `missing` where there is none."""
    try:
        found = re.search(pattern, path.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        found = None
    return float(found[1]) if found else missing


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None


def available_cores() -> int:
    """Cores that the process may use: those it is bound to, and no more than its container's share.

    Processes that torchrun has started on one machine share them.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = min(bound or 1, cgroup_cores(Path("/sys/fs/cgroup")))
    return max(1, math.ceil(share) // told("LOCAL_WORLD_SIZE"))


def default_threads() -> int:
    """Threads that read images: the cores that this process may use, at most 8."""
    return min(8, available_cores())


def threads_each(threads: int | None) -> int | None:
    """Of threads that were asked for, those of each process that torchrun has started here."""
    return threads and max(1, threads // told("LOCAL_WORLD_SIZE"))


def several() -> bool:
    """Whether torchrun has started this process and others."""
    return told("WORLD_SIZE") > 1 and "LOCAL_RANK" in os.environ


def told(variable: str) -> int:
    """The whole number that torchrun says in a variable; 1 where it says none.

    Raises:
        InputError: It is something else.
    """
    text = os.environ.get(variable, "1")
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"{variable} must be a whole number, as torchrun sets it: unset it to run without. "
            f"Received: {text!r}."
        ) from None


def cgroup_cores(root: Path) -> float:
    """The share of processor time that a control group allows, in cores; infinity for no limit.

    Groups are mounted at `root`: `cpu.max` of version 2, or `cpu/` of version 1.
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


# --- one of several processes that torchrun has started ------------------------------------------

MEETING = "KERAS_RESNET_MEETING"  # names the folder in which the processes of `--devices` meet
_PARENT = os.getppid()
store: Any = None  # torch's, which the processes share; once they have met
devices = "1"  # what `--devices` asks of this one process, where the backend is not torch


def meeting_place() -> Path | None:
    """The folder of those that `--devices` has started."""
    folder = os.environ.get(MEETING)
    return Path(folder) if folder else None


def restarted() -> bool:
    """Whether torchrun has started this process in the place of one that was lost."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def orphaned() -> bool:
    """Whether the torchrun, or the command with `--devices`, that started this one has ended."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _PARENT


def speaks(kind: str) -> bool:
    """Whether it is this process that says an error of a kind: one of those that have it does."""
    if "LOCAL_RANK" not in os.environ:
        return True
    if store is None:  # what goes wrong so early does so in all
        return os.environ["LOCAL_RANK"] == "0"
    try:
        return store.add(f"said {kind}", 1) == 1
    except RuntimeError:  # whoever held it has ended
        return True


def reported(code: int) -> int:
    """The exit code to leave with.

    After any but 0 torchrun may start all anew, which an interrupted run does not want; and a wrong
    argument is wrong again: those that `--devices` starts then leave at once (see `settled_code`).
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return code
    place = meeting_place()
    if place is not None and code in (2, 130):
        with contextlib.suppress(OSError):  # where the launcher is gone, nobody reads it
            (place / "code").write_text(str(code), encoding="ascii")
    return 0 if code == 130 else code


def settled_code(place: Path | None) -> int | None:
    """The exit code that a process of `--devices` has reported, after which none is to start."""
    if place is None or not (place / "code").is_file():
        return None
    return int((place / "code").read_text(encoding="ascii"))


# --- the backend ---------------------------------------------------------------------------------

BACKENDS = ("torch", "tensorflow", "jax")


def choose_backend(known: Sequence[str] = BACKENDS) -> None:
    """Settles which backend Keras will import, or says in one line why none can be.

    Where nothing chooses, or a keras.json names a backend that is not there (Keras writes one by
    itself, with its own default in it), and one backend alone is installed, it is that one.
    TensorFlow's native log lines are turned off but for errors, and all of them where it is not
    the backend; it takes a GPU's memory as it needs it. What the environment says already stays.
    Called before Keras is imported: by the command line, and by `import keras` itself (see
    `_registration`).

    Raises:
        InputError: One that is not `known` is chosen.
        MissingDependencyError: The chosen one is not installed, or none is.
    """
    installed = [name for name in BACKENDS if _is_installed(name)]
    chosen = os.environ.get("KERAS_BACKEND")
    if not chosen:
        chosen = _backend_of_keras_json()
        if chosen not in installed and len(installed) == 1:
            os.environ["KERAS_BACKEND"] = chosen = installed[0]
    quiet = "2" if (chosen or "tensorflow") == "tensorflow" else "3"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", quiet)
    # TensorFlow otherwise takes the whole GPU at its first operation.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    if chosen is None and "tensorflow" in installed:
        return  # Keras' own default
    if chosen in installed or (chosen in known and chosen not in BACKENDS):
        return
    if not installed:
        extras = ", ".join(f"keras3-resnet[{name}]" for name in BACKENDS)
        raise MissingDependencyError(
            f"Keras needs a backend, and none is installed: pip install one of {extras}."
        )
    where = "KERAS_BACKEND" if os.environ.get("KERAS_BACKEND") else str(keras_json())
    if chosen is not None and chosen not in BACKENDS:
        raise InputError(
            f"The backend must be torch, tensorflow or jax. {where} says {chosen!r}."
            f"{did_you_mean(chosen, BACKENDS)}"
        )
    set_to = f"{where} names the {chosen} backend, which is not installed"
    found = f"Keras needs one backend, and {' and '.join(installed)} are installed"
    install = f", or pip install 'keras3-resnet[{chosen}]'" if chosen else ""
    raise MissingDependencyError(
        f"{set_to if chosen else found}: set KERAS_BACKEND={' or '.join(installed)}{install}."
    )


# What Keras imports wherever it is installed, for features that no command uses.
_BESIDE_KERAS = ("cv2", "IPython", "jax", "matplotlib", "pandas", "sklearn", "tensorflow")
_DYNAMO = "torch._dynamo"
_alone, _compiler = False, True


def keep_keras_alone(compiler: bool = True) -> None:
    """Has Keras imported, when it comes to that, without what else it would import; for commands.

    Args:
        compiler: Whether torch's may be used. Keras imports it for functions that it shall leave
            alone, which takes more than a CPU second and 70 MB.

    With every backend and matplotlib, pandas and scikit-learn installed, `import keras` on torch
    takes 9 CPU seconds and 620 MB, and 4 and 330 so; and Keras' seed would import TensorFlow too.
    Only for a process of our own: Keras' wrappers for scikit-learn, say, do not work in it. The
    packages can be imported behind it by whoever needs them.
    """
    global _alone, _compiler
    _alone, _compiler = True, compiler


@contextlib.contextmanager
def importing_keras() -> Iterator[None]:
    """What `import keras` runs in (see `_registration`): the packages beside it are not there."""
    if not _alone:
        yield
        return
    backend = chosen_backend()
    hidden = [name for name in _BESIDE_KERAS if name != backend and name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        if backend == "torch" and not _compiler and _DYNAMO not in sys.modules:
            importlib.import_module("torch")
            sys.modules[_DYNAMO] = stand_in = types.ModuleType(_DYNAMO)
            stand_in.__dict__["disable"] = lambda: lambda function: function
            hidden.append(_DYNAMO)
        yield
        if backend == "torch":  # jax writes a SavedModel through TensorFlow
            # Keras looks for it at its first seed, and remembers what it found.
            sys.modules["keras"].utils.set_random_seed(random.getrandbits(32))
    finally:
        for name in hidden:
            sys.modules.pop(name)


def chosen_backend() -> str:
    """The backend that Keras imports, or has."""
    return os.environ.get("KERAS_BACKEND") or _backend_of_keras_json() or "tensorflow"


def _is_installed(name: str) -> bool:
    """Whether a package can be imported; a mere folder of its name in the way is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # hidden by an import hook, or put there by a test
        return name in sys.modules and sys.modules[name] is not None
    return spec is not None and spec.origin is not None


def keras_json() -> Path:
    """Where Keras keeps its settings."""
    home = Path.home() if os.access(Path.home(), os.W_OK) else Path("/tmp")
    return Path(os.environ.get("KERAS_HOME", home / ".keras")).expanduser() / "keras.json"


def _backend_of_keras_json() -> str | None:
    try:
        return json.loads(keras_json().read_text(encoding="utf-8")).get("backend")
    except (OSError, ValueError, AttributeError):
        return None


def system_name(text: str | None = None) -> str:
    """The kind and release of a system without the rest of its `platform.platform()`; of this one.

    Examples:
        >>> system_name("Linux-6.8.0-45-jane-x86_64-with-glibc"), system_name("Windows-11 AMD64")
        ('Linux-6.8', 'Windows-11 AMD64')
    """
    if text is None:
        return f"{system_name(platform.platform())} {platform.machine()}"
    found = re.match(r"[A-Za-z]+(-\d+(\.\d+)?)?( \w+$)?", str(text))
    return found[0] if found else "unknown"
