"""The page says what the model says, takes nothing harmful, and asks nothing elsewhere."""

from __future__ import annotations

import html
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib

import keras
import numpy as np
import pytest
import soak_serve
from PIL import Image

from keras_resnet.cli import main as cli
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.inference.predict import predict
from keras_resnet.inference.serve import build_app, page_parts
from keras_resnet.inference.service import Limits, check_image, open_service
from keras_resnet.models.zoo import create_model
from keras_resnet.runtimes.select import open_runner
from keras_resnet.system.errors import DataError, InputError, MissingDependencyError
from keras_resnet.system.files import printable

NAMES = ["<script>document.title='owned'</script>", "bee", 'a\u202eb & "c"', "d", "e", "f"]
HOSTILE = "<img src=x onerror=\"document.title='owned'\">\u202e'.png"


def png_bytes(width=40, height=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def picture_bytes(kind, size=(40, 30)):
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, kind)
    return stream.getvalue()


def bomb(width, height):
    """A PNG of a few bytes that says it is huge."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # fmt: skip  # noqa: E501

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


BAD = {
    "empty.png": (b"", "is empty"),
    "text.txt": (b"Hello, I am no image.", "no image of a kind that is read here"),
    "text.jpg": (b"Hello, I am no image.", "no image of a kind that is read here"),
    "cut.jpg": (picture_bytes("JPEG", (400, 300))[:700], "damaged or cut off"),
    "head.png": (png_bytes()[:20], "damaged"),
    "bomb.png": (bomb(10_000, 10_000), "100 megapixels (10000 x 10000); at most 50"),
    "huge.png": (bomb(100_000, 100_000), "far too large"),
    "page.eps": (picture_bytes("EPS"), "no image of a kind that is read here"),
    "big.png": (png_bytes() + b"\0" * (20 * 2**20), "20.0 MB; at most 20"),
}


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(1)
    model = create_model("resnet20", num_classes=6, input_shape=(32, 32, 3))
    model.info["class_names"] = NAMES
    model.info["preprocess"] = Preprocess(36, 32).get_config()
    model.info["training"] = {
        "recipe": "cifar", "epoch": 3, "epochs": 8, "val_accuracy": 0.875, "val_pictures": 1200,
    }  # fmt: skip
    return model


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "model.keras"
    model.save(path)
    return str(path)


@pytest.mark.parametrize("pixels", [None, "0..1"])
def test_answers_are_those_of_predict_and_heat_maps_come_along(model, tmp_path, pixels):
    service = open_service(model, "keras", Limits(), pixels)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png_bytes(40 + 20 * i, seed=i))
    paths = sorted(tmp_path.iterdir())
    answers = service.results([(p.name, p.read_bytes) for p in paths], heat=True)
    for answer, expected in zip(answers, predict(model, paths, pixels=pixels), strict=True):
        assert [n for n, _ in answer.classes] == [n for n, _ in expected.classes]
        np.testing.assert_allclose(
            [p for _, p in answer.classes], [p for _, p in expected.classes], rtol=1e-4
        )
        assert answer.pixels.shape == answer.heat.shape == (224, 224, 3)
        assert (answer.pixels != answer.heat).any()
    assert service.results([("a", paths[0].read_bytes)], heat=False)[0].heat is None
    # It is 1 of pixels, and 1 less some 1e-10 of a 255th of them: far from rounding's edge.
    for least, unsure in ((0.5, 0), (1.0, 0 if pixels is None else 3)):
        careful = open_service(model, "keras", Limits(), pixels, min_confidence=least)
        given = careful.results([(p.name, p.read_bytes) for p in paths], False)
        given = [one.answer for one in given]
        assert given.count(["unknown"]) == unsure
        expected = predict(model, paths, pixels=pixels, min_confidence=least)
        assert given == [prediction.answer for prediction in expected]


@pytest.mark.once
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_gets_a_sentence(model, name):
    data, sentence = BAD[name]
    service = open_service(model, "keras", Limits())
    (answer,) = service.results([(name, lambda: data)], heat=True)
    assert sentence in answer.error and answer.error.endswith(".") and not answer.classes
    assert "Traceback" not in answer.error and "\n" not in answer.error


@pytest.mark.once
def test_where_there_are_no_gradients_the_page_says_so(model):
    service = open_service(open_runner(model), "keras", Limits())  # what runs an exported file
    (answer,) = service.results([("a.png", png_bytes)], heat=True)
    assert answer.classes and answer.heat is None and "no gradients" in page_parts().facts(service)
    assert page_parts().results([answer]).count("<img") == 1 and "Parameters" not in dict(
        service.facts()
    )
    whole = open_service(model, "keras", Limits())
    assert "no gradients" not in page_parts().facts(whole) and whole.model is model


@pytest.mark.once
def test_a_narrow_picture_is_refused_before_it_grows():
    preprocess = Preprocess(256, 224)
    with pytest.raises(DataError, match="too narrow"):
        check_image(picture_bytes("PNG", (1, 2000)), "a.png", Limits(), preprocess)
    check_image(picture_bytes("PNG", (2, 100)), "a.png", Limits(), preprocess)
    with pytest.raises(InputError, match="megapixels must be above 0"):
        Limits(megapixels=0)


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "name", "note"),
    [
        ("GIF", "a.jpg", "The file is a GIF, of which the first frame is used, whatever its"),
        ("PNG", "a.jpeg", "The file is a PNG, whatever its name says."),
        ("JPEG", "a.JPG", None),
        ("WEBP", "a", None),
    ],
)
def test_a_wrong_name_is_noted_and_the_picture_answered(model, kind, name, note):
    service = open_service(model, "keras", Limits())
    (answer,) = service.results([(name, lambda: picture_bytes(kind))], heat=False)
    assert answer.classes and answer.error is None
    assert (answer.note or "").startswith(note or "") and bool(answer.note) == bool(note)


@pytest.mark.once
def test_too_many_pictures_are_left_out_and_told(model):
    service = open_service(model, "keras", Limits(pictures=2))
    answers = service.results([("a.png", png_bytes)] * 3, heat=False)
    assert [bool(a.classes) for a in answers] == [True, True, False]
    assert "at most 2 images" in answers[2].error


@pytest.mark.once
def test_a_fault_of_the_model_is_logged_and_no_traceback_is_shown(model, caplog):
    service = open_service(model, "keras", Limits())
    service.runner = None
    (answer,) = service.results([("a.png", png_bytes)], heat=False)
    assert answer.error == "The server failed at this image; its log says why."
    assert "AttributeError" in caplog.text


@pytest.mark.once
def test_names_are_text_and_never_markup(model):
    service = open_service(model, "keras", Limits())
    answers = service.results([(HOSTILE, png_bytes), (HOSTILE, lambda: b"x")], heat=True)
    for page in (page_parts().results(answers), page_parts().facts(service)):
        assert "<script" not in page and "<img src=x" not in page and "\u202e" not in page
        assert "&lt;" in page and "\\u202e" in page


@pytest.mark.once
def test_facts_say_what_is_known(model):
    facts = dict(open_service(model, "keras", Limits()).facts())
    assert facts["Model"] == "resnet20" and facts["Parameters"] == f"{model.count_params():,}"
    assert facts["Validation accuracy"] == "87.50% of 1,200 images"
    assert facts["Weights"] == "epoch 3 of 8 by the recipe cifar"
    assert facts["Preprocessing"].startswith("short side resized to 36 (bilinear), 32 x 32 cut")
    assert facts["Runs on"].startswith("torch 2") and ", Keras 3" in facts["Runs on"]


# --- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(model):
    pytest.importorskip("gradio", reason="needs gradio: pip install keras3-resnet[serve]")
    from starlette.testclient import TestClient

    app = build_app(model, limits=Limits(megabytes=0.5, pictures=4))
    folder = os.environ["GRADIO_TEMP_DIR"]
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        client.folder = folder
        yield client
    assert not os.path.exists(folder)


def uploads(client):
    return [os.path.join(root, f) for root, _, files in os.walk(client.folder) for f in files]


def form(*pictures):
    return [("pictures", (name, data, "application/octet-stream")) for name, data in pictures]


@pytest.mark.once
@pytest.mark.slow
def test_the_endpoint_answers_good_and_bad_in_order(client):
    answer = client.post(
        "/predict", files=form((HOSTILE, png_bytes()), ("t.txt", b"text"), ("a.jpg", png_bytes()))
    )
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert found["model"] == "resnet20"
    good, bad, noted = found["pictures"]
    assert len(good["classes"]) == 5 and good["error"] is None and good["note"] is None
    assert sum(c["probability"] for c in good["classes"]) <= 1
    assert {c["name"] for c in good["classes"]} <= set(NAMES)
    assert not bad["classes"] and "no image" in bad["error"]
    assert noted["classes"] == good["classes"] and "is a PNG" in noted["note"]
    assert uploads(client) == []


@pytest.mark.once
def test_the_endpoint_says_what_is_wrong_with_a_request(client):
    cases = [
        (client.get("/predict"), 405, "curl -F pictures=@cat.jpg"),
        (client.options("/predict"), 405, "curl -F pictures=@cat.jpg"),
        (client.delete("/predict"), 405, "curl -F pictures=@cat.jpg"),
        (client.post("/predict", content=b"x"), 415, "no form"),
        (client.post("/predict", data={"x": "1"}, files=[("y", b"")]), 400, "no image in it"),
        (client.post("/predict", files=form(*[("a.png", b"x")] * 17)), 400, "Too many files"),
        (client.post("/predict", files=form(("a.png", b"0" * 4 * 2**20))), 413, "too large"),
        (
            client.post("/predict", headers={"content-type": "multipart/form-data"}, content=b""),
            400,
            "boundary",
        ),
    ]
    for answer, status, sentence in cases:
        assert answer.status_code == status
        assert sentence in answer.json()["error"] and len(answer.json()) == 1
    many = client.post("/predict", files=form(*[("a.png", png_bytes())] * 5)).json()["pictures"]
    assert [bool(p["classes"]) for p in many] == [True] * 4 + [False]
    big = client.post("/predict", files=form(("a.png", b"0" * 2**20))).json()["pictures"]
    assert "1.0 MB; at most 0.5" in big[0]["error"]


@pytest.mark.once
@pytest.mark.parametrize("path", ["/predict", "/gradio_api/upload"])
def test_an_endless_upload_is_ended_and_leaves_nothing(client, path):
    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b"0" * 2**16  # without a length in the head

    answer = client.post(
        path, content=endless(), headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code == 413 and "too large" in answer.text
    assert uploads(client) == []


def through_gradio(client, *files):
    """What Gradio's route of a program answers to `FileData`, or paths of some."""
    named = [f if isinstance(f, dict) else {"path": f} for f in files]
    data = [{"meta": {"_type": "gradio.FileData"}, **f} for f in named]
    # Python's `json` writes what is no UTF-8, httpx does not.
    asked = {
        "content": json.dumps({"data": [data]}),
        "headers": {"content-type": "application/json"},
    }
    event = client.post("/gradio_api/call/predict", **asked).json()["event_id"]
    return client.get(f"/gradio_api/call/predict/{event}").text


