"""What `compare.html` shows of several runs side by side besides their records."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from keras_resnet.inference.calibration import paired_p_value
from keras_resnet.reports import figures as plots
from keras_resnet.reports.origin import ABOUT
from keras_resnet.reports.run_facts import Results, RunFacts, same_images
from keras_resnet.system.files import shown_path


class Row(NamedTuple):
    """One run of the comparison."""

    run: RunFacts
    label: str  # its name, unlike the others'
    link: str | None  # the URL of its own report where that is below the comparison's folder
    results: Results | None  # on the part that all have, or else the ones that count
    best: set[str]  # the columns in which no other run is better, and some is worse


def comparison(runs: list[RunFacts], path: Path) -> dict[str, Any]:
    """Everything that `compare.html`, to be written at `path`, shows of several runs."""
    part = next((p for p in ("test", "validation") if all(p in r.results for r in runs)), None)
    results = [run.results[part] if part else run.main for run in runs]
    labels = _labels(runs)
    best = _best_columns(results)
    rows = [
        Row(run, label, _link(run, path), *found)
        for run, label, *found in zip(runs, labels, results, best, strict=True)
    ]
    known = [row for row in rows if row.results]
    measures = list(dict.fromkeys(row.results.headline[0] for row in known))
    highest = max((row.results.headline[1] for row in known), default=None)
    winners = [row for row in known if row.results.headline[1] == highest]
    winners = winners if len(measures) == 1 else []  # one does not outdo another task's
    same = part is not None and same_images(runs, part)
    return {
        "part": part,
        "rows": rows,
        "winners": winners,
        "measures": measures,
        "words": list(dict.fromkeys(row.results.word for row in known)),
        "same": same,
        "single_images": all(row.results.rows for row in known),
        "charts": _overlaid(rows),
        "pairs": _paired(rows, winners[0]) if same and winners else [],
        "classes": _classes(results),
        **_differences(runs),
    }


def _labels(runs: list[RunFacts]) -> list[str]:
    """The folders' names; with what is above them where two are alike."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    folders = [run.folder.resolve() for run in runs]
    return [os.path.join(Path(shown_path(one.parent)).name, one.name) for one in folders]


def _link(run: RunFacts, path: Path) -> str | None:
    target, below = (run.folder / "report.html").resolve(), path.resolve().parent
    if not target.is_file() or not target.is_relative_to(below):  # the way up names other folders
        return None
    return "./" + quote(target.relative_to(below).as_posix().encode("utf-8", "surrogateescape"))


def _best_columns(results: list[Results | None]) -> list[set[str]]:
    """By run: the columns whose best value is its own; none where all are equal or tasks differ."""
    found: list[set[str]] = [set() for _ in results]
    if len({r.headline[0] for r in results if r}) > 1:
        return found
    columns = {
        "headline": [r and r.headline[1] for r in results],
        "top1": [r and r.top1 for r in results],
        "loss": [None if r is None or r.loss is None else -r.loss for r in results],
        "f1": [r and r.macro_f1 for r in results],
        "calibration": [r and r.calibration and -r.calibration.error for r in results],
    }
    for column, values in columns.items():
        known = [value for value in values if value is not None]
        for i, value in enumerate(values):
            if len(set(known)) > 1 and value == max(known):
                found[i].add(column)
    return found


def _overlaid(rows: list[Row]) -> list[dict[str, Any]]:
    """By chart: the drawing, its legend, and where each line ends."""
    charts = []
    for key, title in (
        ("val_average_precision", "Validation average precision"),
        ("val_accuracy", "Validation accuracy"), ("val_loss", "Validation loss"),
        ("accuracy", "Training accuracy"), ("loss", "Training loss"),
    ):  # fmt: skip
        series, legend, ends = [], [], []
        for i, row in enumerate(rows):
            values = row.run.history.get(key, [])
            if not any(map(math.isfinite, values)):
                continue
            dash = plots.DASHES[i % len(plots.DASHES)]
            series.append((values, i + 1, dash))
            pattern = "" if dash == "-" else " ".join(str(2 * v) for v in dash[1])
            legend.append(("line", f"s{i % 8 + 1}", pattern, row.label))
            ends.append((row.label, values[-1]))
        if series:
            percent = not key.endswith("loss")
            svg = plots.lines_svg(series, key, percent=percent)
            charts.append(
                {"title": title, "percent": percent, "svg": svg, "legend": legend, "ends": ends}
            )
    return charts


def _paired(rows: list[Row], winner: Row) -> list[dict[str, Any]]:
    """Every other run against the best: how many images both, one or none gets right."""

    def right(row: Row) -> dict[tuple[str, ...], bool]:
        return {Path(r["path"]).parts[-2:]: r["true"] == r["predicted"] for r in row.results.rows}

    first, found = right(winner), []
    for row in rows:
        if row is winner:
            continue
        other = right(row)
        both = sum(first[k] and other[k] for k in first)
        alone = sum(other[k] and not first[k] for k in first)
        best_alone = sum(first[k] and not other[k] for k in first)
        counts = [both, alone, best_alone, len(first) - both - alone - best_alone]
        p = paired_p_value(alone, best_alone)
        equal = not alone and not best_alone  # right and wrong on the same images
        found.append({"label": row.label, "counts": counts, "p": p, "equal": equal})
    return found


def _classes(results: list[Results | None]) -> dict[str, list[float | None]]:
    """By class: the F1 of every run, where at least two say it."""
    scores = [{row["name"]: row["f1"] for row in r.occurring} if r else {} for r in results]
    names = list(dict.fromkeys(name for of_run in scores for name in of_run))
    if len(names) > 200 or sum(map(bool, scores)) < 2:
        return {}
    return {name: [of_run.get(name) for of_run in scores] for name in names}


def _differences(runs: list[RunFacts]) -> dict[str, Any]:
    """The settings that differ, each with its value in every run; and how many there are."""
    settings = []
    for run in runs:
        own = {k: run.config.get(k) for k in ("directory", "seed", "exif", "backend")}
        own |= {f"version of {k}": v for k, v in run.config.get("versions", {}).items()}
        settings.append({**{k: v for k, v in run.recipe.items() if k not in ABOUT[1:]}, **own})
    keys = list(dict.fromkeys(k for of_run in settings for k in of_run))
    found = {key: [of_run.get(key) for of_run in settings] for key in keys}
    changed = {k: values for k, values in found.items() if any(v != values[0] for v in values)}
    return {"settings": changed, "settings_count": len(keys)}
