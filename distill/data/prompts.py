"""The questions: embedded tasks, a local file or a hub dataset, as chat messages with a reference answer.

How a file becomes rows of text: distill/tasks/reading.py; what a prompt may be: distill/tasks/corpus.py.

Stage folder `prompts/`: one row per prompt with `prompt_id, messages, answer, verifier, family, level, split,
solution, completion, question`. `solution` (the worked steps) is empty unless the recipe trains on it: the
public training set has questions and final answers only, the reasoning is what the teacher has to bring.
`question` is what a template was filled with, without the template's own words; empty for the embedded tasks.

Plain text has no questions (`prompts.documents`): documents are cut into windows of tokens (`document_rows`). There is
nothing for the teacher to write and nothing to verify; a live teacher scores the text itself, and the control arm reads
the same rows by cross-entropy alone, so that both arms see equal tokens. The first token of a window is context, every
other one is trained on; windows touch, so that each token of a document is trained on once. The first window of a
document begins with the tokenizer's BOS token, or its end token where it has none, as text is read in evaluation.

    distill generate RECIPE        runs this first
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from distill import console
from distill.config.data import Prompts
from distill.config.evaluation import Evaluate
from distill.config.recipe import Recipe, resolved
from distill.errors import UserError
from distill.files import like_it
from distill.stages import Stage
from distill.storage import PROMPT_SCHEMA, PartWriter, find_file, fingerprint, parts, read_rows
from distill.tasks.corpus import (
    PRESETS,
    check_template,
    conversation,
    documents,
    fill_in,
    is_embedded,
    python_docs,
    render,
    shown,
    split_task,
    with_system,
)
from distill.tasks.problems import sample_problems
from distill.tasks.reading import FORMS, Problems, Table, arrow_rows, read_table, text_of
from distill.tasks.verify import extract_answer, letter, require_package

READING = 2  # what a manifest says of how a local file was read; without it: by a reader that guessed types


def make_prompts(recipe: Recipe, redo: bool = False) -> dict[str, Any]:
    """Run the stage `prompts/`; returns its manifest."""
    config = {"prompts": recipe.prompts.identity(), "seed": recipe.seed}
    if recipe.prompts.source != "tasks":
        config["source_hash"] = source_hash(recipe.prompts.source)
    stage = Stage(recipe.path, "prompts", config, {}, resolved(recipe))
    if stage.done(redo):
        otherwise = _read_otherwise(stage, recipe)
        if not otherwise:
            return stage.manifest
        if not redo:
            raise UserError(
                f"{stage.folder} was made when numbers, dates and missing values of files were guessed, and reads "
                f"otherwise today ({otherwise}); rebuild it with --redo, or keep it and set another run_dir"
            )
    with console.slow("reading the prompts"):
        rows = training_prompts(recipe.prompts, recipe.seed)
    if not rows:
        raise UserError("the recipe selects no prompts; raise prompts.levels or prompts.limit")
    stage.begin(redo)
    for part in parts(stage.folder):
        part.unlink()
    PartWriter(stage.folder, PROMPT_SCHEMA).write_all(rows)
    counts: dict[str, Any] = {"rows": len(rows), "tokens": 0, "errors": 0}
    for name in ("family", "level"):
        values = [row[name] for row in rows]
        counts[f"by_{name}"] = {v: values.count(v) for v in sorted(set(values))}
    return stage.finish(counts, device="cpu", **({"reading": READING} if _is_file(recipe.prompts) else {}))


def _is_file(section: Prompts) -> bool:
    return not section.documents and section.source != "tasks" and not section.source.startswith("hub:")


def _read_otherwise(stage: Stage, recipe: Recipe) -> str | None:
    """The first row of an old finished folder that its file gives otherwise today; None where all are the same."""
    if not _is_file(recipe.prompts) or stage.manifest.get("reading") == READING:
        return None
    today = training_prompts(recipe.prompts, recipe.seed)
    for number, (old, new) in enumerate(zip_longest(read_rows(stage.folder), today, fillvalue={}), 1):
        for key in PROMPT_SCHEMA.names:
            if old.get(key) != new.get(key):
                return f"row {number}, {key}: {str(old.get(key))[:60]!r} -> {str(new.get(key))[:60]!r}"
    return None


def training_prompts(section: Prompts, seed: int) -> list[dict]:
    """The rows of the stage `prompts/` (keys as above), drawn or read as the section says. Raises UserError."""
    if section.documents:
        return document_prompts(section)
    if section.source != "tasks":
        return file_prompts(section.source, section, split="train")
    return task_prompts("train", section.levels, section, seed)


def task_prompts(split: str, levels: dict[str, int], section: Prompts, seed: int) -> list[dict]:
    """Rows of the embedded tasks. Held-out splits never repeat a prompt, whatever `distinct` says."""
    distinct = section.distinct or split != "train"
    with console.slow(f"drawing {sum(levels.values()):,} problems"):
        problems = sample_problems(split, levels, seed, section.families, distinct)
    return [
        {
            "prompt_id": p.prompt_id if distinct else f"{p.prompt_id}-{i}",
            "messages": with_system([{"role": "user", "content": p.question}], section.system),
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

    Without a preset of their own they are read as `prompts` says. Embedded tasks bring their worked solutions where
    `section.solutions` reads them.
    """
    if not section.source:
        if section.solutions:
            prompts = prompts.model_copy(update={"solutions": True})
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
    that are), a verifier whose package is missing, and for rows with an empty question or another mistake.
    """
    require_package(section.verifier)
    table = _read_source(source, section)
    given, solved = (section.completion_column, section.solution_column) if split == "train" else (None, None)
    _check_columns(source, section, table.columns, {"completion_column": given, "solution_column": solved})
    fields = _template_fields(section, table.columns)
    rows, problems = [], Problems(source)
    verifier = f"regex:{section.pattern}" if section.pattern else section.verifier
    for number, item in enumerate(table.rows):
        try:
            row = _read_row(item, section, fields)
            completion, solution = (
                text_of(_filled(item, [column])[column], column) if column else None
                for column in (given, solved)
            )
        except ValueError as error:
            problems.add(f"{source}: {table.place(number)} has {error}")
            continue
        text = "\n".join(m["content"] for m in row["messages"])
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        kept = {"verifier": verifier, "split": split, "solution": solution, "completion": completion}
        rows.append({"prompt_id": f"{digest}-{number}", **row, **kept})
    problems.refuse()
    return rows


def _template_fields(section: Prompts, columns: list[str]) -> list[str]:
    """The names that the template puts in: the source's columns, and `question` and `choices` of a preset."""
    preset = PRESETS.get(section.preset)
    if preset:
        columns = list(dict.fromkeys([*columns, *check_template(preset.template, ("question", "choices"))]))
    template = section.template or (preset.template if preset else None)
    return check_template(template, columns) if template else []


