"""Other names of the same network: a table of rules from our names to theirs; needs no Keras.

A hole in a rule stands for a number and shows what the first one is called:
`layer<1>.<0>.conv<1>` and `res<2>_<0>_branch2<a>` are the same place. `<*>` is text that stays. The
way back is the same table: the names of a whole network, turned round. Names decide which dialect a
file speaks; shapes are compared as for torchvision's own names.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

from keras_resnet.system.errors import InputError
from keras_resnet.variants import COUNTER, Shape

Rules = tuple[tuple[str, str], ...]
CAFFE = (103.53, 116.28, 123.675)  # MSRA's networks, which Detectron2 and OpenMMLab took over
KERAS_CAFFE = (103.939, 116.779, 123.68)  # keras.applications', in its mode "caffe"
_HOLE = re.compile(r"<(\*|a|\d+)>")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """One way of naming the entries."""

    name: str  # the word after `--to`
    of: str  # whose names these are, for messages
    rules: Rules  # (ours, theirs), of whole names; the first that fits is taken
    trunk: str = ""  # what stands before all names but the head's
    head: tuple[Rules, ...] = ()  # all but the first are read and not written
    strides: str | None = "3x3"  # of bottlenecks, unless the file says otherwise; `None`: open
    told: str = ""  # how their class is told the other place
    stem: int = 7  # side of the first kernel that their class has
    plain: bool = False  # no groups, and bottlenecks of a quarter of the width alone
    basic: bool = True  # it has the basic blocks of ResNet-18 and 34, too
    counted: bool = True  # it keeps torch's `num_batches_tracked`
    bgr: tuple[float, ...] = ()  # what its networks subtract from BGR pixels, unless told otherwise
    scaled: bool = False  # they take RGB pixels of -1..1, unless told otherwise
    conv_head: bool = False  # it classifies by a 1x1 convolution

    @property
    def grouped(self) -> bool:
        """Theirs may have group norms: those are no batch norms that lost their statistics."""
        return self.name in ("torchvision", "sequential", "timm")

    def __call__(self, name: str) -> str | None:
        """Their name of one of our entries, `None` where no rule has it."""
        if not self.rules:
            return name
        found = _rewritten(name, self.rules)
        return self.trunk + found if found else _rewritten(name, self.head[0])


def _rewritten(name: str, rules: Rules) -> str | None:
    for ours, theirs in rules:
        pattern, holes = _compiled(ours)
        if found := pattern.fullmatch(name):
            parts = _HOLE.split(theirs)
            values = zip(found.groups(), holes, parts[1::2], strict=True)
            parts[1::2] = [_moved(*three) for three in values]
            return "".join(parts)
    return None


@functools.cache
def _compiled(template: str) -> tuple[re.Pattern[str], list[str]]:
    parts = _HOLE.split(template)
    holes = parts[1::2]
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [r"(\w+)" if hole == "*" else r"(\d+)" for hole in holes]
    return re.compile("".join(parts)), holes


def _moved(text: str, hole: str, other: str) -> str:
    """A number counted from the first one on our side, as their side writes it."""
    if hole == "*":
        return text
    index = int(text) - int(hole)
    return chr(ord("a") + index) if other == "a" else str(int(other) + index)


# --- The table -----------------------------------------------------------------------------------


def _torch(*rows: tuple[str, str]) -> Rules:
    """Rules for modules whose entries are called as torch calls them."""
    return tuple((f"{ours}.<*>", f"{theirs}.<*>") for ours, theirs in rows)


def _numbered(first: int, head: str, *places: str, stem: int = 3) -> Dialect:
    """`nn.Sequential(*resnet.children())`: modules are numbers, inside a stage as ever."""
    rules = _torch(
        ("conv1", "0"), ("bn1", "1"), ("conv1.<0>", "0.<0>"),
        ("layer<1>.<0>.<*>.<0>", f"<{first}>.<0>.<*>.<0>"),
        ("layer<1>.<0>.<*>", f"<{first}>.<0>.<*>"),
    )  # fmt: skip
    heads = tuple(_torch((head, place)) for place in places)
    whose = "nn.Sequential(*resnet.children())"
    return Dialect("sequential", whose, rules, head=heads, stem=stem)


def _keras(variables: dict[str, str], *rows: tuple[str, str], between: str = ".") -> Rules:
    """Rules for layers whose variables are called as Keras calls them."""
    pairs = [(f".{ours}", between + theirs) for ours, theirs in variables.items()]
    return tuple((ours + a, theirs + b) for ours, theirs in rows for a, b in pairs)


_caffe2 = functools.partial(_keras, between="_")  # or as Caffe2 calls its blobs
_KERNEL = {"weight": "kernel", "bias": "bias"}
_NORM = {"weight": "gamma", "bias": "beta",
         "running_mean": "moving_mean", "running_var": "moving_variance"}  # fmt: skip

_KERNEL_BLOBS = {"weight": "w", "bias": "b"}
_NORM_BLOBS = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}

_SAME = _torch(
    ("conv1", "conv1"), ("bn1", "bn1"), ("layer<1>.<0>.<*>", "layer<1>.<0>.<*>"),
    ("layer<1>.<0>.<*>.<0>", "layer<1>.<0>.<*>.<0>"),
)  # fmt: skip

# ResNet-D's blocks, where the first stage has no pooling in its list, since it would do nothing.
_UNPOOLED = (
    *_torch(*((f"layer1.0.downsample.{i + 1}", f"layer1.0.downsample.{i}") for i in (0, 1))),
    *_SAME[2:],
)

TORCHVISION = Dialect("torchvision", "torchvision", ())
_OPENMMLAB = {"trunk": "backbone.", "head": (_torch(("fc", "head.fc")),),
              "told": "style='caffe' in its config"}  # fmt: skip
_KERAS_KERNELS = _keras(
    _KERNEL,
    ("conv1", "conv1_conv"),
    ("layer<1>.<0>.downsample.0", "conv<2>_block<1>_0_conv"),
    ("layer<1>.<0>.conv<1>", "conv<2>_block<1>_<1>_conv"),
)
_OF_KERAS = {"head": (_keras(_KERNEL, ("fc", "predictions")),),
             "plain": True, "basic": False, "counted": False}  # fmt: skip
DIALECTS = (
    Dialect(
        "huggingface",
        "Hugging Face's ResNetForImageClassification",
        _torch(
            ("conv1", "embedder.embedder.convolution"),
            ("bn1", "embedder.embedder.normalization"),
            ("layer<1>.<0>.conv<1>", "encoder.stages.<0>.layers.<0>.layer.<0>.convolution"),
            ("layer<1>.<0>.bn<1>", "encoder.stages.<0>.layers.<0>.layer.<0>.normalization"),
            ("layer<1>.<0>.downsample.0", "encoder.stages.<0>.layers.<0>.shortcut.convolution"),
            ("layer<1>.<0>.downsample.1", "encoder.stages.<0>.layers.<0>.shortcut.normalization"),
        ),
        trunk="resnet.",
        head=(_torch(("fc", "classifier.1")),),
        told="downsample_in_bottleneck in its config",
        plain=True,
    ),
    # The children: conv1, bn1, relu, maxpool, layer1 ..., avgpool, fc; a Flatten before the last
    # one makes it the tenth.
    _numbered(4, "fc", "9", "10", stem=7),
    # Those of networks for small images: conv1, bn1, layer1 ..., linear; or ReLU and pooling too.
    _numbered(2, "linear", "5", "6", "7"),
    _numbered(3, "linear", "7", "8"),
    Dialect(
        "sequential",
        "nn.Sequential(*alexnet.children())",
        _torch(("features.<0>", "0.<0>")),
        head=(_torch(("classifier.<0>", "2.<0>")), _torch(("classifier.<0>", "3.<0>"))),
        stem=11,
    ),
    Dialect(
        "detectron2",
        "Detectron2's ResNet",
        _torch(
            ("conv1", "stem.conv1"),
            ("bn1", "stem.conv1.norm"),
            ("layer<1>.<0>.conv<1>", "res<2>.<0>.conv<1>"),
            ("layer<1>.<0>.bn<1>", "res<2>.<0>.conv<1>.norm"),
            ("layer<1>.<0>.downsample.0", "res<2>.<0>.shortcut"),
            ("layer<1>.<0>.downsample.1", "res<2>.<0>.shortcut.norm"),
        ),
        head=(_torch(("fc", "linear")), _torch(("fc", "stem.fc"))),  # the second: its converter
        strides=None,
        told="STRIDE_IN_1X1 in its config",
        counted=False,
        bgr=CAFFE,
    ),
    # As Detectron2 reads them: MSRA's R-50.pkl, Detectron's own.
    Dialect(
        "detectron2",
        "Caffe2's ResNet",
        _caffe2(
            _KERNEL_BLOBS,
            ("layer<1>.<0>.conv<1>", "res<2>_<0>_branch2<a>"),
            ("layer<1>.<0>.downsample.0", "res<2>_<0>_branch1"),
            ("conv1", "conv1"),
        )
        + _caffe2(
            _NORM_BLOBS,
            ("bn1", "res_conv1_bn"),
            ("layer<1>.<0>.bn<1>", "res<2>_<0>_branch2<a>_bn"),
            ("layer<1>.<0>.downsample.1", "res<2>_<0>_branch1_bn"),
        ),
        head=tuple(_caffe2(_KERNEL_BLOBS, ("fc", head)) for head in ("fc1000", "pred")),
        strides=None,
        told="STRIDE_IN_1X1 in its config",
        counted=False,
        bgr=CAFFE,
    ),
    Dialect("mmpretrain", "mmpretrain's ResNet", _SAME, **_OPENMMLAB),
    Dialect(
        "mmpretrain",
        "mmpretrain's ResNetV1d",
        _torch(
            *(("conv1.0", "stem.0.conv"), ("conv1.1", "stem.0.bn")),
            *(("conv1.3", "stem.1.conv"), ("conv1.4", "stem.1.bn")),
            *(("conv1.6", "stem.2.conv"), ("bn1", "stem.2.bn")),
        )
        + _UNPOOLED,
        **_OPENMMLAB,
    ),
    Dialect(
        "mmpretrain",
        "mmdetection's and mmsegmentation's ResNetV1d",
        _torch(("bn1", "stem.7"), ("conv1.<0>", "stem.<0>")) + _UNPOOLED,
        **_OPENMMLAB,
    ),
    Dialect(
        "timm",
        "timm's ResNetV2",
        _torch(
            ("conv1", "stem.conv"),
            ("layer<1>.<0>.conv<1>", "stages.<0>.blocks.<0>.conv<1>"),
            ("layer<1>.<0>.bn<1>", "stages.<0>.blocks.<0>.norm<1>"),
            ("layer<1>.<0>.downsample.0", "stages.<0>.blocks.<0>.downsample.conv"),
            ("bn", "norm"),
        ),
        head=(_torch(("fc", "head.fc")),),
        conv_head=True,
    ),
    Dialect(
        "timm",
        "timm's ResNet",
        _torch(("conv1.<0>", "conv1.<0>"), ("layer<1>.<0>.se.<*>", "layer<1>.<0>.se.<*>")) + _SAME,
        head=(_torch(("fc", "fc")),),
    ),
    Dialect(
        "keras",
        "keras.applications' ResNetV2",
        _KERAS_KERNELS
        + _keras(
            _NORM,
            ("layer<1>.<0>.bn1", "conv<2>_block<1>_preact_bn"),
            ("layer<1>.<0>.bn<2>", "conv<2>_block<1>_<1>_bn"),
            ("bn", "post_bn"),
        ),
        scaled=True,
        **_OF_KERAS,
    ),
    Dialect(
        "keras",
        "keras.applications' ResNet",
        _KERAS_KERNELS
        + _keras(
            _NORM,
            ("bn1", "conv1_bn"),
            ("layer<1>.<0>.downsample.1", "conv<2>_block<1>_0_bn"),
            ("layer<1>.<0>.bn<1>", "conv<2>_block<1>_<1>_bn"),
        ),
        strides="1x1",
        bgr=KERAS_CAFFE,
        **_OF_KERAS,
    ),
)
PIXELS = ("caffe", "tf", "torch")  # modes of keras.applications' `preprocess_input`
# Those that checkpoints are written in; keras.applications' files are none of torch's.
WORDS = tuple(d for d in dict.fromkeys(d.name for d in (TORCHVISION, *DIALECTS)) if d != "keras")


def _forms() -> tuple[Dialect, ...]:
    """The dialects as files have them: with each of their heads, and without what is around."""
    found = [TORCHVISION]
    for dialect in DIALECTS:
        if all(ours == theirs for ours, theirs in dialect.rules) and not dialect.trunk:
            continue  # torchvision's
        found += [dataclasses.replace(dialect, head=(head,)) for head in dialect.head]
        if dialect.trunk and dialect.rules != _SAME:
            found.append(dataclasses.replace(dialect, trunk=""))
    return tuple(found)


FORMS = _forms()


def names_in(to: str, shapes: Mapping[str, Shape]) -> tuple[Dialect, dict[str, str]]:
    """Our names of a network's entries -> those of a dialect; what it does not keep is left out.

    The entries are given in torchvision's names, with their shapes as torch has them.

    Raises:
        InputError: The dialect has no such network.
    """
    reasons: list[tuple[int, str]] = []
    for dialect in (d for d in DIALECTS if d.name == to):
        kept = [name for name in shapes if dialect.counted or not name.endswith(COUNTER)]
        found = {name: theirs for name in kept if (theirs := dialect(name))}
        strange = next((f"no name for {name!r}" for name in kept if name not in found), None)
        reason = _unlike(dialect, shapes) or strange
        if reason is None:
            return dialect, found
        reasons.append((len(found), f"{dialect.of} has {reason}"))
    nearest = max(reasons, key=lambda known: known[0])[1]  # the one that names most entries
    raise InputError(f"The network cannot be written for {to}: {nearest}.")


def unwritten(names: Iterable[str]) -> dict[str, str]:
    """Statistics that Caffe2's frozen norms lack (they are 0 and 1) -> the scale beside them."""
    known = set(names)
    scales = [name for name in known if name.endswith("_bn_s")]
    new = {f"{scale[:-1]}{blob}": scale for scale in scales for blob in ("rm", "riv")}
    return {name: scale for name, scale in new.items() if name not in known}