@pytest.mark.once
def test_the_endpoint_gradio_and_the_page_say_the_same(client, model):
    files = [
        ("<img src=x>\u202e'.png", png_bytes()),
        ("caf\u00e9 \U0001f41d.jpg", png_bytes(60, seed=1)),
        ("cut.jpg", BAD["cut.jpg"][0]),
        ("empty.png", b""),
        ("left out.png", png_bytes()),
    ]
    parts = [("files", (str(i), data)) for i, (_, data) in enumerate(files)]
    paths = client.post("/gradio_api/upload", files=parts).json()
    given = [
        {"path": path, "orig_name": name} for path, (name, _) in zip(paths, files, strict=True)
    ]
    found = client.post("/predict", files=form(*files)).json()
    assert json.loads(through_gradio(client, *given).split("data: ")[-1]) == [found]
    assert [bool(one["error"]) for one in found["pictures"]] == [False, False, True, True, True]
    service = open_service(model, "keras", Limits(megabytes=0.5, pictures=4))
    reads = [(name, lambda data=data: data) for name, data in files]
    cards = str(page_parts().results(service.results(reads, heat=True))).split("<article")[1:]
    for card, one in zip(cards, found["pictures"], strict=True):
        text = html.unescape(card)
        said = re.findall(r"<li><span dir=.auto.>(.*?)</span>\n<span>(.*?)</span>", text)
        shown = [
            (printable(c["name"]), f"{p:.1%}" if (p := c["probability"]) >= 0.0005 else "< 0.1%")
            for c in one["classes"]
        ]
        assert said == shown and printable(one["name"]) in text
        assert all(one[key] is None or one[key] in text for key in ("error", "note"))


