"""Figures that are files: curves, grids of images, confusion matrices, colours of heat maps.

Figures are built on `Figure` objects, not through pyplot: no window, no global state, and safe in
a thread. Each function writes a file and returns its path.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from keras_resnet.system.errors import InputError
from keras_resnet.system.files import replace_file, shortened

logger = logging.getLogger("keras_resnet")

_TRAIN, _VAL, _MUTED = "#1f6feb", "#d9480f", "#5a616b"
# Every series has a dash of its own too: colour alone does not tell them apart for everyone.
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

# --- names ---------------------------------------------------------------------------------------

# Asked first for letters that matplotlib's own font lacks, by the systems that have them: Linux,
# macOS, Windows. Their colour emoji are bitmaps, which matplotlib cannot draw.
_FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "PingFang SC", "Hiragino Sans GB", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS",
    "Microsoft YaHei", "SimHei", "Yu Gothic", "Meiryo", "MS Gothic", "Malgun Gothic",
    "Noto Sans", "Noto Emoji", "Segoe UI Emoji", "Segoe UI Symbol", "Symbola",
)  # fmt: skip


def label_text(name: object, width: int = 24) -> str:
    """A name as matplotlib shall draw it: one short line, and no `$...$` read as a formula."""
    # Without the marks that ask for an emoji in colour or in black: no font draws them.
    plain = str(name).replace("\ufe0f", "").replace("\ufe0e", "")
    return shortened(plain, width).replace("$", r"\$")


@functools.lru_cache(maxsize=64)
def _fonts(letters: frozenset[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Families that draw these letters, matplotlib's own first, and the letters that none has."""
    usual = tuple(matplotlib.rcParams["font.family"])
    missing = letters - _letters_of(font_manager.findfont(font_manager.FontProperties()))
    if not missing:
        return usual, ()
    order = {name: i for i, name in enumerate(_FALLBACKS)}
    others = {f.name: f.fname for f in font_manager.fontManager.ttflist if f.style == "normal"}
    # matplotlib's "Last Resort" has a box for every letter.
    names = sorted(
        (n for n in others if "Last Resort" not in n), key=lambda n: (order.get(n, 99), n)
    )
    found = []
    for name in names:
        drawn = missing & _letters_of(others[name])
        if drawn:
            found.append(name)
            missing -= drawn
        if not missing:
            break
    return (*usual, *found), tuple(sorted(missing))


@functools.lru_cache(maxsize=256)
def _letters_of(path: str) -> frozenset[str]:
    with contextlib.suppress(OSError, RuntimeError):  # a damaged font is as good as none
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    return frozenset()


@functools.lru_cache(maxsize=64)
def _say_missing(codes: str) -> str:
    """The note under a figure whose letters no font has; told once, too."""
    note = f"No font here has {codes}; install one, such as Noto Sans CJK or Noto Emoji."
    logger.warning("%s Figures show boxes in their place.", note)
    return note


