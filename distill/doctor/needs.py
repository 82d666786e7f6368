"""What later stages will need, asked before the first one spends anything: folders, packages, problems, files.

Each is a function of a `Pair` (distill/doctor/pair.py) that returns findings. Without these checks a run generates
and trains for hours, and then says that a package, a level or a text file is missing.
"""

from distill.config.evaluation import Evaluate
from distill.doctor.findings import FAIL, OK, WARN, Finding, failures
from distill.doctor.pair import Pair
from distill.errors import UserError
from distill.evaluation.evaluate import check_measured
from distill.evaluation.interventions import check_interventions
from distill.files import folder_problem, shown
from distill.models.load import check_quantize
from distill.tasks.problems import available
from distill.tasks.verify import require_package

MOST_ROWS = 10_000_000  # prompts are held in memory, about 1 kB each


def run_folder(pair: Pair) -> list[Finding]:
    """That the run's folder can be made, or written to."""
    problem = folder_problem(pair.recipe.run_dir)
    if problem:
        text, _, fix = f"run_dir={shown(pair.recipe.run_dir)} {problem}".rpartition("; ")
        return [Finding("run_dir", FAIL, text, fix)]
    return [Finding("run_dir", OK, pair.recipe.run_dir)]


def packages(pair: Pair) -> list[Finding]:
    """Extras that a stage imports only when it comes to it."""
    recipe, found = pair.recipe, []
    asked = [("generate", recipe.prompts.verifier), ("evaluate", recipe.prompts.verifier)]
    needed = [lambda v=v: require_package(v) for stage, v in asked if pair.does(stage)]
    if recipe.teacher and pair.does("train"):
        needed.append(lambda: _named("teacher", recipe.teacher.quantize, pair))
    if pair.does("train"):
        needed.append(lambda: _named("student", recipe.student.quantize, pair))
    for check in needed:
        try:
            check()
        except UserError as error:
            found += failures("packages", error)
    return found


def _named(section: str, quantize: str, pair: Pair) -> None:
    try:
        check_quantize(quantize, pair.device)
    except UserError as error:
        raise UserError(
            *(f"{section}.{line}, or set {section}.quantize=none" for line in error.problems)
        ) from None


def problems(pair: Pair) -> list[Finding]:
    """That as many embedded problems exist as are asked for, to train on and to measure with."""
    recipe, found = pair.recipe, []
    section = recipe.prompts
    if section.source == "tasks" and pair.does("generate"):
        found += enough("prompts.levels", section.levels, section.families, "train", section.distinct)
    if not recipe.evaluate.source and pair.does("evaluate"):
        found += enough("evaluate.levels", recipe.evaluate.levels, section.families, recipe.evaluate.split)
    return found


def enough(
    key: str, levels: dict[str, int], families: list[str], split: str, distinct: bool = True
) -> list[Finding]:
    """Findings of one key: nothing asked for, more than there are, or more than memory holds."""
    asked = sum(levels.values())
    if not asked or not families:
        where = "prompts.families names none" if not families else f"{key} asks for 0"
        example = "100" if key.startswith("-") else "'{easy: 100}'"
        text = f"{where}: there are no problems"
        return [Finding("problems", FAIL, text, f"set {key} to {example}, for example")]
    if asked > MOST_ROWS:
        text = f"{key} asks for {asked:,} problems, which are held in memory"
        return [Finding("problems", FAIL, text, f"at most {MOST_ROWS:,} in all")]
    found = []
    for level, count in levels.items() if distinct else ():
        there = {family: available(family, level, split) for family in families}
        if count > sum(there.values()):
            text = f"{key}: {count:,} different {level} problems of the split {split} do not exist, about "
            fix = f"{key}.{level}={sum(there.values()) // 10} or fewer"
            if split == "train":
                fix += ", or prompts.distinct=false (repeats)"
            found.append(Finding("problems", FAIL, f"{text}{sum(there.values()):,} do", fix))
            continue
        each = -(-count // len(families))
        if short := [family for family, most in there.items() if most < each]:
            text = (
                f"{key}: {each:,} {level} problems are asked of each family, and {', '.join(short)} has fewer; "
                "their shares will be smaller"
            )
            found.append(Finding("problems", WARN, text, f"a smaller {key}.{level}"))
    return found


def measured(pair: Pair) -> list[Finding]:
    """What the evaluation will read and change: text files, the harness, choices, routing."""
    section: Evaluate = pair.recipe.evaluate
    if not pair.does("evaluate"):
        return []
    found = []
    for check in (_texts_and_tasks, _routing):
        try:
            check(pair, section)
        except UserError as error:
            found += failures("evaluation", error)
    return found


def _texts_and_tasks(pair: Pair, section: Evaluate) -> None:
    rows = pair.test_rows
    if rows is not None and not rows:
        raise UserError("evaluate: its source has no problems; name a file with at least one row")
    check_measured(rows, section)


def _routing(pair: Pair, section: Evaluate) -> None:
    recipe = pair.recipe
    named = {"base": recipe.student.model, "student": recipe.student.model, "teacher": None}
    if recipe.teacher and not recipe.teacher.endpoint:
        named["teacher"] = recipe.teacher.model
    wanted = section.models or list(named)
    models = {name for key, name in named.items() if name and key in wanted}
    if section.interventions.any and models:
        check_interventions(sorted(models), section.interventions)


def references(pair: Pair) -> list[Finding]:
    """The control arm trains on final answers: a file without them is told before the teacher is asked."""
    recipe = pair.recipe
    if not (recipe.control.enabled and recipe.teacher and pair.does("generate")) or not pair.training_rows:
        return []
    missing = sum(not row["answer"] for row in pair.training_rows)
    if not missing:
        return []
    text = f"the control arm needs final answers for all prompts, and {missing:,} of them lack it"
    fix = (
        "set prompts.answer_column, or control.enabled=false (the run then proves nothing about the teacher)"
    )
    return [Finding("control", FAIL, text, fix)]
