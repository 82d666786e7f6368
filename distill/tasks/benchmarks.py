r"""Public benchmarks by name, and templates: how a published row becomes a question with a reference answer.

A preset knows a dataset's published column names, how its reference answer is read, which verifier fits and
where it lives on the hub; it works the same on a local file with the same columns. A template puts columns
into a prompt: `{question}` is replaced by that column's value, `{{` and `}}` are braces. Nothing in a
template or in a row is ever executed or looked into: a field is the name of a column, not an expression.

    render("{question}\n{choices}", {"question": "Which?", "choices": ["1", "2"]})    # "Which?\nA. 1\nB. 2"
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from distill.errors import UserError
from distill.tasks.reading import Unquoted, text_of, typed_text

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
