"""Who answers the training prompts: the protocol between `generate` and a teacher, and the local teacher.

    teacher = LocalTeacher(recipe.teacher, device, batch_size)
    answers = teacher.answer(questions, sampling, on_finish)     # list[Answer], in the order of questions

Every `Question` gets one `Answer`; one that failed has `error` set and is never dropped in silence. A local model
gives token ids and log-probabilities; an endpoint (distill/data/endpoint.py) gives text alone.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import StopStringCriteria

from distill.config.data import TeacherSection
from distill.errors import RunError, UserError
from distill.models.ahead import Drafts, decode_ahead, load_ahead
from distill.models.chat import opening, prompt_ids, whole_turn
from distill.models.decode import Sampling, decode
from distill.models.describe import describe_model
from distill.models.load import eos_ids, load_model, load_tokenizer, tokenizer_fingerprint

HOPELESS = 16  # failures in a row, each after all of its retries


@dataclass(frozen=True)
class Question:
    """One sample to draw: `key` (seed, prompt_id, sample_idx) fixes its randomness."""

    messages: list[dict]
    key: tuple
    tag: str = ""  # of the row, where teachers are chosen by it


@dataclass
class Answer:
    """`text` is the whole turn of the assistant, with what the teacher's template opened of it.

    prompt_ids and completion_ids are the teacher's own token ids, empty where it gives text alone.
    """

    text: str
    finish_reason: str  # "stop", "length" or "error"
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    signal_ids: bytes | None = None  # the teacher's distribution at every token (distill/data/signals.py)
    signal_values: bytes | None = None
    teacher: str | None = None  # who answered, where several may


class Teacher(Protocol):
    name: str
    opened: str  # what its template writes of the answer ahead of `completion_ids` (distill/models/chat.py)

    def identity(self) -> dict[str, Any]:
        """What the answers depend on besides the recipe: tokenizer and template fingerprints."""
        ...

    def open(self) -> None:
        """Load or reach it. Raises before anything is written where that is impossible."""
        ...

    def answer(
        self, questions: list[Question], sampling: Sampling, on_finish: Callable[[Answer], None]
    ) -> list[Answer]:
        """One answer to every question, in their order; `on_finish` hears of each as it ends."""
        ...

    def flops(self, prompt_tokens: int, completion_tokens: int, rows: int) -> int | None:
        """Forward FLOPs of that many tokens; None where they cannot be known."""
        ...


class BadReply(Exception):
    """One request failed: why, whether it is worth another try, and the seconds that the server asked for."""

    def __init__(self, reason: str, retry: bool = True, wait: float | None = None):
        self.reason, self.retry, self.wait = reason, retry, wait
        super().__init__(reason)


def read_json_reply(body: bytes, what: str) -> Any:
    """The JSON in a server's reply; `what` it is stands in the reason. Raises BadReply."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # either of the two would be the answer
            raise BadReply(f"the {what} has a field twice")
        return found

    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise BadReply(f"the {what} is not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadReply(f"the {what} is not JSON") from None


def is_logprob(value: Any) -> bool:
    """A logarithm of a probability that float32 holds; a rounding error above 0 is let pass. Not NaN, not -inf."""
    return type(value) in (int, float) and -1e30 < value <= 0.01


def closed(tokenizer, ids: list[int]) -> list[int]:
    """A completion as `filter` trains on it: one that ended by another end token gets the tokenizer's own as well."""
    end = tokenizer.eos_token_id
    return list(ids) if ids and ids[-1] == end else [*ids, end]


def taught(tokenizer, answer: Answer) -> list[int]:
    """An answer's tokens as the student will read them: one that was cut off stays open."""
    return (
        closed(tokenizer, answer.completion_ids) if answer.finish_reason == "stop" else answer.completion_ids
    )


class Prompts:
    """Questions as tokens. One that the template refuses fails; too many in a row stop the run.

    A part full of failures would be kept as finished: better to stop before it is written.
    """

    def __init__(self, teacher: str, tokenizer):
        self._teacher, self._tokenizer, self._refused_in_a_row = teacher, tokenizer, 0

    def read(
        self, questions: list[Question], answers: list[Answer | None], on_finish: Callable[[Answer], None]
    ) -> tuple[list[int], list[list[int]]]:
        """(places of the questions that the template takes, their tokens); the others' failures stand in `answers`."""
        asked, ids = [], []
        for messages, same in itertools.groupby(range(len(questions)), lambda i: questions[i].messages):
            places = list(same)  # of one prompt's samples
            try:
                prompt = prompt_ids(self._tokenizer, messages)
            except UserError as error:
                failed = self._refused(error)
                for place in places:
                    answers[place] = failed
                    on_finish(failed)
            else:
                self._refused_in_a_row = 0
                asked += places
                ids += [prompt] * len(places)
        return asked, ids

    def _refused(self, error: UserError) -> Answer:
        self._refused_in_a_row += 1
        if self._refused_in_a_row >= HOPELESS:
            raise RunError(
                f"teacher {self._teacher}: {self._refused_in_a_row} questions in a row fail, the last with: {error}; "
                "leave out prompts.system, or give it another template, then run again: finished parts are kept"
            )
        return Answer("", "error", error=str(error))


class LocalTeacher:
    """Any causal LM or adapter that transformers loads, decoded in batches without waiting for the slowest row."""

    def __init__(self, section: TeacherSection, device: torch.device, batch_size: int):
        self.name = section.model
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(section.model, section.chat_template_kwargs)
        self._section, self._device, self._model, self._ahead = section, device, None, None
        self.drafts = Drafts()  # of all answers so far
        self._prompts = Prompts(self.name, self.tokenizer)

    @property
    def model(self):
        """Loaded on first use: a finished stage is recognised without touching the weights."""
        if self._model is None:
            self._model = load_model(self._section.model, self._section.dtype, self._device)
            self._ahead = self._drafter()
        return self._model

    def _drafter(self) -> torch.nn.Module | None:
        """Who guesses ahead: the model that the recipe names, or a module beside the weights where answers are alone.

        Answers are the same with and without; in batches they are written sooner without.
        """
        section = self._section
        if section.draft is None:
            return load_ahead(section.model, self._model) if self.batch_size == 1 else None
        return load_model(section.draft, section.dtype, self._device)

    @property
    def opened(self) -> str:
        return opening(self.tokenizer)

    @property
    def context(self) -> int | None:
        """Tokens that it takes, prompt and answer."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _fits(self, longest: int) -> bool:
        """Whether so many tokens, and the guesses behind them, fit into both models. (`decode` says which do not.)"""
        context = self.context
        if self._section.draft:
            own = getattr(self._ahead.config.get_text_config(), "max_position_embeddings", None)
            context = min(context or math.inf, (own or math.inf) - self._section.draft_tokens)
        return longest <= (context or longest)

    def open(self) -> None:
        _ = self.model

    def identity(self) -> dict[str, Any]:
        return tokenizer_fingerprint(self.tokenizer)

    def answer(self, questions, sampling, on_finish) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(questions)
        asked, ids = self._prompts.read(questions, answers, on_finish)

        def finish(row: int, completion) -> None:
            text = whole_turn(self.tokenizer, self.tokenizer.decode(completion.ids, skip_special_tokens=True))
            answers[asked[row]] = Answer(
                text, completion.finish_reason, ids[row], completion.ids, completion.logprobs, completion.error,
                len(ids[row]), len(completion.ids),
            )  # fmt: skip
            on_finish(answers[asked[row]])

        given = {
            "eos_ids": eos_ids(self.model, self.tokenizer),
            "pad_id": self.tokenizer.pad_token_id,
            "vocab_limit": len(self.tokenizer),
        }
        keys = [questions[place].key for place in asked]
        longest = max(map(len, ids), default=0) + sampling.max_new_tokens
        if self._ahead is not None and not sampling.stop and self._fits(longest):
            decode_ahead(
                self.model, self._ahead, ids, sampling, keys=keys, **given, guesses=self._section.draft_tokens,
                batch_size=self.batch_size, on_finish=finish, drafts=self.drafts,
            )  # fmt: skip
            return answers
        decode(
            self.model,
            ids,
            sampling,
            **given,
            keys=keys,
            batch_size=self.batch_size,
            on_finish=finish,
            stopping=StopStringCriteria(self.tokenizer, list(sampling.stop)) if sampling.stop else None,
        )
        return answers

    def flops(self, prompt_tokens: int, completion_tokens: int, rows: int) -> int:
        # Each token attends to half of an average row.
        tokens = prompt_tokens + completion_tokens
        context = max(1, tokens // (2 * max(rows, 1)))
        return int(describe_model(self.model, context)["flops_per_token"] * tokens)


class TeachersByTag:
    """Several local teachers of one tokenizer: each answers the questions of its tags, `default` all others."""

    def __init__(self, default: LocalTeacher, by_tag: dict[str, LocalTeacher]):
        """Raises UserError where their prompts or tokens differ: rows are read with one tokenizer."""
        self.default, self.by_tag, self.name, self.opened = default, by_tag, default.name, default.opened
        self._all = list(dict.fromkeys([default, *by_tag.values()]))
        for teacher in by_tag.values():
            if teacher.identity() != default.identity():
                raise UserError(
                    f"generate.by_tag: {teacher.name} has another tokenizer or chat template than {default.name}; "
                    "specialists and teacher.model need the same"
                )

    def open(self) -> None:
        for teacher in self._all:
            teacher.open()

    def identity(self) -> dict[str, Any]:
        names = {tag: teacher.name for tag, teacher in self.by_tag.items()}
        return {**self.default.identity(), "by_tag": names}

    def answer(self, questions, sampling, on_finish) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(questions)
        owners = [self.by_tag.get(question.tag, self.default) for question in questions]
        for teacher in self._all:
            places = [i for i, owner in enumerate(owners) if owner is teacher]
            found = teacher.answer([questions[i] for i in places], sampling, on_finish) if places else []
            for place, answer in zip(places, found):
                answer.teacher = teacher.name
                answers[place] = answer
        return answers

    def flops(self, prompt_tokens: int, completion_tokens: int, rows: int) -> int:
        """Of the mean teacher: each answers some of the questions."""
        each = [teacher.flops(prompt_tokens, completion_tokens, rows) for teacher in self._all]
        return sum(each) // len(each)
