"""Lets Keras find this package's classes without importing Keras.

Importing Keras imports a whole backend: seconds, and gigabytes on some machines. Reading a weight
file or printing the command line's help needs none of it. But a `.keras` file with this package's
layers must load after nothing more than `import keras_resnet`, so the modules that register
classes are imported as soon as somebody imports Keras.

That somebody may be one of those modules. So that none of them is half there at that moment, the
folders that they and what they import live in (`layers`, `models`, `training`) begin with `import
keras` in their `__init__.py`: whoever imports a file of theirs imports Keras first, and its
registration is complete before the file begins.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys

from keras_resnet.system.process import BACKENDS, choose_backend, importing_keras, keras_json

REGISTERING = (
    "layers", "models.image_model", "training.metrics", "training.optimizers", "training.schedules",
)  # fmt: skip


def register_with_keras() -> None:
    """Imports the modules that register classes: now, or right after Keras is imported."""
    if "keras" in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # where TensorFlow is imported later
        _import_registering()
    else:
        sys.meta_path.insert(0, _WhenKerasIsImported())


def _import_registering() -> None:
    for name in REGISTERING:
        importlib.import_module(f"keras_resnet.{name}")


class _WhenKerasIsImported(importlib.abc.MetaPathFinder):
    """Finds Keras where it is, with a backend that is there, and registers when it is imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "keras":
            return None
        # What it raises is said again at the next attempt. Keras' backends for inference alone can
        # run its layers, and some of this package's.
        choose_backend((*BACKENDS, "numpy", "openvino"))
        sys.meta_path.remove(self)  # once is enough
        spec = importlib.util.find_spec("keras")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                settings = keras_json()
                known = settings.exists()
                try:
                    with importing_keras():
                        execute(module)
                except BaseException:
                    # Keras writes its settings first: of an import that failed they would decide
                    # on the backend for ever.
                    if not known:
                        settings.unlink(missing_ok=True)
                    sys.meta_path.insert(0, self)
                    raise
                _import_registering()

            spec.loader.exec_module = execute_and_register
        return spec
