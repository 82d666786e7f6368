"""All that an evaluation says about a mixture of experts: its routing, and how far it is another's.

All of it comes from one teacher-forced pass over the answers.

    routing_section(model, tokenizer, rows, problems, section, routes=folder / "teacher.parquet")   # models.<name>.moe

What a model routes here is what it routed while it answered: the prompt and its own completion, every fed token
once (`route_rows`). That pass, and not a recording made during decoding, is where `moe` in metrics.json
comes from: it knows which token is whose, and decoding is timed without hooks.

    layers.<name>     tokens, experts, load, max_violation (global and per batch, with noise floors), entropies,
                      dead_experts, token_drop, coactivation, score_function, router_entropy, confidence
                      (definitions and sources: distill.moe.metrics, distill.moe.totals)
    layers.<name>.specialisation.family | level | token_class
                      groups, tokens, answers, baseline k/E, share [G, E], strongest (distill.moe.totals)
    layers.<name>.specialisation.token     [{expert, token, id, share, n, z}], ids seen 10 times or more
    model             aggregates over layers (distill.moe.metrics.whole_model)
    answers, answers_total, tokens         how many of the finished answers were routed
    saturation.<other>                     where a second checkpoint has the same experts (below)
    error                                  what could not be measured, absent if nothing

A layer whose score function cannot be told (one expert per token with weight 1) has null for `score_function`,
`router_entropy` and `confidence`, and `undecided` says why; its load holds.

`route_rows` is the teacher-forced pass over finished answers; it gives every token with its row and place:

    for batch in route_rows(model, [(prompt_ids, completion_ids), ...], pad_id):
        batch.answer, batch.position, batch.token_ids          # [N] each
        batch.layers["model.layers.1.mlp"].indices             # [N, k], heaviest weight first
    batch.recording.summary()                                  # the totals of all batches

Processes of a launch read a share of the batches each; sums are added over them before anything is divided.

Why after decoding and not meanwhile: decoding mixes rows of all ages and drops finished ones, so its recording
knows sums only. One forward pass over prompt and completion routes each token as decoding did (tested), costs a
prefill instead of a generation, and tells which token it was. The one thing it cannot give is the load of single
decoding steps: its batches are whole answers.

The last token of a completion is never an input, so no router sees it: N = sum(prompt + completion - 1).

Shapes: N tokens of one batch, k experts per token.

How far the routing of one checkpoint is that of another: router saturation, on the same tokens.

    saturation_between(base, student, pairs, pad_id)       # {"overlap": 0.97, "top1": 0.96, "layers": {...}}

OLMoE (arXiv 2409.02060, section 5.1) compares checkpoints of one run with the last one: mean over tokens of
|S_a & S_b| / k, the share of a token's experts that both chose, and the same for the heaviest expert alone. Two
unrelated routers agree on k / E of the experts. It means something where expert i of one checkpoint *is* expert i
of the other, grown from the same weights; the shapes of two models cannot tell that, the caller must know.

`distill evaluate A B` does it by itself for all checkpoints with the same experts, on the answers of the last one.

Shapes: T tokens, E experts, k experts per token.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill.config.evaluation import SEEN, Evaluate
from distill.console import first_process
from distill.devices import from_all, share_of, summed
from distill.errors import RunError, UserError
from distill.evaluation.answers import problem_prompts
from distill.evaluation.routes import spread, token_pieces, write_routes
from distill.models.routers import Router, bare_model, find_routers
from distill.moe.metrics import overlap, whole_model
from distill.moe.recording import Decisions, Recording, record_routing
from distill.moe.totals import GroupShares

CLASSES = ("prompt", "thinking", "answer")
BATCH_TOKENS = 16_384  # tokens of one pass with padding, at most; a longer row goes alone


@dataclass(frozen=True)
class RoutedBatch:
    """`answer` [N]: place of each token's row in `rows`; `position` [N] in that row; `token_ids` [N].

    `layers[name]`: weights and indices [N, k], heaviest weight first. `recording`: totals so far.
    """

    answer: torch.Tensor
    position: torch.Tensor
    token_ids: torch.Tensor
    layers: dict[str, Decisions]
    recording: Recording


def route_rows(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    pad_id: int,
    batch_size: int = 64,
    share: bool = False,
) -> Iterator[RoutedBatch]:
    """Every decision on every fed token of `rows`, a batch at a time; each row is in exactly one batch.

    Rows come in a fixed random order, so that a batch is a mix of all that was asked, as a training batch is:
    sorted ones would make MaxVio_batch a measure of the sorting. With `share`, the batches that fall to this process
    of a launch (all of them, where there are fewer than processes; `spread_over` tells). Raises UserError for a dense
    model or a row with an empty prompt or completion.
    """
    if not rows or any(not prompt or not completion for prompt, completion in rows):
        raise UserError("routing is read from rows with a prompt and a completion; leave failed answers out")
    fed = [[*prompt, *completion][:-1] for prompt, completion in rows]
    base = bare_model(model)
    only_last = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    )
    device = next(model.parameters()).device
    with record_routing(model) as recording:
        pieces = list(_batches(np.array([len(ids) for ids in fed]), batch_size))
        for chosen in share_of(pieces) if share else pieces:
            ids, mask = _padded([fed[i] for i in chosen], pad_id)
            with torch.inference_mode():
                model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **only_last)
            row, position = mask.nonzero(as_tuple=True)
            layers = {name: _heaviest_first(record.take()) for name, record in recording.layers.items()}
            for name, decisions in layers.items():
                if len(decisions.indices) != len(row):
                    raise RunError(
                        f"{name} routed {len(decisions.indices)} of {len(row)} tokens: a layer that sees only "
                        "some tokens cannot be aligned with the text"
                    )
            answer = torch.from_numpy(chosen)[row]
            yield RoutedBatch(answer, position, ids[row, position], layers, recording)


def spread_over(rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int) -> bool:
    """Whether `route_rows` with `share` reads a part of these rows in every process."""
    pieces = list(_batches(np.array([len(p) + len(c) - 1 for p, c in rows]), batch_size))
    return len(share_of(pieces)) < len(pieces)


def _batches(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers in a fixed random order, at most `batch_size` at a time and BATCH_TOKENS with padding."""
    group, width = [], 0
    for i in np.random.default_rng(0).permutation(len(lengths)):
        wider = max(width, int(lengths[i]))
        if group and (len(group) == batch_size or wider * (len(group) + 1) > BATCH_TOKENS):
            yield np.array(group)
            group, wider = [], int(lengths[i])
        group.append(i)
        width = wider
    if group:
        yield np.array(group)


