"""What stands in front of the page: who may ask, for what, how much and how slowly."""

from __future__ import annotations

import contextlib
import fnmatch
import ipaddress
import logging
import math
import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from keras_resnet.inference.service import Limits
from keras_resnet.system.errors import reason_of
from keras_resnet.system.files import printable

logger = logging.getLogger("keras_resnet")

# What the page and Gradio's clients ask for. Gradio has more routes, with faults of their own.
_TAKEN = re.compile(
    r"/(health|predict|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)?"
    r"|/(assets|static|svelte)/.*"
    r"|/gradio_api/(info|app_id|startup-events|login_check|theme\.css|upload|upload_progress|reset"
    r"|cancel|queue/(join|data)|heartbeat/[^/]+|call/predict(/[^/]+)?)"
)
_UPLOADS = ("/predict", "/gradio_api/upload")
_READING = ("GET", "HEAD", "OPTIONS")

_HEADERS = {
    # Should anything on the page ask for something elsewhere, the browser refuses.
    "content-security-policy": (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; "
        "form-action 'self'; base-uri 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """ASGI: refuses what is not the page's, from elsewhere, or larger than any allowed request.

    Uploads are kept in a folder. `hosts` are names (`*.example.org`) under which it may be asked,
    beside numeric addresses; `None` for any.
    """

    def __init__(self, app, limits: Limits, folder: str, hosts: Sequence[str] | None):
        self.app, self.limits, self.folder, self.hosts = app, limits, folder, hosts
        self._reserved = 0  # bytes of the requests under way

    async def __call__(self, scope, receive, send) -> None:
        """Answers a request, or has it answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from starlette.datastructures import Headers

        headers, limit = Headers(scope=scope), 2**20
        refusal = self._stranger(scope, headers)
        if refusal is not None:
            await _refuse(scope, receive, send, *refusal)
            return
        if scope["path"] in _UPLOADS:
            limit = self.limits.request_bytes
        # What does not say its length may become as long as is allowed.
        length = headers.get("content-length", "0" if scope["method"] in _READING else str(limit))
        if not length.isdecimal() or int(length) > limit:
            await _refuse(scope, receive, send, 413, self._too_large(), 8 * limit)
        elif not self._has_room(int(length)):
            text = "As many uploads are here as there may be at once. Try again in a minute."
            await _refuse(scope, receive, send, 503, text, limit)
        else:
            self._reserved += int(length)
            try:
                await self._answer(scope, receive, send, limit)
            finally:
                self._reserved -= int(length)

    def _stranger(self, scope, headers) -> tuple[int, str] | None:
        """Status and sentence for a request that is none of the page's."""
        host, origin = headers.get("host", ""), headers.get("origin")
        site = headers.get("sec-fetch-site")
        if not self._is_ours(host):
            name = printable(host[:99])
            return 400, f"The server has no such name: --host gives it one. Received: {name}."
        # As Go's `CrossOriginProtection`, and foreign pages read nothing either. Without both
        # headers it is no browser; on plain http from other machines there is only `Origin`.
        if site is not None:
            foreign = site not in ("same-origin", "none")
        else:
            foreign = origin is not None and origin.partition("://")[2].lower() != host.lower()
        if foreign and (origin is not None or scope["method"] not in _READING):
            return 403, "Pages of other servers may not ask here."
        if _TAKEN.fullmatch(scope["path"]):
            return None
        status = 403 if scope["path"].startswith("/gradio_api/") else 404
        return status, "There is no such page."

    def _is_ours(self, host: str) -> bool:
        if self.hosts is None:
            return True
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if any(fnmatch.fnmatchcase(name, known.lower()) for known in self.hosts):
                return True
            ipaddress.ip_address(name)  # nobody can point a number elsewhere
        except ValueError:
            return False
        return True

    def _has_room(self, length: int) -> bool:
        if length == 0:
            return True
        sizes = []
        for root, _, names in os.walk(self.folder):  # `rglob` fails where a folder is just deleted
            for name in names:
                with contextlib.suppress(OSError):
                    sizes.append(os.path.getsize(os.path.join(root, name)))
        room = self.limits.kept_bytes - sum(sizes) - self._reserved
        return length <= room and len(sizes) < self.limits.kept_files

    def _too_large(self) -> str:
        return f"The upload is too large. {self.limits}"

    async def _answer(self, scope, receive, send, limit: int) -> None:
        """Has a request answered, however long it turns out to be, and wherever it breaks off."""
        from starlette.datastructures import MutableHeaders
        from starlette.formparsers import MultiPartException

        taken, begun, more, gone = 0, False, True, False

        async def counted():
            nonlocal taken, more, gone
            message = await receive()
            gone = gone or (more and message["type"] == "http.disconnect")
            more = message.get("more_body", False)
            taken += len(message.get("body", b""))
            if gone or taken > limit:
                # What a form's reader takes for a fault of the form, after which it cleans up.
                raise MultiPartException(self._too_large())
            return message

        async def guarded(message):
            nonlocal begun
            if gone or taken > limit:  # whatever the application makes of the cut-off request
                return
            if message["type"] == "http.response.start":
                begun = True
                for name, value in _HEADERS.items():
                    MutableHeaders(scope=message).append(name, value)
            await send(message)

        try:
            await self.app(scope, counted, guarded)
        except Exception as error:  # Starlette has answered 500
            if not gone and taken <= limit:
                where = printable(f"{scope['method']} {scope['path']}")
                logger.error("%s failed: %s", where, reason_of(error))
        if taken > limit and not begun and not gone:
            await _refuse(scope, receive, send, 413, self._too_large(), 8 * limit if more else 0)


async def _refuse(scope, receive, send, status: int, text: str, left: int = 0) -> None:
    from starlette.responses import JSONResponse, PlainTextResponse

    # A browser that is still sending reads no answer: what comes is taken, and thrown away.
    while left > 0:
        message = await receive()
        left = left - len(message.get("body", b"")) if message.get("more_body") else 0
    headers = {"connection": "close", **_HEADERS}
    refusal: Any = PlainTextResponse(text, status, headers)
    if scope["path"] == "/predict":
        refusal = JSONResponse({"error": text}, status, headers)
    await refusal(scope, receive, send)


# --- connections ---------------------------------------------------------------------------------

# As Apache's `RequestReadTimeout header=20,MinRate=500 body=20,MinRate=500`.
PATIENCE, RATE = 20.0, 500  # seconds that the other end may be late; a byte in time adds 1 / RATE
CONNECTIONS = 200  # at once; below the open files that any system allows


def patient_connection() -> type:
    """Uvicorn's connection, which it leaves open to whoever sends or takes nothing.

    One on which the other end is late by `PATIENCE` is closed: with a request's head or body, or
    with taking the answer. So is the latest of them where there are `CONNECTIONS` already.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        until = 0.0

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self.on_progress()
            if len(self.connections) > CONNECTIONS:
                late = [c for c in self.connections if c is not self and c.is_awaited()]
                # First those that have asked for nothing yet.
                last = min(late, key=lambda c: (c.cycle is not None, c.until), default=self)
                self.connections.discard(last)  # now, not when it has been closed
                last.transport.abort()
            self.look()

        def look(self) -> None:
            if not self.is_awaited():
                self.on_progress()
            elif self.loop.time() > self.until:
                self.transport.abort()
            if self in self.connections:
                self.loop.call_later(PATIENCE / 10, self.look)

        def is_awaited(self) -> bool:
            """Whether it is the other end's turn: to send what is wanted, or to take an answer."""
            sends = self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.flow.read_paused
            return sends or self.transport.get_write_buffer_size() > 0

        def on_progress(self, seconds: float = math.inf) -> None:
            self.until = self.loop.time() + min(PATIENCE, self.until - self.loop.time() + seconds)

        def data_received(self, data: bytes) -> None:
            self.on_progress(len(data) / RATE)
            super().data_received(data)

        def resume_writing(self) -> None:  # 48 KB were taken
            self.on_progress()
            super().resume_writing()

        def on_response_complete(self) -> None:
            self.on_progress()
            super().on_response_complete()

    return Connection
