"""Weights by their name on Hugging Face's hub: a local server stands for it."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from keras_resnet.cli.main import main
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.models.files import convert_file, load_model
from keras_resnet.models.zoo import create_model
from keras_resnet.system.errors import CheckpointError, InputError, MissingDependencyError
from keras_resnet.training.freeze import load_pretrained
from keras_resnet.variants import SPECS
from keras_resnet.weights import download, published
from keras_resnet.weights.load import load_torchvision
from keras_resnet.weights.mapping import to_torchvision
from keras_resnet.weights.matching import spec_shapes
from keras_resnet.weights.writing import write_checkpoint

constants = pytest.importorskip("huggingface_hub.constants")
pytestmark = pytest.mark.once

COMMIT, OLDER = "c" * 40, "b" * 40
CONFIG = {
    "architecture": "resnet_tiny",
    "num_classes": 10,
    "pretrained_cfg": {
        "input_size": [3, 224, 224], "test_input_size": [3, 288, 288], "crop_pct": 0.95,
        "test_crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25],
    },
    "label_names": [f"class {i}" for i in range(10)],
}  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    """The route that huggingface_hub downloads by: /ORG/NAME/resolve/REVISION/FILE."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        parts = self.path.partition("?")[0].strip("/").split("/", 4)
        org, name, _, revision, file = [*parts, *[""] * 5][:5]
        token = self.headers.get("Authorization")
        self.server.requests.append((self.command, revision, file, token))
        commits = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}
        files, commit = self.server.repos.get(f"{org}/{name}"), commits.get(revision)
        error = "RepoNotFound" if files is None else "RevisionNotFound" if not commit else None
        if error is None and (commit, file) not in files:
            error = "EntryNotFound"
        error = "Busy" if file == self.server.busy else error
        data = b"" if error else files[commit, file]
        self.send_response(404 if error else 503 if error else 200)
        if error:
            self.send_header("X-Error-Code", error)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server without repositories, and an empty cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos, server.requests, server.busy = {}, [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.cache = tmp_path / "hf" / "hub"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.cache))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tiny(rng):
    shapes = spec_shapes(SPECS["resnet_tiny"])
    return {k: rng.random(v, "float32") + 0.5 if v else np.int64(3) for k, v in shapes.items()}


def stored(state, folder, ending=".safetensors"):
    write_checkpoint(folder / f"made{ending}", state)
    return (folder / f"made{ending}").read_bytes()


def as_json(value):
    return json.dumps(value).encode()


def test_a_name_brings_weights_preprocessing_and_class_names(hub, tiny, tmp_path):
    data = stored(tiny, tmp_path)
    pickled = stored({k: v * 0 for k, v in tiny.items()}, tmp_path, ".pth")
    hub.repos["timm/resnet_tiny.a1"] = {
        (COMMIT, "model.safetensors"): data,
        (COMMIT, "pytorch_model.bin"): pickled,  # safetensors go first
        (COMMIT, "config.json"): as_json(CONFIG),
    }
    name = "timm/resnet_tiny.a1"
    model = create_model(
        "resnet_tiny", weights=name, input_shape=(None, None, 3), include_preprocessing=True
    )
    assert np.array_equal(to_torchvision(model)["bn1.bias"], tiny["bn1.bias"])
    about = model.info["weights"]
    assert about["source"] == about["published_as"] == f"{name}@{COMMIT[:12]}"
    assert about["sha256"] == hashlib.sha256(data).hexdigest() and about["format"] == "safetensors"
    assert model.info["class_names"] == CONFIG["label_names"]
    prepared = Preprocess.from_config(model.info["preprocess"])
    assert prepared == Preprocess(
        resize_size=235, crop_size=224, interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3
    )
    inside = model.get_layer("preprocessing").get_config()
    assert (inside["mean"], inside["std"]) == ([0.5] * 3, [0.25] * 3)
    # A model of another side keeps the fraction; at the side of timm's tests nothing is cropped.
    for side, resized in ((96, 101), (288, 288)):
        model = create_model("resnet_tiny", input_shape=(side, side, 3), weights=name)
        prepared = Preprocess.from_config(model.info["preprocess"])
        assert (prepared.resize_size, prepared.crop_size) == (resized, (side, side))


