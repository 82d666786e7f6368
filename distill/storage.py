"""Rows on disk, and whether they are what a stage wrote: Parquet parts, a manifest written last, hashes checked.

The run folder is the API between stages. A part is either whole or absent, so a killed stage resumes at
the first missing part; a folder without `manifest.json` is unfinished, and no stage reads it.

    writer = PartWriter(folder); writer.write(0, rows); rows = read_rows(folder)

Whether files are what a stage wrote: the hashes of its manifest, checked where the files are read.

    manifest["files"]       rows and weights, {name: {"bytes", "hash"}}: part of the fingerprint
    manifest["records"]     everything else that is read again: configs, tokenizers, templates, metrics
    "checksum"              of a JSON file's own content (manifest.json, state.json), added by `write_sealed`

    verify_folder(folder)   # raises UserError naming the first file that changed, who wrote it and how to remake it

A file is hashed once per process, as long as its size and time of change stay: BLAKE2b reads 0.8 GB a second, so
100 MB cost 0.13 s of one core, and the bytes are in memory when they are parsed. A folder without a manifest says
nothing of itself, and old manifests have `files` alone.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill import console
from distill.errors import UserError
from distill.files import like_it, replacing, shown, write_atomic, writing

__all__ = ["write_atomic"]  # from distill.files, beside its JSON form

# Where recipes/ and checkpoints/ are: beside the package in a clone, inside it in an installed wheel (setup.py).
_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = _PACKAGE / "shipped"
PROJECT_ROOT = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent


def find_file(path: str) -> Path:
    """A recipe or shipped checkpoint named relative to here, or else to the project folder."""
    here = Path(path)
    # os.path says no, and Path raises, where a name is too long or has a NUL character.
    if not os.path.exists(here) and not here.is_absolute() and os.path.exists(PROJECT_ROOT / here):
        return PROJECT_ROOT / here
    return here


_HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def resolve_model(name: str) -> str:
    """A local folder (also relative to the project), or a hub name left as it is.

    Raises UserError for something that looks like a folder and is not there.
    """
    path = find_file(name)
    if name.strip() and os.path.isdir(path):
        return str(path)
    looks_local = name.startswith((".", "/", "~", "checkpoints/")) or name.count("/") != 1
    if looks_local or os.path.isfile(path) or not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"model '{shown(name)}' is not a folder{like_it(name)}; give a saved model folder or a hub name like "
            "org/name"
        )
    return name


MANIFEST = "manifest.json"
CHECKSUM = "checksum"  # a key of JSON files that are sealed


def fingerprint(value: Any) -> str:
    """A short stable hash of any JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def json_text(value: Any) -> str:
    """A value as `write_json` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json_text(value))


def read_json(path: Path) -> Any:
    """Raises UserError for a missing or damaged file, or content that does not fit its checksum (where it has one)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the stage that writes it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run the stage again") from None
    checksum = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
    if checksum not in (None, fingerprint(value)):
        raise UserError(
            f"{path} is damaged: its content does not fit its checksum; delete it and run the stage again"
        )
    return value


_WRITTEN = "written"  # key of a part's own metadata: its rows and columns once more


class PartWriter:
    """Writes numbered Parquet parts of one schema into a folder, each atomically."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self.folder = folder
        self.schema = schema
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}.parquet"

    def write(self, index: int, rows: list[dict]) -> None:
        # Pages have checksums of their own, and the footer, which counts rows and names columns, has none.
        said = json.dumps({"rows": len(rows), "columns": {f.name: _type_name(f) for f in self.schema}})
        table = pa.Table.from_pylist(rows, schema=self.schema.with_metadata({_WRITTEN: said}))
        with replacing(self.path(index), table.nbytes, sweep=False) as temporary:
            # Nothing reads statistics, and those of a binary column hold whole values.
            pq.write_table(table, temporary, write_statistics=False, write_page_checksum=True)

    def write_all(self, rows: list[dict], part_size: int = 20_000) -> None:
        """All rows in consecutive parts; an empty list still leaves one (empty) part with the schema."""
        for index, start in enumerate(range(0, max(len(rows), 1), part_size)):
            self.write(index, rows[start : start + part_size])


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One part. Raises UserError naming the file if it is not whole."""
    try:
        table = pq.read_table(path, columns=columns, partitioning=None, page_checksum_verification=True)
        _check_footer(table, columns)
        return table
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{path} is damaged ({reason}); delete this file and run its stage again") from None


def _type_name(field: pa.Field) -> str:
    """The same before and after a file: Parquet has another name for the items of a list."""
    return str(field.type).replace("<element: ", "<item: ")


def _check_footer(table: pa.Table, columns: list[str] | None) -> None:
    """Raises ValueError where rows and columns are not those that `PartWriter` says it wrote, if it does."""
    said = (table.schema.metadata or {}).get(_WRITTEN.encode())
    if said is None:
        return
    written = json.loads(said)
    asked = written["columns"] if columns is None else columns
    found = {field.name: _type_name(field) for field in table.schema}
    if table.num_rows != written["rows"] or any(found.get(c) != written["columns"].get(c) for c in asked):
        raise ValueError("its footer tells of other rows or columns than were written")


