"""From teacher outputs to a training set: rejection sampling, deduplication, and an account of what was dropped.

Stage folder `dataset/`: rows of token ids ready to train on, in the *student's* tokenizer and chat template;
`dataset/dropped/` has every row that was not kept, with the rule that dropped it; `dataset/control/` has the
same prompts with the final answer only, for the control arm.

    distill filter RECIPE [--explain]      --explain: per rule, its count and examples

Rows go to disk part by part; what stays in memory is the prompts, and what the rules remember.

`filter.completions` says what of a teacher's answer the student is shown: all of it, its result alone, or another
problem's.

    filter: {completions: reference_answer}        the prompts of the kept rows with their public answers, no working

`whole` is distillation. The others are controls for what in it matters: `teacher_answer` keeps the teacher's result
and drops its working, `reference_answer` drops the teacher as well, and `shuffled` gives each prompt the answer of
another prompt of its family and level: all of the form, none of the content. All four have the same prompts in the
same order, so that runs that differ in this alone differ in nothing else.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from distill import console
from distill.config.recipe import Recipe, resolved
from distill.data.export import write_card
from distill.data.filter_rules import ORDER, Candidate, HeldOut, Rules, held_out_questions, identity, question
from distill.data.prompts import check_documents, document_rows
from distill.data.provenance import require_permission
from distill.data.signals import HEAD, HIDDEN, SignalFormat
from distill.errors import UserError
from distill.files import replacing
from distill.models.chat import completion_ids, named_row, prompt_ids
from distill.models.load import load_tokenizer, same_vocabulary, tokenizer_fingerprint
from distill.models.student import student_config, student_tokenizer
from distill.stages import Stage, input_fingerprint
from distill.storage import (
    DATASET_SCHEMA,
    DROPPED_SCHEMA,
    MANIFEST,
    SIGNAL_COLUMNS,
    PartWriter,
    read_json,
    read_rows,
    verify_folder,
)
from distill.tasks.verify import extract_answer

_READ = ("prompt_id", "sample_idx", "completion_ids", "text", "finish_reason", "verdict", "error")


def make_dataset(recipe: Recipe, redo: bool = False) -> dict[str, Any]:
    """Run the stage `dataset/`; returns its manifest."""
    tokenizer = student_tokenizer(recipe.student)
    inputs = {"prompts": input_fingerprint(recipe.path / "prompts", "generate RECIPE")}
    texts = recipe.prompts.documents
    if recipe.teacher and not texts:
        inputs["generations"] = input_fingerprint(recipe.path / "generations", "generate RECIPE")
    guard = held_out_questions(recipe)
    config = {
        **identity(recipe.filter, guard),
        "control": recipe.control.enabled,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    if texts:
        config["window"] = recipe.prompts.window
        check_documents(recipe.prompts, _context(recipe))
    stage = Stage(recipe.path, "dataset", config, inputs, resolved(recipe))
    if stage.done(redo):
        return stage.manifest
    stage.begin(redo)
    signal = _usable_signal(recipe, config["tokenizer"])
    if signal and signal["kind"] == HIDDEN:
        head = recipe.path / "generations" / HEAD
        with replacing(stage.folder / HEAD, head.stat().st_size) as temporary:
            shutil.copyfile(head, temporary)
    prompts = {row["prompt_id"]: row for row in read_rows(recipe.path / "prompts")}
    if texts:
        rows = document_rows(prompts, tokenizer, recipe.prompts.window)
    elif recipe.teacher:
        answers = read_rows(recipe.path / "generations", [*_READ, *(SIGNAL_COLUMNS if signal else ())])
        rows = apply_filters(answers, prompts, recipe, tokenizer, guard)
        rows = reduced(
            rows,
            recipe.filter.completions,
            prompts,
            lambda row, text: _remade(row, text, tokenizer),
            recipe.filter.shuffled_share,
        )
    else:
        rows = solution_rows(prompts, tokenizer)
    try:
        counts = _write(rows, stage.folder, prompts, tokenizer, recipe.control.enabled)
    except UserError:
        stage.abandon()  # the fix is another recipe, which must not be refused for what this one began
        raise
    # The terms of the answers are those decided on when they were made.
    answered = recipe.path / "generations" / MANIFEST
    if texts:
        terms = require_permission(recipe)
    else:
        terms = read_json(answered).get("terms") if recipe.teacher else None
    write_card(recipe, stage.folder, counts, terms)
    return stage.finish(counts, device="cpu", tokenizer=config["tokenizer"], terms=terms, signal=signal)


def apply_filters(
    rows: Iterable[dict], prompts: dict[str, dict], recipe: Recipe, tokenizer, guard: HeldOut | None = None
) -> Iterator[dict]:
    """A training row per teacher answer, in order; a refused one has `rule`, `verdict` and `detail` too.

    Columns of `rows` beyond those read here (signals) are carried over to kept rows.
    """
    rules = Rules(recipe.filter, guard)
    # An endpoint gives text alone.
    source = recipe.teacher.endpoint.tokenizer if recipe.teacher.endpoint else recipe.teacher.model
    same = source is not None and same_vocabulary(load_tokenizer(source), tokenizer)
    opened = _teacher_opened(recipe)
    asked: dict[
        str, list[int] | str
    ] = {}  # of the newest prompt, whose samples stand side by side: rendered once
    for row in rows:
        prompt = prompts[row["prompt_id"]]
        blank = {"prompt_id": row["prompt_id"], "sample_idx": row["sample_idx"], "text": row["text"]}
        # Same vocabulary: train on the very ids the teacher chose; the text could re-tokenise differently.
        ids = row["completion_ids"] if same else None
        text = row["text"]
        if text is not None and row["prompt_id"] not in asked:
            asked = {row["prompt_id"]: _asked(tokenizer, prompt)}
        if text is not None and isinstance(asked[row["prompt_id"]], str):
            yield {**blank, "rule": "template", "verdict": row["verdict"], "detail": asked[row["prompt_id"]]}
            continue
        new = None
        if text is not None:
            completion = _completion(text, tokenizer, ids, opened, row["finish_reason"] != "length")
            new = _row(prompt, row["sample_idx"], text, asked[row["prompt_id"]], completion)
        if refusal := rules.refuse(Candidate(row, prompt, new)):
            yield {**(new or blank), "rule": refusal[0], "verdict": row["verdict"], "detail": refusal[1]}
        else:
            yield new | {name: value for name, value in row.items() if name in SIGNAL_COLUMNS}


def solution_rows(prompts: dict[str, dict], tokenizer) -> Iterator[dict]:
    """A training row per worked solution; the rule `template` for one that cannot be asked."""
    for prompt in prompts.values():
        asked, text = _asked(tokenizer, prompt), prompt["solution"]
        if isinstance(asked, str):
            blank = {"prompt_id": prompt["prompt_id"], "sample_idx": 0, "text": text, "verdict": None}
            yield {**blank, "rule": "template", "detail": asked}
        else:
            yield _row(prompt, 0, text, asked, _completion(text, tokenizer))


def _asked(tokenizer, prompt: dict) -> list[int] | str:
    """The prompt as the student reads it, or why its template refuses it."""
    try:
        return prompt_ids(tokenizer, prompt["messages"])
    except UserError as error:
        return str(error)


def _write(
    rows: Iterable[dict], folder: Path, prompts: dict[str, dict], tokenizer, control: bool
) -> dict[str, Any]:
    """Rows to the stage's folders; returns the manifest's counts. Raises UserError where nothing is kept."""
    kept, dropped = _Parts(folder, DATASET_SCHEMA), _Parts(folder / "dropped", DROPPED_SCHEMA)
    answers = _Parts(folder / "control", DATASET_SCHEMA) if control else None
    by_rule: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    covered: set[str] = set()
    for row in rows:
        if "rule" in row:
            dropped.add(row)
            by_rule[row["rule"]] += 1
            if row["rule"] == "template" and by_rule["template"] == 1:
                console.warn(
                    f"warning: {named_row(prompts[row['prompt_id']])} is dropped, as others may be (rule template): "
                    f"the student: {row['detail']}"
                )
            continue
        kept.add(row)
        covered.add(row["prompt_id"])
        totals["tokens"] += len(row["completion_ids"])
        totals["prompt_tokens"] += len(row["prompt_ids"])
        prompt = prompts[row["prompt_id"]]
        totals["unanswered"] += bool(prompt["messages"]) and not prompt["answer"]
        if control and not prompt["messages"]:  # plain text: the same rows, to be read without a teacher
            answers.add({name: value for name, value in row.items() if name not in SIGNAL_COLUMNS})
        elif control and prompt["answer"]:
            completion = _completion(prompt["answer"], tokenizer)
            answers.add(_row(prompt, row["sample_idx"], prompt["answer"], row["prompt_ids"], completion))
    if not kept.rows:
        if by_rule["truncated"] > sum(by_rule.values()) / 2:
            raise UserError(
                f"no row is left to train on: {dict(by_rule)}; most answers ran into generate.max_new_tokens; raise it "
                "and run generate with --redo, or loosen `filter` (filter.correct_only=false keeps wrong answers, "
                "filter.finish_reasons=[stop, length] those that were cut off)"
            )
        raise UserError(
            f"no row is left to train on: {dict(by_rule)}; loosen `filter` (filter.correct_only=false keeps "
            "wrong answers), or give a teacher that solves the prompts"
        )
    if control and totals["unanswered"]:
        raise UserError(
            f"the control arm needs final answers for all prompts, {totals['unanswered']} rows lack it; set "
            "prompts.answer_column, or control.enabled=false (the run then proves nothing about the teacher)"
        )
    for parts in filter(None, (dropped, answers, kept)):
        parts.close()
    return {
        "rows": kept.rows,
        "tokens": totals["tokens"],
        "prompt_tokens": totals["prompt_tokens"],
        "errors": by_rule.get("error", 0),
        "kept": kept.rows,
        "dropped": dropped.rows,
        "dropped_by_rule": dict(by_rule),
        "prompts_covered": len(covered),
    }


class _Parts:
    """Rows on their way to a folder: a part is written when it is full; without any row, an empty one."""

    def __init__(self, folder: Path, schema, size: int = 20_000):
        self._writer, self._size = PartWriter(folder, schema), size
        self._buffer: list[dict] = []
        self._written = self.rows = 0

    def add(self, row: dict) -> None:
        self._buffer.append(row)
        self.rows += 1
        if len(self._buffer) == self._size:
            self._flush()

    def close(self) -> None:
        if self._buffer or not self._written:
            self._flush()

    def _flush(self) -> None:
        self._writer.write(self._written, self._buffer)
        self._buffer = []
        self._written += 1


def explain(run_dir: Path, examples: int = 3) -> str:
    """What every rule of a finished `dataset/` dropped: its count and the first few rows, texts cut short."""
    verify_folder(run_dir / "dataset")
    counts = read_json(run_dir / "dataset" / MANIFEST)["counts"]
    questions = {row["prompt_id"]: question(row) for row in read_rows(run_dir / "prompts")}
    shown: dict[str, list[str]] = {rule: [] for rule in counts["dropped_by_rule"]}
    for row in read_rows(run_dir / "dataset" / "dropped"):
        if len(shown[row["rule"]]) < examples:
            detail = f"  [{row['detail']}]" if row.get("detail") else ""
            asked, answered = _cut(questions[row["prompt_id"]], 60), _cut(row["text"] or "", 60)
            shown[row["rule"]].append(f"    {asked}  ->  {answered}{detail}")
    lines = [f"kept {counts['kept']:,}, dropped {counts['dropped']:,}"]
    for rule in sorted(shown, key=[*ORDER, *RULES].index):
        lines += [f"  {rule}: {counts['dropped_by_rule'][rule]:,}", *shown[rule]]
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    """One line: control characters and line breaks become spaces."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _context(recipe: Recipe) -> int | None:
    """Tokens that the student reads at most."""
    config = student_config(recipe.student).get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def _usable_signal(recipe: Recipe, tokenizer: dict[str, str]) -> dict[str, Any] | None:
    """What the generations' manifest says of stored signals, if the student reads the very same tokens."""
    if recipe.teacher is None or recipe.prompts.documents or recipe.filter.completions != "whole":
        return None
    stored = read_json(recipe.path / "generations" / MANIFEST).get("signal")
    form = SignalFormat.from_manifest(stored)
    return stored if form and not form.problems(tokenizer) else None


