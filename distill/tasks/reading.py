r"""A user's file as rows of text: what stands in the file, character by character, and nothing guessed.

    table = read_table("train.jsonl")
    table.columns, next(iter(table.rows))        # ["prompt", "answer"], {"prompt": "2 + 2?", "answer": "4"}

Readers that infer types turn `42` beside `3.5` into 42.0, 2024-01-05 into a time, `NA` into nothing and `007`
into 7, and then no answer equals the reference. Here:

| file          | a cell is |
|---------------|-----------|
| .csv, .tsv    | its text; an empty cell is empty text. Commas in .csv, tabs in .tsv, quotes as in RFC 4180 |
| .jsonl, .json | a string, or the literal as written: `1e5`, `3.50`, `true`; null is missing; lists and objects stay |
| .parquet, hub | typed by whoever wrote it, so that type in one stated spelling, see `typed_text` |

All text is UTF-8, with or without a byte-order mark. Lines of JSONL end at a line feed alone: U+2028, U+0085 and
the like inside a string are characters of it. What cannot be read so is refused with the line and the fix.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from distill.errors import UserError

if TYPE_CHECKING:  # a recipe is checked without them; they take 0.3 s
    import pyarrow as pa

FORMS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SHOWN = 5  # problems of a file that are told one by one; the others are counted
_BOM = b"\xef\xbb\xbf"
_WIDE = (  # the longer marks first: one begins as a shorter one does
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_WHITE = " \t\r\n"  # what JSON takes for white space
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONGEST_CELL = 2**31 - 1  # csv's own limit, 131,072 characters, is less than a long thought
_BATCH = 1000  # rows of a Parquet file or hub dataset that are in memory as Arrow and as text together


class Unquoted(str):
    """A number, true or false as the file writes it: text, but not a text in quotes."""


@dataclass
class Table:
    """`rows` can be gone through once; a row has no key for what it lacks. Columns in order of appearance."""

    columns: list[str]
    rows: Iterable[dict[str, Any]]
    lines: list[int] = field(default_factory=list)  # where each row begins, for files with lines

    def place(self, index: int) -> str:
        """How a message names a row (0-based index): its number, and its line where that is another."""
        line = self.lines[index] if index < len(self.lines) else index + 1
        return f"row {index + 1}" + (f" (line {line})" if line != index + 1 else "")


def read_table(path: Path, limit: int | None = None) -> Table:
    """The rows of a file of one of FORMS, the first `limit` of them where given.

    Raises UserError for a file that cannot be read: one line per problem, with the line and the fix.
    """
    form = path.suffix.lower()
    try:
        if form == ".parquet":
            return _parquet(path, limit)
        if form in (".csv", ".tsv"):
            table = _separated(path, "," if form == ".csv" else "\t", limit)
        else:
            table = _json(path, limit)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the file") from None
    if not table.columns:
        raise UserError(f"{path} cannot be read: there are no rows in it; give at least one")
    return table


class Problems:
    """What is wrong with a file: the first SHOWN problems in words, the others counted."""

    def __init__(self, path: str | Path):
        self.path, self.told, self.count = path, [], 0

    def add(self, problem: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            self.told.append(problem)

    def refuse(self) -> None:
        """Raises UserError if there are any."""
        if self.count > SHOWN:
            more = self.count - SHOWN
            self.told.append(
                f"{self.path}: and {more} more row{'s' if more > 1 else ''} with a problem; mend them all"
            )
        if self.told:
            raise UserError(*self.told)


def text_of(value: Any, name: str) -> str:
    """A cell that must be text; "" for one that is missing. Raises ValueError saying what else it is."""
    if value is None:
        return ""
    if isinstance(value, str):
        return str(value)
    kind = {list: "a list", dict: "an object", bytes: "bytes that are not UTF-8"}.get(type(value), "no text")
    raise ValueError(f"{kind} in '{name}', where one text belongs; write it as text")


# ---- text files ------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A whole file, its line ends as they are, without a byte-order mark. Raises UserError where it is not UTF-8."""
    try:
        _check_wide(path)
        return path.read_bytes().removeprefix(_BOM).decode()
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the file") from None


def _check_wide(path: Path) -> None:
    """Refuses UTF-16 and UTF-32: of plain English they are valid UTF-8, zero bytes beside each letter."""
    with open(path, "rb") as file:
        head = file.read(64)
    name = next((name for mark, name in _WIDE if head.startswith(mark)), None)
    if not name and len(head) >= 4 and not (any(head[::2]) and any(head[1::2])):
        name = "utf-16be" if head[1] else "utf-16le"
    if name:
        raise UserError(f"{path}: line 1: the file is {name.upper()}; {_as_utf8(path, name)}")


