"""What a row of the table holds and costs, and which rows lie in a file; needs no Keras."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping

from keras_resnet.variants import COUNTER, SPECS, AlexNetSpec, ResNetSpec, Shape
from keras_resnet.weights.dialects import FORMS, TORCHVISION, Dialect, has_group_norms, head_shape


def spec_shapes(
    spec: ResNetSpec | AlexNetSpec, num_classes: int | None = None, channels: int = 3
) -> dict[str, Shape]:
    """The state dict of a row of the table: keys and shapes, in torch's order, without a model.

    By default with as many classes as the variant's data set has.
    """
    num_classes = num_classes or spec.num_classes
    return {
        f"{name.replace('_', '.')}.{suffix}": shape
        for name, entries, _ in spec.weighted_layers(num_classes, channels)
        for suffix, shape in entries.items()
    }


def parameter_count(spec: ResNetSpec | AlexNetSpec) -> int:
    """Trainable parameters of a row of the table, with its data set's number of classes."""
    trained = (s for k, s in spec_shapes(spec).items() if k.endswith((".weight", ".bias")))
    return sum(map(math.prod, trained))


def multiply_adds(spec: ResNetSpec | AlexNetSpec) -> int:
    """Multiply-adds of one image at a row's own size, as `count_flops` counts them in a model."""
    return sum(
        side**2 * math.prod(entries["weight"])
        for _, entries, side in spec.weighted_layers(spec.num_classes, 3)
    )


# --- The networks in a file ---------------------------------------------------------------------

MAX_NETWORKS, MAX_PLACES = 32, 2000  # what a file can be made of to take long


@dataclasses.dataclass(frozen=True)
class Network:
    """A network among the entries of a state dict."""

    prefix: str  # what stands in front of its names, such as "module.encoder_q."
    dialect: Dialect  # whose names they are
    names: dict[str, str]  # torchvision's name -> the entry's
    # Rows of the table that it is, each with its number of classes; `None` without a head.
    variants: tuple[tuple[str, int | None], ...] = ()
    near: tuple[str, ...] = ()  # layers beside it, in the module that it is: another head, say
    # Entries of its own modules, or convolutions among them, that it does not have: it is a part of
    # another network.
    strange: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()  # all other entries

    def __str__(self) -> str:
        classes = dict.fromkeys(f"{n} classes" if n else "no head" for _, n in self.variants)
        whose = "" if self.dialect is TORCHVISION else f", named as in {self.dialect.of}"
        return f"{' or '.join(name for name, _ in self.variants)}, {' or '.join(classes)}{whose}"


def find_networks(shapes: Mapping[str, Shape]) -> list[Network]:
    """The networks of the table that a state dict holds, under any prefix, in the file's order.

    A network is there where all entries of its body are, with their shapes; the number of input
    channels and of classes is free, and a head of another kind counts as none. Rows that differ in
    strides alone are all named. Shapes are torch's.
    """
    at: dict[tuple[str, Dialect], list[tuple[str, int | None, dict[str, str]]]] = {}
    shapes = {name: head_shape(name, tuple(shape)) for name, shape in shapes.items()}
    places = _Places(shapes)
    for spec in SPECS.values():
        body, dense = _body_and_head(spec.name)
        for prefix, dialect, names in places.of({**body, **dense}, body):
            classes = _classes(shapes, names, dense, f"{spec.head.replace('_', '.')}.weight")
            if classes is None:
                names = {k: v for k, v in names.items() if k not in dense}
            at.setdefault((prefix, dialect), []).append((spec.name, classes, names))
    prefixes = tuple(prefix for prefix, _ in at)
    found = []
    for (prefix, dialect), rows in itertools.islice(at.items(), MAX_NETWORKS):
        parts = [
            (row, *beside(shapes, prefix, row[2], _body_and_head(row[0])[0], prefixes))
            for row in rows
        ]
        # Nothing of another network, and as much of its own as can be: no part of a deeper one.
        rank = [(len(strange), -len(row[2])) for row, _, strange, _ in parts]
        parts = [part for part, own in zip(parts, rank, strict=True) if own == min(rank)]
        variants = tuple((name, classes) for (name, classes, _), _, _, _ in parts)
        (_, _, names), near, strange, others = parts[0]
        found.append(Network(prefix, dialect, names, variants, near, strange, others))
    order = {name: i for i, name in enumerate(shapes)}
    found.sort(key=lambda network: min(order[name] for name in network.names.values()))
    whole = _largest(network for network in found if not network.strange)
    return whole or [max(found, key=lambda n: len(n.names))] if found else []


def _largest(networks: Iterable[Network]) -> list[Network]:
    """Those that are no part of another: the same network without its head, by a longer prefix."""
    entries = [(network, set(network.names.values())) for network in networks]
    return [
        network
        for i, (network, own) in enumerate(entries)
        if not any(own < other or (own == other and j < i) for j, (_, other) in enumerate(entries))
    ]


