"""A finished run folder as the pages read it: manifests, metrics, loss curves; models and tasks in a fixed order.

run = read_run(Path("checkpoints/demo"))
run.models, run.scores("hard"), run.curves["student"]
"""

import json
from dataclasses import dataclass
from pathlib import Path

from distill.data.ledger import STAGES
from distill.errors import UserError
from distill.evaluation.schema import METRICS_VERSION
from distill.files import like_it
from distill.integrity import unsealed, verify_folder
from distill.report.numbers import absent
from distill.report.words import say
from distill.storage import read_json

MODEL_ORDER = ["base", "control", "student", "teacher"]
TASK_ORDER = ["easy", "medium", "hard"]


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
        return {name: self.metrics["models"][name] for name in ordered(self.metrics["models"], MODEL_ORDER)}

    def scores(self, task: str | None) -> dict[str, dict]:
        """{model: score} of those that were measured on `task`."""
        found = {name: model.get("tasks", {}).get(task) for name, model in self.models.items()}
        return {name: score for name, score in found.items() if score and not absent(score.get("accuracy"))}


def ordered(names, first: list[str]) -> list[str]:
    """`names` without repeats, those of `first` in front in that order; the others keep theirs."""
    names = list(dict.fromkeys(names))
    return [name for name in first if name in names] + [name for name in names if name not in first]


def tasks_in_order(metrics: dict) -> list[str]:
    return ordered((t for m in metrics["models"].values() for t in m.get("tasks", {})), TASK_ORDER)


def hardest(tasks: list[str]) -> str | None:
    """The last of the known levels; of tasks with other names the first."""
    return ([t for t in TASK_ORDER if t in tasks][-1:] or list(tasks)[:1] or [None])[0]


# ---- reading


def read_run(run_dir: Path) -> Run:
    """Reads a run folder. `UserError` where it or its evaluation is missing, damaged or of another schema."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(
            f"{run_dir} is missing{like_it(run_dir)}; make it with `distill run RECIPE run_dir={run_dir}`"
        )
    path, fix = run_dir / "eval" / "metrics.json", f"`distill evaluate RECIPE run_dir={run_dir}`"
    if not path.is_file():
        raise UserError(f"{path} is missing; make it with {fix}")
    metrics = read_json(path)
    for stage in (*STAGES, "eval"):
        verify_folder(run_dir / stage, but=".safetensors")
    version = metrics.get("schema_version")
    if version != METRICS_VERSION:
        raise UserError(f"{path} has schema_version {version}, not {METRICS_VERSION}; redo it with {fix}")
    manifests = {stage: run_dir / stage / "manifest.json" for stage in STAGES}
    curves = {stage: _steps(run_dir / stage / "metrics.jsonl") for stage in ("control", "student")}
    recipe = run_dir / "recipe.yaml"
    return Run(
        path=run_dir,
        recipe=unsealed(recipe.read_text(encoding="utf-8"))[0] if recipe.is_file() else None,
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


def families(run: Run) -> list[tuple[str, str, list]]:
    """Rows (family, level, [a score or None per model])."""
    models = [model.get("families", {}) for model in run.models.values()]
    rank = {task: position for position, task in enumerate(tasks_in_order(run.metrics))}
    pairs = {(family, task) for model in models for family, levels in model.items() for task in levels}
    rows = sorted(pairs, key=lambda pair: (pair[0], rank.get(pair[1], len(rank)), pair[1]))
    return [(family, task, [m.get(family, {}).get(task) for m in models]) for family, task in rows]


def other_scores(models: dict[str, dict]) -> dict[str, list[tuple]]:
    """Rows of the tables beside the written answers, sorted by task, then in the order of the models."""
    rows: dict[str, list[tuple]] = {"likelihoods": [], "texts": [], "harness": []}
    for name, model in models.items():
        rows["likelihoods"] += [
            (t, name, s) for t, found in (model.get("likelihood") or {}).items() for s in found
        ]
        rows["texts"] += [(file, name, score) for file, score in (model.get("text") or {}).items()]
        for task, found in ((model.get("harness") or {}).get("tasks") or {}).items():
            errors = found.get("stderr") or {}
            rows["harness"] += [
                (task, name, _metric(m), v, errors.get(m), found) for m, v in found["metrics"].items()
            ]
    return {kind: sorted(found, key=lambda row: row[0]) for kind, found in rows.items()}


def _metric(key: str) -> str:
    """`acc,none` as people say it: accuracy; a filter of the harness stands in brackets."""
    name, _, how = key.partition(",")
    said = {"acc": say("accuracy"), "acc_norm": say("accuracy by length"), "exact_match": say("exact match")}
    return said.get(name, name.replace("_", " ")) + (f" ({how})" if how not in ("", "none") else "")
