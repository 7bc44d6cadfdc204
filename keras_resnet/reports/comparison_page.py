"""What a page shows of several runs side by side, as the template wants it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from keras_resnet.inference.calibration import paired_p_value
from keras_resnet.reports import figures as plots
from keras_resnet.reports.run_facts import Answers, RunFacts, same_pictures
from keras_resnet.reports.wording import (
    NOTHING,
    as_decimal,
    as_duration,
    as_percent,
    as_setting,
    counted,
    is_number,
    listed,
    name,
    plain,
)


def comparison(runs: list[RunFacts], path: Path) -> dict[str, Any]:
    """Everything that `compare.html`, to be written at `path`, shows of several runs."""
    part = next((p for p in ("test", "validation") if all(p in r.answers for r in runs)), None)
    answers = [run.answers[part] if part else run.main for run in runs]
    labels = _labels(runs)
    scored = [(a.top1, -i) for i, a in enumerate(answers) if a is not None]
    best = -max(scored)[1] if scored else None
    same = part is not None and same_pictures(runs, part)
    context: dict[str, Any] = {
        "runs": runs,
        "title": f"Comparison of {len(runs)} runs",
        "heading": listed(labels, 4),
        "lead": _comparison_lead(runs, answers, best, labels, part),
        "findings": _comparison_findings(answers, part, same),
        "results_text": "The best value of each column is marked.",
        **_results(runs, answers, labels, path),
        "charts": _overlaid(runs, labels),
        "pairs": _paired(answers, best, labels) if same else [],
        "pairs_text": "Every run against the one with the highest accuracy, on the same pictures.",
        **_class_comparison(answers, labels),
        **_differences(runs, labels),
        "missing": [(label, "; ".join(r.missing)) for label, r in zip(labels, runs, strict=True)
                    if r.missing],
    }  # fmt: skip
    anchors = [("results", "Results", True), ("training", "Training", context["charts"]),
               ("pairs", "Chance", context["pairs"]), ("classes", "Classes", context["class_rows"]),
               ("settings", "Settings", True)]  # fmt: skip
    context["sections"] = [(anchor, text) for anchor, text, there in anchors if there]
    return context


def _labels(runs: list[RunFacts]) -> list[str]:
    """The folders' names; with what is above them where two are alike."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [os.path.join(*run.folder.resolve().parts[-2:]) for run in runs]


def _comparison_lead(runs, answers, best, labels, part) -> Markup:
    if best is None:
        return Markup("None of these runs has been evaluated yet.")
    where = f"on the {part} pictures" if part else "each on its own pictures"
    return Markup("{} has the highest accuracy {}: {}.").format(
        name(labels[best]), where, as_percent(answers[best].top1)
    )


def _comparison_findings(answers, part, same) -> list[tuple[str, Markup]]:
    if part is None:
        return [("warn", Markup("Not every run was evaluated on the same part of its data: their "
                                "accuracies are not comparable."))]  # fmt: skip
    if not same and all(a.rows for a in answers):
        return [("warn", Markup("The runs were not evaluated on the same pictures: a difference "
                                "may come from those."))]  # fmt: skip
    return []


def _results(runs, answers, labels, path: Path) -> dict[str, Any]:
    head = ["Run", "Accuracy", "95% interval", "Loss", "F1", "Calibration error", "Best epoch",
            "Epochs", "Time", "Parameters", "Status"]  # fmt: skip
    columns = {
        1: [a.top1 if a else None for a in answers],
        3: [-a.loss if a and a.loss is not None else None for a in answers],
        4: [a.macro_f1 if a else None for a in answers],
        5: [-a.calibration.error if a and a.calibration else None for a in answers],
    }
    rows = []
    for i, (run, a) in enumerate(zip(runs, answers, strict=True)):
        parameters = run.model.get("parameters")
        row: list[Any] = [
            _linked(run, labels[i], path),
            as_percent(a.top1) if a else NOTHING,
            "{} to {}".format(*map(as_percent, a.interval)) if a else NOTHING,
            as_decimal(a.loss) if a else NOTHING,
            as_decimal(a.macro_f1) if a else NOTHING,
            as_percent(a.calibration.error) if a and a.calibration else NOTHING,
            run.best_epoch or NOTHING,
            run.epochs or NOTHING,
            as_duration(run.seconds),
            f"{parameters:,}" if is_number(parameters) else NOTHING,
            run.status,
        ]
        for column, values in columns.items():
            known = [v for v in values if v is not None]
            if len(known) > 1 and values[i] == max(known):
                row[column] = Markup('<span class="best">{}</span>').format(row[column])
        rows.append(row)
    return {"head": head, "rows": rows}


