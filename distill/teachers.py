"""Who answers the training prompts: one small protocol (distill/protocol.py), whoever the teacher is.

    teacher = open_teacher(recipe.teacher, device, batch_size)
    answers = teacher.answer(questions, sampling, on_finish)     # list[Answer], in the order of questions

A local model gives token ids and log-probabilities; an endpoint (distill/endpoint.py) gives text alone.
"""

from typing import Any

import torch
from transformers import StopStringCriteria

from distill.config import Teacher as TeacherSection
from distill.decode import decode
from distill.describe import describe_model
from distill.endpoint import EndpointTeacher
from distill.models import eos_ids, load_model, load_tokenizer, prompt_ids, tokenizer_fingerprint
from distill.protocol import Answer, Teacher


class LocalTeacher:
    """Any causal LM or adapter that transformers loads, decoded in batches without waiting for the slowest row."""

    def __init__(self, section: TeacherSection, device: torch.device, batch_size: int):
        self.name = section.model
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(section.model)
        self._section, self._device, self._model = section, device, None

    @property
    def model(self):
        """Loaded on first use: a finished stage is recognised without touching the weights."""
        if self._model is None:
            self._model = load_model(self._section.model, self._section.dtype, self._device)
        return self._model

    def open(self) -> None:
        _ = self.model

    def identity(self) -> dict[str, Any]:
        return tokenizer_fingerprint(self.tokenizer)

    def answer(self, questions, sampling, on_finish) -> list[Answer]:
        ids = [prompt_ids(self.tokenizer, q.messages) for q in questions]
        answers: list[Answer | None] = [None] * len(questions)

        def finish(row: int, completion) -> None:
            text = self.tokenizer.decode(completion.ids, skip_special_tokens=True)
            answers[row] = Answer(
                text, completion.finish_reason, ids[row], completion.ids, completion.logprobs, completion.error,
                len(ids[row]), len(completion.ids),
            )  # fmt: skip
            on_finish(answers[row])

        decode(
            self.model,
            ids,
            sampling,
            eos_ids=eos_ids(self.model, self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            keys=[q.key for q in questions],
            batch_size=self.batch_size,
            on_finish=finish,
            vocab_limit=len(self.tokenizer),
            stopping=StopStringCriteria(self.tokenizer, list(sampling.stop)) if sampling.stop else None,
        )
        return answers

    def flops(self, prompt_tokens: int, completion_tokens: int, rows: int) -> int:
        # Each token attends to half of an average row.
        tokens = prompt_tokens + completion_tokens
        context = max(1, tokens // (2 * max(rows, 1)))
        return int(describe_model(self.model, context)["flops_per_token"] * tokens)


def open_teacher(section: TeacherSection, device: torch.device, batch_size: int) -> Teacher:
    """The teacher a recipe names. Raises UserError where it cannot be reached or loaded."""
    if section.endpoint:
        return EndpointTeacher(section)
    return LocalTeacher(section, device, batch_size)
