"""`scan` with a model: what only looks alike to a network, and labels that it does not believe."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import numpy as np

from keras_resnet.data import scan as files
from keras_resnet.data.items import Source
from keras_resnet.data.opening import opened
from keras_resnet.data.scan import ScanReport
from keras_resnet.data.walk import walk_pictures

_FEWEST = 20  # images to judge what is near by
_DEVIATIONS = 4


def scan(
    directory: str | os.PathLike | Source,
    *,
    threshold: int = 6,
    workers: int | None = None,
    model: str | os.PathLike | None = None,
) -> ScanReport:
    """Reads every image below a folder once and reports what may spoil training on it.

    With a model it also reports images that are alike to it in two splits, whatever was done to
    them, and suspected label errors. Both are judged by `embed`. An image's label is suspected by
    the definition of confident learning (Northcutt et al. 2021, arXiv:1911.00068, section 3.1):
    the probability of another class is at least what that class's own images have on average.
    Probabilities are out of fold: those of a logistic regression on the vectors of other images.
    A model that was trained on these very images has learnt their labels, the wrong ones included,
    and finds fewer than one that was not.

    Args:
        directory: Class folders, or train/, val/ and test/ with class folders inside, or images.
        threshold: Bits of 128 in which the perceptual hashes of near duplicates differ at most.
        workers: Threads; None takes the processor's cores, at most 8.
        model: As `embed` takes it.

    Raises:
        NotFoundError: The folder does not exist.
        DataError: It is a file, or holds no image.

    Examples:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("ants", "bees"):
        ...     (folder / name).mkdir()
        ...     Image.new("RGB", (40, 30)).save(folder / name / "1.png")
        >>> report = scan(folder)
        >>> len(report.exact_duplicates), len(report.label_conflicts)
        (1, 1)
    """
    source = opened(directory)
    report = files.scan(source, threshold=threshold, workers=workers)
    if model is not None:
        lazy = isinstance(source, Source)
        paths: Sequence[str] = source if lazy else walk_pictures(report.directory)[0]
        _add_suspects(report, paths, model, workers)
    return report


def _add_suspects(
    report: ScanReport, paths: Sequence[str], model: str | os.PathLike, workers: int | None
) -> None:
    # Not at the top: without a model neither Keras nor a backend is needed.
    from sklearn.preprocessing import StandardScaler

    from keras_resnet.inference.embed import embed

    found = embed(model, paths, workers=workers)
    vectors = StandardScaler().fit_transform(found.vectors)
    places = [report._place(path) for path in found.paths]
    splits = np.array([split for split, _ in places])
    known = {frozenset(pair[:2]) for pair in report.across_splits}
    equal = {path: i for i, group in enumerate(report.exact_duplicates) for path in group}
    alike = [
        (found.paths[a], found.paths[b], round(distance, 4))
        for a, b, distance in alike_across(vectors, splits)
    ]
    report.alike_splits = [
        (a, b, distance)
        for a, b, distance in alike
        if frozenset((a, b)) not in known and not (a in equal and equal[a] == equal.get(b))
    ]
    if any(len(names) != 1 for _, names in places):
        return  # of several labels an image each would have to be judged for itself
    names = np.array([label for _, [label] in places])
    labelled = np.flatnonzero(names != "")
    classes, labels = np.unique(names[labelled], return_inverse=True)
    chances = out_of_fold(vectors[labelled], labels)
    if chances is not None:
        report.out_of_fold = float((chances.argmax(1) == labels).mean())
        report.label_errors = [
            (found.paths[labelled[i]], str(classes[labels[i]]), str(classes[j]),
             round(float(chances[i, j]), 4))
            for i, j in label_errors(labels, chances)
        ]  # fmt: skip


def alike_across(vectors: np.ndarray, splits: np.ndarray) -> list[tuple[int, int, float]]:
    """Pairs of images in two splits that are nearer than chance has it, the nearest first.

    What is near is judged by the images themselves: the logarithm of the cosine distance from one
    to its nearest lies four deviations below the median of all. Vectors are `(images, features)`,
    standardised; a pair is (position, position, distance), the training image first.
    """
    from sklearn.neighbors import NearestNeighbors

    found = []
    order = [kind for kind in ("train", "val", "test") if kind in splits]
    for i, first in enumerate(order):
        here = np.flatnonzero(splits == first)
        for other in order[i + 1 :]:
            there = np.flatnonzero(splits == other)
            if min(len(here), len(there)) < _FEWEST:
                continue
            tree = NearestNeighbors(metric="cosine", algorithm="brute").fit(vectors[there])
            logs = np.log(np.maximum(tree.kneighbors(vectors[here], 1)[0].ravel(), 1e-9))
            # By those above the median: copies are below it.
            middle = np.median(logs)
            spread = 1.4826 * np.median(logs[logs >= middle] - middle)
            distances, members = tree.radius_neighbors(
                vectors[here], np.exp(middle - _DEVIATIONS * spread)
            )
            for place, (away, who) in enumerate(zip(distances, members, strict=True)):
                found += [(here[place], there[k], d) for d, k in zip(away, who, strict=True)]
    ranked = sorted(found, key=lambda pair: (pair[2], pair[0], pair[1]))
    return [(int(a), int(b), float(distance)) for a, b, distance in ranked]


def out_of_fold(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """Probabilities of each image's classes, by a regression on four fifths of the others.

    Returns:
        `(images, classes)`; `None` where there are too few classes, or images of one.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    counts = np.bincount(labels)
    if len(counts) < 2 or counts.min() < 2:
        return None
    folds = StratifiedKFold(min(5, counts.min()), shuffle=True, random_state=0)
    # Vectors are as long as images are many: without a strong penalty each label is learnt.
    model = LogisticRegression(C=0.01, max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not quite converged is good enough
        return cross_val_predict(model, vectors, labels, cv=folds, method="predict_proba")


def label_errors(labels: np.ndarray, chances: np.ndarray) -> list[tuple[int, int]]:
    """Images off the diagonal of the confident joint, with the class that they are counted in.

    Labels are of classes that all occur, probabilities out of fold, `(images, classes)`; found are
    (position, likely class), the least believed label first.
    """
    everyone = np.arange(len(labels))
    own = chances[everyone, labels]
    usual = np.bincount(labels, own) / np.bincount(labels)
    confident = chances >= usual - 1e-6
    likely = np.where(confident, chances, -1).argmax(1)
    wrong = confident.any(1) & (likely != labels) & (chances.argmax(1) != labels)
    ranked = sorted(np.flatnonzero(wrong), key=lambda i: (own[i] - chances[i].max(), i))
    return [(int(i), int(likely[i])) for i in ranked]