def head_shape(name: str, shape: Shape) -> Shape:
    """That of a fully connected layer, for timm's 1x1 convolution that does the same."""
    return shape[:2] if name.endswith("head.fc.weight") and shape[2:] == (1, 1) else shape


def has_group_norms(names: Iterable[str]) -> bool:
    """Whether a network's norms have no statistics, by torchvision's names."""
    names = set(names)
    norms = [name.removesuffix("weight") for name in names if re.search(r"\bbn\d\.weight$", name)]
    return any(f"{norm}running_mean" not in names for norm in norms)


def _unlike(dialect: Dialect, shapes: Mapping[str, Shape]) -> str | None:
    """What of a network the dialect's class does not have."""
    if not dialect.grouped and has_group_norms(shapes):
        return "no group norms"
    if dialect.conv_head and "conv1.bias" in shapes:
        return "no biases in its convolutions"
    side = next((shape[2] for shape in shapes.values() if len(shape) == 4), dialect.stem)
    if side != dialect.stem and "conv1.0.weight" not in shapes:
        return f"no first kernel of {side}x{side}"
    if not dialect.basic and "layer1.0.conv3.weight" not in shapes:
        return "no basic blocks"
    for name, shape in shapes.items() if dialect.plain else ():
        middle = name.replace(".conv3.", ".conv2.")
        if name != middle and not shape[0] == 4 * shape[1] == 4 * shapes[middle][1]:
            return f"no groups and no wider bottlenecks ({middle!r})"
    return None
