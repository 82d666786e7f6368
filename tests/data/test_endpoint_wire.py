"""Misdeeds around the reply: framing, headers, packing, odd choices. One bad row each, its neighbours sound.

`test_endpoint.py` has what a server of the standard library can do wrong; here it writes its bytes itself.
"""

import gzip
import importlib.util
import json
import socket
import socketserver
import threading
import time
import zlib

import pytest

if importlib.util.find_spec("openai") is None:
    pytest.skip('needs pip install -e ".[endpoint]"', allow_module_level=True)

from misbehaving_server import completion, good_text

from distill.config.data import TeacherSection
from distill.data.endpoint import EndpointTeacher, asked_wait, read_reply
from distill.data.teachers import Answer, BadReply, Question
from distill.models.decode import Sampling

SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=20)


class WireServer(socketserver.ThreadingTCPServer):
    """`script(question)` gives a misdeed: bytes, or a function of (write, good reply); None answers well.

    Connections stay open as long as the client wants, so that what one reply has too much can reach the next.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), _Wire)
        self.script, self.heads, self.closing = script, [], threading.Event()
        self.base_url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass  # a client that has heard enough


class _Wire(socketserver.StreamRequestHandler):
    def handle(self):
        while True:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (line := self.rfile.readline()):
                    return
                head += line
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            asked = json.loads(self.rfile.read(length))
            question = asked["messages"][-1]["content"]
            self.server.heads.append(head)
            misdeed = self.server.script(question)
            reply = completion(good_text(question, asked["seed"]))
            if misdeed is None:
                self.wfile.write(whole(reply))
            else:
                misdeed(self, reply)
            if misdeed in CLOSES:
                return

    def for_ever(self, piece: bytes, pause: float = 0.0) -> None:
        while not self.server.closing.wait(pause):
            self.wfile.write(piece)


def whole(body, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = (f"HTTP/1.1 {status}", "Content-Type: application/json",
             f"Content-Length: {len(data) if length is None else length}", *headers)  # fmt: skip
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def sends(make):
    """A misdeed that is one piece of bytes, made from the good reply."""
    return lambda wire, reply: wire.wfile.write(make(reply))


def starts(first: bytes, piece: bytes, pause: float = 0.0):
    """A misdeed that does not end."""

    def misdeed(wire, _):
        wire.wfile.write(first)
        wire.for_ever(piece, pause)

    return misdeed


def text(reply) -> bytes:
    return json.dumps(reply).encode()


def packed(reply) -> bytes:
    return gzip.compress(text(reply), mtime=0)


def raw_deflate(reply) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(text(reply)) + packer.flush()


def labelled(encoding: str, make):
    """A body that claims to be packed so."""
    return sends(lambda reply: whole(make(reply), f"Content-Encoding: {encoding}"))


def body(make):
    return sends(lambda reply: whole(make(reply)))


def with_choice(**changes):
    """The reply with other fields of its choice, or, as `message_NAME`, of its message."""

    def make(reply):
        for name, value in changes.items():
            of_message = name.startswith("message_")
            place = reply["choices"][0]["message"] if of_message else reply["choices"][0]
            place[name.removeprefix("message_")] = value
        return reply

    return body(make)


def status(line: str, *headers: str, said=None):
    return sends(lambda _: whole(said or {}, *headers, status=line))


def reset(wire, _):
    wire.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


WRONG = completion("WRONG")["choices"]
PROTOCOL = "the connection failed (RemoteProtocolError)"
SLOW = "no answer within 0.5 s"
# What the row says: what the server does, by name. "" stands for an answer that is read as it should be.
KINDS = {
    PROTOCOL: {
        "a chunk's head that never ends": starts(CHUNKED + b"1;", b"a" * 65536),
        "trailers that never end": starts(CHUNKED + b"2\r\n{}\r\n0\r\n", b"x: y\r\n" * 1000),
        "a chunk of no size": sends(lambda _: CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n"),
        "a chunk of 10^21 bytes": sends(lambda _: CHUNKED + b"FFFFFFFFFFFFFFFFFF\r\nabc"),
        "chunks without their last": sends(lambda r: CHUNKED + b"%x\r\n%b\r\n" % (len(text(r)), text(r))),
        "a negative length": sends(lambda reply: whole(reply, length=-5)),
        "two lengths": sends(lambda reply: whole(reply, "Content-Length: 3")),
        "headers that never end": starts(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 1000),
        "a header that never ends": starts(b"HTTP/1.1 200 OK\r\nX-A: ", b"b" * 65536),
        "NUL in a header": sends(lambda reply: whole(reply, "X-A: b\0c")),
        "another protocol": sends(lambda _: b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
        "HTTP/2 unasked": sends(lambda _: b"\0\0\x12\x04" + b"\0" * 23),
        "a body alone": sends(text),
        "the end in the first line": sends(lambda _: b"HTTP/1.1 20"),
        "status abc": sends(lambda reply: whole(reply, status="abc")),
        "a redirect that forgets the question": status("303 Go", "Location: /v1/other"),
    },
    "the connection failed (": {"a reset": reset},
    SLOW: {
        "small chunks that never end": starts(CHUNKED, b"1\r\n \r\n", 0.02),
        "headers one at a time": starts(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", 0.02),
        "early hints for ever": starts(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 50, 0.001),
    },
    "the answer is longer than 2,117,632 bytes": {
        "chunks that never end": starts(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    },
    "the answer is not JSON": {
        "half of its length": sends(lambda reply: whole(reply, length=len(text(reply)) // 2)),
        "a stream of events": body(lambda reply: b"data: " + text(reply) + b"\n\ndata: [DONE]\n\n"),
        "two lines of JSON": body(lambda reply: text(reply) + b"\n" + text(reply)),
        "a byte order mark": body(lambda reply: b"\xef\xbb\xbf" + text(reply)),
    },
    "the answer is not UTF-8": {
        "packed twice, told once": labelled("gzip", lambda reply: gzip.compress(packed(reply))),
        "UTF-16": body(lambda reply: json.dumps(reply).encode("utf-16")),
    },
    "the answer is not packed as it says": {
        "packed without its end": labelled("gzip", lambda reply: packed(reply)[:-8]),
        "packed, a checksum wrong": labelled("gzip", lambda reply: packed(reply)[:-8] + b"\0" * 8),
        "raw deflate": labelled("deflate", raw_deflate),
    },
    "the answer is packed as 'zstd'": {"zstd": labelled("zstd", lambda _: b"(\xb5/\xfd")},
    "the answer has a field twice": {
        "two texts": body(lambda reply: text(reply)[:-1] + b', "choices": ' + text(WRONG) + b"}"),
    },
    "the answer has 2 choices, and one was asked for": {
        "another choice first": body(lambda r: {**r, "choices": [{**WRONG[0], "index": 1}, *r["choices"]]}),
    },
    "the answer is a message of the role 'user'": {"somebody else's role": with_choice(message_role="user")},
    "the answer has no text": {
        "a call of a tool": with_choice(message_content=None, message_tool_calls=[{"id": "x"}]),
    },
    "the answer has no text: I will not": {
        "a refusal": with_choice(message_content=None, message_refusal="I will not"),
    },
    "HTTP 429; the server asks to wait 1,000,000,000 s": {
        "a wait of 10^308 s": status("429 No", "Retry-After: 1e308"),
        "a wait until 9999": status("429 No", "Retry-After: Fri, 31 Dec 9999 23:59:59 GMT"),
    },
    "HTTP 429": {"a wait into the past": status("429 No", "Retry-After: -5")},
    "HTTP 999": {"a status of nobody": status("999 Odd")},
    "HTTP 500": {"bytes in the status": status("500 \xff\xfe")},
    "HTTP 500: ? ?[31m ?": {"escapes in an error": status("500 No", said={"error": "\ud800 \x1b[31m \0"})},
    "the server redirects to javascript:alert(1)": {
        "a redirect to a script": status("307 Go", "Location: javascript:alert(1)"),
    },
    "": {
        "the reply twice": sends(lambda reply: whole(reply) * 2),
        "another reply behind it": sends(lambda reply: whole(reply) + whole(completion("WRONG"))),
        "deflate": labelled("deflate", lambda reply: zlib.compress(text(reply))),
        "another charset": sends(
            lambda r: whole(r).replace(b"application/json", b"text/html; charset=utf-16")
        ),
        "a role that is a list": with_choice(message_role=["assistant"]),
        "usage that is none": body(
            lambda r: {**r, "usage": {"prompt_tokens": 1e308, "completion_tokens": -4}}
        ),
    },
}
MISDEEDS = {name: (misdeed, reason) for reason, kind in KINDS.items() for name, misdeed in kind.items()}
CLOSES = {reset, *KINDS[PROTOCOL].values()}


def ask(server, questions: int = 4, **changes) -> list[Answer]:
    """One at a time, so that a connection would serve the next question as well."""
    section = {
        "base_url": server.base_url,
        "api_key_env": None,
        "concurrency": 1,
        "timeout": 0.5,
        "retries": 0,
    }
    teacher = EndpointTeacher(TeacherSection(model="m", endpoint=section | changes))
    asked = [Question([{"role": "user", "content": f"q{i}"}], (i,)) for i in range(questions)]
    return teacher.answer(asked, SAMPLING, lambda _: None)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("name", MISDEEDS)
def test_a_misdeed_costs_one_row_and_no_other(name):
    misdeed, reason = MISDEEDS[name]
    with WireServer(lambda question: misdeed if question == "q1" else None) as server:
        answers = ask(server, timeout=0.5 if reason == SLOW else 20)
    texts = [answer.text.partition(" with ")[0] for answer in answers if answer.error is None]
    assert texts == [f"answer to q{i}" for i in range(4) if i != 1 or not reason], "each its own"
    if reason:
        said = answers[1].error
        assert said.startswith(reason) and said.isprintable() and len(said) < 300, said
        assert answers[1].finish_reason == "error" and answers[1].text == ""


@pytest.mark.parametrize(
    "scheme, said",
    [
        ("https", b"HTTP/1.1 400 Bad Request\r\n\r\n"),  # a server without TLS
        ("http", b"\x15\x03\x01\x00\x02\x02\x46"),  # the alert of a server with TLS
    ],
)
def test_tls_on_one_side_alone(scheme, said):
    def handle(connection, *_):
        connection.recv(100)
        connection.sendall(said)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handle) as server:
        server.base_url = f"{scheme}://127.0.0.1:{server.server_address[1]}/v1"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        answers = ask(server, 2, timeout=20)
        server.shutdown()
    assert all(a.error.startswith("the connection failed (") for a in answers)


def test_no_question_carries_what_another_one_got():
    """Cookies would tie questions to one another, and grow with each."""
    many = sends(lambda reply: whole(reply, f"Set-Cookie: n{time.monotonic_ns()}={'x' * 3000}; Path=/"))
    with WireServer(lambda _: many) as server:
        assert all(a.error is None for a in ask(server, 5, timeout=20))
    assert len(server.heads) == 5 and len({len(head) for head in server.heads}) == 1
    assert not any(b"cookie" in head.lower() for head in server.heads)


@pytest.mark.parametrize(
    "counted, kept", [(0, True), (1, False), (2, True), (3, True), (4, True), (5, False), (10**6, False)]
)
def test_logprobs_are_as_many_as_the_tokens_that_usage_counts(counted, kept):
    reply = {**completion("a b c"), "usage": {"completion_tokens": counted}}
    reply["choices"][0]["logprobs"] = {"content": [{"token": t, "logprob": -0.5} for t in ("a", " b", " c")]}
    assert read_reply(json.dumps(reply).encode(), None).logprobs == ([-0.5] * 3 if kept else [])


def test_an_index_that_is_odd_costs_nothing():
    for index in (0, 7, None, "x"):
        reply = completion("4")
        reply["choices"][0]["index"] = index
        assert read_reply(json.dumps(reply).encode(), None).text == "4"


def test_fields_twice_at_any_depth():
    twice = json.dumps(completion("right")).replace(
        '"content": "right"', '"content": "right", "content": "wrong"'
    )
    with pytest.raises(BadReply, match="the answer has a field twice"):
        read_reply(twice.encode(), None)


def test_a_wait_has_an_end():
    assert asked_wait({"retry-after": "1e308"}) == asked_wait({"retry-after-ms": "1e300"}) == 1e9
