r"""Text as people store it: conversations as chat messages, rows of public benchmarks, and plain documents.

Prompts as people store them: text, or a conversation in one of the common forms, as plain chat messages.

    messages, last = conversation([{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}])
    # [{"role": "user", "content": "2 + 2?"}], "4"

Accepted: OpenAI's messages (`role`, `content`), ShareGPT's (`from`, `value`), and a content that is a list of parts
of text ({"type": "text", "text": ...}), which are joined with nothing between them, as chat templates do. Turns are:
one system turn or none, then user and assistant in turn, the user first. That is what every chat template takes;
some would fail on anything else, others would write a prompt that no model was trained on. Whatever is not text of
these three (tools, pictures, sound, an empty turn) is refused: left out, it would change the question.

A last assistant turn is the answer to the question before it, so it is never part of a prompt.

Public benchmarks by name, and templates: how a published row becomes a question with a reference answer.

A preset knows a dataset's published column names, how its reference answer is read, which verifier fits and
where it lives on the hub; it works the same on a local file with the same columns. A template puts columns
into a prompt: `{question}` is replaced by that column's value, `{{` and `}}` are braces. Nothing in a
template or in a row is ever executed or looked into: a field is the name of a column, not an expression.

    render("{question}\n{choices}", {"question": "Which?", "choices": ["1", "2"]})    # "Which?\nA. 1\nB. 2"

Plain text to train and measure on: documents of a file, or English that every machine has.

    documents("notes.jsonl")                     # a .jsonl file with a column `text`; a .txt file is one document
    documents("python-docs", "train")            # what Python's own `help()` reads, in two parts

`python-docs` is `pydoc_data.topics` of the standard library: the language reference and parts of the library's
documentation, 460,000 characters of English prose about Python (PSF licence), the same wherever this Python is. A
tenth of it is held out ("test"): topics in the order of a hash of their names, as many as fit. Topics repeat
each other: a paragraph is kept once, and none of the held-out ones is trained on.
"""

import hashlib
import json
import platform
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.files import like_it
from distill.storage import find_file
from distill.tasks.reading import Problems, Unquoted, json_lines, read_text, text_of, typed_text

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "chatbot", "chatgpt", "model", "ai", "bing", "bard"),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_TOOLS = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
_CALLS = ("tool_calls", "function_call", "tool_call_id")  # keys of a message that is about tools
_MEDIA = ("images", "image", "audio", "audios", "videos", "video", "files", "attachments")
_TEXT_PARTS = ("text", "input_text", "output_text")
_FORM = "a conversation is a list of {'role': ..., 'content': ...} or {'from': ..., 'value': ...}"
Message = dict[str, str]


def conversation(value: Any) -> tuple[list[Message], str | None]:
    """(messages up to a user's turn, the assistant's turn after it or None) of a text or a list of messages.

    Raises ValueError, worded to follow "row 3 has", for everything else.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": _question(value)}], None
    if not isinstance(value, list):
        kind = "an object" if isinstance(value, dict) else "nothing" if value is None else "no text"
        raise ValueError(f"{kind} as its prompt; {_FORM}, a question is text")
    if not value:
        raise ValueError("an empty conversation; remove the row")
    if not all(isinstance(message, dict) for message in value):
        raise ValueError(f"a list as its prompt whose items are no messages; {_FORM}; join texts to one")
    messages = [_message(message, number) for number, message in enumerate(value, 1)]
    _check_order([m["role"] for m in messages])
    last = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    return messages, last


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The conversation with the recipe's system message first. Raises ValueError where it has another of its own."""
    if not system:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise ValueError(
            "a system turn of its own, and the recipe has prompts.system; leave out prompts.system, or the turn"
        )
    return messages


def _question(text: str) -> str:
    """Text that is a question. A conversation that was stored as text is not one: it would be asked as JSON."""
    if isinstance(text, Unquoted):
        raise ValueError(
            f"{text[:40]} as its prompt, without quotes: no text; put it in quotes, or into a prompts.template"
        )
    if not text.strip():
        raise ValueError("an empty prompt; remove the row")
    if text.lstrip().startswith("[") and _is_stored(text):
        raise ValueError(
            "a conversation stored as text (JSON inside a string); store the list itself, in JSONL or Parquet"
        )
    return str(text)


def _is_stored(text: str) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    keys = ({"role", "content"}, {"from", "value"})
    return bool(found) and all(isinstance(m, dict) and any(k <= set(m) for k in keys) for m in found)


