"""Keras' own tests as a yardstick: `keras_tests.py` runs, with a checkout of Keras and without."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("keras_tests.py")


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.once
def test_without_a_checkout_it_is_skipped(tmp_path):
    done = run(str(tmp_path))
    assert done.returncode == 0
    assert done.stdout == f"Skipped: there is no checkout of Keras. Received: {tmp_path}.\n"


@pytest.mark.slow
def test_what_differs_from_keras_has_a_reason(backend):
    checkout = os.environ.get("KERAS_CHECKOUT")
    if checkout is None or backend == "jax":
        pytest.skip("KERAS_CHECKOUT names no checkout of Keras (torch and TensorFlow)")
    done = run(checkout)
    assert done.returncode == 0, done.stdout[-4000:]
