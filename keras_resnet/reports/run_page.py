"""What a page shows of one run: its figures, tables and sentences, as the template wants them."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import Any

from markupsafe import Markup

from keras_resnet.errors import InputError
from keras_resnet.recipes import RECIPES
from keras_resnet.reports import figures as plots
from keras_resnet.reports.pictures import pictures
from keras_resnet.reports.run_facts import Answers, RunFacts
from keras_resnet.reports.wording import (
    NOTHING,
    as_decimal,
    as_duration,
    as_percent,
    as_setting,
    as_size,
    as_time,
    bar,
    counted,
    is_number,
    listed,
    name,
    plain,
    plain_lines,
)
from keras_resnet.variants import SPECS, get_spec
from keras_resnet.weights import download, published

_MATRIX_CLASSES = 12  # up to here a confusion matrix is a table, above it a drawing


def run_context(run: RunFacts, model: Any) -> dict[str, Any]:
    """Everything that `run.html` shows of a run; `model` is loaded where it is `None`."""
    answers = run.main
    context: dict[str, Any] = {
        "run": run,
        "title": f"{plain(run.name)} - training report",
        "when": as_time(run.ended or run.begun),
        "status": run.status,
        "status_kind": {"finished": "good", "unknown": ""}.get(run.status, "warn"),
        "lead": _lead(run),
        "metrics": _metrics(run),
        "findings": _findings(run),
        "answers": answers,
        "answers_text": _answers_text(run),
        "charts": _curves(run),
        "training_text": _training_text(run),
        "epochs": _epoch_table(run),
        "confusions": _confusions(answers),
        "per_class": _per_class(answers),
        **_matrix(answers),
        **pictures(run, model),
        "reliability": _reliability(answers),
        **_data(run),
        **_origin(run),
        "usage": _usage(run),
    }
    anchors = [
        ("training", "Training", "charts"), ("answers", "Right and wrong", "answers"),
        ("mistakes", "Mistakes", "mistakes"), ("uncertain", "Least certain", "uncertain"),
        ("confidence", "Confidence", "reliability"), ("data", "Data", "data_rows"),
        ("origin", "Origin", "setting_rows"), ("use", "Use", "usage"),
    ]  # fmt: skip
    context["sections"] = [(anchor, text) for anchor, text, key in anchors if context[key]]
    return context


def _lead(run: RunFacts) -> Markup:
    names, counts = run.class_names, run.class_counts.get("training", {})
    variant = name(run.variant) if run.variant else Markup("model")
    text = Markup("A {} that tells ").format(variant)
    text += Markup("{} apart: {}.").format(counted(len(names), "class"), listed(names))
    if not names:
        text = Markup("A {}.").format(variant)
    if counts and run.epochs:
        start = "pretrained" if run.recipe.get("weights") else "random"
        text += Markup(" It started from {} weights and saw {} for {}.").format(
            start, counted(sum(counts.values()), "picture"), counted(run.epochs, "epoch")
        )
    return text


def _metrics(run: RunFacts) -> list[dict[str, Any]]:
    answers = run.main
    if answers is None:
        return []
    low, high = answers.interval
    baseline = answers.baseline
    where = f"{counted(answers.count, f'{answers.part} picture')}"
    note = f"of {where}. 95% interval {as_percent(low)} to {as_percent(high)}"
    alt = (
        f"Accuracy {as_percent(answers.top1)}, 95% interval {as_percent(low)} to {as_percent(high)}"
    )
    if baseline is not None:
        note = Markup("{}; the line is at {}, for always answering {}.").format(
            note, as_percent(baseline[1]), name(baseline[0])
        )
        alt += f"; always answering the most frequent class gives {as_percent(baseline[1])}"
    metrics = [
        {
            "label": "Accuracy",
            "value": as_percent(answers.top1),
            "note": note,
            "scale": {
                "alt": alt,
                "low": f"{100 * low:.2f}",
                "width": f"{100 * (high - low):.2f}",
                "at": f"{100 * answers.top1:.2f}",
                "tick": None if baseline is None else f"{100 * baseline[1]:.2f}",
            },
        }
    ]
    result = answers.calibration
    if result is not None:
        lean = "overconfident" if result.bias > 0 else "underconfident"
        metrics.append(
            {
                "label": "Calibration error",
                "value": as_percent(result.error),
                "note": f"{abs(result.bias) * 100:.1f} points {lean} on average",
            }
        )
    if answers.top5 is not None:
        metrics.append({"label": "Top-5 accuracy", "value": as_percent(answers.top5),
                        "note": "the true class is among the five most probable"})  # fmt: skip
    elif answers.macro_f1 is not None:
        metrics.append({"label": "F1", "value": as_decimal(answers.macro_f1),
                        "note": "mean of the classes"})  # fmt: skip
    if answers.loss is not None:
        chance = math.log(len(answers.class_names)) if len(answers.class_names) > 1 else None
        note = "cross-entropy, nats" + (f"; knowing nothing gives {chance:.3f}" if chance else "")
        metrics.append({"label": "Loss", "value": as_decimal(answers.loss), "note": note})
    return [{"scale": None, **metric} for metric in metrics[:4]]


def _findings(run: RunFacts) -> list[tuple[str, Markup]]:
    """What stands out, in sentences: each of them is a number and a rule, none a guess."""
    found: list[tuple[str, Markup]] = []
    answers = run.main
    if answers is not None:
        found += _accuracy_findings(run, answers)
    found += _training_findings(run)
    counts = [n for n in run.class_counts.get("training", {}).values() if n]
    if counts and max(counts) > 3 * min(counts):
        found.append(("warn", Markup("The classes are uneven: the largest has {:.1f} times as many "
                                     "training pictures as the smallest.")
                      .format(max(counts) / min(counts))))  # fmt: skip
    skipped = len({*run.skipped, *(answers.skipped if answers else ())})
    if skipped:
        found.append(("warn", Markup("{} could not be read and {} left out: see Data.").format(
            counted(skipped, "picture"), "was" if skipped == 1 else "were")))  # fmt: skip
    return found


def _accuracy_findings(run: RunFacts, answers: Answers) -> list[tuple[str, Markup]]:
    found: list[tuple[str, Markup]] = []
    baseline, (low, _) = answers.baseline, answers.interval
    if baseline is not None and len(answers.class_names) > 1:
        if low <= baseline[1]:
            found.append(("warn", Markup(
                "Not shown to be better than always answering {}: that is right in {}, and the "
                "interval of the accuracy reaches down to {}."
            ).format(name(baseline[0]), as_percent(baseline[1]), as_percent(low))))  # fmt: skip
        else:
            found.append(("good", Markup(
                "Better than always answering {}, which is right in {}."
            ).format(name(baseline[0]), as_percent(baseline[1]))))  # fmt: skip
    pairs = answers.confusions(1)
    if pairs and pairs[0][3] >= 0.1:
        true, predicted, count, share = pairs[0]
        found.append(("info", Markup("The most frequent mistake: {} taken for {}, {} ({}).").format(
            name(true), name(predicted), counted(count, "time"), as_percent(share))))  # fmt: skip
    scored = [row for row in answers.per_class if row["count"]]
    if len(scored) > 2:
        worst = min(scored, key=lambda row: row["recall"])
        found.append(("info", Markup("Found least often: {}, {} of its pictures.").format(
            name(worst["name"]), as_percent(worst["recall"]))))  # fmt: skip
    result = answers.calibration
    if result is not None and abs(result.bias) > 0.05:
        lean = "surer than it is right" if result.bias > 0 else "less sure than it could be"
        found.append(("warn" if result.bias > 0 else "info", Markup(
            "It is {}: mean confidence {}, right in {}."
        ).format(lean, *map(as_percent, (answers.top1 + result.bias, answers.top1)))))  # fmt: skip
    both = [run.answers[part].top1 for part in ("validation", "test") if part in run.answers]
    if len(both) == 2:
        found.append(("info", Markup("{} on the validation pictures, {} on the test pictures.")
                      .format(*map(as_percent, both))))  # fmt: skip
    return found


def _training_findings(run: RunFacts) -> list[tuple[str, Markup]]:
    found: list[tuple[str, Markup]] = []
    best, wanted = run.best_epoch, run.recipe.get("epochs")
    if best is not None and run.epochs > 1:
        if best == run.epochs:
            found.append(("info", Markup("The last epoch was the best: more epochs may help.")))
        train = run.history.get("accuracy", ())
        val = run.history.get("val_accuracy", ())
        gap = train[best - 1] - val[best - 1] if len(train) >= best else math.nan
        if gap > 0.15:
            found.append(("warn", Markup(
                "At its best epoch it was right on {} of the training pictures and {} of the "
                "validation pictures: it fits the training pictures closer than their kind."
            ).format(as_percent(train[best - 1]), as_percent(val[best - 1]))))  # fmt: skip
    if isinstance(wanted, int) and 0 < run.epochs < wanted:
        found.append(("info", Markup("{} of {} epochs were run.").format(run.epochs, wanted)))
    return found


def _answers_text(run: RunFacts) -> str:
    if run.main is None:
        return ""
    text = f"The best model on {counted(run.main.count, f'{run.main.part} picture')}."
    if run.main.part == "test":
        text += " None of them was used to train it in this run, nor to choose its best epoch."
    else:
        text += " They chose the best epoch, so that new pictures may do a little worse."
    return text


# --- figures -------------------------------------------------------------------------------------


def _curves(run: RunFacts) -> list[dict[str, Any]]:
    charts = []
    for key, title, better in (("accuracy", "Accuracy", max), ("loss", "Loss", min)):
        train, val = run.history.get(key, []), run.history.get(f"val_{key}", [])
        series = [(train, 1, plots.DASHES[1]), (val, 2, plots.DASHES[0])]
        if not any(math.isfinite(v) for values, *_ in series for v in values):
            continue
        percent = key == "accuracy"
        finite = [(v, i + 1) for i, v in enumerate(val) if math.isfinite(v)]
        mark = None
        if finite:
            value = better(v for v, _ in finite)
            mark = (next(i for v, i in finite if v == value), value)
        shown = as_percent if percent else as_decimal
        alt = f"{title} over {counted(run.epochs, 'epoch')}."
        for label, values in (("Training", train), ("validation", val)):
            if values:
                alt += f" {label}: from {shown(values[0])} to {shown(values[-1])};"
        if mark:
            alt += f" best validation value {shown(mark[1])} at epoch {mark[0]}."
        legend = [("line", "s1", "5 2", "Training")] if train else []
        legend += [("line", "s2", "", "Validation; its best is ringed")] if val else []
        charts.append(
            {
                "title": title,
                "alt": alt,
                "svg": Markup(plots.lines_svg(series, key, percent=percent, mark=mark)),
                "square": False,
                "legend": legend,
                "note": "",
            }
        )
    return charts


def _training_text(run: RunFacts) -> str:
    if not run.epochs:
        return ""
    text = f"{counted(run.epochs, 'epoch')}"
    if run.seconds is not None:
        text += f" in {as_duration(run.seconds)}, {as_duration(run.seconds / run.epochs)} each"
    if run.best_epoch is not None:
        text += f"; the best validation accuracy at epoch {run.best_epoch}"
    return f"{text}."


def _epoch_table(run: RunFacts) -> dict[str, Any]:
    titles = {
        "accuracy": "Accuracy", "loss": "Loss", "val_accuracy": "Val. accuracy",
        "val_loss": "Val. loss", "learning_rate": "Learning rate", "seconds": "Seconds",
    }  # fmt: skip
    columns = list(run.history)
    rows = []
    for i in range(run.epochs):
        cells: list[Any] = [str(i + 1)]
        for column in columns:
            value = run.history[column][i] if i < len(run.history[column]) else math.nan
            if column.endswith("accuracy"):
                cells.append(as_percent(value))
            elif column == "learning_rate":
                cells.append(f"{value:.2e}" if is_number(value) else NOTHING)
            else:
                cells.append(as_decimal(value, 1 if column == "seconds" else 4))
        rows.append(cells)
    return {"head": ["Epoch", *(titles.get(c, name(c)) for c in columns)], "rows": rows}


def _matrix(answers: Answers | None) -> dict[str, Any]:
    none = {"matrix": None, "matrix_chart": None}
    if answers is None or answers.confusion is None:
        return none
    counts, names = answers.confusion, answers.class_names
    if len(names) > _MATRIX_CLASSES:
        pairs = [f"{plain(t)} taken for {plain(p)}: {n}" for t, p, n, _ in answers.confusions(3)]
        alt = f"Confusion matrix of {len(names)} classes. The most frequent mistakes: "
        chart = {
            "title": "Confusion matrix",
            "alt": alt + ("; ".join(pairs) or "none") + ".",
            "svg": Markup(plots.confusion_svg(counts, names, "confusion")),
            "square": True,
            "legend": [],
            "note": "The fuller the blue, the larger the share of the row; by its square root, so "
            "that few mistakes can be seen.",
        }
        return {**none, "matrix_chart": chart}
    rows = []
    for i, label in enumerate(names):
        total = int(counts[i].sum())
        cells = []
        for j, count in enumerate(counts[i]):
            share = count / total if total else 0.0
            # Where black or white is read best on the blue, in the page's light and dark mode.
            steps = {"full": 0.85, "half": 0.65, "some": 0.45, "": 0.0}
            kind = next((k for k, least in steps.items() if share > least), "none")
            kind += " diagonal" if i == j else ""
            cells.append({"count": f"{count:,}", "share": f"{share:.3f}", "kind": kind.strip()})
        rows.append({"name": label, "cells": cells, "total": f"{total:,}"})
    return {**none, "matrix": {"names": names, "rows": rows, "many": len(names) > 5}}


def _confusions(answers: Answers | None) -> list[list[Any]]:
    if answers is None or len(answers.class_names) < 3:
        return []
    return [
        [name(true), name(predicted), f"{count:,}", as_percent(share)]
        for true, predicted, count, share in answers.confusions()
    ]


def _per_class(answers: Answers | None) -> list[list[Any]]:
    if answers is None:
        return []
    return [
        [
            name(row["name"]),
            as_percent(row["precision"]),
            Markup("{}{}").format(as_percent(row["recall"]), bar(row["recall"])),
            as_decimal(row["f1"]),
            f"{row['count']:,}",
        ]
        for row in answers.per_class
    ]


def _reliability(answers: Answers | None) -> dict[str, Any] | None:
    result = answers.calibration if answers is not None else None
    if answers is None or result is None:
        return None
    lean = "surer than it is right" if result.bias > 0 else "less sure than it could be"
    text = (
        f"Of the answers given with a confidence of 80%, about 80% should be right. Here the "
        f"expected calibration error is {as_percent(result.error)}, the largest gap of a bin "
        f"{as_percent(result.largest)}; on average the model is {lean}, by "
        f"{abs(result.bias) * 100:.1f} points."
    )
    rows = [
        [
            f"{100 * result.edges[i]:.0f} to {result.edges[i + 1]:.0%}",
            f"{result.counts[i]:,}",
            as_percent(float(result.confidence[i])),
            as_percent(float(result.accuracy[i])),
        ]
        for i in range(len(result.counts))
        if result.counts[i]
    ]
    alt = "Reliability diagram. " + " ".join(
        f"Confidence {a}: {n} answers, {r} of them right." for a, n, _, r in rows
    )
    figure = {
        "title": "Reliability",
        "alt": alt,
        "svg": Markup(plots.reliability_svg(result, "reliability")),
        "square": False,
        "legend": [
            ("bar", "s1", "", "Share that is right"),
            ("whisker", "ink", "", "its 95% interval"),
            ("line", "s2", "", "Mean confidence"),
            ("line", "muted", "4 3", "Where both are equal"),
        ],
        "note": "",
    }
    return {"text": text, "rows": rows, "figure": figure}


# --- data, origin, use ---------------------------------------------------------------------------


def _data(run: RunFacts) -> dict[str, Any]:
    counts = run.class_counts
    parts = list(counts)
    names = run.class_names or list(dict.fromkeys(n for c in counts.values() for n in c))
    rows = [
        [name(label), *(_counted_bar(counts, part, label) for part in parts)] for label in names
    ]
    sums = {part: sum(values.values()) for part, values in counts.items()}
    if rows and len(rows) > 1:
        rows.append(["All", *(f"{sums[part]:,}" for part in parts)])
    text = ", ".join(f"{sums[part]:,} {part}" for part in parts)
    text = f"{text} pictures in {counted(len(names), 'class')}." if parts else ""
    directory = run.config.get("directory")
    if isinstance(directory, str):
        text = Markup("{} From {}.").format(text, name(directory))
    sizes = run.picture_sizes()
    if sizes:
        (w0, w, w1), (h0, h, h1) = sizes["width"], sizes["height"]
        text += Markup(
            " The evaluated ones measure {}x{} to {}x{} pixels, median {}x{}."
        ).format(w0, h0, w1, h1, w, h) if (w0, h0) != (w1, h1) else Markup(
            " The evaluated ones measure {}x{} pixels."
        ).format(w, h)  # fmt: skip
    main = run.main
    skipped = sorted({*run.skipped, *(main.skipped if main else ())})
    return {
        "data_head": ["Class", *(part.capitalize() for part in parts)],
        "data_rows": rows if parts else [],
        "data_text": text,
        "skipped": [[name(path), name(reason)] for path, reason in skipped],
    }


def _counted_bar(counts: dict[str, dict[str, int]], part: str, label: str) -> Markup:
    """A count with its bar; the part's largest class fills it."""
    count = counts[part].get(label, 0)
    share = count / max([1, *counts[part].values()])
    return Markup("{}{}").format(f"{count:,}", bar(share, part != next(iter(counts))))


