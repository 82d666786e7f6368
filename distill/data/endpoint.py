"""A teacher behind an OpenAI-compatible server: text answers over HTTP, every failure a row, the key nowhere.

    teacher:
      model: Qwen/Qwen3-8B
      endpoint: {base_url: http://localhost:8000/v1, api_key_env: null}      # see distill.config.data.Endpoint

Any server that speaks `POST {base_url}/chat/completions`. The official client carries the requests; retrying
is done here, because an answer can be broken in ways that no status code shows. Text is all that is kept:
the server's tokens are strings, which cannot be mapped to ids of a tokenizer that is not here. `prompt_ids`
and `completion_ids` stay empty, the student's tokenizer reads the text, and token counts are the server's
`usage`. `logprobs` (with `top_logprobs` above 0) are those of the server's own chosen tokens, in their order.

What the recipe leaves off (`top_k`, `min_p` at 0) is not sent, since not every server knows it; a server's
own defaults then apply (vLLM takes them from the model, unless started with `--generation-config vllm`).

What a server sent becomes an answer that can be stored, or a reason in one line. Nothing is trusted: a bad field
costs that field, a bad answer that row; bodies end at a size that the question cannot need, unpacked or not, and
nothing is sent to another host than the one in the recipe. Each question has a connection of its own, without cookies.

    answer = read_reply(body, key)      # body: bytes of a chat completion; raises BadReply

The key is taken out of whatever a server echoes, before anything is shortened. Strict where a lenient reading
would store a broken text: JSON, UTF-8, the presence of a text, why it stopped.
"""

import asyncio
import itertools
import math
import os
import random
import time
import zlib
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from distill import console
from distill.config.data import Endpoint, TeacherSection
from distill.data.signals import SignalFormat, encode_top_k
from distill.data.teachers import HOPELESS, Answer, BadReply, Question, is_logprob, read_json_reply
from distill.data.vllm import as_tokens, read_top_k, scoring_request
from distill.errors import RunError, UserError
from distill.models.chat import opening
from distill.models.decode import Sampling, row_seed
from distill.models.load import load_tokenizer, tokenizer_fingerprint

FILTERED = "content_filter"


# The last two: what text-generation-inference calls an end token and a stop string.
_STOPPED = {"stop": "stop", "length": "length", "eos_token": "stop", "stop_sequence": "stop"}
_OTHER_ROLES = ("user", "system", "developer", "tool", "function")
_SHORTEST_SECRET = 8  # shorter keys are placeholders such as EMPTY, and may be words of an answer


def read_reply(body: bytes, key: str | None) -> Answer:
    """A chat completion as an Answer without token ids.

    Reasoning that the server split off (`reasoning_content`, or `reasoning`) is put back in <think> tags,
    where the verifier and the student expect it. Raises BadReply where there is no whole, storable text.
    """
    data = read_json_reply(body, "answer")
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadReply(f"the answer has no choice{server_message(data, key)}")
    if len(choices) > 1:
        raise BadReply(f"the answer has {len(choices)} choices, and one was asked for")
    choice = choices[0]
    reason = choice.get("finish_reason")
    if reason == FILTERED:
        return Answer("", "error", error=FILTERED, **_usage(data))
    if not isinstance(reason, str) or reason not in _STOPPED:
        raise BadReply(f"the answer ended with finish_reason {one_line(redact(repr(reason), key))}")
    text, usage = redact(_text(choice.get("message"), key), key), _usage(data)
    return Answer(text, _STOPPED[reason], logprobs=_logprobs(choice, usage["completion_tokens"]), **usage)


