"""The training set as others read it: a dataset card, TRL's formats, and the hub on request.

    datasets.load_dataset("RUN_DIR/dataset")          what was kept, without dropped/ and control/
    distill export RUN_DIR --format prompt_completion --out train.jsonl      [--plain]
    distill export RUN_DIR --push-to-hub NAME         private, unless --public

The card states teacher, terms, sampling and what each filter dropped.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from distill.config.recipe import Recipe, load_recipe
from distill.data.provenance import in_card, terms_lines
from distill.errors import RunError, UserError
from distill.files import like_it, replacing, shown
from distill.storage import MANIFEST, MESSAGES, parts, read_json, read_table, verify_folder, write_atomic

# The hub's own size classes: https://github.com/huggingface/hub-docs/blob/main/datasetcard.md
_SIZES = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", 1e7: "1M<n<10M"}
_COLUMNS = {
    "prompt_id": "the question, equal for all answers to it",
    "sample_idx": "which of the answers to it",
    "messages": "the question as chat messages",
    "text": "the answer",
    "prompt_ids": "the question in the student's tokenizer and chat template",
    "completion_ids": "the answer's token ids, with the end token",
    "family": "kind of problem",
    "level": "its difficulty",
}


# TRL's dataset formats: https://huggingface.co/docs/trl/dataset_formats, (format, plain) -> columns
_FORMATS = {
    ("messages", False): pa.schema([("messages", MESSAGES)]),
    ("messages", True): pa.schema([("text", pa.string())]),
    ("prompt_completion", False): pa.schema([("prompt", MESSAGES), ("completion", MESSAGES)]),
    ("prompt_completion", True): pa.schema([("prompt", pa.string()), ("completion", pa.string())]),
}


def write_card(recipe: Recipe, folder: Path, counts: dict[str, Any], terms: dict | None) -> None:
    """Write `folder`/README.md. counts: the dataset manifest's; terms: the decision, None for no teacher."""
    front = {
        "pretty_name": f"{recipe.path.name}: training set",
        "task_categories": ["text-generation"],
        "tags": ["synthetic", "distillation"],
        "size_categories": [size_category(counts["rows"])],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "part-*.parquet"}]},
        ],
    }
    lines = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {in_card(front['pretty_name'])}", ""]
    lines += [
        *_origin(recipe, terms),
        "",
        "## What was kept",
        "",
        *_filter_table(counts),
        "",
        "## Columns",
        "",
    ]
    lines += [
        "| column | what |",
        "|---|---|",
        *(f"| {key} | {what} |" for key, what in _COLUMNS.items()),
        "",
    ]
    lines += [f"Versions, hashes and the resolved settings are in `{MANIFEST}`.", ""]
    write_atomic(folder / "README.md", "\n".join(lines))


def size_category(rows: int) -> str:
    return next((name for limit, name in _SIZES.items() if rows < limit), "n>10M")


def _origin(recipe: Recipe, terms: dict[str, Any] | None) -> list[str]:
    source = recipe.prompts.source
    questions = (
        "procedurally generated problems (`distill/tasks/problems.py`)"
        if source == "tasks"
        else f"`{in_card(source)}`"
    )
    if recipe.teacher is None:
        return [
            f"Questions and worked steps: {questions}.",
            "",
            "No third-party data or model outputs are used.",
        ]
    sampling = recipe.generate
    drawn = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    drawn += "".join(
        f", {name} {value:g}"
        for name, value, off in (
            ("top_p", sampling.top_p, 1.0),
            ("top_k", sampling.top_k, 0),
            ("min_p", sampling.min_p, 0.0),
        )
        if value != off
    )
    stated = (
        terms_lines(terms) if terms else ["The teacher's terms were not recorded: check them before sharing."]
    )
    return [
        f"- questions: {questions}",
        f"- answers: `{in_card(recipe.teacher.model)}`, {sampling.samples} per question",
        f"- sampling: {drawn}, at most {sampling.max_new_tokens} tokens; seed {recipe.seed}",
        "",
        *stated,
        "",
        "Flaws of the teacher (wrong rules, refusals, bias) can be inherited.",
    ]


