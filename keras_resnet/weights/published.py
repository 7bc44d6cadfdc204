"""torchvision's published files: which there are, and how one gets onto this machine, whole."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.system.errors import InputError, did_you_mean
from keras_resnet.variants import SPECS

_HERE = pathlib.Path(__file__).parent
_TAG = re.compile(r"(default|imagenet|imagenet1k\w*)", re.IGNORECASE)
# No part of a revision is empty or begins with a point: the client puts it into a path.
_HUB = re.compile(r"(?:hf://)?(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*(?:/[\w-][\w.-]*)*))?", re.ASCII)
_FILES = (".pth", ".pt", ".th", ".tar", ".ckpt", ".bin", ".safetensors", ".keras", ".h5", ".npz")


@dataclasses.dataclass(frozen=True)
class TorchvisionWeights:
    """One of torchvision's weight files."""

    model: str  # the variant's name
    tag: str  # "IMAGENET1K_V1" or "IMAGENET1K_V2"
    is_default: bool  # what "DEFAULT" means for the variant
    url: str  # where torchvision publishes the file
    file_name: str  # which ends in the first eight hex digits of its sha256
    sha256_prefix: str  # those digits
    acc1: float  # published top-1 accuracy on ImageNet's validation set, per cent
    acc5: float  # the same of top-5
    resize_size: int  # short side before the crop, pixels
    crop_size: int  # side of the centre crop, pixels
    interpolation: str  # how images are resized
    mean: tuple[float, ...]  # that are subtracted, in 0..1
    std: tuple[float, ...]  # that are divided by, in 0..1
    num_params: int
    gflops: float  # multiply-adds of one image at `crop_size`, in units of 1e9
    file_size_mb: float  # MiB
    recipe: str  # name of the training recipe
    num_classes: int = 1000

    @property
    def preprocess(self) -> Preprocess:
        """The evaluation preset that the accuracies were measured with."""
        names = ("resize_size", "crop_size", "interpolation", "mean", "std")
        return Preprocess(**{name: getattr(self, name) for name in names})


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads((_HERE / "torchvision.json").read_text(encoding="utf-8"))


@functools.cache
def registry() -> tuple[TorchvisionWeights, ...]:
    """The files that torchvision publishes for the variants of this package, 18 of them."""
    names = {field.name for field in dataclasses.fields(TorchvisionWeights)}
    rows = [{k: v for k, v in row.items() if k in names} for row in _data()["weights"]]
    return tuple(
        TorchvisionWeights(**{**row, "mean": tuple(row["mean"]), "std": tuple(row["std"])})
        for row in rows
    )


