"""The page of `distill play` before there is one: it opens at once and says what is being loaded.

    with WaitingPage(bound, "checkpoints/demo") as waiting:
        waiting.says("loading base")
        ...                              # imports and weights: several seconds
    # now somebody else may serve the same socket; the browser asks again every second and finds the real page

Nothing heavy is imported here. It answers on the loopback address only and under its names only, without a script.
"""

import html
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket

from distill.report.words import html_language, say

NAMES = ("127.0.0.1", "localhost")
AGAIN = 1  # seconds after which the browser asks again
POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
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


class WaitingPage:
    """Serves `bound`, a listening socket, until the block ends; the socket stays open. Errors of the block go on."""

    def __init__(self, bound: socket, title: str):
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
                self.send_header("Content-Security-Policy", POLICY)
                self.send_header("Cache-Control", "no-store")
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(bound.getsockname(), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = bound
        self._server.daemon_threads = True
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
