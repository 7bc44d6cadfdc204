"""Chooses the state dict among what a weight file holds, and says what else the file is."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

from keras_resnet.system.errors import CheckpointError, did_you_mean
from keras_resnet.weights.loaded import Loaded
from keras_resnet.weights.matching import Network, find_networks
from keras_resnet.weights.stand_ins import (
    MAX_STEPS,
    Array,
    Parameter,
    Record,
    Tensor,
    Unreadable,
    brief,
    one_line,
)

MAX_NAME = 512
MAX_LEAVES = 100_000
MAX_DEPTH = 16  # of dicts inside dicts

# Where nested dicts offer several state dicts, the first of these names wins: live weights before
# averaged ones, because that is what `torch.load(...)["model"]` users mean. `key=` overrides it.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network"),
    *("weights", "params", "module"),
    *("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema", "params_ema"),
)
PREFIXES = ("module.", "_orig_mod.")
_NOT_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loss|criterion|^amp$|history", re.IGNORECASE)
# torch.optim.swa_utils.AveragedModel saves this counter beside the prefixed names of its model.
_COUNTER = "n_averaged"


def leaf(value: Any) -> Any:
    """The tensor (or unreadable tensor, or array) that a value is, else None."""
    if type(value) is Parameter:
        value = value.data
    if type(value) is Array and value.code is None:
        return None
    return value if type(value) in (Tensor, Unreadable, Array) else None


Leaf = Callable[[Any], Any]


class _Counter:
    """Counts the tensors in a value; bounds the work over all its counts together."""

    def __init__(self, leaf: Leaf):
        self.left, self.leaf = MAX_STEPS, leaf

    def __call__(self, value: Any) -> int:
        found, seen, todo = 0, set(), [value]
        while todo:
            item = todo.pop()
            if self.leaf(item) is not None:
                found += 1
            elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
                seen.add(id(item))
                self.left -= len(item)
                if self.left < 0:
                    raise CheckpointError("its entries hold each other over and over")
                todo.extend(item.values() if isinstance(item, dict) else item)
        return found


def _choose(root: Any, count: _Counter) -> tuple[list[str], Any]:
    """The path to the state dict, and the state dict: see `read_checkpoint` for the order."""
    path: list[str] = []
    node = root
    while isinstance(node, dict) and len(path) < MAX_DEPTH:
        holders = {k for k, v in node.items() if isinstance(v, dict) and count(v)}
        named = [name for name in WRAPPERS if name in holders]
        if not named:
            named = [name for name in holders if not _NOT_WEIGHTS.search(str(name))]
            if len(named) != 1 or any(count.leaf(v) is not None for v in node.values()):
                break
        path.append(named[0])
        node = node[named[0]]
    return path, node


def _follow(root: Any, key: str) -> Any:
    """The entry at a dotted path; a name may itself contain dots."""
    if not isinstance(root, dict):
        return None
    if key in root:
        return root[key]
    parts = key.split(".")
    for i in range(1, min(len(parts), MAX_DEPTH)):
        head = ".".join(parts[:i])
        if head in root:
            found = _follow(root[head], ".".join(parts[i:]))
            if found is not None:
                return found
    inside = {k[len(key) + 1 :]: v for k, v in root.items() if str(k).startswith(f"{key}.")}
    return inside or None


def _flatten(node: Any, leaf: Leaf = leaf) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, everything else) by dotted name."""
    tensors: dict[str, Any] = {}
    others: dict[str, Any] = {}
    if leaf(node) is not None:
        return {"tensor": leaf(node)}, {}
    todo: list[tuple[str, Any, int]] = [("", node, 0)]
    left = MAX_LEAVES
    while todo:
        prefix, value, depth = todo.pop()
        tensor = leaf(value)
        if tensor is not None:
            if prefix in tensors:
                raise CheckpointError(f"two tensors are called {one_line(prefix)!r}")
            tensors[prefix] = tensor
        elif _nested(prefix, value, depth, leaf):
            left -= len(value)
            if left < 0:
                raise CheckpointError(f"its dicts hold more than {MAX_LEAVES:,} entries")
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            if any(len(prefix) + len(k) > MAX_NAME for k, _ in items if type(k) is str):
                raise CheckpointError(f"it has names of more than {MAX_NAME} characters")
            front = f"{prefix}." if prefix else ""
            todo.extend((f"{front}{k}", v, depth + 1) for k, v in reversed(items))
        elif prefix:
            others[prefix] = value
    return tensors, others


