"""The page of `distill play`: what is shown while models load, and the Gradio page over the engine.

The page of `distill play` before there is one: it opens at once and says what is being loaded.

    with WaitingPage(bound, "checkpoints/demo") as waiting:
        waiting.says("loading base")
        ...                              # imports and weights: several seconds
    # now somebody else may serve the same socket; the browser asks again every second and finds the real page

Nothing heavy is imported here. It answers on the loopback address only and under its names only, without a script.

The page of `distill play`: a local Gradio page over the engine of distill/play/engine.py.

    distill play checkpoints/demo                # prints http://127.0.0.1:7860/, ends with Ctrl-C

It binds to the loopback address alone, has no share link, sends no telemetry and fetches nothing from outside: the
theme uses the system's fonts, and a Content-Security-Policy tells the browser to refuse every other host. Requests
under another host name (a web page that points its own name at this machine) are refused as well.

It opens at once: until PyTorch, Gradio and the models are there, a first page says how far that is. Then the
first example is asked by itself. A question that the embedded models were never trained on is told so instead of
being answered; asking it again answers it all the same.

Needs the extra `play`. Gradio serves it under an application of ours instead of its own `launch`, which looks for
new versions, tunnels and notebooks first.
"""

import html
import importlib.util
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.play.records import Asked, Change, Compared, Finished, examples, find_setup
from distill.report.pages import called, html_language, say, speak
from distill.storage import resolve_model

if TYPE_CHECKING:
    from distill.play.engine import Playground

NAMES = ("127.0.0.1", "localhost")
AGAIN = 1  # seconds after which the browser asks again
WAITING_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
_PAGE = """<!DOCTYPE html>
<html lang="{language}"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{again}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>distill play</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 17px/1.6 system-ui, "Segoe UI", Roboto, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
  max-width: 38rem; margin: 12vh auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.3rem; }} li.now {{ font-weight: 700; }} li.done {{ opacity: .65; }}
</style></head>
<body><h1>distill play · {title}</h1><p>{lead}</p><ol>{lines}</ol></body></html>
"""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Quiet where the browser went away before it was answered: it does that whenever it asks again."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class WaitingPage:
    """Serves `bound`, a listening socket, until the block ends; the socket stays open. Errors of the block go on."""

    def __init__(self, bound: socket.socket, title: str):
        self.title = title
        self.lines: list[tuple[str, float]] = []
        waiting = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 2  # a browser that opens a connection and says nothing must not hold the page up

            def do_GET(self):
                host = (self.headers.get("Host") or "").rpartition(":")[0]
                status, body = (200, waiting.page()) if host in NAMES else (400, "")
                self.send_response(status)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Security-Policy", WAITING_POLICY)
                self.send_header("Cache-Control", "no-store")
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        self._server = _Server(bound.getsockname(), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = bound
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def says(self, line: str) -> None:
        """What is being done now; what was done before counts as finished."""
        self.lines.append((line, time.monotonic()))

    def page(self) -> str:
        now = time.monotonic()
        ends = [*(begun for _, begun in self.lines[1:]), now]
        lines = "".join(
            f"<li class='{'now' if place == len(self.lines) - 1 else 'done'}'>{html.escape(line)} "
            f"({html.escape(say('%(seconds)s s', seconds=f'{end - begun:.1f}'))})</li>"
            for place, ((line, begun), end) in enumerate(zip(self.lines, ends))
        )
        lead = say("The models are being loaded. This page then opens by itself.")
        return _PAGE.format(
            language=html_language(),
            again=AGAIN,
            title=html.escape(self.title),
            lead=html.escape(lead),
            lines=lines,
        )

    def __enter__(self) -> "WaitingPage":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._thread.join()


# ==== The page of `distill play` ====

HOST, PORT = "127.0.0.1", 7860
REDRAW = 0.12  # seconds between two drawings of answers in progress
KEPT = 12  # rounds in the table of earlier ones
QUESTION_LIMIT = 4000  # characters of a question
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; "
    "form-action 'self'; object-src 'none'"
)


