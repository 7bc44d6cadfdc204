"""`scan`, and what is done to files of models: `inspect`, `convert`, `verify` and `export`."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import Any, TextIO

import keras_resnet as kr
from keras_resnet.cli import checks
from keras_resnet.cli.pipes import answer, piped, say_backend
from keras_resnet.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from keras_resnet.runtimes.rows import check_target, default_path, format_for
from keras_resnet.system.errors import InputError, NotFoundError, VerificationError
from keras_resnet.system.files import write_text
from keras_resnet.system.process import tune_process
from keras_resnet.weights.keras_files import inspect_keras_file, run_models
from keras_resnet.weights.published import published_by_torchvision


def scan(
    directory: str, json: str | None, sheet: str | None, exclude_list: str | None,
    columns: str | None, label_regex: str | None, **options: Any,
) -> None:  # fmt: skip
    """Says what may spoil training on a folder."""
    tune_process()
    images = checks.images(directory, columns, label_regex, ["weight"])
    with piped(json) as stdout:
        report = kr.scan(images, **options)
        answer(report, json, report.to_json(), stdout)
        if sheet:
            print(f"{report.save_sheet(sheet)} images in {sheet}")
        if exclude_list:
            count = report.write_exclude_list(exclude_list)
            print(f"{count} files to leave out in {exclude_list}")


def pack(directory: str, columns: str | None, label_regex: str | None, **options: Any) -> None:
    """Writes images into tar shards."""
    print(kr.pack(checks.images(directory, columns, label_regex), **options))


def inspect(file: str, key: str | None, json: str | None, tensors: bool) -> int:
    """Says what a weight file is; 1 where it is refused or damaged."""
    with piped(json) as stdout:
        if file.endswith(".keras") or run_models(Path(file)):
            found = inspect_keras_file(file)
            answer(found, json, found.to_json(), stdout)
            return 0
        return _inspect_checkpoint(file, key, json, tensors, stdout)


def _inspect_checkpoint(
    file: str, key: str | None, json: str | None, tensors: bool, stdout: TextIO | None
) -> int:
    from keras_resnet.system.progress import byte_bar

    info = kr.inspect_checkpoint(file, key=key)
    with byte_bar(f"sha256 of {info.path.name}", info.size) as progress:
        digest = info.hash(progress)
    lines = str(info).split("\n")
    lines = [line for line in lines if tensors or not line.startswith("    ")]
    verdict = _what_it_is(info, digest)
    lines += [f"  sha256   {digest}", *([f"  is       {verdict}"] if verdict else [])]
    facts = {**json_text.loads(info.to_json()), "sha256": digest, "is": verdict}
    answer("\n".join(lines), json, json_text.dumps(facts, indent=2), stdout)
    return 0 if info.safe and info.problem is None else 1


def _what_it_is(info, digest: str) -> str:
    """Which model a checkpoint fits, and which published file it is."""
    published = published_by_torchvision(digest)
    if published is not None:
        return f"torchvision's {published.model} {published.tag}, published as {published.url}"
    if len(info.networks) > 1:
        return f"{len(info.networks)} networks: --key says which"
    return f"weights for {info.networks[0]}" if info.networks else ""


def convert(
    source: str, target: str, class_names: str | None,
    image_size: int | None, resize_size: int | None,
    mean: list[float] | None, std: list[float] | None, **options: Any,
) -> int:  # fmt: skip
    """Turns a weight file into another; 1 where the two disagree."""
    preprocess = None
    if options["pixels"] and (mean or std):
        raise InputError("--pixels says what --mean and --std would: give one of them.")
    if any((image_size, resize_size, mean, std)):
        colors = {"mean": mean or IMAGENET_MEAN, "std": std or IMAGENET_STD}
        preprocess = Preprocess.for_size(image_size or 224, resize_size, **colors)
    names = None if class_names is None else _read_names(class_names)
    result = kr.convert_file(source, target, class_names=names, preprocess=preprocess, **options)
    print(result)
    write_text(f"{target}.report.json", result.to_json() + "\n")
    return 0 if result.passed else 1


def _read_names(path: str) -> list[str]:
    """Class names out of a text file (one a line) or JSON (a list, or index to name)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise NotFoundError(f"Cannot read class names from {path!r}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InputError(f"Class names are read from UTF-8 text; {path!r} is none.") from None
    if not path.endswith(".json"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = json_text.loads(text)
        if isinstance(names, dict):
            names = [names[str(i)] for i in range(len(names))]
        if not isinstance(names, list) or not {type(name) for name in names} <= {str, int}:
            raise TypeError
        return list(map(str, names))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{path!r} must hold a JSON list of names, or numbers from 0 to names."
        ) from None


def verify(model: str, source: str, json: str | None, **options: Any) -> int:
    """Compares a model with the file it came from; 1 where they disagree."""
    with piped(json) as stdout:
        report = kr.verify(kr.load_model(model), source, **options)
        answer(report, json, report.to_json(), stdout)
    return 0 if report.passed else 1


def export(
    model: str, format: str | None, output: str | None, pictures: list[str] | None, **options: Any
) -> int:
    """Writes a model for another runtime; 1 where it gives other numbers."""
    if output is None and format is None:
        raise InputError("Say which: --format onnx, openvino, saved_model, litert or torch.")
    target = default_path(model, format) if output is None else output
    check_target(target, format_for(target, format))
    say_backend()
    images = pictures[0] if pictures and len(pictures) == 1 else pictures
    try:
        report = kr.export(model, target, format, pictures=images, **options)
    except VerificationError as error:
        print(error.report)
        print(f"keras-resnet: {error}", file=sys.stderr)
        return 1
    print(f"{report}\nWritten: {report.path}")
    return 0
