"""The demo's page and its server."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Future
from html import escape
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # a table of so many requests, made anew after each

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sdguard.demo import calibrate_tab, generate_tab, geometry_tab, scan_tab, why_tab
from sdguard.demo.clients import Listeners
from sdguard.demo.comparison import Comparison
from sdguard.demo.model import Model
from sdguard.demo.opening import begin_opening, opening_prompts
from sdguard.demo.page import INTERNAL, ROOM, prompt_box
from sdguard.demo.settings import LARGEST_BODY, LARGEST_FILE

STYLE = Path(__file__).with_name("style.css")
HEADER = (
    '<header class="sg-header"><h1>sdguard</h1><p>See a text-to-image model give back a training picture, see the guard catch it '
    "before the first denoising step, and look at why.</p></header>"
)
FOOTER = '<div class="sg-footer">Running {model} on this machine; nothing is sent elsewhere. <a href="?view=api">Use it as an API</a></div>'
#: the page asks nobody but its own server for anything; who may show it within a page of theirs is said at the end.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; base-uri 'self'; form-action 'self'; frame-ancestors "
)

#: of a content security policy: the page's own site.
OWN = "'self'"
TOO_LARGE = f"A request of more than {LARGEST_BODY / 1e6:.1f} MB is not taken."
UNREADABLE = "What was sent is not of the form that is asked for here; ?view=api says what is."
#: of glibc's malloc.h.
M_ARENA_MAX = -8
#: sessions whose own profile and boxes are kept, the newest.
MOST_SESSIONS = 1000
LOOPBACK = ["127.0.0.1", "localhost"]

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]


class TooLarge(Exception):
    """Ends the reading of a body that is larger than is taken, and has been refused."""


class Shield:
    """ASGI middleware: tells browsers to load nothing from elsewhere, fetches other sites' files for nobody, takes no body of any size.

    ``frames`` are the sites that may show the page within their own, as a content security policy names them.
    """

    def __init__(self, app: Any, frames: str = OWN) -> None:
        self.app, self.policy = app, POLICY + frames

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused, taken = False, 0

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [
                    (b"content-security-policy", self.policy.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        async def unless_refused(message: Message) -> None:
            if not refused:
                await answer(message)

        async def refuse(status: int, why: str) -> None:
            nonlocal refused
            refused = True
            await answer({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
            await answer({"type": "http.response.body", "body": why.encode()})

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > LARGEST_BODY:
                await refuse(413, TOO_LARGE)
                raise TooLarge
            return message

        _, _, file = scope["path"].partition("file=")
        if "://" in file or file.startswith(("http:", "https:")):
            await refuse(403, "This server fetches nothing from elsewhere.")
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > LARGEST_BODY:
            await refuse(413, TOO_LARGE)
            return
        with contextlib.suppress(TooLarge):
            await self.app(scope, counted, unless_refused)


def names_of(host: str) -> list[str]:
    """Under which names the server at an address is asked for.

    One that this machine alone reaches is asked for as such: a page elsewhere whose name was made to resolve here is not let in. One that
    others reach has names that only its owner knows.
    """
    return LOOPBACK if host in LOOPBACK else ["*"]


class Page(gr.Blocks):
    """A page whose every error is one sentence to whoever asked, what its components cannot read among them."""

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().preprocess_data(*args, **kwargs)
        except Exception:
            raise gr.Error(UNREADABLE, print_exception=False) from None

    async def process_api(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().process_api(*args, **kwargs)
        except gr.Error:
            raise
        except Exception:
            logger.exception("sdguard demo")
            raise gr.Error(INTERNAL, print_exception=False) from None


def build(model: Model, opening: Future[list[Comparison]] | None = None) -> gr.Blocks:
    """The page on a model, which opens on ``opening`` once that is there."""
    with Page(title="sdguard", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(HEADER)
        own_profile = gr.State(None)
        first, ordinary = (next(e.text for e in model.examples if e.kind == kind) for kind in (model.examples[0].kind, "ordinary"))
        box = prompt_box("generate", "Prompt", first)
        box.unrender()
        why_box = prompt_box("why", "Prompt", first)
        why_box.unrender()
        with gr.Tabs(elem_classes="sg-tabs"):
            with gr.Tab("Generate", id="generate"):
                setting = generate_tab.tab(model, box, own_profile, why_box, page.load, opening)
            with gr.Tab("Why", id="why"):
                why_tab.tab(model, why_box, own_profile, setting)
            with gr.Tab("Geometry", id="geometry"):
                geometry_tab.tab(model, (first, ordinary), own_profile, setting)
            with gr.Tab("Scan", id="scan"):
                scan_tab.tab(model, own_profile, setting)
            with gr.Tab("Calibrate", id="calibrate") as last:
                calibrate_tab.tab(model, [page.load, last.select], own_profile, setting)
        gr.HTML(FOOTER.format(model="the embedded model" if model.name == "embedded" else escape(model.name)))
        generate_tab.endpoint(model)
    return page


def theme() -> gr.themes.Base:
    """Calm, and of fonts that are here already."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "DejaVu Sans Mono", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_500",
        block_label_text_color="*neutral_600",
        block_border_width="1px",
        block_shadow="none",
        button_large_radius="*radius_md",
    )


def few_heaps() -> None:
    """Let glibc's malloc have two heaps for all threads, not eight a core: each keeps what the largest run in it needed, for good."""
    with contextlib.suppress(AttributeError, TypeError):  # of another libc, or none
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def launch(model: Model, host: str, port: int, wait: bool = True, frames: str = OWN) -> gr.Blocks:
    """Serve the page on a model, until it is interrupted where ``wait``, else from threads beside this one; returns the page.

    ``frames`` as `Shield` has it.
    """
    page = build(model, begin_opening(model) if opening_prompts(model) else None)
    page.queue(max_size=ROOM["concurrency_limit"], api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        theme=theme(),
        css_paths=STYLE,
        max_file_size=LARGEST_FILE,
        max_threads=ROOM["concurrency_limit"] + 32,  # those that wait for their turn hold one each
        state_session_capacity=MOST_SESSIONS,
        allowed_paths=None,
        share=False,
        show_error=True,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,  # whose page could have runs kept in a bucket elsewhere
        footer_links=[],
        prevent_thread_lock=not wait,
        quiet=not wait,
        app_kwargs={
            "middleware": [
                Middleware(TrustedHostMiddleware, allowed_hosts=names_of(host)),
                Middleware(Shield, frames=frames),
                Middleware(Listeners),
            ]
        },
    )
    return page


def serve(model_name: str = "embedded", host: str = "127.0.0.1", port: int = 7860, frames: str = OWN) -> None:
    """Load a model and serve the page until it is interrupted, as `launch` does; raises `BadInput` where the model cannot be loaded."""
    few_heaps()
    model = Model.load(model_name)
    with tempfile.TemporaryDirectory(prefix="sdguard-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        launch(model, host, port, frames=frames)
