"""Rows on disk: Parquet parts written under a temporary name and renamed, a manifest written last.

The run folder is the API between stages. A part is either whole or absent, so a killed stage resumes at
the first missing part; a folder without `manifest.json` is unfinished, and no stage reads it.

    writer = PartWriter(folder); writer.write(0, rows); rows = read_rows(folder)
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill.errors import RunError, UserError

# Where recipes/ and checkpoints/ are: beside the package in a clone, inside it in an installed wheel (setup.py).
_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = _PACKAGE / "shipped"
PROJECT_ROOT = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent


def find_file(path: str) -> Path:
    """A recipe or shipped checkpoint named relative to here, or else to the project folder."""
    here = Path(path)
    if not here.exists() and not here.is_absolute() and (PROJECT_ROOT / here).exists():
        return PROJECT_ROOT / here
    return here


MANIFEST = "manifest.json"


def fingerprint(value: Any) -> str:
    """A short stable hash of any JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader (or a crash) sees the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError for a missing or damaged file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the stage that writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run the stage again") from None


class PartWriter:
    """Writes numbered Parquet parts of one schema into a folder, each atomically."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self.folder = folder
        self.schema = schema
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}.parquet"

    def write(self, index: int, rows: list[dict]) -> None:
        final = self.path(index)
        temporary = final.with_name(f".{final.name}.tmp{os.getpid()}")
        try:
            # Nothing reads statistics, and those of a binary column hold whole values.
            table = pa.Table.from_pylist(rows, schema=self.schema)
            pq.write_table(table, temporary, write_statistics=False)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, final)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunError(
                f"cannot write {final}: {error.strerror or error}; free some space and run again, "
                "finished parts are kept"
            ) from None

    def write_all(self, rows: list[dict], part_size: int = 20_000) -> None:
        """All rows in consecutive parts; an empty list still leaves one (empty) part with the schema."""
        for index, start in enumerate(range(0, max(len(rows), 1), part_size)):
            self.write(index, rows[start : start + part_size])


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary file that a killed process did not get to rename."""
    return path.name.startswith(".") and ".tmp" in path.name


def remove_leftovers(folder: Path) -> None:
    """Temporary files of a process that was killed while writing. Call before any writer of this run starts."""
    for path in folder.rglob(".*.tmp*"):
        if is_leftover(path) and path.is_file():
            path.unlink()


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One part. Raises UserError naming the file if it is not whole."""
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path} is damaged ({reason}); delete this file and run its stage again") from None


def read_rows(folder: Path, columns: list[str] | None = None) -> Iterator[dict]:
    """Every row of a stage folder, part by part; `columns` alone where given. Raises UserError for a damaged part."""
    for path in parts(folder):
        yield from read_table(path, columns).to_pylist()


def row_count(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError):
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
        elif path.stat().st_size != entry["bytes"] or _hash_once(path) != entry["hash"]:
            problems.append(f"{path} was changed: its hash is not the recorded one")
    return problems


def _hash_once(path: Path) -> str:
    """`hash_file`, once in a process for a file that stays as it is: an adapter's base is asked for at every step."""
    state = path.stat()
    return _hash_as_it_was(path.resolve(), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _hash_as_it_was(path: Path, *_state: int) -> str:
    return hash_file(path)


def hash_yaml(path: Path) -> str:
    """Hash of what a YAML file says: comments, spacing and the order of keys do not change it."""
    import yaml

    content = json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


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
