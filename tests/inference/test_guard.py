"""What stands in front of the page: strangers, quotas, slow connections, and the end of it all."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from keras_resnet.inference import guard, serve
from keras_resnet.inference.service import Limits

pytestmark = pytest.mark.once
uvicorn = pytest.importorskip("uvicorn", reason="needs gradio: pip install keras3-resnet[serve]")


async def takes_all(scope, receive, send):
    """Takes a request's body and answers with its length; `/config` with 16 MB; or waits."""
    if scope["type"] != "http":
        return
    count, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RuntimeError("It was told that the client had gone.")
        count += len(message.get("body", b""))
        more = message.get("more_body", False)
    if scope["path"] == "/health":
        await asyncio.sleep(1.0)
    body = bytes(16 * 2**20) if scope["path"] == "/config" else str(count).encode()
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


def guarded(folder, hosts=serve.LOOPBACK, limits=None):
    from starlette.testclient import TestClient

    limits = limits or Limits(megabytes=1, pictures=1)  # 2 MB a request, 8 together, 64 files
    app = guard.Guard(takes_all, limits, str(folder), hosts)
    return TestClient(app, base_url="http://127.0.0.1:7860"), app


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"sec-fetch-site": "same-origin", "origin": "https://behind.a.proxy"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "192.168.1.7"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:3000"}, 403),  # another server of this machine
        ({"origin": "http://127.0.0.1:7860.evil.example"}, 403),
        ({"origin": "http://[half"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:7860"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 400),  # DNS rebinding
        ({"host": "127.0.0.1.evil.example"}, 400),
        ({"host": "localhost.evil.example"}, 400),
        ({"host": "localhost@evil.example"}, 400),
        ({"host": "[::1"}, 400),
        ({"host": ""}, 400),
    ],
)
def test_who_may_upload(tmp_path, headers, status):
    client, _ = guarded(tmp_path)
    assert client.post("/predict", content=b"x", headers=headers).status_code == status


def test_a_link_leads_here_and_a_foreign_page_reads_nothing(tmp_path):
    client, _ = guarded(tmp_path)
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}):
        assert client.get("/config", headers=headers).status_code == 403
        assert client.options("/predict", headers=headers).status_code == 403
    named, _ = guarded(tmp_path, hosts=["*.Example.org", "box"])
    for host, status in {"a.example.org": 200, "BOX:1": 200, "example.com": 400}.items():
        assert named.get("/", headers={"host": host}).status_code == status
    any_name, _ = guarded(tmp_path, hosts=None)
    assert any_name.get("/", headers={"host": "any.example"}).status_code == 200


def test_only_what_the_page_asks_for_is_there(tmp_path):
    client, _ = guarded(tmp_path)
    for path, status in {
        "/openapi.json": 404,
        "/docs": 404,
        "/monitoring/summary": 404,
        "/login": 404,
        "/predict/": 404,
        "/gradio_api/openapi.json": 403,
        "/gradio_api/file=/etc/passwd": 403,
        "/gradio_api/proxy=http://127.0.0.1": 403,
        "/gradio_api/component_server": 403,
        "/gradio_api/call/lambda": 403,
        "/gradio_api/queue/join": 200,
        "/assets/a.js": 200,
    }.items():
        assert client.get(path).status_code == status, path


def test_all_uploads_together_have_a_limit(tmp_path):
    client, app = guarded(tmp_path)
    assert client.post("/predict", content=bytes(2**20)).status_code == 200
    full = tmp_path / "kept"
    full.write_bytes(bytes(7 * 2**20))
    answer = client.post("/predict", content=bytes(2**20 + 1))
    assert answer.status_code == 503 and "Try again in a minute" in answer.json()["error"]
    assert client.post("/predict", content=bytes(2**20)).text == str(2**20)
    # What does not say its length is taken for as long as it may be.
    assert client.post("/predict", content=iter([b"x"])).status_code == 503
    assert client.get("/").status_code == 200
    app._reserved = 2**20  # under way
    assert client.post("/gradio_api/upload", content=b"x").status_code == 503
    app._reserved = 0
    full.unlink()
    assert client.post("/predict", content=iter([b"x"])).status_code == 200
    for i in range(64):
        (tmp_path / str(i)).touch()
    assert client.post("/predict", content=b"x").status_code == 503
    assert app._reserved == 0


