"""A page to try a model on, and an HTTP endpoint beside it: for people and for programs.

The page is Gradio's (the extra `serve`). It works without a network: no fonts, scripts or counters
from elsewhere, no share link. Whatever is uploaded is checked before it is decoded (bytes, kind,
pixels), answered, and deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import importlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_resnet.errors import DataError, InputError, MissingDependencyError
from keras_resnet.inference.grad_cam import grad_cam
from keras_resnet.inference.service import Answer, Limits, Service, _data_uri, _text
from keras_resnet.models.files import load_model
from keras_resnet.runtimes.formats import format_of_file
from keras_resnet.runtimes.runner import Runner
from keras_resnet.runtimes.select import open_runner
from keras_resnet.system.files import printable

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def answers_html(answers: Sequence[Answer]) -> str:
    """Cards, one a picture."""
    return f'<div class="kr-answers">{"".join(map(_card, answers))}</div>'


def _card(answer: Answer) -> str:
    name = f'<h3 class="kr-name" dir="auto">{_text(answer.name)}</h3>'
    if answer.error is not None:
        sentence = f'<p class="kr-error" role="alert">{_text(answer.error)}</p>'
        return f'<article class="kr-card kr-bad">{name}{sentence}</article>'
    best = answer.classes[0][0]
    pictures = _figure(answer.pixels, "Seen by the model", answer.name)
    if answer.heat is not None:
        pictures += _figure(answer.heat, f"What spoke for {best}", f"heat map for {best}")
    note = f'<p class="kr-note">{_text(answer.note)}</p>' if answer.note else ""
    bars = "".join(
        f'<li><span class="kr-class" dir="auto">{_text(label)}</span>'
        f'<span class="kr-share">{_percent(share)}</span>'
        f'<span class="kr-bar"><span style="width:{100 * share:.2f}%"></span></span></li>'
        for label, share in answer.classes
    )
    return (
        f'<article class="kr-card">{name}{note}<div class="kr-body">'
        f'<div class="kr-pictures">{pictures}</div><ol class="kr-bars">{bars}</ol></div></article>'
    )


def _percent(share: float) -> str:
    return "&lt; 0.1%" if share < 0.0005 else f"{share:.1%}"


def _figure(pixels: np.ndarray | None, caption: str, alt: str) -> str:
    return (
        f'<figure><img src="{_data_uri(pixels)}" alt="{_text(alt)}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def facts_html(service: Service) -> str:
    """The model's facts as a list, its classes folded in."""
    rows = "".join(
        f'<div><dt>{_text(label)}</dt><dd dir="auto">{_text(value)}</dd></div>'
        for label, value in service.facts()
    )
    names = "".join(f'<li dir="auto">{_text(name)}</li>' for name in service.names)
    blind = f'<p class="kr-note">{_text(service.why_blind)}</p>' if service.why_blind else ""
    return (
        f'<section class="kr-facts"><h2>About the model</h2><dl>{rows}<div><dt>Classes</dt>'
        f"<dd><details><summary>{len(service.names):,}</summary><ol>{names}</ol></details></dd>"
        f"</div></dl>{blind}</section>"
    )


def _programs_html(limits: Limits) -> str:
    curl = "curl -F pictures=@cat.jpg -F pictures=@dog.jpg ADDRESS/predict"
    client = (
        "from gradio_client import Client, handle_file\n\n"
        'client = Client("ADDRESS", analytics_enabled=False)\n'
        'client.predict([handle_file("cat.jpg")], api_name="/predict")'
    )
    return (
        '<div class="kr-programs"><p>Both give JSON: the five most probable classes of each '
        f"picture, or a sentence about what is wrong with it. {_text(limits)}</p>"
        f"<pre><code>{_text_lines(curl)}</code></pre><pre><code>{_text_lines(client)}</code></pre>"
        "</div>"
    )


def _text_lines(text: str) -> str:
    return html.escape(text)


_CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; width: 100% !important;
  --kr-quiet: #5b6472; }