def locate(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape], head: str | None):
    """The same for the entries of one model, whose last layer may be missing or another."""
    body = {k: v for k, v in wanted.items() if k.rpartition(".")[0] != head} or dict(wanted)
    shapes = {name: head_shape(name, tuple(shape)) for name, shape in shapes.items()}
    prefixes = tuple(network.prefix for network in find_networks(shapes))
    found = []
    for prefix, dialect, names in _Places(shapes).of(wanted, body):
        rest = beside(shapes, prefix, names, body, prefixes)
        found.append(Network(prefix, dialect, names, (), *rest))
    return _largest(network for network in found if not network.strange) or found[:1]


@functools.cache
def _body_and_head(name: str) -> tuple[dict[str, Shape], dict[str, Shape]]:
    spec = SPECS[name]
    dense = [n.replace("_", ".") for n in getattr(spec, "dense", (spec.head,))]
    shapes = spec_shapes(spec)
    head = {k: v for k, v in shapes.items() if k.rpartition(".")[0] in dense}
    return {k: v for k, v in shapes.items() if k not in head}, head


@functools.cache
def head_modules() -> frozenset[str]:
    """Module paths of the fully connected layers of all rows."""
    return frozenset(k.rpartition(".")[0] for name in SPECS for k in _body_and_head(name)[1])


@functools.cache
def _translated(dialect: Dialect, names: tuple[str, ...]) -> dict[str, str]:
    return {name: theirs for name in names if (theirs := dialect(name))}


class _Places:
    """Where the entries of networks stand in a state dict."""

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = {key: tuple(shape) for key, shape in shapes.items()}
        self.found: dict[tuple[str, Shape], list[str]] = {}
        self.ends: dict[str, list[str]] = collections.defaultdict(list)
        for key in self.shapes:
            self.ends[_end(key)].append(key)

    def prefixes(self, name: str, shape: Shape | None = None) -> list[str]:
        """What stands in front of an entry, wherever it is and has this shape.

        The second axis, the input channels, is free.
        """
        key = (name, (*shape[:1], *shape[2:]) if shape else ())
        if key not in self.found:
            names = (k for k in self.ends[_end(name)] if k == name or k.endswith(f".{name}"))
            fits = (k for k in names if not shape or (*(v := self.shapes[k])[:1], *v[2:]) == key[1])
            self.found[key] = [k[: -len(name)] for k in itertools.islice(fits, MAX_PLACES)]
        return self.found[key]

    def spoken(
        self, names: Iterable[str], first: str, shape: Shape | None = None
    ) -> Iterator[tuple[Dialect, dict[str, str], list[str]]]:
        """Dialects in whose words the first entry is there: those for all names, and where."""
        for dialect in FORMS:
            theirs = dialect(first)
            if theirs and (prefixes := self.prefixes(theirs, shape)):
                yield dialect, _translated(dialect, tuple(names)), prefixes

    def of(
        self, names: Iterable[str], body: Mapping[str, Shape]
    ) -> Iterator[tuple[str, Dialect, dict[str, str]]]:
        """Prefix, dialect, and torchvision's name -> the entry's, wherever all of a body is.

        The input channels, the second axis of the first entry, may be others.
        """
        wanted = [(key, shape) for key, shape in body.items() if not key.endswith(COUNTER)]
        (first, stem), *rest = wanted
        grouped = has_group_norms(body)
        for dialect, theirs, prefixes in self.spoken(names, first, stem):
            if any(key not in theirs for key, _ in wanted) or (grouped and not dialect.grouped):
                continue
            for prefix in prefixes:
                if all(self.shapes.get(prefix + theirs[key]) == shape for key, shape in rest):
                    found = {key: prefix + name for key, name in theirs.items()}
                    yield prefix, dialect, {k: v for k, v in found.items() if v in self.shapes}


def _end(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])


def _classes(shapes: Mapping[str, Shape], names: Mapping[str, str], dense, weight) -> int | None:
    """The number of classes, where a head is there as a row has it."""
    if weight not in names or len(shape := shapes[names[weight]]) != 2:
        return None
    classes = shape[0]
    wanted = dense | {weight: (classes, *dense[weight][1:]), f"{weight[:-7]}.bias": (classes,)}
    fits = all(key in names and tuple(shapes[names[key]]) == v for key, v in wanted.items())
    return classes if fits else None