def test_a_folder_with_timms_config_is_read_as_the_hubs(tiny, tmp_path):
    file = tmp_path / "model.safetensors"
    write_checkpoint(file, tiny)
    (tmp_path / "config.json").write_bytes(as_json(CONFIG))
    model = create_model("resnet_tiny", weights=file, include_preprocessing=True)
    assert model.info["class_names"] == CONFIG["label_names"]
    assert model.info["preprocess"]["mean"] == list(model.get_layer("preprocessing").mean)
    assert model.get_layer("preprocessing").std == (0.25,) * 3
    convert_file(file, tmp_path / "made.keras", check=False)
    assert load_model(tmp_path / "made.keras").info["preprocess"]["interpolation"] == "bicubic"
    # a model that normalises otherwise answers otherwise: said, or refused
    built = create_model("resnet_tiny", include_preprocessing=True)
    before = to_torchvision(built)
    with pytest.raises(InputError, match=r"with mean \[0.5, 0.5, 0.5\] and .*inside with \[0.485"):
        load_torchvision(built, file)
    assert np.array_equal(to_torchvision(built)["bn1.bias"], before["bn1.bias"])
    with pytest.raises(InputError, match="give it the former"):
        create_model("resnet_tiny", weights=file, include_preprocessing=True, mean=(0.4,) * 3)
    line = load_pretrained(built, file)
    assert "'fc' is new" in line and "inside with [0.485" in line and "--normalization" in line
    (tmp_path / "config.json").write_bytes(as_json(CONFIG | {"architecture": "resnetblur18"}))
    for fails in (lambda: create_model("resnet_tiny", weights=file),
                  lambda: convert_file(file, tmp_path / "again.keras")):  # fmt: skip
        with pytest.raises(InputError, match="resnetblur18"):
            fails()


def test_a_new_head_takes_no_class_names(hub, tiny, tmp_path):
    hub.repos["me/mine"] = {
        (COMMIT, "model.safetensors"): stored(tiny, tmp_path),
        (COMMIT, "config.json"): as_json(CONFIG),
    }
    model = create_model("resnet_tiny", num_classes=3)
    load_torchvision(model, "hf://me/mine", head="skip")
    assert "class_names" not in model.info and model.info["preprocess"]["crop_size"] == [16, 16]


def test_revisions_pickles_and_tokens(hub, tiny, tmp_path, monkeypatch):
    older = {k: v + 1 if k == "bn1.bias" else v for k, v in tiny.items()}
    hub.repos["me/mine"] = {
        (COMMIT, "pytorch_model.bin"): stored(tiny, tmp_path, ".pth"),
        (OLDER, "model.safetensors"): stored(older, tmp_path),
    }
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    model = create_model("resnet_tiny")
    load_torchvision(model, "hf://me/mine@v1")
    assert np.array_equal(to_torchvision(model)["bn1.bias"], older["bn1.bias"])
    assert model.info["weights"]["source"] == f"me/mine@{OLDER[:12]}"
    load_torchvision(model, "hf://me/mine")
    assert model.info["weights"]["format"] == "zip" and "preprocess" not in model.info
    assert {token for *_, token in hub.requests} == {"Bearer hf_secret"}
    assert "hf_secret" not in json.dumps(model.info)


def test_what_is_not_there_is_said_in_a_line(hub, tiny, tmp_path):
    hub.repos["me/empty"] = {(COMMIT, "README.md"): b"nothing"}
    for text, message in (
        ("hf://me/none", "Cannot fetch 'hf://me/none': .*404"),
        ("hf://me/empty", "neither model.safetensors nor pytorch_model.bin"),
        ("hf://me/empty@v9", "Cannot fetch 'hf://me/empty@v9': "),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            create_model("resnet_tiny", weights=text)
        assert "\n" not in str(caught.value)
    out = ("hf://me/mine@a/../../../../y", "hf://me/mine@a//b", "hf://me/mine@a/")
    for text in ("hf://mine", "hf://", "hf://me/mine/x", "hf://me/mine@", *out):
        with pytest.raises(InputError, match=r"hf://ORG/NAME@REVISION is needed\. Received"):
            create_model("resnet_tiny", weights=text)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "resnetblur18"}, "weights for resnetblur18, not for resnet_tiny: no mod"),
        ({"architecture": "resnet18"}, r"not for resnet_tiny: use kr.create_model\('resnet18'\)"),
        ({"model_args": {"aa_layer": "avg"}}, r"options of its own, \['aa_layer'\]"),
        ({"model_args": 5}, "options of its own, 5"),
        ({"pretrained_cfg": CONFIG["pretrained_cfg"] | {"input_size": [10**400]}}, "config.json"),
        ({"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}}, "config.json"),
        ({"pretrained_cfg": CONFIG["pretrained_cfg"] | {"crop_pct": 0}}, "crop_pct must"),
        ({"pretrained_cfg": CONFIG["pretrained_cfg"] | {"input_size": [3, 10**9]}}, "config.json"),
        ({"pretrained_cfg": CONFIG["pretrained_cfg"] | {"mean": "x"}}, "config.json"),
    ],
)
def test_a_config_of_another_network_or_of_nonsense_is_refused(
    changed, message, hub, tiny, tmp_path
):
    hub.repos["me/mine"] = {
        (COMMIT, "model.safetensors"): stored(tiny, tmp_path),
        (COMMIT, "config.json"): as_json(CONFIG | changed),
    }
    with pytest.raises((InputError, CheckpointError), match=message):
        create_model("resnet_tiny", weights="hf://me/mine")