def test_only_uploads_may_be_large(tmp_path):
    client, _ = guarded(tmp_path)
    assert client.post("/predict", content=bytes(3 * 2**19)).status_code == 200
    assert client.post("/gradio_api/queue/join", content=bytes(3 * 2**19)).status_code == 413
    chunks = (bytes(2**16) for _ in range(24))
    assert client.post("/gradio_api/queue/join", content=chunks).status_code == 413


# --- connections ---------------------------------------------------------------------------------


@pytest.fixture
def port(monkeypatch, tmp_path):
    """A server with little patience; the test's end is its end."""
    monkeypatch.setattr(guard, "PATIENCE", 0.5)
    monkeypatch.setattr(guard, "CONNECTIONS", 20)
    listener = socket.create_server(("127.0.0.1", 0))
    app = guard.Guard(takes_all, Limits(), str(tmp_path), None)
    kind = guard.patient_connection()
    config = uvicorn.Config(app, http=kind, lifespan="off", log_level="error", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def begin(port, data, buffer=None):
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(5)
    connection.connect(("127.0.0.1", port))
    connection.sendall(data)
    return connection


def head(path, length=0, more=""):
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def body_of(connection):
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    assert answer.status == 200
    return answer.read()


def seconds_until_closed(connection, drip=b""):
    """How long a connection lives on which a byte now and then is sent."""
    begun = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - begun < 8:
        try:
            connection.sendall(drip)
            if connection.recv(100) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    connection.close()
    return time.monotonic() - begun


@pytest.mark.parametrize(
    ("sent", "drip"),
    [
        (b"", b""),
        (b"GET / HT", b""),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: ", b"a"),
        (head("/predict", 10**6), b""),
        (head("/predict", 10**6) + bytes(1000), b"0"),
        (head("/predict", 10**9), b"0"),  # refused, and what still comes thrown away
        (head("/predict", 0) * 2 + b"P", b"O"),  # two answers, and then
    ],
    ids=["nothing", "head", "slow head", "body", "slow body", "refused", "kept"],
)
def test_slow_connections_are_closed(port, sent, drip):
    assert 0.3 < seconds_until_closed(begin(port, sent), drip) < 3


def test_who_does_not_take_the_answer_is_let_go_and_who_is_in_time_is_not(port):
    lazy = begin(port, head("/config"), 4096)
    busy = begin(port, head("/health"))  # takes twice as long as there is patience
    assert body_of(busy) == b"0"
    time.sleep(0.5)
    taken = 0
    with contextlib.suppress(ConnectionResetError):
        while data := lazy.recv(2**16):
            taken += len(data)
    assert taken < 16 * 2**20  # what the system had taken for it
    steady = begin(port, head("/predict", 6000))
    for _ in range(10):
        steady.sendall(bytes(600))
        time.sleep(0.1)
    assert body_of(steady) == b"6000"
    lazy.close(), busy.close(), steady.close()


def test_many_open_connections_lock_nobody_out(port, monkeypatch):
    monkeypatch.setattr(guard, "PATIENCE", 60)
    idle = [begin(port, b"") for _ in range(60)]
    asking = begin(port, head("/predict", 1) + b"x")
    assert body_of(asking) == b"1"
    assert max(seconds_until_closed(connection) for connection in idle[:30]) < 5  # the oldest
    for connection in (*idle, asking):
        connection.close()


def test_who_goes_away_leaves_no_line(port, caplog):
    for _ in range(3):
        begin(port, head("/predict", 1000) + b"x").close()
    lazy = begin(port, head("/config"), 4096)
    lazy.close()
    time.sleep(0.3)
    assert caplog.text == ""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_has_begun_end_and_the_second_does_not_wait(sent, tmp_path, monkeypatch):
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    app = guard.Guard(takes_all, Limits(), str(folder), None)
    app.routes = [SimpleNamespace(app=SimpleNamespace(stop_event=asyncio.Event()))]
    answers, codes = [], []
    monkeypatch.setattr(os, "_exit", codes.append)
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}

    def ask(times):
        connection = begin(port, head("/health", 1))  # the body is still to come
        for _ in range(times):
            time.sleep(0.4)
            os.kill(os.getpid(), sent)
        with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
            connection.sendall(b"x")
            answers.append(body_of(connection))
        connection.close()

    try:
        for times in (1, 2):
            listener = socket.create_server(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            thread = threading.Thread(target=ask, args=(times,))
            thread.start()
            serve._run(app, listener)
            thread.join()
            assert codes == [128 + sent] * (times - 1)  # then the process has ended
            assert folder.exists() == (times == 1)
            if times == 1:
                assert answers == [b"1"]
        assert app.routes[0].app.stop_event.is_set()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