def beside(
    shapes: Mapping[str, Shape],
    prefix: str,
    names: Mapping[str, str],
    body: Iterable[str],
    others: Iterable[str] = (),
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """What is no entry of a network: layers near it, what makes it another network, and the rest.

    Of the shapes of a whole state dict; `names` are the network's entries, as `Network.names`, and
    `body` torchvision's names of those that are no head's. What begins with one of the `others`,
    the prefixes of other networks, does not count as near.
    """
    own = set(names.values())
    modules = {name.rpartition(".")[0] for name in own} - {""}  # a batch norm is no group norm
    kinds = {_kind(names[key][len(prefix) :]) for key in body if key in names}
    inside = tuple(p for p in others if p != prefix and p.startswith(prefix))
    near, strange, rest = [], [], []
    for name, shape in shapes.items():
        if name in own:
            continue
        away = not name.startswith(prefix) or name.endswith("_momentum")  # Caffe2's optimizer
        if away or (inside and name.startswith(inside)):
            rest.append(name)
        elif _kind(name[len(prefix) :]) in kinds or name.rpartition(".")[0] in modules:
            if not name.endswith(COUNTER):
                strange.append(name)
        elif len(shape) > 2:
            strange.append(name)
        else:
            near.append(name)
    layers = {name.rpartition(".")[0] for name in near
              if len(shapes[name]) == 2 or name.endswith("running_var")}  # fmt: skip
    rest += [name for name in near if name.rpartition(".")[0] not in layers]
    return tuple(n for n in near if n.rpartition(".")[0] in layers), tuple(strange), tuple(rest)


def _kind(name: str) -> str:
    """The module of a network that an entry belongs to, without its number: `layer` of layer4."""
    return re.sub(r"(?<=\D)\d+$", "", name.partition(".")[0])


def grouped(names: Iterable[str], limit: int = 6) -> str:
    """Names in a few words: by their first parts, with the number of entries.

    Examples:
        >>> grouped(["queue", "encoder_k.conv1.weight", "encoder_k.bn1.bias"])
        'encoder_k.* (2), queue'
    """
    names = sorted(names)
    common = os.path.commonprefix(names)  # noqa: RUF071 (of text, not of paths)
    start = common.rfind(".") + 1 if len(names) > 1 else 0
    counts: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        end = name.find(".", start)
        counts[name if end < 0 else name[:end]].append(name)
    shown = [n[0] if len(n) == 1 else f"{part}.* ({len(n)})" for part, n in counts.items()]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def matching_variants(shapes: Mapping[str, Shape]) -> list[tuple[str, int | None]]:
    """The rows of the table that a state dict fits, by its keys and shapes.

    The number of classes and of input channels is free, a head may be absent, and
    `num_batches_tracked` does not count. Rows that differ in strides alone are all listed.

    Args:
        shapes: Key to shape as torch has it.

    Returns:
        `(variant, number of classes)`, the number `None` without a head, in the table's order.

    Examples:
        >>> matching_variants(spec_shapes(SPECS["resnet50"], num_classes=5))
        [('resnet50', 5), ('resnet50_v1', 5)]
    """
    found = [n for n in find_networks(shapes) if not (n.near or n.beside)]
    return list(variants_of(shapes)) if found else []


def variants_of(shapes: Mapping[str, Shape]) -> tuple[tuple[str, int | None], ...]:
    """The same, whatever stands beside the network."""
    found = [n for n in find_networks(shapes) if not (n.prefix or n.strange)]
    return found[0].variants if found else ()


def fit(shapes: Mapping[str, Shape]) -> str:
    """What a state dict fits, for a message."""
    found = [network for network in find_networks(shapes) if not network.strange]
    if not found:
        return f"it fits no model of kr.list_models(){_nearest(shapes)}"
    names = " and ".join(n for n, _ in found[0].variants)
    at = f" at {found[0].prefix!r}" if found[0].prefix else ""
    classes = found[0].variants[0][1]
    return f"it fits {names} ({f'{classes} classes' if classes else 'without a head'}){at}"


def _nearest(shapes: Mapping[str, Shape]) -> str:
    """Which network the entries are most like, and what is in the way."""
    places, best = _Places(shapes), (0.5, "")
    for spec in SPECS.values():
        body = {k: v for k, v in _body_and_head(spec.name)[0].items() if not k.endswith(COUNTER)}
        spoken = places.spoken(body, next(iter(body)))
        for prefix, words in ((p, words) for _, words, at in spoken for p in at[:MAX_NETWORKS]):
            there = {k: places.shapes.get(prefix + words.get(k, k)) for k in body}
            lacking = [k for k, v in there.items() if v != body[k]]
            share = 1 - len(lacking) / len(body)
            if share <= best[0]:
                continue
            names = {k: prefix + words.get(k, k) for k, v in there.items() if v is not None}
            near, strange, _ = beside(shapes, prefix, names, body)
            what = [f"{grouped((*strange, *near), 3)} not its own"] if strange or near else []
            for key in lacking[:1]:
                name = prefix + words.get(key, key)
                has = f"{name} is {there[key]}, not {body[key]}"
                what.insert(0, has if there[key] else f"{name} is missing")
            best = share, f", is nearest to {spec.name}: {'; '.join(what)}"
    return best[1]
