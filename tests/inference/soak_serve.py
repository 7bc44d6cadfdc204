"""Thousands of requests to a running server, good and bad mixed: memory and open files stay flat.

    python tests/inference/soak_serve.py --requests 5000 --at-once 16

Serves a tiny model on loopback in a process of its own. Each good answer must be the same as the
first one for the same image, each bad request get the status that is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

EDGE = b"edge"
FORM = {"Content-Type": f"multipart/form-data; boundary={EDGE.decode()}"}
JSON = {"Content-Type": "application/json"}


def form(name, *files):
    """The body of a form with files in it."""
    head = b'--%b\r\nContent-Disposition: form-data; name="%b"; filename="%b"\r\n\r\n%b\r\n'
    parts = [head % (EDGE, name.encode(), f.encode(), data) for f, data in files]
    return b"".join(parts) + b"--%b--\r\n" % EDGE


def image(seed):
    """A file of one of four kinds and sizes."""
    random = np.random.default_rng(seed)
    size = (*random.integers(20, 300, 2), 3)
    stream = io.BytesIO()
    kind = ("PNG", "JPEG", "WEBP", "BMP")[seed % 4]
    Image.fromarray(random.integers(0, 256, size, np.uint8)).save(stream, kind)
    return stream.getvalue()


IMAGES = [(f"{i}.png", image(i)) for i in range(8)]
# Method, path, headers, body, and the status that answers it.
GOOD = [("POST", "/predict", FORM, form("pictures", *IMAGES[i : i + 1 + i % 2]), 200)
        for i in range(7)]  # fmt: skip
BAD = [
    ("POST", "/predict", FORM, form("pictures", ("a.png", b"text"), ("b.png", b"")), 200),
    ("POST", "/predict", FORM, form("pictures", ("a.jpg", IMAGES[1][1][:500])), 200),
    ("POST", "/predict", FORM, b"\0\xff" * 500, 400),
    ("POST", "/predict", FORM, form("pictures", ("a.png", b"x"))[:-30], 400),
    ("POST", "/predict", JSON, b"{}", 415),
    ("DELETE", "/predict", {}, b"", 405),
    ("POST", "/predict", {**FORM, "Origin": "https://example.com"}, GOOD[0][3], 403),
    ("POST", "/gradio_api/upload", FORM, b"\0\xff" * 500, 400),
    ("POST", "/gradio_api/call/predict", JSON, b"[" * 10**5, 400),
    ("GET", "/gradio_api/file=/etc/passwd", {}, b"", 403),
    ("GET", "/health", {}, b"", 200),
]


class Client:
    """One connection, kept open as long as the server does."""

    def __init__(self, port):
        self.port, self.connection = port, None

    def ask(self, method, path, headers, body):
        """Status and body of the answer; once more where a kept connection has just been closed."""
        for again in (True, False):
            fresh = self.connection is None
            if fresh:
                self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            try:
                self.connection.request(method, path, body, headers)
                answer = self.connection.getresponse()
                found = answer.status, answer.read()
                if answer.will_close:
                    self.close()
                return found
            except (http.client.HTTPException, OSError):
                self.close()
                if fresh or not again:
                    raise

    def through_page(self, name, data):
        """As a page asks: uploaded, queued, and the answer waited for."""
        up = self.ask("POST", "/gradio_api/upload", FORM, form("files", (name, data)))[1]
        file = {"path": json.loads(up)[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        asked = json.dumps({"data": [[file]]})
        event = self.ask("POST", "/gradio_api/call/predict", JSON, asked)[1]
        found = self.ask(
            "GET", f"/gradio_api/call/predict/{json.loads(event)['event_id']}", {}, b""
        )
        return 200, found[1].split(b"data: ")[-1].strip()[1:-1]  # a list of one

    def break_off(self):
        """Sends the beginning of an upload, and is gone."""
        with socket.create_connection(("127.0.0.1", self.port)) as broken:
            head = (
                f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {FORM['Content-Type']}"
            )
            body = form("pictures", IMAGES[0])
            broken.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:300])

    def close(self):
        """Ends the connection."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None


