"""Reading what a server sent: an answer that can be stored, or a reason in one line. Nothing is trusted.

    answer = read_reply(body, key)      # body: bytes of a chat completion; raises BadReply

The key is taken out of whatever a server echoes, before anything is shortened. Strict where a lenient reading
would store a broken text: JSON, UTF-8, the presence of a text, why it stopped.
"""

import json
import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from distill.protocol import Answer

FILTERED = "content_filter"
# The last two: what text-generation-inference calls an end token and a stop string.
_STOPPED = {"stop": "stop", "length": "length", "eos_token": "stop", "stop_sequence": "stop"}
_SHORTEST_SECRET = 8  # shorter keys are placeholders such as EMPTY, and may be words of an answer


class BadReply(Exception):
    """One request failed: why, whether it is worth another try, and the seconds that the server asked for."""

    def __init__(self, reason: str, retry: bool = True, wait: float | None = None):
        self.reason, self.retry, self.wait = reason, retry, wait
        super().__init__(reason)


def read_reply(body: bytes, key: str | None) -> Answer:
    """A chat completion as an Answer without token ids.

    Reasoning that the server split off (`reasoning_content`, or `reasoning`) is put back in <think> tags,
    where the verifier and the student expect it. Raises BadReply where there is no whole, storable text.
    """
    try:
        data = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadReply("the answer is not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadReply("the answer is not JSON") from None
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadReply(f"the answer has no choice{server_message(data, key)}")
    choice = choices[0]
    reason = choice.get("finish_reason")
    if reason == FILTERED:
        return Answer("", "error", error=FILTERED, **_usage(data))
    if not isinstance(reason, str) or reason not in _STOPPED:
        raise BadReply(f"the answer ended with finish_reason {one_line(redact(repr(reason), key))}")
    text = redact(_text(choice.get("message")), key)
    return Answer(text, _STOPPED[reason], logprobs=_logprobs(choice), **_usage(data))


def _text(message: Any) -> str:
    message = message if isinstance(message, dict) else {}
    content = message.get("content")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if content is None and isinstance(reasoning, str):
        content = f"<think>{reasoning}"  # still thinking when its tokens ran out
    elif isinstance(content, str) and isinstance(reasoning, str) and "</think>" not in content:
        content = f"<think>{reasoning}</think>{content}"
    if not isinstance(content, str):
        raise BadReply("the answer has no text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise BadReply("the answer has half of a surrogate pair, which no file can hold") from None
    return content


def _usage(data: dict) -> dict[str, int]:
    usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: n if type(n) is int and 0 <= n < 2**31 else 0 for name, n in counts.items()}


def _logprobs(choice: dict) -> list[float]:
    """Of the chosen tokens; [] unless the server gives a number for every one."""
    found = choice.get("logprobs")
    tokens = found.get("content") if isinstance(found, dict) else None
    values = [t.get("logprob") if isinstance(t, dict) else None for t in tokens or []]
    return [float(v) for v in values] if all(type(v) in (int, float) for v in values) else []


def server_message(body: Any, key: str | None) -> str:
    """The human part of an error body of whichever shape, as ": message"; "" if there is none."""
    for _ in range(3):
        if isinstance(body, dict):
            body = next((body[name] for name in ("error", "message", "detail") if body.get(name)), "")
    said = one_line(redact(body, key)) if isinstance(body, str) else ""
    return f": {said}" if said else ""


def redact(text: str, key: str | None) -> str:
    return text.replace(key, "[key]") if key and len(key) >= _SHORTEST_SECRET else text


def one_line(text: str, limit: int = 200) -> str:
    """Printable, storable and short, whatever a server put into it."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds from `Retry-After` (RFC 9110 section 10.2.3: seconds or a date) or `retry-after-ms`, if any."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None
