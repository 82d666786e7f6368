"""What is kept of a grid's runs: single answers, so that arms are compared problem by problem, and records of tasks.

    records = Records(Path("checkpoints/claims"))         # of what has been finished, here or on another machine
    table = read_items(runs_by_arm, records)               # {arm: {seed: {kind: Items}}}
    write_items(table, Path("checkpoints/claims/items.parquet"))

A kind is a level of problems (`hard`) or a flaw that is probed (`flaw.bias`). Arms of a seed answer the same problems,
so the difference between two of them has an item for each; what the items alone would make it vary is told
beside what the seeds do. The table is kept whole: every number of the claims can be worked out from it again
(recipes/recompute.py does, without this package).

A record is all that results are made of: the recipe's fingerprint, metrics, what training used, every answer, seconds,
the code's commit. Each finished task leaves one in `records.parquet`, which is written once a minute. So a grid can be
shared out: what any `records*.parquet` in the grid's folder knows of today's recipe is not run again, unless a run
that is left needs its weights.

Shapes: P problems of a kind.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill.bench.metrics import MODEL, read_metrics
from distill.bench.plan import Task
from distill.errors import UserError
from distill.files import replacing
from distill.storage import MANIFEST, fingerprint, read_json, read_rows

ITEMS = "items.parquet"
SCHEMA = pa.schema(
    [
        ("arm", pa.dictionary(pa.int16(), pa.string())),
        ("seed", pa.int32()),
        ("kind", pa.dictionary(pa.int16(), pa.string())),  # a level, or flaw.NAME
        ("item", pa.string()),  # the problem's id, the same in every arm of a seed
        ("right", pa.bool_()),  # solved; of a flaw: shown
        ("tokens", pa.int32()),  # of the answer; null for a flaw
        ("nats", pa.float32()),  # of the worked solution; null where it was not read
        ("nats_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Items:
    """One run's answers of a kind, sorted by item. right [P] bool; tokens, nats, nats_tokens [P], NaN for none."""

    item: np.ndarray
    right: np.ndarray
    tokens: np.ndarray
    nats: np.ndarray
    nats_tokens: np.ndarray

    @property
    def count(self) -> tuple[int, int]:
        return int(self.right.sum()), len(self.right)


Table = dict[str, dict[int, dict[str, Items]]]


def read_items(runs: Mapping[str, Mapping[int, Task]], records: "Records") -> Table:
    """{arm: {seed: {kind: Items}}} of finished runs; `runs` is {arm: {seed: task}}. Several samples count as one."""
    return {
        arm: {seed: records[task].items for seed, task in by_seed.items()} for arm, by_seed in runs.items()
    }


def items_of(folder: Path) -> dict[str, Items]:
    """A run folder's answers by kind: of its student alone, whose teacher may have answered beside it."""
    values = ("prompt_id", "tokens", "solution_nats", "solution_tokens")
    kinds: dict[str, list[tuple]] = {}
    for row in read_rows(folder / "eval" / "answers", ["model", "sample_idx", "level", "verdict", *values]):
        if row["model"] == MODEL and row["sample_idx"] == 0:  # its teacher may have answered beside it
            item, *measured = (row[name] for name in values)
            kinds.setdefault(row["level"], []).append((item, row["verdict"] == "correct", *measured))
    if (folder / "probes.json").is_file():
        for flaw, item, shown in read_json(folder / "probes.json").get("items", []):
            kinds.setdefault(f"flaw.{flaw}", []).append((item, shown, None, None, None))
    return {kind: _items(rows) for kind, rows in kinds.items()}


def _items(rows: list[tuple]) -> Items:
    item, right, *numbers = zip(*sorted(rows, key=lambda row: row[0]))
    tokens, nats, nats_tokens = (np.array(column, np.float64) for column in numbers)
    # As they are kept, so that the table gives the very numbers again.
    nats = nats.astype(np.float32).astype(np.float64)
    return Items(np.array(item), np.array(right, bool), tokens, nats, nats_tokens)