def soak(port, count, at_once, bad=0.3, page=0.05):
    """Asks so often, and gives seconds of each good request, and what was wrong.

    Args:
        port: Of the server on loopback.
        count: Requests.
        at_once: Threads.
        bad: Fraction of bad requests.
        page: Fraction that go through the page's routes; a fifth as many break off.
    """
    here, first, seconds, wrong = threading.local(), {}, [], []

    def one(number):
        client = here.__dict__.setdefault("client", Client(port))
        draw = (number * 0.6180339887) % 1  # evenly spread, the same each time
        try:
            begun = time.perf_counter()
            if draw < page:
                # A file of its own name: the page deletes what it has answered.
                found = client.through_page(f"{number}.png", IMAGES[number % 8][1])
                text = found[1].replace(f"{number}.png".encode(), b"")
                key, status = ("page", number % 8), 200
            elif draw < page * 1.2:
                client.break_off()
                return
            else:
                good = draw < 1 - bad
                index = number % len(GOOD if good else BAD)
                *request, status = (GOOD if good else BAD)[index]
                found = client.ask(*request)
                text, key = found[1], (good, index)
                if good:
                    seconds.append(time.perf_counter() - begun)
            if found[0] != status:
                wrong.append(f"{key}: {found[0]} instead of {status}: {text[:200]!r}")
            elif text != first.setdefault(key, text):
                wrong.append(f"{key}: {text[:200]!r} and {first[key][:200]!r}")
        except Exception as error:
            wrong.append(f"{number}: {error!r}")
            client.close()

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, range(count)))
    return seconds, wrong


@contextlib.contextmanager
def serving(model):
    """The port and the process of a server of its own; what it prints goes to its `log`."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "keras_resnet", "serve", str(model), "--port", "0"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        process.log = log
        try:
            for _ in itertools.repeat(None, 600):
                time.sleep(0.1)
                log.seek(0)
                found = re.search(r"127\.0\.0\.1:(\d+) ", log.read())
                if found or process.poll() is not None:
                    break
            yield int(found[1]), process
        finally:
            process.terminate()
            process.wait(60)


def state(pid):
    """Resident megabytes, open files, seconds of CPU of a process."""
    root = Path(f"/proc/{pid}")
    resident = int(re.search(r"VmRSS:\s+(\d+)", (root / "status").read_text())[1]) / 1024
    ticks = (root / "stat").read_text().rsplit(") ", 1)[1].split()
    cpu = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
    return resident, len(os.listdir(root / "fd")), cpu


def main():
    """Runs the soak and prints a line for each part of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--parts", type=int, default=5)
    arguments = parser.parse_args()
    import keras_resnet as kr

    model = kr.create_model("resnet_tiny", num_classes=6, input_shape=(32, 32, 3))
    model.info["class_names"] = list("abcdef")
    model.info["preprocess"] = kr.Preprocess(36, 32).get_config()
    errors = 0
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "tiny.keras")
        with serving(Path(folder) / "tiny.keras") as (port, process):
            soak(port, 200, arguments.at_once)
            each = arguments.requests // arguments.parts
            print("requests  MB resident  open files  CPU ms each  p50 ms  p99 ms  wrong")
            for part in range(arguments.parts):
                before = state(process.pid)
                seconds, wrong = soak(port, each, arguments.at_once)
                time.sleep(6)  # kept connections are closed after five
                after = state(process.pid)
                cpu = (after[2] - before[2]) / each * 1000
                p50, p99 = np.percentile(seconds, [50, 99]) * 1000
                print(f"{(part + 1) * each:8}  {after[0]:11.1f}  {after[1]:10}  {cpu:11.2f}  "
                      f"{p50:6.1f}  {p99:6.1f}  {len(wrong):5}", flush=True)  # fmt: skip
                for line in wrong[:5]:
                    print(f"  {line}")
                errors += len(wrong)
            process.log.seek(0)
            said = process.log.read().splitlines()[2:]
            print(f"The server said {len(said)} lines: {said[:5]}")
    return 1 if errors or said else 0


if __name__ == "__main__":
    sys.exit(main())
