"""Transfer learning: which layers train, and what that does to the batch norms."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from keras_resnet.data.folders import plain_name
from keras_resnet.models.files import load_model
from keras_resnet.recipes import Recipe
from keras_resnet.system.errors import CheckpointError, InputError, did_you_mean
from keras_resnet.weights import download
from keras_resnet.weights.arrays import adapted_to, how_adapted
from keras_resnet.weights.keras_files import find_keras_file
from keras_resnet.weights.load import load_torchvision
from keras_resnet.weights.mapping import expected_keys, info_of, weighted_layers
from keras_resnet.weights.published import hub_name, resolve_weights
from keras_resnet.weights.sources import own_head_of, pixel_problem, read_source


@dataclasses.dataclass(frozen=True)
class FreezeReport:
    """What trains and what does not; `print` it.

    Attributes:
        until: The first part that trains.
        trained: Names of the layers with weights that train.
        frozen: Names of those that do not.
        trained_params: Number of weights that train.
        frozen_params: Number of weights that do not.
        frozen_norms: Batch norms that use and keep their stored statistics.
        training_norms: Batch norms that normalise by the batch and update their statistics.
    """

    until: str | None
    trained: list[str]
    frozen: list[str]
    trained_params: int
    frozen_params: int
    frozen_norms: int
    training_norms: int

    def __str__(self) -> str:
        lines = [
            f"Training {len(self.trained)} layers ({self.trained_params:,} weights), "
            f"{len(self.frozen)} frozen ({self.frozen_params:,} weights)."
        ]
        if self.frozen_norms or self.training_norms:
            lines.append(
                f"Batch norms: {self.frozen_norms} frozen, which use and keep their stored "
                f"statistics; {self.training_norms} training, which normalise by the batch and "
                "update theirs."
            )
        return "\n".join(lines)


def parts(model: keras.Model) -> list[str]:
    """The parts that `freeze` can stop at, from the input to the head.

    Examples:
        >>> from keras_resnet import create_model
        >>> parts(create_model("resnet18"))
        ['conv1', 'layer1', 'layer2', 'layer3', 'layer4', 'fc']
    """
    found: list[str] = []
    for layer in weighted_layers(model):
        part = layer.name.split("_")[0]
        # The stem's norm belongs to the stem.
        if part not in found and not part.startswith("bn"):
            found.append(part)
    return found


def freeze(
    model: keras.Model, until: str | None = "head", *, freeze_norms: bool = False
) -> FreezeReport:
    """Freezes every layer before a part of the model, and unfreezes that part and all behind it.

    Models inside the model are walked through; what was frozen as a whole before, with
    `backbone.trainable = False`, is set anew as well.

    The choice is kept in the layers (`trainable`), so that it outlives compiling again, saving and
    loading; compile afterwards, as always in Keras. A frozen batch norm runs in inference mode
    even inside `fit`: unlike a frozen one of torch in `train()`, it keeps its statistics.

    Args:
        model: The model.
        until: `"head"` for the last layer alone, a part such as `"layer4"` or `"classifier"` (see
            `parts`), the name of a layer or of a model inside, or `None` to train everything.
        freeze_norms: Freeze the batch norms behind `until` as well.

    Returns:
        What trains now.

    Raises:
        InputError: There is no such part.

    Examples:
        >>> from keras_resnet import create_model
        >>> freeze(create_model("resnet18", num_classes=2), until="layer4").training_norms
        5
    """
    layers = list(weighted_layers(model))
    first = 0 if until is None else _first_trained(model, layers, until)
    # A frozen model trains nothing of what is in it, however that is set: from outside to inside.
    model.trainable = True
    norms = []
    for i, layer in enumerate(layers):
        layer.trainable = i >= first
        for norm in _norms(layer):
            norm.trainable = layer.trainable and not freeze_norms
            norms.append(norm)
    trained = [x for x in layers if x.trainable]
    frozen = [x for x in layers if not x.trainable]
    names = [x.name for x in trained], [x.name for x in frozen]
    counts = (
        _params(v for x in layers for v in getattr(x, f"{kind}_weights"))
        for kind in ("trainable", "non_trainable")
    )
    training = sum(x.trainable for x in norms)
    return FreezeReport(until, *names, *counts, len(norms) - training, training)


def part_to_train(model: keras.Model, recipe: Recipe, epoch: int) -> str | None:
    """The first part that trains in an epoch, counted from 0, under gradual unfreezing."""
    start = recipe.unfreeze
    if not recipe.gradual or start is None:
        return start
    back = epoch // recipe.gradual
    if back == 0:
        return start
    names = parts(model)
    first = names.index(start) if start in names else len(names) - 1
    return names[first - back] if first > back else None


def _norms(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The batch norms in a layer: itself, or those of a block that is one layer to the graph."""
    # `_layers` is Keras' own; tests/training/test_freeze.py fails where it is gone.
    own = [layer] if isinstance(layer, keras.layers.BatchNormalization) else []
    return own + [norm for inner in layer._layers for norm in _norms(inner)]


def _first_trained(model: keras.Model, layers: list[keras.layers.Layer], until: str) -> int:
    if until == "head":
        return len(layers) - 1
    models = _models_inside(model)
    if until in models:
        inside = {id(layer) for layer in weighted_layers(models[until])}
        return next((i for i, layer in enumerate(layers) if id(layer) in inside), 0)
    for i, layer in enumerate(layers):
        if layer.name == until or layer.name.startswith(f"{until}_"):
            return i
    known = [*dict.fromkeys(x.name.split("_")[0] for x in layers), *models, "head"]
    raise InputError(
        f"The model has no part {until!r}.{did_you_mean(until, known)} "
        f"Its parts: {', '.join(known)}."
    )