def _origin(run: RunFacts) -> dict[str, Any]:
    recipe = run.recipe
    published = RECIPES.get(str(recipe.get("name")))
    changed, every = [], []
    for key, value in recipe.items():
        if key in ("name", "source", "aim"):
            continue
        row = [key.replace("_", " ").capitalize(), as_setting(value)]
        every.append(row)
        default = getattr(published, key, value)
        default = list(default) if isinstance(default, tuple) else default
        if published is not None and default != value:
            changed.append([row[0], Markup("{} <span class='small'>instead of {}</span>").format(
                row[1], as_setting(default))])  # fmt: skip
    if published is None:
        changed = every[:12]
    text = Markup("What was changed:") if changed and published is not None else Markup("As it is.")
    versions = run.config.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    devices = run.config.get("devices")
    version_rows = [[name(k), name(v)] for k, v in versions.items()]
    if isinstance(devices, list):
        version_rows.append(["Device", as_setting(devices)])
    return {
        "recipe_name": recipe.get("name"),
        "recipe_text": text,
        "recipe_changed": changed,
        "recipe_rows": every,
        "setting_rows": _settings(run),
        "version_rows": version_rows,
        "weights_rows": _weights(run),
        "command": _command(run),
    }


def _command(run: RunFacts) -> str:
    given = run.config.get("command")
    if not isinstance(given, list) or len(given) < 2 or given[1] != "train":
        return ""
    backend = run.config.get("backend")
    start = f"KERAS_BACKEND={backend} " if isinstance(backend, str) else ""
    return plain(start + shlex.join(["keras-resnet", *map(str, given[1:])]))


