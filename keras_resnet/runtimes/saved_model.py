"""TensorFlow's SavedModel: described and run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from keras_resnet.runtimes.formats import METADATA_FILE, to_json
from keras_resnet.runtimes.runner import FileRunner


class Runner(FileRunner):
    """TensorFlow on a SavedModel folder."""

    runtime = "tensorflow"
    reads = ("saved_model",)

    def _open(self, path, precision, threads):
        import tensorflow as tf

        self._loaded = tf.saved_model.load(os.fspath(path))
        function = self._loaded.signatures["serving_default"]
        (given,) = function.structured_input_signature[1].values()
        (output,) = function.structured_outputs.values()
        self._function, self._input = function, given.name
        about = path / "assets.extra" / METADATA_FILE
        text = about.read_text(encoding="utf-8") if about.is_file() else None
        return text, tuple(given.shape), tuple(output.shape)

    def _run(self, images):
        import tensorflow as tf

        (output,) = self._function(**{self._input: tf.constant(images)}).values()
        return output.numpy()

    @staticmethod
    def finish(path: Path, description: dict[str, Any]) -> None:
        # TensorFlow's place for files that are not the graph's.
        extra = path / "assets.extra"
        extra.mkdir(exist_ok=True)
        (extra / METADATA_FILE).write_text(to_json(description), encoding="ascii")