def _choose_fonts(figure: Figure) -> None:
    """Gives every text fonts that have its letters; a note says what none has."""
    for axes in figure.axes:
        if axes.axison:
            axes.get_xticklabels(), axes.get_yticklabels()  # which makes them
    texts = [text for text in figure.findobj(Text) if not text.get_text().isascii()]
    letters = frozenset("".join(text.get_text() for text in texts))
    if not letters:
        return
    families, missing = _fonts(frozenset(c for c in letters if not unicodedata.combining(c)))
    for text in texts:
        text.set_fontfamily(families)
    if missing:
        codes = ", ".join(f"U+{ord(c):04X}" for c in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        figure.text(
            drawn.x0 / width, (drawn.y0 - 0.1) / height, _say_missing(codes + more),
            fontsize=7, color=_MUTED, va="top",
        )  # fmt: skip


def _save(figure: Figure, path: str | os.PathLike) -> Path:
    path = Path(path)
    kind = path.suffix.lstrip(".") or "png"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        _choose_fonts(figure)
        replace_file(
            path, lambda name: figure.savefig(name, format=kind, dpi=120, bbox_inches="tight")
        )
    return path


# --- lines ---------------------------------------------------------------------------------------


def draw_lines(
    axes: Axes,
    series: Sequence[tuple[Sequence[float], str, Any]],
    *,
    percent: bool = False,
    mark: tuple[int, float] | None = None,
    ink: str = "black",
    surface: str = "white",
) -> None:
    """Draws numbers over the epochs, in a file or for a page.

    Args:
        axes: Where.
        series: Values one an epoch, their colour, and the dash (of `DASHES`' kind).
        percent: Values are fractions.
        mark: An epoch (from 1) and its value, to be ringed and written out.
        ink: Colour of the mark.
        surface: Colour behind its text.
    """
    drawn = []
    for values, color, dash in series:
        values = np.asarray(values, float)
        if not np.isfinite(values).any():
            continue
        drawn.append(values[np.isfinite(values)])
        marker = "o" if values.size < 16 else None
        epochs = np.arange(1, values.size + 1)
        axes.plot(epochs, values, color=color, ls=dash, lw=2, marker=marker, ms=4.5, clip_on=False)
    every = np.concatenate(drawn) if drawn else np.zeros(0)
    if percent:
        low = min(0.9, float(np.floor(every.min() * 10) / 10)) if every.size else 0
        axes.set_ylim(max(0, low), 1)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    elif every.size and every.min() > 0 and every.max() > 30 * every.min():
        axes.set_yscale("log")  # one bad first epoch would press the rest flat
    elif every.size and every.min() >= 0:
        axes.set_ylim(0, float(every.max()) * 1.08 or 1)
    if mark is not None and np.isfinite(mark[1]):
        text = f"{mark[1]:.1%}" if percent else f"{mark[1]:.3g}"
        axes.plot(*mark, "o", ms=10, mfc="none", mec=ink, mew=1.4, clip_on=False, zorder=5)
        longest = max((v.size for v in drawn), default=1)
        left = mark[0] > (1 + longest) / 2
        high = mark[1] > sum(axes.get_ylim()) / 2
        axes.annotate(
            text, mark, textcoords="offset points", xytext=(-4 if left else 4, -22 if high else 12),
            ha="right" if left else "left", fontsize=11, fontweight="bold", color=ink,
            bbox={"facecolor": surface, "edgecolor": "none", "pad": 1.5, "alpha": 0.8},
            zorder=6,
        )  # fmt: skip
    axes.set_xlabel("Epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=8))
    axes.margins(x=0.02)


def curves(history: Mapping[str, Sequence[float]], path: str | os.PathLike) -> Path:
    """Draws accuracy and loss over the epochs, training and validation, side by side.

    Args:
        history: Columns of `history.csv`: `accuracy`, `loss`, `val_accuracy`, `val_loss`; those
            missing are left out. One value an epoch; the best of validation is ringed.
        path: The image to write; its extension decides the format.
    """
    figure = Figure(figsize=(12, 4))
    score = "average_precision" if "average_precision" in history else "accuracy"
    for axes, key in zip(figure.subplots(1, 2), (score, "loss"), strict=True):
        train, val = (np.asarray(history.get(p + key, ()), float) for p in ("", "val_"))
        best = None
        if np.isfinite(val).any():
            at = int(np.nanargmin(val) if key == "loss" else np.nanargmax(val))
            best = (at + 1, float(val[at]))
        series = [(train, _TRAIN, DASHES[1]), (val, _VAL, DASHES[0])]
        draw_lines(axes, series, percent=key != "loss", mark=best)
        both = zip(("Training", "Validation"), (train, val), strict=True)
        names = [name for name, values in both if np.isfinite(values).any()]
        if names:
            axes.legend(axes.lines[: len(names)], names, frameon=False, handlelength=3)
        what = key.replace("_", " ")
        title = f"{' and '.join(names)} {what}".capitalize()
        axes.set_title(title, loc="left", fontweight="bold", pad=12)
        axes.set_ylabel(what.capitalize())
        axes.tick_params(length=0, labelcolor=_MUTED, pad=5)
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.grid(axis="y", alpha=0.35)
        axes.set_axisbelow(True)
    return _save(figure, path)


def learning_rates(
    rates: np.ndarray,
    losses: np.ndarray,
    smoothed: np.ndarray,
    suggestion: float | None,
    path: str | os.PathLike,
    *,
    noise: bool = False,
) -> Path:
    """Draws the sweep of `lr_find`: the loss over the learning rate.

    Args:
        rates: One a step.
        losses: The loss of each step.
        smoothed: Its moving average.
        suggestion: The rate to mark, or `None`.
        path: The image to write.
        noise: Whether the loss falls by no more than chance.
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
    title = f"Learning-rate finder{': noise, no suggestion' if noise else ''}"
    axes.set(title=title, xlabel="Learning rate", ylabel="Loss", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def enlarged(image: np.ndarray, least: int) -> np.ndarray:
    """An image, enlarged by a whole number until its shorter side has at least so many pixels."""
    times = max(1, -(-least // min(image.shape[:2])))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def picture_grid(
    images: np.ndarray, titles: Sequence[str], path: str | os.PathLike, columns: int = 4
) -> Path:
    """Draws images in a grid, each under its title.

    Args:
        images: `(n, height, width, channels)`, as `displayed` takes them.
        titles: One text an image.
        path: The image to write.
        columns: Images in a row.
    """
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    wide, high, side = 2.0, 2.2, 1.7  # inches to the next image, and of its longer side
    size = wide * (columns - 1) + side, high * (rows - 1) + side
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1))  # one for all: an image with its own takes 50 ms
    for number, (image, title) in enumerate(zip(images, titles, strict=False)):
        row, column = divmod(number, columns)
        x, y = wide * column + side / 2, high * row + side / 2
        up, right = (side / 2 * n / max(image.shape[:2]) for n in image.shape[:2])
        _show(axes, image, extent=(x - right, x + right, y + up, y - up), aspect="auto")
        title = "\n".join(label_text(line, 30) for line in title.split("\n"))
        axes.annotate(title, (x, y - up), (0, 6), textcoords="offset points", ha="center",
                      va="baseline", fontsize=9)  # fmt: skip
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    return _save(figure, path)


# --- confusion matrices --------------------------------------------------------------------------

_HIT, _MISTAKE = (0.24, 0.49, 0.92), (0.87, 0.36, 0.05)  # black is readable on both


def frequent_mistakes(
    matrix: np.ndarray, class_names: Sequence[str], limit: int
) -> list[tuple[str, str, int, float]]:
    """The most frequent mistakes: true and predicted class, count, fraction of the true class.

    Args:
        matrix: Counts, `(classes, classes)`, rows are true classes.
        class_names: Names in the order of the rows.
        limit: How many, at most.
    """
    totals = matrix.sum(axis=1)
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    return [
        (class_names[i], class_names[j], int(wrong[i, j]), float(wrong[i, j] / totals[i]))
        for i, j in pairs
        if wrong[i, j]
    ]


def confusion_pixels(matrix: np.ndarray) -> np.ndarray:
    """A confusion matrix as colours: what is right in blue, mistakes in orange.

    The fuller the colour, the larger the fraction of the row; by its square root, so that few
    mistakes are seen.

    Args:
        matrix: Counts, `(classes, classes)`, rows are true classes.

    Returns:
        RGBA in 0..1, `(classes, classes, 4)`: for white and for dark ground.
    """
    totals = matrix.sum(axis=1, keepdims=True)
    fractions = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    return _colored(fractions, np.eye(len(matrix), dtype=bool))


def _colored(fractions: np.ndarray, right: np.ndarray) -> np.ndarray:
    right = np.broadcast_to(right, fractions.shape)
    color = np.where(right[..., None], _HIT, _MISTAKE)
    return np.concatenate([color, np.sqrt(fractions)[..., None]], axis=-1)


def confusion_matrix(matrix: Any, class_names: Sequence[str], path: str | os.PathLike) -> Path:
    """Draws a confusion matrix: rows are true classes; hits are blue, mistakes orange.

    Up to 30 classes have their counts written in, up to 60 their names beside them; of more than
    20 the most frequent mistakes are listed.

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
    side = 12.0 if count > 60 else max(2.5, (0.45 if count <= 30 else 0.2) * count)
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))  # what stands beside it is saved with it
    axes.imshow(confusion_pixels(matrix), interpolation="nearest")
    large = 13 if count > 60 else 10
    axes.set_title("Confusion matrix", fontsize=large + 2, fontweight="bold", pad=12)
    axes.set_xlabel("Predicted class", fontsize=large)
    axes.set_ylabel("True class", fontsize=large)
    if count <= 60:
        names = [label_text(name) for name in class_names]
        axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), names)
        axes.tick_params(labelsize=8)
    if count <= 30:
        for i, j in np.argwhere(matrix > 0):
            text = f"{matrix[i, j]:,}"  # up to five digits fit into a cell
            size = min(8, 40 / len(text))
            axes.text(j, i, text, ha="center", va="center", fontsize=size)
    scale = axes.inset_axes((1 + 0.3 / side, 0, 0.3 / side, 1))
    ramp = _colored(np.linspace(0, 1, 256)[:, None].repeat(2, axis=1), np.array([[True, False]]))
    scale.imshow(ramp, extent=(0, 2, 0, 1), origin="lower", aspect="auto")
    scale.set_xticks((0.5, 1.5), ("right", "wrong"), rotation=90, fontsize=8)
    scale.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    scale.yaxis.tick_right()
    scale.yaxis.set_label_position("right")
    scale.set_ylabel("Of the true class", fontsize=large)
    if count > 20:
        lines = [
            f"{label_text(a)} taken for {label_text(b)}: {n:,} ({part:.0%})"
            for a, b, n, part in frequent_mistakes(matrix, class_names, 20)
        ]
        text = "\n".join(["The most frequent mistakes", *(lines or ["None"])])
        axes.text(1 + 1.5 / side, 1, text, transform=axes.transAxes, va="top", linespacing=1.7,
                  fontsize=large - 1)  # fmt: skip
    return _save(figure, path)


