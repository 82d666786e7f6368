"""The report: one self-contained HTML page that tells a class what a run did and whether it worked.

It reads the run folder and nothing else (no model, no network), and writes `report.html` beside the stages:
figures are inline SVG, style is inline, there is no script, and a content-security policy keeps it so, since
the page shows text that models wrote. The same folder gives the same bytes. What a run lacks (no control, a
dense teacher, an evaluation alone) is said on the page or left out.

    distill report recipes/demo.yaml          # or, from Python:
    build_report(Path("checkpoints/demo"))    # -> checkpoints/demo/report.html; in Chinese with "zh"
    print(summary_table(metrics))             # models x tasks in plain text

What is shown is decided here and in `distill.report.findings`; `distill.report.figures` draws; the template holds the
words and the loops, `distill.report.pages` their Chinese.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from distill.data.ledger import STAGES
from distill.report import drawing
from distill.report import figures as draw
from distill.report.drawing import expert_load
from distill.report.findings import (
    MODEL_ORDER,
    Run,
    families,
    headline,
    ordered,
    other_scores,
    read_run,
    tasks_in_order,
)
from distill.report.pages import NB, absent, called, number, page_environment, percent, say, share, speaking
from distill.storage import parts, read_table, write_atomic

PROBLEM = ["family", "level", "prompt_id"]
EXAMPLE_FAMILIES = 8


# ---- sections: each returns what the template shows


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
        title = say("loss") if name == "loss" else called(name).replace("_", " ").replace(" kl", " KL")
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
            figure = expert_load(name, {layer: values["load"] for layer, values in layers.items()})
            rows = []
            for label, values in zip(drawing.layer_labels(list(layers)), layers.values()):
                violation, floor = values.get("max_violation"), values.get("max_violation_noise_floor")
                rows.append((label, values, None if absent(violation) or not floor else violation / floor))
            found.append({"model": name, "figure": Markup(figure), "rows": rows})
    return found


def computed_in(precision: dict | None) -> str:
    """The precision of a manifest in a word or two; its reason, a sentence about the machine, stays in the manifest."""
    about = precision or {}
    name = about.get("name") or about.get("compute")
    if not name:
        return "–"
    chosen = str(about.get("reason") or "").startswith("auto:")
    return say("%(name)s, chosen for this machine", name=name) if chosen else str(name)


def examples(run: Run, hero: str, rivals: list[str]) -> dict:
    """Problems side by side, chosen by rule: per family the hardest that `hero` solved and none of `rivals`
    did (of those one that the teacher solved, then by id), and one that `hero` got wrong."""
    paths = parts(run.path / "eval" / "answers")
    right: dict[tuple, dict[str, bool]] = {}  # of the first sample of each problem, by model
    for path in paths:
        for row in read_table(path, [*PROBLEM, "model", "verdict"]).to_pylist():
            right.setdefault(_problem(row), {}).setdefault(row["model"], row["verdict"] == "correct")
    rank = {task: -position for position, task in enumerate(tasks_in_order(run.metrics))}
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
        | {"answers": [rows[key][model] for model in ordered(rows[key], MODEL_ORDER)]}
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
    """Plain text for a terminal: models x tasks, accuracy in percent with its 95 % interval; texts; the harness's."""
    head, columns = ["accuracy [95 %]"], {}
    models = ordered(metrics["models"], MODEL_ORDER)
    for task in tasks_in_order(metrics):
        columns[task] = [metrics["models"][model].get("tasks", {}).get(task) for model in models]
        counts = sorted({score["n"] for score in columns[task] if score})
        head.append(f"{task} (n={'-'.join(str(n) for n in dict.fromkeys([counts[0], counts[-1]]))})")
    cells = [[percent(score).replace(NB, " ") for score in column] for column in columns.values()]
    rows = [head, *([model, *row] for model, *row in zip(models, *cells))]
    others = [*_text_tables(metrics, models), *_harness_table(metrics, models)]
    tables = [rows] if columns or not others else []
    return "\n\n".join(map(_aligned, [*tables, *others]))


def _harness_table(metrics: dict, models: list[str]) -> list[list[list[str]]]:
    """Published tasks as the harness itself reports them: each metric with its standard error."""
    rows = []
    for model in models:
        for task, found in metrics["models"][model].get("harness", {}).get("tasks", {}).items():
            for key, value in found["metrics"].items():
                error = found["stderr"].get(key)
                shown = number(value) + (f" ± {number(error)}" if error is not None else "")
                rows.append([model, f"{task} (n={found['n']})", key.removesuffix(",none"), shown])
    return [[["lm-evaluation-harness", "task", "metric", "value"], *rows]] if rows else []


def _text_tables(metrics: dict, models: list[str]) -> list[list[list[str]]]:
    """One per text: surprise of each model and, where there is a teacher, how close it is to it."""
    texts = [name for model in models for name in metrics["models"][model].get("text", {})]
    found = []
    for text in dict.fromkeys(texts):
        rows = [[f"text: {text.replace('_', ' ')}", "nats per token"]]
        scores = [(model, metrics["models"][model].get("text", {}).get(text)) for model in models]
        close = any(score and score.get("teacher") for _, score in scores)
        rows[0] += ["KL from the teacher", "same top-1"] if close else []
        for model, score in scores:
            if score:
                said = score.get("teacher") or {}
                cells = [number(score["nll_per_token"])]
                if close:
                    cells += [
                        number(said.get("forward_kl")),
                        share(said.get("top1_agreement")).replace(NB, " "),
                    ]
                rows.append([model, *cells])
        found.append(rows)
    return found


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[position]) for row in rows) for position in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


# ---- the page


def build_report(run_dir: Path, language: str = "en") -> Path:
    """Writes `run_dir/report.html` (whole or not at all) and returns its path. `UserError` as `read_run`."""
    run = read_run(run_dir)
    with speaking(language):
        page = page_environment().get_template("report.html.j2").render(**_shown(run))
    path = run.path / "report.html"
    write_atomic(path, page)
    return path


def _shown(run: Run) -> dict:
    """What the template shows."""
    tasks = {task: run.scores(task) for task in tasks_in_order(run.metrics)}
    ks = dict.fromkeys(k for t in tasks.values() for score in t.values() for k in score.get("pass_at_k", {}))
    panels = [draw.accuracy_panel(t, scores, list(run.models)) for t, scores in tasks.items() if scores]
    counts = run.manifests.get("dataset", {}).get("counts", {}).get("dropped_by_rule", {})
    verdict = headline(run)
    weaker = [name for name in ("base", "control") if name in run.models and name != verdict.get("hero")]
    weaker = weaker or [verdict["rival"]] if "rival" in verdict else []
    return {
        "run": run,
        "name": run.path.resolve().name,
        "stages": list(STAGES),
        "models": run.models,
        "headline": verdict,
        "rules": sorted(counts.items(), key=lambda rule: (-rule[1], rule[0])),
        "panels": [Markup(panel) for panel in panels],
        "tasks": tasks,
        "ks": [k for k in ks if k != "1"],
        "families": families(run),
        **other_scores(run.models),
        "training": training(run) if run.curves else None,
        "experts": expert_tables(run),
        "precision": {stage: computed_in(m.get("precision")) for stage, m in run.manifests.items()},
        "examples": examples(run, verdict.get("hero"), weaker),
        "versions": version_rows(run),
        "routed": bool(list((run.path / "eval" / "routes").glob("*.parquet"))),
    }
