"""Routing decisions on disk, token by token, for a subset of answers: what a page needs to show who did what.

    write_routes(run_dir / "eval" / "routes", "teacher", tokenizer, rows, decisions, find_routers(model))
    routes = read_routes(run_dir / "eval" / "routes" / "teacher.parquet")
    routes.layers                       # ["model.layers.1.mlp", ...], in model order
    routes.rows[0].experts[0, 5]        # experts of token 5 in the first routed layer, heaviest weight first

One Parquet file per MoE model, `eval/routes/<name>.parquet`, one row per answer:

| column | type | what |
|---|---|---|
| prompt_id, family, level | string | the problem |
| verdict | string | correct, wrong, no_answer, truncated, error (distill/tasks/verify.py) |
| tokens | list<string> | the text of each routed token, [T]; joined they are the prompt and answer (see below) |
| token_ids | list<int32> | their ids, [T] |
| classes | list<string> | of each: prompt, thinking or answer (distill/evaluation/routing.py), [T] |
| experts | binary | C-order uint8 (uint16 with more than 255 experts) [L, T, k], heaviest weight first |
| weights | binary | C-order little-endian float16 [L, T, k]: what the expert outputs are multiplied with |

T is prompt + completion - 1: the last token of a completion is never fed back, so no router sees it. A character
whose bytes are split over several tokens appears in the last of them; the others are empty strings.
File metadata (Parquet key-value): `layers` (JSON list of L names), `num_experts` (JSON list of L ints),
`experts_per_token` (JSON list of L ints, k is the largest), `null_experts` (JSON list of L ints: that many of
the last experts compute nothing), `experts_dtype` ("uint8" or "uint16"), `schema_version` ("1"). A layer with
fewer than k experts per token is padded with the dtype's largest value and weight 0.

Shapes: L routed layers, T tokens of one answer, k experts per token.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.errors import RunError, UserError
from distill.files import replacing

if TYPE_CHECKING:  # pages read routes, and torch takes seconds to import
    from distill.models.routers import Router
    from distill.moe.recording import Decisions

ROUTES_VERSION = "1"
ROUTES_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("family", pa.string()),
        ("level", pa.string()),
        ("verdict", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("token_ids", pa.list_(pa.int32())),
        ("classes", pa.list_(pa.string())),
        ("experts", pa.binary()),
        ("weights", pa.binary()),
    ]
)


@dataclass(frozen=True)
class RouteRow:
    """One answer. `experts` [L, T, k] (uint8 or uint16) and `weights` [L, T, k] float16, heaviest first."""

    prompt_id: str
    family: str
    level: str
    verdict: str
    tokens: list[str]
    token_ids: list[int]
    classes: list[str]
    experts: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Routes:
    """One file: per layer its name, experts, experts per token and experts that compute nothing; the answers."""

    layers: list[str]
    num_experts: list[int]
    experts_per_token: list[int]
    null_experts: list[int]
    rows: list[RouteRow]


def write_routes(
    folder: Path,
    name: str,
    tokenizer,
    rows: list[dict[str, Any]],
    decisions: "list[dict[str, Decisions]]",
    routers: "list[Router]",
) -> Path:
    """Write `<folder>/<name>.parquet` (schema above), whole or not at all; returns its path.

    rows: dicts with prompt_id, family, level, verdict, token_ids [T] and classes [T]; decisions[r][layer]: weights
    and indices [T, k] of row r, heaviest weight first; routers: those of the model, which name the layers.
    Raises RunError where the disk is full, or a row's decisions are not one per token.
    """
    k, widest = max(r.top_k for r in routers), max(r.num_experts for r in routers)
    dtype = np.dtype("uint8") if widest <= 255 else np.dtype("<u2")
    table = []
    for row, found in zip(rows, decisions, strict=True):
        shape = (len(routers), len(row["token_ids"]), k)
        experts, weights = np.full(shape, np.iinfo(dtype).max, dtype), np.zeros(shape, "<f2")
        for layer, router in enumerate(routers):
            if found[router.name].indices.shape != (shape[1], router.top_k):
                raise RunError(
                    f"{router.name}: {len(found[router.name].indices)} decisions for the {shape[1]} tokens of "
                    f"{row['prompt_id']}"
                )
            experts[layer, :, : router.top_k] = found[router.name].indices.numpy()
            weights[layer, :, : router.top_k] = found[router.name].weights.numpy()
        pieces = token_pieces(tokenizer, row["token_ids"])
        table.append({**row, "tokens": pieces, "experts": experts.tobytes(), "weights": weights.tobytes()})
    facts = {
        "layers": [router.name for router in routers],
        "num_experts": [router.num_experts for router in routers],
        "experts_per_token": [router.top_k for router in routers],
        "null_experts": [router.null_experts for router in routers],
    }
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    metadata |= {
        "experts_dtype": "uint8" if dtype.itemsize == 1 else "uint16",
        "schema_version": ROUTES_VERSION,
    }
    schema = ROUTES_SCHEMA.with_metadata(metadata)
    final = folder / f"{name}.parquet"
    rows = pa.Table.from_pylist(table, schema=schema)
    with replacing(final, rows.nbytes) as temporary:
        pq.write_table(rows, temporary, write_statistics=False)
    return final


def read_routes(path: Path) -> Routes:
    """Raises UserError for a file that is missing, damaged, or not of this schema."""
    try:
        table = pq.read_table(path, partitioning=None)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if metadata.get("schema_version") != ROUTES_VERSION:
            raise ValueError(f"schema_version is {metadata.get('schema_version')}, not {ROUTES_VERSION}")
        layers, num_experts, per_token, null_experts = (
            json.loads(metadata[key])
            for key in ("layers", "num_experts", "experts_per_token", "null_experts")
        )
        kind = {"uint8": "u1", "uint16": "<u2"}[metadata["experts_dtype"]]
        rows = []
        for row in table.to_pylist():
            shape = (len(layers), len(row["token_ids"]), max(per_token))
            row["experts"] = np.frombuffer(row["experts"], kind).reshape(shape)
            row["weights"] = np.frombuffer(row["weights"], "<f2").reshape(shape)
            rows.append(RouteRow(**row))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; `distill evaluate` writes it for every mixture of experts"
        ) from None
    except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged ({reason}); delete it and evaluate again with --redo") from None
    return Routes(layers, num_experts, per_token, null_experts, rows)


def token_pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, [T]; joined they are the decoded text. Special tokens by their names.

    A token that ends inside a character is "" and the one that completes it has the character. Decoded in short
    windows: decoding every prefix would be quadratic, and single tokens lose the spaces of SentencePiece.
    """

    def text(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces, begin, read = [], 0, 0  # ids[begin:read] are context whose text is known, ids[read:] not yet
    for i in range(len(ids)):
        known, longer = text(begin, read), text(begin, i + 1)
        if longer.endswith("\ufffd") and i + 1 < len(ids):
            pieces.append("")
        else:
            pieces.append(longer[len(known) :])
            begin, read = read, i + 1
    return pieces


def spread(rows: list[dict[str, Any]], limit: int) -> list[int]:
    """Places of at most `limit` rows, in turn from every (family, level, right or wrong) there is, in order."""
    cells: dict[tuple, list[int]] = {}
    for place, row in enumerate(rows):
        cells.setdefault((row["family"], row["level"], row["verdict"] == "correct"), []).append(place)
    turns = itertools.zip_longest(*(cells[key] for key in sorted(cells, key=str)))
    return [place for turn in turns for place in turn if place is not None][:limit]