def _padded(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, T], right-padded, so that positions count from 0 in every family."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def _heaviest_first(decisions: Decisions) -> Decisions:
    weights, order = decisions.weights.sort(dim=-1, descending=True, stable=True)
    return Decisions(weights, decisions.indices.gather(-1, order))


def token_classes(prompt: int, completion: int, thinking: int) -> np.ndarray:
    """Place in CLASSES of each routed token, [prompt + completion - 1], of a row with so many tokens.

    thinking: completion tokens up to and with the last </think> (`distill.evaluation.answers.thinking_tokens`),
    which is what the verifier does not read as the answer; all of them if thinking never closed, none without the
    tag.
    """
    place = np.arange(prompt + completion - 1)
    return np.where(place < prompt, 0, np.where(place < prompt + thinking, 1, 2))


TOKEN_IDS = 1000  # ids followed, the most frequent ones


def routing_section(
    model,
    tokenizer,
    rows: list[dict],
    problems: list[dict],
    section: Evaluate,
    routes: Path | None = None,
) -> dict[str, Any]:
    """models.<name>.moe of one evaluated checkpoint. `rows` of ANSWER_SCHEMA, of any of the `problems`.

    routes: also write there the decisions on `section.routes` answers (`distill.evaluation.routes`).
    Where no answer can be routed (all failed) `layers` is empty and `error` says so. UserError for a dense model.
    """
    report, chosen, routers = _report(
        model,
        tokenizer,
        rows,
        problems,
        section.routing_rows,
        min(64, section.batch_size),
        section.routes,
    )
    if routes is not None and chosen and first_process():
        kept = list(chosen.values())
        write_routes(
            routes.parent,
            routes.stem,
            tokenizer,
            [k[0] for k in kept],
            [k[1] for k in kept],
            routers,
        )
    return report


def routing_report(
    model, tokenizer, answers_rows: list[dict], problems: list[dict], limit: int
) -> dict[str, Any]:
    """The same without a recipe section or a file: at most `limit` of the answers, evenly taken."""
    return _report(model, tokenizer, answers_rows, problems, limit, 64, 0)[0]


def finished(rows: list[dict], limit: int) -> list[dict]:
    """At most `limit` answers that have tokens, evenly taken over all of them; cut-off ones belong to them."""
    usable = [row for row in rows if row["completion_ids"] and not row["error"]]
    places = np.unique(np.linspace(0, len(usable) - 1, min(limit, len(usable))).round().astype(int))
    return [usable[place] for place in places]


