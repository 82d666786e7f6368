"""The questions: embedded tasks, a local file or a hub dataset, as chat messages with a reference answer.

Stage folder `prompts/`: one row per prompt with `prompt_id, messages, answer, verifier, family, level, split,
solution, completion, question`. `solution` (the worked steps) is empty unless the recipe trains on it: the
public training set has questions and final answers only, the reasoning is what the teacher has to bring.
`question` is what a template was filled with, without the template's own words; empty for the embedded tasks.

    distill generate RECIPE        runs this first
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill.config.data import Prompts
from distill.config.evaluation import Evaluate
from distill.config.recipe import Recipe
from distill.errors import UserError
from distill.stages import Stage
from distill.storage import PROMPT_SCHEMA, PartWriter, find_file
from distill.tasks.benchmarks import PRESETS, check_template, fill_in, render, shown, split_task
from distill.tasks.problems import sample_problems
from distill.tasks.verify import letter, require_package


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
    """The rows of the stage `prompts/` (keys as above), drawn or read as the section says. Raises UserError."""
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


def held_out(section: Evaluate, prompts: Prompts, seed: int) -> list[dict]:
    """Problems no training set of ours can contain (a split by content), or those of the recipe's own source.

    Without a preset of their own they are read as `prompts` says.
    """
    if not section.source:
        return task_prompts(section.split, section.levels, prompts, seed)
    names = {
        "preset": section.preset,
        "source": section.source,
        "config": section.config,
        "split": section.split,
    }
    if section.preset and section.preset != prompts.preset:
        prompts = Prompts(**names, system=prompts.system)
    names = {**names, "preset": section.preset or prompts.preset, "config": section.config or prompts.config}
    return file_prompts(section.source, prompts.model_copy(update={**names, "limit": section.limit}), "test")


def named_problems(name: str, prompts: Prompts) -> list[dict]:
    """Problems of one `--tasks` word: FILE, PRESET, PRESET:FILE or hub:org/name, read as `prompts` says.

    Their `level`, which names the task in the results, is the preset or the file's own name.
    """
    preset, source = split_task(name)
    given = prompts.model_dump(exclude_unset=True, exclude={"source"})
    if preset:
        try:
            named = fill_in({"preset": preset, "source": source or None, "config": prompts.config}, "test")
        except ValueError as error:
            raise UserError(f"--tasks {name}: {error} (as prompts.config=NAME)") from None
        given = {
            key: value for key, value in given.items() if key in ("limit", "system", "template", "split")
        }
        prompts = Prompts(**{**named, **given})
    else:
        prompts = prompts.model_copy(update={"split": prompts.split or "test"})
    rows = file_prompts(source or prompts.source, prompts, "test")
    task = name.rpartition("/")[2] if name.startswith("hub:") else Path(name).stem
    return rows if preset else [{**row, "level": task} for row in rows]


def file_prompts(source: str, section: Prompts, split: str) -> list[dict]:
    """Rows of a local file or a hub dataset through the columns, template or preset of the recipe.

    Optional columns `family` and `level` are used where present ("all" otherwise); a preset's rows have its
    name as level. Raises UserError for a source that cannot be read, a column that is not there (with those
    that are), an empty question, and a verifier whose package is missing.
    """
    require_package(section.verifier)
    table = _read_source(source, section)
    given, solved = (section.completion_column, section.solution_column) if split == "train" else (None, None)
    _check_columns(
        source, section, table.column_names, {"completion_column": given, "solution_column": solved}
    )
    fields = _template_fields(section, table.column_names)
    rows = []
    for number, item in enumerate(table):
        try:
            question, own, answer, family, choices = _read_row(item, section, fields)
            completion, solution = (
                str(_filled(item, [column])[column]) if column else None for column in (given, solved)
            )
        except ValueError as error:
            raise UserError(f"{source}: row {number + 1} has {error}") from None
        messages = _messages(question, section.system) if isinstance(question, str) else question
        text = "\n".join(m["content"] for m in messages)
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        rows.append(
            {
                "prompt_id": f"{digest}-{number}",
                "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
                "answer": answer,
                "verifier": f"regex:{section.pattern}" if section.pattern else section.verifier,
                "family": str(family or section.preset or "all"),
                "level": section.preset or str(item.get("level") or "all"),
                "split": split,
                "solution": solution,
                "completion": completion,
                "question": own,
                "choices": choices,
            }
        )
    return rows


def _template_fields(section: Prompts, columns: list[str]) -> list[str]:
    """The names that the template puts in: the source's columns, and `question` and `choices` of a preset."""
    preset = PRESETS.get(section.preset)
    if preset:
        columns = list(dict.fromkeys([*columns, *check_template(preset.template, ("question", "choices"))]))
    template = section.template or (preset.template if preset else None)
    return check_template(template, columns) if template else []