@pytest.mark.once
def test_a_name_that_is_no_text_and_fields_of_other_kinds_are_answered(client, capfd):
    def kept():
        parts = [("files", ("a.png", png_bytes()))]
        return client.post("/gradio_api/upload", files=parts).json()[0]

    found = through_gradio(client, {"path": kept(), "orig_name": "caf\udce9.png"})
    assert "event: complete" in found and r"caf\\udce9.png" in found and '"error": null' in found
    assert uploads(client) == []
    for wrong in (5, "a\0b", "x" * 5000):
        assert "event: error" in through_gradio(client, {"path": wrong})
    assert client.get("/health").json() == {"status": "ok", "model": "resnet20"}
    deep = b"[" * 10**5
    for path in ("/gradio_api/call/predict", "/gradio_api/queue/join"):
        answer = client.post(path, content=deep, headers={"content-type": "application/json"})
        assert answer.status_code == 400
    assert capfd.readouterr().err == ""


@pytest.mark.once
def test_no_file_of_the_server_and_no_address_is_read(client, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png_bytes())
    for path in (str(secret), "https://example.com/a.png", os.path.relpath(secret)):
        for stream in (False, True):
            given = {"path": path, "is_stream": stream}
            assert "not its path" in through_gradio(client, given), given
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
    assert secret.exists()
    for path in (__file__, "/etc/passwd"):
        assert client.get(f"/gradio_api/file={path}").status_code == 403
    path = client.post("/gradio_api/upload", files=[("files", ("ok.png", png_bytes()))]).json()[0]
    assert '"classes": [{"name"' in through_gradio(client, path)
    assert uploads(client) == []
    assert "no longer there" in through_gradio(client, path)