def counts(table: Table) -> dict[str, dict[int, tuple[int, int]]]:
    """{"arm@metric": {seed: (right, of so many)}} of accuracies by level and of flaws."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for arm, by_seed in table.items():
        for seed, kinds in by_seed.items():
            for kind, items in kinds.items():
                name = kind if kind.startswith("flaw.") else f"accuracy.{kind}"
                found.setdefault(f"{arm}@{name}", {})[seed] = items.count
    return found


def item_values(table: Table, term: str, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(items, values) of `arm@metric` in a seed, where the metric is a mean over problems; None elsewhere."""
    arm, _, name = term.partition("@")
    family, _, kind = name.partition(".")
    kinds = table.get(arm, {}).get(seed, {})
    if name in kinds:
        return kinds[name].item, kinds[name].right.astype(float)
    if kind not in kinds or family not in ("accuracy", "nll"):
        return None
    items = kinds[kind]
    if family == "accuracy":
        return items.item, items.right.astype(float)
    read = np.isfinite(items.nats)
    mean = items.nats_tokens[read].mean() if read.any() else math.nan
    return items.item[read], items.nats[read] / mean


def item_noise(table: Table, terms: Mapping[str, float], seeds: Sequence[int]) -> dict[str, Any] | None:
    """What the choice of test problems alone contributes: {"n": problems in all, "stderr": of the mean effect}.

    Paired: each problem has one difference, the contrast of its values over the arms. None where the arms of a
    seed did not answer the same problems, or the metric is no mean over them.
    """
    variance, n = 0.0, 0
    for seed in seeds:
        columns = {term: item_values(table, term, seed) for term in terms}
        if any(column is None or not len(column[0]) for column in columns.values()):
            return None
        first = next(iter(columns.values()))[0]
        if any(not np.array_equal(items, first) for items, _ in columns.values()) or len(first) < 2:
            return None
        differences = sum(weight * columns[term][1] for term, weight in terms.items())
        variance += float(differences.var(ddof=1)) / len(first)
        n += len(first)
    return {"n": n, "stderr": math.sqrt(variance) / len(seeds)} if seeds else None


def write_items(table: Table, path: Path) -> None:
    """Every answer as a row of SCHEMA, atomically."""
    parts = []
    for arm, by_seed in table.items():
        for seed, kinds in by_seed.items():
            for kind, items in kinds.items():
                parts.append(_columns(arm, seed, kind, items))
    whole = pa.concat_tables(parts).unify_dictionaries() if parts else SCHEMA.empty_table()
    # All answers to a problem together: its name is then stored once, and the file is a third of the size.
    plain = pa.table({name: whole[name].cast(pa.string()) for name in ("kind", "item", "arm")})
    order = [(name, "ascending") for name in ("kind", "item", "seed", "arm")]
    whole = whole.take(pc.sort_indices(plain.append_column("seed", whole["seed"]), order))
    with replacing(path, whole.nbytes) as temporary:
        pq.write_table(whole, temporary, compression="zstd", compression_level=12)


def _columns(arm: str, seed: int, kind: str, items: Items) -> pa.Table:
    n = len(items.item)
    columns = [
        pa.array([arm] * n).dictionary_encode().cast(SCHEMA.field("arm").type),
        pa.array(np.full(n, seed, np.int32)),
        pa.array([kind] * n).dictionary_encode().cast(SCHEMA.field("kind").type),
        pa.array(items.item.tolist(), pa.string()),
        pa.array(items.right),
        *(
            pa.array(column, there.type, from_pandas=True)
            for column, there in zip(
                (_whole(items.tokens), items.nats.astype(np.float32), _whole(items.nats_tokens)),
                list(SCHEMA)[5:],
            )
        ),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _whole(column: np.ndarray) -> list[int | None]:
    return [None if math.isnan(value) else int(value) for value in column.tolist()]


# ==== Records of finished tasks ====

RECORDS = "records.parquet"
PATIENCE = 60.0  # seconds between two writings of it: the whole file each time, for hundreds of tasks
_ABOUT = b"records"  # in the file's metadata: everything but the answers, which are rows as in items.parquet


@dataclass(frozen=True)
class Record:
    """A finished task, wherever it was made. What is not a run has no device, metrics and answers."""

    identity: str  # of its recipe, as planned
    commit: str | None  # of the code that made it
    seconds: float
    device: str | None = None
    values: dict[str, float] = field(default_factory=dict)  # distill/bench/metrics.py has the names
    # Of a trained run: steps, rows, tokens, tokens_read, flops of its manifest.
    used: dict[str, float] | None = None
    items: dict[str, Items] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "items"}