def _read_row(
    item: dict, section: Prompts, fields: list[str]
) -> tuple[Any, str | None, str, Any, list[str] | None]:
    """(text or messages, the row's own part of it, reference, family, choices if it has a list of them).

    Raises ValueError for a bad row.
    """
    preset = PRESETS.get(section.preset)
    values = {**item, **preset.read(_filled(item, preset.columns))} if preset else item
    answer = values["answer"] if preset else item.get(section.answer_column)
    if not fields:
        question, own = _filled(item, [section.prompt_column])[section.prompt_column], None
    else:
        question = render(section.template or preset.template, _filled(values, fields))
        own = values["question"] if preset else "\n".join(shown(values[name]) for name in fields)
    reference = "" if answer is None else str(answer)
    if section.verifier == "choice" and reference and letter(reference) is None:
        raise ValueError(f"the answer '{reference[:40]}', and verifier 'choice' compares letters A to Z")
    choices = values.get("choices")
    choices = [str(choice) for choice in choices] if isinstance(choices, list) and choices else None
    return question, own, reference, values.get("family"), choices


def _check_columns(source: str, section: Prompts, columns: list[str], extra: dict[str, str | None]) -> None:
    """Raises UserError for columns that the recipe or its preset names and the source does not have.

    extra: further keys of `prompts` and the columns they name, None where they name none.
    """
    there = ", ".join(columns)
    if section.preset:
        missing = [c for c in PRESETS[section.preset].columns if c not in columns]
        if missing:
            wanted = ", ".join(missing)
            raise UserError(
                f"{source} is not of the form '{section.preset}': no column {wanted}; it has: {there}"
            )
        return
    keys = ["answer_column"] if section.template else ["prompt_column", "answer_column"]
    for key in [*keys, *(key for key, column in extra.items() if column)]:
        column = getattr(section, key)
        if column and column not in columns:
            raise UserError(f"{source} has no column '{column}'; set prompts.{key} to one of: {there}")


def _filled(row: dict, columns: Iterable[str]) -> dict:
    """The row, after a look that none of these columns is empty. Raises ValueError naming the one that is."""
    for name in columns:
        if row[name] is None or row[name] == "" or row[name] == []:
            raise ValueError(f"an empty '{name}'; remove the row")
    return row


def _read_source(source: str, section: Prompts):
    """A local file or a hub dataset as a `datasets.Dataset`, `section.limit` rows of it."""
    data = _from_hub(source, section) if source.startswith("hub:") else _from_file(source)
    return data.select(range(min(section.limit, len(data)))) if section.limit else data


def _from_file(source: str):
    """Read without the cache of `datasets`: the file is small and may change."""
    from datasets import Dataset

    path = find_file(source)
    readers = {
        ".jsonl": Dataset.from_json,
        ".json": Dataset.from_json,
        ".csv": Dataset.from_csv,
        ".parquet": Dataset.from_parquet,
    }
    if path.suffix not in readers:
        forms = ", ".join(readers)
        raise UserError(f"prompts.source='{source}': give 'tasks', a {forms} file or 'hub:org/name'")
    if not path.is_file():
        raise UserError(f"prompts.source: file '{source}' not found")
    try:
        return readers[path.suffix](str(path), keep_in_memory=True)
    except Exception as error:  # datasets wraps every reader's own exceptions
        reason = (str(error.__cause__ or error).splitlines() or ["there are no rows in it"])[0]
        raise UserError(f"prompts.source: cannot read '{source}' ({reason})") from None


def _from_hub(source: str, section: Prompts):
    """A split of a hub dataset, from the cache or the network. Data alone: no code of the dataset runs."""
    from datasets import load_dataset

    name, _, revision = source.removeprefix("hub:").partition("@")
    split = section.split or "train"
    try:
        return load_dataset(name, section.config, split=split, revision=revision or None)
    except Exception as error:  # datasets and its network stack raise dozens of kinds; each becomes one line
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        raise UserError(
            f"cannot load '{source}' (config {section.config}, split {split}): {reason}; "
            "without network, name a local .jsonl or .parquet file of it as `source`, with the same `preset`"
        ) from None


def _hash_source(source: str) -> str | None:
    """The content of a local file; a hub dataset is known by its name, config, split and revision."""
    if source.startswith("hub:"):
        return None
    path = find_file(source)
    if not path.is_file():
        raise UserError(f"prompts.source: '{source}' is neither 'tasks' nor a file")
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def _messages(question: str, system: str | None) -> list[dict]:
    lead = [{"role": "system", "content": system}] if system else []
    return [*lead, {"role": "user", "content": question}]
