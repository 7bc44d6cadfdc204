"""Every figure; the only module that imports matplotlib.

Figures are built on `Figure` objects, not through pyplot: no window, no global state, and safe in
a thread. Each function writes a file and returns its path.
"""

from __future__ import annotations

import io
import logging
import os
import re
import textwrap
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keras_resnet.errors import InputError
from keras_resnet.files import printable, replace_file
from keras_resnet.reliability import Calibration, accuracy_interval

# Class names may be in any script; a missing glyph is drawn as a box and needs no warning a name.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

_TRAIN, _VAL = "#1f6feb", "#d9480f"


def _text(name: object, width: int = 24) -> str:
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
        path: The picture to write; its extension decides the format.
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
        path: The picture to write.
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
    """Draws pictures in a grid, each under its title.

    Args:
        images: uint8 `(n, height, width, channels)`, 1, 3 or 4 channels.
        titles: One text a picture.
        path: The picture to write.
        columns: Pictures in a row.
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
        axes.set_title("\n".join(_text(line, 30) for line in title.split("\n")), fontsize=9)
    return _save(figure, path)


def confusion_matrix(matrix: Any, class_names: Sequence[str], path: str | os.PathLike) -> Path:
    """Draws a confusion matrix: rows are true classes, colours shares of the row.

    Args:
        matrix: Counts, `(classes, classes)`: an array, or lists.
        class_names: Names in the order of the rows.
        path: The picture to write.

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
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, fraction=0.046, label="Share of the true class")
    names = [_text(name) for name in class_names]
    if count <= 60:
        axes.set_xticks(range(count), names, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(count), names, fontsize=8)
    if count <= 30:
        for i, j in np.argwhere(matrix > 0):
            axes.text(
                j, i, f"{matrix[i, j]:,}", ha="center", va="center", fontsize=8,
                color="white" if shares[i, j] > 0.5 else "black",
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


# --- for a web page ------------------------------------------------------------------------------

# Colours that stand for a role; in the page they are CSS variables, which follow its light or dark
# mode. No other colour of a figure may be one of these.
ROLES = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "surface": "#040404",
    **{f"s{i}": f"#0505{i:02d}" for i in range(1, 9)},  # series
}
# Every series has a dash of its own too: colour alone does not tell them apart for everyone.
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

_SVG_SETTINGS = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "keras_resnet",  # the same figure is the same file
}
_SVG_LOCK = threading.Lock()  # matplotlib's settings are global


