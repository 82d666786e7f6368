"""The report: one self-contained HTML page that tells a class what a run did and whether it worked.

It reads the run folder and nothing else (no model, no network), and writes `report.html` beside the stages:
figures are inline SVG, style is inline, there is no script, and a content-security policy keeps it so, since
the page shows text that models wrote. The same folder gives the same bytes. What a run lacks (no control, a
dense teacher, an evaluation alone) is said on the page or left out.

    distill report recipes/demo.yaml          # or, from Python:
    build_report(Path("checkpoints/demo"))    # -> checkpoints/demo/report.html
    print(summary_table(metrics))             # models x tasks in plain text

What is shown is decided here; `distill.report.drawing` draws and formats; the template holds the words and the loops.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from distill.data.ledger import STAGES
from distill.errors import UserError
from distill.evaluation.schema import METRICS_VERSION
from distill.report import drawing
from distill.report import figures as draw
from distill.report.numbers import NB, absent, p_value, percent, points
from distill.report.pages import page_environment
from distill.storage import parts, read_json, read_table, write_atomic

MODEL_ORDER = ["base", "control", "student", "teacher"]
TASK_ORDER = ["easy", "medium", "hard"]
_MODEL_WORDS = {
    "student": "the student",
    "base": "the base before training",
    "control": "the same base trained without the teacher",
    "teacher": "the teacher",
}
OPPOSITE = {"BETTER": "WORSE", "WORSE": "BETTER"}
PROBLEM = ["family", "level", "prompt_id"]
EXAMPLE_FAMILIES = 8


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `curves[stage]` are the rows of that stage's metrics.jsonl."""

    path: Path
    recipe: str | None
    manifests: dict[str, dict]
    metrics: dict
    curves: dict[str, list[dict]]

    @property
    def models(self) -> dict[str, dict]:
        """Models of the evaluation, those of the demo first, from weakest to strongest."""
        return {name: self.metrics["models"][name] for name in _ordered(self.metrics["models"], MODEL_ORDER)}

    def scores(self, task: str | None) -> dict[str, dict]:
        """{model: score} of those that were measured on `task`."""
        found = {name: model.get("tasks", {}).get(task) for name, model in self.models.items()}
        return {name: score for name, score in found.items() if score and not absent(score.get("accuracy"))}


def _ordered(names, first: list[str]) -> list[str]:
    """`names` without repeats, those of `first` in front in that order; the others keep theirs."""
    names = list(dict.fromkeys(names))
    return [name for name in first if name in names] + [name for name in names if name not in first]


def _tasks(metrics: dict) -> list[str]:
    return _ordered((t for m in metrics["models"].values() for t in m.get("tasks", {})), TASK_ORDER)


def _hardest(tasks: list[str]) -> str | None:
    """The last of the known levels; of tasks with other names the first."""
    return ([t for t in TASK_ORDER if t in tasks][-1:] or list(tasks)[:1] or [None])[0]


# ---- reading


