"""What is known about the running backend: its version, its devices, its determinism."""

from __future__ import annotations

import contextlib
import importlib.metadata

import keras
import numpy as np


def devices() -> list[str]:
    """The devices that the backend computes on, for people.

    Examples:
        >>> len(devices()) >= 1
        True
    """
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        # What Keras picks by itself where there is no CUDA.
        return ["mps" if torch.backends.mps.is_available() else "cpu"]
    if backend == "tensorflow":
        import tensorflow as tf

        found = tf.config.list_logical_devices("GPU")
        return [device.name for device in found] or ["cpu"]
    import jax

    return [str(device.device_kind) for device in jax.devices()]


def backend_version() -> str:
    """Version of the backend's package; `"?"` where it is not known."""
    backend = keras.backend.backend()
    for name in (backend, f"{backend}-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "?"


def package_version() -> str:
    """This package's version as installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("keras3-resnet")
    return "unknown"


def backend_line() -> str:
    """The backend, its version and device in one line, which every command prints."""
    name = f"{keras.backend.backend()} {backend_version()}"
    return f"{name} on {', '.join(devices())}, Keras {keras.__version__}"


def in_data_format(images: np.ndarray, data_format: str | None = None) -> np.ndarray:
    """A batch of images in the order of a data format.

    Args:
        images: `(n, height, width, channels)`.
        data_format: `"channels_last"` or `"channels_first"`; Keras' setting by default.

    Returns:
        The same array, or `(n, channels, height, width)` in an order of its own in memory.

    Examples:
        >>> in_data_format(np.zeros((2, 32, 24, 3)), "channels_first").shape
        (2, 3, 32, 24)
    """
    if (data_format or keras.config.image_data_format()) == "channels_first":
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images


def image_shape(height: int | None, width: int | None, channels: int) -> tuple[int | None, ...]:
    """The shape of an image in the order of Keras' data format."""
    last = keras.config.image_data_format() == "channels_last"
    return (height, width, channels) if last else (channels, height, width)


def make_deterministic() -> None:
    """Asks the backend for deterministic kernels, where it has a choice."""
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)
    elif backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


class Sender:
    """Sends batches to torch's CUDA device while it still computes; elsewhere changes nothing.

    Pinned memory lets the copy run without the processor, a stream of its own beside the kernels
    of the step before; nobody waits but the kernels that read the batch.
    """

    def __init__(self):
        self._stream = None
        if keras.backend.backend() == "torch":
            import torch

            if torch.cuda.is_available():
                self._stream = torch.cuda.Stream()

    def __call__(self, batch: tuple) -> tuple:
        """The arrays of a batch as tensors on the device, uint8 as uint8."""
        if self._stream is None:
            return batch
        import torch

        current = torch.cuda.current_stream()
        with torch.cuda.stream(self._stream):
            sent = tuple(
                torch.from_numpy(array).pin_memory().to(current.device, non_blocking=True)
                for array in batch
            )
        current.wait_stream(self._stream)
        for tensor in sent:
            tensor.record_stream(current)  # its memory is not reused before the kernels are through
        return sent


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
