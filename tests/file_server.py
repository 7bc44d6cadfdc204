"""A server on this machine that stands for the network: files, parts, lines that break."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
import time

import numpy as np

DATA = np.random.default_rng(0).integers(0, 256, 3_000_001, dtype=np.uint8).tobytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves DATA as the test asks for: see `Server`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        if server.status != 200:
            self.send_error(server.status)
            return
        data, start = server.data, 0
        if server.ranges and (found := re.fullmatch(r"bytes=(\d+)-", server.requests[-1] or "")):
            start = int(found[1])
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cut and len(server.requests) <= server.cuts:
            self.wfile.write(body[: server.cut])
            self.close_connection = True
            return
        for i in range(0, len(body), 1 << 18):
            time.sleep(server.pause)
            with contextlib.suppress(OSError):
                self.wfile.write(body[i : i + (1 << 18)])
        if server.stall:
            server.release.wait(20)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    data, status, ranges, cut, cuts, pause, stall = DATA, 200, True, 0, 10**9, 0.0, False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.release = [], threading.Event()
