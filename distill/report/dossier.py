"""The dossier: one self-contained HTML page with all that was measured about one or several checkpoints.

What the answer viewer of the dossier shows: which experts each token of a few answers went to.

    view = viewer_data(routes, answers, budget=900_000)      # {model: Routes}, {(model, prompt_id): row}
    view["data"]        # goes into the page as JSON; templates/viewer.js shows it
    view["first"]       # the first answer in its first layer, for readers without JavaScript

Experts and weights travel as base64 of whole bytes: experts as they are, weights times `scale`, rounded (two
decimals wherever they are below 2.56). A budget in bytes bounds the page: answers are taken from all models in
turn until it is spent, and a long answer keeps its first tokens; the page says how many are left out.

Shapes: L routed layers, T tokens of one answer, k experts per token.

It reads an evaluated folder and nothing else: metrics.json (distill/evaluation/schema.py), manifest.json, answers/
and routes/ (distill/evaluation/routes.py). What was not measured is left out. Figures are inline SVG, style and
script are inline; a content-security policy admits that one script by its hash and nothing else, since the page
shows text that models wrote. The script turns the leaves of the answer viewer and sorts tables: without it the page is
whole.

    build_dossier(Path("checkpoints/eval-student"))          # -> checkpoints/eval-student/dossier.html
    build_dossier(folder, "zh")                              # in Chinese

What is shown is decided here, in `distill.report.findings`, `experts` and `viewer`; `figures` and `heat` draw; the
templates hold the words, `distill.report.pages` their Chinese. The same folder gives the same bytes.
"""

import base64
import datetime
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from distill.errors import UserError
from distill.evaluation.routes import read_routes
from distill.evaluation.schema import METRICS_VERSION
from distill.report import figures as draw
from distill.report.drawing import layer_labels
from distill.report.experts import changes_view, moe_view, precision_view
from distill.report.findings import Run, families, findings, headline, other_scores
from distill.report.pages import (
    LONGEST_TEXT,
    TEMPLATES,
    absent,
    called,
    clip,
    page_environment,
    say,
    speaking,
    visible,
)
from distill.storage import parts, read_json, read_table, verify_folder, write_atomic

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


# ==== The dossier ====

VIEWER_BYTES = 900_000  # of token text, experts and weights in the page
PAIRS_DRAWN = 12  # per task; the table has all


@dataclass(frozen=True)
class Evaluation:
    """An evaluated folder. `run` is its metrics as the report sees them."""

    path: Path
    run: Run
    manifest: dict

    @property
    def metrics(self) -> dict:
        return self.run.metrics

    @property
    def models(self) -> dict[str, dict]:
        return self.run.models


# ---- reading


def read_evaluation(out_dir: Path) -> Evaluation:
    """`UserError` where metrics.json is missing, damaged or of another version."""
    out_dir = Path(out_dir)
    path, fix = out_dir / "metrics.json", "make it with `distill evaluate`"
    if not path.is_file():
        raise UserError(f"{path} is missing; {fix}")
    metrics = read_json(path)
    if metrics.get("schema_version") != METRICS_VERSION:
        found = metrics.get("schema_version")
        raise UserError(f"{path} has schema_version {found}, not {METRICS_VERSION}; {fix} --redo")
    manifest = out_dir / "manifest.json"
    run = Run(path=out_dir, recipe=None, manifests={}, metrics=metrics, curves={})
    return Evaluation(out_dir, run, read_json(manifest) if manifest.is_file() else {})


def _routes(folder: Path, models: dict) -> dict[str, Any]:
    """{model: Routes} of the routed models, in the order of the page."""
    paths = {name: folder / f"{name}.parquet" for name in models}
    return {name: read_routes(path) for name, path in paths.items() if path.is_file()}


def _answers(folder: Path, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], dict]:
    """The first answer of each wanted (model, prompt_id)."""
    found: dict[tuple[str, str], dict] = {}
    for path in parts(folder) if wanted else []:
        for row in read_table(path, ["model", "prompt_id", "prompt", "reference", "answer"]).to_pylist():
            key = (row["model"], row["prompt_id"])
            if key in wanted:
                found.setdefault(key, row)
    return found


# ---- sections: each returns what the template shows


def tasks_of(evaluation: Evaluation) -> dict[str, dict[str, dict]]:
    """{task: {model: score}} of what was measured."""
    names = dict.fromkeys(task for model in evaluation.models.values() for task in model.get("tasks", {}))
    return {task: scores for task in names if (scores := evaluation.run.scores(task))}


