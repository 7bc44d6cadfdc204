"""What is known about the running backend: its version, its devices, its determinism."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet.system.process import BACKENDS, available_cores


def devices() -> list[str]:
    """The devices that compute, for people: where the backend puts what Keras makes."""
    backend, made = keras.backend.backend(), keras.ops.zeros(())
    if backend == "torch":
        import torch

        place = made.device
        return [torch.cuda.get_device_name(place) if place.type == "cuda" else place.type]
    if backend == "tensorflow":
        import tensorflow as tf

        kind, index = made.device.split(":")[-2:]  # of /job:localhost/.../device:GPU:0
        if kind == "CPU":
            return ["cpu"]
        found = tf.config.list_physical_devices(kind)[int(index)]
        return [tf.config.experimental.get_device_details(found).get("device_name", kind)]
    return [str(device.device_kind) for device in made.devices()]


def installed_version(module: str) -> str | None:
    """Version of the installed package that a module comes from; `None` where there is none."""
    for name in (module, f"{module}-cpu", f"{module}-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def backend_version() -> str:
    """Version of the backend's package; `"?"` where it is not known."""
    return installed_version(keras.backend.backend()) or "?"


def package_version() -> str:
    """This package's version as installed."""
    return installed_version("keras3-resnet") or "unknown"


def environment() -> dict[str, str]:
    """What computes here, a line a thing, for people: what a report of a bug needs to say."""
    backend = keras.backend.backend()
    others = [name for name in BACKENDS if name != backend and installed_version(name)]
    facts = {
        "keras_resnet": f"{package_version()}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        "backend": backend_line(),
        "also there": ", ".join(f"{name} {installed_version(name)}" for name in others) or "none",
        "data format": f"{keras.config.image_data_format()}, {keras.config.dtype_policy().name}",
        "cores": f"{available_cores()} of {os.cpu_count()} to be used",
        "TF32": f"{'allowed' if tf32_allowed() else 'not allowed'} (GPUs alone have it)",
        "driver": "no NVIDIA driver",
    }
    with contextlib.suppress(OSError):
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        numbers = re.findall(r"\d+(?:\.\d+)+", first)  # the first is the driver's
        facts["driver"] = numbers[0] if numbers else first
    cuda = cudnn = None
    if backend == "torch":
        import torch

        cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
    elif backend == "tensorflow":
        import tensorflow as tf

        built = tf.sysconfig.get_build_info()
        cuda, cudnn = built.get("cuda_version"), built.get("cudnn_version")
    if cuda:
        facts["CUDA"] = f"{cuda}, cuDNN {cudnn}"
    return facts


def backend_line() -> str:
    """The backend, its version and device in one line, which every command prints."""
    name = f"{keras.backend.backend()} {backend_version()}"
    return f"{name} on {', '.join(devices())}, Keras {keras.__version__}"


def in_data_format(images: np.ndarray, data_format: str | None = None) -> np.ndarray:
    """A batch `(n, height, width, channels)` in a data format; in Keras' setting by default.

    It is the same array, or `(n, channels, height, width)` in an order of its own in memory.
    """
    if (data_format or keras.config.image_data_format()) == "channels_first":
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images


def image_shape(height: int | None, width: int | None, channels: int) -> tuple[int | None, ...]:
    """The shape of an image in the order of Keras' data format."""
    last = keras.config.image_data_format() == "channels_last"
    return (height, width, channels) if last else (channels, height, width)


def make_deterministic() -> None:
    """Asks the backend for deterministic kernels; torch names an operation that has none."""
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        # cuBLAS reads it at its first product; without it torch warns at every one.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    elif backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


@contextlib.contextmanager
def without_source_paths() -> Iterator[None]:
    """For what is written for others: jax notes the lines of code that it came from, with folders.

    Names of the files stay.
    """
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*/")
    try:
        yield
    finally:
        jax.config.update(name, before)


# --- TF32 ----------------------------------------------------------------------------------------


def tf32_allowed() -> bool:
    """Whether a GPU may compute float32 convolutions on 10 of 23 bits, as it does by default."""
    read, _, _, using = _tf32_switches()[-1]
    return read() in (using, None)


