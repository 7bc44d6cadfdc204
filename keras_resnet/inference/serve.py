"""A page to try a model on, and an HTTP endpoint beside it: for people and for programs.

The page is Gradio's (the extra `serve`). It works without a network: no fonts, scripts or counters
from elsewhere, no share link. Whatever is uploaded is checked before it is decoded (bytes, kind,
pixels), classified, and deleted.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from keras_resnet.inference.guard import Guard, patient_connection
from keras_resnet.inference.service import Limits, Service, open_service
from keras_resnet.runtimes.runner import Runner
from keras_resnet.system.errors import DataError, InputError, reason_of, require
from keras_resnet.system.files import printable

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# --- the page ------------------------------------------------------------------------------------

_PROGRAMS = """\
Both give JSON: the five most probable classes of each image, or a sentence about what is wrong
with it. {limits}

```sh
curl -F pictures=@cat.jpg -F pictures=@dog.jpg ADDRESS/predict
```

```python
from gradio_client import Client, handle_file

client = Client("ADDRESS", analytics_enabled=False)
client.predict([handle_file("cat.jpg")], api_name="/predict")
```
"""

# Pasted images go where dropped ones go.
_PASTE = """() => document.addEventListener('paste', (event) => {
  const input = document.querySelector('#images input[type=file]');
  if (!input || !event.clipboardData?.files.length) return;
  event.preventDefault();
  input.files = event.clipboardData.files;
  input.dispatchEvent(new Event('change', { bubbles: true }));
})"""


@functools.cache
def page_parts() -> Any:
    """The macros of the page's template: `title`, `results` and `facts`.

    Nothing in the text that they are given is markup, and nothing turns the writing direction.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    environment.filters["data_uri"] = _data_uri
    text = Path(__file__).with_name("serve.html").read_text(encoding="utf-8")
    return environment.from_string(text).module


def _data_uri(pixels: np.ndarray) -> Markup:
    stream = io.BytesIO()
    # A JPEG would smear enlarged pixels.
    few = len(np.unique(pixels.reshape(-1, 3)[:4096], axis=0)) < 64
    kind, options = ("png", {}) if few else ("jpeg", {"quality": 88})
    Image.fromarray(pixels).save(stream, kind, **options)
    return Markup(f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}")


def _uploads_field(gradio, **options):
    """A `gradio.File` that downloads nothing.

    A subclass would be tidier, but Gradio writes a `.pyi` file beside the module of each.
    """
    field = gradio.File(file_count="multiple", **options)

    async def take(path: str) -> str:
        return path

    field.async_move_resource_to_block_cache = take
    return field


def _page(gradio, service: Service, folder: str):
    html, limits = page_parts(), service.limits

    def classify(uploads: list[dict] | None, heat: bool) -> list:
        found = [(Path(u["path"]), u["orig_name"] or Path(u["path"]).name) for u in uploads or []]
        # Gradio lets any path and address through where it is mounted in another application, and
        # does not even ask the field about those that call themselves streams (6.31.0).
        if not all(_is_inside(path, folder) for path, _ in found):
            raise gradio.Error("Give the image itself, not its path.", print_exception=False)
        try:
            return service.results([(n, functools.partial(_read, p)) for p, n in found], heat)
        finally:
            for path, _ in found:
                with contextlib.suppress(OSError):
                    path.unlink()
                    path.parent.rmdir()  # each upload has a folder of its own

    with gradio.Blocks(
        title=f"{printable(service.name)} - keras_resnet", analytics_enabled=False
    ) as page:
        gradio.HTML(html.title(service.name, limits))
        with gradio.Row():
            with gradio.Column(scale=5, min_width=320):
                uploads = _uploads_field(gradio, label="Images", elem_id="images", height=170)
                results = gradio.HTML()
            with gradio.Column(scale=2, min_width=260):
                gradio.HTML(html.facts(service), container=True, padding=True)
                with gradio.Accordion("From a program", open=False):
                    programs = gradio.Markdown()
        uploads.upload(
            lambda given: (html.results(classify(given, True)), None),
            uploads,
            [results, uploads],
            preprocess=False,  # as it was uploaded: a path and a name
            api_visibility="private",
            show_progress_on=uploads,
        )
        text = json.dumps(_PROGRAMS.format(limits=limits))
        page.load(None, None, programs, js=f"() => {text}.replaceAll('ADDRESS', location.origin)")
        asked, given = _uploads_field(gradio, visible=False), gradio.JSON(visible=False)
        gradio.Button(visible=False).click(
            lambda pictures: service.to_dict(classify(pictures, False)),
            asked,
            given,
            preprocess=False,
            api_name="predict",
        )
    page.preprocess_data = functools.partial(_quiet, gradio.Error, page.preprocess_data)
    page.queue(max_size=64)
    # Of 2,000 clients Gradio would keep the answers that nobody fetches, megabytes each.
    page._queue.pending_messages_per_session.max_size = 64
    return page


