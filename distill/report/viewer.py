"""What the answer viewer of the dossier shows: which experts each token of a few answers went to.

    view = viewer_data(routes, answers, budget=900_000)      # {model: Routes}, {(model, prompt_id): row}
    view["data"]        # goes into the page as JSON; templates/viewer.js shows it
    view["first"]       # the first answer in its first layer, for readers without JavaScript

Experts and weights travel as base64 of whole bytes: experts as they are, weights times `scale`, rounded (two
decimals wherever they are below 2.56). A budget in bytes bounds the page: answers are taken from all models in
turn until it is spent, and a long answer keeps its first tokens; the page says how many are left out.

Shapes: L routed layers, T tokens of one answer, k experts per token.
"""

import base64
import itertools
import json
from typing import Any

import numpy as np

from distill.report.drawing import layer_labels
from distill.report.numbers import LONGEST_TEXT, clip
from distill.report.pages import visible
from distill.report.words import called, say

ANSWER_SHARE = 4  # one answer may take this part of the budget
QUESTION = 80  # letters by which an answer is found in the list


def viewer_data(routes: dict[str, Any], answers: dict[tuple, dict], budget: int) -> dict[str, Any] | None:
    """None without routes. `routes[model]` as of `distill.evaluation.routes.read_routes`."""
    models = [_model(name, found) for name, found in routes.items() if found.rows]
    if not models:
        return None
    left, shown, total = budget, 0, sum(len(found.rows) for found in routes.values())
    queues = [(model, iter(routes[model["name"]].rows)) for model in models]
    for step in itertools.count():
        waiting = [(model, row) for model, rows in queues if (row := next(rows, None)) is not None]
        for model, row in waiting:
            entry = _answer(model, row, answers.get((model["name"], row.prompt_id)), budget // ANSWER_SHARE)
            size = len(json.dumps(entry, ensure_ascii=False).encode())
            if size <= left or not step:
                model["answers"].append(entry)
                left, shown = left - size, shown + 1
        if not waiting:
            break
    data = {"models": models, "words": _words()}
    return {"data": data, "first": _first(models[0]), "shown": shown, "of": total}


def _words() -> dict[str, str]:
    """What the script says, in the language of the page; it fills in what stands in braces."""
    values = {name: "{" + name + "}" for name in ("n", "of", "part", "token", "layer")}
    return {
        "token": say("Token %(n)s of %(of)s (%(part)s): %(token)s – its experts and their weights", **values),
        "layer": say("layer"),
        "rank": say("expert %(n)s", **values),
        "idle": say("(computes nothing)"),
        "legend": say("Tokens of this answer by first expert, %(layer)s:", **values),
        "more": say("and %(n)s more experts", **values),
        "reference": say("correct answer: %(n)s", **values),
        "taken": say("taken as answer: %(n)s", **values),
        "left": say("%(n)s more tokens are not in this page", **values),
        **{part: called(part) for part in ("prompt", "thinking", "answer")},
    }


def _model(name: str, routes) -> dict[str, Any]:
    heaviest = max((float(row.weights.max(initial=0)) for row in routes.rows), default=0)
    scale = next((scale for scale in (100, 10, 1) if heaviest * scale <= 255), 0.1)
    return {
        "name": name,
        "title": called(name),
        "layers": layer_labels(list(routes.layers)),
        "experts": list(routes.num_experts),
        "perToken": list(routes.experts_per_token),
        "nulls": list(routes.null_experts),
        "k": max(routes.experts_per_token),
        "wide": routes.rows[0].experts.dtype.itemsize == 2,
        "scale": scale,
        "answers": [],
    }


def _answer(model: dict, row, answer: dict | None, most: int) -> dict[str, Any]:
    layers, tokens, k = row.experts.shape
    per_token = layers * k * (3 if model["wide"] else 2) * 4 / 3 + 8  # bytes in base64, and some for the text
    kept = max(16, min(tokens, int(most / per_token)))
    weights = np.clip(np.rint(row.weights[:, :kept].astype(np.float64) * model["scale"]), 0, 255)
    experts = row.experts[:, :kept].astype("<u2" if model["wide"] else np.uint8)
    runs = [[label, len(list(run))] for label, run in itertools.groupby(row.classes[:kept])]
    words = {"verdict": row.verdict, "said": called(row.verdict)} if row.verdict else {}
    words["kind"] = say(", ").join(called(name) for name in (row.family, row.level) if name)
    if answer:
        words |= {key: clip(answer[key])[:LONGEST_TEXT] for key in ("reference", "answer") if answer.get(key)}
        words["question"] = " ".join((answer.get("prompt") or "").split())[:QUESTION]
    return words | {
        "id": row.prompt_id,
        "tokens": [visible(text) for text in row.tokens[:kept]],
        "left": tokens - kept,
        "runs": runs,
        "e": _base64(experts),
        "w": _base64(weights.astype(np.uint8)),
    }


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _first(model: dict) -> dict[str, Any]:
    """What the page shows before anything is chosen: runs of (token, experts) of one answer in one layer."""
    answer = model["answers"][0]
    kind = "<u2" if model["wide"] else np.uint8
    shape = (len(model["layers"]), len(answer["tokens"]), model["k"])
    experts = np.frombuffer(base64.b64decode(answer["e"]), kind).reshape(shape)[0, :, : model["perToken"][0]]
    tokens = list(zip(answer["tokens"], experts.tolist()))
    runs, start = [], 0
    for label, length in answer["runs"]:
        runs.append((label, tokens[start : start + length]))
        start += length
    return {"model": model, "answer": answer, "runs": runs}
