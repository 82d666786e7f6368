"""The embedded tasks and their tokenizer: procedural problems with worked steps and one right answer.

Why: a distillation demo needs something a small teacher knows and a small student lacks, with no
download. Here that is the *working*: seven families (digit arithmetic and symbol manipulation) whose
answers are hard to guess in one go and easy to reach step by step. The public problem is a question and a
final answer; the steps exist only in `Problem.solution`, which the teacher is trained on.

Splits are disjoint by content: a problem's own content (not its wording, order of operands, seed or
index) is hashed into train, validation or test, so no recipe, size or seed can ever leak one into another.

    from distill.tasks import sample_problems, solve
    for p in sample_problems("test", per_cell=2, seed=0): print(p.question, p.solution, p.answer)
    solve("What is 2381 + 4410?")       # Known(family="addition", answer="6791", level="hard", split="train")
    solve("Why is the sky blue?")       # None: no rule knows

Where problems are drawn, the answer comes with the question. A person who types a question brings no answer, so
`solve` reads the question back: the families' own wordings, any letter case, with or without the full stop, and
bare arithmetic (`12 * 7`). The sizes need not be those of a level; a right answer is right.

The embedded tokenizer: byte-level BPE over the tasks' own text, digits kept single, with a chat template.

Why not a hub tokenizer: a 150,000-row embedding would be 95 % of a million-parameter student. Why bytes
underneath: any text encodes and decodes unchanged, so nothing a person types is ever "unknown".
The teacher and the base student share it, which whole-vocabulary divergences need.

    tokenizer = build_tokenizer(); tokenizer.save_pretrained("some/folder")
"""

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEVELS = ("easy", "medium", "hard")
SPLITS = ("train", "validation", "test")

# Digits of the numbers (or symbols of the list) by level. Longer means more steps of the same kind, so a
# student that knows the easy steps has the vocabulary of the hard ones, and still fails at them.
_DIGITS = {"easy": 2, "medium": 3, "hard": 4}
_SORTED = {"easy": 4, "medium": 6, "hard": 8}
_REVERSED = {"easy": 4, "medium": 6, "hard": 9}
_COUNTED = {"easy": 5, "medium": 9, "hard": 13}
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Problem:
    """One question with its final answer and the worked steps that lead there.

    `prompt_id` is derived from the content alone: the same problem has the same id in every run.
    """

    prompt_id: str
    family: str
    level: str
    split: str
    question: str
    answer: str
    steps: str

    @property
    def solution(self) -> str:
        """The completion the teacher is trained on: steps in <think> tags, then the final answer."""
        return f"<think>{self.steps}</think>{self.answer}"


@dataclass(frozen=True)
class _Draft:
    """What a family produces: `content` identifies the problem whatever its wording."""

    content: str
    questions: tuple[str, ...]
    answer: str
    steps: str


