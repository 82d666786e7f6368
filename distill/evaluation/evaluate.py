"""MoE-aware evaluation: several checkpoints on the same held-out problems, and who is better.

    distill evaluate RECIPE                                         base, control, student, teacher of the run
    distill evaluate CHECKPOINT ... [--tasks T ...] [--teacher PATH] [--out DIR]      any causal LM or adapter
    accelerate launch --config_file recipes/accelerate/cpu2.yaml -m distill evaluate ...          shared by processes

This module is the stage and its order: check everything, the teacher first (the others are compared with its
answers), one model at a time, then what needs all of them. What is measured of a model is in
distill/evaluation/measure.py, comparisons in distill/evaluation/answers.py. It leaves `metrics.json`, every key of
which is described in distill/evaluation/schema.py, and `answers/` (every answer as a Parquet row, one part per
model), each model's part as soon as it is done, so an interrupted evaluation continues with the next model.

The processes of a launch measure the same model together: each answers and reads a share (`distill.devices.dealt`), and
the main process writes. metrics.json is that of one process, times aside.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from distill.config.data import Prompts
from distill.config.evaluation import Evaluate
from distill.config.recipe import Recipe, resolved
from distill.console import first_process
from distill.data.cards import refresh_cards
from distill.data.prompts import held_out, named_problems
from distill.devices import describe_device, main_decides, pick_device, processes
from distill.errors import UserError
from distill.evaluation.answers import compare, forgetting, problem_prompts
from distill.evaluation.likelihood import choice_problems, letters_of
from distill.evaluation.measure import Plan, measure_model, teacher_reference
from distill.evaluation.routing import add_saturation
from distill.evaluation.schema import METRICS_VERSION, check
from distill.evaluation.stats import RESAMPLES
from distill.models.chat import fix_date, reads_the_clock, template_date
from distill.models.load import check_model, load_model
from distill.stages import Stage, folder_date, input_fingerprint
from distill.storage import (
    ANSWER_SCHEMA,
    MANIFEST,
    PartWriter,
    find_file,
    fingerprint,
    read_json,
    read_table,
    verify_source,
    write_json,
    write_sealed,
)
from distill.tasks.corpus import documents

BASE = "base"  # the name of the model whose solved problems are looked at again


def evaluate_recipe(recipe: Recipe, redo: bool = False) -> dict[str, Any]:
    """Stage `eval/` of a run: every checkpoint the recipe has, on its held-out problems."""
    run = recipe.path
    inputs = {"student": input_fingerprint(run / "student", "train RECIPE")}
    checkpoints = {"student": str(run / "student")}
    if recipe.control.enabled:
        inputs["control"] = input_fingerprint(run / "control", "train RECIPE")
        checkpoints = {"control": str(run / "control"), **checkpoints}
    if recipe.student.model:
        checkpoints = {BASE: recipe.student.model, **checkpoints}
    if recipe.teacher and not recipe.teacher.endpoint:
        checkpoints["teacher"] = recipe.teacher.model
    if recipe.evaluate.models:
        checkpoints = {name: path for name, path in checkpoints.items() if name in recipe.evaluate.models}
    local = "teacher" in checkpoints
    manifest = _stage_of(recipe, checkpoints, inputs, "teacher" if local else None, redo, _sources(run))
    if first_process():
        refresh_cards(run, recipe.prices.usd_per_device_hour)
    return manifest


def _sources(run: Path) -> list[tuple[dict[str, Any], str]]:
    """(what was recorded of a model, who used it then), of the base and of the teacher."""
    kept = [(run / "student", "base_source"), (run / "generations", "teacher_source")]
    found = [
        (read_json(folder / MANIFEST).get(key), f"the stage '{folder.name}'")
        for folder, key in kept
        if (folder / MANIFEST).is_file()
    ]
    return [(source, user) for source, user in found if source and "files" in source]


def evaluate_named(recipe: Recipe, checkpoints: dict[str, str], redo: bool = False) -> dict[str, Any]:
    """Stage `eval/` of the recipe's run folder for these checkpoints alone, whatever the run itself has trained.

    One named "teacher" is what the others are compared with."""
    return _stage_of(recipe, checkpoints, {}, "teacher" if "teacher" in checkpoints else None, redo)


def _stage_of(
    recipe: Recipe,
    checkpoints: dict[str, str],
    inputs: dict,
    teacher: str | None,
    redo: bool,
    sources: list[tuple[dict[str, Any], str]] = (),
) -> dict:
    problems = held_out(recipe.evaluate, recipe.prompts, recipe.seed)
    device = pick_device(recipe.device, recipe.threads)
    plan = _plan(problems, recipe.evaluate, device, recipe.prices.usd_per_device_hour)
    asked = {BASE: recipe.student.chat_template_kwargs}  # control and student were saved with theirs
    if recipe.teacher:
        asked["teacher"] = recipe.teacher.chat_template_kwargs
    plan = replace(plan, template_arguments={name: given for name, given in asked.items() if given})
    stage = Stage(recipe.path, "eval", _identity(plan, checkpoints), inputs, resolved(recipe))
    return _run(stage, checkpoints, plan, teacher, redo, sources)


def evaluate_checkpoints(
    checkpoints: dict[str, str],
    teacher: str | None,
    out: Path,
    section: Evaluate,
    tasks: list[str],
    redo: bool = False,
    prompts: Prompts | None = None,
    usd_per_hour: float | None = None,
    threads: int = 0,
) -> dict[str, Any]:
    """The same without a recipe: named checkpoints, optionally against a teacher, into the folder `out`.

    `tasks` are files, presets or hub datasets (see named_problems), read as `prompts` says. `usd_per_hour` is
    the price of this device.
    """
    fix_date(folder_date(out))
    if teacher:
        checkpoints = {**{n: p for n, p in checkpoints.items() if p != teacher}, "teacher": teacher}
    problems = held_out(section, Prompts(), seed=0) if section.levels else []
    for task in tasks:
        found = named_problems(task, prompts or Prompts())
        if not found:
            raise UserError(f"--tasks {task}: it has no problems; give a file with at least one row")
        problems += found
    plan = _plan(problems, section, pick_device(threads=threads), usd_per_hour)
    stage = Stage(out.parent, out.name, _identity(plan, checkpoints), inputs={})
    stage.elsewhere = "give another --out"
    return _run(stage, checkpoints, plan, "teacher" if teacher else None, redo)


def _plan(problems: list[dict], section: Evaluate, device, usd_per_hour: float | None) -> Plan:
    """Everything that can be wrong with what is asked, found before any model is loaded. Raises UserError."""
    if not problems and not (section.harness or section.text):
        raise UserError("there are no problems to evaluate on; name levels or files with --tasks")
    if not problems and (further := _of_answers(section)):
        raise UserError(f"{further} needs problems that are answered; name levels or files with --tasks")
    check_measured(problems, section)
    return Plan(problems, section, device, [documents(path) for path in section.text], usd_per_hour)


def check_measured(problems: list[dict] | None, section: Evaluate) -> None:
    """The parts of an evaluation besides its problems: choices, text files, the harness. Raises UserError.

    `problems`: those that are known, None where they are on the hub.
    """
    if section.likelihood and problems is not None:
        if not choice_problems(problems):
            raise UserError(
                "likelihood needs multiple-choice problems (prompts.verifier=choice, or the presets mmlu, gpqa, "
                "ceval); these have none, so name some with --tasks, or leave it out"
            )
        for problem in choice_problems(problems):
            letters_of(problem)
    if section.solutions and not any(p["solution"] for p in problems):
        raise UserError(
            "evaluate.solutions reads the worked solutions of the embedded tasks, and these problems have none; "
            "leave it out, or name levels of the embedded tasks"
        )
    if section.harness:
        from distill.evaluation.harness import check_harness

        check_harness(section)
    for path in section.text:
        documents(path)


def _of_answers(section: Evaluate) -> str | None:
    """What was asked for that only answers can tell."""
    asked = {
        "--precision": section.precisions,
        "an intervention on the routing": section.interventions.any,
        "--samples": section.samples > 1,
    }
    return next((name for name, given in asked.items() if given), None)


def _identity(plan: Plan, checkpoints: dict[str, str]) -> dict[str, Any]:
    keys = ("prompt_id", "messages", "answer", "verifier")
    dated = any(_reads_the_clock(plan, name, path) for name, path in checkpoints.items())
    later = {"template_arguments": plan.template_arguments} if plan.template_arguments else {}
    later |= {"date": template_date().isoformat()} if dated else {}
    return later | {
        "schema_version": METRICS_VERSION,
        "evaluate": plan.section.identity(),
        "usd_per_hour": plan.usd_per_hour,
        "checkpoints": checkpoints,
        "problems": fingerprint([tuple(p[key] for key in keys) for p in plan.problems]),
        "text": fingerprint(plan.documents),
    }


def _reads_the_clock(plan: Plan, name: str, path: str) -> bool:
    try:
        return reads_the_clock(plan.tokenizer(name, path))
    except UserError:  # what is missing is told by `check_model`, in a better order
        return False


def _run(
    stage: Stage,
    checkpoints: dict[str, str],
    plan: Plan,
    teacher: str | None,
    redo: bool,
    sources: list[tuple[dict[str, Any], str]] = (),
) -> dict:
    ranks = processes(plan.device)
    if main_decides(ranks, lambda: stage.done(redo)):
        return stage.manifest
    for source, user in sources:  # an adapter on another base is another model
        if source["model"] in checkpoints.values():
            verify_source(source, find_file(source["model"]), user)
    for name, path in checkpoints.items():  # all before any weight is loaded: mistakes surface in a second
        check_model(path, tokenizer=False)
        problem_prompts(plan.tokenizer(name, path), plan.problems, name)
    if plan.section.interventions.any:
        from distill.evaluation.interventions import check_interventions

        check_interventions(list(checkpoints.values()), plan.section.interventions)
    if ranks.is_main_process:
        stage.begin(redo)
    ranks.wait_for_everyone()
    rows_of, results = _measure_all(stage, checkpoints, plan, teacher, ranks)
    if ranks.is_main_process:
        _finish(stage, checkpoints, plan, teacher, rows_of, results, ranks.num_processes)
    ranks.wait_for_everyone()
    return stage.manifest


def _finish(
    stage: Stage,
    checkpoints: dict[str, str],
    plan: Plan,
    teacher: str | None,
    rows_of: dict[str, list[dict]],
    results: dict[str, dict],
    world: int,
) -> None:
    """What needs all models, metrics.json and the manifest: the main process's alone."""
    add_saturation(
        results,
        rows_of,
        plan.problems,
        lambda name: (
            load_model(checkpoints[name], device=plan.device),
            plan.tokenizer(name, checkpoints[name]),
        ),
        teacher,
        plan.section.routing_rows,
    )
    section = plan.section
    metrics: dict[str, Any] = {
        "schema_version": METRICS_VERSION,
        "settings": {
            **section.model_dump(include={"samples", "temperature", "top_p", "seed", "max_new_tokens"}),
            "bootstrap_resamples": RESAMPLES,
        },
        "models": results,
        "comparisons": compare(rows_of, section.level, section.seed),
    }
    trained = {name: rows for name, rows in rows_of.items() if name != teacher}
    if BASE in trained and len(trained) > 1:
        metrics["forgetting"] = forgetting(trained, BASE, section.seed)
    check(metrics)
    write_json(stage.folder / "metrics.json", metrics)
    for name in checkpoints:
        (stage.folder / f"{name}.json").unlink()
        (stage.folder / f"{name}.interventions.jsonl").unlink(missing_ok=True)
        for line in results[name]["warnings"]:
            print(f"warning: {name}: {line}", file=sys.stderr)
    rows = [row for name in checkpoints for row in rows_of[name]]
    counts = {
        "rows": len(rows),
        "problems": len(plan.problems),
        "tokens": sum(row["tokens"] for row in rows),
        "prompt_tokens": sum(r["cost"]["prompt_tokens"] for r in results.values()),
        "errors": sum(row["error"] is not None for row in rows),
    }
    flops = sum(r["cost"]["flops"] for r in results.values())
    stage.finish(counts, device=describe_device(plan.device, world), flops=flops)


