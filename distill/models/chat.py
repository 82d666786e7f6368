"""What a model reads: chat messages as the token ids that the model was trained on, and what its template opens.

    ids = prompt_ids(tokenizer, [{"role": "user", "content": "2 + 2?"}])     # up to where the assistant's words begin
    opening(tokenizer)                                  # "<think>\\n" for DeepSeek-R1: the template begins the answer
    ids = text_ids(tokenizer, "so </think> 4")          # words of an answer; they make no control token

The rules, each because something silently went wrong without it:
- Ids are those of the tokenizer's own chat template. A tokenizer without one gets `PLAIN_TEMPLATE`, with the
  beginning-of-sequence token where the tokenizer itself would put one (Gemma without it: 8.98 nats a token instead of
  2.40).
- Only the template makes control tokens. `<|im_end|>` in a user's question is text, and stays text. Control tokens are
  those that the tokenizer marks as special, and every added token that its template writes.
- A template may write the beginning of the answer (`<think>`). An answer is then what the template wrote and what the
  model added: one text, for the verifier and for a student whose own template opens nothing.
- A template that reads the clock (`strftime_now`) reads the date of the run, which is fixed once (`fix_date`).
- A template is a program of a stranger, and may go wrong for one conversation of many: time, memory and the length of
  what it writes are limited, and `check_prompts` names the row.
"""

import contextlib
import datetime
import functools
import json
import re
import resource
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError
from distill.models.folders import conversation_problem
from distill.workers.template_worker import MEMORY, MOST_CHARACTERS, SECONDS

# For tokenizers that bring no chat template: stated in the README, and saved with the student so that
# plain transformers renders prompts exactly as they were trained.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_BOS = "{{ bos_token }}"
_THINK, _END_THINK = "<think>", "</think>"
_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<form>.*?)(?P=quote)\s*\)""")
_MARKS = range(0xE000, 0xF8FF)  # Unicode's private use area: characters that stand for a control token's text
_date: datetime.date | None = None


# ---- templates -----------------------------------------------------------------------------------------


def set_template(tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any] | None = None) -> None:
    """Give the tokenizer one template for good: its own or the plain one, with `arguments` written into it.

    arguments: what `apply_chat_template` would be given at every call, as {"enable_thinking": False}. They become part
    of the template, so that whatever is saved renders as it was trained, and its fingerprint tells them.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name; the first of them is for chat without tools
        template = template.get("default") or next(iter(template.values()))
    if not template:
        template = (_BOS if _adds_bos(tokenizer) else "") + PLAIN_TEMPLATE
    set_first = "".join(
        f"{{%- set {name} = {_literal(value)} %}}" for name, value in (arguments or {}).items()
    )
    tokenizer.chat_template = set_first + template


def has_own_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """False where the plain template had to be put in."""
    return not tokenizer.chat_template.endswith(PLAIN_TEMPLATE)


def reads_the_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "strftime_now" in tokenizer.chat_template


def fix_date(date: datetime.date | None) -> None:
    """The day that templates read from now on in this process; None: today, decided at the first use."""
    global _date
    _date = date


def template_date() -> datetime.date:
    global _date
    _date = _date or datetime.date.today()
    return _date


def _dated(template: str) -> str:
    """The template with its questions to the clock answered. transformers renders no callable but its own."""
    day = datetime.datetime.combine(template_date(), datetime.time())
    return _CLOCK.sub(lambda match: json.dumps(day.strftime(match["form"]), ensure_ascii=False), template)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's own call puts its beginning-of-sequence token first."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(k)}: {_literal(v)}' for k, v in value.items())}}}"
    return json.dumps(value)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], generation_prompt: bool = True) -> str:
    """The template's text. Raises UserError where the template refuses the messages, or goes beyond its limits."""
    template = _dated(tokenizer.chat_template)
    size = sum(len(m["content"]) for m in messages if isinstance(m.get("content"), str))
    try:
        with _limits(template, tokenizer, messages):
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=generation_prompt, tokenize=False
            )
        if len(text) > MOST_CHARACTERS + 10 * size:
            raise ValueError(f"it writes {len(text):,} characters where the messages have {size:,}")
        return text
    # A template is a program: it raises its own errors, and whatever its mistakes raise.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise UserError(f"the chat template refuses these messages (roles: {roles}): {reason}") from None