def read_rows(folder: Path, columns: list[str] | None = None) -> Iterator[dict]:
    """Every row of a stage folder, part by part; `columns` alone where given. Raises UserError for a damaged part."""
    for path in parts(folder):
        yield from read_table(path, columns).to_pylist()


def row_count(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError):
            raise UserError(f"{path} is damaged; delete this file and run its stage again") from None
    return total


def hash_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def changed_files(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What differs from recorded entries {name: {"bytes", "hash"}}: a line per file that is missing or another."""
    problems = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif not same(path, entry):
            problems.append(f"{path} was changed: its hash is not the recorded one")
    return problems


def same(path: Path, entry: dict[str, Any]) -> bool:
    """Whether the file is the one of a recorded {"bytes", "hash"}, or says what a recorded {"content"} says."""
    if "content" in entry:
        return entry["content"] == adapter_content(path)
    return path.stat().st_size == entry["bytes"] and hash_once(path) == entry["hash"]


def adapter_content(path: Path) -> str | None:
    """Hash of what an adapter_config.json says, but for where its base lies; None where it is no JSON object.

    A base may be moved and the path edited; whether it is the same base is told by the hashes of its own files.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        said.pop("base_model_name_or_path", None)
    except (ValueError, RecursionError, AttributeError):
        return None
    return fingerprint(said)


def hash_once(path: Path) -> str:
    """`hash_file`, once in a process for a file that stays as it is: an adapter's base is asked for at every step."""
    state = path.stat()
    return _hash_as_it_was(path.resolve(), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _hash_as_it_was(path: Path, *_state: int) -> str:
    return hash_file(path)


def hash_yaml(path: Path) -> str:
    """Hash of what a YAML file says: comments, spacing and the order of keys do not change it."""
    content = json.dumps(parse_yaml(path.read_text(encoding="utf-8")), sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def parse_yaml(text: str) -> Any:
    """What a YAML text of ours says; one of a user goes through `config.recipe.load_yaml`. Raises YAMLError."""
    import yaml

    # libyaml, 8 times as fast, where PyYAML was built with it.
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


# ---- row schemas, one per stage -------------------------------------------------------------------

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

# A teacher's distribution at every completion token, packed (distill/data/signals.py); null where none is kept.
SIGNAL_COLUMNS = ("signal_ids", "signal_values")
_SIGNALS = [(name, pa.binary()) for name in SIGNAL_COLUMNS]

PROMPT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", MESSAGES),
        ("answer", pa.string()),
        ("verifier", pa.string()),
        ("family", pa.string()),
        ("level", pa.string()),
        ("split", pa.string()),
        ("solution", pa.string()),  # null: the public set has final answers only
        ("completion", pa.string()),  # null: the teacher writes it
        ("question", pa.string()),  # what a template was filled with; null: the messages are the question
    ]
)

GENERATION_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_idx", pa.int32()),
        ("teacher", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("prompt_tokens", pa.int32()),  # an endpoint's own count, where there are no ids
        ("completion_tokens", pa.int32()),
        *_SIGNALS,
        ("verdict", pa.string()),
        ("error", pa.string()),
        ("family", pa.string()),
        ("level", pa.string()),
    ]
)

DATASET_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_idx", pa.int32()),
        ("messages", MESSAGES),  # the question; `text` is the answer
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        *_SIGNALS,
        ("text", pa.string()),
        ("family", pa.string()),
        ("level", pa.string()),
    ]
)

DROPPED_SCHEMA = DATASET_SCHEMA.append(pa.field("rule", pa.string())).append(pa.field("verdict", pa.string()))
DROPPED_SCHEMA = DROPPED_SCHEMA.append(pa.field("detail", pa.string()))  # what the rule found

ANSWER_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_idx", pa.int32()),  # 0 for greedy answers
        ("family", pa.string()),
        ("level", pa.string()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),
        ("final", pa.string()),  # what the verifier compares, in one spelling; null if it finds nothing
        ("verdict", pa.string()),
        ("finish_reason", pa.string()),
        ("tokens", pa.int32()),
        ("thinking_tokens", pa.int32()),  # of these, up to and with the last </think>
        ("logprob", pa.float64()),  # of the whole answer, natural log, temperature 1
        ("completion_ids", pa.list_(pa.int32())),
        ("error", pa.string()),
        # Of the worked solution, read after its problem (evaluate.solutions); null where it was not.
        ("solution_nats", pa.float64()),
        ("solution_tokens", pa.int32()),
    ]
)


# ==== Whether files are what a stage wrote ====

COMMANDS = {
    "prompts": "generate",
    "generations": "generate",
    "dataset": "filter",
    "student": "train",
    "control": "train",
    "eval": "evaluate",
}
# What a stage's folder holds besides rows and weights and is read again. Pages (.html) are made from these, and a
# card (.md) is for people: evaluation writes its scores into it.
_RECORDS = (".json", ".jsonl", ".jinja", ".txt", ".model")
_ADAPTER = "adapter_config.json"
_SEAL = "# checksum of the lines above: "


# ---- writing -----------------------------------------------------------------------------------------