def _settings(run: RunFacts) -> list[list[Any]]:
    config, facts = run.config, run.model
    rows: list[list[Any]] = []
    if run.variant:
        rows.append(["Model", name(run.variant)])
    if is_number(facts.get("parameters")):
        rows.append(["Parameters", f"{facts['parameters']:,}"])
    if is_number(facts.get("multiply_adds")):
        rows.append(["Multiply-adds", f"{facts['multiply_adds'] / 1e9:.3f} billion a picture"])
    preprocess = config.get("preprocess") or run.info.get("preprocess")
    if isinstance(preprocess, dict):
        shown = {k: preprocess.get(k) for k in ("resize_size", "crop_size", "interpolation")}
        steps = [f"{k.replace('_', ' ')} {v}" for k, v in shown.items() if v is not None]
        rows.append(["Pixels", name(", ".join(steps))])
    augment = config.get("augment")
    if isinstance(augment, dict) and isinstance(augment.get("steps"), list):
        steps = [str(s.get("name")) for s in augment["steps"] if isinstance(s, dict)]
        rows.append(["Augmentation", name(", ".join(steps))])
    for key, title in (("seed", "Seed"), ("backend", "Backend"), ("data_format", "Data format")):
        if key in config:
            rows.append([title, as_setting(config[key])])
    if run.begun:
        rows.append(["Begun", as_time(run.begun)])
    if run.ended:
        rows.append(["Last entry", as_time(run.ended)])
    if run.seconds is not None:
        rows.append(["Time of the epochs", as_duration(run.seconds)])
    return rows


