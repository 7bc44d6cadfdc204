"""What stands in front of the page: bounds on requests, and headers that keep it to itself."""

from __future__ import annotations

from keras_resnet.inference.service import Limits

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
    """ASGI: ends requests that are larger than any allowed one, with or without a length.

    Args:
        app: The application behind it.
        limits: What an upload may be at most.
    """

    def __init__(self, app, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope, receive, send) -> None:
        """Answers a request, or has it answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.formparsers import MultiPartException
        from starlette.responses import PlainTextResponse

        if scope["path"].startswith(("/gradio_api/file=http", "/gradio_api/proxy=")):
            # Gradio looks up the host before it refuses.
            refusal = PlainTextResponse("Files of other hosts are not given out.", 403)
            await refusal(scope, receive, send)
            return
        limit, taken, begun, more = self.limits.request_bytes, 0, False, True
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            await self._refuse(scope, receive, send, more)
            return

        async def counted():
            nonlocal taken, more
            message = await receive()
            more = message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > limit:
                # What a form's reader takes for a fault of the form, after which it cleans up.
                raise MultiPartException("The upload is too large.")
            return message

        async def guarded(message):
            nonlocal begun
            if taken > limit:  # whatever the application makes of the cut-off request
                return
            if message["type"] == "http.response.start":
                begun = True
                for name, value in _HEADERS.items():
                    MutableHeaders(scope=message).append(name, value)
            await send(message)

        try:
            await self.app(scope, counted, guarded)
        except Exception:
            if taken <= limit:
                raise
        if taken > limit and not begun:
            await self._refuse(scope, receive, send, more)

    async def _refuse(self, scope, receive, send, more: bool) -> None:
        from starlette.responses import JSONResponse, PlainTextResponse

        # A browser that is still sending reads no answer: what comes is taken, and thrown away.
        left = 8 * self.limits.request_bytes
        while more and left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            more = message.get("more_body", False)
        text, headers = f"The upload is too large. {self.limits}", {"connection": "close"}
        refusal = PlainTextResponse(text, 413, headers)
        if scope["path"] == "/predict":
            refusal = JSONResponse({"error": text}, 413, headers)
        await refusal(scope, receive, send)