def _nested(prefix: str, value: Any, depth: int, leaf: Leaf) -> bool:
    """Whether an entry's own entries are named one by one."""
    if depth >= MAX_DEPTH or not value:
        return False
    # Optimizer and scheduler states hold tensors too; they are no weights.
    if depth and _NOT_WEIGHTS.search(prefix[-64:].rpartition(".")[2]):
        return False
    if type(value) in (list, tuple):
        return len(value) <= 1000 and any(leaf(v) is not None for v in value)
    return isinstance(value, dict)


def _strip(names: list[str]) -> str:
    """The longest run of `module.` and `_orig_mod.` with which every name begins."""
    prefix = ""
    for _ in range(8 if names else 0):
        longer = [prefix + p for p in PREFIXES]
        found = [p for p in longer if all(n.startswith(p) and len(n) > len(p) for n in names)]
        if not found:
            break
        prefix = found[0]
    return prefix


@dataclasses.dataclass
class Selection:
    """The chosen tensors, by name; see `CheckpointInfo` for the rest."""

    key: str
    prefix: str
    tensors: dict[str, Any]
    others: dict[str, Any]
    alternatives: dict[str, int]


def find_entry(
    root: Any, key: str | None, leaf: Leaf = leaf
) -> tuple[list[str], Any, tuple[dict[str, Any], dict[str, Any]]]:
    """The entry at `key`, or the one that `read_checkpoint` documents.

    Returns:
        Its path, itself, and its tensors and everything else in it by dotted names.
    """
    if key is None:
        path, node = _choose(root, _Counter(leaf))
        flat = _flatten(node, leaf)
        if path and not _networks(flat[0]):
            with contextlib.suppress(CheckpointError):
                whole = _flatten(root, leaf)
                if _networks(whole[0]):  # beside the entry whose name says weights
                    return [], root, whole
        return path, node, flat
    if key == "":
        return [], root, _flatten(root, leaf)
    node, known = _follow(root, key) if type(key) is str else None, []
    if node is None:
        with contextlib.suppress(CheckpointError):
            known = [n.prefix[:-1] for n in _networks(_flatten(root, leaf)[0]) if n.prefix]
        meant = [name for name in known if f".{key}." in f".{name}."]
        key = meant[0] if len(meant) == 1 else key
        node = _follow(root, key) if len(meant) == 1 else None
    if node is None:
        names = list(root) if isinstance(root, dict) else []
        shown = ", ".join(one_line(n, 40) for n in (known or names)[:12])
        near = did_you_mean(one_line(key), known + names[:1000])
        raise CheckpointError(
            f"it has no entry {one_line(key)!r}.{near} It has: {shown or brief(root)}"
        )
    return [key], node, _flatten(node, leaf)


def _networks(tensors: dict[str, Any]) -> list[Network]:
    found = find_networks({name: getattr(t, "shape", ()) for name, t in tensors.items()})
    return [network for network in found if not network.strange]


