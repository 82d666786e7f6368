"""Single answers of a grid: what was right in which run, so that arms are compared problem by problem.

    table = read_items(tasks_by_arm)                       # {arm: {seed: {kind: Items}}}
    write_items(table, Path("checkpoints/claims/items.parquet"))

A kind is a level of problems (`hard`) or a flaw that is probed (`flaw.bias`). Arms of a seed answer the same problems,
so the difference between two of them has an item for each; what the items alone would make it vary is told
beside what the seeds do. The table is kept whole: every number of the claims can be worked out from it again
(recipes/recompute.py does, without this package).

Shapes: P problems of a kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.bench.metrics import MODEL
from distill.bench.plan import Task
from distill.files import replacing
from distill.storage import read_json, read_rows

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


def read_items(runs: Mapping[str, Mapping[int, Task]]) -> Table:
    """{arm: {seed: {kind: Items}}} of finished runs; `runs` is {arm: {seed: task}}. Several samples count as one."""
    known: dict[Path, dict[str, Items]] = {}
    found: Table = {}
    for arm, by_seed in runs.items():
        for seed, task in by_seed.items():
            if task.folder not in known:
                known[task.folder] = _of_run(task.folder)
            found.setdefault(arm, {})[seed] = known[task.folder]
    return found


def _of_run(folder: Path) -> dict[str, Items]:
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
                n = len(items.item)
                columns = [
                    pa.array([arm] * n).dictionary_encode().cast(SCHEMA.field("arm").type),
                    pa.array(np.full(n, seed, np.int32)),
                    pa.array([kind] * n).dictionary_encode().cast(SCHEMA.field("kind").type),
                    pa.array(items.item.tolist(), pa.string()),
                    pa.array(items.right),
                    *(
                        pa.array(column, field.type, from_pandas=True)
                        for column, field in zip(
                            (_whole(items.tokens), items.nats.astype(np.float32), _whole(items.nats_tokens)),
                            list(SCHEMA)[5:],
                        )
                    ),
                ]
                parts.append(pa.Table.from_arrays(columns, schema=SCHEMA))
    whole = pa.concat_tables(parts).unify_dictionaries() if parts else SCHEMA.empty_table()
    with replacing(path, whole.nbytes) as temporary:
        pq.write_table(whole, temporary, compression="zstd", compression_level=12)


def _whole(column: np.ndarray) -> list[int | None]:
    return [None if math.isnan(value) else int(value) for value in column.tolist()]