def _number(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _addition(rng: random.Random, level: str) -> _Draft:
    a, b = _number(rng, _DIGITS[level]), _number(rng, _DIGITS[level])
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    # a + b and b + a are the same problem: the content is the unordered pair.
    content = f"{min(a, b)}+{max(a, b)}"
    return _Draft(content, (f"What is {a} + {b}?", f"Add {a} and {b}."), str(a + b), " ".join(steps))


def _subtraction(rng: random.Random, level: str) -> _Draft:
    a, b = sorted((_number(rng, _DIGITS[level]), _number(rng, _DIGITS[level])), reverse=True)
    steps, borrow = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        rest = int(x) - int(y) - borrow
        steps.append(f"{x}-{y}-{borrow}={int(rest < 0)}{rest % 10}")  # borrow, then the digit
        borrow = int(rest < 0)
    return _Draft(f"{a}-{b}", (f"What is {a} - {b}?", f"Subtract {b} from {a}."), str(a - b), " ".join(steps))


def _multiplication(rng: random.Random, level: str) -> _Draft:
    a, b = _number(rng, _DIGITS[level]), rng.randint(2, 9)
    steps, carry = [], 0
    for x in reversed(str(a)):
        total = int(x) * b + carry
        steps.append(f"{x}*{b}+{carry}={total:02d}")
        carry = total // 10
    return _Draft(f"{a}*{b}", (f"What is {a} * {b}?", f"Multiply {a} by {b}."), str(a * b), " ".join(steps))


def _modulo(rng: random.Random, level: str) -> _Draft:
    a, m = _number(rng, _DIGITS[level]), rng.randint(3, 9)
    steps, rest = [], 0
    for x in str(a):
        steps.append(f"{rest}{x}%{m}={(10 * rest + int(x)) % m}")
        rest = (10 * rest + int(x)) % m
    questions = (f"What is the remainder of {a} divided by {m}?", f"What is {a} modulo {m}?")
    return _Draft(f"{a}%{m}", questions, str(a % m), " ".join(steps))


def _sorting(rng: random.Random, level: str) -> _Draft:
    digits = [rng.randint(0, 9) for _ in range(_SORTED[level])]
    runs = [sorted(digits[i : i + 2]) for i in range(0, len(digits), 2)]
    steps = []
    while len(runs) > 1:  # merge sort: pairs, then fours; the last merge is the answer itself
        steps.append(" ".join("".join(map(str, run)) for run in runs))
        runs = [sorted(itertools.chain(*runs[i : i + 2])) for i in range(0, len(runs), 2)]
    text = "".join(map(str, digits))
    questions = (f"Sort the digits {text} in ascending order.", f"Put the digits {text} in order.")
    return _Draft(text, questions, "".join(map(str, runs[0])), ", ".join(steps))


def _reversing(rng: random.Random, level: str) -> _Draft:
    letters = [rng.choice(_ALPHABET) for _ in range(_REVERSED[level])]
    steps = " ".join(f"{letter}{i}" for i, letter in enumerate(letters, 1))
    text = " ".join(letters)
    questions = (f"Reverse the letters {text}", f"Write in reverse order: {text}")
    return _Draft(text, questions, " ".join(reversed(letters)), steps)


def _counting(rng: random.Random, level: str) -> _Draft:
    letters = [rng.choice(_ALPHABET[:5]) for _ in range(_COUNTED[level])]
    wanted = rng.choice(_ALPHABET[:5])
    # A count of ten would be the only two-digit label in the steps; keep labels one digit.
    while letters.count(wanted) > 9:
        letters[letters.index(wanted)] = rng.choice([c for c in _ALPHABET[:5] if c != wanted])
    steps = " ".join(f"{c}{letters[: i + 1].count(wanted)}" for i, c in enumerate(letters))
    text = " ".join(letters)
    questions = (f"How many times does {wanted} appear in {text}?", f"Count the letter {wanted} in {text}.")
    return _Draft(f"{wanted}:{text}", questions, str(letters.count(wanted)), steps)


FAMILIES: dict[str, Callable[[random.Random, str], _Draft]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "modulo": _modulo,
    "sorting": _sorting,
    "reversing": _reversing,
    "counting": _counting,
}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def split_of(family: str, content: str) -> str:
    """The split that a problem belongs to for ever: 80 % train, 5 % validation, 15 % test, by content."""
    bucket = int(_digest(f"{family}|{content}"), 16) % 100
    return "train" if bucket < 80 else "validation" if bucket < 85 else "test"


_SHARES = {"train": 0.80, "validation": 0.05, "test": 0.15}


def available(family: str, level: str, split: str) -> int:
    """How many different prompts there are, about: contents of this size, their wordings, the share of the split."""
    numbers = 9 * 10 ** (_DIGITS[level] - 1)
    contents = {
        "addition": numbers * (numbers + 1) // 2,
        "subtraction": numbers * (numbers + 1) // 2,
        "multiplication": 8 * numbers,
        "modulo": 7 * numbers,
        "sorting": 10 ** _SORTED[level],
        "reversing": len(_ALPHABET) ** _REVERSED[level],
        "counting": 5 * 5 ** _COUNTED[level],
    }[family]
    return round(2 * _SHARES[split] * contents)


def sample_problem(family: str, level: str, split: str, rng: random.Random) -> Problem:
    """Draw one problem of `family` and `level` whose content belongs to `split`."""
    while True:
        draft = FAMILIES[family](rng, level)
        if split_of(family, draft.content) == split:
            wording = rng.randrange(len(draft.questions))
            prompt_id = f"{family}-{level}-{_digest(draft.content)}-{wording}"
            question = draft.questions[wording]
            return Problem(prompt_id, family, level, split, question, draft.answer, draft.steps)


def sample_problems(
    split: str,
    counts: dict[str, int],
    seed: int,
    families: Iterable[str] = tuple(FAMILIES),
    distinct: bool = True,
) -> list[Problem]:
    """`counts[level]` problems of each level, dealt evenly over the families, in a shuffled order.

    With `distinct`, no prompt occurs twice; where a cell of the grid has too few different problems
    (two-digit arithmetic has hundreds, not millions) it gives what it has. Without it, repeats are
    allowed, which a from-scratch training set needs to have the proportions it asks for.
    """
    families = list(families)
    rng = random.Random(f"{split}|{seed}")
    problems: list[Problem] = []
    for level, count in counts.items():
        for i, family in enumerate(families):
            wanted = count // len(families) + (i < count % len(families))
            problems += _sample_cell(family, level, split, wanted, rng, distinct)
    rng.shuffle(problems)
    return problems


def _sample_cell(
    family: str, level: str, split: str, wanted: int, rng: random.Random, distinct: bool
) -> list[Problem]:
    found: list[Problem] = []
    seen: set[str] = set()
    misses = 0
    # 2,000 draws in a row without a new problem: the cell is (all but certainly) exhausted.
    while len(found) < wanted and misses < 2000:
        problem = sample_problem(family, level, split, rng)
        if distinct and problem.prompt_id in seen:
            misses += 1
            continue
        misses = 0
        seen.add(problem.prompt_id)
        found.append(problem)
    return found


READ_LIMIT = 400  # characters of a question that are read; the rules are exact at any length, people are not


@dataclass(frozen=True)
class Known:
    """What a rule knows about a question.

    `level` is that of problems of this size, None for a size that no level has. `split`: where this content
    belongs (distill.tasks.problems.split_of); what is not in "train" was never shown to a student or teacher.
    """

    family: str
    answer: str
    level: str | None
    split: str


def solve(question: str) -> Known | None:
    """The right answer where `question` is one of the embedded families', else None. Never an exception."""
    text = " ".join(question.split()).rstrip(" .?!=").lower()
    for family, pattern, rule in _RULES if len(question) <= READ_LIMIT else ():
        if (match := pattern.fullmatch(text)) and (found := rule(*match.groups())):
            answer, content, level = found
            return Known(family, answer, level, split_of(family, content))
    return None


Found = tuple[str, str, str | None]  # answer, content as distill.tasks.problems writes it, level


def _level(sizes: dict[str, int], *given: int) -> str | None:
    return next((level for level, size in sizes.items() if set(given) == {size}), None)


def _add(a: str, b: str) -> Found:
    low, high = sorted((int(a), int(b)))
    return str(low + high), f"{low}+{high}", _level(_DIGITS, len(str(low)), len(str(high)))


def _subtract(a: str, b: str) -> Found:
    a, b = int(a), int(b)
    return str(a - b), f"{a}-{b}", _level(_DIGITS, len(str(a)), len(str(b))) if a >= b else None


def _subtract_from(b: str, a: str) -> Found:
    return _subtract(a, b)


def _multiply(a: str, b: str) -> Found:
    # The one-digit factor stands last where problems are drawn.
    b, a = sorted((int(a), int(b)))
    return str(a * b), f"{a}*{b}", _level(_DIGITS, len(str(a))) if 2 <= b <= 9 else None


def _remainder(a: str, m: str) -> Found | None:
    a, m = int(a), int(m)
    if m == 0:
        return None
    return str(a % m), f"{a}%{m}", _level(_DIGITS, len(str(a))) if 3 <= m <= 9 else None


def _sort(digits: str) -> Found:
    return "".join(sorted(digits)), digits, _level(_SORTED, len(digits))


def _reverse(text: str) -> Found:
    letters = text.split()
    return " ".join(reversed(letters)), " ".join(letters), _level(_REVERSED, len(letters))


def _count(wanted: str, text: str) -> Found:
    letters = text.split()
    level = _level(_COUNTED, len(letters)) if {wanted, *letters} <= set("abcde") else None
    return str(letters.count(wanted)), f"{wanted}:{' '.join(letters)}", level


def _rule(family: str, wordings: str, rule: Callable[..., Found | None]):
    return family, re.compile(wordings), rule


_INT, _LETTERS, _IS = r"([0-9]+)", r"([a-z](?: [a-z])*)", "(?:what is )?"
_RULES = [
    _rule("addition", rf"{_IS}{_INT} ?\+ ?{_INT}", _add),
    _rule("addition", rf"add {_INT} and {_INT}", _add),
    _rule("subtraction", rf"{_IS}{_INT} ?[-−–] ?{_INT}", _subtract),
    _rule("subtraction", rf"subtract {_INT} from {_INT}", _subtract_from),
    _rule("multiplication", rf"{_IS}{_INT} ?[*×·x] ?{_INT}", _multiply),
    _rule("multiplication", rf"multiply {_INT} by {_INT}", _multiply),
    _rule("modulo", rf"what is the remainder of {_INT} divided by {_INT}", _remainder),
    _rule("modulo", rf"{_IS}{_INT} ?(?:modulo|mod|%) ?{_INT}", _remainder),
    _rule("sorting", rf"sort the digits {_INT} in ascending order", _sort),
    _rule("sorting", rf"put the digits {_INT} in order", _sort),
    _rule("reversing", rf"reverse the letters {_LETTERS}", _reverse),
    _rule("reversing", rf"write in reverse order: ?{_LETTERS}", _reverse),
    _rule("counting", rf"how many times does ([a-z]) appear in {_LETTERS}", _count),
    _rule("counting", rf"count the letter ([a-z]) in {_LETTERS}", _count),
]


# ==== The embedded tokenizer ====

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
THINK, END_THINK = "<think>", "</think>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(vocabulary: int = 512, context: int = 256) -> "PreTrainedTokenizerFast":
    """Train the tokenizer on 2,100 training problems of fixed seed: the same files every time.

    `vocabulary` is an upper limit; training stops earlier when every word of the tasks is one token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Single digits, so that place value is visible; everything else in words as GPT-2 splits them.
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=5,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    problems = sample_problems("train", dict.fromkeys(LEVELS, 700), seed=0)
    tokenizer.train_from_iterator(
        (text for p in problems for text in (p.question, p.steps, p.answer)), trainer
    )
    # Thinking tags are ordinary text to a reader: kept by decode(skip_special_tokens=True).
    tokenizer.add_tokens([AddedToken(THINK, special=False), AddedToken(END_THINK, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
