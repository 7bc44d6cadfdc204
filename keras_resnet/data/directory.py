"""`image_dataset_from_directory`: Keras' arguments, torchvision's pixels."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_resnet.data.dataset import ImageDataset
from keras_resnet.data.folders import (
    find_pictures,
    flat_images,
    listed,
    split_folders,
    stratified_split,
)
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.errors import DataError, InputError, one_of

logger = logging.getLogger("keras_resnet")


def image_dataset_from_directory(
    directory: str | os.PathLike,
    labels: str | Sequence[int] | None = "inferred",
    label_mode: str | None = "int",
    class_names: Sequence[str] | None = None,
    color_mode: str = "rgb",
    batch_size: int = 32,
    image_size: int | tuple[int, int] | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    validation_split: float | None = None,
    subset: str | None = None,
    interpolation: str = "bilinear",
    follow_links: bool = True,
    crop_to_aspect_ratio: bool = False,
    *,
    data_format: str | None = None,
    preprocess: Preprocess | None = None,
    augment: Callable | None = None,
    workers: int | None = None,
    cache: str | os.PathLike | None = None,
    output: str = "uint8",
    on_error: str = "skip",
    exif: bool = False,
    exclude: str | os.PathLike | Iterable[str] | None = None,
    drop_last: bool | str = False,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    label_smoothing: float = 0.0,
    repeats: int = 1,
    verify: bool = False,
) -> ImageDataset | tuple[ImageDataset, ImageDataset]:
    """Reads a folder with one subfolder a class, with Keras' arguments and torchvision's pixels.

    Args:
        directory: holds the class folders; images may lie in nested folders inside them. Hidden
            files and folders are ignored.
        labels: `"inferred"` from the folders, None for images alone (any folder), or one int a
            file, in the order of the sorted paths.
        label_mode: `"int"`, `"categorical"` (one-hot), `"binary"` or None.
        class_names: the class folders to take, in the order of their labels; all, sorted as text
            ('1', '10', '2'), by default.
        color_mode: `"rgb"`, `"grayscale"` or `"rgba"`.
        batch_size: images a batch.
        image_size: (height, width), or one int for both, to resize to; exclusive with
            `preprocess`. Without either, images are resized to 256 and cropped to 224.
        shuffle: a new order each epoch; False keeps that of `file_paths`.
        seed: of order and augmentation; None draws one (kept in `.seed`).
        validation_split: the fraction of each class to hold out, 0 to 1. The split depends on the
            seed and the files alone (seed None splits as seed 0).
        subset: `"training"`, `"validation"` or `"both"` (a pair), with `validation_split`. The
            validation part is neither shuffled, augmented, mixed, smoothed nor cut.
        interpolation: of `image_size`, one of Preprocess'.
        follow_links: visit folders behind symbolic links inside class folders, as torchvision does;
            links that lead in circles do no harm.
        crop_to_aspect_ratio: with `image_size`, cut instead of distorting.
        data_format: `"channels_last"` or `"channels_first"`; None is that of Keras' configuration.
        preprocess: the `Preprocess` that evaluates the model.
        augment: called with (image, generator), gives the uint8 image; then `preprocess` only
            normalises. See `augment.Augment`.
        workers: threads that read batches ahead; None takes the processor's cores, at most 8.
        cache: `"ram"` or a folder: keep what was decoded (finished images where nothing is
            random).
        output: `"uint8"` (values 0..255, for a model that preprocesses) or `"float32"`
            (normalised by `preprocess`).
        on_error: `"skip"` leaves an unreadable image out and lists it in `.skipped`; `"raise"`
            stops.
        exif: turn images as their EXIF orientation says.
        exclude: files to leave out: a list of paths, or a file as `scan` writes.
        drop_last: True drops a last batch that is not full; `"auto"` drops it only where it holds
            one image, on which batch norm cannot train. Evaluation keeps all (False).
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of cutmix, 0 for none; with both, one of the two for each batch.
        label_smoothing: 0 to 1; as mixing, it makes labels one-hot floats.
        repeats: repeated augmentation: each image that many times in a row, in an epoch of
            unchanged length.
        verify: decode every file once now, and drop what cannot be read.

    Returns:
        An `ImageDataset`, or a pair for `subset="both"`.

    Raises:
        NotFoundError: the folder does not exist.
        DataError: no class folder, an empty class folder, no image.
        InputError: an argument that cannot work.

    Examples:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("ants", "bees"):
        ...     (folder / name).mkdir()
        ...     Image.new("RGB", (40, 30)).save(folder / name / "1.png")
        >>> dataset = image_dataset_from_directory(folder, image_size=(32, 32), seed=0)
        >>> images, labels = dataset[0]
        >>> images.shape, dataset.class_names
        ((2, 32, 32, 3), ['ants', 'bees'])
    """
    if preprocess is None:
        preprocess = _preprocess_of(
            image_size, interpolation, color_mode, crop_to_aspect_ratio, exif
        )
    else:
        _check_no_conflict(preprocess, image_size, color_mode, crop_to_aspect_ratio, exif)
    _check_subset(validation_split, subset)
    paths, numbers, names = _files(directory, labels, class_names, follow_links, exclude)
    if label_mode is None:
        numbers = None
    evaluation = {
        "label_mode": label_mode,
        "preprocess": preprocess,
        "batch_size": batch_size,
        "workers": workers,
        "cache": cache,
        "output": output,
        "on_error": on_error,
        "seed": seed,
        "verify": verify,
        "data_format": data_format or keras.config.image_data_format(),
    }
    training = {
        **evaluation,
        "shuffle": shuffle,
        "augment": augment,
        "drop_last": drop_last,
        "mixup": mixup,
        "cutmix": cutmix,
        "label_smoothing": label_smoothing,
        "repeats": repeats,
    }

    def part(indices: np.ndarray, arguments: dict[str, Any]) -> ImageDataset:
        chosen = None if numbers is None else [numbers[i] for i in indices]
        return ImageDataset([paths[i] for i in indices], chosen, names, **arguments)

    if subset is None:
        return ImageDataset(paths, numbers, names, **training)
    count = len(paths) if numbers is None else numbers
    kept, held = stratified_split(count, validation_split, 0 if seed is None else seed)
    evaluation["shuffle"] = False
    if subset == "both":
        return part(kept, training), part(held, evaluation)
    return part(kept, training) if subset == "training" else part(held, evaluation)


def _check_subset(validation_split: float | None, subset: str | None) -> None:
    if (validation_split is None) != (subset is None):
        raise InputError(
            f"validation_split and subset go together. "
            f"Received: {validation_split!r} and {subset!r}."
        )
    if subset is not None:
        one_of("subset", subset, ("training", "validation", "both"))


def _files(
    directory: str | os.PathLike,
    labels: str | Sequence[int] | None,
    class_names: Sequence[str] | None,
    follow_links: bool,
    exclude: Any,
) -> tuple[list[str], Any, Sequence[str] | None]:
    """Paths, labels and class names: of class folders, or of any folder with labels as given."""
    directory = os.fspath(directory)
    if not isinstance(labels, str):
        paths = flat_images(directory, follow_links, exclude)
        return paths, labels, None if labels is None else class_names
    if labels != "inferred":
        raise InputError(
            f"labels must be 'inferred', None or a list of ints. Received: {labels!r}."
        )
    with contextlib.suppress(DataError):  # find_pictures says what is wrong
        parts = split_folders(directory) if class_names is None else {}
        if len(parts) > 1:
            logger.warning(
                "%r holds %s, which are taken for classes here: give one of them, such as %r.",
                directory, listed([os.path.basename(part) for part in parts.values()]),
                next(iter(parts.values())),
            )  # fmt: skip
    return find_pictures(directory, class_names, follow_links=follow_links, exclude=exclude)


def _preprocess_of(
    image_size: int | tuple[int, int] | None,
    interpolation: str,
    color_mode: str,
    crop_to_aspect_ratio: bool,
    exif: bool,
) -> Preprocess:
    arguments: dict[str, Any] = {
        "interpolation": interpolation,
        "color_mode": color_mode,
        "exif": exif,
    }
    if color_mode != "rgb":  # ImageNet's mean and std are those of three channels
        arguments |= {"mean": None, "std": None}
    if image_size is None:
        return Preprocess(**arguments)
    both = (image_size, image_size) if isinstance(image_size, int) else image_size
    return Preprocess(both, None, crop_to_aspect_ratio=crop_to_aspect_ratio, **arguments)


def _check_no_conflict(
    preprocess: Preprocess,
    image_size: Any,
    color_mode: str,
    crop_to_aspect_ratio: bool,
    exif: bool,
) -> None:
    """Raises InputError where an argument says other than the Preprocess given beside it."""
    wrong = {
        "image_size": image_size is not None,
        "color_mode": color_mode not in ("rgb", preprocess.color_mode),
        "crop_to_aspect_ratio": crop_to_aspect_ratio and not preprocess.crop_to_aspect_ratio,
        "exif": exif and not preprocess.exif,
    }
    named = [name for name, conflicts in wrong.items() if conflicts]
    if named:
        raise InputError(
            f"{' and '.join(named)} cannot be given beside preprocess, which says it: {preprocess}."
        )
