"""`image_dataset_from_directory`: Keras' arguments and errors, torchvision's pixels."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras

from keras_resnet.data.dataset import ImageDataset
from keras_resnet.data.folders import (
    find_pictures,
    flat_images,
    listed,
    split_folders,
    stratified_split,
)
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.system.errors import DataError, InputError, did_you_mean, one_of, require

logger = logging.getLogger("keras_resnet")

# What Keras calls them; Pillow's are their equals where an image shrinks.
_INTERPOLATIONS = {"area": "box", "lanczos3": "lanczos"}


def image_dataset_from_directory(
    directory: str | os.PathLike,
    labels: str | Sequence[int] | None = "inferred",
    label_mode: str | None = "int",
    class_names: Sequence[str] | None = None,
    color_mode: str | int = "rgb",
    batch_size: int | None = 32,
    image_size: int | tuple[int, int] | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    validation_split: float | None = None,
    subset: str | None = None,
    interpolation: str = "bilinear",
    follow_links: bool = True,
    crop_to_aspect_ratio: bool = False,
    pad_to_aspect_ratio: bool = False,
    data_format: str | None = None,
    format: str | None = None,
    verbose: bool = False,
    *,
    preprocess: Preprocess | None = None,
    augment: Callable | None = None,
    workers: int | None = None,
    cache: str | os.PathLike | None = None,
    output: str | None = None,
    on_error: str = "skip",
    exif: bool = False,
    exclude: str | os.PathLike | Iterable[str] | None = None,
    drop_last: bool | str = False,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    label_smoothing: float = 0.0,
    repeats: int = 1,
    sampler: str | None = None,
    verify: bool = False,
) -> ImageDataset | tuple[ImageDataset, ImageDataset] | Any:
    """Reads a folder with one subfolder a class, with Keras' arguments and torchvision's pixels.

    Args:
        directory: holds the class folders; images may lie in nested folders inside them. Hidden
            files and folders are ignored.
        labels: `"inferred"` from the folders, None for images alone (any folder), or one int a
            file, in the order of the sorted paths (then `class_names` may name them).
        label_mode: `"int"`, `"categorical"` (one-hot), `"binary"` or None.
        class_names: the class folders to take, in the order of their labels; all, sorted as text
            ('1', '10', '2'), by default.
        color_mode: `"rgb"`, `"grayscale"`, `"rgba"` or a number of channels: see `Preprocess`.
        batch_size: images a batch; None gives one image after the other, without a batch's axis.
        image_size: (height, width), or one int for both, to resize to; exclusive with
            `preprocess`. Without either, images are resized to 256 and cropped to 224.
        shuffle: a new order each epoch; False keeps that of `file_paths`.
        seed: of order and augmentation; None draws one (kept in `.seed`).
        validation_split: the fraction of each class to hold out, 0 to 1. The split depends on the
            seed and the files alone (seed None splits as seed 0).
        subset: `"training"`, `"validation"` or `"both"` (a pair), with `validation_split`. The
            validation part is neither shuffled, augmented, mixed, smoothed nor cut.
        interpolation: of `image_size`, one of Preprocess', or Keras' `"area"` and `"lanczos3"`.
        follow_links: visit folders behind symbolic links inside class folders, as torchvision does;
            links that lead in circles do no harm.
        crop_to_aspect_ratio: with `image_size`, cut instead of distorting.
        pad_to_aspect_ratio: with `image_size`, centre on black instead of distorting.
        data_format: `"channels_last"` or `"channels_first"`; None is that of Keras' configuration.
        format: `"tf"` for a `tf.data.Dataset` or `"grain"` for a `grain.IterDataset` of the same
            batches; by default an `ImageDataset`, which needs neither package.
        verbose: print how many images and classes were found.
        preprocess: the `Preprocess` that evaluates the model.
        augment: called with (image, generator), gives the uint8 image; then `preprocess` only
            normalises. See `augment.Augment`.
        workers: threads that read batches ahead; None takes the processor's cores, at most 8.
        cache: `"ram"` or a folder: keep what was decoded (finished images where nothing is
            random).
        output: `"uint8"` (values 0..255, for a model that preprocesses), `"float32"`
            (normalised by `preprocess`) or `"pixels"` (0..255 in float32, as Keras', and the
            default where a `format` is given).
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
        sampler: `"balanced"` draws each class equally often, in epochs of unchanged length.
        verify: decode every file once now, and drop what cannot be read.

    Returns:
        An `ImageDataset` (or as `format` says), or a pair for `subset="both"`.

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
    one_of("`label_mode` argument", label_mode, ("int", "categorical", "binary", None))
    one_of("`format`", format, (None, "tf", "grain"))
    validation_split = _checked_split(validation_split, subset)
    said: dict[str, Any] = {
        "color_mode": color_mode,
        "crop_to_aspect_ratio": crop_to_aspect_ratio,
        "pad_to_aspect_ratio": pad_to_aspect_ratio,
        "exif": exif,
    }
    if preprocess is None:
        preprocess = _preprocess_of(image_size, interpolation, said)
    else:
        _check_no_conflict(preprocess, image_size, said)
    paths, numbers, names = _files(directory, labels, class_names, follow_links, exclude)
    if verbose:
        kinds = "" if numbers is None else f" belonging to {len(names or set(numbers))} classes"
        print(f"Found {len(paths)} files{kinds}.")
    if label_mode is None:
        numbers = None
    evaluation = {
        "label_mode": label_mode,
        "preprocess": preprocess,
        "batch_size": batch_size,
        "workers": workers,
        "cache": cache,
        "output": output or ("uint8" if format is None else "pixels"),
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
        "sampler": sampler,
    }

    def part(indices: Any, arguments: dict[str, Any]) -> Any:
        chosen = None if numbers is None else [numbers[i] for i in indices]
        dataset = ImageDataset([paths[i] for i in indices], chosen, names, **arguments)
        return dataset if format is None else _in_format(dataset, format)

    if subset is None:
        return part(range(len(paths)), training)
    count = len(paths) if numbers is None else numbers
    kept, held = stratified_split(count, validation_split, 0 if seed is None else seed)
    evaluation["shuffle"] = False
    if subset == "both":
        return part(kept, training), part(held, evaluation)
    return part(kept, training) if subset == "training" else part(held, evaluation)


