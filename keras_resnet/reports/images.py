"""The images of a report: what the model got wrong or was unsure of, and what may say why.

That is where it looked, and the images it learnt from that are alike to it.
"""

from __future__ import annotations

import base64
import functools
import io
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from keras_resnet.data.items import Files, absolute
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.plots import displayed, enlarged
from keras_resnet.reports.run_facts import RunFacts
from keras_resnet.system.errors import DataError, InputError, reason_of

logger = logging.getLogger("keras_resnet")

_MISTAKES, _UNCERTAIN = 12, 8  # images shown
_SIDES = 128, 320  # with at least and at most so many pixels a side
_NEAREST, _NEAR_SIDE = 3, 160  # training images beside a mistake, and the pixels of theirs
_COMPARED = 1000  # training images that those are looked for among: each goes through the model


def images(run: RunFacts, model: Any, say: Callable[[str], object]) -> dict[str, Any]:
    """The cards of the images to look at, with Grad-CAM where the model and they are there.

    Returns:
        `mistakes` and `uncertain`, the cards; `heat`, whether any has a heat map; `compared`, how
        many training images those beside a mistake are the nearest of, and `drawn`, whether there
        are more; `no_heat` and `no_near`, why there are none.
    """
    results = run.main
    mistakes = results.mistakes[:_MISTAKES] if results else []
    uncertain = results.least_certain(but=mistakes)[:_UNCERTAIN] if results else []
    load = functools.cache(lambda: _model(run) if model is None else model)
    views, no_heat = _spared(_looked_at, run, load, mistakes, uncertain)
    beside, no_near = _spared(_nearest, run, load, mistakes, say)
    near = beside.get("near", {})
    return {
        "mistakes": [_card(row, views, near) for row in mistakes],
        "uncertain": [_card(row, views, near) for row in uncertain],
        "heat": any(len(of_image) > 1 for of_image in views.values()),
        "no_heat": no_heat,
        "no_near": no_near,
        **{key: beside.get(key, 0) for key in ("compared", "drawn")},
    }


def _card(row: dict[str, Any], views: dict[str, Any], near: dict[str, Any]) -> dict[str, Any]:
    shown = {"views": views.get(row["path"]), "near": near.get(row["path"])}
    return {**row, "right": row["true"] == row["predicted"], **shown}


def _spared(find: Callable[..., dict[str, Any]], *arguments: Any) -> tuple[dict[str, Any], str]:
    """What is found, or nothing and the reason: an image less must not cost the report."""
    try:
        return find(*arguments), ""
    except Exception as error:
        logger.debug("Left out of the report.", exc_info=True)
        return {}, reason_of(error)


def _model(run: RunFacts) -> Any:
    # Not at the top: a report of figures alone needs neither a model nor a backend's gradients.
    from keras_resnet.models.files import load_model

    return load_model(run.folder) if run.files else None


def _nearest(run, load, mistakes, say) -> dict[str, Any]:
    """By path of a mistake, the training images whose vectors are nearest to its own."""
    asked = {row["path"]: run.image(row["path"]) for row in mistakes}
    asked = {path: image for path, image in asked.items() if image is not None}
    if not mistakes:
        return {}
    if not asked:
        raise InputError("the images are not where they were: give --images.")
    if (model := load()) is None:
        raise InputError("there is no model file here: give --model.")
    from sklearn.neighbors import NearestNeighbors

    from keras_resnet.inference.embed import embed
    from keras_resnet.models.files import model_input

    trained = run.trained or run
    but = set(map(absolute, asked.values()))
    paths, labels, drawn = trained.training_images(_COMPARED, but)
    say(f"Comparing the mistakes with {len(paths):,} training images ...")
    found = embed(model, Files([*asked.values(), *paths]))
    read = set(found.paths)
    asked = {path: image for path, image in asked.items() if image in read}
    there = [i for i, path in enumerate(paths) if path in read]
    if not (asked and there):
        raise DataError("none of them can be read.")
    vectors = np.split(found.vectors, [len(asked)])  # views of it, in the order of what was asked
    tree = NearestNeighbors(n_neighbors=min(_NEAREST, len(there)), metric="cosine")
    away, which = tree.fit(vectors[1]).kneighbors(vectors[0])
    prepare, near = model_input(model)[0], {}
    for path, distances, places in zip(asked, away, which, strict=True):
        near[path] = [
            {
                **_view(enlarged(prepare.pixels(paths[i]), _SIDES[0]), paths[i], side=_NEAR_SIDE),
                "label": labels[i],
                "similarity": 1 - float(distance),
            }
            for i, distance in zip([there[k] for k in places], distances, strict=True)
        ]
    return {"near": near, "compared": len(there), "drawn": drawn}


def _looked_at(run, load, mistakes, uncertain) -> dict[str, list[dict[str, Any]]]:
    """By path: the image as the model saw it, and why it predicted what it did."""
    from keras_resnet.inference.explain import iter_explanations
    from keras_resnet.models.files import model_class_names

    rows = [row for row in [*mistakes, *uncertain] if run.image(row["path"]) is not None]
    if not rows:
        return {}
    if (model := load()) is None:
        return _plain_views(run, rows)
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
    pixels: np.ndarray,
    path: str,
    seen: bool = False,
    label: str | None = None,
    side: int = _SIDES[1],
) -> dict[str, Any]:
    """One JPEG of an image: as it is, as the model saw it, or under the heat map of a class."""
    pixels = displayed(pixels)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    image.thumbnail((side, side))
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
