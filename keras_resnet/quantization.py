"""Exported files in eight-bit integers, with ranges taken from pictures."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet import formats
from keras_resnet.errors import InputError, MissingDependencyError

# By format, the packages (import name to extra) that quantise it.
_NEEDS = {
    "onnx": {"onnxruntime": "onnx"},
    "openvino": {"nncf": "int8"},
}


def check(name: str) -> None:
    """Says before any work that a format cannot be quantised here.

    Raises:
        InputError: Nothing quantises that format.
        MissingDependencyError: A package is missing; the message has the pip line.
    """
    if name not in _NEEDS:
        raise InputError(f"int8 can be had in {' or '.join(_NEEDS)}, not in {name}.")
    for module, extra in _NEEDS[name].items():
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(
                f"int8 in {name} needs the package {module!r}: "
                f'pip install "keras3-resnet[{extra}]".'
            )


def quantize(
    path: Path, name: str, description: dict[str, Any], batches: list[np.ndarray], source: str
) -> None:
    """Turns an exported file into one of eight-bit weights and activations, in its place.

    Args:
        path: The float32 file.
        name: Its format, `"onnx"` or `"openvino"`.
        description: What it says about its model; the calibration is added.
        batches: Inputs to take the ranges from, NHWC float32.
        source: Where they come from, to be noted.
    """
    if keras.config.image_data_format() == "channels_first":
        batches = [batch.transpose(0, 3, 1, 2) for batch in batches]
    size = description["input"]["shape"][0]
    if size is not None:  # a file of one batch size
        batches = [np.repeat(batch, size, axis=0) for batch in batches]
    description = {
        **description,
        "precision": "int8",
        "calibration": {"pictures": len(batches), "folder": source},
    }
    if name == "onnx":
        _quantize_onnx(path, description, batches)
    else:
        _quantize_openvino(path, description, batches)


def _quantize_onnx(path: Path, description: dict[str, Any], batches: list[np.ndarray]) -> None:
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
            return None if batch is None else {formats.INPUT: batch}

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
    formats.describe_onnx(model, description)
    folded.unlink()
    fresh.unlink()
    onnx.save(model, path)


def _no_advice(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in record.getMessage()


def _quantize_openvino(path: Path, description: dict[str, Any], batches: list[np.ndarray]) -> None:
    import nncf
    import openvino as ov

    level = logging.getLogger("nncf").level
    nncf.set_log_level(logging.ERROR)
    try:
        model = nncf.quantize(
            ov.Core().read_model(path),
            nncf.Dataset(batches),
            subset_size=len(batches),
        )
    finally:
        nncf.set_log_level(level or logging.INFO)
    formats.save_openvino(model, path, description)
