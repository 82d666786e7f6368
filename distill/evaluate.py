"""MoE-aware evaluation: several checkpoints on the same held-out problems, and who is better.

    distill evaluate RECIPE                                         base, control, student, teacher of the run
    distill evaluate CHECKPOINT ... [--tasks T ...] [--teacher PATH] [--out DIR]      any causal LM or adapter

Leaves `metrics.json` (schema below) and `answers/` (every answer as a Parquet row, one part per model), each
model's part as soon as it is done, so an interrupted evaluation continues with the next model.

metrics.json, schema_version 1:
    models.<name>.model        parameters_total, parameters_active, flops_per_token, kv_bytes_per_token, ...
    models.<name>.tasks.<t>    n, accuracy, stderr, ci95 (Wilson), pass_at_k, truncated, no_answer, errors, mean_tokens
    models.<name>.families.<f>.<t>   the same, per task family
    models.<name>.fidelity     agreement with the teacher on its own answers (tokens, top1_agreement, KLs in nats)
    models.<name>.moe.layers.<l>     load, max_violation with its noise floor, entropies, dead experts, ...
    models.<name>.cost         seconds, generated_tokens, decode_tokens_per_second, flops_per_answer
    comparisons[]              a, b, task, n, difference (b's accuracy minus a's), ci95, p_value, verdict on b
"""

from pathlib import Path
from typing import Any

from distill.answers import answer_problems, summarise
from distill.config import Prompts, Recipe
from distill.describe import describe_model
from distill.devices import describe_device, pick_device
from distill.errors import UserError
from distill.eval_sections import Evaluate
from distill.fidelity import fidelity, teacher_rows
from distill.models import load_model, load_tokenizer, prompt_ids, same_vocabulary
from distill.preflight import check_model
from distill.prompts import held_out, named_problems
from distill.shards import ANSWER_SCHEMA, PartWriter, fingerprint, read_json, read_table, write_json
from distill.stages import Stage, input_fingerprint
from distill.stats import holm, paired_comparison

SCHEMA_VERSION = 1


def evaluate_recipe(recipe: Recipe, redo: bool = False) -> dict[str, Any]:
    """Stage `eval/` of a run: every checkpoint the recipe has, on its held-out problems."""
    run = recipe.path
    inputs = {"student": input_fingerprint(run / "student", "train RECIPE")}
    checkpoints = {"student": str(run / "student")}
    if recipe.control.enabled:
        inputs["control"] = input_fingerprint(run / "control", "train RECIPE")
        checkpoints = {"control": str(run / "control"), **checkpoints}
    if recipe.student.model:
        checkpoints = {"base": recipe.student.model, **checkpoints}
    local = recipe.teacher and not recipe.teacher.endpoint
    if local:
        checkpoints["teacher"] = recipe.teacher.model
    problems = held_out(recipe.evaluate, recipe.prompts, recipe.seed)
    stage = Stage(run, "eval", _identity(recipe.evaluate, checkpoints, problems), inputs)
    device = pick_device(recipe.device, recipe.threads)
    teacher = "teacher" if local else None
    return _run(stage, checkpoints, problems, recipe.evaluate, teacher, device, redo)


def evaluate_checkpoints(
    checkpoints: dict[str, str],
    teacher: str | None,
    out: Path,
    section: Evaluate,
    tasks: list[str],
    redo: bool = False,
    prompts: Prompts | None = None,
) -> dict[str, Any]:
    """The same without a recipe: named checkpoints, optionally against a teacher, into the folder `out`.

    `tasks` are files, presets or hub datasets (see named_problems), read as `prompts` says.
    """
    if teacher:
        checkpoints = {**{n: p for n, p in checkpoints.items() if p != teacher}, "teacher": teacher}
    problems = held_out(section, Prompts(), seed=0) if section.levels else []
    for task in tasks:
        problems += named_problems(task, prompts or Prompts())
    if not problems:
        raise UserError("there are no problems to evaluate on; name levels or files with --tasks")
    stage = Stage(out.parent, out.name, _identity(section, checkpoints, problems), inputs={})
    return _run(stage, checkpoints, problems, section, "teacher" if teacher else None, pick_device(), redo)


def _identity(section: Evaluate, checkpoints: dict[str, str], problems: list[dict]) -> dict[str, Any]:
    return {
        "evaluate": section.model_dump(mode="json"),
        "checkpoints": checkpoints,
        "problems": fingerprint(
            [(p["prompt_id"], p["messages"], p["answer"], p["verifier"]) for p in problems]
        ),
    }


