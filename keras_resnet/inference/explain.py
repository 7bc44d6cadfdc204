"""Where a model looked: heat maps laid over images, one at a time or a folder of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence

import keras
import numpy as np

from keras_resnet import plots
from keras_resnet.data.dataset import ImageDataset
from keras_resnet.data.folders import plain_name
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.sources import Images
from keras_resnet.inference.grad_cam import (
    as_classifier,
    data_format_of,
    grad_cam,
    network_of,
    resized,
)
from keras_resnet.inference.prediction_files import Prediction, most_probable
from keras_resnet.models.files import images_at_a_time, model_class_names, model_input
from keras_resnet.runtimes.select import open_runner
from keras_resnet.system.device import in_data_format
from keras_resnet.system.errors import DataError, InputError, between, did_you_mean, whole


def overlay(image: np.ndarray, heatmap: np.ndarray, alpha: float = 0.75) -> np.ndarray:
    """An image in gray under a heat map in colour: all colour is heat.

    Args:
        image: uint8 `(height, width, channels)`; of more than three channels the first three.
        heatmap: `(height, width)` in 0..1, as of `grad_cam`; of another size it is resized.
        alpha: Opacity of the colour where the map is 1; elsewhere in proportion.

    Returns:
        uint8 `(height, width, 3)`.

    Raises:
        InputError: Shapes or types that cannot work.

    Examples:
        >>> gray = np.full((2, 2, 3), 128, np.uint8)
        >>> overlay(gray, np.array([[0.0, 0.0], [0.0, 1.0]]))[0, 0].tolist()
        [128, 128, 128]
    """
    image, heatmap = np.asarray(image), np.asarray(heatmap, np.float32)
    if image.dtype != np.uint8 or image.ndim != 3 or 0 in image.shape:
        raise InputError(
            "overlay draws on uint8 images (height, width, channels). "
            f"Received: {image.dtype}, {image.shape}."
        )
    image = plots.displayed(image)
    if heatmap.ndim != 2:
        raise InputError(f"A heat map is (height, width). Received: {heatmap.shape}.")
    between("alpha", alpha, 0, 1)
    if heatmap.shape != image.shape[:2]:
        heatmap = resized(heatmap, image.shape[:2])
    heat = np.clip(np.nan_to_num(heatmap), 0, 1)[..., None]
    # In gray: on a yellow flower nobody could tell heat from petals. ITU-R BT.601's weights.
    weights = (0.299, 0.587, 0.114) if image.shape[-1] > 1 else (1.0,)
    gray = (image[..., : len(weights)] @ np.asarray(weights))[..., None]
    opacity = alpha * heat
    mixed = gray * (1 - opacity) + plots.heat_colors(heat[..., 0]) * opacity
    return np.round(mixed).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a model says of one image, and where it looked.

    Attributes:
        prediction: The most probable classes; its `error` is set where it cannot be read.
        class_name: The class that the heat map speaks for; `None` where it cannot be read.
        pixels: `(height, width, channels)`, the image as the model saw it, or `None`; uint8, or
            float32 of 16 bits.
        heatmap: float32 `(height, width)` in 0..1, or `None`.
        probability: Of the class that the heat map speaks for.
    """

    prediction: Prediction
    class_name: str | None = None
    pixels: np.ndarray | None = None
    heatmap: np.ndarray | None = None
    probability: float | None = None

    def overlay(self, alpha: float = 0.75, least: int = 256) -> np.ndarray:
        """The image under its heat map, uint8 `(height, width, 3)`.

        Args:
            alpha: As of `overlay`.
            least: Images with a shorter side are enlarged by a whole number, to see something.

        Raises:
            DataError: The image could not be read.
        """
        if self.pixels is None or self.heatmap is None:
            raise DataError(f"There is nothing to draw: {self.prediction.error}")
        return overlay(plots.enlarged(plots.displayed(self.pixels), least), self.heatmap, alpha)