def _text(message: Any, key: str | None) -> str:
    message = message if isinstance(message, dict) else {}
    if message.get("role") in _OTHER_ROLES:
        raise BadReply(f"the answer is a message of the role {message['role']!r}")
    content = message.get("content")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if not content and isinstance(reasoning, str):
        # Still thinking when its tokens ran out: no content then, or an empty one (llama.cpp's server).
        content = f"<think>{reasoning}" if reasoning else content
    elif isinstance(content, str) and isinstance(reasoning, str) and "</think>" not in content:
        content = f"<think>{reasoning}</think>{content}"
    if not isinstance(content, str):
        raise BadReply(f"the answer has no text{server_message(message.get('refusal'), key)}")
    if "</think>" in content and "<think>" not in content.partition("</think>")[0]:
        content = f"<think>{content}"  # the server's template opened the thinking, ahead of what it sent
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise BadReply("the answer has half of a surrogate pair, which no file can hold") from None
    return content


def _usage(data: dict) -> dict[str, int]:
    usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: n if type(n) is int and 0 <= n < 2**31 else 0 for name, n in counts.items()}


def _logprobs(choice: dict, counted: int) -> list[float]:
    """Of the chosen tokens; [] unless there is a number for every one. counted: by its usage, the end token or not."""
    found = choice.get("logprobs")
    tokens = found.get("content") if isinstance(found, dict) else None
    if not isinstance(tokens, list) or (counted and abs(len(tokens) - counted) > 1):
        return []
    values = [t.get("logprob") if isinstance(t, dict) else None for t in tokens]
    return [float(v) for v in values] if all(map(is_logprob, values)) else []


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
            except Exception:  # the parser of dates has several
                continue
        if math.isfinite(seconds):
            return min(max(seconds, 0.0), _FOR_EVER)
    return None


# ---- what comes over the wire ------------------------------------------------------------------------


def longest_body(tokens: int, entries: int) -> int:
    """Bytes that no honest reply exceeds: of a token its text with escapes, and of each log-probability an entry."""
    return 2**21 + tokens * (1024 + 256 * entries)


async def guard(response, most: int, key: str | None) -> None:
    """Called with the headers of every response, redirects included, before its body is read or it is followed.

    Raises BadReply; the body will raise it where it is longer than `most` bytes, as sent or unpacked.
    """
    if response.has_redirect_location:
        _same_origin(response, key)
    packed = ", ".join(response.headers.get_list("content-encoding")).strip().lower()
    if packed not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise BadReply(f"the answer is packed as {one_line(redact(repr(packed), key), 40)}, not asked for")
    if "content-encoding" in response.headers:
        del response.headers["content-encoding"]  # unpacked here, a piece at a time
    # The client's own package: httpx2, or httpx in older versions.
    library = import_module(type(response).__module__.partition(".")[0])
    unpack = zlib.decompressobj(47) if packed not in ("", "identity") else None
    source = response.stream

    class Bounded(library.AsyncByteStream):
        async def __aiter__(self):
            sent = length = 0
            async for piece in source:
                sent += len(piece)
                if unpack:
                    try:
                        piece = unpack.decompress(piece, most + 1 - length)
                    except zlib.error:
                        raise BadReply("the answer is not packed as it says") from None
                length += len(piece)
                if max(sent, length) > most:
                    raise BadReply(f"the answer is longer than {most:,} bytes")
                yield piece
            if unpack and sent and not unpack.eof:
                raise BadReply("the answer is not packed as it says")

        async def aclose(self):
            await source.aclose()

    response.stream = Bounded()


def _same_origin(response, key: str | None) -> None:
    """Raises Redirected unless a redirect stays with its host and port, or goes from http to https there."""
    asked, where = response.request.url, response.headers.get("location", "")
    try:
        target = asked.join(where)
        stays = (target.scheme, target.host, target.port) == (asked.scheme, asked.host, asked.port)
        upgrade = (asked.scheme, target.scheme) == ("http", "https") and asked.port == target.port is None
        same = stays or (upgrade and asked.host == target.host)
    except Exception:  # a Location that is no address
        same = False
    if not same:
        raise Redirected(
            f"the server redirects to {one_line(redact(where, key), 100)}, where nothing is sent; if that is the "
            "right server, name it in teacher.endpoint.base_url"
        )


class Redirected(BadReply):
    """To another host. The same request would be sent there again."""

    def __init__(self, reason: str):
        super().__init__(reason, retry=False)


