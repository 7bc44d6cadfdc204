"""torchvision's files on this machine: a local server stands for the network."""

from __future__ import annotations

import hashlib
import multiprocessing
import pathlib
import socket
import time

import pytest
from file_server import DATA, Handler

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.system.errors import CheckpointError, InputError
from keras_resnet.variants import SPECS
from keras_resnet.weights import download, published
from keras_resnet.weights.writing import write_checkpoint

pytestmark = pytest.mark.once


@pytest.fixture
def entry():
    """A row of the registry whose file is DATA."""
    row = published.resolve_weights("resnet18")
    digits = hashlib.sha256(DATA).hexdigest()[:8]
    values = {**row.__dict__, "sha256_prefix": digits, "file_name": f"resnet18-{digits}.pth"}
    return published.TorchvisionWeights(**values)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache, and no way out of this machine."""
    monkeypatch.setenv("KERAS_RESNET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return tmp_path / "home" / "weights"


@pytest.fixture
def fetch(server, entry, monkeypatch):
    monkeypatch.setenv("KERAS_RESNET_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/models/")
    return lambda **options: download.weights_path(entry, **{"timeout": 5, **options})


def leftovers(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


# --- The registry -------------------------------------------------------------------------------


def test_the_registry_is_torchvisions(torchvision):
    rows = published.registry()
    assert len(rows) == 18 and {row.model for row in rows} <= set(SPECS)
    for row in rows:
        theirs = torchvision.models.get_model_weights(row.model)[row.tag]
        assert row.url == theirs.url and row.url.endswith(row.file_name)
        assert row.num_params == theirs.meta["num_params"]
        assert row.acc1 == theirs.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        assert row.is_default == (torchvision.models.get_model_weights(row.model).DEFAULT is theirs)
        preset = theirs.transforms()
        assert row.preprocess == Preprocess(
            resize_size=preset.resize_size[0],
            crop_size=preset.crop_size[0],
            interpolation=preset.interpolation.value,
            mean=preset.mean,
            std=preset.std,
        )
        assert published.imagenet_class_names() == list(theirs.meta["categories"])


def test_tags_resolve_to_files():
    assert published.resolve_weights("resnet50").file_name == "resnet50-11ad3fa6.pth"
    assert (
        published.resolve_weights("resnet50", "imagenet1k_v1").file_name == "resnet50-0676ba61.pth"
    )
    assert published.resolve_weights("resnet18", "imagenet") == published.resolve_weights(
        "resnet18", "DEFAULT"
    )
    assert (
        published.is_tag("IMAGENET1K_V2")
        and published.is_tag("default")
        and not published.is_tag("a.pth")
    )


@pytest.mark.parametrize(
    "variant, tag, message",
    [
        ("resnet18", "IMAGENET1K_V2", r"no weights 'IMAGENET1K_V2'.*IMAGENET1K_V1"),
        ("resnet50", "IMAGENET1K_V", r"Did you mean 'imagenet1k_v\d' or 'imagenet1k_v\d'"),
        ("resnet20", "DEFAULT", r"publishes no weights for 'resnet20'"),
        ("resnet50", "IMAGENET1K_FBGEMM_V1", r"quantised to 8 bits"),
        ("resnet50", "resnet50_fbgemm-23753f79.pth", r"quantised to 8 bits"),
    ],
)
def test_tags_that_mean_nothing_are_explained(variant, tag, message):
    with pytest.raises(InputError, match=message):
        published.resolve_weights(variant, tag)


def test_published_files_are_known_by_their_hash_older_ones_too():
    assert published.published_by_torchvision("0676ba61" + "0" * 56).tag == "IMAGENET1K_V1"
    old = published.published_by_torchvision("19c8e357" + "0" * 56)  # resnet50-19c8e357.pth
    assert (old.model, old.tag) == ("resnet50", "IMAGENET1K_V1")
    assert published.published_by_torchvision("deadbeef" + "0" * 56) is None


# --- The download -------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_and_then_read_offline(fetch, server, home):
    path = fetch()
    assert path.parent == home and path.read_bytes() == DATA
    assert leftovers(home) == {path.name}
    server.shutdown()
    server.server_close()
    assert fetch() == path and len(server.requests) == 1


def test_a_part_is_continued(fetch, server, entry, home):
    home.mkdir(parents=True)
    (home / f"{entry.file_name}.part").write_bytes(DATA[:1_000_000])
    assert fetch().read_bytes() == DATA
    assert server.requests == ["bytes=1000000-"]


def test_a_server_without_ranges_starts_again(fetch, server, entry, home):
    server.ranges = False
    home.mkdir(parents=True)
    (home / f"{entry.file_name}.part").write_bytes(DATA[:1_000_000])
    assert fetch().read_bytes() == DATA
    assert leftovers(home) == {entry.file_name}


def test_a_whole_part_only_gets_its_name(fetch, server, entry, home):
    home.mkdir(parents=True)
    (home / f"{entry.file_name}.part").write_bytes(DATA)
    assert fetch().read_bytes() == DATA
    (home / entry.file_name).unlink()
    (home / f"{entry.file_name}.part").write_bytes(DATA + b"too long")
    assert fetch().read_bytes() == DATA


def test_a_line_that_breaks_is_taken_up_again(fetch, server, home):
    server.cut = 400_000
    assert fetch().read_bytes() == DATA
    assert server.requests[:3] == [None, "bytes=400000-", "bytes=800000-"]


def test_a_line_that_stays_dead_leaves_the_part_and_says_what_to_do(fetch, server, entry, home):
    server.cut, server.cuts = 400_000, 1

    def dead(self):
        self.close_connection = True

    ok = Handler.do_GET
    server.RequestHandlerClass = type(
        "Dying",
        (Handler,),
        {"do_GET": lambda self: (ok if not self.server.requests else dead)(self)},
    )
    with pytest.raises(CheckpointError) as caught:
        fetch()
    message = str(caught.value)
    assert "\n" not in message and f"put it at {home / entry.file_name}" in message
    assert f"/models/{entry.file_name}" in message
    assert leftovers(home) == {f"{entry.file_name}.part"}
    server.RequestHandlerClass, server.cut = Handler, 0
    assert fetch().read_bytes() == DATA
    assert server.requests[-1] == "bytes=400000-"


def test_a_missing_file_is_not_asked_for_again(fetch, server, home):
    server.status = 404
    with pytest.raises(CheckpointError, match=r"HTTP 404 Not Found.*Fetch it by hand"):
        fetch()
    assert len(server.requests) == 1 and not leftovers(home)


def test_a_busy_server_is_asked_again(fetch, server):
    server.status = 503
    with pytest.raises(CheckpointError, match="HTTP 503"):
        fetch()
    assert len(server.requests) == 5


def test_wrong_bytes_are_deleted_and_never_get_the_name(fetch, server, home, entry):
    server.data = DATA[:-1] + bytes([DATA[-1] ^ 1])
    with pytest.raises(
        CheckpointError, match=rf"sha256 begins with \w+, not with {entry.sha256_prefix}"
    ):
        fetch()
    assert not leftovers(home)
    server.data = DATA
    assert fetch().read_bytes() == DATA


def test_a_damaged_file_in_the_cache_is_fetched_again(fetch, server, entry, home):
    home.mkdir(parents=True)
    (home / entry.file_name).write_bytes(DATA[:1000])
    assert fetch().read_bytes() == DATA


def test_a_server_that_stalls_counts_as_dead(fetch, server):
    server.stall, server.data = True, b""

    class Silent(Handler):
        def do_GET(self):
            self.server.requests.append("silent")
            self.server.release.wait(20)

    server.RequestHandlerClass = Silent
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="timed out"):
        fetch(timeout=0.2)
    assert time.monotonic() - started < 10


def test_no_network_is_one_line(entry, monkeypatch, home):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("KERAS_RESNET_WEIGHTS_URL", url)
    with pytest.raises(CheckpointError) as caught:
        download.weights_path(entry, timeout=2)
    assert "refused" in str(caught.value) and "\n" not in str(caught.value)
    assert not leftovers(home)


def test_torchs_own_cache_is_used_where_it_is_right(fetch, server, entry, tmp_path):
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / entry.file_name).write_bytes(DATA)
    assert fetch() == folder / entry.file_name and not server.requests
    (folder / entry.file_name).write_bytes(DATA[:-5])
    assert fetch().read_bytes() == DATA and server.requests


def test_folder_and_url_can_be_given(server, entry, tmp_path, monkeypatch):
    monkeypatch.delenv("KERAS_RESNET_WEIGHTS_URL", raising=False)
    url = f"http://127.0.0.1:{server.server_port}/mirror/file"
    path = download.weights_path(entry, cache=tmp_path / "here", url=url)
    assert path == tmp_path / "here" / entry.file_name and path.read_bytes() == DATA


def test_a_folder_that_cannot_be_written_is_named(fetch, tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"Cannot write .* into .*KERAS_RESNET_HOME"):
        fetch()


def test_the_cache_is_the_platforms_unless_told(monkeypatch, tmp_path):
    assert download.cache_folder() == tmp_path / "home" / "weights"
    monkeypatch.delenv("KERAS_RESNET_HOME")
    assert download.cache_folder().parts[-2:] == ("keras_resnet", "weights")


def _fetch_in_a_process(entry, url, folder, results):
    try:
        results.put(
            hashlib.sha256(
                download.weights_path(entry, cache=folder, url=url).read_bytes()
            ).hexdigest()
        )
    except Exception as error:
        results.put(repr(error))


def test_processes_that_want_the_same_file_do_not_disturb_each_other(server, entry, tmp_path):
    server.pause = 0.03
    url = f"http://127.0.0.1:{server.server_port}/file"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_fetch_in_a_process, args=(entry, url, tmp_path / "w", results))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert set(found) == {hashlib.sha256(DATA).hexdigest()}
    assert len(server.requests) == 1  # the others waited
    assert leftovers(tmp_path / "w") == {entry.file_name}


def test_the_bar_is_for_terminals_only(fetch, server, entry, home, monkeypatch, capsys):
    fetch()
    assert capsys.readouterr().err == ""
    (home / entry.file_name).unlink()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    fetch()
    shown = capsys.readouterr().err
    assert entry.file_name in shown and "100%" in shown
    assert shown.removesuffix("\x1b[?25h").endswith("\n")  # the cursor is shown again last
    (home / entry.file_name).unlink()
    fetch(progress=False)
    assert capsys.readouterr().err == ""


# --- weights= in create_model ---------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch, tmp_path, server):
    """A small model's row in the registry, and its file on the server."""
    from keras_resnet.models.zoo import create_model
    from keras_resnet.weights.mapping import to_torchvision

    model = create_model("resnet20", num_classes=1000)
    write_checkpoint(tmp_path / "made.pth", to_torchvision(model))
    server.data = (tmp_path / "made.pth").read_bytes()
    digits = hashlib.sha256(server.data).hexdigest()[:8]
    values = published.resolve_weights("resnet18").__dict__
    row = published.TorchvisionWeights(
        **{**values, "model": "resnet20", "sha256_prefix": digits, "file_name": f"r-{digits}.pth"}
    )
    monkeypatch.setattr(published, "registry", lambda: (row,))
    monkeypatch.setenv("KERAS_RESNET_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}")
    return model