def iter_explanations(
    model: keras.Model | str | os.PathLike,
    sources: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    class_name: str | Sequence[str] | None = None,
    layer: str | None = None,
    top: int = 5,
    batch_size: int = 16,
    workers: int | None = None,
    preprocess: Preprocess | None = None,
    pixels: str | None = None,
) -> Iterator[Explanation]:
    """Classifies images and says where the model looked, one `Explanation` at a time.

    Args:
        model: A model, a `.keras` file or a run folder.
        sources: An image, a folder (searched through), a shell pattern, or several of these.
        class_name: The class to explain: one for all, or one an image; by default the most
            probable one of each.
        layer: As of `grad_cam`.
        top: Classes to give an image, most probable first.
        batch_size: Images at a time, fewer where they are large; the result does not depend on it.
        workers: Threads that read images.
        preprocess: In place of the model's own.
        pixels: As for `predict`.

    Yields:
        An `Explanation` an image, in order; those of unreadable images hold an error.

    Raises:
        InputError: An unknown class or layer, a model without a head or preprocessing.
        NotFoundError: A path does not exist.
        DataError: A folder holds no image.
    """
    whole("top", top, 1)
    model = as_classifier(model)
    names = model_class_names(model)
    paths = list(Images(sources))
    wanted = _classes_by_name(class_name, names, len(paths))
    prepared, fed = model_input(model, preprocess, pixels)
    runner = open_runner(model)
    network_of(model, layer)  # an unknown layer is said before any image is read
    size = images_at_a_time(prepared, batch_size)
    dataset = ImageDataset(
        paths, label_mode=None, shuffle=False, batch_size=size, workers=workers,
        preprocess=prepared, output="uint8",
    )  # fmt: skip
    for index in range(len(dataset)):
        found: dict[int, Explanation] = {}
        try:
            batch = dataset.read_batch(index)
        except DataError:
            if not dataset.skipped:
                raise
        else:
            images = batch.images if fed == "uint8" else prepared.normalize(batch.images)
            found = dict(_explained(runner, model, batch, images, dataset, wanted, layer, top))
        reasons = dict(dataset.skipped)
        for sample in map(int, dataset.batch_indices(index)):
            path = paths[sample]
            error = reasons.get(path, "cannot be read")
            yield found.get(sample) or Explanation(Prediction(path, [], error))


def _classes_by_name(given, names: list[str], count: int) -> list[int] | None:
    if given is None:
        return None
    asked = [given] * count if isinstance(given, str) else list(given)
    if len(asked) != count:
        raise InputError(f"class_name names {len(asked)} classes for {count} images.")
    position = {plain_name(name): i for i, name in enumerate(names)}
    for name in asked:
        if plain_name(name) not in position:
            raise InputError(
                f"The model has no class {name!r}.{did_you_mean(name, names)} Its classes: "
                f"{', '.join(map(repr, names[:10]))}{' ...' if len(names) > 10 else ''}."
            )
    return [position[plain_name(name)] for name in asked]


def _explained(runner, model, batch, images, dataset, wanted, layer, top):
    names = model_class_names(runner)
    logs = runner.log_probabilities(images)
    images = in_data_format(images, data_format_of(model))
    chosen = logs.argmax(axis=1) if wanted is None else [wanted[i] for i in batch.indices]
    maps = grad_cam(model, images, np.asarray(chosen, np.int32), layer)
    for i, sample in enumerate(map(int, batch.indices)):
        prediction = Prediction(dataset.file_paths[sample], most_probable(logs[i], names, top))
        k = int(chosen[i])
        probability = float(np.exp(logs[i, k]))
        yield sample, Explanation(prediction, names[k], batch.images[i], maps[i], probability)


def overlay_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """A name for each image's overlay, no two alike: `cat.png`, `cat-2.png`.

    Examples:
        >>> overlay_names(["a/cat.jpg", "b/cat.jpg", "Cat-2.png"])
        ['cat.png', 'cat-2.png', 'Cat-2-2.png']
    """
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        # Bytes are what file systems count: 255 a name, at most four a letter.
        stem, number = os.path.splitext(os.path.basename(os.fspath(path)))[0][:50], 1
        name = f"{stem}.png"
        while name.lower() in taken:  # some file systems do not tell the cases apart
            number += 1
            name = f"{stem}-{number}.png"
        taken.add(name.lower())
        names.append(name)
    return names


def save_overlay(explanation: Explanation, path: str | os.PathLike) -> None:
    """Writes the image beside itself under its heat map, with its class, probability and scale.

    `Explanation.overlay` is the image under its heat map alone.

    Args:
        explanation: As `iter_explanations` gives it.
        path: The image to write; its extension decides the format.

    Raises:
        DataError: The image could not be read, or the file cannot be written.
    """
    drawn, e = explanation.overlay(), explanation
    predicted = e.prediction.classes[0]
    try:
        plots.explanation(e.pixels, drawn, predicted, (e.class_name, e.probability), path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"The image {os.fspath(path)!r} cannot be written: {reason}.") from error
