"""Published weight files: fetched once, checked, kept."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
from typing import Any

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.system.download import fetched, file_sha256
from keras_resnet.system.errors import (
    CheckpointError,
    InputError,
    KerasResNetError,
    between,
    reason_of,
    require,
    whole,
)
from keras_resnet.system.files import cache_home, printable
from keras_resnet.weights import published
from keras_resnet.weights.published import TorchvisionWeights


def cache_folder() -> pathlib.Path:
    """Where downloaded weights lie: below `KERAS_RESNET_HOME`, else the platform's cache folder."""
    return cache_home() / "weights"


def _torch_cache() -> pathlib.Path:
    # torch/hub.py, _get_torch_home.
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return pathlib.Path(home).expanduser() / "hub" / "checkpoints"


def local_path(
    entry: TorchvisionWeights, *, cache: str | os.PathLike | None = None
) -> pathlib.Path | None:
    """The file of some published weights where it is on this machine and whole; never fetched."""
    folder = pathlib.Path(cache).expanduser() if cache else cache_folder()
    for path in (folder / entry.file_name, _torch_cache() / entry.file_name):
        if path.is_file() and file_sha256(path).startswith(entry.sha256_prefix):
            return path
    return None


def address(entry: TorchvisionWeights) -> str:
    """Where some published weights are fetched."""
    base = os.environ.get("KERAS_RESNET_WEIGHTS_URL")
    return f"{base.rstrip('/')}/{entry.file_name}" if base else entry.url


def weights_path(
    entry: TorchvisionWeights,
    *,
    cache: str | os.PathLike | None = None,
    url: str | None = None,
    progress: bool = True,
    timeout: float = 30.0,
    attempts: int = 5,
) -> pathlib.Path:
    """The file of some published weights, downloaded if it is not here yet.

    Looked for in the cache folder and in torch's; each time the sha256 is compared with the name.
    How it is fetched is told at `system.download.fetched`.

    Args:
        entry: Out of `resolve_weights` or `registry`.
        cache: Folder to keep it in; by default `cache_folder()`.
        url: Where to fetch it instead of `entry.url`. The environment variable
            `KERAS_RESNET_WEIGHTS_URL` replaces the part before the file's name for all.
        progress: A progress bar on stderr, where that is a terminal.
        timeout: Seconds without a byte after which a connection counts as dead.
        attempts: Connections in a row that bring nothing, before it is given up.

    Raises:
        CheckpointError: The network failed (the message says what to fetch by hand, and where to
            put it), the bytes are not the published ones, or the disk refused.

    Examples:
        >>> weights_path(resolve_weights("resnet18"))  # doctest: +SKIP
        PosixPath('.../keras_resnet/weights/resnet18-f37072fd.pth')
    """
    folder = pathlib.Path(cache).expanduser() if cache else cache_folder()
    found = local_path(entry, cache=folder)
    if found is not None:
        return found
    return fetched(
        address(entry) if url is None else url,
        folder / entry.file_name,
        entry.sha256_prefix,
        home=entry.url,
        error=CheckpointError,
        progress=progress,
        timeout=timeout,
        attempts=attempts,
    )


# --- Hugging Face's hub -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HubFile:
    """Weights of a repository on the hub, and what its config.json says of them, if it does."""

    path: pathlib.Path  # in the hub's own cache
    label: str  # repository and commit
    variant: str | None = None  # the network's name at timm
    images: dict[str, Any] | None = None  # side, crop fraction, interpolation, mean and deviation
    test_side: int | None = None  # a larger one at which images are not cropped
    class_names: list[str] | None = None  # in order
    strides: str | None = None  # where the bottlenecks stride

    def preprocess(self, side: int | None) -> Preprocess | None:
        """How images are prepared for a model of this side (its own by default).

        As timm's `transforms_imagenet_eval`: the crop's fraction stays, the size is the model's.
        """
        if self.images is None:
            return None
        options = dict(self.images)
        own, fraction = options.pop("side"), options.pop("crop_pct")
        side = side or own
        fraction = 1.0 if side == self.test_side else fraction
        return Preprocess(resize_size=math.floor(side / fraction), crop_size=side, **options)


