"""Rows of plain text: documents cut into windows of tokens, to train on without questions or answers.

    prompts: {documents: true, source: python-docs, window: 128}

There is nothing for the teacher to write and nothing to verify: the stage `generations/` falls away, and a live teacher
scores the text itself (`forward_kl` and the like). The control arm reads the same rows by cross-entropy alone, so that
both arms see equal tokens. A row is one window: its first token is context, every other one is trained on; windows
touch, so that each token of a document is trained on once. The first window of a document begins with the tokenizer's
BOS token, or its end token where it has none, as text is read in evaluation (distill/evaluation/likelihood.py).
"""

from collections.abc import Iterator
from typing import Any

from distill.config.data import Prompts
from distill.errors import UserError
from distill.tasks.documents import documents

_SHORTEST = 8  # tokens of a row: a document's last few are not worth one


def document_prompts(section: Prompts) -> list[dict[str, Any]]:
    """Rows of the stage `prompts/`, one per document. Raises UserError for a source that cannot be read."""
    texts = documents(section.source, "train", "prompts.source")[: section.limit]
    return [
        {
            "prompt_id": f"document-{number:05d}",
            "messages": [],
            "answer": "",
            "verifier": "exact",
            "family": "text",
            "level": "text",
            "split": "train",
            "solution": None,
            "completion": text,
            "question": None,
        }
        for number, text in enumerate(texts)
    ]


def document_rows(prompts: dict[str, dict], tokenizer, window: int) -> Iterator[dict[str, Any]]:
    """Training rows of DATASET_SCHEMA: windows of at most `window` tokens, the first of which is context."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for prompt in prompts.values():
        tokens = [
            first,
            *tokenizer(prompt["completion"], add_special_tokens=False, verbose=False)["input_ids"],
        ]
        for number, start in enumerate(range(0, len(tokens) - 1, window - 1)):
            piece = tokens[start : start + window]
            if len(piece) < _SHORTEST and number:
                continue
            yield {
                "prompt_id": prompt["prompt_id"],
                "sample_idx": number,
                "messages": [],
                "prompt_ids": piece[:1],
                "completion_ids": piece[1:],
                "text": tokenizer.decode(piece[1:]),
                "family": prompt["family"],
                "level": prompt["level"],
            }


def check_documents(section: Prompts, context: int | None) -> None:
    """Raises UserError for windows that the student cannot read."""
    if context is not None and section.window > context:
        raise UserError(
            f"prompts.window={section.window}: the student reads {context} tokens at most; lower it"
        )
