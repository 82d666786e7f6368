"""From teacher outputs to a training set: rejection sampling, deduplication, and an account of what was dropped.

Stage folder `dataset/`: rows of token ids ready to train on, in the *student's* tokenizer and chat template;
`dataset/dropped/` has every row that was not kept, with the rule that dropped it; `dataset/control/` has the
same prompts with the final answer only, for the control arm.

    distill filter RECIPE
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from distill.config import Recipe
from distill.errors import UserError
from distill.models import load_tokenizer, prompt_ids, same_vocabulary, tokenizer_fingerprint
from distill.shards import DATASET_SCHEMA, DROPPED_SCHEMA, PartWriter, read_rows
from distill.stages import Stage, input_fingerprint
from distill.students import student_tokenizer


def make_dataset(recipe: Recipe, redo: bool = False) -> dict[str, Any]:
    """Run the stage `dataset/`; returns its manifest."""
    tokenizer = student_tokenizer(recipe.student)
    inputs = {"prompts": input_fingerprint(recipe.path / "prompts", "generate RECIPE")}
    if recipe.teacher:
        inputs["generations"] = input_fingerprint(recipe.path / "generations", "generate RECIPE")
    config = {
        "filter": recipe.filter.model_dump(mode="json"),
        "control": recipe.control.enabled,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    stage = Stage(recipe.path, "dataset", config, inputs)
    if stage.done(redo):
        return stage.manifest
    stage.begin(redo)
    prompts = {row["prompt_id"]: row for row in read_rows(recipe.path / "prompts")}
    if recipe.teacher:
        kept, dropped = apply_filters(read_rows(recipe.path / "generations"), prompts, recipe, tokenizer)
    else:
        kept, dropped = [_row(p, 0, p["solution"], tokenizer) for p in prompts.values()], []
    by_rule = dict(Counter(row["rule"] for row in dropped))
    if not kept:
        raise UserError(
            f"no row is left to train on: {by_rule}; loosen `filter` (filter.correct_only=false keeps wrong "
            "answers), or give a teacher that solves the prompts"
        )
    PartWriter(stage.folder / "dropped", DROPPED_SCHEMA).write_all(dropped)
    if recipe.control.enabled:
        PartWriter(stage.folder / "control", DATASET_SCHEMA).write_all(control_rows(kept, prompts, tokenizer))
    PartWriter(stage.folder, DATASET_SCHEMA).write_all(kept)
    counts = {
        "rows": len(kept),
        "tokens": sum(len(r["completion_ids"]) for r in kept),
        "prompt_tokens": sum(len(r["prompt_ids"]) for r in kept),
        "errors": by_rule.get("error", 0),
        "kept": len(kept),
        "dropped": len(dropped),
        "dropped_by_rule": by_rule,
        "prompts_covered": len({r["prompt_id"] for r in kept}),
    }
    return stage.finish(counts, device="cpu", tokenizer=tokenizer_fingerprint(tokenizer))


def apply_filters(
    rows: Iterable[dict], prompts: dict[str, dict], recipe: Recipe, tokenizer
) -> tuple[list, list]:
    """(kept, dropped). Rules in order: error, truncated, wrong_answer, too_long, duplicate, per_prompt_cap."""
    rules = recipe.filter
    teacher = load_tokenizer(recipe.teacher.model)
    same = same_vocabulary(teacher, tokenizer)
    kept, dropped, seen, per_prompt = [], [], set(), Counter()
    for row in rows:
        prompt = prompts[row["prompt_id"]]
        # Same vocabulary: train on the very ids the teacher chose; the text could re-tokenise differently.
        ids = row["completion_ids"] if same else None
        new = (
            _row(prompt, row["sample_idx"], row["text"], tokenizer, ids) if row["text"] is not None else None
        )
        key = (row["prompt_id"], row["text"])
        rule = None
        if row["error"]:
            rule = "error"
        elif row["finish_reason"] == "length":
            rule = "truncated"
        elif rules.correct_only and row["verdict"] != "correct":
            rule = "wrong_answer"
        elif rules.max_tokens and len(new["prompt_ids"]) + len(new["completion_ids"]) > rules.max_tokens:
            rule = "too_long"
        elif rules.deduplicate and key in seen:
            rule = "duplicate"
        elif rules.max_per_prompt and per_prompt[row["prompt_id"]] >= rules.max_per_prompt:
            rule = "per_prompt_cap"
        if rule:
            blank = {"prompt_id": row["prompt_id"], "sample_idx": row["sample_idx"], "text": row["text"]}
            dropped.append({**(new or blank), "rule": rule, "verdict": row["verdict"]})
            continue
        seen.add(key)
        per_prompt[row["prompt_id"]] += 1
        kept.append(new)
    return kept, dropped


def control_rows(kept: list[dict], prompts: dict[str, dict], tokenizer) -> list[dict]:
    """The same prompts in the same order and number, answered by the public final answer alone."""
    missing = sum(not prompts[row["prompt_id"]]["answer"] for row in kept)
    if missing:
        raise UserError(
            f"the control arm needs a final answer for every prompt and {missing} have none; "
            "set prompts.answer_column, or control.enabled=false (the run then proves nothing about the teacher)"
        )
    return [
        _row(prompts[r["prompt_id"]], r["sample_idx"], prompts[r["prompt_id"]]["answer"], tokenizer)
        for r in kept
    ]


def _row(prompt: dict, sample_idx: int, text: str, tokenizer, ids: list[int] | None = None) -> dict:
    """One training row. Completion ids always end with the student's end token: it must learn to stop."""
    completion = list(ids) if ids is not None else tokenizer(text, add_special_tokens=False)["input_ids"]
    if not completion or completion[-1] != tokenizer.eos_token_id:
        completion = [*completion, tokenizer.eos_token_id]
    return {
        "prompt_id": prompt["prompt_id"],
        "sample_idx": sample_idx,
        "prompt_ids": prompt_ids(tokenizer, prompt["messages"]),
        "completion_ids": completion,
        "text": text,
        "family": prompt["family"],
        "level": prompt["level"],
    }