def _measure_all(
    stage: Stage, checkpoints: dict[str, str], plan: Plan, teacher: str | None, ranks: PartialState
) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """(answer rows, results) by model in the order of `checkpoints`; what is on disk already is read."""
    writer = PartWriter(stage.folder / "answers", ANSWER_SCHEMA)
    reference = teacher_reference(teacher, checkpoints[teacher], plan) if teacher else None
    rows_of: dict[str, list[dict]] = {}
    results: dict[str, dict] = {}
    for name in sorted(checkpoints, key=lambda name: name != teacher):  # the teacher first
        part = list(checkpoints).index(name)
        measured = stage.folder / f"{name}.json"
        known = main_decides(ranks, lambda p=part, m=measured: writer.path(p).is_file() and m.is_file())
        if not known:
            routes = stage.folder / "routes" / f"{name}.parquet"
            kept = stage.folder / f"{name}.interventions.jsonl"
            rows, result = measure_model(
                name, checkpoints[name], plan, reference, name == teacher, routes, kept
            )
            if ranks.is_main_process:
                writer.write(part, rows)
                write_sealed(measured, result)
                stage.checkpoint_clock()
            ranks.wait_for_everyone()
        rows_of[name] = read_table(writer.path(part)).to_pylist()
        results[name] = read_json(measured)  # now: a damaged one is told before the others are measured
        if name == teacher:
            reference.answers = [row for row in rows_of[name] if row["sample_idx"] == 0]
    ranks.wait_for_everyone()  # the first process removes these files when it goes on, and another may still read
    return {name: rows_of[name] for name in checkpoints}, {name: results[name] for name in checkpoints}