def _remade(row: dict, text: str, tokenizer) -> dict:
    """A kept row with another text; stored signals go, they were said of the old one."""
    plain = {name: value for name, value in row.items() if name not in SIGNAL_COLUMNS}
    return plain | {"text": text, "completion_ids": _completion(text, tokenizer)}


def _teacher_opened(recipe: Recipe) -> str:
    """What the teacher's template wrote of every answer ahead of the ids that it decoded."""
    manifest = recipe.path / "generations" / MANIFEST
    return read_json(manifest).get("opened", "") if manifest.is_file() else ""


def _completion(
    text: str, tokenizer, ids: list[int] | None = None, opened: str = "", ended: bool = True
) -> list[int]:
    """Token ids of what the student has to write. They end with its end token: it must learn to stop.

    text: the whole turn. ids: those of the teacher, in the same vocabulary, behind what its template `opened`. Where
    the teacher ended its turn with another special token, the student's takes that one's place. A turn that was cut
    off (`ended` is False) has no end token: it would teach to stop in the middle.
    """
    if not ended:
        return completion_ids(tokenizer, text, opened, ids)
    end = tokenizer.eos_token_id
    if ids and ids[-1] in tokenizer.all_special_ids:
        ids = ids[:-1]
    return [*completion_ids(tokenizer, text, opened, ids), end]


