"""What a person looks at after a run: `report.html`, one file that needs no network, and a card."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, pass_eval_context
from jinja2.nodes import EvalContext

from keras_resnet.data.opening import opened
from keras_resnet.reports import figures as plots
from keras_resnet.reports.comparison_page import comparison
from keras_resnet.reports.images import images as shown_images
from keras_resnet.reports.origin import ABOUT, origin, recipe_changes
from keras_resnet.reports.run_facts import Results, RunFacts
from keras_resnet.reports.run_files import read_run
from keras_resnet.reports.wording import FILTERS, Markdown, as_markdown, as_time
from keras_resnet.system.device import package_version
from keras_resnet.system.errors import InputError
from keras_resnet.system.files import write_text

_CARD_OWN = re.compile(r"<!-- yours -->\n(.*?)<!-- end of yours -->", re.DOTALL)


def report(
    run_or_runs: str | os.PathLike | Iterable[str | os.PathLike],
    output: str | os.PathLike | None = None,
    *,
    model: Any = None,
    images: Any = None,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Writes what a person wants to see of a run, or of several side by side, as one HTML file.

    Of one run: headline figures, curves, confusion matrix, every class, the most confident
    mistakes beside the training images that are nearest to them, the least certain images, both
    with Grad-CAM over them, reliability, data, settings, the weights' origin, versions, and how to
    use the model; and `MODEL_CARD.md` beside it, in
    which the part between `<!-- yours -->` and `<!-- end of yours -->` is yours and is kept. Of
    several runs: their results, curves, differences, and whether those are more than chance.

    The file needs no network and runs no script. A run that is unfinished, lacks its evaluation
    or was made by an older version gets a report of what there is.

    Args:
        run_or_runs: A run folder, or several; or a folder of folds.
        output: The file to write; by default `report.html` in the run folder, and of several runs
            `comparison.html` beside the first.
        model: The run's model where it is loaded already; else `best.keras` is loaded. For what
            `evaluate` wrote: the model, a `.keras` file or a run folder.
        images: What the model was trained on, as `train` takes it, where no run's record says it:
            arrays, a `datasets.Dataset`, a folder that has moved. Without it such images are not
            shown.
        say: Called with a line about what takes a while, such as `print`.

    Returns:
        The file.

    Raises:
        NotFoundError: There is no such folder; a near name is suggested.
        InputError: A file, a folder that is no run's, or an output that is no `.html` file.
    """
    single = isinstance(run_or_runs, str | os.PathLike)
    folders = [run_or_runs] if single else list(run_or_runs)
    if single and (folds := Path(run_or_runs).expanduser() / "folds.json").is_file():
        folders = sorted(folds.parent.glob("fold-*"))
    if not folders:
        raise InputError("report needs a run folder, or several.")
    if output is not None:
        output = Path(output).expanduser()
        if output.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"A report is written as .html, not as {output.name!r}.")
        if output.is_dir() or not output.parent.is_dir():
            what = "is a folder" if output.is_dir() else "is in a folder that does not exist"
            raise InputError(f"The output {str(output)!r} {what}.")
    runs = [read_run(folder) for folder in folders]
    for run in runs if images is not None else ():
        run.images = opened(images)
    if len(runs) > 1:
        if model is not None:
            raise InputError(f"A model is that of one run. Received: {len(runs)} runs.")
        if len({run.folder.resolve() for run in runs}) < len(runs):
            raise InputError("The same run folder is named twice.")
        path = output or runs[0].folder.resolve().parent / "comparison.html"
        write_text(path, _render("compare.html", **comparison(runs, path)))
        return path
    if isinstance(model, str | os.PathLike):
        # Not at the top: a report of figures alone needs neither a model nor a backend.
        from keras_resnet.models.files import load_model

        file, model = Path(model).expanduser(), load_model(model)
        folder = file if file.is_dir() else file.parent
        if file.exists() and (folder / "config.json").is_file():
            runs[0].trained = dataclasses.replace(read_run(folder), images=runs[0].images)
    path = output or runs[0].folder / "report.html"
    context = run_context(runs[0], model, say)
    write_text(path, _render("run.html", **context))
    _write_card(path.with_name("MODEL_CARD.md"), context)
    return path


