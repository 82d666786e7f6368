"""What is known of a question and its answers in `distill play`: tokens, experts, verdicts, and what just happened.

    token.probability, token.own, token.teacher, token.experts        # of one place of one answer
    asked.answers["student"].verdict

The engine (distill/play.py) fills these in while models speak, the page (distill/play_html.py) shows them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NOT_VERIFIED = "not verified"

Chosen = dict[str, list[tuple[int, float]]]  # of each routed layer: experts and weights, heaviest first


@dataclass(frozen=True)
class Change:
    """Other routing than the model's own. `drop`: {decoder layer or router name: experts}, as in interventions."""

    top_k: int | None = None
    drop: Mapping[int | str, Sequence[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.top_k is not None or any(self.drop.values())


@dataclass(frozen=True)
class Option:
    """A token that could stand at a place. `id` is in the vocabulary of the model that weighs it."""

    id: int
    text: str
    probability: float


@dataclass
class Token:
    """One token of an answer; `text` is "" where its bytes end in a later token. Options: likeliest first.

    `teacher` is None until the teacher has read the answer, and where it has no place that read the same text
    (another tokenizer); `teacher_probability`, of this very token, also wherever tokens are not shared.
    """

    id: int
    text: str
    probability: float
    own: list[Option]
    experts: Chosen
    teacher: list[Option] | None = None
    teacher_probability: float | None = None
    teacher_experts: Chosen = field(default_factory=dict)

    @property
    def parts(self) -> bool:
        """The teacher would have said something else here."""
        if not self.teacher:
            return False
        first = self.teacher[0]
        if self.teacher_probability is not None:
            return first.id != self.id
        return not (first.text.startswith(self.text) or self.text.startswith(first.text))


@dataclass
class Answer:
    """What one model said. `verdict`: one of distill.verify.VERDICTS or "not verified"; None while it speaks."""

    model: str
    change: Change
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None  # stop, length, error
    final: str | None = None
    verdict: str | None = None
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Reference:
    """How an answer to this question is checked: `answer` by `verifier`, known from `source`."""

    answer: str
    verifier: str
    source: str  # "rule" or "problem"
    family: str
    level: str | None
    split: str


@dataclass
class Asked:
    """One question and the answers to it so far, by model in the order of the players."""

    question: str
    messages: list[dict]
    reference: Reference | None
    temperature: float
    seed: int
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Spoke:
    """A token was added to the answer."""

    answer: Answer


@dataclass(frozen=True)
class Finished:
    """The answer is whole and has its verdict."""

    answer: Answer


@dataclass(frozen=True)
class Compared:
    """The teacher has read the answer."""

    answer: Answer
