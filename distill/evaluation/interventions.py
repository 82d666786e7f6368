"""Accuracy under changed routing: fewer experts, without one expert, with random experts, on the same problems.

    entries = intervention_sweep(model, answer, top_k=[1, 2, 4], drop=["1:3"], route=["random"])
    accuracy_against_flops(entries)["hard"]         # the curve that fewer or more experts per token trace

    distill evaluate CKPT --top-k 1,2,4 --drop-expert 1:3,2:0+2:1 --drop-each --route random,uniform,shuffled
    evaluate: {interventions: {top_k: [1, 2, 4], drop: ["1:3", "2:0+2:1"], route: [random], problems: 60}}

A drop is LAYER:EXPERT, several that are dropped together are joined by `+`; LAYER is the decoder layer's number
or the router's name. How each change is made is in `distill.moe.interventions`. Answers are greedy.

One entry: `kind` (none, top_k, drop, route), `value`, `label`, `experts_per_token`, `flops_per_token` (of that k,
by `distill.models.describe`; the routing controls and a dropped expert cost what the model costs),
`decode_tokens_per_second` (of all its answers together, where they were timed), `tasks` (a score per level, as
`distill.evaluation.answers.summarise`) and `comparison` with the unchanged model over all problems: n, difference
(the entry's accuracy minus the unchanged model's), ci95, p_value, p_value_holm (Holm 1979, over the sweep) and a
verdict on the entry that needs the corrected one. The first entry is the unchanged model; its own k has no other.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from distill import console
from distill.config.evaluation import Evaluate, Interventions
from distill.errors import UserError
from distill.evaluation.answers import answer_problems, summarise
from distill.evaluation.stats import holm, paired_comparison
from distill.files import writing
from distill.models.describe import DEFAULT_CONTEXT, describe_model
from distill.models.load import check_adapter_base, load_config, resolve_model
from distill.models.routers import find_routers
from distill.moe.interventions import drop_experts, layer_number, route, use_top_k
from distill.storage import CHECKSUM, fingerprint

AnswerRows = list[dict]
UNCHANGED = "unchanged"
_KEPT = ("prompt_id", "sample_idx", "level", "verdict", "final", "tokens", "thinking_tokens")  # of an answer
SKIPPED = {"kind": "skipped", "value": None, "label": "dense model: it has no experts to change"}


@dataclass(frozen=True)
class _Change:
    kind: str
    value: Any
    label: str
    made: Callable[[nn.Module], AbstractContextManager]


# ------------------------------------------------------------------------------------------- the sweep


def intervention_sweep(
    model: nn.Module,
    answer: Callable[[], AnswerRows],
    *,
    top_k: Sequence[int] = (),
    drop: Sequence[str] = (),
    drop_each: bool = False,
    route: Sequence[str] = (),
    seed: int = 0,
    context: int = DEFAULT_CONTEXT,
    done: Mapping[str, AnswerRows] | None = None,
    on_entry: Callable[[str, AnswerRows], None] | None = None,
) -> list[dict[str, Any]]:
    """Entries as in the module docstring: the unchanged model, then every change, in the order asked for.

    answer: answers the same problems in the same order at every call, one row each with `level`, `verdict` and
        what `summarise` reads; it is called inside each change.
    drop_each: also the accuracy without expert e, for every layer and every expert that computes.
    done, on_entry: to resume. `on_entry(label, rows)` is called as each is answered; rows given back in `done`
        by label are not answered again. A score and its Holm correction are made of all of them at the end.
    Raises UserError before the first answer if any of the changes is not possible on this model.
    """
    changes = _planned(model, top_k, drop, drop_each, route, seed)
    answered: dict[str, AnswerRows] = dict(done or {})
    todo = [(UNCHANGED, None), *((change.label, change.made) for change in changes)]
    with console.bar(
        total=len(todo), desc="interventions", unit="setting", main=console.first_process()
    ) as bar:
        for label, made in todo:
            if label not in answered:
                if made is None:
                    answered[label] = answer()
                else:
                    with made(model):
                        answered[label] = answer()
                if on_entry is not None:
                    on_entry(label, answered[label])
            bar.update()
    return _entries(model, changes, answered, context)


def _planned(model, top_k, drop, drop_each, routes, seed) -> list[_Change]:
    """What is to be done, each tried (without a forward pass) so that a mistake is told before hours of work."""
    routers = find_routers(model)
    own = {router.top_k for router in routers}
    drops = list(drop)
    if drop_each:
        drops += [f"{_layer(r, routers)}:{e}" for r in routers for e in range(r.num_experts - r.null_experts)]
    problems, changes = [], []
    for k in [k for k in dict.fromkeys(top_k) if own != {k}]:
        changes.append(_Change("top_k", k, f"top-k {k}", lambda m, k=k: use_top_k(m, k)))
    for text in dict.fromkeys(drops):
        changes.append(
            _Change("drop", text, f"without {text}", lambda m, t=text: drop_experts(m, parse_drop(t)))
        )
    for how in dict.fromkeys(routes):
        changes.append(_Change("route", how, f"{how} routing", lambda m, h=how: route(m, h, seed)))
    for change in changes:
        try:
            with change.made(model):
                pass
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return changes


def _layer(router, routers) -> str:
    """The layer's number where that names one router, else the router's name."""
    number = layer_number(router.name)
    return str(number) if [layer_number(r.name) for r in routers].count(number) == 1 else router.name


def parse_drop(text: str) -> dict[str, list[int]]:
    """{layer: [experts]} of "1:3" or "1:3+2:0". Raises UserError."""
    found: dict[str, list[int]] = {}
    for part in text.split("+"):
        layer, colon, expert = part.strip().rpartition(":")
        if not (colon and layer and expert.isdecimal()):
            raise UserError(f"drop '{text}': give LAYER:EXPERT, as 1:3, or several at once, as 1:3+2:0")
        found.setdefault(layer, []).append(int(expert))
    return found


def _entries(model, changes: list[_Change], answered: Mapping[str, AnswerRows], context: int) -> list[dict]:
    routers, base = find_routers(model), answered[UNCHANGED]
    own = max(router.top_k for router in routers)
    flops = {
        k: describe_model(model, context, experts_per_token=k)["flops_per_token"]
        for k in {None, *(change.value for change in changes if change.kind == "top_k")}
    }
    entries = []
    for change in [None, *changes]:
        rows = answered[change.label if change else UNCHANGED]
        k = change.value if change and change.kind == "top_k" else None
        entries.append(
            {
                "kind": change.kind if change else "none",
                "value": change.value if change else None,
                "label": change.label if change else UNCHANGED,
                "experts_per_token": k or own,
                "flops_per_token": int(flops[k]),
                "decode_tokens_per_second": _speed(rows),
                "tasks": {
                    level: summarise([r for r in rows if r["level"] == level])
                    for level in dict.fromkeys(r["level"] for r in base)
                },
                "comparison": _compared(rows, base) if change else None,
            }
        )
    compared = [entry["comparison"] for entry in entries if entry["comparison"]]
    for item, corrected in zip(compared, holm([item["p_value"] for item in compared])):
        item["p_value_holm"] = corrected
        if corrected is None or corrected >= 0.05:
            item["verdict"] = "INCONCLUSIVE"
    return entries


def _speed(rows: AnswerRows) -> float | None:
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    return round(sum(row["tokens"] for row in rows) / seconds, 1) if seconds else None


def _compared(rows: AnswerRows, base: AnswerRows) -> dict[str, Any]:
    right = [[row["verdict"] == "correct" for row in given] for given in (rows, base)]
    return paired_comparison(*right)


def accuracy_against_flops(entries: list[dict]) -> dict[str, list[dict]]:
    """{level: [{experts_per_token, flops_per_token, accuracy, ci95}, ...]} by rising cost: the unchanged model
    and every other k."""
    points = sorted(
        (e for e in entries if e["kind"] in ("none", "top_k")), key=lambda e: e["flops_per_token"]
    )
    return {
        level: [
            {key: e[key] for key in ("experts_per_token", "flops_per_token")}
            | {key: e["tasks"][level][key] for key in ("accuracy", "ci95")}
            for e in points
        ]
        for level in (points[0]["tasks"] if points else {})
    }


# ------------------------------------------------------------------------------------------- in an evaluation


def interventions_for(
    model, tokenizer, problems: list[dict], section: Evaluate, kept: Path | None = None
) -> list[dict[str, Any]]:
    """The sweep that `section.interventions` asks for, on its first `problems` of each level.

    kept: a JSON-lines file of what is answered; one that is there is continued. [] if nothing was asked for, one
    entry of kind `skipped` for a dense model. Raises UserError as `intervention_sweep` does.
    """
    asked = section.interventions
    if not asked.any:
        return []
    if not find_routers(model):
        return [dict(SKIPPED)]
    first: dict[str, list[dict]] = {}
    for problem in problems:
        first.setdefault(problem["level"], []).append(problem)
    chosen = [problem for level in first.values() for problem in level[: asked.problems]]
    greedy = section.model_copy(update={"samples": 1, "temperature": 0.0})

    def answer() -> AnswerRows:
        rows, measured = answer_problems(model, tokenizer, chosen, "", greedy, bar=False)
        share = measured["seconds"] / len(rows)
        return [{**{key: row[key] for key in _KEPT}, "seconds": share} for row in rows]

    return intervention_sweep(
        model,
        answer,
        top_k=asked.top_k,
        drop=asked.drop,
        drop_each=asked.drop_each,
        route=asked.route,
        seed=asked.seed,
        context=section.max_new_tokens,
        done=_read_kept(kept) if kept else None,
        on_entry=(lambda label, rows: _keep(kept, label, rows)) if kept and console.first_process() else None,
    )


def _keep(path: Path, label: str, rows: AnswerRows) -> None:
    """A line more, with a checksum of its own, after one that a kill cut short too."""
    entry = json.loads(json.dumps({"label": label, "rows": rows}))
    data = "\n" + json.dumps({**entry, CHECKSUM: fingerprint(entry)}) + "\n"
    with writing(path.parent, len(data)), path.open("a", encoding="utf-8") as file:
        file.write(data)


def _read_kept(path: Path) -> dict[str, AnswerRows]:
    """What an earlier run answered; a line that a kill cut short, or that is not as it was, is answered again."""
    found: dict[str, AnswerRows] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.pop(CHECKSUM, None) == fingerprint(entry):
            found[entry["label"]] = entry["rows"]
    return found


# ------------------------------------------------------------------------------------------- what is asked for


def check_interventions(paths: Sequence[str], asked: Interventions) -> None:
    """Whether what is asked for can be done, from the configs alone: no weight is read.

    Raises UserError if all models are dense, or a mixture of experts cannot do one of the changes. Dense models
    beside others are left to `interventions_for`, which says that they were skipped.
    """
    if not asked.any:
        return
    problems, routed = [], 0
    for path in paths:
        skeleton = _skeleton(path)
        if find_routers(skeleton):
            routed += 1
            try:
                _planned(skeleton, asked.top_k, asked.drop, asked.drop_each, asked.route, asked.seed)
            except UserError as error:
                problems += [f"{path}: {line}" for line in error.problems]
    if not routed:
        problems.append(
            f"interventions change the routing, and {', '.join(map(str, paths))} "
            f"{'is a dense model' if len(paths) == 1 else 'are dense models'}; "
            "leave --top-k, --drop-expert, --drop-each and --route out, or name a mixture of experts"
        )
    if problems:
        raise UserError(*problems)


def _skeleton(path: str) -> nn.Module:
    """The model (an adapter's base) on the meta device, in eval mode."""
    folder = Path(resolve_model(path))
    adapter = (folder / "adapter_config.json").is_file()
    config = load_config(check_adapter_base(folder) if adapter else path)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