def _not_utf8(path: Path) -> UserError:
    """Names the first line of the file that is not UTF-8."""
    _check_wide(path)
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{raw[error.start]:02x}"
                return UserError(
                    f"{path}: line {number}: not UTF-8 ({byte}); if it is Latin-1, {_as_utf8(path, 'latin1')}"
                )
    return UserError(f"{path} is not UTF-8; save it as UTF-8")


def _as_utf8(path: Path, encoding: str) -> str:
    return f"save it as UTF-8: `iconv -f {encoding} -t utf-8 {path.name} > utf8{path.suffix}`"


# ---- JSON ------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One JSON object. Raises ValueError for a key that it has twice: either value could be meant."""
    row = {key: _literal(value) for key, value in pairs}
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key '{next(k for k in keys if keys.count(k) > 1)}' stands in it twice; keep one")
    return row


def _literal(value: Any) -> Any:
    if value is True or value is False:
        return Unquoted("true" if value else "false")
    return [_literal(item) for item in value] if type(value) is list else value


# Not strict: a tab or vertical tab inside a string is the string's own, whatever the standard says of escaping it.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=Unquoted, parse_float=Unquoted, parse_constant=Unquoted, strict=False
)


def decode_json(text: str) -> Any:
    """One JSON value, numbers, true and false as `Unquoted` text. Raises ValueError saying what is wrong with it."""
    try:
        value = _literal(_DECODER.decode(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno}); write one value a line") from None
    except RecursionError:
        raise ValueError("nested too deeply; write it flatter") from None
    _check_surrogates(text, value)
    return value


def _check_surrogates(text: str, value: Any) -> None:
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                "half of a surrogate pair (\\ud800 to \\udfff), which is no character; write the character"
            ) from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value or the ValueError that says what is wrong with it) of a JSONL file, blank lines left out.

    Raises UserError where the file is not UTF-8.
    """
    _check_wide(path)
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = (raw.removeprefix(_BOM) if number == 1 else raw).decode().strip(_WHITE)
            except UnicodeDecodeError:
                raise _not_utf8(path) from None
            if not text:
                continue
            try:
                yield number, decode_json(text)
            except ValueError as error:
                yield number, error


def _json(path: Path, limit: int | None) -> Table:
    """JSON lines or one JSON value, whatever the ending says: both are found under both."""
    _check_wide(path)
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
    if path.suffix.lower() == ".json" or head.startswith(b"["):
        rows = _one_value(path)
        if rows is not None:
            return _rows(rows[:limit], [])
    rows, lines, problems = [], [], Problems(path)
    for number, row in json_lines(path):
        if not isinstance(row, dict):
            what = (
                row if isinstance(row, ValueError) else "not an object {...}; a row is one object in one line"
            )
            problems.add(f"{path}: line {number}: {what}")
        rows.append(row)
        lines.append(number)
        if len(rows) == limit:
            break
    problems.refuse()
    return _rows(rows, lines)


def _one_value(path: Path) -> list[dict] | None:
    """The rows of a file that is one JSON value; None where it is an object with more after it: JSON lines."""
    text = read_text(path)
    begin = len(text) - len(text.lstrip(_WHITE))
    if begin == len(text):
        return []
    try:
        value, end = _DECODER.raw_decode(text, begin)
        value = _literal(value)
        _check_surrogates(text, value)
    except json.JSONDecodeError as error:
        line = text.count("\n", 0, error.pos) + 1
        raise UserError(f"{path}: line {line}: not JSON ({error.msg}); check brackets and quotes") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: {reason}") from None
    if text[end:].strip(_WHITE):
        return None
    return _listed(path, value)


def _listed(path: Path, value: Any) -> list[dict]:
    """Rows of a list of objects, of {"data": [...]}, of an object of equally long columns, or of one object."""
    if isinstance(value, dict):
        inside = value.get("data")
        if isinstance(inside, list) and inside and all(isinstance(row, dict) for row in inside):
            return inside
        columns = list(value.values())
        if columns and all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
            return [dict(zip(value, cells)) for cells in zip(*columns)]
        return [value]
    bad = [i for i, row in enumerate(value if isinstance(value, list) else []) if not isinstance(row, dict)]
    if bad or not isinstance(value, list):
        where = f"row {bad[0] + 1} is no object" if bad else "it is no list"
        raise UserError(
            f'{path}: {where}; a .json file is a list of rows, [{{"prompt": ..., "answer": ...}}, ...]'
        )
    return value


def _rows(rows: list[dict], lines: list[int]) -> Table:
    return Table(list(dict.fromkeys(key for row in rows for key in row)), rows, lines)


# ---- CSV -------------------------------------------------------------------------------------------------------


def _separated(path: Path, separator: str, limit: int | None) -> Table:
    """Every cell as it stands; a column without a name (a data frame's index) is left out."""
    _check_wide(path)
    earlier = csv.field_size_limit(_LONGEST_CELL)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return _records(path, csv.reader(file, delimiter=separator, strict=True), separator, limit)
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    finally:
        csv.field_size_limit(earlier)


def _records(path: Path, reader: Any, separator: str, limit: int | None) -> Table:
    columns: list[str] = []
    rows: list[dict] = []
    lines: list[int] = []
    problems, begin = Problems(path), 0
    try:
        for cells in reader:
            begin, first = reader.line_num, begin + 1
            if not cells:
                continue
            if not columns:
                columns = _header(path, cells, separator)
                continue
            if len(cells) != len(columns):
                problems.add(
                    f"{path}: row {len(rows) + 1} (line {first}) has {len(cells)} cells and the header "
                    f"{len(columns)}; put quotes around a cell with a separator in it"
                )
            row = dict(zip(columns, cells))
            row.pop("", None)
            rows.append(row)
            lines.append(first)
            if len(rows) == limit:
                break
    except csv.Error as error:
        where = f"{path}: the row that begins in line {begin + 1} is no row ({error})"
        problems.add(f'{where}; close its quotes, and write a quote inside a quoted cell twice ("")')
    problems.refuse()
    return Table([name for name in columns if name], rows, lines)


def _header(path: Path, cells: list[str], separator: str) -> list[str]:
    named = [name for name in cells if name]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise UserError(f"{path} has two columns '{twice[0]}'; give every column its own name")
    other = next((s for s in (";", "\t", ",") if s in cells[0]), None) if len(cells) == 1 else None
    if other:
        form, mark = (".tsv", "tabs") if separator == "\t" else (".csv", "commas")
        fix = "name it .tsv" if other == "\t" else "name it .csv" if other == "," else f"save it with {mark}"
        raise UserError(f"{path}: a {form} file is separated by {mark}, and its header by {other!r}; {fix}")
    return cells


# ---- Parquet and the hub: typed by whoever wrote them ------------------------------------------------------------


def _parquet(path: Path, limit: int | None) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None

    def batches() -> Iterator["pa.RecordBatch"]:
        try:
            yield from file.iter_batches(batch_size=_BATCH)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from None

    return arrow_rows(str(path), schema, batches(), limit)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(f"{path} cannot be read as Parquet ({reason}); write it again")


def arrow_rows(
    name: str, schema: "pa.Schema", batches: Iterable["pa.RecordBatch | pa.Table"], limit: int | None
) -> Table:
    """Arrow batches of one schema as rows of text. Raises UserError for two columns of one name, and while reading."""
    import pyarrow as pa

    twice = sorted({column for column in schema.names if schema.names.count(column) > 1})
    if twice:
        raise UserError(f"{name} has two columns '{twice[0]}'; give every column its own name")
    converters = {f.name: c for f in schema if (c := _converter(f.type)) is not None}

    def rows() -> Iterator[dict[str, Any]]:
        left = limit
        for batch in batches:
            try:
                found = (batch if left is None else batch.slice(0, left)).to_pylist()
            # Text that is not UTF-8, a year 10000.
            except (ValueError, OverflowError, pa.ArrowException) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"{name} has a value without a form here ({reason}); write it as text"
                ) from None
            for row in found:
                for column, convert in converters.items():
                    if row[column] is not None:
                        row[column] = convert(row[column])
            yield from found
            left = None if left is None else left - len(found)
            if left == 0:
                return

    return Table(list(schema.names), rows())


