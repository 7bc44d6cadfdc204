"""`models`, `summary` and `info`."""

from __future__ import annotations

from pathlib import Path

import keras_resnet as kr
from keras_resnet.runtimes.rows import FORMATS
from keras_resnet.system.errors import InputError, did_you_mean
from keras_resnet.variants import SPECS, get_spec
from keras_resnet.weights.keras_files import find_keras_file
from keras_resnet.weights.matching import multiply_adds, parameter_count
from keras_resnet.weights.published import registry, timm_registry


def models(pattern: str, weights: bool) -> None:
    """Prints the table of models, or of the weights that are known by name."""
    names = kr.list_models(pattern)
    if not names:
        raise InputError(f"No model matches {pattern!r}.{did_you_mean(pattern, SPECS)}")
    if weights:
        return _weights(names)
    width = max(map(len, names))
    print(f"{'Model':{width}}  {'Parameters':>11}  {'GFLOPs':>6}  {'Input':>7}  Published top-1")
    for name in names:
        spec = SPECS[name]
        size, count, gflops = spec.input_size, parameter_count(spec), multiply_adds(spec) / 1e9
        known = [f"{row.acc1:.3f} ({row.tag})" for row in registry() if row.model == name]
        start = f"{name:{width}}  {count:>11,}  {gflops:6.3f}  {size:>3}x{size:<3}"
        print(f"{start}  {', '.join(known) or '-'}")


def _weights(names: list[str]) -> None:
    """Variant, what `weights=` takes, MB in float32, ImageNet top-1 and at which side, licence."""
    rows = [
        (row.model, row.tag, row.acc1, row.crop_size, "torchvision", "BSD-3-Clause")
        for row in registry()
    ]
    rows += [
        (row.model, f"timm/{row.name}", row.acc1, row.side, "timm", row.licence)
        for row in timm_registry()
    ]
    rows = sorted((row for row in rows if row[0] in names), key=lambda row: names.index(row[0]))
    if not rows:
        raise InputError(f"No weights are known by name for {', '.join(names)}: give a file.")
    width, long = (max(len(row[i]) for row in rows) for i in (0, 1))
    print(f"{'Model':{width}}  {'weights=':{long}}  {'MB':>5}  Top-1   At   By           Licence")
    for name, text, acc1, side, source, licence in rows:
        size = parameter_count(SPECS[name]) * 4e-6
        start = f"{name:{width}}  {text:{long}}  {size:5.0f}  {acc1:.3f}  {side:<3}"
        print(f"{start}  {source:<11}  {licence}")


def summary(model: str, input_size: int | None, num_classes: int | None) -> None:
    """Prints a model layer by layer."""
    if model.endswith(".keras") or Path(model).exists():
        path = find_keras_file(model)
        made = kr.load_model(path)
    else:
        side = input_size or get_spec(model).input_size
        from keras_resnet.system.device import image_shape

        shape = image_shape(side, side, 3)
        made = kr.create_model(model, input_shape=shape, num_classes=num_classes)
    print(kr.summary(made, input_size))


def info() -> None:
    """Prints what is in use, line by line: for a look, and to go into a report of a bug."""
    from keras_resnet.system.device import environment, installed_version

    found = {row.module: installed_version(row.module) for row in FORMATS.values()}
    there = [f"{module} {version}" for module, version in found.items() if version]
    facts = {**environment(), "engines": ", ".join(["keras", *there])}
    for name, value in facts.items():
        print(f"{name:<13} {value}")
