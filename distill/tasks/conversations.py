r"""Prompts as people store them: text, or a conversation in one of the common forms, as plain chat messages.

    messages, last = conversation([{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}])
    # [{"role": "user", "content": "2 + 2?"}], "4"

Accepted: OpenAI's messages (`role`, `content`), ShareGPT's (`from`, `value`), and a content that is a list of parts
of text ({"type": "text", "text": ...}), which are joined with nothing between them, as chat templates do. Turns are:
one system turn or none, then user and assistant in turn, the user first. That is what every chat template takes;
some would fail on anything else, others would write a prompt that no model was trained on. Whatever is not text of
these three (tools, pictures, sound, an empty turn) is refused: left out, it would change the question.

A last assistant turn is the answer to the question before it, so it is never part of a prompt.
"""

import json
from itertools import pairwise
from typing import Any

from distill.tasks.reading import Unquoted

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
