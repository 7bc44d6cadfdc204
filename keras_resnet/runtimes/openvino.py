"""OpenVINO: written, described and run."""

from __future__ import annotations

import logging
import os
import queue
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from keras_resnet.runtimes.formats import INPUT, METADATA, to_json
from keras_resnet.runtimes.runner import FileRunner
from keras_resnet.system.errors import NotFoundError


class Runner(FileRunner):
    """OpenVINO on an `.xml` file and the `.bin` beside it, or on an `.onnx` file."""

    runtime = "openvino"
    splits = True
    reads = ("openvino", "onnx")
    quantizers: ClassVar = {"nncf": "int8"}
    precisions = ("float32", "bfloat16", "float16")

    def _open(self, path, precision, threads):
        import openvino as ov

        weights = path.with_suffix(".bin")
        if path.suffix == ".xml" and not weights.is_file():
            raise NotFoundError(f"{str(weights)!r} is missing: it belongs to {path.name!r}.")
        core = ov.Core()
        model = core.read_model(path)
        hints = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
        # Left alone, it computes in bfloat16 where the processor can.
        options = {"INFERENCE_PRECISION_HINT": hints[precision], "PERFORMANCE_HINT": "LATENCY"}
        gpu = self.accelerator()
        if gpu is None:
            options["INFERENCE_NUM_THREADS"] = str(threads)
            options["NUM_STREAMS"] = str(self._parts)
        else:
            self.name += f" on {core.get_property(gpu, 'FULL_DEVICE_NAME')}"
        self._model = core.compile_model(model, gpu or "CPU", options)
        # One for each thread that may ask at once; any others wait.
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(self._parts):
            self._requests.put(self._model.create_infer_request())
        places = ([METADATA], ["framework", METADATA])  # .xml, .onnx
        found = (str(model.get_rt_info(keys).value) for keys in places if model.has_rt_info(keys))
        shapes = [
            tuple(size.get_length() if size.is_static else None for size in port.partial_shape)
            for port in (model.inputs[0], model.outputs[0])
        ]
        return next(found, None), *shapes

    def _run(self, images):
        request = self._requests.get()
        try:
            # A copy: the request's own buffer is written over by the next batch.
            return np.array(request.infer([images], share_inputs=True)[0])
        finally:
            self._requests.put(request)

    @staticmethod
    def accelerator() -> str | None:
        """The first of Intel's GPUs."""
        import openvino as ov

        return next((name for name in ov.Core().available_devices if name.startswith("GPU")), None)

    @staticmethod
    def finish(path: Path, description: dict[str, Any]) -> None:
        import openvino as ov

        model = ov.Core().read_model(path)
        # Keras' constants that were not folded come out as further results, behind the model's.
        model = ov.Model([model.get_results()[0]], model.get_parameters(), description["name"])
        shape = [-1 if size is None else size for size in description["input"]["shape"]]
        model.reshape({model.inputs[0]: ov.PartialShape(shape)})
        model.inputs[0].tensor.set_names({INPUT})
        model.outputs[0].tensor.set_names({description["output"]})
        save_openvino(model, path, description)

    @staticmethod
    def quantize(path: Path, description: dict[str, Any], batches: list[np.ndarray]) -> None:
        import nncf
        import openvino as ov

        level = logging.getLogger("nncf").level
        nncf.set_log_level(logging.ERROR)
        try:
            model = nncf.quantize(
                ov.Core().read_model(path), nncf.Dataset(batches), subset_size=len(batches)
            )
        finally:
            nncf.set_log_level(level or logging.INFO)
        save_openvino(model, path, description)

    @staticmethod
    def files(path: Path) -> list[Path]:
        """The weights, and the graph that wants them."""
        return [path.with_suffix(".bin"), path]


def save_openvino(model, path: Path, description: dict[str, Any]) -> None:
    """Writes an OpenVINO model, in float32, with its description, over the file it came from."""
    import openvino as ov

    model.set_rt_info(to_json(description), METADATA)
    # What was read lies in a mapped file: the new one is made beside it.
    fresh = path.with_name(f"new-{path.name}")
    ov.save_model(model, fresh, compress_to_fp16=False)
    del model
    os.replace(fresh.with_suffix(".bin"), path.with_suffix(".bin"))
    os.replace(fresh, path)