async def _quiet(error, preprocess, *args, **options):
    """Gradio's check of what a program sends; what is wrong with that is no fault of the server."""
    try:
        return await preprocess(*args, **options)
    except Exception as wrong:
        raise error(reason_of(wrong), print_exception=False) from None


def _is_inside(path: Path, folder: str) -> bool:
    try:
        return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))
    except ValueError:  # a NUL
        return False


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the same file, uploaded twice at the same time
        raise DataError("The upload is no longer there; give it again.") from None


# --- the application -----------------------------------------------------------------------------


def build_app(
    model: keras.Model | Runner | str | os.PathLike,
    *,
    limits: Limits | None = None,
    engine: str = "keras",
    hosts: Sequence[str] | None = LOOPBACK,
    pixels: str | None = None,
    min_confidence: float = 0.0,
) -> Any:
    """The page and the endpoint as an ASGI application, for a server of your own.

    Sets Gradio's environment variables for the process: no analytics, and a folder for uploads
    that is removed when the application ends.

    Args:
        model: A model, a `.keras` file, a run folder, an exported file or a `Runner`.
        limits: What an upload may be at most.
        engine: What runs the model: see `open_runner`.
        hosts: Names under which the server may be asked (a page elsewhere cannot pretend to be it
            by pointing its own name here), beside numeric addresses; `None` for any.
        pixels: As for `predict`.
        min_confidence: As for `predict`.

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
    require("gradio", "serve", "serve")
    import fastapi
    import gradio

    service = open_service(model, engine, limits, pixels, min_confidence)
    folder = tempfile.mkdtemp(prefix="keras-resnet-serve-")
    os.environ["GRADIO_TEMP_DIR"] = folder

    @contextlib.asynccontextmanager
    async def lifespan(app):
        sweeper = asyncio.create_task(_sweep(folder, page))
        yield
        sweeper.cancel()
        shutil.rmtree(folder, ignore_errors=True)

    # Its own pages of documentation would come with scripts from elsewhere.
    app = fastapi.FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, limits=limits, folder=folder, hosts=hosts)
    _add_endpoint(app, service)
    page = _page(gradio, service, folder)
    # Gradio's other themes fetch fonts.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gradio.mount_gradio_app(
        app,
        page,
        path="/",
        js=_PASTE,
        theme=gradio.themes.Default(primary_hue="indigo", **fonts),
        max_file_size=limits.request_bytes,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        show_error=True,
    )


async def _sweep(folder: str, page, every: float = 60, age: float = 600) -> None:
    """Deletes uploads that nothing was ever asked of, and what a broken connection left."""
    while True:
        await asyncio.sleep(every)
        page.upload_file_set.clear()  # Gradio's list of all there ever were
        for path in Path(folder).rglob("*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - age:
                    path.rmdir() if path.is_dir() else path.unlink()


def _add_endpoint(app, service: Service) -> None:
    import anyio
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    # One request's images are decoded while another's are classified; more would only take memory.
    few = anyio.CapacityLimiter(2)

    async def health(request):
        return JSONResponse({"status": "ok", "model": service.name})

    async def predict(request):
        address = str(request.base_url).rstrip("/")
        usage = f"Send images as a form: curl -F pictures=@cat.jpg {address}/predict"
        if request.method != "POST":
            return JSONResponse({"error": usage}, 405, {"Allow": "POST"})
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return JSONResponse({"error": f"This is no form. {usage}"}, 415)
        try:
            # Its temporary files go when it closes.
            async with request.form(max_files=4 * service.limits.pictures, max_fields=16) as form:
                found = [v for v in form.getlist("pictures") if not isinstance(v, str)]
                if not found:
                    return JSONResponse({"error": f"There is no image in it. {usage}"}, 400)
                uploads = [(file.filename, file.file.read) for file in found]
                run = functools.partial(service.results, uploads, False)
                results = await anyio.to_thread.run_sync(run, limiter=few)
        except HTTPException as error:
            return JSONResponse({"error": f"{error.detail} {service.limits}"}, 400)
        return JSONResponse(service.to_dict(results))

    app.add_route("/health", health)
    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    app.add_route("/predict", predict, methods=methods)


# --- the server ----------------------------------------------------------------------------------


def serve(
    model: keras.Model | Runner | str | os.PathLike,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    limits: Limits | None = None,
    engine: str = "keras",
    pixels: str | None = None,
    min_confidence: float = 0.0,
) -> None:
    """Serves a page on which people try the model, until Ctrl-C or SIGTERM; the second is at once.

    `POST /predict` beside it answers programs, and `GET /health` those that watch over it. Nothing
    is sent anywhere, and nothing is kept. Requests under way are finished before it ends.

    Args:
        model: A model, a `.keras` file, a run folder, an exported file or a `Runner`.
        host: Where to listen; other machines can reach the page only if it is not 127.0.0.1.
        port: Where to listen; 0 takes a free one.
        limits: What an upload may be at most.
        engine: What runs the model: see `open_runner`.
        pixels: As for `predict`.
        min_confidence: As for `predict`.

    Raises:
        InputError: The port is taken; the model has no head, or names no preprocessing.
        NotFoundError: There is no such file.
        MissingDependencyError: Gradio is not installed.
    """
    require("gradio", "serve", "serve")
    with _listen(host, port) as listener:
        port = listener.getsockname()[1]
        local = host in LOOPBACK
        name = socket.gethostname().lower()
        hosts = LOOPBACK if local else (*LOOPBACK, host.lower(), name, f"{name}.local")
        app = build_app(
            model, limits=limits, engine=engine, hosts=hosts, pixels=pixels,
            min_confidence=min_confidence,
        )  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else shown
        print(f"Serving at http://{shown}:{port} (Ctrl-C stops)", flush=True)
        if not local:
            print("Whoever reaches this machine can use it: there is no password.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
            _run(app, listener)


def _run(app, listener: socket.socket) -> None:
    """Serves until a signal comes; after it, what has begun is finished."""
    import uvicorn

    folder = os.environ["GRADIO_TEMP_DIR"]
    # Each malformed request is a warning.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):
            if self.should_exit:
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(128 + sig)
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets=None):
            app.routes[-1].app.stop_event.set()  # Gradio's, which lets go of pages that are open
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        http=patient_connection(),
        ws="none",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=30,
    )
    Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 65536:
        raise InputError(f"The port must be from 0 to 65535. Received: {port}.")
    kind, flags = socket.SOCK_STREAM, socket.AI_PASSIVE
    try:
        family, *_, address = socket.getaddrinfo(host or None, port, type=kind, flags=flags)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"There is no address of the name {host!r} here: {error}.") from None
    try:
        return socket.create_server(
            address, family=family, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise InputError(
            f"Cannot listen on {host}:{port}: {os.strerror(error.errno)}. Give another --port (0 "
            "for a free one) or --host."
        ) from None