def require_gradio() -> None:
    """Raises UserError where the extra is missing. Called before any model is loaded."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("distill play needs an extra: pip install 'distill-demo[play]'")


def bind(port: int) -> socket.socket:
    """A listening socket on the loopback address; port 0 is any free one. UserError where it is taken."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
        bound.listen()
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port {port}: {reason}; give another, or --port 0 for any that is free") from None
    return bound


def play(
    targets: list[str],
    teacher: str | None = None,
    tasks: list[str] | None = None,
    port: int = PORT,
    max_new_tokens: int | None = None,
    language: str = "en",
) -> None:
    """The command: everything that can be wrong first, then the models, then the page until Ctrl-C.

    Raises UserError for a missing extra, a port that is taken, a run without a student, models that do not load.
    """
    require_gradio()
    speak(language)
    with bind(port) as bound:
        setup = find_setup(targets, teacher, tasks, max_new_tokens)
        problems = [line for path in dict.fromkeys(setup.checkpoints.values()) for line in _problems(path)]
        if problems:
            raise UserError(*problems)
        print(
            f"http://{HOST}:{bound.getsockname()[1]}/    {', '.join(setup.checkpoints)}; opens now, answers when the "
            "models are loaded; Ctrl-C ends",
            flush=True,
        )
        with WaitingPage(bound, setup.title) as waiting:
            page = _load(setup, waiting)
        page.run(sockets=[bound])


def _load(setup, waiting: WaitingPage):
    """The `uvicorn.Server` of the whole page.

    One import after the other: two threads that import at once share one interpreter lock and gain little.
    """
    waiting.says(say("PyTorch and Transformers"))
    from distill.console import quiet_libraries
    from distill.devices import pick_device
    from distill.models.load import check_model
    from distill.play.engine import Playground

    quiet_libraries()
    problems = []
    for path in dict.fromkeys(setup.checkpoints.values()):
        try:
            check_model(path)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)

    def on_load(name: str) -> None:
        waiting.says(say("%(model)s, from %(path)s", model=called(name), path=setup.checkpoints[name]))

    playground = Playground(setup, pick_device(), on_load)
    waiting.says(say("the page"))
    return server(playground)


def _problems(path: str) -> list[str]:
    """What can be told of a checkpoint without importing anything heavy; `check_model` tells the rest."""
    try:
        resolve_model(path)
    except UserError as error:
        return error.problems
    return []


def server(playground: "Playground"):
    """A `uvicorn.Server` of the page; `run(sockets=[bind(port)])` serves it until interrupted."""
    app = build_app(playground)
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))


def build_app(playground: "Playground"):
    """The page as an ASGI application: Gradio mounted at /, under the rules of this module."""
    gradio = _gradio()
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from distill.report.pages import TEMPLATES

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_WithPolicy)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gradio.themes.Base(
        primary_hue="blue", font=fonts, font_mono=["ui-monospace", "Menlo", "monospace"]
    )
    return gradio.mount_gradio_app(
        app,
        build_play_page(playground),
        path="/",
        server_name=HOST,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme,
        css=(TEMPLATES / "play.css").read_text(encoding="utf-8"),
    )


def _gradio():
    """The package, told before its import that it may not phone home."""
    require_gradio()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio

    return gradio


