"""How far a float32 training of the reference is from itself, by its roundings alone.

Where a ReLU's input, or the two largest of a max pooling, are within a rounding error of each
other, float32 falls either way, and a gradient moves by percents. Which way depends on the CPU's
instructions, the number of threads and the order in memory: on a CPU without AVX-512 torchvision's
ResNet-18 of `test_training_parity.py` in channels_last parts from itself in contiguous memory by
2.7e-3 after twenty steps, although each step is right to 1e-7 (torch 2.13). So a test of gradients
holds float64 to a strict tolerance, and float32 to the same base tolerance, or where that fails,
to `FACTOR` times what the reference differs from itself on the machine that runs.
"""

from __future__ import annotations

import contextlib

import numpy as np

FACTOR = 3


def _same(x):
    return x


def _channels_last(x):
    if isinstance(x, np.ndarray) or x.ndim != 4:
        return x
    import torch

    return x.contiguous(memory_format=torch.channels_last)


def _nudged(seed):
    """Every value moved by one or two units in its last place."""

    def change(x):
        signs = np.random.default_rng(seed).choice([1 - 2**-23, 1 + 2**-23], size=tuple(x.shape))
        signs = signs.astype("float32")
        if isinstance(x, np.ndarray):
            return x * signs
        import torch

        return x * torch.from_numpy(signs)

    return change


@contextlib.contextmanager
def _torch_with(threads, onednn):
    if threads is None and onednn:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.backends.mkldnn.flags(enabled=onednn):
            yield
    finally:
        torch.set_num_threads(before)


# Threads (None for those that are), oneDNN's kernels or torch's own, and the change of the input.
WAYS = [
    (None, True, _channels_last),
    *[(None, True, _nudged(seed)) for seed in range(4)],
    (1, True, _same),
    (2, True, _same),
    (None, False, _same),
]


def allowed(base, found, run, plain, difference):
    """The tolerance for `found`: `base`, or where that fails what the reference's spread allows.

    The spread is the largest difference of the reference computed in other ways from itself. No
    more ways are gone than it takes to see that `found` is within it.

    Args:
        base: The tolerance where nothing falls the other way.
        found: What is to be judged, a number or an array of numbers.
        run: Takes a function to call on the reference's input (a torch tensor or an array) before
            it is used, and returns what the reference computes from it.
        plain: What `run` returns for an unchanged input.
        difference: Of two such results, in the units of `found`.
    """
    limit = np.array(base, "float64")
    for threads, onednn, change in WAYS:
        if np.all(found <= limit):
            break
        with _torch_with(threads, onednn):
            limit = np.maximum(limit, FACTOR * np.array(difference(run(change), plain)))
    if (limit > base).any():
        print(f"off by {found}, above {base}; by the reference's own spread, {limit} is allowed")
    return limit
