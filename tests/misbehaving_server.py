"""A small OpenAI-compatible server that misbehaves as told, request by request, on a free port of 127.0.0.1.

    with MisbehavingServer(lambda question, attempt: "500" if attempt == 0 else "ok") as server:
        server.base_url; server.requests      # every request as (question, seed, what it got)

An attempt is the how-manyth request with this question and seed, from 0. The good answer names both.
"""

import gzip
import io
import json
import threading
import time
from collections import Counter
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(content, finish_reason="stop", **message) -> dict:
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "finish_reason": finish_reason, "logprobs": None,
                     "message": {"role": "assistant", "content": content, **message}}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }  # fmt: skip


@cache
def bomb() -> bytes:
    """60 MB of spaces around nothing, in 0.06 MB."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
        for _ in range(60):
            file.write(b" " * 10**6)
    return buffer.getvalue()


# Odd `logprobs` of a choice whose text is sound: the field is lost, the answer is not.
ODD_LOGPROBS = {
    "number": {"content": 5},
    "text": {"content": "abc"},
    "list": [1, 2],
    "word": "none",
    "object": {"content": {"logprob": -1}},
    "nothing_in_it": {"content": [None]},
    "huge_integer": {"content": [{"logprob": -(10**400)}]},
    "nan": {"content": [{"logprob": float("nan")}]},
    "minus_infinity": {"content": [{"logprob": float("-inf")}]},
    "beyond_float32": {"content": [{"logprob": -1e300}]},
    "above_zero": {"content": [{"logprob": 3.5}]},
    "truth": {"content": [{"logprob": True}]},
    "mixed": {"content": [{"logprob": -0.5}, {"token": "x"}]},
}


def good_text(question: str, seed: int) -> str:
    return f"answer to {question} with {seed}"


class MisbehavingServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, script, delay: float = 0.0, answer=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.delay, self.answer = script, delay, answer
        self.requests: list[tuple[str, int, str]] = []
        self.bodies: list[dict] = []
        self.times: list[float] = []
        self.attempts: Counter = Counter()
        self.running = self.peak = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.elsewhere = ""  # another server's base_url
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that gave up waiting


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each time
    server: MisbehavingServer

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question, seed, server = body["messages"][-1]["content"], body["seed"], self.server
        with server.lock:
            attempt = server.attempts[question, seed]
            server.attempts[question, seed] += 1
            server.running += 1
            server.peak = max(server.peak, server.running)
        told = server.script(question, attempt)
        with server.lock:
            server.requests.append((question, seed, told))
            server.bodies.append(body)
            server.times.append(time.monotonic())
        if server.delay:
            time.sleep(server.delay)
        with server.lock:
            server.running -= 1
        self.question, self.seed, self.body = question, seed, body
        if told.startswith("odd:"):
            return self.tell_odd(told.removeprefix("odd:"))
        getattr(self, f"tell_{told}", lambda: self.tell_status(int(told)))()

    def send(self, status: int, body, headers: dict | None = None, length: int | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length if length is not None else len(data)))
        self.end_headers()
        self.wfile.write(data)

    def tell_ok(self):
        answer = self.server.answer or good_text
        self.send(200, completion(answer(self.question, self.seed)))

    def tell_status(self, status: int):
        self.send(status, {"error": {"message": f"told to say {status}", "code": None}})

    def tell_429(self):
        self.send(429, {"error": {"message": "slow down"}}, {"Retry-After": "1"})

    def tell_tomorrow(self):
        self.send(429, {"error": {"message": "daily quota"}}, {"Retry-After": "86400"})

    def tell_quota(self):
        self.send(429, {"error": {"message": "no credit", "code": "insufficient_quota"}})

    def tell_hang(self):
        self.server.closing.wait(20)
        self.close_connection = True

    def tell_drip(self):
        """A byte now and then, for ever: no timeout between bytes would notice."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        while not self.server.closing.wait(0.05):
            self.wfile.write(b" ")
        self.close_connection = True

    def tell_cut(self):
        data = json.dumps(completion("cut off")).encode()
        self.send(200, data[: len(data) // 2], length=len(data))
        self.close_connection = True

    def tell_cut_quietly(self):
        """Half an answer that claims to be whole."""
        data = json.dumps(completion("cut off")).encode()
        self.send(200, data[: len(data) // 2])

    def tell_reset(self):
        self.close_connection = True

    def tell_page(self):
        self.send(200, b"<html>busy</html>", {"Content-Type": "text/html"})

    def tell_not_json(self):
        self.send(200, b'{"choices": [}')

    def tell_no_choice(self):
        self.send(200, {"choices": [], "error": {"message": "upstream gave up"}})

    def tell_null(self):
        self.send(200, completion(None))

    def tell_latin1(self):
        self.send(200, json.dumps(completion("caf?")).encode().replace(b"caf?", b"caf\xe9"))

    def tell_surrogate(self):
        self.send(200, completion("half a pair \ud83d"))

    def tell_abort(self):
        self.send(200, completion("unfinished", "abort"))

    def tell_filtered(self):
        self.send(200, completion("", "content_filter"))

    def tell_echo(self):
        """An error that repeats what the client sent, as gateways in debug mode do."""
        self.send(500, {"error": {"message": f"failed with headers {dict(self.headers)}"}})

    def tell_echo_ok(self):
        self.send(200, completion(f"you sent {self.headers['Authorization']}"))

    def tell_echo_page(self):
        """The key lies across the length at which messages are cut."""
        page = "x" * 170 + f" {self.headers['Authorization']} " + "x" * 4000
        self.send(400, page.encode(), {"Content-Type": "text/html"})

    def tell_echo_401(self):
        self.send(401, {"error": {"message": f"bad key: {self.headers['Authorization']}"}})

    def tell_newer(self):
        """A server that knows `max_completion_tokens` alone."""
        if "max_tokens" in self.body:
            return self.send(400, {"error": {"message": "max_tokens unsupported: use max_completion_tokens"}})
        return self.tell_ok()

    def tell_logprobs(self):
        reply = completion("two words")
        values = [{"token": t, "logprob": v} for t, v in (("two", -0.5), (" words", -1.25))]
        reply["choices"][0]["logprobs"] = {"content": values}
        self.send(200, reply)

    def tell_endless(self):
        """10^9 bytes, or as many as are taken."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(10**9))
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b" " * 10**6)

    def tell_endless_error(self):
        self.send_response(500)
        self.send_header("Content-Length", str(10**9))
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b"x" * 10**6)

    def tell_bomb(self):
        self.send(200, bomb(), {"Content-Encoding": "gzip"})

    def tell_two_bombs(self):
        self.send(200, bomb(), {"Content-Encoding": "gzip, gzip"})

    def tell_error_bomb(self):
        self.send(500, bomb(), {"Content-Encoding": "gzip"})

    def tell_no_gzip(self):
        self.send(200, b"{}", {"Content-Encoding": "gzip"})

    def tell_brotli(self):
        self.send(200, b"{}", {"Content-Encoding": "br"})

    def tell_packed(self):
        """Sound, and packed although nobody asked for that."""
        reply = json.dumps(completion((self.server.answer or good_text)(self.question, self.seed))).encode()
        self.send(200, gzip.compress(reply), {"Content-Encoding": "gzip"})

    def tell_elsewhere(self):
        self.send(307, b"", {"Location": f"{self.server.elsewhere}/chat/completions"})

    def tell_round(self):
        self.send(307, b"", {"Location": self.path})

    def tell_aside(self):
        """A redirect that stays at home."""
        if self.path.endswith("/there"):
            return self.tell_ok()
        self.server.attempts[self.question, self.seed] -= 1  # the same request comes once more
        self.send(307, b"", {"Location": f"{self.path}/there"})

    def tell_no_address(self):
        self.send(307, b"", {"Location": "http://[::1"})

    def tell_deep(self):
        self.send(200, b"[" * 200_000)

    def tell_digits(self):
        self.send(200, b'{"choices": ' + b"9" * 5000 + b"}")

    def tell_array(self):
        self.send(200, [completion("x")])

    def tell_choice_text(self):
        self.send(200, {"choices": "abc"})

    def tell_message_list(self):
        reply = completion("x")
        reply["choices"][0]["message"] = ["x"]
        self.send(200, reply)

    def tell_reason_list(self):
        self.send(200, completion("x", ["stop"]))

    def tell_parts(self):
        self.send(200, completion([{"type": "text", "text": "x"}]))

    def tell_empty(self):
        self.send(200, b"")

    def tell_no_content(self):
        self.send_response(204)
        self.end_headers()

    def tell_charset(self):
        self.send(500, b"zz", {"Content-Type": "text/html; charset=hex"})

    def tell_error_list(self):
        self.send(500, [{"error": {"code": ["insufficient_quota"]}}])

    def tell_odd_wait(self):
        self.send(503, {}, {"Retry-After": "Thu, 99 Foo 99999999 99:99:99 GMT"})

    def tell_odd(self, name):
        reply = completion((self.server.answer or good_text)(self.question, self.seed))
        reply["choices"][0]["logprobs"] = ODD_LOGPROBS[name]
        self.send(200, reply)