class _WithPolicy:
    """Adds the headers that keep the browser at home. Plain ASGI: answers are streamed."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_headers(message):
            if message["type"] == "http.response.start":
                added = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


# ---------------------------------------------------------------------------------------------- the page


def build_play_page(playground: "Playground"):
    """The `gradio.Blocks`: examples, controls, answers, one token, earlier rounds. The first example is asked."""
    gr = _gradio()
    from distill.play import html as play_html
    from distill.report.pages import TEMPLATES

    controls = Controls(playground)
    script = (TEMPLATES / "play.js").read_text(encoding="utf-8")
    title, first = playground.setup.title, next(iter(controls.examples), "")
    with gr.Blocks(title=f"distill play: {title}", analytics_enabled=False) as page:
        asked, rounds = gr.State(None), gr.State([])
        gr.HTML(
            f"<h1>distill play</h1><p>{play_html.escape(title)}</p>",
            elem_classes="play-title",
            apply_default_css=False,
        )
        with gr.Row(elem_id="examples", visible=bool(controls.examples)):
            clicked = [
                gr.Button(text, size="sm", elem_classes="example", min_width=120)
                for text in controls.examples
            ]
        with gr.Row():
            question = gr.Textbox(first, label=say("Problem"), placeholder="What is 2381 + 4410?",
                                  max_length=QUESTION_LIMIT, elem_id="question", scale=4, min_width=280)  # fmt: skip
            pick = gr.Dropdown(controls.problems, value=None, label=say("or pick a held-out one"), elem_id="pick",
                               visible=bool(controls.problems), scale=4, min_width=280)  # fmt: skip
            ask = gr.Button(say("Ask"), variant="primary", elem_id="ask", scale=1, min_width=110)
            stop = gr.Button(say("Stop"), elem_id="stop", scale=1, min_width=110)
        with gr.Row():
            temperature = gr.Slider(0, 1.5, 0, step=0.05, label=say("Temperature (0: greedy)"),
                                    elem_id="temperature", scale=3, min_width=260)  # fmt: skip
            seed = gr.Number(0, label=say("Seed"), precision=0, elem_id="seed", scale=1, min_width=90)
            whose = gr.Dropdown([(called(name), name) for name in controls.routed], value=controls.first,
                                label=say("Experts of"), elem_id="whose", visible=len(controls.routed) > 1,
                                scale=2, min_width=140)  # fmt: skip
            top_k = gr.Slider(**controls.top_k(controls.first), elem_id="top_k", scale=3, min_width=260)
            drop = gr.Dropdown(**controls.drop(controls.first), multiselect=True, elem_id="drop",
                               scale=3, min_width=260)  # fmt: skip
        answers = gr.HTML(play_html.welcome(), js_on_load=script, elem_id="answers", apply_default_css=False)
        look = gr.HTML("", js_on_load=script, elem_id="look", apply_default_css=False)
        earlier = gr.HTML("", js_on_load=None, elem_id="earlier", apply_default_css=False)

        given = [question, temperature, seed, whose, top_k, drop, rounds, asked]
        shown = [answers, look, earlier, asked, rounds]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        run = {"fn": controls.ask, "inputs": given, "outputs": shown, "concurrency_id": "models", **quiet}
        asking = [ask.click(**run), question.submit(**run)]
        if first:
            asking.append(page.load(**run))
        for button, text in zip(clicked, controls.examples):
            chosen = button.click(lambda text=text: text, None, question, queue=False, **quiet)
            asking.append(chosen.then(**run))

        def on_look(asked, event: gr.EventData):
            return controls.look(asked, event.model, event.place)

        def on_drop(whose, dropped, event: gr.EventData):
            return controls.dropped(whose, dropped, event.model, event.layer, event.expert)

        answers.look(on_look, asked, look, queue=False, **quiet)
        dropped = look.drop(on_drop, [whose, drop], [whose, top_k, drop], queue=False, **quiet)
        asking.append(dropped.then(**run))
        stop.click(None, cancels=asking, queue=False, **quiet)
        pick.input(lambda chosen: chosen or "", pick, question, queue=False, **quiet)
        whose.input(controls.changed_model, whose, [top_k, drop], queue=False, **quiet)
    page.queue(default_concurrency_limit=1)
    return page


class Controls:
    """What the page's events call. Values come from a browser: everything is checked again."""

    def __init__(self, playground: "Playground"):
        from distill.play import html

        self.playground, self.html = playground, html
        self.examples = examples(playground.setup.problems)
        self.problems = [(_label(p), text) for text, p in playground.problems.items()]
        self.routed = [player.name for player in playground.routed]
        # The teacher's experts first: dropping one shows what is learned from.
        self.first = "teacher" if "teacher" in self.routed else next(iter(self.routed), None)

    def top_k(self, model: str | None) -> dict[str, Any]:
        """Properties of the slider for experts per token of one model."""
        if model is None:
            return {"minimum": 1, "maximum": 2, "value": 1, "visible": False, "label": ""}
        router = self.playground.players[model].routers[0]
        label = say("Experts per token of %(model)s", model=called(model))
        return {
            "minimum": 1, "maximum": router.num_experts, "value": router.top_k, "step": 1, "label": label,
            "visible": True,
        }  # fmt: skip

    def drop(self, model: str | None) -> dict[str, Any]:
        """Properties of the list of experts to drop from one model."""
        if model is None:
            return {"choices": [], "value": [], "visible": False, "label": ""}
        player = self.playground.players[model]
        labels = self.html.labels_of(player)
        choices = [
            (say("%(layer)s expert %(e)s", layer=labels[router.name], e=e), f"{router.name}:{e}")
            for router in player.routers
            for e in range(router.num_experts - router.null_experts)
        ]
        return {"choices": choices, "value": [], "label": say("Dropped experts of %(model)s", model=called(model)),
                "visible": True}  # fmt: skip

    def changed_model(self, model: str):
        gr = _gradio()
        return gr.update(**self.top_k(model)), gr.update(**self.drop(model))

    def changes(self, model: str | None, top_k: float | None, dropped: list[str] | None) -> dict[str, Change]:
        """The change of routing that the controls say, by model."""
        if model not in self.routed:
            return {}
        own = self.playground.players[model].routers[0].top_k
        found: dict[str, list[int]] = {}
        for text in dropped or []:
            layer, _, expert = text.rpartition(":")
            found.setdefault(layer, []).append(int(expert))
        change = Change(int(top_k) if top_k and int(top_k) != own else None, found)
        return {model: change} if change else {}

    def ask(self, question, temperature, seed, whose, top_k, dropped, rounds, before=None) -> Iterator[tuple]:
        """Stream one round: (answers, token, earlier rounds, the round, the list of rounds).

        `before`: the last round, or the question that was told to be outside what the models know.
        """
        gr, html = _gradio(), self.html
        skip = gr.skip()
        question = (question or "").strip()[:QUESTION_LIMIT]
        if not question:
            yield html.welcome(), skip, skip, skip, skip
            return
        if self.playground.narrow and not self.playground.reference(question) and before != question:
            yield html.outside(question, next(iter(self.examples), None)), "", skip, question, skip
            return
        changes = self.changes(whose, top_k, dropped)
        asked = self.playground.begin(
            question, temperature=float(temperature or 0), seed=int(seed or 0), changes=changes
        )
        yield html.cards(asked, self.playground), "", skip, asked, skip
        drawn = time.monotonic()
        for event in self.playground.answer(asked):
            if isinstance(event, Finished | Compared) or time.monotonic() - drawn > REDRAW:
                yield html.cards(asked, self.playground), skip, skip, skip, skip
                drawn = time.monotonic()
        rounds = [*rounds, asked][-KEPT:]
        picked = html.first_to_look_at(asked)
        yield (
            html.cards(asked, self.playground, picked),
            html.panel(asked, self.playground, *picked) if picked else "",
            html.history(rounds, self.playground),
            asked,
            rounds,
        )

    def look(self, asked: Asked | str | None, model: str, place: int) -> str:
        """The token that was clicked."""
        known = isinstance(asked, Asked)
        return self.html.panel(asked, self.playground, model, int(place)) if known else ""

    def dropped(self, whose: str | None, dropped: list[str] | None, model: str, layer: str, expert: int):
        """The controls after an expert was clicked: it is dropped, beside others of the same model."""
        gr = _gradio()
        entry = f"{layer}:{int(expert)}"
        if model not in self.routed or entry not in [v for _, v in self.drop(model)["choices"]]:
            return gr.skip(), gr.skip(), gr.skip()
        if model == whose:
            return gr.skip(), gr.skip(), gr.update(value=list(dict.fromkeys([*(dropped or []), entry])))
        return model, gr.update(**self.top_k(model)), gr.update(**{**self.drop(model), "value": [entry]})


def _label(problem: dict) -> str:
    """One line for a problem to pick."""
    text = " ".join(problem["messages"][-1]["content"].split())
    kind = " · ".join(called(word) for word in (problem["level"], problem["family"]) if word != "all")
    text = text if len(text) <= 100 else f"{text[:99]}…"
    return f"{kind} · {text}" if kind else text
