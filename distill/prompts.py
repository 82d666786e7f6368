"""The questions: embedded tasks or a local file, as chat messages with a reference answer.

Stage folder `prompts/`: one row per prompt with `prompt_id, messages, answer, verifier, family, level, split,
solution`. `solution` (the worked steps) is empty unless the recipe trains on it: the public training set has
questions and final answers only, the reasoning is what the teacher has to bring.

    distill generate RECIPE        runs this first
"""

import hashlib
from pathlib import Path
from typing import Any

from distill.config import Prompts, Recipe, find_file
from distill.errors import UserError
from distill.shards import PROMPT_SCHEMA, PartWriter
from distill.stages import Stage
from distill.tasks import sample_problems


def make_prompts(recipe: Recipe, redo: bool = False) -> dict[str, Any]:
    """Run the stage `prompts/`; returns its manifest."""
    config = {"prompts": recipe.prompts.model_dump(mode="json"), "seed": recipe.seed}
    if recipe.prompts.source != "tasks":
        config["source_hash"] = _hash_source(recipe.prompts.source)
    stage = Stage(recipe.path, "prompts", config, inputs={})
    if stage.done(redo):
        return stage.manifest
    rows = training_prompts(recipe.prompts, recipe.seed)
    if not rows:
        raise UserError("the recipe selects no prompts; raise prompts.levels or prompts.limit")
    stage.begin(redo)
    PartWriter(stage.folder, PROMPT_SCHEMA).write_all(rows)
    counts: dict[str, Any] = {"rows": len(rows), "tokens": 0, "errors": 0}
    for name in ("family", "level"):
        values = [row[name] for row in rows]
        counts[f"by_{name}"] = {v: values.count(v) for v in sorted(set(values))}
    return stage.finish(counts, device="cpu")


def training_prompts(section: Prompts, seed: int) -> list[dict]:
    if section.source != "tasks":
        return file_prompts(section.source, section, split="train")
    return task_prompts("train", section.levels, section, seed)


def task_prompts(split: str, levels: dict[str, int], section: Prompts, seed: int) -> list[dict]:
    """Rows of the embedded tasks. Held-out splits never repeat a prompt, whatever `distinct` says."""
    distinct = section.distinct or split != "train"
    problems = sample_problems(split, levels, seed, section.families, distinct)
    return [
        {
            "prompt_id": p.prompt_id if distinct else f"{p.prompt_id}-{i}",
            "messages": _messages(p.question, section.system),
            "answer": p.answer,
            "verifier": "exact",
            "family": p.family,
            "level": p.level,
            "split": p.split,
            "solution": p.solution if section.solutions else None,
        }
        for i, p in enumerate(problems)
    ]


def file_prompts(source: str, section: Prompts, split: str) -> list[dict]:
    """Rows of a JSONL, Parquet or CSV file through the column names of the recipe.

    Optional columns `family` and `level` are used where present ("all" otherwise). Raises UserError for a
    missing or unreadable file, a missing column or an empty question, each with what is there instead.
    """
    table = _read_source(source, section.limit)
    for key in ("prompt_column", "answer_column"):
        column = getattr(section, key)
        if column and column not in table.column_names:
            names = ", ".join(table.column_names)
            raise UserError(f"{source} has no column '{column}'; set prompts.{key} to one of: {names}")
    rows = []
    for number, item in enumerate(table):
        question = item[section.prompt_column]
        if not question:
            raise UserError(f"{source}: row {number + 1} has an empty '{section.prompt_column}'; remove it")
        messages = _messages(question, section.system) if isinstance(question, str) else question
        text = "\n".join(m["content"] for m in messages)
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        rows.append(
            {
                "prompt_id": f"{digest}-{number}",
                "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
                "answer": str(item[section.answer_column]) if section.answer_column else "",
                "verifier": section.verifier,
                "family": str(item.get("family") or "all"),
                "level": str(item.get("level") or "all"),
                "split": split,
                "solution": None,
            }
        )
    return rows


def _read_source(source: str, limit: int | None):
    """The file as a `datasets.Dataset`, without its cache: the file is small and may change."""
    from datasets import Dataset

    path = find_file(source)
    readers = {
        ".jsonl": Dataset.from_json,
        ".json": Dataset.from_json,
        ".csv": Dataset.from_csv,
        ".parquet": Dataset.from_parquet,
    }
    if path.suffix not in readers:
        raise UserError(f"prompts.source='{source}': give 'tasks' or a {', '.join(readers)} file")
    if not path.is_file():
        raise UserError(f"prompts.source: file '{source}' not found")
    try:
        data = readers[path.suffix](str(path), keep_in_memory=True)
    except Exception as error:  # datasets wraps every reader's own exceptions
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"prompts.source: cannot read '{source}' ({reason})") from None
    return data.select(range(min(limit, len(data)))) if limit else data


def _hash_source(source: str) -> str:
    path = find_file(source)
    if not path.is_file():
        raise UserError(f"prompts.source: '{source}' is neither 'tasks' nor a file")
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def _messages(question: str, system: str | None) -> list[dict]:
    lead = [{"role": "system", "content": system}] if system else []
    return [*lead, {"role": "user", "content": question}]
