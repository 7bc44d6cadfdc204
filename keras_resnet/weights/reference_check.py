"""Whether a state dict holds what `reference` runs: all of it, nothing else, in shapes that fit."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_resnet.system.errors import InputError

NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var")


def check(plan: Any, found: Any, entries: dict[str, np.ndarray]) -> None:
    """Raises InputError unless the entries are the plan's, all of them, in shapes that fit."""
    kinds: dict[str, str] = {}
    kind, norm = ("group", NORM_ENTRIES[:2]) if plan.norm_groups else ("batch", NORM_ENTRIES)
    for conv in plan.every_conv():
        kinds[f"{conv.name}.weight"] = "convolution"
        if conv.bias:
            kinds[f"{conv.name}.bias"] = "bias"
        for name in filter(None, (conv.norm, conv.before)):
            kinds |= {f"{name}.{entry}": f"{kind} norm" for entry in norm}
    if plan.last_norm:
        kinds |= {f"{plan.last_norm}.{entry}": f"{kind} norm" for entry in norm}
    for name in plan.linears:
        kinds |= {f"{name}.weight": "linear layer", f"{name}.bias": "bias"}
    norms = (key.rpartition(".")[0] for key in kinds if key.endswith(".running_var"))
    counters = {f"{name}.num_batches_tracked" for name in norms}
    missing = [key for key in kinds if key not in entries]
    unexpected = sorted(entries.keys() - kinds.keys() - counters)
    if missing or unexpected:
        parts = [f"no {kinds[missing[0]]} {missing[0]!r}{_more(missing)}"] if missing else []
        parts += [f"unexpected {unexpected[0]!r}{_more(unexpected)}"] if unexpected else []
        blocks = f" with {list(found.blocks)} blocks" if found.blocks else ""
        raise InputError(
            f"The state dict looks like {found.family}{blocks}, but there is "
            f"{'; and '.join(parts)}. Pass the whole state dict of one network."
        )
    for key in kinds:
        dtype = entries[key].dtype
        # NumPy has no bfloat16; ml_dtypes' has the name and converts, but its kind is not "f".
        if dtype.kind != "f" and dtype.name != "bfloat16":
            raise InputError(f"{key!r} holds {dtype.name}; weights must be floating point.")

    channels = found.in_channels
    for conv in plan.convs:
        channels = _check_conv(conv, channels, entries, norm)
    for block in (block for stage in plan.stages.values() for block in stage):
        out = channels
        for conv in (*block.branch, *block.squeeze):
            out = _check_conv(conv, out, entries, norm)
        if hasattr(block.shortcut, "kernel"):
            channels = _check_conv(block.shortcut, channels, entries, norm)
        elif block.shortcut == "zero_padding" and out >= channels and (out - channels) % 2 == 0:
            channels = out
        if channels != out:
            last = f"{block.branch[-1].name}.weight"
            raise InputError(f"{last!r} gives {out} channels, its block's shortcut {channels}.")
    if plan.last_norm:
        _check_vectors(plan.last_norm, norm, channels, entries)
    features = channels if plan.stages else None  # AlexNet's depend on the pooled size
    for name in plan.linears:
        rows, columns = shape_of(entries, f"{name}.weight", 2)
        if features not in (columns, None) or (features is None and columns % channels):
            raise InputError(
                f"'{name}.weight' has shape {(rows, columns)}; "
                f"the layer before it gives {features or f'a multiple of {channels}'} features."
            )
        if shape_of(entries, f"{name}.bias", 1) != (rows,):
            raise InputError(f"'{name}.bias' has {len(entries[f'{name}.bias'])}, not {rows}.")
        features = rows


def _check_conv(
    conv: Any, channels: int, entries: dict[str, np.ndarray], norm: tuple[str, ...]
) -> int:
    """The convolution's output channels, its shapes having been compared with what it reads."""
    shape = shape_of(entries, f"{conv.name}.weight", 4)
    fits = shape[1] * conv.groups == channels and shape[0] % conv.groups == 0
    if not fits or shape[2:] != (conv.kernel, conv.kernel):
        groups = f" in {conv.groups} groups" if conv.groups > 1 else ""
        raise InputError(
            f"'{conv.name}.weight' has shape {shape}; expected a {conv.kernel}x{conv.kernel} "
            f"convolution of {channels} channels{groups} (out, in / groups, height, width)."
        )
    vectors = ((conv.bias and conv.name, ("bias",), shape[0]), (conv.norm, norm, shape[0]),
               (conv.before, norm, channels))  # fmt: skip
    for name, kinds, count in vectors:
        if name:
            _check_vectors(name, kinds, count, entries)
    return shape[0]


def _check_vectors(name: str, kinds: Any, count: int, entries: dict[str, np.ndarray]) -> None:
    for key in (f"{name}.{kind}" for kind in kinds):
        if shape_of(entries, key, 1) != (count,):
            raise InputError(f"{key!r} has {len(entries[key])} values for {count} channels.")


def _more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more: {', '.join(keys[1:4])} ...)" if len(keys) > 1 else ""


def shape_of(entries: dict[str, np.ndarray], key: str, rank: int) -> tuple[int, ...]:
    """Shape of an entry that must have a rank, or InputError."""
    kind = {4: "convolution", 2: "linear layer", 1: "vector"}[rank]
    if key not in entries:
        raise InputError(
            f"The state dict has no {kind} {key!r}; pass a network's whole state dict."
        )
    shape = entries[key].shape
    if len(shape) != rank or 0 in shape:
        raise InputError(f"{key!r} has shape {shape}; a {kind} has {rank} dimensions, none of 0.")
    return shape