def _converter(kind: "pa.DataType") -> Callable[[Any], Any] | None:
    """What makes text of the values of an Arrow type; None where they are text."""
    import numpy as np
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_null(kind)
    ):
        return None
    if types.is_float16(kind) or types.is_float32(kind):
        narrow = np.float16 if types.is_float16(kind) else np.float32
        return lambda value: Unquoted(_float_text(narrow(value)))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        one = _converter(kind.value_type)
        return one and (lambda values: [None if v is None else one(v) for v in values])
    if types.is_struct(kind):
        inside = {f.name: c for f in kind if (c := _converter(f.type)) is not None}
        if not inside:
            return None
        return lambda value: value | {k: c(value[k]) for k, c in inside.items() if value[k] is not None}
    return typed_text


def typed_text(value: Any) -> Any:
    """How a typed value is written: the rule for Parquet files and hub datasets.

    Whole numbers in digits; other numbers in the fewest digits that read back as the same, without `.0` (a column of
    whole numbers with gaps is often stored as 42.0); decimals with all their places; true and false; dates as
    2024-01-05, times as 2024-01-05 14:30:00; bytes as the UTF-8 they are. Anything else stays what it is.
    """
    if isinstance(value, bool):
        return Unquoted("true" if value else "false")
    if isinstance(value, float):
        return Unquoted(_float_text(value))
    if isinstance(value, Decimal):
        return Unquoted(format(value, "f"))
    if isinstance(value, int | date | datetime | time | timedelta | UUID):
        return Unquoted(str(value))
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def _float_text(value: Any) -> str:
    return str(value).removesuffix(".0")
