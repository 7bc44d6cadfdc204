"""What `run.html` shows of one run besides its record: drawings, images, findings, origin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from keras_resnet.reports import figures as plots
from keras_resnet.reports.images import images
from keras_resnet.reports.origin import ABOUT, origin, recipe_changes
from keras_resnet.reports.run_facts import Results, RunFacts

_MATRIX_CLASSES = 12  # up to here a confusion matrix is a table, above it a drawing


def run_context(run: RunFacts, model: Any) -> dict[str, Any]:
    """Everything that `run.html` and the model card show of a run; `None` loads its model."""
    results = run.main
    return {
        "run": run,
        "results": results,
        "findings": findings(run),
        "curves": _curves(run),
        **_matrix(results),
        **images(run, model),
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
    """One thing that stands out.

    Attributes:
        kind: `"good"`, `"warn"` or `"info"`.
        rule: The macro of `sentences.html` that says it.
        facts: Its arguments.
    """

    kind: str
    rule: str
    facts: dict[str, Any]


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