# How to ask, not what: changing these continues a run.
# The tokenizer is told by what it is (`identity`), not by where it lies.
TRANSPORT = {"api_key_env", "concurrency", "timeout", "retries", "backoff", "tokenizer"}
_RETRIED = {408, 409, 429}  # and 5xx: the same request may work later
_FATAL = {401, 402, 403, 404, 405}  # no other request will work either
_LONGEST_BACKOFF = 60.0  # seconds
_LONGEST_WAIT = 600.0  # seconds a server may ask for; longer is a daily quota, not a pause
_FOR_EVER = 1e9  # seconds, 32 years: all that a message needs to say


def check_endpoint(endpoint: Endpoint) -> None:
    """Everything but the server is here: the client's package and a usable key. Raises UserError."""
    if find_spec("openai") is None:
        raise UserError('an endpoint teacher needs the openai client: pip install -e ".[endpoint]"')
    read_key(endpoint)


def read_key(endpoint: Endpoint) -> str | None:
    """The key from its environment variable, which is the only place it is ever read from.

    Raises UserError (without the key) if it is not set, or cannot be sent in a header.
    """
    name = endpoint.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {name} is not set; export the key of {endpoint.base_url} in it, or "
            "set teacher.endpoint.api_key_env=null for a server without keys"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{name} holds characters that no HTTP header can carry; export the key again")
    return key


