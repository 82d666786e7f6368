"""What is known of a question and its answers in `distill play`: tokens, experts, verdicts, and what just happened.

    token.probability, token.own, token.teacher, token.experts        # of one place of one answer
    asked.answers["student"].verdict

The engine (distill/play/engine.py) fills these in while models speak, the page
(distill/play/html.py) shows them.

`find_setup` says who plays and with what: the checkpoints, teacher and problems on the page.

    setup = find_setup(["checkpoints/demo"])                        # a run: base, control, student, teacher
    setup = find_setup(["checkpoints/base", "MINE"], teacher="checkpoints/teacher", tasks=["gsm8k:test.jsonl"])

A run folder is short for the checkpoints of its recipe; its problems are the recipe's held-out ones. Without a run
they are those of the embedded tasks, or of `tasks`. No weight is read here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distill import console
from distill.config.data import Prompts
from distill.config.evaluation import Evaluate
from distill.config.recipe import Recipe, load_recipe
from distill.data.prompts import held_out, named_problems
from distill.errors import UserError
from distill.storage import find_file
from distill.tasks.corpus import PRESETS, split_task
from distill.tasks.problems import FAMILIES, LEVELS

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
class TokenOption:
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
    own: list[TokenOption]
    experts: Chosen
    teacher: list[TokenOption] | None = None
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
class PlayedAnswer:
    """What one model said. `verdict`: one of distill.tasks.verify.VERDICTS or "not verified"; None while it speaks."""

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
class PlayedReference:
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
    reference: PlayedReference | None
    temperature: float
    seed: int
    answers: dict[str, PlayedAnswer]


@dataclass(frozen=True)
class Spoke:
    """A token was added to the answer."""

    answer: PlayedAnswer


@dataclass(frozen=True)
class Finished:
    """The answer is whole and has its verdict."""

    answer: PlayedAnswer


@dataclass(frozen=True)
class Compared:
    """The teacher has read the answer."""

    answer: PlayedAnswer


EXAMPLES = 5  # questions to click
_EXAMPLE_LEVELS = ("hard", "medium", "easy")
PER_CELL = 3  # problems to pick from, of each embedded family and level
OFFERED = 120  # problems to pick from, at most


@dataclass(frozen=True)
class Setup:
    """`checkpoints`: path by name, in the order shown. `teacher`: the name of one of them, None without."""

    checkpoints: dict[str, str]
    teacher: str | None = None
    problems: list[dict] = field(default_factory=list)
    system: str | None = None
    max_new_tokens: int = 256
    title: str = ""
    embedded: bool = (
        False  # whether the problems are the embedded families, and nothing but these was asked for
    )


def find_setup(
    targets: list[str],
    teacher: str | None = None,
    tasks: list[str] | None = None,
    max_new_tokens: int | None = None,
) -> Setup:
    """Raises UserError for a run without a student, a folder that is neither run nor checkpoint, unread tasks."""
    _check_tasks(tasks or [])
    runs = {target: _run_recipe(target) for target in targets if is_run(target)}
    checkpoints: dict[str, str] = {}
    for target in targets:
        found = _of_run(target, runs[target]) if target in runs else {Path(target).name: target}
        for name, path in found.items():
            if name in checkpoints:  # another run's student, or another folder of that name
                place = target.strip("/").replace("/", "-")
                name = f"{place}-{name}" if target in runs else place
            checkpoints[name] = path
    if teacher:
        others = {n: p for n, p in checkpoints.items() if p != teacher and n != "teacher"}
        checkpoints = {**others, "teacher": teacher}
    recipe = next(iter(runs.values()), None)
    limit = max_new_tokens or (recipe.evaluate.max_new_tokens if recipe else Setup.max_new_tokens)
    return Setup(
        checkpoints,
        "teacher" if "teacher" in checkpoints else None,
        _problems(recipe, tasks),
        recipe.prompts.system if recipe else None,
        limit,
        ", ".join(Path(target).name for target in targets if target in runs) or ", ".join(checkpoints),
        all(task in LEVELS for task in tasks or []) and (not recipe or recipe.prompts.source == "tasks"),
    )


def examples(problems: list[dict]) -> list[str]:
    """A few questions to begin with: short ones of different families, the hardest level first."""
    levels = [level for level in _EXAMPLE_LEVELS if any(p["level"] == level for p in problems)]
    levels = levels or list(dict.fromkeys(p["level"] for p in problems))
    of_level = {level: _a_family_each(p for p in problems if p["level"] == level) for level in levels}
    chosen: list[dict] = []
    while len(chosen) < EXAMPLES and any(of_level.values()):
        for level in levels:
            used = {p["family"] for p in chosen}
            fresh = [p for p in of_level[level] if p["family"] not in used] or of_level[level]
            if fresh and len(chosen) < EXAMPLES:
                chosen.append(fresh[0])
                of_level[level].remove(fresh[0])
    return [problem["messages"][-1]["content"] for problem in chosen]


def _a_family_each(problems: Iterable[dict]) -> list[dict]:
    """The shortest question of each family."""
    shortest: dict[str, dict] = {}
    for problem in sorted(problems, key=lambda p: len(p["messages"][-1]["content"])):
        shortest.setdefault(problem["family"], problem)
    return list(shortest.values())


def _check_tasks(tasks: list[str]) -> None:
    known = [*LEVELS, *PRESETS]
    missing = [
        f"--tasks {task}: neither a level, a preset ({', '.join(known)}), hub:org/name nor a file"
        for task in tasks
        if not (task in known or task.startswith("hub:") or Path(split_task(task)[1]).is_file())
    ]
    if missing:
        raise UserError(*missing)


def is_run(target: str) -> bool:
    """A folder that is no checkpoint itself."""
    folder = find_file(target)
    return folder.is_dir() and not any(
        (folder / name).is_file() for name in ("config.json", "adapter_config.json")
    )


def _run_recipe(target: str) -> Recipe:
    folder = find_file(target)
    if not (folder / "student" / "manifest.json").is_file():
        raise UserError(
            f"{target} has no finished student; `distill run RECIPE run_dir={target}` makes one, or name checkpoints"
        )
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{target} has no recipe.yaml; name its checkpoints instead: distill play {target}/student"
        )
    return load_recipe(str(folder / "recipe.yaml"))


def _of_run(target: str, recipe: Recipe) -> dict[str, str]:
    """The checkpoints of a run that are there. A student from scratch has no base, a served teacher no weights."""
    folder = find_file(target)
    found = {"base": recipe.student.model} if recipe.student.model else {}
    arms = (name for name in ("control", "student") if (folder / name / "manifest.json").is_file())
    found |= {name: str(folder / name) for name in arms}
    if recipe.teacher and not recipe.teacher.endpoint:
        found["teacher"] = recipe.teacher.model
    return found


def _problems(recipe: Recipe | None, tasks: list[str] | None) -> list[dict]:
    """Held-out problems, those of one family and level beside each other. Problems are a help, not a need."""
    named = [task for task in tasks or [] if task not in LEVELS]
    found = [problem for task in named for problem in named_problems(task, Prompts())]
    levels = [level for level in LEVELS if level in tasks] if tasks else LEVELS
    try:
        if recipe and not tasks:
            section = recipe.evaluate.model_copy(
                update={"levels": _few(recipe.evaluate.levels), "limit": OFFERED}
            )
            found += held_out(section, recipe.prompts, recipe.seed)
        elif levels:
            found += held_out(Evaluate(levels=_few(levels)), Prompts(), seed=0)
    except UserError as error:
        console.warn(f"no problems to pick from: {error.problems[0]}")
    order = list(dict.fromkeys([*LEVELS, *(p["level"] for p in found)]))
    return sorted(found, key=lambda p: (order.index(p["level"]), p["family"]))[:OFFERED]


def _few(levels) -> dict[str, int]:
    return dict.fromkeys(levels, PER_CELL * len(FAMILIES))