# --- heat maps -----------------------------------------------------------------------------------


def explanation(
    image: np.ndarray,
    overlay: np.ndarray,
    predicted: tuple[str, float],
    explained: tuple[str, float],
    path: str | os.PathLike,
) -> Path:
    """Draws where a model looked: the image, the heat map over it, its scale, the prediction.

    Args:
        image: `(height, width, channels)`, as the model saw it.
        overlay: uint8 `(height, width, 3)`, the image under the heat map of a class.
        predicted: The most probable class and its probability.
        explained: The class that the heat map speaks for, and its probability.
        path: The image to write; its extension decides the format.
    """
    height, width = overlay.shape[:2]
    wide = 3.6 * max(0.6, min(2.0, width / height))
    figure = Figure(figsize=(2 * wide, 3.6))
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.05})
    _show(left, image)
    _show(right, overlay)
    heads = (left, "Predicted: ", predicted), (right, "For: ", explained)
    for axes, head, (name, probability) in heads:
        title = f"{head}{label_text(name, int(8 * wide))} {probability:.1%}"
        axes.set_title(title, fontsize=10, loc="left")
    scale = right.inset_axes((1.03, 0, 0.04, 1))
    scale.imshow(heat_colors(np.linspace(0, 1, 256))[:, None], extent=(0, 1, 0, 1),
                 origin="lower", aspect="auto")  # fmt: skip
    scale.set_xticks(())
    scale.yaxis.tick_right()
    scale.set_yticks((0, 1), ("nothing", "most"), fontsize=8)
    return _save(figure, path)


def displayed(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any channels as people see them: uint8, the first three channels or the first.

    Examples:
        >>> displayed(np.zeros((4, 4, 5), np.float32)).shape
        (4, 4, 3)
    """
    shown = pixels[..., : 3 if pixels.shape[-1] >= 3 else 1]
    return shown if shown.dtype == np.uint8 else np.rint(shown).astype(np.uint8)


def _show(axes: Axes, image: np.ndarray, **options: Any) -> None:
    """An image, small ones with their pixels as squares."""
    axes.axis("off")
    image = displayed(image)
    gray = image.shape[-1] == 1
    axes.imshow(
        image[..., 0] if gray else image,
        cmap="gray" if gray else None,
        vmin=0,
        vmax=255,
        interpolation="nearest" if len(image) < 64 else None,
        **options,
    )


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Colours of a heat map, from violet over red to yellow: uint8 `(..., 3)` for values in 0..1.

    Lightness grows with the value, so that the order survives printing and colour blindness.
    """
    return (matplotlib.colormaps["plasma"](np.asarray(values, float))[..., :3] * 255).astype(
        "uint8"
    )