def _filter_table(counts: dict[str, Any]) -> list[str]:
    dropped = counts["dropped_by_rule"]
    lines = ["| | rows |", "|---|---|", f"| answers | {counts['kept'] + counts['dropped']:,} |"]
    lines += [f"| dropped: {rule} | {number:,} |" for rule, number in dropped.items()]
    return [*lines, f"| kept, for {counts['prompts_covered']:,} questions | {counts['kept']:,} |"]


# ------------------------------------------------------------------------------------------------- export


def export(run_dir: Path, form: str, out: Path, plain: bool = False) -> int:
    """Write the training set of a run in one of TRL's formats; returns the number of rows.

    form: "prompt_completion" or "messages"; out: a new .jsonl or .parquet file. `plain` gives strings instead
    of chat messages, through the student's chat template and with its end token; tokenize them without adding
    special tokens. Raises UserError for an unfinished run, another ending, or a file that exists.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out {out}: give a file that ends in .jsonl or .parquet")
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; give another name, or remove it")
    folder = _finished_dataset(run_dir)
    render = _plain_renderer(run_dir) if plain else None
    write = _write_jsonl if out.suffix == ".jsonl" else _write_parquet
    size = sum(path.stat().st_size for path in parts(folder))
    with replacing(out, size) as temporary:
        return write(temporary, _FORMATS[form, plain], _batches(folder, form, render))


def _finished_dataset(run_dir: Path) -> Path:
    if not run_dir.is_dir():
        raise UserError(f"{shown(run_dir)} is no folder; give the run_dir of a recipe{like_it(run_dir)}")
    folder = run_dir / "dataset"
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not finished; run `distill filter RECIPE` first")
    verify_folder(folder)
    return folder


def _batches(folder: Path, form: str, render) -> Iterator[list[dict]]:
    """Rows of the format, one part in memory at a time."""
    for path in parts(folder):
        if "messages" not in pq.read_schema(path).names:
            raise UserError(f"{path} has no questions as messages; rebuild it: distill filter RECIPE --redo")
        rows = read_table(path, ["messages", "text"]).to_pylist()
        yield [_exported(row, form, render) for row in rows]


def _exported(row: dict, form: str, render) -> dict:
    prompt, answer = row["messages"], [{"role": "assistant", "content": row["text"]}]
    if render:
        text = render(prompt, row["text"])
        return {"text": "".join(text)} if form == "messages" else dict(zip(("prompt", "completion"), text))
    if form == "messages":
        return {"messages": [*prompt, *answer]}
    return {"prompt": prompt, "completion": answer}


def _plain_renderer(run_dir: Path):
    """(messages, answer) -> the two strings that the student was trained on."""
    from distill.models.chat import continuation, opening
    from distill.models.chat import render as render_chat
    from distill.models.student import student_tokenizer

    tokenizer = student_tokenizer(load_recipe(str(run_dir / "recipe.yaml")).student)

    def render(messages: list[dict], answer: str) -> tuple[str, str]:
        return render_chat(tokenizer, messages), continuation(
            answer, opening(tokenizer)
        ) + tokenizer.eos_token

    return render


def _write_jsonl(path: Path, schema: pa.Schema, batches: Iterator[list[dict]]) -> int:
    rows = 0
    with open(path, "w", encoding="utf-8") as file:
        for batch in batches:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch)
            rows += len(batch)
    return rows


def _write_parquet(path: Path, schema: pa.Schema, batches: Iterator[list[dict]]) -> int:
    rows = 0
    with pq.ParquetWriter(path, schema) as writer:
        for batch in batches:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            rows += len(batch)
    return rows


def push(run_dir: Path, name: str, public: bool = False) -> str:
    """Upload the card, the parts and the manifest as the hub dataset `name`; returns its address.

    Private unless `public`. Raises UserError where the teacher's terms were not recorded, or where a private
    upload would land in a dataset that is public already; RunError where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = _finished_dataset(run_dir)
    manifest = read_json(folder / MANIFEST)
    if "generations" in manifest["inputs"] and not manifest.get("terms"):
        raise UserError(f"{folder}: the teacher's terms were not recorded; rebuild it before sharing it")
    api = HfApi()
    try:
        address = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True)
        if not public and not api.repo_info(name, repo_type="dataset").private:
            raise UserError(f"dataset '{name}' is public already; give another name, or --public")
        api.upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=["README.md", MANIFEST, "part-*.parquet"],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"the hub did not take '{name}' ({reason}); check the name and `hf auth login`"
        ) from None
    return str(address)