def _models_inside(model: keras.Model) -> dict[str, keras.Model]:
    found = {}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found |= {layer.name: layer, **_models_inside(layer)}
    return found


def _params(variables: Iterable[Any]) -> int:
    statistics = ("moving_mean", "moving_variance")
    return sum(math.prod(v.shape) for v in variables if v.name not in statistics)


def starting_weights(variant: str, weights: str | None) -> tuple[str | None, str]:
    """What training starts from: `"auto"` becomes the published weights, where they can be had.

    Returns:
        The weights, and why they are random where `"auto"` came to nothing.

    Examples:
        >>> starting_weights("resnet20", "auto")
        (None, "torchvision publishes no weights for 'resnet20'")
    """
    if weights != "auto":
        return weights, ""
    try:
        # No long wait: random weights are a way to go on.
        download.weights_path(resolve_weights(variant), timeout=10.0, attempts=2)
    except InputError as error:
        return None, str(error).split(".")[0]
    except CheckpointError as error:
        return None, str(error).rstrip(".")
    return "DEFAULT", ""


def to_fetch(variant: str, weights: str | None) -> str | None:
    """Where weights are fetched that are not here; arguments are those of `starting_weights`."""
    if weights is None or os.path.exists(weights):
        return None
    if hub_name(weights):
        return f"Hugging Face's hub, where its cache lacks them: {weights}"
    try:
        entry = resolve_weights(variant, "DEFAULT" if weights == "auto" else weights)
    except InputError:  # there are none, or it is a file's name
        return None
    return None if download.local_path(entry) else download.address(entry)


def load_pretrained(
    model: keras.Model,
    source: str | os.PathLike,
    class_names: Sequence[str] | None = None,
    key: str | None = None,
) -> str:
    """Loads weights under a new head: those of every layer but the last.

    They are a tag's such as `"DEFAULT"`, a torch checkpoint's, which may hold several networks
    (`key`), a `.keras` file's, or a run folder's. The head stays as it is, but for a file that has
    the same classes.

    Returns:
        One line that says what was loaded.

    Raises:
        InputError: Weights of another network.
        NotFoundError: There is no such file.
    """
    text = os.path.expanduser(os.fspath(source))
    if text.endswith(".keras") or os.path.isdir(text):
        return _load_from_keras(model, str(find_keras_file(text)), class_names)
    variant = info_of(model).get("variant")
    found = read_source(text, key, expected_keys(model), own_head_of(model), variant)
    found.told = True  # the run's own normalisation stays
    report = load_torchvision(model, found, head="skip")
    line = f"{str(report).splitlines()[0]}; {model.layers[-1].name!r} is new."
    problem = pixel_problem(model, found)
    return f"{line} {problem.partition(': give')[0]} (--normalization)." if problem else line


def _load_from_keras(model: keras.Model, path: str, class_names: Sequence[str] | None) -> str:
    other = load_model(path)
    theirs, ours = list(weighted_layers(other)), list(weighted_layers(model))
    head, adapted = ours[-1], ""
    weights = {layer.name: layer.get_weights() for layer in theirs}
    stem, first = weights[theirs[0].name], ours[0].get_weights()
    if stem[0].ndim == first[0].ndim == 4 and stem[0].shape[2] == 3 != first[0].shape[2]:
        channels = first[0].shape[2]
        turned = adapted_to(stem[0].transpose(3, 2, 0, 1), channels)
        stem[0] = turned.transpose(2, 3, 1, 0)
        adapted = f"; {how_adapted(theirs[0].name, channels)}"
    expected = {layer.name: _kind(layer, weights[layer.name]) for layer in theirs[:-1]}
    wanted = {layer.name: _kind(layer) for layer in ours[:-1]}
    problems = [n for n in {**wanted, **expected} if wanted.get(n) != expected.get(n)]
    if problems:
        raise InputError(
            f"The weights of {path!r} ({other.name}) do not fit {model.name}: "
            f"{len(problems)} layers differ, the first is {problems[0]!r}."
        )
    for layer in ours[:-1]:
        layer.set_weights(weights[layer.name])
    before = [plain_name(str(n)) for n in getattr(other, "info", {}).get("class_names") or ()]
    now = [plain_name(name) for name in class_names or ()]
    kept = now and sorted(before) == sorted(now) and _kind(theirs[-1]) == _kind(head)
    if kept:
        order = [before.index(name) for name in now]  # the last axis of kernel and bias
        head.set_weights([weight[..., order] for weight in theirs[-1].get_weights()])
    told = "stays, for the classes are the same" if kept else "is new"
    return f"{len(ours) - 1} layers from {path!r}; {head.name!r} {told}{adapted}."


def _kind(layer: keras.layers.Layer, weights: Sequence[Any] | None = None) -> tuple:
    """What two layers must share to mean the same by the same weights.

    The strides as well: resnet50 and resnet50_v1 have weights of equal shapes.
    """
    shapes = [tuple(w.shape) for w in weights or layer.weights]
    return type(layer).__name__, shapes, getattr(layer, "strides", None)
