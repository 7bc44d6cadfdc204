"""The images of a report: what the model got wrong or was unsure of, and where it looked."""

from __future__ import annotations

import base64
import io
import logging
import os
from typing import Any

import numpy as np
from PIL import Image

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.plots import displayed, enlarged
from keras_resnet.reports.run_facts import RunFacts
from keras_resnet.system.errors import reason_of

logger = logging.getLogger("keras_resnet")

_MISTAKES, _UNCERTAIN = 12, 8  # images shown
_SIDES = 128, 320  # with at least and at most so many pixels a side


def images(run: RunFacts, model: Any) -> dict[str, Any]:
    """The cards of the images to look at, with Grad-CAM where the model and they are there.

    Returns:
        `mistakes` and `uncertain`, the cards; `heat`, whether any has a heat map; `no_heat`, why
        none has.
    """
    results = run.main
    mistakes = results.mistakes[:_MISTAKES] if results else []
    uncertain = results.least_certain(but=mistakes)[:_UNCERTAIN] if results else []
    views, problem = {}, ""
    try:
        views = _looked_at(run, model, mistakes, uncertain)
    except Exception as error:  # an image less must not cost the report
        logger.debug("No Grad-CAM in the report.", exc_info=True)
        problem = reason_of(error)
    return {
        "mistakes": [_card(row, views.get(row["path"])) for row in mistakes],
        "uncertain": [_card(row, views.get(row["path"])) for row in uncertain],
        "heat": any(len(of_image) > 1 for of_image in views.values()),
        "no_heat": problem,
    }


def _card(row: dict[str, Any], views: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {**row, "right": row["true"] == row["predicted"], "views": views}


def _looked_at(run, model, mistakes, uncertain) -> dict[str, list[dict[str, Any]]]:
    """By path: the image as the model saw it, and why it predicted what it did."""
    # Not at the top: a report of figures alone needs neither a model nor a backend's gradients.
    from keras_resnet.inference.explain import iter_explanations
    from keras_resnet.models.files import load_model, model_class_names

    rows = [row for row in [*mistakes, *uncertain] if run.image(row["path"]) is not None]
    if not rows:
        return {}
    if model is None and not run.files:
        return _plain_views(run, rows)
    model = load_model(run.folder) if model is None else model
    known = set(model_class_names(model))
    # Of several labels the first one stands for all in a heat map.
    rows = [
        {**row, **{key: row[key] if row[key] in known else row[key].split("|")[0]
                   for key in ("predicted", "true")}}
        for row in rows
    ]  # fmt: skip
    wrong = {row["path"] for row in mistakes}
    mistakes = [row for row in rows if row["path"] in wrong]
    rows = [row for row in rows if row["predicted"] in known]
    views: dict[str, list[dict[str, Any]]] = {}
    for key, asked in (("predicted", rows), ("true", mistakes)):
        asked = [row for row in asked if row in rows and row[key] in known]
        if not asked:
            continue
        paths = [run.image(row["path"]) for row in asked]
        found = iter_explanations(model, paths, class_name=[row[key] for row in asked])
        for row, explanation in zip(asked, found, strict=True):
            if explanation.heatmap is None:
                continue
            if row["path"] not in views:
                seen = _view(enlarged(explanation.pixels, _SIDES[0]), row["path"], seen=True)
                views[row["path"]] = [seen]
            drawn = explanation.overlay(least=_SIDES[0])
            views[row["path"]].append(_view(drawn, row["path"], label=row[key]))
    return views


def _plain_views(run: RunFacts, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    config = run.config.get("preprocess")
    preprocess = Preprocess() if config is None else Preprocess.from_config(config)
    found = ((row["path"], preprocess.pixels(run.image(row["path"]))) for row in rows)
    return {path: [_view(enlarged(pixels, _SIDES[0]), path)] for path, pixels in found}


def _view(
    pixels: np.ndarray, path: str, seen: bool = False, label: str | None = None
) -> dict[str, Any]:
    """One JPEG of an image: as it is, as the model saw it, or under the heat map of a class."""
    pixels = displayed(pixels)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    image.thumbnail((_SIDES[1],) * 2)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=82, optimize=True)
    return {
        "jpeg": base64.b64encode(stream.getvalue()).decode("ascii"),
        "file": os.path.basename(path),
        "seen": seen,
        "label": label,
        "width": image.width,
        "height": image.height,
    }
