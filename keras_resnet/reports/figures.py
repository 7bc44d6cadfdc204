"""The figures of a page, as `<svg>` elements, each with a key that is unique in the page.

Their colours are CSS variables: `--ink`, `--muted`, `--line`, `--surface`, `--s1` to `--s8`.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from keras_resnet.inference.calibration import Calibration, accuracy_interval
from keras_resnet.plots import DASHES as DASHES, confusion_pixels, draw_lines, label_text

# Colours that stand for a role; in the page they are CSS variables, which follow its light or dark
# mode. No other colour of a figure may be one of these.
ROLES = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "surface": "#040404",
    **{f"s{i}": f"#0505{i:02d}" for i in range(1, 9)},  # series
}

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
    series: Sequence[tuple[Sequence[float], int, str]],  # values, colour from 1, one of DASHES
    key: str,
    *,
    percent: bool = False,  # values are fractions
    mark: tuple[int, float] | None = None,  # epoch (from 1) and value, to be written out
) -> str:
    """Draws numbers over the epochs; the page says which line is which."""
    figure, axes = _page_axes(5.4, 3.0)
    colored = [(values, ROLES[f"s{(color - 1) % 8 + 1}"], dash) for values, color, dash in series]
    ink, surface = ROLES["ink"], ROLES["surface"]
    draw_lines(axes, colored, percent=percent, mark=mark, ink=ink, surface=surface)
    return _svg(figure, key)


def reliability_svg(result: Calibration, key: str) -> str:
    """Draws how often predictions of each confidence are right, and how many there are."""
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
    top.set(ylim=(0, 1), xlim=(0, 1), ylabel="Right")
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.bar(middle, result.counts, width * 0.88, color=ROLES["muted"], alpha=0.6)
    bottom.set(xlabel="Confidence", ylabel="Images")
    bottom.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3, min_n_ticks=1))
    return _svg(figure, key)


def coverage_svg(coverage: np.ndarray, accuracy: np.ndarray, key: str) -> str:
    """Draws the accuracy over the fraction of images that are answered."""
    figure, axes = _page_axes(5.4, 3.0)
    axes.plot([0, *coverage], [accuracy[0], *accuracy], color=ROLES["s1"], lw=2, drawstyle="steps")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlim=(0, 1), ylim=(min(0.95, accuracy.min()) - 0.02, 1.01), xlabel="Images answered")
    return _svg(figure, key)


def confusion_svg(matrix: np.ndarray, class_names: Sequence[str], key: str) -> str:
    """Draws a confusion matrix of many classes, coloured as `plots.confusion_pixels`.

    Names are written beside it for up to 40 classes.
    """
    count = len(class_names)
    figure, axes = _page_axes(7.2, 7.2)
    axes.grid(False)
    axes.imshow(confusion_pixels(matrix), interpolation="nearest", aspect="equal")
    axes.spines[:].set_visible(True)
    axes.set(xlabel="Predicted class", ylabel="True class")
    if count <= 40:
        names, size = [label_text(name, 18) for name in class_names], 9 if count <= 24 else 7
        axes.set_xticks(range(count), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), names)
        axes.tick_params(labelsize=size)
    return _svg(figure, key)