def read_run(run_dir: Path) -> Run:
    """Reads a run folder. `UserError` where it or its evaluation is missing, damaged or of another schema."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is missing; make it with `distill run RECIPE run_dir={run_dir}`")
    path, fix = run_dir / "eval" / "metrics.json", f"`distill evaluate RECIPE run_dir={run_dir}`"
    if not path.is_file():
        raise UserError(f"{path} is missing; make it with {fix}")
    metrics = read_json(path)
    version = metrics.get("schema_version")
    if version != METRICS_VERSION:
        raise UserError(f"{path} has schema_version {version}, not {METRICS_VERSION}; redo it with {fix}")
    manifests = {stage: run_dir / stage / "manifest.json" for stage in STAGES}
    curves = {stage: _steps(run_dir / stage / "metrics.jsonl") for stage in ("control", "student")}
    recipe = run_dir / "recipe.yaml"
    return Run(
        path=run_dir,
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        manifests={stage: read_json(path) for stage, path in manifests.items() if path.is_file()},
        metrics=metrics,
        curves={stage: rows for stage, rows in curves.items() if rows},
    )


def _steps(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl in step order; where a resumed run wrote a step twice, the later row counts."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}); run `distill train RECIPE` again") from None
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


# ---- sections: each returns what the template shows


def _seen_from(comparisons: list[dict], model: str) -> list[dict]:
    """The comparisons of `model`, with `rival` and with difference and verdict as judgements of `model`.

    In the file both judge b against a: `difference` is b's accuracy minus a's.
    """
    seen = [{**c, "rival": c["a"]} for c in comparisons if c["b"] == model]
    for c in (c for c in comparisons if c["a"] == model):
        low, high = c["ci95"]
        turned = {"rival": c["b"], "difference": -c["difference"], "ci95": [-high, -low]}
        seen.append({**c, **turned, "verdict": OPPOSITE.get(c["verdict"], c["verdict"])})
    return seen


def headline(run: Run) -> dict:
    """The verdict in plain words: the hero (the student, else the first model judged) against its rival
    (control, else base, else any) on the hardest task they share. The evaluation judged, nothing is tested
    here. Without comparisons only `verdict`, `title`, `task` and `scores`."""
    comparisons = run.metrics.get("comparisons", [])
    hero = "student" if "student" in run.models else next((c["b"] for c in comparisons), None)
    seen = _seen_from(comparisons, hero)
    if not seen:
        task = _hardest(_tasks(run.metrics))
        title = "No verdict: this evaluation compared no models."
        return {"verdict": "NOT COMPARED", "title": title, "task": task, "scores": run.scores(task)}
    rival = _ordered((c["rival"] for c in seen), ["control", "base"])[0]
    duels = {c["task"]: c for c in seen if c["rival"] == rival}
    duels = {task: duels[task] for task in _ordered(duels, TASK_ORDER)}
    task = _hardest(list(duels))
    duel, scores = duels[task], run.scores(task)
    a, b = _MODEL_WORDS.get(hero, hero), _MODEL_WORDS.get(rival, rival)
    lead = {"BETTER": f"Better than {b}", "WORSE": f"Worse than {b}"}.get(duel["verdict"], "No clear winner")
    if (hero, rival) == ("student", "control") and duel["verdict"] in OPPOSITE:
        lead = f"Learning from the teacher {'paid off' if duel['verdict'] == 'BETTER' else 'did not pay off'}"
    said = {name: percent(score, 0) for name, score in scores.items()}
    title = f"{lead}: {a} solves {said.get(hero, '–')} of the {task} problems, {b} {said.get(rival, '–')}."
    chance = p_value(duel.get("p_value_holm", duel.get("p_value")))
    detail = f"Difference: {points(duel)}, p-value {chance}, n = {duel['n']:,} problems."
    if duel["verdict"] not in OPPOSITE:
        detail += " A difference of this size can be chance; only more problems could tell."
    notes = [
        f"Worse than {_MODEL_WORDS.get(c['rival'], c['rival'])} on {c['task']}: {points(c)}, n = {c['n']:,}"
        f"{' – training made it forget' if c['rival'] == 'base' else ''}."
        for c in seen
        if c["verdict"] == "WORSE" and c["rival"] in (rival, "base") and c is not duel
    ]
    if "teacher" in scores and hero != "teacher":
        costs = [run.models[name].get("model", {}).get("flops_per_token") for name in ("teacher", hero)]
        price = f", at {costs[0] / costs[1]:.2g} times the operations per token" if all(costs) else ""
        notes.append(f"The teacher itself solves {said['teacher']} of the {task} problems{price}.")
    if hero == "student" and "teacher" in run.models and "control" not in run.models:
        notes.append("No control was run: a gain may come from training as such, not from the teacher.")
    words = {"verdict": duel["verdict"], "title": title, "detail": detail, "notes": notes}
    return {**words, "task": task, "scores": scores, "hero": hero, "rival": rival, "duels": duels}


def families(run: Run) -> list[tuple[str, str, list]]:
    """Rows (family, level, [a score or None per model])."""
    models = [model.get("families", {}) for model in run.models.values()]
    rank = {task: position for position, task in enumerate(_tasks(run.metrics))}
    pairs = {(family, task) for model in models for family, levels in model.items() for task in levels}
    rows = sorted(pairs, key=lambda pair: (pair[0], rank.get(pair[1], len(rank)), pair[1]))
    return [(family, task, [m.get(family, {}).get(task) for m in models]) for family, task in rows]


def training(run: Run) -> dict:
    """Loss curves (the total, then each objective where there are several) and a row of numbers per model."""
    names = dict.fromkeys(o for rows in run.curves.values() for r in rows for o in r.get("objectives", {}))
    series = {"loss": {stage: [row["loss"] for row in rows] for stage, rows in run.curves.items()}}
    for name in names if len(names) > 1 else []:
        found = {s: [row.get("objectives", {}).get(name) for row in rows] for s, rows in run.curves.items()}
        series[name] = {s: v for s, v in found.items() if any(value is not None for value in v)}
    windows = {stage: max(1, len(rows) // 20) for stage, rows in run.curves.items()}
    figures, table = [], []
    for name, values in series.items():
        lines = {s: ([row["step"] for row in run.curves[s]], v) for s, v in values.items()}
        title = name.replace("_", " ").replace(" kl", " KL")
        figures.append(Markup(draw.loss_curves(title, lines, windows, list(run.models))))
    for stage, rows in run.curves.items():
        loss = np.array(series["loss"][stage], dtype=float)
        ends = draw.smooth(loss, windows[stage])[[0, -1]].tolist()
        row = {"stage": stage, "steps": len(rows), "window": windows[stage], "ends": ends}
        totals = {"tokens": sum(row["tokens"] for row in rows), "seconds": rows[-1]["seconds"]}
        table.append({**row, **totals, "not_finite": int((~np.isfinite(loss)).sum())})
    return {"figures": figures, "table": table}


def expert_tables(run: Run) -> list[dict]:
    """Heat map and rows (layer, metrics, MaxVio as a multiple of its noise floor) per MoE model."""
    found = []
    for name, model in run.models.items():
        layers = (model.get("moe") or {}).get("layers", {})
        layers = {layer: layers[layer] for layer in drawing.in_order(layers)}
        if layers:
            figure = draw.expert_load(name, {layer: values["load"] for layer, values in layers.items()})
            rows = []
            for layer, values in layers.items():
                violation, floor = values.get("max_violation"), values.get("max_violation_noise_floor")
                rows.append((layer, values, None if absent(violation) or not floor else violation / floor))
            found.append({"model": name, "figure": Markup(figure), "rows": rows})
    return found


def examples(run: Run, hero: str, rivals: list[str]) -> dict:
    """Problems side by side, chosen by rule: per family the hardest that `hero` solved and none of `rivals`
    did (of those one that the teacher solved, then by id), and one that `hero` got wrong."""
    paths = parts(run.path / "eval" / "answers")
    right: dict[tuple, dict[str, bool]] = {}  # of the first sample of each problem, by model
    for path in paths:
        for row in read_table(path, [*PROBLEM, "model", "verdict"]).to_pylist():
            right.setdefault(_problem(row), {}).setdefault(row["model"], row["verdict"] == "correct")
    rank = {task: -position for position, task in enumerate(_tasks(run.metrics))}
    order = sorted(right, key=lambda k: (k[0], rank.get(k[1], 1), not right[k].get("teacher"), k[2]))
    won: dict[str, list] = {}
    for key in order:
        if right[key].get(hero) and not any(right[key].get(name, True) for name in rivals):
            won.setdefault(key[0], []).append(key)
    lost = [key for key in order if right[key].get(hero) is False]
    lost.sort(key=lambda k: (not right[k].get("teacher"), rank.get(k[1], 1)))
    chosen = [
        ("won", keys[0], *(sum(key[:2] == keys[0][:2] for key in group) for group in (keys, order)))
        for keys in list(won.values())[:EXAMPLE_FAMILIES]
    ]
    chosen += [("lost", key, len(lost), len(order)) for key in lost[:1]]
    ids = pa.array([key[2] for _, key, _, _ in chosen], pa.string())
    rows: dict[tuple, dict[str, dict]] = {}
    for table in map(read_table, paths):
        for row in table.filter(pc.is_in(table["prompt_id"], ids)).to_pylist():
            rows.setdefault(_problem(row), {}).setdefault(row["model"], row)
    shown = [
        {"kind": kind, "family": key[0], "level": key[1], "similar": similar, "of": total}
        | {"answers": [rows[key][model] for model in _ordered(rows[key], MODEL_ORDER)]}
        for kind, key, similar, total in chosen
    ]
    left_out = max(0, len(won) - EXAMPLE_FAMILIES)
    return {"shown": shown, "problems": len(order), "families_left_out": left_out, "rivals": rivals}


def _problem(row: dict) -> tuple[str, str, str]:
    return tuple(row[column] or "" for column in PROBLEM)


def version_rows(run: Run) -> list[tuple[str, str]]:
    """(library, version); where stages differ, each version with its stages."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage, manifest in run.manifests.items():
        for library, version in manifest.get("versions", {}).items():
            found.setdefault(library, {}).setdefault(str(version), []).append(stage)
    rows = []
    for library, uses in found.items():
        said = [f"{version} ({', '.join(stages)})" for version, stages in uses.items()]
        rows.append((library, "; ".join(said if len(uses) > 1 else uses)))
    return rows


