"""`export`: a model as a file for another runtime, run there and compared before it is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras
import numpy as np

from keras_resnet.data.preprocess import Preprocess, imagenet_colors
from keras_resnet.data.sources import Images
from keras_resnet.models.files import load_model, model_input, model_preprocess
from keras_resnet.models.image_model import as_functional, require_finite_weights
from keras_resnet.runtimes import formats, int8 as quantization, rows, writing
from keras_resnet.runtimes.int8 import Int8Images, Int8Report, spread
from keras_resnet.runtimes.runner import KerasRunner, Runner
from keras_resnet.runtimes.select import open_file, runtime_of
from keras_resnet.system.device import exact_float32, installed_version
from keras_resnet.system.errors import DataError, InputError, VerificationError, whole
from keras_resnet.system.files import named, printable, remove_leftovers, temporary_prefix
from keras_resnet.weights.verify import relative_difference

# Images that a file is compared on.
_COMPARED = 16


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An exported file beside its model, on one batch."""

    batch: int  # images in it
    difference: float  # the largest of two outputs, over the largest output


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export` wrote and found; `print` it.

    Attributes:
        path: The file or folder.
        format: Its format.
        size: Bytes.
        model: What the model is called.
        batch_size: The fixed one, or `None` for any.
        runtime: What ran the file, with its version; `None` where it was not run.
        pictures: How many it was compared on, and which.
        comparisons: One a batch size; those of an int8 file are for information.
        tolerance: What they were held to.
        int8: What calibration changed, if it was asked for.
        notes: What was assumed, in sentences.
        passed: Nothing is beyond its tolerance.
    """

    path: str
    format: str
    size: int
    model: str
    batch_size: int | None
    runtime: str | None
    pictures: str
    comparisons: list[Comparison]
    tolerance: float
    int8: Int8Report | None
    notes: list[str]
    passed: bool

    def __str__(self) -> str:
        batch = "any batch size" if self.batch_size is None else f"batches of {self.batch_size}"
        lines = [
            f"{printable(self.model)} as {self.format}, {self.size / 1e6:.1f} MB, {batch}",
            *self.notes,
        ]
        if self.runtime is None:
            lines.append("Not compared with the model.")
        else:
            lines.append(f"Run by {self.runtime} beside the model, on {self.pictures}:")
            lines += [
                f"  batch {one.batch}: differs by at most {one.difference:.2g} (relative)"
                for one in self.comparisons
            ]
        if self.int8 is not None:
            lines.append(str(self.int8))
        elif self.comparisons:
            worst = max(one.difference for one in self.comparisons)
            wrong = f"Differs by {worst:.2g}: more than the tolerance of {self.tolerance:g}."
            lines.append(f"Agrees to {self.tolerance:g}." if self.passed else wrong)
        return "\n".join(lines)


@exact_float32()
def export(
    model: keras.Model | str | os.PathLike,
    path: str | os.PathLike,
    format: str | None = None,
    *,
    verify: bool = True,
    pictures: str | os.PathLike | Sequence[str | os.PathLike] | np.ndarray | None = None,
    tolerance: float = 1e-4,
    batch_size: int | None = None,
    int8: str | os.PathLike | None = None,
    max_drop: float = 0.02,
) -> ExportReport:
    """Writes a model as a file for another runtime, and proves that it predicts alike there.

    Class names, preprocessing and everything else in `model.info` go along: in ONNX's
    `metadata_props`, OpenVINO's `rt_info`, a SavedModel's `assets.extra`, a zip archive behind a
    LiteRT model and inside torch's, as JSON under the name `keras_resnet`. `predict` and `evaluate`
    take the file like a `.keras` file. Whatever the model's dtype policy, the file is in float32.
    Its input is called `images`, in the model's layout; normalisation is inside where the model
    has it inside, decoding, resizing and cropping are described.

    Args:
        model: A model with one input and one output, a `.keras` file or a run folder.
        path: The file to write: `.onnx`, `.xml` (OpenVINO, with a `.bin` beside it), `.tflite`
            (LiteRT), `.pt2` (torch), or a folder (SavedModel).
        format: `"onnx"`, `"openvino"`, `"saved_model"`, `"litert"` or `"torch"`; by the path's
            suffix by default.
        verify: Run the file in its runtime, at batch 1 and at another batch size, and compare.
        pictures: To compare on: files, folders, or a batch that is the model's input, NHWC. By
            default the two photographs in scikit-learn's package.
        tolerance: Largest difference allowed, relative to the largest output.
        batch_size: A fixed one; any by default.
        int8: A folder of images, best one folder a class, to quantise with (ONNX by ONNX
            Runtime, OpenVINO by NNCF). Accuracy is then measured in place of the tolerance: on
            `pictures` if they are given, else on those of the folder that were not used.
        max_drop: Fraction of right predictions that int8 may cost; five times as many may be
            others where there are no labels.

    Returns:
        The `ExportReport`.

    Raises:
        VerificationError: The file differs from the model; it is not kept. Its `report` says how.
        InputError: A format that the backend cannot write (the message names one that can), or a
            model or a path that does not fit.
        MissingDependencyError: A package is missing; the message has the pip line.
        NotFoundError: A path does not exist.
        DataError: None of the images can be read.
    """
    path = Path(path).expanduser()
    name = rows.format_for(path, format)
    # All that can be said before the work.
    formats.check_backend(name)
    if verify or int8 is not None:
        runtime_of(name)
    if int8 is not None:
        quantization.check(name)
    rows.check_target(path, name)
    if batch_size is not None:
        whole("batch_size", batch_size, 1)
    if isinstance(model, (str, os.PathLike)):
        if rows.format_of_file(Path(model).expanduser()) is not None:
            raise InputError(
                f"{str(model)!r} is an exported file already; export the .keras file it came from."
            )
        model = load_model(model)
    model = as_functional(model)
    require_finite_weights(model)
    notes: list[str] = []
    prepared = _preprocess_for(model, notes)
    images, shown = _images(model, prepared, pictures) if verify else (None, "")
    calibration = None if int8 is None else Int8Images(model, prepared, int8, pictures)
    plain = _as_written(model, notes)
    with _staging(path) as folder:
        staged = folder / path.name
        description = writing.write(plain, staged, name, batch_size)
        before = writing.size_of(staged, name)
        if calibration is not None:
            quantization.quantize(
                staged, name, description, calibration.batches(), str(calibration.folder)
            )
        reference = KerasRunner(plain, optimize=False)
        runner = open_file(staged) if verify or calibration is not None else None
        comparisons = _compare(runner, reference, images) if verify else []
        int8_report = calibration and calibration.measure(reference, runner, before)
        version = installed_version(rows.FORMATS[name].module)
        report = ExportReport(
            path=str(path),
            format=name,
            size=writing.size_of(staged, name),
            model=model.name,
            batch_size=batch_size,
            runtime=runner and f"{runner.runtime} {version}",
            pictures=shown,
            comparisons=comparisons,
            tolerance=tolerance,
            int8=int8_report,
            notes=notes,
            passed=_passes(comparisons, tolerance, int8_report, max_drop),
        )
        if not report.passed:
            raise VerificationError(
                f"The {name} file does not predict as the model does, and is not kept.", report
            )
        del runner  # Windows does not move what is open
        for one in rows.FORMATS[name].runner.files(staged):
            _publish(one, path.with_name(one.name))
    return report


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A folder beside a file for what is not whole yet; a killed process' goes with the next."""
    remove_leftovers(path.parent)
    start = temporary_prefix("exporting")
    with (
        tempfile.TemporaryDirectory(
            prefix=start, dir=path.parent, ignore_cleanup_errors=True
        ) as folder,
        named(path),
    ):
        yield Path(folder)


def _as_written(model: keras.Model, notes: list[str]) -> keras.Model:
    """The model that the file is made of, and what differs in it."""
    if None in model.input_shape[1:]:
        height, width, _ = formats.input_size(model)
        notes.append(f"The model takes images of any size; the file takes {height}x{width}.")
    plain = writing.in_float32(model)
    if plain is not model:
        policies = " and ".join(sorted({layer.dtype_policy.name for layer in model.layers}))
        notes.append(f"The model computes in {policies}; file and comparison are in float32.")
    return plain


def _publish(staged: Path, target: Path) -> None:
    """Moves what is whole into its place."""
    for one in [staged] if staged.is_file() else [p for p in staged.rglob("*") if p.is_file()]:
        with open(one, "rb+") as stream:
            os.fsync(stream.fileno())
    if target.suffix == ".bin":
        # An .xml beside another's weights would load, and predict wrongly.
        target.with_suffix(".xml").unlink(missing_ok=True)
    if target.is_dir():  # a folder is not replaced in one step
        old = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
        os.rename(target, old)
        os.rename(staged, target)
        old.unlink() if old.is_symlink() else shutil.rmtree(old)
    else:
        os.replace(staged, target)


# --- comparing -----------------------------------------------------------------------------------


def _preprocess_for(model: keras.Model, notes: list[str]) -> Preprocess:
    if getattr(model, "info", {}).get("preprocess"):
        return model_preprocess(model)
    height, width, channels = formats.input_size(model)
    notes.append(
        f"The model does not say how its images are prepared: compared on {height}x{width} with "
        "ImageNet's normalisation. Set model.info['preprocess'] so that predict knows."
    )
    colors = imagenet_colors(channels)
    return Preprocess((height, width), None, color_mode=channels, **colors)


def _images(model: keras.Model, prepared: Preprocess, pictures) -> tuple[np.ndarray, str]:
    """A batch of the model's input, and what it shows."""
    if isinstance(pictures, np.ndarray):
        return pictures, f"{len(pictures)} given inputs"
    channels = formats.input_size(model)[2]
    if channels != prepared.channels:
        raise InputError(
            f"The model takes {channels} channels, images are read with {prepared.channels}: "
            "pass pictures= as a batch, an array (n, height, width, channels)."
        )
    if pictures is None:
        from sklearn.datasets import load_sample_image

        sources = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
        shown = "photographs of scikit-learn"
    else:
        sources = spread(list(Images(pictures)), _COMPARED)
        shown = "given images"
    found, reason = [], None
    for source in sources:
        try:
            found.append(prepared.pixels(source))
        except DataError as error:
            reason = error
    if not found:
        raise DataError(f"None of the images can be read: {reason}")
    # Where nothing crops, sizes differ: one batch has one.
    found = [pixels for pixels in found if pixels.shape == found[0].shape]
    # At least three: batch 1, and another batch size that is no accident of two.
    for i in range(max(0, 3 - len(found))):
        found.append(found[i][:, ::-1])
    batch = np.stack(found)
    prepared, output = model_input(model, prepared, formats.pixels_held(model))
    if output == "float32":
        batch = prepared.normalize(batch)
    return batch, f"{len(batch)} {shown}"


def _compare(runner: Runner, reference: Runner, images: np.ndarray) -> list[Comparison]:
    """Every image alone, then all of them at once."""
    expected = reference.finite_outputs(images)
    alone = np.concatenate([runner.outputs(images[i : i + 1]) for i in range(len(images))])
    found = [Comparison(1, relative_difference(alone, expected))]
    if len(images) > 1:
        together = relative_difference(runner.outputs(images), expected)
        found.append(Comparison(len(images), together))
    return found


def _passes(
    comparisons: list[Comparison], tolerance: float, int8: Int8Report | None, max_drop: float
) -> bool:
    # Written so that a nan fails.
    if int8 is None:
        return all(one.difference <= tolerance for one in comparisons)
    if not all(np.isfinite(one.difference) for one in comparisons):
        return False
    if int8.before is not None:
        return int8.before - int8.after <= max_drop
    return 1 - int8.agreement <= 5 * max_drop