def test_what_a_config_cannot_say_is_not_taken(hub, tiny, tmp_path):
    pretrained = CONFIG["pretrained_cfg"] | {"crop_mode": "squash"}
    hub.repos["me/mine"] = {
        (COMMIT, "model.safetensors"): stored(tiny, tmp_path),
        (COMMIT, "config.json"): as_json(
            {"architecture": [], "label_names": ["a", "b", "c"], "pretrained_cfg": pretrained}
        ),
    }
    model = create_model("resnet_tiny", input_shape=(96, 96, 3), weights="hf://me/mine")
    assert "class_names" not in model.info  # 3 for 10 classes
    # Images of timm's other crop modes lose the crop alone.
    assert Preprocess.from_config(model.info["preprocess"]) == Preprocess(
        resize_size=96,
        crop_size=(96, 96),
        interpolation="bicubic",
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )


def test_transformers_say_where_they_stride_and_what_classes_are_called():
    told = download._told(
        {"model_type": "resnet", "downsample_in_bottleneck": True, "id2label": {"0": "a"}}, "x/y"
    )
    assert told == {"variant": None, "strides": "1x1", "class_names": ["a"]}


def test_a_config_that_cannot_be_reached_is_not_one_that_is_not_there(hub, tiny, tmp_path):
    hub.repos["me/mine"] = {(COMMIT, "model.safetensors"): stored(tiny, tmp_path)}
    hub.busy = "config.json"
    with pytest.raises(CheckpointError, match=r"Cannot fetch 'hf://me/mine, config\.json': "):
        download.hub_file("hf://me/mine")
    hub.busy = None
    assert download.hub_file("hf://me/mine").variant is None  # asked, and not there
    hub.busy = "config.json"
    assert download.hub_file("hf://me/mine").variant is None


def test_offline_reads_the_cache_and_says_what_it_lacks(hub, tiny, tmp_path):
    hub.repos["me/mine"] = {(COMMIT, "model.safetensors"): stored(tiny, tmp_path)}
    program = (
        "import sys; from keras_resnet.weights.download import hub_file\n"
        "try: print(hub_file(sys.argv[1]).label)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )

    def run(text, **environment):
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")} | environment
        command = [sys.executable, "-c", program, text]
        return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()

    assert run("hf://me/mine") == f"me/mine@{COMMIT[:12]}"
    asked = len(hub.requests)
    assert run("hf://me/mine", HF_HUB_OFFLINE="1") == f"me/mine@{COMMIT[:12]}"
    missing = run("hf://me/other", HF_HUB_OFFLINE="1")
    assert missing.startswith("CheckpointError Cannot fetch 'hf://me/other'")
    assert len(hub.requests) == asked and "and HF_HUB_OFFLINE is set" in missing


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"keras3-resnet\[hub\]"):
        download.hub_file("timm/resnet18.a1_in1k")


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert published.hub_name("timm/resnet18.a1_in1k") == ("timm/resnet18.a1_in1k", None)
    assert published.hub_name("hf://me/mine@refs/pr/1") == ("me/mine", "refs/pr/1")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "resnet18.a1_in1k").write_bytes(b"x")
    assert published.hub_name("timm/resnet18.a1_in1k") is None
    assert published.hub_name("timm/mine.pth") is None and published.hub_name("a/b") is None


@pytest.mark.slow
def test_the_table_is_timms(torchvision):
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    assert timm.__version__
    rows = published.timm_registry()
    assert len(rows) >= 60
    for row in rows:
        theirs = get_pretrained_cfg(row.name)
        assert theirs.hf_hub_id == f"timm/{row.name}" and theirs.num_classes == 1000
        assert (theirs.input_size[1], theirs.license) == (row.side, row.licence)
        assert 50 < row.acc1 < 90
    config = theirs.to_dict()
    told = download.HubFile(None, "", **download._told({"pretrained_cfg": config}, "timm/x"))
    ours = told.preprocess(None)
    resize, crop, *_ = create_transform(**resolve_data_config(pretrained_cfg=config)).transforms
    assert (ours.resize_size, ours.crop_size) == (resize.size, crop.size)
    assert ours.interpolation == resize.interpolation.value


def test_the_command_line_lists_what_is_known_by_name(capsys):
    assert main(["models", "resnet50", "--weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Model", "weights=", "MB", "Top-1", "At", "By", "Licence"]
    words = [line.split() for line in lines]
    assert words[2][:6] == ["resnet50", "IMAGENET1K_V2", "102", "80.858", "224", "torchvision"]
    wanted = ["resnet50", "timm/resnet50.a1_in1k", "102", "80.382", "224", "timm", "apache-2.0"]
    assert wanted in words
    assert main(["models", "resnet20", "--weights"]) == 2
    assert "No weights are known by name for resnet20" in capsys.readouterr().err