def set_tf32(on: bool) -> None:
    """Lets the backend's GPU kernels use TF32, or not: faster, with errors of some 1e-3.

    The backend's own switches are set, for the whole process; a CPU computes the same either way.
    Without this call they stand as torch (convolutions yes, products no), TensorFlow (yes) and jax
    (yes) have them. `train` writes the state into `config.json`, and every numerical proof
    (`verify`, `convert`, `export`) runs without TF32 whatever is set here.

    Args:
        on: Whether TF32 is allowed.
    """
    for _, write, without, using in _tf32_switches():
        if using != _LEFT_ALONE:
            write(using if on else without)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 as it is written, for whatever compares numbers; what was set is put back."""
    switches = _tf32_switches()
    before = [read() for read, *_ in switches]
    try:
        for _, write, without, _ in switches:
            write(without)
        yield
    finally:
        for (_, write, *_), value in zip(switches, before, strict=True):
            if value != _LEFT_ALONE:
                write(value)


_LEFT_ALONE = "left alone"


def _tf32_switches() -> list[tuple[Callable[[], Any], Callable[[Any], None], Any, Any]]:
    """How each switch is read and set, and its values without TF32 and with it.

    The last one is that of convolutions.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        from tensorflow.config import experimental

        read = experimental.tensor_float_32_execution_enabled
        return [(read, experimental.enable_tensor_float_32_execution, False, True)]
    if backend == "jax":
        import jax

        name = "jax_default_matmul_precision"
        write = functools.partial(jax.config.update, name)
        return [(lambda: getattr(jax.config, name), write, "highest", "tensorfloat32")]
    import torch

    def legacy(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except RuntimeError:  # somebody set the newer names alone, which then count
            return _LEFT_ALONE

    cudnn, matmul = torch.backends.cudnn, torch.get_float32_matmul_precision
    allowed = functools.partial(legacy, lambda: cudnn.allow_tf32)
    found = [
        (functools.partial(legacy, matmul), torch.set_float32_matmul_precision, "highest", "high"),
        (allowed, functools.partial(setattr, cudnn, "allow_tf32"), False, True),
    ]
    # The newer names; torch.compile fails where these alone are set.
    cpu = torch.backends.mkldnn  # bfloat16, where somebody asked for it
    owners = {cpu.conv: _LEFT_ALONE, cpu.rnn: _LEFT_ALONE, cpu.matmul: _LEFT_ALONE}
    owners |= {cudnn.rnn: "tf32", torch.backends.cuda.matmul: "tf32", cudnn.conv: "tf32"}
    for owner, using in owners.items():
        read = functools.partial(getattr, owner, "fp32_precision")
        found.append((read, functools.partial(setattr, owner, "fp32_precision"), "ieee", using))
    return found


# --- not waiting for the device ------------------------------------------------------------------


def _cuda() -> Any:
    """Torch's CUDA device where Keras computes on one (`KERAS_TORCH_DEVICE` may say another)."""
    if keras.backend.backend() != "torch":
        return None
    device = keras.ops.zeros(()).device
    return device if device.type == "cuda" else None


class Sender:
    """Sends batches to torch's CUDA device while it still computes; elsewhere changes nothing.

    Page-locked memory lets the copy run without the processor, a stream of its own beside the
    kernels of the step before; nobody waits but the kernels that read the batch.

    Attributes:
        device: Where they go; `None` where they stay.
    """

    def __init__(self):
        self.device, self._stream = _cuda(), None
        if self.device is not None:
            import torch

            self._stream = torch.cuda.Stream(self.device)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array to put a batch together in: what it holds is sent without another copy."""
        if self._stream is None:
            return np.empty(shape, dtype)
        import torch

        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=kind, pin_memory=True).numpy()

    def __call__(self, batch: tuple) -> tuple:
        """The arrays of a batch as tensors on the device, uint8 as uint8."""
        if self._stream is None:
            return batch
        import torch

        def locked(array: np.ndarray) -> torch.Tensor:
            # The tensor behind an array of `empty`, for torch keeps that until it is copied.
            whole = isinstance(array.base, torch.Tensor) and array.base.shape == array.shape
            return (array.base if whole else torch.from_numpy(array)).pin_memory()

        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            sent = tuple(locked(array).to(self.device, non_blocking=True) for array in batch)
        self.wait()
        for tensor in sent:
            tensor.record_stream(current)  # its memory is not reused before the kernels are through
        return sent

    def wait(self) -> None:
        """Lets the kernels that are started from now on wait for what was sent; nobody else does.

        A call does it for its own thread, which may have another stream than the one that computes.
        """
        if self._stream is not None:
            import torch

            torch.cuda.current_stream(self.device).wait_stream(self._stream)


def fetch(value: Any) -> Callable[[], np.ndarray]:
    """Begins to copy a tensor to the host; the function that is given waits for it, and gives it.

    On torch's CUDA devices and on jax that waits for what had been begun before this call alone;
    TensorFlow waits for all that is under way when it is asked.
    """
    backend, copied = keras.backend.backend(), None
    if backend == "jax":
        value.copy_to_host_async()
    elif backend == "torch" and value.device.type == "cuda":
        import torch

        copied, stream = torch.cuda.Event(), torch.cuda.current_stream(value.device)
        value = value.detach().to("cpu", non_blocking=True)  # torch puts it in page-locked memory
        copied.record(stream)

    def get() -> np.ndarray:
        if copied is not None:
            copied.synchronize()
        return keras.ops.convert_to_numpy(value)

    return get


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """For steps of Keras on torch's CUDA device: numbers get there without a wait for its work.

    Keras makes a tensor of each number that it computes with (the size of a batch, the 1 that a
    counter grows by) with `torch.as_tensor`, whose copy to a device waits until all that is under
    way is done: four times in a plain step. In this block a number is filled in on the device, and
    lists and arrays are copied from page-locked memory.
    """
    place = _cuda()
    if place is None:
        yield
        return
    import torch

    as_tensor = torch.as_tensor

    def sent(data, dtype=None, device=None):
        apart = device is not None and torch.device(device).type == place.type
        if apart and isinstance(data, (bool, int, float)):
            return torch.full((), data, dtype=dtype, device=device)
        if apart and isinstance(data, (list, tuple, np.ndarray)):
            return as_tensor(data, dtype=dtype).pin_memory().to(device, non_blocking=True)
        return as_tensor(data, dtype=dtype, device=device)

    torch.as_tensor = sent
    try:
        yield
    finally:
        torch.as_tensor = as_tensor


@contextlib.contextmanager
def fastest_convolutions() -> Iterator[None]:
    """CuDNN tries its kernels at the first batch of a shape, as in torchvision's training.

    Not where deterministic kernels are asked for: which is the fastest differs from run to run.
    """
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        cudnn.benchmark = before


def cudnn_benchmark() -> bool | None:
    """Whether cuDNN tries its kernels; `None` where torch does not run."""
    if keras.backend.backend() != "torch":
        return None
    import torch

    return torch.backends.cudnn.benchmark


def release_memory() -> None:
    """Gives the memory of what is no longer used back to torch's CUDA device."""
    gc.collect()
    if _cuda() is not None:
        import torch

        torch.cuda.empty_cache()


def sync(model: keras.Model) -> None:
    """Brings the weights that a running `fit` holds (on jax) back into the model's variables."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def random_state() -> dict[str, np.ndarray]:
    """What draws random numbers outside Keras' variables: on torch, dropout does."""
    if keras.backend.backend() != "torch":
        return {}
    import torch

    states = {"random/cpu": torch.get_rng_state().numpy()}
    if torch.cuda.is_available():
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"random/cuda{i}"] = state.numpy()
    return states


def set_random_state(states: dict[str, np.ndarray]) -> None:
    """Puts back what `random_state` gave."""
    if "random/cpu" not in states:
        return
    import torch

    torch.set_rng_state(torch.from_numpy(np.array(states["random/cpu"])))
    for i in range(torch.cuda.device_count()):
        if f"random/cuda{i}" in states:
            torch.cuda.set_rng_state(torch.from_numpy(np.array(states[f"random/cuda{i}"])), i)