def _message(given: dict, number: int) -> Message:
    """One turn. Keys other than role and content (ids, weights, names) say nothing that a template writes."""
    where = f"turn {number} of its conversation"
    message = {key: value for key, value in given.items() if value not in (None, [], {})}
    named = [key for key in ("role", "from") if key in message]
    if len(named) != 1 or not isinstance(message[named[0]], str):
        raise ValueError(f"{where} without one role; {_FORM}")
    name = message[named[0]].strip()
    if name.lower() in _TOOLS or any(key in message for key in _CALLS):
        raise ValueError(f"a tool call or its result in {where}; remove the turns about tools, or the row")
    if name.lower() not in _ROLE_OF:
        known = ", ".join(_ROLE_OF)
        raise ValueError(f"the unknown role '{name[:40]}' in {where}; use one of: {known}")
    if media := [key for key in _MEDIA if key in message]:
        raise ValueError(f"'{media[0]}' in {where}; only text is read, remove the row")
    content = given.get("content") if named[0] == "role" or "content" in message else given.get("value")
    role = _ROLE_OF[name.lower()]
    text = _content(content, where)
    if role != "system" and not text.strip():  # an empty system turn is some templates' way to have none
        raise ValueError(f"an empty {where}; remove the row")
    return {"role": role, "content": text}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str) and not isinstance(content, Unquoted):
        return str(content)
    if content is None:
        raise ValueError(f"no content (null) in {where}; write its text, or remove the turn")
    if not isinstance(content, list):
        raise ValueError(f"{str(content)[:40]!r} as content of {where}, which is no text; write it as text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(text, str) or isinstance(text, Unquoted):
            name = f"a part '{kind}'" if kind and kind not in _TEXT_PARTS else "a part without text"
            raise ValueError(f"{name} in {where}; only parts of text are read, remove the row")
        texts.append(str(text))
    return "".join(texts)


def _check_order(roles: list[str]) -> None:
    """Raises ValueError unless a system turn, if any, is first and user and assistant follow each other."""
    turns = roles[1:] if roles[0] == "system" else roles
    shift = len(roles) - len(turns) + 1  # number of the first turn after the system's
    if "system" in turns:
        number = turns.index("system") + shift
        raise ValueError(f"a system turn that is not the first (turn {number}); move it to the beginning")
    if "user" not in turns:
        raise ValueError("a conversation without a user's turn; remove the row")
    if turns[0] != "user":
        raise ValueError("a conversation that the assistant begins; remove its first turn")
    for number, (one, two) in enumerate(pairwise(turns), shift + 1):
        if one == two:
            raise ValueError(f"two {one} turns in a row (turn {number}); join them to one")


# ==== Public benchmarks by name, and templates ====

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")

_STEPS = "Reason step by step, and put your final answer within \\boxed{{}}."
_LETTER = "Reason step by step, and end with a line 'Answer: ' and the letter of the right choice."
_LETTER_ZH = "请逐步思考，最后一行写“答案：”和正确选项的字母。"


@dataclass(frozen=True)
class Preset:
    """One benchmark. `read` maps a published row to `question`, `answer` and perhaps `choices` and `family`.

    `train` and `test` are hub splits; a benchmark without `train` is for evaluation only. `read` raises
    ValueError for a row that does not hold what the benchmark promises.
    """

    source: str
    config: str | None
    train: str | None
    test: str
    columns: tuple[str, ...]
    template: str
    verifier: str
    read: Callable[[dict], dict]


def _gsm8k(row: dict) -> dict:
    """Cobbe et al. 2021: worked steps, then `#### 1,234`."""
    _steps, marked, answer = text_of(row["answer"], "answer").rpartition("####")
    if not marked or not answer.strip():
        raise ValueError("no '####' line in its answer")
    return {"question": text_of(row["question"], "question"), "answer": answer.strip().replace(",", "")}


def _competition(row: dict) -> dict:
    """MATH-500 (Lightman et al. 2023) and AIME: a problem and its final answer."""
    return {
        "question": text_of(row["problem"], "problem"),
        "answer": text_of(row["answer"], "answer").strip(),
        "family": row.get("subject"),
    }


def _gpqa(row: dict) -> dict:
    """Rein et al. 2023: the right answer and three wrong ones, each in a column of its own."""
    columns = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    question, *published = (text_of(row[c], c).strip() for c in ("Question", *columns))
    order = shuffled(4, [question, *published])
    return {
        "question": question,
        "choices": [published[i] for i in order],
        "answer": LETTERS[order.index(0)],
        "family": row.get("High-level domain"),
    }


def _mmlu(row: dict) -> dict:
    """Hendrycks et al. 2021: a list of choices and the index of the right one (or its letter)."""
    answer, choices = typed_text(row["answer"]), row["choices"]
    if not isinstance(choices, list):
        raise ValueError("'choices' that are not a list; CSV has none, use JSONL or Parquet")
    # An index is a number in the file; "1" in quotes could as well be one of the choices.
    indexed = isinstance(answer, Unquoted) and answer.isdecimal() and len(answer) < 3
    letter = LETTERS[int(answer) : int(answer) + 1] if indexed else text_of(answer, "answer").strip()
    if letter not in list(LETTERS[: len(choices)]):
        raise ValueError(f"the answer {answer!r}, which is none of its {len(choices)} choices")
    return {
        "question": text_of(row["question"], "question"),
        "choices": choices,
        "answer": letter,
        "family": row.get("subject"),
    }


def _ceval(row: dict) -> dict:
    """Huang et al. 2023: choices in columns A to D, the answer a letter (the public `test` has none)."""
    letter = text_of(row["answer"], "answer").strip()
    if letter not in ("A", "B", "C", "D"):
        raise ValueError(f"the answer {letter!r}, not A, B, C or D (split test has no answers, val has)")
    choices = [text_of(row[c], c) for c in "ABCD"]
    return {"question": text_of(row["question"], "question"), "choices": choices, "answer": letter}


PRESETS: dict[str, Preset] = {
    "gsm8k": Preset(
        "hub:openai/gsm8k", "main", "train", "test", ("question", "answer"),
        "{question}\n\nReason step by step, and end with a line '#### ' and the final number.",
        "numeric", _gsm8k,
    ),
    "math500": Preset(
        "hub:HuggingFaceH4/MATH-500", None, None, "test", ("problem", "answer"),
        "{question}\n\n" + _STEPS, "math", _competition,
    ),
    "aime": Preset(
        "hub:HuggingFaceH4/aime_2024", None, None, "train", ("problem", "answer"),
        "{question}\n\n" + _STEPS, "numeric", _competition,
    ),
    "gpqa": Preset(
        "hub:Idavidrein/gpqa", "gpqa_diamond", None, "train",
        ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        "{question}\n\n{choices}\n\n" + _LETTER, "choice", _gpqa,
    ),
    "mmlu": Preset(
        "hub:cais/mmlu", "all", "auxiliary_train", "test", ("question", "choices", "answer"),
        "{question}\n\n{choices}\n\n" + _LETTER, "choice", _mmlu,
    ),
    "ceval": Preset(
        "hub:ceval/ceval-exam", None, None, "val", ("question", "A", "B", "C", "D", "answer"),
        "{question}\n\n{choices}\n\n" + _LETTER_ZH, "choice", _ceval,
    ),
}  # fmt: skip


def fill_in(section: Any, split: str) -> Any:
    """A recipe section with what its `preset` implies: source, config, split and verifier, where not given.

    `split` is "train" for training prompts, "test" for held-out ones. Raises ValueError where the benchmark
    has no such split or needs a `config`.
    """
    if not isinstance(section, dict) or section.get("preset") not in PRESETS:
        return section
    name, preset = section["preset"], PRESETS[section["preset"]]
    filled = dict(section)
    if split == "train":
        filled.setdefault("verifier", preset.verifier)
    if filled.get("source") not in (None, "tasks", preset.source):
        return filled
    if filled.get("split") is None:
        filled["split"] = getattr(preset, split)
    if filled["split"] is None:
        raise ValueError(
            f"{name} has no training split, it is for evaluation (`evaluate.preset: {name}`); "
            "to train on it all the same, name `split` or a local `source`"
        )
    filled["source"] = preset.source
    if filled.get("config") is None:
        filled["config"] = preset.config
    if name == "ceval" and not filled["config"]:
        raise ValueError("ceval has one config per subject: set `config`, for example computer_network")
    return filled


def split_task(word: str) -> tuple[str, str]:
    """(preset, source) of a `--tasks` word: FILE, hub:org/name, PRESET, PRESET:FILE; "" for what it lacks."""
    preset, _, source = word.partition(":")
    return (preset, source) if preset in PRESETS else ("", word)


def held_out_preset(recipe: Any) -> Any:
    """A recipe whose prompts come from a benchmark is measured on its held-out split by default."""
    if not isinstance(recipe, dict) or not isinstance(recipe.get("prompts"), dict):
        return recipe
    name, evaluate = recipe["prompts"].get("preset"), recipe.get("evaluate") or {}
    if (
        name not in PRESETS
        or not isinstance(evaluate, dict)
        or evaluate.get("source")
        or evaluate.get("preset")
    ):
        return recipe
    config = recipe["prompts"].get("config")
    return {**recipe, "evaluate": {"config": config, **evaluate, "preset": name}}


def shuffled(n: int, content: list[str]) -> list[int]:
    """An order of n choices that depends on the row's own content alone: the same in every run and file."""
    seed = hashlib.blake2b("\0".join(content).encode(errors="replace"), digest_size=8).digest()
    order = list(range(n))
    random.Random(int.from_bytes(seed, "big")).shuffle(order)
    return order


def check_template(template: str, columns: Iterable[str], key: str = "prompts.template") -> list[str]:
    """The columns that a template names. Raises UserError for one that is not there, or a lone brace."""
    columns, fields = list(columns), []
    for match in _BRACES.finditer(template):
        if match[0] in ("{{", "}}"):
            continue
        if match[1] is None:
            raise UserError(f"{key} has a lone '{match[0]}'; write '{match[0] * 2}' for a brace")
        if match[1] not in columns:
            there = ", ".join(columns)
            raise UserError(f"{key} names '{match[0]}'; a field is the name of a column, one of: {there}")
        fields.append(match[1])
    if not fields:
        raise UserError(f"{key} names no column; all prompts would be equal; columns: {', '.join(columns)}")
    return fields


def render(template: str, values: dict[str, Any]) -> str:
    """The template with its columns' values put in, once: braces inside a value stay what they are."""

    def put(match: re.Match) -> str:
        return match[0][0] if match[0] in ("{{", "}}") else shown(values[match[1]])

    return _BRACES.sub(put, template)


def shown(value: Any) -> str:
    """A column's value as it stands; a list becomes lettered lines. ValueError for what has no plain form."""
    if isinstance(value, list | tuple) and len(value) <= len(LETTERS):
        return "\n".join(f"{letter}. {shown(item)}" for letter, item in zip(LETTERS, value))
    written = typed_text(value)
    if isinstance(written, str):
        return str(written)
    raise ValueError(f"{str(value)[:40]!r}: a template takes text, numbers and lists of them")


# ==== Plain text to train and measure on ====

PYTHON_DOCS = "python-docs"
_HELD_OUT = 0.1  # share of the characters


def is_embedded(source: str) -> bool:
    return source == PYTHON_DOCS


def documents(source: str, split: str = "test", key: str = "--text") -> list[str]:
    """The texts of a source, none of them empty; `split` ("train" or "test") is of the embedded one alone.

    Raises UserError, naming `key`, for a file that is missing, of another kind, unreadable or empty.
    """
    if is_embedded(source):
        return [text for _, text in python_docs(split)]
    file = find_file(source)
    if not file.is_file():
        raise UserError(
            f"{key} {source}: no such file{like_it(file)}; give a .txt or .jsonl file, or {PYTHON_DOCS} (evaluate.text)"
        )
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{key} {source}: give a .txt file, or a .jsonl file with a column `text`")
    found = [read_text(file)] if file.suffix == ".txt" else _texts(file, key)
    found = [text for text in found if text.strip()]
    if not found:
        raise UserError(f"{key} {source} has no text in it; give a file that does")
    return found


def python_docs(split: str) -> list[tuple[str, str]]:
    """(topic, its text) of one part, in the order of names; paragraphs that another topic has already left out."""
    from pydoc_data.topics import topics

    held_out, size, whole = set(), 0, sum(map(len, topics.values()))
    for name in sorted(topics, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest()):
        if size + len(topics[name]) <= _HELD_OUT * whole:
            held_out.add(name)
            size += len(topics[name])
    seen: set[str] = set()
    found = []
    for names in (sorted(held_out), sorted(topics.keys() - held_out)):  # what is held out is taken first
        for name in names:
            kept = [p for p in topics[name].split("\n\n") if p.strip() and p.strip() not in seen]
            seen |= {p.strip() for p in kept}
            if kept and (name in held_out) == (split == "test"):
                found.append((name, "\n\n".join(kept).strip() + "\n"))
    return found


def text_version(source: str) -> str:
    """What a manifest says of the embedded text: it is another in another Python."""
    return f"{source}, Python {platform.python_version()}" if is_embedded(source) else source


def _texts(file: Path, key: str) -> list[str]:
    """The column `text` of a JSONL file. Raises UserError with what is wrong, line by line."""
    texts, problems = [], Problems(f"{key} {file}")
    for line, row in json_lines(file):
        text = row.get("text") if isinstance(row, dict) else None
        if isinstance(text, str) and not isinstance(text, Unquoted):
            texts.append(text)
        else:
            wrong = row if isinstance(row, ValueError) else "no object with `text`, a string in quotes"
            problems.add(f'{key} {file}: line {line}: {wrong}; every line is an object {{"text": ...}}')
    problems.refuse()
    return texts