def _linked(run: RunFacts, label: str, path: Path) -> Markup:
    """The run's name, leading to its own report where that is near."""
    target = run.folder / "report.html"
    if not target.is_file():
        return name(label)
    relative = os.path.relpath(target.resolve(), path.resolve().parent)
    link = quote(relative.replace(os.sep, "/").encode("utf-8", "surrogateescape"))
    return Markup('<a href="{}">{}</a>').format(f"./{link}", name(label))


def _overlaid(runs: list[RunFacts], labels: list[str]) -> list[dict[str, Any]]:
    charts = []
    for key, title, percent in (
        ("val_accuracy", "Validation accuracy", True), ("val_loss", "Validation loss", False),
        ("accuracy", "Training accuracy", True), ("loss", "Training loss", False),
    ):  # fmt: skip
        series, legend, ends = [], [], []
        for i, run in enumerate(runs):
            values = run.history.get(key, [])
            if not any(map(math.isfinite, values)):
                continue
            dash = plots.DASHES[i % len(plots.DASHES)]
            series.append((values, i + 1, dash))
            pattern = "" if dash == "-" else " ".join(str(2 * v) for v in dash[1])
            legend.append(("line", f"s{i % 8 + 1}", pattern, name(labels[i])))
            shown = as_percent(values[-1]) if percent else as_decimal(values[-1])
            ends.append(f"{plain(labels[i])} ends at {shown}")
        if series:
            charts.append(
                {
                    "title": title,
                    "alt": f"{title} over the epochs: {'; '.join(ends)}.",
                    "svg": Markup(plots.lines_svg(series, key, percent=percent)),
                    "square": False,
                    "legend": legend,
                    "note": "",
                }
            )
    return charts


def _paired(answers: list[Answers], best: int, labels: list[str]) -> list[list[Any]]:
    def right(a: Answers) -> dict[tuple[str, ...], bool]:
        return {Path(r["path"]).parts[-2:]: r["true"] == r["predicted"] for r in a.rows}

    first, rows = right(answers[best]), []
    for i, a in enumerate(answers):
        if i == best:
            continue
        other = right(a)
        both = sum(first[k] and other[k] for k in first)
        alone = sum(other[k] and not first[k] for k in first)
        best_alone = sum(first[k] and not other[k] for k in first)
        p = paired_p_value(alone, best_alone)
        neither = len(first) - both - alone - best_alone
        shown = f"{p:.3f}" if p >= 0.001 else "below 0.001"
        rows.append(
            [name(labels[i]), *(f"{n:,}" for n in (both, alone, best_alone, neither)), shown]
        )
    return rows


def _class_comparison(answers, labels: list[str]) -> dict[str, Any]:
    scores = [{r["name"]: r["f1"] for r in a.per_class if r["count"]} if a else {} for a in answers]
    names = list(dict.fromkeys(n for s in scores for n in s))
    if not names or len(names) > 200 or sum(map(bool, scores)) < 2:
        return {"class_head": [], "class_rows": []}
    rows = []
    for label in names:
        values = [s.get(label) for s in scores]
        top = max(v for v in values if v is not None)
        cells = [
            Markup('<span class="best">{}</span>').format(as_decimal(v))
            if v == top
            else as_decimal(v)
            for v in values
        ]
        rows.append([name(label), *cells])
    return {"class_head": ["Class", *map(name, labels)], "class_rows": rows}


def _differences(runs: list[RunFacts], labels: list[str]) -> dict[str, Any]:
    settings = []
    for run in runs:
        own = {k: run.config.get(k) for k in ("directory", "seed", "exif", "backend")}
        versions = run.config.get("versions")
        own.update({f"version of {k}": v for k, v in versions.items()}
                   if isinstance(versions, dict) else {})  # fmt: skip
        settings.append(
            {**{k: v for k, v in run.recipe.items() if k not in ("source", "aim")}, **own}
        )
    keys = list(dict.fromkeys(k for s in settings for k in s))
    rows = [
        [name(key.replace("_", " ").capitalize()), *(as_setting(s.get(key)) for s in settings)]
        for key in keys
        if any(s.get(key) != settings[0].get(key) for s in settings)
    ]
    text = (
        f"{counted(len(rows), 'setting')} of {len(keys)}." if rows else "No setting is different."
    )
    return {
        "setting_head": ["Setting", *map(name, labels)],
        "setting_rows": rows,
        "settings_text": text if rows else "No setting is different.",
    }
