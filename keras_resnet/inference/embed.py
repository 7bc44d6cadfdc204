"""Images as vectors: what a model's head sees of them, to search, group and compare them by."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import keras
import numpy as np

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.sources import Images, Sources
from keras_resnet.inference.stream import computed_rows, found_images
from keras_resnet.models.features import embedding_model
from keras_resnet.models.files import images_at_a_time, load_model, model_input
from keras_resnet.runtimes.runner import KerasRunner
from keras_resnet.system.errors import DataError, InputError, require, whole
from keras_resnet.system.files import check_apart, printable, replace_file, valid_text
from keras_resnet.system.group import sharers


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """What `embed` gives.

    Attributes:
        paths: The images that could be read, in order.
        vectors: float32 `(images, features)`.
        skipped: `(path, reason)` of the others.
    """

    paths: list[str]
    vectors: np.ndarray
    skipped: list[tuple[str, str]]

    def __str__(self) -> str:
        count, features = self.vectors.shape
        lines = [f"{count:,} images, {features:,} numbers each"]
        lines += [f"Skipped: {printable(reason)}" for _, reason in self.skipped[:10]]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `.npz` (arrays `paths` and `vectors`) or `.parquet` (columns `path`, `vector`).

        Raises:
            InputError: Another extension.
            MissingDependencyError: Parquet without pyarrow.
        """
        kind = check_embeddings(path)
        replace_file(Path(path).expanduser(), self._npz if kind == ".npz" else self._parquet)

    def _npz(self, name: str) -> None:
        with open(name, "wb") as stream:
            np.savez(stream, paths=np.array(self.paths, np.str_), vectors=self.vectors)

    def _parquet(self, name: str) -> None:
        import pyarrow
        import pyarrow.parquet

        numbers = pyarrow.array(self.vectors.ravel())
        vectors = pyarrow.FixedSizeListArray.from_arrays(numbers, self.vectors.shape[1])
        columns = {"path": list(map(valid_text, self.paths)), "vector": vectors}
        pyarrow.parquet.write_table(pyarrow.table(columns), name)


def check_embeddings(path: str | os.PathLike) -> str:
    """The ending of a file that embeddings can be written to; or raises as `Embeddings.save`."""
    kind = Path(path).suffix.lower()
    if kind not in (".npz", ".parquet"):
        raise InputError(
            f"Embeddings are written as .npz or .parquet. Received: {os.fspath(path)!r}."
        )
    if kind == ".parquet":
        require("pyarrow", "parquet", "Parquet")
    return kind


def embed(
    model: keras.Model | str | os.PathLike,
    sources: Sources | Images,
    *,
    output: str | os.PathLike | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    preprocess: Preprocess | None = None,
    pixels: str | None = None,
) -> Embeddings:
    """Turns images into vectors: the input of the model's last layer, its head.

    Args:
        model: A model, a `.keras` file, a run folder, or the name of a variant for torchvision's
            weights of it. A model without a head gives its output, pooled.
        sources: As for `predict`.
        output: A `.npz` or `.parquet` file to write them to as well.
        batch_size: Images at a time; the result does not depend on it.
        workers: Threads that read images.
        preprocess: In place of the model's own.
        pixels: As for `predict`.

    Returns:
        The `Embeddings`, in memory; of several processes that share the images in the first.

    Raises:
        InputError: The model names no preprocessing, or it is unclear which pixels it takes.
        NotFoundError: A path does not exist.
        DataError: No image can be read.
    """
    whole("batch_size", batch_size, 1)
    if output is not None:
        check_embeddings(output)
    images = found_images(sources)
    if output is not None:
        check_apart(output, images.given)
    loaded = model if isinstance(model, keras.Model) else load_model(model)
    runner = KerasRunner(embedding_model(loaded))
    prepared = model_input(runner, preprocess, pixels)
    batch_size = images_at_a_time(prepared[0], batch_size)
    batches = computed_rows(
        runner, images, runner.finite_outputs,
        batch_size=batch_size, workers=workers, prepared=prepared,
    )  # fmt: skip
    rows = [row for batch in batches for row in batch]
    made = [Embeddings([], np.zeros((0, 0), np.float32), [])]

    def make() -> None:
        skipped = [(str(path), row) for path, row in rows if isinstance(row, str)]
        if len(skipped) == len(rows):
            raise DataError(
                f"None of the {len(rows)} images can be read; the first: {skipped[0][1]}"
            )
        found = [(str(path), row) for path, row in rows if not isinstance(row, str)]
        vectors = np.stack([row for _, row in found]).astype(np.float32)
        made[0] = Embeddings([path for path, _ in found], vectors, skipped)
        if output is not None:
            made[0].save(output)

    sharers().from_first(make)
    return made[0]