def _too_long(*_) -> None:
    raise TimeoutError(f"it does not end within {SECONDS} s")


@contextlib.contextmanager
def _limits(template: str, tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Iterator[None]:
    """What a template may use: SECONDS of work, and MEMORY more than there is.

    A signal stops it, which only the main thread hears. In any other a process of its own tries it first.
    """
    if threading.current_thread() is not threading.main_thread():
        tokens = {name: str(text) for name, text in tokenizer.special_tokens_map.items()}
        if problem := conversation_problem(template, tokens, messages):
            raise ValueError(f"it {problem}")
        yield
        return
    allowed = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):  # elsewhere than on Linux; or a lower limit stands already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + 2 * MEMORY
        if allowed[0] != resource.RLIM_INFINITY:
            room = min(room, allowed[0])
        resource.setrlimit(resource.RLIMIT_AS, (room, allowed[1]))
    signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {2 * MEMORY // 2**20} MB") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, allowed)


def refused_prompts(tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict]) -> Iterator[tuple[dict, str]]:
    """(row, why) of every row (`messages`) that the template refuses, each question once."""
    asked = set()
    for row in rows:
        if (key := json.dumps(row["messages"], sort_keys=True)) not in asked:
            asked.add(key)
            try:
                render(tokenizer, row["messages"])
            except UserError as error:
                yield row, str(error)


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict], label: str, most: int = 5
) -> None:
    """Raises UserError with a line for each of the first `most` rows (`prompt_id, messages`) that are refused."""
    lines = []
    for row, reason in refused_prompts(tokenizer, rows):
        if len(lines) == most:
            raise UserError(*lines, "and more of them")
        lines.append(
            f"{label}, {named_row(row)}: {reason}; leave this row out, or give the tokenizer another template"
        )
    if lines:
        raise UserError(*lines)


def named_row(row: dict) -> str:
    """A row by its id and the beginning of its question, on one line."""
    question = " ".join(str(row["messages"][-1]["content"]).split()) if row["messages"] else ""
    return f"row {row['prompt_id']} ({question if len(question) <= 60 else question[:57] + '...'})"


# ---- ids -----------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """Token ids of chat messages up to where the assistant's words begin, as the model was trained to read them.

    Equal to `tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)`, but for control
    tokens that a message spells out: these stay text. Words of assistant turns may hold <think> tags.
    """
    marked, meant = _marked(tokenizer, messages)
    text = render(tokenizer, marked)
    if not meant:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids: list[int] = []
    for piece in _pieces(tokenizer, text):
        spelled = re.sub("|".join(meant), lambda m: meant[m[0]], piece)
        ids += _as_text(tokenizer, spelled) if spelled != piece else _plainly(tokenizer, piece)
    return ids


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of words of an assistant's turn. Control tokens that they spell out stay text; <think> tags do not."""
    control = _control(tokenizer)
    if control is None or not re.search(control, text):
        return _plainly(tokenizer, text)
    ids: list[int] = []
    for piece in re.split(f"({_THINK}|{_END_THINK})", text):
        ids += _plainly(tokenizer, piece) if piece in (_THINK, _END_THINK) else _as_text(tokenizer, piece)
    return ids