@pytest.mark.once
def test_the_server_looks_up_no_other_host(model, monkeypatch):
    """No counter of visits, no look for a newer version, no address that somebody gave."""
    pytest.importorskip("gradio", reason="needs gradio: pip install keras3-resnet[serve]")
    from starlette.testclient import TestClient

    asked, resolve = [], socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: asked.append(host) or resolve(host, *a, **k)
    )
    elsewhere = "https://example.com/a.png"
    with TestClient(build_app(model), base_url="http://127.0.0.1") as client:
        assert client.get("/").status_code == client.get("/config").status_code == 200
        assert "not its path" in through_gradio(client, elsewhere)
        for path in (f"/gradio_api/file={elsewhere}", f"/gradio_api/proxy={elsewhere}"):
            assert client.get(path).status_code == 403
    assert set(asked) <= {"127.0.0.1", "localhost", None}


@pytest.mark.once
def test_another_name_for_this_machine_is_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    for path in ("/docs", "/redoc"):
        assert client.get(path).status_code == 404
    page = client.get("/")
    assert (
        page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    )
    sources = re.findall(r'(?:src|href)="(https?:)?//', page.text)
    assert not sources


# --- the command and the page in a browser -------------------------------------------------------


@pytest.fixture(scope="module")
def address(file):
    pytest.importorskip("gradio", reason="needs gradio: pip install keras3-resnet[serve]")
    command = [sys.executable, "-m", "keras_resnet", "serve", file, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert lines[0].startswith("Backend: "), lines
        found = re.search(r"Serving at (http://127\.0\.0\.1:\d+) \(Ctrl-C stops\)", lines[1])
        assert found, lines
        yield found[1]
        with socket.create_connection(("127.0.0.1", int(found[1].rpartition(":")[2]))) as page:
            page.sendall(b"GET /gradio_api/heartbeat/a HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert page.recv(100)  # a page that is open keeps nobody waiting
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


@pytest.mark.once
@pytest.mark.slow
def test_the_documented_client_lines_work(address, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    (tmp_path / "cat.png").write_bytes(png_bytes())
    client = gradio_client.Client(address, verbose=False, analytics_enabled=False)
    given = [gradio_client.handle_file(str(tmp_path / "cat.png"))]
    found = client.predict(given, api_name="/predict")
    assert found["pictures"][0]["name"] == "cat.png" and len(found["pictures"][0]["classes"]) == 5
    if shutil.which("curl"):
        command = ["curl", "-s", "-F", f"pictures=@{tmp_path / 'cat.png'}", f"{address}/predict"]
        out = subprocess.run(command, capture_output=True, check=True).stdout
        assert json.loads(out) == found


@pytest.mark.once
@pytest.mark.slow
def test_many_at_once_get_the_answers_of_one(address):
    seconds, wrong = soak_serve.soak(int(address.rpartition(":")[2]), 150, 8, page=0.1)
    assert wrong == [] and len(seconds) > 70


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.requests, page.errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#images input[type=file]", state="attached")
    yield page
    elsewhere = [u for u in page.requests if not u.startswith((address, "data:", "blob:"))]
    assert elsewhere == [] and page.errors == []
    page.close()


@pytest.mark.once
@pytest.mark.slow
def test_a_person_drops_pictures_and_sees_answers(page, tmp_path):
    files = [
        {"name": HOSTILE, "mimeType": "image/png", "buffer": png_bytes(300, 200)},
        {"name": "text.txt", "mimeType": "text/plain", "buffer": b"no picture"},
        {"name": "bomb.png", "mimeType": "image/png", "buffer": BAD["bomb.png"][0]},
    ]
    page.set_input_files("#images input[type=file]", files)
    page.wait_for_selector(".kr-result >> nth=2")
    cards = page.locator(".kr-result")
    assert cards.count() == 3
    good = cards.nth(0)
    assert good.locator("li").count() == 5 and good.locator("img").count() == 2
    assert "onerror" in good.locator("h3").inner_text()
    shown = [float(s.strip("<% ")) for s in good.locator("li > :nth-child(2)").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
    widths = [bar.bounding_box()["width"] for bar in good.locator(".kr-bar > span").all()]
    assert widths == sorted(widths, reverse=True) and widths[0] > 20
    for image in good.locator("img").all():
        assert image.evaluate("i => i.complete && i.naturalWidth") == 224
    assert "no image of a kind" in cards.nth(1).inner_text()
    assert "megapixels" in cards.nth(2).inner_text()
    assert "owned" not in page.title()
    facts = page.locator(".kr-facts").inner_text()
    assert "resnet20" in facts and "87.50%" in facts and ", Keras 3" in facts
    page.get_by_text("From a program").click()
    page.wait_for_selector("pre")
    for code in page.locator("pre").all_inner_texts():
        assert page.url.rstrip("/") in code and "ADDRESS" not in code
    # The field is empty again, for the next image.
    page.wait_for_selector("#images input[type=file]", state="attached")
    page.set_input_files("#images input[type=file]", files[:1])
    page.wait_for_function("document.querySelectorAll('.kr-result').length == 1")


@pytest.mark.once
def test_a_pasted_picture_is_answered_and_a_phone_shows_it_whole(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.evaluate(
        """(bytes) => {
            const transfer = new DataTransfer();
            const file = new File([new Uint8Array(bytes)], 'pasted.png', { type: 'image/png' });
            transfer.items.add(file);
            document.dispatchEvent(
                new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true }));
        }""",
        list(png_bytes(64, 64)),
    )
    page.wait_for_selector(".kr-result")
    assert page.locator(".kr-result h3").inner_text() == "pasted.png"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for selector in (".kr-result", ".kr-facts", "#images"):
        box = page.locator(selector).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390


@pytest.mark.once
def test_bad_addresses_are_said_in_one_line(file, capsys):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            (["--port", port], "Give another --port"),
            (["--port", "70000"], "from 0 to 65535"),
            (["--host", "no.such.host.invalid"], "no address of the name"),
            (["--max-mb", "0"], "max_mb must be above 0"),
        ]
        for arguments, message in cases:
            assert cli.main(["serve", file, *arguments]) == 2
            err = capsys.readouterr().err.strip()
            assert message in err and "\n" not in err
    assert cli.main(["serve", f"{file}x", "--port", "0"]) == 2
    assert "Did you mean 'model.keras'" in capsys.readouterr().err


@pytest.mark.once
@pytest.mark.slow
def test_without_gradio_the_pip_line_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingDependencyError, match=r"keras3-resnet\[serve\]"):
        build_app(file)
    assert importlib.util.find_spec("keras_resnet.inference.serve")
    package = pathlib.Path(cli.__file__).parents[1]
    assert list(package.rglob("*.pyi")) == [package / "__init__.pyi"]  # Gradio writes such files