def select(loaded: Loaded, key: str | None, keep_prefix: bool) -> Selection:
    """The state dict at `key`, or the one that `read_checkpoint` documents."""
    root, count = loaded.root, _Counter(leaf)
    path, node, (tensors, others) = find_entry(root, key)
    alternatives: dict[str, int] = {}
    if isinstance(root, dict) and path:
        for name, value in root.items():
            held = count(value) if isinstance(value, dict) else 0
            if held and name == path[0]:
                continue
            if held and node is not value and len(alternatives) < 100:
                alternatives[name] = held
            elif not held and len(others) < MAX_LEAVES:
                others.setdefault(name, value)
    if len(tensors) > 1 and type(tensors.get(_COUNTER)) is Tensor:
        others[_COUNTER] = tensors.pop(_COUNTER)
    prefix = "" if keep_prefix else _strip(list(tensors))
    if prefix:
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    # Arrays count too: turned to this machine's byte order, each is a copy.
    total = sum(t.nbytes for t in tensors.values() if type(t) in (Tensor, Array))
    stored = max(loaded.size, sum(member.size for member in loaded.members.values()))
    if total > 4 * stored + (1 << 24):
        raise CheckpointError(
            f"its tensors claim {total:,} bytes, from a file of {loaded.size:,}: views of the same "
            f"numbers over and over"
        )
    return Selection(".".join(path), prefix, tensors, others, alternatives)


def kind_of(loaded: Loaded, selection: Selection | None, name: str) -> tuple[str, str | None]:
    """(what the file is, why its tensors cannot be had or None)."""
    if loaded.problem and not (loaded.kind == "pickle" and loaded.refused):
        return loaded.kind, loaded.problem
    if loaded.refused:
        module = _pickled_module(loaded)
        if module is not None:
            what, where = module
            return "pickled module", (
                f"it holds a whole pickled module ({what}), which is Python code, not weights; not "
                f"loaded. Where you trust the file, with PyTorch and the model's source: "
                f"torch.save(torch.load({name!r}, weights_only=False){where}.state_dict(), "
                f"'state_dict.pth'), and read that"
            )
        names = list(loaded.refused)
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        wants = ", ".join(one_line(n, 100) for n in names[:5])
        return "refused pickle", f"the file wants to call {wants}{more}; not loaded"
    assert selection is not None
    strange = {n: t.kind for n, t in selection.tensors.items() if type(t) is Unreadable}
    if strange:
        first, kind = next(iter(strange.items()))
        if "quantised" in strange.values():
            kind = "quantised"
        such = f"{len(strange):,} tensors, such as {one_line(first)!r}, are {kind}"
        return kind, f"{such}{_ADVICE.get(kind, '; save them as plain tensors in PyTorch')}"
    if not selection.tensors:
        return "no tensors", (
            f"it holds no tensors{f' at {selection.key!r}' if selection.key else ''}, only "
            f"{one_line(brief(loaded.root), 200)}"
        )
    return "state dict", None


_ADVICE = {
    "quantised": (
        ": their integers belong to PyTorch's quantised kernels and cannot become Keras weights. "
        "Take the float file of the same model (the name without _fbgemm)"
    ),
    "sparse": (
        ". In PyTorch: torch.save({k: v if v.layout == torch.strided else v.to_dense() for k, v in "
        "state_dict.items()}, 'dense.pth'), and read that"
    ),
    "meta": ": they were saved from the meta device and have no numbers. Save the real model",
    "device": (
        ": they were saved from a device that writes its own format. In PyTorch: "
        "torch.save({k: v.cpu() for k, v in state_dict.items()}, 'cpu.pth'), and read that"
    ),
}


def _pickled_module(loaded: Loaded) -> tuple[str, str] | None:
    """(class, how to index it) of a pickled torch module in the file, if that is what it is."""

    def is_module(value: Any) -> bool:
        return (
            type(value) is Record
            and isinstance(value.state, dict)
            and ("_modules" in value.state or "_parameters" in value.state)
        )

    root = loaded.root
    if is_module(root):
        return one_line(root.name.full, 100), ""
    if isinstance(root, dict):
        for key, value in itertools.islice(root.items(), 1000):
            if is_module(value):
                return one_line(value.name.full, 100), f"[{one_line(key)!r}]"
    if root is None:
        layers = [n for n in loaded.refused if n.startswith("torch.nn.modules.")]
        if layers:  # the pickle broke off before the object was whole
            return one_line(next(iter(loaded.refused)), 100), ""
    return None