def _plainly(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text in which nothing is a control token."""
    if not text:
        return []
    if (without := _without_added_tokens(tokenizer)) is not None:
        return without.encode(text, add_special_tokens=False).ids
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _marked(tokenizer, messages: list[dict]) -> tuple[list[dict], dict[str, str]]:
    """The messages with a private character in place of each control token they spell out, and what each stands for."""
    control = _control(tokenizer)
    if control is None:
        return messages, {}
    meant: dict[str, str] = {}
    everything = "".join(m["content"] for m in messages if isinstance(m.get("content"), str))
    free = (chr(code) for code in _MARKS if chr(code) not in everything)
    found, mark_of = [], {}

    def mark(match: re.Match) -> str:
        if match[0] not in mark_of:
            mark_of[match[0]] = next(free)
            meant[mark_of[match[0]]] = match[0]
        return mark_of[match[0]]

    for message in messages:
        content = message.get("content")
        pattern = control if message.get("role") == "assistant" else _control(tokenizer, thinking=True)
        found.append(
            {**message, "content": re.sub(pattern, mark, content)} if isinstance(content, str) else message
        )
    return (found, meant) if meant else (messages, {})


def _pieces(tokenizer, text: str) -> list[str]:
    """The text cut at its added tokens, as the tokenizer itself cuts it first; these are pieces of their own."""
    added = sorted((str(t) for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return [p for p in re.split(f"({'|'.join(map(re.escape, added))})", text) if p] if added else [text]


def _control(tokenizer: PreTrainedTokenizerBase, thinking: bool = False) -> str | None:
    """A pattern of the control tokens; None without any. `thinking`: with the <think> tags, if they are tokens."""
    return _control_pattern(tokenizer, tokenizer.chat_template or "", len(tokenizer), thinking)


@functools.lru_cache(maxsize=64)
def _control_pattern(tokenizer, template: str, _size: int, thinking: bool) -> str | None:
    names = {
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or str(token) in template
    } | set(tokenizer.all_special_tokens)
    if not thinking:
        names -= {_THINK, _END_THINK}
    names = {name for name in names if name.strip()}
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or None


@functools.lru_cache(maxsize=16)
def _without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The same tokenizer with no added token that a text could spell; None where there is no fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    data = json.loads(backend.to_str())
    data["added_tokens"], data["post_processor"], data["truncation"], data["padding"] = [], None, None, None
    return Tokenizer.from_str(json.dumps(data))


# ---- what the template opens ---------------------------------------------------------------------------


def opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the generation prompt already writes of the assistant's own words, from <think> on; "" for nothing.

    "<think>\\n" for DeepSeek-R1 and its distilled models; "<think>\\n\\n</think>\\n\\n" for Qwen3 without thinking.
    """
    return _opening(tokenizer, tokenizer.chat_template or "")


@functools.lru_cache(maxsize=64)
def _opening(tokenizer: PreTrainedTokenizerBase, _template: str) -> str:
    asked = [{"role": "user", "content": "?"}]
    try:
        before, whole = render(tokenizer, asked, False), render(tokenizer, asked)
    except UserError:  # told where prompts are counted
        return ""
    common = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), min(len(before), len(whole)))
    added = whole[common:]
    place = added.find(_THINK)
    return added[place:] if place >= 0 else ""


def whole_turn(tokenizer: PreTrainedTokenizerBase, generated: str) -> str:
    """The assistant's turn as one text: what its template opened, and what the model added."""
    return opening(tokenizer) + generated


def continuation(turn: str, opened: str) -> str:
    """What is left to say of an assistant's turn where the prompt ends with `opened`.

    A turn that thinks continues inside an opened <think>; one that does not closes it first. Where the prompt has
    closed the thinking already, a turn that thinks is left as it is.
    """
    if turn.startswith(opened):
        return turn[len(opened) :]
    if _END_THINK in opened:
        return turn
    stripped = turn.lstrip()
    if stripped.startswith(_THINK):
        return stripped[len(_THINK) :].lstrip()
    return f"{_END_THINK}\n\n{turn}"


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, turn: str, teacher_opened: str = "", ids: list[int] | None = None
) -> list[int]:
    """Ids of what a student has to write for this turn, after its own prompt; no end token is added.

    ids: the teacher's own ids of the turn behind `teacher_opened`, in the same vocabulary; they are kept wherever the
    text that they spell is kept whole.
    """
    opened = opening(tokenizer)
    if ids is None:
        return text_ids(tokenizer, continuation(turn, opened))
    if teacher_opened.startswith(opened):
        return [*text_ids(tokenizer, teacher_opened[len(opened) :]), *ids]
    begin = text_ids(tokenizer, opened[len(teacher_opened) :]) if opened.startswith(teacher_opened) else []
    if begin and ids[: len(begin)] == begin:
        return list(ids[len(begin) :])
    return text_ids(tokenizer, continuation(turn, opened))
