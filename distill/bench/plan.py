"""The runs that a grid asks for: which recipe each is, what it needs first, what may be shared.

    bench, file = load_bench("recipes/claims.yaml")
    tasks = plan(bench, "small", file)               # in an order in which each finds what it needs

Four kinds of tasks: `base` (a student made from a model, `student.from`), `answers` (prompts and what a teacher says of
them), `rows` (the training set made of those) and `run` (training and measuring). Runs whose recipes agree on
everything that a teacher's answers depend on share them, and so with rows and bases: one generation serves all arms of
a seed. Nothing heavy is imported here.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.bench.claims import Claim
from distill.bench.grid import Arm, Bench, arms_within
from distill.bench.metrics import MODEL
from distill.config.recipe import BASE_FOLDER, Recipe, make_recipe, read_recipe
from distill.errors import UserError
from distill.storage import fingerprint

MADE = "student.from"  # as an arm's `checkpoint`: what the recipe makes its student from, before training
KNOWN_BEFORE = ("prompts", "steps", "rows")  # of distill.bench.claims.EQUAL: recipes settle these


@dataclass
class Task:
    kind: str  # "base", "answers", "rows" or "run"
    name: str
    folder: Path
    recipe: Recipe  # with run_dir = folder
    needs: list[str] = field(default_factory=list)
    arm: str = ""
    seed: int = 0
    rows: Path | None = None  # run: whose dataset it trains on; rows: whose answers it is made from
    checkpoint: str | None = None  # run: measured as it is
    merged: bool = False  # run: another run starts from its student
    probes: str | None = None


def plan(bench: Bench, budget: str, file: Path) -> dict[str, Task]:
    """{name: task} of a budget. Raises UserError for recipes that do not hold, or claims between unequal arms."""
    arms = arms_within(bench, budget)
    problems: list[str] = []
    tasks: dict[str, Task] = {}
    root = Path(bench.run_dir)
    wanted = {arm.start for arm in arms.values() if arm.start}
    for name, arm in arms.items():
        for seed in [bench.first_seed] if arm.once else bench.seeds_of(name, budget):
            try:
                run = _run(bench, name, arm, seed, root, arms, file)
            except UserError as error:
                problems += [f"arm {name}: {line}" for line in error.problems]
                break
            run.merged = name in wanted
            _made(run, root, tasks)
            if not arm.checkpoint:
                first = name
                while arms[first].start:
                    first = arms[first].start
                begun = run if first == name else _run(bench, first, arms[first], seed, root, arms, file)
                _made(begun, root, tasks)
                _share(run, begun, root, tasks, arms)
            tasks[run.name] = run
    if not problems:
        problems = [
            p for claim in bench.claims if bench.within(budget, claim) for p in _unequal(bench, claim, tasks)
        ]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return tasks


def run_name(arm: str, seed: int) -> str:
    return f"{arm}-{seed}"


def runs_of(bench: Bench, arm: str, seed: int, arms: dict[str, Arm]) -> str:
    """The run that stands for `arm` in `seed`: its own, or the one that serves all seeds."""
    return run_name(arm, bench.first_seed if arms[arm].once else seed)


def _run(bench: Bench, name: str, arm: Arm, seed: int, root: Path, arms: dict[str, Arm], file: Path) -> Task:
    changes = {**bench.set, **bench.changes(name)}
    needs, folder = [], root / run_name(name, seed)
    if arm.start:
        needs.append(runs_of(bench, arm.start, seed, arms))
        changes["student.model"] = str(root / needs[-1] / "start")
    if arm.teacher:
        needs.append(runs_of(bench, arm.teacher, seed, arms))
        changes["teacher.model"] = str(root / needs[-1] / "student")
    if arm.teachers:
        made = {tag: runs_of(bench, other, seed, arms) for tag, other in arm.teachers.items()}
        needs += dict.fromkeys(made.values())
        places = {tag: str(root / run / "student") for tag, run in made.items()}
        changes["train.teachers.models"] = places
        if arm.averaged:
            first, *others = dict.fromkeys(places.values())
            changes |= {"student.from": {"model": first, "average": others}, "student.model": None}
            changes.pop("train.teachers.models")
    if arm.checkpoint and arm.checkpoint != MADE:
        changes |= {"student.model": arm.checkpoint, "student.config": None, "student.from": None}
    fixed = {"run_dir": str(folder), "seed": seed + arm.seed_offset, "control.enabled": False}
    if "teacher" not in changes.get("evaluate.models", ()):
        fixed["evaluate.models"] = [MODEL]
    if isinstance(bench.recipe, str):
        where, data = read_recipe(bench.recipe)
    else:
        where, data = file, json.loads(json.dumps(bench.recipe))
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**changes, **fixed}.items()]
    recipe = make_recipe(data, overrides, where)
    return Task(
        "run", folder.name, folder, recipe, needs, name, seed, checkpoint=arm.checkpoint, probes=arm.probes
    )


def _made(run: Task, root: Path, tasks: dict[str, Task]) -> None:
    """A student that is made from a model is made once, for all runs that start from the same."""
    student = run.recipe.student
    if student.made_from is None:
        return
    made = run.recipe.base_identity
    key = fingerprint([made if len(made) > 1 else made["from"], student.chat_template_kwargs])
    name = f"base-{key[:12]}"
    folder = root / "shared" / name
    base = student.model_copy(update={"model": str(folder / BASE_FOLDER)})
    if name not in tasks:
        recipe = run.recipe.model_copy(update={"run_dir": str(folder), "student": base})
        tasks[name] = Task("base", name, folder, recipe, list(run.needs))
    run.recipe = run.recipe.model_copy(update={"student": base.model_copy(update={"made_from": None})})
    run.needs = [*run.needs, name]
    if run.checkpoint == MADE:
        run.checkpoint = base.model


def _share(run: Task, begun: Task, root: Path, tasks: dict[str, Task], arms: dict[str, Arm]) -> None:
    """The tasks that make the run's training set, new ones where no other run has asked for the same.

    `begun`: the run that this one's chain of `start` begins with. Rows are in its student's tokenizer, and that student
    is there before anything has been trained.
    """
    recipe, origin = run.recipe, begun.recipe.student
    made_bases = [need for need in begun.needs if need in tasks and tasks[need].kind == "base"]
    whole: dict[str, Any] = {
        "prompts": recipe.prompts.identity(),
        "seed": recipe.seed,
        "teacher": recipe.teacher.identity() if recipe.teacher else None,
        "generate": recipe.generate.identity() if recipe.teacher else None,
    }
    if recipe.generate.by_tag:
        whole["teachers"] = recipe.train.teachers.models
    arm = arms[run.arm]
    teachers = {arm.teacher, *(arm.teachers.values() if recipe.generate.by_tag else ())} - {None}
    taught = [need for need in run.needs if need.rpartition("-")[0] in teachers]
    answers = _shared("answers", fingerprint(whole), run, root, tasks, taught)
    tokenizer = origin.model or origin.tokenizer
    made = {**whole, "filter": recipe.filter.model_dump(mode="json"), "tokenizer": tokenizer}
    if recipe.evaluate.source or recipe.filter.decontaminate:
        made["held_out"] = recipe.evaluate.model_dump(mode="json")
    rows = _shared("rows", fingerprint(made), run, root, tasks, [answers.name, *made_bases])
    rows.recipe = rows.recipe.model_copy(update={"student": origin})
    rows.rows = answers.folder
    run.rows = rows.folder
    run.needs = [*run.needs, rows.name]


def _shared(kind: str, key: str, run: Task, root: Path, tasks: dict[str, Task], needs: list[str]) -> Task:
    name = f"{kind}-{key[:12]}"
    if name not in tasks:
        folder = root / "shared" / name
        recipe = run.recipe.model_copy(update={"run_dir": str(folder)})
        tasks[name] = Task(kind, name, folder, recipe, needs)
    return tasks[name]


def _unequal(bench: Bench, claim: Claim, tasks: dict[str, Task]) -> list[str]:
    """What the arms of a claim should have in common and their recipes say they do not."""
    arms = dict.fromkeys(term.partition("@")[0] for term in claim.terms(bench.factorial))
    first = [next((t for t in tasks.values() if t.arm == arm), None) for arm in arms]
    trained = [task for task in first if task is not None and not task.checkpoint]
    problems = []
    for key in (key for key in claim.equal if key in KNOWN_BEFORE):
        values = {task.arm: known_budget(task)[key] for task in trained}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{arm} {value}" for arm, value in values.items())
            problems.append(
                f"claim {claim.id}: arms differ in {key} ({shown}), so the comparison is not of the technique alone; "
                f"make them equal, or take {key} out of `equal` and say in `axis` what is held equal instead"
            )
    return problems


def known_budget(task: Task) -> dict[str, Any]:
    """What a recipe settles of a run's budget: which prompts (a fingerprint), steps, rows of all steps."""
    train = task.recipe.train
    # The worked solutions of the embedded tasks are another text for the same prompts.
    prompts = task.recipe.prompts.identity(exclude={"solutions"})
    return {
        "prompts": fingerprint([prompts, task.seed])[:8],
        "steps": train.steps,
        "rows": train.steps * train.batch_size,
    }