@pass_eval_context
def _finalize(context: EvalContext, value: Any) -> Any:
    """What becomes of a value: HTML escapes by itself, in Markdown it is done here."""
    return value if context.autoescape else as_markdown(value)


@functools.cache
def _environment() -> Environment:
    """The templates, compiled once a process."""
    environment = Environment(
        loader=PackageLoader("keras_resnet.reports", "templates"),
        autoescape=lambda name: name is None or name.endswith(".html"),
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment


def _render(template: str, **context: Any) -> str:
    made = {"when": as_time(datetime.now()), "version": package_version()}
    return _environment().get_template(template).render(made=made, **context)


# --- the model card ------------------------------------------------------------------------------

_OWN_TEXT = """## Intended use

*What is this model for, and who uses it? What must it not be used for?*

## Limits

*Which images was it not trained on? Who could be harmed by a wrong prediction, and what then?*
"""


def _write_card(path: Path, context: dict[str, Any]) -> None:
    """Writes the model card; what a person wrote into their part of it stays."""
    own = _OWN_TEXT
    try:
        match = _CARD_OWN.search(path.read_text(encoding="utf-8", errors="surrogateescape"))
        own = match[1] if match else own
    except OSError:
        pass
    write_text(path, _render("MODEL_CARD.md", own=Markdown(own), **context))


# --- the page of one run --------------------------------------------------------------------------

_MATRIX_CLASSES = 12  # up to here a confusion matrix is a table, above it a drawing


def run_context(run: RunFacts, model: Any, say: Callable[[str], object]) -> dict[str, Any]:
    """Everything that `run.html` and the model card show of a run; `None` loads its model."""
    results = run.main
    return {
        "run": run,
        "results": results,
        "findings": findings(run),
        "curves": _curves(run),
        **_matrix(results),
        **shown_images(run, model, say),
        "reliability": _reliability(results),
        "coverage": _coverage(results),
        "sizes": run.image_sizes(),
        "origin": origin(run),
        "recipe": {k: v for k, v in run.recipe.items() if k not in ABOUT},
        "changes": recipe_changes(run.recipe),
        "model_file": next((n for n in ("best.keras", *run.files) if n in run.files), None),
    }


def _curves(run: RunFacts) -> list[dict[str, Any]]:
    charts = []
    for key, better in (("average_precision", max), ("accuracy", max), ("loss", min)):
        train, val = run.history.get(key, []), run.history.get(f"val_{key}", [])
        series = [(train, 1, plots.DASHES[1]), (val, 2, plots.DASHES[0])]
        if not any(math.isfinite(v) for v in [*train, *val]):
            continue
        finite = [v for v in val if math.isfinite(v)]
        best = (val.index(better(finite)) + 1, better(finite)) if finite else None
        percent = key != "loss"
        svg = plots.lines_svg(series, key, percent=percent, mark=best)
        charts.append({"key": key, "svg": svg, "train": train, "val": val, "best": best})
    return charts


def _matrix(results: Results | None) -> dict[str, Any]:
    """The confusion matrix: cells for a table, or a drawing."""
    found: dict[str, Any] = {"matrix": None, "matrix_svg": None}
    if results is None or results.confusion is None:
        return found
    counts, names = results.confusion, results.class_names
    if len(names) > _MATRIX_CLASSES:
        return {**found, "matrix_svg": plots.confusion_svg(counts, names, "confusion")}
    rows = []
    for i, label in enumerate(names):
        total = int(counts[i].sum())
        cells = [_cell(int(count), total, i == j) for j, count in enumerate(counts[i])]
        rows.append({"name": label, "cells": cells, "total": total})
    return {**found, "matrix": rows}


def _cell(count: int, total: int, right: bool) -> dict[str, Any]:
    fraction = count / total if total else 0.0
    # Where black or white is read best on the colour, in the page's light and dark mode.
    steps = {"full": 0.85, "half": 0.65, "some": 0.45, "": 0.0}
    kind = next((k for k, least in steps.items() if fraction > least), "none")
    kind += " diagonal" if right else " wrong"
    return {"count": count, "fraction": fraction, "kind": kind.strip(), "right": right}


def _reliability(results: Results | None) -> dict[str, Any] | None:
    """Confidence against accuracy: the numbers, the bins that are not empty, a drawing."""
    measured = results.calibration if results is not None else None
    if measured is None:
        return None
    bins = [
        {
            "range": f"{100 * low:.0f} to {high:.0%}",
            "count": int(count),
            "confidence": float(confidence),
            "accuracy": float(accuracy),
        }
        for low, high, count, confidence, accuracy in zip(
            measured.edges[:-1], measured.edges[1:], measured.counts, measured.confidence,
            measured.accuracy, strict=True,
        )
        if count
    ]  # fmt: skip
    svg = plots.reliability_svg(measured, "reliability")
    return {"measured": measured, "bins": bins, "svg": svg}


def _coverage(results: Results | None) -> dict[str, Any] | None:
    """Accuracy over the images that the model is surest of: a drawing, and what accuracies cost."""
    found = results.coverage if results is not None else None
    if found is None:
        return None
    rows = []
    for wanted in (0.8, 0.9, 0.95, 0.99, 1.0):
        reached = np.flatnonzero(found[1] >= wanted)
        if len(reached) and wanted > found[1][-1]:  # what all images have costs nothing
            coverage, _, least = (float(of[reached[-1]]) for of in found)
            rows.append({"wanted": wanted, "coverage": coverage, "least": least})
    return {"svg": plots.coverage_svg(*found[:2], "coverage"), "rows": rows, "all": found[1][-1]}


# --- what stands out: each finding is a number and a rule, none a guess ---------------------------


class Finding(NamedTuple):
    """One thing that stands out."""

    kind: str  # "good", "warn" or "info"
    rule: str  # the macro of `sentences.html` that says it
    facts: dict[str, Any]  # its arguments


def findings(run: RunFacts) -> list[Finding]:
    """What stands out in a run, the most telling first."""
    found = [*_of_results(run.main)] if run.main else []
    if len(run.results) == 2:
        facts = {part: results.headline[1] for part, results in run.results.items()}
        found.append(Finding("info", "both_parts", {**facts, "word": run.main.headline[0]}))
    found += _of_training(run)
    counts = [n for n in run.training_counts.values() if n]
    if counts and max(counts) > 3 * min(counts):
        used = next((k for k in ("class_weights", "sampler") if run.recipe.get(k)), None)
        facts = {"times": max(counts) / min(counts), "balanced": used}
        found.append(Finding("info" if used else "warn", "uneven_classes", facts))
    if run.all_skipped:
        found.append(Finding("warn", "skipped", {"count": len(run.all_skipped)}))
    return found


def _of_results(results: Results) -> Iterator[Finding]:
    baseline, (low, _) = results.baseline, results.interval
    if baseline is not None and len(results.class_names) > 1:
        facts = {"label": baseline[0], "fraction": baseline[1]}
        if low <= baseline[1]:
            yield Finding("warn", "not_above_baseline", {**facts, "low": low})
        else:
            yield Finding("good", "above_baseline", facts)
    for actual, predicted, count, fraction in results.confusions(1):
        if fraction >= 0.1:
            facts = {"actual": actual, "predicted": predicted, "count": count, "fraction": fraction}
            yield Finding("info", "most_frequent_mistake", facts)
    if len(results.occurring) > 2:
        worst = min(results.occurring, key=lambda row: row["recall"])
        facts = {"label": worst["name"], "recall": worst["recall"]}
        yield Finding("info", "least_found_class", facts)
    measured = results.calibration
    if measured is not None and abs(measured.bias) > 0.05:
        kind = "warn" if measured.bias > 0 else "info"
        yield Finding(kind, "confidence", {"accuracy": results.top1, "bias": measured.bias})


def _of_training(run: RunFacts) -> Iterator[Finding]:
    best, wanted = run.best_epoch, run.recipe.get("epochs")
    if best is not None and run.epochs > 1:
        if best == run.epochs:
            yield Finding("info", "last_epoch_best", {})
        train = run.history[run.score][best - 1] if run.score in run.history else math.nan
        val = run.history[f"val_{run.score}"][best - 1]
        if train - val > 0.15:
            yield Finding("warn", "overfits", {"train": train, "val": val, "score": run.score})
    if isinstance(wanted, int) and 0 < run.epochs < wanted:
        yield Finding("info", "stopped_early", {"run": run.epochs, "wanted": wanted})