class EndpointTeacher:
    """Asks a server, `concurrency` requests at a time. The key is read when the first question is asked."""

    def __init__(self, section: TeacherSection):
        self.name = section.model
        self._template_arguments = section.chat_template_kwargs
        self._endpoint = section.endpoint
        self._tokenizer = None
        self._limit_name = "max_tokens"
        self._failed_in_a_row = 0
        self._worked = self._told = False  # whether any request has; whether useless logprobs were told of
        self._jitter = random.Random()

    @property
    def opened(self) -> str:
        """What the template opens ahead of an answer, as <think>.

        Without a tokenizer here the template is the server's secret; what it left out is put back (`_text`).
        """
        return opening(self.tokenizer) if self.tokenizer else ""

    def open(self) -> None:
        """Raises UserError without client or key."""
        check_endpoint(self._endpoint)

    def identity(self) -> dict[str, Any]:
        # The server does not say; its address and the model's name are in the recipe.
        return tokenizer_fingerprint(self.tokenizer) if self._endpoint.tokenizer else {}

    @property
    def tokenizer(self):
        """Of the served model, from `teacher.endpoint.tokenizer`; None where the recipe names none."""
        if self._tokenizer is None and self._endpoint.tokenizer:
            self._tokenizer = load_tokenizer(self._endpoint.tokenizer, self._template_arguments)
        return self._tokenizer

    def flops(self, prompt_tokens: int, completion_tokens: int, rows: int) -> None:
        return None

    def answer(
        self, questions: list[Question], sampling: Sampling, on_finish: Callable[[Answer], None]
    ) -> list[Answer]:
        """One answer per question, in their order; one that still fails after its retries has `error` set.

        Raises RunError where no other question can work either: the server
        refuses the key, the account or the address, or nothing has worked many times in a row.
        """
        return asyncio.run(self._answer_all(questions, sampling, on_finish))

    async def _answer_all(self, questions, sampling, on_finish) -> list[Answer]:
        key = read_key(self._endpoint)
        answers: list[Answer | None] = [None] * len(questions)
        waiting = iter(enumerate(questions))

        async def work(client) -> None:
            for index, question in waiting:
                answers[index] = await self._ask(client, self._request(question, sampling), key)
                self._count_failures(answers[index])
                on_finish(answers[index])

        most = longest_body(sampling.max_new_tokens, self._endpoint.top_logprobs)
        await self._with_client(work, len(questions), key, most)
        return answers

    def score(
        self, questions: list[Question], answers: list[Answer], form: SignalFormat, reasons=("stop",)
    ) -> None:
        """Give every answer that ended so ids of the served model's tokenizer, its signal and its tokens' logprobs.

        One that the server does not score after its retries becomes a failed answer, with the reason.
        """
        due = [(q, a) for q, a in zip(questions, answers) if a.finish_reason in reasons and a.error is None]
        asyncio.run(self._score_all(due, form))

    async def _score_all(self, due: list[tuple[Question, Answer]], form: SignalFormat) -> None:
        texts = as_tokens(self.tokenizer, due)
        key, waiting = read_key(self._endpoint), iter(texts)

        async def work(client) -> None:
            for answer, prompt, completion in waiting:
                ids = [*prompt, *completion]
                read = partial(read_top_k, ids=ids, start=len(prompt), k=form.k, vocabulary=form.vocabulary)
                found = await self._ask(client, scoring_request(self.name, ids, form.k), key, read)
                self._count_failures(found if isinstance(found, Answer) else answer)
                if isinstance(found, Answer):  # the reason why there is nothing
                    answer.error, answer.finish_reason = found.error, "error"
                    continue
                named, logprobs, answer.logprobs = found
                answer.prompt_ids, answer.completion_ids = prompt, completion
                answer.signal_ids, answer.signal_values = encode_top_k(form, named, logprobs)

        longest = max((len(prompt) + len(completion) for _, prompt, completion in texts), default=0)
        await self._with_client(work, len(texts), key, longest_body(longest, form.k + 1))

    async def _with_client(self, work, tasks: int, key: str | None, most: int) -> None:
        """`work(client)` as often at a time as the recipe allows, until all of them end; no body above `most` bytes."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # they tie one question to the next
        hooks = {"response": [lambda response: guard(response, most, key)]}
        async with AsyncOpenAI(
            base_url=self._endpoint.base_url,
            http_client=DefaultAsyncHttpxClient(event_hooks=hooks, max_redirects=3, cookies=no_cookies),
            # A connection each: what a server sends too much would be read as the answer to the next question.
            default_headers={"Accept-Encoding": "identity", "Connection": "close"},
            api_key=key or "none",  # the client wants one; servers without keys ignore it
            max_retries=0,
            timeout=self._endpoint.timeout,
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._endpoint.concurrency, tasks)):
                        group.create_task(work(client))
            except BaseExceptionGroup as found:
                raise found.exceptions[0] from None

    def _request(self, question: Question, sampling: Sampling) -> dict[str, Any]:
        request = {
            "model": self.name,
            "messages": question.messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": row_seed(question.key) & 0x7FFFFFFF,  # some servers hold it in 32 bits
        }
        if sampling.stop:
            request["stop"] = list(sampling.stop)
        if self._endpoint.top_logprobs:
            request |= {"logprobs": True, "top_logprobs": self._endpoint.top_logprobs}
        extra = {name: getattr(sampling, name) for name in ("top_k", "min_p") if getattr(sampling, name)}
        if self._template_arguments:  # as vLLM, SGLang and llama.cpp's server read it
            extra["chat_template_kwargs"] = self._template_arguments
        return {**request, "extra_body": extra} if extra else request

    async def _ask(self, client, request: dict[str, Any], key: str | None, read=None) -> Answer | Any:
        """One question with its retries. While it waits it keeps its place, which spares the server.

        read: what becomes of a reply's body; without it an Answer. After the last failure an Answer with its reason.
        """
        for attempt in itertools.count():
            try:
                return await self._send(client, request, key, read)
            except BadReply as bad:
                asked_too_much = bad.wait is not None and bad.wait > _LONGEST_WAIT
                if asked_too_much or not bad.retry or attempt == self._endpoint.retries:
                    wish = f"; the server asks to wait {bad.wait:,.0f} s" if asked_too_much else ""
                    return Answer("", "error", error=f"{bad.reason}{wish}")
                pause = self._pause(attempt, bad.wait)
            await asyncio.sleep(pause)

    async def _send(self, client, request: dict[str, Any], key: str | None, read=None) -> Answer | Any:
        """One attempt. Raises BadReply for what concerns this request, RunError for what concerns all."""
        import openai

        scoring = "prompt" in request
        create = client.completions if scoring else client.chat.completions
        limit = "max_tokens" if scoring else self._limit_name
        sent = {limit if name == "max_tokens" else name: value for name, value in request.items()}
        try:
            # The client's own timeout restarts with every byte; this one is for the whole answer.
            async with asyncio.timeout(self._endpoint.timeout):
                reply = await create.with_raw_response.create(**sent)
                body = reply.content
        except (TimeoutError, openai.APITimeoutError):
            raise BadReply(f"no answer within {self._endpoint.timeout:g} s") from None
        except openai.APIStatusError as error:
            said = server_message(error.body, key)
            newer = error.status_code == 400 and limit == "max_tokens" and "max_completion_tokens" in said
            if newer and not scoring:
                self._limit_name = "max_completion_tokens"  # the newer name, which newer models insist on
                return await self._send(client, request, key)
            raise self._status_problem(error, said) from None
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, BadReply):
                raise self._redirected(error.__cause__) from None
            cause = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
            raise BadReply(f"the connection failed{cause}") from None
        except BadReply as bad:
            raise self._redirected(bad) from None
        except Exception as error:  # the client stumbles over what a server sent: one answer, not the run
            raise BadReply(f"the reply cannot be read ({type(error).__name__})") from None
        if read:
            return read(body)
        answer = read_reply(body, key)
        self._worked = True
        if self._endpoint.top_logprobs and not answer.logprobs and answer.text and not self._told:
            self._told = True
            console.warn(
                f"warning: {self._endpoint.base_url} gives no usable logprobs (a number at most 0 for every token) "
                "with some answers; these are stored without"
            )
        return answer

    def _redirected(self, bad: BadReply) -> BadReply | RunError:
        """To another host from the first request on: the address is wrong, and no other request will work."""
        if isinstance(bad, Redirected) and not self._worked:
            return RunError(f"{self._endpoint.base_url}: {bad.reason}")
        return bad

    def _status_problem(self, error, said: str) -> BadReply | RunError:
        """What an HTTP status means: for this request, or for all of them."""
        status = error.status_code
        if status in _FATAL or error.code == "insufficient_quota":
            return RunError(f"{self._endpoint.base_url} {self._fix(status)} (HTTP {status}{said})")
        retry = status in _RETRIED or status >= 500
        return BadReply(f"HTTP {status}{said}", retry, asked_wait(error.response.headers))

    def _fix(self, status: int) -> str:
        name = self._endpoint.api_key_env
        if status in (401, 403) and name:
            return f"refuses the key in {name} for '{self.name}'; export a key of this server that may use it"
        if status in (401, 403):
            return "asks for a key; name the variable that holds it in teacher.endpoint.api_key_env"
        if status in (404, 405):
            return (
                f"does not serve '{self.name}' at /chat/completions; check teacher.endpoint.base_url (it "
                "usually ends in /v1) and teacher.model"
            )
        return "has no credit left for this key; add some, then run again: finished parts are kept"

    def _pause(self, attempt: int, asked: float | None) -> float:
        """Seconds before the next attempt, spread: requests refused together do not return together."""
        backoff = self._endpoint.backoff
        if asked is not None:
            return asked + self._jitter.uniform(0, backoff)
        return min(backoff * 2**attempt, _LONGEST_BACKOFF) * self._jitter.uniform(0.5, 1)

    def _count_failures(self, answer: Answer) -> None:
        """A part full of errors would be kept as finished: better to stop before it is written."""
        failed = answer.error is not None and answer.error != FILTERED
        self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
        if self._failed_in_a_row >= max(HOPELESS, 2 * self._endpoint.concurrency):
            raise RunError(
                f"{self._endpoint.base_url} failed {self._failed_in_a_row} times in a row, the last with: "
                f"{answer.error}; check the server, then run again: finished parts are kept"
            )
