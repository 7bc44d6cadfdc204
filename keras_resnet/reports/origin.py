"""Where the weights of a run come from, and what proves it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from keras_resnet.recipes import RECIPES
from keras_resnet.reports.run_facts import RunFacts
from keras_resnet.system.errors import InputError, reason_of
from keras_resnet.variants import SPECS, get_spec
from keras_resnet.weights import download, published


@dataclasses.dataclass
class Origin:
    """What is known of a run's first and last weights."""

    known: dict[str, Any]  # what the model says of the file that training started from
    row: published.TorchvisionWeights | None = None  # of that file, by its sha256
    check: Any = None  # the `VerifyReport` of the file imported anew
    unchecked: str = ""  # why there is none
    # Name, bytes and sha256 of the run's own models.
    files: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)


def origin(run: RunFacts) -> Origin:
    """Follows a run's weights back; the first file is read anew where it is on this machine."""
    found = Origin(run.weights)
    for name in ("best.keras", "last.keras"):
        if name in run.files:
            sha256 = download.file_sha256(run.folder / name)
            found.files.append((name, run.files[name], sha256))
    if found.known:
        sha256 = found.known.get("sha256")
        found.row = published.published_by_torchvision(str(sha256)) if sha256 else None
        path = _first_file(run.recipe.get("weights"), run.variant)
        if path is None:
            found.unchecked = "the file is not here"
        elif download.file_sha256(path) != sha256:
            found.unchecked = "the file here is another one now"
        else:
            try:
                found.check = _verify(path, run.variant, found.known.get("key") or None)
            except Exception as error:  # a report is no place for a traceback
                found.unchecked = reason_of(error)
    return found


def _first_file(start: Any, variant: str | None) -> Path | None:
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


def _verify(path: Path, variant: str, key: str | None) -> Any:
    """The file once more through the import, and compared with plain NumPy."""
    # Not at the top: figures alone need neither Keras nor a backend.
    from keras_resnet.models.zoo import create_model
    from keras_resnet.system.device import image_shape
    from keras_resnet.weights.load import load_torchvision
    from keras_resnet.weights.verify import verify

    spec = get_spec(variant)
    side = spec.input_size if spec.min_size > 1 else min(64, spec.input_size)
    fresh = create_model(variant, num_classes=2, input_shape=image_shape(side, side, 3))
    load_torchvision(fresh, path, head="skip", key=key)
    return verify(fresh, path, key=key)


def recipe_changes(recipe: dict[str, Any]) -> list[tuple[str, Any, Any]] | None:
    """Setting, value, and the published recipe's value, of what differs; `None` of no recipe's."""
    row = RECIPES.get(str(recipe.get("name")))
    if row is None:
        return None
    changes = []
    for key, value in recipe.items():
        default = getattr(row, key, value)
        default = list(default) if isinstance(default, tuple) else default
        if default != value and key not in ABOUT:
            changes.append((key, value, default))
    return changes


ABOUT = ("name", "source", "aim")  # fields of a recipe that set nothing