def _read_row(item: dict, section: Prompts, fields: list[str]) -> dict[str, Any]:
    """`messages, answer, family, level, question, choices` of a row. Raises ValueError for a bad one."""
    preset = PRESETS.get(section.preset)
    values = {**item, **preset.read(_filled(item, preset.columns))} if preset else item
    column = "answer" if preset else section.answer_column
    reference = text_of(values.get(column), column) if column else ""
    if not fields:
        column = section.prompt_column
        messages, last = conversation(_filled(item, [column])[column])
        reference, own = _with_last_turn(reference, last, section), None
    else:
        text = render(section.template or preset.template, _filled(values, fields))
        own = values["question"] if preset else "\n".join(shown(values[name]) for name in fields)
        messages = [{"role": "user", "content": text}]
    if section.verifier == "choice" and reference and letter(reference) is None:
        raise ValueError(f"the answer '{reference[:40]}', and verifier 'choice' compares letters A to Z")
    return {
        "messages": with_system(messages, section.system),
        "answer": reference,
        "family": text_of(values.get("family"), "family") or section.preset or "all",
        "level": section.preset or text_of(item.get("level"), "level") or "all",
        "question": own,
        "choices": _choices(values.get("choices"), section),
    }


def _with_last_turn(reference: str, last: str | None, section: Prompts) -> str:
    """The reference answer of a conversation that ends with an assistant's turn, as `prompts.last_turn` says."""
    if last is None or section.last_turn == "drop":
        return reference
    if section.last_turn == "refuse":
        raise ValueError(
            "an assistant's turn at the end of its conversation; set prompts.last_turn=reference to compare answers "
            "with it, or prompts.last_turn=drop"
        )
    final = extract_answer(last)
    if final is None:
        raise ValueError("a last assistant turn that is all thinking, no reference; remove the row")
    if reference and reference != final:
        raise ValueError(
            f"two references, '{reference[:40]}' in '{section.answer_column}' and a last assistant turn; set "
            "prompts.answer_column='', or prompts.last_turn=drop"
        )
    return final