def verdicts(evaluation: Evaluation) -> dict[str, Any]:
    """A figure per task, the rows, and how p was corrected."""
    rows = evaluation.metrics.get("comparisons") or []
    by_task: dict[str, list] = {}
    for row in rows:
        if not absent(row.get("difference")) and row.get("ci95"):
            by_task.setdefault(row["task"], []).append(row)
    figures = [Markup(draw.verdict_panel(task, pairs[:PAIRS_DRAWN])) for task, pairs in by_task.items()]
    return {"rows": rows, "figures": figures}


def family_figures(evaluation: Evaluation) -> list[Markup]:
    """A panel per task with the dots of every family and model."""
    panels: dict[str, dict[str, dict]] = {}
    for family, task, scores in families(evaluation.run):
        found = {n: s for n, s in zip(evaluation.models, scores) if s and not absent(s.get("accuracy"))}
        if found:
            panels.setdefault(task, {})[family] = found
    order = list(evaluation.models)
    return [
        Markup(draw.family_panel(task, panels[task], order))
        for task in tasks_of(evaluation)
        if task in panels
    ]


def calibration(evaluation: Evaluation) -> dict[str, Any] | None:
    """Reliability of tokens and of whole answers, with every model that has it in one figure."""
    blocks = {
        name: model["calibration"] for name, model in evaluation.models.items() if model.get("calibration")
    }
    kinds = {
        say("next tokens"): {n: b for n, b in blocks.items() if b.get("bins")},
        say("whole answers"): {
            n: b["answers"] for n, b in blocks.items() if (b.get("answers") or {}).get("bins")
        },
    }
    order = list(evaluation.models)
    figures = [
        Markup(draw.reliability(title, drawable, order))
        for title, found in kinds.items()
        if (
            drawable := {
                n: b for n, b in found.items() if not absent(b.get("ece")) and not absent(b.get("brier"))
            }
        )
    ]
    return {"blocks": blocks, "figures": figures} if blocks else None


def fidelity_rows(evaluation: Evaluation) -> list[tuple[str, str, dict]]:
    """Rows (model, whose text, agreement)."""
    rows = []
    for name, model in evaluation.models.items():
        if close := model.get("fidelity"):
            rows.append((name, say("the teacher's text"), close))
            rows += [(name, say("its own text"), close["own_text"])] if close.get("own_text") else []
    return rows


def _script() -> tuple[Markup, str]:
    """The page's script and the policy's word for it: exactly these bytes may run."""
    script = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("tables.js", "viewer.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Markup(script), f"'sha256-{digest}'"


# ---- the page


def build_dossier(out_dir: Path, language: str = "en") -> Path:
    """Writes `out_dir/dossier.html` (whole or not at all) and returns its path. `UserError` as `read_evaluation`."""
    verify_folder(out_dir)
    evaluation = read_evaluation(out_dir)
    with speaking(language):
        page = page_environment().get_template("dossier.html.j2").render(**_shown(evaluation))
    path = evaluation.path / "dossier.html"
    write_atomic(path, page)
    return path


def _shown(evaluation: Evaluation) -> dict[str, Any]:
    """What the template shows."""
    models = evaluation.models
    tasks = tasks_of(evaluation)
    experts = [view for name, model in models.items() if (view := moe_view(name, model))]
    routes = _routes(evaluation.path / "routes", models)
    wanted = {(name, row.prompt_id) for name, found in routes.items() for row in found.rows}
    answers = _answers(evaluation.path / "answers", wanted)
    script, policy = _script()
    written = datetime.datetime.fromtimestamp(
        (evaluation.path / "metrics.json").stat().st_mtime, datetime.UTC
    )
    scores = [score for found in tasks.values() for score in found.values()]
    verdict = headline(evaluation.run)
    return {
        "name": evaluation.path.resolve().name,
        "metrics": evaluation.metrics,
        "manifest": evaluation.manifest,
        "written": written.date().isoformat(),
        "models": models,
        "headline": verdict,
        **findings(evaluation.run, verdict, experts),
        "tasks": tasks,
        "panels": [Markup(draw.accuracy_panel(task, found, list(models))) for task, found in tasks.items()],
        "ks": sorted({k for s in scores for k in s.get("pass_at_k") or {} if k != "1"}, key=int),
        "votes": sorted({k for s in scores for k in s.get("majority_at_k") or {}}, key=int),
        "verdicts": verdicts(evaluation),
        "family_figures": family_figures(evaluation),
        "families": families(evaluation.run),
        "experts": experts,
        "changes": [view for name, model in models.items() if (view := changes_view(name, model))],
        "precisions": [view for name, model in models.items() if (view := precision_view(name, model))],
        "calibration": calibration(evaluation),
        "few": draw.FEW_ANSWERS,
        "fidelity": fidelity_rows(evaluation),
        **other_scores(evaluation.models),
        "viewer": viewer_data(routes, answers, VIEWER_BYTES),
        "report": (evaluation.path.parent / "report.html").is_file(),
        "script": script,
        "policy": policy,
    }