def entries(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{name in the folder: {"bytes", "hash"}} of these files."""
    return {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "hash": hash_file(p)} for p in sorted(paths)
    }


def record_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """`entries` of what goes into `records`: directly in the folder, but not the manifest.

    Of an adapter's settings it is {"content"}: the path of its base may be edited.
    """
    found = entries(
        folder,
        (
            p
            for p in folder.iterdir()
            if p.is_file() and p.suffix in _RECORDS and p.name != MANIFEST and not p.name.startswith(".")
        ),
    )
    if _ADAPTER in found:
        found[_ADAPTER] = {"content": adapter_content(folder / _ADAPTER)}
    return found


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """A JSON object with the checksum of its own content; `read_json` checks it and takes it out."""
    plain = json.loads(json.dumps(value, allow_nan=False))
    sealed = {**plain, CHECKSUM: fingerprint(plain)}
    write_atomic(path, json.dumps(sealed, indent=2, ensure_ascii=False) + "\n")


def sealed_text(text: str) -> str:
    """A text file of lines, with a last one, a YAML comment, that holds the checksum of those above."""
    return f"{text}{_SEAL}{fingerprint(text)}\n"


def unsealed(text: str) -> tuple[str, bool]:
    """(the text without its seal, whether it is as it was written); one that was never sealed is."""
    body, seal, checksum = text.rpartition(_SEAL)
    if seal:
        return body, checksum.strip() == fingerprint(body)
    body, _, last = text.rstrip("\n").rpartition("\n")
    # A seal whose own words are damaged is no text that was never sealed.
    damaged = len(last) == len(_SEAL) + 32 and sum(a != b for a, b in zip(last, _SEAL)) <= 2
    return (f"{body}\n", False) if damaged else (text, True)


# ---- reading -----------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """A stage's manifest. Raises UserError where it is missing or damaged, or its fingerprint is not its own."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is no manifest of a stage; delete it and {_remake(folder, None)}")
    if not {"config", "inputs", "files", "fingerprint"} <= set(manifest):
        return manifest
    identity = {"config": manifest["config"], "inputs": manifest["inputs"]}
    if fingerprint({"identity": identity, "files": manifest["files"]}) != manifest["fingerprint"]:
        raise UserError(
            f"{path} is damaged: its fingerprint is not that of its content; delete it and "
            f"{_remake(folder, manifest.get('stage'))}"
        )
    return manifest


def verify_folder(folder: Path, but: str | None = None) -> None:
    """Every file of the folder's manifest is as it was written; a missing one is for its reader to tell.

    `but`: the ending of files that are not going to be read. Without a manifest nothing is known. Raises UserError.
    """
    if not (folder / MANIFEST).is_file():
        return
    manifest = read_manifest(folder)
    with console.slow(f"comparing {folder} with its hashes"):
        changed = _changed(folder, manifest, but)
    if problems := [_problem(path, folder, manifest.get("stage")) for path in changed]:
        raise UserError(*problems)


def remove_changed(folder: Path) -> None:
    """For --redo: files that `verify_folder` would name are deleted, so that they are made again."""
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        for path in _changed(folder, manifest if isinstance(manifest, dict) else {}):
            path.unlink()


def _changed(folder: Path, manifest: dict[str, Any], but: str | None = None) -> list[Path]:
    lists = [manifest.get(name, {}) for name in ("files", "records")]
    recorded = {**lists[0], **lists[1]} if all(isinstance(files, dict) for files in lists) else {"": None}
    # A stranger's manifest must not have other files read, or with --redo deleted.
    if not all(_is_entry(name, entry) for name, entry in recorded.items()):
        raise UserError(
            f"{folder / MANIFEST} names a file outside its folder, or one without its hash; delete it and "
            f"{_remake(folder, None)}"
        )
    found = {folder / name: entry for name, entry in recorded.items()}
    read = {path: entry for path, entry in found.items() if not (but and path.name.endswith(but))}
    return [path for path, entry in read.items() if path.is_file() and not same(path, entry)]


def _is_entry(name: str, entry: Any) -> bool:
    inside = bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
    return inside and isinstance(entry, dict) and ("content" in entry or {"bytes", "hash"} <= entry.keys())


def _problem(path: Path, folder: Path, stage: str | None) -> str:
    return (
        f"{path} is damaged: it is not what the stage '{stage}' wrote (its hash is another); "
        f"delete this file and {_remake(folder, stage)} (a change of your own belongs in a copy without {MANIFEST})"
    )


def verify_source(source: dict[str, Any] | None, folder: Path, user: str) -> None:
    """A model's files against what `user` recorded of them when it used it. Raises UserError for another one."""
    for name, entry in (source or {}).get("files", {}).items():
        path = folder / name
        if path.is_file() and not same(path, entry):
            raise UserError(
                f"{path} is not the file that {user} used (its hash is another); put that one back, or make the run "
                "anew from that stage with --redo"
            )


def _remake(folder: Path, stage: str | None) -> str:
    stage = stage or folder.name
    if folder.name == stage and stage in COMMANDS:
        return f"run `distill {COMMANDS[stage]} RECIPE` again"
    return "copy the folder again"
