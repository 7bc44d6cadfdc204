"""The pictures of a report: what the model got wrong or was unsure of, and where it looked."""

from __future__ import annotations

import base64
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.reports.run_facts import RunFacts
from keras_resnet.reports.wording import counted, name, plain

logger = logging.getLogger("keras_resnet")

_MISTAKES, _UNCERTAIN = 12, 8  # pictures shown
_SIDES = 128, 320  # with at least and at most so many pixels a side


def pictures(run: RunFacts, model: Any) -> dict[str, Any]:
    """The cards of the pictures to look at, with Grad-CAM where the model and they are there."""
    empty = {"mistakes": [], "uncertain": [], "mistakes_text": "", "heat_note": ""}
    answers = run.main
    if answers is None or not answers.rows:
        return empty
    mistakes = answers.confident_mistakes(_MISTAKES)
    uncertain = answers.least_certain(_UNCERTAIN, (row["path"] for row in mistakes))
    problem, views = "", {}
    try:
        views = _looked_at(run, model, mistakes, uncertain)
    except Exception as error:  # a picture less must not cost the report
        logger.debug("No Grad-CAM in the report.", exc_info=True)
        problem = str(error).strip().split("\n")[0] or type(error).__name__
    wrong = sum(row["true"] != row["predicted"] for row in answers.rows)
    text = (
        f"{counted(wrong, 'picture')} of {answers.count:,} got the wrong answer; these are the "
        f"{len(mistakes)} to which the model gave the highest probability. A label may be wrong, "
        "too."
        if wrong > len(mistakes)
        else f"All {counted(wrong, 'picture')} with a wrong answer, the surest first."
    )
    if any(view for view in views.values()):
        note = Markup(
            '<p class="small">Each picture as the model saw it, and where it found what speaks for '
            'a class (Grad-CAM): nothing <span class="heat"></span> most. The scale is each '
            "picture's own.</p>"
        )
    elif problem:
        note = Markup('<p class="small">Without Grad-CAM: {}</p>').format(plain(problem))
    else:
        note = ""
    return {
        "mistakes": [_card(row, views.get(row["path"])) for row in mistakes],
        "uncertain": [_card(row, views.get(row["path"])) for row in uncertain],
        "mistakes_text": text,
        "heat_note": note,
    }


def _card(row: dict[str, Any], views: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {
        **row,
        "path": os.path.join(*Path(row["path"]).parts[-2:]),
        "right": row["true"] == row["predicted"],
        "views": views,
        "missing": "The picture is not where it was.",
    }


def _looked_at(run, model, mistakes, uncertain) -> dict[str, list[dict[str, Any]]]:
    """By path: the picture as the model saw it, and why it answered what it did."""
    # Not at the top: a report of figures alone needs neither a model nor a backend's gradients.
    from keras_resnet.inference.explain import iter_explanations
    from keras_resnet.models.files import load_model, model_class_names

    rows = [row for row in [*mistakes, *uncertain] if run.picture(row["path"]) is not None]
    if not rows:
        return {}
    if model is None and not run.files:
        return _plain_views(run, rows)
    model = load_model(run.folder) if model is None else model
    known = set(model_class_names(model))
    rows = [row for row in rows if row["predicted"] in known]
    views: dict[str, list[dict[str, Any]]] = {}
    for key, asked in (("predicted", rows), ("true", mistakes)):
        asked = [row for row in asked if row in rows and row[key] in known]
        if not asked:
            continue
        paths = [run.picture(row["path"]) for row in asked]
        found = iter_explanations(model, paths, class_name=[row[key] for row in asked])
        for row, explanation in zip(asked, found, strict=True):
            if explanation.heatmap is None:
                continue
            file = plain(os.path.basename(row["path"]))
            if row["path"] not in views:
                pixels = _at_least(explanation.pixels)
                views[row["path"]] = [_view(pixels, f"{file} as the model saw it", "the picture")]
            text = Markup("for {}").format(name(row[key]))
            alt = f"{file}, under a heat map of what speaks for {plain(row[key])}"
            drawn = explanation.overlay(least=_SIDES[0])
            views[row["path"]].append(_view(drawn, alt, text))
    return views


def _plain_views(run: RunFacts, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    config = run.config.get("preprocess")
    preprocess = Preprocess.from_config(config) if isinstance(config, dict) else Preprocess()
    views = {}
    for row in rows:
        file = plain(os.path.basename(row["path"]))
        pixels = _at_least(preprocess.pixels(run.picture(row["path"])))
        views[row["path"]] = [_view(pixels, file, "the picture")]
    return views


def _at_least(pixels: np.ndarray) -> np.ndarray:
    times = max(1, -(-_SIDES[0] // min(pixels.shape[:2])))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def _view(pixels: np.ndarray, alt: str, text: str | Markup) -> dict[str, Any]:
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    picture.thumbnail((_SIDES[1],) * 2)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82, optimize=True)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return {
        "src": f"data:image/jpeg;base64,{data}",
        "alt": alt,
        "text": text,
        "width": picture.width,
        "height": picture.height,
    }