def summary_table(metrics: dict) -> str:
    """Plain text for a terminal: models x tasks, accuracy in percent with its 95 % interval; then the texts."""
    head, columns = ["accuracy [95 %]"], {}
    models = _ordered(metrics["models"], MODEL_ORDER)
    for task in _tasks(metrics):
        columns[task] = [metrics["models"][model].get("tasks", {}).get(task) for model in models]
        counts = sorted({score["n"] for score in columns[task] if score})
        head.append(f"{task} (n={'-'.join(str(n) for n in dict.fromkeys([counts[0], counts[-1]]))})")
    cells = [[percent(score).replace(NB, " ") for score in column] for column in columns.values()]
    rows = [head, *([model, *row] for model, *row in zip(models, *cells))]
    texts = _text_tables(metrics, models)
    tables = [rows] if columns or not texts else []
    return "\n\n".join(map(_aligned, [*tables, *texts]))


def _text_tables(metrics: dict, models: list[str]) -> list[list[list[str]]]:
    """One per text: surprise of each model and, where there is a teacher, how close it is to it."""
    texts = [name for model in models for name in metrics["models"][model].get("text", {})]
    found = []
    for text in dict.fromkeys(texts):
        rows = [[f"text: {text.replace('_', ' ')}", "nats per token", "KL from the teacher", "same top-1"]]
        for model in models:
            if score := metrics["models"][model].get("text", {}).get(text):
                close = score.get("teacher") or {}
                values = [score["nll_per_token"], close.get("forward_kl")]
                cells = ["-" if value is None else f"{value:.3f}" for value in values]
                same = close.get("top1_agreement")
                rows.append([model, *cells, "-" if same is None else f"{same:.1%}"])
        found.append(rows)
    return found


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[position]) for row in rows) for position in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