def _row(prompt: dict, sample_idx: int, text: str, asked: list[int], completion: list[int]) -> dict:
    """One training row."""
    return {
        "prompt_id": prompt["prompt_id"],
        "sample_idx": sample_idx,
        "messages": prompt["messages"],
        "prompt_ids": asked,
        "completion_ids": completion,
        "text": text,
        "family": prompt["family"],
        "level": prompt["level"],
    }


# Rules of this module, in the account of what was dropped beside those of distill/data/filter_rules.py.
RULES = ("template", "no_final_answer", "no_other_prompt")
Row = dict
Make = Callable[[Row, str], Row]  # (row, text) -> the row with that text in place of its own


def reduced(
    rows: Iterable[Row], how: str, prompts: dict[str, Row], make: Make, share: float = 1.0
) -> Iterator[Row]:
    """Kept rows (those without `rule`) with their completions as `how` says; dropped rows pass unchanged.

    An answer without a final result (`teacher_answer`) or a prompt without a reference is dropped, with the rule
    `no_final_answer`. `shuffled` holds all rows in memory, and drops those of a cell with a single prompt; `share`
    of the prompts, chosen by their ids, get another's answer, and the rest keep theirs.
    """
    if how == "whole":
        yield from rows
    elif how == "shuffled":
        yield from _shuffled(rows, make, share)
    else:
        for row in rows:
            if "rule" in row:
                yield row
                continue
            known = prompts[row["prompt_id"]]["answer"]
            text = known if how == "reference_answer" else extract_answer(row["text"])
            yield make(row, text) if text else _refused(row, "no_final_answer")