def identity(task: Task) -> str:
    """A fingerprint of what the task is to do; folders of the grid are named in it, machines are not."""
    from distill.training.arms import NOT_IDENTITY

    if task.kind in ("answers", "rows"):
        # The name is a fingerprint of all that they depend on, and the recipe that of whoever asked first.
        return task.name
    recipe = task.recipe.identity(exclude={"train": NOT_IDENTITY})
    return fingerprint([recipe, task.kind, task.checkpoint, task.probes, str(task.rows), sorted(task.needs)])


def record_of(task: Task, kept: Mapping[str, Any]) -> Record:
    """Of a task that has finished in its folder; `kept`: its `seconds` and `commit` on the grid's clock."""
    about = identity(task), kept.get("commit"), kept["seconds"]
    if task.kind != "run":
        return Record(*about)
    used = None
    if not task.checkpoint:
        manifest = read_json(task.folder / "student" / MANIFEST)
        counts = manifest["counts"]
        used = {name: counts[name] for name in ("steps", "rows", "tokens", "tokens_read")}
        used["flops"] = manifest["flops"]
    device = read_json(task.folder / "eval" / MANIFEST)["device"]
    return Record(*about, device, read_metrics(task.folder), used, items_of(task.folder))


class Records:
    """Records of a grid's tasks by name. Files beside this machine's own are read and left as they are."""

    def __init__(self, root: Path):
        self.path, self._known = root / RECORDS, {}
        for path in sorted(root.glob("records*.parquet"), key=lambda p: p.name == RECORDS):  # its own wins
            self._known |= _read_records(path)
        self._rows: dict[str, list[pa.Table]] = {}
        self._written = time.monotonic()

    def __getitem__(self, task: Task) -> Record:
        return self._known[task.name]

    def knows(self, task: Task) -> bool:
        """Whether the task is finished as today's recipe asks for it."""
        known = self._known.get(task.name)
        return known is not None and known.identity == identity(task)

    def add(self, task: Task, kept: Mapping[str, Any]) -> None:
        """Of a task that has finished here. The file follows within a minute, and by `write` at the end."""
        self._known[task.name] = record_of(task, kept)
        self._rows.pop(task.name, None)
        if time.monotonic() - self._written > PATIENCE:
            self.write()

    def write(self) -> None:
        """All of them in one file, so that it can be carried to another machine by itself."""
        for name, record in self._known.items():
            if name not in self._rows:
                rows = record.items.items()
                self._rows[name] = [_columns(name, 0, kind, items) for kind, items in rows]
        parts = [part for name in self._known for part in self._rows[name]]
        whole = pa.concat_tables(parts).unify_dictionaries() if parts else SCHEMA.empty_table()
        about = {name: record.about() for name, record in self._known.items()}
        whole = whole.replace_schema_metadata({_ABOUT: json.dumps(about)})
        with replacing(self.path, whole.nbytes) as temporary:
            pq.write_table(whole, temporary, compression="zstd")
        self._written = time.monotonic()


def _read_records(path: Path) -> dict[str, Record]:
    """Raises UserError for a file that is none, or is damaged."""
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[_ABOUT])
        items: dict[str, dict[str, Items]] = {}
        if table.num_rows:
            names = np.array(table["arm"].cast(pa.string()).to_pylist())
            starts = np.flatnonzero(np.r_[True, names[1:] != names[:-1]])
            for start, end in zip(starts, [*starts[1:], len(names)]):
                items[str(names[start])] = _kinds(table.slice(start, end - start))
        return {name: Record(**of, items=items.get(name, {})) for name, of in about.items()}
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{path} holds no records of a grid's runs ({type(error).__name__}); copy it again from the machine that "
            "made it, or remove it: its runs are then made here"
        ) from None


def _kinds(rows: pa.Table) -> dict[str, Items]:
    """The answers of one run: its kinds follow one another."""
    names = np.array(rows["kind"].cast(pa.string()).to_pylist())
    columns = [
        np.array(rows[name].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
        for name in ("tokens", "nats", "nats_tokens")
    ]
    item, right = np.array(rows["item"].to_pylist()), np.array(rows["right"].to_pylist(), bool)
    return {
        kind: Items(item[names == kind], right[names == kind], *(column[names == kind] for column in columns))
        for kind in dict.fromkeys(names.tolist())
    }
