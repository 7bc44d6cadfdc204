"""What stands out in a run: each finding is a number and a rule, none a guess."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from keras_resnet.reports.run_facts import Results, RunFacts


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