def hub_file(text: str) -> HubFile:
    """Weights by a name that `hub_name` knows, safetensors before pickles.

    huggingface_hub does the work, so its cache, `HF_HUB_OFFLINE`, `HF_TOKEN` and `HF_ENDPOINT`
    count.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        CheckpointError: There is no such repository, revision or file, or no connection.
    """
    require("huggingface_hub", "hub", f"weights={text!r}")
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, revision = published.hub_name(text) or (text, None)
    fetch = functools.partial(huggingface_hub.hf_hub_download, repo)
    path, missing = None, None
    try:
        for name in ("model.safetensors", "pytorch_model.bin"):
            try:
                path = pathlib.Path(fetch(name, revision=revision))
                break
            except EntryNotFoundError as error:
                missing = error
        if path is None:
            why = reason_of(missing) if missing else ""
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                why = "the cache does not have it, and HF_HUB_OFFLINE is set"
            raise CheckpointError(
                f"Cannot fetch {text!r}: neither model.safetensors nor pytorch_model.bin: {why}"
            )
        commit = path.parent.name
        try:
            config = _read_config(pathlib.Path(fetch("config.json", revision=commit)))
        except LocalEntryNotFoundError:  # not reached, which is an EntryNotFoundError too
            kept = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=commit)
            if kept is not huggingface_hub._CACHED_NO_EXIST:
                raise
            config = {}
        except EntryNotFoundError:
            config = {}
    except (OSError, ValueError) as error:
        if isinstance(error, KerasResNetError):
            raise
        text = f"{text}, config.json" if path else text
        raise CheckpointError(f"Cannot fetch {text!r}: {reason_of(error)}") from error
    return HubFile(path, f"{repo}@{commit[:12]}", **_told(config, repo))


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 2**20:
            raise ValueError("more than a megabyte")
        config = json.loads(path.read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"Its config.json cannot be read: {reason_of(error)}") from error


def _told(config: dict[str, Any], repo: str) -> dict[str, Any]:
    """What a config.json of timm or transformers says, as `HubFile` has it."""
    if options := config.get("model_args"):
        options = list(options)[:5] if isinstance(options, dict) else options
        raise CheckpointError(
            f"{repo} was built with options of its own, {printable(str(options)[:100])}: timm's "
            "model of that name would answer differently."
        )
    cfg = config.get("pretrained_cfg")
    cfg = cfg if isinstance(cfg, dict) else config  # timm before 0.9
    variant = config.get("architecture")
    told: dict[str, Any] = {"variant": variant if isinstance(variant, str) else None}
    if "input_size" in cfg:
        try:
            options = {name: cfg[name] for name in ("interpolation", "mean", "std")}
            side = whole("input_size", cfg["input_size"][-1], 1)
            fraction = between("crop_pct", cfg.get("crop_pct", 0.875), 0.1, 1)
            if cfg.get("crop_mode", "center") != "center":  # squashed, or with a border
                fraction = 1.0
            told["images"] = {"side": side, "crop_pct": fraction, **options}
            HubFile(pathlib.Path(), repo, images=told["images"]).preprocess(None)
            if cfg.get("test_input_size") and cfg.get("test_crop_pct") == 1:
                told["test_side"] = whole("test_input_size", cfg["test_input_size"][-1], 1)
        except (LookupError, TypeError, OverflowError, InputError) as error:
            raise CheckpointError(f"{repo}'s config.json: {reason_of(error)}") from error
    names = config.get("label_names") or cfg.get("label_names")
    labels = config.get("id2label")
    if isinstance(labels, dict):
        names = [labels.get(str(i)) for i in range(len(labels))]
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        told["class_names"] = names
    elif repo.startswith("timm/") and repo.endswith("_in1k"):
        told["class_names"] = published.imagenet_class_names()
    if told["variant"]:
        told["strides"] = "3x3"
    elif config.get("model_type") == "resnet":  # of transformers
        told["strides"] = "1x1" if config.get("downsample_in_bottleneck") else "3x3"
    return told
