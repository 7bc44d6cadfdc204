"""Figures that are files: curves, grids of images, confusion matrices, colours of heat maps.

Figures are built on `Figure` objects, not through pyplot: no window, no global state, and safe in
a thread. Each function writes a file and returns its path.
"""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keras_resnet.errors import InputError
from keras_resnet.system.files import printable, replace_file

_TRAIN, _VAL = "#1f6feb", "#d9480f"


def label_text(name: object, width: int = 24) -> str:
    """A name as matplotlib shall draw it: one short line, and no `$...$` read as a formula."""
    return textwrap.shorten(printable(name), width, placeholder="...").replace("$", r"\$")


def _save(figure: Figure, path: str | os.PathLike) -> Path:
    path = Path(path)
    kind = path.suffix.lstrip(".") or "png"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        replace_file(
            path, lambda name: figure.savefig(name, format=kind, dpi=120, bbox_inches="tight")
        )
    return path


def curves(history: Mapping[str, Sequence[float]], path: str | os.PathLike) -> Path:
    """Draws accuracy and loss over the epochs, training and validation, side by side.

    Args:
        history: Columns of `history.csv`: `accuracy`, `loss`, `val_accuracy`, `val_loss`; those
            missing are left out. One value an epoch.
        path: The image to write; its extension decides the format.
    """
    figure = Figure(figsize=(12, 4))
    panels = figure.subplots(1, 2)
    for axes, key, title, corner in (
        (panels[0], "accuracy", "Training and validation accuracy", "lower right"),
        (panels[1], "loss", "Training and validation loss", "upper right"),
    ):
        for prefix, label, color in (("", "Training", _TRAIN), ("val_", "Validation", _VAL)):
            values = np.asarray(history.get(prefix + key, ()), dtype=float)
            if values.size:
                epochs = np.arange(1, values.size + 1)
                marker = "o" if values.size < 30 else None
                axes.plot(epochs, values, color=color, marker=marker, ms=3, label=label)
        best = np.asarray(history.get("val_" + key, ()), dtype=float)
        if np.isfinite(best).any():
            at = int(np.nanargmax(best) if key == "accuracy" else np.nanargmin(best))
            axes.annotate(
                f"{best[at]:.4g}", (at + 1, best[at]), textcoords="offset points", xytext=(-4, -12),
                ha="right", fontsize=8, color=_VAL,
            )  # fmt: skip
        axes.set(title=title, xlabel="Epoch", ylabel=key.capitalize())
        drawn = np.concatenate([line.get_ydata() for line in axes.lines] or [[]])
        drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
        if key == "loss" and drawn.size and drawn.max() > 30 * drawn.min():
            axes.set_yscale("log")  # one bad first epoch would press the rest flat
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc=corner)
    return _save(figure, path)


def learning_rates(
    rates: np.ndarray,
    losses: np.ndarray,
    smoothed: np.ndarray,
    suggestion: float | None,
    path: str | os.PathLike,
) -> Path:
    """Draws the sweep of `lr_find`: the loss over the learning rate.

    Args:
        rates: One a step.
        losses: The loss of each step.
        smoothed: Its moving average.
        suggestion: The rate to mark, or `None`.
        path: The image to write.
    """
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    axes.plot(rates, losses, color=_TRAIN, alpha=0.3, lw=1, label="Loss")
    axes.plot(rates, smoothed, color=_TRAIN, label="Smoothed")
    if suggestion is not None:
        axes.axvline(suggestion, color=_VAL, ls="--", label=f"Suggestion: {suggestion:.1e}")
    low, high = float(np.min(smoothed)), float(smoothed[0])
    if high > low:  # what diverged at the end would press the rest flat
        axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    axes.set(title="Learning-rate finder", xlabel="Learning rate", ylabel="Loss", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def picture_grid(
    images: np.ndarray, titles: Sequence[str], path: str | os.PathLike, columns: int = 4
) -> Path:
    """Draws images in a grid, each under its title.

    Args:
        images: uint8 `(n, height, width, channels)`, 1, 3 or 4 channels.
        titles: One text an image.
        path: The image to write.
        columns: Images in a row.
    """
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.75 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, image, title in zip(panels, images, titles, strict=False):
        gray = image.shape[-1] == 1
        axes.imshow(
            image[..., 0] if gray else image,
            cmap="gray" if gray else None,
            vmin=0,
            vmax=255,
            interpolation="nearest" if len(image) < 64 else None,
        )
        axes.set_title("\n".join(label_text(line, 30) for line in title.split("\n")), fontsize=9)
    return _save(figure, path)


def confusion_matrix(matrix: Any, class_names: Sequence[str], path: str | os.PathLike) -> Path:
    """Draws a confusion matrix: rows are true classes, colours fractions of the row.

    Args:
        matrix: Counts, `(classes, classes)`: an array, or lists.
        class_names: Names in the order of the rows.
        path: The image to write.

    Raises:
        InputError: The matrix has not a row and a column a class.
    """
    matrix, count = np.asarray(matrix), len(class_names)
    if matrix.shape != (count, count):
        raise InputError(
            f"A confusion matrix of {count} classes is {count} x {count}. Received: {matrix.shape}."
        )
    side = min(24.0, max(4.0, 1.6 + 0.5 * count))
    figure = Figure(figsize=(side + 1, side))
    axes = figure.subplots()
    totals = matrix.sum(axis=1, keepdims=True)
    fractions = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    drawn = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, fraction=0.046, label="Fraction of the true class")
    names = [label_text(name) for name in class_names]
    if count <= 60:
        axes.set_xticks(range(count), names, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(count), names, fontsize=8)
    if count <= 30:
        for i, j in np.argwhere(matrix > 0):
            axes.text(
                j, i, f"{matrix[i, j]:,}", ha="center", va="center", fontsize=8,
                color="white" if fractions[i, j] > 0.5 else "black",
            )  # fmt: skip
    axes.set(xlabel="Predicted class", ylabel="True class", title="Confusion matrix")
    return _save(figure, path)


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Colours of a heat map, from violet over red to yellow: uint8 `(..., 3)` for values in 0..1.

    Lightness grows with the value, so that the order survives printing and colour blindness.
    """
    return (matplotlib.colormaps["plasma"](np.asarray(values, float))[..., :3] * 255).astype(
        "uint8"
    )