def token_pairs(tokenizer, rows: list[dict], problems: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(prompt_ids, completion_ids) of each answer, as it was asked."""
    asked = problem_prompts(tokenizer, problems)
    prompts = {problem["prompt_id"]: ids for problem, ids in zip(problems, asked)}
    return [(prompts[row["prompt_id"]], list(row["completion_ids"])) for row in rows]


def _report(
    model, tokenizer, rows, problems, limit: int, batch_size: int, routes: int
) -> tuple[dict, dict, list[Router]]:
    """(the report, {place of a row: (row for write_routes, its decisions)} of `routes` answers, the routers)."""
    answers = finished(rows, limit)
    if not answers:
        return (
            {
                "layers": {},
                "answers": 0,
                "answers_total": len(rows),
                "error": "no answer could be routed",
            },
            {},
            [],
        )
    pairs = token_pairs(tokenizer, answers, problems)
    labels = _Labels(tokenizer, answers, pairs)
    tables: dict[str, dict[str, GroupShares]] = {}
    chosen: dict[int, tuple] = dict.fromkeys(spread(answers, routes))
    for batch in route_rows(model, pairs, tokenizer.pad_token_id, batch_size, share=True):
        of_tokens = labels.of(batch)
        for name, decisions in batch.layers.items():
            router = batch.recording.layers[name].router
            tables[name] = tables.get(name) or {
                kind: GroupShares(router.num_experts, router.top_k, groups)
                for kind, groups in labels.groups.items()
            }
            for kind, table in tables[name].items():
                table.add(decisions.indices, of_tokens[kind], batch.answer)
        for place in chosen.keys() & set(batch.answer.tolist()):
            chosen[place] = labels.route_row(place), _of_row(batch, place)
    if spread_over(pairs, batch_size):
        batch.recording.reduce(summed)
        for table in (table for kinds in tables.values() for table in kinds.values()):
            table.reduce(summed)
        for found in from_all({place: row for place, row in chosen.items() if row}):
            chosen |= found
    layers = _layers(batch.recording, tables, labels)
    report = {
        "answers": len(answers),
        "answers_total": len(rows),
        "tokens": sum(len(p) + len(c) - 1 for p, c in pairs),
        "model": whole_model(layers),
        "layers": layers,
    }
    if undecided := [layer["undecided"] for layer in layers.values() if "undecided" in layer]:
        report["error"] = f"{len(undecided)} of {len(layers)} layers lack router entropy: {undecided[0]}"
    return report, chosen, [record.router for record in batch.recording.layers.values()]


def _layers(
    recording: Recording, tables: dict[str, dict[str, GroupShares]], labels: "_Labels"
) -> dict[str, dict]:
    layers = {}
    for name, record in recording.layers.items():
        try:
            layers[name] = record.summary()
        except RunError as error:  # of scores: the load holds, and says nothing false
            unknown = dict.fromkeys(("score_function", "router_entropy", "confidence"))
            layers[name] = {**record.load_summary(), **unknown, "undecided": str(error)}
        overall = record.counts.double() / record.tokens
        found = layers[name]["specialisation"] = {}
        for kind, table in tables[name].items():
            comparisons = len(table.groups) * table.experts * len(tables)
            if kind != "token":
                found[kind] = table.summary(overall, comparisons)
                continue
            found[kind] = [
                {"expert": e["expert"], "token": labels.text[e["group"]], "id": e["group"]}
                | {key: e[key] for key in ("share", "n", "z")}
                for e in table.preferred(overall, comparisons)
            ]
    return layers


class _Labels:
    """What each routed token belongs to. `groups[kind]`: names of family, level, token_class; ids of `token`."""

    def __init__(self, tokenizer, answers: list[dict], pairs: list[tuple[list[int], list[int]]]):
        self.answers, self.pairs = answers, pairs
        self.classes = []
        for row, (prompt, completion) in zip(answers, pairs):
            self.classes.append(token_classes(len(prompt), len(completion), row["thinking_tokens"]))
        seen = Counter(i for prompt, completion in pairs for i in [*prompt, *completion[:-1]])
        ids = sorted(i for i, n in seen.most_common(TOKEN_IDS) if n >= SEEN)
        self.text = {i: token_pieces(tokenizer, [i])[0] for i in ids}
        self.groups = {
            key: list(dict.fromkeys(str(row[key]) for row in answers)) for key in ("family", "level")
        }
        self.groups |= {"token_class": list(CLASSES), "token": ids}
        self._ids = torch.tensor(ids, dtype=torch.int64)

    def of(self, batch: RoutedBatch) -> dict[str, torch.Tensor]:
        """Per kind the place of each token's group, [N]; -1 for an id that is not followed."""
        found = {}
        for key in ("family", "level"):
            places = {group: place for place, group in enumerate(self.groups[key])}
            found[key] = torch.tensor([places[str(row[key])] for row in self.answers])[batch.answer]
        pairs = zip(batch.answer.tolist(), batch.position.tolist())
        found["token_class"] = torch.tensor([int(self.classes[row][place]) for row, place in pairs])
        place = torch.searchsorted(self._ids, batch.token_ids)
        padded = torch.cat([self._ids, torch.tensor([-1])])  # an id above all followed ones lands there
        found["token"] = torch.where(padded[place] == batch.token_ids, place, -1)
        return found

    def route_row(self, place: int) -> dict[str, Any]:
        """A row for `write_routes`, without its decisions."""
        row, (prompt, completion) = self.answers[place], self.pairs[place]
        return {
            **{key: row[key] for key in ("prompt_id", "family", "level", "verdict")},
            "token_ids": [*prompt, *completion[:-1]],
            "classes": [CLASSES[c] for c in self.classes[place]],
        }


def _of_row(batch: RoutedBatch, place: int) -> dict[str, Decisions]:
    mine = batch.answer == place
    return {name: Decisions(d.weights[mine], d.indices[mine]) for name, d in batch.layers.items()}


# ==== How far the routing of one checkpoint is that of another ====

_SHAPE = ("architecture", "layers", "hidden_size", "vocab_size", "experts", "experts_per_token")


def saturation(a: dict[str, Decisions], b: dict[str, Decisions]) -> dict[str, dict[str, float]]:
    """Per layer `overlap`, mean |S_a & S_b| / k, and `top1`, share of tokens with the same heaviest expert.

    a, b: decisions [T, k] on the same T tokens, heaviest weight first (`distill.evaluation.routing`). ValueError if the
    layers, the tokens or k differ.
    """
    if a.keys() != b.keys():
        raise ValueError(f"different routed layers: {', '.join(sorted(a.keys() ^ b.keys()))}")
    return {
        name: {
            "overlap": float(overlap(a[name].indices, b[name].indices).mean()),
            "top1": float((a[name].indices[:, 0] == b[name].indices[:, 0]).double().mean()),
        }
        for name in a
    }


def saturation_between(
    model_a, model_b, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, batch_size: int = 64
) -> dict[str, Any]:
    """`saturation` of two models over `rows` of (prompt_ids, completion_ids), in bounded memory.

    `overlap` and `top1` are plain means over layers (all see the same tokens), `uniform` is k / E. Raises
    UserError if the two do not have the same routed layers.
    """
    shapes = [[(r.name, r.num_experts, r.top_k) for r in find_routers(model)] for model in (model_a, model_b)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "saturation compares checkpoints of one model; these two have other layers or experts"
        )
    sums: dict[str, dict[str, float]] = {}
    tokens = 0
    both = (route_rows(model, rows, pad_id, batch_size) for model in (model_a, model_b))
    for a, b in zip(*both, strict=True):
        tokens += len(a.answer)
        for name, found in saturation(a.layers, b.layers).items():
            total = sums.setdefault(name, {"overlap": 0.0, "top1": 0.0})
            for key, value in found.items():
                total[key] += value * len(a.answer)
    layers = {name: {key: value / tokens for key, value in found.items()} for name, found in sums.items()}
    means = {key: sum(found[key] for found in layers.values()) / len(layers) for key in ("overlap", "top1")}
    uniform = sum(k / experts for _, experts, k in shapes[0]) / len(shapes[0])
    return {"tokens": tokens, **means, "uniform": uniform, "layers": layers}


def comparable(results: dict[str, dict], teacher: str | None = None) -> list[tuple[str, list[str]]]:
    """[(last, [others])] among evaluated checkpoints: groups with the same experts, by models.<name>.model.

    `results[name]["model"]` is what `describe_model` gives. A teacher is nobody's checkpoint and left out.
    """
    groups: dict[tuple, list[str]] = {}
    for name, result in results.items():
        if name != teacher and result["model"]["experts"]:
            groups.setdefault(tuple(result["model"][key] for key in _SHAPE), []).append(name)
    return [(names[-1], names[:-1]) for names in groups.values() if len(names) > 1]


def add_saturation(
    results: dict[str, dict],
    rows_of: dict[str, list[dict]],
    problems: list[dict],
    load: Callable[[str], tuple[Any, Any]],
    teacher: str | None = None,
    limit: int = 1000,
) -> None:
    """Put `moe.saturation.<last>` into the results of every checkpoint with the same experts as a later one.

    load: name -> (model, tokenizer). On at most `limit` answers of the last, which both read; those with another
    vocabulary are left out.
    """
    for last, others in comparable(results, teacher):
        answers = finished(rows_of[last], limit)
        if not answers:
            continue
        model, tokenizer = load(last)
        pairs = token_pairs(tokenizer, answers, problems)
        for name in others:
            other, other_tokenizer = load(name)
            if other_tokenizer.get_vocab() == tokenizer.get_vocab():
                found = saturation_between(other, model, pairs, tokenizer.pad_token_id)
                results[name].setdefault("moe", {"layers": {}}).setdefault("saturation", {})[last] = found