def _svg(figure: Figure, key: str) -> str:
    """A figure as an `<svg>` element to put into a page; `key` keeps its ids from others'."""
    stream = io.StringIO()
    with _SVG_LOCK, matplotlib.rc_context(_SVG_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(
            stream, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04,
            dpi=200, metadata=nothing,
        )  # fmt: skip
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # It would style the whole page.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    # The page decides the size; the viewBox keeps the shape.
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    text = f'{head} aria-hidden="true" focusable="false">{rest}'
    used = set(re.findall(r"(?:url\(#|xlink:href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(#|xlink:href=\"#)", rf"\g<1>{key}-", text)
    # The page's own font; matplotlib writes one property or several, by its version.
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    for role, color in ROLES.items():
        text = text.replace(color, f"var(--{role})")
    return re.sub(r"\n\s*", "\n", text).strip()


def _page_axes(width: float, height: float):
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    _page_style(axes)
    return figure, axes


def _page_style(axes) -> None:
    axes.set_facecolor("none")
    axes.tick_params(length=0, labelcolor=ROLES["muted"], labelsize=10, pad=5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(ROLES["line"])
    axes.grid(axis="y", color=ROLES["line"], lw=0.8)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=ROLES["muted"], size=10)


def lines_svg(
    series: Sequence[tuple[Sequence[float], int, str]],
    key: str,
    *,
    percent: bool = False,
    mark: tuple[int, float] | None = None,
) -> str:
    """Draws numbers over the epochs for a page; the page says which line is which.

    Args:
        series: Values one an epoch, the colour's number from 1, and the dash (of `DASHES`' kind).
        key: Unique in the page.
        percent: Values are shares.
        mark: An epoch (from 1) and its value, to be marked and written out.

    Returns:
        An `<svg>` element whose colours are CSS variables: `--ink`, `--muted`, `--line`,
        `--surface`, `--s1` to `--s8`.
    """
    figure, axes = _page_axes(5.4, 3.0)
    drawn = []
    for values, color, dash in series:
        values = np.asarray(values, float)
        if not np.isfinite(values).any():
            continue
        drawn.append(values[np.isfinite(values)])
        marker = "o" if values.size < 16 else None
        axes.plot(
            np.arange(1, values.size + 1), values, color=ROLES[f"s{(color - 1) % 8 + 1}"],
            ls=dash, lw=2, marker=marker, ms=4.5, clip_on=False,
        )  # fmt: skip
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
        axes.plot(*mark, "o", ms=10, mfc="none", mec=ROLES["ink"], mew=1.4, clip_on=False, zorder=5)
        longest = max((v.size for v in drawn), default=1)
        left = mark[0] > (1 + longest) / 2
        high = mark[1] > sum(axes.get_ylim()) / 2
        axes.annotate(
            text, mark, textcoords="offset points", xytext=(-4 if left else 4, -22 if high else 12),
            ha="right" if left else "left", fontsize=11, fontweight="bold", color=ROLES["ink"],
            bbox={"facecolor": ROLES["surface"], "edgecolor": "none", "pad": 1.5, "alpha": 0.8},
            zorder=6,
        )  # fmt: skip
    axes.set_xlabel("Epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=8))
    axes.margins(x=0.02)
    return _svg(figure, key)


def reliability_svg(result: Calibration, key: str) -> str:
    """Draws how often answers of each confidence are right, and how many there are, for a page.

    Returns:
        An `<svg>` element, coloured as `lines_svg`'s.
    """
    figure = Figure(figsize=(5.4, 4.6))
    top, bottom = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": (3.4, 1), "hspace": 0.12}
    )
    for axes in (top, bottom):
        _page_style(axes)
    width = np.diff(result.edges)
    middle = result.edges[:-1] + width / 2
    filled = result.counts > 0
    top.plot([0, 1], [0, 1], color=ROLES["muted"], lw=1.2, ls=(0, (4, 3)), zorder=1)
    accuracy, counts = result.accuracy[filled], result.counts[filled]
    top.bar(middle[filled], accuracy, width[filled] * 0.88, color=ROLES["s1"], alpha=0.75, zorder=2)
    ends = np.array(
        [accuracy_interval(round(a * n), int(n)) for a, n in zip(accuracy, counts, strict=True)]
    ).reshape(-1, 2)
    top.vlines(middle[filled], ends[:, 0], ends[:, 1], color=ROLES["ink"], lw=1.2, zorder=3)
    half = width[filled] * 0.44
    top.hlines(
        result.confidence[filled], middle[filled] - half, middle[filled] + half,
        color=ROLES["s2"], lw=2.2, zorder=4,
    )  # fmt: skip
    percent = lambda y, _: f"{y:.0%}"  # noqa: E731
    top.set(ylim=(0, 1), xlim=(0, 1), ylabel="Right")
    top.yaxis.set_major_formatter(percent)
    bottom.bar(middle, result.counts, width * 0.88, color=ROLES["muted"], alpha=0.6)
    bottom.set(xlabel="Confidence", ylabel="Pictures")
    bottom.xaxis.set_major_formatter(percent)
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3, min_n_ticks=1))
    return _svg(figure, key)


def confusion_svg(matrix: np.ndarray, class_names: Sequence[str], key: str) -> str:
    """Draws a confusion matrix of many classes for a page: the fuller the colour, the more.

    Args:
        matrix: Counts, `(classes, classes)`, rows are true classes.
        class_names: Names in the order of the rows; written beside it for up to 40 classes.
        key: Unique in the page.

    Returns:
        An `<svg>` element, coloured as `lines_svg`'s.
    """
    count = len(class_names)
    figure, axes = _page_axes(7.2, 7.2)
    axes.grid(False)
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    # One blue for both modes, more or less transparent: few mistakes must be seen, hence the root.
    pixels = np.empty((count, count, 4))
    pixels[..., :3] = (0.24, 0.49, 0.92)
    pixels[..., 3] = np.sqrt(shares)
    axes.imshow(pixels, interpolation="nearest", aspect="equal")
    axes.spines[:].set_visible(True)
    axes.set(xlabel="Predicted class", ylabel="True class")
    if count <= 40:
        names, size = [_text(name, 18) for name in class_names], 9 if count <= 24 else 7
        axes.set_xticks(range(count), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), names)
        axes.tick_params(labelsize=size)
    return _svg(figure, key)
