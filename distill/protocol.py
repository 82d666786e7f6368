"""What is asked of a teacher and what comes back: the protocol between `generate` and whoever answers.

Every `Question` gets one `Answer`; one that failed has `error` set and is never dropped in silence.
`distill.teachers` answers with a local model, `distill.endpoint` through a server.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from distill.decode import Sampling


@dataclass(frozen=True)
class Question:
    """One sample to draw: `key` (seed, prompt_id, sample_idx) fixes its randomness."""

    messages: list[dict]
    key: tuple


@dataclass
class Answer:
    """prompt_ids and completion_ids are the teacher's own token ids, empty where it gives text alone."""

    text: str
    finish_reason: str  # "stop", "length" or "error"
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    signal_ids: bytes | None = None  # the teacher's distribution at every token (distill/signals.py)
    signal_values: bytes | None = None


class Teacher(Protocol):
    name: str

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
