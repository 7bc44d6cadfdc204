"""LiteRT: described and run."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from keras_resnet.runtimes.formats import METADATA_FILE, to_json
from keras_resnet.runtimes.runner import FileRunner


class Runner(FileRunner):
    """LiteRT on a `.tflite` file."""

    runtime = "litert"
    reads = ("litert",)

    def _open(self, path, precision, threads):
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(os.fspath(path), num_threads=threads)
        self._interpreter.allocate_tensors()
        text = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if METADATA_FILE in archive.namelist():
                    text = archive.read(METADATA_FILE).decode("utf-8")
        ends = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        shapes = (ports[0]["shape_signature"] for ports in ends)
        return text, *(tuple(None if n == -1 else int(n) for n in shape) for shape in shapes)

    def _run(self, images):
        port = self._interpreter.get_input_details()[0]
        if tuple(port["shape"]) != images.shape:
            self._interpreter.resize_tensor_input(port["index"], images.shape)
            self._interpreter.allocate_tensors()
        self._interpreter.set_tensor(port["index"], images)
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._interpreter.get_output_details()[0]["index"])

    @staticmethod
    def finish(path: Path, description: dict[str, Any]) -> None:
        # As in TensorFlow Lite's own metadata: a zip archive behind the model, which `unzip` opens.
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(METADATA_FILE, to_json(description))
            names = description["info"].get("class_names")
            if names and not any("\n" in name for name in names):
                archive.writestr("labels.txt", "\n".join(names) + "\n")