# ---- the page


def build_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` (whole or not at all) and returns its path. `UserError` as `read_run`."""
    run = read_run(run_dir)
    tasks = {task: run.scores(task) for task in _tasks(run.metrics)}
    ks = dict.fromkeys(k for t in tasks.values() for score in t.values() for k in score.get("pass_at_k", {}))
    panels = [draw.accuracy_panel(t, scores, list(run.models)) for t, scores in tasks.items() if scores]
    counts = run.manifests.get("dataset", {}).get("counts", {}).get("dropped_by_rule", {})
    verdict = headline(run)
    weaker = [name for name in ("base", "control") if name in run.models and name != verdict.get("hero")]
    weaker = weaker or [verdict["rival"]] if "rival" in verdict else []
    template = page_environment().get_template("report.html.j2")
    page = template.render(
        run=run,
        name=run.path.resolve().name,
        stages=list(STAGES),
        models=run.models,
        headline=verdict,
        rules=sorted(counts.items(), key=lambda rule: (-rule[1], rule[0])),
        panels=[Markup(panel) for panel in panels],
        tasks=tasks,
        ks=[k for k in ks if k != "1"],
        families=families(run),
        training=training(run) if run.curves else None,
        experts=expert_tables(run),
        examples=examples(run, verdict.get("hero"), weaker),
        versions=version_rows(run),
    )
    path = run.path / "report.html"
    write_atomic(path, page)
    return path