def _run(
    stage: Stage, checkpoints, problems, section: Evaluate, teacher: str | None, device, redo
) -> dict[str, Any]:
    if stage.done(redo):
        return stage.manifest
    for path in checkpoints.values():  # all of them before any weight is loaded: mistakes surface in a second
        check_model(path)
    stage.begin(redo)
    writer = PartWriter(stage.folder / "answers", ANSWER_SCHEMA)
    # The teacher first: the others are compared with its answers.
    order = sorted(checkpoints, key=lambda name: name != teacher)
    reference = _Reference(checkpoints[teacher], section.fidelity_rows, device) if teacher else None
    found: dict[str, dict] = {}
    for name in order:
        part = list(checkpoints).index(name)
        measured = stage.folder / f"{name}.json"
        if not (writer.path(part).is_file() and measured.is_file()):
            rows, result = _evaluate_one(
                name, checkpoints[name], problems, section, reference, device, name == teacher
            )
            writer.write(part, rows)
            write_json(measured, result)
            stage.checkpoint_clock()
        found[name] = {"rows": read_table(writer.path(part)).to_pylist(), "result": read_json(measured)}
        if name == teacher:
            reference.answers = found[name]["rows"]

    metrics = {
        "schema_version": SCHEMA_VERSION,
        "models": {name: found[name]["result"] for name in checkpoints},
        "comparisons": compare({name: found[name]["rows"] for name in checkpoints}),
    }
    write_json(stage.folder / "metrics.json", metrics)
    for name in checkpoints:
        (stage.folder / f"{name}.json").unlink()
    rows = [row for name in checkpoints for row in found[name]["rows"]]
    counts = {
        "rows": len(rows),
        "problems": len(problems),
        "tokens": sum(row["tokens"] for row in rows),
        "prompt_tokens": sum(r["cost"]["prompt_tokens"] for r in metrics["models"].values()),
        "errors": sum(row["error"] is not None for row in rows),
    }
    flops = sum(r["cost"]["flops"] for r in metrics["models"].values())
    return stage.finish(counts, device=describe_device(device), flops=flops)


class _Reference:
    """The teacher that fidelity is measured against, loaded once and only if something needs it."""

    def __init__(self, path: str, limit: int, device):
        self.path, self.limit, self.device = path, limit, device
        self.answers: list[dict] = []
        self.tokenizer = load_tokenizer(path)
        self._model = None

    @property
    def model(self):
        if self._model is None:
            self._model = load_model(self.path, device=self.device)
        return self._model

    def compare(self, model, tokenizer, problems: list[dict]) -> dict[str, Any] | None:
        """Fidelity of `model`; None where it cannot be defined (other vocabulary, no finished answers)."""
        if not self.limit or not same_vocabulary(self.tokenizer, tokenizer):
            return None
        ids = [prompt_ids(self.tokenizer, p["messages"]) for p in problems]
        rows = teacher_rows(ids, self.answers, self.limit)
        return fidelity(model, self.model, rows, tokenizer.pad_token_id) if rows else None


def _evaluate_one(
    name, path, problems, section: Evaluate, reference, device, is_teacher
) -> tuple[list[dict], dict]:
    tokenizer = load_tokenizer(path)
    model = reference.model if is_teacher else load_model(path, device=device)
    rows, measured = answer_problems(
        model, tokenizer, problems, name, section.max_new_tokens, section.batch_size
    )
    # One context for all models, so that their FLOPs/token compare; the page states it.
    described = describe_model(model, context=section.max_new_tokens)
    tokens = measured["prompt_tokens"] + measured["generated_tokens"]
    flops = int(described["flops_per_token"] * tokens)
    result = {
        "path": path,
        "model": described,
        "tasks": {
            level: summarise([r for r in rows if r["level"] == level]) for level in _names(rows, "level")
        },
        "families": {
            family: {
                level: summarise([r for r in rows if (r["family"], r["level"]) == (family, level)])
                for level in _names([r for r in rows if r["family"] == family], "level")
            }
            for family in _names(rows, "family")
        },
        "cost": {
            **{k: v for k, v in measured.items() if k != "moe"},
            "flops": flops,
            "flops_per_answer": flops // len(rows),
        },
    }
    if "moe" in measured:
        result["moe"] = measured["moe"]
    if reference and not is_teacher and (close := reference.compare(model, tokenizer, problems)):
        result["fidelity"] = close
    return rows, result


def _names(rows: list[dict], key: str) -> list[str]:
    """Distinct values in order of difficulty where they are the embedded levels, else of first appearance."""
    found = list(dict.fromkeys(row[key] for row in rows))
    known = ["easy", "medium", "hard"]
    return sorted(found, key=lambda v: known.index(v) if v in known else len(known))


def compare(rows_of: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """Every pair of models on the same problems, per task: paired difference, interval, exact McNemar, verdict.

    `difference` is accuracy of b minus accuracy of a, the verdict is about b. p-values are corrected for the
    number of comparisons in the list (Holm 1979), and a verdict needs the corrected one.
    """
    names = list(rows_of)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    found = []
    for a, b in pairs:
        for level in _names(rows_of[a], "level"):
            correct = [[r["verdict"] == "correct" for r in rows_of[m] if r["level"] == level] for m in (a, b)]
            # paired_comparison judges its first argument against its second.
            result = paired_comparison(correct[1], correct[0])
            found.append({"a": a, "b": b, "task": level, **result})
    for item, corrected in zip(found, holm([item["p_value"] for item in found])):
        item["p_value_holm"] = corrected
        if corrected is None or corrected >= 0.05:
            item["verdict"] = "INCONCLUSIVE"
    return found
