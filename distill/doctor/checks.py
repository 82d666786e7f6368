"""`distill doctor`: is this pair fit for this recipe, and is all there that later stages need?

What later stages will need, asked before the first one spends anything: folders, packages, problems, files.

Each is a function of a `Pair` (distill/doctor/pair.py) that returns findings. Without these checks a run generates
and trains for hours, and then says that a package, a level or a text file is missing.

`distill doctor`: is this pair fit for this recipe? Asked of configs and tokenizers, before weights are loaded.

    distill doctor RECIPE [key=value ...] [--json]
    findings = examine(recipe)               # list of distill.doctor.pair.Finding
    check_recipe(recipe, "run")              # what every command asks first; one UserError with every problem

`doctor` prints a line per check, OK, note, WARN or FAIL, with the fix; its exit code is 2 with a FAIL, else 0. Every
command that runs a recipe makes the same checks of its part of it first: a FAIL stops it, a WARN is printed once.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import torch

from distill import console
from distill.config.evaluation import Evaluate
from distill.config.recipe import Recipe
from distill.data.endpoint import check_endpoint
from distill.data.provenance import require_permission
from distill.data.signals import STORED, SignalFormat, signal_problems
from distill.data.vllm import check_engine
from distill.devices import describe_device
from distill.doctor import memory as footprint
from distill.doctor import student as student_checks
from distill.doctor import tokens as token_checks
from distill.doctor.pair import (
    FAIL,
    NOTE,
    OK,
    WARN,
    Finding,
    Pair,
    Side,
    base_of,
    failures,
    findings_of,
    model_side,
)
from distill.errors import UserError
from distill.evaluation.evaluate import check_measured
from distill.evaluation.interventions import check_interventions
from distill.files import folder_problem, shown
from distill.models.load import (
    check_model,
    check_quantize,
    check_weights,
    resolve_model,
    tokenizer_fingerprint,
)
from distill.models.precision import resolve_precision
from distill.tasks.problems import FAMILIES, available
from distill.tasks.verify import require_package
from distill.training.open_teachers import ALONE
from distill.training.train import launch_problems

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


# ==== `distill doctor` ====


def examine(recipe: Recipe, command: str = "run", weights: bool = False) -> list[Finding]:
    """All findings, in the order of the report. `weights`: their absence is a FAIL rather than a warning.

    A mistake that several checks run into is told by the first of them.
    """
    return list({(f.state, f.text): f for f in reversed(_examine(recipe, command, weights))}.values())[::-1]


def _examine(recipe: Recipe, command: str, weights: bool) -> list[Finding]:
    pair = Pair(recipe, command)
    found = findings_of("device", _device, pair)
    if any(f.state == FAIL for f in found):
        return found  # nothing below can be judged for a device that is not there
    for name, check in (
        ("run_dir", run_folder),
        ("packages", packages),
        ("problems", problems),
    ):
        found += findings_of(name, check, pair)
    sides = [*pair.sides, *([pair.draft] if pair.draft else [])]
    models = [f for side in sides for f in findings_of("models", _model, side, weights)]
    found += models
    if recipe.teacher and recipe.teacher.endpoint:
        found += findings_of("models", _endpoint, pair)
    if recipe.teacher and recipe.teacher.engine == "vllm":
        found += findings_of("models", _engine, pair)
    # Measuring trains nothing; and of a model that is not there nobody knows the terms.
    if command != "evaluate" and not any(f.state == FAIL for f in models):
        found += findings_of("terms", _terms, pair)
    if pair.does("train"):
        found += findings_of("launch", _launch, pair, weights)
        found += findings_of("precision", student_checks.precision, pair)
        found += findings_of("trackers", _trackers, pair)
    if any(f.state == FAIL for f in models):
        return found  # what follows reads both configs and tokenizers
    unread = _prompts(pair)
    found += unread
    checks = [
        ("vocabulary", token_checks.vocabulary),
        ("draft", token_checks.draft),
        ("chat template", token_checks.template),
        ("end of turn", token_checks.end_of_turn),
        *([] if unread else [("context", token_checks.context)]),
        ("objectives", objectives),
    ]
    if pair.does("train"):
        checks += [("trained", student_checks.trained), ("experts", student_checks.expert_findings)]
        checks += [("precision", student_checks.rounding)]
    checks += [("evaluation", measured), ("control", references), ("memory", footprint.memory)]
    for name, check in checks:
        found += findings_of(name, check, pair)
    return found


def examine_checkpoints(models: dict[str, str], section: Evaluate, device: torch.device) -> list[Finding]:
    """The same of checkpoints that are only measured, `models` by name: what each reads, its context, its memory."""
    found = []
    if section.levels:
        found += enough("--problems", section.levels, list(FAMILIES), section.split)
    for name, path in models.items():
        side = model_side("checkpoint", path)
        loaded = findings_of("models", _model, side, True)
        found += loaded
        if any(f.state == FAIL for f in loaded):
            continue
        found += token_checks.missing_template(side)
        short = token_checks.fits(side, "--max-new-tokens", section.max_new_tokens, "held-out", None)
        found += [short] if short else []
        has, wants = footprint.device_memory(device), side.facts["weight_bytes"]
        if wants > has:
            text = f"{name}: weights of {footprint.gigabytes(wants)}, and the device has {footprint.gigabytes(has)}"
            found.append(Finding("memory", FAIL, text, "take a larger device or a smaller model"))
    return found


def _device(pair: Pair) -> list[Finding]:
    total = footprint.device_memory(pair.device)
    return [Finding("device", OK, f"{describe_device(pair.device)}, {footprint.gigabytes(total)} of memory")]


def _model(side: Side, weights: bool) -> list[Finding]:
    """That config and tokenizer can be read, and weights where they lie here."""
    found = []
    if side.name:
        folder = Path(resolve_model(side.name))
        empty = folder.is_dir() and not any(
            f.suffix in (".safetensors", ".bin", ".pt", ".pth") for f in folder.iterdir()
        )
        if empty and side.made_from:
            pass  # the run's first stage puts them there
        elif empty and not weights:
            text = f"{side.label}: {folder} has no weights yet"
            found.append(Finding("models", WARN, text, "put *.safetensors there before a run"))
        elif folder.is_dir():
            check_model(side.name, tokenizer=False)
            check_weights(Path(base_of(side.name)))
    _ = side.tokenizer
    facts = side.facts
    size = f"{facts['parameters_total']:,} parameters"
    if facts["experts"]:
        size += f" ({facts['parameters_active']:,} active)"
    return [*found, Finding("models", OK, f"{side.label}: {facts['model_type']}, {size}")]


def _endpoint(pair: Pair) -> list[Finding]:
    recipe = pair.recipe
    answered = (recipe.path / "generations" / "manifest.json").is_file()
    if pair.does("generate") and not answered:
        check_endpoint(recipe.teacher.endpoint)
    return [
        Finding(
            "models", OK, f"teacher '{recipe.teacher.model}' answers at {recipe.teacher.endpoint.base_url}"
        )
    ]


def _engine(pair: Pair) -> list[Finding]:
    recipe = pair.recipe
    if pair.does("generate") and not (recipe.path / "generations" / "manifest.json").is_file():
        check_engine(recipe.teacher)
    kind = recipe.generate.signal.kind
    if kind not in ("none", "top_k"):
        raise UserError(
            f"generate.signal.kind={kind}: vLLM names its likeliest tokens alone; set kind=top_k, or "
            "teacher.engine=transformers"
        )
    return [Finding("models", OK, f"teacher '{recipe.teacher.model}' answers by vLLM, in this process")]


def _terms(pair: Pair) -> list[Finding]:
    decision = require_permission(pair.recipe)
    if decision is None:
        return [Finding("terms", OK, "no teacher, no terms")]
    if decision["acknowledged"]:
        return [Finding("terms", NOTE, f"{decision['reason']}; acknowledged: {decision['acknowledged']}")]
    return [Finding("terms", OK, decision["reason"])]


def _prompts(pair: Pair) -> list[Finding]:
    """What is wrong with the files of training prompts and of held-out problems that the command reads: all of it."""
    found = []
    for work, which in (("generate", "training_rows"), ("evaluate", "test_rows")):
        if pair.does(work):
            try:
                getattr(pair, which)
            except UserError as error:
                found += failures("prompts", error)
    return found


def _launch(pair: Pair, starts: bool) -> list[Finding]:
    """That the processes of this launch can train so: a stage of hours may come before they do."""
    recipe, world = pair.recipe, console.launched()
    if world == 1:
        alone = starts and recipe.teacher and recipe.teacher.device == "sharded"
        return failures("launch", UserError(ALONE)) if alone else []
    fsdp, deepspeed = (
        os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")
    )
    half = resolve_precision(recipe.train.precision, pair.device).accelerate != "no"
    if found := launch_problems(recipe, world, fsdp, half, deepspeed):
        raise UserError(*found)
    return [Finding("launch", OK, f"{world} processes share the rows of a step")]


def _trackers(pair: Pair) -> list[Finding]:
    absent = [name for name in pair.recipe.train.trackers if find_spec(name) is None]
    if absent:
        raise UserError(
            f"train.trackers: {', '.join(absent)} not installed; pip install {' '.join(absent)}, or leave it out "
            "(metrics.jsonl is written in any case)"
        )
    return []


def objectives(pair: Pair) -> list[Finding]:
    """That what the objectives read will be there: a live teacher, stored signals, given text."""
    recipe = pair.recipe
    asked = recipe.train.objectives
    if recipe.teacher is None:
        found = [
            f"objective {o.name} needs a teacher, and the recipe has none; name one, or use cross_entropy"
            for o in asked
            if o.live or o.signal in STORED
        ]
    else:
        found = _signals(pair)
        live = [o.name for o in asked if o.live and recipe.needs_live_teacher]
        if live and recipe.teacher.endpoint:
            found.append(
                f"objective {live[0]} needs the model itself, and the endpoint of '{recipe.teacher.model}' gives text "
                "alone; use train.objectives='[{name: cross_entropy}]' (distil the text), or a teacher loaded here"
            )
    if found:
        return failures("objectives", UserError(*found))
    return [Finding("objectives", OK, ", ".join(o.name for o in asked))]


def _signals(pair: Pair) -> list[str]:
    """What is wrong with keeping the teacher's signals, with scoring given text, or with training on either."""
    recipe = pair.recipe
    signal, given = recipe.generate.signal, recipe.prompts.completion_column
    found = signal_problems(signal.kind, signal.temperature, recipe.train.objectives)
    if recipe.teacher.endpoint:
        scores = (
            recipe.teacher.endpoint.tokenizer and signal.kind == "top_k"
        )  # by the server (distill/data/vllm.py)
        asked = {"generate.signal": signal.kind != "none" and not scores, "prompts.completion_column": given}
        found += [
            f"{key} needs the logits of '{recipe.teacher.model}', and its endpoint gives text alone; leave it "
            "out, or load the teacher here"
            + (
                ""
                if key != "generate.signal"
                else ", or let a vLLM server score its answers: kind=top_k, and the "
                "folder of its tokenizer in teacher.endpoint.tokenizer"
            )
            for key in (key for key, wanted in asked.items() if wanted)
        ]
    elif not found and (recipe.reads_states or any(o.signal in STORED for o in recipe.train.objectives)):
        teacher = pair.teacher.tokenizer
        form = SignalFormat.from_recipe(signal, len(teacher), tokenizer_fingerprint(teacher))
        found += form.problems(tokenizer_fingerprint(pair.student.tokenizer))
    if given and recipe.prompts.source == "tasks":
        found.append(
            "prompts.completion_column names texts of a file; give the file as prompts.source, or leave it out"
        )
    if given and recipe.generate.samples != 1:
        found.append("prompts.completion_column gives one text to every prompt; set generate.samples=1")
    return found


__all__ = ["check_checkpoints", "check_model", "check_recipe"]


def check_recipe(recipe: Recipe, command: str) -> None:
    """Everything that can be known without loading weights. Raises UserError with all problems."""
    _stop_or_warn(examine(recipe, command, weights=True))


def check_checkpoints(models: dict[str, str], section: Evaluate, device: torch.device) -> None:
    """The same for checkpoints by name that are only measured."""
    _stop_or_warn(examine_checkpoints(models, section, device))


def _stop_or_warn(findings: list[Finding]) -> None:
    if problems := [f.line for f in findings if f.state == FAIL]:
        raise UserError(*dict.fromkeys(problems))
    shown = (WARN, NOTE) if console.verbose() else (WARN,)
    said = {f.line: "warning" if f.state == WARN else "note" for f in findings if f.state in shown}
    for line, kind in said.items():
        console.warn(f"{kind}: {line}")
