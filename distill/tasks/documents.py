"""Plain text to train and measure on: documents of a file, or English that every machine has.

    documents("notes.jsonl")                     # a .jsonl file with a column `text`; a .txt file is one document
    documents("python-docs", "train")            # what Python's own `help()` reads, in two parts

`python-docs` is `pydoc_data.topics` of the standard library: the language reference and parts of the library's
documentation, 460,000 characters of English prose about Python (PSF licence), the same wherever this Python is. A
tenth of it is held out ("test"): topics in the order of a hash of their names, as many as fit. Topics repeat
each other: a paragraph is kept once, and none of the held-out ones is trained on.
"""

import hashlib
import platform
from pathlib import Path

from distill.errors import UserError
from distill.files import like_it
from distill.storage import find_file
from distill.tasks.reading import Problems, Unquoted, json_lines, read_text

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