def _weights(run: RunFacts) -> list[list[Any]]:
    """Where training started, and what proves it."""
    files = [
        [file, Markup("{} <br>sha256 <code>{}</code>").format(
            as_size(size), download.file_sha256(run.folder / file))]
        for file, size in run.files.items()
        if file in ("best.keras", "last.keras")
    ]  # fmt: skip
    start = run.recipe.get("weights")
    known = run.info.get("weights") or run.model.get("weights")
    if not isinstance(known, dict):
        if start is None and not run.recipe:
            return files
        return [["Start", "random weights" if start is None else name(start)], *files]
    rows = [["Start", name(start if start is not None else known.get("source", "a file"))]]
    if known.get("source"):
        rows.append(
            ["File", Markup("{} ({})").format(name(known["source"]), name(known.get("format")))]
        )
    sha256 = known.get("sha256")
    if sha256:
        rows.append(["sha256", Markup("<code>{}</code>").format(plain(sha256))])
        row = published.published_by_torchvision(str(sha256))
        if row is not None:
            said = Markup("torchvision's {} {}, by its sha256").format(row.model, row.tag)
        else:
            said = "not one of torchvision's files"
        rows.append(["Published as", said])
    if is_number(known.get("loaded")):
        text = f"{known['loaded']:,} tensors"
        if known.get("head") == "skip":
            text += "; the head was new"
        for key in ("missing", "unexpected"):
            if known.get(key):
                text += f"; {len(known[key])} {key}"
        rows.append(["Loaded", text])
    rows.append(["Verified", _verification(run, start, sha256, known.get("key") or None)])
    return rows + files


