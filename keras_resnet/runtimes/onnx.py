"""ONNX: written, described and run."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, ClassVar

import keras
import numpy as np

from keras_resnet.layers.conv import Conv2D
from keras_resnet.runtimes.formats import INPUT, METADATA, to_json
from keras_resnet.runtimes.runner import FileRunner, sizes
from keras_resnet.runtimes.writing import all_layers, clone
from keras_resnet.system.device import tf32_allowed


class Runner(FileRunner):
    """ONNX Runtime on an `.onnx` file, on a GPU where its package for one is installed."""

    runtime = "onnxruntime"
    fixes_batch = True  # Keras takes another exporter for fixed sizes
    splits = True
    reads = ("onnx",)
    quantizers: ClassVar = {"onnxruntime": "onnx"}

    def _open(self, path, precision, threads):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads // self._parts
        options.log_severity_level = 3
        settings = {"CUDAExecutionProvider": {"use_tf32": str(int(tf32_allowed()))}}
        providers = [(name, settings.get(name, {})) for name in _gpu_providers()]
        self._session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=[*providers, "CPUExecutionProvider"]
        )
        # It falls back to the CPU where a driver or a library is missing.
        running = self._session.get_providers()[0].removesuffix("ExecutionProvider")
        if running != "CPU":
            self.name += f" on {running}"
        given, output = self._session.get_inputs()[0], self._session.get_outputs()[0]
        self._input = given.name
        text = self._session.get_modelmeta().custom_metadata_map.get(METADATA)
        return text, sizes(given.shape), sizes(output.shape)

    def _run(self, images):
        return self._session.run(None, {self._input: images})[0]

    @staticmethod
    def accelerator() -> str | None:
        """The first kind of GPU that the installed package has code for."""
        return next(iter(_gpu_providers()), None)

    @staticmethod
    def prepare(model: keras.Model) -> keras.Model:
        """The network without calls of XLA, on TensorFlow."""
        return _without_xla(model) if keras.backend.backend() == "tensorflow" else model

    @staticmethod
    def finish(path: Path, description: dict[str, Any]) -> None:
        """Names input and output, sets the batch, and writes the description into the file."""
        import onnx

        model = onnx.load(path)
        graph = model.graph
        # tf2onnx makes inputs of constants that a function captured, and folds them away later.
        used = {name for node in graph.node for name in node.input}
        for value in [value for value in graph.input if value.name not in used]:
            graph.input.remove(value)
        (given,) = graph.input
        output = graph.output[0]
        renamed = {given.name: INPUT, output.name: description["output"]}
        for node in graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        batch = description["input"]["shape"][0]
        for value in (given, output):
            value.name = renamed[value.name]
            size = value.type.tensor_type.shape.dim[0]
            size.Clear()
            if batch is None:
                size.dim_param = "batch"
            else:
                size.dim_value = batch
        del graph.value_info[:]  # of the old names and sizes; a runtime finds its own
        describe_onnx(model, description)
        onnx.save(model, path)

    @staticmethod
    def quantize(path: Path, description: dict[str, Any], batches: list[np.ndarray]) -> None:
        import onnx
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self):
                self._batches = iter(batches)

            def get_next(self):
                batch = next(self._batches, None)
                return None if batch is None else {INPUT: batch}

        folded, fresh = path.with_name("folded.onnx"), path.with_name("int8.onnx")
        # The root logger is told to run this first, which it does here.
        logging.getLogger().addFilter(_no_advice)
        try:
            # Batch norms go into the convolutions, so that their ranges are those of one operation.
            quant_pre_process(os.fspath(path), os.fspath(folded), skip_symbolic_shape=True)
            quantize_static(
                os.fspath(folded),
                os.fspath(fresh),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.getLogger().removeFilter(_no_advice)
        model = onnx.load(fresh)
        describe_onnx(model, description)
        folded.unlink()
        fresh.unlink()
        onnx.save(model, path)


def _gpu_providers() -> list[str]:
    import onnxruntime

    known = ("CUDAExecutionProvider", "ROCMExecutionProvider", "MIGraphXExecutionProvider")
    return [name for name in known if name in onnxruntime.get_available_providers()]


def _without_xla(model: keras.Model) -> keras.Model:
    """The same network with grouped convolutions that tf2onnx can read.

    Keras compiles them with XLA, as TensorFlow cannot run them on a CPU; tf2onnx finds a call of a
    function there and leaves it in the file. Written and not run, they may be what they are.
    """
    if not any(getattr(layer, "groups", 1) > 1 for layer in all_layers(model)):
        return model

    class GroupedConv2D(Conv2D):
        def convolution_op(self, inputs, kernel):
            return self.padding_convolution(inputs, kernel)

    def plain(layer):
        if isinstance(layer, keras.Model):
            return _without_xla(layer)
        if isinstance(layer, keras.layers.Conv2D) and layer.groups > 1:
            return GroupedConv2D.from_config(layer.get_config())
        return type(layer).from_config(layer.get_config())

    return clone(model, plain)


def describe_onnx(model, description: dict[str, Any]) -> None:
    """Writes what is known about a model into an `onnx.ModelProto`."""
    import onnx

    properties = {METADATA: to_json(description)}
    names = description["info"].get("class_names")
    if names:  # for tools that look for the classes alone
        properties["class_names"] = json.dumps(list(names), ensure_ascii=True)
    onnx.helper.set_model_props(model, properties)
    model.doc_string = "; ".join(description["steps_before_the_model"])
    model.producer_name = description["written_by"]


def _no_advice(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in record.getMessage()