def _choices(found: Any, section: Prompts) -> list[str] | None:
    """A column `choices`, if it is a list of texts. Raises ValueError where likelihood would need it to be."""
    if not isinstance(found, list) or not found:
        return None
    if all(isinstance(choice, str) and choice for choice in found):
        return [str(choice) for choice in found]
    if section.verifier == "choice":
        raise ValueError("a list 'choices' with something else than text in it; write every choice as text")
    return None


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
    if section.last_turn == "reference" and section.answer_column == "answer" and not section.template:
        # The conversations bring it; a column of this name is still compared with them.
        keys.remove("answer_column")
    for key in [*keys, *(key for key, column in extra.items() if column)]:
        column = getattr(section, key)
        if column and column not in columns:
            more = ", or prompts.answer_column='' for none" if key == "answer_column" else ""
            raise UserError(f"{source} has no column '{column}'; set prompts.{key} to one of: {there}{more}")


def _filled(row: dict, columns: Iterable[str]) -> dict:
    """The row, after a look that none of these columns is empty. Raises ValueError naming the one that is."""
    for name in columns:
        if row.get(name) in (None, "", []):
            raise ValueError(f"an empty '{name}'; remove the row")
    return row


def _read_source(source: str, section: Prompts) -> Table:
    """A local file or a hub dataset as rows of text, the first `section.limit` of them where there is a limit."""
    if source.startswith("hub:"):
        data = _from_hub(source, section).with_format("arrow")
        return arrow_rows(source, data.features.arrow_schema, data.iter(1000), section.limit)
    path = find_file(source)
    if path.suffix.lower() not in FORMS:
        forms = ", ".join(FORMS)
        raise UserError(f"prompts.source='{source}': give 'tasks', a {forms} file or 'hub:org/name'")
    if not path.is_file():
        raise UserError(f"prompts.source: file '{source}' not found{like_it(path)}; give one that is there")
    return read_table(path, section.limit)


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


def source_hash(source: str) -> str | None:
    """The content of a local file; a hub dataset is known by its name, config, split and revision."""
    if source.startswith("hub:"):
        return None
    if is_embedded(source):  # another Python has another text
        return fingerprint(python_docs("train"))
    path = find_file(source)
    if not path.is_file():
        raise UserError(
            f"prompts.source: '{source}' is neither 'tasks' nor a file{like_it(path)}; give one of them"
        )
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


# ---- plain text ----------------------------------------------------------------------------------------


_SHORTEST = 8  # tokens of a row: a document's last few are not worth one


def document_prompts(section: Prompts) -> list[dict[str, Any]]:
    """Rows of the stage `prompts/`, one per document. Raises UserError for a source that cannot be read."""
    texts = documents(section.source, "train", "prompts.source")[: section.limit]
    return [
        {
            "prompt_id": f"document-{number:05d}",
            "messages": [],
            "answer": "",
            "verifier": "exact",
            "family": "text",
            "level": "text",
            "split": "train",
            "solution": None,
            "completion": text,
            "question": None,
        }
        for number, text in enumerate(texts)
    ]


def document_rows(prompts: dict[str, dict], tokenizer, window: int) -> Iterator[dict[str, Any]]:
    """Training rows of DATASET_SCHEMA: windows of at most `window` tokens, the first of which is context."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for prompt in prompts.values():
        tokens = [
            first,
            *tokenizer(prompt["completion"], add_special_tokens=False, verbose=False)["input_ids"],
        ]
        for number, start in enumerate(range(0, len(tokens) - 1, window - 1)):
            piece = tokens[start : start + window]
            if len(piece) < _SHORTEST and number:
                continue
            yield {
                "prompt_id": prompt["prompt_id"],
                "sample_idx": number,
                "messages": [],
                "prompt_ids": piece[:1],
                "completion_ids": piece[1:],
                "text": tokenizer.decode(piece[1:]),
                "family": prompt["family"],
                "level": prompt["level"],
            }


def check_documents(section: Prompts, context: int | None) -> None:
    """Raises UserError for windows that the student cannot read."""
    if context is not None and section.window > context:
        raise UserError(
            f"prompts.window={section.window}: the student reads {context} tokens at most; lower it"
        )