def _verification(run: RunFacts, start: Any, sha256: Any, key: str | None) -> str:
    """The file once more through the import, and compared with plain NumPy, where it is here."""
    path = _weights_file(start, run.variant)
    if path is None:
        return "not repeated: the file is not here"
    if download.file_sha256(path) != sha256:
        return "not repeated: the file here is another one now"
    import keras

    from keras_resnet.models.zoo import create_model
    from keras_resnet.weights.load import load_torchvision
    from keras_resnet.weights.verify import verify

    try:
        spec = get_spec(run.variant)
        side = spec.input_size if spec.min_size > 1 else min(64, spec.input_size)
        last = keras.config.image_data_format() == "channels_last"
        shape = (side, side, 3) if last else (3, side, side)
        fresh = create_model(run.variant, num_classes=2, input_shape=shape)
        load_torchvision(fresh, path, head="skip", key=key)
        result = verify(fresh, path, key=key)
    except Exception as error:  # a report is no place for a traceback
        return f"not repeated: {plain(str(error).splitlines()[0])}"
    verdict = "agrees" if result.passed else "DISAGREES"
    return (
        f"the file, imported anew, {verdict} with a forward pass in plain NumPy: largest relative "
        f"difference {result.error:.1e} over {len(result.stages)} stages "
        f"(tolerance {result.tolerance:g})"
    )


def _weights_file(start: Any, variant: str | None) -> Path | None:
    """The file that training started from, where it is on this machine; nothing is fetched."""
    if not isinstance(start, str) or variant not in SPECS:
        return None
    if os.path.isfile(os.path.expanduser(start)):
        return None if start.endswith(".keras") else Path(start).expanduser()
    try:
        if not published.is_tag(start):
            return None
        return download.local_path(published.resolve_weights(variant, start))
    except InputError:
        return None


def _usage(run: RunFacts) -> dict[str, str] | None:
    if not run.files:
        return None
    file = "best.keras" if "best.keras" in run.files else next(iter(run.files))
    path = str(run.folder / file)
    quoted = shlex.quote(plain(path))
    folder = shlex.quote(plain(run.folder))
    shell = f"""keras-resnet predict {quoted} photo.jpg
keras-resnet explain {quoted} photo.jpg
keras-resnet evaluate {folder} labelled/"""
    python = f"""import keras_resnet as kr

model = kr.load_model({path!r})
for prediction in kr.predict(model, "photo.jpg"):
    print(prediction)"""
    return {"shell": shell, "python": plain_lines(python)}