def _shuffled(rows: Iterable[Row], make: Make, share: float) -> Iterator[Row]:
    """Each row with the text of a row further on in its (family, level), the last with those of the first."""
    kept: list[Row] = []
    for row in rows:
        if "rule" in row:
            yield row
        else:
            kept.append(row)
    cells: dict[tuple, list[Row]] = {}
    for row in kept:
        cells.setdefault((row["family"], row["level"]), []).append(row)
    donors: dict[tuple, str | None] = {}
    for cell in cells.values():
        by_prompt: dict[str, list[Row]] = {}
        for row in cell:
            by_prompt.setdefault(row["prompt_id"], []).append(row)
        groups = list(by_prompt.values())
        for group, other in zip(groups, [*groups[1:], groups[0]]):
            for i, row in enumerate(group):
                text = other[i % len(other)]["text"] if other is not group else None
                donors[row["prompt_id"], row["sample_idx"]] = text
    for row in kept:
        if not _drawn(row["prompt_id"], share):
            yield row
            continue
        text = donors[row["prompt_id"], row["sample_idx"]]
        yield _refused(row, "no_other_prompt") if text is None else make(row, text)


def _drawn(prompt_id: str, share: float) -> bool:
    """Whether a prompt belongs to `share` of all: by its id, so that a dose is the same on every machine."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8], "big") < share * 2**64


def _refused(row: Row, rule: str) -> Row:
    return {**row, "rule": rule, "verdict": None, "detail": None}