def imagenet_class_names() -> list[str]:
    """The names of ImageNet's 1000 classes, in the order of torchvision's outputs.

    Examples:
        >>> imagenet_class_names()[281:283]
        ['tabby', 'tiger cat']
    """
    return json.loads((_HERE / "imagenet_classes.json").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class TimmWeights:
    """Weights that timm publishes on Hugging Face's hub."""

    name: str  # what comes behind `timm/`; before the point it is the variant
    side: int  # of the images, pixels
    acc1: float  # published top-1 accuracy on ImageNet's validation set at that side, per cent
    licence: str  # of the weights

    @property
    def model(self) -> str:
        """The variant's name."""
        return self.name.partition(".")[0]


@functools.cache
def timm_registry() -> tuple[TimmWeights, ...]:
    """The weights of timm for the variants of this package; licences and accuracies are timm's."""
    rows = json.loads((_HERE / "timm.json").read_text(encoding="utf-8"))["weights"]
    return tuple(row for row in (TimmWeights(*r) for r in rows) if row.model in SPECS)


def hub_name(text: Any) -> tuple[str, str | None] | None:
    """Repository and revision on Hugging Face's hub that a text names; `None` for another text.

    `"hf://ORG/NAME"` and `"timm/NAME"`, each perhaps with `@REVISION`; a file of timm's goes first.

    Raises:
        InputError: It begins with `hf://` and goes on otherwise.

    Examples:
        >>> hub_name("timm/resnet50.a1_in1k@main"), hub_name("timm/resnet50.pth")
        (('timm/resnet50.a1_in1k', 'main'), None)
    """
    if not isinstance(text, str) or not text.startswith(("hf://", "timm/")):
        return None
    if text.startswith("timm/") and (text.endswith(_FILES) or os.path.exists(text)):
        return None
    found = _HUB.fullmatch(text)
    if found is None:
        raise InputError(f"hf://ORG/NAME or hf://ORG/NAME@REVISION is needed. Received: {text!r}.")
    return found[1], found[2]


def is_tag(text: str) -> bool:
    """Whether a text is meant as a tag (`"DEFAULT"`, `"IMAGENET1K_V2"`) and not as a path.

    Raises:
        InputError: It is neither: no tag, no file, and without the extension of one.
    """
    if _TAG.fullmatch(text):
        return True
    if hub_name(text):
        return False
    if not os.path.splitext(text)[1] and not os.path.exists(os.path.expanduser(text)):
        near = did_you_mean(text, ["default", "imagenet1k_v1", "imagenet1k_v2"])
        raise InputError(
            f"weights={text!r} is neither a file nor one of DEFAULT, IMAGENET1K_V1, "
            f"IMAGENET1K_V2, timm/NAME and hf://ORG/NAME.{near}"
        )
    return False


def resolve_weights(variant: str, tag: str = "DEFAULT") -> TorchvisionWeights:
    """The published file of a variant by its tag.

    Args:
        variant: A name out of `list_models()`.
        tag: `"IMAGENET1K_V1"`, `"IMAGENET1K_V2"`, or `"DEFAULT"` (`"imagenet"` is the same) for
            the one that torchvision recommends. Upper and lower case are the same.

    Raises:
        InputError: There is no such file for the variant, or it is a quantised one.

    Examples:
        >>> resolve_weights("resnet50").file_name
        'resnet50-11ad3fa6.pth'
    """
    wanted = str(tag).upper()
    rows = {row.tag: row for row in registry() if row.model == variant}
    if is_quantised(tag):
        raise InputError(
            f"{tag!r} is quantised to 8 bits and cannot be imported. "
            f"Use {' or '.join(rows) or 'other weights'}."
        )
    if not rows:
        known = dict.fromkeys(row.model for row in registry())
        raise InputError(
            f"torchvision publishes no weights for {variant!r}.{did_you_mean(variant, known)} "
            f"There are files for {', '.join(known)}."
        )
    if wanted in ("DEFAULT", "IMAGENET"):
        return next(row for row in rows.values() if row.is_default)
    if wanted not in rows:
        near = did_you_mean(tag, ["default", *(name.lower() for name in rows)])
        raise InputError(
            f"{variant} has no weights {tag!r}.{near} There are: {', '.join(rows)}, DEFAULT."
        )
    return rows[wanted]


def named_variant(text: str | os.PathLike) -> str | None:
    """The variant that a text names where a model file is meant, for its published weights.

    A file or folder of that name goes first.

    Raises:
        InputError: torchvision publishes no weights of it.
    """
    name = os.fspath(text)
    if name.lower() not in SPECS or os.path.exists(os.path.expanduser(name)):
        return None
    return resolve_weights(name.lower()).model


def published_by_torchvision(sha256: str) -> TorchvisionWeights | None:
    """The published file with this sha256, whatever it is called here.

    torchvision writes the first eight digits into the name. Its older files of the same models
    hold the same weights in older formats, and count as the V1 they became. The first eight of the
    64 hex digits are enough.
    """
    for row in registry():
        if sha256.startswith(row.sha256_prefix):
            return row
    for model, name in _data()["older_file_names_still_in_caches"].items():
        if sha256.startswith(pathlib.Path(name).stem.rpartition("-")[2]):
            return resolve_weights(model, "IMAGENET1K_V1")
    return None


def is_quantised(name: str) -> bool:
    """Whether a file name is that of one of torchvision's 8-bit files, which cannot be imported."""
    return name in _data()["quantized_not_importable"] or "fbgemm" in name.lower()
