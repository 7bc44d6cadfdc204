"""Loads a torchvision state dict into a model: checks everything, then copies."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from keras_resnet.system.errors import InputError, one_of
from keras_resnet.system.files import printable
from keras_resnet.variants import SPECS
from keras_resnet.weights import published as hub
from keras_resnet.weights.mapping import (
    KINDS,
    Entry,
    Head,
    convs_of,
    has_torchvisions_bottlenecks,
    info_of,
    modules_of,
    strides_of,
)
from keras_resnet.weights.matching import COUNTER, Shape, fit, grouped, variants_of
from keras_resnet.weights.sources import (
    Source,
    few,
    own_head_of,
    pixel_problem,
    read_source,
    to_json_text,
    told_preprocess,
)
from keras_resnet.weights.verify import VerifyReport, verify_source

# --- The report ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What an import did, or why it was not done; `print` it.

    Shapes are torch's.

    Attributes:
        model: The model's name.
        source: The file's name, `"a state dict"`, or the module's class.
        format: `"zip"`, `"stream"`, `"tar"`, `"safetensors"`, `"dict"` or `"module"`.
        sha256: Of the file, 64 hex digits; `None` where there is no file.
        key: The entry that was read, where a file nests several.
        prefix: What was taken away from the front of every name.
        names: Whose names its entries have, where that is not torchvision.
        head: As asked for.
        variants: Rows of the table that the source fits, with the number of classes.
        loaded: Key to shape.
        missing: Key to shape of what the model wants and the source lacks.
        unexpected: Key to shape of what the source has and the model does not want.
        mismatched: Key to (the source's shape, the model's shape, or a reason).
        skipped: Key to shape of the head's entries that were left out.
        left_out: Name in the file to shape of what stands beside the network: another network, a
            queue, a projector, a loss's weights.
        cast: Key to (the source's dtype, the model's).
        done: Whether anything was assigned; if not, `loaded` is what would have fitted.
        verification: The proof, where it was asked for.
        adapted: What was made of an RGB file's first convolution, for images of other channels.
        note: What the file leaves open, in a sentence.
    """

    model: str
    source: str
    format: str
    sha256: str | None = None
    key: str = ""
    prefix: str = ""
    head: Head = "strict"
    names: str = ""
    variants: tuple[tuple[str, int | None], ...] = ()
    loaded: dict[str, Shape] = dataclasses.field(default_factory=dict)
    missing: dict[str, Shape] = dataclasses.field(default_factory=dict)
    unexpected: dict[str, Shape] = dataclasses.field(default_factory=dict)
    mismatched: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, Shape] = dataclasses.field(default_factory=dict)
    left_out: dict[str, Shape] = dataclasses.field(default_factory=dict)
    cast: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    done: bool = False
    verification: VerifyReport | None = None
    adapted: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Every entry of either side has its counterpart, or was left out as asked."""
        return not (self.missing or self.unexpected or self.mismatched)

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """The report as JSON text, written to `path` as well where one is given."""
        proof = self.verification and json.loads(self.verification.to_json())
        facts = {**dataclasses.asdict(self), "ok": self.ok, "verification": proof}
        return to_json_text(facts, path)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        lines = [
            f"{self.source} -> {self.model}: {len(self.loaded)} of {total} entries "
            + ("loaded" if self.done else "fit, nothing was loaded")
        ]
        if self.done and self.head != "strict" and self.skipped:
            how = "drawn anew" if self.head == "replace" else "left as it was"
            lines[0] += f", the head {how}"
        lines[0] += f"; {self.adapted}" if self.adapted else ""
        facts = [self.format, f"sha256 {self.sha256[:8]}..." if self.sha256 else "",
                 f"entry {printable(self.key)!r}" if self.key else "",
                 f"prefix {printable(self.prefix)!r} removed" if self.prefix else "",
                 f"in the names of {self.names}" if self.names else ""]  # fmt: skip
        lines.append("  from         " + ", ".join(fact for fact in facts if fact))
        for (before, after), count in sorted(collections.Counter(self.cast.values()).items()):
            lines.append(f"  cast         {count} entries, {before} -> {after}")
        for name in ("missing", "unexpected", "skipped", "mismatched"):
            lines += _listed(name, getattr(self, name))
        if self.left_out:
            lines.append(f"  left out     {printable(grouped(self.left_out))}")
        if self.note:
            lines.append(f"  open         {self.note}")
        if self.verification is not None:
            lines += str(self.verification).split("\n")
        return "\n".join(lines)


def _listed(name: str, entries: Mapping[str, Any], limit: int = 4) -> list[str]:
    if not entries:
        return []
    lines = []
    for key in sorted(entries)[:limit]:
        shown = entries[key]
        if name == "mismatched":
            shown = f"source {shown[0]}, model {shown[1]}"
        lines.append(f"  {name if not lines else '':<12} {printable(key)}  {shown}")
    if len(entries) > limit:
        lines.append(f"  {'':<12} and {len(entries) - limit} more {name}")
    return lines


# --- Import -------------------------------------------------------------------------------------


def load_torchvision(
    model: keras.Model,
    source: str | os.PathLike | Mapping[str, Any] | Any,
    *,
    head: Head = "strict",
    strict: bool = True,
    key: str | None = None,
    verify: bool = False,
    allow_other_strides: bool = False,
) -> LoadReport:
    """Loads a torch state dict into a Keras model, or leaves the model exactly as it was.

    Names, kinds and shapes are compared first, all of them; then everything is assigned.

    Args:
        model: A model of this package, one built with its blocks, or any Functional model of
            Conv2D, Dense and BatchNormalization whose layers are named after the modules.
        source: A checkpoint's path (see `read_checkpoint`), a state dict of NumPy arrays or torch
            tensors, a torch module, one of torchvision's tags (`"DEFAULT"`) where the model comes
            from `create_model`, or a name on Hugging Face's hub (`"timm/resnet50.a1_in1k"`,
            `"hf://ORG/NAME@REVISION"`).
        head: `"strict"` loads the last layer like any other. `"skip"` loads all but the head: the
            model's own last layer stays as it is, for a model with other classes or without a
            head. `"replace"` loads all but the head too, which the source must have, and draws the
            model's last layer anew from its initializers, even where the shapes agree.
        strict: With `False`, missing and unexpected entries are reported and no error. Entries of
            another shape always are.
        key: Which entry of a nested checkpoint to read, such as `"model_ema"`.
        verify: Run `verify` afterwards; where it fails the old weights come back.
        allow_other_strides: Load into a model whose bottlenecks stride elsewhere than the
            source's do, or seem to. torchvision's stride on the 3x3 (v1.5), and their weights
            give wrong answers in a v1 model, whose shapes are the same. Needed for weights of a
            v1 model whose origin does not show.

    Returns:
        What was loaded, missing, unexpected, skipped and cast. In a model of this package
        `info["weights"]` says the same in short, and a file that torchvision published brings its
        preprocessing and class names.

    Raises:
        InputError: The source does not fit (the error's `report` has every key), or a layer has
            weights of an unknown kind.
        CheckpointError: The file cannot be read, or is refused.
        NotFoundError: There is no such file.

    Examples:
        >>> import numpy as np
        >>> x = keras.Input((8,))
        >>> model = keras.Model(x, keras.layers.Dense(2, name="fc")(x), name="tiny")
        >>> state = {"module.fc.weight": np.ones((2, 8)), "module.fc.bias": np.zeros(2)}
        >>> print(load_torchvision(model, state))
        a state dict -> tiny: 2 of 2 entries loaded
          from         dict, prefix 'module.' removed
          cast         2 entries, float64 -> float32
    """
    one_of("head", head, ("strict", "skip", "replace"))
    modules = modules_of(model)
    entries = {e.key: e for _, group in modules.values() for e in group}
    own_head = own_head_of(model)
    wanted = {k: entry.shape for k, entry in entries.items()}
    found = read_source(source, key, wanted, own_head, info_of(model).get("variant"))
    if head == "replace" and own_head is None:
        raise InputError(f"{model.name} has no fully connected layer whose head to replace.")
    if not strict and found.rivals:
        raise InputError(
            f"{found.label} has parts of {model.name} at several places: name one of "
            f"{few((f'key={r!r}' for r in found.rivals), 6)}."
        )
    report = _plan(model.name, found, entries, own_head, head)
    problem = _problem(report, found, own_head, entries, strict)
    if problem is None and not allow_other_strides:
        problem = _stride_problem(model, found)
    if problem is None and not found.told:
        problem = pixel_problem(model, found)
    if problem is not None:
        error = InputError(problem)
        error.report = report
        raise error

    assignments = [
        (entries[k].variable, entries[k].to_keras(found.tensors[k]))
        for k in report.loaded
        if entries[k].variable is not None
    ]
    if head == "replace":
        assignments += _fresh(modules[own_head][0])
    old = []
    try:
        for variable, value in assignments:
            old.append((variable, keras.ops.convert_to_numpy(variable.value)))
            variable.assign(value)
        if verify:
            proof = verify_source(model, found, head=head == "strict")
            report = dataclasses.replace(report, verification=proof)
            if not proof.passed:
                error = InputError(
                    f"{found.label} was loaded into {model.name}, but they answer differently "
                    f"from {proof.first_difference!r} on; the old weights were put back."
                )
                error.report = report
                raise error
    except BaseException:
        for variable, value in old:
            variable.assign(value)
        raise
    report = dataclasses.replace(report, done=True)
    _remember(model, report, found, modules)
    if found.other_pixels:
        warnings.warn(report.note, stacklevel=2)
    return report


def _plan(name, found: Source, entries: Mapping[str, Entry], own_head, head) -> LoadReport:
    loaded, missing, unexpected, mismatched, skipped, cast = ({} for _ in range(6))
    shapes = found.shapes
    for key, entry in entries.items():
        module = key.rpartition(".")[0]
        if module == own_head and (head == "skip" or (head == "replace" and key in shapes)):
            skipped[key] = shapes.get(key, entry.shape)
        elif key not in shapes:
            if entry.variable is not None:  # files before torch 0.4.1 count no batches
                missing[key] = entry.shape
        elif shapes[key] != entry.shape:
            mismatched[key] = (_described(shapes[key], entry.shape),
                               _described(entry.shape, shapes[key]))  # fmt: skip
        elif entry.variable is None:
            loaded[key] = entry.shape
        elif not keras.backend.is_float_dtype(found.dtypes[key]):
            mismatched[key] = (found.dtypes[key], str(entry.variable.dtype))
        else:
            loaded[key] = entry.shape
            if found.dtypes[key] != str(entry.variable.dtype):
                cast[key] = (found.dtypes[key], str(entry.variable.dtype))
    linear = {k.rpartition(".")[0] for k, v in shapes.items()
              if k.endswith(".weight") and len(v) == 2}  # fmt: skip
    left_out, near = dict(found.beside), found.near
    for key in sorted(set(shapes) - set(entries)):
        module, _, suffix = key.rpartition(".")
        if head == "skip" and module in linear:
            skipped[key] = shapes[key]
        elif head == "skip" and key in near:
            left_out[key] = shapes[key]
        elif suffix != COUNTER:
            unexpected[key] = shapes[key]
    note = found.other_pixels
    if not note and found.network.dialect.name == "mmpretrain" and not found.config.get("style"):
        note = "Without its config, it is taken for style='pytorch', strides on the 3x3."
    return LoadReport(
        name, found.label, found.kind, found.sha256, found.key, found.prefix, head,
        found.names, variants_of(shapes), loaded, missing, unexpected, mismatched, skipped,
        left_out, cast, adapted=found.adapted, note=note,
    )  # fmt: skip


def _described(shape: Shape, other: Shape) -> Shape | str:
    """The shape, with its kind where that differs too."""
    if len(shape) == len(other):
        return shape
    return f"{shape}, {KINDS.get(len(shape), 'of another kind')}"


def _problem(report: LoadReport, found: Source, own_head, entries, strict: bool) -> str | None:
    """One line that says why the source does not fit, or None."""
    if not report.mismatched and (not strict or report.ok):
        if report.loaded:
            return None
        return f"{found.label} and {report.model} have no entry in common: {few(found.tensors)}."
    head_alone = set(report.mismatched) <= {f"{own_head}.weight", f"{own_head}.bias"}
    if head_alone and not report.missing and not report.unexpected and own_head:
        theirs, own = found.shapes[f"{own_head}.weight"], entries[f"{own_head}.weight"].shape
        if len(theirs) == 2 and theirs[0] != own[0] and theirs[1] == own[1]:
            return (
                f"{found.label} has {theirs[0]} classes, {report.model} has {own[0]}: "
                'load_torchvision(model, source, head="skip") loads all but the last layer.'
            )
    spared = not report.mismatched and set(report.unexpected) <= found.near
    if spared and own_head and report.head == "strict":
        other = f" ({grouped(report.unexpected)} in its place)" if report.unexpected else ""
        if report.missing and all(k.rpartition(".")[0] == own_head for k in report.missing):
            return (
                f"{found.label} has no {own_head!r} as {report.model} has it{other}: "
                'head="skip" loads all but the last layer.'
            )
        if not report.missing:
            return (
                f"{found.label} has {grouped(report.unexpected)} beside the layers of "
                f'{report.model}, perhaps before the head: head="skip" loads all but the last '
                "layer, strict=False the head as well."
            )
    sides = []
    for name in ("missing", "unexpected"):
        if keys := getattr(report, name):
            sides.append(f"{len(keys)} {name} ({few(keys)})")
    if report.mismatched:
        first = sorted(report.mismatched)[0]
        theirs, own = report.mismatched[first]
        sides.append(
            f"{len(report.mismatched)} of another shape or kind ({printable(first)}: source "
            f"{theirs}, model {own})"
        )
    hint = ""
    if not report.mismatched and not report.missing and own_head is None:
        hint = ' head="skip" leaves out the head.'
    return (
        f"{found.label} does not fit {report.model}: {fit(found.shapes)}. "
        f"Entries: {', '.join(sides)}.{hint}"
    )


def _stride_problem(model: keras.Model, found: Source) -> str | None:
    own = strides_of(convs_of(model))
    if own is None or own == found.strides:
        return None
    if found.strides is None and found.network.dialect.name == "detectron2":
        return (
            f"{found.label} does not say where its bottlenecks stride: Detectron2's weights stride "
            "on the 1x1 convolutions (MSRA's, its default: resnet50_v1 and the like) or, where "
            "STRIDE_IN_1X1 is false in its config, on the 3x3 ones (resnet50), and "
            f"{model.name} on the {own}. If that is right, pass allow_other_strides=True."
        )
    if found.strides is not None:
        said = f"strides on the {found.strides} convolutions ({found.strides_from})"
    elif own == "3x3" or not has_torchvisions_bottlenecks(found.tensors):
        return None
    else:
        said = "looks like torchvision's, whose bottlenecks stride on the 3x3 convolutions (v1.5)"
    fits = [n for n, _ in variants_of(found.shapes)
            if getattr(SPECS[n], "stride_on", None) == (found.strides or "3x3")]  # fmt: skip
    use = f"use {' or '.join(fits)}" if fits else "use a model with the same strides"
    return (
        f"{found.label} {said}, {model.name} strides on the {own}: the shapes are the same, the "
        f"answers would be wrong. Either {use}, or pass allow_other_strides=True if the weights "
        "were trained in a model like this one."
    )


def _fresh(layer: keras.layers.Dense) -> Iterator[tuple[Any, Any]]:
    """New values for a head, from its own initializers."""
    pairs = [(layer.kernel, layer.kernel_initializer), (layer.bias, layer.bias_initializer)]
    for variable, same in pairs:
        if variable is not None:
            draw = type(same).from_config(same.get_config())  # with a seed of its own
            yield variable, keras.ops.convert_to_numpy(draw(variable.shape, variable.dtype))


def _remember(model: keras.Model, report: LoadReport, found: Source, modules) -> None:
    """Writes the weights' origin into the model's info, where it has one."""
    if not isinstance(getattr(model, "info", None), dict):
        return
    told = [path for path in modules if f"{path}.{COUNTER}" in report.loaded]
    counts = {path: int(found.tensors[f"{path}.{COUNTER}"]) for path in told}
    norms = [layer for layer, _ in modules.values()
             if isinstance(layer, keras.layers.BatchNormalization)]  # fmt: skip
    same = len(set(counts.values())) == 1 and len(counts) == len(norms)
    row, cast = found.published, collections.Counter(report.cast.values())
    model.info["weights"] = {
        "source": found.label,
        "sha256": found.sha256,
        "format": found.kind,
        "key": found.key,
        "prefix": found.prefix,
        "names": found.names,
        "head": report.head,
        "loaded": len(report.loaded),
        "missing": sorted(report.missing),
        "unexpected": sorted(report.unexpected),
        "left_out": grouped(report.left_out, 20),
        "cast": {f"{a} -> {b}": cast[a, b] for a, b in sorted(cast)},
        "adapted": report.adapted or None,
        "published_as": found.named.label if found.named else row and f"{row.model} {row.tag}",
        COUNTER: (next(iter(counts.values())) if same else counts) if counts else None,
    }
    preprocess = told_preprocess(model, found)
    names = found.preprocess and hub.imagenet_class_names()
    if found.named:
        names = found.named.class_names
    if preprocess is not None:
        model.info["preprocess"] = preprocess.get_config()
    head = own_head_of(model) if report.head == "strict" else None
    if names and head is not None and len(names) == modules[head][0].units:
        model.info["class_names"] = names