.dark .gradio-container, .gradio-container.dark { --kr-quiet: #a3acba; }
.gradio-container > main, .gradio-container .wrap.app { width: 100%; max-width: none !important; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container .block { border-radius: 12px !important; }
#pictures { border: 1.5px dashed var(--kr-quiet) !important; }
.kr-title h1 { font-size: 1.6rem; font-weight: 650; margin: .4rem 0 .1rem;
  color: var(--body-text-color); overflow-wrap: anywhere; }
.kr-title p { color: var(--kr-quiet); margin: 0; }
.kr-answers { display: grid; gap: 16px; }
.kr-card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 12px; padding: 14px 16px 16px; min-width: 0; }
.kr-card .kr-name { font-size: 1rem; font-weight: 600; margin: 0 0 10px; overflow-wrap: anywhere;
  color: var(--body-text-color); }
.kr-bad { border-left: 4px solid #d97706; }
.kr-error, .kr-note { margin: 0; color: var(--body-text-color); overflow-wrap: anywhere; }
.kr-note { color: var(--kr-quiet); font-size: .875rem; margin: 0 0 10px; }
.kr-body { display: grid; grid-template-columns: minmax(0, 1.15fr) minmax(0, 1fr); gap: 20px;
  align-items: center; }
.kr-pictures { display: flex; gap: 10px; }
.kr-pictures figure { margin: 0; flex: 1 1 0; min-width: 0; max-width: 240px; }
.kr-pictures img { width: 100%; height: auto; border-radius: 8px; display: block; }
.kr-pictures figcaption { font-size: .8rem; margin-top: 5px; overflow-wrap: anywhere;
  color: var(--kr-quiet); }
.kr-bars { list-style: none; margin: 0 !important; padding: 0 !important; display: grid; gap: 9px; }
.kr-bars li { display: grid; grid-template-columns: minmax(0, 1fr) auto; column-gap: 10px;
  margin: 0; color: var(--body-text-color); }
.kr-class { overflow-wrap: anywhere; }
.kr-bars li:first-child .kr-class, .kr-bars li:first-child .kr-share { font-weight: 650; }
.kr-share { font-variant-numeric: tabular-nums; }
.kr-bar { grid-column: 1 / -1; height: 8px; border-radius: 4px; overflow: hidden;
  background: var(--border-color-primary); margin-top: 3px; }
.kr-bar > span { display: block; height: 100%; border-radius: 4px; background: #4f46e5; }
.dark .kr-bar > span { background: #818cf8; }
.kr-facts { border: 1px solid var(--border-color-primary); border-radius: 12px;
  background: var(--block-background-fill); padding: 14px 16px; }
.kr-facts h2 { font-size: 1rem; font-weight: 650; margin: 0 0 10px; color: var(--body-text-color); }
.kr-facts dl { margin: 0; display: grid; gap: 10px; }
.kr-facts dt { font-size: .78rem; color: var(--kr-quiet); }
.kr-facts dd { margin: 0; color: var(--body-text-color); overflow-wrap: anywhere; font-size: .92rem; }
.kr-facts summary { cursor: pointer; }
.kr-facts ol { max-height: 16rem; overflow: auto; margin: 6px 0 0; padding-left: 1.6rem; }
.kr-facts .kr-note { margin: 12px 0 0; }
.kr-programs pre { background: var(--background-fill-secondary); border-radius: 8px;
  padding: 10px 12px; overflow-x: auto; font-size: .82rem; margin: 8px 0; }
.kr-programs p { color: var(--kr-quiet); margin: 0; }
@media (max-width: 760px) {
  .kr-body { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  .kr-pictures figure { max-width: none; }
}
"""  # noqa: E501

# Pasted pictures go where dropped ones go; phones offer the camera and the gallery; the lines for
# programs name the address that the page was asked for.
_HEAD = """
<script>
const krInput = () => document.querySelector('#pictures input[type=file]');
document.addEventListener('paste', (event) => {
  const files = [...(event.clipboardData ? event.clipboardData.files : [])];
  const input = krInput();
  if (!files.length || !input) return;
  event.preventDefault();
  const transfer = new DataTransfer();
  files.forEach((file) => transfer.items.add(file));
  input.files = transfer.files;
  input.dispatchEvent(new Event('change', { bubbles: true }));
});
document.addEventListener('click', (event) => {
  const input = krInput();
  if (input && event.target.closest('#pictures')) input.setAttribute('accept', 'image/*');
}, true);
const krAddress = () => document.querySelectorAll('.kr-programs code').forEach((code) => {
  if (code.textContent.includes('ADDRESS'))
    code.textContent = code.textContent.replaceAll('ADDRESS', location.origin);
});
new MutationObserver(krAddress).observe(document, { childList: true, subtree: true });
</script>
"""


# --- the application -----------------------------------------------------------------------------


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f'serve needs the package {name.split(".")[0]}: pip install "keras3-resnet[serve]".'
        ) from error


def _service(model: Any, engine: str, limits: Limits) -> Service:
    found, blind = None, None
    if isinstance(model, keras.Model):
        found = model
    elif not isinstance(model, Runner) and format_of_file(Path(model).expanduser()) is None:
        found = load_model(model)
    if found is None:
        blind = "An exported model has no gradients: there are no heat maps of where it looked."
    runner = open_runner(model if found is None else found, engine)
    if found is not None:
        try:  # once, before anybody waits for it
            shape = Service(runner, None, limits, None).preprocess.output_shape
            grad_cam(found, _blank(found, shape))
        except InputError as error:
            found, blind = None, f"No heat maps: {error}"
    return Service(runner, found, limits, blind)


def _blank(model: keras.Model, shape: tuple[int | None, int | None, int]) -> np.ndarray:
    image = np.zeros((1, shape[0] or 224, shape[1] or 224, shape[2]), np.float32)
    first = keras.config.image_data_format() == "channels_first"
    return image.transpose(0, 3, 1, 2) if first else image


def build_app(
    model: keras.Model | Runner | str | os.PathLike,
    *,
    limits: Limits | None = None,
    engine: str = "keras",
    hosts: Sequence[str] | None = LOOPBACK,
) -> Any:
    """The page and the endpoint as an ASGI application, for a server of your own.

    Sets Gradio's environment variables for the process: no analytics, and a folder for uploads
    that is removed when the application ends.

    Args:
        model: A model, a `.keras` file, a run folder, an exported file or a `Runner`.
        limits: What an upload may be at most.
        engine: What runs the model: see `engines.open_runner`.
        hosts: Names under which the server may be asked (a page elsewhere cannot pretend to be it
            by pointing its own name here); `None` for any.

    Returns:
        A FastAPI application: `uvicorn.run(build_app("best.keras"))`.

    Raises:
        InputError: The model has no head, or names no preprocessing.
        NotFoundError: There is no such file.
        MissingDependencyError: Gradio is not installed.
    """
    limits = limits or Limits()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    gradio, fastapi = _import("gradio"), _import("fastapi")
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    service = _service(model, engine, limits)
    folder = tempfile.mkdtemp(prefix="keras-resnet-serve-")
    os.environ["GRADIO_TEMP_DIR"] = folder

    @contextlib.asynccontextmanager
    async def lifespan(app):
        sweeper = asyncio.create_task(_sweep(folder))
        yield
        sweeper.cancel()
        shutil.rmtree(folder, ignore_errors=True)

    # Its own pages of documentation would come with scripts from elsewhere.
    app = fastapi.FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guard, limits=limits)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[_bracketed(h) for h in hosts])
    _add_endpoint(app, service)
    gradio.mount_gradio_app(
        app,
        _page(gradio, service),
        path="/",
        css=_CSS,
        head=_HEAD,
        theme=gradio.themes.Default(
            primary_hue="indigo",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        max_file_size=limits.request_bytes,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        show_error=True,
    )
    return app


async def _sweep(folder: str, every: float = 60, age: float = 600) -> None:
    """Deletes uploads that nothing was ever asked of, and what a broken connection left."""
    while True:
        await asyncio.sleep(every)
        for path in Path(folder).rglob("*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - age:
                    path.rmdir() if path.is_dir() else path.unlink()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _Upload(NamedTuple):
    """A file in Gradio's folder of uploads, a folder of its own around it."""

    path: Path
    name: str

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:  # the same file, uploaded twice at the same time
            raise DataError("The upload is no longer there; give it again.") from None

    def delete(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
            self.path.parent.rmdir()


def _page(gradio, service: Service):
    def uploads_field(**options):
        """A `gradio.File` of what people give: no addresses, and no files of this machine.

        Gradio checks neither where it is mounted in another application (6.31.0). A subclass would
        be tidier, but Gradio writes a `.pyi` file beside the module of each.
        """
        field = gradio.File(file_count="multiple", **options)
        folder = os.path.realpath(field.GRADIO_CACHE)

        async def take(path: str) -> str:
            if os.path.commonpath([folder, os.path.realpath(path)]) != folder:
                raise gradio.Error("Give the picture itself, not its path.", print_exception=False)
            return path

        def uploads(payload) -> list[_Upload]:
            files = [] if payload is None else getattr(payload, "root", [payload])
            return [_Upload(Path(f.path), f.orig_name or os.path.basename(f.path)) for f in files]

        field.async_move_resource_to_block_cache = take
        field.preprocess = uploads
        return field

    def answer(uploads: list[_Upload], heat: bool) -> list[Answer]:
        try:
            return service.answer([(upload.name, upload.read) for upload in uploads], heat)
        finally:
            for upload in uploads:
                upload.delete()

    def show(uploads):
        return answers_html(answer(uploads, True)), None

    def predict(pictures):
        return _as_json(service, answer(pictures, False))

    name = service.runner.info.get("variant") or service.runner.model_name
    with gradio.Blocks(
        title=f"{printable(name)} - keras_resnet",
        analytics_enabled=False,
    ) as page:
        gradio.HTML(
            f'<div class="kr-title"><h1>{_text(name)}</h1><p>Drop, paste or pick pictures: the '
            f"model says what they show. {_text(service.limits)}</p></div>"
        )
        with gradio.Row():
            with gradio.Column(scale=5, min_width=320):
                uploads = uploads_field(label="Pictures", elem_id="pictures", height=170)
                answers = gradio.HTML(elem_id="answers")
            with gradio.Column(scale=2, min_width=260):
                gradio.HTML(facts_html(service))
                with gradio.Accordion("From a program", open=False):
                    gradio.HTML(_programs_html(service.limits))
        uploads.upload(
            show,
            uploads,
            [answers, uploads],
            api_visibility="private",
            show_progress_on=uploads,
        )
        asked, given = uploads_field(visible=False), gradio.JSON(visible=False)
        gradio.Button(visible=False).click(predict, asked, given, api_name="predict")
    page.queue(max_size=64)
    return page


def _as_json(service: Service, answers: list[Answer]) -> dict[str, Any]:
    name = service.runner.info.get("variant") or service.runner.model_name
    return {"model": name, "pictures": [answer.to_dict() for answer in answers]}


def _add_endpoint(app, service: Service) -> None:
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    usage = "Send pictures as a form: curl -F pictures=@cat.jpg ADDRESS/predict"

    async def predict(request):
        usage_here = usage.replace("ADDRESS", str(request.base_url).rstrip("/"))
        if request.method != "POST":
            return JSONResponse({"error": usage_here}, 405, {"Allow": "POST"})
        kind = request.headers.get("content-type", "")
        if not kind.startswith("multipart/form-data"):
            return JSONResponse({"error": f"This is no form. {usage_here}"}, 415)
        try:
            # Its temporary files go when it closes.
            async with request.form(max_files=4 * service.limits.pictures, max_fields=16) as form:
                found = [v for k, v in form.multi_items() if k == "pictures"]
                uploads = [(f.filename, f.file.read) for f in found if not isinstance(f, str)]
                if not uploads:
                    return JSONResponse({"error": f"There is no picture in it. {usage_here}"}, 400)
                answers = await run_in_threadpool(service.answer, uploads, False)
        except HTTPException as error:
            return JSONResponse({"error": f"{error.detail} {service.limits}"}, 400)
        return JSONResponse(_as_json(service, answers))

    app.add_route("/predict", predict, methods=["GET", "HEAD", "PUT", "POST"])


class _Guard:
    """ASGI: ends requests that are larger than any allowed one, and keeps the page to itself."""

    # Should anything on the page ask for something elsewhere, the browser refuses.
    _POLICY = (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; "
        "form-action 'self'; base-uri 'self'"
    )

    def __init__(self, app, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].startswith(("/gradio_api/file=http", "/gradio_api/proxy=")):
            # Gradio looks up the host before it refuses.
            await _send_text(send, 403, "Files of other hosts are not given out.", b"text/plain")
            return
        from starlette.formparsers import MultiPartException

        limit, taken, over, begun = self.limits.request_bytes, 0, False, False
        more = True
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            await self._refuse(scope, receive, send, True)
            return

        async def counted():
            nonlocal taken, over, more
            message = await receive()
            more = message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > limit:
                over = True
                # What a form's reader takes for a fault of the form, after which it cleans up.
                raise MultiPartException("The upload is too large.")
            return message

        async def answered(message):
            nonlocal begun
            if over:  # whatever the application makes of the cut-off request
                if not begun:
                    begun = True
                    await self._refuse(scope, receive, send, more)
                return
            if message["type"] == "http.response.start":
                begun = True
                extra = [
                    (b"content-security-policy", self._POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            await self.app(scope, counted, answered)
        except Exception:
            if not over:
                raise
        if over and not begun:
            await self._refuse(scope, receive, send, more)

    async def _refuse(self, scope, receive, send, more: bool) -> None:
        # A browser that is still sending reads no answer: what comes is taken, and thrown away.
        left = 8 * self.limits.request_bytes
        while more and left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            more = message.get("more_body", False)
        sentence, kind = f"The upload is too large. {self.limits}", b"text/plain"
        if scope["path"] == "/predict":
            sentence, kind = json.dumps({"error": sentence}), b"application/json"
        await _send_text(send, 413, sentence, kind)


async def _send_text(send, status: int, text: str, kind: bytes) -> None:
    headers = [(b"content-type", kind), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def serve(
    model: keras.Model | Runner | str | os.PathLike,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    limits: Limits | None = None,
    engine: str = "keras",
) -> None:
    """Serves a page on which people try the model, until Ctrl-C.

    `POST /predict` beside it answers programs. Nothing is sent anywhere, and nothing is kept.

    Args:
        model: A model, a `.keras` file, a run folder, an exported file or a `Runner`.
        host: Where to listen; other machines can reach the page only if it is not 127.0.0.1.
        port: Where to listen; 0 takes a free one.
        limits: What an upload may be at most.
        engine: What runs the model: see `engines.open_runner`.

    Raises:
        InputError: The port is taken; the model has no head, or names no preprocessing.
        NotFoundError: There is no such file.
        MissingDependencyError: Gradio is not installed.
    """
    uvicorn = _import("uvicorn")
    _import("gradio")
    listener = _listen(host, port)
    with listener:
        port = listener.getsockname()[1]
        local = host in LOOPBACK
        app = build_app(model, limits=limits, engine=engine, hosts=LOOPBACK if local else None)
        everywhere = host in ("0.0.0.0", "::", "")
        shown = "127.0.0.1" if everywhere else _bracketed(host)
        print(f"Serving at http://{shown}:{port} (Ctrl-C stops)", flush=True)
        if not local:
            print("Whoever reaches this machine can use it: there is no password.", flush=True)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=3
        )
        with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
            uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 65536:
        raise InputError(f"The port must be from 0 to 65535. Received: {port}.")
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(f"There is no address of the name {host!r} here: {error}.") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise InputError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Give another --port (0 for a free "
            "one) or --host."
        ) from None
    return listener