def test_weights_by_tag_bring_class_names_and_preprocessing(made):
    from keras_resnet.models.zoo import create_model
    from keras_resnet.weights.load import load_torchvision
    from keras_resnet.weights.mapping import to_torchvision

    model = create_model("resnet20", num_classes=1000, weights="DEFAULT")
    expected = to_torchvision(made)
    assert all(a.tobytes() == expected[k].tobytes() for k, a in to_torchvision(model).items())
    assert model.info["class_names"][:2] == ["tench", "goldfish"]
    assert Preprocess.from_config(model.info["preprocess"]) == published.registry()[0].preprocess
    assert model.info["weights"]["published_as"] == "resnet20 IMAGENET1K_V1"

    headless = create_model("resnet20", include_top=False, weights="IMAGENET1K_V1")
    assert "class_names" not in headless.info and "preprocess" in headless.info
    new_head = create_model("resnet20", num_classes=3)
    assert load_torchvision(new_head, "DEFAULT", head="skip").skipped


def test_weights_with_other_classes_are_refused_before_the_download(made, server):
    from keras_resnet.models.zoo import create_model

    with pytest.raises(
        InputError, match=r"has 1000 classes, num_classes is 3.*head=.skip"
    ) as caught:
        create_model("resnet20", num_classes=3, weights="DEFAULT")
    assert "\n" not in str(caught.value) and not server.requests


def test_weights_may_be_a_path_or_a_state_dict(made, tmp_path):
    from keras_resnet.models.zoo import create_model
    from keras_resnet.system.errors import NotFoundError
    from keras_resnet.weights.mapping import to_torchvision

    state = to_torchvision(made)
    for weights in (state, tmp_path / "made.pth", str(tmp_path / "made.pth")):
        model = create_model("resnet20", num_classes=1000, weights=weights)
        assert to_torchvision(model)["linear.bias"].tobytes() == state["linear.bias"].tobytes()
    with pytest.raises(InputError, match=r"has 1000 classes, resnet20 has 10: .*head=.skip"):
        create_model("resnet20", weights=state)
    with pytest.raises(NotFoundError, match=r"absent\.pth"):
        create_model("resnet20", weights="absent.pth")
    with pytest.raises(InputError, match=r"neither a file nor.*Did you mean 'default'"):
        create_model("resnet20", weights="defualt")