# In this file messages begin with Keras' words, for which people's own tests and logs look.


def _checked_split(validation_split: float | None, subset: str | None) -> float:
    if validation_split and not 0 < validation_split < 1:
        raise InputError(
            f"`validation_split` must be between 0 and 1. Received: {validation_split!r}."
        )
    if bool(validation_split) != (subset is not None):
        raise InputError(
            f"If `subset` is set, `validation_split` must be set, and inversely: they go together. "
            f"Received: {subset!r} and {validation_split!r}."
        )
    if subset not in (None, "training", "validation", "both"):
        raise InputError(
            f'`subset` must be either "training", "validation" or "both". Received: {subset!r}.'
            f"{did_you_mean(subset, ('training', 'validation', 'both'))}"
        )
    return validation_split or 0.0


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
        if labels is None and class_names is not None:
            raise InputError(
                f"When `labels=None` (no labels), argument `class_names` cannot be specified. "
                f"Received: {list(class_names)}."
            )
        paths = flat_images(directory, follow_links, exclude)
        if labels is not None and len(labels) != len(paths):
            raise InputError(
                f"Expected the lengths of `labels` to match the number of files in the target "
                f"directory: one int an image. Received: {len(labels)} for {len(paths)} images."
            )
        return paths, labels, class_names
    if labels != "inferred":
        raise InputError(
            f"`labels` argument should be 'inferred', None or a list of ints. Received: {labels!r}."
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


def _in_format(dataset: ImageDataset, format: str) -> Any:
    """The batches as a `tf.data.Dataset` or `grain.IterDataset` with Keras' attributes."""
    if format == "tf":
        require("tensorflow", "tensorflow", 'format="tf"')
        result = _as_tf_data(dataset)
    else:
        require("grain", "grain", 'format="grain"')
        import grain

        result = grain.MapDataset.source(dataset).to_iter_dataset()
    result.class_names, result.file_paths = dataset.class_names, dataset.file_paths
    return result


def _as_tf_data(dataset: ImageDataset) -> Any:
    import tensorflow as tf

    def epoch():
        yield from dataset
        dataset.on_epoch_end()

    height, width, channels = dataset.preprocess.output_shape
    height, width = getattr(dataset.augment, "output_size", None) or (height, width)
    shape = (height, width, channels)
    if dataset.data_format == "channels_first":
        shape = (channels, height, width)
    batch = (None,) if dataset.batched else ()
    signature = tf.TensorSpec((*batch, *shape), "uint8" if dataset.output == "uint8" else "float32")
    if dataset.labels is not None:
        last = {"int": (), "binary": (1,)}.get(dataset.label_mode, (len(dataset.class_names),))
        kind = "int32" if dataset.label_mode == "int" else "float32"
        signature = (signature, tf.TensorSpec((*batch, *last), kind))
    result = tf.data.Dataset.from_generator(epoch, output_signature=signature)
    # One by one, what cannot be read is left out, and their number is not known before.
    return result.apply(tf.data.experimental.assert_cardinality(len(dataset))) if batch else result


def _preprocess_of(
    image_size: int | tuple[int, int] | None, interpolation: str, said: dict[str, Any]
) -> Preprocess:
    said = {**said, "interpolation": _INTERPOLATIONS.get(interpolation, interpolation)}
    if said["color_mode"] != "rgb":  # ImageNet's mean and std are those of three channels
        said |= {"mean": None, "std": None}
    if image_size is None:
        return Preprocess(**{k: v for k, v in said.items() if not k.endswith("aspect_ratio")})
    both = (image_size, image_size) if isinstance(image_size, int) else image_size
    return Preprocess(both, None, **said)


def _check_no_conflict(preprocess: Preprocess, image_size: Any, said: dict[str, Any]) -> None:
    """Raises InputError where an argument says other than the Preprocess given beside it."""
    named = ["image_size"] if image_size is not None else []
    named += [k for k, v in said.items() if v not in ("rgb", False, getattr(preprocess, k))]
    if named:
        raise InputError(
            f"{' and '.join(named)} cannot be given beside preprocess, which says it: {preprocess}."
        )
