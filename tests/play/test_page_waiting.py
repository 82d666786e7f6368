"""The page before the page: it is there at once, says what is loaded, and leaves the socket to whoever comes next."""

import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from conftest import PYTHON, ROOT

from distill.play.page import WaitingPage, bind
from distill.report.pages import speaking


def get(port: int, **headers) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        return answer.read().decode()


def test_it_says_how_far_it_is_and_hands_the_socket_over():
    with bind(0) as bound:
        port = bound.getsockname()[1]
        with WaitingPage(bound, "a <run>") as waiting:
            waiting.says("first thing")
            waiting.says("loading <base>")
            page = get(port)
            assert "a &lt;run&gt;" in page and "loading &lt;base&gt;" in page and "<script" not in page
            assert page.index("class='done'>first thing") < page.index("class='now'>loading")
            assert 'http-equiv="refresh"' in page  # the browser asks again, without a script
            with speaking("zh"):
                assert "正在加载模型" in get(port) and 'lang="zh-CN"' in get(port)
            with pytest.raises(urllib.error.HTTPError, match="400"):
                get(port, Host="evil.example:80")
        with WaitingPage(bound, "the next one"):
            assert "the next one" in get(port)


def test_an_error_of_the_block_goes_on():
    with bind(0) as bound, pytest.raises(ZeroDivisionError), WaitingPage(bound, "x"):
        1 / 0  # noqa: B018


def test_a_browser_that_goes_away_leaves_no_traceback(capsys, monkeypatch):
    """Reset before the answer is written, as by a browser that asks again; a mistake of ours is still shown."""
    gone = False

    def page(_self) -> str:
        while not gone:
            time.sleep(0.01)
        return "x" * 10**6

    monkeypatch.setattr(WaitingPage, "page", page)
    with bind(0) as bound, WaitingPage(bound, "x"):
        with socket.create_connection(bound.getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost:80\r\n\r\n")
            time.sleep(0.3)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone = True
        time.sleep(0.5)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(WaitingPage, "page", lambda _self: 1 // 0)
        with pytest.raises(OSError):
            get(bound.getsockname()[1])
        time.sleep(0.3)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_it_needs_nothing_heavy():
    code = "import sys, distill.play.page, distill.play.page; "
    code += "print({'torch', 'transformers', 'gradio'} & set(sys.modules))"
    start = time.perf_counter()
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n" and time.perf_counter() - start < 60
